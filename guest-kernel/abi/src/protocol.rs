//! What is said between the host and the agent, over vsock.
//!
//! The agent listens on [`PORT`] from before the fork point on; the host makes
//! every connection. The first frame on each is a [`Hello`] that says what the
//! connection is for:
//!
//! - one *control* connection, on which [`Request`]s go in and [`Event`]s come
//!   out;
//! - one connection for each stdio stream of a process, raw bytes after the
//!   hello. The host shuts down its sending half for end-of-file on stdin; the
//!   agent closes an output stream when the last writer in the guest is gone.
//!   With a terminal there is one stream both ways, [`Stream::Terminal`].
//!
//! The host opens the streams of a process before it asks for its start, and
//! [`ProcessSpec::streams`] names them, so that the agent knows what to wait for.
//!
//! A **warm** container (one with [`ContainerSpec::warm`]) says [`Event::Warm`] and
//! can then be frozen with the whole guest. After [`Request::Freeze`] the agent stops
//! all processes of the container (its cgroup's freezer), delivers what they have
//! written, lets go of the host's streams without ending the container's (the host
//! reads end-of-file, the container sees nothing), and says [`Event::Frozen`]. The
//! host closes every connection, and when the last is gone the agent rings the fork
//! point. In each child it takes the identity, thaws the
//! container, and waits for connections as a bare child does; the host opens streams
//! and asks for [`Request::Attach`]. [`Hooks`] come before the first step and after the
//! last but that.
//!
//! A frame is a length (u32, little-endian, at most [`MAX_FRAME`]) and as many
//! bytes of postcard. Both sides treat a longer or undecodable frame as the end
//! of the connection.

use crate::options::{ContainerOptions, ProcessOptions};
use crate::task::Task;
use alloc::string::String;
use alloc::vec::Vec;
use serde::{Deserialize, Serialize};

/// The vsock port on which the agent listens.
pub const PORT: u32 = 1;

/// The longest frame, in bytes: room for the longest argument list and
/// environment that Linux takes (a quarter of an 8 MiB stack), twice.
pub const MAX_FRAME: usize = 4 << 20;

/// The longest frame from the guest: events are short, and a guest that says
/// otherwise is hostile.
pub const MAX_EVENT_FRAME: usize = 64 << 10;

/// Names one process of this child; chosen by the host. The container's own is
/// [`CONTAINER`].
pub type ProcessId = u32;

/// The container's first process.
pub const CONTAINER: ProcessId = 0;

/// The command of a hook, which is the agent's own: no host may choose it.
pub const HOOK: ProcessId = ProcessId::MAX;

/// What a connection is for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Hello {
    /// Requests and events.
    Control,
    /// One stream of one process.
    Stdio {
        /// Whose.
        process: ProcessId,
        /// Which.
        stream: Stream,
    },
}

/// A stream of a process, from its own point of view.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Stream {
    /// Host to guest.
    Stdin,
    /// Guest to host.
    Stdout,
    /// Guest to host.
    Stderr,
    /// Both ways, the master side of a pseudo-terminal.
    Terminal,
}

/// From the host, on the control connection.
#[expect(
    clippy::large_enum_variant,
    reason = "there is one at a time, and it goes by reference"
)]
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Mount the root file system and start the container's first process,
    /// [`CONTAINER`]. Once in the life of a child.
    StartContainer {
        /// The file systems.
        container: ContainerSpec,
        /// The process.
        process: ProcessSpec,
    },
    /// Start one more process in the container, with an id that was never used
    /// in this child. It fails if the container is not running, or has 256
    /// processes of the host's already.
    Exec {
        /// Its name from now on; not [`CONTAINER`] or [`HOOK`].
        id: ProcessId,
        /// The process.
        process: ProcessSpec,
    },
    /// Make the guest ready to be frozen. Only while a warm container runs, and
    /// nothing else does: no process by [`Request::Exec`], no stream of one.
    /// Answered by [`Event::Frozen`] or [`Event::FreezeFailed`].
    Freeze,
    /// In a child of a warm template: tie these streams, which the host has
    /// opened, to the container's first process; answered by [`Event::Started`] when the
    /// child's hook has done its work, and if the process has ended by then, by
    /// [`Event::Exited`] after that; or by [`Event::StartFailed`]. Once in the life of a
    /// child. Connections for streams that the process was not
    /// started with are closed.
    Attach {
        /// Which.
        streams: Vec<Stream>,
    },
    /// Send a signal to a process. To one that has ended: nothing happens.
    Signal {
        /// To whom.
        process: ProcessId,
        /// The signal's number.
        signal: i32,
    },
    /// The size of the terminal has changed.
    Resize {
        /// Whose terminal.
        process: ProcessId,
        /// To what.
        size: WindowSize,
    },
    /// In the place of [`Request::StartContainer`]: mount the file systems, and start a
    /// first process that runs no program and only waits to be killed, so that tasks can
    /// be done.
    OpenContainer {
        /// The file systems.
        container: ContainerSpec,
    },
    /// Do something in the container that is no program's: one more process, told of as
    /// by [`Request::Exec`].
    Task {
        /// Its name from now on; not [`CONTAINER`] or [`HOOK`].
        id: ProcessId,
        /// What.
        task: Task,
        /// The streams that the host has opened; no [`Stream::Terminal`].
        streams: Vec<Stream>,
    },
}

