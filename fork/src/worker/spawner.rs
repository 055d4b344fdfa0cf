//! The spawner as its owner sees it: a process that starts workers and sees them end.
//!
//! The owner is a program with many threads, open files and secrets in its memory; a
//! worker is to have none of them. So workers are not forked from the owner, but from
//! a small process that it starts once. That one also knows when each has died, and
//! takes away what it left.

mod process;

pub(super) use process::run;

use super::packet;
use super::process::{Entered, SPAWNER};
use crate::error::Error;
use crate::jail::{Confinement, Limits};
use crate::volumes::{Claim, Volume, broker};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde::{Deserialize, Serialize};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What both programs must be of: they are installed together.
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// How long a worker may take into its jail. A millisecond is usual; an emulated host
/// under load is a thousand times slower.
const ENTER_TIMEOUT: Duration = Duration::from_secs(30);

/// How long the spawner may take to end all workers: some milliseconds each, and there
/// may be a thousand.
const END_TIMEOUT: Duration = Duration::from_secs(60);

/// Whether workers are jailed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Jail {
    /// Each worker has a user, namespaces and a cgroup of its own, an empty root, and
    /// no privilege. Needs root.
    On(Limits),
    /// Only what a process can do to itself: no_new_privs, resource limits and the
    /// lists of system calls. For use without root.
    Off,
}

/// How to start workers.
#[derive(Debug, Clone)]
pub struct WorkersSpec {
    /// The worker program: see [`find_program`](super::find_program).
    pub program: PathBuf,
    /// What each worker is put into.
    pub jail: Jail,
}

/// What became of the workers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Those that were started, brokers among them.
    pub started: u64,
    /// Those of them that have ended and been reaped.
    pub gone: u64,
    /// Those of them that were killed for a system call that no VM needs.
    pub violations: u64,
}

/// The spawner. Dropping it ends all workers, and returns when they are gone.
#[derive(Debug)]
pub struct Workers {
    line: Mutex<Line>,
    spawner: Child,
    missing: Vec<String>,
}

/// To the spawner: one request and its answer at a time, but for one worker that was
/// asked for ahead.
#[derive(Debug)]
struct Line {
    /// `None`: an exchange was broken off.
    socket: Option<OwnedFd>,
    ahead: Ahead,
}

/// A worker that was asked for before it is needed.
#[derive(Debug)]
enum Ahead {
    None,
    /// The answer is the next to come.
    Asked,
    Come(Reply, Option<OwnedFd>),
}

/// From the owner to the spawner.
#[derive(Debug, Serialize, Deserialize)]
enum Request {
    /// First, and once.
    Configure { version: String, jail: Jail },
    /// Start a worker.
    Spawn,
    /// Start a broker.
    Broker,
    /// Count.
    Counts,
}

/// From the spawner: one to each request.
#[derive(Debug, Serialize, Deserialize)]
enum Reply {
    /// The limits that cannot be kept.
    Configured {
        missing: Vec<String>,
    },
    /// With the owner's end of the worker's socket.
    Spawned {
        pid: i32,
    },
    Counts(Counts),
    Failed(String),
}

/// From the spawner to a worker: it is in its cgroup and may begin.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Start {
    pub(super) confinement: Confinement,
}

impl Workers {
    /// Starts a spawner.
    ///
    /// # Errors
    /// A program that cannot be started or is of another version.
    pub fn start(spec: WorkersSpec) -> Result<Self, Error> {
        let (socket, theirs) = packet::pair().map_err(Error::spawner("socketpair"))?;
        let program = std::path::absolute(&spec.program)
            .map_err(Error::io(&spec.program, "cannot find it"))?;
        let spawner = Command::new(&program)
            .arg(SPAWNER)
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .spawn()
            .map_err(Error::io(&program, "cannot start it"))?;
        let mut this = Self {
            line: Mutex::new(Line {
                socket: Some(socket),
                ahead: Ahead::None,
            }),
            spawner,
            missing: Vec::new(),
        };
        let configure = Request::Configure {
            version: VERSION.to_owned(),
            jail: spec.jail,
        };
        match this.ask(&configure)? {
            (Reply::Configured { missing }, _) => this.missing = missing,
            (other, _) => return Err(unexpected(other)),
        }
        Ok(this)
    }

