//! The fork of a VM that runs: a picture of it at one instant, which it hardly notices.
//!
//! ```text
//!   source    runs ........................ | stopped            | runs on
//!   caller    pages copied, and those again | state, last pages  | children, elsewhere
//!             that were written meanwhile   |
//! ```
//! What has to be copied are the pages that the source has of its own: at its first
//! capture those that the page map shows, later those that it has written since the last.
//! KVM logs what the guest writes and `devices::WriteLog` what the monitor does. Looking
//! for pages costs milliseconds for each gibibyte, and copying one some 3 µs, so neither
//! happens while the source is stopped; the two logs name what is left then in a tenth of
//! a millisecond. The layer that holds the copies is a file that is only ever written with
//! write(2), never mapped writable, so it can be sealed at once.
//!
//! The source keeps its pages: for it nothing has changed. Nor does it matter to it if a
//! capture fails; what had been read from the logs is kept for the next.

use crate::error::Error;
use crate::machine::{UNCOVERED, lock};
use crate::memory::{
    Image, Layer, PageSet, Ram, Run, memory_file, punch, seal_unmapped, take_news,
};
use crate::moment::Moment;
use crate::reaper::Parts;
use crate::vm::{Vm, VmState};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// So few pages are left for when the source is stopped: a tenth of a millisecond's copy.
const FEW: u64 = 32;

/// A source that writes faster than it is copied is stopped after so many rounds.
const ROUNDS_MAX: u32 = 12;

/// The most runs of pages that a layer begins with. Each is a mapping of each child, and a
/// process has 65530 (Linux vm.max_map_count), for all layers of an image.
const RUNS_MAX: usize = 16 << 10;

const NOT_FORKED: &str = "booted and not forked: freeze it first";

/// What is known of a VM's memory since it was last captured.
#[derive(Debug)]
pub(crate) struct Trail {
    /// What has changed since, as far as the logs were read.
    news: News,
    /// How often it was captured.
    captures: u64,
}

/// What has changed of a memory. No page is in both.
#[derive(Debug)]
struct News {
    /// Given back: zeroes.
    blank: PageSet,
    written: PageSet,
}

/// A picture that is being taken.
#[derive(Debug)]
pub struct Capture {
    captures: u64,
    layer: Layer,
    cost: CaptureCost,
}

/// How a picture of a VM is taken, and what its devices are given then.
#[derive(Debug, Default)]
pub struct CaptureSpec {
    /// A fresh overlay for its writable disk
    /// ([`devices::virtio::block::format_overlay`]), if it has one: what it writes from
    /// then on goes there, and what was there is shared with those who are made of the
    /// picture.
    pub overlay: Option<File>,
    /// For the server of its volumes, if it has one: see
    /// [`Fs::claim`](devices::virtio::fs::Fs::claim).
    pub claim: Option<OwnedFd>,
    /// Whether it is paused, and stays so.
    pub stays_paused: bool,
}

/// A picture of a VM at one instant.
#[derive(Debug)]
pub struct Captured {
    /// What it has written of its memory, or given back, since it was last captured or,
    /// before that, forked.
    layer: Layer,
    /// All the rest of it.
    pub state: VmState,
    /// What it took.
    pub cost: CaptureCost,
}

/// When a capture had come how far, and what was copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CaptureCost {
    /// It was asked for.
    pub asked: Moment,
    /// The source was told to stop.
    pub stopping: Moment,
    /// All of its vCPUs had.
    pub stopped: Moment,
    /// The states of vCPUs and devices were read.
    pub saved: Moment,
    /// They were let go on.
    pub resumed: Moment,
    /// How often pages were copied while it ran.
    pub rounds: u32,
    /// How many pages were, some more than once.
    pub copied_running: u64,
    /// How many were copied while it was stopped.
    pub copied_stopped: u64,
    /// How many pages the layer has.
    pub pages: u64,
}

impl Vm {
    /// Begins a picture of a VM that runs: copies what it has written, once.
    ///
    /// # Errors
    /// A VM that was booted and not forked, or what the system says. The VM runs on.
    pub fn begin_capture(&self) -> Result<Capture, Error> {
        let asked = Moment::now();
        let parts = self.parts()?;
        let mut trail = lock(&self.trail);
        let trail = match &mut *trail {
            Some(trail) => trail,
            none => none.insert(begin(parts, self.pagemap())?),
        };
        let bytes = parts.kvm.ram.bytes();
        let mut capture = Capture {
            captures: trail.captures,
            layer: Layer {
                file: Arc::new(memory_file(bytes)?),
                pages: PageSet::none_of(bytes),
            },
            cost: CaptureCost {
                asked,
                stopping: asked,
                stopped: asked,
                saved: asked,
                resumed: asked,
                rounds: 1,
                copied_running: 0,
                copied_stopped: 0,
                pages: 0,
            },
        };
        trail.read_logs(parts)?;
        // What was not written is what it was before: copied too, it does no harm.
        let mut first = trail.news.written.clone();
        first.widen(RUNS_MAX);
        capture.cost.copied_running = first.count();
        capture.layer.pages.add(&trail.news.blank);
        capture.copy(&parts.kvm.ram, &first)?;
        Ok(capture)
    }

    /// Takes the picture, wherever the vCPUs are: at one instant, as soon as little is left
    /// to copy. The VM goes on when this returns, unless it is to stay paused.
    ///
    /// # Errors
    /// Another picture was taken since this was begun, or what the system says. The VM
    /// runs on, unless the error is that it cannot.
    pub fn finish_capture(&self, capture: Capture, spec: CaptureSpec) -> Result<Captured, Error> {
        self.finish_watched(capture, spec, |_| {})
    }

