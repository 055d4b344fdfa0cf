//! Socket device (virtio 1.2 §5.10): streams that the host opens to the guest.
//!
//! [`Vsock::connect`] gives a plain Unix stream; the other end of the pair is
//! here, and the device moves bytes between it and the guest's queues. Requests
//! of the guest are refused: the host listens on no port.
//!
//! A fork copies no connection: the state only says whether there were any. If so,
//! the restored device tells its guest that they are gone, before anything else
//! (transport reset, §5.10.6.7): Linux then ends its connected sockets, and
//! listens on. The parent's connections live on. Ports of the host are not used
//! again after a restore.

mod connection;
mod packet;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use serde::{Deserialize, Serialize};

use self::connection::{Connection, Outcome};
use self::packet::{HEADER_SIZE, Header, TYPE_STREAM, op};
use super::queue::{DeviceIo, QueueError};
use super::{Buffers, Chain, ChainError, Progress, VirtioDevice, copy_config};

/// Context id of the host (§5.10.4).
pub const HOST_CID: u64 = 2;
/// Context id of every guest: children are told apart by their monitors.
pub const GUEST_CID: u64 = 3;
/// First port of the host; those below are for the privileged.
pub const FIRST_PORT: u32 = 1024;
/// The most connections at a time, those included that only drain.
pub const CONNECTIONS_MAX: usize = 1024;

const TYPE_SOCKET: u32 = 19;
const RX: usize = 0;
const TX: usize = 1;
const EVENT: usize = 2;
const QUEUE_SIZES: &[u16] = &[128, 128, 16];

const F_STREAM: u64 = 1 << 0;

/// Id of the event "transport reset" (§5.10.6.7).
const EVENT_TRANSPORT_RESET: u32 = 0;

/// Resets waiting for a buffer of the guest. When there are as many, no more of
/// its packets are taken until it provides buffers.
const REPLIES_MAX: usize = 128;
/// The most packets in one direction before others get their turn.
const BURST_MAX: usize = 256;

/// Why a socket device could not be restored.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// A reserved context id, or one of more than 32 bits (§5.10.4).
    #[error("{0} is no context id of a guest")]
    GuestCid(u64),
    /// A reserved port.
    #[error("{0} is no port that the host hands out")]
    Port(u32),
    /// The descriptor that watches the connections could not be made.
    #[error("cannot make an epoll descriptor")]
    Epoll(#[source] io::Error),
}

/// A socket device without its connections.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockState {
    /// The guest's context id.
    pub guest_cid: u64,
    /// The host's port of the next connection, unless it is in use.
    pub next_port: u32,
    /// There were connections, which the guest is to be told are gone.
    pub lost_connections: bool,
}

impl Default for VsockState {
    fn default() -> Self {
        Self {
            guest_cid: GUEST_CID,
            next_port: FIRST_PORT,
            lost_connections: false,
        }
    }
}

/// How far the guest has been told that its connections are gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TransportReset {
    /// It has no need to know, or it knows.
    None,
    /// It is to be told when it has a buffer for the event.
    Due,
    /// It was, and had so many buffers for events left. It has acted on the event
    /// when it gives the buffer back; a connection opened before would be ended
    /// with the others, so nothing is sent until then.
    Sent { buffers_left: u16 },
}

/// The socket device.
#[derive(Debug)]
pub struct Vsock {
    state: VsockState,
    /// Watches every connection's stream, edge-triggered, under its host port.
    /// Itself watched by the event loop, so a new stream needs nobody's consent.
    epoll: OwnedFd,
    /// By host port.
    connections: HashMap<u32, Connection>,
    /// Host ports of connections that may have a packet for the guest.
    line: VecDeque<u32>,
    /// Packets for the guest that belong to no connection.
    replies: VecDeque<Header>,
    transport_reset: TransportReset,
}

