//! Flow control, bounds, and throughput.

use super::*;

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
        let packets = guest.receive();
        if packets.is_empty() {
            guest.inner.wait(100);
        }
        received.extend(payload(&packets));
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
            let packets = guest.receive();
            if packets.is_empty() {
                guest.inner.wait(100);
            }
            for packet in packets {
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
