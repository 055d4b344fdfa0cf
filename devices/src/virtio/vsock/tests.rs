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
fn bytes_written_before_the_guest_accepts_arrive_after_it_did() {
    let mut guest = Guest::new(4);
    let mut stream = guest.connect();
    stream.write_all(b"early").unwrap();
    let packets = guest.receive();
    assert_eq!(ops(&packets), [op::REQUEST]);
    let request = packets[0].header;
    assert_eq!((request.dst_port, request.src_port), (PORT, FIRST_PORT));
    assert_eq!(request.buf_alloc, BUFFER_SIZE);
    let peer = Peer {
        port: request.src_port,
        fwd_cnt: 0,
        buf_alloc: GUEST_BUFFER,
    };
    guest.send(peer.header(op::RESPONSE), &[]);
    assert_eq!(payload(&guest.receive()), b"early");
    guest.send(peer.header(op::RW), b"reply");
    let mut reply = [0; 5];
    stream.read_exact(&mut reply).unwrap();
    assert_eq!(&reply, b"reply");
}

#[test]
fn a_request_waits_for_a_buffer_of_the_guest() {
    let mut guest = Guest::new(0);
    let _stream = guest.connect();
    guest.inner.run();
    guest.inner.submit(RX, &[Buffer::In(RX_BUFFER)]);
    assert_eq!(ops(&guest.receive()), [op::REQUEST]);
}

#[test]
fn a_connection_to_a_guest_that_is_not_up_waits_for_it() {
    let mut inner = FakeGuest::power_on(
        vsock(&VsockState::default()),
        crate::testing::memory(),
        &crate::virtio::TransportState::default(),
    );
    let _stream = inner.device().device_mut().connect(PORT).unwrap();
    inner.run();
    // The driver's reset at its probe forgets what was before it: Linux resets
    // before anybody in the guest can listen.
    assert!(inner.set_up(u64::MAX));
    assert_eq!(inner.device().device().connections(), 0);
}

#[test]
fn a_refused_connection_ends() {
    let mut guest = Guest::new(4);
    for early in [&b""[..], b"early"] {
        let mut stream = guest.connect();
        stream.write_all(early).unwrap();
        let request = guest.receive().remove(0).header;
        let peer = Peer {
            port: request.src_port,
            fwd_cnt: 0,
            buf_alloc: 0,
        };
        guest.send(peer.header(op::RST), &[]);
        let end = stream.read(&mut [0]);
        if early.is_empty() {
            assert_eq!(end.unwrap(), 0);
        } else {
            assert_eq!(end.unwrap_err().kind(), ErrorKind::ConnectionReset);
        }
        assert_eq!(guest.connections(), 0);
    }
    // A reset is not answered.
    assert!(guest.receive().is_empty());
}

#[test]
fn a_request_not_yet_sent_is_withdrawn_with_its_stream() {
    let mut guest = Guest::new(0);
    drop(guest.connect());
    guest.inner.run();
    assert_eq!(guest.connections(), 0);
    guest.inner.submit(RX, &[Buffer::In(RX_BUFFER)]);
    assert!(guest.receive().is_empty());
}

#[test]
fn half_close_by_the_host() {
    let mut guest = Guest::new(4);
    let (mut stream, peer) = guest.establish();
    stream.write_all(b"question").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let packets = guest.receive();
    assert_eq!(ops(&packets), [op::RW, op::SHUTDOWN]);
    assert_eq!(packets[1].header.flags, shutdown::SEND);
    // The other direction still works.
    guest.send(peer.header(op::RW), b"answer");
    guest.send(peer.shutdown(shutdown::BOTH), &[]);
    assert_eq!(read_all(&stream), b"answer");
    assert_eq!(ops(&guest.receive()), [op::RST]);
    assert_eq!(guest.connections(), 0);
}

