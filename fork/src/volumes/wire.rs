//! FUSE on the wire (Linux `include/uapi/linux/fuse.h`, version 7.38), as far as the
//! server speaks it. All numbers are little-endian, as everything on x86-64.

use rustix::fs::Statx;
use rustix::io::Errno;
use std::ffi::CStr;

/// The version of the protocol that is spoken.
pub(super) const MAJOR: u32 = 7;
pub(super) const MINOR: u32 = 38;

/// Bytes of the header of an answer.
pub(super) const OUT_HEADER: usize = 16;

/// The most data of one request or answer, in bytes.
pub(super) const DATA_MAX: u32 = 128 << 10;

/// The longest name, in bytes.
const NAME_MAX: usize = 255;

pub(super) mod op {
    #![allow(missing_docs)] // named as in the header
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const READLINK: u32 = 5;
    pub const SYMLINK: u32 = 6;
    pub const MKNOD: u32 = 8;
    pub const MKDIR: u32 = 9;
    pub const UNLINK: u32 = 10;
    pub const RMDIR: u32 = 11;
    pub const RENAME: u32 = 12;
    pub const LINK: u32 = 13;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const SETXATTR: u32 = 21;
    pub const GETXATTR: u32 = 22;
    pub const LISTXATTR: u32 = 23;
    pub const REMOVEXATTR: u32 = 24;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const READDIR: u32 = 28;
    pub const RELEASEDIR: u32 = 29;
    pub const FSYNCDIR: u32 = 30;
    pub const CREATE: u32 = 35;
    pub const INTERRUPT: u32 = 36;
    pub const DESTROY: u32 = 38;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
    pub const READDIRPLUS: u32 = 44;
    pub const RENAME2: u32 = 45;
    pub const LSEEK: u32 = 46;
}

/// Features that the guest may use, if it knows them.
pub(super) mod feature {
    pub const ASYNC_READ: u32 = 1 << 0;
    pub const ATOMIC_O_TRUNC: u32 = 1 << 3;
    pub const BIG_WRITES: u32 = 1 << 5;
    /// Cached data is dropped when size or time of a file have changed.
    pub const AUTO_INVAL_DATA: u32 = 1 << 12;
    pub const DO_READDIRPLUS: u32 = 1 << 13;
    pub const READDIRPLUS_AUTO: u32 = 1 << 14;
    pub const PARALLEL_DIROPS: u32 = 1 << 18;
    /// Setuid and setgid bits are dropped by the server, when the guest says so.
    pub const HANDLE_KILLPRIV_V2: u32 = 1 << 28;

    pub const ALL: u32 = ASYNC_READ
        | ATOMIC_O_TRUNC
        | BIG_WRITES
        | AUTO_INVAL_DATA
        | DO_READDIRPLUS
        | READDIRPLUS_AUTO
        | PARALLEL_DIROPS
        | HANDLE_KILLPRIV_V2;
}

/// A request, and what of it has not been read.
#[derive(Debug)]
pub(super) struct Request<'a> {
    pub(super) opcode: u32,
    pub(super) unique: u64,
    pub(super) node: u64,
    pub(super) uid: u32,
    pub(super) gid: u32,
    rest: &'a [u8],
}

impl<'a> Request<'a> {
    /// `None`: no request at all.
    pub(super) fn parse(packet: &'a [u8]) -> Option<Self> {
        let mut this = Self {
            opcode: 0,
            unique: 0,
            node: 0,
            uid: 0,
            gid: 0,
            rest: packet,
        };
        let len = this.u32().ok()?;
        this.opcode = this.u32().ok()?;
        this.unique = this.u64().ok()?;
        this.node = this.u64().ok()?;
        this.uid = this.u32().ok()?;
        this.gid = this.u32().ok()?;
        this.skip(8).ok()?;
        (len as usize == packet.len()).then_some(this)
    }

    /// Whether nobody waits for an answer.
    pub(super) fn is_note(&self) -> bool {
        matches!(self.opcode, op::FORGET | op::BATCH_FORGET | op::INTERRUPT)
    }

