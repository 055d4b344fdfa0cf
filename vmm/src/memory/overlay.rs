//! A file mapped over a part of guest memory.

use crate::error::Error;
use devices::GuestMemory;
use rustix::mm::{MapFlags, ProtFlags, mmap};
use std::fs::File;
use std::ops::Range;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};
use vm_run_abi::PAGE_SIZE;

/// Maps the bytes `part` of `file`, private, over guest memory from `gpa` on. What was
/// there before is gone.
///
/// # Errors
/// A range that is not whole pages within one region, or what mmap says.
pub(super) fn map(
    memory: &GuestMemory,
    gpa: GuestAddress,
    file: &File,
    part: Range<u64>,
) -> Result<(), Error> {
    let len = (part.end - part.start) as usize;
    let no_part = || {
        Error::State(format!(
            "{len} bytes at {:#x} are no part of its memory",
            gpa.0
        ))
    };
    let is_aligned = [gpa.0, part.start, part.end]
        .iter()
        .all(|at| at.is_multiple_of(PAGE_SIZE));
    let region = memory.find_region(gpa).filter(|_| is_aligned);
    let region = region.ok_or_else(no_part)?;
    let at = MemoryRegionAddress(gpa.0 - region.start_addr().0);
    let slice = region.get_slice(at, len).map_err(|_| no_part())?;
    let address = slice.ptr_guard_mut().as_ptr();
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
    // SAFETY: `slice` is `len` bytes of a region of `memory`, which is mapped as long as
    // that lives, and unmaps the whole region at its end, whatever lies in it; whole pages,
    // so that nothing beside it is replaced. Nobody has a reference into guest memory.
    unsafe { mmap(address.cast(), len, protection, flags, file, part.start) }
        .map_err(Error::memory("mmap of a layer"))?;
    Ok(())
}
