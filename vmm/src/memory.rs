//! Guest memory: written shared by one booting parent, then sealed, then mapped
//! private by any number of children.
//!
//! ```text
//!   boot:    Ram::shared(bytes)        memfd, MAP_SHARED, one VM writes it
//!   freeze:  Ram::into_image()         mappings gone, memfd sealed
//!   fork:    Ram::private(&image)      MAP_PRIVATE: reads share, writes copy
//! ```
//!
//! An [`Image`] never changes: a sealed memfd cannot be written through any
//! descriptor or mapping, ever (memfd_create(2), F_SEAL_WRITE). An image from
//! disk is opened read-only; whoever can write the template's file owns the
//! template.

use crate::error::Error;
use crate::layout::{RamRange, ram_ranges};
use devices::GuestMemory;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use std::fs::File;
use std::io;
use std::sync::Arc;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestRegionMmap, MmapRegion};

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
}

impl Ram {
    /// Fresh zeroed memory that can become an [`Image`].
    ///
    /// # Errors
    /// A size that no guest can have, or what the kernel says.
    pub fn shared(bytes: u64) -> Result<Self, Error> {
        let ranges = ram_ranges(bytes)?;
        let fd = memfd_create(
            "vm-run-guest",
            MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING,
        )
        .map_err(Error::memory("memfd_create"))?;
        ftruncate(&fd, bytes).map_err(Error::memory("ftruncate"))?;
        Self::map(Arc::new(File::from(fd)), bytes, ranges, libc::MAP_SHARED)
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
        })
    }

    /// Unmaps the memory and seals it. The guest and its devices must be gone:
    /// the kernel refuses the seal (EBUSY) while any writable shared mapping is
    /// left, which is the proof that the image cannot change.
    ///
    /// # Errors
    /// A mapping that is left, or memory that was private.
    pub fn into_image(self) -> Result<Image, Error> {
        drop(self.memory);
        fcntl_add_seals(
            &*self.file,
            SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL,
        )
        .map_err(Error::memory("F_ADD_SEALS"))?;
        Ok(Image {
            file: self.file,
            bytes: self.bytes,
        })
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
        self.memory
            .write_slice(data, GuestAddress(gpa))
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    const MIB: u64 = 1 << 20;

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
        let image = parent.into_image().expect("sealed");
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
    fn a_sealed_image_cannot_be_written_by_anyone() {
        let image = Ram::shared(64 * MIB)
            .expect("memory")
            .into_image()
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
            ram.into_image(),
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
        let image = ram.into_image().expect("sealed");
        let mut byte = [0];
        image
            .file()
            .read_exact_at(&mut byte, 3 << 30)
            .expect("read");
        assert_eq!(byte, *b"h");
    }
}
