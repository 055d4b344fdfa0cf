//! A template: a frozen parent, from which children are forked.

use crate::child::{Born, Child};
use crate::disk::{Disks, EmptyDisk, LIST_MAX, Slot};
use crate::error::Error;
use crate::guest::Guest;
use crate::identity;
use crate::machine::{CONSOLE_LINES, Local, Machine, Mailbox, News, last_words};
use crate::network::Network;
use crate::request::{Request, Shared};
use crate::stages::ForkPath;
use crate::store::{self, Contents, Manifest};
use crate::volumes::{Claim, Volume};
use crate::worker::{Remote, write_record};
use rustix::fs::{MemfdFlags, memfd_create};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::path::Path;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use vm_run_abi::identity::Connections;
use vm_run_abi::protocol::{Hooks, Stream};
use vm_run_abi::{VERSION, identity as page};
use vmm::payload::micro;
use vmm::{
    Birth, Console, Cpu, Event, EventSink, Host, Image, Isolation, Moment, Payload, Prepared, Vm,
    VmConfig, VmState, floor,
};

/// The trust domain of those who name none.
pub const DEFAULT_DOMAIN: &str = "default";

/// What is inside a template.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Linux, with the agent at its fork point: knows no image.
    Bare,
    /// Linux, with a container inside that goes on in each child.
    Warm,
    /// A few instructions, for measuring.
    Micro,
}

/// The container inside a warm template.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Warm {
    /// What people call its image.
    pub image: String,
    /// The command line of its first process.
    pub command: Vec<String>,
    /// What its first process was started with, `NAME=value` each: what
    /// [`Child::exec`](crate::Child::exec) is usually given, with `cwd` and `user`.
    pub env: Vec<String>,
    /// The directory in which it was started.
    pub cwd: String,
    /// The user, as the image or whoever started it said; empty for root.
    pub user: String,
    /// The streams that its first process has.
    pub streams: Vec<Stream>,
    /// Whether it is on the guest's network: a child's tap is of use to no other.
    pub has_network: bool,
    /// What is done in each child, and before a child is frozen in its turn.
    pub hooks: Hooks,
}

/// A container that ran when a picture of it was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Live {
    /// Where its writable layer is, if that is on a disk.
    pub disk: Option<Slot>,
}

/// What to boot for a template.
#[derive(Debug, Clone)]
pub struct BootSpec {
    /// Guest memory in bytes: a multiple of 2 MiB.
    pub memory: u64,
    /// How many vCPUs.
    pub vcpus: u8,
    /// Kernel and agent; without them, `program` runs.
    pub guest: Option<Guest>,
    /// A guest of a few instructions, for measuring.
    pub program: micro::Program,
    /// More words for the kernel's command line.
    pub cmdline: String,
    /// How long the guest may take to its fork point.
    pub timeout: Duration,
    /// Whose children may share its memory: see docs/threat-model.md.
    pub domain: String,
}

impl Default for BootSpec {
    /// 256 MiB, one vCPU, the guest of a few instructions.
    fn default() -> Self {
        Self {
            memory: 256 << 20,
            vcpus: 1,
            guest: None,
            program: micro::FORK_BENCH,
            cmdline: String::new(),
            timeout: Duration::from_secs(10),
            domain: DEFAULT_DOMAIN.into(),
        }
    }
}

/// What a child is given at the fork.
#[derive(Debug)]
pub struct ForkSpec {
    /// Its hostname: 1 to 64 of `[A-Za-z0-9.-]`.
    pub hostname: String,
    /// The files behind its disks. A warm template has its own root.
    pub disks: Disks,
    /// What it sees of the host's files: at most [`VOLUMES_MAX`](crate::VOLUMES_MAX), in a
    /// worker with a jail. A child with volumes cannot be frozen.
    pub volumes: Vec<Volume>,
    /// Its network. Without one, its container has a loopback interface and nothing else.
    pub network: Option<Network>,
    /// The trust domain of whoever asks.
    pub domain: String,
    /// What becomes of the connections to the outside that the container in a warm
    /// template had: see docs/warm.md.
    pub connections: Connections,
    /// Whether it stops when it has its identity, until [`Child::release`] or the
    /// start of its container.
    pub hold: bool,
}

