//! Guest memory: written shared by one booting parent, then sealed, then mapped
//! private by any number of children.
//!
//! ```text
//!   boot:    Ram::shared(bytes)        memfd, MAP_SHARED, one VM writes it
//!   freeze:  Ram::into_image()         mappings gone, memfd sealed
//!   fork:    Ram::private(&image)      MAP_PRIVATE: reads share, writes copy
//!   freeze of a child: Ram::into_image()  the image's bytes and the child's own
//!                                         pages copied to a new memfd, sealed
//!   Ram::reclaimer()                   what the guest does not use is zeroes, and free
//!   fork of a child that runs: capture.rs  its own pages copied to a layer over its image
//! ```

mod blank;
mod image;
mod merge;
#[allow(unsafe_code)]
mod overlay;
mod pages;

#[cfg(test)]
pub(crate) use blank::add_all;
pub(crate) use blank::{Blanks, take_news};
pub(crate) use image::Layer;
pub use image::{Image, LAYERS_MAX};
pub use merge::Merged;
use overlay::Mappings;
pub use overlay::mappings_left;
pub(crate) use pages::PageSet;
pub use pages::Run;

use crate::error::Error;
use crate::layout::{RamRange, ram_ranges};
use blank::Reclaimer;
use devices::GuestMemory;
use devices::virtio::Reclaim;
use rustix::fs::{
    FallocateFlags, MemfdFlags, SealFlags, SeekFrom, fallocate, fcntl_add_seals, fcntl_get_seals,
    ftruncate, memfd_create, seek,
};
use rustix::io::Errno;
use std::fs::File;
use std::io::{self, Seek};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestRegionMmap, MmapRegion};
use vm_run_abi::PAGE_SIZE;

/// The memory of one VM, mapped.
#[derive(Debug)]
pub struct Ram {
    memory: GuestMemory,
    ranges: Vec<RamRange>,
    bytes: u64,
    over: Over,
    blanks: Blanks,
    mappings: Arc<Mappings>,
}

/// What a VM's memory is mapped over.
#[derive(Debug)]
enum Over {
    /// A file of its own, which it writes.
    Shared(Arc<File>),
    /// What it shares with others; its own pages are nobody's file.
    Private(Image),
}

impl Ram {
    /// Fresh zeroed memory that can become an [`Image`].
    ///
    /// # Errors
    /// A size that no guest can have, or what the kernel says.
    pub fn shared(bytes: u64) -> Result<Self, Error> {
        let ranges = ram_ranges(bytes)?;
        let file = Arc::new(memory_file(bytes)?);
        let memory = map(&file, &ranges, libc::MAP_SHARED)?;
        Ok(Self {
            memory,
            ranges,
            bytes,
            over: Over::Shared(file),
            blanks: Blanks::default(),
            mappings: Arc::default(),
        })
    }

    /// A child's memory: the image, copied page by page as the child writes.
    ///
    /// # Errors
    /// What mmap says.
    pub fn private(image: &Image) -> Result<Self, Error> {
        let mut this = Self::over_base(image)?;
        this.lay_over(image)?;
        Ok(this)
    }

    /// The same without its layers.
    pub(crate) fn over_base(image: &Image) -> Result<Self, Error> {
        let ranges = ram_ranges(image.bytes())?;
        let memory = map(image.shared_base(), &ranges, libc::MAP_PRIVATE)?;
        Ok(Self {
            memory,
            ranges,
            bytes: image.bytes(),
            over: Over::Private(Image::flat(Arc::clone(image.shared_base()), image.bytes())),
            blanks: Blanks::default(),
            mappings: Arc::default(),
        })
    }

    /// Maps the layers of an image over its base, which this is; of a file that was laid
    /// before only the pages that were not. Nobody has used it yet.
    ///
    /// # Errors
    /// An image over another base, or what mmap says.
    pub(crate) fn lay_over(&mut self, image: &Image) -> Result<(), Error> {
        let base = self.image().map(Image::shared_base);
        if !base.is_some_and(|base| same_file(base, image.shared_base()).unwrap_or(false)) {
            return Err(Error::State("its image has another base".into()));
        }
        for layer in image.all_layers() {
            let mut new = layer.clone();
            for laid in self.image().iter().flat_map(|laid| laid.all_layers()) {
                if same_file(&laid.file, &layer.file)? {
                    new.pages.remove(&laid.pages);
                }
            }
            self.lay(&new)?;
        }
        self.over = Over::Private(image.clone());
        Ok(())
    }

    /// Maps the pages of a layer over what is there.
    fn lay(&self, layer: &Layer) -> Result<(), Error> {
        let (runs, left) = (layer.pages.runs().count(), mappings_left());
        if runs > left {
            return Err(Error::State(format!(
                "its memory is {runs} mappings, and this process can have {left} more: \
                 have fewer children at once, or each in a worker"
            )));
        }
        for (gpa, part) in self.parts(&layer.pages) {
            overlay::map(&self.memory, gpa, &layer.file, part, &self.mappings)?;
        }
        Ok(())
    }

