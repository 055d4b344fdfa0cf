//! Guest memory as devices have it, and what they have written of it.

use std::num::NonZeroUsize;
use std::sync::OnceLock;
use vm_memory::bitmap::{AtomicBitmap, BS, Bitmap, NewBitmap, RefSlice, WithBitmapSlice};
use vm_memory::{GuestMemoryMmap, VolatileSlice};

/// The memory of a guest. Whatever writes to it says so to the [`WriteLog`] of its region.
pub type GuestMemory = GuestMemoryMmap<WriteLog>;

/// A stretch of guest memory, which the guest may write at any time.
pub type GuestSlice<'m> = VolatileSlice<'m, BS<'m, WriteLog>>;

/// What the devices of a guest reach of its addresses.
#[derive(Clone, Debug)]
pub struct DeviceMemory {
    /// RAM.
    pub ram: GuestMemory,
    /// Files of the host that a guest can map, read-only. A driver names their pages
    /// where it writes a file straight from a mapping of another (O_DIRECT). A file may
    /// be cut short at any time, so this process never touches them: they are for
    /// system calls, which say EFAULT then.
    pub rom: Option<GuestMemory>,
}

impl From<GuestMemory> for DeviceMemory {
    fn from(ram: GuestMemory) -> Self {
        Self { ram, rom: None }
    }
}

/// The bytes of a page.
const PAGE: NonZeroUsize = NonZeroUsize::new(4096).expect("not zero");

/// Which pages of a region this process has written, for a fork of a guest that runs: KVM
/// logs what the guest writes, and nothing of this. Until somebody asks there is no log,
/// and no cost.
///
/// A page is written first and logged then. So a write that is not in the log when it
/// begins was over before, and one that is not in what [`Self::take`] gives is not over or
/// will be in the next.
#[derive(Debug, Default)]
pub struct WriteLog {
    /// Bytes of the region.
    len: usize,
    pages: OnceLock<AtomicBitmap>,
}

impl WriteLog {
    /// Logs from now on.
    pub fn begin(&self) {
        self.pages.get_or_init(|| AtomicBitmap::new(self.len, PAGE));
    }

    /// What was written since the last call or [`Self::begin`]: a bit for each page, from
    /// the lowest of the first word on. Empty without a log.
    pub fn take(&self) -> Vec<u64> {
        self.pages
            .get()
            .map(AtomicBitmap::get_and_reset)
            .unwrap_or_default()
    }
}

impl<'a> WithBitmapSlice<'a> for WriteLog {
    type S = RefSlice<'a, Self>;
}

impl Bitmap for WriteLog {
    fn mark_dirty(&self, offset: usize, len: usize) {
        if let Some(pages) = self.pages.get() {
            pages.mark_dirty(offset, len);
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.pages.get().is_some_and(|pages| pages.dirty_at(offset))
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, Self> {
        RefSlice::new(self, offset)
    }
}

impl NewBitmap for WriteLog {
    fn with_len(len: usize) -> Self {
        Self {
            len,
            pages: OnceLock::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

    #[test]
    fn what_is_written_is_logged_once_asked_for() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).expect("memory");
        let region = memory.find_region(GuestAddress(0)).expect("there");
        let log = (**region).bitmap();
        memory
            .write_slice(b"before", GuestAddress(0))
            .expect("written");
        assert_eq!(log.take(), [0_u64; 0]);
        log.begin();
        memory
            .write_slice(b"12", GuestAddress(0x1fff))
            .expect("written");
        memory
            .write_slice(b"1", GuestAddress(0x4_0000))
            .expect("written");
        assert_eq!(log.take(), [0b110, 1, 0, 0]);
        assert_eq!(log.take(), [0; 4]);
    }
}
