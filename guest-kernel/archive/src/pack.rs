//! From a file or a directory to a tar stream.

use crate::error::{Context, Error, Result, printable};
use crate::read::{Entry, Kind};
use crate::write::TarWriter;
use rustix::buffer::spare_capacity;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, Statx, StatxFlags};
use rustix::io::Errno;
use std::collections::HashMap;
use std::io::Write;

/// Directories one in the other.
const DEEPEST: usize = 1024;
/// What is copied at once.
const BUFFER: usize = 256 << 10;
/// The longest attribute that Linux has.
const ATTRIBUTE: usize = 64 << 10;

/// At which mounts below the path a walk stops.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mounts {
    /// At those of file systems that hold nothing but what the kernel says, or memory:
    /// /proc, /sys, /dev.
    Real,
    /// At all.
    None,
}

/// How a path is packed.
#[derive(Debug, Clone)]
pub struct Pack<'a> {
    /// The file, directory or link. A link at its end is taken as it is.
    pub path: &'a [u8],
    /// What stands for the path in the archive; empty: what is in the directory has
    /// names of its own.
    pub name: &'a [u8],
    /// Whether a link at the end of the path is followed.
    pub follow: bool,
    /// Which mounts are entered.
    pub mounts: Mounts,
}

/// Writes it all to `out`; the end of the archive is left to the caller.
///
/// # Errors
/// A path that is not there, or what the system says.
pub fn pack<W: Write>(what: &Pack<'_>, out: &mut TarWriter<W>) -> Result<()> {
    let named = || format!("read {}", printable(what.path));
    let flags = match what.follow {
        true => OFlags::empty(),
        false => OFlags::NOFOLLOW,
    };
    let flags = OFlags::PATH | OFlags::CLOEXEC | flags;
    let at = rustix::fs::open(what.path, flags, Mode::empty()).context(named)?;
    let found = stat(at.as_fd(), b"", AtFlags::EMPTY_PATH).context(named)?;
    let mut walk = Walk {
        out,
        mounts: what.mounts,
        links: HashMap::new(),
        buffer: vec![0; BUFFER],
    };
    // What was looked at, and not what may lie there by now.
    let opened = match FileType::from_raw_mode(found.stx_mode.into()) {
        FileType::Directory => Some(open(at.as_fd(), b".", OFlags::DIRECTORY).context(named)?),
        FileType::RegularFile => Some(reopen(&at).context(named)?),
        _ => None,
    };
    let mut path = what.name.to_vec();
    let link = match FileType::from_raw_mode(found.stx_mode.into()) {
        FileType::Symlink => {
            let link = rustix::fs::readlinkat(&at, "", Vec::new()).context(named)?;
            link.into_bytes()
        }
        _ => Vec::new(),
    };
    walk.one(&found, opened, link, &mut path, 0)
}

/// A descriptor to read from, of one that stands for a path only.
fn reopen(at: &OwnedFd) -> Result<OwnedFd, Errno> {
    use rustix::fd::AsRawFd;
    let path = format!("/proc/self/fd/{}", at.as_raw_fd());
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    rustix::fs::open(path, flags, Mode::empty())
}

fn open(at: BorrowedFd<'_>, name: &[u8], flags: OFlags) -> Result<OwnedFd, Errno> {
    // Nothing here waits for the other side of a pipe, or becomes our terminal.
    let flags = OFlags::RDONLY
        | OFlags::CLOEXEC
        | OFlags::NOFOLLOW
        | OFlags::NONBLOCK
        | OFlags::NOCTTY
        | flags;
    rustix::fs::openat(at, name, flags, Mode::empty())
}

fn stat(at: BorrowedFd<'_>, name: &[u8], flags: AtFlags) -> Result<Statx, Errno> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | flags;
    let mask = StatxFlags::BASIC_STATS | StatxFlags::MNT_ID;
    rustix::fs::statx(at, name, flags, mask)
}

struct Walk<'a, W> {
    out: &'a mut TarWriter<W>,
    mounts: Mounts,
    /// The first names of files that have several, by device and inode.
    links: HashMap<(u32, u32, u64), Vec<u8>>,
    buffer: Vec<u8>,
}

