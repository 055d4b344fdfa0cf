//! Which images the store has, and what they are called: one small JSON file,
//! replaced as a whole under a lock.

use super::error::{Context, ImageError, Result};
use super::reference::{Reference, by_digest};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::Write;
use std::path::Path;

const FILE: &str = "index.json";
const VERSION: u32 = 1;
/// The fewest digits of an id that stand for it.
const SHORTEST_PREFIX: usize = 2;

/// The index file.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Index {
    version: u32,
    /// The images, in the order of their first load.
    pub images: Vec<Record>,
}

/// One image. All digests are `sha256:HEX` and name blobs of the store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The configuration, whose digest is the image's id.
    pub config: String,
    /// The manifest.
    pub manifest: String,
    /// The layers as they were given, from the bottom.
    pub layers: Vec<String>,
    /// Their chain id, which names the root file system's image.
    pub chain_id: String,
    /// Full names.
    pub names: Vec<String>,
    /// What registries call it: `DOMAIN/PATH@sha256:HEX`, of the manifest or of the
    /// index that led to it.
    #[serde(default)]
    pub digests: Vec<String>,
}

impl Record {
    /// The digests of all its blobs.
    pub fn blobs(&self) -> impl Iterator<Item = &String> {
        self.layers.iter().chain([&self.config, &self.manifest])
    }
}

impl Index {
    /// Reads the index of the store in `directory`; an empty one when there is none.
    ///
    /// # Errors
    /// [`ImageError::Store`] when it is not what this program wrote.
    pub fn read(directory: &Path) -> Result<Index> {
        let path = directory.join(FILE);
        let bytes = match std::fs::read(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Ok(Index {
                    version: VERSION,
                    images: Vec::new(),
                });
            }
            other => other.context(|| format!("read {}", path.display()))?,
        };
        let damaged = |reason: String| ImageError::Store(format!("{}: {reason}", path.display()));
        let index: Index =
            serde_json::from_slice(&bytes).map_err(|error| damaged(error.to_string()))?;
        if index.version != VERSION {
            return Err(damaged(format!(
                "version {}, this program knows {VERSION}",
                index.version
            )));
        }
        Ok(index)
    }

    /// Changes the index: one process at a time, and whole or not at all.
    ///
    /// # Errors
    /// Those of `change`, which leave the index as it was, and of the file system.
    pub fn update<T>(directory: &Path, change: impl FnOnce(&mut Index) -> Result<T>) -> Result<T> {
        let lock = lock_file(&directory.join("index.lock"))?;
        lock.lock().context(|| "lock the image store".to_owned())?;
        let mut index = Index::read(directory)?;
        let result = change(&mut index)?;
        let new = directory.join("index.json.new");
        let what = || format!("write {}", new.display());
        let mut file = File::create(&new).context(what)?;
        let bytes = serde_json::to_vec_pretty(&index)
            .map_err(std::io::Error::from)
            .context(what)?;
        file.write_all(&bytes).context(what)?;
        file.sync_all().context(what)?;
        std::fs::rename(&new, directory.join(FILE)).context(what)?;
        sync_directory(directory)?;
        Ok(result)
    }

    /// Enters an image, or gives one that is there more names. A name belongs to one
    /// image: the last that took it.
    pub fn enter(&mut self, record: Record) {
        for other in &mut self.images {
            other.names.retain(|name| !record.names.contains(name));
        }
        match self
            .images
            .iter_mut()
            .find(|other| other.config == record.config)
        {
            Some(known) => {
                known.names.extend(record.names);
                known
                    .digests
                    .retain(|digest| !record.digests.contains(digest));
                known.digests.extend(record.digests);
            }
            None => self.images.push(record),
        }
    }

    /// The image of a name, a digest, an id, or an unambiguous prefix of an id.
    ///
    /// # Errors
    /// [`ImageError::NoSuchImage`] and [`ImageError::Ambiguous`].
    pub fn find(&self, wanted: &str) -> Result<&Record> {
        if let Some(record) = self.find_name(wanted) {
            return Ok(record);
        }
        let prefix = wanted.strip_prefix("sha256:").unwrap_or(wanted);
        let is_id =
            prefix.len() >= SHORTEST_PREFIX && prefix.bytes().all(|b| b.is_ascii_hexdigit());
        let mut matches = self.images.iter().filter(|record| {
            is_id
                && record
                    .config
                    .trim_start_matches("sha256:")
                    .starts_with(&prefix.to_ascii_lowercase())
        });
        match (matches.next(), matches.next()) {
            (Some(record), None) => Ok(record),
            (Some(_), Some(_)) => Err(ImageError::Ambiguous(wanted.to_owned())),
            (None, _) => Err(ImageError::NoSuchImage(wanted.to_owned())),
        }
    }

    /// The image of a name, or of a digest in a repository.
    pub fn find_name(&self, wanted: &str) -> Option<&Record> {
        let reference = Reference::parse(wanted).ok()?;
        let by_tag = reference.name.to_string();
        let by_digest = reference
            .digest
            .map(|digest| by_digest(&reference.name, &digest));
        self.images.iter().find(|record| match &by_digest {
            Some(digest) => record.digests.contains(digest),
            None => record.names.contains(&by_tag),
        })
    }
}

