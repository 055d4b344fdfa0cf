//! Reports of free memory: whatever comes, only the guest's own memory is taken.
#![no_main]

use arbitrary::Arbitrary;
use devices::testing::{Buffer, MEMORY_SIZE};
use devices::virtio::{Balloon, BalloonState, Reclaim};
use harness::{Action, Hostile};
use libfuzzer_sys::fuzz_target;
use std::sync::Arc;
use vm_memory::GuestAddress;

#[derive(Arbitrary, Debug)]
enum Step {
    Guest(Action),
    /// Of the right form, or nearly.
    Report {
        queue: u8,
        lengths: Vec<u16>,
    },
}

struct Memory;

impl Reclaim for Memory {
    fn reclaim(&self, at: GuestAddress, len: usize) {
        let end = at.0.checked_add(len as u64);
        assert!(end.is_some_and(|end| end <= MEMORY_SIZE as u64));
    }
}

fuzz_target!(|steps: Vec<Step>| {
    let restore = |state: &BalloonState| Balloon::restore(state, Arc::new(Memory));
    let mut hostile = Hostile::new(restore(&BalloonState {}));
    for step in steps {
        match step {
            Step::Guest(action) => hostile.act(action, restore),
            Step::Report { queue, lengths } => {
                let free = lengths.iter().take(32).map(|len| Buffer::In((*len).into()));
                hostile.submit((queue % 3).into(), &free.collect::<Vec<_>>());
            }
        }
    }
    hostile.guest.run();
});
