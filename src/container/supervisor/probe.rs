//! Asks a container whether it is well: a thread for each life, which runs the probe
//! as any client runs a command.

use super::life::Order;
use super::serve::{Shared, thread};
use super::session::Client;
use crate::container::health::{OUTPUT_MAX, Probe};
use crate::container::options::HealthCheck;
use crate::container::record::Status;
use crate::container::wire::{self, Answer, Exec, Frame};
use anyhow::{Context, Result, bail};
use jiff::Timestamp;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

const SIGKILL: i32 = 9;
/// Docker's, for a probe that could not be run or did not end in time.
const NO_STATUS: i32 = -1;

/// While this is held, probes are made.
pub struct Watch(#[expect(dead_code, reason = "its end is the word")] Option<Sender<()>>);

/// Begins to watch a life that has begun, if it is to be watched.
///
/// # Errors
/// No thread.
pub fn watch(shared: &Arc<Shared>) -> Result<Watch> {
    let Some(check) = shared.read(|record| record.spec.options.health.clone()) else {
        return Ok(Watch(None));
    };
    let (sender, over) = channel();
    let shared = Arc::clone(shared);
    thread("health", move || {
        if let Err(error) = probes(&shared, &check, &over) {
            log::error!("the container's health: {error:#}");
        }
    })?;
    Ok(Watch(Some(sender)))
}

fn probes(shared: &Shared, check: &HealthCheck, over: &Receiver<()>) -> Result<()> {
    let begun = Instant::now();
    loop {
        let is_early = begun.elapsed() < check.start_period;
        let pause = if is_early && is_starting(shared) {
            check.start_interval
        } else {
            check.interval
        };
        if over.recv_timeout(pause) == Err(RecvTimeoutError::Disconnected) {
            return Ok(());
        }
        if shared.read(|record| record.state.status) == Status::Paused {
            continue;
        }
        let is_early = begun.elapsed() < check.start_period;
        let start = Timestamp::now();
        let (exit_code, output) = match probe(shared, check) {
            Ok(done) => done,
            Err(error) => (NO_STATUS, super::one_line(&error)),
        };
        // What the end of the container has cut off says nothing.
        if over.try_recv() == Err(std::sync::mpsc::TryRecvError::Disconnected) {
            return Ok(());
        }
        let probe = Probe {
            start,
            end: Timestamp::now(),
            exit_code,
            output,
        };
        shared.change(|state| {
            let health = state.health.get_or_insert_default();
            health.note(probe, check, is_early);
        })?;
    }
}

fn is_starting(shared: &Shared) -> bool {
    use crate::container::health::HealthStatus::Starting;
    shared.read(|record| {
        let health = record.state.health.as_ref();
        health.is_none_or(|health| health.status == Starting)
    })
}

/// Runs the command to its end; its status, and the beginning of what it said.
fn probe(shared: &Shared, check: &HealthCheck) -> Result<(i32, String)> {
    let (mut ours, theirs) = UnixStream::pair().context("cannot make a socket pair")?;
    let exec = Exec {
        args: check.command(),
        env: Vec::new(),
        cwd: None,
        user: None,
        tty: false,
        stdin: false,
        detach: false,
        window: None,
        privileged: false,
    };
    let client = Client::new(theirs);
    let session = shared.order(|reply| Order::Exec(exec, vec![client], reply))?;
    match wire::receive(&mut ours)? {
        Some(Answer::Done) => {}
        other => bail!("a probe is answered out of turn: {other:?}"),
    }
    let deadline = Instant::now() + check.timeout;
    let mut output = Vec::new();
    let mut is_late = false;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() && !is_late {
            is_late = true;
            session.remote().signal(SIGKILL)?;
        }
        // After the deadline its end is waited for: it has been killed.
        let wait = (!is_late).then_some(left.max(Duration::from_millis(1)));
        if !is_readable(&ours, wait)? {
            continue;
        }
        match wire::receive_frame(&mut ours)? {
            Some(Frame::Stdout(bytes) | Frame::Stderr(bytes)) => {
                let room = OUTPUT_MAX.saturating_sub(output.len());
                output.extend_from_slice(&bytes[..room.min(bytes.len())]);
            }
            Some(Frame::Ended { status, .. }) => {
                let output = String::from_utf8_lossy(&output).into_owned();
                return Ok(if is_late {
                    let limit = check.timeout.as_secs_f64();
                    let why = format!("Health check exceeded timeout ({limit}s): {output}");
                    (NO_STATUS, why)
                } else {
                    (status.into(), output)
                });
            }
            Some(_) => bail!("a frame out of turn"),
            None => bail!("a probe has no end"),
        }
    }
}

/// Whether there is something to read within that time.
fn is_readable(stream: &UnixStream, wait: Option<Duration>) -> Result<bool> {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let wait = wait.and_then(|wait| Timespec::try_from(wait).ok());
    let mut fds = [PollFd::new(stream, PollFlags::IN)];
    match poll(&mut fds, wait.as_ref()) {
        Ok(ready) => Ok(ready > 0),
        Err(rustix::io::Errno::INTR) => Ok(false),
        Err(error) => Err(error).context("poll"),
    }
}
