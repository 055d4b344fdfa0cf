//! What a container or a process has asked for and most have not: each of these does
//! nothing where nothing is asked for.

use crate::exec::Failure;
use crate::mounts::{make_directory, make_read_only, mount};
use crate::privileged;
use crate::sys;
use rustix::fd::BorrowedFd;
use rustix::fs::{Mode, OFlags, openat};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount_remount};
use std::ffi::CString;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use vm_run_abi::options::{ContainerOptions, ProcessOptions, Tmpfs};

/// The period of a limit of processor time, in microseconds.
const CPU_PERIOD: u64 = 100_000;

/// What is done while the guest's own file systems are still in sight. It is for the
/// container's IPC namespace, in which this process is, and its cgroup.
pub fn set_kernel(options: &ContainerOptions, cgroup: BorrowedFd<'_>) -> Result<(), Failure> {
    for (name, value) in &options.sysctls {
        let path = format!("/proc/sys/{}", name.replace('.', "/"));
        fs::write(path, value)
            .map_err(|e| Failure::other(format!("cannot set the sysctl {name} to {value}: {e}")))?;
    }
    if !options.domainname.is_empty() {
        rustix::system::setdomainname(options.domainname.as_bytes())
            .map_err(|e| Failure::other(format!("cannot set the domain name: {e}")))?;
    }
    if let Some(memory) = options.memory {
        limit(cgroup, "memory.max", &memory.to_string())?;
    }
    if let Some(quota) = options.cpu_quota {
        limit(cgroup, "cpu.max", &format!("{quota} {CPU_PERIOD}"))?;
    }
    if let Some(pids) = options.pids {
        limit(cgroup, "pids.max", &pids.to_string())?;
    }
    Ok(())
}

fn limit(cgroup: BorrowedFd<'_>, name: &str, value: &str) -> Result<(), Failure> {
    let failed =
        |e: Errno| Failure::other(format!("cannot set the container's {name} to {value}: {e}"));
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    let file = openat(cgroup, name, flags, Mode::empty()).map_err(failed)?;
    rustix::io::write(&file, value.as_bytes()).map_err(failed)?;
    Ok(())
}

/// What is done in the container's root, when all that every container finds is there.
pub fn complete(options: &ContainerOptions) -> Result<(), Failure> {
    if options.privileged {
        privileged::open_up()?;
    }
    if !options.resolv_conf.is_empty() {
        fs::write("/etc/resolv.conf", &options.resolv_conf)
            .map_err(|e| Failure::other(format!("cannot write /etc/resolv.conf: {e}")))?;
    }
    if let Some(size) = options.shm_size {
        resize_shm(size)?;
    }
    Ok(())
}

fn resize_shm(size: u64) -> Result<(), Failure> {
    let failed = |why: String| Failure::other(format!("cannot resize /dev/shm to {size}: {why}"));
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    let data = CString::new(format!("mode=1777,size={size}")).map_err(|e| failed(e.to_string()))?;
    mount_remount("/dev/shm", flags, &data).map_err(|e| failed(e.to_string()))
}

/// As docker's runtime does: a directory that is there gives its mode, unless another
/// is asked for.
pub fn mount_tmpfs(tmpfs: &Tmpfs) -> Result<(), Failure> {
    let path = &tmpfs.path;
    let mut data = match fs::metadata(path) {
        Ok(found) => format!("mode={:o}", found.permissions().mode() & 0o7777),
        Err(e) if e.kind() == ErrorKind::NotFound => {
            make_directory(path)?;
            String::new()
        }
        Err(e) => return Err(Failure::other(format!("cannot find {path}: {e}"))),
    };
    if !tmpfs.data.is_empty() {
        if !data.is_empty() {
            data.push(',');
        }
        data.push_str(&tmpfs.data);
    }
    let data = CString::new(data)
        .map_err(|_| Failure::other(format!("the options of {path} contain a zero byte")))?;
    let flags = MountFlags::from_bits_retain(tmpfs.flags) - MountFlags::RDONLY;
    Ok(mount("tmpfs", path, "tmpfs", flags, &data)?)
}

/// Makes those file systems in memory read-only that are to be: what lies in them had to
/// be put there first.
pub fn lock_tmpfs(all: &[Tmpfs]) -> Result<(), Failure> {
    for tmpfs in all {
        let flags = MountFlags::from_bits_retain(tmpfs.flags);
        if flags.contains(MountFlags::RDONLY) {
            make_read_only(&tmpfs.path, flags)?;
        }
    }
    Ok(())
}

/// Limits this process, while it may still set any limit.
pub fn restrict(options: &ProcessOptions) -> Result<(), Failure> {
    if let Some(score) = options.oom_score_adj {
        fs::write("/proc/self/oom_score_adj", score.to_string())
            .map_err(|e| Failure::other(format!("cannot set oom_score_adj to {score}: {e}")))?;
    }
    for limit in &options.limits {
        sys::set_limit(limit.resource, limit.soft, limit.hard).map_err(|e| {
            let number = limit.resource;
            Failure::other(format!("cannot set the limit of resource {number}: {e}"))
        })?;
    }
    Ok(())
}
