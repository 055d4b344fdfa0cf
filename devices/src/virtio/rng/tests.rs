use super::*;
use crate::testing::{Buffer, FakeGuest, conformance};

#[test]
fn conforms() {
    conformance(&RngState::default(), Rng::restore, |guest| {
        let used = guest.request(0, &[Buffer::In(32)]);
        assert_eq!(used.len, 32);
    });
}

#[test]
fn bytes_are_random_and_fill_every_buffer() {
    let mut guest = FakeGuest::boot(Rng::default());
    let first = guest.request(0, &[Buffer::In(100), Buffer::In(5000)]);
    let second = guest.request(0, &[Buffer::In(100), Buffer::In(5000)]);
    assert_eq!((first.len, first.data.len()), (5100, 5100));
    assert_ne!(first.data, second.data);
    let zeroes = first.data.iter().filter(|&&byte| byte == 0).count();
    assert!(zeroes < 200, "{zeroes} of 5100 bytes are zero");
}

#[test]
fn one_request_gets_a_bounded_answer() {
    let mut guest = FakeGuest::boot(Rng::default());
    let used = guest.request(0, &[Buffer::In(60 << 10), Buffer::In(60 << 10)]);
    assert_eq!(used.len, REQUEST_MAX);
}

#[test]
fn a_request_without_room_is_answered() {
    let mut guest = FakeGuest::boot(Rng::default());
    assert_eq!(guest.request(0, &[Buffer::Out(vec![1])]).len, 0);
    assert_eq!(guest.request(0, &[Buffer::In(0)]).len, 0);
}

#[test]
fn more_requests_than_a_burst_are_all_answered() {
    let mut guest = FakeGuest::boot(Rng::default());
    for _ in 0..3 * BURST_MAX {
        guest.submit(0, &[Buffer::In(8)]);
    }
    guest.run();
    let answers = std::iter::from_fn(|| guest.used(0)).count();
    assert_eq!(answers, 3 * BURST_MAX);
}