impl Default for ForkSpec {
    /// A child of no particular name.
    fn default() -> Self {
        Self {
            hostname: "child".into(),
            disks: Disks::default(),
            volumes: Vec::new(),
            network: None,
            domain: DEFAULT_DOMAIN.into(),
            connections: Connections::default(),
            hold: false,
        }
    }
}

/// What a template and its children know of it.
#[derive(Debug)]
pub(crate) struct TemplateInfo {
    pub(crate) host: Arc<Host>,
    pub(crate) kind: Kind,
    pub(crate) guest_digest: String,
    pub(crate) cpu: Cpu,
    pub(crate) domain: String,
    pub(crate) warm: Option<Warm>,
    /// If the parent ran, and was not at its fork point.
    pub(crate) live: Option<Live>,
    /// The lower layers of its container's disk, the lowest first.
    pub(crate) layers: Vec<File>,
    /// What its container's guest knows of its volumes, if it has any.
    pub(crate) volumes: Option<Claim>,
    /// The root image of a warm template's container.
    pub(crate) root: Option<File>,
    /// What lay under the file system that the parent had mounted for its children's
    /// writable layer.
    pub(crate) empty_disk: Option<EmptyDisk>,
}

impl TemplateInfo {
    /// What is known of a child of it, in which this container is, from this root image.
    pub(crate) fn with_container(&self, warm: Warm, root: Option<File>) -> Self {
        Self {
            host: Arc::clone(&self.host),
            kind: Kind::Warm,
            guest_digest: self.guest_digest.clone(),
            cpu: self.cpu.clone(),
            domain: self.domain.clone(),
            warm: Some(warm),
            live: None,
            layers: Vec::new(),
            volumes: None,
            root,
            empty_disk: None,
        }
    }
}

/// A frozen parent, or a picture of one that ran ([`Child::capture`]). Immutable, and cheap to share.
#[derive(Debug)]
pub struct Template {
    info: Arc<TemplateInfo>,
    image: Image,
    state: Arc<VmState>,
    /// For workers; made when it is first asked for.
    record: OnceLock<File>,
}

/// What a child in this process is, but for its VM.
struct Unborn {
    asked: Moment,
    born: Born,
    mailbox: Arc<Mailbox>,
}

impl Template {
    /// Boots a parent to its fork point and freezes it.
    ///
    /// # Errors
    /// A guest that does not get there, with its own words or its last console
    /// lines; or whatever the monitor says.
    pub fn boot(host: Arc<Host>, spec: &BootSpec) -> Result<Self, Error> {
        let (kind, payload, guest_digest) = match &spec.guest {
            None => (
                Kind::Micro,
                Payload::Micro(spec.program.clone()),
                String::new(),
            ),
            Some(_) if host.isolation()? == Isolation::SyscallStaysInUserMode => {
                return Err(Error::NoLinux);
            }
            Some(guest) => (
                Kind::Bare,
                Payload::Linux {
                    kernel: guest.kernel.clone(),
                    initramfs: guest.initramfs.clone(),
                    cmdline: spec.cmdline.clone(),
                },
                guest.digest()?,
            ),
        };
        let config = VmConfig {
            memory: spec.memory,
            vcpus: spec.vcpus,
            payload,
        };
        let disk = spec.guest.as_ref().and_then(|guest| guest.disk.as_deref());
        let disk = disk.map(parents_disk).transpose()?;
        let (image, state) = boot(&host, &config, disk.as_ref(), spec.timeout)?;
        let empty_disk = disk.as_ref().map(EmptyDisk::of).transpose();
        let empty_disk = empty_disk.map_err(Error::Process)?;
        let cpu = host.cpu();
        Ok(Self::new(
            TemplateInfo {
                host,
                kind,
                guest_digest,
                cpu,
                domain: spec.domain.clone(),
                warm: None,
                live: None,
                layers: Vec::new(),
                volumes: None,
                root: None,
                empty_disk,
            },
            image,
            state,
        ))
    }

