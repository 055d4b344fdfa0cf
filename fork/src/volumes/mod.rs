//! Volumes: directories and files of the host in a container.
//!
//! The guest's kernel speaks FUSE, the device of its VM hands the requests on, and the
//! **broker** answers them: a process of the child's own, in a jail of its own
//! ([`broker`]), with the volumes as all that there is, and the privileges that files of
//! many owners need. It is one thread, so a request sees the effects of all before it.
//!
//! At the fork of a guest that runs, its device has the broker keep what the guest knows of
//! its files ([`table`]), for whoever has a claim on that ([`Claim`]): the broker of each
//! child is handed it, and both go on.

pub(crate) mod broker;
mod claim;
#[cfg(fuzzing)]
pub(crate) mod fuzz;
mod server;
mod table;
mod wire;

pub use self::claim::Claim;

use std::os::fd::OwnedFd;

/// The most volumes of one child.
pub const VOLUMES_MAX: usize = 64;

/// A directory or a file of the host that a child sees.
///
/// In the guest the volumes have the numbers that they have in
/// [`ForkSpec::volumes`](crate::ForkSpec::volumes); where each lies in the container is
/// the [`ContainerSpec`](crate::ContainerSpec)'s to say.
#[derive(Debug)]
pub struct Volume {
    /// The directory, or the file: best opened with O_PATH. With all that is mounted
    /// below it.
    pub source: OwnedFd,
    /// Whether the child may not change it.
    pub read_only: bool,
}
