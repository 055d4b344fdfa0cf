//! From what a user typed to what a container needs.

use super::{Store, place};
use crate::image::digest::hex;
use crate::image::documents::{Configuration, ImageConfig};
use crate::image::erofs;
use crate::image::error::{Context, ImageError, Result};
use crate::image::layer;
use crate::image::tree::Tree;
use crate::progress::{Bar, Progress};
use std::fs::File;
use std::path::{Path, PathBuf};

/// An image that can be run.
#[derive(Clone, Debug)]
pub struct Image {
    /// Its id, `sha256:HEX`.
    pub id: String,
    /// How its containers start.
    pub config: ImageConfig,
    /// Its root file system, an EROFS image.
    pub rootfs: PathBuf,
}

impl Image {
    /// Opens the root file system, and marks it as used for as long as the file, or
    /// a duplicate of it in another process, is open: `image prune -a` passes over it.
    ///
    /// # Errors
    /// [`ImageError::Io`].
    pub fn open_rootfs(&self) -> Result<File> {
        let shown = || format!("open {}", self.rootfs.display());
        let file = File::open(&self.rootfs).context(shown)?;
        file.lock_shared().context(shown)?;
        Ok(file)
    }
}

impl Store {
    /// The image of a name, an id, or an unambiguous prefix of an id. Its root file
    /// system is made again if it was lost or is of an older version.
    ///
    /// # Errors
    /// [`ImageError::NoSuchImage`], [`ImageError::Ambiguous`], or the disk's.
    pub fn resolve(&self, wanted: &str) -> Result<Image> {
        let record = self.record(wanted)?;
        let configuration = self.configuration(&record)?;
        let rootfs = self.rootfs_path(&record.chain_id)?;
        if !rootfs.exists() {
            let _busy = self.busy()?;
            self.build(&configuration, &record.layers, &Bar::default())?;
        }
        Ok(Image {
            id: record.config,
            config: configuration.config,
            rootfs,
        })
    }

    /// Merges an image's layers, checks their digests, and writes its root file
    /// system if it is not there.
    pub(super) fn build(
        &self,
        configuration: &Configuration,
        layers: &[String],
        progress: &dyn Progress,
    ) -> Result<()> {
        let tmp = self.scratch_directory();
        let scratch = self.scratch(&tmp, progress);
        let mut tree = Tree::new(&self.limits);
        let mut unpacked = 0;
        for (number, (digest, diff_id)) in layers.iter().zip(configuration.diff_ids()).enumerate() {
            let path = self.blob_path(digest)?;
            let blob = File::open(&path).context(|| format!("open {}", path.display()))?;
            unpacked = layer::unpack(blob, diff_id, number as u16, &mut tree, &scratch, unpacked)?;
        }
        let chain_id = configuration.chain_id();
        let target = self.rootfs_path(&chain_id)?;
        if target.exists() {
            return Ok(());
        }
        self.write_rootfs(&tree, &chain_id, &target, progress)
    }

    /// Writes a tree as an EROFS image whose UUID is the beginning of `digest`.
    pub(super) fn write_rootfs(
        &self,
        tree: &Tree,
        digest: &str,
        target: &Path,
        progress: &dyn Progress,
    ) -> Result<()> {
        let number = u128::from_str_radix(&hex(digest)?[..32], 16);
        let uuid = number
            .map_err(|error| ImageError::Store(error.to_string()))?
            .to_be_bytes();
        let new = self.temporary()?;
        erofs::write(tree, uuid, new.as_file(), progress)?;
        place(new, target)
    }
}
