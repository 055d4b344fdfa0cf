//! File system device (virtio 1.2 §5.11): hands FUSE requests to a server outside of
//! this process, which is bound late, and its answers to the guest.
//!
//! The device knows of FUSE only the two headers (Linux `include/uapi/linux/fuse.h`). A
//! request goes to the server in one packet, its data straight from guest memory; the
//! answer is waited for, and read straight into the guest's buffers. So there is one
//! request under way at a time, and none when the device is at rest. Neither side is
//! believed: lengths are checked, and a server that does not answer what was asked is
//! given up; from then on, as without a server, every request fails and the guest lives.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::{Errno, IoSlice, retry_on_intr};
use rustix::net::sockopt::socket_type;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketType, sendmsg};
use serde::{Deserialize, Serialize};

use super::chain::{Chain, ChainError};
use super::iov;
use super::queue::{DeviceIo, QueueError};
use super::{Progress, VirtioDevice, copy_config};

const TYPE_FS: u32 = 26;
/// Requests that nobody waits for, and all others. A request of [`PACKET_MAX`] has some
/// forty descriptors.
const QUEUE_SIZES: &[u16] = &[64, 128];

/// What the guest mounts.
const TAG: &[u8] = b"volumes";
/// Bytes that a tag has room for (§5.11.4).
const TAG_LEN: usize = 36;

/// `struct fuse_in_header`: len, opcode, unique, nodeid, uid, gid, pid, padding.
const IN_HEADER: usize = 40;
/// `struct fuse_out_header`: len, error, unique.
const OUT_HEADER: usize = 16;

const OP_FORGET: u32 = 2;
const OP_INTERRUPT: u32 = 36;
const OP_BATCH_FORGET: u32 = 42;

/// No request of FUSE, nor of the guest: it is the monitor's own, and comes with a socket
/// on which what the guest knows of its files at that instant can be asked for
/// ([`Fs::claim`]).
pub const OP_CLAIM: u32 = u32::MAX;

/// The longest request, in bytes: 128 KiB of data and room for what describes it. A
/// packet is held in the socket's buffer, 208 KiB by Linux's default.
pub const PACKET_MAX: usize = (128 << 10) + 4096;
/// The most data moved before others get their turn, in bytes.
const BURST_MAX: usize = 4 << 20;

/// The device has no state of its own: what a guest knows of its server is lost with it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FsState {}

/// Why a server could not be bound.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// There is one already.
    #[error("the file system has a server already")]
    Bound,
    /// Packets must keep their borders.
    #[error("the file server is not at a sequenced-packet socket")]
    NotPackets,
    /// The descriptor cannot be asked.
    #[error("cannot use the file server's socket")]
    Io(#[source] io::Error),
}

/// The file system device.
#[derive(Debug, Default)]
pub struct Fs {
    server: Option<OwnedFd>,
}

/// What the device looks at in a request.
struct Header {
    bytes: [u8; IN_HEADER],
    opcode: u32,
    unique: u64,
}

impl Fs {
    /// The device in `state`, without a server.
    pub fn restore(_state: &FsState) -> Self {
        Self::default()
    }

    /// Gives it its server: a socket of the kind SOCK_SEQPACKET. How long an answer may
    /// take is the socket's to know (SO_RCVTIMEO).
    ///
    /// # Errors
    /// A second server, or another kind of descriptor.
    pub fn bind(&mut self, server: OwnedFd) -> Result<(), FsError> {
        if self.server.is_some() {
            return Err(FsError::Bound);
        }
        match socket_type(&server) {
            Ok(SocketType::SEQPACKET) => {}
            Ok(_) | Err(Errno::NOTSOCK) => return Err(FsError::NotPackets),
            Err(error) => return Err(FsError::Io(error.into())),
        }
        self.server = Some(server);
        Ok(())
    }

    /// Whether it has a server, and has not given it up.
    pub fn has_server(&self) -> bool {
        self.server.is_some()
    }