/// From the agent, on the control connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// The process has passed its exec.
    Started {
        /// Which.
        process: ProcessId,
    },
    /// The process could not be started; nothing of it is left.
    StartFailed {
        /// Which.
        process: ProcessId,
        /// Of what sort: it decides the exit status that docker would give.
        reason: StartFailure,
        /// One line for people.
        message: String,
    },
    /// The container has said that it is warm. Once, and only by a container that
    /// this host has started so: never in a child of a warm template.
    Warm,
    /// The container is frozen, and the guest will be at its fork point when all
    /// connections are closed.
    Frozen,
    /// [`Request::Freeze`] cannot be done; the container runs on.
    FreezeFailed {
        /// One line for people.
        message: String,
    },
    /// The process has ended and been reaped. For [`CONTAINER`], every other
    /// process of the container is gone too, and has been told of before.
    Exited {
        /// Which.
        process: ProcessId,
        /// How.
        status: ExitStatus,
    },
}

/// Why a process could not be started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum StartFailure {
    /// The command is not there (docker's 127).
    NotFound,
    /// The command is there and cannot be run (docker's 126).
    NotExecutable,
    /// Anything else (docker's 125): a mount failed, no such user, ...
    Other,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExitStatus {
    /// By exit(2).
    Code(u8),
    /// By a signal.
    Signal(u8),
}

impl ExitStatus {
    /// What a shell and docker make of it: the code, or 128 and the signal.
    pub fn code(self) -> u8 {
        match self {
            Self::Code(code) => code,
            Self::Signal(signal) => signal.saturating_add(128),
        }
    }
}

/// The size of a terminal, in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowSize {
    /// Lines.
    pub rows: u16,
    /// Columns.
    pub cols: u16,
}

/// The file systems of a container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerSpec {
    /// Whether the root image lies in the root window, to be mapped; it is on the first
    /// disk in any case. Said by the fork, not by whoever starts a container.
    pub mapped_root: bool,
    /// Whether the disk of the writable layer is the empty one that was mounted before
    /// the fork point, and not another. Said by the fork.
    pub mounted_disk: bool,
    /// Whether the guest's interface leads anywhere: then the container has it; else it
    /// has a network of its own, with nothing but a loopback. Said by the fork.
    pub network: bool,
    /// What lies over the read-only image.
    pub writable: Writable,
    /// Whether the container will say when it is warm: it finds the socket and the
    /// helper program of docs/warm.md under `/run/vm-run`.
    pub warm: bool,
    /// What is done in a warm container when it is frozen, and in its children.
    pub hooks: Hooks,
    /// Whether its disk outlives it: then all that it wrote is there before the host
    /// hears that it has ended.
    pub kept: bool,
    /// What differs from every other container.
    pub options: ContainerOptions,
    /// The volumes that the host serves this child, each with its place.
    pub volumes: Vec<Mount>,
}

/// What is done in a warm container: before it is frozen, and in each child. The agent
/// keeps it in its memory, so the children of a template have it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hooks {
    /// Before the container's processes are stopped. If it fails, so does the freeze, and
    /// the container goes on.
    pub pre_freeze: Option<Hook>,
    /// In each child, which has its identity, as soon as the container's processes run.
    /// If it fails the container is killed, and [`Request::Attach`] is answered by
    /// [`Event::StartFailed`].
    pub post_fork: Option<Hook>,
    /// How long a command may take before it is killed, and has failed; in milliseconds.
    pub limit_ms: u32,
}

impl Default for Hooks {
    /// None, and half a minute for a command.
    fn default() -> Self {
        Self {
            pre_freeze: None,
            post_fork: None,
            limit_ms: 30_000,
        }
    }
}

/// One of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Hook {
    /// A command in the container, with the environment, the directory, the user and the
    /// restrictions of the container's first process. It must end with 0.
    Command(Vec<String>),
    /// A signal to the container's first process, by number. Nobody waits for what comes
    /// of it.
    Signal(i32),
}

/// The tag of the virtio-fs on which the host serves volumes. Its root has a directory or
/// a file for each, by number: `0`, `1`, ...
pub const VOLUMES_TAG: &str = "volumes";

/// A volume in its place.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// The volume's number.
    pub volume: u32,
    /// Where the container finds it: an absolute path, of which links lead nowhere else
    /// than in the container. Made if it is not there.
    pub target: String,
    /// Whether the container may not change it.
    pub read_only: bool,
    /// Whether an empty volume first gets a copy of what the image has there.
    pub copy_up: bool,
}

/// The writable layer of a container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Writable {
    /// A disk, which holds an ext4.
    Disk,
    /// Guest memory, at most so many bytes.
    Memory {
        /// The size of the tmpfs, in bytes.
        limit: u64,
    },
    /// Nothing: the root file system is read-only.
    #[default]
    Nothing,
}

/// A process to start in the container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessSpec {
    /// The command and its arguments; never empty. A command without a slash is
    /// looked for in the `PATH` of `env`.
    pub args: Vec<String>,
    /// `NAME=value`, each.
    pub env: Vec<String>,
    /// The working directory, or empty for the root; made if it is missing, as docker
    /// does.
    pub cwd: String,
    /// `USER[:GROUP]`, names or numbers, resolved in the image; empty for root.
    pub user: String,
    /// The streams that the host has opened. Without [`Stream::Stdin`] the
    /// process reads from /dev/null.
    pub streams: Vec<Stream>,
    /// The first size of the terminal, if [`Stream::Terminal`] is asked for.
    pub window: Option<WindowSize>,
    /// What differs from every other process.
    pub options: ProcessOptions,
}
