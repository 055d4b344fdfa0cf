//! A fake guest's socket layer, and the device as a whole; its parts are in the
//! modules below.

mod connection;
mod credit;

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;

use super::connection::BUFFER_SIZE;
use super::packet::shutdown;
use super::*;
use crate::testing::{Buffer, FakeGuest, conformance};

const PORT: u32 = 52;
/// What Linux gives: a page, less its own bookkeeping.
const RX_BUFFER: usize = 3776;
const GUEST_BUFFER: u32 = 256 * 1024;

fn vsock(state: &VsockState) -> Vsock {
    Vsock::restore(state).unwrap()
}

/// A packet of the device.
#[derive(Debug)]
struct Packet {
    header: Header,
    payload: Vec<u8>,
}

/// A guest with as much of a socket layer as its tests need.
struct Guest {
    inner: FakeGuest<Vsock>,
}

impl Guest {
    /// A guest with `buffers` buffers for the device.
    fn new(buffers: usize) -> Self {
        let mut inner = FakeGuest::boot(vsock(&VsockState::default()));
        for _ in 0..buffers {
            inner.submit(RX, &[Buffer::In(RX_BUFFER)]);
        }
        for _ in 0..2 {
            inner.submit(EVENT, &[Buffer::In(4)]);
        }
        inner.run();
        Self { inner }
    }

    fn connect(&self) -> UnixStream {
        self.inner.device().device_mut().connect(PORT).unwrap()
    }

    fn connections(&self) -> usize {
        self.inner.device().device().connections()
    }

    /// Takes what the device has sent; each buffer goes back to it.
    fn receive(&mut self) -> Vec<Packet> {
        self.inner.run();
        let mut packets = Vec::new();
        while let Some(used) = self.inner.used(RX) {
            packets.push(packet(&used.data[..used.len]));
            self.inner.submit(RX, &[Buffer::In(used.data.len())]);
            self.inner.run();
        }
        packets
    }

    fn send(&mut self, header: Header, payload: &[u8]) {
        let header = Header {
            len: payload.len() as u32,
            ..header
        };
        self.send_raw(header, payload);
    }

    fn send_raw(&mut self, header: Header, payload: &[u8]) {
        while self.inner.room(TX) < 2 {
            self.inner.run();
            assert!(self.inner.used(TX).is_some(), "the device takes no packets");
        }
        let mut buffers = vec![Buffer::Out(header.to_bytes().to_vec())];
        if !payload.is_empty() {
            buffers.push(Buffer::Out(payload.to_vec()));
        }
        self.inner.submit(TX, &buffers);
        self.inner.run();
        while self.inner.used(TX).is_some() {}
    }

    /// Connects and accepts: the host's stream, and the guest's side.
    fn establish(&mut self) -> (UnixStream, Peer) {
        let stream = self.connect();
        let packets = self.receive();
        assert_eq!(packets.len(), 1);
        assert_eq!(packets[0].header.op, op::REQUEST);
        let peer = Peer {
            port: packets[0].header.src_port,
            fwd_cnt: 0,
            buf_alloc: GUEST_BUFFER,
        };
        self.send(peer.header(op::RESPONSE), &[]);
        (stream, peer)
    }
}

fn packet(raw: &[u8]) -> Packet {
    let field = |at: usize| u32::from_le_bytes(raw[at..at + 4].try_into().unwrap());
    let half = |at: usize| u16::from_le_bytes(raw[at..at + 2].try_into().unwrap());
    let header = Header {
        src_cid: field(0).into(),
        dst_cid: field(8).into(),
        src_port: field(16),
        dst_port: field(20),
        len: field(24),
        kind: half(28),
        op: half(30),
        flags: field(32),
        buf_alloc: field(36),
        fwd_cnt: field(40),
    };
    assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, GUEST_CID));
    let payload = raw[HEADER_SIZE..].to_vec();
    assert_eq!(payload.len(), header.len as usize);
    Packet { header, payload }
}

/// The guest's side of a connection.
struct Peer {
    port: u32,
    fwd_cnt: u32,
    buf_alloc: u32,
}

impl Peer {
    fn header(&self, op: u16) -> Header {
        Header {
            src_cid: GUEST_CID,
            dst_cid: HOST_CID,
            src_port: PORT,
            dst_port: self.port,
            kind: TYPE_STREAM,
            op,
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.fwd_cnt,
            ..Header::default()
        }
    }

