//! Guest memory: written shared by one booting parent, then sealed, then mapped
//! private by any number of children.
//!
//! ```text
//!   boot:    Ram::shared(bytes)        memfd, MAP_SHARED, one VM writes it
//!   freeze:  Ram::into_image()         mappings gone, memfd sealed
//!   fork:    Ram::private(&image)      MAP_PRIVATE: reads share, writes copy
//!   freeze of a child: Ram::into_image()  the image's bytes and the child's own
//!                                         pages copied to a new memfd, sealed
//! ```
//!
//! An [`Image`] never changes: a sealed memfd cannot be written through any
//! descriptor or mapping, ever (memfd_create(2), F_SEAL_WRITE). An image from
//! disk is opened read-only; whoever can write the template's file owns the
//! template.

use crate::error::Error;
use crate::layout::{RamRange, ram_ranges};
use devices::GuestMemory;
use rustix::fs::{
    MemfdFlags, SealFlags, SeekFrom, fcntl_add_seals, fcntl_get_seals, ftruncate, memfd_create,
    seek,
};
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestRegionMmap, MmapRegion};
use vm_run_abi::PAGE_SIZE;

/// An immutable picture of guest memory, shared by all children of a template.
#[derive(Debug, Clone)]
pub struct Image {
    file: Arc<File>,
    bytes: u64,
}

impl Image {
    /// Takes a memory file from disk, opened read-only.
    ///
    /// # Errors
    /// If its length is not `bytes`.
    pub fn from_file(file: File, bytes: u64) -> Result<Self, Error> {
        ram_ranges(bytes)?;
        let len = file.metadata().map_err(Error::memory("fstat"))?.len();
        if len != bytes {
            return Err(Error::State(format!(
                "the memory file holds {len} bytes and not {bytes}"
            )));
        }
        Ok(Self {
            file: Arc::new(file),
            bytes,
        })
    }

    /// Takes a memory file from another process, and seals it.
    ///
    /// # Errors
    /// A length that is not `bytes`, or a file that somebody may still write.
    pub fn sealed(file: File, bytes: u64) -> Result<Self, Error> {
        seal(&file)?;
        Self::from_file(file, bytes)
    }

    /// The file. Reading it at `RamRange::file_offset` gives that range.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The guest's memory in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

/// The memory of one VM, mapped.
#[derive(Debug)]
pub struct Ram {
    memory: GuestMemory,
    ranges: Vec<RamRange>,
    file: Arc<File>,
    bytes: u64,
    private: bool,
}

impl Ram {
    /// Fresh zeroed memory that can become an [`Image`].
    ///
    /// # Errors
    /// A size that no guest can have, or what the kernel says.
    pub fn shared(bytes: u64) -> Result<Self, Error> {
        let ranges = ram_ranges(bytes)?;
        let file = memory_file(bytes)?;
        Self::map(Arc::new(file), bytes, ranges, libc::MAP_SHARED)
    }

    /// A child's memory: the image, copied page by page as the child writes.
    ///
    /// # Errors
    /// What mmap says.
    pub fn private(image: &Image) -> Result<Self, Error> {
        let ranges = ram_ranges(image.bytes)?;
        let file = Arc::clone(&image.file);
        Self::map(file, image.bytes, ranges, libc::MAP_PRIVATE)
    }

    fn map(file: Arc<File>, bytes: u64, ranges: Vec<RamRange>, how: i32) -> Result<Self, Error> {
        let other = |source: io::Error| Error::Memory {
            what: "mmap",
            source,
        };
        let regions = ranges
            .iter()
            .map(|range| {
                let region = MmapRegion::build(
                    Some(FileOffset::from_arc(Arc::clone(&file), range.file_offset)),
                    range.len as usize,
                    libc::PROT_READ | libc::PROT_WRITE,
                    how | libc::MAP_NORESERVE,
                )
                .map_err(|e| other(io::Error::other(e)))?;
                GuestRegionMmap::new(region, GuestAddress(range.gpa))
                    .ok_or_else(|| other(io::ErrorKind::InvalidInput.into()))
            })
            .collect::<Result<Vec<_>, _>>()?;
        let memory = GuestMemory::from_regions(regions).map_err(|e| other(io::Error::other(e)))?;
        Ok(Self {
            memory,
            ranges,
            file,
            bytes,
            private: how == libc::MAP_PRIVATE,
        })
    }

