//! The image store: a folder of the state directory, shared by any number of
//! processes.
//!
//! ```text
//! images/index.json      which images there are, and their names
//! images/blobs/sha256/   manifests, configurations and layers as they were given
//! images/rootfs/         root file systems as EROFS images, by chain id or by the
//!                        state of a host directory
//! images/tmp/            what is being made
//! ```
//!
//! Every file is made in `tmp`, synced, and renamed into place; the index, which
//! names them, is replaced last. Whoever makes files holds `busy.lock` shared;
//! whoever gets it alone may delete what the index does not name, left by a removal
//! or by a process that was killed. A root file system in use is an open file, and
//! stays whole however its name goes.

use super::archive::{Archive, Input};
use super::digest::{HashReader, Hasher, hex};
use super::documents::{Configuration, Found, ImageConfig, find, parse};
use super::erofs;
use super::error::{Context, ImageError, Result};
use super::hostdir;
use super::index::{Index, Record, lock_file, sync_directory};
use super::layer::{self, Scratch};
use super::limits::Limits;
use super::name::Name;
use super::tree::Tree;
use crate::progress::{Bar, Progress, Quiet};
use serde::Serialize;
use std::collections::HashSet;
use std::fs::{self, File, TryLockError};
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use tempfile::NamedTempFile;

/// The image store of a state directory.
pub struct Store {
    directory: PathBuf,
    limits: Limits,
}

/// One reference of a load.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loaded {
    /// The image's name, short; `None` when the archive gave it none.
    pub name: Option<String>,
    /// The image's id, `sha256:HEX`.
    pub id: String,
}

/// One image of a listing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ImageSummary {
    /// The image's id, `sha256:HEX`.
    pub id: String,
    /// Its names, short.
    pub names: Vec<String>,
    /// When it was made, RFC 3339, if its maker said so.
    pub created: Option<String>,
    /// Bytes of its root file system's image.
    pub size: u64,
}

/// What a removal did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Removed {
    /// Names, short, that are free now.
    pub untagged: Vec<String>,
    /// The id of the image, if it is gone.
    pub deleted: Option<String>,
}

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

