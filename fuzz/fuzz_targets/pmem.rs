//! Requests to a window of memory: whatever comes, the window stays where it is.
#![no_main]

use arbitrary::Arbitrary;
use devices::testing::Buffer;
use devices::virtio::{Pmem, PmemState};
use harness::{Action, Hostile};
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
enum Step {
    Guest(Action),
    /// Of the right form, or nearly.
    Request {
        kind: u8,
        extra: Vec<u8>,
        room: u8,
    },
}

#[derive(Arbitrary, Debug)]
struct Input {
    /// In pages: most windows are possible ones.
    start: u64,
    pages: u32,
    steps: Vec<Step>,
}

fuzz_target!(|input: Input| {
    let state = PmemState {
        start: input.start.wrapping_mul(4096),
        size: u64::from(input.pages) * 4096,
    };
    let Ok(device) = Pmem::restore(&state) else {
        return;
    };
    let restore = |state: &PmemState| Pmem::restore(state).expect("it was good before");
    let mut hostile = Hostile::new(device);
    for step in input.steps {
        match step {
            Step::Guest(action) => hostile.act(action, restore),
            Step::Request { kind, extra, room } => {
                let kind = Buffer::Out(u32::from(kind % 2).to_le_bytes().into());
                let buffers = [kind, Buffer::Out(extra), Buffer::In(room.into())];
                hostile.submit(0, &buffers);
            }
        }
    }
    hostile.guest.run();
    assert_eq!(hostile.guest.freeze().device, state);
});
