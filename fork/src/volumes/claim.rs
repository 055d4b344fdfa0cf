//! The right to go on with a guest's volumes as it knew them when a picture of it was taken.

use crate::worker::packet;
use rustix::fd::{AsFd, OwnedFd};
use serde::{Deserialize, Serialize};
use std::io;

/// A claim on what a broker keeps: a socket to it. The broker lives as long as there is one,
/// also when its guest has ended.
#[doc(hidden)]
#[derive(Debug)]
pub struct Claim(OwnedFd);

/// From the holder of a claim.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum ToKeeper {
    /// Send it. With it: a socket, for the table.
    HandOver,
}

impl Claim {
    /// A claim, and what the broker is to be given for it.
    ///
    /// # Errors
    /// No descriptors.
    pub fn new() -> io::Result<(Self, OwnedFd)> {
        let (ours, theirs) = packet::pair()?;
        Ok((Self(ours), theirs))
    }

    /// The same, from another process.
    pub(crate) fn from_descriptor(socket: OwnedFd) -> Self {
        Self(socket)
    }

    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        Ok(Self(self.0.try_clone()?))
    }

    /// Has the broker hand over what it keeps, to whoever reads from what is returned.
    pub(crate) fn hand_over(&self) -> io::Result<OwnedFd> {
        let (from, to) = packet::pair()?;
        packet::send(&self.0, &ToKeeper::HandOver, &[to.as_fd()])?;
        Ok(from)
    }
}

impl AsFd for Claim {
    fn as_fd(&self) -> rustix::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}
