//! How a container says that it is warm, and hears that it is a child: the
//! socket and the helper program of docs/warm.md.

use crate::mounts::{make_directory, make_read_only, mount};
use crate::poll::{Poll, Token};
use rustix::fd::OwnedFd;
use rustix::fs::Mode;
use rustix::io::{Errno, read, write};
use rustix::mount::MountFlags;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, listen, socket_with,
};
use std::collections::BTreeMap;
use std::io;

/// Where the container finds them; a file system of its own, read-only.
const DIRECTORY: &str = "/run/vm-run";

/// The socket in it.
const SOCKET: &str = "/run/vm-run/sock";

/// The helper program in it.
pub const HELPER: &str = "/run/vm-run/warm";

/// How the container's first process finds the socket.
pub const VARIABLE: &str = "VM_RUN_WARM=/run/vm-run/sock";

/// What a process writes.
const WARM: &[u8] = b"warm\n";

/// How many processes of a container can be connected.
const MAX_CLIENTS: usize = 16;

/// Puts the socket and the helper into the container's root, which must be the
/// root by now. The result is the socket, which listens.
pub fn place(helper: &[u8]) -> Result<OwnedFd, String> {
    make_directory(DIRECTORY)?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOATIME;
    mount("tmpfs", DIRECTORY, "tmpfs", flags, c"size=1m,mode=755")?;
    let all = Mode::RUSR | Mode::RGRP | Mode::ROTH;
    let program = all | Mode::XUSR | Mode::XGRP | Mode::XOTH;
    std::fs::write(HELPER, helper)
        .and_then(|()| Ok(rustix::fs::chmod(HELPER, program)?))
        .map_err(|e| format!("cannot make {HELPER}: {e}"))?;
    let socket = open_socket().map_err(|e| format!("cannot make {SOCKET}: {e}"))?;
    make_read_only(DIRECTORY, flags)?;
    Ok(socket)
}

fn open_socket() -> rustix::io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    bind(&socket, &SocketAddrUnix::new(SOCKET)?)?;
    // Connecting takes the right to write, and any user may.
    let all = Mode::RUSR | Mode::RGRP | Mode::ROTH | Mode::WUSR | Mode::WGRP | Mode::WOTH;
    rustix::fs::chmod(SOCKET, all)?;
    listen(&socket, MAX_CLIENTS as i32)?;
    Ok(socket)
}

/// A process of the container that has connected.
#[derive(Debug)]
struct Client {
    socket: OwnedFd,
    /// How much of [`WARM`] it has written.
    said: usize,
}

/// What there is beside the processes of a warm container.
#[derive(Debug)]
pub struct Warm {
    listener: OwnedFd,
    clients: BTreeMap<u64, Client>,
    next_client: u64,
    is_warm: bool,
}

impl Warm {
    /// Takes what [`place`] has made.
    pub fn new(listener: OwnedFd, poll: &Poll) -> io::Result<Self> {
        poll.watch_for_input(&listener, Token::WarmListener)?;
        Ok(Self {
            listener,
            clients: BTreeMap::new(),
            next_client: 0,
            is_warm: false,
        })
    }

    /// Takes one connection, if there is one: `false` if not. One too many is
    /// closed.
    pub fn accept(&mut self, poll: &Poll) -> io::Result<bool> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = match accept_with(&self.listener, flags) {
            Ok(socket) => socket,
            Err(Errno::INTR | Errno::CONNABORTED) => return Ok(true),
            Err(Errno::AGAIN) => return Ok(false),
            Err(e) => return Err(e.into()),
        };
        if self.clients.len() < MAX_CLIENTS {
            let number = self.next_client;
            self.next_client += 1;
            poll.watch_edges(&socket, Token::WarmClient(number))?;
            self.clients.insert(number, Client { socket, said: 0 });
        }
        Ok(true)
    }

    /// Reads what a process says; `true` if the container is warm by it, once and
    /// not in a child.
    /// One that says anything else, or goes, is forgotten.
    pub fn read(&mut self, number: u64) -> bool {
        let Some(client) = self.clients.get_mut(&number) else {
            return false;
        };
        if client.read().is_err() {
            self.clients.remove(&number);
            return false;
        }
        let first = client.is_warm() && !self.is_warm;
        self.is_warm |= first;
        first
    }

    /// The same for all that has come until now: the container is frozen, and
    /// what it has said counts.
    pub fn catch_up(&mut self, poll: &Poll) -> io::Result<bool> {
        // As many as can wait, and one for each that is in the way.
        for _ in 0..4 * MAX_CLIENTS {
            if !self.accept(poll)? {
                break;
            }
        }
        let numbers: Vec<u64> = self.clients.keys().copied().collect();
        Ok(numbers
            .into_iter()
            .fold(false, |warm, n| warm | self.read(n)))
    }

    /// The container, which does not run, is a child: each of its processes that is
    /// waiting has its answer and reads it when it runs.
    pub fn become_child(&mut self, generation: u64) {
        // The host of a child knows already.
        self.is_warm = true;
        let answer = format!("child {generation:016x}\n");
        self.clients.retain(|_, client| {
            if client.is_warm() {
                // Into an empty buffer, and one that has gone needs no answer.
                write(&client.socket, answer.as_bytes()).ok();
            }
            !client.is_warm()
        });
    }
}

impl Client {
    fn is_warm(&self) -> bool {
        self.said == WARM.len()
    }

    /// Reads to EAGAIN. An error is the end of it.
    fn read(&mut self) -> Result<(), Errno> {
        loop {
            // One byte more than it may say.
            let mut bytes = [0; WARM.len() + 1];
            let expected = &WARM[self.said..];
            match read(&self.socket, &mut bytes[..=expected.len()]) {
                Ok(0) => return Err(Errno::PIPE),
                Ok(n) if expected.starts_with(&bytes[..n]) => self.said += n,
                Ok(_) => return Err(Errno::PROTO),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(()),
                Err(e) => return Err(e),
            }
        }
    }
}