impl Store {
    /// Opens the store in the state directory `root`, making it if need be.
    ///
    /// # Errors
    /// [`ImageError::Io`] when its folders cannot be made.
    pub fn open(root: &Path) -> Result<Store> {
        let directory = root.join("images");
        for folder in ["blobs/sha256", "rootfs", "tmp"] {
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

    /// Loads the images of an archive: all of them, or on an error none.
    ///
    /// # Errors
    /// [`ImageError`]: what is wrong with the archive, or with the disk.
    pub fn load(&self, input: Input<'_>, progress: &dyn Progress) -> Result<Vec<Loaded>> {
        let busy = self.busy()?;
        let result = self.load_all(input, progress);
        drop(busy);
        match result {
            Ok(loaded) => {
                self.sweep()?;
                Ok(loaded)
            }
            Err(error) => {
                if let Err(sweeping) = self.sweep() {
                    log::warn!("the image store could not be cleaned: {sweeping}");
                }
                Err(error)
            }
        }
    }

    /// All images, in the order of their first load.
    ///
    /// # Errors
    /// [`ImageError`] when the store cannot be read.
    pub fn list(&self) -> Result<Vec<ImageSummary>> {
        let summary = |record: &Record| {
            let rootfs = fs::metadata(self.rootfs_path(&record.chain_id)?);
            Ok(ImageSummary {
                id: record.config.clone(),
                names: record.names.iter().map(|name| familiar(name)).collect(),
                created: self.configuration(record)?.created,
                size: rootfs.map_or(0, |meta| meta.len()),
            })
        };
        Index::read(&self.directory)?
            .images
            .iter()
            .map(summary)
            .collect()
    }

    /// Removes a name, and its image with the last one; or, by its id, an image with
    /// all its names.
    ///
    /// # Errors
    /// [`ImageError::NoSuchImage`], [`ImageError::Ambiguous`], or the disk's.
    pub fn remove(&self, wanted: &str) -> Result<Removed> {
        let removed = Index::update(&self.directory, |index| {
            let record = index.find(wanted)?.clone();
            let by_name = index.find_name(wanted).is_some();
            let untagged: Vec<String> = match Name::parse(wanted) {
                Ok(name) if by_name => vec![name.to_string()],
                _ => record.names.clone(),
            };
            let mut deleted = None;
            index.images.retain_mut(|other| {
                if other.config != record.config {
                    return true;
                }
                other.names.retain(|name| !untagged.contains(name));
                if other.names.is_empty() {
                    deleted = Some(other.config.clone());
                }
                !other.names.is_empty()
            });
            Ok(Removed {
                untagged: untagged.iter().map(|name| familiar(name)).collect(),
                deleted,
            })
        })?;
        self.sweep()?;
        Ok(removed)
    }

    /// The image of a name, an id, or an unambiguous prefix of an id. Its root file
    /// system is made again if it was lost or is of an older version.
    ///
    /// # Errors
    /// [`ImageError::NoSuchImage`], [`ImageError::Ambiguous`], or the disk's.
    pub fn resolve(&self, wanted: &str) -> Result<Image> {
        let index = Index::read(&self.directory)?;
        let record = index.find(wanted)?;
        let configuration = self.configuration(record)?;
        let rootfs = self.rootfs_path(&record.chain_id)?;
        if !rootfs.exists() {
            let _busy = self.busy()?;
            self.build(&configuration, &record.layers, &Bar::default())?;
        }
        Ok(Image {
            id: record.config.clone(),
            config: configuration.config,
            rootfs,
        })
    }

    fn load_all(&self, input: Input<'_>, progress: &dyn Progress) -> Result<Vec<Loaded>> {
        let tmp = self.directory.join("tmp");
        let scratch = Scratch {
            directory: &tmp,
            limits: &self.limits,
            progress,
        };
        let archive = Archive::open(input, &scratch)?;
        let found = find(&archive, &self.limits)?;
        let records = found
            .iter()
            .map(|image| self.load_one(&archive, image, progress))
            .collect::<Result<Vec<Record>>>()?;
        Index::update(&self.directory, |index| {
            records
                .iter()
                .cloned()
                .for_each(|record| index.enter(record));
            Ok(())
        })?;
        let loaded = |record: &Record| {
            let id = record.config.clone();
            let named: Vec<Loaded> = record
                .names
                .iter()
                .map(|name| Loaded {
                    name: Some(familiar(name)),
                    id: id.clone(),
                })
                .collect();
            if named.is_empty() {
                vec![Loaded { name: None, id }]
            } else {
                named
            }
        };
        Ok(records.iter().flat_map(loaded).collect())
    }

    /// Brings one image's blobs and root file system into the store, which does not
    /// name them yet.
    fn load_one(
        &self,
        archive: &Archive,
        image: &Found,
        progress: &dyn Progress,
    ) -> Result<Record> {
        let configuration = Configuration::parse(&image.config, &self.limits)?;
        let diff_ids = configuration.diff_ids();
        if diff_ids.len() != image.layers.len() {
            return Err(ImageError::Archive(format!(
                "its configuration names {} layers, and {} are given",
                diff_ids.len(),
                image.layers.len()
            )));
        }
        let config = Hasher::digest(&image.config);
        let names: Vec<String> = image.names.iter().map(Name::to_string).collect();
        if let Some(known) = Index::read(&self.directory)?
            .images
            .iter()
            .find(|known| known.config == config)
            && self.is_complete(known)?
        {
            return Ok(Record {
                names,
                ..known.clone()
            });
        }
        let mut layers = Vec::new();
        for (number, (layer, diff_id)) in image.layers.iter().zip(diff_ids).enumerate() {
            // A docker archive's layers are plain tars as a rule: a known one has
            // the name of its content.
            let likely = layer.digest.as_deref().unwrap_or(diff_id);
            if self.blob_path(likely)?.exists() {
                layers.push(likely.to_owned());
                continue;
            }
            let mut blob = layer.open(archive)?;
            progress.begin(&format!("Copying layer {}", number + 1), Some(blob.left()));
            layers.push(self.import(&mut blob, layer.digest.as_deref(), progress)?);
            progress.end();
        }
        self.import(&mut image.config.as_slice(), Some(&config), &Quiet)?;
        let manifest = match &image.manifest {
            Some(bytes) => bytes.clone(),
            None => self.manifest(&config, image.config.len() as u64, &layers)?,
        };
        let manifest = self.import(&mut manifest.as_slice(), None, &Quiet)?;
        self.build(&configuration, &layers, progress)?;
        Ok(Record {
            config,
            manifest,
            layers,
            chain_id: configuration.chain_id(),
            names,
        })
    }

    /// Merges an image's layers, checks their digests, and writes its root file
    /// system if it is not there.
    fn build(
        &self,
        configuration: &Configuration,
        layers: &[String],
        progress: &dyn Progress,
    ) -> Result<()> {
        let tmp = self.directory.join("tmp");
        let scratch = Scratch {
            directory: &tmp,
            limits: &self.limits,
            progress,
        };
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
    fn write_rootfs(
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

    /// Copies a blob into the store under the digest of its content.
    fn import(
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

    /// The manifest that a docker archive lacks.
    fn manifest(&self, config: &str, config_size: u64, layers: &[String]) -> Result<Vec<u8>> {
        let mut described = Vec::new();
        for digest in layers {
            let path = self.blob_path(digest)?;
            let file = File::open(&path).context(|| format!("open {}", path.display()))?;
            let size = file
                .metadata()
                .context(|| format!("stat {}", path.display()))?
                .len();
            let mut first = Vec::new();
            file.take(4)
                .read_to_end(&mut first)
                .context(|| format!("read {}", path.display()))?;
            let suffix = match layer::Compression::of(&first) {
                layer::Compression::None => "",
                layer::Compression::Gzip => "+gzip",
                layer::Compression::Zstd => "+zstd",
            };
            let media_type = format!("application/vnd.oci.image.layer.v1.tar{suffix}");
            described.push(
                serde_json::json!({ "mediaType": media_type, "digest": digest, "size": size }),
            );
        }
        let manifest = serde_json::json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {
                "mediaType": "application/vnd.oci.image.config.v1+json",
                "digest": config,
                "size": config_size,
            },
            "layers": described,
        });
        Ok(manifest.to_string().into_bytes())
    }

    fn configuration(&self, record: &Record) -> Result<Configuration> {
        let path = self.blob_path(&record.config)?;
        let bytes = fs::read(&path).context(|| format!("read {}", path.display()))?;
        parse("the image's configuration", &bytes)
    }

    fn is_complete(&self, record: &Record) -> Result<bool> {
        for digest in record
            .layers
            .iter()
            .chain([&record.config, &record.manifest])
        {
            if !self.blob_path(digest)?.exists() {
                return Ok(false);
            }
        }
        Ok(self.rootfs_path(&record.chain_id)?.exists())
    }

    fn blob_path(&self, digest: &str) -> Result<PathBuf> {
        Ok(self.directory.join("blobs/sha256").join(hex(digest)?))
    }

    fn rootfs_path(&self, chain_id: &str) -> Result<PathBuf> {
        Ok(self.directory.join("rootfs").join(format!(
            "sha256-{}.v{}.erofs",
            hex(chain_id)?,
            erofs::VERSION
        )))
    }

    fn temporary(&self) -> Result<NamedTempFile> {
        let tmp = self.directory.join("tmp");
        NamedTempFile::new_in(&tmp).context(|| format!("make a file in {}", tmp.display()))
    }

    /// Says that files are being made, for as long as the returned file is open.
    fn busy(&self) -> Result<File> {
        let lock = lock_file(&self.directory.join("busy.lock"))?;
        lock.lock_shared()
            .context(|| "lock the image store".to_owned())?;
        Ok(lock)
    }

    /// Deletes what the index does not name, unless somebody is making files: then
    /// the next who can will do it.
    fn sweep(&self) -> Result<()> {
        let lock = lock_file(&self.directory.join("busy.lock"))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Ok(()),
            Err(TryLockError::Error(error)) => {
                return Err(error).context(|| "lock the image store".to_owned());
            }
        }
        let index = Index::read(&self.directory)?;
        let mut kept = HashSet::new();
        for record in &index.images {
            kept.insert(self.rootfs_path(&record.chain_id)?);
            for digest in record
                .layers
                .iter()
                .chain([&record.config, &record.manifest])
            {
                kept.insert(self.blob_path(digest)?);
            }
        }
        for folder in ["blobs/sha256", "rootfs", "tmp"] {
            let folder = self.directory.join(folder);
            let shown = || format!("clean {}", folder.display());
            for entry in fs::read_dir(&folder).context(shown)? {
                let entry = entry.context(shown)?;
                let of_directory = entry
                    .file_name()
                    .as_bytes()
                    .starts_with(DIRECTORY_PREFIX.as_bytes());
                if !of_directory && !kept.contains(&entry.path()) {
                    fs::remove_file(entry.path()).context(shown)?;
                }
            }
        }
        Ok(())
    }
}

const DIRECTORY_PREFIX: &str = "dir-";

/// The EROFS image of a directory of the host: found in the store when nothing in
/// the directory changed since it was made, else made, in place of the last one.
///
/// # Errors
/// [`ImageError::Io`] when something in it cannot be read, [`ImageError::Changed`]
/// when it changes meanwhile, [`ImageError::Limit`] when it is too large.
pub fn rootfs_from_dir(store: &Store, dir: &Path) -> Result<PathBuf> {
    let _busy = store.busy()?;
    let path = dir
        .canonicalize()
        .context(|| format!("open the directory {}", dir.display()))?;
    let walked = hostdir::walk(&path, &store.limits)?;
    let place = Hasher::digest(path.as_os_str().as_bytes());
    let family = format!("{DIRECTORY_PREFIX}{}-", &hex(&place)?[..16]);
    let name = format!(
        "{family}{}.v{}.erofs",
        &hex(&walked.digest)?[..32],
        erofs::VERSION
    );
    let folder = store.directory.join("rootfs");
    let target = folder.join(&name);
    if target.exists() {
        return Ok(target);
    }
    store.write_rootfs(&walked.tree, &walked.digest, &target, &Bar::default())?;
    let shown = || format!("clean {}", folder.display());
    let again = hostdir::walk(&path, &store.limits)?;
    let stale = |entry: &Path| {
        let name_of = entry
            .file_name()
            .map(|name| name.as_bytes().to_vec())
            .unwrap_or_default();
        name_of.starts_with(family.as_bytes())
            && (name_of != name.as_bytes() || again.digest != walked.digest)
    };
    for entry in fs::read_dir(&folder).context(shown)? {
        let entry = entry.context(shown)?.path();
        if stale(&entry) {
            match fs::remove_file(&entry) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                other => other.context(shown)?,
            }
        }
    }
    if again.digest != walked.digest {
        return Err(ImageError::Changed(dir.display().to_string()));
    }
    Ok(target)
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

fn familiar(name: &str) -> String {
    Name::parse(name).map_or_else(|_| name.to_owned(), |name| name.familiar())
}

#[cfg(test)]
mod tests;
