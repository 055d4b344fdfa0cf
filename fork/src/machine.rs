//! The VM of a child, wherever it lives: in this process, or in a worker.

use crate::error::Error;
use crate::stats::{self, ChildStats};
use crate::worker::Remote;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use vmm::{
    Capture, CaptureCost, CaptureSpec, Console, Event, EventSink, Image, Moment, Timeline, Vm,
    VmState,
};

/// What a VM tells its owner. A guest makes at most one of each kind until it is
/// resumed (see [`vmm::EventSink`]).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum News {
    /// The guest is at its fork point.
    ForkPoint { version: u64 },
    /// The guest has applied the identity of this generation.
    IdentityApplied {
        generation: u64,
        entered: Moment,
        at: Moment,
    },
    /// The guest's kernel has taken the identity of this generation, by the interrupt.
    IdentityTaken { generation: u64 },
    /// A guest without Linux has answered.
    Answer {
        value: u64,
        entered: Moment,
        at: Moment,
    },
    /// The guest has ended: how, with its last words.
    Dead(String),
}

impl News {
    /// Of an event of `vm`, whose console explains a death.
    pub(crate) fn of(event: &Event, console: impl FnOnce() -> Vec<String>) -> Self {
        let ended = |how: &str| {
            // A panic is followed by registers and traces: more than a screen.
            let words = last_words(console());
            if words.is_empty() {
                format!("{how}; its console is empty")
            } else {
                format!("{how}; its last words: {}", words.join(" | "))
            }
        };
        match event {
            Event::ForkPoint { version, .. } => Self::ForkPoint { version: *version },
            Event::IdentityApplied {
                generation,
                entered,
                at,
            } => Self::IdentityApplied {
                generation: *generation,
                entered: *entered,
                at: *at,
            },
            Event::IdentityTaken { generation } => Self::IdentityTaken {
                generation: *generation,
            },
            Event::Answer { value, entered, at } => Self::Answer {
                value: *value,
                entered: *entered,
                at: *at,
            },
            Event::BootFailed(line) => Self::Dead(line.clone()),
            Event::PowerOff => Self::Dead(ended("it powered off")),
            Event::Reset => Self::Dead(ended("it reset itself")),
            Event::Failed(reason) => Self::Dead(ended(reason)),
        }
    }
}

/// How many lines of the console are looked at for last words.
pub(crate) const CONSOLE_LINES: usize = 200;

/// Five lines: those that end with the line in which the kernel says why it gave
/// up, or else the last.
pub(crate) fn last_words(mut lines: Vec<String>) -> Vec<String> {
    const PANIC: &str = "Kernel panic - not syncing";
    if let Some(at) = lines.iter().position(|line| line.contains(PANIC)) {
        lines.truncate(at + 1);
    }
    lines.split_off(lines.len().saturating_sub(5))
}

/// Where the events of a VM in this process arrive: a queue, and a descriptor
/// that is readable when there is something in it.
#[derive(Debug)]
pub(crate) struct Mailbox {
    news: Mutex<VecDeque<News>>,
    bell: OwnedFd,
}

