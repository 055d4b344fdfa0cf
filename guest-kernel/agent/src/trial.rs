//! A container before the fork point, that nobody has asked for. What a kernel
//! makes at its first container and keeps, every child would make: slabs with room
//! in them, threads that work for it, directories of its own file systems.

use crate::report::{Report, next_report};
use crate::spawn::{self, Resources, SpawnError};
use crate::warm;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fd::{AsFd, BorrowedFd};
use rustix::io::Errno;
use rustix::process::{WaitOptions, waitpid};
use vm_run_abi::protocol::{ContainerSpec, ProcessSpec, Stream, Writable};

/// Room for the mount points, in bytes.
const ROOM: u64 = 1 << 20;

/// Starts a container with an empty root, in memory, and waits until it has ended.
/// `resources` must be without an image. No signal of its end is left over if
/// SIGCHLD is not blocked yet.
///
/// # Errors
/// One line: in such a guest no container would start.
pub fn run(resources: &Resources) -> Result<(), String> {
    let container = ContainerSpec {
        writable: Writable::Memory { limit: ROOM },
        // It brings the only program that is there. The helper finds nobody at its
        // socket, and ends.
        warm: true,
    };
    let process = ProcessSpec {
        args: vec![warm::HELPER.to_owned()],
        env: Vec::new(),
        cwd: "/".to_owned(),
        user: String::new(),
        streams: vec![Stream::Stdout, Stream::Stderr],
        window: None,
    };
    let failed = |why: &str| format!("a container cannot be started: {why}");
    let spawned =
        spawn::container(resources, &container, &process).map_err(|e| failed(&explain(e)))?;
    let begun = read_to_end(spawned.reports.as_fd());
    loop {
        match waitpid(Some(spawned.pid), WaitOptions::empty()) {
            Err(Errno::INTR) => {}
            Err(e) => return Err(failed(&e.to_string())),
            Ok(_) => return begun.map_err(|why| failed(&why)),
        }
    }
}

fn explain(error: SpawnError) -> String {
    match error {
        SpawnError::Failed(failure) => failure.message,
        SpawnError::Lost(error) => error.to_string(),
    }
}

/// Reads what the process reports until it runs its program.
fn read_to_end(reports: BorrowedFd<'_>) -> Result<(), String> {
    let mut ready = Err("it has ended before its program".to_owned());
    loop {
        match poll(&mut [PollFd::new(&reports, PollFlags::IN)], None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(e) => return Err(e.to_string()),
        }
        match next_report(reports).map_err(|e| e.to_string())? {
            Some(Report::End) => return ready,
            Some(Report::Ready) => ready = Ok(()),
            Some(Report::Failed(failure)) => ready = Err(failure.message),
            // The socket is closed by not being kept.
            Some(Report::Warm(..) | Report::Terminal(..)) | None => {}
        }
    }
}
