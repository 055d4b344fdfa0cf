//! The transport's registers and rings, with the simplest device behind them.
#![no_main]

use devices::virtio::{Rng, RngState};
use harness::{Action, Hostile};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|actions: Vec<Action>| {
    let mut hostile = Hostile::new(Rng::restore(&RngState::default()));
    for action in actions {
        hostile.act(action, Rng::restore);
    }
    hostile.guest.run();
});
