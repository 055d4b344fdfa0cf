//! Who has an endpoint: a process that holds a lock on a file of the owner's name. The
//! kernel lets go of it however the process ends.

use anyhow::{Context, Result};
use rustix::fs::{FlockOperation, flock};
use std::fs::File;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// Somebody who has endpoints, for as long as this lives.
#[derive(Debug)]
pub struct Owner {
    root: PathBuf,
    id: String,
    _lock: File,
}

/// Where the files are.
pub fn directory(root: &Path) -> PathBuf {
    root.join("networks")
}

fn path(root: &Path, id: &str) -> PathBuf {
    directory(root).join(id)
}

impl Owner {
    /// Becomes the owner of the endpoints of `id`. The caller has all networks to itself
    /// ([`super::host::Host::lock`]), so nobody takes the file for a dead one's.
    ///
    /// # Errors
    /// What the file system says.
    pub fn new(root: &Path, id: &str) -> Result<Self> {
        let path = path(root, id);
        let what = || format!("cannot lock {}", path.display());
        let lock = File::create(&path).with_context(what)?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive).with_context(what)?;
        Ok(Self {
            root: root.to_owned(),
            id: id.to_owned(),
            _lock: lock,
        })
    }

    /// Its name.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The state directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Whether nobody holds the lock.
    pub fn is_gone(root: &Path, id: &str) -> bool {
        match File::open(path(root, id)) {
            Ok(file) => flock(&file, FlockOperation::NonBlockingLockShared).is_ok(),
            Err(error) => error.kind() == ErrorKind::NotFound,
        }
    }

    /// Removes the file.
    ///
    /// # Errors
    /// What the file system says; one that is not there is no error.
    pub fn forget(root: &Path, id: &str) -> Result<()> {
        let path = path(root, id);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(error).with_context(|| format!("cannot remove {}", path.display()))
            }
            _ => Ok(()),
        }
    }
}