    /// Makes an image of it. The guest and its devices must be gone.
    ///
    /// Shared memory is unmapped and sealed: the kernel refuses the seal (EBUSY)
    /// while any writable shared mapping is left, which is the proof that the
    /// image cannot change. Private memory is copied: the image below it, and over
    /// that the pages that `pagemap` (an open `/proc/self/pagemap`) shows as its
    /// own.
    ///
    /// # Errors
    /// A mapping that is left, or what the kernel says.
    pub(crate) fn into_image(self, pagemap: &File) -> Result<Image, Error> {
        let file = if self.private {
            let copy = memory_file(self.bytes)?;
            copy_data(&self.file, &copy, self.bytes).map_err(Error::memory("copy"))?;
            self.copy_own_pages(pagemap, &copy)
                .map_err(Error::memory("copy of a child's pages"))?;
            Arc::new(copy)
        } else {
            self.file
        };
        drop(self.memory);
        seal(&file)?;
        Ok(Image {
            file,
            bytes: self.bytes,
        })
    }

    fn copy_own_pages(&self, pagemap: &File, to: &File) -> io::Result<()> {
        for (range, (_, hva, _)) in self.ranges.iter().zip(self.slots()) {
            let mut entries = vec![0; (range.len / PAGE_SIZE * 8) as usize];
            pagemap.read_exact_at(&mut entries, hva / PAGE_SIZE * 8)?;
            let own = |at: &usize| {
                let mut word = [0; 8];
                word.copy_from_slice(&entries[at * 8..at * 8 + 8]);
                is_own(u64::from_le_bytes(word))
            };
            let mut page = [0; PAGE_SIZE as usize];
            for at in (0..(range.len / PAGE_SIZE) as usize).filter(own) {
                let offset = at as u64 * PAGE_SIZE;
                self.memory
                    .read_slice(&mut page, GuestAddress(range.gpa + offset))
                    .map_err(io::Error::other)?;
                to.write_all_at(&page, range.file_offset + offset)?;
            }
        }
        Ok(())
    }

    /// The guest's memory in bytes.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// For devices and the loader.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Where the memory lies.
    pub fn ranges(&self) -> &[RamRange] {
        &self.ranges
    }

    /// Writes `data` at a guest-physical address.
    ///
    /// # Errors
    /// An address that is not RAM.
    pub fn write(&self, gpa: u64, data: &[u8]) -> Result<(), Error> {
        write(&self.memory, gpa, data)
    }

    /// Reads `into.len()` bytes at a guest-physical address.
    ///
    /// # Errors
    /// An address that is not RAM.
    pub(crate) fn read(&self, gpa: u64, into: &mut [u8]) -> Result<(), Error> {
        self.memory
            .read_slice(into, GuestAddress(gpa))
            .map_err(|source| Error::GuestMemory { gpa, source })
    }

    /// For KVM_SET_USER_MEMORY_REGION: (guest-physical, host address, length).
    pub(crate) fn slots(&self) -> impl Iterator<Item = (u64, u64, u64)> + '_ {
        self.ranges.iter().filter_map(|range| {
            let region = self.memory.find_region(GuestAddress(range.gpa))?;
            Some((range.gpa, region.as_ptr() as u64, range.len))
        })
    }
}

/// Writes `data` at a guest-physical address.
pub(crate) fn write(memory: &GuestMemory, gpa: u64, data: &[u8]) -> Result<(), Error> {
    memory
        .write_slice(data, GuestAddress(gpa))
        .map_err(|source| Error::GuestMemory { gpa, source })
}

fn memory_file(bytes: u64) -> Result<File, Error> {
    let fd = memfd_create(
        "vm-run-guest",
        MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING,
    )
    .map_err(Error::memory("memfd_create"))?;
    ftruncate(&fd, bytes).map_err(Error::memory("ftruncate"))?;
    Ok(File::from(fd))
}

/// To be called on a file that is sealed already, too.
fn seal(file: &File) -> Result<(), Error> {
    let all = SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    if fcntl_get_seals(file).map_err(Error::memory("F_GET_SEALS"))? == all {
        return Ok(());
    }
    fcntl_add_seals(file, all).map_err(Error::memory("F_ADD_SEALS"))
}

