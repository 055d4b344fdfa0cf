//! The container's root file system: the read-only image, mapped from the root
//! window or read from the first disk, and the writable layer over it.

use crate::mounts::{self, make_directory_with, mount};
use crate::volumes;
use rustix::fd::OwnedFd;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::MountFlags;
use std::ffi::CString;
use std::os::unix::fs::MetadataExt;
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
    /// For [`Writable::Disk`]: an ext4.
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
pub fn mount_root(disks: &Disks, container: &ContainerSpec) -> Result<String, String> {
    let paths = paths();
    mount_image(disks, container.mapped_root, &paths.image)?;
    mount_layer(disks, &container.writable, &paths.layer)?;
    mount_overlay(&paths)?;
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
        Writable::Disk => {
            // A layer may live for a second: no thread zeroes its inode tables, or
            // reads the bitmaps of all its block groups ahead; and none of the tables
            // around an inode is read with it, or kept for attributes that are equal.
            let options =
                c"noinit_itable,no_prefetch_block_bitmaps,inode_readahead_blks=0,nombcache";
            let disk = &disks.writable;
            return mount(disk, target, "ext4", MountFlags::NOATIME, options)
                .map_err(|why| format!("the writable disk holds no ext4: {why}"));
        }
    };
    // tmpfs takes a size of zero for "no limit".
    let options =
        CString::new(format!("size={},mode=755", limit.max(4096))).map_err(|e| e.to_string())?;
    mount("tmpfs", target, "tmpfs", MountFlags::NOATIME, &options)
}

fn mount_overlay(paths: &Paths) -> Result<(), String> {
    let Paths { image, layer, root } = paths;
    let (upper, work) = (upper(layer), format!("{layer}/work"));
    make_upper(image, &upper)?;
    make_directory_with(&work, 0o755)?;
    let options = CString::new(format!("lowerdir={image},upperdir={upper},workdir={work}"))
        .map_err(|e| e.to_string())?;
    mount("overlay", root, "overlay", MountFlags::NOATIME, &options)
}

/// Makes the upper directory with owner and mode of the image's root, because
/// the root of an overlay shows those of its upper directory.
fn make_upper(image: &str, upper: &str) -> Result<(), String> {
    match rustix::fs::mkdir(upper, Mode::RWXU) {
        Ok(()) => {}
        Err(Errno::EXIST) => return Ok(()),
        Err(e) => return Err(format!("cannot make {upper}: {e}")),
    }
    let failed = |e: std::io::Error| format!("cannot copy the mode of {image} to {upper}: {e}");
    let like = std::fs::metadata(image).map_err(failed)?;
    std::os::unix::fs::chown(upper, Some(like.uid()), Some(like.gid())).map_err(failed)?;
    std::fs::set_permissions(upper, like.permissions()).map_err(failed)
}
