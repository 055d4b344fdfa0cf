//! Native VM fork, as a library: boot a guest once, freeze it, and fork children
//! from it by copy-on-write.
//!
//! ```no_run
//! use fork::worker::{Jail, Limits, Workers, WorkersSpec, find_program};
//! use fork::{BootSpec, ForkSpec, Host, Place, Pool, Template};
//! use std::sync::Arc;
//!
//! // A guest of a few instructions: runs on any KVM. `guest: Some(..)` is Linux.
//! let host = Arc::new(Host::open()?);
//! let template = Arc::new(Template::boot(host, &BootSpec::default())?);
//!
//! // In this process, cold.
//! let mut child = template.fork(ForkSpec::default())?;
//! assert_eq!(child.answer()?, child.expected_answer());
//!
//! // Each in a jailed process of its own, from a pool that was filled ahead.
//! let program = find_program().ok_or("no vm-run-worker")?;
//! let jail = Jail::On(Limits::default());
//! let workers = Arc::new(Workers::start(WorkersSpec { program, jail })?);
//! let pool = Pool::new(template, Place::Workers(workers), 4)?;
//! for mut child in pool.fork_many((0..4).map(|_| ForkSpec::default()).collect()).into_iter().flatten() {
//!     assert_eq!(child.answer()?, child.expected_answer());
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Everything blocks; there is no async runtime, no global state and no panic
//! that a guest or a file can reach. Dropping a [`Child`] ends its VM.

#![forbid(unsafe_code)]

mod agent;
mod child;
mod error;
#[cfg(fuzzing)]
pub mod fuzz;
mod guest;
mod identity;
mod jail;
mod machine;
mod pool;
mod stats;
mod store;
mod template;
pub mod worker;

pub use agent::Remote;
pub use child::{Child, ForkPath, Process, Stages};
pub use error::Error;
pub use guest::Guest;
pub use pool::{Place, Pool, PoolStats};
pub use stats::ChildStats;
pub use store::{FORMAT, Manifest};
pub use template::{BootSpec, DEFAULT_DOMAIN, ForkSpec, Kind, Template, Warm};
pub use vm_run_abi::protocol::{
    ContainerSpec, ExitStatus, ProcessId, ProcessSpec, StartFailure, Stream, WindowSize, Writable,
};
pub use vmm::{
    Cpu, Disks, Host, HostError, Isolation, Moment, Timeline, VMS_PER_PROCESS, VmCounts,
};
