//! Images on their way out.

use super::{FOLDERS, Store, directory};
use crate::image::error::{Context, Result};
use crate::image::index::{Index, Record, lock_file};
use crate::image::reference::{Reference, by_digest, familiar};
use std::collections::HashSet;
use std::fs::{self, File, Metadata, TryLockError};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::Duration;

/// How long an unfinished download is kept for the next pull to go on with.
const DOWNLOADS_KEPT: Duration = Duration::from_secs(7 * 24 * 3600);

/// What a removal did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    /// Names, short, that are free now.
    pub untagged: Vec<String>,
    /// The ids of the images that are gone.
    pub deleted: Vec<String>,
    /// Bytes of the disk that are free now.
    pub reclaimed: u64,
}

/// How eagerly the store is cleaned.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Downloads {
    /// Unfinished downloads are kept for a while.
    KeepRecent,
    /// They go too.
    Drop,
}

impl Store {
    /// Removes a name, and its image with the last one; or, by its id, an image with
    /// all its names.
    ///
    /// # Errors
    /// [`ImageError::NoSuchImage`](crate::image::error::ImageError::NoSuchImage),
    /// [`ImageError::Ambiguous`](crate::image::error::ImageError::Ambiguous), or the
    /// disk's.
    pub fn remove(&self, wanted: &str) -> Result<Removed> {
        let mut removed = Index::update(&self.directory, |index| {
            let found = index.find(wanted)?;
            let by_name = index.find_name(wanted).is_some();
            let id = found.config.clone();
            let name = match Reference::parse(wanted) {
                Ok(reference) if by_name => Some(match &reference.digest {
                    Some(digest) => by_digest(&reference.name, digest),
                    None => reference.name.to_string(),
                }),
                _ => None,
            };
            let mut removed = Removed::default();
            index.images.retain_mut(|record| {
                record.config != id || !take_off(record, name.as_deref(), &mut removed)
            });
            Ok(removed)
        })?;
        removed.reclaimed = self.clean(Downloads::KeepRecent)?;
        Ok(removed)
    }

    /// Removes the images that have no name, or with `all` every image that no
    /// container uses, and what unfinished downloads left.
    ///
    /// # Errors
    /// [`ImageError`](crate::image::error::ImageError) of the disk.
    pub fn prune(&self, all: bool) -> Result<Removed> {
        let mut removed = Index::update(&self.directory, |index| {
            let mut removed = Removed::default();
            let mut kept = Vec::new();
            for record in std::mem::take(&mut index.images) {
                let goes = record.names.is_empty() || all;
                if !goes || self.is_used(&record)? {
                    kept.push(record);
                    continue;
                }
                removed.untagged.extend(shown_names(&record));
                removed.deleted.push(record.config);
            }
            index.images = kept;
            Ok(removed)
        })?;
        removed.reclaimed = self.clean(Downloads::Drop)?;
        Ok(removed)
    }

    /// Whether a container has the image's root file system open.
    fn is_used(&self, record: &Record) -> Result<bool> {
        let path = self.rootfs_path(&record.chain_id)?;
        let shown = || format!("open {}", path.display());
        let file = match File::open(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
            other => other.context(shown)?,
        };
        match file.try_lock() {
            Ok(()) => Ok(false),
            Err(TryLockError::WouldBlock) => Ok(true),
            Err(TryLockError::Error(error)) => Err(error).context(shown),
        }
    }

    /// Deletes what the index does not name, unless somebody is making files: then
    /// the next who can will do it.
    ///
    /// # Errors
    /// [`ImageError`](crate::image::error::ImageError) of the disk.
    pub fn sweep(&self) -> Result<()> {
        self.clean(Downloads::KeepRecent).map(|_| ())
    }

    /// The same; returns how many bytes of disk it freed.
    fn clean(&self, downloads: Downloads) -> Result<u64> {
        let lock = lock_file(&self.directory.join("busy.lock"))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Ok(0),
            Err(TryLockError::Error(error)) => {
                return Err(error).context(|| "lock the image store".to_owned());
            }
        }
        let kept = self.named()?;
        let mut freed = 0;
        for folder in FOLDERS {
            let path = self.directory.join(folder);
            let shown = || format!("clean {}", path.display());
            for entry in fs::read_dir(&path).context(shown)? {
                let entry = entry.context(shown)?;
                let meta = entry.metadata().context(shown)?;
                let stays = match folder {
                    "downloads" => downloads == Downloads::KeepRecent && is_recent(&meta),
                    _ => kept.contains(&entry.path()) || directory::is_of_directory(&entry.path()),
                };
                if !stays {
                    fs::remove_file(entry.path()).context(shown)?;
                    // st_blocks counts 512 bytes, whatever the file system.
                    freed += meta.blocks() * 512;
                }
            }
        }
        Ok(freed)
    }

    /// The files that the index names.
    fn named(&self) -> Result<HashSet<PathBuf>> {
        let mut named = HashSet::new();
        for record in &Index::read(&self.directory)?.images {
            named.insert(self.rootfs_path(&record.chain_id)?);
            for digest in record.blobs() {
                named.insert(self.blob_path(digest)?);
            }
        }
        Ok(named)
    }
}

/// Takes a name off an image, or all; says whether the image goes with them.
fn take_off(record: &mut Record, name: Option<&str>, removed: &mut Removed) -> bool {
    match name {
        Some(name) => {
            record.names.retain(|other| other != name);
            record.digests.retain(|other| other != name);
            removed.untagged.push(familiar(name));
        }
        None => {
            removed.untagged.extend(shown_names(record));
            record.names.clear();
            record.digests.clear();
        }
    }
    // The last tag takes the digests along: they came with it.
    let by_digest = name.is_some_and(|name| name.contains('@'));
    let is_left_a_digest = by_digest && !record.digests.is_empty();
    let goes = record.names.is_empty() && !is_left_a_digest;
    if goes {
        removed
            .untagged
            .extend(record.digests.iter().map(|digest| familiar(digest)));
        removed.deleted.push(record.config.clone());
    }
    goes
}

fn shown_names(record: &Record) -> impl Iterator<Item = String> {
    record
        .names
        .iter()
        .chain(&record.digests)
        .map(|name| familiar(name))
}

/// A time in the future, of a clock that was set back, counts as recent.
fn is_recent(meta: &Metadata) -> bool {
    let age = meta.modified().ok().and_then(|time| time.elapsed().ok());
    age.is_none_or(|age| age < DOWNLOADS_KEPT)
}
