use super::*;
use crate::testing::{Buffer, FakeGuest, Used, conformance, flag};
use crate::virtio::feature;
use rustix::fs::fcntl_setfl;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair,
};
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress};

/// What stands for a tap here, and its other side.
fn pair() -> (OwnedFd, OwnedFd) {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap()
}

fn bound() -> (Net, OwnedFd) {
    limited(RateLimits::default())
}

fn limited(limits: RateLimits) -> (Net, OwnedFd) {
    let (tap, wire) = pair();
    let mut device = Net::restore(&NetState::default()).unwrap();
    device.bind(tap, limits).unwrap();
    (device, wire)
}

fn connected() -> (FakeGuest<Net>, OwnedFd) {
    let (device, wire) = bound();
    (FakeGuest::boot(device), wire)
}

/// A frame with its header, all of whose bytes are told apart.
fn packet(head: [u8; HEADER_SIZE], len: usize) -> Vec<u8> {
    let mut bytes = head.to_vec();
    bytes.extend((0..len).map(|at| (at % 251) as u8));
    bytes
}

const PLAIN: [u8; HEADER_SIZE] = [0; HEADER_SIZE];

/// A header with these flags and this kind of segments.
fn header(flags: u8, gso: u8) -> [u8; HEADER_SIZE] {
    let mut bytes = PLAIN;
    bytes[..2].copy_from_slice(&[flags, gso]);
    bytes[4..6].copy_from_slice(&1448_u16.to_le_bytes());
    bytes[6..10].copy_from_slice(&[34, 0, 16, 0]);
    bytes
}

/// What has come out of the guest, if anything.
fn heard(wire: &OwnedFd) -> Option<Vec<u8>> {
    let mut buffer = vec![0; 2 * PACKET_MAX];
    match recv(wire, &mut buffer[..], RecvFlags::empty()) {
        Ok((_, len)) => Some(buffer[..len].to_vec()),
        Err(Errno::AGAIN) => None,
        Err(error) => panic!("{error}"),
    }
}

fn say(wire: &OwnedFd, bytes: &[u8]) {
    send(wire, bytes, SendFlags::NOSIGNAL).unwrap();
}

/// Takes the chains that hold one frame, and puts them together.
fn received(guest: &mut FakeGuest<Net>) -> Option<Vec<u8>> {
    let first = guest.used(RX)?;
    let written = |used: &Used| used.data[..used.len].to_vec();
    let mut bytes = written(&first);
    let count = u16::from_le_bytes([bytes[NUM_BUFFERS], bytes[NUM_BUFFERS + 1]]);
    for _ in 1..count {
        bytes.extend(written(&guest.used(RX).expect("as many as it says")));
    }
    bytes[NUM_BUFFERS..HEADER_SIZE].fill(0);
    Some(bytes)
}

const NUM_BUFFERS: usize = 10;

#[test]
fn conforms() {
    let restore = |state: &NetState| Net::restore(state).unwrap();
    conformance(&NetState::default(), restore, |guest| {
        let used = guest.request(TX, &[Buffer::Out(packet(PLAIN, 60))]);
        assert_eq!(used.len, 0);
    });
}

#[test]
fn the_guest_finds_its_address_and_mtu() {
    let state = NetState {
        mac: [2, 1, 2, 3, 4, 5],
        mtu: 9000,
    };
    let guest = FakeGuest::boot(Net::restore(&state).unwrap());
    assert_eq!(guest.config(0), state.mac);
    assert_eq!(guest.config(10), 9000_u16.to_le_bytes());
    assert_eq!(guest.device().device().save(), state);
}

#[test]
fn a_state_of_no_device_is_refused() {
    let state = |mac, mtu| NetState { mac, mtu };
    for state in [
        state([0; 6], 1500),
        state([3, 0, 0, 0, 0, 1], 1500),
        state([0xff; 6], 1500),
        state([2, 0, 0, 0, 0, 1], 67),
    ] {
        assert!(Net::restore(&state).is_err(), "{state:?}");
    }
}

