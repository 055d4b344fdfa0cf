//! The life of one process of the container, as events for the host.

use crate::exec::Failure;
use crate::names::Names;
use crate::report::{Report, next_report};
use crate::rootfs::Layers;
use crate::spawn::{Spawned, resize};
use crate::sys;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::process::{Pid, WaitStatus};
use std::io;
use vm_run_abi::protocol::{Event, ExitStatus, ProcessId, WindowSize};

/// A process from its start to its end.
#[derive(Debug)]
pub struct Process {
    id: ProcessId,
    pid: Pid,
    /// While it is on its way to its program.
    starting: Option<Starting>,
    /// The size that the host has asked for since its terminal was.
    resized: Option<WindowSize>,
}

#[derive(Debug)]
struct Starting {
    reports: OwnedFd,
    ready: bool,
    failure: Option<Failure>,
}

/// What the loop has to act on.
#[derive(Debug)]
pub enum Happened {
    /// The process has made its terminal: master and slave side.
    Terminal(OwnedFd, OwnedFd),
    /// The container has its root, of these layers, and files with its name.
    Root(Layers, Names),
    /// The container has its warm socket, which listens.
    Warm(OwnedFd),
    /// For the host.
    Event(Event),
}

/// The event of a process that could not be started.
pub fn start_failed(process: ProcessId, Failure { reason, message }: Failure) -> Event {
    Event::StartFailed {
        process,
        reason,
        message,
    }
}

impl Process {
    /// Takes over what has been spawned.
    pub fn new(id: ProcessId, spawned: Spawned) -> Self {
        Self {
            id,
            pid: spawned.pid,
            starting: Some(Starting {
                reports: spawned.reports,
                ready: false,
                failure: None,
            }),
            resized: None,
        }
    }

    /// What it reports over, while it is starting.
    pub fn reports(&self) -> Option<BorrowedFd<'_>> {
        self.starting.as_ref().map(|s| s.reports.as_fd())
    }

    /// Reads all that it has reported until now.
    pub fn read_reports(&mut self) -> io::Result<Vec<Happened>> {
        let mut happened = Vec::new();
        while let Some(starting) = &mut self.starting {
            match next_report(starting.reports.as_fd())? {
                None => break,
                Some(Report::Terminal(master, slave)) => {
                    if let Some(size) = self.resized {
                        resize(master.as_fd(), size)?;
                    }
                    happened.push(Happened::Terminal(master, slave));
                }
                Some(Report::Root(layers, names)) => {
                    happened.push(Happened::Root(layers, names));
                }
                Some(Report::Warm(listener)) => happened.push(Happened::Warm(listener)),
                // It has been waited for.
                Some(Report::Prepared(_)) => {}
                Some(Report::Ready) => starting.ready = true,
                Some(Report::Failed(failure)) => starting.failure = Some(failure),
                Some(Report::End) if starting.ready && starting.failure.is_none() => {
                    self.starting = None;
                    let process = self.id;
                    happened.push(Happened::Event(Event::Started { process }));
                }
                // It has failed, or died: its end is a matter of moments.
                Some(Report::End) => break,
            }
        }
        Ok(happened)
    }

    /// The event of its end. It has been reaped, and what it reported has been
    /// read before.
    pub fn ended(self, status: WaitStatus) -> Event {
        let process = self.id;
        let status = exit_status(status);
        let Some(starting) = self.starting else {
            return Event::Exited { process, status };
        };
        let early = || {
            Failure::other(match status {
                ExitStatus::Signal(n) => format!("killed by signal {n} before its program ran"),
                ExitStatus::Code(n) => format!("ended with status {n} before its program ran"),
            })
        };
        start_failed(process, starting.failure.unwrap_or_else(early))
    }

    /// Sends it a signal. Nothing happens if the number is none.
    pub fn signal(&self, signal: i32) {
        if (1..=libc::SIGRTMAX()).contains(&signal) {
            // The process is not reaped yet, so the number is still its own, and
            // PID 1 may signal anybody.
            sys::kill(self.pid, signal).ok();
        }
    }

    /// Notes the size of the terminal that it is going to have.
    pub fn resize(&mut self, size: WindowSize) {
        self.resized = Some(size);
    }

    /// Its number in the agent's PID namespace.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Whether its program runs.
    pub fn is_running(&self) -> bool {
        self.starting.is_none()
    }
}

fn exit_status(status: WaitStatus) -> ExitStatus {
    match (status.exit_status(), status.terminating_signal()) {
        (_, Some(signal)) => ExitStatus::Signal(signal as u8),
        (code, None) => ExitStatus::Code(code.unwrap_or_default() as u8),
    }
}
