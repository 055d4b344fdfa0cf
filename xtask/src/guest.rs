//! `cargo xtask guest`: kernel, agent and the empty writable disk, in one
//! directory of the cache, where vm-run finds them.

use crate::{agent, host, kernel};
use anyhow::{Context, Result};
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use sha2::{Digest, Sha256};
use std::fs;
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The size of a container's writable layer. A sparse file: what is not written
/// takes no room.
const WRITABLE_BYTES: u64 = 10 << 30;

/// How the empty disk is made: an ext4 with a journal, for it outlives whatever kills its
/// guest, and nobody ever checks it; a small one, in the first group, where a smaller
/// disk has it too (src/disk/ext4.rs). Nothing is written that can be written later, and
/// there are no copies of the superblock, so that the list of its blocks is short. No
/// flexible groups (-G 1): with the first file the kernel reads the bitmaps of a whole
/// one, and keeps two pages for each of its groups, in every child.
const MKE2FS: &[&str] = &[
    "-q",
    "-F",
    "-t",
    "ext4",
    "-b",
    "4096",
    "-m",
    "0",
    "-O",
    "^resize_inode,sparse_super2",
    "-J",
    "size=8,location=0",
    "-G",
    "1",
    "-E",
    "lazy_itable_init=1,lazy_journal_init=1,nodiscard,root_owner=0:0,num_backup_sb=0",
    // The same bytes at every build.
    "-U",
    "6e1f8a3c-0000-4000-8000-766d2d72756e",
    "-L",
    "writable",
];

/// The files of a guest.
pub const FILES: [&str; 4] = ["vmlinux", "initramfs", "writable.blocks", "digest"];

/// Builds what is missing and returns the directory. `current` beside it points
/// to it.
pub fn ensure() -> Result<PathBuf> {
    let kernel = kernel::ensure()?;
    let initramfs = agent::ensure()?;
    let parts = [&kernel, &initramfs]
        .map(|path| fs::read(path).with_context(|| format!("cannot read {}", path.display())));
    let [kernel_bytes, initramfs_bytes] = parts;
    let (kernel_bytes, initramfs_bytes) = (kernel_bytes?, initramfs_bytes?);
    let all = host::cache_dir()?.join("guest");
    let name = host::key(&[
        &kernel_bytes,
        &initramfs_bytes,
        &WRITABLE_BYTES.to_le_bytes(),
        MKE2FS.join(" ").as_bytes(),
    ]);
    let dir = all.join(&name);
    if !dir.is_dir() {
        let unfinished = all.join(format!(".{name}.{}", std::process::id()));
        fs::create_dir_all(&unfinished)
            .with_context(|| format!("cannot make {}", unfinished.display()))?;
        fs::write(unfinished.join("vmlinux"), &kernel_bytes)?;
        fs::write(unfinished.join("initramfs"), &initramfs_bytes)?;
        let disk = empty_disk(&unfinished)?;
        fs::write(unfinished.join("writable.blocks"), &disk)?;
        fs::write(
            unfinished.join("digest"),
            digest(&[&kernel_bytes, &initramfs_bytes, &disk]),
        )?;
        // Another process may have been faster: its directory is the same.
        if let Err(error) = fs::rename(&unfinished, &dir)
            && !dir.is_dir()
        {
            return Err(error).with_context(|| format!("cannot make {}", dir.display()));
        }
    }
    point_to(&all.join("current"), &name)?;
    Ok(dir)
}

/// The digest that vm-run computes of the files: see `fork::Guest::digest`.
fn digest(files: &[&[u8]]) -> String {
    let mut all = Sha256::new();
    for file in files {
        all.update(Sha256::digest(file));
    }
    all.finalize().iter().map(|b| format!("{b:02x}")).collect()
}

/// An empty ext4, as the list of its blocks that fork/src/disk.rs reads.
fn empty_disk(dir: &Path) -> Result<Vec<u8>> {
    host::apt_install(&["e2fsprogs"])?;
    let path = dir.join("ext4");
    fs::File::create(&path)?.set_len(WRITABLE_BYTES)?;
    host::run(
        Command::new("mke2fs")
            .args(MKE2FS)
            .arg(&path)
            .env("E2FSPROGS_FAKE_TIME", "1")
            .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
            .stdout(Stdio::null()),
    )?;
    let blocks = written_blocks(&fs::File::open(&path)?)?;
    fs::remove_file(&path)?;
    Ok(blocks)
}

/// The blocks that are not all zeroes. Only where the file has data is it read
/// (lseek(2), SEEK_DATA): the rest of its gigabytes are holes.
fn written_blocks(disk: &fs::File) -> Result<Vec<u8>> {
    let mut list = b"vmrunblk".to_vec();
    list.extend(WRITABLE_BYTES.to_le_bytes());
    let mut block = [0; 4096];
    let step = block.len() as u64;
    let mut at = 0;
    loop {
        let start = match seek(disk, SeekFrom::Data(at)) {
            Ok(start) => start / step * step,
            // No data from there on.
            Err(Errno::NXIO) => return Ok(list),
            Err(error) => return Err(error).context("cannot look for the disk's data"),
        };
        at = seek(disk, SeekFrom::Hole(start)).context("cannot look for the disk's holes")?;
        for offset in (start..at).step_by(block.len()) {
            disk.read_exact_at(&mut block, offset)?;
            if block.iter().any(|byte| *byte != 0) {
                list.extend(offset.to_le_bytes());
                list.extend(block);
            }
        }
    }
}

fn point_to(link: &Path, target: &str) -> Result<()> {
    let unfinished = link.with_extension(std::process::id().to_string());
    symlink(target, &unfinished)
        .and_then(|()| fs::rename(&unfinished, link))
        .with_context(|| format!("cannot make {}", link.display()))
}
