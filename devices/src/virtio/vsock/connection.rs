//! One stream between a port of the host and a port of the guest, with the
//! credit of both directions (virtio 1.2 §5.10.6.3).

use std::collections::VecDeque;
use std::io::{self, Read};
use std::net::Shutdown;
use std::num::Wrapping;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use rustix::io::Errno;
use rustix::net::{SendFlags, send};

use super::packet::{Header, op, shutdown};
use crate::virtio::{Buffers, ChainError, iov};

/// Bytes that a guest may have under way to a host that does not read: what the
/// guest is told as `buf_alloc`, and the most that one connection buffers.
pub(super) const BUFFER_SIZE: u32 = 256 * 1024;
/// The guest is told of room when this much came free since it was last told.
const CREDIT_STEP: u32 = BUFFER_SIZE / 4;
/// The most payload of one packet to the guest, in bytes.
const PAYLOAD_MAX: usize = 64 * 1024;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The request is to be sent, when the guest has a buffer for it.
    Requested,
    /// The request is sent.
    Connecting,
    Established,
    /// Over for the guest; bytes for the host are left.
    Draining,
}

/// What becomes of a connection after an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Keep,
    /// The guest broke the protocol, or waits for the reset that ends a close.
    Reset,
    /// Nobody needs it any more.
    Remove,
}

#[derive(Debug)]
pub(super) struct Connection {
    /// Our end of the pair, non-blocking.
    stream: UnixStream,
    pub(super) guest_port: u32,
    phase: Phase,
    /// In the line of those that have something for the guest.
    pub(super) queued: bool,

    // Host to guest.
    /// The stream may have bytes (or its end): set by an edge, cleared by EAGAIN.
    readable: bool,
    /// The host sends no more.
    host_sent_all: bool,
    guest_buf_alloc: u32,
    guest_fwd_cnt: Wrapping<u32>,
    sent: Wrapping<u32>,
    credit_requested: bool,

    // Guest to host.
    /// Bytes the host has not taken yet; never more than `BUFFER_SIZE`.
    buffer: VecDeque<u8>,
    /// The host takes no more.
    host_closed: bool,
    /// The host was told that no more comes. Once: each time is an event of the
    /// stream, which would lead here again.
    finished: bool,
    forwarded: Wrapping<u32>,
    /// `forwarded` as the guest last heard of it.
    announced: Wrapping<u32>,
    credit_due: bool,

    /// What the guest said that it does no more: SHUTDOWN flags.
    guest_shutdown: u32,
    /// What we told the guest that the host does no more: SHUTDOWN flags.
    host_shutdown: u32,
}

impl Connection {
    /// A connection to be requested of the guest; `stream` is non-blocking.
    pub(super) fn new(stream: UnixStream, guest_port: u32) -> Self {
        Self {
            stream,
            guest_port,
            phase: Phase::Requested,
            queued: false,
            readable: false,
            host_sent_all: false,
            guest_buf_alloc: 0,
            guest_fwd_cnt: Wrapping(0),
            sent: Wrapping(0),
            credit_requested: false,
            buffer: VecDeque::new(),
            host_closed: false,
            finished: false,
            forwarded: Wrapping(0),
            announced: Wrapping(0),
            credit_due: false,
            guest_shutdown: 0,
            host_shutdown: 0,
        }
    }

    /// Whether packets of the guest still belong to this connection.
    pub(super) fn is_known_to_guest(&self) -> bool {
        matches!(self.phase, Phase::Connecting | Phase::Established)
    }

    /// Whether there is, or may be, a packet for the guest.
    pub(super) fn has_packet(&self) -> bool {
        match self.phase {
            Phase::Requested => true,
            Phase::Connecting | Phase::Draining => false,
            Phase::Established => {
                self.shutdown_due() != 0
                    || self.credit_due
                    || self.can_read() && (self.guest_room() > 0 || !self.credit_requested)
            }
        }
    }