/// Copies what of `from` is no hole.
fn copy_data(from: &File, to: &File, bytes: u64) -> io::Result<()> {
    let mut buffer = vec![0; 1 << 20];
    let mut at = 0;
    loop {
        at = match seek(from, SeekFrom::Data(at)) {
            Ok(data) if data < bytes => data,
            Ok(_) | Err(Errno::NXIO) => return Ok(()),
            Err(e) => return Err(e.into()),
        };
        let end = seek(from, SeekFrom::Hole(at))?.min(bytes);
        while at < end {
            let part = &mut buffer[..((end - at) as usize).min(1 << 20)];
            from.read_exact_at(part, at)?;
            to.write_all_at(part, at)?;
            at += part.len() as u64;
        }
    }
}

/// Whether an entry of the page map is a page of the process's own: present or
/// swapped, and not the file's (Linux Documentation/admin-guide/mm/pagemap.rst).
fn is_own(entry: u64) -> bool {
    const PRESENT: u64 = 1 << 63;
    const SWAPPED: u64 = 1 << 62;
    const FILE: u64 = 1 << 61;
    entry & (PRESENT | SWAPPED) != 0 && entry & FILE == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn pagemap() -> File {
        File::open("/proc/self/pagemap").expect("the page map")
    }

    fn read(ram: &Ram, gpa: u64) -> u8 {
        let mut byte = [0];
        ram.memory()
            .read_slice(&mut byte, GuestAddress(gpa))
            .expect("RAM");
        byte[0]
    }

    #[test]
    fn children_see_the_parent_and_not_each_other() {
        let parent = Ram::shared(64 * MIB).expect("memory");
        parent.write(5 * MIB, b"p").expect("RAM");
        let image = parent.into_image(&pagemap()).expect("sealed");
        let a = Ram::private(&image).expect("map");
        let b = Ram::private(&image).expect("map");
        a.write(5 * MIB, b"a").expect("RAM");
        assert_eq!((read(&a, 5 * MIB), read(&b, 5 * MIB)), (b'a', b'p'));
        drop(a);
        let mut byte = [0];
        image
            .file()
            .read_exact_at(&mut byte, 5 * MIB)
            .expect("read");
        assert_eq!(byte, *b"p");
    }

    #[test]
    fn the_image_of_a_child_has_its_parents_bytes_and_its_own() {
        let parent = Ram::shared(64 * MIB).expect("memory");
        parent.write(5 * MIB, b"parent").expect("RAM");
        parent.write(6 * MIB, b"parent").expect("RAM");
        let image = parent.into_image(&pagemap()).expect("sealed");
        let child = Ram::private(&image).expect("map");
        child.write(6 * MIB, b"child").expect("RAM");
        child.write(40 * MIB, b"where a hole was").expect("RAM");
        // A page that was only read is not the child's own.
        assert_eq!(read(&child, 50 * MIB), 0);
        let second = child.into_image(&pagemap()).expect("sealed");
        let grandchild = Ram::private(&second).expect("map");
        assert_eq!(read(&grandchild, 5 * MIB), b'p');
        assert_eq!(read(&grandchild, 6 * MIB), b'c');
        assert_eq!(read(&grandchild, 6 * MIB + 5), b't');
        assert_eq!(read(&grandchild, 40 * MIB), b'w');
        assert_eq!(read(&Ram::private(&image).expect("map"), 6 * MIB), b'p');
        assert!(second.file().write_at(b"x", 0).is_err(), "sealed");
    }

    #[test]
    fn a_sealed_image_cannot_be_written_by_anyone() {
        let image = Ram::shared(64 * MIB)
            .expect("memory")
            .into_image(&pagemap())
            .expect("sealed");
        let error = image.file().write_at(b"x", 0).expect_err("sealed");
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
        let error = image.file().set_len(0).expect_err("sealed");
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
    }

    #[test]
    fn memory_that_is_still_mapped_is_not_sealed() {
        let ram = Ram::shared(64 * MIB).expect("memory");
        let left = ram.memory().clone();
        assert!(matches!(
            ram.into_image(&pagemap()),
            Err(Error::Memory {
                what: "F_ADD_SEALS",
                ..
            })
        ));
        drop(left);
    }

    #[test]
    fn a_guest_over_three_gib_has_its_bytes_where_the_file_has_them() {
        let ram = Ram::shared(4 << 30).expect("memory");
        ram.write(4 << 30, b"h").expect("RAM above the hole");
        assert!(ram.write(3 << 30, b"x").is_err(), "the hole is no RAM");
        let image = ram.into_image(&pagemap()).expect("sealed");
        let mut byte = [0];
        image
            .file()
            .read_exact_at(&mut byte, 3 << 30)
            .expect("read");
        assert_eq!(byte, *b"h");
    }
}
