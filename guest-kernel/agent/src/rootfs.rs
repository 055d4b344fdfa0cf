//! The container's root file system: the read-only image, mapped from the root
//! window or read from the first disk, and the writable layer over it.

use crate::mounts::{self, make_directory_with, mount};
use crate::sys;
use crate::volumes;
use rustix::fd::AsFd;
use rustix::io::Errno;
use rustix::mount::MountFlags;
use std::ffi::CString;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::time::Duration;
use vm_run_abi::PAGE_SIZE;
use vm_run_abi::protocol::Writable;

/// Where a guest finds what belongs to its container.
#[derive(Debug, Clone)]
pub struct Disks {
    /// The image: erofs or ext4, never written.
    pub image: String,
    /// The same image once more, if it has been put there, in memory that can be
    /// mapped: see [`find_window`].
    pub window: Option<String>,
    /// For [`Writable::Disk`]: an ext4.
    pub writable: String,
    /// The host's volumes.
    pub volumes: volumes::Source,
}

/// A file system that the agent mounts from a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Erofs,
    Ext4,
}

/// What the start of a disk says: the file system, its size and that of its blocks,
/// in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Superblock {
    kind: Kind,
    size: u64,
    block: u64,
}

/// Both file systems have their superblock at this offset.
const SUPERBLOCK_AT: u64 = 1024;
/// As much of it as is looked at (the rest of the page).
const SUPERBLOCK_LEN: usize = 1024;

impl Superblock {
    /// By Linux fs/erofs/erofs_fs.h (`struct erofs_super_block`) and fs/ext4/ext4.h
    /// (`struct ext4_super_block`).
    fn parse(bytes: &[u8; SUPERBLOCK_LEN]) -> Option<Self> {
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at: usize| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << 16;
        let of = |kind, blocks: u32, bits: u32| {
            let block = 1 << bits;
            let size = u64::from(blocks).checked_mul(block)?;
            Some(Self { kind, size, block })
        };
        if u32_at(0) == 0xe0f5_e1e2 {
            return of(Kind::Erofs, u32_at(36), u32::from(bytes[12]).min(16));
        }
        if u16_at(56) == 0xef53 {
            return of(Kind::Ext4, u32_at(4), 10 + u32_at(24).min(6));
        }
        None
    }
}

/// How long a disk may take to show its size after a fork. Late binding changes
/// the size that the kernel knows, and the kernel hears of it by an interrupt.
const SIZE_PATIENCE: Duration = Duration::from_secs(5);

/// What a look at a disk has found.
enum Look {
    /// A file system that fits the disk.
    Ready(Kind),
    /// The disk is smaller than that: it may grow still.
    Small(String),
}

/// Waits until the disk is as large as its file system says, and returns the
/// file system's kind.
fn probe(disk: &str) -> Result<Kind, String> {
    let pause = Duration::from_millis(2);
    let mut waited = Duration::ZERO;
    loop {
        match look(disk)? {
            Look::Ready(kind) => return Ok(kind),
            Look::Small(why) if waited >= SIZE_PATIENCE => return Err(why),
            Look::Small(_) => std::thread::sleep(pause),
        }
        waited += pause;
    }
}

/// The block device of the root window, and what shows that it can be mapped.
const WINDOW: &str = "/dev/pmem0";
const WINDOW_DAX: &str = "/sys/block/pmem0/queue/dax";
const WINDOW_READAHEAD: &str = "/sys/block/pmem0/queue/read_ahead_kb";
/// Bound to its driver, a device has a link of its name in here.
const WINDOW_DRIVER: &str = "/sys/bus/virtio/drivers/virtio_pmem";

/// How long the kernel may take from the window's driver to its block device, which
/// it makes by itself after the boot.
const WINDOW_PATIENCE: Duration = Duration::from_secs(5);

