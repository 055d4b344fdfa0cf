//! The on-disk structures (Linux, `fs/erofs/erofs_fs.h`), written field by field in
//! little endian.

use crate::image::tree::{Body, Meta};

/// Bytes of a block.
pub const BLOCK: u64 = 4096;
/// log2 of [`BLOCK`].
const BLOCK_BITS: u8 = 12;
/// Where the superblock begins.
pub const SUPERBLOCK_OFFSET: usize = 1024;
const MAGIC: u32 = 0xe0f5_e1e2;
const FEATURE_COMPAT_SB_CHKSUM: u32 = 0x1;
const FEATURE_COMPAT_MTIME: u32 = 0x2;
/// Inodes are addressed in slots of 32 bytes from the beginning of the inode area.
pub const SLOT: u64 = 32;
/// Bytes of an extended inode.
pub const INODE: u64 = 64;
/// The block that inodes are counted from. The superblock's, so that the first inode
/// does not get number 0, which readdir(3) takes for a deleted entry.
const META_BLOCK: u32 = 0;
/// Bytes of a directory entry, without its name.
pub const DIRENT: usize = 12;

/// How an inode's data lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DataLayout {
    /// In whole blocks, the last one filled up with zeros (EROFS_INODE_FLAT_PLAIN).
    Plain,
    /// In whole blocks, and what is left over behind the inode
    /// (EROFS_INODE_FLAT_INLINE): for directories and links.
    Inline,
}

/// What the superblock says.
pub struct Superblock {
    /// The root directory's inode number; it has 16 bits here.
    pub root_nid: u16,
    /// Inodes in the image.
    pub inodes: u64,
    /// Blocks in the image.
    pub blocks: u32,
    /// The file system's UUID.
    pub uuid: [u8; 16],
}

impl Superblock {
    /// The first block of the image.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![0; SUPERBLOCK_OFFSET];
        out.extend(MAGIC.to_le_bytes());
        let checksum_at = out.len();
        out.extend(0u32.to_le_bytes());
        out.extend((FEATURE_COMPAT_SB_CHKSUM | FEATURE_COMPAT_MTIME).to_le_bytes());
        out.extend([BLOCK_BITS, 0]); // no superblock extension slots
        out.extend(self.root_nid.to_le_bytes());
        out.extend(self.inodes.to_le_bytes());
        // Build time: only compact inodes take their time from it, and there are none.
        out.extend([0; 12]);
        out.extend(self.blocks.to_le_bytes());
        out.extend(META_BLOCK.to_le_bytes());
        out.extend(0u32.to_le_bytes()); // no shared attributes
        out.extend(self.uuid);
        out.resize(BLOCK as usize, 0); // no volume name, no incompatible features
        let checksum = crc32c(&out[SUPERBLOCK_OFFSET..]);
        out[checksum_at..checksum_at + 4].copy_from_slice(&checksum.to_le_bytes());
        out
    }
}

/// What an inode says, beside its file's metadata.
pub struct Inode {
    /// How the data lies.
    pub layout: DataLayout,
    /// The attributes' size, as `i_xattr_icount` has it.
    pub xattr_count: u16,
    /// Bytes of data.
    pub size: u64,
    /// The first block of data.
    pub start_block: u32,
    /// The number that tools show; Linux itself uses the position.
    pub number: u32,
    /// Names.
    pub links: u32,
}

impl Inode {
    /// An extended inode (`struct erofs_inode_extended`): the only kind with a time.
    pub fn encode(&self, meta: &Meta, body: &Body) -> Vec<u8> {
        const EXTENDED: u16 = 1;
        let layout = match self.layout {
            DataLayout::Plain => 0,
            DataLayout::Inline => 2,
        };
        let union = match *body {
            Body::CharDevice(major, minor) | Body::BlockDevice(major, minor) => {
                encode_device(major, minor)
            }
            _ => self.start_block,
        };
        let mut out = Vec::with_capacity(INODE as usize);
        out.extend((EXTENDED | layout << 1).to_le_bytes());
        out.extend(self.xattr_count.to_le_bytes());
        out.extend((file_type(body).mode | meta.mode).to_le_bytes());
        out.extend([0; 2]);
        out.extend(self.size.to_le_bytes());
        out.extend(union.to_le_bytes());
        out.extend(self.number.to_le_bytes());
        out.extend(meta.uid.to_le_bytes());
        out.extend(meta.gid.to_le_bytes());
        out.extend(meta.mtime.to_le_bytes());
        out.extend(meta.mtime_nsec.to_le_bytes());
        out.extend(self.links.to_le_bytes());
        out.resize(INODE as usize, 0);
        out
    }
}

/// A file's type, as `i_mode` and as a directory entry have it.
pub struct FileType {
    /// The S_IFMT bits.
    pub mode: u16,
    /// The FT_* number.
    pub dirent: u8,
}

/// The type of a file.
pub fn file_type(body: &Body) -> FileType {
    let (mode, dirent) = match body {
        Body::Regular(_) => (0o100_000, 1),
        Body::Directory(_) => (0o040_000, 2),
        Body::CharDevice(..) => (0o020_000, 3),
        Body::BlockDevice(..) => (0o060_000, 4),
        Body::Fifo => (0o010_000, 5),
        Body::Socket => (0o140_000, 6),
        Body::Symlink(_) => (0o120_000, 7),
    };
    FileType { mode, dirent }
}

/// Linux's `new_encode_dev`.
fn encode_device(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

/// CRC-32C as Linux's `crc32c(~0, ...)`: without the final inversion.
fn crc32c(bytes: &[u8]) -> u32 {
    const POLYNOMIAL: u32 = 0x82f6_3b78;
    bytes.iter().fold(!0, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            if crc & 1 == 1 {
                (crc >> 1) ^ POLYNOMIAL
            } else {
                crc >> 1
            }
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc32c_has_the_check_value_of_the_standard() {
        assert_eq!(!crc32c(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn device_numbers_are_linux_s() {
        assert_eq!(encode_device(8, 1), 0x801);
        assert_eq!(encode_device(0xabc, 0xde_f12), 0xdefa_bc12);
    }

    #[test]
    fn the_superblock_is_one_block_with_the_magic_at_1024() {
        let block = Superblock {
            root_nid: 7,
            inodes: 3,
            blocks: 5,
            uuid: [9; 16],
        }
        .encode();
        assert_eq!(block.len() as u64, BLOCK);
        assert_eq!(block[1024..1028], [0xe2, 0xe1, 0xf5, 0xe0]);
        assert_eq!(block[1024 + 14..1024 + 16], [7, 0]);
        assert_eq!(block[1024 + 36..1024 + 40], [5, 0, 0, 0]);
    }
}
