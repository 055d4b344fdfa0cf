//! One VM in a process of its own, in a jail.
//!
//! The program with the VMs, which is not jailed, starts one *spawner*, and that
//! starts *workers*: processes of the program `vm-run-worker`, whose `main` is
//! [`main`]. [`Workers`] is the spawner as its owner sees it.

pub(crate) mod packet;
pub(crate) mod picture;
mod process;
mod protocol;
mod remote;
mod serve;
mod spawner;

pub use crate::jail::Limits;
#[doc(hidden)]
pub use crate::jail::{Thread, confine};
#[doc(hidden)]
pub use crate::volumes::Claim;
pub(crate) use picture::write_record;
#[doc(hidden)]
pub use process::main_with;
pub use process::{find_program, main};
pub(crate) use remote::Remote;
pub use spawner::{Counts, Jail, Workers, WorkersSpec};
