//! The disks of a child, and the empty one that its writable layer begins as.
//!
//! A template has an empty ext4 mounted already: no child pays for that mount. What it
//! lies on has to be, byte for byte, what was there at the freeze ([`EmptyDisk`]); a
//! disk that is, goes where it is mounted, and any other is mounted when the container
//! starts. So nobody has to say whether a disk is fresh, and nobody can say it wrongly.
//!
//! An empty disk is kept as a list of its blocks that are not all zeroes, and not as a
//! sparse file: copies, archives and some file systems lose holes.
//!
//! | bytes | hold |
//! |---|---|
//! | 8 | `vmrunblk` |
//! | 8 | the disk's size in bytes |
//! | 8 + 4096, again and again | a block's offset, and the block |
//!
//! All integers are little-endian. `cargo xtask guest` writes one for each guest.

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use vmm::DiskFiles;

const MAGIC: &[u8] = b"vmrunblk";
const BLOCK: usize = 4096;
/// The most blocks of a list: an empty file system has some twenty.
const BLOCKS_MAX: usize = 4096;
/// The most blocks of a sparse file that a file system may have filled with zeroes. One
/// that knows no holes has gigabytes of them, and they are not read at each fork.
const FILLED_MAX: usize = 1024;
/// The longest list, in bytes.
pub(crate) const LIST_MAX: u64 = (16 + BLOCKS_MAX * (8 + BLOCK)) as u64;

/// The files behind the disks of one child.
#[derive(Debug, Default)]
pub struct Disks {
    /// The root image; many children may share it.
    pub root: Option<File>,
    /// The writable layer: an ext4, of no other child. An empty one is made by
    /// [`Template::empty_disk`](crate::Template::empty_disk). A template that has the lower
    /// layers of its container's disk is to get one fresh overlay
    /// ([`format_overlay`](crate::format_overlay)).
    pub writable: Option<DiskFiles>,
}

/// On which of the machine's disks a writable layer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Slot {
    /// The one that was mounted before the fork point.
    Mounted,
    /// The other.
    Writable,
}

/// The same file, opened anew: locks are each one's own.
pub(crate) fn reopen(file: &File) -> io::Result<File> {
    File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// A disk in which nothing has been written yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EmptyDisk {
    /// In bytes.
    size: u64,
    /// By their offsets, which rise.
    blocks: Vec<(u64, [u8; BLOCK])>,
}

impl EmptyDisk {
    /// From its list.
    ///
    /// # Errors
    /// A list that is spoilt.
    pub fn from_list(list: &[u8]) -> io::Result<Self> {
        let spoilt = |what| io::Error::new(io::ErrorKind::InvalidData, what);
        let (size, mut rest) = list
            .strip_prefix(MAGIC)
            .and_then(word)
            .ok_or_else(|| spoilt("no list of a disk's blocks"))?;
        let mut blocks: Vec<(u64, [u8; BLOCK])> = Vec::new();
        while let Some((offset, after)) = word(rest) {
            let (block, after) = after
                .split_first_chunk()
                .ok_or_else(|| spoilt("a list of a disk's blocks that is cut short"))?;
            let end = offset.checked_add(BLOCK as u64);
            let follows = blocks.last().is_none_or(|(last, _)| *last < offset);
            let is_whole = offset.is_multiple_of(BLOCK as u64);
            let is_inside = end.is_some_and(|end| end <= size);
            if !(is_inside && follows && is_whole) {
                return Err(spoilt("a list with a block out of its place"));
            }
            if blocks.len() == BLOCKS_MAX {
                return Err(spoilt("a list of too many blocks"));
            }
            blocks.push((offset, *block));
            rest = after;
        }
        match rest {
            [] => Ok(Self { size, blocks }),
            _ => Err(spoilt("a list of a disk's blocks that is cut short")),
        }
    }

    /// Its list.
    pub fn to_list(&self) -> Vec<u8> {
        let mut list = MAGIC.to_vec();
        list.extend(self.size.to_le_bytes());
        for (offset, block) in &self.blocks {
            list.extend(offset.to_le_bytes());
            list.extend(block);
        }
        list
    }