    /// Where pages lie: in the guest, and in the memory file.
    fn parts(&self, pages: &PageSet) -> impl Iterator<Item = (GuestAddress, Range<u64>)> {
        pages.runs().flat_map(|run| {
            let of_range = move |range: &RamRange| {
                let (bytes, all) = (run.bytes(), range.in_file());
                let part = bytes.start.max(all.start)..bytes.end.min(all.end);
                let gpa = GuestAddress(range.gpa + part.start - all.start);
                (!part.is_empty()).then_some((gpa, part))
            };
            self.ranges.iter().filter_map(of_range)
        })
    }

    /// Makes an image of it. The guest and its devices must be gone.
    ///
    /// Shared memory is unmapped and sealed: the kernel refuses the seal (EBUSY)
    /// while any writable shared mapping is left, which is the proof that the
    /// image cannot change. Private memory is copied: the image below it, and over
    /// that the pages that `pagemap` (an open `/proc/self/pagemap`) shows as its
    /// own, and holes for those that it has given back.
    ///
    /// # Errors
    /// A mapping that is left, or what the kernel says.
    pub(crate) fn into_image(self, pagemap: &File) -> Result<Image, Error> {
        match self.over {
            Over::Shared(file) => {
                drop(self.memory);
                seal(&file)?;
                Ok(Image::flat(file, self.bytes))
            }
            Over::Private(ref image) => {
                let mut pages = self.own_pages(pagemap)?;
                let layer = memory_file(self.bytes)?;
                self.copy_pages(&pages, &layer)?;
                blank::add_all(&self.blanks.lock(), &mut pages);
                let file = Arc::new(layer);
                image.under(Layer { file, pages }).flatten()
            }
        }
    }

    /// What it shares with others; `None` of memory that a booted guest has for itself.
    pub(crate) fn image(&self) -> Option<&Image> {
        match &self.over {
            Over::Shared(_) => None,
            Over::Private(image) => Some(image),
        }
    }

    /// The pages that `pagemap` (an open `/proc/self/pagemap`) shows as its own: written
    /// since it was mapped.
    ///
    /// # Errors
    /// What the kernel says.
    pub(crate) fn own_pages(&self, pagemap: &File) -> Result<PageSet, Error> {
        let mut pages = PageSet::none_of(self.bytes);
        let failed = Error::memory::<io::Error>("read of the page map");
        self.look_for_own(pagemap, &mut pages).map_err(failed)?;
        Ok(pages)
    }

    fn look_for_own(&self, pagemap: &File, pages: &mut PageSet) -> io::Result<()> {
        let mut entries = [0; 8 * 4096];
        for (range, (_, hva, _)) in self.ranges.iter().zip(self.slots()) {
            let count = range.len / PAGE_SIZE;
            for at in (0..count).step_by(entries.len() / 8) {
                let part = (count - at).min(entries.len() as u64 / 8) as usize;
                let part = &mut entries[..part * 8];
                pagemap.read_exact_at(part, (hva / PAGE_SIZE + at) * 8)?;
                let (words, _) = part.as_chunks::<8>();
                for (number, word) in (at..).zip(words) {
                    if is_own(u64::from_le_bytes(*word)) {
                        let first = range.file_offset / PAGE_SIZE + number;
                        pages.insert(Run { first, count: 1 });
                    }
                }
            }
        }
        Ok(())
    }

    /// Copies pages to the places that they have in the memory file. The guest may write
    /// them meanwhile.
    ///
    /// # Errors
    /// What the kernel says.
    pub(crate) fn copy_pages(&self, pages: &PageSet, to: &File) -> Result<(), Error> {
        let mut file = to;
        for (gpa, part) in self.parts(pages) {
            file.seek(io::SeekFrom::Start(part.start))
                .map_err(Error::memory("lseek"))?;
            let count = (part.end - part.start) as usize;
            self.memory
                .write_all_volatile_to(gpa, &mut file, count)
                .map_err(|source| Error::GuestMemory { gpa: gpa.0, source })?;
        }
        Ok(())
    }

    /// What takes the memory that its guest does not use.
    pub(crate) fn reclaimer(&self) -> Arc<dyn Reclaim> {
        Arc::new(Reclaimer {
            memory: self.memory.clone(),
            ranges: self.ranges.clone(),
            bytes: self.bytes,
            file: match &self.over {
                Over::Shared(file) => Some(Arc::clone(file)),
                Over::Private(_) => None,
            },
            blanks: self.blanks.clone(),
            mappings: Arc::clone(&self.mappings),
            failed: AtomicBool::new(false),
        })
    }

    /// What it has given back.
    pub(crate) fn blanks(&self) -> &Blanks {
        &self.blanks
    }

    /// Logs, from now on, what this process writes of it.
    pub(crate) fn log_writes(&self) {
        for region in self.memory.iter() {
            MmapRegion::bitmap(region).begin();
        }
    }

