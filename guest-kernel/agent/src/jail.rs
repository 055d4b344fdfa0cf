//! What surrounds the container's process: its view of the file system, as
//! docker gives it by default (moby oci/defaults.go).
//!
//! Everything here runs in the first process. What does not depend on the image is put
//! together before the fork point, on a file system of its own. Paths of the container
//! are resolved only once its root is the root, so that a link in an image leads
//! nowhere else.

use crate::mounts::{
    bind, detach, make_device, make_directory, make_directory_with, make_file_for_mount,
    make_read_only, mount,
};
use crate::names::Names;
use rustix::fd::OwnedFd;
use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::{MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use vm_run_abi::options::ContainerOptions;

/// What a container finds beside its image, as trees of mounts that lie nowhere yet.
#[derive(Debug)]
pub struct System {
    names: Names,
    /// Each with the place where it goes.
    directories: [(&'static str, OwnedFd); 2],
    /// /sys, which shows the network of whoever has mounted it: the guest's, and that of
    /// a container without one.
    sys: [OwnedFd; 2],
    files: [(&'static str, OwnedFd); 3],
    machine_id: OwnedFd,
}

/// Where the trees are put together; a file system of its own, seen by nobody else.
/// The files that the guest writes stay on it.
const SYSTEM: &str = "/mnt/system";

const MACHINE_ID: &str = "/etc/machine-id";

/// The path of the container's `path` while the trees are there.
fn under(path: &str) -> String {
    format!("{SYSTEM}{path}")
}

/// Where /sys is put together that shows the guest's network.
const GUEST_SYS: &str = "/guest-sys";

/// Keeps mounts made here from everybody else, and the other way round.
pub fn make_mounts_private() -> Result<(), String> {
    let flags = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", flags).map_err(|e| format!("cannot make mounts private: {e}"))
}

impl System {
    /// Puts it together. To be called by the first process of the container's
    /// namespaces, for whose eyes its file systems are. `leave` moves it from the guest's
    /// network into one of its own.
    pub fn prepare(leave: impl FnOnce() -> Result<(), String>) -> Result<Self, String> {
        make_directory_with(SYSTEM, 0o755)?;
        let options = c"size=64k,mode=755";
        mount("tmpfs", SYSTEM, "tmpfs", MountFlags::NOATIME, options)?;
        let names = Names::make(SYSTEM)
            .map_err(|e| format!("cannot make the files with the hostname: {e}"))?;
        fs::write(under("/resolv.conf"), "")
            .map_err(|e| format!("cannot make a resolv.conf: {e}"))?;
        mount_sys(GUEST_SYS)?;
        leave()?;
        mount_system()?;
        fill_dev()?;
        protect_system()?;
        let system = Self {
            names,
            directories: [("/proc", take("/proc")?), ("/dev", take("/dev")?)],
            sys: [take("/sys")?, take(GUEST_SYS)?],
            files: [
                ("/etc/hostname", take("/hostname")?),
                ("/etc/hosts", take("/hosts")?),
                ("/etc/resolv.conf", take("/resolv.conf")?),
            ],
            machine_id: take("/machine-id")?,
        };
        detach(SYSTEM)?;
        Ok(system)
    }

    /// Of which it places one only: the other is to be held by the agent, or it is taken
    /// apart.
    pub fn views(&self) -> &[OwnedFd] {
        &self.sys
    }

    /// Puts it where the container finds it, in a root that is the root by now, and
    /// returns the files with the hostname, open.
    /// With a network it is in the guest's.
    pub fn place(
        self,
        hostname: &str,
        network: bool,
        options: &ContainerOptions,
    ) -> Result<Names, String> {
        self.names
            .write(hostname, &options.domainname, &options.hosts)
            .map_err(|e| format!("cannot write the files with the hostname: {e}"))?;
        let [own_sys, guest_sys] = self.sys;
        let sys = if network { guest_sys } else { own_sys };
        for (target, tree) in self.directories.into_iter().chain([("/sys", sys)]) {
            make_directory(target)?;
            put(&tree, target, MoveMountFlags::MOVE_MOUNT_T_SYMLINKS)?;
        }
        for (target, tree) in self.files {
            make_file_for_mount(target)?;
            put(&tree, target, MoveMountFlags::empty())?;
        }
        // An image without one stays so.
        if fs::symlink_metadata(MACHINE_ID).is_ok_and(|found| found.is_file()) {
            let drawn = self.names.draw_machine_id();
            drawn.map_err(|e| format!("cannot draw {MACHINE_ID}: {e}"))?;
            put(&self.machine_id, MACHINE_ID, MoveMountFlags::empty())?;
        }
        Ok(self.names)
    }
}

/// A copy of the tree of mounts at a path under [`SYSTEM`].
fn take(path: &str) -> Result<OwnedFd, String> {
    let path = under(path);
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_RECURSIVE;
    rustix::mount::open_tree(CWD, &path, flags)
        .map_err(|e| format!("cannot take the mounts at {path}: {e}"))
}

fn put(tree: &OwnedFd, target: &str, flags: MoveMountFlags) -> Result<(), String> {
    let flags = flags | MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    rustix::mount::move_mount(tree, "", CWD, target, flags)
        .map_err(|e| format!("cannot mount {target}: {e}"))
}

/// This process's namespaces, to be held by the agent: the end of a container would take
/// them apart, with all of its mounts and their file systems, when the guest is about to
/// end anyway.
pub fn namespaces() -> Result<Vec<OwnedFd>, String> {
    let open = |name| {
        let path = format!("/proc/self/ns/{name}");
        rustix::fs::open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|e| format!("cannot open {path}: {e}"))
    };
    ["mnt", "ipc", "pid", "cgroup", "net"]
        .into_iter()
        .map(open)
        .collect()
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

/// What none of the kernel's own file systems needs.
pub const PLAIN: MountFlags = MountFlags::NOSUID
    .union(MountFlags::NOEXEC)
    .union(MountFlags::NODEV);

fn mount_system() -> Result<(), String> {
    let on = |target: &str, kind: &str, flags: MountFlags, options| {
        let target = under(target);
        make_directory(&target)?;
        mount(kind, &target, kind, flags, options)
    };
    on("/proc", "proc", PLAIN, c"")?;
    let dev = MountFlags::NOSUID | MountFlags::STRICTATIME;
    on("/dev", "tmpfs", dev, c"mode=755,size=65536k")?;
    let pts = MountFlags::NOSUID | MountFlags::NOEXEC;
    let pts_options = c"newinstance,ptmxmode=0666,mode=0620,gid=5";
    on("/dev/pts", "devpts", pts, pts_options)?;
    on("/dev/shm", "tmpfs", PLAIN, c"mode=1777,size=65536k")?;
    on("/dev/mqueue", "mqueue", PLAIN, c"")?;
    mount_sys("/sys")
}

/// Mounts a /sys of the network that this process is in.
fn mount_sys(target: &str) -> Result<(), String> {
    let target = under(target);
    make_directory(&target)?;
    let flags = PLAIN | MountFlags::RDONLY;
    mount("sysfs", &target, "sysfs", flags, c"")?;
    let cgroups = format!("{target}/fs/cgroup");
    mount("cgroup2", &cgroups, "cgroup2", flags, c"")?;
    let masked = MASKED.iter().filter_map(|path| path.strip_prefix("/sys"));
    masked
        .into_iter()
        .try_for_each(|path| hide(&format!("{target}{path}")))
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
        make_device(&under(&format!("/dev/{name}")), major, minor, 0o666)?;
    }
    for (name, target) in [
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
        ("core", "/proc/kcore"),
        ("ptmx", "pts/ptmx"),
    ] {
        symlink(target, under(&format!("/dev/{name}")))
            .map_err(|e| format!("cannot make /dev/{name}: {e}"))?;
    }
    Ok(())
}

/// Shows the container's terminal as its console.
pub fn bind_console(terminal: &str) -> Result<(), String> {
    make_file_for_mount("/dev/console")?;
    bind(terminal, "/dev/console")
}

/// Hidden from a container: what speaks of the whole machine.
pub const MASKED: [&str; 12] = [
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

/// Shown to a container and not to be changed by it.
pub const READ_ONLY: [&str; 5] = [
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];

/// Hides and locks the paths above, as far as the kernel has them; those in /sys are
/// hidden by now.
fn protect_system() -> Result<(), String> {
    for path in READ_ONLY.map(under) {
        if Path::new(&path).exists() {
            bind(&path, &path)?;
            make_read_only(&path, PLAIN)?;
        }
    }
    let masked = MASKED.iter().filter(|path| !path.starts_with("/sys"));
    masked.into_iter().try_for_each(|path| hide(&under(path)))
}

/// Hides a path from the container, if the kernel has it.
fn hide(path: &str) -> Result<(), String> {
    match fs::metadata(path) {
        Ok(found) if found.is_dir() => {
            mount("tmpfs", path, "tmpfs", MountFlags::RDONLY, c"size=4k")
        }
        Ok(_) => bind(&under("/dev/null"), path),
        Err(_) => Ok(()),
    }
}
