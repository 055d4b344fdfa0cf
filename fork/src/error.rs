//! Errors one can match on.

use std::io;
use std::path::PathBuf;
use vm_run_abi::protocol::StartFailure;

/// What can go wrong with templates and children. Each message is one line.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The monitor: the host's KVM, the configuration, the kernel file, ...
    #[error(transparent)]
    Vm(#[from] vmm::Error),
    /// This host's KVM runs guests, but no kernel in them: it is PVM.
    #[error(
        "this host's KVM cannot run Linux guests (PVM: no VMX or SVM): use another host; vm-run doctor tells more"
    )]
    NoLinux,
    /// The parent did not reach its fork point.
    #[error("the guest did not boot: {0}")]
    Boot(String),
    /// Kernel and agent are of another version than this program.
    #[error("the guest speaks version {guest} of the agreement and this program version {ours}: take the guest that was built with this program", ours = vm_run_abi::VERSION)]
    Version {
        /// What the guest said.
        guest: u64,
    },
    /// A file of a template, or of the guest.
    #[error("{}: {what}: {source}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// A template on disk that is not whole or not ours.
    #[error("template {}: {reason}", path.display())]
    Template {
        /// Where.
        path: PathBuf,
        /// Why it cannot be used, and what to do.
        reason: String,
    },
    /// The hostname is not one.
    #[error("{0}")]
    Hostname(vm_run_abi::identity::Invalid),
    /// The host's random numbers.
    #[error("getrandom: {0}")]
    Random(io::Error),
    /// A child that did not say that it has its identity: it does not run.
    #[error("the child did not confirm its identity{0}")]
    Identity(String),
    /// The child's guest has died or does not answer.
    #[error("the virtual machine died: {0}")]
    Died(String),
    /// The process could not be started.
    #[error("{message}")]
    Start {
        /// Of what sort.
        reason: StartFailure,
        /// The agent's line.
        message: String,
    },
    /// A message that is longer than the agreement allows.
    #[error("the command line and environment are too long: {bytes} bytes, and {max} is the most")]
    TooLong {
        /// How long.
        bytes: usize,
        /// How long it may be.
        max: usize,
    },
    /// A child of another trust domain was asked for.
    #[error(
        "the template belongs to the trust domain {template:?} and the child was asked for by {asked:?}: children share their template's memory, so build a template for that domain"
    )]
    Domain {
        /// Whose the template is.
        template: String,
        /// Who asked.
        asked: String,
    },
    /// A request that contradicts itself or its template.
    #[error("{0}")]
    Request(&'static str),
    /// A container that is not warm, or cannot be frozen.
    #[error("the container cannot be frozen: {0}")]
    NotWarm(String),
    /// This process lacks something: descriptors, memory, ...
    #[error("cannot manage a virtual machine: {0}")]
    Process(#[source] io::Error),
    /// A pool that is not full in time.
    #[error("{ready} of {size} virtual machines of the pool are ready: {why}")]
    PoolNotFull {
        /// How many are.
        ready: usize,
        /// How many there should be.
        size: usize,
        /// Why.
        why: String,
    },
    /// A worker refused, with its own words.
    #[error("{0}")]
    Worker(String),
    /// A worker has ended, or broken the rules.
    #[error("the worker process has gone: {0}")]
    WorkerGone(String),
    /// A template in parts that cannot be put together.
    #[error("a template from another process cannot be used: {0}")]
    Parcel(String),
    /// The call does not fit the child's state.
    #[error("the child {0}")]
    State(&'static str),
    /// The spawner of workers, or a worker on its way into its jail: a call failed.
    #[error("workers: {what}: {source}")]
    Spawner {
        /// What was tried.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// What a worker or the spawner said before it gave up; or that it ended.
    #[error("{0}")]
    Jail(String),
}

impl Error {
    pub(crate) fn io(
        path: impl Into<PathBuf>,
        what: &'static str,
    ) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io {
            path: path.into(),
            what,
            source,
        }
    }

    pub(crate) fn spawner(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Spawner { what, source }
    }
}
