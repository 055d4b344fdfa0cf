//! What the agent does itself in a container, where docker's daemon would look into the
//! container's files: the host never does, for a guest wrote them.
//!
//! A task is one more process of the container ([`Request::Task`]
//! (crate::protocol::Request::Task)), as its root, and runs no program. It ends with zero,
//! or with one of [`TASK_FAILED`], [`TASK_NOT_FOUND`] and [`TASK_CONFLICT`] and one line on
//! its standard error. What it says in the types of this module it says in postcard, on
//! its standard output. Paths are the container's, begin at its root, and are bytes.

use alloc::string::String;
use alloc::vec::Vec;
use serde::{Deserialize, Serialize};

/// The exit status of a task that the system says no to, or that was told nonsense.
pub const TASK_FAILED: u8 = 1;
/// The exit status of a task whose path is not there.
pub const TASK_NOT_FOUND: u8 = 2;
/// The exit status of a task that finds a directory where there should be none, or the
/// other way round.
pub const TASK_CONFLICT: u8 = 3;

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Task {
    /// Write a tar of a path to standard output.
    Pack {
        /// The path. A link at its end is packed as a link.
        path: Vec<u8>,
        /// What stands for the path in the archive; empty: what is in the directory has
        /// names of its own.
        name: Vec<u8>,
        /// Whether a link at the end of the path is followed.
        follow: bool,
        /// Whether no mount below it is entered; else only those that hold nothing but
        /// what the kernel says, or memory.
        one_mount: bool,
    },
    /// Take a tar from standard input, into a directory that is there.
    Unpack {
        /// The directory.
        path: Vec<u8>,
        /// Whether files have the owners that the archive names; else they are root's.
        owners: bool,
        /// Whether a directory may be replaced by something else, and the other way
        /// round.
        replace: bool,
    },
    /// Say what is at a path: a [`PathStat`].
    Stat {
        /// The path. A link at its end is not followed.
        path: Vec<u8>,
    },
    /// Say what the container has changed of its image: a list of [`Change`]s.
    Changes,
    /// Say what runs in the container: a list of [`ProcessRow`]s.
    Processes,
}

/// What is at a path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathStat {
    /// The last part of the path.
    pub name: Vec<u8>,
    /// In bytes.
    pub size: u64,
    /// Kind and permissions, as stat(2) has them.
    pub mode: u32,
    /// Seconds since 1970.
    pub mtime: i64,
    /// Nanoseconds on top.
    pub mtime_nsec: u32,
    /// Of a link: where it leads in the end, from the root.
    pub target: Vec<u8>,
}

/// What has become of a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ChangeKind {
    /// It is not what it was.
    Changed,
    /// It was not there.
    Added,
    /// It is not there any more.
    Deleted,
}

/// A difference between a container and its image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// What has become of it.
    pub kind: ChangeKind,
    /// From the root.
    pub path: Vec<u8>,
}

/// A process of a container, as the container's own `ps` would show it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessRow {
    /// Whose it is.
    pub uid: u32,
    /// Its number in the container.
    pub pid: u32,
    /// Its parent's.
    pub parent: u32,
    /// When it began, in seconds since 1970.
    pub started: i64,
    /// How long it has been there, in hundredths of a second.
    pub age: u64,
    /// How long a processor has run it, in hundredths of a second.
    pub ran: u64,
    /// Its terminal; empty if it has none.
    pub terminal: String,
    /// Its command line; its name in brackets if it has none.
    pub command: Vec<u8>,
}