    pub(crate) fn new(info: TemplateInfo, image: Image, state: VmState) -> Self {
        Self::of(&Arc::new(info), image, state)
    }

    /// Of a child at one instant: what is said of its own template holds of it too.
    pub(crate) fn of(info: &Arc<TemplateInfo>, image: Image, state: VmState) -> Self {
        Self {
            info: Arc::clone(info),
            image,
            state: Arc::new(state),
            record: OnceLock::new(),
        }
    }

    /// The same memory in other files. Nobody has had it yet.
    pub(crate) fn with_memory(self, image: Image) -> Self {
        Self { image, ..self }
    }

    /// A template of a frozen child of another.
    pub(crate) fn frozen(
        parent: &TemplateInfo,
        warm: Warm,
        root: Option<File>,
        image: Image,
        state: VmState,
    ) -> Self {
        Self::new(parent.with_container(warm, root), image, state)
    }

    /// Opens a template on disk. Its memory is mapped from the page cache, so
    /// all children of it, in any process, share it.
    ///
    /// # Errors
    /// A template that is not whole, was made by another version, or for
    /// another CPU.
    pub fn open(host: Arc<Host>, dir: &Path) -> Result<Self, Error> {
        let manifest = Manifest::read(dir)?;
        let cpu = host.cpu();
        manifest.check_cpu(dir, &cpu)?;
        let opened = store::open(dir, &manifest)?;
        Ok(Self::new(
            TemplateInfo {
                host,
                kind: manifest.kind,
                guest_digest: manifest.guest_digest,
                cpu,
                domain: manifest.domain,
                warm: manifest.warm,
                live: manifest.live,
                layers: opened.layers,
                volumes: None,
                root: opened.root,
                empty_disk: opened.empty_disk,
            },
            opened.image,
            opened.state,
        ))
    }

    /// Writes the template to `dir`, which must not exist: it appears there
    /// whole, or not at all.
    ///
    /// # Errors
    /// What the file system says.
    pub fn save(&self, dir: &Path) -> Result<Manifest, Error> {
        if self.info.volumes.is_some() {
            return Err(Error::Request(
                "a container with volumes can be forked and not be kept: what it has open there is on no disk",
            ));
        }
        store::save(
            dir,
            &Contents {
                info: &self.info,
                image: &self.image,
                state: &self.state,
            },
        )
    }

    /// Forks a child in this process: a VM of its own that goes on where the
    /// parent was frozen, with an identity of its own. It runs when this returns.
    /// A [`Pool`](crate::Pool) forks faster, and into processes of their own.
    ///
    /// # Errors
    /// A hostname that is none, another trust domain, a disk that another child
    /// has, more VMs than a process may have, or what KVM says. Nothing is left
    /// then.
    pub fn fork(&self, spec: ForkSpec) -> Result<Child, Error> {
        let request = self.check(spec)?;
        let console = Console::new();
        let (birth, rest) = self.birth(request, console.clone())?;
        let (host, asked) = (&self.info.host, rest.asked);
        let vm = vmm::fork(host, &self.image, &self.state, console, asked, birth)?;
        Ok(self.child_here(vm, rest, ForkPath::Cold))
    }

    /// A VM made ahead, in this process.
    pub(crate) fn prepare(&self) -> Result<Prepared, Error> {
        Ok(Prepared::new(&self.info.host, &self.image, &self.state)?)
    }

    /// Makes a child of a VM in this process.
    pub(crate) fn fork_here(
        &self,
        prepared: Prepared,
        request: Request,
        path: ForkPath,
    ) -> Result<Child, Error> {
        let (birth, rest) = self.birth(request, prepared.console().clone())?;
        let vm = prepared.start(rest.asked, birth)?;
        Ok(self.child_here(vm, rest, path))
    }

