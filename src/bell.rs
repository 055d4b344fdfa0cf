//! What wakes a loop that watches it.

use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use std::io;
use std::sync::Arc;

/// A bell, which many may have (eventfd(2)).
#[derive(Clone, Debug)]
pub struct Bell(Arc<OwnedFd>);

impl Bell {
    /// One that has not rung.
    ///
    /// # Errors
    /// No descriptor left.
    pub fn new() -> io::Result<Self> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        Ok(Self(Arc::new(eventfd(0, flags)?)))
    }

    /// Wakes whoever watches it, until it is hushed.
    pub fn ring(&self) {
        // It fails only if it has rung very often, and was not heard yet.
        rustix::io::write(&*self.0, &1_u64.to_ne_bytes()).ok();
    }

    /// So that it can ring anew.
    pub fn hush(&self) {
        // It fails only if it has not rung.
        rustix::io::read(&*self.0, &mut [0; 8]).ok();
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