    pub(super) fn bytes(&mut self, count: usize) -> Result<&'a [u8], Errno> {
        let (bytes, rest) = self.rest.split_at_checked(count).ok_or(Errno::INVAL)?;
        self.rest = rest;
        Ok(bytes)
    }

    pub(super) fn skip(&mut self, count: usize) -> Result<(), Errno> {
        self.bytes(count).map(drop)
    }

    pub(super) fn u32(&mut self) -> Result<u32, Errno> {
        let bytes = self.bytes(4)?.try_into().map_err(|_| Errno::INVAL)?;
        Ok(u32::from_le_bytes(bytes))
    }

    pub(super) fn u64(&mut self) -> Result<u64, Errno> {
        let bytes = self.bytes(8)?.try_into().map_err(|_| Errno::INVAL)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// A string that ends with a zero.
    pub(super) fn string(&mut self) -> Result<&'a CStr, Errno> {
        let found = CStr::from_bytes_until_nul(self.rest).map_err(|_| Errno::INVAL)?;
        self.skip(found.to_bytes_with_nul().len())?;
        Ok(found)
    }

    /// A name in a directory: it leads nowhere but into that.
    pub(super) fn name(&mut self) -> Result<&'a CStr, Errno> {
        let found = self.string()?;
        match found.to_bytes() {
            b"" | b"." | b".." => Err(Errno::INVAL),
            name if name.contains(&b'/') => Err(Errno::INVAL),
            name if name.len() > NAME_MAX => Err(Errno::NAMETOOLONG),
            _ => Ok(found),
        }
    }
}

/// An answer, or a part of one.
#[derive(Debug, Default)]
pub(super) struct Answer(pub(super) Vec<u8>);

impl Answer {
    /// Of a request that wants no data back.
    pub(super) fn empty() -> Self {
        Self::default()
    }

    pub(super) fn u16(mut self, value: u16) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    pub(super) fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    pub(super) fn u64(mut self, value: u64) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    pub(super) fn zeroes(mut self, count: usize) -> Self {
        self.0.resize(self.0.len() + count, 0);
        self
    }

    pub(super) fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }

    /// `struct fuse_attr`.
    pub(super) fn attributes(self, stat: &Statx, ino: u64) -> Self {
        self.u64(ino)
            .u64(stat.stx_size)
            .u64(stat.stx_blocks)
            // Seconds before 1970 have the same bits.
            .u64(stat.stx_atime.tv_sec as u64)
            .u64(stat.stx_mtime.tv_sec as u64)
            .u64(stat.stx_ctime.tv_sec as u64)
            .u32(stat.stx_atime.tv_nsec)
            .u32(stat.stx_mtime.tv_nsec)
            .u32(stat.stx_ctime.tv_nsec)
            .u32(stat.stx_mode.into())
            .u32(stat.stx_nlink)
            .u32(stat.stx_uid)
            .u32(stat.stx_gid)
            .u32(device(stat))
            .u32(stat.stx_blksize)
            .u32(0)
    }
}

/// The number of a device node in the 32 bits that FUSE has for it (Linux
/// `new_encode_dev`).
fn device(stat: &Statx) -> u32 {
    let (major, minor) = (stat.stx_rdev_major, stat.stx_rdev_minor);
    (minor & 0xff) | (major & 0xfff) << 8 | (minor & !0xff) << 12
}

/// A whole packet.
pub(super) fn packet(unique: u64, outcome: Result<Answer, Errno>) -> Vec<u8> {
    let (error, data) = match outcome {
        Ok(answer) => (0, answer.0),
        Err(errno) => (-errno.raw_os_error(), Vec::new()),
    };
    let len = (OUT_HEADER + data.len()) as u32;
    let mut packet = Vec::with_capacity(OUT_HEADER + data.len());
    packet.extend(len.to_le_bytes());
    packet.extend(error.to_le_bytes());
    packet.extend(unique.to_le_bytes());
    packet.extend(data);
    packet
}