#[test]
fn a_tap_is_bound_once_and_never_waits() {
    let (mut device, _wire) = bound();
    assert!(device.has_tap());
    let free = RateLimits::default();
    assert!(matches!(device.bind(pair().0, free), Err(NetError::Bound)));
    let mut device = Net::restore(&NetState::default()).unwrap();
    let (tap, _wire) = pair();
    fcntl_setfl(&tap, OFlags::empty()).unwrap();
    assert!(matches!(device.bind(tap, free), Err(NetError::Blocking)));
    let (reader, _writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::NONBLOCK).unwrap();
    assert!(matches!(device.bind(reader, free), Err(NetError::Access)));
    assert!(!device.has_tap());
}

#[test]
fn without_a_tap_the_guest_talks_into_the_void_and_no_page_is_written() {
    let mut guest = FakeGuest::boot(Net::restore(&NetState::default()).unwrap());
    let ring = |guest: &FakeGuest<Net>, at| {
        let mut bytes = vec![0; 0x8000];
        let read = guest.memory().read_slice(&mut bytes, GuestAddress(at));
        read.unwrap();
        bytes
    };
    for _ in 0..4 {
        guest.submit(RX, &[Buffer::In(2048)]);
    }
    // The used rings of both queues: see the fake guest.
    let used = |guest: &FakeGuest<Net>| [0x1_8000, 0x2_8000].map(|at| ring(guest, at));
    let before = used(&guest);
    guest.run();
    guest.device().kick();
    guest.run();
    assert_eq!(used(&guest), before);
    let sent = guest.request(TX, &[Buffer::Out(packet(PLAIN, 60))]);
    assert_eq!(sent.len, 0);
    assert!(guest.used(RX).is_none());
}

#[test]
fn what_the_guest_sends_is_one_frame_however_it_lies() {
    let (mut guest, wire) = connected();
    let whole = packet(header(1, 1), 65_550);
    let at = [0, 12, 13, 40, 4096, whole.len()];
    let parts: Vec<Buffer> = at
        .windows(2)
        .map(|range| Buffer::Out(whole[range[0]..range[1]].to_vec()))
        .collect();
    let used = guest.request(TX, &parts);
    assert_eq!(used.len, 0);
    assert_eq!(heard(&wire), Some(whole));
    // Header and frame in one, and bits that are not a driver's to set.
    let mut odd = packet(header(0xff, 4 | 0x80), 60);
    odd[NUM_BUFFERS] = 7;
    guest.request(TX, &[Buffer::Out(odd)]);
    assert_eq!(heard(&wire), Some(packet(header(1, 4 | 0x80), 60)));
}

#[test]
fn a_frame_that_is_none_is_dropped() {
    let (mut guest, wire) = connected();
    let too_long = packet(PLAIN, FRAME_MAX + 1);
    let dropped = [
        packet(PLAIN, 0),
        packet(PLAIN, FRAME_MIN - 1),
        too_long,
        // UFO, UDP segments, ECN of nothing, segments without checksums.
        packet(header(1, 3), 60),
        packet(header(1, 5), 60),
        packet(header(1, 0x80), 60),
        packet(header(0, 1), 60),
        packet(header(0, 4), 60),
    ];
    for bytes in dropped {
        let (head, rest) = bytes.split_at(HEADER_SIZE);
        guest.request(TX, &[Buffer::Out(head.into()), Buffer::Out(rest.into())]);
        assert_eq!(heard(&wire), None, "{head:?}");
    }
    assert!(!guest.needs_reset());
    guest.request(TX, &[Buffer::Out(packet(PLAIN, FRAME_MIN))]);
    assert_eq!(heard(&wire), Some(packet(PLAIN, FRAME_MIN)));
    let longest = packet(PLAIN, FRAME_MAX);
    guest.request(TX, &[Buffer::Out(longest.clone())]);
    assert_eq!(heard(&wire), Some(longest));
}

