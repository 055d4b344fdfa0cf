//! Makes the empty disk smaller, in the tables of its ext4 (Linux
//! Documentation/filesystems/ext4): the groups behind the new end are left out, and the
//! last one is cut. Nothing is in the file system but its root, all in the first group.
//!
//! This is our own empty disk, before any guest has seen it: what a guest has written is
//! never read here.

use anyhow::{Context, Result, ensure};
use std::fs::File;
use std::os::unix::fs::FileExt;

const BLOCK: usize = 4096;
/// Blocks of a group: what one block of bits tells of.
const GROUP: u64 = 8 * BLOCK as u64;
/// The superblock, in the first block.
const SUPER: usize = 1024;
/// A descriptor of a group.
const DESCRIPTOR: usize = 64;
/// A last group is left out if its tables leave it less room than that, as mke2fs does.
const LEAST_ROOM: u64 = 50;

/// Offsets in the superblock (`struct ext4_super_block`).
mod at {
    pub const INODES: usize = 0x0;
    pub const BLOCKS: usize = 0x4;
    pub const FREE_BLOCKS: usize = 0xc;
    pub const FREE_INODES: usize = 0x10;
    pub const BLOCK_BITS: usize = 0x18;
    pub const GROUP_BLOCKS: usize = 0x20;
    pub const GROUP_INODES: usize = 0x28;
    pub const MAGIC: usize = 0x38;
    pub const INODE_SIZE: usize = 0x58;
    pub const RO_FEATURES: usize = 0x64;
    pub const UUID: usize = 0x68;
    pub const DESCRIPTOR_SIZE: usize = 0xfe;
    pub const BLOCKS_HIGH: usize = 0x150;
    pub const OVERHEAD: usize = 0x248;
    pub const CHECKSUM: usize = 0x3fc;
}

/// Offsets in a descriptor (`struct ext4_group_desc`).
mod group {
    pub const BITMAP: usize = 0x0;
    pub const FREE_BLOCKS: usize = 0xc;
    pub const FREE_INODES: usize = 0xe;
    pub const FLAGS: usize = 0x12;
    pub const BITMAP_SUM: usize = 0x18;
    pub const CHECKSUM: usize = 0x1e;
    pub const BITMAP_SUM_HIGH: usize = 0x38;
    /// Of the flags: the bits were not written, because they can be computed.
    pub const BLOCK_UNINIT: u16 = 2;
}

/// Of the features: checksums of all tables.
const METADATA_CSUM: u32 = 0x400;

/// Cuts the file system in `disk` down to `size` bytes, or a little less where the last
/// group would have no room.
///
/// # Errors
/// A disk that is not as `cargo xtask guest` makes it, or that cannot be written.
pub fn shrink(disk: &File, size: u64) -> Result<()> {
    let mut tables = Tables::read(disk)?;
    tables.cut(size / BLOCK as u64)?;
    tables.write(disk)
}

struct Tables {
    first: Vec<u8>,
    /// The descriptors, in whole blocks.
    descriptors: Vec<u8>,
    /// The bits of the first group, and of the last if that is another.
    bits: Vec<(u64, Vec<u8>)>,
    blocks: u64,
    /// Of each group's inode table and bits.
    overhead: u64,
    /// Of the journal, which is in the first group.
    journal: u64,
    seed: u32,
}

impl Tables {
    fn read(disk: &File) -> Result<Self> {
        let mut first = vec![0; BLOCK];
        disk.read_exact_at(&mut first, 0)?;
        let u16_at = |at: usize| u16::from_le_bytes([first[SUPER + at], first[SUPER + at + 1]]);
        let u32_at = |at: usize| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << 16;
        let is_ours = u16_at(at::MAGIC) == 0xef53
            && u32_at(at::BLOCK_BITS) == 2
            && u64::from(u32_at(at::GROUP_BLOCKS)) == GROUP
            && u32_at(at::RO_FEATURES) & METADATA_CSUM != 0
            && usize::from(u16_at(at::DESCRIPTOR_SIZE)) == DESCRIPTOR
            && u32_at(at::BLOCKS_HIGH) == 0;
        ensure!(is_ours, "the empty disk is not as this program knows it");
        let blocks = u64::from(u32_at(at::BLOCKS));
        let inodes = u64::from(u32_at(at::GROUP_INODES)) * u64::from(u16_at(at::INODE_SIZE));
        let overhead = 2 + inodes / BLOCK as u64;
        let seed = crc32c(!0, &first[SUPER + at::UUID..][..16]);
        let groups = blocks.div_ceil(GROUP) as usize;
        let mut descriptors = vec![0; (groups * DESCRIPTOR).next_multiple_of(BLOCK)];
        disk.read_exact_at(&mut descriptors, BLOCK as u64)?;
        let all = u64::from(u32_at(at::OVERHEAD));
        let of_tables = groups as u64 * overhead + 1 + (descriptors.len() / BLOCK) as u64;
        let journal = all.checked_sub(of_tables);
        let mut tables = Self {
            first,
            descriptors,
            bits: Vec::new(),
            blocks,
            overhead,
            journal: journal.context("the empty disk is not as this program knows it")?,
            seed,
        };
        let mut bits = vec![0; BLOCK];
        let place = tables.bitmap(0);
        disk.read_exact_at(&mut bits, place * BLOCK as u64)?;
        tables.bits.push((place, bits));
        Ok(tables)
    }