    fn shutdown(&self, flags: u32) -> Header {
        Header {
            flags,
            ..self.header(op::SHUTDOWN)
        }
    }
}

fn payload(packets: &[Packet]) -> Vec<u8> {
    packets
        .iter()
        .filter(|p| p.header.op == op::RW)
        .flat_map(|p| p.payload.clone())
        .collect()
}

fn ops(packets: &[Packet]) -> Vec<u16> {
    packets.iter().map(|p| p.header.op).collect()
}

fn read_all(mut stream: &UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    bytes
}

/// Bytes that tell their place: no period of a power of two.
fn pattern(len: usize) -> Vec<u8> {
    (0..len as u32).map(|n| (n % 8191 % 256) as u8).collect()
}

#[test]
fn conforms() {
    conformance(&VsockState::default(), vsock, |guest| {
        if guest.room(EVENT) == 16 {
            guest.submit(EVENT, &[Buffer::In(4)]);
        }
        while guest.room(RX) > 120 {
            guest.submit(RX, &[Buffer::In(RX_BUFFER)]);
        }
        let stream = guest.device().device_mut().connect(PORT).unwrap();
        guest.run();
        let used = guest.used(RX).expect("a request");
        let request = packet(&used.data[..used.len]).header;
        let refusal = Header {
            src_cid: GUEST_CID,
            dst_cid: HOST_CID,
            src_port: request.dst_port,
            dst_port: request.src_port,
            len: 0,
            op: op::RST,
            ..request
        };
        guest.request(TX, &[Buffer::Out(refusal.to_bytes().to_vec())]);
        assert!(read_all(&stream).is_empty());
        assert_eq!(guest.device().device().connections(), 0);
    });
}

#[test]
fn the_guest_reads_its_context_id() {
    let guest = Guest::new(0);
    assert_eq!(guest.inner.config::<8>(0), GUEST_CID.to_le_bytes());
}

#[test]
fn packets_of_no_connection_are_reset() {
    let mut guest = Guest::new(8);
    let (_stream, peer) = guest.establish();
    let stranger = Peer {
        port: 9999,
        fwd_cnt: 0,
        buf_alloc: 0,
    };
    for op in [op::REQUEST, op::RESPONSE, op::RW, op::SHUTDOWN, 77] {
        guest.send(stranger.header(op), &[]);
        let packets = guest.receive();
        assert_eq!(ops(&packets), [op::RST]);
        let reset = packets[0].header;
        assert_eq!((reset.src_port, reset.dst_port), (9999, PORT));
    }
    // Another port of the guest than the one that the connection has.
    let impostor = Header {
        src_port: PORT + 1,
        ..peer.header(op::RST)
    };
    guest.send(impostor, &[]);
    assert_eq!(guest.connections(), 1);
    // A type that we do not have is reset; other context ids are not ours.
    let datagram = Header {
        kind: 3,
        ..peer.header(op::RW)
    };
    guest.send(datagram, &[]);
    let packets = guest.receive();
    assert_eq!((packets[0].header.op, packets[0].header.kind), (op::RST, 3));
    for (src_cid, dst_cid) in [(4, HOST_CID), (GUEST_CID, 7), (1 << 40, HOST_CID)] {
        let header = Header {
            src_cid,
            dst_cid,
            ..stranger.header(op::REQUEST)
        };
        guest.send(header, &[]);
    }
    assert!(guest.receive().is_empty());
}

#[test]
fn operations_out_of_place_reset_the_connection() {
    for op in [op::REQUEST, op::RESPONSE, 0, 8, 0xffff] {
        let mut guest = Guest::new(4);
        let (stream, peer) = guest.establish();
        guest.send(peer.header(op), &[]);
        assert_eq!(ops(&guest.receive()), [op::RST]);
        assert_eq!(guest.connections(), 0);
        assert!(read_all(&stream).is_empty());
    }
}

#[test]
fn a_length_that_lies_resets_the_connection() {
    for len in [6, u32::MAX] {
        let mut guest = Guest::new(4);
        let (_stream, peer) = guest.establish();
        let header = Header {
            len,
            ..peer.header(op::RW)
        };
        guest.send_raw(header, b"short");
        assert_eq!(ops(&guest.receive()), [op::RST]);
    }
}

