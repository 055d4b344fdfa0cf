//! Tar archives, on both sides of a virtual machine: the host reads those of images and
//! of hostile guests, a guest reads those of a hostile host's user. So there is one
//! reader, which takes no number and no name on trust, and one way into a directory,
//! which leaves it by no link.
//!
//! ```text
//! read    entries of a stream, bounded            write   the other way
//! unpack  a stream into a directory               pack    the other way
//! ```

#![forbid(unsafe_code)]

mod error;
mod pack;
mod read;
mod unpack;
mod write;

pub use error::{Context, Error, Result, printable};
pub use pack::{Mounts, Pack, pack};
pub use read::{Entry, Kind, Piece, Plain, Stream, TarReader};
pub use unpack::{Resolve, Unpack, unpack};
pub use write::TarWriter;
