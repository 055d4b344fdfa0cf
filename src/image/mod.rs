//! Container images: read, merged, written as one read-only file system, and kept.
//!
//! ```text
//! archive   docker-archive or OCI layout: members by name  (vm-run-archive reads tar)
//! documents manifest, index, configuration                     -> which layers
//! layer     decompress, check digests, and merge               -> tree
//! tree      names and metadata in memory; contents stay put    (hostdir: from a directory)
//! erofs     tree -> file system image
//! store     blobs, names, images; shared by processes
//! registry  the same from and to a registry
//! ```
//!
//! An archive is a stranger's: every size, count and depth in it is held against
//! [`limits::Limits`], every digest is checked, and no path in it is ever used on
//! the host's file system.

pub mod archive;
// A fuzzer has no network and no command line: it builds neither.
#[cfg(not(fuzzing))]
mod changes;
#[cfg(not(fuzzing))]
pub mod cli;
mod content;
pub mod digest;
mod documents;
mod erofs;
pub mod error;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod hostdir;
mod index;
pub mod layer;
pub mod limits;
mod merge;
mod name;
#[cfg(not(fuzzing))]
mod obtain;
mod reference;
#[cfg(not(fuzzing))]
mod registry;
pub mod sink;
mod store;
mod tree;

pub use documents::{ImageConfig, ImageHealth};
#[cfg(not(fuzzing))]
pub use obtain::{PullPolicy, obtain};
pub use reference::Reference;
#[cfg(not(fuzzing))]
pub use registry::{Access, Login, pull};
pub use store::{ImageSummary, Store, rootfs_from_dir};