impl Mailbox {
    pub(crate) fn new() -> io::Result<Arc<Self>> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        Ok(Arc::new(Self {
            news: Mutex::default(),
            bell: eventfd(0, flags)?,
        }))
    }

    /// For a VM with this console.
    pub(crate) fn sink(self: &Arc<Self>, console: Console) -> EventSink {
        let mailbox = Arc::clone(self);
        Arc::new(move |event| {
            let news = News::of(&event, || console.tail(CONSOLE_LINES));
            mailbox.lock().push_back(news);
            // The counter cannot overflow: a guest makes few events.
            if let Err(error) = rustix::io::write(&mailbox.bell, &1_u64.to_ne_bytes()) {
                log::error!("an event of a virtual machine is late: {error}");
            }
        })
    }

    fn take(&self) -> Option<News> {
        let mut waiting = self.lock();
        let news = waiting.pop_front();
        if news.is_none() {
            // Under the lock: nothing has come since. An empty counter is no error.
            rustix::io::read(&self.bell, &mut [0; 8]).ok();
        }
        news
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<News>> {
        self.news.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AsFd for Mailbox {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}

/// A VM in this process.
#[derive(Debug)]
pub(crate) struct Local {
    pub(crate) vm: Vm,
    /// What its memory was when it was last captured, or forked.
    pub(crate) image: Image,
    pub(crate) mailbox: Arc<Mailbox>,
}

/// A VM.
#[derive(Debug)]
pub(crate) enum Machine {
    /// In this process.
    Here(Box<Local>),
    /// In a process of its own.
    Worker(Remote),
}

/// A picture that is being taken, and where.
#[derive(Debug)]
pub(crate) enum Capturing {
    Here { so_far: Image, capture: Capture },
    Worker { so_far: Image, layer: File },
}

impl Capturing {
    /// See [`Capture::so_far`].
    pub(crate) fn so_far(&self) -> &Image {
        match self {
            Self::Here { so_far, .. } | Self::Worker { so_far, .. } => so_far,
        }
    }
}

impl Machine {
    /// What it has told and nobody has heard yet.
    pub(crate) fn news(&mut self) -> Option<News> {
        match self {
            Self::Here(local) => local.mailbox.take(),
            Self::Worker(remote) => remote.news(),
        }
    }

    /// Readable when there may be news.
    pub(crate) fn bell(&self) -> BorrowedFd<'_> {
        match self {
            Self::Here(local) => local.mailbox.as_fd(),
            Self::Worker(remote) => remote.as_fd(),
        }
    }

    /// See [`Vm::connect`].
    pub(crate) fn connect(&mut self, port: u32) -> Result<UnixStream, Error> {
        match self {
            Self::Here(local) => local
                .vm
                .connect(port)
                .map_err(|e| Error::Died(format!("cannot connect to the agent: {e}"))),
            Self::Worker(remote) => remote.connect(port),
        }
    }

    /// Stops all vCPUs.
    pub(crate) fn pause(&mut self) -> Result<(), Error> {
        match self {
            Self::Here(local) => Ok(local.vm.pause()?),
            Self::Worker(remote) => remote.pause(),
        }
    }

    /// Lets a VM go on that was held or paused.
    pub(crate) fn resume(&mut self) -> Result<(), Error> {
        match self {
            Self::Here(local) => Ok(local.vm.resume()?),
            Self::Worker(remote) => remote.resume(),
        }
    }

    /// Stops it, and lets it go on as somebody else: see [`Vm::renew`].
    pub(crate) fn renew(&mut self, page: &[u8]) -> Result<(), Error> {
        match self {
            Self::Here(local) => {
                local.vm.pause()?;
                local.vm.renew(page)?;
                Ok(local.vm.resume()?)
            }
            Self::Worker(remote) => remote.renew(page),
        }
    }

    /// See [`Vm::replace_layers`].
    pub(crate) fn replace_layers(&mut self, count: usize, merged: File) -> Result<(), Error> {
        match self {
            Self::Here(local) => Ok(local.vm.replace_layers(count, merged)?),
            Self::Worker(remote) => remote.replace_layers(count, &merged),
        }
    }

    /// The end of what its console says; empty where nobody can say.
    pub(crate) fn console_tail(&mut self) -> Vec<String> {
        last_words(match self {
            Self::Here(local) => local.vm.console_tail(CONSOLE_LINES),
            Self::Worker(remote) => remote.last_words().unwrap_or_default(),
        })
    }

    pub(crate) fn timeline(&self) -> Timeline {
        match self {
            Self::Here(local) => local.vm.timeline(),
            Self::Worker(remote) => remote.timeline(),
        }
    }

    pub(crate) fn stats(&self) -> Result<ChildStats, Error> {
        let root_image = self.root_image();
        match self {
            Self::Here(local) => stats::of_mappings(&local.vm.mappings(), root_image),
            Self::Worker(remote) => stats::of_process(remote.pid(), remote.mappings(), root_image),
        }
    }

    /// Where its memory lies in this process.
    pub(crate) fn mappings(&self) -> Vec<(u64, u64)> {
        match self {
            Self::Here(local) => local.vm.mappings(),
            Self::Worker(_) => Vec::new(),
        }
    }

    /// Where the root image lies in its process, if it is mapped into the guest.
    pub(crate) fn root_image(&self) -> Option<(u64, u64)> {
        match self {
            Self::Here(local) => local.vm.root_image(),
            Self::Worker(remote) => remote.root_image(),
        }
    }

    /// What its memory was when it was last captured, or forked.
    pub(crate) fn image(&self) -> Result<Image, Error> {
        match self {
            Self::Here(local) => Ok(local.image.clone()),
            Self::Worker(remote) => remote.image().cloned(),
        }
    }

    /// The same memory in other files, for those that are forked from now on.
    pub(crate) fn set_image(&mut self, image: Image) {
        match self {
            Self::Here(local) => local.image = image,
            Self::Worker(remote) => remote.set_image(image),
        }
    }

    /// See [`Vm::begin_capture`] and, of a guest with Linux, [`Vm::check_kernel`].
    pub(crate) fn begin_capture(&mut self, has_kernel: bool) -> Result<Capturing, Error> {
        match self {
            Self::Here(local) => {
                if has_kernel {
                    local.vm.check_kernel()?;
                }
                let capture = local.vm.begin_capture()?;
                let so_far = capture.so_far(&local.image);
                Ok(Capturing::Here { so_far, capture })
            }
            Self::Worker(remote) => {
                let (so_far, layer) = remote.begin_capture(has_kernel)?;
                Ok(Capturing::Worker { so_far, layer })
            }
        }
    }

    /// See [`Vm::finish_capture`].
    pub(crate) fn finish_capture(
        &mut self,
        capturing: Capturing,
        spec: CaptureSpec,
    ) -> Result<(Image, VmState, CaptureCost), Error> {
        match (self, capturing) {
            (Self::Here(local), Capturing::Here { capture, .. }) => {
                let captured = local.vm.finish_capture(capture, spec)?;
                local.image = captured.image(&local.image);
                Ok((local.image.clone(), captured.state, captured.cost))
            }
            (Self::Worker(remote), Capturing::Worker { layer, .. }) => {
                remote.finish_capture(layer, &spec)
            }
            _ => Err(Error::State("is not where it was captured")),
        }
    }

    /// Stops a VM that is at its fork point, and takes what is left of it.
    pub(crate) fn freeze(self) -> Result<(Image, VmState), Error> {
        match self {
            Self::Here(local) => {
                local.vm.pause()?;
                Ok(local.vm.freeze()?)
            }
            Self::Worker(remote) => remote.freeze(),
        }
    }

    /// Ends it, and waits until it is gone.
    pub(crate) fn end(self) {
        match self {
            Self::Here(local) => local.vm.end(),
            Self::Worker(remote) => remote.end(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_words_end_with_the_reason() {
        let lines = |text: &str| text.split(' ').map(String::from).collect::<Vec<_>>();
        assert_eq!(last_words(lines("a b c d e f")), lines("b c d e f"));
        assert_eq!(last_words(lines("a")), ["a"]);
        assert!(last_words(Vec::new()).is_empty());
        let panic = "[ 1.0] Kernel panic - not syncing: it is late".to_owned();
        let mut said = lines("a b");
        said.push(panic.clone());
        said.extend(lines("c d e f g h"));
        assert_eq!(last_words(said), ["a".to_owned(), "b".to_owned(), panic]);
    }

    #[test]
    fn the_bell_rings_while_there_is_news() {
        let mailbox = Mailbox::new().expect("an eventfd");
        let sink = mailbox.sink(Console::new());
        sink(Event::PowerOff);
        sink(Event::Reset);
        let dead = |how: &str| Some(News::Dead(format!("{how}; its console is empty")));
        assert_eq!(mailbox.take(), dead("it powered off"));
        let mut count = [0; 8];
        assert_eq!(mailbox.take(), dead("it reset itself"));
        assert_eq!(mailbox.take(), None);
        assert!(
            rustix::io::read(mailbox.as_fd(), &mut count).is_err(),
            "quiet"
        );
    }
}
