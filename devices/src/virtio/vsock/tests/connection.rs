//! From the request to the end of a connection.

use super::*;

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
fn the_probe_of_a_driver_forgets_connections_requested_before() {
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
fn a_reset_of_the_device_ends_every_connection() {
    let mut guest = Guest::new(4);
    let (stream, _) = guest.establish();
    assert!(guest.inner.set_up(u64::MAX));
    assert!(read_all(&stream).is_empty());
    assert_eq!(guest.connections(), 0);
}

#[test]
fn a_host_that_writes_before_it_reads_is_not_stuck_when_the_guest_closes() {
    for end in [op::SHUTDOWN, op::RST] {
        let mut guest = Guest::new(4);
        let (mut stream, mut peer) = guest.establish();
        peer.buf_alloc = 0;
        // More than the socket takes, so that some of it waits in the device.
        for _ in 0..5 {
            guest.send(peer.header(op::RW), &[1; 64 << 10]);
        }
        let host = std::thread::spawn(move || {
            let refused = stream.write_all(&[0; 8 << 20]).unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::BrokenPipe);
            let (mut count, mut chunk) = (0, [0; 64 << 10]);
            while let Ok(n @ 1..) = stream.read(&mut chunk) {
                count += n;
            }
            count
        });
        // Let it fill the socket; the guest has no room for any of it.
        while guest.receive().is_empty() {
            guest.inner.wait(100);
        }
        let last = Header {
            op: end,
            ..peer.shutdown(shutdown::BOTH)
        };
        guest.send(last, &[]);
        while !host.is_finished() {
            guest.inner.wait(10);
        }
        assert_eq!(host.join().unwrap(), 5 * (64 << 10));
        guest.inner.run();
        assert_eq!(guest.connections(), 0);
    }
}
