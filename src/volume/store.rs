//! The volumes of a state directory: `<root>/volumes/<name>/_data`, as docker has them.
//!
//! What is in `_data` a container has written: it is never followed, only handed on as a
//! whole or removed. Whoever makes a container holds the lock shared until its record
//! names its volumes; whoever removes volumes holds it alone.

use super::{Mount, Source};
use crate::container::{check_name as check_container_name, is_id};
use crate::unfit::Unfit;
use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, flock};
use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

const DATA: &str = "_data";
const LOCK: &str = ".lock";
/// How a volume is called that is being removed.
const REMOVED: &str = ".tmp-";

/// Whether a name can be a volume's: docker's rule.
///
/// # Errors
/// One line.
pub fn check_name(name: &str) -> Result<()> {
    if is_anonymous(name) || check_container_name(name).is_ok() {
        return Ok(());
    }
    bail!(
        "{name:?} is no name of a volume: two or more letters, digits, _ . -, and a letter or digit first"
    )
}

/// Whether a volume was given no name: then it has an id.
pub fn is_anonymous(name: &str) -> bool {
    is_id(name)
}

/// All volumes.
#[derive(Debug, Clone)]
pub struct Store {
    shelf: PathBuf,
}

/// Volumes that are there for a container that is being made. Those that were made for it
/// and have no name go with it, unless it is [kept](Made::keep).
#[derive(Debug)]
pub struct Made {
    store: Store,
    anonymous: Vec<String>,
    /// Nobody removes a volume meanwhile.
    _lock: Option<File>,
}

impl Store {
    /// Of a state directory, which may have none yet.
    pub fn of(root: &Path) -> Self {
        Self {
            shelf: root.join("volumes"),
        }
    }

    /// Where a volume's files are, there or not.
    ///
    /// # Errors
    /// A name that is none.
    pub fn data(&self, name: &str) -> Result<PathBuf> {
        check_name(name)?;
        Ok(self.shelf.join(name).join(DATA))
    }

    /// Whether there is such a volume.
    ///
    /// # Errors
    /// A name that is none.
    pub fn exists(&self, name: &str) -> Result<bool> {
        Ok(self.data(name)?.is_dir())
    }

    /// # Errors
    /// [`Unfit`]: there is none of that name.
    pub fn check_exists(&self, name: &str) -> Result<()> {
        match self.exists(name)? {
            true => Ok(()),
            false => Err(missing(name).into()),
        }
    }

    /// All names, sorted.
    ///
    /// # Errors
    /// What the file system says.
    pub fn names(&self) -> Result<Vec<String>> {
        let entries = match fs::read_dir(&self.shelf) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            done => done.with_context(|| format!("cannot list {}", self.shelf.display()))?,
        };
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry.with_context(|| format!("cannot list {}", self.shelf.display()))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if self.exists(&name).unwrap_or(false) {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }

    /// When it was made.
    pub fn created(&self, name: &str) -> Option<jiff::Timestamp> {
        let made = fs::metadata(self.shelf.join(name)).ok()?.modified().ok()?;
        made.try_into().ok()
    }

