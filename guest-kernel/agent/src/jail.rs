//! What surrounds the container's process: its view of the file system, as
//! docker gives it by default (moby oci/defaults.go).
//!
//! Everything here runs in the new process, after its root file system has been
//! mounted. Paths are resolved only once that is the root, so that a link in an
//! image leads nowhere else.

use crate::mounts::{
    bind, detach, make_device, make_directory, make_directory_with, make_file_for_mount,
    make_read_only, mount,
};
use crate::names::Names;
use rustix::fd::OwnedFd;
use rustix::fs::CWD;
use rustix::mount::{MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

/// Files that the guest writes and the container finds in /etc.
#[derive(Debug)]
pub struct GeneratedFiles {
    names: Names,
    /// A mount of each, and where it goes.
    mounts: [(&'static str, OwnedFd); 2],
}

/// Where the files are written; a file system of its own, seen by nobody else.
const GENERATED: &str = "/mnt/files";

/// Keeps mounts made here from everybody else, and the other way round.
pub fn make_mounts_private() -> Result<(), String> {
    let flags = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", flags).map_err(|e| format!("cannot make mounts private: {e}"))
}

/// Writes the generated files, and takes a mount of each that outlives the
/// change of the root.
pub fn generate_files(hostname: &str) -> Result<GeneratedFiles, String> {
    make_directory_with(GENERATED, 0o755)?;
    mount(
        "tmpfs",
        GENERATED,
        "tmpfs",
        MountFlags::NOATIME,
        c"size=64k,mode=755",
    )?;
    let names = Names::make(GENERATED, hostname)
        .map_err(|e| format!("cannot make the files with the hostname: {e}"))?;
    let tree = |target: &'static str, name: &str| {
        let path = format!("{GENERATED}/{name}");
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        rustix::mount::open_tree(CWD, &path, flags)
            .map(|tree| (target, tree))
            .map_err(|e| format!("cannot make {target}: {e}"))
    };
    let mounts = [
        tree("/etc/hostname", "hostname")?,
        tree("/etc/hosts", "hosts")?,
    ];
    Ok(GeneratedFiles { names, mounts })
}

/// Makes the mount at `root` the root, and drops the old one with all of its
/// mounts. The old root is put under the new one's root for a moment and is on
/// top there (pivot_root(2), "pivot_root(".", ".")").
pub fn enter(root: &str) -> Result<(), String> {
    let failed = |what: &str| {
        let what = format!("cannot {what} {root}");
        move |e: rustix::io::Errno| format!("{what}: {e}")
    };
    rustix::process::chdir(root).map_err(failed("enter"))?;
    rustix::process::pivot_root(".", ".").map_err(failed("make a root of"))?;
    detach(".")?;
    rustix::process::chdir("/").map_err(failed("stand in the root of"))
}

const PLAIN: MountFlags = MountFlags::NOSUID
    .union(MountFlags::NOEXEC)
    .union(MountFlags::NODEV);

/// Mounts what a container finds beside its image.
pub fn mount_system() -> Result<(), String> {
    let on = |target: &str, kind: &str, flags: MountFlags, options| {
        make_directory(target)?;
        mount(kind, target, kind, flags, options)
    };
    on("/proc", "proc", PLAIN, c"")?;
    let dev = MountFlags::NOSUID | MountFlags::STRICTATIME;
    on("/dev", "tmpfs", dev, c"mode=755,size=65536k")?;
    let pts = MountFlags::NOSUID | MountFlags::NOEXEC;
    let pts_options = c"newinstance,ptmxmode=0666,mode=0620,gid=5";
    on("/dev/pts", "devpts", pts, pts_options)?;
    on("/dev/shm", "tmpfs", PLAIN, c"mode=1777,size=65536k")?;
    on("/dev/mqueue", "mqueue", PLAIN, c"")?;
    let sys = PLAIN | MountFlags::RDONLY;
    on("/sys", "sysfs", sys, c"")?;
    mount("cgroup2", "/sys/fs/cgroup", "cgroup2", sys, c"")?;
    fill_dev()
}

fn fill_dev() -> Result<(), String> {
    for (name, major, minor) in [
        ("null", 1, 3),
        ("zero", 1, 5),
        ("full", 1, 7),
        ("random", 1, 8),
        ("urandom", 1, 9),
        ("tty", 5, 0),
    ] {
        make_device(&format!("/dev/{name}"), major, minor, 0o666)?;
    }
    for (name, target) in [
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
        ("core", "/proc/kcore"),
        ("ptmx", "pts/ptmx"),
    ] {
        symlink(target, format!("/dev/{name}"))
            .map_err(|e| format!("cannot make /dev/{name}: {e}"))?;
    }
    Ok(())
}

impl GeneratedFiles {
    /// Puts the files where the container finds them, and returns them open.
    pub fn place(self) -> Result<Names, String> {
        for (target, tree) in self.mounts {
            make_file_for_mount(target)?;
            let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
            rustix::mount::move_mount(&tree, "", CWD, target, flags)
                .map_err(|e| format!("cannot mount {target}: {e}"))?;
        }
        Ok(self.names)
    }
}

/// Shows the container's terminal as its console.
pub fn bind_console(terminal: &str) -> Result<(), String> {
    make_file_for_mount("/dev/console")?;
    bind(terminal, "/dev/console")
}

/// Hidden from the container: what speaks of the whole machine.
const MASKED: [&str; 12] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
];

/// Shown to the container and not to be changed by it.
const READ_ONLY: [&str; 5] = [
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];

/// Hides and locks the paths above, as far as the kernel has them.
pub fn protect_system() -> Result<(), String> {
    for path in READ_ONLY
        .into_iter()
        .filter(|path| Path::new(path).exists())
    {
        bind(path, path)?;
        make_read_only(path, PLAIN)?;
    }
    for path in MASKED {
        match fs::metadata(path) {
            Ok(found) if found.is_dir() => {
                mount("tmpfs", path, "tmpfs", MountFlags::RDONLY, c"size=4k")?;
            }
            Ok(_) => bind("/dev/null", path)?,
            Err(_) => {}
        }
    }
    Ok(())
}