    /// The next packet for the guest: fills `header` (but for the addresses) and
    /// `payload`, and gives the number of payload bytes. `None`: there is none.
    pub(super) fn next_packet(
        &mut self,
        header: &mut Header,
        payload: &mut Buffers<'_>,
    ) -> Result<Option<usize>, ChainError> {
        let mut len = 0;
        match self.phase {
            Phase::Requested => {
                self.phase = Phase::Connecting;
                header.op = op::REQUEST;
            }
            Phase::Connecting | Phase::Draining => return Ok(None),
            Phase::Established => {
                if self.can_read() && self.guest_room() > 0 {
                    len = self.read_stream(payload)?;
                }
                let shutdown_due = self.shutdown_due();
                if len > 0 {
                    header.op = op::RW;
                } else if shutdown_due != 0 {
                    self.host_shutdown |= shutdown_due;
                    header.op = op::SHUTDOWN;
                    header.flags = self.host_shutdown;
                } else if self.credit_due {
                    header.op = op::CREDIT_UPDATE;
                } else if self.can_read() && !self.credit_requested {
                    self.credit_requested = true;
                    header.op = op::CREDIT_REQUEST;
                } else {
                    return Ok(None);
                }
            }
        }
        header.buf_alloc = BUFFER_SIZE;
        header.fwd_cnt = self.forwarded.0;
        self.announced = self.forwarded;
        self.credit_due = false;
        Ok(Some(len))
    }

