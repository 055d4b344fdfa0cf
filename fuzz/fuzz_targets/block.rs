//! Requests to a disk: its file keeps its length, and all its bytes if the disk
//! is read-only.
#![no_main]

use std::fs::File;
use std::io::Read;

use arbitrary::Arbitrary;
use devices::virtio::{Block, BlockState};
use harness::{Action, Hostile};
use libfuzzer_sys::fuzz_target;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

const FILE_LEN: u64 = 64 << 10;

#[derive(Arbitrary, Debug)]
struct Input {
    read_only: bool,
    actions: Vec<Action>,
}

fuzz_target!(|input: Input| {
    let file = File::from(memfd_create("disk", MemfdFlags::CLOEXEC).expect("memfd"));
    ftruncate(&file, FILE_LEN).expect("length");
    let state = BlockState {
        capacity_sectors: 1 << 20,
        read_only: input.read_only,
        id: "fuzz".into(),
    };
    // A duplicate has the same lock, so that a fork can have it while its parent
    // is still there; two virtual machines never do this.
    let bind =
        |state: &BlockState| Block::restore(state, file.try_clone().ok()).expect("a good state");
    let mut hostile = Hostile::new(bind(&state));
    for action in input.actions {
        hostile.act(action, bind);
    }
    hostile.guest.run();
    assert_eq!(file.metadata().expect("memfd").len(), FILE_LEN);
    if input.read_only {
        let mut bytes = Vec::new();
        (&file).read_to_end(&mut bytes).expect("memfd");
        assert!(bytes.iter().all(|&byte| byte == 0));
    }
});
