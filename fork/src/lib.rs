//! Native VM fork, as a library: boot a guest once, freeze it, and fork children
//! from it by copy-on-write.
//!
//! ```no_run
//! use fork::{BootSpec, ForkSpec, Host, Template};
//! use std::{sync::Arc, time::Duration};
//!
//! // A guest of a few instructions: runs on any KVM. `guest: Some(..)` is Linux.
//! let template = Template::boot(
//!     Arc::new(Host::open()?),
//!     &BootSpec {
//!         memory: 256 << 20,
//!         vcpus: 1,
//!         guest: None,
//!         cmdline: String::new(),
//!         timeout: Duration::from_secs(10),
//!     },
//! )?;
//! let mut child = template.fork(ForkSpec {
//!     hostname: "child-1".into(),
//!     ..ForkSpec::default()
//! })?;
//! assert_eq!(child.answer()?, child.expected_answer());
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
mod store;
mod template;
pub mod worker;

pub use agent::Remote;
pub use child::{Child, Process, Stages};
pub use error::Error;
pub use guest::Guest;
pub use store::{FORMAT, Manifest};
pub use template::{BootSpec, ForkSpec, Kind, Template};
pub use vm_run_abi::protocol::{
    ContainerSpec, ExitStatus, ProcessSpec, StartFailure, Stream, WindowSize, Writable,
};
pub use vmm::{Cpu, Disks, Host, HostError, Isolation, Timeline};