/// The block device of the root window, for a kernel that has a driver for it and
/// can map files from it. In the parent the window is all zeroes. Nothing of it may
/// be in the page cache at the fork point, so it is not opened here: what the kernel
/// itself has read it has dropped at the last close.
pub fn find_window() -> Result<Option<String>, String> {
    let mut entries = std::fs::read_dir(WINDOW_DRIVER).into_iter().flatten();
    let is_device = |name: &[u8]| name.starts_with(b"virtio");
    if !entries.any(|entry| entry.is_ok_and(|e| is_device(e.file_name().as_encoded_bytes()))) {
        return Ok(None);
    }
    let pause = Duration::from_millis(2);
    let mut waited = Duration::ZERO;
    while !Path::new(WINDOW).exists() {
        if waited >= WINDOW_PATIENCE {
            return Err(format!("the kernel has virtio_pmem and makes no {WINDOW}"));
        }
        std::thread::sleep(pause);
        waited += pause;
    }
    let dax = std::fs::read_to_string(WINDOW_DAX).unwrap_or_default();
    if dax.trim() != "1" {
        return Ok(None);
    }
    // What is not mapped (superblock, inodes, directories) is copied, at no more cost
    // for one page at a time: a page that nobody asks for is not to be a child's own.
    std::fs::write(WINDOW_READAHEAD, "0")
        .map_err(|e| format!("cannot write {WINDOW_READAHEAD}: {e}"))?;
    Ok(Some(WINDOW.to_owned()))
}

/// Mounts the image from the window, if that holds one that can be mapped. `false`:
/// it is to be read from its disk.
fn mount_window(window: &str, target: &str, flags: MountFlags) -> Result<bool, String> {
    let failed = |e: std::io::Error| format!("cannot read {window}: {e}");
    let mut bytes = [0; SUPERBLOCK_LEN];
    File::open(window)
        .and_then(|file| file.read_exact_at(&mut bytes, SUPERBLOCK_AT))
        .map_err(failed)?;
    match Superblock::parse(&bytes) {
        // The monitor has put nothing there, and knows it.
        None if bytes.iter().all(|byte| *byte == 0) => return Ok(false),
        // Linux maps only blocks of a page's size (fs/erofs/super.c).
        Some(found) if found.kind == Kind::Erofs && found.block == PAGE_SIZE => {}
        _ => {
            note("it is no erofs with blocks of a page");
            return Ok(false);
        }
    }
    match mount(window, target, "erofs", flags, c"dax=always") {
        Ok(()) => Ok(true),
        Err(why) => {
            note(&why);
            Ok(false)
        }
    }
}

/// For the kernel's log. Where there is none nobody can be told.
fn note(why: &str) {
    const NOTICE: &str = "<5>";
    let line = format!("{NOTICE}vm-run-agent: the root image is read and not mapped: {why}");
    std::fs::write("/dev/kmsg", line).ok();
}

fn look(disk: &str) -> Result<Look, String> {
    let failed = |e: std::io::Error| format!("cannot read {disk}: {e}");
    let file = File::open(disk).map_err(failed)?;
    let size = sys::block_device_size(file.as_fd()).map_err(failed)?;
    if size < SUPERBLOCK_AT + SUPERBLOCK_LEN as u64 {
        return Ok(Look::Small(format!("{disk} has only {size} bytes")));
    }
    let mut bytes = [0; SUPERBLOCK_LEN];
    file.read_exact_at(&mut bytes, SUPERBLOCK_AT)
        .map_err(failed)?;
    let found =
        Superblock::parse(&bytes).ok_or_else(|| format!("{disk} holds neither erofs nor ext4"))?;
    if size >= found.size {
        return Ok(Look::Ready(found.kind));
    }
    let needed = found.size;
    let why = format!("{disk} has {size} of the {needed} bytes of its file system");
    Ok(Look::Small(why))
}

/// The paths under [`mounts::BASE`].
struct Paths {
    image: String,
    layer: String,
    root: String,
}

fn paths() -> Paths {
    let under = |name: &str| format!("{}/{name}", mounts::BASE);
    Paths {
        image: under("image"),
        layer: under("layer"),
        root: under("root"),
    }
}

/// Makes the directories that [`mount_root`] mounts on.
pub fn make_mount_points() -> Result<(), String> {
    let paths = paths();
    for path in [&paths.image, &paths.layer, &paths.root] {
        make_directory_with(path, 0o755)?;
    }
    Ok(())
}

/// Mounts the root file system, and returns where. To be called in a mount
/// namespace of the container's own. The root is writable still, so that mount
/// points can be made in it, whatever `writable` says: with
/// [`Writable::Nothing`] the caller makes it read-only when they are there.
pub fn mount_root(disks: &Disks, writable: &Writable) -> Result<String, String> {
    let paths = paths();
    mount_image(disks, &paths.image)?;
    mount_layer(disks, writable, &paths.layer)?;
    mount_overlay(&paths)?;
    Ok(paths.root)
}

