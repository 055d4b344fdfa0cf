//! Messages between processes on one host: one packet each, with descriptors.
//!
//! A sequenced-packet socket keeps the borders of messages and tells of the other
//! side's end, so there is no framing and no partial message (unix(7)).

use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::{Errno, IoSlice, IoSliceMut};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg,
    sendmsg, socketpair,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io;
use std::mem::MaybeUninit;

/// The longest packet, in bytes. A VM's state goes as a descriptor.
const PACKET_MAX: usize = 16 << 10;

/// The most descriptors that come with one packet.
pub(crate) const DESCRIPTORS_MAX: usize = 4 + vmm::DISK_LAYERS_MAX;
const _: () = assert!(DESCRIPTORS_MAX >= 2 + vmm::LAYERS_MAX);

/// Two ends of a new connection.
pub(crate) fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?)
}

/// Sends one message, with descriptors. It waits while the other side's buffer is
/// full.
pub(crate) fn send(
    socket: impl AsFd,
    message: &impl Serialize,
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<()> {
    send_with(socket, message, descriptors, SendFlags::empty())
}

/// The same, or an error of the kind WouldBlock.
pub(crate) fn try_send(
    socket: impl AsFd,
    message: &impl Serialize,
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<()> {
    send_with(socket, message, descriptors, SendFlags::DONTWAIT)
}

fn send_with(
    socket: impl AsFd,
    message: &impl Serialize,
    descriptors: &[BorrowedFd<'_>],
    flags: SendFlags,
) -> io::Result<()> {
    let bytes = postcard::to_stdvec(message).map_err(io::Error::other)?;
    if bytes.len() > PACKET_MAX {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    loop {
        match sendmsg(
            &socket,
            &[IoSlice::new(&bytes)],
            &mut control,
            flags | SendFlags::NOSIGNAL,
        ) {
            Err(Errno::INTR) => {}
            done => return Ok(done.map(drop)?),
        }
    }
}

/// A message and what came with it; `None` when the other side has ended the
/// connection.
pub(crate) type Received<M> = Option<(M, Vec<OwnedFd>)>;

/// Waits for one message.
pub(crate) fn receive<M: DeserializeOwned>(socket: impl AsFd) -> io::Result<Received<M>> {
    receive_with(socket, RecvFlags::empty())
}

/// One message if it has come; `None` if not.
pub(crate) fn try_receive<M: DeserializeOwned>(
    socket: impl AsFd,
) -> io::Result<Option<Received<M>>> {
    match receive_with(socket, RecvFlags::DONTWAIT) {
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
        done => done.map(Some),
    }
}

fn receive_with<M: DeserializeOwned>(
    socket: impl AsFd,
    flags: RecvFlags,
) -> io::Result<Received<M>> {
    let flags = flags | RecvFlags::CMSG_CLOEXEC;
    let mut bytes = [0; PACKET_MAX];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let got = loop {
        let mut slices = [IoSliceMut::new(&mut bytes)];
        match recvmsg(&socket, &mut slices, &mut control, flags) {
            Err(Errno::INTR) => {}
            // A process that is killed with unread messages resets the connection.
            Err(Errno::CONNRESET) => return Ok(None),
            done => break done?,
        }
    };
    let descriptors: Vec<OwnedFd> = control
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
            _ => None,
        })
        .flatten()
        .collect();
    if got.bytes == 0 {
        return Ok(None);
    }
    if got
        .flags
        .intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC)
    {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let message = postcard::from_bytes(&bytes[..got.bytes])
        .map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
    Ok(Some((message, descriptors)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, memfd_create};
    use rustix::io::{pread, write};

    #[test]
    fn messages_keep_their_borders_and_bring_descriptors() {
        let (a, b) = pair().expect("a pair");
        let file = memfd_create("t", MemfdFlags::CLOEXEC).expect("a file");
        write(&file, b"x").expect("written");
        send(&a, &(7_u32, "one"), &[file.as_fd(), file.as_fd()]).expect("sent");
        send(&a, &(8_u32, "two"), &[]).expect("sent");
        drop(a);
        let (message, got): ((u32, String), _) = receive(&b).expect("received").expect("a message");
        assert_eq!((message.0, message.1.as_str(), got.len()), (7, "one", 2));
        let mut byte = [0];
        assert_eq!(pread(&got[1], &mut byte, 0), Ok(1));
        assert_eq!(byte, *b"x");
        let (message, got): ((u32, String), _) = receive(&b).expect("received").expect("a message");
        assert_eq!((message.0, got.len()), (8, 0));
        assert!(receive::<u32>(&b).expect("the end").is_none());
    }

    #[test]
    fn what_is_too_long_or_no_message_is_refused() {
        let (a, b) = pair().expect("a pair");
        assert!(send(&a, &vec![0_u8; PACKET_MAX], &[]).is_err());
        write(&a, &[0xff; 3]).expect("written");
        assert!(receive::<(u64, u64)>(&b).is_err());
        write(&a, &[0; PACKET_MAX + 1]).expect("written");
        assert!(receive::<u8>(&b).is_err());
    }
}
