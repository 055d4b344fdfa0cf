//! Errors one can match on. Each message is one line: what, where, what to do.

use std::path::PathBuf;

/// A configuration that no guest can have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Bytes.
    #[error(
        "{0} bytes of guest memory: it takes a multiple of 2 MiB from {min} MiB to {max} GiB",
        min = crate::layout::MEMORY_MIN >> 20, max = crate::layout::MEMORY_MAX >> 30
    )]
    Memory(u64),
    /// How many were asked for.
    #[error("{0} vCPUs: it takes 1 to {max}", max = crate::layout::VCPUS_MAX)]
    Vcpus(u8),
    /// The command line of the kernel.
    #[error("the kernel's command line is longer than {max} bytes or not ASCII", max = crate::layout::CMDLINE_MAX - 1)]
    CommandLine,
}

/// Why this host cannot run a VM.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// No such file.
    #[error(
        "there is no /dev/kvm: enable virtualization in the firmware, or nested virtualization on the cloud host, and load kvm_intel or kvm_amd"
    )]
    NoKvm,
    /// EACCES or EPERM.
    #[error(
        "no permission to open /dev/kvm: add yourself to the group that owns it (usually: usermod -aG kvm $USER), or be root"
    )]
    Permission,
    /// Anything else on the way to a usable KVM.
    #[error("cannot open /dev/kvm: {0}")]
    Open(#[source] std::io::Error),
    /// No /proc, or one of an odd sort.
    #[error("cannot open /proc/self/pagemap: {0}; mount proc at /proc")]
    Proc(#[source] std::io::Error),
    /// KVM_GET_API_VERSION.
    #[error("/dev/kvm speaks API version {0}, not 12")]
    ApiVersion(i32),
    /// KVM_CHECK_EXTENSION.
    #[error("this KVM lacks {0}: vm-run needs Linux 6.1 or later on the host")]
    Capability(&'static str),
    /// An ioctl on /dev/kvm.
    #[error("{call} failed on this host: {source}")]
    Ioctl {
        /// The ioctl's name.
        call: &'static str,
        /// What it said.
        source: std::io::Error,
    },
}

/// What can go wrong with one virtual machine.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// See [`ConfigError`].
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// See [`HostError`].
    #[error(transparent)]
    Host(#[from] HostError),
    /// A KVM call on a VM or vCPU.
    #[error("{call}: {source}")]
    Kvm {
        /// The ioctl's name.
        call: &'static str,
        /// What it said.
        source: std::io::Error,
    },
    /// KVM took only the first of the MSRs.
    #[error("KVM_SET_MSRS took {set} of {len}: it refused MSR {msr:#x}")]
    Msr {
        /// How many it took.
        set: usize,
        /// How many there were.
        len: usize,
        /// The first that it refused.
        msr: u32,
    },
    /// Making, mapping or sealing guest memory.
    #[error("guest memory: {what}: {source}")]
    Memory {
        /// What was tried.
        what: &'static str,
        /// What it said.
        source: std::io::Error,
    },
    /// The monitor's own access to guest memory.
    #[error("guest memory at {gpa:#x}: {source}")]
    GuestMemory {
        /// Where.
        gpa: u64,
        /// What vm-memory said.
        source: vm_memory::GuestMemoryError,
    },
    /// The kernel file.
    #[error("{}: {reason}", path.display())]
    Kernel {
        /// Which.
        path: PathBuf,
        /// In words.
        reason: String,
    },
    /// A state that does not describe a machine of ours.
    #[error("the saved state is not usable: {0}")]
    State(String),
    /// A guest of ours that should have run and did not.
    #[error("{0}")]
    Guest(String),
    /// A device refused its state or its file.
    #[error("{device}: {reason}")]
    Device {
        /// Which.
        device: &'static str,
        /// Its own words.
        reason: String,
    },
    /// A thread or an event file could not be made.
    #[error("{what}: {source}")]
    Os {
        /// What was tried.
        what: &'static str,
        /// What it said.
        source: std::io::Error,
    },
    /// As many VMs live in this process as it allows.
    #[error(
        "{most} virtual machines live in this process, and no more are allowed: each slows every page fault of all others; fork into workers, or allow more with Host::allow_vms"
    )]
    TooMany {
        /// How many are allowed.
        most: usize,
    },
    /// The VM is not in the phase that the call needs.
    #[error("the virtual machine is {0}")]
    Phase(&'static str),
    /// A vCPU thread is gone or does not answer.
    #[error("vCPU {0} does not answer")]
    Unresponsive(u8),
}

impl Error {
    pub(crate) fn kvm(call: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |e| Self::Kvm {
            call,
            source: e.into(),
        }
    }

    pub(crate) fn os(what: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Os { what, source }
    }

    pub(crate) fn memory<E: Into<std::io::Error>>(what: &'static str) -> impl FnOnce(E) -> Self {
        move |e| Self::Memory {
            what,
            source: e.into(),
        }
    }
}
