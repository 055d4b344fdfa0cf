//! A session with a container's process, on our own standard streams.

use super::keys::Keys;
use super::wire::{self, Frame, Window};
use crate::lock::lock;
use crate::signals::Catcher;
use crate::terminal::Raw;
use anyhow::{Context, Result, bail};
use fork::Moment;
use signal_hook::consts::SIGWINCH;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

/// How a session has ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The process has ended.
    Ended {
        /// Its status.
        status: u8,
        /// Why, if it was by no doing of its own: one line.
        why: String,
    },
    /// The person has left.
    Detached,
}

impl Outcome {
    /// The status that we end with.
    ///
    /// # Errors
    /// What ended the process from outside.
    pub fn status(self) -> Result<u8> {
        match self {
            Self::Ended { why, .. } if !why.is_empty() => bail!(why),
            Self::Ended { status, .. } => Ok(status),
            Self::Detached => Ok(0),
        }
    }
}

/// Our side, ready before the process begins.
pub struct Terminal {
    tty: bool,
    interactive: bool,
    signals: Option<Catcher>,
    raw: Option<Raw>,
    keys: Keys,
}

impl Terminal {
    /// With `tty` and `interactive`, every key that is typed is the container's; with
    /// `tty` alone, only its output is shown, as docker has it. With `signals`, those
    /// that we get are the container's.
    ///
    /// # Errors
    /// A terminal that was asked for and is not there.
    pub fn new(tty: bool, interactive: bool, signals: bool) -> Result<Self> {
        Ok(Self {
            tty,
            interactive,
            signals: signals.then(Catcher::new).transpose()?,
            raw: (tty && interactive).then(Raw::new).transpose()?,
            keys: Keys::default(),
        })
    }

    /// With other keys that leave it alone, if any.
    pub fn left_by(mut self, keys: Option<Keys>) -> Self {
        self.keys = keys.unwrap_or_default();
        self
    }

    /// Copies until either side ends; and when the first output came.
    ///
    /// # Errors
    /// A supervisor that has gone.
    pub fn attend(self, mut stream: UnixStream) -> Result<(Outcome, Option<Moment>)> {
        let to = Arc::new(Mutex::new(stream.try_clone().context("dup")?));
        if self.interactive {
            let (to, keys) = (Arc::clone(&to), self.tty.then_some(self.keys));
            thread("input", move || input(&to, keys))?;
        } else {
            // There will be none.
            send(&to, &Frame::InputEnded).ok();
        }
        if let Some(signals) = self.signals {
            let to = Arc::clone(&to);
            thread("signals", move || forward(signals, &to))?;
        }
        let ended = output(&mut stream);
        drop(self.raw);
        ended
    }
}

/// Shows what comes.
fn output(stream: &mut UnixStream) -> Result<(Outcome, Option<Moment>)> {
    let mut first = None;
    loop {
        match wire::receive_frame(stream)? {
            Some(Frame::Stdout(bytes)) => {
                first = first.or_else(|| Some(Moment::now()));
                show(io::stdout(), &bytes);
            }
            Some(Frame::Stderr(bytes)) => {
                first = first.or_else(|| Some(Moment::now()));
                show(io::stderr(), &bytes);
            }
            Some(Frame::Ended { status, why }) => {
                return Ok((Outcome::Ended { status, why }, first));
            }
            Some(_) => bail!("the supervisor speaks out of turn"),
            // We have shut it down ourselves, or it has died.
            None if DETACHED.load(std::sync::atomic::Ordering::Relaxed) => {
                return Ok((Outcome::Detached, first));
            }
            None => bail!("the container's supervisor has gone"),
        }
    }
}

/// Set when the person has typed the keys to leave: there is one terminal.
static DETACHED: std::sync::atomic::AtomicBool = std::sync::atomic::AtomicBool::new(false);

/// If ours is closed the rest is dropped, so that the container does not stop.
fn show(mut to: impl Write, bytes: &[u8]) {
    if let Err(error) = to.write_all(bytes).and_then(|()| to.flush()) {
        log::debug!("output: {error}");
    }
}

/// Copies our standard input until either ends.
fn input(to: &Mutex<UnixStream>, mut keys: Option<Keys>) {
    let mut buffer = vec![0; 32 << 10];
    loop {
        // Unbuffered: a line buffer would hold back what was typed.
        let got = match io::stdin().lock().read(&mut buffer) {
            Ok(0) => break,
            Ok(got) => got,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => {
                log::debug!("standard input: {error}");
                break;
            }
        };
        let (bytes, leave) = match &mut keys {
            Some(keys) => keys.filter(&buffer[..got]),
            None => (buffer[..got].to_vec(), false),
        };
        let sent = send(to, &Frame::Input(bytes));
        if leave {
            DETACHED.store(true, std::sync::atomic::Ordering::Relaxed);
            let stream = lock(to);
            // It ends our reading too.
            stream.shutdown(Shutdown::Both).ok();
            return;
        }
        if sent.is_err() {
            // The container has ended.
            return;
        }
    }
    send(to, &Frame::InputEnded).ok();
}

/// Every signal that reaches us is the process's, and a new window size its terminal's.
fn forward(signals: Catcher, to: &Mutex<UnixStream>) {
    for signal in signals.forever() {
        let sent = match (signal, Window::ours()) {
            (SIGWINCH, Some(window)) => send(to, &Frame::Resize(window.size())),
            (SIGWINCH, None) => Ok(()),
            _ => send(to, &Frame::Signal(signal)),
        };
        if let Err(error) = sent {
            log::debug!("signal {signal}: {error}");
            return;
        }
    }
}

fn send(to: &Mutex<UnixStream>, frame: &Frame) -> Result<()> {
    let mut stream = lock(to);
    wire::send_frame(&mut *stream, frame)
}

/// It is left alone at the end: it may be waiting for a key.
fn thread(name: &str, body: impl FnOnce() + Send + 'static) -> Result<()> {
    std::thread::Builder::new()
        .name(name.into())
        .spawn(body)
        .map(drop)
        .context("cannot start a thread")
}