    fn birth(&self, request: Request, console: Console) -> Result<(Birth, Unborn), Error> {
        let mailbox = Mailbox::new().map_err(Error::Process)?;
        let rest = Unborn {
            asked: request.asked,
            born: request.born()?,
            mailbox: Arc::clone(&mailbox),
        };
        if !matches!(request.volumes, Shared::Nothing) {
            return Err(Error::Request(
                "volumes need a worker: fork from a pool in workers",
            ));
        }
        let birth = Birth {
            disks: request.disks,
            volumes: None,
            tap: request.network.map(Network::into_tap),
            map_root: request.map_root,
            patches: vec![(page::GPA, request.identity.to_bytes().to_vec())],
            events: mailbox.sink(console),
            hold: request.hold,
        };
        Ok((birth, rest))
    }

    /// Waits until a worker runs the child that it was asked for.
    pub(crate) fn child_in(
        &self,
        mut remote: Remote,
        request: &Request,
        path: ForkPath,
    ) -> Result<Child, Error> {
        let born = request.born()?;
        remote.started()?;
        Ok(self.child(Machine::Worker(remote), born, path))
    }

    fn child(&self, machine: Machine, born: Born, path: ForkPath) -> Child {
        let vcpus = self.state.vcpus() as u8;
        Child::new(machine, Arc::clone(&self.info), vcpus, path, born)
    }

    fn child_here(&self, vm: Vm, unborn: Unborn, path: ForkPath) -> Child {
        let mailbox = unborn.mailbox;
        let machine = Machine::Here(Box::new(Local {
            vm,
            image: self.image.clone(),
            mailbox,
        }));
        self.child(machine, unborn.born, path)
    }

    /// See [`TemplateInfo::check`].
    pub(crate) fn check(&self, spec: ForkSpec) -> Result<Request, Error> {
        self.info.check(spec)
    }

    /// What a fresh writable layer of a child of this template is best made of: the
    /// child finds it mounted. A child that gets any other mounts it when its container
    /// starts. `None` of a guest that came without one, or with a container inside.
    pub fn empty_disk(&self) -> Option<&EmptyDisk> {
        self.info.empty_disk.as_ref()
    }

    /// What one fork of this template costs in KVM itself: see [`vmm::floor`].
    ///
    /// # Errors
    /// What KVM says.
    pub fn floor(&self) -> Result<Duration, Error> {
        let identity = identity::draw("floor")?;
        let patches: [(u64, &[u8]); 1] = [(page::GPA, &identity.to_bytes())];
        Ok(floor::measure(
            &self.info.host,
            &self.image,
            &self.state,
            &patches,
        )?)
    }

    /// The first half of a pooled floor: what can be made ahead. It is to be left
    /// alone for a while before [`Self::pooled_floor`].
    ///
    /// # Errors
    /// What KVM says.
    pub fn floor_ahead(&self) -> Result<floor::Pooled, Error> {
        Ok(floor::Pooled::new(&self.info.host, &self.state)?)
    }

    /// What a fork costs in KVM itself when VM, interrupt controllers, vCPUs and
    /// CPUID were made ahead.
    ///
    /// # Errors
    /// What KVM says.
    pub fn pooled_floor(&self, ahead: floor::Pooled) -> Result<Duration, Error> {
        let identity = identity::draw("floor")?;
        let patches: [(u64, &[u8]); 1] = [(page::GPA, &identity.to_bytes())];
        Ok(ahead.measure(&self.image, &self.state, &patches)?)
    }

    /// What the first write to a page of its memory costs this process now: see
    /// [`vmm::floor::cow_fault`].
    ///
    /// # Errors
    /// What mmap says.
    pub fn cow_fault(&self) -> Result<Duration, Error> {
        Ok(floor::cow_fault(&self.image)?)
    }