#[test]
fn half_close_by_the_guest() {
    let mut guest = Guest::new(4);
    let (mut stream, peer) = guest.establish();
    guest.send(peer.header(op::RW), b"last words");
    guest.send(peer.shutdown(shutdown::SEND), &[]);
    assert_eq!(read_all(&stream), b"last words");
    stream.write_all(b"still here").unwrap();
    assert_eq!(payload(&guest.receive()), b"still here");
    // A guest that sends after it said that it would not.
    guest.send(peer.header(op::RW), b"x");
    assert_eq!(ops(&guest.receive()), [op::RST]);
    assert_eq!(guest.connections(), 0);
}

#[test]
fn a_guest_that_reads_no_more_makes_the_host_s_writes_fail() {
    let mut guest = Guest::new(4);
    let (mut stream, peer) = guest.establish();
    guest.send(peer.shutdown(shutdown::RECEIVE), &[]);
    assert_eq!(
        stream.write(b"x").unwrap_err().kind(),
        ErrorKind::BrokenPipe
    );
    guest.send(peer.header(op::RW), b"output");
    guest.send(peer.shutdown(shutdown::SEND), &[]);
    assert_eq!(read_all(&stream), b"output");
}

#[test]
fn a_close_by_the_guest_is_clean_even_if_it_left_bytes_unread() {
    let mut guest = Guest::new(4);
    let (mut stream, mut peer) = guest.establish();
    peer.buf_alloc = 0;
    guest.send(peer.header(op::CREDIT_UPDATE), &[]);
    stream.write_all(b"never read").unwrap();
    guest.send(peer.header(op::RW), b"bye");
    guest.send(peer.shutdown(shutdown::BOTH), &[]);
    assert_eq!(read_all(&stream), b"bye");
}

#[test]
fn a_close_by_the_host_closes_the_guest_s_side() {
    let mut guest = Guest::new(4);
    let (mut stream, peer) = guest.establish();
    stream.write_all(b"and go").unwrap();
    drop(stream);
    let packets = guest.receive();
    assert_eq!(payload(&packets), b"and go");
    let told = packets
        .iter()
        .filter(|p| p.header.op == op::SHUTDOWN)
        .fold(0, |flags, p| flags | p.header.flags);
    assert_eq!(told, shutdown::BOTH);
    // What the guest had under way is taken and dropped.
    guest.send(peer.header(op::RW), &[0; 1000]);
    guest.send(peer.header(op::RST), &[]);
    assert_eq!(guest.connections(), 0);
}

