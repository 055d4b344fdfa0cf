//! From a tar stream to a directory, which no entry leaves.
//!
//! A name with `..` in it is refused, and one that begins with a slash begins below the
//! directory. Every other file is reached through a descriptor of its parent, which the
//! kernel resolves below the directory (openat2(2)): a link that the archive has made, or
//! that somebody makes meanwhile, leads nowhere else.

use crate::error::{Context, Error, Result, printable};
use crate::read::{Entry, Kind, Stream, TarReader};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{
    AtFlags, Dir, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid, XattrFlags,
};
use rustix::io::Errno;

/// What directories are remembered by until the end, in bytes of their names.
const MOST_NAMES: usize = 256 << 20;
/// What is copied at once.
const BUFFER: usize = 64 << 10;
/// Directories one in the other, of those that are removed.
const DEEPEST: usize = 1024;

/// How links are followed on the way to an entry's parent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resolve {
    /// Not at all.
    NoLinks,
    /// Those that stay below the directory.
    Beneath,
    /// All, with the directory as the root.
    InRoot,
}

/// How an archive is unpacked.
#[derive(Debug, Clone)]
pub struct Unpack<'a> {
    /// If it is not empty: the only name that the archive may have entries of, or below.
    pub only: &'a [u8],
    /// How links are followed.
    pub resolve: Resolve,
    /// Whether a directory may be replaced by something else, and the other way round.
    pub replace: bool,
    /// Whether files have the owners that the archive names; else they are the caller's.
    pub owners: bool,
    /// Whether what gives rights is taken over: setuid and its like, attributes, devices.
    pub privileges: bool,
}

/// Unpacks the archive into `directory`.
///
/// # Errors
/// What the archive says that is not to be, and what the system says. What was unpacked
/// before stays; of the file at which it happened nothing does.
pub fn unpack<S: Stream>(
    directory: BorrowedFd<'_>,
    how: &Unpack<'_>,
    reader: &mut TarReader<S>,
) -> Result<()> {
    let mut unpacker = Unpacker {
        root: directory,
        how,
        directories: Vec::new(),
        names: 0,
        buffer: vec![0; BUFFER],
    };
    while let Some(entry) = reader.next_entry()? {
        unpacker.entry(&entry, reader)?;
    }
    unpacker.finish()
}

struct Unpacker<'a> {
    root: BorrowedFd<'a>,
    how: &'a Unpack<'a>,
    /// What becomes of directories when everything is in them.
    directories: Vec<(Vec<u8>, Entry)>,
    /// Bytes of their names.
    names: usize,
    buffer: Vec<u8>,
}

/// Where an entry goes.
struct Place {
    parent: OwnedFd,
    name: Vec<u8>,
}

