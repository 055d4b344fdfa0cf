//! The writable layer of a child: the empty disk that came with the guest, written
//! into a file of the child's own.
//!
//! The empty disk is kept as a list of its blocks that are not all zeroes, and
//! not as a sparse file: copies, archives and some file systems lose holes.
//!
//! | bytes | hold |
//! |---|---|
//! | 8 | `vmrunblk` |
//! | 8 | the disk's size in bytes |
//! | 8 + 4096, again and again | a block's offset, and the block |
//!
//! All integers are little-endian. `cargo xtask guest` writes it.

// The tests of pages have this file too, from elsewhere.
#[path = "disk/ext4.rs"]
mod ext4;

use anyhow::{Context, Result, bail, ensure};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

const MAGIC: &[u8] = b"vmrunblk";
const BLOCK: usize = 4096;

/// The least that a disk can be: its tables take some of it.
const LEAST: u64 = 16 << 20;
/// The most: the size of the empty disk.
const MOST: u64 = 10 << 30;

/// Checks the size that somebody wants a disk to have.
///
/// # Errors
/// One line.
pub fn check_size(size: u64) -> Result<()> {
    if !(LEAST..=MOST).contains(&size) {
        bail!(
            "a writable layer has between {} MiB and {} GiB",
            LEAST >> 20,
            MOST >> 30
        );
    }
    Ok(())
}

/// Makes `disk`, an empty file, a fresh disk, from the list `blocks`; of another size
/// than the list's if one is given, in whole blocks.
///
/// # Errors
/// A list that is spoilt, or a file that cannot be written.
pub fn write(blocks: &Path, disk: &File, size: Option<u64>) -> Result<()> {
    let list = fs::read(blocks).with_context(|| format!("cannot read {}", blocks.display()))?;
    fill(disk, &list).context("cannot write a disk")?;
    match size {
        None => Ok(()),
        Some(size) => {
            check_size(size)?;
            ext4::shrink(disk, size).context("cannot make a smaller disk")
        }
    }
}

fn fill(disk: &File, list: &[u8]) -> Result<()> {
    let (size, mut rest) = list
        .strip_prefix(MAGIC)
        .and_then(word)
        .context("the empty disk that came with the guest is spoilt")?;
    disk.set_len(size)?;
    while let Some((offset, after)) = word(rest) {
        let block = after.get(..BLOCK).context("the empty disk is cut short")?;
        let end = offset.checked_add(BLOCK as u64);
        ensure!(
            end.is_some_and(|end| end <= size),
            "the empty disk has a block behind its end"
        );
        disk.write_all_at(block, offset)?;
        rest = &after[BLOCK..];
    }
    ensure!(rest.is_empty(), "the empty disk is cut short");
    Ok(())
}

fn word(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let (word, rest) = bytes.split_first_chunk::<8>()?;
    Some((u64::from_le_bytes(*word), rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(size: u64, offset: u64, block: usize) -> Vec<u8> {
        let mut list = MAGIC.to_vec();
        list.extend(size.to_le_bytes());
        list.extend(offset.to_le_bytes());
        list.extend(vec![7; block]);
        list
    }

    #[test]
    fn a_disk_has_its_size_and_its_blocks() {
        let disk = tempfile::tempfile().expect("a file");
        fill(&disk, &list(1 << 30, 8192, BLOCK)).expect("fills");
        assert_eq!(disk.metadata().expect("stat").len(), 1 << 30);
        let mut three = [1; 3];
        disk.read_exact_at(&mut three, 8191).expect("reads");
        assert_eq!(three, [0, 7, 7]);
    }

    #[test]
    fn a_spoilt_list_is_refused() {
        let disk = tempfile::tempfile().expect("a file");
        let spoilt = [
            vec![],
            b"something else".to_vec(),
            list(1 << 20, 1 << 20, BLOCK),
            list(1 << 20, u64::MAX, BLOCK),
            list(1 << 20, 0, 100),
        ];
        for list in spoilt {
            assert!(fill(&disk, &list).is_err());
        }
    }
}