#[test]
fn a_reset_keeps_what_the_host_has_not_read_yet() {
    let mut guest = Guest::new(4);
    let (stream, peer) = guest.establish();
    let sent = pattern(BUFFER_SIZE as usize);
    for chunk in sent.chunks(64 << 10) {
        guest.send(peer.header(op::RW), chunk);
    }
    // More than a socket holds, so some of it waits in the device.
    for chunk in sent.chunks(64 << 10).take(1) {
        guest.send(peer.header(op::RW), chunk);
    }
    guest.send(peer.header(op::RST), &[]);
    assert_eq!(guest.connections(), 1, "draining");
    let mut received = Vec::new();
    let mut chunk = [0; 32 << 10];
    loop {
        guest.inner.run();
        match (&stream).read(&mut chunk).unwrap() {
            0 => break,
            count => received.extend_from_slice(&chunk[..count]),
        }
    }
    assert_eq!(received.len(), sent.len() + (64 << 10));
    assert_eq!(received[..sent.len()], sent);
    assert_eq!(guest.connections(), 0);
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
fn a_slow_reader_stops_only_its_own_connection() {
    let mut guest = Guest::new(16);
    let (slow, peer) = guest.establish();
    let (mut quick, other) = guest.establish();
    let chunk = pattern(64 << 10);
    // The device's credit, by its own reckoning, until it has none left.
    let (mut sent, mut forwarded) = (0u32, 0u32);
    loop {
        for packet in guest.receive() {
            if packet.header.dst_port == PORT && packet.header.src_port == peer.port {
                forwarded = packet.header.fwd_cnt;
            }
        }
        if sent - forwarded + chunk.len() as u32 > BUFFER_SIZE {
            break;
        }
        guest.send(peer.header(op::RW), &chunk);
        sent += chunk.len() as u32;
    }
    assert!(sent > BUFFER_SIZE, "the socket took some of it");
    for _ in 0..100 {
        guest.send(other.header(op::RW), b"ping");
        let mut ping = [0; 4];
        quick.read_exact(&mut ping).unwrap();
        quick.write_all(b"pong").unwrap();
        assert_eq!(payload(&guest.receive()), b"pong");
    }
    // Once it reads, the guest is told of the room.
    let mut rest = vec![0; sent as usize];
    let mut done = 0;
    let mut updates = 0;
    while done < rest.len() {
        done += (&slow).read(&mut rest[done..]).unwrap();
        updates += ops(&guest.receive())
            .iter()
            .filter(|&&op| op == op::CREDIT_UPDATE)
            .count();
    }
    assert!(updates > 0);
    assert!(rest.chunks(chunk.len()).all(|part| part == chunk));
}

#[test]
fn more_than_the_credit_resets_the_connection() {
    let mut guest = Guest::new(4);
    let (_slow, peer) = guest.establish();
    let mut reset = false;
    for _ in 0..20 {
        guest.send(peer.header(op::RW), &[1; 64 << 10]);
        reset |= ops(&guest.receive()).contains(&op::RST);
    }
    assert!(reset);
    assert_eq!(guest.connections(), 0);
}

#[test]
fn the_guest_s_credit_is_kept_and_asked_for_once() {
    let mut guest = Guest::new(16);
    let (mut stream, mut peer) = guest.establish();
    peer.buf_alloc = 8192;
    guest.send(peer.header(op::CREDIT_UPDATE), &[]);
    let sent = pattern(20_000);
    stream.write_all(&sent).unwrap();
    let packets = guest.receive();
    let mut received = payload(&packets);
    assert_eq!(received.len(), 8192);
    let asked = |packets: &[Packet]| {
        ops(packets)
            .into_iter()
            .filter(|&op| op == op::CREDIT_REQUEST)
            .count()
    };
    assert_eq!(asked(&packets), 1);
    // "None" is an answer; it is not asked again at once.
    guest.send(peer.header(op::CREDIT_UPDATE), &[]);
    assert!(guest.receive().is_empty());
    while received.len() < sent.len() {
        peer.fwd_cnt = received.len() as u32;
        guest.send(peer.header(op::CREDIT_UPDATE), &[]);
        let more = payload(&guest.receive());
        assert!(!more.is_empty() && more.len() <= 8192);
        received.extend(more);
    }
    assert_eq!(received, sent);
    // A guest that contradicts itself gets nothing, and breaks nothing.
    peer.fwd_cnt = 1 << 31;
    guest.send(peer.header(op::CREDIT_UPDATE), &[]);
    stream.write_all(b"x").unwrap();
    assert!(payload(&guest.receive()).is_empty());
}

#[test]
fn a_credit_request_is_answered() {
    let mut guest = Guest::new(4);
    let (_stream, peer) = guest.establish();
    guest.send(peer.header(op::RW), &[0; 100]);
    guest.send(peer.header(op::CREDIT_REQUEST), &[]);
    let packets = guest.receive();
    assert_eq!(ops(&packets), [op::CREDIT_UPDATE]);
    assert_eq!(packets[0].header.fwd_cnt, 100);
    assert_eq!(packets[0].header.buf_alloc, BUFFER_SIZE);
}

#[test]
fn eight_mebibytes_to_the_guest() {
    let mut guest = Guest::new(64);
    let (mut stream, mut peer) = guest.establish();
    let sent = pattern(8 << 20);
    let expected = sent.clone();
    let writer = std::thread::spawn(move || {
        stream.write_all(&sent).unwrap();
        stream
    });
    let mut received = Vec::new();
    let mut told = 0;
    while received.len() < expected.len() {
        guest.inner.wait(100);
        received.extend(payload(&guest.receive()));
        if received.len() - told >= 64 << 10 {
            told = received.len();
            peer.fwd_cnt = told as u32;
            guest.send(peer.header(op::CREDIT_UPDATE), &[]);
        }
    }
    assert!(received == expected);
    drop(writer.join().unwrap());
}

#[test]
fn eight_mebibytes_to_the_host() {
    let mut guest = Guest::new(16);
    let (stream, peer) = guest.establish();
    let sent = pattern(8 << 20);
    let reader = std::thread::spawn(move || read_all(&stream));
    let mut forwarded = 0;
    for (index, chunk) in sent.chunks(64 << 10).enumerate() {
        let end = (index * (64 << 10) + chunk.len()) as u32;
        while end - forwarded > BUFFER_SIZE {
            guest.inner.wait(100);
            for packet in guest.receive() {
                assert_eq!(packet.header.op, op::CREDIT_UPDATE);
                forwarded = packet.header.fwd_cnt;
            }
        }
        guest.send(peer.header(op::RW), chunk);
    }
    guest.send(peer.shutdown(shutdown::BOTH), &[]);
    while !reader.is_finished() {
        guest.inner.wait(10);
    }
    assert!(reader.join().unwrap() == sent);
    guest.inner.run();
    assert_eq!(guest.connections(), 0);
}

#[test]
fn replies_without_buffers_are_bounded_and_none_is_lost() {
    let mut guest = Guest::new(0);
    let stranger = Peer {
        port: 9999,
        fwd_cnt: 0,
        buf_alloc: 0,
    };
    let header = stranger.header(op::RW).to_bytes().to_vec();
    let mut sent = 0;
    for _ in 0..3 {
        while guest.inner.room(TX) > 0 {
            guest.inner.submit(TX, &[Buffer::Out(header.clone())]);
            sent += 1;
        }
        guest.inner.run();
        while guest.inner.used(TX).is_some() {}
    }
    assert_eq!(sent, 2 * REPLIES_MAX, "the rest stays in the queue");
    let mut resets = 0;
    for _ in 0..4 {
        while guest.inner.room(RX) > 0 {
            guest.inner.submit(RX, &[Buffer::In(RX_BUFFER)]);
        }
        guest.inner.run();
        resets += std::iter::from_fn(|| guest.inner.used(RX)).count();
    }
    assert_eq!(resets, sent);
}

#[test]
fn connections_are_bounded() {
    let guest = Guest::new(0);
    let streams: Vec<_> = (0..CONNECTIONS_MAX).map(|_| guest.connect()).collect();
    let refused = guest.inner.device().device_mut().connect(PORT);
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::QuotaExceeded);
    drop(streams);
}

