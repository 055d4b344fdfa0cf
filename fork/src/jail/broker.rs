//! The jail of a broker: its root holds the volumes and nothing else, and it keeps the
//! privileges over files that a server of many owners needs, and no other.

use super::namespaces::{leave_host_but_files, take_root};
use super::{Error, limits, no_descriptor_but, one_thread, privileges};
use crate::volumes::Volume;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{CWD, FileType, Mode, OFlags, fstat, mkdir, mknodat, open, rmdir};
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount,
    mount_change, mount_remount, move_mount, open_tree, unmount,
};
use rustix::process::{chdir, umask};
use std::fs;

/// Where the new root is put together: covered, in this namespace only.
const PLACE: &str = "/proc";

/// A tree of mounts that lies nowhere yet.
struct Tree {
    mounts: OwnedFd,
    is_directory: bool,
    read_only: bool,
}

/// Closes the jail around this process, which keeps the descriptors `kept`: see
/// [`super::enter`]. The working directory is that of its descriptors then. Returns the
/// namespace with the mounts of its volumes.
///
/// # Errors
/// As [`super::enter`].
pub(crate) fn enter_broker(
    volumes: Vec<Volume>,
    kept: &[BorrowedFd<'_>],
) -> Result<OwnedFd, Error> {
    one_thread()?;
    // Before the namespace changes: what a descriptor is of is then somebody else's.
    let trees = volumes
        .into_iter()
        .map(Tree::of)
        .collect::<Result<Vec<_>, _>>()?;
    let mut known = kept.to_vec();
    known.extend(trees.iter().map(|tree| tree.mounts.as_fd()));
    no_descriptor_but(&known)?;
    leave_host_but_files()?;
    let namespace = put_together(trees)?;
    limits::set_broker()?;
    // Modes are the guest's to choose.
    umask(Mode::empty());
    privileges::keep_files()?;
    Ok(namespace)
}

impl Tree {
    fn of(volume: Volume) -> Result<Self, Error> {
        let found = fstat(&volume.source).map_err(Error::call("fstat of a volume"))?;
        let flags = OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_EMPTY_PATH
            | OpenTreeFlags::AT_RECURSIVE;
        Ok(Self {
            mounts: open_tree(&volume.source, "", flags).map_err(Error::call("open_tree"))?,
            is_directory: FileType::from_raw_mode(found.st_mode) == FileType::Directory,
            read_only: volume.read_only,
        })
    }

    /// Puts it into the working directory under this name.
    fn put(&self, name: &str) -> Result<(), Error> {
        if self.is_directory {
            mkdir(name, Mode::RWXU).map_err(Error::call("mkdir"))?;
        } else {
            mknodat(CWD, name, FileType::RegularFile, Mode::RUSR, 0)
                .map_err(Error::call("mknod"))?;
        }
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        move_mount(&self.mounts, "", CWD, name, flags).map_err(Error::call("move_mount"))
    }
}

/// Makes the root: a small file system with the volumes, by number.
fn put_together(trees: Vec<Tree>) -> Result<OwnedFd, Error> {
    let plain = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("vm-run", PLACE, "tmpfs", plain, c"mode=755,size=1m").map_err(Error::call("tmpfs"))?;
    chdir(PLACE).map_err(Error::call("chdir"))?;
    for (number, tree) in trees.iter().enumerate() {
        tree.put(&number.to_string())?;
    }
    // What is mounted on the host from now on is not to appear in a volume, and writable.
    let alone = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change(".", alone).map_err(Error::call("mount --make-rprivate"))?;
    let read_only: Vec<usize> = (0..trees.len())
        .filter(|&number| trees[number].read_only)
        .collect();
    // The descriptors of the trees keep nothing that the root does not have.
    drop(trees);
    mkdir("proc", Mode::RWXU).map_err(Error::call("mkdir"))?;
    mount("proc", "proc", "proc", plain, c"").map_err(Error::call("mount proc"))?;
    take_root()?;
    for number in read_only {
        make_read_only(&format!("/{number}"))?;
    }
    let namespace = open(
        "/proc/self/ns/mnt",
        OFlags::RDONLY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(Error::call("open of the mount namespace"))?;
    leave_proc()?;
    let flags = plain | MountFlags::RDONLY | MountFlags::BIND;
    mount_remount("/", flags, "").map_err(Error::call("mount -o remount,ro /"))?;
    Ok(namespace)
}

/// Makes a mount and all below it read-only.
fn make_read_only(volume: &str) -> Result<(), Error> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").map_err(Error::file("mountinfo"))?;
    for line in mounts.lines() {
        // proc_pid_mountinfo(5): 36 35 98:0 /root /place options ...
        let mut fields = line.split(' ').skip(4);
        let (Some(place), Some(options)) = (fields.next(), fields.next()) else {
            continue;
        };
        let below = place.strip_prefix(volume);
        if below.is_some_and(|rest| rest.is_empty() || rest.starts_with('/')) {
            let flags = MountFlags::RDONLY | MountFlags::BIND | flags(options);
            mount_remount(unescaped(place).as_slice(), flags, "")
                .map_err(Error::call("making a volume read-only"))?;
        }
    }
    Ok(())
}

/// The options of a mount that a remount has to repeat.
fn flags(options: &str) -> MountFlags {
    let flag = |option: &str| match option {
        "nosuid" => MountFlags::NOSUID,
        "nodev" => MountFlags::NODEV,
        "noexec" => MountFlags::NOEXEC,
        "noatime" => MountFlags::NOATIME,
        "nodiratime" => MountFlags::NODIRATIME,
        "relatime" => MountFlags::RELATIME,
        _ => MountFlags::empty(),
    };
    options.split(',').map(flag).collect()
}

/// A path as mountinfo writes it: blanks and the like in octal.
fn unescaped(path: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut rest = path.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        let octal = (first == b'\\')
            .then(|| after.get(..3))
            .flatten()
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match octal {
            Some(byte) => {
                bytes.push(byte);
                rest = &after[3..];
            }
            None => {
                bytes.push(first);
                rest = after;
            }
        }
    }
    bytes
}

/// Keeps the directory of this process's descriptors as its working directory, which no
/// path leads to any more. A descriptor is opened again through it.
fn leave_proc() -> Result<(), Error> {
    chdir("/proc/self/fd").map_err(Error::call("chdir /proc/self/fd"))?;
    unmount("/proc", UnmountFlags::DETACH).map_err(Error::call("umount /proc"))?;
    rmdir("/proc").map_err(Error::call("rmdir /proc"))?;
    // It is the right one, and works.
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    open("0", flags, Mode::empty()).map_err(Error::call("open of a descriptor"))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_remount_keeps_what_a_mount_forbids() {
        let all = flags("rw,nosuid,nodev,noexec,relatime");
        let wanted =
            MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC | MountFlags::RELATIME;
        assert_eq!(all, wanted);
        assert_eq!(flags("rw,idmapped"), MountFlags::empty());
    }

    #[test]
    fn paths_of_mountinfo_are_read_back() {
        assert_eq!(unescaped("/0/a\\040b\\134c"), b"/0/a b\\c");
        assert_eq!(unescaped("/0/x\\9"), b"/0/x\\9");
    }
}
