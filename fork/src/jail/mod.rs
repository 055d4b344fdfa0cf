//! The jail of a worker: what a guest that has broken out of its VM finds.
//!
//! Two layers. [`enter`] takes away everything that has a name: files, other
//! processes, the network, privileges. [`confine`] then takes away the system calls
//! that a VM does not need, thread by thread. Either alone should hold.
//!
//! [`enter`] is called once, while the process has one thread, before it reads a byte
//! of a template. What it needs is open by then: its socket and /dev/kvm, which the
//! worker cannot open again.

mod broker;
pub(crate) mod cgroup;
mod limits;
mod namespaces;
mod privileges;
mod seccomp;

pub(crate) use broker::enter_broker;
pub use limits::Limits;
pub(crate) use seccomp::confine_broker;
#[doc(hidden)]
pub use seccomp::{Thread, confine};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Signal, set_parent_process_death_signal};
use serde::{Deserialize, Serialize};
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Why a process cannot enter its jail.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// A call that failed.
    #[error("{call}: {source}")]
    Call {
        /// The call, and on what.
        call: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The jail closes around one thread; another would stay outside.
    #[error("the process has {0} threads, and the jail takes one")]
    Threads(usize),
    /// A descriptor that nobody meant to bring along.
    #[error("descriptor {fd} would come along: {target}")]
    Descriptor {
        /// Its number.
        fd: String,
        /// What it is.
        target: String,
    },
    /// The spawner ended before this process could ask to be ended with it.
    #[error("the spawner has ended")]
    Orphan,
}

impl Error {
    fn call(call: &'static str) -> impl FnOnce(Errno) -> Self {
        move |errno| Self::Call {
            call,
            source: errno.into(),
        }
    }

    fn file(call: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Call { call, source }
    }
}

/// What [`enter`] does. The spawner chooses it for each worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Confinement {
    /// Everything. Needs root.
    Full {
        /// The worker's own, user and group: no other process of this host has it.
        uid: u32,
        /// The most threads and processes of this uid.
        processes: u32,
    },
    /// What a process can do to itself without privileges.
    Unprivileged,
}

/// Closes the jail around this process. `socket` and `kvm` are the descriptors that it
/// keeps beside the standard streams; `stderr` goes to the spawner.
///
/// # Errors
/// What is not as it must be, or the call that failed. The process is then half in its
/// jail, and has to end.
pub(crate) fn enter(
    confinement: &Confinement,
    socket: BorrowedFd<'_>,
    stderr: BorrowedFd<'_>,
) -> Result<(), Error> {
    one_thread()?;
    no_descriptor_but(&[socket])?;
    match *confinement {
        Confinement::Full { uid, processes } => {
            namespaces::leave_host()?;
            limits::set(Some(processes))?;
            privileges::drop_all(uid)?;
        }
        Confinement::Unprivileged => {
            limits::set(None)?;
            privileges::no_new()?;
        }
    }
    end_with_spawner(stderr)
}

/// Namespaces, uids and capabilities belong to threads (credentials(7)).
fn one_thread() -> Result<(), Error> {
    let tasks = fs::read_dir("/proc/self/task").map_err(Error::file("/proc/self/task"))?;
    match tasks.count() {
        1 => Ok(()),
        more => Err(Error::Threads(more)),
    }
}

/// The spawner hands on none but the standard streams, and [`Host`](vmm::Host) opens
/// /dev/kvm and the map of this process's own pages; this is the proof.
fn no_descriptor_but(given: &[BorrowedFd<'_>]) -> Result<(), Error> {
    // The pid as this /proc has it: in its own namespace it is another.
    let pid = fs::read_link("/proc/self").map_err(Error::file("/proc/self"))?;
    let own = |file| format!("/proc/{}/{file}", pid.display());
    let known_files = ["/dev/kvm".to_owned(), own("pagemap"), own("fd")];
    for entry in fs::read_dir("/proc/self/fd").map_err(Error::file("/proc/self/fd"))? {
        let entry = entry.map_err(Error::file("/proc/self/fd"))?;
        let fd = entry.file_name().to_string_lossy().into_owned();
        let target = fs::read_link(entry.path()).map_err(Error::file("/proc/self/fd"))?;
        let target = target.to_string_lossy().into_owned();
        let known = matches!(fd.as_str(), "0" | "1" | "2")
            || given
                .iter()
                .any(|given| fd == given.as_raw_fd().to_string())
            || known_files.contains(&target);
        if !known {
            return Err(Error::Descriptor { fd, target });
        }
    }
    Ok(())
}

/// Asks for SIGKILL when the spawner ends, which alone knows of this process. After
/// the change of uid, which clears the wish (PR_SET_PDEATHSIG(2const)). If the spawner
/// has ended before, the only reader of `stderr` is gone: poll(2) says POLLERR.
fn end_with_spawner(stderr: BorrowedFd<'_>) -> Result<(), Error> {
    set_parent_process_death_signal(Some(Signal::KILL)).map_err(Error::call("PR_SET_PDEATHSIG"))?;
    let mut ends = [PollFd::from_borrowed_fd(stderr, PollFlags::empty())];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    poll(&mut ends, Some(&now)).map_err(Error::call("poll"))?;
    if ends[0].revents().contains(PollFlags::ERR) {
        return Err(Error::Orphan);
    }
    Ok(())
}
