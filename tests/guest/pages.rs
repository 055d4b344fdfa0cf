//! How many pages of its own a child has, counted from the host. docs/faults.md
//! says what they are, and what keeps them few.

use crate::support::{boot, busybox_rootfs};
use fork::{Child, ContainerSpec, Disks, ForkSpec, ProcessSpec, Stream, Template, Writable};
use std::collections::HashSet;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;

const PAGE: usize = 4096;

/// From the wake-up until the identity holds, where the child is held. No timer fires on
/// the way, so it does not go by the host's speed: every child is to keep to it.
const MOST_TO_IDENTITY: usize = 40;
/// From the wake-up to the exit of `true`, with the writable layer on a disk. Two boots of
/// one guest have differed by twenty.
const MOST_TO_EXIT_ON_DISK: usize = 500;
/// With it in memory.
const MOST_TO_EXIT: usize = 470;
/// Of those, pages that hold a block of the root image.
const MOST_FILE_CACHE: usize = 250;

/// The memory of the only child in this process: a private mapping of the base.
struct Memory {
    start: u64,
    pages: usize,
}

impl Memory {
    fn of_the_child() -> Self {
        let maps = fs::read_to_string("/proc/self/maps").expect("reads");
        let mut private = maps
            .lines()
            .filter(|line| line.contains("memfd:vm-run-guest") && line.contains("rw-p"));
        let line = private.next().expect("a child lives");
        assert!(private.next().is_none(), "there is one child:\n{maps}");
        let (range, _) = line.split_once(' ').expect("a line of maps");
        let (start, end) = range.split_once('-').expect("a range");
        let address = |hex| u64::from_str_radix(hex, 16).expect("an address");
        let (start, end) = (address(start), address(end));
        let pages = (end - start) as usize / PAGE;
        Self { start, pages }
    }

    /// The numbers of its pages that are no longer the base's: in memory or in swap,
    /// and not of the file (Documentation/admin-guide/mm/pagemap.rst: bits 63, 62
    /// and 61).
    fn private_pages(&self) -> Vec<u64> {
        let mut entries = vec![0; self.pages * 8];
        File::open("/proc/self/pagemap")
            .and_then(|f| f.read_exact_at(&mut entries, self.start / PAGE as u64 * 8))
            .expect("reads");
        let (entries, _) = entries.as_chunks();
        (0..)
            .zip(entries)
            .map(|(number, entry)| (number, u64::from_le_bytes(*entry)))
            .filter(|(_, entry)| entry >> 62 != 0 && entry >> 61 & 1 == 0)
            .map(|(number, _)| number)
            .collect()
    }

    /// How many of these pages hold a block of the root image.
    fn count_blocks(&self, pages: &[u64], blocks: &HashSet<[u8; PAGE]>) -> usize {
        let memory = File::open("/proc/self/mem").expect("opens");
        let holds_block = |number: &&u64| {
            let mut page = [0; PAGE];
            memory
                .read_exact_at(&mut page, self.start + **number * PAGE as u64)
                .expect("reads");
            blocks.contains(&page)
        };
        pages.iter().filter(holds_block).count()
    }
}

/// The blocks of a root image that are not all zeroes.
fn blocks_of(mut image: File) -> HashSet<[u8; PAGE]> {
    let mut bytes = Vec::new();
    image.read_to_end(&mut bytes).expect("reads");
    let (blocks, _) = bytes.as_chunks();
    let data = |block: &&[u8; PAGE]| block.iter().any(|byte| *byte != 0);
    blocks.iter().filter(data).copied().collect()
}

fn fork(template: &Template, hold: bool) -> Child {
    let writable = tempfile::tempfile().expect("a file");
    let empty = template.empty_disk().expect("a guest with a disk");
    empty.write_to(&writable).expect("a disk");
    let disks = Disks {
        root: Some(busybox_rootfs()),
        writable: Some(writable.into()),
    };
    let hostname = "pages".into();
    template
        .fork(ForkSpec {
            hostname,
            disks,
            hold,
            ..ForkSpec::default()
        })
        .expect("forks")
}

#[test]
fn a_child_has_few_pages_of_its_own_when_its_identity_holds() {
    let template = boot(256, 1);
    let counts = [(); 4].map(|()| {
        let mut child = fork(&template, true);
        child.confirm().expect("has an identity");
        let count = Memory::of_the_child().private_pages().len();
        child.release().expect("goes on");
        count
    });
    println!("private pages from wake-up to identity: {counts:?}");
    assert!(counts.iter().max() <= Some(&MOST_TO_IDENTITY), "{counts:?}");
}

#[test]
fn a_child_has_few_pages_of_its_own_when_true_has_ended() {
    let template = boot(256, 1);
    let blocks = blocks_of(busybox_rootfs());
    let memory = Writable::Memory { limit: 64 << 20 };
    for (writable, most) in [
        (Writable::Disk, MOST_TO_EXIT_ON_DISK),
        (memory, MOST_TO_EXIT),
    ] {
        let mut child = fork(&template, false);
        let container = ContainerSpec {
            writable: writable.clone(),
            ..ContainerSpec::default()
        };
        let process = ProcessSpec {
            args: vec!["true".into()],
            env: vec!["PATH=/bin:/sbin:/usr/bin:/usr/sbin".into()],
            streams: vec![Stream::Stdout, Stream::Stderr],
            ..ProcessSpec::default()
        };
        let _streams = child.start(container, process).expect("starts");
        assert_eq!(child.wait().expect("ends").code(), 0);
        let memory = Memory::of_the_child();
        let pages = memory.private_pages();
        let cache = memory.count_blocks(&pages, &blocks);
        let count = pages.len();
        println!("private pages to the exit of true, {writable:?}: {count}, file cache {cache}");
        assert!(count <= most, "{count}");
        assert!(cache <= MOST_FILE_CACHE, "{cache}");
    }
}
