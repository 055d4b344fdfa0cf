//! What the monitor and the guest agree on, and nothing else: the addresses of
//! the two pages that they share, the doorbell's registers, the identity page,
//! and the messages of the agent.
//!
//! Both sides are built from this one crate. [`VERSION`] changes with every
//! change of meaning here; a monitor refuses a guest of another version at the
//! fork point.

#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod doorbell;
pub mod identity;
pub mod network;
pub mod options;
pub mod protocol;
pub mod task;

/// The version of everything in this crate. The agent stores it into
/// [`doorbell::FORK_POINT`], so that a mismatch is found before any fork.
pub const VERSION: u32 = 8;

/// The size of a guest page, in bytes.
pub const PAGE_SIZE: u64 = 4096;
