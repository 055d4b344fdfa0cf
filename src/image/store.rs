//! The image store: a folder of the state directory, shared by any number of
//! processes.
//!
//! ```text
//! images/index.json      which images there are, and their names
//! images/blobs/sha256/   manifests, configurations and layers as they were given
//! images/rootfs/         root file systems as EROFS images, by chain id or by the
//!                        state of a host directory
//! images/downloads/      layers on their way from a registry, by digest
//! images/tmp/            what is being made
//! ```
//!
//! Every file is made in `tmp`, synced, and renamed into place; the index, which
//! names them, is replaced last. Whoever makes files holds `busy.lock` shared;
//! whoever gets it alone may delete what the index does not name, left by a removal
//! or by a process that was killed. A root file system in use is an open file with a
//! shared lock, and stays whole however its name goes.

mod directory;
mod enter;
#[cfg(not(fuzzing))]
mod import;
mod inspect;
mod load;
mod remove;
mod resolve;
mod save;

use super::digest::{HashReader, Hasher, hex};
use super::documents::{Configuration, parse};
use super::erofs;
use super::error::{Context, Result};
use super::index::{Index, Record, lock_file, sync_directory};
use super::layer::Scratch;
use super::limits::Limits;
use super::name::Name;
use super::reference::familiar;
use crate::progress::Progress;
use serde::Serialize;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use tempfile::NamedTempFile;

pub use directory::rootfs_from_dir;
pub use enter::Parts;
#[cfg(not(fuzzing))]
pub use import::Import;
pub use remove::Removed;
#[cfg(not(fuzzing))]
pub use resolve::Image;
pub use save::Format;

/// The folders that hold files.
const FOLDERS: [&str; 4] = ["blobs/sha256", "rootfs", "downloads", "tmp"];

/// The image store of a state directory.
pub struct Store {
    directory: PathBuf,
    limits: Limits,
}

/// One image of a listing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ImageSummary {
    /// The image's id, `sha256:HEX`.
    pub id: String,
    /// Its names, short.
    pub names: Vec<String>,
    /// What registries call it, short: `NAME@sha256:HEX`.
    pub digests: Vec<String>,
    /// When it was made, RFC 3339, if its maker said so.
    pub created: Option<String>,
    /// Bytes of its root file system's image.
    pub size: u64,
}

impl Store {
    /// Opens the store in the state directory `root`, making it if need be.
    ///
    /// # Errors
    /// `ImageError::Io` when its folders cannot be made.
    pub fn open(root: &Path) -> Result<Store> {
        let directory = root.join("images");
        for folder in FOLDERS {
            let path = directory.join(folder);
            fs::create_dir_all(&path).context(|| format!("make {}", path.display()))?;
        }
        Ok(Store {
            directory,
            limits: Limits::default(),
        })
    }

    /// The same store with other bounds for what is loaded.
    #[cfg(test)]
    pub fn with_limits(mut self, limits: Limits) -> Store {
        self.limits = limits;
        self
    }

    /// The bounds for what comes in.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// All images, in the order of their first load.
    ///
    /// # Errors
    /// [`ImageError`] when the store cannot be read.
    pub fn list(&self) -> Result<Vec<ImageSummary>> {
        let summary = |record: &Record| {
            Ok(ImageSummary {
                id: record.config.clone(),
                names: record.names.iter().map(|name| familiar(name)).collect(),
                digests: record.digests.iter().map(|name| familiar(name)).collect(),
                created: self.configuration(record)?.created,
                size: self.size(record)?,
            })
        };
        Index::read(&self.directory)?
            .images
            .iter()
            .map(summary)
            .collect()
    }

    /// Gives an image one more name, which another may lose by it.
    ///
    /// # Errors
    /// `ImageError::BadName`, `ImageError::NoSuchImage`, `ImageError::Ambiguous`,
    /// or the disk's.
    pub fn tag(&self, wanted: &str, name: &str) -> Result<()> {
        let name = Name::parse(name)?.to_string();
        Index::update(&self.directory, |index| {
            let record = index.find(wanted)?.clone();
            index.enter(Record {
                names: vec![name],
                digests: Vec::new(),
                ..record
            });
            Ok(())
        })
    }

    /// The record of an image.
    ///
    /// # Errors
    /// `ImageError::NoSuchImage`, `ImageError::Ambiguous`, or the disk's.
    pub fn record(&self, wanted: &str) -> Result<Record> {
        Index::read(&self.directory)?.find(wanted).cloned()
    }

