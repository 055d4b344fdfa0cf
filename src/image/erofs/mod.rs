//! Writes a root file system as an EROFS image: read-only, uncompressed, with
//! blocks of 4 KiB, mountable as it is by Linux 5.4 and later. The same tree gives
//! the same bytes.
//!
//! The layout follows Linux's `fs/erofs/erofs_fs.h` and its documentation
//! (`Documentation/filesystems/erofs.rst`):
//!
//! ```text
//! block 0      superblock, at byte 1024
//! block 1 ...  inodes, each with its extended attributes; behind a directory's or a
//!              link's, where it fits into the same block, the tail of its data
//! then         whole blocks of data, file after file
//! ```
//!
//! The tail of a regular file has a block of its own: only so can a guest map the file
//! from memory that holds the image (`dax`), and a mapped page is no page of its own.
//!
//! Compression is left out on purpose: the image is read once into the host's page
//! cache, and all children share it there; what would be saved on disk would be
//! paid again in every child.

mod directory;
mod format;
mod layout;
mod write;
mod xattr;

pub use write::write;

/// The version of this writer: part of the name of a cached image, so that images
/// of an older writer are not taken for those of this one.
pub const VERSION: u32 = 2;