    /// Has the server keep what the guest knows of its files now, for as long as the other
    /// end of `claim` is open: for those who go on as this guest does. The guest is stopped.
    ///
    /// # Errors
    /// A device without a server, or one that does not do it: it goes on serving if it has
    /// said so.
    pub fn claim(&mut self, claim: OwnedFd) -> io::Result<()> {
        let gone = || io::Error::new(io::ErrorKind::NotConnected, "the server has ended");
        let server = self.server.as_ref().ok_or_else(gone)?;
        match ask_to_keep(server.as_fd(), claim.as_fd()) {
            Ok(0) => Ok(()),
            Ok(error) => {
                let why = io::Error::from_raw_os_error(-error);
                Err(io::Error::other(format!(
                    "the server does not keep it: {why}"
                )))
            }
            Err(why) => {
                // Whatever it says next is an answer to nobody.
                self.server = None;
                Err(why)
            }
        }
    }

    /// Carries out one request, and gives the number of bytes written to it.
    fn execute(&mut self, chain: &mut Chain<'_>) -> Result<usize, ChainError> {
        let (readable, room) = (chain.readable.len(), chain.writable.len());
        let header = Header::read(chain)?;
        let wants_answer = header.wants_answer();
        if wants_answer && room < OUT_HEADER {
            return Err(ChainError::TooShort);
        }
        let done = if header.len() != readable || readable > PACKET_MAX {
            Err(Errno::INVAL)
        } else if header.opcode == OP_CLAIM {
            Err(Errno::NOSYS)
        } else {
            self.exchange(&header, chain)
        };
        match done {
            _ if !wants_answer => Ok(0),
            Ok(answer) => {
                chain.writable.write_all(&answer)?;
                // Its length is that of a packet which fitted.
                Ok(u32::from_le_bytes([answer[0], answer[1], answer[2], answer[3]]) as usize)
            }
            Err(errno) => {
                chain.writable.write_all(&failure(header.unique, errno))?;
                Ok(OUT_HEADER)
            }
        }
    }

    /// Has the server carry out a request. What follows the header of its answer is in
    /// the guest's buffers already.
    fn exchange(
        &mut self,
        header: &Header,
        chain: &mut Chain<'_>,
    ) -> Result<[u8; OUT_HEADER], Errno> {
        let server = self.server.as_ref().ok_or(Errno::IO)?;
        match ask(server.as_fd(), header, chain) {
            Ok(answer) => Ok(answer),
            Err(why) => {
                log::warn!("the volumes' server is given up: {why}");
                self.server = None;
                Err(Errno::IO)
            }
        }
    }
}

impl Header {
    /// The guest may change what lies in its memory: the copy is what counts, and what is
    /// sent.
    fn read(chain: &mut Chain<'_>) -> Result<Self, ChainError> {
        let mut bytes = [0; IN_HEADER];
        chain.readable.read_exact(&mut bytes)?;
        let [
            _,
            _,
            _,
            _,
            o0,
            o1,
            o2,
            o3,
            u0,
            u1,
            u2,
            u3,
            u4,
            u5,
            u6,
            u7,
            ..,
        ] = bytes;
        Ok(Self {
            bytes,
            opcode: u32::from_le_bytes([o0, o1, o2, o3]),
            unique: u64::from_le_bytes([u0, u1, u2, u3, u4, u5, u6, u7]),
        })
    }

    /// What the request says of its length.
    fn len(&self) -> usize {
        let [l0, l1, l2, l3, ..] = self.bytes;
        u32::from_le_bytes([l0, l1, l2, l3]) as usize
    }

    fn wants_answer(&self) -> bool {
        !matches!(self.opcode, OP_FORGET | OP_BATCH_FORGET | OP_INTERRUPT)
    }
}

/// See [`Fs::claim`]. The error that the server answers with, negative, or 0.
fn ask_to_keep(server: BorrowedFd<'_>, claim: BorrowedFd<'_>) -> io::Result<i32> {
    let mut header = [0; IN_HEADER];
    header[..4].copy_from_slice(&(IN_HEADER as u32).to_le_bytes());
    header[4..8].copy_from_slice(&OP_CLAIM.to_le_bytes());
    let with = [claim];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&with));
    let (packet, flags) = ([IoSlice::new(&header)], SendFlags::NOSIGNAL);
    // As the vectored calls of all other requests (`iov.rs`).
    let sent = retry_on_intr(|| sendmsg(server, &packet, &mut control, flags))?;
    if sent != IN_HEADER {
        return Err(io::ErrorKind::WriteZero.into());
    }
    let mut answer = [0; OUT_HEADER];
    let got = iov::receive_packet(server, &mut answer, &[])?;
    check_answer(&answer, got, OUT_HEADER, 0)
}

