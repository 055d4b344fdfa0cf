//! What a child's fork found ready, and when the child reached each stage.

use serde::{Deserialize, Serialize};
use vmm::{Moment, Timeline};

/// What was ready when a child was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ForkPath {
    /// Nothing: its VM was made at the fork.
    Cold,
    /// A pool had its VM.
    Pooled,
    /// Its parent ran on: its VM was made meanwhile.
    Live,
}

/// When a child reached each stage. What has not happened is `None`.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Stages {
    /// The fork itself.
    pub fork: Timeline,
    /// The first vCPU entered the guest.
    pub entered: Option<Moment>,
    /// The guest had applied its identity, or a guest without Linux had answered.
    pub confirmed: Option<Moment>,
    /// The container's process had passed its exec, or was attached to.
    pub started: Option<Moment>,
    /// The container's exit was known.
    pub exited: Option<Moment>,
}
