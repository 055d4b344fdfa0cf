//! What the guest needs of its kernel, checked before the fork point, so that a
//! kernel that lacks something is refused in one line and not by a container
//! that behaves oddly.

use crate::devices;
use crate::mounts::CGROUPS;
use rustix::fs::XattrFlags;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use std::fs;
use std::path::Path;

/// A file system and the option that brings it.
const FILE_SYSTEMS: [(&str, &str); 7] = [
    ("tmpfs", "CONFIG_TMPFS"),
    ("erofs", "CONFIG_EROFS_FS"),
    ("ext4", "CONFIG_EXT4_FS"),
    ("overlay", "CONFIG_OVERLAY_FS"),
    ("devpts", "CONFIG_UNIX98_PTYS"),
    ("mqueue", "CONFIG_POSIX_MQUEUE"),
    ("cgroup2", "CONFIG_CGROUPS"),
];

/// A kind of namespace and the option that brings it.
const NAMESPACES: [(&str, &str); 6] = [
    ("mnt", "CONFIG_NAMESPACES"),
    ("uts", "CONFIG_UTS_NS"),
    ("ipc", "CONFIG_IPC_NS"),
    ("pid", "CONFIG_PID_NS"),
    ("net", "CONFIG_NET_NS"),
    ("cgroup", "CONFIG_CGROUPS"),
];

/// A controller of cgroup2 and the option that brings it.
const CONTROLLERS: [(&str, &str); 2] = [("memory", "CONFIG_MEMCG"), ("pids", "CONFIG_CGROUP_PIDS")];

/// A driver under /sys/bus/virtio/drivers and the option that brings it.
const DRIVERS: [(&str, &str); 2] = [
    ("virtio_blk", "CONFIG_VIRTIO_BLK"),
    ("vmw_vsock_virtio_transport", "CONFIG_VIRTIO_VSOCKETS"),
];

/// The options that the running kernel lacks. `known` are those that the mounts
/// of the boot have found missing already: what they would show is not asked for.
pub fn missing_options(known: &[&'static str]) -> Vec<&'static str> {
    let mut missing = known.to_vec();
    missing.extend(missing_file_systems(
        &fs::read_to_string("/proc/filesystems").unwrap_or_default(),
    ));
    missing.extend(absent("/proc/self/ns", &NAMESPACES));
    let controllers = fs::read_to_string(format!("{CGROUPS}/cgroup.controllers"));
    missing.extend(missing_controllers(&controllers.unwrap_or_default()));
    missing.extend(missing_devices());
    missing.extend(missing_sockets());
    if devices::load_rules().is_err() {
        missing.extend(["CONFIG_BPF_SYSCALL", "CONFIG_CGROUP_BPF"]);
    }
    if !keeps_trusted_xattrs("/dev") {
        missing.push("CONFIG_TMPFS_XATTR");
    }
    if matches!(rustix::thread::set_thread_groups(&[]), Err(Errno::NOSYS)) {
        missing.push("CONFIG_MULTIUSER");
    }
    missing.sort_unstable();
    missing.dedup();
    missing
}

/// One line that names the options, or `None` if none is missing.
pub fn complaint(missing: &[&str]) -> Option<String> {
    (!missing.is_empty()).then(|| {
        let options = missing.join(", ");
        format!("the kernel lacks {options} (built in, not as modules)")
    })
}

/// `listing` is that of /proc/filesystems: a flag or nothing, a tab, a name.
fn missing_file_systems(listing: &str) -> Vec<&'static str> {
    let has = |name: &str| {
        listing
            .lines()
            .any(|line| line.split('\t').nth(1) == Some(name))
    };
    let lacking = FILE_SYSTEMS.iter().filter(|(name, _)| !has(name));
    lacking.map(|(_, option)| *option).collect()
}

fn absent(directory: &str, entries: &[(&str, &'static str)]) -> Vec<&'static str> {
    let there = |name: &str| Path::new(directory).join(name).exists();
    let lacking = entries.iter().filter(|(name, _)| !there(name));
    lacking.map(|(_, option)| *option).collect()
}

fn missing_devices() -> Vec<&'static str> {
    let mut missing = absent("/sys/bus/virtio/drivers", &DRIVERS);
    let devices = fs::read_dir("/sys/bus/virtio/devices");
    if devices.map_or(true, |mut devices| devices.next().is_none()) {
        missing.extend(["CONFIG_VIRTIO_MMIO", "CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES"]);
    }
    missing
}

fn missing_controllers(listing: &str) -> Vec<&'static str> {
    let has = |name: &str| listing.split_whitespace().any(|other| other == name);
    let lacking = CONTROLLERS.iter().filter(|(name, _)| !has(name));
    lacking.map(|(_, option)| *option).collect()
}

fn missing_sockets() -> Vec<&'static str> {
    let families = [
        (AddressFamily::UNIX, "CONFIG_UNIX"),
        (AddressFamily::INET, "CONFIG_INET"),
        (AddressFamily::VSOCK, "CONFIG_VSOCKETS"),
    ];
    let lacking = families.into_iter().filter(|(family, _)| {
        let made = socket_with(*family, SocketType::STREAM, SocketFlags::CLOEXEC, None);
        matches!(made, Err(Errno::AFNOSUPPORT | Errno::NOSYS))
    });
    lacking.map(|(_, option)| option).collect()
}

/// Whether a tmpfs keeps the attributes that overlayfs marks its layers with.
/// `tmpfs` is a directory on one: a devtmpfs is one too.
fn keeps_trusted_xattrs(tmpfs: &str) -> bool {
    let name = "trusted.vm-run";
    match rustix::fs::lsetxattr(tmpfs, name, b"", XattrFlags::empty()) {
        Err(Errno::OPNOTSUPP) => false,
        Err(_) => true,
        // A mark that stays would do no harm.
        Ok(()) => rustix::fs::lremovexattr(tmpfs, name).is_ok(),
    }
}

/// The disks of the container; the monitor gives them to every guest.
pub fn missing_disks(disks: &[&str]) -> Option<String> {
    let missing: Vec<&str> = disks
        .iter()
        .copied()
        .filter(|disk| !Path::new(disk).exists())
        .collect();
    (!missing.is_empty()).then(|| format!("the machine lacks the disks {}", missing.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listing_is_read_by_its_second_column() {
        let all = "nodev\ttmpfs\nnodev\toverlay\n\text4\n\terofs\nnodev\tdevpts\n\
                   nodev\tmqueue\nnodev\tcgroup2\n";
        assert!(missing_file_systems(all).is_empty());
        let some = all.replace("erofs", "erofs2").replace("\text4\n", "");
        let expected = ["CONFIG_EROFS_FS", "CONFIG_EXT4_FS"];
        assert_eq!(missing_file_systems(&some), expected);
    }

    #[test]
    fn controllers_are_words() {
        assert!(missing_controllers("cpuset cpu io memory pids\n").is_empty());
        assert_eq!(
            missing_controllers("cpu memory2\n"),
            ["CONFIG_MEMCG", "CONFIG_CGROUP_PIDS"]
        );
    }

    #[test]
    fn a_complaint_is_one_line() {
        assert_eq!(complaint(&[]), None);
        assert_eq!(
            complaint(&["CONFIG_EROFS_FS", "CONFIG_VSOCKETS"]).as_deref(),
            Some("the kernel lacks CONFIG_EROFS_FS, CONFIG_VSOCKETS (built in, not as modules)")
        );
    }
}
