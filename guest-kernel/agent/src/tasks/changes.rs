//! What a container has changed of its image: its upper layer, compared with what lies
//! under it (Linux Documentation/filesystems/overlayfs.rst).
//!
//! A directory is changed if anything in it is, or its own owner or mode. Its time alone
//! is no change: making the places where the guest mounts /proc and its like sets it.

use super::Failed;
use crate::rootfs::Layers;
use rustix::buffer::spare_capacity;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;
use std::collections::BTreeSet;
use vm_run_abi::task::{Change, ChangeKind};

/// Directories one in the other.
const DEEPEST: usize = 1024;

/// Where the guest mounts something of its own, so that nothing else is written there:
/// empty, if it had to be made.
const MOUNT_POINTS: [&[u8]; 6] = [
    b"/proc",
    b"/dev",
    b"/sys",
    b"/etc/hostname",
    b"/etc/hosts",
    b"/etc/resolv.conf",
];

/// All differences, each directory before what is in it.
pub fn changes(layers: &Layers) -> Result<Vec<Change>, Failed> {
    let mut all = Vec::new();
    let failed = |e: Errno| Failed::io("read the container's layers", e);
    let upper = open(layers.upper.as_fd(), b".").map_err(failed)?;
    let image = open(layers.image.as_fd(), b".").map_err(failed)?;
    directory(&upper, Some(&image), &mut Vec::new(), 0, &mut all)?;
    Ok(all)
}

fn open(at: BorrowedFd<'_>, name: &[u8]) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(at, name, flags, Mode::empty())
}

fn stat(at: &OwnedFd, name: &[u8]) -> Result<Option<Stat>, Errno> {
    match rustix::fs::statat(at, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(found) => Ok(Some(found)),
        Err(Errno::NOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

fn names(directory: &OwnedFd) -> Result<BTreeSet<Vec<u8>>, Errno> {
    let mut names = BTreeSet::new();
    for entry in Dir::read_from(directory)? {
        let name = entry?.file_name().to_bytes().to_vec();
        if !matches!(&name[..], b"." | b"..") {
            names.insert(name);
        }
    }
    Ok(names)
}

/// Adds what has changed in a directory of the upper layer; `image` is the directory
/// under it, if there is one.
fn directory(
    upper: &OwnedFd,
    image: Option<&OwnedFd>,
    path: &mut Vec<u8>,
    depth: usize,
    all: &mut Vec<Change>,
) -> Result<(), Failed> {
    if depth > DEEPEST {
        return Err(Failed::new("the container's directories are too deep"));
    }
    let shown = String::from_utf8_lossy(path).into_owned();
    let failed = |e: Errno| Failed::io(format!("compare {shown}/"), e);
    let mut names_here = names(upper).map_err(failed)?;
    let above = names_here.clone();
    if let Some(image) = image
        && is_opaque(upper).map_err(failed)?
    {
        names_here.extend(names(image).map_err(failed)?);
    }
    for name in names_here {
        let length = path.len();
        path.push(b'/');
        path.extend(&name);
        if above.contains(&name) {
            one(upper, image, &name, path, depth, all)?;
        } else {
            add(ChangeKind::Deleted, path, all);
        }
        path.truncate(length);
    }
    Ok(())
}

/// Adds what has become of one name in the upper layer.
fn one(
    upper: &OwnedFd,
    image: Option<&OwnedFd>,
    name: &[u8],
    path: &mut Vec<u8>,
    depth: usize,
    all: &mut Vec<Change>,
) -> Result<(), Failed> {
    let shown = String::from_utf8_lossy(path).into_owned();
    let failed = |e: Errno| Failed::io(format!("compare {shown}"), e);
    let Some(now) = stat(upper, name).map_err(failed)? else {
        // It has gone since.
        return Ok(());
    };
    let before = match image {
        Some(image) => stat(image, name).map_err(failed)?,
        None => None,
    };
    let kind = FileType::from_raw_mode(now.st_mode);
    if kind == FileType::CharacterDevice && now.st_rdev == 0 {
        if before.is_some() {
            add(ChangeKind::Deleted, path, all);
        }
        return Ok(());
    }
    if kind != FileType::Directory {
        let is_mount_point = now.st_size == 0 && MOUNT_POINTS.contains(&&path[..]);
        if !is_mount_point {
            add(kind_of(before.is_some()), path, all);
        }
        return Ok(());
    }
    let inner = open(upper.as_fd(), name).map_err(failed)?;
    let under = match (image, &before) {
        (Some(image), Some(before)) if is_directory(before) => {
            Some(open(image.as_fd(), name).map_err(failed)?)
        }
        _ => None,
    };
    let at = all.len();
    let own = |s: &Stat| (s.st_mode, s.st_uid, s.st_gid);
    let has_changed = before
        .as_ref()
        .is_none_or(|before| own(before) != own(&now));
    add(kind_of(before.is_some()), path, all);
    directory(&inner, under.as_ref(), path, depth + 1, all)?;
    let is_bare = all.len() == at + 1;
    let is_mount_point = MOUNT_POINTS.contains(&&path[..]);
    if is_bare && (!has_changed || is_mount_point) {
        all.truncate(at);
    }
    Ok(())
}

fn is_directory(found: &Stat) -> bool {
    FileType::from_raw_mode(found.st_mode) == FileType::Directory
}

/// Whether a directory hides all that lies under it.
fn is_opaque(directory: &OwnedFd) -> Result<bool, Errno> {
    let mut value = Vec::with_capacity(8);
    match rustix::fs::fgetxattr(
        directory,
        "trusted.overlay.opaque",
        spare_capacity(&mut value),
    ) {
        Ok(_) => Ok(value == b"y"),
        Err(Errno::NODATA | Errno::OPNOTSUPP | Errno::RANGE) => Ok(false),
        Err(error) => Err(error),
    }
}

fn kind_of(was_there: bool) -> ChangeKind {
    match was_there {
        true => ChangeKind::Changed,
        false => ChangeKind::Added,
    }
}

fn add(kind: ChangeKind, path: &[u8], all: &mut Vec<Change>) {
    let path = path.to_vec();
    all.push(Change { kind, path });
}
