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
use super::{copy_data, copy_range, memory_file, seal, seal_unmapped};
use crate::error::Error;
use crate::layout::ram_ranges;
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
    base: Arc<File>,
    bytes: u64,
    /// The oldest first. No page is in two.
    layers: Vec<Layer>,
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

    /// Makes room for one more layer, which has these pages: copies into it what would be
    /// left of the smallest others, so that they are all hidden.
    ///
    /// # Errors
    /// What the kernel says.
    pub(crate) fn fold(&self, layer: &File, pages: &mut PageSet) -> Result<(), Error> {
        let left_of = |older: &Layer| {
            let mut left = older.pages.clone();
            left.remove(pages);
            (left, Arc::clone(&older.file))
        };
        let mut left: Vec<_> = self.layers.iter().map(left_of).collect();
        left.retain(|(pages, _)| !pages.is_empty());
        left.sort_by_key(|(pages, _)| pages.count());
        let too_many = (left.len() + 1).saturating_sub(LAYERS_MAX);
        for (older, file) in &left[..too_many] {
            for run in older.runs() {
                copy_range(file, layer, run.bytes()).map_err(Error::memory("copy"))?;
            }
            pages.add(older);
        }
        Ok(())
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
        copy_data(&self.base, &flat, self.bytes).map_err(Error::memory("copy"))?;
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

fn check_length(file: &File, bytes: u64) -> Result<(), Error> {
    let len = file.metadata().map_err(Error::memory("fstat"))?.len();
    if len == bytes {
        return Ok(());
    }
    Err(Error::State(format!(
        "the memory file holds {len} bytes and not {bytes}"
    )))
}