/// Sends a request, and waits for its answer if it has one.
fn ask(
    server: BorrowedFd<'_>,
    header: &Header,
    chain: &mut Chain<'_>,
) -> io::Result<[u8; OUT_HEADER]> {
    let wanted = IN_HEADER + chain.readable.len();
    if iov::send_packet(server, &header.bytes, chain.readable.slices())? != wanted {
        return Err(io::ErrorKind::WriteZero.into());
    }
    let mut answer = [0; OUT_HEADER];
    if !header.wants_answer() {
        return Ok(answer);
    }
    // A copy of the buffers without the header's place: it is written when it is checked.
    let room = chain.writable.len();
    let data = chain.writable.split_off(OUT_HEADER);
    let got = iov::receive_packet(server, &mut answer, data.slices())?;
    check_answer(&answer, got, room, header.unique)?;
    Ok(answer)
}

/// The error, negative or 0, of an answer of `got` bytes to the request `asked`, which has
/// `room` for so many.
fn check_answer(answer: &[u8; OUT_HEADER], got: usize, room: usize, asked: u64) -> io::Result<i32> {
    let odd = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what);
    let &[l0, l1, l2, l3, e0, e1, e2, e3, unique @ ..] = answer;
    match got {
        0 => return Err(io::ErrorKind::UnexpectedEof.into()),
        1..OUT_HEADER => return Err(odd("its answer has no header")),
        _ if got > room => return Err(odd("its answer is too long")),
        _ => {}
    }
    if u32::from_le_bytes([l0, l1, l2, l3]) as usize != got {
        return Err(odd("its answer is not as long as it says"));
    }
    if u64::from_le_bytes(unique) != asked {
        return Err(odd("it answers another request"));
    }
    // An error, if any, of those that the guest's kernel takes (fuse_dev_do_write).
    let error = i32::from_le_bytes([e0, e1, e2, e3]);
    if !(-511..=0).contains(&error) {
        return Err(odd("its answer is no error that there is"));
    }
    Ok(error)
}

/// The answer to a request that cannot be carried out.
fn failure(unique: u64, errno: Errno) -> [u8; OUT_HEADER] {
    let mut answer = [0; OUT_HEADER];
    answer[..4].copy_from_slice(&(OUT_HEADER as u32).to_le_bytes());
    answer[4..8].copy_from_slice(&(-errno.raw_os_error()).to_le_bytes());
    answer[8..].copy_from_slice(&unique.to_le_bytes());
    answer
}

impl VirtioDevice for Fs {
    type State = FsState;

    fn device_type(&self) -> u32 {
        TYPE_FS
    }

    fn queue_sizes(&self) -> &'static [u16] {
        QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        0
    }

    /// The layout is that of §5.11.4: the tag, and one queue of requests.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; TAG_LEN + 4];
        config[..TAG.len()].copy_from_slice(TAG);
        config[TAG_LEN..].copy_from_slice(&1_u32.to_le_bytes());
        copy_config(&config, offset, data);
    }

    fn process_queue(
        &mut self,
        queue: usize,
        io: &mut DeviceIo<'_>,
    ) -> Result<Progress, QueueError> {
        let mut moved = 0;
        while moved < BURST_MAX {
            let Some(mut chain) = io.pop_or_wait(queue)? else {
                return Ok(Progress::Done);
            };
            // Each request counts for a quarter of the longest at least: it waits.
            moved += PACKET_MAX / 4 + chain.readable.len() + chain.writable.len();
            let written = self
                .execute(&mut chain)
                .map_err(|source| QueueError::Chain { queue, source })?;
            io.push_used(queue, &chain, written)?;
        }
        Ok(Progress::More)
    }

    fn host_events(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn process_host_events(&mut self, _io: &mut DeviceIo<'_>) -> Result<Progress, QueueError> {
        Ok(Progress::Done)
    }

    /// The server knows nothing of it: its guest begins a new session by FUSE_INIT.
    fn reset(&mut self) {}

    fn save(&self) -> FsState {
        FsState {}
    }
}

#[cfg(test)]
mod tests;
