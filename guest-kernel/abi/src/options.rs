//! What a host may ask for and most do not. The default of each is what docker does
//! with no option given, and costs a child nothing.
//!
//! The host has checked the values; the agent takes them as they are.

use alloc::string::String;
use alloc::vec::Vec;
use serde::{Deserialize, Serialize};

/// Of a container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerOptions {
    /// Nothing of the guest is hidden from it or locked: it sees and opens every
    /// device, and may write to all of /proc and /sys.
    pub privileged: bool,
    /// Its PID 1 is not its program: it hands signals on to that, reaps whatever
    /// becomes an orphan, and ends as the program does.
    pub init: bool,
    /// File systems in memory, in the order in which they are mounted.
    pub tmpfs: Vec<Tmpfs>,
    /// The size of /dev/shm, in bytes, where it is not 64 MiB.
    pub shm_size: Option<u64>,
    /// Kernel parameters and their values.
    pub sysctls: Vec<(String, String)>,
    /// The NIS domain, where there is one.
    pub domainname: String,
    /// More lines for /etc/hosts.
    pub hosts: String,
    /// The content of /etc/resolv.conf.
    pub resolv_conf: String,
    /// The most memory of all its processes, in bytes.
    pub memory: Option<u64>,
    /// The processor time of all its processes in 100 ms, in microseconds.
    pub cpu_quota: Option<u64>,
    /// The most processes it may have.
    pub pids: Option<u64>,
}

/// A file system in memory.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tmpfs {
    /// Where: an absolute path, made if it is missing.
    pub path: String,
    /// The flags of mount(2).
    pub flags: u32,
    /// The options of tmpfs, comma-separated.
    pub data: String,
}

/// Of a process.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessOptions {
    /// What root may do, a bit for each capability by its number, where it is not
    /// docker's default. Those that the kernel does not know are left out.
    pub capabilities: Option<u64>,
    /// Whether no program that it runs gives it more privileges.
    pub no_new_privileges: bool,
    /// Groups to be in, names or numbers, resolved in the image.
    pub groups: Vec<String>,
    /// Limits of its resources.
    pub limits: Vec<Limit>,
    /// How much rather than others the kernel ends it when memory is out.
    pub oom_score_adj: Option<i32>,
}

/// A limit of a resource (setrlimit(2)).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limit {
    /// `RLIMIT_*`, by number.
    pub resource: u32,
    /// Of which the process is told; [`u64::MAX`] is no limit.
    pub soft: u64,
    /// To which it may raise that.
    pub hard: u64,
}
