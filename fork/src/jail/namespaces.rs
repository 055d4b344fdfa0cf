//! Namespaces of a worker's own, and a root with nothing in it.

use super::Error;
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount,
};
use rustix::process::{chdir, pivot_root};
use rustix::system::sethostname;
use rustix::thread::UnshareFlags;

/// Leaves the host's files, network, IPC objects, names and cgroups. The PID namespace
/// is the worker's own already: the spawner made it, for a process cannot change its.
pub(super) fn leave_host() -> Result<(), Error> {
    leave_host_but_files()?;
    empty_root()
}

/// The same, but for the root: the files are all there still, in mounts that nobody else
/// sees changes of.
pub(super) fn leave_host_but_files() -> Result<(), Error> {
    let flags = UnshareFlags::NEWNS
        | UnshareFlags::NEWNET
        | UnshareFlags::NEWIPC
        | UnshareFlags::NEWUTS
        | UnshareFlags::NEWCGROUP;
    // Deprecated because CLONE_FILES can take descriptors from under other threads;
    // it is not among these flags, and there is no other thread.
    #[allow(deprecated)]
    rustix::thread::unshare(flags).map_err(Error::call(
        "unshare (the jail needs root; --no-jail does not)",
    ))?;
    sethostname(b"vm-run").map_err(Error::call("sethostname"))?;
    // Nothing that is mounted or unmounted here is seen outside, and pivot_root(2)
    // refuses mounts that propagate.
    mount_change(
        "/",
        MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
    )
    .map_err(Error::call("mount --make-rprivate /"))
}

/// Makes the root an empty file system in which nothing can be made: its one inode is
/// the root, it is read-only, and the worker's user may not look into it.
fn empty_root() -> Result<(), Error> {
    // On a directory that is there: it is covered, in this namespace only.
    let flags = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    let options = c"mode=0,nr_inodes=1,nr_blocks=1";
    mount("vm-run", "/proc", "tmpfs", flags, options).map_err(Error::call("mount tmpfs"))?;
    chdir("/proc").map_err(Error::call("chdir"))?;
    take_root()
}

/// Makes the working directory the root, and takes the old one away.
pub(super) fn take_root() -> Result<(), Error> {
    // The old root comes to lie on the new one (pivot_root(2), NOTES), and is taken off.
    pivot_root(".", ".").map_err(Error::call("pivot_root"))?;
    unmount(".", UnmountFlags::DETACH).map_err(Error::call("umount"))?;
    chdir("/").map_err(Error::call("chdir /"))
}
