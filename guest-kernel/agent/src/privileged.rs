//! A container that may do everything: what hides or locks the guest from others is
//! taken away again, and all of its devices have nodes. Its guest is its own, so
//! nothing but that is at stake.

use crate::jail::{MASKED, PLAIN, READ_ONLY};
use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount_remount, unmount};
use std::fs;
use std::path::Path;

/// Opens up a container that has all that every container has.
pub fn open_up() -> Result<(), String> {
    for path in MASKED.iter().chain(&READ_ONLY) {
        match unmount(*path, UnmountFlags::DETACH) {
            // The kernel has no such file, or it has not been covered.
            Ok(()) | Err(Errno::INVAL | Errno::NOENT) => {}
            Err(e) => return Err(format!("cannot uncover {path}: {e}")),
        }
    }
    for path in ["/sys", "/sys/fs/cgroup"] {
        mount_remount(path, MountFlags::BIND | PLAIN, c"")
            .map_err(|e| format!("cannot make {path} writable: {e}"))?;
    }
    make_nodes("/sys/dev/char", FileType::CharacterDevice)?;
    make_nodes("/sys/dev/block", FileType::BlockDevice)
}

/// A node for each device of a kind that has none.
fn make_nodes(list: &str, kind: FileType) -> Result<(), String> {
    let failed = |e: std::io::Error| format!("cannot list {list}: {e}");
    for entry in fs::read_dir(list).map_err(failed)? {
        let path = entry.map_err(failed)?.path().join("uevent");
        // A device may go meanwhile; not every one has a name.
        let Some(device) = fs::read_to_string(path)
            .ok()
            .and_then(|e| Device::parse(&e))
        else {
            continue;
        };
        let path = format!("/dev/{}", device.name);
        if let Some(parent) = Path::new(&path).parent() {
            fs::create_dir_all(parent).map_err(|e| format!("cannot make {parent:?}: {e}"))?;
        }
        let number = makedev(device.major, device.minor);
        match mknodat(CWD, &path, kind, Mode::from_raw_mode(device.mode), number) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(e) => return Err(format!("cannot make {path}: {e}")),
        }
    }
    Ok(())
}

/// What the kernel says of a device.
#[derive(Debug, PartialEq, Eq)]
struct Device {
    name: String,
    major: u32,
    minor: u32,
    mode: u32,
}

impl Device {
    fn parse(uevent: &str) -> Option<Self> {
        let field = |name: &str| {
            let mut lines = uevent.lines().filter_map(|line| line.split_once('='));
            lines
                .find(|(found, _)| *found == name)
                .map(|(_, value)| value)
        };
        let mode = field("DEVMODE").and_then(|mode| u32::from_str_radix(mode, 8).ok());
        Some(Self {
            name: field("DEVNAME")?.to_owned(),
            major: field("MAJOR")?.parse().ok()?,
            minor: field("MINOR")?.parse().ok()?,
            mode: mode.unwrap_or(0o600),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_says_how_a_device_is_called() {
        let device = Device::parse("MAJOR=1\nMINOR=3\nDEVNAME=null\nDEVMODE=0666\n");
        let name = "null".to_owned();
        let (major, minor, mode) = (1, 3, 0o666);
        let expected = Device {
            name,
            major,
            minor,
            mode,
        };
        assert_eq!(device, Some(expected));
        let disk = Device::parse("MAJOR=254\nMINOR=0\nDEVNAME=vda\nDEVTYPE=disk\n");
        assert_eq!(disk.map(|disk| disk.mode), Some(0o600));
        assert_eq!(Device::parse("DRIVER=virtio\n"), None);
    }
}
