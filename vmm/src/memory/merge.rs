//! Layers that are made one, so that a child of a long line of forks has no more mappings
//! than one of a short line.

use super::image::{Image, LAYERS_MAX, Layer};
use super::pages::PageSet;
use super::{copy_range, memory_file, seal_unmapped};
use crate::error::Error;
use std::fs::File;
use std::sync::Arc;

/// So many layers are left as they are.
const LAYERS_KEPT: usize = 4;

/// So many runs of pages are not many. Each is a mapping of each child: some microseconds.
const RUNS_MANY: usize = 8192;
/// So many they are then made, by what lies between them.
const RUNS_MERGED: usize = 4096;
/// No layer is laid over more: one begins with 16384 at most (`capture.rs`), and a process
/// has 65530 mappings (Linux vm.max_map_count).
const RUNS_MAX: usize = 32 << 10;

/// Layers of an image that were made one.
#[derive(Debug)]
pub struct Merged {
    layer: Layer,
    /// What was below them.
    older: Vec<Arc<File>>,
    instead_of: Vec<Arc<File>>,
}

impl Image {
    /// Whether it is better merged.
    pub fn has_many_layers(&self) -> bool {
        self.layers.len() > LAYERS_KEPT || self.runs() > RUNS_MANY
    }

    /// How many mappings its layers are: see [`mappings_left`](super::mappings_left).
    pub fn runs(&self) -> usize {
        let runs = |layer: &Layer| layer.pages.runs().count();
        self.layers.iter().map(runs).sum()
    }

    /// How many of its youngest layers are best made one. A layer that is more than twice
    /// as large as all younger ones is left alone: a page is copied the less often the
    /// longer it stays as it is.
    fn worth_merging(&self) -> usize {
        if self.runs() > RUNS_MANY {
            return self.layers.len();
        }
        let (mut count, mut pages) = (0, 0);
        for layer in self.layers.iter().rev() {
            let too_many = self.layers.len() - count >= LAYERS_KEPT;
            if count > 0 && !too_many && layer.pages.count() > 2 * pages {
                break;
            }
            pages += layer.pages.count();
            count += 1;
        }
        count
    }