    /// The limits that this host cannot keep, for want of cgroups: one line each.
    pub fn missing(&self) -> &[String] {
        &self.missing
    }

    /// Has one worker started, and does not wait for it: it is what the next
    /// [`Self::spawn`] returns, which is then faster.
    ///
    /// # Errors
    /// When the spawner has died.
    pub fn spawn_ahead(&self) -> Result<(), Error> {
        let mut line = self.lock();
        if matches!(line.ahead, Ahead::None) {
            line.send(&Request::Spawn)?;
            line.ahead = Ahead::Asked;
        }
        Ok(())
    }

    /// Starts a worker and waits until it is in its jail. Returns the socket to it and
    /// its pid. The worker ends when the socket is closed; nobody else needs to reap it.
    ///
    /// # Errors
    /// What kept the worker from its jail.
    #[doc(hidden)]
    pub fn spawn(&self) -> Result<(OwnedFd, Pid), Error> {
        // The lock is not held meanwhile.
        let ahead = self.lock().take_ahead()?;
        let reply = match ahead {
            Some(reply) => reply,
            None => self.ask(&Request::Spawn)?,
        };
        let (pid, socket) = match reply {
            (Reply::Spawned { pid }, Some(socket)) => (pid, socket),
            (Reply::Failed(line), _) => return Err(Error::Jail(line)),
            (other, _) => return Err(unexpected(other)),
        };
        let pid = Pid::from_raw(pid).ok_or_else(|| unexpected(Reply::Spawned { pid }))?;
        // Outside of the lock: meanwhile the spawner starts the next.
        if !readable(&socket, ENTER_TIMEOUT)? {
            return Err(Error::Jail(format!(
                "worker {pid} was not in its jail after {} s",
                ENTER_TIMEOUT.as_secs()
            )));
        }
        match packet::receive::<Entered>(&socket).map_err(Error::spawner("a worker's packet"))? {
            Some((Ok(()), _)) => Ok((socket, pid)),
            Some((Err(line), _)) => Err(Error::Jail(line)),
            None => Err(Error::Jail(format!(
                "worker {pid} died on its way into its jail"
            ))),
        }
    }

    /// Starts a broker for these volumes, and waits until it serves. Returns the socket
    /// for the worker of the child that is to have them; the broker ends when it is
    /// closed.
    ///
    /// # Errors
    /// Workers without a jail, too many volumes, or what kept the broker from its jail.
    #[doc(hidden)]
    pub fn serve(&self, volumes: &[Volume]) -> Result<(OwnedFd, Pid), Error> {
        let (socket, pid) = self.start_broker()?;
        broker::set_up(&socket, volumes)?;
        Ok((socket, pid))
    }

    /// The same for a child that goes on with the volumes of its source.
    ///
    /// # Errors
    /// Workers without a jail, a source whose broker has ended, or what kept the broker
    /// from its jail.
    #[doc(hidden)]
    pub fn serve_heir(&self, claim: &Claim) -> Result<(OwnedFd, Pid), Error> {
        let (socket, pid) = self.start_broker()?;
        broker::set_up_heir(&socket, claim)?;
        Ok((socket, pid))
    }

    fn start_broker(&self) -> Result<(OwnedFd, Pid), Error> {
        let (pid, socket) = match self.ask(&Request::Broker)? {
            (Reply::Spawned { pid }, Some(socket)) => (pid, socket),
            (other, _) => return Err(unexpected(other)),
        };
        let pid = Pid::from_raw(pid).ok_or_else(|| unexpected(Reply::Spawned { pid }))?;
        Ok((socket, pid))
    }