impl Vsock {
    /// A device in `state`, without connections.
    pub fn restore(state: &VsockState) -> Result<Self, VsockError> {
        if state.guest_cid <= HOST_CID || state.guest_cid >= u64::from(u32::MAX) {
            return Err(VsockError::GuestCid(state.guest_cid));
        }
        if state.next_port < FIRST_PORT || state.next_port == u32::MAX {
            return Err(VsockError::Port(state.next_port));
        }
        Ok(Self {
            state: state.clone(),
            epoll: epoll::create(CreateFlags::CLOEXEC).map_err(|e| VsockError::Epoll(e.into()))?,
            connections: HashMap::new(),
            line: VecDeque::new(),
            replies: VecDeque::new(),
            transport_reset: if state.lost_connections {
                TransportReset::Due
            } else {
                TransportReset::None
            },
        })
    }

    /// Opens a stream to the guest's `port`, and gives the host's end at once.
    ///
    /// Bytes written before the guest accepts are delivered after it did. If the
    /// guest refuses, the stream ends: with `ECONNRESET` if bytes were lost, else
    /// with an end of file. Whoever drops the stream before the guest was asked
    /// takes the request back. A reset by the guest's driver, as at its probe, ends
    /// every stream.
    ///
    /// The device wakes the event loop by itself.
    ///
    /// # Errors
    /// `QuotaExceeded` when [`CONNECTIONS_MAX`] are open; what `socketpair(2)` and
    /// `epoll_ctl(2)` give.
    pub fn connect(&mut self, port: u32) -> io::Result<UnixStream> {
        if self.connections.len() >= CONNECTIONS_MAX {
            return Err(io::Error::new(
                io::ErrorKind::QuotaExceeded,
                format!("{CONNECTIONS_MAX} vsock connections are open"),
            ));
        }
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        let host_port = self.take_port();
        // The new stream is writable: this event is what wakes the loop.
        epoll::add(
            &self.epoll,
            &ours,
            EventData::new_u64(host_port.into()),
            EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET,
        )?;
        self.connections
            .insert(host_port, Connection::new(ours, port));
        self.enqueue(host_port);
        Ok(theirs)
    }

    /// Number of connections, those included that only drain.
    pub fn connections(&self) -> usize {
        self.connections.len()
    }

    /// The next free host port. There is one: fewer are in use than exist.
    fn take_port(&mut self) -> u32 {
        loop {
            let port = self.state.next_port;
            self.state.next_port = match port + 1 {
                u32::MAX => FIRST_PORT, // VMADDR_PORT_ANY is no port
                next => next,
            };
            if !self.connections.contains_key(&port) {
                return port;
            }
        }
    }

    /// Puts a connection in line if it has something for the guest.
    fn enqueue(&mut self, host_port: u32) {
        if let Some(connection) = self.connections.get_mut(&host_port)
            && !connection.queued
            && connection.has_packet()
        {
            connection.queued = true;
            self.line.push_back(host_port);
        }
    }

    /// Moves packets both ways until neither side has any, or the burst is over.
    fn pump(&mut self, io: &mut DeviceIo<'_>) -> Result<Progress, QueueError> {
        let received = self.receive_packets(io)?;
        if !self.reset_is_over(io)? {
            // Replies that wait are sent when the guest gives its buffer back.
            return Ok(match received {
                Progress::More if self.replies.len() < REPLIES_MAX => Progress::More,
                _ => Progress::Done,
            });
        }
        let sent = self.send_packets(io)?;
        let stalled = received == Progress::More && self.replies.len() >= REPLIES_MAX;
        // Stalled for want of buffers for the replies: those bring us back.
        if sent == Progress::More || received == Progress::More && !stalled {
            return Ok(Progress::More);
        }
        Ok(Progress::Done)
    }