impl Unpacker<'_> {
    fn entry<S: Stream>(&mut self, entry: &Entry, reader: &mut TarReader<S>) -> Result<()> {
        let path = self.clean(&entry.path)?;
        if path.is_empty() {
            return match entry.kind {
                // The directory itself stays what it is.
                Kind::Directory => Ok(()),
                _ => Err(refused(&entry.path, "a name of nothing")),
            };
        }
        let named = || format!("make {}", printable(&path));
        let place = self.place(&path).context(named)?;
        let exists = self.make_room(&place, entry).map_err(|error| match error {
            Denied::Kind(reason) => Error::Conflict {
                entry: printable(&path),
                reason,
            },
            Denied::System(error) => Error::Io {
                what: named(),
                source: error.into(),
            },
        })?;
        let (parent, name) = (&place.parent, &place.name[..]);
        match entry.kind {
            Kind::Regular => self.file(&place, entry, reader),
            Kind::Directory => {
                if !exists {
                    rustix::fs::mkdirat(parent, name, Mode::RWXU).context(named)?;
                }
                self.remember(path, entry)
            }
            Kind::Symlink => {
                rustix::fs::symlinkat(&entry.link[..], parent, name).context(named)?;
                self.finish_special(&place, entry).context(named)
            }
            Kind::HardLink => {
                let target = self.clean(&entry.link)?;
                let target = match target.is_empty() {
                    true => return Err(refused(&path, "a link to nothing")),
                    false => self.place(&target).context(named)?,
                };
                let flags = AtFlags::empty();
                rustix::fs::linkat(&target.parent, &target.name[..], parent, name, flags)
                    .context(named)
            }
            Kind::CharDevice | Kind::BlockDevice if !self.how.privileges => {
                Err(refused(&path, "a device, which is not made here"))
            }
            Kind::CharDevice | Kind::BlockDevice | Kind::Fifo => {
                let kind = match entry.kind {
                    Kind::CharDevice => FileType::CharacterDevice,
                    Kind::BlockDevice => FileType::BlockDevice,
                    _ => FileType::Fifo,
                };
                let device = rustix::fs::makedev(entry.device.0, entry.device.1);
                rustix::fs::mknodat(parent, name, kind, Mode::empty(), device).context(named)?;
                self.finish_special(&place, entry).context(named)
            }
        }
    }

    /// A path below the directory, without what says nothing.
    fn clean(&self, path: &[u8]) -> Result<Vec<u8>> {
        let parts = path.split(|byte| *byte == b'/');
        let parts: Vec<&[u8]> = parts.filter(|part| !matches!(*part, b"" | b".")).collect();
        if parts.contains(&&b".."[..]) || path.contains(&0) {
            return Err(refused(path, "it leads out of the archive"));
        }
        let only = self.how.only;
        if !only.is_empty() && parts.first().is_some_and(|first| *first != only) {
            return Err(refused(path, "it was not asked for"));
        }
        Ok(parts.join(&b'/'))
    }

    /// The parent of a path, made if it is missing.
    fn place(&self, path: &[u8]) -> Result<Place, Errno> {
        let (parent, name) = match path.iter().rposition(|byte| *byte == b'/') {
            Some(at) => (&path[..at], &path[at + 1..]),
            None => (&b"."[..], path),
        };
        let parent = match self.open(parent) {
            Err(Errno::NOENT) => {
                let above = self.place(parent)?;
                let mode = Mode::from_raw_mode(0o755);
                match rustix::fs::mkdirat(&above.parent, &above.name[..], mode) {
                    Ok(()) | Err(Errno::EXIST) => {}
                    Err(error) => return Err(error),
                }
                self.open(parent)?
            }
            parent => parent?,
        };
        let name = name.to_vec();
        Ok(Place { parent, name })
    }

    fn open(&self, path: &[u8]) -> Result<OwnedFd, Errno> {
        let resolve = match self.how.resolve {
            Resolve::NoLinks => ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS,
            Resolve::Beneath => ResolveFlags::BENEATH,
            Resolve::InRoot => ResolveFlags::IN_ROOT,
        };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let resolve = resolve | ResolveFlags::NO_MAGICLINKS;
        loop {
            match rustix::fs::openat2(self.root, path, flags, Mode::empty(), resolve) {
                // Something was renamed on the way.
                Err(Errno::AGAIN | Errno::INTR) => {}
                opened => return opened,
            }
        }
    }

    /// Takes away what is in the way of an entry. Whether a directory is there already,
    /// for one.
    fn make_room(&self, place: &Place, entry: &Entry) -> Result<bool, Denied> {
        let name = &place.name[..];
        let found = match rustix::fs::statat(&place.parent, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => return Ok(false),
            found => found?,
        };
        let is_directory = FileType::from_raw_mode(found.st_mode) == FileType::Directory;
        match (is_directory, entry.kind == Kind::Directory) {
            (true, true) => return Ok(true),
            (true, false) if !self.how.replace => {
                return Err(Denied::Kind("a directory of this name is there already"));
            }
            (false, true) if !self.how.replace => {
                return Err(Denied::Kind("a file of this name is there already"));
            }
            (true, false) => remove(place.parent.as_fd(), name, 0)?,
            (false, _) => rustix::fs::unlinkat(&place.parent, name, AtFlags::empty())?,
        }
        Ok(false)
    }

    fn file<S: Stream>(
        &mut self,
        place: &Place,
        entry: &Entry,
        reader: &mut TarReader<S>,
    ) -> Result<()> {
        let named = || format!("write {}", printable(&entry.path));
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mode = Mode::RUSR | Mode::WUSR;
        let file = rustix::fs::openat(&place.parent, &place.name[..], flags, mode);
        let file = file.context(named)?;
        let written = self
            .fill(&file, entry, reader)
            .and_then(|()| self.finish_opened(file.as_fd(), entry).context(named));
        if let Err(error) = written {
            let gone = rustix::fs::unlinkat(&place.parent, &place.name[..], AtFlags::empty());
            return match gone {
                Ok(()) | Err(Errno::NOENT) => Err(error),
                Err(left) => Err(refused(
                    &entry.path,
                    &format!("{error}, and its half stays: {left}"),
                )),
            };
        }
        Ok(())
    }

    /// The bytes. What lies between the pieces is a hole, and so are zeroes: a file that
    /// says it is endless costs its reader's patience, and not a disk.
    fn fill<S: Stream>(
        &mut self,
        file: &OwnedFd,
        entry: &Entry,
        reader: &mut TarReader<S>,
    ) -> Result<()> {
        let named = || format!("write {}", printable(&entry.path));
        let mut written = 0;
        for piece in &entry.pieces {
            let (mut at, mut left) = (piece.offset, piece.length);
            while left > 0 {
                let wanted = usize::try_from(left).map_or(BUFFER, |left| left.min(BUFFER));
                let bytes = &mut self.buffer[..wanted];
                reader.read_data(bytes)?;
                if bytes.iter().any(|byte| *byte != 0) {
                    write_all(file, bytes, at).context(named)?;
                    written = at + wanted as u64;
                }
                at += wanted as u64;
                left -= wanted as u64;
            }
        }
        if written < entry.size {
            rustix::fs::ftruncate(file, entry.size).context(named)?;
        }
        Ok(())
    }

    fn remember(&mut self, path: Vec<u8>, entry: &Entry) -> Result<()> {
        let attributes = entry
            .xattrs
            .iter()
            .map(|(name, value)| name.len() + value.len());
        self.names +=
            path.len() + entry.path.len() + size_of::<Entry>() + attributes.sum::<usize>();
        if self.names > MOST_NAMES {
            return Err(Error::Limit(
                "an archive of too many directories".to_owned(),
            ));
        }
        self.directories.push((path, entry.clone()));
        Ok(())
    }

    /// Gives the directories what they are to be: the inner ones first, because an outer
    /// one may forbid to enter it.
    fn finish(mut self) -> Result<()> {
        for (path, entry) in std::mem::take(&mut self.directories).iter().rev() {
            let named = || format!("finish {}", printable(path));
            let opened = match self.open(path) {
                // A later entry has taken its place.
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => continue,
                opened => opened.context(named)?,
            };
            self.finish_opened(opened.as_fd(), entry).context(named)?;
        }
        Ok(())
    }

    /// Owner first, since a new one takes setuid away, then attributes and mode, time last.
    fn finish_opened(&self, file: BorrowedFd<'_>, entry: &Entry) -> Result<(), Errno> {
        if self.how.owners {
            let (owner, group) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
            rustix::fs::fchown(file, Some(owner), Some(group))?;
        }
        if self.how.privileges {
            for (name, value) in &entry.xattrs {
                match rustix::fs::fsetxattr(file, &name[..], value, XattrFlags::empty()) {
                    // A file system that has none.
                    Ok(()) | Err(Errno::OPNOTSUPP) => {}
                    Err(error) => return Err(error),
                }
            }
        }
        rustix::fs::fchmod(file, self.mode(entry))?;
        rustix::fs::futimens(file, &times(entry))
    }

    /// The same of what cannot be opened.
    fn finish_special(&self, place: &Place, entry: &Entry) -> Result<(), Errno> {
        let (parent, name) = (&place.parent, &place.name[..]);
        if self.how.owners {
            let (owner, group) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
            let flags = AtFlags::SYMLINK_NOFOLLOW;
            rustix::fs::chownat(parent, name, Some(owner), Some(group), flags)?;
        }
        if entry.kind != Kind::Symlink {
            // It was made a moment ago, in a place where only its owner makes files; a
            // link in its stead would give somebody's file a mode, not its contents.
            rustix::fs::chmodat(parent, name, self.mode(entry), AtFlags::empty())?;
        }
        rustix::fs::utimensat(parent, name, &times(entry), AtFlags::SYMLINK_NOFOLLOW)
    }

    fn mode(&self, entry: &Entry) -> Mode {
        let kept = if self.how.privileges { 0o7777 } else { 0o777 };
        Mode::from_raw_mode(u32::from(entry.mode) & kept)
    }
}