#[test]
fn ports_in_use_are_not_given_again() {
    let state = VsockState {
        next_port: u32::MAX - 1,
        ..VsockState::default()
    };
    let mut device = vsock(&state);
    let _a = device.connect(PORT).unwrap();
    let _b = device.connect(PORT).unwrap();
    device.state.next_port = u32::MAX - 1;
    let _c = device.connect(PORT).unwrap();
    let mut ports: Vec<_> = device.connections.keys().copied().collect();
    ports.sort_unstable();
    assert_eq!(ports, [FIRST_PORT, FIRST_PORT + 1, u32::MAX - 1]);
}

#[test]
fn a_fork_has_no_connections_and_new_ports() {
    let mut guest = Guest::new(4);
    let (_stream, peer) = guest.establish();
    guest.send(peer.header(op::RST), &[]);
    let frozen = guest.inner.freeze();
    assert!(!frozen.device.lost_connections);
    let mut child = Guest {
        inner: FakeGuest::thaw(vsock(&frozen.device), &frozen),
    };
    child.send(peer.header(op::RW), b"to nobody");
    assert_eq!(ops(&child.receive()), [op::RST]);
    let (_stream, second) = child.establish();
    assert_ne!(second.port, peer.port);
}

#[test]
fn a_fork_of_a_guest_with_connections_is_told_that_they_are_gone() {
    let mut guest = Guest::new(4);
    let (_stream, _) = guest.establish();
    let frozen = guest.inner.freeze();
    let mut child = Guest {
        inner: FakeGuest::thaw(vsock(&frozen.device), &frozen),
    };
    assert_eq!(child.connections(), 0);
    let _new = child.connect();
    // The event first, and nothing else until the guest has acted on it: not in
    // this child, and not in a child of it.
    assert!(child.receive().is_empty());
    let event = child.inner.used(EVENT).expect("an event");
    assert_eq!((event.len, &event.data[..]), (4, &[0; 4][..]));
    let frozen = child.inner.freeze();
    assert!(frozen.device.lost_connections);
    child.inner.submit(EVENT, &[Buffer::In(4)]);
    assert_eq!(ops(&child.receive()), [op::REQUEST]);
    assert!(child.inner.used(EVENT).is_none());
}

#[test]
fn the_reset_event_waits_for_a_buffer() {
    let state = VsockState {
        lost_connections: true,
        ..VsockState::default()
    };
    let mut inner = FakeGuest::boot(vsock(&VsockState::default()));
    inner.submit(RX, &[Buffer::In(RX_BUFFER)]);
    inner.run();
    let frozen = inner.freeze();
    let mut child = Guest {
        inner: FakeGuest::thaw(vsock(&state), &frozen),
    };
    let _stream = child.connect();
    assert!(child.receive().is_empty());
    child.inner.submit(EVENT, &[Buffer::In(4)]);
    child.inner.run();
    assert!(child.inner.used(EVENT).is_some());
    assert!(child.receive().is_empty());
    child.inner.submit(EVENT, &[Buffer::In(4)]);
    assert_eq!(ops(&child.receive()), [op::REQUEST]);
}

#[test]
fn broken_chains_stop_the_device() {
    for (queue, buffer) in [
        (RX, Buffer::In(HEADER_SIZE - 1)),
        (TX, Buffer::Out(vec![0; HEADER_SIZE - 1])),
        (TX, Buffer::In(100)),
    ] {
        let mut guest = Guest::new(0);
        let _stream = guest.connect();
        guest.inner.submit(queue, &[buffer]);
        guest.inner.run();
        assert!(guest.inner.needs_reset());
    }
    // Room for a header alone is enough for a request, not for data.
    let mut guest = Guest::new(0);
    for _ in 0..3 {
        guest.inner.submit(RX, &[Buffer::In(HEADER_SIZE)]);
    }
    let (mut stream, _) = guest.establish();
    stream.write_all(b"data").unwrap();
    guest.inner.run();
    assert!(guest.inner.needs_reset());
}

#[test]
fn states_that_cannot_be_are_refused() {
    for guest_cid in [0, 1, 2, u64::from(u32::MAX), 1 << 40] {
        let state = VsockState {
            guest_cid,
            ..VsockState::default()
        };
        assert!(matches!(
            Vsock::restore(&state),
            Err(VsockError::GuestCid(_))
        ));
    }
    for next_port in [0, 1023, u32::MAX] {
        let state = VsockState {
            next_port,
            ..VsockState::default()
        };
        assert!(matches!(Vsock::restore(&state), Err(VsockError::Port(_))));
    }
}
