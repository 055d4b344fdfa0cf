//! Memory that a guest has given back: zeroes that cost nothing, until it writes there
//! again.
//!
//! A private mapping that drops its pages has the file's again, what the guest's parent
//! had there. So what a child gives back is mapped anew, over nothing. A parent that is
//! booting has its own file, which gets a hole.

use super::overlay::{self, Mappings, mappings_left};
use super::pages::{PageSet, Run};
use super::punch;
use crate::layout::RamRange;
use devices::GuestMemory;
use devices::virtio::Reclaim;
use std::fs::File;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use vm_memory::GuestAddress;
use vm_run_abi::PAGE_SIZE;

/// Only whole blocks of so many bytes are taken: each can be a mapping, and Linux reports
/// none that is smaller (its pageblock_order).
const BLOCK: u64 = 2 << 20;

/// No new block is taken where a process has no more mappings than these: a fork takes
/// some too.
const MAPPINGS_KEPT: usize = 20_000;

/// What a child has given back; a page that it wrote later is still in it.
#[derive(Debug)]
pub(crate) struct Blank {
    all: PageSet,
    /// Since the last [`Self::take`].
    news: PageSet,
}

impl Blank {
    fn none_of(bytes: u64) -> Self {
        Self {
            all: PageSet::none_of(bytes),
            news: PageSet::none_of(bytes),
        }
    }

    fn insert(&mut self, block: Run) {
        self.all.insert(block);
        self.news.insert(block);
    }
}

/// What a child has given back, shared with its balloon. A mutex that holds nothing before
/// the first time, and is held while a page is taken: whoever has it reads what was given
/// back and what was written as of one moment.
#[derive(Debug, Clone, Default)]
pub(crate) struct Blanks(Arc<Mutex<Option<Blank>>>);

impl Blanks {
    pub(crate) fn lock(&self) -> MutexGuard<'_, Option<Blank>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Adds to `pages` what was given back since the last call.
pub(crate) fn take_news(blank: &mut Option<Blank>, pages: &mut PageSet) {
    if let Some(blank) = blank {
        pages.add(&blank.news);
        blank.news.clear();
    }
}

/// Adds to `pages` all that was ever given back.
pub(crate) fn add_all(blank: &Option<Blank>, pages: &mut PageSet) {
    if let Some(blank) = blank {
        pages.add(&blank.all);
    }
}

/// The memory of a guest, for its balloon.
pub(super) struct Reclaimer {
    pub(super) memory: GuestMemory,
    pub(super) ranges: Vec<RamRange>,
    pub(super) bytes: u64,
    /// Of a parent, which writes it.
    pub(super) file: Option<Arc<File>>,
    pub(super) blanks: Blanks,
    pub(super) mappings: Arc<Mappings>,
    /// Whether the system would not: it is said once, and nothing is taken any more.
    pub(super) failed: AtomicBool,
}

impl Reclaim for Reclaimer {
    fn reclaim(&self, at: GuestAddress, len: usize) {
        let end = at.0.saturating_add(len as u64);
        for range in &self.ranges {
            let Some(start) = at.0.max(range.gpa).checked_next_multiple_of(BLOCK) else {
                continue;
            };
            let end = end.min(range.gpa + range.len) / BLOCK * BLOCK;
            for gpa in (start..end).step_by(BLOCK as usize) {
                self.reclaim_block(range.file_offset + gpa - range.gpa, gpa);
            }
        }
    }
}

impl Reclaimer {
    /// The block at `offset` of the memory file and at `gpa` of the guest.
    fn reclaim_block(&self, offset: u64, gpa: u64) {
        if self.failed.load(Ordering::Relaxed) {
            return;
        }
        let taken = match &self.file {
            Some(file) => punch(file, offset..offset + BLOCK).map_err(|e| e.to_string()),
            None => self.map_block(offset, gpa),
        };
        if let Err(why) = taken {
            self.failed.store(true, Ordering::Relaxed);
            log::warn!("memory that the guest does not use stays with it: {why}");
        }
    }

