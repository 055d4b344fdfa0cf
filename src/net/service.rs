//! A service of a container's network: one thread with an event loop, which ends with
//! the handle.

use crate::bell::Bell;
use rustix::buffer::spare_capacity;
use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::fd::{AsFd, OwnedFd};
use rustix::io::Errno;
use std::io;
use std::thread::JoinHandle;
use std::time::Duration;

/// How much stack a loop gets, in bytes: it calls nothing deep, and what it buffers is on
/// the heap.
const STACK: usize = 128 << 10;

/// A service that runs. It ends when this is dropped: its sockets are closed then.
#[derive(Debug)]
pub struct Service {
    stop: Bell,
    thread: Option<JoinHandle<()>>,
}

impl Service {
    /// Runs `serve` in a thread of its own. It is to return soon after the bell that it
    /// gets has rung.
    pub(super) fn start(
        name: &str,
        serve: impl FnOnce(&Bell) + Send + 'static,
    ) -> io::Result<Self> {
        let stop = Bell::new()?;
        let heard = stop.clone();
        let thread = std::thread::Builder::new()
            .name(name.into())
            .stack_size(STACK)
            .spawn(move || serve(&heard))?;
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.stop.ring();
        if self.thread.take().is_some_and(|it| it.join().is_err()) {
            log::error!("a service of the network has panicked");
        }
    }
}

/// What a loop watches (epoll(7)). What is closed is watched no more.
#[derive(Debug)]
pub(super) struct Watch(OwnedFd);

/// Events taken at once.
const EVENTS: usize = 64;

impl Watch {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self(epoll::create(CreateFlags::CLOEXEC)?))
    }

    pub(super) fn add(&self, what: impl AsFd, key: u64, flags: EventFlags) -> io::Result<()> {
        Ok(epoll::add(&self.0, what, EventData::new_u64(key), flags)?)
    }

    /// Waits for events, but no longer than that. Each is a key with its flags.
    pub(super) fn wait(&self, patience: Option<Duration>) -> io::Result<Vec<(u64, EventFlags)>> {
        let mut events = Vec::with_capacity(EVENTS);
        let patience = patience.map(timespec);
        match epoll::wait(&self.0, spare_capacity(&mut events), patience.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let keyed = events.iter().map(|event| (event.data.u64(), event.flags));
        Ok(keyed.collect())
    }
}

/// For calls that wait.
pub(super) fn timespec(patience: Duration) -> Timespec {
    Timespec::try_from(patience).unwrap_or(Timespec {
        tv_sec: i64::MAX,
        tv_nsec: 0,
    })
}
