//! Mounting with errors that name source, target and reason; and the guest's own
//! mounts, made at boot.

use rustix::fd::OwnedFd;
use rustix::fs::{FileType, Mode, OFlags, makedev, mkdir, mknodat, open};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};
use std::ffi::CStr;
use std::fs;
use std::io::ErrorKind;
use std::path::Path;

/// Where the agent keeps the mounts that it makes a root file system from.
pub const BASE: &str = "/mnt";

/// The cgroup file system of the guest.
pub const CGROUPS: &str = "/sys/fs/cgroup";

/// mount(2).
pub fn mount(
    source: &str,
    target: &str,
    kind: &str,
    flags: MountFlags,
    options: &CStr,
) -> Result<(), String> {
    rustix::mount::mount(source, target, kind, flags, Some(options)).map_err(|e| {
        let options = options.to_string_lossy();
        let with = if options.is_empty() { "" } else { " with " };
        format!("cannot mount {kind} from {source} on {target}{with}{options}: {e}")
    })
}

/// A bind mount of a file or a directory.
pub fn bind(source: &str, target: &str) -> Result<(), String> {
    rustix::mount::mount_bind(source, target)
        .map_err(|e| format!("cannot bind {source} on {target}: {e}"))
}

/// Makes the mount at `target` read-only, and nothing else on that file system.
pub fn make_read_only(target: &str, flags: MountFlags) -> Result<(), String> {
    let flags = MountFlags::BIND | MountFlags::RDONLY | flags;
    rustix::mount::mount_remount(target, flags, c"")
        .map_err(|e| format!("cannot make {target} read-only: {e}"))
}

/// Takes the mount at `target` out of the tree, now or when its users are gone.
pub fn detach(target: &str) -> Result<(), String> {
    rustix::mount::unmount(target, UnmountFlags::DETACH)
        .map_err(|e| format!("cannot unmount {target}: {e}"))
}

/// Makes a directory and its parents, if they are missing.
pub fn make_directory(path: &str) -> Result<(), String> {
    fs::create_dir_all(path).map_err(|e| format!("cannot make {path}: {e}"))
}

/// A mount that the guest's boot makes, and the kernel option that it needs.
struct BootMount {
    kind: &'static str,
    target: &'static str,
    option: &'static str,
}

/// What is mounted at boot after /dev, in this order.
const BOOT_MOUNTS: [BootMount; 3] = [
    BootMount {
        kind: "proc",
        target: "/proc",
        option: "CONFIG_PROC_FS",
    },
    BootMount {
        kind: "sysfs",
        target: "/sys",
        option: "CONFIG_SYSFS",
    },
    BootMount {
        kind: "cgroup2",
        target: CGROUPS,
        option: "CONFIG_CGROUPS",
    },
];

const LOCKED: MountFlags = MountFlags::NOSUID
    .union(MountFlags::NOEXEC)
    .union(MountFlags::NODEV);

/// Puts a mount over the initramfs that shows the same files. The initramfs is
/// the root of all mounts and cannot be the old root of pivot_root(2); a mount
/// on top of it can.
pub fn cover_initramfs() -> Result<(), String> {
    bind("/", BASE)?;
    let step = |what: &str, result: rustix::io::Result<()>| {
        result.map_err(|e| format!("cannot {what} over the initramfs: {e}"))
    };
    step("change directory", rustix::process::chdir(BASE))?;
    step("move a mount", rustix::mount::mount_move(".", "/"))?;
    step("change root", rustix::process::chroot("."))
}

/// Mounts /dev. Without a devtmpfs it makes the nodes that are needed to say so:
/// `false` then.
pub fn mount_dev() -> Result<bool, String> {
    let error = match mount("devtmpfs", "/dev", "devtmpfs", MountFlags::NOSUID, c"") {
        Ok(()) => return Ok(true),
        Err(e) => e,
    };
    make_device("/dev/mem", 1, 1, 0o600)
        .map(|()| false)
        .map_err(|e| format!("{error}; {e}"))
}

/// Mounts the rest; returns the options that the kernel turned out to lack.
pub fn mount_guest() -> Vec<&'static str> {
    let failed = |m: &&BootMount| mount(m.kind, m.target, m.kind, LOCKED, c"").is_err();
    BOOT_MOUNTS
        .iter()
        .filter(failed)
        .map(|m| m.option)
        .collect()
}

/// Lets cgroups have every controller that the kernel has.
pub fn enable_controllers() -> Result<(), String> {
    let all = fs::read_to_string(format!("{CGROUPS}/cgroup.controllers"))
        .map_err(|e| format!("cannot read the cgroup controllers: {e}"))?;
    for controller in all.split_whitespace() {
        fs::write(
            format!("{CGROUPS}/cgroup.subtree_control"),
            format!("+{controller}"),
        )
        .map_err(|e| format!("cannot enable the cgroup controller {controller}: {e}"))?;
    }
    Ok(())
}

/// Makes a cgroup, and returns its directory.
pub fn make_cgroup(name: &str) -> Result<OwnedFd, String> {
    let path = format!("{CGROUPS}/{name}");
    make_directory(&path)?;
    let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
    open(&path, flags, Mode::empty()).map_err(|e| format!("cannot open {path}: {e}"))
}

/// Makes a character device node with exactly this mode; one that is there stays.
pub fn make_device(path: &str, major: u32, minor: u32, mode: u32) -> Result<(), String> {
    let mode = Mode::from_raw_mode(mode);
    let device = makedev(major, minor);
    match mknodat(
        rustix::fs::CWD,
        path,
        FileType::CharacterDevice,
        mode,
        device,
    ) {
        Ok(()) => rustix::fs::chmod(path, mode),
        Err(Errno::EXIST) => Ok(()),
        Err(e) => Err(e),
    }
    .map_err(|e| format!("cannot make the device {path}: {e}"))
}

/// Makes a single directory with exactly this mode; one that is there stays.
pub fn make_directory_with(path: &str, mode: u32) -> Result<(), String> {
    match mkdir(path, Mode::from_raw_mode(mode)) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(e) => Err(format!("cannot make {path}: {e}")),
    }
}

/// Makes an empty regular file to mount something over, in the place of a link
/// (never through it); a regular file that is there stays.
pub fn make_file_for_mount(path: &str) -> Result<(), String> {
    let failed = |e: std::io::Error| format!("cannot make {path}: {e}");
    match fs::symlink_metadata(path) {
        Ok(found) if found.is_file() => return Ok(()),
        Ok(found) if found.is_symlink() => fs::remove_file(path).map_err(failed)?,
        Ok(_) => return Err(format!("{path} in the image is neither a file nor a link")),
        Err(e) if e.kind() == ErrorKind::NotFound => {}
        Err(e) => return Err(failed(e)),
    }
    if let Some(parent) = Path::new(path).parent().and_then(Path::to_str) {
        make_directory(parent)?;
    }
    fs::write(path, "").map_err(failed)
}
