use super::*;
use crate::testing::{Buffer, FakeGuest, conformance};

const WINDOW: PmemState = PmemState {
    start: 4 << 30,
    size: 512 << 20,
};

fn boot() -> FakeGuest<Pmem> {
    FakeGuest::boot(Pmem::restore(&WINDOW).expect("a window"))
}

/// The driver's request, and room for the answer.
fn request(kind: u32) -> [Buffer; 2] {
    [Buffer::Out(kind.to_le_bytes().into()), Buffer::In(4)]
}

#[test]
fn conforms() {
    let restore = |state: &PmemState| Pmem::restore(state).expect("a window");
    conformance(&WINDOW, restore, |guest| {
        assert_eq!(guest.request(0, &request(REQUEST_FLUSH)).data, [0; 4]);
    });
}

#[test]
fn the_driver_reads_where_the_window_is() {
    let guest = boot();
    assert_eq!(guest.config(0), WINDOW.start.to_le_bytes());
    assert_eq!(guest.config(8), WINDOW.size.to_le_bytes());
    assert_eq!(guest.config(16), [0; 4], "nothing follows");
}

#[test]
fn a_flush_is_done_and_what_is_unknown_fails() {
    let mut guest = boot();
    let flushed = guest.request(0, &request(REQUEST_FLUSH));
    assert_eq!((flushed.len, flushed.data), (4, vec![0; 4]));
    let failed = guest.request(0, &request(1));
    assert_eq!((failed.len, failed.data), (4, vec![0xff; 4]));
    assert!(!guest.needs_reset());
}

#[test]
fn more_requests_than_a_burst_are_all_answered() {
    let mut guest = boot();
    for _ in 0..5 {
        let room = guest.room(0) / 2;
        for _ in 0..room {
            guest.submit(0, &request(REQUEST_FLUSH));
        }
        guest.run();
        let answers = std::iter::from_fn(|| guest.used(0)).count();
        assert_eq!(answers, room);
    }
}

#[test]
fn a_request_without_its_parts_stops_the_device() {
    for broken in [
        vec![Buffer::Out(vec![0; 4])],
        vec![Buffer::Out(vec![0; 3]), Buffer::In(4)],
        vec![Buffer::Out(vec![0; 4]), Buffer::In(3)],
    ] {
        let mut guest = boot();
        guest.submit(0, &broken);
        guest.run();
        assert!(guest.needs_reset(), "{broken:?}");
    }
}

#[test]
fn a_window_is_of_whole_pages_and_has_an_end() {
    for (start, size) in [(1, 4096), (4096, 4095), (u64::MAX - 4095, 8192)] {
        let refused = Pmem::restore(&PmemState { start, size });
        assert!(matches!(refused, Err(PmemError::Window { .. })), "{start}");
    }
    assert!(Pmem::restore(&PmemState::default()).is_ok());
}
