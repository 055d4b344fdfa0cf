//! Writable layers of another size than the guest's empty disk.

mod ext4;

use anyhow::{Context, Result, bail};
use fork::EmptyDisk;
use std::fs::{self, File};
use std::path::Path;

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

/// Makes `disk`, an empty file, a fresh disk of `size` bytes, in whole blocks; `list` is
/// that of the guest's empty disk.
///
/// # Errors
/// A list that is spoilt, or a file that cannot be written.
pub fn write_smaller(list: &Path, disk: &File, size: u64) -> Result<()> {
    check_size(size)?;
    let empty = fs::read(list).and_then(|list| EmptyDisk::from_list(&list));
    let empty = empty.with_context(|| format!("cannot read {}", list.display()))?;
    empty.write_to(disk).context("cannot write a disk")?;
    ext4::shrink(disk, size).context("cannot make a smaller disk")
}
