//! The bounds of a worker: those that cgroups keep, and resource limits.

use super::Error;
use crate::volumes::broker;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde::{Deserialize, Serialize};

/// What one worker may use of the host. cgroups keep it; where one is missing,
/// [`Workers::missing`](crate::worker::Workers::missing) says so.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Limits {
    /// Bytes of memory that are the worker's own: its copied pages, page tables and
    /// KVM's structures. The template's pages are charged to whoever made them. Swap is
    /// not bounded. `None`: no limit.
    pub memory: Option<u64>,
    /// Threads and processes. A worker has a thread for each vCPU and two more, and
    /// KVM may add one.
    pub processes: u32,
    /// Time on CPUs, in CPUs: 1.5 is one and a half of one CPU's time. `None`: no limit.
    pub cpus: Option<f64>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            memory: None,
            processes: 64,
            cpus: None,
        }
    }
}

/// Open descriptors: a VM's devices need under 200, and each vsock connection one, of
/// which a guest may have 1024 (`devices::virtio::vsock::CONNECTIONS_MAX`).
const DESCRIPTORS: u64 = 1280;

/// The longest file, in bytes: what a disk claims to be at boot.
const FILE: u64 = 1 << 40;

/// Signals that wait: a vCPU is kicked by a queued signal (signal(7), real-time).
const SIGNALS: u64 = 1024;

/// Sets the resource limits of a broker. Its files may be of any size: they are the
/// host's own.
pub(super) fn set_broker() -> Result<(), Error> {
    set_all([
        (Resource::Nofile, broker::DESCRIPTORS),
        (Resource::Nproc, 1),
        (Resource::Core, 0),
        (Resource::Memlock, 0),
        (Resource::Msgqueue, 0),
        (Resource::Nice, 0),
        (Resource::Rtprio, 0),
    ])
}

/// Sets the resource limits (getrlimit(2)). `processes` counts all processes of the
/// uid, so it is for a worker that has a uid of its own: then it bounds threads even
/// where no pids cgroup does.
pub(super) fn set(processes: Option<u32>) -> Result<(), Error> {
    let fixed = [
        (Resource::Nofile, DESCRIPTORS),
        (Resource::Fsize, FILE),
        // A core file would hold the guest's memory.
        (Resource::Core, 0),
        // Pages that cannot be reclaimed, message queues, and priorities over others.
        (Resource::Memlock, 0),
        (Resource::Msgqueue, 0),
        (Resource::Nice, 0),
        (Resource::Rtprio, 0),
        (Resource::Sigpending, SIGNALS),
    ];
    let of_uid = processes.map(|most| (Resource::Nproc, u64::from(most)));
    set_all(fixed.into_iter().chain(of_uid))
}

fn set_all(limits: impl IntoIterator<Item = (Resource, u64)>) -> Result<(), Error> {
    for (resource, most) in limits {
        // Hard limits only go down without CAP_SYS_RESOURCE.
        let most = getrlimit(resource)
            .maximum
            .map_or(most, |max| max.min(most));
        let limit = Rlimit {
            current: Some(most),
            maximum: Some(most),
        };
        setrlimit(resource, limit).map_err(Error::call("setrlimit"))?;
    }
    Ok(())
}
