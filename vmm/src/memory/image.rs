//! Pictures of guest memory that never change: a base, and layers over it.
//!
//! ```text
//!   base      0 1 2 3 4 5 6 7      a file with all of memory
//!   layer       1     4            pages that a guest had written when it was forked
//!   layer             4   6        and when it was forked again
//!             0 1 2 3 4 5 6 7      what a child sees: the uppermost of each
//! ```
//! A page lies in every file where it lies in memory, so a layer is a sparse file and
//! nothing has to be looked up. A layer holds only what no later one hides: the cost of
//! a child is that of the pages, and does not grow with the depth.

use super::pages::{PageSet, Run};
use super::{copy_range, memory_file, seal, seal_unmapped};
use crate::error::Error;
use crate::layout::ram_ranges;
use rustix::fs::{OFlags, fcntl_getfl};
use std::fs::File;
use std::sync::Arc;

/// The most layers of one image: each is a descriptor of every child's process.
pub const LAYERS_MAX: usize = 16;

/// An immutable picture of guest memory, shared by all children of a template.
///
/// A sealed memfd cannot be written through any descriptor or mapping, ever
/// (memfd_create(2), F_SEAL_WRITE). A base from disk is opened read-only; whoever can write
/// the template's file owns the template.
#[derive(Debug, Clone)]
pub struct Image {
    pub(super) base: Arc<File>,
    pub(super) bytes: u64,
    /// The oldest first. No page is in two.
    pub(super) layers: Vec<Layer>,
}

/// Some pages of a guest's memory.
#[derive(Debug, Clone)]
pub(crate) struct Layer {
    pub(crate) file: Arc<File>,
    pub(crate) pages: PageSet,
}

impl Image {
    /// Takes a memory file from disk, opened read-only.
    ///
    /// # Errors
    /// If its length is not `bytes`.
    pub fn from_file(file: File, bytes: u64) -> Result<Self, Error> {
        ram_ranges(bytes)?;
        check_length(&file, bytes)?;
        Ok(Self::flat(Arc::new(file), bytes))
    }

    /// Takes a memory file from another process, and seals it.
    ///
    /// # Errors
    /// A length that is not `bytes`, or a file that somebody may still write.
    pub fn sealed(file: File, bytes: u64) -> Result<Self, Error> {
        seal(&file)?;
        Self::from_file(file, bytes)
    }

    /// Over a base, without layers. Nobody writes the file again.
    pub(crate) fn flat(base: Arc<File>, bytes: u64) -> Self {
        Self {
            base,
            bytes,
            layers: Vec::new(),
        }
    }

    /// The same with one more layer: a file from another process, and the pages that are
    /// in it. Nobody writes it any more by a descriptor. If that process has been taken
    /// over it may have mapped the file before: what it could still change is what its own
    /// forks see, of which it decides anyway.
    ///
    /// # Errors
    /// A file of another length, too many layers, or pages that the memory does not have or
    /// that are not in order.
    pub fn with_layer(&self, file: File, runs: &[Run]) -> Result<Self, Error> {
        seal_unmapped(&file)?;
        self.with_growing(file, runs)
    }

    /// The same with a layer that lies on a disk, opened read-only as the base of
    /// [`Self::from_file`] is.
    ///
    /// # Errors
    /// As [`Self::with_layer`], or a file that is open for writing.
    pub fn with_layer_from_disk(&self, file: File, runs: &[Run]) -> Result<Self, Error> {
        if !is_read_only(&file)? {
            return Err(Error::State("a layer from disk is open for writing".into()));
        }
        self.with_growing(file, runs)
    }

    /// The same with a layer from a process that is trusted: from disk, or one to be sealed.
    ///
    /// # Errors
    /// As [`Self::with_layer`].
    pub fn with_layer_handed_over(&self, file: File, runs: &[Run]) -> Result<Self, Error> {
        match is_read_only(&file)? {
            true => self.with_growing(file, runs),
            false => self.with_layer(file, runs),
        }
    }

    /// The same while the layer is still being written: see
    /// [`Capture::so_far`](crate::Capture::so_far).
    ///
    /// # Errors
    /// As [`Self::with_layer`].
    pub fn with_growing(&self, file: File, runs: &[Run]) -> Result<Self, Error> {
        check_length(&file, self.bytes)?;
        let mut pages = PageSet::none_of(self.bytes);
        // In order: no page costs the reader of somebody else's list more than once.
        let mut next = 0;
        for run in runs {
            let end = run.first.checked_add(run.count).filter(|end| {
                let is_inside = *end <= self.bytes / vm_run_abi::PAGE_SIZE;
                run.first >= next && run.count > 0 && is_inside
            });
            next = end.ok_or_else(|| Error::State(format!("{run:?} is no part of its memory")))?;
            pages.insert(*run);
        }
        let file = Arc::new(file);
        let image = self.under(Layer { file, pages });
        if image.layers.len() > LAYERS_MAX {
            return Err(Error::State("it has too many layers".into()));
        }
        Ok(image)
    }