    fn cut(&mut self, wanted: u64) -> Result<()> {
        let mut blocks = wanted;
        let last = blocks % GROUP;
        if last > 0 && blocks > GROUP && last < self.overhead + LEAST_ROOM {
            blocks -= last;
        }
        let fits = blocks > self.overhead + self.journal + LEAST_ROOM && blocks <= self.blocks;
        ensure!(fits, "a disk of {blocks} blocks");
        let groups = blocks.div_ceil(GROUP) as usize;
        let before = self.descriptors.len() / BLOCK;
        self.descriptors.truncate(groups * DESCRIPTOR);
        let length = self.descriptors.len().next_multiple_of(BLOCK);
        self.descriptors.resize(length, 0);
        // Blocks of descriptors that are not needed any more.
        for block in 1 + length / BLOCK..=before {
            self.bits[0].1[block / 8] &= !(1 << (block % 8));
        }
        let in_last = blocks - (groups as u64 - 1) * GROUP;
        if groups > 1 {
            let mut bits = vec![0; BLOCK];
            set(&mut bits, 0, self.overhead);
            set(&mut bits, in_last, GROUP);
            self.bits.push((self.bitmap(groups - 1), bits));
            self.describe(groups - 1, 1);
        } else {
            set(&mut self.bits[0].1, in_last, GROUP);
        }
        self.describe(0, 0);
        self.blocks = blocks;
        self.count(groups, length / BLOCK);
        Ok(())
    }

    /// Has a group's descriptor say what its bits do.
    fn describe(&mut self, number: usize, bits: usize) {
        let bits = &self.bits[bits].1;
        let free: u32 = bits.iter().map(|byte| byte.count_zeros()).sum();
        let sum = crc32c(self.seed, bits);
        let entry = &mut self.descriptors[number * DESCRIPTOR..][..DESCRIPTOR];
        let flags = u16::from_le_bytes([entry[group::FLAGS], entry[group::FLAGS + 1]]);
        put(entry, group::FREE_BLOCKS, &(free as u16).to_le_bytes());
        let flags = flags & !group::BLOCK_UNINIT;
        put(entry, group::FLAGS, &flags.to_le_bytes());
        put(entry, group::BITMAP_SUM, &(sum as u16).to_le_bytes());
        let high = (sum >> 16) as u16;
        put(entry, group::BITMAP_SUM_HIGH, &high.to_le_bytes());
        put(entry, group::CHECKSUM, &[0; 2]);
        let own = crc32c(crc32c(self.seed, &(number as u32).to_le_bytes()), entry);
        put(entry, group::CHECKSUM, &(own as u16).to_le_bytes());
    }

    /// Has the superblock say what the groups do.
    fn count(&mut self, groups: usize, descriptor_blocks: usize) {
        let sum = |at: usize| -> u32 {
            let all = self.descriptors.chunks(DESCRIPTOR).take(groups);
            all.map(|entry| u32::from(u16::from_le_bytes([entry[at], entry[at + 1]])))
                .sum()
        };
        let (free_blocks, free_inodes) = (sum(group::FREE_BLOCKS), sum(group::FREE_INODES));
        let sb = &mut self.first[SUPER..][..1024];
        let inodes = u32::from_le_bytes([
            sb[at::GROUP_INODES],
            sb[at::GROUP_INODES + 1],
            sb[at::GROUP_INODES + 2],
            sb[at::GROUP_INODES + 3],
        ]);
        let tables = groups as u64 * self.overhead + 1 + descriptor_blocks as u64;
        let overhead = tables + self.journal;
        for (at, value) in [
            (at::INODES, inodes * groups as u32),
            (at::BLOCKS, self.blocks as u32),
            (at::FREE_BLOCKS, free_blocks),
            (at::FREE_INODES, free_inodes),
            (at::OVERHEAD, overhead as u32),
        ] {
            put(sb, at, &value.to_le_bytes());
        }
        let sum = crc32c(!0, &sb[..at::CHECKSUM]);
        put(sb, at::CHECKSUM, &sum.to_le_bytes());
    }