impl<W: Write> Walk<'_, W> {
    /// One of any kind, at `path` in the archive; `opened` if it is to be read.
    fn one(
        &mut self,
        found: &Statx,
        opened: Option<OwnedFd>,
        link: Vec<u8>,
        path: &mut Vec<u8>,
        depth: usize,
    ) -> Result<()> {
        let mut entry = entry(found, path, link);
        match (FileType::from_raw_mode(found.stx_mode.into()), opened) {
            (FileType::Directory, Some(directory)) => {
                entry.kind = Kind::Directory;
                entry.xattrs = attributes(directory.as_fd(), path)?;
                entry.path = match path.is_empty() {
                    true => b"./".to_vec(),
                    false => [path, &b"/"[..]].concat(),
                };
                self.out.entry(&entry)?;
                self.directory(directory, found, path, depth)
            }
            (FileType::RegularFile, Some(file)) => self.file(entry, found, &file, path),
            (FileType::Symlink, _) => {
                entry.kind = Kind::Symlink;
                self.out.entry(&entry)
            }
            (FileType::CharacterDevice, _) => {
                entry.kind = Kind::CharDevice;
                self.out.entry(&entry)
            }
            (FileType::BlockDevice, _) => {
                entry.kind = Kind::BlockDevice;
                self.out.entry(&entry)
            }
            (FileType::Fifo, _) => {
                entry.kind = Kind::Fifo;
                self.out.entry(&entry)
            }
            // A socket is its listener's, who is not in an archive.
            _ => Ok(()),
        }
    }

    fn file(&mut self, mut entry: Entry, found: &Statx, file: &OwnedFd, path: &[u8]) -> Result<()> {
        let key = (found.stx_dev_major, found.stx_dev_minor, found.stx_ino);
        if found.stx_nlink > 1 {
            if let Some(first) = self.links.get(&key) {
                entry.kind = Kind::HardLink;
                entry.link.clone_from(first);
                return self.out.entry(&entry);
            }
            self.links.insert(key, path.to_vec());
        }
        entry.size = found.stx_size;
        entry.xattrs = attributes(file.as_fd(), path)?;
        self.out.entry(&entry)?;
        let mut left = entry.size;
        while left > 0 {
            let wanted = usize::try_from(left).map_or(BUFFER, |left| left.min(BUFFER));
            let got = match rustix::io::read(file, &mut self.buffer[..wanted]) {
                Ok(0) => break,
                Ok(got) => got,
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error).context(|| format!("read {}", printable(path))),
            };
            self.out.data(&self.buffer[..got])?;
            left -= got as u64;
        }
        self.out.fill()
    }

    fn directory(
        &mut self,
        directory: OwnedFd,
        found: &Statx,
        path: &mut Vec<u8>,
        depth: usize,
    ) -> Result<()> {
        if depth >= DEEPEST {
            let deep = format!("directories deeper than {DEEPEST} at {}", printable(path));
            return Err(Error::Limit(deep));
        }
        for name in names(&directory, path)? {
            let length = path.len();
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend(&name);
            self.child(directory.as_fd(), &name, found, path, depth)?;
            path.truncate(length);
        }
        Ok(())
    }

    fn child(
        &mut self,
        directory: BorrowedFd<'_>,
        name: &[u8],
        parent: &Statx,
        path: &mut Vec<u8>,
        depth: usize,
    ) -> Result<()> {
        let failed = printable(path);
        let named = || format!("read {failed}");
        let found = match stat(directory, name, AtFlags::empty()) {
            // It has gone since the directory was read.
            Err(Errno::NOENT) => return Ok(()),
            found => found.context(named)?,
        };
        let kind = FileType::from_raw_mode(found.stx_mode.into());
        let flags = match kind {
            FileType::Directory => OFlags::DIRECTORY,
            FileType::RegularFile => OFlags::empty(),
            FileType::Symlink => {
                let link = rustix::fs::readlinkat(directory, name, Vec::new());
                return self.one(&found, None, link.context(named)?.into_bytes(), path, depth);
            }
            _ => return self.one(&found, None, Vec::new(), path, depth),
        };
        let opened = match open(directory, name, flags) {
            // It has gone, or become something else.
            Err(Errno::NOENT | Errno::LOOP | Errno::NOTDIR) => return Ok(()),
            opened => opened.context(named)?,
        };
        let now = stat(opened.as_fd(), b"", AtFlags::EMPTY_PATH).context(named)?;
        if FileType::from_raw_mode(now.stx_mode.into()) != kind {
            return Ok(());
        }
        if now.stx_mnt_id != parent.stx_mnt_id && !self.enters(opened.as_fd()).context(named)? {
            return self.mount_point(&now, kind, path);
        }
        self.one(&now, Some(opened), Vec::new(), path, depth + 1)
    }

    fn enters(&self, mount: BorrowedFd<'_>) -> Result<bool, Errno> {
        /// Of Linux include/uapi/linux/magic.h: proc, sysfs, tmpfs, devpts, mqueue
        /// (ipc/mqueue.c), cgroup2.
        const NOT_REAL: [u64; 6] = [
            0x9fa0,
            0x6265_6572,
            0x0102_1994,
            0x1cd1,
            0x1980_0202,
            0x6367_7270,
        ];
        match self.mounts {
            Mounts::None => Ok(false),
            Mounts::Real => {
                let kind = rustix::fs::fstatfs(mount)?.f_type as u64;
                Ok(!NOT_REAL.contains(&kind))
            }
        }
    }

    /// What is under the mount cannot be seen: an empty directory, or an empty file.
    fn mount_point(&mut self, found: &Statx, kind: FileType, path: &[u8]) -> Result<()> {
        let mut entry = entry(found, path, Vec::new());
        if kind == FileType::Directory {
            entry.kind = Kind::Directory;
            entry.path.push(b'/');
        }
        self.out.entry(&entry)
    }
}

