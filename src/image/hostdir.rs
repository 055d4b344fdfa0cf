//! A directory of the host as a root file system, for `--rootfs DIR`.
//!
//! The walk goes by open directories and never follows a symbolic link, so nothing
//! outside the directory is read, whoever changes it meanwhile. What is mounted
//! below the directory is left out (its mount points stay, empty).

use super::content::{Content, Stamp};
use super::digest::Hasher;
use super::error::{Context, ImageError, Result, printable};
use super::limits::Limits;
use super::merge::is_kept;
use super::tree::{Body, Children, Meta, Node, NodeId, Tree, Xattrs};
use rustix::fs::{
    AtFlags, Dir, FileType, Mode, OFlags, Stat, fstat, llistxattr, major, minor, openat, statat,
};
use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

/// A directory as it was when it was walked.
pub struct Walked {
    /// Its files.
    pub tree: Tree,
    /// A digest over the names and all that `stat` and the attributes say. A file
    /// whose content changed has another change time, so contents are not read.
    pub digest: String,
}

/// Walks the directory `path`.
///
/// # Errors
/// [`ImageError::Io`] when something cannot be read, [`ImageError::Changed`] when it
/// changes meanwhile, [`ImageError::Limit`] when it is too large.
pub fn walk(path: &Path, limits: &Limits) -> Result<Walked> {
    let root = File::open(path)
        .and_then(|file| {
            if file.metadata()?.is_dir() {
                Ok(file)
            } else {
                Err(io::ErrorKind::NotADirectory.into())
            }
        })
        .context(|| format!("open the directory {}", path.display()))?;
    let root = Arc::new(OwnedFd::from(root));
    let stat = fstat(&root)
        .map_err(io::Error::from)
        .context(|| format!("stat {}", path.display()))?;
    let mut walk = Walk {
        tree: Tree::new(limits),
        hasher: Hasher::default(),
        seen: HashMap::new(),
        device: stat.st_dev,
        root: Arc::clone(&root),
        depth: limits.depth,
    };
    let xattrs = xattrs_of(root.as_fd(), b".")
        .context(|| format!("read attributes of {}", path.display()))?;
    walk.record(b"/", &stat, &xattrs, &[]);
    walk.tree.node_mut(Tree::ROOT).meta = meta(&stat, xattrs);
    walk.directory(root.as_fd(), &mut Vec::new(), Tree::ROOT, 0)?;
    Ok(Walked {
        tree: walk.tree,
        digest: walk.hasher.finish(),
    })
}

struct Walk {
    tree: Tree,
    hasher: Hasher,
    /// Files with several names, by device and inode.
    seen: HashMap<(u64, u64), NodeId>,
    device: u64,
    root: Arc<OwnedFd>,
    depth: usize,
}

impl Walk {
    /// Takes in what is in the directory `open`, whose path below the root is `path`.
    fn directory(
        &mut self,
        open: BorrowedFd<'_>,
        path: &mut Vec<u8>,
        node: NodeId,
        depth: usize,
    ) -> Result<()> {
        if depth > self.depth {
            return Err(ImageError::Limit(format!(
                "directories deeper than {}",
                self.depth
            )));
        }
        for name in names(open).context(|| format!("read the directory {}", printable(path)))? {
            let length = path.len();
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend(&name);
            self.entry(open, &name, path, node, depth)?;
            path.truncate(length);
        }
        // A mark, so that two trees cannot have one record.
        self.hasher.update(&[0]);
        Ok(())
    }

