//! Volumes: what the host serves, put where the container finds it.
//!
//! All volumes are one file system, of which the container sees only the parts that are
//! its volumes. A part is taken before the container's root is the root, and put after
//! that: so a link in the image, or in another volume, leads nowhere but into the
//! container.

mod copy;

use crate::mounts::{self, bind, make_directory, make_read_only};
use rustix::fd::OwnedFd;
use rustix::fs::{CWD, Dir, FileType, Mode, OFlags, fstat, openat};
use rustix::io::Errno;
use rustix::mount::{MountFlags, MoveMountFlags, OpenTreeFlags, move_mount, open_tree};
use std::fs;
use std::path::Path;
use vm_run_abi::protocol::Mount;

/// Where the file system of all volumes is.
#[derive(Debug, Clone)]
pub struct Source {
    /// Its kind, as mount(2) has it.
    pub kind: String,
    /// What is mounted: a tag.
    pub name: String,
}

/// A volume that lies nowhere yet.
#[derive(Debug)]
struct Volume {
    mount: Mount,
    tree: OwnedFd,
    is_directory: bool,
}

/// The volumes of a container.
#[derive(Debug)]
pub struct Volumes(Vec<Volume>);

/// Takes the volumes, each by its number. To be called in the mount namespace of the
/// container.
pub fn take(source: &Source, wanted: &[Mount]) -> Result<Volumes, String> {
    if wanted.is_empty() {
        return Ok(Volumes(Vec::new()));
    }
    let place = format!("{}/volumes", mounts::BASE);
    make_directory(&place)?;
    let Source { kind, name } = source;
    rustix::mount::mount(name, &place, kind, MountFlags::empty(), None).map_err(|e| match e {
        Errno::NODEV => format!(
            "the guest's kernel has no {kind}: volumes need CONFIG_FUSE_FS and CONFIG_VIRTIO_FS"
        ),
        e => format!("cannot mount the volumes: {e}"),
    })?;
    let taken = wanted.iter().map(|mount| take_one(&place, mount));
    let volumes = taken.collect::<Result<Vec<_>, _>>()?;
    mounts::detach(&place)?;
    Ok(Volumes(volumes))
}

fn take_one(place: &str, mount: &Mount) -> Result<Volume, String> {
    let path = format!("{place}/{}", mount.volume);
    let target = &mount.target;
    if !target.starts_with('/') {
        return Err(format!(
            "{target} is no place for a volume: it begins with no /"
        ));
    }
    if mount.read_only {
        // A mount of its own for a moment, which keeps that when it is taken.
        bind(&path, &path)?;
        make_read_only(&path, MountFlags::empty())?;
    }
    let failed = |e: Errno| format!("cannot take the volume of {target}: {e}");
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = open_tree(CWD, &path, flags).map_err(failed)?;
    if mount.read_only {
        mounts::detach(&path)?;
    }
    let found = fstat(&tree).map_err(failed)?;
    Ok(Volume {
        mount: mount.clone(),
        tree,
        is_directory: FileType::from_raw_mode(found.st_mode) == FileType::Directory,
    })
}

/// What the container finds beside its image is mounted over most volumes, and under
/// these.
fn lies_on_system(target: &str) -> bool {
    const FILES: [&str; 2] = ["/etc/hosts", "/etc/hostname"];
    const TREES: [&str; 3] = ["/dev", "/proc", "/sys"];
    let target = Path::new(target);
    FILES.iter().any(|file| target == Path::new(file))
        || TREES.iter().any(|tree| target.starts_with(tree))
}

impl Volumes {
    /// Puts the volumes that are to be there before [`crate::jail::System`] is placed, in
    /// a root that is the root by now; those that come after are left.
    pub fn place_under(&mut self) -> Result<(), String> {
        let all = std::mem::take(&mut self.0);
        let (on, under) = all
            .into_iter()
            .partition(|volume| lies_on_system(&volume.mount.target));
        self.0 = on;
        put_all(under)
    }

    /// Puts those that are left.
    pub fn place_over(self) -> Result<(), String> {
        put_all(self.0)
    }
}

/// One within another after that, as docker sorts them.
fn put_all(mut volumes: Vec<Volume>) -> Result<(), String> {
    volumes.sort_by_key(|volume| Path::new(&volume.mount.target).components().count());
    volumes.iter().try_for_each(Volume::put)
}

impl Volume {
    fn put(&self) -> Result<(), String> {
        let target = &self.mount.target;
        let wrong = |is: &str, is_not: &str| {
            format!("{target} in the container is {is}, and its volume {is_not}")
        };
        match fs::metadata(target) {
            Ok(found) if found.is_dir() && !self.is_directory => {
                return Err(wrong("a directory", "is none"));
            }
            Ok(found) if !found.is_dir() && self.is_directory => {
                return Err(wrong("no directory", "is one"));
            }
            Ok(_) if self.mount.copy_up && self.is_directory => self.copy_up()?,
            Ok(_) => {}
            Err(_) if self.is_directory => make_directory(target)?,
            Err(_) => make_file(target)?,
        }
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_SYMLINKS;
        move_mount(&self.tree, "", CWD, target, flags)
            .map_err(|e| format!("cannot mount a volume on {target}: {e}"))
    }

    /// Gives an empty volume what the image has in its place.
    fn copy_up(&self) -> Result<(), String> {
        let target = &self.mount.target;
        let failed = |e: Errno| format!("cannot copy {target} into its volume: {e}");
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let to = openat(&self.tree, ".", flags, Mode::empty()).map_err(failed)?;
        if self.mount.read_only || !is_empty(&to).map_err(failed)? {
            return Ok(());
        }
        let from = openat(CWD, target, flags, Mode::empty()).map_err(failed)?;
        copy::directory(from, to).map_err(failed)
    }
}

/// An empty regular file, to mount over.
fn make_file(path: &str) -> Result<(), String> {
    if let Some(parent) = Path::new(path).parent().and_then(Path::to_str) {
        make_directory(parent)?;
    }
    fs::write(path, "").map_err(|e| format!("cannot make {path}: {e}"))
}

fn is_empty(directory: &OwnedFd) -> Result<bool, Errno> {
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            return Ok(false);
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_docker_mounts_lies_between() {
        for on in ["/dev", "/dev/shm", "/proc/x", "/sys", "/etc/hosts"] {
            assert!(lies_on_system(on), "{on}");
        }
        for under in ["/etc", "/device", "/data/dev", "/etc/hosts.d"] {
            assert!(!lies_on_system(under), "{under}");
        }
    }
}