/// A file of no bytes.
fn entry(found: &Statx, path: &[u8], link: Vec<u8>) -> Entry {
    Entry {
        path: path.to_vec(),
        link,
        kind: Kind::Regular,
        mode: found.stx_mode & 0o7777,
        uid: found.stx_uid,
        gid: found.stx_gid,
        mtime: found.stx_mtime.tv_sec,
        mtime_nsec: found.stx_mtime.tv_nsec,
        device: (found.stx_rdev_major, found.stx_rdev_minor),
        xattrs: Vec::new(),
        size: 0,
        pieces: Vec::new(),
    }
}

/// The names in a directory, in an order that does not change.
fn names(directory: &OwnedFd, path: &[u8]) -> Result<Vec<Vec<u8>>> {
    let named = || format!("list {}", printable(path));
    let mut names = Vec::new();
    for entry in Dir::read_from(directory).context(named)? {
        let entry = entry.context(named)?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            names.push(name.to_vec());
        }
    }
    names.sort_unstable();
    Ok(names)
}

/// Which attributes are the file's own, and not its file system's or its machine's.
fn is_portable(name: &[u8]) -> bool {
    name.starts_with(b"user.")
        || name == b"security.capability"
        || name.starts_with(b"system.posix_acl_")
}

fn attributes(file: BorrowedFd<'_>, path: &[u8]) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let named = || format!("read attributes of {}", printable(path));
    let mut list = Vec::with_capacity(ATTRIBUTE);
    match rustix::fs::flistxattr(file, spare_capacity(&mut list)) {
        Err(Errno::OPNOTSUPP) => return Ok(Vec::new()),
        listed => listed.map(drop).context(named)?,
    }
    let mut all = Vec::new();
    for name in list
        .split(|byte| *byte == 0)
        .filter(|name| is_portable(name))
    {
        let mut value = Vec::with_capacity(ATTRIBUTE);
        match rustix::fs::fgetxattr(file, name, spare_capacity(&mut value)) {
            Ok(_) => all.push((name.to_vec(), value)),
            // It has gone.
            Err(Errno::NODATA) => {}
            Err(error) => return Err(error).context(named),
        }
    }
    Ok(all)
}
