//! The life of the container's first process, as events for the host.

use crate::exec::Failure;
use crate::spawn::{self, Report, Resources, Spawned, next_report, resize};
use crate::streams::Link;
use crate::sys;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::process::{Pid, WaitStatus};
use std::io;
use vm_run_abi::protocol::{
    CONTAINER, ContainerSpec, Event, ExitStatus, ProcessSpec, Stream, WindowSize,
};

/// Where the container is in its life.
#[derive(Debug, Default)]
enum State {
    /// Not asked for.
    #[default]
    None,
    /// Asked for; not all of its streams have come.
    Waiting(Box<(ContainerSpec, ProcessSpec)>),
    /// On its way to its program.
    Starting(Starting),
    /// Its program runs.
    Running(Pid),
    /// Ended, or never started.
    Over,
}

#[derive(Debug)]
struct Starting {
    pid: Pid,
    reports: OwnedFd,
    ready: bool,
    failure: Option<Failure>,
}

/// What the loop has to act on.
#[derive(Debug)]
pub enum Happened {
    /// The process has made its terminal: master and slave side.
    Terminal(OwnedFd, OwnedFd),
    /// For the host.
    Event(Event),
}

impl Happened {
    /// The container could not be started, for a reason that is not its
    /// command's.
    pub fn start_failed(message: String) -> Self {
        Failure::other(message).into()
    }
}

impl From<Failure> for Happened {
    fn from(Failure { reason, message }: Failure) -> Self {
        Self::Event(Event::StartFailed {
            process: CONTAINER,
            reason,
            message,
        })
    }
}

/// The container. There is one in the life of a child.
#[derive(Debug, Default)]
pub struct Container {
    state: State,
    /// The size that the host has asked for since the terminal was.
    resized: Option<WindowSize>,
}

impl Container {
    /// Notes what is to be started; `false` if something was before.
    pub fn ask(&mut self, container: ContainerSpec, process: ProcessSpec) -> bool {
        let first = matches!(self.state, State::None);
        if first {
            self.state = State::Waiting(Box::new((container, process)));
        }
        first
    }

    /// Starts it, once it is asked for and the streams that it needs are among
    /// `arrived`; `None` before that. The result is the agent's ends of its pipes.
    pub fn start(
        &mut self,
        resources: &Resources,
        arrived: &[Stream],
    ) -> Option<Result<Vec<(Stream, OwnedFd)>, Happened>> {
        let State::Waiting(specs) = &self.state else {
            return None;
        };
        let (container, process) = specs.as_ref();
        if let Err(why) = check_streams(&process.streams) {
            self.state = State::Over;
            return Some(Err(Happened::start_failed(why)));
        }
        if !process.streams.iter().all(|s| arrived.contains(s)) {
            return None;
        }
        Some(match spawn::container(resources, container, process) {
            Ok(Spawned {
                pid,
                reports,
                pipes,
            }) => {
                self.state = State::Starting(Starting {
                    pid,
                    reports,
                    ready: false,
                    failure: None,
                });
                Ok(pipes)
            }
            Err(failure) => {
                self.state = State::Over;
                Err(failure.into())
            }
        })
    }

    /// What a new process reports over, while it is starting.
    pub fn reports(&self) -> Option<BorrowedFd<'_>> {
        match &self.state {
            State::Starting(starting) => Some(starting.reports.as_fd()),
            _ => None,
        }
    }

    /// Reads all that the new process has reported until now.
    pub fn read_reports(&mut self) -> io::Result<Vec<Happened>> {
        let mut happened = Vec::new();
        while let State::Starting(starting) = &mut self.state {
            match next_report(starting.reports.as_fd())? {
                None => break,
                Some(Report::Terminal(master, slave)) => {
                    if let Some(size) = self.resized {
                        resize(master.as_fd(), size)?;
                    }
                    happened.push(Happened::Terminal(master, slave));
                }
                Some(Report::Ready) => starting.ready = true,
                Some(Report::Failed(failure)) => starting.failure = Some(failure),
                Some(Report::End) if starting.ready && starting.failure.is_none() => {
                    self.state = State::Running(starting.pid);
                    let process = CONTAINER;
                    happened.push(Happened::Event(Event::Started { process }));
                }
                // It has failed, or died: its end is a matter of moments.
                Some(Report::End) => break,
            }
        }
        Ok(happened)
    }

    /// Its process has been reaped. What it reported has been read before.
    pub fn ended(&mut self, status: WaitStatus) -> Happened {
        let status = exit_status(status);
        match std::mem::replace(&mut self.state, State::Over) {
            State::Starting(Starting {
                failure: Some(failure),
                ..
            }) => failure.into(),
            State::Starting(_) => Happened::start_failed(match status {
                ExitStatus::Signal(n) => format!("killed by signal {n} before its program ran"),
                ExitStatus::Code(n) => format!("ended with status {n} before its program ran"),
            }),
            _ => Happened::Event(Event::Exited {
                process: CONTAINER,
                status,
            }),
        }
    }

    /// Sends it a signal. Nothing happens if it is not there, or if the number
    /// is none.
    pub fn signal(&self, signal: i32) {
        if let Some(pid) = self.pid()
            && (1..=libc::SIGRTMAX()).contains(&signal)
        {
            // The process is not reaped yet, so the number is still its own, and
            // PID 1 may signal anybody.
            sys::kill(pid, signal).ok();
        }
    }

    /// Sets the size of its terminal, or of the one that it is going to have.
    pub fn resize<'a>(&mut self, size: WindowSize, links: impl Iterator<Item = &'a Link>) {
        self.resized = Some(size);
        for link in links.filter(|link| link.is_terminal()) {
            // A terminal that has hung up has no size to set.
            resize(link.guest(), size).ok();
        }
    }

    fn pid(&self) -> Option<Pid> {
        match &self.state {
            State::Starting(starting) => Some(starting.pid),
            State::Running(pid) => Some(*pid),
            State::None | State::Waiting(_) | State::Over => None,
        }
    }

    /// Whether `pid` is its first process.
    pub fn is(&self, pid: Pid) -> bool {
        self.pid() == Some(pid)
    }

    /// Whether it has a process.
    pub fn is_alive(&self) -> bool {
        self.pid().is_some()
    }

    /// Whether it has, or had, a process.
    pub fn is_started(&self) -> bool {
        !matches!(self.state, State::None | State::Waiting(_))
    }
}

/// Each stream once, and a terminal alone.
fn check_streams(streams: &[Stream]) -> Result<(), String> {
    let twice = (1..streams.len()).any(|i| streams[i..].contains(&streams[i - 1]));
    if twice {
        return Err("a stream is named twice".to_owned());
    }
    if streams.contains(&Stream::Terminal) && streams.len() > 1 {
        return Err("a terminal is the only stream of its process".to_owned());
    }
    Ok(())
}

fn exit_status(status: WaitStatus) -> ExitStatus {
    match (status.exit_status(), status.terminating_signal()) {
        (_, Some(signal)) => ExitStatus::Signal(signal as u8),
        (code, None) => ExitStatus::Code(code.unwrap_or_default() as u8),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Stream::{Stderr, Stdin, Stdout, Terminal};

    #[test]
    fn streams_are_each_once_and_a_terminal_alone() {
        assert!(check_streams(&[]).is_ok());
        assert!(check_streams(&[Stdin, Stdout, Stderr]).is_ok());
        assert!(check_streams(&[Terminal]).is_ok());
        assert!(check_streams(&[Stdout, Stdin, Stdout]).is_err());
        assert!(check_streams(&[Terminal, Stdin]).is_err());
    }
}
