//! The broker: the process that serves one child's volumes.
//!
//! ```text
//!   owner                 broker
//!   Volume  source   -->  once for each, or:
//!   Inherit socket   -->  what the broker of a child's source keeps for it comes there
//!   Serve            -->  enters its jail
//!                    <--  Entered
//! ```
//! Then the owner hands its end of the socket to the child's worker, and what comes are
//! the requests of its guest, and claims on what that knows ([`Claim`]). The broker ends
//! with the worker and the last claim.

use super::claim::{Claim, ToKeeper};
use super::server::{Bounds, Server};
use super::table::{HandOver, Table};
use super::wire::{Answer, packet as answer};
use super::{VOLUMES_MAX, Volume};
use crate::error::Error;
use crate::jail;
use crate::worker::packet;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{Mode, OFlags, open};
use rustix::io::{Errno, IoSliceMut};
use rustix::net::sockopt::{Timeout, set_socket_send_buffer_size, set_socket_timeout};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, recvmsg, send};
use rustix::process::{Resource, getrlimit};
use serde::{Deserialize, Serialize};
use std::io;
use std::mem::MaybeUninit;
use std::sync::Arc;
use std::time::Duration;
use vmm::OP_CLAIM;

/// From the owner.
#[derive(Debug, Serialize, Deserialize)]
enum ToBroker {
    /// One more. With it: the directory or file.
    Volume { read_only: bool },
    /// All that there is to serve comes by the socket that is with it.
    Inherit,
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
/// The most claims that are kept at once, and the most tables that are on their way.
const CLAIMS_MAX: usize = 16;
const HAND_OVERS_MAX: usize = 1024;
/// Descriptors beside them, and those that live for one request.
const DESCRIPTORS_BESIDE: usize = 32 + CLAIMS_MAX + HAND_OVERS_MAX;

/// Hands a broker its volumes, over the socket to it, and waits until it serves.
pub(crate) fn set_up(socket: &OwnedFd, volumes: &[Volume]) -> Result<(), Error> {
    if volumes.len() > VOLUMES_MAX {
        return Err(Error::Request("a child has at most 64 volumes"));
    }
    let hand_over = || {
        for volume in volumes {
            let read_only = volume.read_only;
            let message = ToBroker::Volume { read_only };
            packet::send(socket, &message, &[volume.source.as_fd()])?;
        }
        Ok(())
    };
    hand_over().map_err(failed)?;
    begin(socket)
}

/// Has a broker serve what another one keeps.
pub(crate) fn set_up_heir(socket: &OwnedFd, claim: &Claim) -> Result<(), Error> {
    let hand_over = || {
        let from = claim.hand_over()?;
        packet::send(socket, &ToBroker::Inherit, &[from.as_fd()])
    };
    hand_over().map_err(failed)?;
    begin(socket)
}

fn begin(socket: &OwnedFd) -> Result<(), Error> {
    let begin = || {
        packet::send(socket, &ToBroker::Serve, &[])?;
        set_socket_send_buffer_size(socket, BUFFER)?;
        set_socket_timeout(socket, Timeout::Recv, Some(ANSWER))?;
        packet::receive::<Entered>(socket)
    };
    match begin().map_err(failed)? {
        Some((Ok(()), _)) => Ok(()),
        Some((Err(line), _)) => Err(Error::Jail(line)),
        None => Err(Error::Jail("the volumes' server has died".into())),
    }
}

fn failed(error: io::Error) -> Error {
    Error::spawner("a packet to the volumes' server")(error)
}

/// What a broker is to serve.
enum Source {
    Volumes(Vec<Volume>),
    Table(OwnedFd),
}

/// The process: takes its volumes, enters its jail, serves.
pub(crate) fn run(socket: &OwnedFd) -> io::Result<()> {
    let Some(source) = take(socket)? else {
        return Ok(());
    };
    let mut broker = match Broker::new(socket, source) {
        Ok(broker) => broker,
        Err(line) => {
            let line = format!("the volumes' server cannot enter its jail: {line}");
            return packet::send(socket, &Entered::Err(line), &[]);
        }
    };
    packet::send(socket, &Entered::Ok(()), &[])?;
    broker.serve(socket)
}

fn take(socket: &OwnedFd) -> io::Result<Option<Source>> {
    let mut volumes = Vec::new();
    let mut table = None;
    while let Some((message, with)) = packet::receive(socket)? {
        match (message, with.into_iter().next()) {
            (ToBroker::Volume { read_only }, Some(source)) if volumes.len() < VOLUMES_MAX => {
                volumes.push(Volume { source, read_only });
            }
            (ToBroker::Inherit, Some(from)) if table.is_none() => table = Some(from),
            (ToBroker::Serve, None) => {
                return Ok(Some(table.map_or(Source::Volumes(volumes), Source::Table)));
            }
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

/// What it does when it is in its jail.
struct Broker {
    server: Server,
    /// The mounts that its guest's files are in.
    namespace: Arc<OwnedFd>,
    claims: Vec<Claimed>,
    hand_overs: Vec<HandOver>,
    /// Room for a request.
    request: Vec<u8>,
}

/// What is kept for a claim, and the broker's end of that.
struct Claimed {
    table: Arc<Table>,
    socket: OwnedFd,
}

impl Broker {
    /// Closes the jail around this process.
    ///
    /// # Errors
    /// One line.
    fn new(socket: &OwnedFd, source: Source) -> Result<Self, String> {
        let (volumes, from) = match source {
            Source::Volumes(volumes) => (volumes, None),
            Source::Table(from) => (Vec::new(), Some(from)),
        };
        let mut kept = vec![socket.as_fd()];
        kept.extend(from.as_ref().map(AsFd::as_fd));
        let own = jail::enter_broker(volumes, &kept).map_err(|e| e.to_string())?;
        set_socket_send_buffer_size(socket, BUFFER).map_err(|e| e.to_string())?;
        let (namespace, server) = match from {
            None => (Arc::new(own), serve_root()),
            Some(from) => {
                let bounds = bounds();
                let table = Table::receive(&from, bounds.nodes + bounds.handles);
                let table = table.map_err(|e| e.to_string())?;
                let namespace = Arc::clone(&table.namespace);
                (namespace, Server::inherit(table, "", bounds))
            }
        };
        let server = server.map_err(|e| e.to_string())?;
        jail::confine_broker().map_err(|e| e.to_string())?;
        Ok(Self {
            server,
            namespace,
            claims: Vec::new(),
            hand_overs: Vec::new(),
            request: vec![0; REQUEST_MAX],
        })
    }

    /// Answers until there is nobody to answer.
    fn serve(&mut self, guest: &OwnedFd) -> io::Result<()> {
        let mut has_guest = true;
        loop {
            let is_alone = self.claims.is_empty() && self.hand_overs.is_empty();
            match (has_guest, is_alone) {
                (false, true) => return Ok(()),
                (true, true) => has_guest = self.answer(guest)?,
                (_, false) => {
                    let mut ready = self.wait(has_guest.then_some(guest))?.into_iter();
                    if has_guest && ready.next() == Some(true) {
                        has_guest = self.answer(guest)?;
                    }
                    self.attend(ready);
                }
            }
        }
    }

    /// Waits, and says of the guest, each hand-over and each claim whether it is ready.
    fn wait(&self, guest: Option<&OwnedFd>) -> io::Result<Vec<bool>> {
        let mut all: Vec<PollFd<'_>> = Vec::new();
        all.extend(guest.map(|guest| PollFd::new(guest, PollFlags::IN)));
        let sent = self.hand_overs.iter();
        all.extend(sent.map(|sent| PollFd::new(sent, PollFlags::OUT)));
        let claims = self.claims.iter().map(|claim| &claim.socket);
        all.extend(claims.map(|socket| PollFd::new(socket, PollFlags::IN)));
        loop {
            match poll(&mut all, None) {
                Err(Errno::INTR) => {}
                done => {
                    done?;
                    return Ok(all.iter().map(|fd| !fd.revents().is_empty()).collect());
                }
            }
        }
    }

    /// Goes on with what is ready. Whoever it fails for sees an end of file.
    fn attend(&mut self, mut ready: impl Iterator<Item = bool>) {
        self.hand_overs.retain_mut(|sent| {
            let is_done = ready.next() == Some(true) && sent.go_on().unwrap_or(true);
            !is_done
        });
        let mut asked = Vec::new();
        self.claims.retain(|claim| {
            if ready.next() != Some(true) {
                return true;
            }
            match packet::try_receive::<ToKeeper>(&claim.socket) {
                Ok(Some(Some((ToKeeper::HandOver, with)))) => {
                    let to = with.into_iter().next();
                    asked.extend(to.map(|to| HandOver::new(Arc::clone(&claim.table), to)));
                    true
                }
                Ok(None) => true,
                Ok(Some(None)) | Err(_) => false,
            }
        });
        let room = HAND_OVERS_MAX - self.hand_overs.len();
        self.hand_overs.extend(asked.into_iter().take(room));
    }

    /// Waits for one packet, and answers it; false when the guest has ended.
    fn answer(&mut self, guest: &OwnedFd) -> io::Result<bool> {
        let Some((len, with)) = receive(guest, &mut self.request)? else {
            return Ok(false);
        };
        let asked = self.request.get(..len).ok_or(io::ErrorKind::FileTooLarge)?;
        let answer = if asked.get(4..8) == Some(&OP_CLAIM.to_le_bytes()) {
            Some(answer(0, self.claim(with)))
        } else {
            self.server.serve(asked).map_err(io::Error::other)?
        };
        let Some(answer) = answer else {
            return Ok(true);
        };
        loop {
            match send(guest, &answer, SendFlags::NOSIGNAL) {
                Err(Errno::INTR) => {}
                // The worker has ended.
                Err(Errno::PIPE | Errno::CONNRESET) => return Ok(false),
                sent => return Ok(sent.map(|_| true)?),
            }
        }
    }

    /// Keeps what the guest knows now.
    fn claim(&mut self, socket: Option<OwnedFd>) -> Result<Answer, Errno> {
        let socket = socket.ok_or(Errno::INVAL)?;
        if self.claims.len() >= CLAIMS_MAX {
            return Err(Errno::NFILE);
        }
        let table = Arc::new(self.server.table(&self.namespace));
        self.claims.push(Claimed { table, socket });
        Ok(Answer::empty())
    }
}

/// One packet, and the descriptor that came with it; `None` at the other side's end. A
/// packet that is longer than the buffer has its true length.
fn receive(socket: &OwnedFd, buffer: &mut [u8]) -> io::Result<Option<(usize, Option<OwnedFd>)>> {
    let flags = RecvFlags::TRUNC | RecvFlags::CMSG_CLOEXEC;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let got = loop {
        match recvmsg(socket, &mut [IoSliceMut::new(buffer)], &mut control, flags) {
            Err(Errno::INTR) => {}
            Err(Errno::CONNRESET) => return Ok(None),
            done => break done?,
        }
    };
    let with = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    Ok((got.bytes > 0).then_some((got.bytes, with)))
}
