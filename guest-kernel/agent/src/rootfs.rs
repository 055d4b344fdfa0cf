//! The container's root file system: the read-only image, mapped from the root
//! window or read from the first disk, and the writable layer over it.
//!
//! An empty layer is mounted before the fork point: what a mount costs, a template pays
//! once. A child's disk goes on where that one was at the freeze, if the host has put it
//! there; any other layer is mounted over it.

use crate::mounts::{self, make_directory_with, mount};
use crate::volumes;
use rustix::fd::OwnedFd;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::MountFlags;
use std::ffi::CString;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::time::Duration;
use vm_run_abi::protocol::{ContainerSpec, Writable};

/// Where a guest finds what belongs to its container.
#[derive(Debug, Clone)]
pub struct Disks {
    /// The image: erofs or ext4, never written.
    pub image: String,
    /// The same image once more, if it has been put there, in memory that can be
    /// mapped: see [`find_window`].
    pub window: Option<String>,
    /// For [`Writable::Disk`]: an empty ext4, if the host has one for its templates; see
    /// [`mount_empty`].
    pub mounted: String,
    /// Any other disk for [`Writable::Disk`]: an ext4.
    pub writable: String,
    /// The host's volumes.
    pub volumes: volumes::Source,
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
    // The node comes before what the queue says of itself (Linux block/genhd.c,
    // device_add_disk).
    while !(Path::new(WINDOW).exists() && Path::new(WINDOW_DAX).exists()) {
        if waited >= WINDOW_PATIENCE {
            return Err(format!("the kernel has virtio_pmem and makes no {WINDOW}"));
        }
        std::thread::sleep(pause);
        waited += pause;
    }
    let dax = std::fs::read_to_string(WINDOW_DAX)
        .map_err(|e| format!("cannot read {WINDOW_DAX}: {e}"))?;
    if dax.trim() != "1" {
        return Ok(None);
    }
    // What is not mapped (superblock, inodes, directories) is copied, at no more cost
    // for one page at a time: a page that nobody asks for is not to be a child's own.
    std::fs::write(WINDOW_READAHEAD, "0")
        .map_err(|e| format!("cannot write {WINDOW_READAHEAD}: {e}"))?;
    Ok(Some(WINDOW.to_owned()))
}