    /// What is in `file`.
    ///
    /// # Errors
    /// A file that cannot be read, or with too much in it.
    pub(crate) fn of(file: &File) -> io::Result<Self> {
        let size = file.metadata()?.len();
        let mut blocks = Vec::new();
        let mut block = [0; BLOCK];
        let full = for_data(file, |offset| {
            file.read_exact_at(&mut block, offset)?;
            if block.iter().any(|byte| *byte != 0) {
                blocks.push((offset, block));
            }
            Ok(blocks.len() <= BLOCKS_MAX)
        })?;
        if full {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        Ok(Self { size, blocks })
    }

    /// Makes `file`, which is empty, such a disk: sparse, and of its size.
    ///
    /// # Errors
    /// What the file system says.
    pub fn write_to(&self, file: &File) -> io::Result<()> {
        file.set_len(self.size)?;
        for (offset, block) in &self.blocks {
            file.write_all_at(block, *offset)?;
        }
        Ok(())
    }

    /// Whether `file` is such a disk, byte for byte. Only its data are looked at, and no
    /// more of them than there should be.
    pub(crate) fn is_in(&self, file: &File) -> io::Result<bool> {
        if file.metadata()?.len() != self.size {
            return Ok(false);
        }
        let mut expected = self.blocks.iter();
        let mut filled = 0;
        let mut found = [0; BLOCK];
        let differs = for_data(file, |offset| {
            file.read_exact_at(&mut found, offset)?;
            let mut rest = expected.clone();
            match rest.next() {
                Some((place, block)) if *place == offset => {
                    expected = rest;
                    Ok(found == *block)
                }
                Some((place, _)) if *place < offset => Ok(false),
                // A hole that the file system has filled.
                _ => {
                    filled += 1;
                    Ok(filled <= FILLED_MAX && found == [0; BLOCK])
                }
            }
        })?;
        Ok(!differs && expected.next().is_none())
    }
}

/// Goes over the blocks of a file that hold data (lseek(2), SEEK_DATA), by their offsets,
/// until one has been seen that is not to be gone on from; whether there was one.
fn for_data(file: &File, mut go_on: impl FnMut(u64) -> io::Result<bool>) -> io::Result<bool> {
    let step = BLOCK as u64;
    let mut at = 0;
    loop {
        let start = match seek(file, SeekFrom::Data(at)) {
            Ok(start) => start / step * step,
            // No data from there on.
            Err(Errno::NXIO) => return Ok(false),
            Err(error) => return Err(error.into()),
        };
        at = seek(file, SeekFrom::Hole(start))?.next_multiple_of(step);
        for offset in (start..at).step_by(BLOCK) {
            if !go_on(offset)? {
                return Ok(true);
            }
        }
    }
}

fn word(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let (word, rest) = bytes.split_first_chunk::<8>()?;
    Some((u64::from_le_bytes(*word), rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(size: u64, offsets: &[u64], block: usize) -> Vec<u8> {
        let mut list = MAGIC.to_vec();
        list.extend(size.to_le_bytes());
        for offset in offsets {
            list.extend(offset.to_le_bytes());
            list.extend(vec![7; block]);
        }
        list
    }

    #[test]
    fn a_disk_has_its_size_and_its_blocks() {
        let list = list(1 << 30, &[8192, 1 << 20], BLOCK);
        let empty = EmptyDisk::from_list(&list).expect("a list");
        assert_eq!(empty.to_list(), list);
        let file = tempfile::tempfile().expect("a file");
        empty.write_to(&file).expect("written");
        assert_eq!(file.metadata().expect("stat").len(), 1 << 30);
        let mut three = [1; 3];
        file.read_exact_at(&mut three, 8191).expect("reads");
        assert_eq!(three, [0, 7, 7]);
        assert_eq!(EmptyDisk::of(&file).expect("is read"), empty);
    }

    #[test]
    fn a_disk_is_known_by_every_byte() {
        let list = list(1 << 30, &[8192, 1 << 20], BLOCK);
        let empty = EmptyDisk::from_list(&list).expect("a list");
        let file = tempfile::tempfile().expect("a file");
        let is_it = || empty.is_in(&file).expect("is read");
        assert!(!is_it());
        empty.write_to(&file).expect("written");
        assert!(is_it());
        // A hole may be lost.
        file.write_all_at(&[0; BLOCK], 0).expect("written");
        file.write_all_at(&[0; BLOCK], 1 << 25).expect("written");
        assert!(is_it());
        for (offset, was) in [(1 << 26, 0), (4096, 0), (8192, 7), ((1 << 20) + 4095, 7)] {
            file.write_all_at(&[1], offset).expect("written");
            assert!(!is_it(), "{offset}");
            file.write_all_at(&[was], offset).expect("written");
            assert!(is_it(), "{offset}");
        }
        let zeroes = vec![0; (FILLED_MAX - 1) * BLOCK];
        file.write_all_at(&zeroes, 1 << 27).expect("written");
        assert!(!is_it(), "too much to read");
        file.set_len(1 << 27).expect("cut");
        file.set_len(1 << 30).expect("longer");
        assert!(is_it());
        file.set_len(1 << 29).expect("cut");
        assert!(!is_it());
        file.set_len(1 << 30).expect("longer");
        assert!(is_it());
        file.set_len(16 << 10).expect("cut");
        file.set_len(1 << 30).expect("longer");
        assert!(!is_it());
    }

    #[test]
    fn a_spoilt_list_is_refused() {
        let spoilt = [
            vec![],
            b"something else".to_vec(),
            list(1 << 20, &[1 << 20], BLOCK),
            list(1 << 20, &[u64::MAX], BLOCK),
            list(1 << 20, &[8192, 4096], BLOCK),
            list(1 << 20, &[1], BLOCK),
            list(1 << 20, &[0], 100),
        ];
        for list in spoilt {
            assert!(EmptyDisk::from_list(&list).is_err());
        }
    }
}
