//! Other memory mapped over a part of guest memory.

use crate::error::Error;
use devices::GuestMemory;
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous};
use std::ffi::c_void;
use std::fs::File;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};
use vm_run_abi::PAGE_SIZE;

/// How many parts of all guests' memory are mapped by themselves in this process, and the
/// most: of the 65530 that it may have (Linux vm.max_map_count), some are for others.
static MAPPED: AtomicUsize = AtomicUsize::new(0);
const MAPPED_MAX: usize = 60_000;

/// Those of one guest. Dropped with its memory.
#[derive(Debug, Default)]
pub(super) struct Mappings(AtomicUsize);

impl Mappings {
    fn add_one(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
        MAPPED.fetch_add(1, Ordering::Relaxed);
    }
}

impl Drop for Mappings {
    fn drop(&mut self) {
        MAPPED.fetch_sub(*self.0.get_mut(), Ordering::Relaxed);
    }
}

/// How many more runs of pages this process can map for its guests: each run of pages of a
/// layer is a mapping ([`Image::runs`](super::Image::runs)).
pub fn mappings_left() -> usize {
    MAPPED_MAX.saturating_sub(MAPPED.load(Ordering::Relaxed))
}

const ACCESS: ProtFlags = ProtFlags::READ.union(ProtFlags::WRITE);
const HOW: MapFlags = MapFlags::PRIVATE
    .union(MapFlags::FIXED)
    .union(MapFlags::NORESERVE);

/// Maps the bytes `part` of `file`, private, over guest memory from `gpa` on, and counts
/// it. What was there before is gone.
///
/// # Errors
/// A range that is not whole pages within one region, or what mmap says.
pub(super) fn map(
    memory: &GuestMemory,
    gpa: GuestAddress,
    file: &File,
    part: Range<u64>,
    count: &Mappings,
) -> Result<(), Error> {
    let len = (part.end - part.start) as usize;
    let address = whole_pages(memory, gpa, len)?;
    // SAFETY: `whole_pages`; and nobody has a reference into guest memory.
    unsafe { mmap(address, len, ACCESS, HOW, file, part.start) }
        .map_err(Error::memory("mmap of a layer"))?;
    count.add_one();
    Ok(())
}

/// Maps no file, and counts it: `len` bytes from `gpa` on read as zeroes. What was there before is gone.
///
/// # Errors
/// As [`map`].
pub(super) fn map_nothing(
    memory: &GuestMemory,
    gpa: GuestAddress,
    len: usize,
    count: &Mappings,
) -> Result<(), Error> {
    let address = whole_pages(memory, gpa, len)?;
    // SAFETY: as in `map`.
    unsafe { mmap_anonymous(address, len, ACCESS, HOW) }
        .map_err(Error::memory("mmap of nothing"))?;
    count.add_one();
    Ok(())
}

/// Where `len` bytes from `gpa` on lie in this process: whole pages of one region of
/// `memory`, so that nothing beside them is replaced. The region is mapped as long as
/// `memory` lives, and unmapped as a whole at its end, whatever lies in it.
fn whole_pages(memory: &GuestMemory, gpa: GuestAddress, len: usize) -> Result<*mut c_void, Error> {
    let none = || {
        Error::State(format!(
            "{len} bytes at {:#x} are no part of its memory",
            gpa.0
        ))
    };
    let is_whole = [gpa.0, len as u64]
        .iter()
        .all(|at| at.is_multiple_of(PAGE_SIZE));
    let region = memory.find_region(gpa).filter(|_| is_whole);
    let region = region.ok_or_else(none)?;
    let at = MemoryRegionAddress(gpa.0 - region.start_addr().0);
    let slice = region.get_slice(at, len).map_err(|_| none())?;
    Ok(slice.ptr_guard_mut().as_ptr().cast())
}
