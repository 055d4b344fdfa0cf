//! One process of the container and those who watch it: its output goes to all of
//! them, their input to it.
//!
//! A client that does not read stops the process, as it would on a pipe; one that has
//! gone is forgotten. The end is told after the last output: when the process has
//! ended and its outputs are at their end.

use crate::container::log::{Log, Output};
use crate::container::wire::{self, Frame};
use crate::lock::lock;
use anyhow::{Context, Result};
use fork::{Process, Remote};
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long the end of a process waits in all for outputs that something else still holds
/// open, while nothing comes of them.
pub const DRAIN: Duration = Duration::from_secs(2);

/// A client of a session: where its frames go.
pub struct Client(Mutex<UnixStream>);

/// A process and its clients.
pub struct Session {
    hub: Mutex<Hub>,
    changed: Condvar,
    /// Standard input or terminal; `None` when it was closed, or there is none.
    input: Mutex<Option<UnixStream>>,
    remote: Remote,
    is_terminal: bool,
}

struct Hub {
    clients: Vec<Arc<Client>>,
    /// Outputs that are not at their end.
    open: usize,
    /// Those of them of which something is on its way to the clients.
    spreading: usize,
    is_over: bool,
}

/// Where the container's own output is kept.
pub type SharedLog = Arc<Mutex<Log>>;

impl Client {
    pub fn new(stream: UnixStream) -> Arc<Self> {
        Arc::new(Self(Mutex::new(stream)))
    }

    fn put(&self, kind: u8, bytes: &[u8]) -> Result<()> {
        wire::put(&mut *lock(&self.0), kind, bytes)
    }

    /// Sends an answer or a frame.
    pub fn with<T>(&self, send: impl FnOnce(&mut UnixStream) -> Result<T>) -> Result<T> {
        send(&mut lock(&self.0))
    }
}

impl Session {
    /// Begins to copy what `process` says, to `log` and to `clients`.
    ///
    /// # Errors
    /// No thread.
    pub fn new(
        process: Process,
        log: Option<&SharedLog>,
        clients: Vec<Arc<Client>>,
    ) -> Result<Arc<Self>> {
        let Process {
            stdin,
            stdout,
            stderr,
            terminal,
            remote,
        } = process;
        let is_terminal = terminal.is_some();
        let mut outputs = Vec::new();
        let input = match &terminal {
            Some(terminal) => Some(terminal.try_clone().context("dup")?),
            None => stdin,
        };
        let streams = [
            (stdout, Output::Stdout),
            (stderr, Output::Stderr),
            (terminal, Output::Stdout),
        ];
        for (stream, output) in streams {
            outputs.extend(stream.map(|stream| (stream, output)));
        }
        let this = Arc::new(Self {
            hub: Mutex::new(Hub {
                clients,
                open: outputs.len(),
                spreading: 0,
                is_over: false,
            }),
            changed: Condvar::new(),
            input: Mutex::new(input),
            remote,
            is_terminal,
        });
        for (stream, output) in outputs {
            let (session, log) = (Arc::clone(&this), log.cloned());
            std::thread::Builder::new()
                .name("output".into())
                .stack_size(128 << 10)
                .spawn(move || session.copy(stream, output, log.as_ref()))
                .context("cannot start a thread")?;
        }
        Ok(this)
    }

    pub fn remote(&self) -> &Remote {
        &self.remote
    }

    /// One more client; false if there is nothing left to be told.
    pub fn join(&self, client: &Arc<Client>) -> bool {
        let mut hub = lock(&self.hub);
        if hub.is_over {
            return false;
        }
        hub.clients.push(Arc::clone(client));
        true
    }

    /// A client has gone.
    pub fn leave(&self, client: &Arc<Client>) {
        let mut hub = lock(&self.hub);
        hub.clients.retain(|other| !Arc::ptr_eq(other, client));
    }

    /// Input for the process. What it does not read any more is dropped.
    pub fn input(&self, bytes: &[u8]) {
        // The lock is held while the process does not read: others' input waits too.
        let mut input = lock(&self.input);
        if let Some(stream) = &mut *input
            && let Err(error) = stream.write_all(bytes)
        {
            log::debug!("standard input: {error}");
            *input = None;
        }
    }