/// Opens a lock file, making it if need be.
///
/// # Errors
/// [`ImageError::Io`].
pub fn lock_file(path: &Path) -> Result<File> {
    File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .context(|| format!("open {}", path.display()))
}

/// Makes a rename in `directory` last through a crash.
///
/// # Errors
/// [`ImageError::Io`].
pub fn sync_directory(directory: &Path) -> Result<()> {
    File::open(directory)
        .and_then(|open| open.sync_all())
        .context(|| format!("sync {}", directory.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::name::Name;

    fn record(id: &str, names: &[&str]) -> Record {
        Record {
            config: format!("sha256:{id}"),
            manifest: String::new(),
            layers: Vec::new(),
            chain_id: String::new(),
            names: names
                .iter()
                .map(|name| Name::parse(name).unwrap().to_string())
                .collect(),
            digests: Vec::new(),
        }
    }

    #[test]
    fn a_name_moves_to_the_last_image_that_took_it() {
        let mut index = Index::default();
        index.enter(record("aa11", &["a", "b"]));
        index.enter(record("aa22", &["a"]));
        assert_eq!(index.find("a").unwrap().config, "sha256:aa22");
        assert_eq!(index.find("b:latest").unwrap().config, "sha256:aa11");
        index.enter(record("aa11", &["a"]));
        assert_eq!(index.images.len(), 2);
        assert_eq!(index.find("a").unwrap().config, "sha256:aa11");
    }

    #[test]
    fn a_digest_is_found_in_its_repository_whatever_the_tag() {
        let digest = format!("sha256:{}", "0b".repeat(32));
        let mut index = Index::default();
        let full = format!("docker.io/library/a@{digest}");
        for _ in 0..2 {
            index.enter(Record {
                digests: vec![full.clone()],
                ..record("aa11", &["a"])
            });
        }
        assert_eq!(index.images[0].digests, [full]);
        for typed in [format!("a@{digest}"), format!("a:other@{digest}")] {
            assert_eq!(index.find(&typed).unwrap().config, "sha256:aa11");
        }
        assert!(index.find(&format!("b@{digest}")).is_err());
    }

    #[test]
    fn ids_are_found_by_prefix_unless_two_fit() {
        let mut index = Index::default();
        index.enter(record("aa11", &[]));
        index.enter(record("aa22", &[]));
        assert_eq!(index.find("AA1").unwrap().config, "sha256:aa11");
        assert_eq!(index.find("sha256:aa22").unwrap().config, "sha256:aa22");
        assert!(matches!(index.find("aa"), Err(ImageError::Ambiguous(_))));
        assert!(matches!(index.find("bb"), Err(ImageError::NoSuchImage(_))));
        assert!(matches!(index.find(""), Err(ImageError::NoSuchImage(_))));
    }

    #[test]
    fn a_failed_change_leaves_the_index_as_it_was() {
        let directory = tempfile::tempdir().unwrap();
        Index::update(directory.path(), |index| {
            index.enter(record("aa", &["x"]));
            Ok(())
        })
        .unwrap();
        let before = Index::read(directory.path()).unwrap();
        let failed: Result<()> = Index::update(directory.path(), |index| {
            index.images.clear();
            Err(ImageError::NoSuchImage("y".to_owned()))
        });
        assert!(failed.is_err());
        assert_eq!(Index::read(directory.path()).unwrap(), before);
        std::fs::write(directory.path().join(FILE), "{").unwrap();
        assert!(matches!(
            Index::read(directory.path()),
            Err(ImageError::Store(_))
        ));
    }
}