    /// The file of a blob, which need not be there.
    ///
    /// # Errors
    /// `ImageError::Archive` for what is no SHA-256 digest.
    pub fn blob_path(&self, digest: &str) -> Result<PathBuf> {
        Ok(self.directory.join("blobs/sha256").join(hex(digest)?))
    }

    /// The file in which a layer is downloaded.
    ///
    /// # Errors
    /// `ImageError::Archive` for what is no SHA-256 digest.
    pub fn download_path(&self, digest: &str) -> Result<PathBuf> {
        Ok(self.directory.join("downloads").join(hex(digest)?))
    }

    /// The content of a small blob that the index names.
    ///
    /// # Errors
    /// `ImageError::Io`.
    pub fn document(&self, digest: &str) -> Result<Vec<u8>> {
        let path = self.blob_path(digest)?;
        fs::read(&path).context(|| format!("read {}", path.display()))
    }

    /// Bytes of an image's root file system; 0 when it has to be made again.
    fn size(&self, record: &Record) -> Result<u64> {
        let rootfs = fs::metadata(self.rootfs_path(&record.chain_id)?);
        Ok(rootfs.map_or(0, |meta| meta.len()))
    }

    fn configuration(&self, record: &Record) -> Result<Configuration> {
        parse("the image's configuration", &self.document(&record.config)?)
    }

    fn rootfs_path(&self, chain_id: &str) -> Result<PathBuf> {
        Ok(self.directory.join("rootfs").join(format!(
            "sha256-{}.v{}.erofs",
            hex(chain_id)?,
            erofs::VERSION
        )))
    }

    fn scratch_directory(&self) -> PathBuf {
        self.directory.join("tmp")
    }

    fn scratch<'a>(&'a self, directory: &'a Path, progress: &'a dyn Progress) -> Scratch<'a> {
        Scratch {
            directory,
            limits: &self.limits,
            progress,
        }
    }

    fn temporary(&self) -> Result<NamedTempFile> {
        let tmp = self.scratch_directory();
        NamedTempFile::new_in(&tmp).context(|| format!("make a file in {}", tmp.display()))
    }

    /// Copies a blob into the store under the digest of its content.
    fn keep(
        &self,
        input: &mut dyn Read,
        expected: Option<&str>,
        progress: &dyn Progress,
    ) -> Result<String> {
        let mut new = self.temporary()?;
        let mut hashed = HashReader::new(input);
        let mut buffer = vec![0; 128 << 10];
        loop {
            let count = hashed
                .read(&mut buffer)
                .context(|| "read the archive".to_owned())?;
            if count == 0 {
                break;
            }
            self.limits.check_unpacked(u64::MAX, hashed.count())?;
            new.write_all(&buffer[..count])
                .context(|| "write a blob of the image".to_owned())?;
            progress.advance(count as u64);
        }
        let digest = hashed.finish();
        if let Some(expected) = expected {
            Hasher::check("blob", expected, &digest)?;
        }
        place(new, &self.blob_path(&digest)?)?;
        Ok(digest)
    }

    /// Says that files are being made, for as long as the returned file is open.
    ///
    /// # Errors
    /// `ImageError::Io`.
    pub fn busy(&self) -> Result<File> {
        let lock = lock_file(&self.directory.join("busy.lock"))?;
        lock.lock_shared()
            .context(|| "lock the image store".to_owned())?;
        Ok(lock)
    }

    /// Does what makes files, and cleans up behind it, whether it succeeds or not.
    ///
    /// # Errors
    /// Those of `work`, and on its success those of the cleaning.
    pub fn making<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let busy = self.busy()?;
        let result = work();
        drop(busy);
        match (result, self.sweep()) {
            (Ok(done), swept) => swept.map(|_| done),
            (Err(error), swept) => {
                if let Err(sweeping) = swept {
                    log::warn!("the image store could not be cleaned: {sweeping}");
                }
                Err(error)
            }
        }
    }
}

/// Gives a finished file its name, for good.
fn place(new: NamedTempFile, target: &Path) -> Result<()> {
    let what = || format!("write {}", target.display());
    new.as_file().sync_all().context(what)?;
    new.persist(target)
        .map_err(|error| error.error)
        .context(what)?;
    match target.parent() {
        Some(folder) => sync_directory(folder),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests;