    /// The same; `watch` sees the memory while nobody writes it.
    fn finish_watched(
        &self,
        mut capture: Capture,
        spec: CaptureSpec,
        watch: impl FnOnce(&Ram),
    ) -> Result<Captured, Error> {
        let parts = self.parts()?;
        let ram = &parts.kvm.ram;
        let stays_paused = spec.stays_paused;
        if parts.devices.writable().is_some() != spec.overlay.is_some() {
            return Err(Error::Phase(UNCOVERED));
        }
        let mut trail = lock(&self.trail);
        let trail = trail.as_mut().filter(|it| it.captures == capture.captures);
        let trail = trail.ok_or(Error::Phase("captured by somebody else meanwhile"))?;
        while capture.cost.rounds < ROUNDS_MAX {
            let copied = capture.catch_up(ram, &trail.read_logs(parts)?)?;
            capture.cost.rounds += 1;
            capture.cost.copied_running += copied;
            if copied <= FEW {
                break;
            }
        }
        capture.cost.stopping = Moment::now();
        let stopped = self.pause().and_then(|()| {
            capture.cost.stopped = Moment::now();
            stopped(parts, trail, &mut capture, spec, watch)
        });
        if !stays_paused {
            // Also what could not be stopped as a whole.
            self.resume()?;
        }
        capture.cost.resumed = Moment::now();
        let state = stopped?;
        let Capture {
            layer, mut cost, ..
        } = capture;
        cost.pages = layer.pages.count();
        seal_unmapped(&layer.file)?;
        *trail = Trail {
            news: News::none_of(ram.bytes()),
            captures: trail.captures + 1,
        };
        Ok(Captured { layer, state, cost })
    }
}

/// Begins to log what a VM writes, and finds what it has written so far.
fn begin(parts: &Parts, pagemap: &File) -> Result<Trail, Error> {
    let ram = &parts.kvm.ram;
    if ram.image().is_none() {
        return Err(Error::Phase(NOT_FORKED));
    }
    // The log first: what is written while we look is in it. And what was given back
    // before: that is its own where it was written since.
    parts.kvm.log_writes()?;
    let mut news = News::none_of(ram.bytes());
    take_news(&mut ram.blanks().lock(), &mut news.blank);
    news.written = ram.own_pages(pagemap)?;
    news.blank.remove(&news.written);
    Ok(Trail { news, captures: 0 })
}

/// What is done while the source is stopped.
fn stopped(
    parts: &Parts,
    trail: &mut Trail,
    capture: &mut Capture,
    spec: CaptureSpec,
    watch: impl FnOnce(&Ram),
) -> Result<VmState, Error> {
    let mut devices = parts.devices.hold();
    let state = Vm::save(parts, &devices)?;
    capture.cost.saved = Moment::now();
    // After the vCPUs were read: KVM writes guest memory when one is put aside (steal
    // time, arch/x86/kvm/x86.c).
    let last = trail.read_logs(parts)?;
    capture.cost.copied_stopped = capture.catch_up(&parts.kvm.ram, &last)?;
    devices.claim(spec.claim)?;
    devices.cover(spec.overlay)?;
    watch(&parts.kvm.ram);
    Ok(state)
}

impl News {
    fn none_of(bytes: u64) -> Self {
        Self {
            blank: PageSet::none_of(bytes),
            written: PageSet::none_of(bytes),
        }
    }

    /// What there is when this is followed by `later`.
    fn add(&mut self, later: &Self) {
        self.written.remove(&later.blank);
        self.written.add(&later.written);
        self.blank.add(&later.blank);
        self.blank.remove(&later.written);
    }
}

impl Trail {
    /// What has changed since the logs were last read.
    fn read_logs(&mut self, parts: &Parts) -> Result<News, Error> {
        let mut news = News::none_of(parts.kvm.ram.bytes());
        let read = parts.kvm.take_writes(&mut news.blank, &mut news.written);
        // Written before it was given back or after: it is read where it lies.
        news.blank.remove(&news.written);
        // Some of it may have been read before the failure, and is in no log any more.
        self.news.add(&news);
        read.map(|()| news)
    }
}

impl Capture {
    /// What there is of it: over what its source was when it was last captured (or, before
    /// that, forked) what was copied, of which the source may have written some again. For
    /// children that are to have its pages mapped when it is done, and that touch none of
    /// them before.
    pub fn so_far(&self, before: &Image) -> Image {
        before.under(self.layer.clone())
    }

    /// The layer alone: a file that is not sealed yet, and the pages in it.
    pub fn layer(&self) -> (&Arc<File>, Vec<Run>) {
        (&self.layer.file, self.layer.pages.runs().collect())
    }

    /// Takes over what has changed, and gives the number of pages copied.
    fn catch_up(&mut self, ram: &Ram, news: &News) -> Result<u64, Error> {
        for run in news.blank.runs() {
            punch(&self.layer.file, run.bytes()).map_err(Error::memory("fallocate"))?;
        }
        self.layer.pages.add(&news.blank);
        self.copy(ram, &news.written)?;
        Ok(news.written.count())
    }

    fn copy(&mut self, ram: &Ram, pages: &PageSet) -> Result<(), Error> {
        ram.copy_pages(pages, &self.layer.file)?;
        self.layer.pages.add(pages);
        Ok(())
    }
}

impl Captured {
    /// Its memory, of a source that was `before` when it was last captured (or, before
    /// that, forked).
    pub fn image(&self, before: &Image) -> Image {
        before.under(self.layer.clone())
    }

    /// The pages in the new layer, which is that of [`Capture::layer`].
    pub fn pages(&self) -> Vec<Run> {
        self.layer.pages.runs().collect()
    }
}

#[cfg(test)]
mod tests;
