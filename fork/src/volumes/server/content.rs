//! Requests that are about open files.

use super::nodes::stat;
use super::{Outcome, Server};
use crate::volumes::wire::{Answer, DATA_MAX, Request};
use rustix::fd::OwnedFd;
use rustix::fs::{
    CWD, FallocateFlags, FileType, Mode, OFlags, SeekFrom, fallocate, fchmod, fdatasync, fsync,
    openat, seek,
};
use rustix::io::{Errno, pread, pwrite};

/// What an open file is told of how it was opened. The rest means nothing here, or would:
/// O_DIRECT wants aligned memory, O_NOATIME the owner.
const OPEN_FLAGS: OFlags = OFlags::ACCMODE
    .union(OFlags::APPEND)
    .union(OFlags::TRUNC)
    .union(OFlags::SYNC)
    .union(OFlags::DSYNC);

/// FUSE_OPEN_KILL_SUIDGID and FUSE_WRITE_KILL_SUIDGID.
const OPEN_KILLS: u32 = 1 << 0;
const WRITE_KILLS: u32 = 1 << 2;

/// Linux's lseek(2) numbers.
const SEEK_DATA: u32 = 3;
const SEEK_HOLE: u32 = 4;

impl Server {
    pub(super) fn open(&mut self, request: &mut Request<'_>) -> Outcome {
        let (flags, how) = (request.u32()?, request.u32()?);
        self.has_room()?;
        let flags = OFlags::from_bits_retain(flags) & OPEN_FLAGS;
        let file = self.open_again(request.node, flags)?;
        if how & OPEN_KILLS != 0 && flags.contains(OFlags::TRUNC) {
            drop_privileges(&file)?;
        }
        self.opened(file)
    }

    fn opened(&mut self, file: OwnedFd) -> Outcome {
        let handle = self.keep(file)?;
        Ok(Answer::empty().u64(handle).zeroes(8))
    }

    /// Opens a file that the guest knows. Only regular files and directories: everything
    /// else the guest's kernel opens itself, and some would make this process wait.
    pub(super) fn open_again(&self, node: u64, flags: OFlags) -> Result<OwnedFd, Errno> {
        let fd = self.nodes.get(node)?;
        match FileType::from_raw_mode(stat(fd)?.stx_mode.into()) {
            FileType::RegularFile | FileType::Directory => {}
            _ => return Err(Errno::NXIO),
        }
        let flags = flags | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        openat(CWD, self.path(fd), flags, Mode::empty())
    }

    /// Makes a file and opens it, or opens what is there.
    pub(super) fn create(&mut self, request: &mut Request<'_>) -> Outcome {
        let (flags, mode) = (request.u32()?, request.u32()?);
        request.skip(4)?;
        let how = request.u32()?;
        let name = request.name()?;
        self.has_room()?;
        self.nodes.has_room()?;
        let parent = request.node;
        let asked = OFlags::from_bits_retain(flags);
        let made = self.as_caller((request.uid, request.gid), |this| {
            let own = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let mode = Mode::from_raw_mode(mode & 0o7777);
            let parent = this.nodes.get(parent)?;
            openat(parent, name, asked & OPEN_FLAGS | own, mode)
        });
        match made {
            Ok(file) => {
                let flags = OFlags::PATH | OFlags::CLOEXEC;
                let node = openat(CWD, self.path(&file), flags, Mode::empty())?;
                let entry = self.nodes.tell(node)?;
                Ok(entry.bytes(&self.opened(file)?.0))
            }
            Err(Errno::EXIST) if !asked.contains(OFlags::EXCL) => {
                self.open_there(request, (asked & OPEN_FLAGS, how), name)
            }
            Err(errno) => Err(errno),
        }
    }

    /// Somebody else has made it since the guest looked.
    fn open_there(
        &mut self,
        request: &Request<'_>,
        (flags, how): (OFlags, u32),
        name: &std::ffi::CStr,
    ) -> Outcome {
        let entry = self.nodes.look_up(request.node, name)?;
        let [n0, n1, n2, n3, n4, n5, n6, n7, ..] = entry.0[..] else {
            return Err(Errno::IO);
        };
        let node = u64::from_le_bytes([n0, n1, n2, n3, n4, n5, n6, n7]);
        let opened = self.open_again(node, flags).and_then(|file| {
            if how & OPEN_KILLS != 0 && flags.contains(OFlags::TRUNC) {
                drop_privileges(&file)?;
            }
            self.opened(file)
        });
        match opened {
            Ok(opened) => Ok(entry.bytes(&opened.0)),
            Err(errno) => {
                // The guest is told of nothing.
                self.nodes.forget(node, 1);
                Err(errno)
            }
        }
    }