fn mount_image(disks: &Disks, target: &str) -> Result<(), String> {
    let flags = MountFlags::RDONLY | MountFlags::NOATIME;
    if let Some(window) = &disks.window
        && mount_window(window, target, flags)?
    {
        return Ok(());
    }
    let disk = &disks.image;
    match probe(disk)? {
        Kind::Erofs => mount(disk, target, "erofs", flags, c""),
        // No journal replay: the disk cannot be written.
        Kind::Ext4 => mount(disk, target, "ext4", flags, c"noload"),
    }
}

/// What is written on a root that turns read-only: mount points, and the working
/// directory. A bound, not a reservation.
const MOUNT_POINTS_LIMIT: u64 = 1 << 20;

fn mount_layer(disks: &Disks, writable: &Writable, target: &str) -> Result<(), String> {
    let limit = match writable {
        Writable::Memory { limit } => *limit,
        Writable::Nothing => MOUNT_POINTS_LIMIT,
        Writable::Disk => {
            let disk = &disks.writable;
            if probe(disk)? != Kind::Ext4 {
                return Err(format!("{disk} is to be written and holds no ext4"));
            }
            // A layer may live for a second: no thread zeroes its inode tables, or
            // reads the bitmaps of all its block groups ahead; and none of the tables
            // around an inode is read with it, or kept for attributes that are equal.
            let options =
                c"noinit_itable,no_prefetch_block_bitmaps,inode_readahead_blks=0,nombcache";
            return mount(disk, target, "ext4", MountFlags::NOATIME, options);
        }
    };
    // tmpfs takes a size of zero for "no limit".
    let options =
        CString::new(format!("size={},mode=755", limit.max(4096))).map_err(|e| e.to_string())?;
    mount("tmpfs", target, "tmpfs", MountFlags::NOATIME, &options)
}

fn mount_overlay(paths: &Paths) -> Result<(), String> {
    let Paths { image, layer, root } = paths;
    let (upper, work) = (format!("{layer}/upper"), format!("{layer}/work"));
    make_upper(image, &upper)?;
    make_directory_with(&work, 0o755)?;
    let options = CString::new(format!("lowerdir={image},upperdir={upper},workdir={work}"))
        .map_err(|e| e.to_string())?;
    mount("overlay", root, "overlay", MountFlags::NOATIME, &options)
}

/// Makes the upper directory with owner and mode of the image's root, because
/// the root of an overlay shows those of its upper directory.
fn make_upper(image: &str, upper: &str) -> Result<(), String> {
    match rustix::fs::mkdir(upper, rustix::fs::Mode::RWXU) {
        Ok(()) => {}
        Err(Errno::EXIST) => return Ok(()),
        Err(e) => return Err(format!("cannot make {upper}: {e}")),
    }
    let failed = |e: std::io::Error| format!("cannot copy the mode of {image} to {upper}: {e}");
    let like = std::fs::metadata(image).map_err(failed)?;
    std::os::unix::fs::chown(upper, Some(like.uid()), Some(like.gid())).map_err(failed)?;
    std::fs::set_permissions(upper, like.permissions()).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn superblocks_tell_kind_and_size() {
        let mut erofs = [0; SUPERBLOCK_LEN];
        erofs[0..4].copy_from_slice(&[0xe2, 0xe1, 0xf5, 0xe0]);
        erofs[12] = 12;
        erofs[36..40].copy_from_slice(&100u32.to_le_bytes());
        let found = Superblock::parse(&erofs);
        let expected = |kind, size| {
            let block = 4096;
            Some(Superblock { kind, size, block })
        };
        assert_eq!(found, expected(Kind::Erofs, 100 * 4096));

        let mut ext4 = [0; SUPERBLOCK_LEN];
        ext4[4..8].copy_from_slice(&5000u32.to_le_bytes());
        ext4[24] = 2;
        ext4[56..58].copy_from_slice(&[0x53, 0xef]);
        assert_eq!(Superblock::parse(&ext4), expected(Kind::Ext4, 5000 * 4096));

        assert_eq!(Superblock::parse(&[0; SUPERBLOCK_LEN]), None);
        assert!(Superblock::parse(&[0xff; SUPERBLOCK_LEN]).is_none());
    }
}