    /// The block with a group's bits.
    fn bitmap(&self, number: usize) -> u64 {
        let entry = &self.descriptors[number * DESCRIPTOR..][group::BITMAP..];
        u32::from_le_bytes([entry[0], entry[1], entry[2], entry[3]]).into()
    }

    fn write(&self, disk: &File) -> Result<()> {
        disk.set_len(self.blocks * BLOCK as u64)
            .context("cannot cut the disk")?;
        disk.write_all_at(&self.first, 0)?;
        disk.write_all_at(&self.descriptors, BLOCK as u64)?;
        for (place, bits) in &self.bits {
            disk.write_all_at(bits, place * BLOCK as u64)?;
        }
        Ok(())
    }
}

fn put(table: &mut [u8], at: usize, bytes: &[u8]) {
    table[at..at + bytes.len()].copy_from_slice(bytes);
}

fn set(bits: &mut [u8], from: u64, to: u64) {
    for bit in from..to {
        bits[(bit / 8) as usize] |= 1 << (bit % 8);
    }
}

/// CRC-32C as ext4 has it: no bit is turned at either end.
fn crc32c(mut crc: u32, bytes: &[u8]) -> u32 {
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            let carry = if crc & 1 == 1 { 0x82f6_3b78 } else { 0 };
            crc = crc >> 1 ^ carry;
        }
    }
    crc
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;
    use std::process::Command;

    fn run(program: &str, args: &[&str], disk: &Path) -> String {
        let mut command = Command::new(program);
        command.env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin");
        let out = command.args(args).arg(disk).output().expect(program);
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        let errors = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.success(), "{program}: {text} {errors}");
        text
    }

    #[test]
    fn a_smaller_disk_is_sound() {
        assert_eq!(!crc32c(!0, b"123456789"), 0xe306_9283);
        let dir = tempfile::tempdir().expect("a directory");
        for (size, blocks) in [
            (16 << 20, 4096),
            (100 << 20, 25_600),
            (128 << 20, GROUP),
            // No room in the last group.
            ((128 << 20) + 8192, GROUP),
            ((256 << 20) + (5 << 20) + 100, 2 * GROUP + 1280),
            (8 << 30, 64 * GROUP),
            ((8 << 30) + (64 << 20), 64 * GROUP + GROUP / 2),
            ((10 << 30) - 4096, 80 * GROUP - 1),
            (10 << 30, 80 * GROUP),
        ] {
            let path = dir.path().join("disk");
            let disk = File::create(&path).expect("a file");
            disk.set_len(10 << 30).expect("sparse");
            // As in xtask/src/guest.rs.
            let options = "-q -F -t ext4 -b 4096 -m 0 \
                -O ^resize_inode,sparse_super2 -J size=8,location=0 -G 1 \
                -E lazy_itable_init=1,lazy_journal_init=1,nodiscard,root_owner=0:0,num_backup_sb=0";
            let options: Vec<&str> = options.split_whitespace().collect();
            run("mke2fs", &options, &path);
            let disk = File::options().read(true).write(true).open(&path);
            shrink(&disk.expect("opens"), size).expect("shrinks");
            run("e2fsck", &["-fn"], &path);
            let shown = run("dumpe2fs", &["-h"], &path);
            let count = shown.lines().find_map(|l| l.strip_prefix("Block count:"));
            assert_eq!(
                count.map(str::trim),
                Some(&blocks.to_string()[..]),
                "{size}"
            );
            assert_eq!(std::fs::metadata(&path).expect("stat").len(), blocks * 4096);
        }
    }

    #[test]
    fn what_is_not_our_disk_is_left_alone() {
        let disk = tempfile::tempfile().expect("a file");
        disk.set_len(1 << 30).expect("sparse");
        assert!(shrink(&disk, 100 << 20).is_err());
    }
}