    fn map_block(&self, offset: u64, gpa: u64) -> Result<(), String> {
        let mut blank = self.blanks.lock();
        let blank = blank.get_or_insert_with(|| Blank::none_of(self.bytes));
        let block = Run {
            first: offset / PAGE_SIZE,
            count: BLOCK / PAGE_SIZE,
        };
        // Another one is mapped over the first: it is counted once.
        let none = Mappings::default();
        let count = match blank.all.contains(block.first) {
            true => &none,
            false if mappings_left() < MAPPINGS_KEPT => return Ok(()),
            false => &self.mappings,
        };
        overlay::map_nothing(&self.memory, GuestAddress(gpa), BLOCK as usize, count)
            .map_err(|e| e.to_string())?;
        blank.insert(block);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Image, Ram};
    use std::os::unix::fs::{FileExt, MetadataExt};
    use vm_memory::Bytes;

    const MIB: u64 = 1 << 20;
    const MEMORY: u64 = 64 * MIB;

    fn pagemap() -> File {
        File::open("/proc/self/pagemap").expect("the page map")
    }

    fn read(ram: &Ram, gpa: u64) -> u8 {
        let mut byte = [0];
        let at = GuestAddress(gpa);
        ram.memory().read_slice(&mut byte, at).expect("RAM");
        byte[0]
    }

    /// All of it written.
    fn image() -> Image {
        let parent = Ram::shared(MEMORY).expect("memory");
        parent.write(0, &vec![b'p'; MEMORY as usize]).expect("RAM");
        parent.into_image(&pagemap()).expect("sealed")
    }

    fn reclaim(ram: &Ram, at: u64, len: u64) {
        ram.reclaimer().reclaim(GuestAddress(at), len as usize);
    }

    #[test]
    fn what_a_child_gives_back_is_zeroes_and_not_its_parents() {
        let image = image();
        let child = Ram::private(&image).expect("mapped");
        child.write(8 * MIB, &[b'c'; MIB as usize]).expect("RAM");
        let own = || child.own_pages(&pagemap()).expect("read").count();
        assert_eq!(own(), 256);
        // Not whole: the first block from 7 MiB on is that at 8 MiB.
        reclaim(&child, 7 * MIB, 4 * MIB);
        assert_eq!(own(), 0);
        let seen: Vec<u8> = [7, 8, 9, 10].map(|at| read(&child, at * MIB)).into();
        assert_eq!(seen, [b'p', 0, 0, b'p']);
        child.write(9 * MIB, b"again").expect("RAM");
        assert_eq!(read(&child, 9 * MIB), b'a');
        assert_eq!(read(&Ram::private(&image).expect("mapped"), 8 * MIB), b'p');
        // And what is made of it.
        let second = child.into_image(&pagemap()).expect("sealed");
        let grandchild = Ram::private(&second).expect("mapped");
        let seen: Vec<u8> = [7, 8, 9, 10].map(|at| read(&grandchild, at * MIB)).into();
        assert_eq!(seen, [b'p', 0, b'a', b'p']);
        let blocks = second.base().metadata().expect("stats").blocks();
        // But for the page that was written, and the one that was looked at.
        assert_eq!(blocks * 512, MEMORY - 2 * MIB + 2 * PAGE_SIZE);
    }

    #[test]
    fn a_parent_that_gives_back_has_holes() {
        let parent = Ram::shared(MEMORY).expect("memory");
        parent.write(0, &vec![b'p'; MEMORY as usize]).expect("RAM");
        reclaim(&parent, 0, MEMORY / 2);
        assert_eq!(read(&parent, 32 * MIB), b'p');
        let image = parent.into_image(&pagemap()).expect("sealed");
        let blocks = image.base().metadata().expect("stats").blocks();
        assert_eq!(blocks * 512, MEMORY / 2);
        let mut byte = [1];
        image.base().read_exact_at(&mut byte, MIB).expect("reads");
        assert_eq!(byte, [0]);
    }

    #[test]
    fn what_is_no_block_of_the_memory_is_left_alone() {
        let ram = Ram::private(&image()).expect("mapped");
        for (at, len) in [
            (0, BLOCK - 1),
            (1, BLOCK),
            (MEMORY - BLOCK + 1, BLOCK),
            (MEMORY, BLOCK),
            (u64::MAX - 5, 5),
            (u64::MAX, u64::MAX),
        ] {
            reclaim(&ram, at, len);
        }
        assert!(ram.blanks().lock().is_none());
    }
}