    /// Makes one of its youngest layers, if there are many: each has a descriptor in every
    /// child, and each run of pages a mapping. It costs a copy of them, and both are there
    /// until the last who uses the old ones has gone. For any thread: nobody waits for it.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn merge(&self) -> Result<Option<Merged>, Error> {
        if !self.has_many_layers() {
            return Ok(None);
        }
        self.merge_youngest(self.worth_merging(), RUNS_MERGED)
            .map(Some)
    }

    /// The same memory in no more mappings than `most`: one layer, of what would be too many,
    /// and what lies between that.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn within(&self, most: usize) -> Result<Self, Error> {
        if self.runs() <= most {
            return Ok(self.clone());
        }
        let merged = self.merge_youngest(self.layers.len(), most.max(1))?;
        Ok(self.with_merged(&merged))
    }

    fn merge_youngest(&self, count: usize, most_runs: usize) -> Result<Merged, Error> {
        let kept = self.layers.len() - count;
        let (older, young) = self.layers.split_at(kept);
        let file = memory_file(self.bytes)?;
        let copy = |from: &File, pages: &PageSet| {
            let mut runs = pages.runs();
            runs.try_for_each(|run| copy_range(from, &file, run.bytes()))
                .map_err(Error::memory("copy"))
        };
        let mut pages = PageSet::none_of(self.bytes);
        for layer in young {
            copy(&layer.file, &layer.pages)?;
            pages.add(&layer.pages);
        }
        // What lies between them too, if they are scattered.
        let mut between = pages.clone();
        between.widen(most_runs);
        between.remove(&pages);
        pages.add(&between);
        for layer in older {
            copy(&layer.file, &between.common(&layer.pages))?;
            between.remove(&layer.pages);
        }
        copy(&self.base, &between)?;
        seal_unmapped(&file)?;
        let files = |layers: &[Layer]| layers.iter().map(|it| Arc::clone(&it.file)).collect();
        Ok(Merged {
            layer: Layer {
                file: Arc::new(file),
                pages,
            },
            older: files(older),
            instead_of: files(young),
        })
    }

    /// The same memory with what was made of some layers of it, or of what it was before
    /// later layers were laid over it.
    pub fn with_merged(&self, merged: &Merged) -> Self {
        let is_in = |files: &[Arc<File>], layer: &Layer| {
            files.iter().any(|file| Arc::ptr_eq(file, &layer.file))
        };
        let (mut layers, mut later) = (Vec::new(), Vec::new());
        let mut new = merged.layer.clone();
        for layer in &self.layers {
            if is_in(&merged.older, layer) {
                let mut layer = layer.clone();
                layer.pages.remove(&merged.layer.pages);
                layers.push(layer);
            } else if !is_in(&merged.instead_of, layer) {
                new.pages.remove(&layer.pages);
                later.push(layer.clone());
            }
        }
        layers.push(new);
        layers.append(&mut later);
        layers.retain(|layer| !layer.pages.is_empty());
        Self {
            base: Arc::clone(&self.base),
            bytes: self.bytes,
            layers,
        }
    }

    /// The same, with room for one more layer: see [`Self::merge`].
    ///
    /// # Errors
    /// What the kernel says.
    pub fn with_room(&self) -> Result<Self, Error> {
        if self.layers.len() < LAYERS_MAX && self.runs() < RUNS_MAX {
            return Ok(self.clone());
        }
        let merged = self.merge()?;
        Ok(merged.map_or_else(|| self.clone(), |merged| self.with_merged(&merged)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Ram, Run};
    use std::os::unix::fs::FileExt;
    use vm_memory::{Bytes, GuestAddress};
    use vm_run_abi::PAGE_SIZE;

    const BYTES: u64 = 64 << 20;

    fn flat() -> Image {
        let file = memory_file(BYTES).expect("a file");
        file.write_all_at(b"base", 0).expect("written");
        Image::flat(Arc::new(file), BYTES)
    }

    /// One more layer with so many pages from this one on, each with `text`.
    fn over(image: &Image, first: u64, count: u64, text: &str) -> Image {
        let file = memory_file(BYTES).expect("a file");
        for page in first..first + count {
            let at = page * PAGE_SIZE;
            file.write_all_at(text.as_bytes(), at).expect("written");
        }
        let image = image.with_room().expect("room");
        image
            .with_layer(file, &[Run { first, count }])
            .expect("a layer")
    }

    /// What the first pages of a child hold.
    fn seen(image: &Image) -> Vec<String> {
        let ram = Ram::private(image).expect("mapped");
        let read = |page: u64| {
            let mut bytes = [0; 4];
            let at = GuestAddress(page * PAGE_SIZE);
            ram.memory().read_slice(&mut bytes, at).expect("RAM");
            String::from_utf8_lossy(&bytes).into_owned()
        };
        (0..40).map(read).collect()
    }

    #[test]
    fn merged_layers_are_the_same_memory() {
        let mut image = flat();
        for level in 1..=10 {
            image = over(&image, level, 2, &format!("{level:04}"));
        }
        assert_eq!(image.layers().len(), 10);
        let merged = image.merge().expect("merged").expect("many");
        // Meanwhile there is one more, over some of what is being merged.
        let later = over(&image, 3, 3, "late");
        for image in [image, later] {
            let fewer = image.with_merged(&merged);
            assert!(!fewer.has_many_layers());
            assert_eq!(seen(&fewer), seen(&image));
            // Again it changes nothing.
            assert_eq!(seen(&fewer.with_merged(&merged)), seen(&image));
            assert!(
                fewer
                    .layers()
                    .all(|(file, _)| file.write_at(b"x", 0).is_err())
            );
        }
        let few = over(&flat(), 1, 1, "only");
        assert!(few.merge().expect("few").is_none());
    }

    #[test]
    fn what_is_old_and_large_is_left_alone() {
        let mut image = over(&flat(), 100, 1000, "old");
        for level in 1..=4 {
            image = over(&image, level * 8, 4, "new");
        }
        let fewer = image.with_merged(&image.merge().expect("merged").expect("many"));
        let pages: Vec<u64> = fewer
            .layers()
            .map(|(_, runs)| runs.iter().map(|run| run.count).sum())
            .collect();
        assert_eq!(pages, [1000, 16]);
        assert_eq!(seen(&fewer), seen(&image));
    }

    #[test]
    fn scattered_pages_are_joined_by_what_lies_between_them() {
        let scattered = |image: &Image, text: &str| {
            let file = memory_file(BYTES).expect("a file");
            let runs: Vec<Run> = (1..BYTES / PAGE_SIZE / 2)
                .map(|at| Run {
                    first: at * 2,
                    count: 1,
                })
                .collect();
            for run in &runs {
                let at = run.bytes().start;
                file.write_all_at(text.as_bytes(), at).expect("written");
            }
            image.with_layer(file, &runs).expect("a layer")
        };
        let lower = over(&over(&flat(), 3, 1, "low"), 7, 3, "mid");
        let image = scattered(&lower, "many");
        assert_eq!(image.runs(), 8191 + 3);
        let merged = image.merge().expect("merged").expect("many");
        let later = over(&image, 9, 1, "late");
        for image in [image, later] {
            let fewer = image.with_merged(&merged);
            assert!(fewer.runs() < 4, "{}", fewer.runs());
            assert_eq!(seen(&fewer), seen(&image));
            for most in [1, 2, 100, 9000] {
                let fitting = image.within(most).expect("merged");
                assert!(fitting.runs() <= most, "{}", fitting.runs());
                assert_eq!(seen(&fitting), seen(&image));
            }
        }
    }

    #[test]
    fn there_is_room_for_one_more_layer_however_many_there_were() {
        let mut image = flat();
        let mut expected = seen(&image);
        for level in 0..100 {
            let text = format!("{level:04}");
            image = over(&image, level % 39, 1, &text);
            expected[(level % 39) as usize] = text;
            assert!(image.layers().len() <= LAYERS_MAX);
            assert_eq!(seen(&image), expected);
        }
    }
}