    /// Reads what the guest has room for. 0: nothing there, or the end.
    fn read_stream(&mut self, payload: &mut Buffers<'_>) -> Result<usize, ChainError> {
        if payload.is_empty() {
            // A read of no bytes would look like the end of the stream.
            return Err(ChainError::TooShort);
        }
        payload.split_off(PAYLOAD_MAX.min(self.guest_room() as usize));
        match iov::readv(self.stream.as_fd(), payload.slices()) {
            Ok(0) => self.host_sent_all = true,
            Ok(len) => {
                // No more than PAYLOAD_MAX.
                self.sent += Wrapping(len as u32);
                return Ok(len);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.readable = false,
            // Reset by the host: no more to come.
            Err(_) => self.host_sent_all = true,
        }
        Ok(0)
    }

    /// The guest sent `header` with `payload`, in this connection.
    pub(super) fn receive(&mut self, header: &Header, payload: Buffers<'_>) -> Outcome {
        self.guest_buf_alloc = header.buf_alloc;
        self.guest_fwd_cnt = Wrapping(header.fwd_cnt);
        if self.guest_room() > 0 {
            // Not at every update: a guest that says "no room" would be asked
            // again at once, and so on.
            self.credit_requested = false;
        }
        match (self.phase, header.op) {
            (Phase::Connecting, op::RESPONSE) => {
                self.phase = Phase::Established;
                Outcome::Keep
            }
            (_, op::RST) => self.reset_by_guest(),
            (Phase::Established, op::RW) => self.receive_data(header.len, payload),
            (Phase::Established, op::SHUTDOWN) => self.receive_shutdown(header.flags),
            (Phase::Established, op::CREDIT_UPDATE) => Outcome::Keep,
            (Phase::Established, op::CREDIT_REQUEST) => {
                self.credit_due = true;
                Outcome::Keep
            }
            _ => Outcome::Reset,
        }
    }

    fn receive_data(&mut self, len: u32, mut payload: Buffers<'_>) -> Outcome {
        let held = self.buffer.len() as u64;
        let broken = u64::from(len) + held > u64::from(BUFFER_SIZE)
            || payload.len() < len as usize
            || self.guest_shutdown & shutdown::SEND != 0;
        if broken {
            return Outcome::Reset;
        }
        payload.split_off(len as usize);
        while self.buffer.is_empty() && !payload.is_empty() && !self.host_closed {
            match iov::send(self.stream.as_fd(), payload.slices()) {
                Ok(count) => {
                    payload.advance(count);
                    self.count_forwarded(count);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => self.host_closes(),
            }
        }
        if self.host_closed {
            self.count_forwarded(payload.len());
        } else if !payload.is_empty() {
            let (old, new) = (self.buffer.len(), payload.len());
            self.buffer.resize(old + new, 0);
            let (front, back) = self.buffer.as_mut_slices();
            // The new bytes are the last ones: in `back`, or across both.
            let in_front = front.len().saturating_sub(old);
            let (a, b) = if in_front > 0 {
                (&mut front[old..], back)
            } else {
                (&mut [][..], &mut back[old - front.len()..])
            };
            if payload.read_exact(a).and(payload.read_exact(b)).is_err() {
                return Outcome::Reset;
            }
        }
        Outcome::Keep
    }

    fn receive_shutdown(&mut self, flags: u32) -> Outcome {
        let new = flags & shutdown::BOTH & !self.guest_shutdown;
        self.guest_shutdown |= new;
        if new & shutdown::RECEIVE != 0 {
            self.refuse_host();
        }
        self.finish_sending();
        if self.guest_shutdown == shutdown::BOTH {
            self.phase = Phase::Draining;
            return Outcome::Reset;
        }
        Outcome::Keep
    }

    fn reset_by_guest(&mut self) -> Outcome {
        self.phase = Phase::Draining;
        // A host that is blocked in a write might never come to read.
        self.shut(Shutdown::Read);
        self.end()
    }

    /// After the guest's side is gone: whether bytes for the host are left.
    pub(super) fn end(&mut self) -> Outcome {
        match self.phase {
            Phase::Draining if !self.buffer.is_empty() => Outcome::Keep,
            _ => Outcome::Remove,
        }
    }

    /// Something happened on the stream (edge-triggered).
    pub(super) fn host_event(&mut self, readable: bool, writable: bool, hung_up: bool) -> Outcome {
        self.readable |= readable;
        if hung_up {
            // Nobody holds the other end. A request not yet sent is withdrawn;
            // bytes already written by the host are still delivered otherwise.
            if self.phase == Phase::Requested {
                return Outcome::Remove;
            }
            self.host_closes();
        }
        if writable {
            self.flush();
        }
        match self.phase {
            Phase::Draining => self.end(),
            _ => Outcome::Keep,
        }
    }

    /// Moves buffered bytes to the host, as many as it takes.
    fn flush(&mut self) {
        while !self.buffer.is_empty() && !self.host_closed {
            let (front, _) = self.buffer.as_slices();
            match send(
                &self.stream,
                front,
                SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
            ) {
                Ok(count) => {
                    self.buffer.drain(..count);
                    self.count_forwarded(count);
                }
                Err(Errno::WOULDBLOCK) => break,
                Err(Errno::INTR) => {}
                Err(_) => self.host_closes(),
            }
        }
        if self.buffer.is_empty() {
            self.buffer = VecDeque::new();
            self.finish_sending();
        }
    }

    /// The host reads no more: what is meant for it is taken and dropped.
    fn host_closes(&mut self) {
        self.host_closed = true;
        let dropped = self.buffer.len();
        self.buffer = VecDeque::new();
        self.count_forwarded(dropped);
    }

    /// The guest sends no more and the host has it all: end of file for the host.
    fn finish_sending(&mut self) {
        let all_sent = self.guest_shutdown & shutdown::SEND != 0 && self.buffer.is_empty();
        if all_sent && !self.finished {
            self.finished = true;
            self.shut(Shutdown::Write);
        }
    }

    /// The guest reads no more: the host's writes fail from now on, and what it
    /// wrote is dropped. Bytes that stayed unread would make a clean close
    /// ECONNRESET for the host.
    fn refuse_host(&mut self) {
        self.shut(Shutdown::Read);
        let mut scrap = [0; 4096];
        // Ends: nothing comes after, and the socket's buffer is finite.
        while self.stream.read(&mut scrap).is_ok_and(|count| count > 0) {}
        self.readable = false;
    }

    fn shut(&self, how: Shutdown) {
        if let Err(error) = self.stream.shutdown(how) {
            // The host's end is gone already.
            log::trace!("vsock: shutdown: {error}");
        }
    }

    /// No more than `BUFFER_SIZE` at a time, so the cast is exact.
    fn count_forwarded(&mut self, count: usize) {
        self.forwarded += Wrapping(count as u32);
        if (self.forwarded - self.announced).0 >= CREDIT_STEP {
            self.credit_due = true;
        }
    }

    fn can_read(&self) -> bool {
        self.readable && !self.host_sent_all && self.guest_shutdown & shutdown::RECEIVE == 0
    }

    /// Bytes that the guest still has room for. A guest that contradicts itself
    /// has none.
    fn guest_room(&self) -> u32 {
        self.guest_buf_alloc
            .saturating_sub((self.sent - self.guest_fwd_cnt).0)
    }

    /// SHUTDOWN flags that the guest is to hear of.
    fn shutdown_due(&self) -> u32 {
        let mut flags = 0;
        if self.host_sent_all {
            flags |= shutdown::SEND;
        }
        if self.host_closed {
            flags |= shutdown::RECEIVE;
        }
        flags & !self.host_shutdown
    }

    /// Our end, for epoll.
    pub(super) fn stream(&self) -> &UnixStream {
        &self.stream
    }
}
