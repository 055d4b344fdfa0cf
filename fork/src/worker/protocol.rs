//! What an owner and its worker say to each other: packets on one socket.
//!
//! ```text
//!   owner                        worker
//!   Make     a base        -->   makes a VM
//!                          <--   Made
//!   Lay      half a picture -->  gives it memory          (of a source that runs)
//!                          <--   Laid
//!   Load     a picture     -->   gives it memory and state, waits
//!                          <--   Loaded
//!   Start    disks         -->   identity, clocks, run
//!                          <--   Started
//!                          <--   News ...
//!   Connect                -->
//!                          <--   Connected  stream
//! ```
//! The owner's end of file is the worker's end. A worker is trusted by its owner
//! no more than the guest inside it: its packets are bounded, and what it sends
//! is checked as what comes from a file.

use crate::machine::News;
use serde::{Deserialize, Serialize};
use vmm::{CaptureCost, Moment, RateLimits, Timeline};

/// From the owner.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum ToWorker {
    /// Make a VM. With it: the file of its base.
    Make {
        /// Guest memory, in bytes.
        memory: u64,
        vcpus: u8,
    },
    /// Give it memory, as far as there is some. With it: the files of a picture
    /// (`picture.rs`) without a state.
    Lay {
        /// Guest memory, in bytes.
        memory: u64,
    },
    /// Give it memory and state. With it: the files of a picture (`picture.rs`), whose
    /// base is that of the VM.
    Load {
        /// Guest memory, in bytes.
        memory: u64,
    },
    /// Make it a child, and run it. With it: the files of the disks that it has, the
    /// socket to the server of its volumes, and the tap of its network.
    Start {
        asked: Moment,
        /// What the identity page is to hold.
        identity: Vec<u8>,
        has_root: bool,
        /// How many files each of the other disks has.
        mounted: usize,
        writable: usize,
        has_volumes: bool,
        /// The limits of its network, whose tap comes with it.
        network: Option<RateLimits>,
        map_root: bool,
        hold: bool,
    },
    /// Stop the guest.
    Pause,
    /// Let the guest go on, which was held or stopped.
    Resume,
    /// Stop the guest, and let it go on as somebody else.
    Renew {
        /// What the identity page is to hold.
        identity: Vec<u8>,
    },
    /// Connect to a port of the guest.
    Connect { port: u32 },
    /// Tell the guest's last words.
    LastWords,
    /// Begin a picture of the guest, which runs on.
    BeginCapture {
        /// Whether it has to have one that takes an identity at any instruction.
        has_kernel: bool,
    },
    /// Take the picture that was begun. With it: what is to lie over its disk, and the
    /// claim to what it knows of its volumes.
    FinishCapture {
        has_overlay: bool,
        has_claim: bool,
        stays_paused: bool,
    },
    /// Have one file in the place of overlays of its disk. With it: the file.
    ReplaceLayers {
        /// How many, above the lowest file.
        count: usize,
    },
    /// Freeze the guest, which is at its fork point.
    Freeze,
}

/// From the worker. Each request has one answer; news come in between.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum FromWorker {
    Made,
    Laid,
    Loaded,
    Started {
        timeline: Timeline,
        /// Where the guest's memory lies in the worker: (address, length).
        mappings: Vec<(u64, u64)>,
        /// Where the root image lies in the worker, if it is mapped into the guest.
        root_image: Option<(u64, u64)>,
    },
    Paused,
    Resumed,
    Renewed,
    LayersReplaced,
    /// With it: the stream.
    Connected,
    LastWords(Vec<String>),
    /// With it: the layer that the picture is to have, which is not sealed yet, and the
    /// record of the pages in it.
    Copied,
    /// With it: the record of the pages in the layer, and of the state.
    Captured(CaptureCost),
    /// With it: the memory, and the record of the rest.
    Frozen {
        /// Guest memory, in bytes.
        memory: u64,
    },
    /// The request could not be fulfilled: one line.
    Failed(String),
    News(News),
}