/// Why there is no room for an entry.
enum Denied {
    Kind(&'static str),
    System(Errno),
}

impl From<Errno> for Denied {
    fn from(error: Errno) -> Self {
        Self::System(error)
    }
}

fn refused(path: &[u8], reason: &str) -> Error {
    Error::Entry {
        entry: printable(path),
        reason: reason.to_owned(),
    }
}

fn times(entry: &Entry) -> Timestamps {
    let time = Timespec {
        tv_sec: entry.mtime,
        tv_nsec: entry.mtime_nsec.into(),
    };
    Timestamps {
        last_access: time,
        last_modification: time,
    }
}

fn write_all(file: &OwnedFd, mut bytes: &[u8], mut at: u64) -> Result<(), Errno> {
    while !bytes.is_empty() {
        match rustix::io::pwrite(file, bytes, at) {
            Ok(written) => {
                bytes = &bytes[written..];
                at += written as u64;
            }
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Removes a directory with all that is in it.
fn remove(parent: BorrowedFd<'_>, name: &[u8], depth: usize) -> Result<(), Errno> {
    if depth > DEEPEST {
        return Err(Errno::NAMETOOLONG);
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let directory = rustix::fs::openat(parent, name, flags, Mode::empty())?;
    for entry in Dir::read_from(&directory)? {
        let entry = entry?;
        let inner = entry.file_name().to_bytes();
        if matches!(inner, b"." | b"..") {
            continue;
        }
        match rustix::fs::unlinkat(&directory, inner, AtFlags::empty()) {
            Ok(()) => {}
            Err(Errno::ISDIR) => remove(directory.as_fd(), inner, depth + 1)?,
            Err(error) => return Err(error),
        }
    }
    rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR)
}

#[cfg(test)]
mod tests;