    /// Tells the guest that its connections are gone, if it is to know. True when
    /// it has acted on it, and packets may be sent.
    fn reset_is_over(&mut self, io: &mut DeviceIo<'_>) -> Result<bool, QueueError> {
        while self.transport_reset == TransportReset::Due {
            let Some(mut chain) = io.pop_or_wait(EVENT)? else {
                return Ok(false);
            };
            let event = EVENT_TRANSPORT_RESET.to_le_bytes();
            chain
                .writable
                .write_all(&event)
                .map_err(|source| QueueError::Chain {
                    queue: EVENT,
                    source,
                })?;
            let buffers_left = io.available(EVENT)?;
            io.push_used(EVENT, &chain, event.len())?;
            self.transport_reset = TransportReset::Sent { buffers_left };
        }
        if let TransportReset::Sent { buffers_left } = self.transport_reset {
            if !io.notify_beyond(EVENT, buffers_left)? {
                return Ok(false);
            }
            self.transport_reset = TransportReset::None;
        }
        Ok(true)
    }

    fn receive_packets(&mut self, io: &mut DeviceIo<'_>) -> Result<Progress, QueueError> {
        for _ in 0..BURST_MAX {
            if self.replies.len() >= REPLIES_MAX {
                return Ok(Progress::More);
            }
            let Some(mut chain) = io.pop_or_wait(TX)? else {
                return Ok(Progress::Done);
            };
            let header = Header::read(&mut chain.readable)
                .map_err(|source| QueueError::Chain { queue: TX, source })?;
            self.receive(&header, std::mem::take(&mut chain.readable));
            io.push_used(TX, &chain, 0)?;
        }
        Ok(Progress::More)
    }

    /// Takes one packet of the guest.
    fn receive(&mut self, header: &Header, payload: Buffers<'_>) {
        if header.src_cid != self.state.guest_cid || header.dst_cid != HOST_CID {
            return; // not ours, and nobody to answer (as Linux's vhost-vsock)
        }
        let host_port = header.dst_port;
        let connection = self
            .connections
            .get_mut(&host_port)
            .filter(|c| c.guest_port == header.src_port && c.is_known_to_guest());
        let Some(connection) = connection.filter(|_| header.kind == TYPE_STREAM) else {
            return self.reply_reset(header);
        };
        match connection.receive(header, payload) {
            Outcome::Keep => self.enqueue(host_port),
            Outcome::Remove => self.remove(host_port),
            Outcome::Reset => {
                let drained = connection.end();
                self.reply_reset(header);
                if drained == Outcome::Remove {
                    self.remove(host_port);
                }
            }
        }
    }

    /// Answers a packet with a reset, unless it is one itself.
    fn reply_reset(&mut self, to: &Header) {
        if to.op != op::RST {
            self.replies.push_back(Header {
                src_cid: to.dst_cid,
                dst_cid: to.src_cid,
                src_port: to.dst_port,
                dst_port: to.src_port,
                kind: to.kind,
                op: op::RST,
                ..Header::default()
            });
        }
    }

    fn remove(&mut self, host_port: u32) {
        if let Some(connection) = self.connections.remove(&host_port)
            && let Err(error) = epoll::delete(&self.epoll, connection.stream())
        {
            // Closing the stream removes it as well.
            log::trace!("vsock: epoll: {error}");
        }
    }

    fn send_packets(&mut self, io: &mut DeviceIo<'_>) -> Result<Progress, QueueError> {
        for _ in 0..BURST_MAX {
            if self.replies.is_empty() && self.line.is_empty() {
                return Ok(Progress::Done);
            }
            let Some(mut chain) = io.pop_or_wait(RX)? else {
                return Ok(Progress::Done);
            };
            match self.next_packet(&mut chain) {
                Ok(Some(written)) => io.push_used(RX, &chain, written)?,
                Ok(None) => io.undo_pop(RX),
                Err(source) => return Err(QueueError::Chain { queue: RX, source }),
            }
        }
        Ok(Progress::More)
    }

