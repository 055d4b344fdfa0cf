//! The broker: the process that serves one child's volumes.
//!
//! ```text
//!   owner                 broker
//!   Volume  source   -->  once for each
//!   Serve            -->  enters its jail
//!                    <--  Entered
//! ```
//! Then the owner hands its end of the socket to the child's worker, and what comes are
//! the requests of its guest. The end of the worker is the end of the socket, and of the
//! broker.

use super::server::{Bounds, Server};
use super::{VOLUMES_MAX, Volume};
use crate::error::Error;
use crate::jail;
use crate::worker::packet;
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_send_buffer_size, set_socket_timeout};
use rustix::net::{RecvFlags, SendFlags, recv, send};
use rustix::process::{Resource, getrlimit};
use serde::{Deserialize, Serialize};
use std::io;
use std::time::Duration;

/// From the owner.
#[derive(Debug, Serialize, Deserialize)]
enum ToBroker {
    /// One more. With it: the directory or file.
    Volume { read_only: bool },
    /// That was all.
    Serve,
}

/// From the broker, once: it is in its jail, or why not.
type Entered = Result<(), String>;

/// How long an answer may take before the guest is told that its volumes are gone. The
/// whole VM waits meanwhile, so it is no more than a disk may take that is very slow.
const ANSWER: Duration = Duration::from_secs(120);

/// What a socket's buffer has to hold, in bytes: a whole packet, and the kernel's own
/// costs. Linux's default is as much.
const BUFFER: usize = 208 << 10;

/// The longest request, in bytes: the device sends none that is longer.
const REQUEST_MAX: usize = (128 << 10) + 4096;

/// The most files that a guest may know, and have open. Each is a descriptor, and keeps
/// an inode in the kernel's memory.
const NODES_MAX: usize = 200_000;
const HANDLES_MAX: usize = 16_384;
/// Descriptors beside them, and those that live for one request.
const DESCRIPTORS_BESIDE: usize = 32;

/// Hands a broker its volumes, over the socket to it, and waits until it serves.
pub(crate) fn set_up(socket: &OwnedFd, volumes: &[Volume]) -> Result<(), Error> {
    let failed = Error::spawner("a packet to the volumes' server");
    if volumes.len() > VOLUMES_MAX {
        return Err(Error::Request("a child has at most 64 volumes"));
    }
    let hand_over = || {
        for volume in volumes {
            let read_only = volume.read_only;
            let message = ToBroker::Volume { read_only };
            packet::send(socket, &message, &[volume.source.as_fd()])?;
        }
        packet::send(socket, &ToBroker::Serve, &[])?;
        set_socket_send_buffer_size(socket, BUFFER)?;
        set_socket_timeout(socket, Timeout::Recv, Some(ANSWER))?;
        packet::receive::<Entered>(socket)
    };
    match hand_over().map_err(failed)? {
        Some((Ok(()), _)) => Ok(()),
        Some((Err(line), _)) => Err(Error::Jail(line)),
        None => Err(Error::Jail("the volumes' server has died".into())),
    }
}

/// The process: takes its volumes, enters its jail, serves.
pub(crate) fn run(socket: &OwnedFd) -> io::Result<()> {
    let Some(volumes) = take(socket)? else {
        return Ok(());
    };
    let entered = jail::enter_broker(volumes, socket.as_fd()).map_err(|e| e.to_string());
    let made = entered.and_then(|()| {
        set_socket_send_buffer_size(socket, BUFFER).map_err(|e| e.to_string())?;
        let server = serve_root().map_err(|e| e.to_string())?;
        jail::confine_broker().map_err(|e| e.to_string())?;
        Ok(server)
    });
    let mut server = match made {
        Ok(server) => server,
        Err(line) => {
            let line = format!("the volumes' server cannot enter its jail: {line}");
            return packet::send(socket, &Entered::Err(line), &[]);
        }
    };
    packet::send(socket, &Entered::Ok(()), &[])?;
    serve(socket, &mut server)
}

fn take(socket: &OwnedFd) -> io::Result<Option<Vec<Volume>>> {
    let mut volumes = Vec::new();
    while let Some((message, with)) = packet::receive(socket)? {
        match (message, with.into_iter().next()) {
            (ToBroker::Volume { read_only }, Some(source)) if volumes.len() < VOLUMES_MAX => {
                volumes.push(Volume { source, read_only });
            }
            (ToBroker::Serve, None) => return Ok(Some(volumes)),
            _ => return Err(io::ErrorKind::InvalidData.into()),
        }
    }
    Ok(None)
}

/// In the jail the working directory is that of this process's descriptors.
fn serve_root() -> Result<Server, Errno> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = open("/", flags, Mode::empty())?;
    Server::new(root, "", bounds())
}

/// As much as this process may have.
fn bounds() -> Bounds {
    let most = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    let most = usize::try_from(most).unwrap_or(usize::MAX);
    let most = most.saturating_sub(DESCRIPTORS_BESIDE);
    let handles = HANDLES_MAX.min(most / 4);
    Bounds {
        nodes: NODES_MAX.min(most - handles),
        handles,
    }
}

/// How many descriptors it needs for that.
pub(crate) const DESCRIPTORS: u64 = (NODES_MAX + HANDLES_MAX + DESCRIPTORS_BESIDE) as u64;

/// Answers until there is nobody to answer.
fn serve(socket: &OwnedFd, server: &mut Server) -> io::Result<()> {
    let mut request = vec![0; REQUEST_MAX];
    loop {
        let len = match recv(socket, &mut request[..], RecvFlags::TRUNC) {
            Err(Errno::INTR) => continue,
            Ok((_, 0)) | Err(Errno::CONNRESET) => return Ok(()),
            done => done?.1,
        };
        let asked = request.get(..len).ok_or(io::ErrorKind::FileTooLarge)?;
        let Some(answer) = server.serve(asked).map_err(io::Error::other)? else {
            continue;
        };
        loop {
            match send(socket, &answer, SendFlags::NOSIGNAL) {
                Err(Errno::INTR) => {}
                // The worker has ended.
                Err(Errno::PIPE | Errno::CONNRESET) => return Ok(()),
                sent => {
                    sent?;
                    break;
                }
            }
        }
    }
}