    /// The memory that all children share.
    pub fn image(&self) -> &Image {
        &self.image
    }

    /// The frozen parent's state.
    pub fn state(&self) -> &VmState {
        &self.state
    }

    pub(crate) fn info(&self) -> &TemplateInfo {
        &self.info
    }

    pub(crate) fn shared_state(&self) -> &Arc<VmState> {
        &self.state
    }

    /// What a worker needs to know beside the memory's files.
    pub(crate) fn record(&self) -> Result<&File, Error> {
        if let Some(file) = self.record.get() {
            return Ok(file);
        }
        let file = write_record(Some(&self.state), &self.image).map_err(Error::Process)?;
        // Another thread may have been faster, with the same bytes.
        Ok(self.record.get_or_init(|| file))
    }

    /// What is inside.
    pub fn kind(&self) -> Kind {
        self.info.kind
    }

    /// Whether its parent ran, at any instruction, and was not at its fork point.
    pub fn is_live(&self) -> bool {
        self.info.live.is_some()
    }

    /// The lower layers of the disk of the container in it, the lowest first; each child
    /// gets a fresh one over them ([`ForkSpec::disks`]). Empty if that has none.
    pub fn layers(&self) -> &[File] {
        &self.info.layers
    }

    /// The container inside a warm template.
    pub fn warm(&self) -> Option<&Warm> {
        self.info.warm.as_ref()
    }

    /// Whose children may share its memory.
    pub fn domain(&self) -> &str {
        &self.info.domain
    }

    /// The digest of the kernel and agent that were booted; empty without.
    pub fn guest_digest(&self) -> &str {
        &self.info.guest_digest
    }

    /// The host on which it is open.
    pub fn host(&self) -> &Arc<Host> {
        &self.info.host
    }
}

/// What the parent's file system for writable layers lies on, made of the list at `path`.
fn parents_disk(path: &Path) -> Result<File, Error> {
    let list = store::read_bounded(path, LIST_MAX)?;
    let empty = EmptyDisk::from_list(&list).map_err(Error::io(path, "read"))?;
    let file = memfd_create("vm-run-disk", MemfdFlags::CLOEXEC).map(File::from);
    let file = file.map_err(|e| Error::Process(e.into()))?;
    empty.write_to(&file).map_err(Error::Process)?;
    Ok(file)
}

/// Boots a guest, and freezes it at its fork point.
fn boot(
    host: &Host,
    config: &VmConfig,
    disk: Option<&File>,
    timeout: Duration,
) -> Result<(Image, VmState), Error> {
    let (sender, events) = mpsc::channel();
    // The receiver outlives the VM; after that nobody is told anything.
    let sink: EventSink = Arc::new(move |event| drop(sender.send(event)));
    let mounted = disk.map(File::try_clone).transpose();
    let disks = vmm::Disks {
        mounted: mounted.map_err(Error::Process)?.map(Into::into),
        ..vmm::Disks::default()
    };
    let vm = Vm::boot(host, config, disks, &sink)?;
    let console = || vm.console_tail(CONSOLE_LINES);
    let version = match events.recv_timeout(timeout) {
        Ok(Event::ForkPoint { version, .. }) => version,
        Ok(event) => match News::of(&event, console) {
            News::Dead(why) => return Err(Error::Boot(why)),
            other => return Err(Error::Boot(format!("it said {other:?} out of turn"))),
        },
        Err(RecvTimeoutError::Timeout) => {
            let seconds = timeout.as_secs();
            let words = last_words(console()).join(" | ");
            return Err(Error::Boot(format!(
                "it did not reach its fork point in {seconds} s; its last words: {words}"
            )));
        }
        Err(RecvTimeoutError::Disconnected) => {
            return Err(Error::Boot("its vCPUs ended".into()));
        }
    };
    if version != u64::from(VERSION) {
        return Err(Error::Version { guest: version });
    }
    vm.pause()?;
    Ok(vm.freeze()?)
}