    /// There will be no more input. A terminal has no end: its reader would lose its
    /// output with it.
    pub fn end_input(&self) {
        if self.is_terminal {
            return;
        }
        if let Some(stream) = lock(&self.input).take()
            && let Err(error) = stream.shutdown(Shutdown::Write)
        {
            log::debug!("standard input: {error}");
        }
    }

    /// Waits until all outputs have been copied; or, with a limit, until nothing has come
    /// for so long in all. What a client takes its time to read does not count.
    pub fn drain(&self, limit: Option<Duration>) {
        let mut left = limit;
        let mut hub = lock(&self.hub);
        while hub.open > 0 {
            hub = match &mut left {
                Some(Duration::ZERO) => return,
                Some(left) if hub.spreading == 0 => {
                    let start = Instant::now();
                    let waited = self.changed.wait_timeout(hub, *left);
                    *left = left.saturating_sub(start.elapsed());
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
                Some(_) | None => self
                    .changed
                    .wait(hub)
                    .unwrap_or_else(PoisonError::into_inner),
            };
        }
    }

    /// Tells all clients how the process ended, in a thread of its own: a client may
    /// take its time to read what came before. With a `limit`, it waits no longer for
    /// outputs that something else still holds open.
    ///
    /// # Errors
    /// No thread.
    pub fn farewell(
        self: &Arc<Self>,
        status: u8,
        why: &str,
        limit: Option<Duration>,
        farewells: &Arc<Farewells>,
    ) -> Result<()> {
        let session = Arc::clone(self);
        let ticket = farewells.begin();
        let ended = Frame::Ended {
            status,
            why: why.to_owned(),
        };
        std::thread::Builder::new()
            .name("farewell".into())
            .stack_size(128 << 10)
            .spawn(move || {
                session.drain(limit);
                let clients = {
                    let mut hub = lock(&session.hub);
                    hub.is_over = true;
                    std::mem::take(&mut hub.clients)
                };
                for client in clients {
                    if let Err(error) = client.with(|to| wire::send_frame(to, &ended)) {
                        log::debug!("a client has gone: {error}");
                    }
                }
                drop(ticket);
            })
            .context("cannot start a thread")?;
        Ok(())
    }

    fn copy(&self, mut from: UnixStream, output: Output, log: Option<&SharedLog>) {
        let kind = match output {
            Output::Stdout => wire::STDOUT,
            Output::Stderr => wire::STDERR,
        };
        let mut buffer = vec![0; 32 << 10];
        loop {
            match from.read(&mut buffer) {
                Ok(0) => break,
                Ok(got) => self.spread(kind, &buffer[..got], output, log),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => {
                    log::debug!("an output of the container: {error}");
                    break;
                }
            }
        }
        lock(&self.hub).open -= 1;
        self.changed.notify_all();
    }

    fn spread(&self, kind: u8, bytes: &[u8], output: Output, log: Option<&SharedLog>) {
        if let Some(log) = log
            && let Err(error) = lock(log).write(output, bytes)
        {
            // A full disk costs the log, not the container.
            log::error!("{error:#}");
        }
        let clients = {
            let mut hub = lock(&self.hub);
            hub.spreading += 1;
            hub.clients.clone()
        };
        self.changed.notify_all();
        for client in clients {
            if let Err(error) = client.put(kind, bytes) {
                log::debug!("a client has gone: {error}");
                self.leave(&client);
            }
        }
        lock(&self.hub).spreading -= 1;
        self.changed.notify_all();
    }
}

/// How many clients' ends are still to be told.
#[derive(Default)]
pub struct Farewells {
    count: Mutex<usize>,
    changed: Condvar,
}

/// One that is not told yet.
pub struct Ticket(Arc<Farewells>);

impl Farewells {
    /// One more, until the ticket is dropped.
    pub fn begin(self: &Arc<Self>) -> Ticket {
        *lock(&self.count) += 1;
        Ticket(Arc::clone(self))
    }

    /// Waits until all are told.
    pub fn wait(&self) {
        let mut count = lock(&self.count);
        while *count > 0 {
            let waited = self.changed.wait(count);
            count = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        *lock(&self.0.count) -= 1;
        self.0.changed.notify_all();
    }
}