#[test]
fn an_offload_that_was_not_settled_is_none_either_way() {
    let (device, wire) = bound();
    let wanted = feature::VERSION_1 | F_CSUM | F_GUEST_CSUM | F_HOST_TSO4 | F_GUEST_TSO4;
    let mut guest = FakeGuest::boot_with(device, wanted);
    for (head, fits) in [
        (header(1, 0), true),
        (header(1, 1), true),
        (header(1, 4), false),
        (header(1, 1 | 0x80), false),
    ] {
        guest.request(TX, &[Buffer::Out(packet(head, 60))]);
        assert_eq!(heard(&wire).is_some(), fits, "{head:?}");
        guest.submit(RX, &[Buffer::In(2048)]);
        say(&wire, &packet(head, 60));
        guest.run();
        assert_eq!(received(&mut guest).is_some(), fits, "{head:?}");
    }
    // A guest that takes no checksums learns of none.
    let (device, wire) = bound();
    let mut guest = FakeGuest::boot_with(device, feature::VERSION_1);
    guest.submit(RX, &[Buffer::In(2048)]);
    say(&wire, &packet(header(1, 0), 60));
    say(&wire, &packet(header(2, 0), 61));
    guest.run();
    assert_eq!(received(&mut guest), Some(packet(header(0, 0), 61)));
}

#[test]
fn a_chain_without_room_for_a_header_breaks_the_device_and_no_more() {
    let (mut guest, _wire) = connected();
    guest.submit(TX, &[Buffer::Out(vec![0; HEADER_SIZE - 1])]);
    guest.run();
    assert!(guest.needs_reset());
    assert!(guest.set_up(u64::MAX));
    let (mut guest, wire) = connected();
    guest.submit(RX, &[Buffer::In(HEADER_SIZE - 1)]);
    say(&wire, &packet(PLAIN, 60));
    guest.run();
    assert!(guest.needs_reset());
    // The frame is not for whoever comes next.
    assert!(guest.set_up(u64::MAX));
    guest.submit(RX, &[Buffer::In(2048)]);
    say(&wire, &packet(PLAIN, 61));
    guest.run();
    assert_eq!(received(&mut guest), Some(packet(PLAIN, 61)));
}

#[test]
fn a_chain_with_a_loop_or_outside_of_memory_breaks_the_device_and_no_more() {
    for queue in [RX, TX] {
        let write = if queue == RX { flag::WRITE } else { 0 };
        for (place, flags) in [
            ((0x10_0000, 2048), write | flag::NEXT),
            ((u64::MAX - 16, 2048), write),
            ((0x10_0000, u32::MAX), write),
        ] {
            let (mut guest, wire) = connected();
            say(&wire, &packet(PLAIN, 60));
            guest.write_descriptor(queue, 0, place, flags, 0);
            guest.make_available(queue, 0);
            guest.notify(queue);
            guest.run();
            assert!(guest.needs_reset(), "{queue} {place:?}");
        }
    }
}

#[test]
fn a_frame_goes_into_one_buffer_that_is_large_enough() {
    let (mut guest, wire) = connected();
    guest.submit(RX, &[Buffer::In(100), Buffer::In(PACKET_MAX)]);
    let bytes = packet(header(1, 1), 65_550);
    say(&wire, &bytes);
    guest.run();
    let used = guest.used(RX).expect("a frame");
    assert_eq!(used.len, bytes.len());
    assert_eq!(used.data[NUM_BUFFERS..HEADER_SIZE], [1, 0]);
    assert_eq!(used.data[HEADER_SIZE..used.len], bytes[HEADER_SIZE..]);
}

#[test]
fn a_frame_goes_into_several_buffers_that_are_small() {
    let (mut guest, wire) = connected();
    for _ in 0..50 {
        guest.submit(RX, &[Buffer::In(1536)]);
    }
    guest.run();
    guest.interrupts();
    for len in [65_550, 60, 1536 - HEADER_SIZE, 1536 - HEADER_SIZE + 1] {
        let bytes = packet(header(1, 4), len);
        say(&wire, &bytes);
        guest.run();
        assert_eq!(guest.interrupts(), 1);
        assert_eq!(received(&mut guest), Some(bytes));
        assert!(guest.used(RX).is_none());
    }
}

#[test]
fn a_guest_without_mergeable_buffers_gets_what_fits_into_one() {
    let (device, wire) = bound();
    let mut guest = FakeGuest::boot_with(device, !F_MRG_RXBUF);
    for _ in 0..3 {
        guest.submit(RX, &[Buffer::In(1526)]);
    }
    for len in [1515, 1514, 60] {
        say(&wire, &packet(PLAIN, len));
    }
    guest.run();
    assert_eq!(received(&mut guest), Some(packet(PLAIN, 1514)));
    assert_eq!(received(&mut guest), Some(packet(PLAIN, 60)));
    assert!(guest.used(RX).is_none());
}

