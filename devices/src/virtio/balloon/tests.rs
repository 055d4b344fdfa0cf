use super::*;
use crate::testing::{Buffer, FakeGuest, conformance};
use std::sync::Mutex;

/// Remembers what it was given.
#[derive(Default)]
struct Given(Mutex<Vec<(GuestAddress, usize)>>);

impl Reclaim for Given {
    fn reclaim(&self, at: GuestAddress, len: usize) {
        self.0.lock().expect("no test panics").push((at, len));
    }
}

fn boot() -> (FakeGuest<Balloon>, Arc<Given>) {
    let given = Arc::new(Given::default());
    let device = Balloon::restore(&BalloonState {}, given.clone());
    (FakeGuest::boot(device), given)
}

#[test]
fn conforms() {
    let restore = |state: &BalloonState| Balloon::restore(state, Arc::new(Given::default()));
    conformance(&BalloonState {}, restore, |guest| {
        assert_eq!(guest.request(REPORTING, &[Buffer::In(4096)]).len, 0);
    });
}

#[test]
fn the_balloon_is_to_be_empty() {
    let (guest, _) = boot();
    assert_eq!(guest.config(0), [0; 16]);
}

#[test]
fn what_is_reported_is_given_back_before_the_driver_has_it_again() {
    let (mut guest, given) = boot();
    for count in [1, 8, 32] {
        let free = vec![Buffer::In(4096); count];
        let used = guest.request(REPORTING, &free);
        assert_eq!(used.len, 0, "nothing is written");
        let given = std::mem::take(&mut *given.0.lock().expect("no test panics"));
        assert_eq!(given.len(), count);
        assert!(given.iter().all(|(_, len)| *len == 4096), "{given:?}");
    }
}

#[test]
fn a_page_that_is_offered_to_the_balloon_stays() {
    let (mut guest, given) = boot();
    for queue in 0..REPORTING {
        guest.request(queue, &[Buffer::Out(vec![1; 4])]);
    }
    // A device reads it: it is no room, and not free.
    guest.request(REPORTING, &[Buffer::Out(vec![1; 4096])]);
    assert_eq!(*given.0.lock().expect("no test panics"), []);
}

#[test]
fn memory_that_the_guest_has_not_stops_the_device() {
    let (mut guest, given) = boot();
    let head = guest.make_chain(REPORTING, &[Buffer::In(4096)]);
    guest.write_descriptor(REPORTING, head, (1 << 40, 4096), 2, 0);
    guest.make_available(REPORTING, head);
    guest.write(crate::virtio::mmio::register::QUEUE_NOTIFY, 2);
    guest.run();
    assert!(guest.needs_reset());
    assert_eq!(*given.0.lock().expect("no test panics"), []);
}