    /// How many workers were started, and how many of them are gone.
    ///
    /// # Errors
    /// When the spawner has died.
    pub fn counts(&self) -> Result<Counts, Error> {
        match self.ask(&Request::Counts)? {
            (Reply::Counts(counts), _) => Ok(counts),
            (other, _) => Err(unexpected(other)),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Line> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ask(&self, request: &Request) -> Result<Answer, Error> {
        match self.lock().exchange(request)? {
            (Reply::Failed(line), _) => Err(Error::Jail(line)),
            answer => Ok(answer),
        }
    }
}

/// With the descriptor that came with it.
type Answer = (Reply, Option<OwnedFd>);

/// A step that fails is the last: a late answer would be taken for the next request's.
impl Line {
    fn exchange(&mut self, request: &Request) -> Result<Answer, Error> {
        if let Ahead::Asked = self.ahead {
            let (reply, socket) = self.receive()?;
            self.ahead = Ahead::Come(reply, socket);
        }
        self.send(request)?;
        self.receive()
    }

    /// The worker that was asked for ahead, once the spawner has answered.
    fn take_ahead(&mut self) -> Result<Option<Answer>, Error> {
        match std::mem::replace(&mut self.ahead, Ahead::None) {
            Ahead::None => Ok(None),
            Ahead::Asked => self.receive().map(Some),
            Ahead::Come(reply, socket) => Ok(Some((reply, socket))),
        }
    }

    fn send(&mut self, request: &Request) -> Result<(), Error> {
        let sent = self
            .socket
            .as_ref()
            .map(|socket| packet::send(socket, request, &[]));
        match sent {
            Some(Ok(())) => Ok(()),
            Some(Err(error)) => Err(self.broken(Some(error))),
            None => Err(self.broken(None)),
        }
    }

    fn receive(&mut self) -> Result<Answer, Error> {
        match self.socket.as_ref().map(packet::receive::<Reply>) {
            Some(Ok(Some((reply, descriptors)))) => Ok((reply, descriptors.into_iter().next())),
            Some(Err(error)) => Err(self.broken(Some(error))),
            Some(Ok(None)) | None => Err(self.broken(None)),
        }
    }

    fn broken(&mut self, error: Option<io::Error>) -> Error {
        self.socket = None;
        match error {
            Some(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                Error::spawner("the spawner's packet")(error)
            }
            _ => Error::Jail("the spawner of workers has died".into()),
        }
    }
}

fn unexpected(reply: Reply) -> Error {
    Error::Jail(format!("the spawner answered something else: {reply:?}"))
}

/// Whether `fd` can be read, or has ended, within `limit`.
fn readable(fd: impl AsFd, limit: Duration) -> Result<bool, Error> {
    let until = Instant::now() + limit;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).unwrap_or_default();
        match poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&left)) {
            Ok(ready) => return Ok(ready > 0),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(Error::spawner("poll")(errno.into())),
        }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        // The end of this socket is what tells the spawner.
        self.line
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner)
            .socket = None;
        if let Err(error) = end(&mut self.spawner) {
            log::error!("the spawner of workers did not end: {error}");
        }
    }
}

/// Waits for the spawner's end, and kills it when that takes too long: then its
/// workers die with it, and the next spawner removes their cgroups.
fn end(spawner: &mut Child) -> Result<(), Error> {
    let pid = Pid::from_child(spawner);
    let ended = pidfd_open(pid, PidfdFlags::empty())
        .map_err(|errno| Error::spawner("pidfd_open")(errno.into()))
        .and_then(|pidfd| readable(pidfd, END_TIMEOUT));
    if !matches!(ended, Ok(true)) {
        log::warn!("the spawner of workers is killed");
        spawner.kill().map_err(Error::spawner("kill"))?;
    }
    spawner.wait().map_err(Error::spawner("wait"))?;
    Ok(())
}