#[test]
fn frames_wait_for_buffers_and_nobody_spins() {
    let (mut guest, wire) = connected();
    let bytes = |len| packet(PLAIN, len);
    for len in [3000, 61, 62] {
        say(&wire, &bytes(len));
    }
    // It comes to rest, or this panics.
    guest.run();
    guest.submit(RX, &[Buffer::In(1536)]);
    guest.run();
    assert!(guest.used(RX).is_none(), "there is no room for all of it");
    guest.submit(RX, &[Buffer::In(1536)]);
    guest.run();
    assert_eq!(received(&mut guest), Some(bytes(3000)));
    for len in [61, 62] {
        guest.submit(RX, &[Buffer::In(1536)]);
        guest.run();
        assert_eq!(received(&mut guest), Some(bytes(len)));
    }
    say(&wire, &bytes(63));
    guest.run();
    guest.submit(RX, &[Buffer::In(1536)]);
    guest.run();
    assert_eq!(received(&mut guest), Some(bytes(63)));
}

#[test]
fn a_frame_that_no_guest_has_room_for_is_dropped() {
    let (mut guest, wire) = connected();
    while guest.room(RX) > 0 {
        guest.submit(RX, &[Buffer::In(HEADER_SIZE)]);
    }
    say(&wire, &packet(PLAIN, 65_550));
    say(&wire, &packet(PLAIN, 60));
    guest.run();
    assert_eq!(received(&mut guest), Some(packet(PLAIN, 60)));
    assert!(guest.used(RX).is_none());
}

#[test]
fn what_is_no_frame_of_a_tap_does_not_reach_the_guest() {
    let (mut guest, wire) = connected();
    guest.submit(RX, &[Buffer::In(2048)]);
    for len in [1, HEADER_SIZE - 1, HEADER_SIZE, HEADER_SIZE + 13] {
        say(&wire, &vec![0; len]);
    }
    say(&wire, &packet(header(1, 3), 60));
    say(&wire, &packet(PLAIN, 60));
    guest.run();
    assert_eq!(received(&mut guest), Some(packet(PLAIN, 60)));
}

#[test]
fn a_full_tap_holds_the_queue_up_and_loses_nothing() {
    let (mut guest, wire) = connected();
    let count = 100;
    for len in 0..count {
        guest.submit(TX, &[Buffer::Out(packet(PLAIN, 20_000 + len))]);
    }
    guest.run();
    let mut returned = 0;
    while guest.used(TX).is_some() {
        returned += 1;
    }
    assert!(0 < returned && returned < count, "{returned}");
    for len in 0..count {
        let bytes = heard(&wire).unwrap_or_else(|| panic!("frame {len}"));
        assert_eq!(bytes, packet(PLAIN, 20_000 + len));
        guest.run();
    }
    while guest.used(TX).is_some() {
        returned += 1;
    }
    assert_eq!(returned, count);
}

#[test]
fn many_frames_are_more_than_one_turn() {
    let (mut guest, wire) = connected();
    for _ in 0..256 {
        guest.submit(TX, &[Buffer::Out(packet(PLAIN, 14))]);
    }
    // More than fits into the tap: nobody is to wait for the other side.
    for _ in 0..1000 {
        guest.wait(0);
        while heard(&wire).is_some() {}
    }
    guest.run();
    let returned = std::iter::from_fn(|| guest.used(TX)).count();
    assert_eq!(returned, 256);
}

#[test]
fn the_end_of_the_tap_is_not_the_guests() {
    let (mut guest, wire) = connected();
    guest.submit(RX, &[Buffer::In(2048)]);
    guest.run();
    drop(wire);
    guest.run();
    let used = guest.request(TX, &[Buffer::Out(packet(PLAIN, 60))]);
    assert_eq!(used.len, 0);
    assert!(guest.used(RX).is_none());
    assert!(!guest.needs_reset());
}

