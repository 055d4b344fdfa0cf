//! Native VM fork, as a library: boot a guest once, freeze it, and fork children
//! from it by copy-on-write.
//!
//! ```
//! use fork::{BootSpec, ForkSpec, Host, Template};
//! use std::sync::Arc;
//!
//! // A guest of a few instructions, which runs on any KVM.
//! // With `guest: Some(..)` it is Linux, and children run containers.
//! let host = Arc::new(Host::open()?);
//! let template = Template::boot(host, &BootSpec::default())?;
//!
//! // Each child goes on where the parent was frozen, as somebody else.
//! let mut answers = Vec::new();
//! for name in ["one", "two", "three"] {
//!     let hostname = name.to_string();
//!     let mut child = template.fork(ForkSpec { hostname, ..ForkSpec::default() })?;
//!     let answer = child.answer()?;
//!     assert_eq!(answer, child.expected_answer());
//!     answers.push(answer);
//! }
//! answers.sort_unstable();
//! answers.dedup();
//! assert_eq!(answers.len(), 3);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! That was in this process, where VMs share its fate and are few. A [`Pool`] forks
//! into jailed processes of their own, which it makes ahead of time:
//!
//! ```no_run
//! use fork::worker::{Jail, Limits, Workers, WorkersSpec, find_program};
//! use fork::{BootSpec, ForkSpec, Host, Place, Pool, Template};
//! use std::sync::Arc;
//!
//! let host = Arc::new(Host::open()?);
//! let template = Arc::new(Template::boot(host, &BootSpec::default())?);
//! let program = find_program().ok_or("no vm-run-worker")?;
//! let jail = Jail::On(Limits::default());
//! let workers = Arc::new(Workers::start(WorkersSpec { program, jail })?);
//! let pool = Pool::new(template, Place::Workers(workers), 4)?;
//! let mut child = pool.fork(ForkSpec::default())?;
//! assert_eq!(child.answer()?, child.expected_answer());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! A child of a Linux guest runs a container: [`Child::start`] in a child of a
//! [`Kind::Bare`] template, with the root image in [`ForkSpec::disks`];
//! [`Child::attach`] in a child of a [`Kind::Warm`] one, whose container runs
//! already. [`Child::await_warm`] and [`Child::freeze`] make a warm template of a
//! child; [`Child::fork`] forks one while it runs, at whatever instruction it is, and
//! [`Child::capture`] makes a template of it. `docs/library.md` tells the rest, and `docs/threat-model.md` who may share
//! a template.
//!
//! Everything blocks; there is no async runtime, no global state and no panic
//! that a guest or a file can reach. Dropping a [`Child`] ends its VM.

#![forbid(unsafe_code)]

mod agent;
mod child;
mod disk;
mod error;
#[cfg(fuzzing)]
pub mod fuzz;
mod guest;
mod identity;
mod jail;
mod machine;
mod network;
mod parcel;
mod pool;
mod request;
mod stages;
mod stats;
mod store;
mod template;
mod volumes;
pub mod worker;

pub use agent::Remote;
pub use child::{Child, LiveFork, Process};
pub use disk::{Disks, EmptyDisk, Slot};
pub use error::Error;
pub use guest::Guest;
pub use network::Network;
pub use parcel::Parcel;
pub use pool::{Place, Pool, PoolStats};
pub use stages::{ForkPath, Stages};
pub use stats::ChildStats;
pub use store::{Content, FORMAT, Manifest, NamedPart, Part, SparseWriter, rename_into_place};
pub use template::{BootSpec, DEFAULT_DOMAIN, ForkSpec, Kind, Live, Template, Warm};
pub use vm_run_abi::identity::Connections;
pub use vm_run_abi::options::{ContainerOptions, Limit, ProcessOptions, Tmpfs};
pub use vm_run_abi::protocol::{
    CONTAINER, ContainerSpec, ExitStatus, Hook, Hooks, Mount, ProcessId, ProcessSpec, StartFailure,
    Stream, WindowSize, Writable,
};
pub use vm_run_abi::{network as addresses, task};
pub use vmm::payload::micro;
pub use vmm::{
    CaptureCost, Cpu, DISK_LAYERS_MAX, DiskFiles, Error as VmError, Host, HostError, Image,
    Isolation, Merged, Moment, Rate, RateLimit, RateLimits, Timeline, VMS_PER_PROCESS, VmCounts,
    format_overlay, merge_overlays,
};
pub use volumes::{VOLUMES_MAX, Volume};