#[test]
fn many_connections_all_have_their_turn() {
    let mut guest = Guest::new(32);
    let mut ends: Vec<_> = (0..200).map(|_| guest.establish()).collect();
    for (index, (stream, _)) in ends.iter_mut().enumerate() {
        stream.write_all(&(index as u32).to_le_bytes()).unwrap();
    }
    let mut heard: Vec<u32> = guest
        .receive()
        .iter()
        .map(|p| u32::from_le_bytes(p.payload[..].try_into().unwrap()))
        .collect();
    heard.sort_unstable();
    assert!(heard.into_iter().eq(0..200));
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
fn a_reset_of_the_device_ends_every_connection() {
    let mut guest = Guest::new(4);
    let (stream, _) = guest.establish();
    assert!(guest.inner.set_up(u64::MAX));
    assert!(read_all(&stream).is_empty());
    assert_eq!(guest.connections(), 0);
}

#[test]
fn a_fork_has_no_connections_and_new_ports() {
    let mut guest = Guest::new(4);
    let (_stream, peer) = guest.establish();
    let frozen = guest.inner.freeze();
    let mut child = Guest {
        inner: FakeGuest::thaw(vsock(&frozen.device), &frozen),
    };
    assert_eq!(child.connections(), 0);
    child.send(peer.header(op::RW), b"to nobody");
    assert_eq!(ops(&child.receive()), [op::RST]);
    let (_stream, second) = child.establish();
    assert_ne!(second.port, peer.port);
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