#[test]
fn a_child_goes_on_with_a_tap_of_its_own() {
    let mut parent = FakeGuest::boot(Net::restore(&NetState::default()).unwrap());
    for _ in 0..10 {
        parent.submit(RX, &[Buffer::In(1536)]);
    }
    parent.request(TX, &[Buffer::Out(packet(PLAIN, 60))]);
    let frozen = parent.freeze();
    let (device, wire) = bound();
    let mut child = FakeGuest::thaw(device, &frozen);
    child.run();
    assert_eq!(heard(&wire), None);
    say(&wire, &packet(PLAIN, 70));
    child.run();
    assert_eq!(received(&mut child), Some(packet(PLAIN, 70)));
    child.request(TX, &[Buffer::Out(packet(PLAIN, 80))]);
    assert_eq!(heard(&wire), Some(packet(PLAIN, 80)));
}

/// So much in a second, and no more at once than there must be.
fn slow(per_second: u64) -> Option<Rate> {
    let per_second = std::num::NonZeroU64::new(per_second).unwrap();
    let burst = 0;
    Some(Rate { per_second, burst })
}

/// Lets time go by until `done` has been so often.
fn until(
    guest: &mut FakeGuest<Net>,
    count: usize,
    mut done: impl FnMut(&mut FakeGuest<Net>) -> bool,
) {
    let mut seen = 0;
    for _ in 0..1000 {
        guest.run();
        seen += std::iter::from_fn(|| done(guest).then_some(())).count();
        if seen == count {
            return;
        }
        guest.wait(100);
    }
    panic!("{seen} of {count}");
}

#[test]
fn frames_of_a_guest_wait_for_their_time_and_none_is_lost() {
    let mut limits = RateLimits::default();
    limits.from_guest.bytes = slow(100_000);
    let (device, wire) = limited(limits);
    let mut guest = FakeGuest::boot(device);
    let start = Instant::now();
    for len in 0..10 {
        guest.submit(TX, &[Buffer::Out(packet(PLAIN, 5000 + len))]);
    }
    // It comes to rest, or this panics; and what is not held back is not.
    guest.run();
    let sent = std::iter::from_fn(|| heard(&wire)).count();
    assert!((1..10).contains(&sent), "{sent}");
    guest.submit(RX, &[Buffer::In(2048)]);
    say(&wire, &packet(PLAIN, 60));
    guest.run();
    assert_eq!(received(&mut guest), Some(packet(PLAIN, 60)));
    let mut len = 5000 + sent;
    until(&mut guest, 10 - sent, |_| {
        let frame = heard(&wire);
        let expected = packet(PLAIN, len);
        len += usize::from(frame.is_some());
        frame.is_some_and(|frame| frame == expected)
    });
    // Nine are paid for before the tenth goes; the bucket holds four milliseconds.
    assert!(start.elapsed() >= Duration::from_millis(440));
}

#[test]
fn frames_for_a_guest_wait_for_their_time_and_none_is_lost() {
    let mut limits = RateLimits::default();
    limits.to_guest.frames = slow(50);
    let (device, wire) = limited(limits);
    let mut guest = FakeGuest::boot(device);
    for _ in 0..10 {
        guest.submit(RX, &[Buffer::In(2048)]);
        say(&wire, &packet(PLAIN, 60));
    }
    let start = Instant::now();
    guest.run();
    assert_eq!(received(&mut guest), Some(packet(PLAIN, 60)));
    assert_eq!(received(&mut guest), None);
    guest.request(TX, &[Buffer::Out(packet(PLAIN, 60))]);
    assert_eq!(heard(&wire), Some(packet(PLAIN, 60)));
    until(&mut guest, 9, |guest| received(guest).is_some());
    assert!(start.elapsed() >= Duration::from_millis(170));
}

#[test]
fn a_reset_pays_no_debts() {
    let mut limits = RateLimits::default();
    limits.from_guest.bytes = slow(1000);
    let (device, wire) = limited(limits);
    let mut guest = FakeGuest::boot(device);
    guest.request(TX, &[Buffer::Out(packet(PLAIN, 60_000))]);
    assert!(heard(&wire).is_some());
    assert!(guest.set_up(u64::MAX));
    guest.submit(TX, &[Buffer::Out(packet(PLAIN, 60))]);
    guest.run();
    assert_eq!(heard(&wire), None);
}
