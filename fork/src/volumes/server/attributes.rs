//! Requests that are about attributes, extended ones too.

use super::content::drop_privileges;
use super::nodes::stat;
use super::{Outcome, Server, VALID, group, user};
use crate::volumes::wire::{Answer, DATA_MAX, Request};
use rustix::fs::{
    AtFlags, CWD, Mode, OFlags, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, XattrFlags, chmod,
    chownat, fstatvfs, ftruncate, getxattr, listxattr, removexattr, setxattr, utimensat,
};
use rustix::io::Errno;

/// FATTR_*: which fields of a change are meant.
mod valid {
    pub const MODE: u32 = 1 << 0;
    pub const UID: u32 = 1 << 1;
    pub const GID: u32 = 1 << 2;
    pub const SIZE: u32 = 1 << 3;
    pub const ATIME: u32 = 1 << 4;
    pub const MTIME: u32 = 1 << 5;
    pub const HANDLE: u32 = 1 << 6;
    pub const ATIME_NOW: u32 = 1 << 7;
    pub const MTIME_NOW: u32 = 1 << 8;
    pub const KILL_SUIDGID: u32 = 1 << 11;
}

/// `struct fuse_setattr_in`.
struct Change {
    valid: u32,
    handle: u64,
    size: u64,
    atime: Timespec,
    mtime: Timespec,
    mode: u32,
    uid: u32,
    gid: u32,
}

impl Change {
    fn read(request: &mut Request<'_>) -> Result<Self, Errno> {
        let valid = request.u32()?;
        request.skip(4)?;
        let (handle, size) = (request.u64()?, request.u64()?);
        request.skip(8)?;
        let (atime, mtime) = (request.u64()?, request.u64()?);
        request.skip(8)?;
        let (atime_ns, mtime_ns) = (request.u32()?, request.u32()?);
        request.skip(4)?;
        let mode = request.u32()?;
        request.skip(4)?;
        let (uid, gid) = (request.u32()?, request.u32()?);
        let time = |seconds: u64, nanoseconds: u32, given: u32, now: u32| Timespec {
            // Seconds before 1970 have the same bits.
            tv_sec: seconds as i64,
            tv_nsec: match (valid & now != 0, valid & given != 0) {
                (true, _) => UTIME_NOW,
                (_, true) => nanoseconds.min(999_999_999).into(),
                _ => UTIME_OMIT,
            },
        };
        Ok(Self {
            valid,
            handle,
            size,
            atime: time(atime, atime_ns, valid::ATIME, valid::ATIME_NOW),
            mtime: time(mtime, mtime_ns, valid::MTIME, valid::MTIME_NOW),
            mode,
            uid,
            gid,
        })
    }

    fn has(&self, any: u32) -> bool {
        self.valid & any != 0
    }
}

impl Server {
    /// `struct fuse_attr_out`.
    fn attributes(&mut self, node: u64) -> Outcome {
        let found = stat(self.nodes.get(node)?)?;
        let ino = self.nodes.ino(&found);
        let answer = Answer::empty().u64(VALID).u32(0).u32(0);
        Ok(answer.attributes(&found, ino))
    }

    pub(super) fn get_attributes(&mut self, request: &mut Request<'_>) -> Outcome {
        self.attributes(request.node)
    }

    pub(super) fn set_attributes(&mut self, request: &mut Request<'_>) -> Outcome {
        let change = Change::read(request)?;
        let node = request.node;
        let fd = self.nodes.get(node)?;
        let path = self.path(fd);
        if change.has(valid::MODE) {
            chmod(&path, Mode::from_raw_mode(change.mode & 0o7777))?;
        }
        if change.has(valid::UID | valid::GID) {
            let uid = change.has(valid::UID).then(|| user(change.uid));
            let gid = change.has(valid::GID).then(|| group(change.gid));
            let (uid, gid) = (uid.transpose()?, gid.transpose()?);
            chownat(fd, c"", uid, gid, AtFlags::EMPTY_PATH)?;
        }
        if change.has(valid::SIZE) {
            let opened;
            let file = if change.has(valid::HANDLE) {
                self.handle(change.handle)?
            } else {
                opened = self.open_again(node, OFlags::WRONLY)?;
                &opened
            };
            ftruncate(file, change.size)?;
            if change.has(valid::KILL_SUIDGID) {
                drop_privileges(file)?;
            }
        }
        let times = valid::ATIME | valid::MTIME | valid::ATIME_NOW | valid::MTIME_NOW;
        if change.has(times) {
            let times = Timestamps {
                last_access: change.atime,
                last_modification: change.mtime,
            };
            utimensat(CWD, &path, &times, AtFlags::empty())?;
        }
        self.attributes(node)
    }

    /// `struct fuse_kstatfs`.
    pub(super) fn stat_fs(&mut self, request: &mut Request<'_>) -> Outcome {
        let found = fstatvfs(self.nodes.get(request.node)?)?;
        let narrow = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
        let answer = Answer::empty()
            .u64(found.f_blocks)
            .u64(found.f_bfree)
            .u64(found.f_bavail)
            .u64(found.f_files)
            .u64(found.f_ffree)
            .u32(narrow(found.f_bsize))
            .u32(narrow(found.f_namemax))
            .u32(narrow(found.f_frsize));
        Ok(answer.zeroes(28))
    }

    pub(super) fn set_xattr(&mut self, request: &mut Request<'_>) -> Outcome {
        let (size, flags) = (request.u32()?, request.u32()?);
        let name = request.string()?;
        let value = request.bytes(size as usize)?;
        let path = self.path(self.nodes.get(request.node)?);
        setxattr(path, name, value, XattrFlags::from_bits_retain(flags))?;
        Ok(Answer::empty())
    }

    pub(super) fn get_xattr(&mut self, request: &mut Request<'_>) -> Outcome {
        let size = request.u32()?;
        request.skip(4)?;
        let name = request.string()?;
        let path = self.path(self.nodes.get(request.node)?);
        sized(size, |buffer| getxattr(&path, name, buffer))
    }

    pub(super) fn list_xattr(&mut self, request: &mut Request<'_>) -> Outcome {
        let size = request.u32()?;
        let path = self.path(self.nodes.get(request.node)?);
        sized(size, |buffer| listxattr(&path, buffer))
    }

    pub(super) fn remove_xattr(&mut self, request: &mut Request<'_>) -> Outcome {
        let name = request.string()?;
        removexattr(self.path(self.nodes.get(request.node)?), name)?;
        Ok(Answer::empty())
    }
}

/// Bytes of which the guest first asks how many they are: `struct fuse_getxattr_out`.
fn sized(size: u32, read: impl FnOnce(&mut [u8]) -> Result<usize, Errno>) -> Outcome {
    // The longest value and the longest list (xattr(7)).
    const MOST: usize = 64 << 10;
    let mut buffer = vec![
        0;
        if size == 0 {
            MOST
        } else {
            size.min(DATA_MAX) as usize
        }
    ];
    let len = read(&mut buffer)?;
    if size == 0 {
        return Ok(Answer::empty().u32(len as u32).u32(0));
    }
    buffer.truncate(len);
    Ok(Answer(buffer))
}