    fn entry(
        &mut self,
        open: BorrowedFd<'_>,
        name: &[u8],
        path: &mut Vec<u8>,
        parent: NodeId,
        depth: usize,
    ) -> Result<()> {
        let shown = |what: &str, path: &[u8]| format!("{what} {}", printable(path));
        let stat = statat(open, name, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(io::Error::from)
            .context(|| shown("stat", path))?;
        let xattrs = xattrs_of(open, name).context(|| shown("read attributes of", path))?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        let target = match kind {
            FileType::Symlink => rustix::fs::readlinkat(open, name, Vec::new())
                .map_err(io::Error::from)
                .context(|| shown("read the link", path))?
                .into_bytes(),
            _ => Vec::new(),
        };
        self.record(name, &stat, &xattrs, &target);
        let identity = (stat.st_dev, stat.st_ino);
        if let Some(known) = self.seen.get(&identity) {
            return self.tree.link(parent, name, *known, 0);
        }
        let body = match kind {
            FileType::Directory => Body::Directory(Children::new()),
            FileType::RegularFile => {
                Body::Regular(Content::from_host(&self.root, path.clone(), &stat))
            }
            FileType::Symlink => Body::Symlink(target),
            FileType::CharacterDevice => Body::CharDevice(major(stat.st_rdev), minor(stat.st_rdev)),
            FileType::BlockDevice => Body::BlockDevice(major(stat.st_rdev), minor(stat.st_rdev)),
            FileType::Fifo => Body::Fifo,
            FileType::Socket => Body::Socket,
            FileType::Unknown => return Err(ImageError::Changed(printable(path))),
        };
        let node = self.tree.add(Node {
            meta: meta(&stat, xattrs),
            body,
        })?;
        self.tree.link(parent, name, node, 0)?;
        if kind != FileType::Directory {
            if stat.st_nlink > 1 {
                self.seen.insert(identity, node);
            }
            return Ok(());
        }
        if stat.st_dev != self.device {
            return Ok(());
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let inner = openat(open, name, flags, Mode::empty())
            .map_err(io::Error::from)
            .context(|| shown("open the directory", path))?;
        let opened = fstat(&inner)
            .map_err(io::Error::from)
            .context(|| shown("stat", path))?;
        if Stamp::of(&opened) != Stamp::of(&stat) {
            return Err(ImageError::Changed(printable(path)));
        }
        self.directory(inner.as_fd(), path, node, depth + 1)
    }

    /// Adds a file to the digest, every variable part with its length.
    fn record(&mut self, name: &[u8], stat: &Stat, xattrs: &Xattrs, target: &[u8]) {
        let mut part = |bytes: &[u8]| {
            self.hasher.update(&(bytes.len() as u64 + 1).to_le_bytes());
            self.hasher.update(bytes);
        };
        part(name);
        part(&Stamp::of(stat).bytes());
        part(&stat.st_uid.to_le_bytes());
        part(&stat.st_gid.to_le_bytes());
        part(&stat.st_rdev.to_le_bytes());
        part(target);
        part(&(xattrs.len() as u64).to_le_bytes());
        for (key, value) in xattrs {
            part(key);
            part(value);
        }
    }
}

/// The names in a directory, sorted, as the image is to depend on nothing else.
fn names(open: BorrowedFd<'_>) -> io::Result<Vec<Vec<u8>>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(open)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if !matches!(name, b"." | b"..") {
            names.push(name.to_vec());
        }
    }
    names.sort_unstable();
    Ok(names)
}

fn meta(stat: &Stat, xattrs: Xattrs) -> Meta {
    Meta {
        mode: (stat.st_mode & 0o7777) as u16,
        uid: stat.st_uid,
        gid: stat.st_gid,
        mtime: stat.st_mtime,
        mtime_nsec: stat.st_mtime_nsec as u32,
        xattrs,
    }
}

/// The attributes of `name` in an open directory. There is no `lgetxattrat` before
/// Linux 6.13; the path through /proc ends in the very directory that is open.
fn xattrs_of(open: BorrowedFd<'_>, name: &[u8]) -> io::Result<Xattrs> {
    let path = [
        format!("/proc/self/fd/{}/", open.as_raw_fd()).as_bytes(),
        name,
    ]
    .concat();
    let list = match grown(|buffer| llistxattr(path.as_slice(), buffer)) {
        Err(rustix::io::Errno::OPNOTSUPP) => return Ok(Xattrs::new()),
        other => other?,
    };
    let mut xattrs = Xattrs::new();
    for key in list
        .split(|b| *b == 0)
        .filter(|key| !key.is_empty() && is_kept(key))
    {
        match grown(|buffer| rustix::fs::lgetxattr(path.as_slice(), key, buffer)) {
            // Removed meanwhile, or not for this user's eyes.
            Err(rustix::io::Errno::NODATA | rustix::io::Errno::OPNOTSUPP) => {}
            Err(error) => return Err(error.into()),
            Ok(value) => {
                xattrs.insert(key.to_vec(), value);
            }
        }
    }
    Ok(xattrs)
}

/// Calls with a buffer that holds whatever attribute Linux allows (64 KiB).
fn grown(call: impl Fn(&mut [u8]) -> rustix::io::Result<usize>) -> rustix::io::Result<Vec<u8>> {
    let mut buffer = vec![0; 256];
    let length = match call(&mut buffer) {
        Err(rustix::io::Errno::RANGE) => {
            buffer.resize(64 << 10, 0);
            call(&mut buffer)?
        }
        other => other?,
    };
    buffer.truncate(length);
    Ok(buffer)
}