    /// What this process has written since it was last asked.
    pub(crate) fn take_writes(&self, pages: &mut PageSet) {
        for (range, region) in self.ranges.iter().zip(self.memory.iter()) {
            pages.add_words(range.file_offset, &MmapRegion::bitmap(region).take());
        }
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

/// Maps a file as guest memory.
fn map(file: &Arc<File>, ranges: &[RamRange], how: i32) -> Result<GuestMemory, Error> {
    let other = |source: io::Error| Error::Memory {
        what: "mmap",
        source,
    };
    let regions = ranges
        .iter()
        .map(|range| {
            let region = MmapRegion::build(
                Some(FileOffset::from_arc(Arc::clone(file), range.file_offset)),
                range.len as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                how | libc::MAP_NORESERVE,
            )
            .map_err(|e| other(io::Error::other(e)))?;
            GuestRegionMmap::new(region, GuestAddress(range.gpa))
                .ok_or_else(|| other(io::ErrorKind::InvalidInput.into()))
        })
        .collect::<Result<Vec<_>, _>>()?;
    GuestMemory::from_regions(regions).map_err(|e| other(io::Error::other(e)))
}

/// A file for so many bytes of memory, all of them holes.
pub(crate) fn memory_file(bytes: u64) -> Result<File, Error> {
    let fd = memfd_create(
        "vm-run-guest",
        MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING,
    )
    .map_err(Error::memory("memfd_create"))?;
    ftruncate(&fd, bytes).map_err(Error::memory("ftruncate"))?;
    Ok(File::from(fd))
}

/// Seals a file that somebody may have mapped: the kernel refuses while a writable shared
/// mapping is left. To be called on a file that is sealed already, too.
fn seal(file: &File) -> Result<(), Error> {
    add_seals(file, SealFlags::WRITE | SealFlags::SEAL)
}

/// Seals a file that this process has made and nobody has mapped to write it: nobody can
/// from now on, nor write it in any other way. F_SEAL_WRITE would have to be sure of that,
/// and wait until no page is on a list of another CPU's (linux mm/memfd.c,
/// memfd_wait_for_pins): milliseconds, and EBUSY now and then. Whoever gets the file from
/// this process can still ask for that.
pub(crate) fn seal_unmapped(file: &File) -> Result<(), Error> {
    add_seals(file, SealFlags::FUTURE_WRITE)
}

fn add_seals(file: &File, more: SealFlags) -> Result<(), Error> {
    let all = more | SealFlags::SHRINK | SealFlags::GROW;
    let there = fcntl_get_seals(file).map_err(Error::memory("F_GET_SEALS"))?;
    if there.contains(all) {
        return Ok(());
    }
    fcntl_add_seals(file, all).map_err(Error::memory("F_ADD_SEALS"))
}

/// Makes a range of `to` what it is in `from`: a hole costs nothing in either.
fn copy_range(from: &File, to: &File, range: Range<u64>) -> io::Result<()> {
    punch(to, range.clone())?;
    let mut buffer = Vec::new();
    let mut at = range.start;
    while at < range.end {
        let data = match seek(from, SeekFrom::Data(at)) {
            Ok(data) if data < range.end => data,
            Ok(_) | Err(Errno::NXIO) => return Ok(()),
            Err(e) => return Err(e.into()),
        };
        let end = seek(from, SeekFrom::Hole(data))?.min(range.end);
        at = end.min(data + (1 << 20));
        buffer.resize((at - data) as usize, 0);
        from.read_exact_at(&mut buffer, data)?;
        to.write_all_at(&buffer, data)?;
    }
    Ok(())
}

/// Makes a range of a memory file a hole: zeroes.
pub(crate) fn punch(file: &File, range: Range<u64>) -> io::Result<()> {
    let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    Ok(fallocate(file, hole, range.start, range.end - range.start)?)
}

/// Whether two descriptors are of one file.
fn same_file(one: &Arc<File>, other: &Arc<File>) -> Result<bool, Error> {
    if Arc::ptr_eq(one, other) {
        return Ok(true);
    }
    let id = |file| rustix::fs::fstat(file).map(|found| (found.st_dev, found.st_ino));
    let [one, other] = [id(one), id(other)].map(|id| id.map_err(Error::memory("fstat")));
    Ok(one? == other?)
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
            .base()
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
        assert!(second.base().write_at(b"x", 0).is_err(), "sealed");
        // As whoever gets it from another process wants it.
        let file = second.base().try_clone().expect("cloned");
        Image::sealed(file, 64 * MIB).expect("sealed for good");
    }

    #[test]
    fn a_sealed_image_cannot_be_written_by_anyone() {
        let image = Ram::shared(64 * MIB)
            .expect("memory")
            .into_image(&pagemap())
            .expect("sealed");
        let error = image.base().write_at(b"x", 0).expect_err("sealed");
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
        let error = image.base().set_len(0).expect_err("sealed");
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
            .base()
            .read_exact_at(&mut byte, 3 << 30)
            .expect("read");
        assert_eq!(byte, *b"h");
    }
}
