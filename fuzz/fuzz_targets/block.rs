//! Requests to a disk: its file keeps its length, and all its bytes if the disk
//! is read-only.
#![no_main]

use std::fs::File;
use std::io::Read;

use arbitrary::Arbitrary;
use devices::testing::Buffer;
use devices::virtio::block::{DiskFiles, format_overlay};
use devices::virtio::{Block, BlockState};
use harness::{Action, Hostile};
use libfuzzer_sys::fuzz_target;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

const FILE_LEN: u64 = 64 << 10;

#[derive(Arbitrary, Debug)]
enum Step {
    Guest(Action),
    /// Of the right form.
    Request {
        kind: u8,
        sector: u8,
        bytes: Vec<u8>,
        room: u16,
    },
    /// A discard or write-zeroes of one segment.
    Clear {
        kind: u8,
        sector: u8,
        sectors: u8,
        flags: u8,
    },
}

#[derive(Arbitrary, Debug)]
struct Input {
    read_only: bool,
    /// Whether there is one more file, over the first.
    layered: bool,
    steps: Vec<Step>,
}

fn header(kind: u8, sector: u8) -> Buffer {
    let mut raw = u32::from(kind).to_le_bytes().to_vec();
    raw.extend([0; 4]);
    raw.extend(u64::from(sector).to_le_bytes());
    Buffer::Out(raw)
}

fn act(hostile: &mut Hostile<Block>, step: Step, bind: impl Fn(&BlockState) -> Block) {
    match step {
        Step::Guest(action) => hostile.act(action, bind),
        Step::Request {
            kind,
            sector,
            bytes,
            room,
        } => {
            let (out, room) = (Buffer::Out(bytes), Buffer::In(room.into()));
            let status = Buffer::In(1);
            hostile.submit(0, &[header(kind % 16, sector), out, room, status]);
        }
        Step::Clear {
            kind,
            sector,
            sectors,
            flags,
        } => {
            let mut segment = u64::from(sector).to_le_bytes().to_vec();
            segment.extend(u32::from(sectors).to_le_bytes());
            segment.extend(u32::from(flags % 4).to_le_bytes());
            let kind = 11 + 2 * (kind % 2);
            hostile.submit(0, &[header(kind, 0), Buffer::Out(segment), Buffer::In(1)]);
        }
    }
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
    let overlay = File::from(memfd_create("overlay", MemfdFlags::CLOEXEC).expect("memfd"));
    format_overlay(&overlay, FILE_LEN).expect("length");
    let is_layered = input.layered && !input.read_only;
    let bind = |state: &BlockState| {
        let mut disk = Block::restore(state).expect("a good state");
        let over = is_layered.then_some(&overlay);
        let files = [&file].into_iter().chain(over);
        let files = files.map(|file| file.try_clone().expect("a descriptor"));
        disk.bind(DiskFiles(files.collect()))
            .expect("files that fit");
        disk
    };
    let mut hostile = Hostile::new(bind(&state));
    for step in input.steps {
        act(&mut hostile, step, bind);
    }
    hostile.guest.run();
    assert_eq!(file.metadata().expect("memfd").len(), FILE_LEN);
    if input.read_only || is_layered {
        let mut bytes = Vec::new();
        (&file).read_to_end(&mut bytes).expect("memfd");
        assert!(bytes.iter().all(|&byte| byte == 0));
    }
});
