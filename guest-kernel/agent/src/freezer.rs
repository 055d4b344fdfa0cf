//! The freezer of the container's cgroup (Linux
//! Documentation/admin-guide/cgroup-v2.rst, `cgroup.freeze`).

use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{Mode, OFlags, openat};
use rustix::io::{pread, write};
use std::io;

/// The two files of the freezer, open.
#[derive(Debug)]
pub struct Freezer {
    freeze: OwnedFd,
    events: OwnedFd,
}

impl Freezer {
    /// Of the cgroup with this directory.
    pub fn open(cgroup: BorrowedFd<'_>) -> io::Result<Self> {
        let file = |name: &str, flags| openat(cgroup, name, flags | OFlags::CLOEXEC, Mode::empty());
        Ok(Self {
            freeze: file("cgroup.freeze", OFlags::WRONLY)?,
            events: file("cgroup.events", OFlags::RDONLY)?,
        })
    }

    /// Has all processes of the cgroup stop, soon: see [`Self::is_frozen`].
    pub fn freeze(&self) -> io::Result<()> {
        write(&self.freeze, b"1")?;
        Ok(())
    }

    /// Lets them run.
    pub fn thaw(&self) -> io::Result<()> {
        write(&self.freeze, b"0")?;
        Ok(())
    }

    /// Whether every process of the cgroup has stopped.
    pub fn is_frozen(&self) -> io::Result<bool> {
        // Two short lines: `populated N` and `frozen N`.
        let mut bytes = [0; 128];
        let len = pread(&self.events, &mut bytes, 0)?;
        Ok(bytes[..len]
            .split(|b| *b == b'\n')
            .any(|l| l == b"frozen 1"))
    }

    /// What changes when that does; see [`crate::poll::Poll::watch_for_change`].
    pub fn events(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }
}