/// For the kernel's log. Where there is none nobody can be told.
fn note(why: &str) {
    const NOTICE: &str = "<5>";
    let line = format!("{NOTICE}vm-run-agent: the root image is read and not mapped: {why}");
    std::fs::write("/dev/kmsg", line).ok();
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

/// What a container's root is put together of, and what is not seen in it. Each stands
/// for its directory only: whoever looks opens it anew.
#[derive(Debug)]
pub struct Layers {
    /// What the container has written.
    pub upper: OwnedFd,
    /// Its image.
    pub image: OwnedFd,
}

impl Layers {
    /// Of the root that [`mount_root`] has mounted a moment ago.
    pub fn open() -> Result<Self, String> {
        let paths = paths();
        let open = |path: &str| {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let opened = rustix::fs::open(path, flags, Mode::empty());
            opened.map_err(|e| format!("cannot open {path}: {e}"))
        };
        Ok(Self {
            upper: open(&upper(&paths.layer))?,
            image: open(&paths.image)?,
        })
    }
}

fn upper(layer: &str) -> String {
    format!("{layer}/upper")
}

fn work(layer: &str) -> String {
    format!("{layer}/work")
}

/// Of the upper directory: that of most images' root.
const UPPER_MODE: u32 = 0o755;

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
/// points can be made in it, whatever the container's layer is: with
/// [`Writable::Nothing`] the caller makes it read-only when they are there.
///
/// No disk is looked at before it is mounted: whatever a child reads twice is copied
/// twice.
pub fn mount_root(
    disks: &Disks,
    container: &ContainerSpec,
    empty: Option<&Empty>,
) -> Result<String, String> {
    let paths = paths();
    mount_image(disks, container.mapped_root, &paths.image)?;
    match (&container.writable, container.mounted_disk, empty) {
        (Writable::Disk, true, Some(_)) => {}
        (Writable::Disk, true, None) => {
            return Err("the host takes a disk for mounted that is not".to_owned());
        }
        (writable, ..) => mount_layer(disks, writable, &paths.layer)?,
    }
    mount_overlay(&paths, container.mounted_disk)?;
    Ok(paths.root)
}

fn mount_image(disks: &Disks, is_mapped: bool, target: &str) -> Result<(), String> {
    let flags = MountFlags::RDONLY | MountFlags::NOATIME;
    if let Some(window) = disks.window.as_ref().filter(|_| is_mapped) {
        match mount(window, target, "erofs", flags, c"dax=always") {
            Ok(()) => return Ok(()),
            // An ext4, as a rule.
            Err(why) => note(&why),
        }
    }
    let disk = &disks.image;
    let Err(no_erofs) = mount(disk, target, "erofs", flags, c"") else {
        return Ok(());
    };
    // No journal replay: the disk cannot be written.
    mount(disk, target, "ext4", flags, c"noload").map_err(|no_ext4| {
        format!("the root image is neither erofs nor ext4: {no_erofs}; {no_ext4}")
    })
}

/// What is written on a root that turns read-only: mount points, and the working
/// directory. A bound, not a reservation.
const MOUNT_POINTS_LIMIT: u64 = 1 << 20;

fn mount_layer(disks: &Disks, writable: &Writable, target: &str) -> Result<(), String> {
    let limit = match writable {
        Writable::Memory { limit } => *limit,
        Writable::Nothing => MOUNT_POINTS_LIMIT,
        Writable::Disk => return mount_disk(&disks.writable, target),
    };
    // tmpfs takes a size of zero for "no limit".
    let options =
        CString::new(format!("size={},mode=755", limit.max(4096))).map_err(|e| e.to_string())?;
    mount("tmpfs", target, "tmpfs", MountFlags::NOATIME, &options)
}

fn mount_disk(disk: &str, target: &str) -> Result<(), String> {
    // A layer may live for a second: no thread zeroes its inode tables, or reads the
    // bitmaps of all its block groups ahead; and none of the tables around an inode is
    // read with it, or kept for attributes that are equal.
    let options = c"noinit_itable,no_prefetch_block_bitmaps,inode_readahead_blks=0,nombcache";
    mount(disk, target, "ext4", MountFlags::NOATIME, options)
        .map_err(|why| format!("the writable disk holds no ext4: {why}"))
}

/// The empty layer, which is mounted. Held, it stays so to the end of the guest: what
/// goes with the last mount of a file system is written to its disk, and the disk of a
/// child with another layer is none.
#[derive(Debug)]
pub struct Empty(pub OwnedFd);

/// Mounts the empty layer, if there is one, and makes the directories in it that
/// overlayfs works with. Before the fork point, in the mount namespace of the container;
/// the mount points are there.
pub fn mount_empty(disks: &Disks) -> Result<Option<Empty>, String> {
    if !holds_ext4(&disks.mounted)? {
        return Ok(None);
    }
    let paths = paths();
    let layer = &paths.layer;
    mount_disk(&disks.mounted, layer)?;
    make_directory_with(&upper(layer), UPPER_MODE)?;
    make_directory_with(&work(layer), 0o755)?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let failed = |e: Errno| format!("cannot settle the empty disk: {e}");
    let held = rustix::fs::open(layer, flags, Mode::empty()).map_err(failed)?;
    // Nothing is to be left that every child would write.
    rustix::fs::syncfs(&held).map_err(failed)?;
    Ok(Some(Empty(held)))
}

/// Whether a disk has what an ext4 begins with: in its superblock at 1024, the number at
/// 0x38 (Linux Documentation/filesystems/ext4/super.rst).
fn holds_ext4(disk: &str) -> Result<bool, String> {
    const MAGIC_AT: u64 = 1024 + 0x38;
    const MAGIC: [u8; 2] = 0xef53_u16.to_le_bytes();
    let mut found = [0; 2];
    File::open(disk)
        .and_then(|file| file.read_exact_at(&mut found, MAGIC_AT))
        .map_err(|e| format!("cannot read {disk}: {e}"))?;
    Ok(found == MAGIC)
}

fn mount_overlay(paths: &Paths, is_empty: bool) -> Result<(), String> {
    let Paths { image, layer, root } = paths;
    let (upper, work) = (upper(layer), work(layer));
    make_upper(image, &upper, is_empty)?;
    make_directory_with(&work, 0o755)?;
    let options = CString::new(format!("lowerdir={image},upperdir={upper},workdir={work}"))
        .map_err(|e| e.to_string())?;
    mount("overlay", root, "overlay", MountFlags::NOATIME, &options)
}

/// Makes the upper directory with owner and mode of the image's root, because
/// the root of an overlay shows those of its upper directory. One that is there has
/// what the container gave it, unless the layer is the empty one.
fn make_upper(image: &str, upper: &str, is_empty: bool) -> Result<(), String> {
    match rustix::fs::mkdir(upper, Mode::RWXU) {
        Ok(()) => {}
        Err(Errno::EXIST) if is_empty => {}
        Err(Errno::EXIST) => return Ok(()),
        Err(e) => return Err(format!("cannot make {upper}: {e}")),
    }
    let failed = |e: std::io::Error| format!("cannot copy the mode of {image} to {upper}: {e}");
    let like = std::fs::metadata(image).map_err(failed)?;
    let now = std::fs::metadata(upper).map_err(failed)?;
    if (like.uid(), like.gid()) != (now.uid(), now.gid()) {
        std::os::unix::fs::chown(upper, Some(like.uid()), Some(like.gid())).map_err(failed)?;
    }
    if like.permissions() == now.permissions() {
        return Ok(());
    }
    std::fs::set_permissions(upper, like.permissions()).map_err(failed)
}
