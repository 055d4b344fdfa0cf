//! Volumes: what the host serves, put where the container finds it; and its file systems
//! in memory, since one may lie in the other.
//!
//! All volumes are one file system, of which the container sees only the parts that are
//! its volumes. A part is taken before the container's root is the root, and put after
//! that: so a link in the image, or in another volume, leads nowhere but into the
//! container.

mod copy;

use crate::exec::Failure;
use crate::mounts::{self, bind, make_directory, make_read_only};
use crate::options;
use rustix::fd::OwnedFd;
use rustix::fs::{CWD, Dir, FileType, Mode, OFlags, fstat, openat};
use rustix::io::Errno;
use rustix::mount::{MountFlags, MoveMountFlags, OpenTreeFlags, move_mount, open_tree};
use std::fs;
use std::path::Path;
use vm_run_abi::options::Tmpfs;
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

/// What a container asks for.
#[derive(Debug)]
enum Place {
    Volume(Volume),
    Memory(Tmpfs),
}

/// The volumes of a container, and its file systems in memory.
#[derive(Debug)]
pub struct Volumes(Vec<Place>);

/// Takes what a container asks for. To be called in its mount namespace.
pub fn take(source: &Source, wanted: &[Mount], memory: &[Tmpfs]) -> Result<Volumes, String> {
    let volumes = take_volumes(source, wanted)?.into_iter().map(Place::Volume);
    let memory = memory.iter().cloned().map(Place::Memory);
    Ok(Volumes(volumes.chain(memory).collect()))
}

/// Takes the volumes, each by its number.
fn take_volumes(source: &Source, wanted: &[Mount]) -> Result<Vec<Volume>, String> {
    if wanted.is_empty() {
        return Ok(Vec::new());
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
    Ok(volumes)
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

/// What the container finds beside its image is mounted over most places, and under
/// these.
fn lies_on_system(target: &str) -> bool {
    const FILES: [&str; 3] = ["/etc/hosts", "/etc/hostname", "/etc/resolv.conf"];
    const TREES: [&str; 3] = ["/dev", "/proc", "/sys"];
    let target = Path::new(target);
    FILES.iter().any(|file| target == Path::new(file))
        || TREES.iter().any(|tree| target.starts_with(tree))
}

impl Volumes {
    /// Puts what is to be there before [`crate::jail::System`] is placed, in a root that
    /// is the root by now; what comes after is left.
    pub fn place_under(&mut self) -> Result<(), Failure> {
        let all = std::mem::take(&mut self.0);
        let (on, under) = all
            .into_iter()
            .partition(|place| lies_on_system(place.target()));
        self.0 = on;
        put_all(under)
    }

    /// Puts what is left.
    pub fn place_over(self) -> Result<(), Failure> {
        put_all(self.0)
    }
}

/// One within another after that, as docker sorts them.
fn put_all(mut places: Vec<Place>) -> Result<(), Failure> {
    places.sort_by_key(|place| Path::new(place.target()).components().count());
    places.iter().try_for_each(Place::put)
}

impl Place {
    fn target(&self) -> &str {
        match self {
            Self::Volume(volume) => &volume.mount.target,
            Self::Memory(tmpfs) => &tmpfs.path,
        }
    }

    fn put(&self) -> Result<(), Failure> {
        match self {
            Self::Volume(volume) => Ok(volume.put()?),
            Self::Memory(tmpfs) => options::mount_tmpfs(tmpfs),
        }
    }
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
