//! How much an image may ask for. Everything in an archive is a stranger's word:
//! each number that decides on memory, disk or time has its bound here.

use super::error::{ImageError, Result};

/// The bounds of one load.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Bytes of one JSON document (manifest, index, configuration). containerd and
    /// the registries stop at 4 MiB.
    pub json: u64,
    /// Layers of one image; overlayfs stacks in docker end at 127.
    pub layers: usize,
    /// Members of the outer archive.
    pub members: usize,
    /// Images in one archive.
    pub images: usize,
    /// Files, directories and the rest in one root file system, those that a later
    /// layer hides included.
    pub inodes: usize,
    /// Bytes of names, link targets, attributes and sparse maps kept in memory.
    pub metadata: u64,
    /// Depth of a directory below the root.
    pub depth: usize,
    /// Bytes of one image's layers after decompression, and of its files.
    pub unpacked: u64,
    /// A compressed stream that gives more than this many times its size ...
    pub ratio: u64,
    /// ... once it has given this many bytes, is a bomb. A layer of real files
    /// compresses 2 to 20 times; gzip itself ends at 1032.
    pub ratio_from: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            json: 4 << 20,
            layers: 127,
            members: 1 << 16,
            images: 1024,
            inodes: 1 << 20,
            metadata: 256 << 20,
            depth: 1024,
            unpacked: 64 << 30,
            ratio: 200,
            ratio_from: 256 << 20,
        }
    }
}

impl Limits {
    /// Checks a stream that has given `output` bytes for `input` bytes.
    ///
    /// # Errors
    /// [`ImageError::Limit`] when it is too long or looks like a bomb.
    pub fn check_unpacked(&self, input: u64, output: u64) -> Result<()> {
        if output > self.unpacked {
            return Err(ImageError::Limit(format!(
                "the image unpacks to more than {} GiB",
                self.unpacked >> 30
            )));
        }
        if output > self.ratio_from && output / self.ratio > input {
            return Err(ImageError::Limit(format!(
                "{input} compressed bytes unpack to more than {output}: a decompression bomb"
            )));
        }
        Ok(())
    }
}
