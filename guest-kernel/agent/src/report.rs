//! What a new process reports of its own start, over a socket that closes at its
//! exec: messages, each a packet.

use crate::exec::Failure;
use crate::names::Names;
use crate::rootfs::Layers;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{OFlags, fcntl_setfl};
use rustix::io::{Errno, IoSlice, IoSliceMut};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, Shutdown, SocketFlags, SocketType, recvmsg, sendmsg, shutdown,
    socketpair,
};
use std::io;
use std::mem::MaybeUninit;
use vm_run_abi::protocol::StartFailure;

/// A step on the way of a new process.
#[derive(Debug)]
pub enum Report {
    /// The container's first process waits for its program; see [`crate::prepared`].
    /// Its namespaces, the trees that show them, and the empty layer if there is one.
    Prepared(Vec<OwnedFd>),
    /// The terminal: master and slave side.
    Terminal(OwnedFd, OwnedFd),
    /// The container's root: its layers, and the files in it that say who it is.
    Root(Layers, Names),
    /// The warm socket, which listens.
    Warm(OwnedFd),
    /// All is ready, the exec is next.
    Ready,
    /// It could not be started, and is about to end.
    Failed(Failure),
    /// The socket is closed. After [`Report::Ready`] and with no
    /// [`Report::Failed`] the program runs.
    End,
}

/// The first byte of a report.
const PREPARED: u8 = b'P';
const TERMINAL: u8 = b'T';
const ROOT: u8 = b'O';
const WARM: u8 = b'W';
const READY: u8 = b'R';
const FAILED: u8 = b'F';

/// The longest report, in bytes. Messages quote paths and arguments.
const REPORT_MAX: usize = 8 << 10;

/// How many descriptors a report can carry.
const DESCRIPTORS_MAX: usize = 8;

/// The new process's side.
#[derive(Debug)]
pub struct Reporter(OwnedFd);

/// Both sides; the agent's does not block.
pub fn channel() -> Result<(OwnedFd, Reporter), Errno> {
    let flags = SocketFlags::CLOEXEC;
    let (reports, reporter) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    fcntl_setfl(&reports, OFlags::NONBLOCK)?;
    Ok((reports, Reporter(reporter)))
}

impl Reporter {
    /// [`Report::Prepared`]
    pub fn prepared(&self, held: &[BorrowedFd<'_>]) -> Result<(), Errno> {
        self.send(PREPARED, &[], held)
    }

    /// [`Report::Terminal`]
    pub fn terminal(&self, master: &OwnedFd, slave: &OwnedFd) -> Result<(), Errno> {
        self.send(TERMINAL, &[], &[master.as_fd(), slave.as_fd()])
    }

    /// [`Report::Root`]
    pub fn root(&self, layers: &Layers, names: &Names) -> Result<(), Errno> {
        let Layers { upper, image } = layers;
        let Names {
            hostname,
            hosts,
            machine_id,
        } = names;
        let all = [upper, image, hostname, hosts, machine_id].map(AsFd::as_fd);
        self.send(ROOT, &[], &all)
    }

    /// [`Report::Warm`]
    pub fn warm(&self, listener: &OwnedFd) -> Result<(), Errno> {
        self.send(WARM, &[], &[listener.as_fd()])
    }

    /// [`Report::Ready`], of a process that runs no program: [`Report::End`] follows.
    pub fn done(&self) -> Result<(), Errno> {
        self.ready()?;
        shutdown(&self.0, Shutdown::Both)
    }

    /// [`Report::Ready`]
    pub fn ready(&self) -> Result<(), Errno> {
        self.send(READY, &[], &[])
    }

    /// [`Report::Failed`]
    pub fn failed(&self, failure: &Failure) -> Result<(), Errno> {
        let reason = match failure.reason {
            StartFailure::NotFound => 0,
            StartFailure::NotExecutable => 1,
            StartFailure::Other => 2,
        };
        let message = truncate(&failure.message);
        self.send(FAILED, &[&[reason], message.as_bytes()], &[])
    }

    fn send(&self, kind: u8, parts: &[&[u8]], descriptors: &[BorrowedFd<'_>]) -> Result<(), Errno> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
            return Err(Errno::NOBUFS);
        }
        let kind = [kind];
        let mut slices = vec![IoSlice::new(&kind)];
        slices.extend(parts.iter().map(|part| IoSlice::new(part)));
        sendmsg(&self.0, &slices, &mut control, SendFlags::NOSIGNAL)?;
        Ok(())
    }
}

/// As much of `message` as a report holds.
fn truncate(message: &str) -> &str {
    &message[..message.floor_char_boundary(REPORT_MAX - 2)]
}

/// The next thing that a new process reports, as soon as it does.
pub fn await_report(reports: BorrowedFd<'_>) -> io::Result<Report> {
    loop {
        match poll(&mut [PollFd::new(&reports, PollFlags::IN)], None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
        if let Some(report) = next_report(reports)? {
            return Ok(report);
        }
    }
}

/// The next thing that a new process reports; `None` if there is nothing now.
pub fn next_report(reports: BorrowedFd<'_>) -> io::Result<Option<Report>> {
    let mut bytes = [0; REPORT_MAX];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut slices = [IoSliceMut::new(&mut bytes)];
    let flags = RecvFlags::CMSG_CLOEXEC;
    let len = match recvmsg(reports, &mut slices, &mut control, flags) {
        Ok(message) => message.bytes,
        Err(Errno::AGAIN | Errno::INTR) => return Ok(None),
        Err(e) => return Err(e.into()),
    };
    let messages = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
        _ => None,
    });
    let descriptors: Vec<OwnedFd> = messages.flatten().collect();
    let malformed = || io::Error::from(io::ErrorKind::InvalidData);
    let Some((kind, body)) = bytes[..len].split_first() else {
        return Ok(Some(Report::End));
    };
    Ok(Some(match (*kind, body) {
        (PREPARED, []) => Report::Prepared(descriptors),
        (TERMINAL, []) => {
            let [master, slave] = descriptors.try_into().map_err(|_| malformed())?;
            Report::Terminal(master, slave)
        }
        (ROOT, []) => {
            let [upper, image, hostname, hosts, machine_id] =
                descriptors.try_into().map_err(|_| malformed())?;
            let names = Names {
                hostname,
                hosts,
                machine_id,
            };
            Report::Root(Layers { upper, image }, names)
        }
        (WARM, []) => {
            let [listener] = descriptors.try_into().map_err(|_| malformed())?;
            Report::Warm(listener)
        }
        (READY, []) => Report::Ready,
        (FAILED, [reason, message @ ..]) => Report::Failed(Failure {
            reason: match reason {
                0 => StartFailure::NotFound,
                1 => StartFailure::NotExecutable,
                _ => StartFailure::Other,
            },
            message: String::from_utf8_lossy(message).into_owned(),
        }),
        _ => return Err(malformed()),
    }))
}