    /// Makes a volume; false if it was there.
    ///
    /// # Errors
    /// A name that is none, or what the file system says.
    pub fn make(&self, name: &str) -> Result<bool> {
        let data = self.data(name)?;
        let failed = || format!("cannot make {}", data.display());
        if let Some(parent) = data.parent() {
            fs::create_dir_all(parent).with_context(failed)?;
        }
        match fs::create_dir(&data) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(false),
            Err(error) => Err(error).with_context(failed),
        }
    }

    /// Makes the volumes that these mounts need and that are not there.
    ///
    /// # Errors
    /// What the file system says; what was made is removed then.
    pub fn make_for(&self, mounts: &[Mount]) -> Result<Made> {
        let names = mounts.iter().filter_map(|mount| match &mount.source {
            Source::Volume { name, .. } => Some(name),
            Source::Bind(_) => None,
        });
        let mut made = Made {
            store: self.clone(),
            anonymous: Vec::new(),
            _lock: None,
        };
        for name in names {
            if made._lock.is_none() {
                made._lock = Some(self.lock(FlockOperation::LockShared)?);
            }
            if self.make(name)? && is_anonymous(name) {
                made.anonymous.push(name.clone());
            }
        }
        Ok(made)
    }

    fn lock(&self, how: FlockOperation) -> Result<File> {
        let path = self.shelf.join(LOCK);
        let open = || {
            fs::create_dir_all(&self.shelf)?;
            let mut options = File::options();
            let lock = options
                .create(true)
                .truncate(false)
                .write(true)
                .open(&path)?;
            flock(&lock, how)?;
            Ok::<_, std::io::Error>(lock)
        };
        open().with_context(|| format!("cannot lock {}", path.display()))
    }

    /// Removes a volume that no mount of `used`, asked for under the lock, names.
    ///
    /// # Errors
    /// None of this name, one in use, or what the file system says.
    pub fn remove(
        &self,
        name: &str,
        used: impl FnOnce() -> Result<Vec<(String, Vec<Mount>)>>,
    ) -> Result<()> {
        if !self.exists(name)? {
            return Err(missing(name).into());
        }
        let _lock = self.lock(FlockOperation::LockExclusive)?;
        for (container, mounts) in used()? {
            if mounts.iter().any(|mount| mount.is_of(name)) {
                return Err(Unfit::conflict(format!(
                    "volume {name} is in use by container {container}: remove that first"
                ))
                .into());
            }
        }
        self.take_away(name)
    }

    /// Renamed first, so that nobody finds half of it.
    fn take_away(&self, name: &str) -> Result<()> {
        let volume = self.shelf.join(name);
        let failed = || format!("cannot remove {}", volume.display());
        let away = tempfile::Builder::new()
            .prefix(REMOVED)
            .tempdir_in(&self.shelf)
            .with_context(failed)?;
        fs::rename(&volume, away.path().join("v")).with_context(failed)?;
        away.close().with_context(failed)
    }

    /// Removes those volumes of a container that have no name and that no other container
    /// has. The container is gone by now.
    ///
    /// # Errors
    /// What the file system says.
    pub fn remove_anonymous(
        &self,
        mounts: &[Mount],
        used: impl Fn() -> Result<Vec<(String, Vec<Mount>)>>,
    ) -> Result<()> {
        for mount in mounts {
            if let Source::Volume { name, .. } = &mount.source
                && is_anonymous(name)
                && self.exists(name)?
                && !used()?
                    .iter()
                    .any(|(_, all)| all.iter().any(|m| m.is_of(name)))
            {
                self.remove(name, || Ok(Vec::new()))?;
            }
        }
        Ok(())
    }

    /// Removes what killed processes have left half-removed.
    ///
    /// # Errors
    /// What the file system says.
    pub fn sweep(&self) -> Result<()> {
        if !self.shelf.is_dir() {
            return Ok(());
        }
        let _lock = self.lock(FlockOperation::LockExclusive)?;
        for entry in fs::read_dir(&self.shelf).context("cannot list the volumes")? {
            let entry = entry.context("cannot list the volumes")?;
            if entry.file_name().to_string_lossy().starts_with(REMOVED) {
                let path = entry.path();
                fs::remove_dir_all(&path)
                    .with_context(|| format!("cannot remove {}", path.display()))?;
            }
        }
        Ok(())
    }
}

impl Mount {
    fn is_of(&self, wanted: &str) -> bool {
        matches!(&self.source, Source::Volume { name, .. } if name == wanted)
    }
}

impl Made {
    /// The container is there, and they are its.
    pub fn keep(mut self) {
        self.anonymous.clear();
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        for name in &self.anonymous {
            if let Err(error) = self.store.take_away(name) {
                log::warn!("{error:#}");
            }
        }
    }
}

fn missing(name: &str) -> Unfit {
    Unfit::missing(format!("there is no volume {name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(name: &str) -> Mount {
        Mount {
            source: Source::Volume {
                name: name.into(),
                copy_up: true,
            },
            target: "/v".into(),
            read_only: false,
        }
    }

    #[test]
    fn volumes_are_made_listed_and_removed_unless_in_use() {
        let dir = tempfile::tempdir().expect("a directory");
        let store = Store::of(dir.path());
        assert!(store.names().expect("none").is_empty());
        store.sweep().expect("nothing to do");
        assert!(store.make("data").expect("made"));
        assert!(!store.make("data").expect("there"));
        fs::write(store.data("data").expect("a path").join("f"), "x").expect("written");
        assert!(store.created("data").is_some());
        assert_eq!(store.names().expect("lists"), ["data"]);
        let used = || Ok(vec![("web".to_owned(), vec![mount("data")])]);
        let error = store.remove("data", used).expect_err("in use").to_string();
        assert!(error.contains("in use by container web"), "{error}");
        store.remove("data", || Ok(Vec::new())).expect("removed");
        assert!(store.remove("data", || Ok(Vec::new())).is_err());
        assert!(store.names().expect("lists").is_empty());
    }

    #[test]
    fn names_are_no_paths() {
        let dir = tempfile::tempdir().expect("a directory");
        let store = Store::of(dir.path());
        for bad in [
            "", ".", "..", "../x", "a/b", "/etc", ".lock", ".tmp-x", "-x",
        ] {
            assert!(store.data(bad).is_err(), "{bad}");
            assert!(store.make(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_container_that_is_not_made_leaves_no_anonymous_volume() {
        let dir = tempfile::tempdir().expect("a directory");
        let store = Store::of(dir.path());
        let anonymous = "ab".repeat(32);
        let mounts = [mount(&anonymous), mount("named")];
        drop(store.make_for(&mounts).expect("made"));
        assert_eq!(store.names().expect("lists"), ["named"]);
        store.make_for(&mounts).expect("made").keep();
        assert_eq!(store.names().expect("lists").len(), 2);
        let other = [("other".to_owned(), mounts.to_vec())];
        store
            .remove_anonymous(&mounts, || Ok(other.to_vec()))
            .expect("in use");
        assert_eq!(store.names().expect("lists").len(), 2);
        store
            .remove_anonymous(&mounts, || Ok(Vec::new()))
            .expect("removed");
        assert_eq!(store.names().expect("lists"), ["named"]);
    }
}
