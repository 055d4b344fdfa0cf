//! A layer's tar, put together from packages and single files.

use super::deb;
use anyhow::{Context, Result};
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use tar::{Builder, EntryType, Header};

/// The time of files that no package brings: fixed, so that the bytes are.
const TIME: u64 = 1_700_000_000;
/// What dpkg's path-exclude leaves out of small images.
const EXCLUDED: &[&str] = &[
    "usr/share/doc/",
    "usr/share/info/",
    "usr/share/lintian/",
    "usr/share/locale/",
    "usr/share/man/",
];
/// Debian's merged /usr: these are symbolic links into it.
const MERGED: &[&str] = &["bin", "lib", "lib64", "sbin"];

/// A layer in the making.
pub struct Layer {
    tar: Builder<Vec<u8>>,
    /// Paths that are there, as packages share directories.
    paths: HashSet<PathBuf>,
}

impl Layer {
    /// An empty layer.
    pub fn new() -> Layer {
        Layer {
            tar: Builder::new(Vec::new()),
            paths: HashSet::new(),
        }
    }

    /// Whether the layer has this path.
    pub fn has(&self, path: &str) -> bool {
        self.paths.contains(Path::new(path))
    }

    /// Adds a directory that belongs to `owner`.
    pub fn directory(&mut self, path: &str, mode: u32, owner: u64) -> Result<()> {
        let mut header = header(EntryType::Directory, mode);
        header.set_uid(owner);
        header.set_gid(owner);
        self.append(header, Path::new(path), &[])
    }

    /// Adds a file of root's.
    pub fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> Result<()> {
        let mut header = header(EntryType::Regular, mode);
        header.set_size(content.len() as u64);
        self.append(header, Path::new(path), content)
    }

    /// Adds a symbolic link, unless the path is taken.
    pub fn symlink(&mut self, path: &str, target: &str) -> Result<()> {
        if self.paths.insert(PathBuf::from(path)) {
            self.tar
                .append_link(&mut header(EntryType::Symlink, 0o777), path, target)?;
        }
        Ok(())
    }

    /// Adds all files of a package but its documentation.
    pub fn package(&mut self, package: &Path) -> Result<()> {
        self.files_of(package)
            .with_context(|| format!("cannot unpack {}", package.display()))
    }

    fn files_of(&mut self, package: &Path) -> Result<()> {
        let mut files = deb::open(package)?;
        let mut archive = tar::Archive::new(&mut files);
        for entry in archive.entries()? {
            let entry = entry?;
            let path = merged(&entry.path()?);
            let excluded = EXCLUDED.iter().any(|prefix| path.starts_with(prefix));
            if path.as_os_str().is_empty() || excluded {
                continue;
            }
            let mut header = entry.header().clone();
            match header.entry_type() {
                EntryType::Directory if MERGED.iter().any(|name| path == Path::new(name)) => {}
                EntryType::Directory => self.append(header, &path, &[])?,
                EntryType::Symlink => {
                    let target = entry
                        .link_name()?
                        .context("a symbolic link without a target")?
                        .into_owned();
                    self.paths.insert(path.clone());
                    self.tar.append_link(&mut header, &path, target)?;
                }
                EntryType::Link => {
                    let target = entry.link_name()?.context("a hard link without a target")?;
                    self.tar.append_link(&mut header, &path, merged(&target))?;
                }
                _ => {
                    self.paths.insert(path.clone());
                    self.tar.append_data(&mut header, &path, entry)?;
                }
            }
        }
        files.close()
    }

    fn append(&mut self, mut header: Header, path: &Path, content: &[u8]) -> Result<()> {
        let again = !self.paths.insert(path.to_path_buf());
        if again && header.entry_type() == EntryType::Directory {
            return Ok(());
        }
        self.tar.append_data(&mut header, path, content)?;
        Ok(())
    }

    /// The layer's bytes.
    pub fn finish(self) -> Result<Vec<u8>> {
        Ok(self.tar.into_inner()?)
    }
}

fn header(kind: EntryType, mode: u32) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_mtime(TIME);
    header.set_uid(0);
    header.set_gid(0);
    header.set_size(0);
    header
}

/// A package's path in a root file system with a merged /usr.
fn merged(path: &Path) -> PathBuf {
    let path = path.strip_prefix("./").unwrap_or(path);
    match MERGED
        .iter()
        .any(|name| path.starts_with(name) && path != Path::new(name))
    {
        true => Path::new("usr").join(path),
        false => path.to_path_buf(),
    }
}