    /// Writes the next packet for the guest into `chain`: its size in bytes, or
    /// `None` if there is none after all.
    fn next_packet(&mut self, chain: &mut Chain<'_>) -> Result<Option<usize>, ChainError> {
        let mut payload = chain.writable.split_off(HEADER_SIZE);
        let mut len = 0;
        let header = match self.replies.pop_front() {
            Some(reply) => reply,
            None => match self.next_of_line(&mut payload)? {
                Some((header, payload_len)) => {
                    len = payload_len;
                    header
                }
                None => return Ok(None),
            },
        };
        chain.writable.write_all(&header.to_bytes())?;
        Ok(Some(HEADER_SIZE + len))
    }

    /// One packet of the first connection in line that has any; it goes back to
    /// the end of the line, so that all have their turn.
    fn next_of_line(
        &mut self,
        payload: &mut Buffers<'_>,
    ) -> Result<Option<(Header, usize)>, ChainError> {
        while let Some(host_port) = self.line.pop_front() {
            let Some(connection) = self.connections.get_mut(&host_port) else {
                continue;
            };
            connection.queued = false;
            let mut header = Header {
                src_cid: HOST_CID,
                dst_cid: self.state.guest_cid,
                src_port: host_port,
                dst_port: connection.guest_port,
                kind: TYPE_STREAM,
                ..Header::default()
            };
            if let Some(len) = connection.next_packet(&mut header, payload)? {
                // No more than 64 KiB.
                header.len = len as u32;
                self.enqueue(host_port);
                return Ok(Some((header, len)));
            }
        }
        Ok(None)
    }

    /// Takes the events of the streams. Those that do not fit one call keep the
    /// descriptor readable.
    fn take_host_events(&mut self) {
        let mut events = Vec::with_capacity(64);
        let timeout = rustix::event::Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let spare = rustix::buffer::spare_capacity(&mut events);
        if let Err(error) = epoll::wait(&self.epoll, spare, Some(&timeout)) {
            log::debug!("vsock: epoll: {error}");
        }
        for event in events {
            let Ok(host_port) = u32::try_from(event.data.u64()) else {
                continue;
            };
            let Some(connection) = self.connections.get_mut(&host_port) else {
                continue;
            };
            let flags = event.flags;
            let outcome = connection.host_event(
                flags.intersects(EventFlags::IN | EventFlags::RDHUP | EventFlags::HUP),
                flags.contains(EventFlags::OUT),
                flags.intersects(EventFlags::HUP | EventFlags::ERR),
            );
            match outcome {
                Outcome::Remove => self.remove(host_port),
                Outcome::Keep | Outcome::Reset => self.enqueue(host_port),
            }
        }
    }
}

impl VirtioDevice for Vsock {
    type State = VsockState;

    fn device_type(&self) -> u32 {
        TYPE_SOCKET
    }

    fn queue_sizes(&self) -> &'static [u16] {
        QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        F_STREAM
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        copy_config(&self.state.guest_cid.to_le_bytes(), offset, data);
    }

    /// A notification of any queue moves packets both ways.
    fn process_queue(
        &mut self,
        _queue: usize,
        io: &mut DeviceIo<'_>,
    ) -> Result<Progress, QueueError> {
        self.pump(io)
    }

    fn host_events(&self) -> Option<BorrowedFd<'_>> {
        Some(self.epoll.as_fd())
    }

    fn process_host_events(&mut self, io: &mut DeviceIo<'_>) -> Result<Progress, QueueError> {
        self.take_host_events();
        self.pump(io)
    }

    /// Every connection ends: the guest has forgotten them.
    fn reset(&mut self) {
        self.connections.clear();
        self.line.clear();
        self.replies.clear();
        self.transport_reset = TransportReset::None;
    }

    fn save(&self) -> VsockState {
        VsockState {
            lost_connections: !self.connections.is_empty()
                || self.transport_reset != TransportReset::None,
            ..self.state.clone()
        }
    }
}
