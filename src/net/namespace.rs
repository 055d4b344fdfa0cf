//! A network namespace of a container, with nobody in it: it lasts as long as a descriptor
//! of it is open, and all that is in it goes with it. So nothing is left of one whose owner
//! was killed.

use anyhow::{Context, Result};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{Mode, OFlags};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};
use std::io;
use std::path::Path;

/// The calling thread's, whatever the process's is.
const OWN: &str = "/proc/thread-self/ns/net";

/// A namespace.
#[derive(Debug)]
pub struct Namespace(OwnedFd);

impl Namespace {
    /// Makes one, empty.
    ///
    /// # Errors
    /// No privilege: it takes CAP_SYS_ADMIN (network_namespaces(7)).
    pub fn new() -> Result<Self> {
        in_thread(|| {
            leave()?;
            let flags = OFlags::RDONLY | OFlags::CLOEXEC;
            rustix::fs::open(OWN, flags, Mode::empty()).map_err(io::Error::from)
        })
        .map(Self)
        .context("cannot make a network namespace")
    }

    /// One more way to the same.
    ///
    /// # Errors
    /// No descriptor left.
    pub fn try_clone(&self) -> io::Result<Self> {
        self.0.try_clone().map(Self)
    }

    /// Does something in it: sockets and files that are opened there stay of it.
    ///
    /// # Errors
    /// No thread, or what `body` says.
    pub fn within<T: Send>(&self, body: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        in_thread(|| {
            move_into_link_name_space(self.as_fd(), Some(LinkNameSpaceType::Network))?;
            body()
        })
    }
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Moves the calling thread into a new one.
fn leave() -> io::Result<()> {
    #[expect(unsafe_code, reason = "rustix has no other way")]
    // SAFETY: what is unsafe about unshare is CLONE_FILES, which is not asked for.
    let done = unsafe { unshare_unsafe(UnshareFlags::NEWNET) };
    Ok(done?)
}

/// A namespace is a thread's: one of its own comes back to no other.
fn in_thread<T: Send>(body: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("namespace".into())
            .stack_size(128 << 10)
            .spawn_scoped(scope, body)?;
        thread
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("a thread has panicked")))
    })
}

/// Whether the kernel has IPv6, and nobody has switched it off at boot.
pub fn has_ipv6() -> bool {
    Path::new("/proc/sys/net/ipv6").is_dir()
}

/// Sets a parameter of the calling thread's namespace, named as sysctl(8) names it.
///
/// # Errors
/// What the kernel says, with the name.
pub fn set_parameter(name: &str, value: &str) -> io::Result<()> {
    let path = format!("/proc/sys/{}", name.replace('.', "/"));
    std::fs::write(&path, value)
        .map_err(|error| io::Error::new(error.kind(), format!("{path}: {error}")))
}
