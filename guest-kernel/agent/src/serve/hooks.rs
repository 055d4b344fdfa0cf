//! The hooks of a warm container (docs/warm.md): what is done in it before it is frozen,
//! and in each child.

use super::Server;
use super::freeze::{Attachment, Stage};
use crate::poll::Token;
use crate::spawn::SpawnError;
use crate::sys;
use rustix::fd::OwnedFd;
use rustix::io::{Errno, read};
use std::collections::BTreeMap;
use std::io;
use std::time::{Duration, Instant};
use vm_run_abi::protocol::{
    CONTAINER, ContainerSpec, Event, ExitStatus, HOOK, Hook, Hooks, ProcessSpec, StartFailure,
    Stream,
};

/// How much of what a command says is kept, in bytes from its end: its last line is told
/// if it fails.
const SAID_MAX: usize = 1 << 10;

/// How much of that line is told, in characters.
const LINE_MAX: usize = 200;

/// How much of a pipe is read at once, and how often that is for a full one (pipe(7)).
const READ: usize = 4 << 10;
const PIPE_READS: usize = 16;

/// The two moments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum When {
    PreFreeze,
    PostFork,
}

impl When {
    fn word(self) -> &'static str {
        match self {
            Self::PreFreeze => "pre-freeze",
            Self::PostFork => "post-fork",
        }
    }
}

/// What has been asked for, and what of it is going on.
#[derive(Debug, Default)]
pub(super) struct Hooking {
    hooks: Hooks,
    /// How a command runs, but for its words.
    process: ProcessSpec,
    running: Option<Running>,
}

/// A command on its way to its end.
#[derive(Debug)]
struct Running {
    when: When,
    /// Until when it may take; `None` if it has taken that, and is killed.
    until: Option<Instant>,
    outputs: BTreeMap<u64, OwnedFd>,
    said: Vec<u8>,
}

impl Hooking {
    /// Of a container with this first process.
    pub(super) fn new(container: &ContainerSpec, process: &ProcessSpec) -> Self {
        Self {
            hooks: container.hooks.clone(),
            process: ProcessSpec {
                args: Vec::new(),
                streams: vec![Stream::Stdout, Stream::Stderr],
                window: None,
                ..process.clone()
            },
            running: None,
        }
    }

    /// When the command has taken too long.
    pub(super) fn until(&self) -> Option<Instant> {
        self.running.as_ref().and_then(|running| running.until)
    }

    /// The command that runs, if one does, is nobody's any more.
    pub(super) fn forget(&mut self) {
        self.running = None;
    }

    /// Whether a command runs.
    pub(super) fn is_running(&self) -> bool {
        self.running.is_some()
    }
}

impl Running {
    /// Reads once; `false` if there is nothing to read any more.
    fn hear(&mut self, number: u64) -> bool {
        let Some(output) = self.outputs.get(&number) else {
            return false;
        };
        let mut bytes = [0; READ];
        match read(output, &mut bytes) {
            Ok(0) => false,
            Ok(n) => {
                self.said.extend_from_slice(&bytes[..n]);
                let surplus = self.said.len().saturating_sub(SAID_MAX);
                self.said.drain(..surplus);
                true
            }
            Err(Errno::INTR) => true,
            Err(_) => false,
        }
    }

    /// Why it has failed, if it has.
    fn outcome(&self, event: &Event, limit: Duration) -> Result<(), String> {
        let hook = format!("the {} hook", self.when.word());
        let why = match event {
            Event::Exited {
                status: ExitStatus::Code(0),
                ..
            } => return Ok(()),
            Event::StartFailed { message, .. } => return Err(format!("{hook}: {message}")),
            _ if self.until.is_none() => format!("did not end in {} s", limit.as_secs_f32()),
            Event::Exited {
                status: ExitStatus::Code(code),
                ..
            } => format!("ended with status {code}"),
            _ => "was killed".to_owned(),
        };
        Err(match last_line(&self.said) {
            line if line.is_empty() => format!("{hook} {why}"),
            line => format!("{hook} {why}: {line}"),
        })
    }
}

/// The last line with anything on it, as far as people can read it.
fn last_line(said: &[u8]) -> String {
    let text = String::from_utf8_lossy(said);
    let mut lines = text.lines().rev().map(str::trim);
    let line = lines.find(|line| !line.is_empty()).unwrap_or_default();
    let legible = line.chars().filter(|c| !c.is_control());
    legible.take(LINE_MAX).collect()
}