    /// The same with one more layer. What that hides is dropped, and a layer that is all
    /// hidden.
    pub(crate) fn under(&self, layer: Layer) -> Self {
        let mut layers = self.layers.clone();
        for older in &mut layers {
            older.pages.remove(&layer.pages);
        }
        layers.push(layer);
        layers.retain(|layer| !layer.pages.is_empty());
        Self {
            base: Arc::clone(&self.base),
            bytes: self.bytes,
            layers,
        }
    }

    /// The lowest file: all of a memory without layers.
    pub fn base(&self) -> &File {
        &self.base
    }

    pub(super) fn shared_base(&self) -> &Arc<File> {
        &self.base
    }

    /// What lies over it, the oldest first: a file, and its pages that count.
    pub fn layers(&self) -> impl ExactSizeIterator<Item = (&File, Vec<Run>)> {
        let parts = |layer: &'_ Layer| layer.pages.runs().collect();
        self.layers
            .iter()
            .map(move |layer| (&*layer.file, parts(layer)))
    }

    pub(super) fn all_layers(&self) -> &[Layer] {
        &self.layers
    }

    /// The guest's memory in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The same in one file. It costs a copy of all that is no hole, unless there is only
    /// one already.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn flatten(&self) -> Result<Self, Error> {
        if self.layers.is_empty() {
            return Ok(self.clone());
        }
        let flat = memory_file(self.bytes)?;
        copy_range(&self.base, &flat, 0..self.bytes).map_err(Error::memory("copy"))?;
        for layer in &self.layers {
            for run in layer.pages.runs() {
                // A page that is a hole here is zeroes, whatever the base has.
                copy_range(&layer.file, &flat, run.bytes()).map_err(Error::memory("copy"))?;
            }
        }
        seal_unmapped(&flat)?;
        Ok(Self::flat(Arc::new(flat), self.bytes))
    }
}

/// A layer from disk has no seals to tell it by: on a tmpfs it can have some, and is then
/// sealed against more.
fn is_read_only(file: &File) -> Result<bool, Error> {
    let flags = fcntl_getfl(file).map_err(Error::memory("F_GETFL"))?;
    Ok(flags & OFlags::ACCMODE == OFlags::RDONLY)
}

fn check_length(file: &File, bytes: u64) -> Result<(), Error> {
    let len = file.metadata().map_err(Error::memory("fstat"))?.len();
    if len == bytes {
        return Ok(());
    }
    Err(Error::State(format!(
        "the memory file holds {len} bytes and not {bytes}"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, memfd_create};
    use std::os::unix::fs::FileExt;

    const BYTES: u64 = 64 << 20;
    const RUNS: [Run; 2] = [Run { first: 1, count: 2 }, Run { first: 9, count: 1 }];

    /// As a template on disk has it: read-only, and without seals.
    fn on_disk(bytes: u64) -> File {
        let file = tempfile::NamedTempFile::new().expect("a file");
        file.as_file().set_len(bytes).expect("sized");
        file.reopen()
            .expect("opens")
            .write_at(b"x", 4096)
            .expect("writes");
        File::open(file.path()).expect("opens")
    }

    fn base() -> Image {
        Image::from_file(on_disk(BYTES), BYTES).expect("a base")
    }

    #[test]
    fn a_layer_from_disk_is_taken_as_it_is() {
        for with in [Image::with_layer_from_disk, Image::with_layer_handed_over] {
            let image = with(&base(), on_disk(BYTES), &RUNS).expect("a layer");
            let (file, runs) = image.layers().next().expect("a layer");
            assert_eq!(runs, RUNS);
            let mut byte = [0];
            file.read_exact_at(&mut byte, 4096).expect("reads");
            assert_eq!(byte, *b"x");
            // What cannot be sealed is not taken from a process that is not trusted.
            assert!(base().with_layer(on_disk(BYTES), &RUNS).is_err());
        }
    }

    #[test]
    fn a_layer_in_memory_is_sealed_and_no_layer_from_disk() {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(memfd_create("layer", flags).expect("a file"));
        file.set_len(BYTES).expect("sized");
        let same = || file.try_clone().expect("cloned");
        assert!(base().with_layer_from_disk(same(), &RUNS).is_err());
        base()
            .with_layer_handed_over(same(), &RUNS)
            .expect("a layer");
        let error = file.write_at(b"x", 0).expect_err("sealed");
        assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied);
    }

    #[test]
    fn a_layer_that_does_not_fit_its_memory_is_refused() {
        let pages = BYTES / vm_run_abi::PAGE_SIZE;
        let run = |first, count| Run { first, count };
        let bad = [
            vec![run(pages, 1)],
            vec![run(0, pages + 1)],
            vec![run(u64::MAX, 2)],
            vec![run(3, 0)],
            vec![run(3, 2), run(4, 1)],
        ];
        for runs in bad {
            let with = base().with_layer_from_disk(on_disk(BYTES), &runs);
            assert!(with.is_err(), "{runs:?}");
        }
        let short = on_disk(BYTES - 4096);
        assert!(base().with_layer_from_disk(short, &RUNS).is_err());
        let mut image = base();
        for first in 0..LAYERS_MAX as u64 {
            image = image
                .with_layer_from_disk(on_disk(BYTES), &[run(first, 1)])
                .expect("a layer");
        }
        let more = image.with_layer_from_disk(on_disk(BYTES), &[run(99, 1)]);
        assert!(more.is_err(), "one too many");
    }
}