    pub(super) fn read(&mut self, request: &mut Request<'_>) -> Outcome {
        let (handle, offset, size) = (request.u64()?, request.u64()?, request.u32()?);
        let file = self.handle(handle)?;
        let mut data = vec![0; size.min(DATA_MAX) as usize];
        let mut done = 0;
        while done < data.len() {
            let at = offset.checked_add(done as u64).ok_or(Errno::INVAL)?;
            match pread(file, &mut data[done..], at) {
                Ok(0) => break,
                Ok(count) => done += count,
                Err(Errno::INTR) => {}
                Err(errno) if done == 0 => return Err(errno),
                Err(_) => break,
            }
        }
        data.truncate(done);
        Ok(Answer(data))
    }

    pub(super) fn write(&mut self, request: &mut Request<'_>) -> Outcome {
        let (handle, offset, size) = (request.u64()?, request.u64()?, request.u32()?);
        let how = request.u32()?;
        request.skip(16)?;
        let data = request.bytes(size as usize)?;
        let file = self.handle(handle)?;
        if how & WRITE_KILLS != 0 {
            drop_privileges(file)?;
        }
        let mut done = 0;
        while done < data.len() {
            let at = offset.checked_add(done as u64).ok_or(Errno::INVAL)?;
            match pwrite(file, &data[done..], at) {
                Ok(0) => break,
                Ok(count) => done += count,
                Err(Errno::INTR) => {}
                Err(errno) if done == 0 => return Err(errno),
                // What was written is told; the next write finds the error again.
                Err(_) => break,
            }
        }
        Ok(Answer::empty().u32(done as u32).u32(0))
    }

    pub(super) fn allocate(&mut self, request: &mut Request<'_>) -> Outcome {
        let (handle, offset, len) = (request.u64()?, request.u64()?, request.u64()?);
        let flags = FallocateFlags::from_bits_retain(request.u32()?);
        let file = self.handle(handle)?;
        fallocate(file, flags, offset, len)?;
        // The guest does not say whether its caller may keep them.
        if request.uid != 0 {
            drop_privileges(file)?;
        }
        Ok(Answer::empty())
    }

    pub(super) fn seek(&mut self, request: &mut Request<'_>) -> Outcome {
        let (handle, offset, whence) = (request.u64()?, request.u64()?, request.u32()?);
        let to = match whence {
            SEEK_DATA => SeekFrom::Data(offset),
            SEEK_HOLE => SeekFrom::Hole(offset),
            // The guest's kernel does the others itself.
            _ => return Err(Errno::INVAL),
        };
        Ok(Answer::empty().u64(seek(self.handle(handle)?, to)?))
    }

    pub(super) fn sync(&mut self, request: &mut Request<'_>) -> Outcome {
        const DATA_ONLY: u32 = 1;
        let (handle, flags) = (request.u64()?, request.u32()?);
        let file = self.handle(handle)?;
        if flags & DATA_ONLY != 0 {
            fdatasync(file)?;
        } else {
            fsync(file)?;
        }
        Ok(Answer::empty())
    }

    pub(super) fn release(&mut self, request: &mut Request<'_>) -> Outcome {
        self.handles.remove(&request.u64()?);
        Ok(Answer::empty())
    }
}

/// Takes off what a change by somebody without CAP_FSETID takes off: the setuid bit, and
/// the setgid bit where it is one (inode(7)). This process has that capability, so the
/// kernel does not do it.
pub(super) fn drop_privileges(file: &OwnedFd) -> Result<(), Errno> {
    const SETUID: u32 = 0o4000;
    const SETGID: u32 = 0o2000;
    const GROUP_EXECUTE: u32 = 0o010;
    let found = stat(file)?;
    let mode = u32::from(found.stx_mode);
    if FileType::from_raw_mode(mode) != FileType::RegularFile {
        return Ok(());
    }
    let mut kept = mode & !SETUID;
    if mode & GROUP_EXECUTE != 0 {
        kept &= !SETGID;
    }
    if kept == mode {
        return Ok(());
    }
    fchmod(file, Mode::from_raw_mode(kept & 0o7777))
}