impl Server {
    /// Begins a hook: whether its end is to be waited for. The outer error is the end of
    /// the guest.
    pub(super) fn begin_hook(&mut self, when: When) -> io::Result<Result<bool, String>> {
        let hooks = &self.hooking.hooks;
        let hook = match when {
            When::PreFreeze => &hooks.pre_freeze,
            When::PostFork => &hooks.post_fork,
        };
        let args = match hook {
            None => return Ok(Ok(false)),
            Some(Hook::Signal(signal)) => {
                if let Some(first) = self.container.get_mut(CONTAINER) {
                    first.signal(*signal);
                }
                return Ok(Ok(false));
            }
            Some(Hook::Command(args)) => args.clone(),
        };
        let limit = Duration::from_millis(hooks.limit_ms.into());
        let process = ProcessSpec {
            args,
            ..self.hooking.process.clone()
        };
        let pipes = match self.container.start_hook(&process, &self.resources) {
            Ok(pipes) => pipes,
            Err(SpawnError::Failed(failure)) => {
                return Ok(Err(format!(
                    "the {} hook: {}",
                    when.word(),
                    failure.message
                )));
            }
            Err(SpawnError::Lost(error)) => return Err(error),
        };
        let mut outputs = BTreeMap::new();
        for (_, pipe) in pipes {
            let number = self.new_number();
            self.poll.watch_for_input(&pipe, Token::Hook(number))?;
            outputs.insert(number, pipe);
        }
        if let Some(reports) = self.container.get_mut(HOOK).and_then(|p| p.reports()) {
            self.poll.watch_for_input(reports, Token::Reports(HOOK))?;
        }
        self.hooking.running = Some(Running {
            when,
            until: Some(Instant::now() + limit),
            outputs,
            said: Vec::new(),
        });
        Ok(Ok(true))
    }

    /// The command has said something.
    pub(super) fn hear_hook(&mut self, number: u64) -> io::Result<()> {
        let Some(running) = &mut self.hooking.running else {
            return Ok(());
        };
        if !running.hear(number)
            && let Some(output) = running.outputs.remove(&number)
        {
            self.poll.remove(&output)?;
        }
        Ok(())
    }

    /// Kills a command that has taken too long, and what it has started.
    pub(super) fn hurry_hook(&mut self) {
        let Some(running) = &mut self.hooking.running else {
            return;
        };
        if running.until.is_none_or(|until| Instant::now() < until) {
            return;
        }
        running.until = None;
        if let Some(process) = self.container.get_mut(HOOK) {
            process.signal(libc::SIGKILL);
            // It leads a group, unless it has not come so far.
            sys::kill_group(process.pid(), libc::SIGKILL).ok();
        }
    }

    /// The command has ended, as this event says: what waits for it goes on.
    pub(super) fn hook_has_ended(&mut self, event: &Event) -> io::Result<()> {
        let Some(mut running) = self.hooking.running.take() else {
            return Ok(());
        };
        let numbers: Vec<u64> = running.outputs.keys().copied().collect();
        for number in numbers {
            // All that is in the pipe; who else may hold it is not waited for.
            for _ in 0..PIPE_READS {
                if !running.hear(number) {
                    break;
                }
            }
            if let Some(output) = running.outputs.remove(&number) {
                self.poll.remove(&output)?;
            }
        }
        let limit = Duration::from_millis(self.hooking.hooks.limit_ms.into());
        match (running.when, running.outcome(event, limit)) {
            // The container has ended meanwhile, which has been told.
            (When::PreFreeze, _) if !matches!(self.stage, Stage::Hooking) => Ok(()),
            (When::PreFreeze, Ok(())) => {
                self.begin_freezing();
                Ok(())
            }
            (When::PreFreeze, Err(why)) => {
                self.stop_freezing(&why);
                Ok(())
            }
            (When::PostFork, Ok(())) => self.attach_if_complete(),
            (When::PostFork, Err(why)) => {
                self.refuse(why);
                Ok(())
            }
        }
    }

    /// A child that is not what it should be goes no further.
    pub(super) fn refuse(&mut self, why: String) {
        if let Some(first) = self.container.get_mut(CONTAINER) {
            first.signal(libc::SIGKILL);
        }
        if let Attachment::Asked { .. } = self.attachment {
            self.tell_refused(why);
        } else {
            self.attachment = Attachment::Refused { why };
        }
    }

    /// Answers the host that wanted to attach. There is nothing to attach to any more.
    pub(super) fn tell_refused(&mut self, message: String) {
        self.attachment = Attachment::Tied;
        self.arrived.retain(|a| a.process != CONTAINER);
        self.send(&Event::StartFailed {
            process: CONTAINER,
            reason: StartFailure::Other,
            message,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_line_is_told_as_far_as_it_can_be_read() {
        assert_eq!(last_line(b""), "");
        assert_eq!(last_line(b"one\ntwo\n\n \n"), "two");
        assert_eq!(last_line(b"\x1b[1mred\x07\xff"), "[1mred\u{fffd}");
        assert_eq!(last_line(&[b'x'; 1000]).len(), LINE_MAX);
    }
}
