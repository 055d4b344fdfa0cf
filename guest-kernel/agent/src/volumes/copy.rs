//! A copy of a directory with all that is in it: owners, modes, times, links, extended
//! attributes. Nothing runs in the container yet, so what is there stays as it is; it may
//! be hostile all the same.

use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{
    AtFlags, Dir, FileType, Mode, OFlags, Stat, Timespec, Timestamps, XattrFlags, chownat, fchmod,
    fchown, fgetxattr, flistxattr, fsetxattr, fstat, futimens, mkdirat, mknodat, openat,
    readlinkat, statat, symlinkat, utimensat,
};
use rustix::fs::{Gid, Uid};
use rustix::io::{Errno, read, write};
use std::ffi::{CStr, CString};

/// How deep directories may lie in each other: each is open while it is copied.
const DEPTH_MAX: usize = 200;

/// Longest list of names of attributes, and longest attribute (xattr(7)).
const XATTR_MAX: usize = 64 << 10;

/// A directory that is being copied.
struct Level {
    from: OwnedFd,
    to: OwnedFd,
    /// What is left of it.
    names: Vec<(CString, FileType)>,
}

impl Level {
    fn new(from: OwnedFd, to: OwnedFd) -> Result<Self, Errno> {
        let mut names = Vec::new();
        for entry in Dir::read_from(&from)? {
            let entry = entry?;
            let name = entry.file_name();
            if !matches!(name.to_bytes(), b"." | b"..") {
                names.push((name.to_owned(), entry.file_type()));
            }
        }
        Ok(Self { from, to, names })
    }
}

/// Copies what is in `from` into `to`, and gives that the same owner and mode.
pub fn directory(from: OwnedFd, to: OwnedFd) -> Result<(), Errno> {
    let mut levels = vec![Level::new(from, to)?];
    loop {
        let depth = levels.len();
        let Some(level) = levels.last_mut() else {
            return Ok(());
        };
        let Some((name, kind)) = level.names.pop() else {
            // Last: what was made in it has changed its times.
            attributes(&level.from, &level.to)?;
            levels.pop();
            continue;
        };
        let (from, to) = (level.from.as_fd(), level.to.as_fd());
        let kind = match kind {
            FileType::Unknown => {
                FileType::from_raw_mode(statat(from, &name, AtFlags::SYMLINK_NOFOLLOW)?.st_mode)
            }
            known => known,
        };
        match kind {
            FileType::Directory if depth >= DEPTH_MAX => return Err(Errno::NAMETOOLONG),
            FileType::Directory => {
                let next = enter(from, to, &name)?;
                levels.push(next);
            }
            FileType::RegularFile => file(from, to, &name)?,
            FileType::Symlink => link(from, to, &name)?,
            kind => special(from, to, &name, kind)?,
        }
    }
}

const OPEN: OFlags = OFlags::CLOEXEC.union(OFlags::NOFOLLOW);

fn enter(from: BorrowedFd<'_>, to: BorrowedFd<'_>, name: &CStr) -> Result<Level, Errno> {
    let flags = OPEN | OFlags::RDONLY | OFlags::DIRECTORY;
    mkdirat(to, name, Mode::RWXU)?;
    let to = openat(to, name, flags, Mode::empty())?;
    Level::new(openat(from, name, flags, Mode::empty())?, to)
}

fn file(from: BorrowedFd<'_>, to: BorrowedFd<'_>, name: &CStr) -> Result<(), Errno> {
    let from = openat(from, name, OPEN | OFlags::RDONLY, Mode::empty())?;
    let flags = OPEN | OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
    let to = openat(to, name, flags, Mode::RUSR | Mode::WUSR)?;
    let mut buffer = vec![0; 128 << 10];
    loop {
        let count = match read(&from, &mut buffer) {
            Ok(0) => break,
            Err(Errno::INTR) => continue,
            done => done?,
        };
        let mut rest = &buffer[..count];
        while !rest.is_empty() {
            match write(&to, rest) {
                Err(Errno::INTR) => {}
                done => rest = &rest[done?..],
            }
        }
    }
    attributes(&from, &to)
}

fn link(from: BorrowedFd<'_>, to: BorrowedFd<'_>, name: &CStr) -> Result<(), Errno> {
    let target = readlinkat(from, name, Vec::new())?;
    symlinkat(&target, to, name)?;
    by_name(from, to, name)
}

/// FIFOs and sockets. Device nodes are none of a volume's.
fn special(
    from: BorrowedFd<'_>,
    to: BorrowedFd<'_>,
    name: &CStr,
    kind: FileType,
) -> Result<(), Errno> {
    if !matches!(kind, FileType::Fifo | FileType::Socket) {
        return Ok(());
    }
    let mode = Mode::from_raw_mode(statat(from, name, AtFlags::SYMLINK_NOFOLLOW)?.st_mode);
    mknodat(to, name, kind, mode, 0)?;
    by_name(from, to, name)
}

/// Owner and times of what is not opened.
fn by_name(from: BorrowedFd<'_>, to: BorrowedFd<'_>, name: &CStr) -> Result<(), Errno> {
    let flags = AtFlags::SYMLINK_NOFOLLOW;
    let like = statat(from, name, flags)?;
    let (uid, gid) = owner(&like);
    chownat(to, name, Some(uid), Some(gid), flags)?;
    utimensat(to, name, &times(&like), flags)
}

/// Owner, mode, extended attributes and times; in this order, for each takes away what
/// the next has set.
fn attributes(from: &OwnedFd, to: &OwnedFd) -> Result<(), Errno> {
    let like = fstat(from)?;
    let (uid, gid) = owner(&like);
    fchown(to, Some(uid), Some(gid))?;
    fchmod(to, Mode::from_raw_mode(like.st_mode))?;
    extended(from, to)?;
    futimens(to, &times(&like))
}

fn extended(from: &OwnedFd, to: &OwnedFd) -> Result<(), Errno> {
    let mut list = vec![0; XATTR_MAX];
    let len = match flistxattr(from, &mut list[..]) {
        Err(Errno::OPNOTSUPP) => return Ok(()),
        done => done?,
    };
    let mut value = vec![0; XATTR_MAX];
    let names = list[..len].split_inclusive(|byte| *byte == 0);
    for name in names.filter_map(|name| CStr::from_bytes_with_nul(name).ok()) {
        // The overlay's own.
        if name.to_bytes().starts_with(b"trusted.") {
            continue;
        }
        let len = fgetxattr(from, name, &mut value[..])?;
        match fsetxattr(to, name, &value[..len], XattrFlags::empty()) {
            // A file system of the host that has none.
            Err(Errno::OPNOTSUPP) => {}
            done => done?,
        }
    }
    Ok(())
}

fn owner(like: &Stat) -> (Uid, Gid) {
    (Uid::from_raw(like.st_uid), Gid::from_raw(like.st_gid))
}

fn times(like: &Stat) -> Timestamps {
    let time = |seconds: i64, nanoseconds: u64| Timespec {
        tv_sec: seconds,
        // Less than a second's.
        tv_nsec: nanoseconds as i64,
    };
    Timestamps {
        last_access: time(like.st_atime, like.st_atime_nsec),
        last_modification: time(like.st_mtime, like.st_mtime_nsec),
    }
}
