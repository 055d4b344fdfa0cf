//! Volumes of containers: what is mounted where, and the named ones.

pub mod cli;
mod parse;
mod store;

pub use parse::{VolumeArgs, plan};
pub use store::Store;

use anyhow::{Context, Result};
use rustix::fs::{Mode, OFlags, open};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// Something of the host's in a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// What.
    pub source: Source,
    /// Where the container finds it.
    pub target: String,
    /// Whether the container may not change it.
    #[serde(default)]
    pub read_only: bool,
}

/// What is mounted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Source {
    /// A directory or a file of the host.
    Bind(PathBuf),
    /// A volume of the store.
    Volume {
        /// Its name.
        name: String,
        /// Whether it gets what the image has there, if it is empty.
        copy_up: bool,
    },
}

impl Mount {
    /// Where it is on the host.
    ///
    /// # Errors
    /// A name that is none: records are files.
    pub fn path(&self, root: &Path) -> Result<PathBuf> {
        match &self.source {
            Source::Bind(path) => Ok(path.clone()),
            Source::Volume { name, .. } => Store::of(root).data(name),
        }
    }

    /// Opens it for whoever serves it.
    ///
    /// # Errors
    /// One that is not there.
    pub fn open(&self, root: &Path) -> Result<fork::Volume> {
        let path = self.path(root)?;
        let source = open(&path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
            .with_context(|| format!("cannot mount {} on {}", path.display(), self.target))?;
        Ok(fork::Volume {
            source,
            read_only: self.read_only,
        })
    }

    /// What the guest is told of it, as the volume with this number.
    pub fn in_guest(&self, number: usize) -> fork::Mount {
        fork::Mount {
            // No more than there can be.
            volume: number as u32,
            target: self.target.clone(),
            read_only: self.read_only,
            copy_up: matches!(self.source, Source::Volume { copy_up: true, .. }),
        }
    }

    /// Docker's object.
    pub fn object(&self, root: &Path) -> Value {
        let source = self.path(root).unwrap_or_default();
        match &self.source {
            Source::Bind(_) => json!({
                "Type": "bind",
                "Source": source,
                "Destination": self.target,
                "Mode": "",
                "RW": !self.read_only,
                "Propagation": "rprivate",
            }),
            Source::Volume { name, .. } => json!({
                "Type": "volume",
                "Name": name,
                "Source": source,
                "Destination": self.target,
                "Driver": "local",
                "Mode": "",
                "RW": !self.read_only,
                "Propagation": "",
            }),
        }
    }
}
