//! A template: a frozen parent, from which children are forked.

use crate::child::{Child, Inbox};
use crate::error::Error;
use crate::guest::Guest;
use crate::identity;
use crate::store::{self, Manifest, Memory};
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};
use vm_run_abi::{VERSION, identity as page};
use vmm::payload::micro;
use vmm::{Cpu, Disks, Event, EventSink, Host, Image, Isolation, Payload, Vm, VmConfig, VmState};

/// What is inside a template.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Linux, with the agent at its fork point: knows no image.
    Bare,
    /// A few instructions, for measuring.
    Micro,
}

/// What to boot for a template.
#[derive(Debug, Clone)]
pub struct BootSpec {
    /// Guest memory in bytes: a multiple of 2 MiB.
    pub memory: u64,
    /// How many vCPUs.
    pub vcpus: u8,
    /// Kernel and agent; without them: the guest of a few instructions.
    pub guest: Option<Guest>,
    /// More words for the kernel's command line.
    pub cmdline: String,
    /// How long the guest may take to its fork point.
    pub timeout: Duration,
}

/// What a child is given at the fork.
#[derive(Debug, Default)]
pub struct ForkSpec {
    /// Its hostname: 1 to 64 of `[A-Za-z0-9.-]`.
    pub hostname: String,
    /// The files behind its disks.
    pub disks: Disks,
}

/// A frozen parent. Immutable, and cheap to share.
#[derive(Debug)]
pub struct Template {
    host: Arc<Host>,
    image: Image,
    state: VmState,
    kind: Kind,
    guest_digest: String,
    cpu: Cpu,
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
                Payload::Micro(&micro::FORK_BENCH),
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
        let (sender, events) = mpsc::channel();
        // The receiver outlives the VM; after that nobody is told anything.
        let sink: EventSink = Arc::new(move |event| drop(sender.send(event)));
        let vm = Vm::boot(&host, &config, sink)?;
        let deadline = Instant::now() + spec.timeout;
        let version = loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match events.recv_timeout(left) {
                Ok(Event::Entered(_)) => {}
                Ok(Event::ForkPoint { version, .. }) => break version,
                Ok(Event::BootFailed(line)) => return Err(Error::Boot(line)),
                Ok(other) => return Err(Error::Boot(death(&other, &vm))),
                Err(RecvTimeoutError::Timeout) => {
                    let seconds = spec.timeout.as_secs();
                    let tail = console(&vm);
                    return Err(Error::Boot(format!(
                        "it did not reach its fork point in {seconds} s{tail}"
                    )));
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(Error::Boot("its vCPUs ended".into()));
                }
            }
        };
        if version != u64::from(VERSION) {
            return Err(Error::Version { guest: version });
        }
        vm.pause()?;
        let (image, state) = vm.freeze()?;
        let cpu = host.cpu();
        Ok(Self {
            host,
            image,
            state,
            kind,
            guest_digest,
            cpu,
        })
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
        let (image, state) = store::open(dir, &manifest)?;
        Ok(Self {
            host,
            image,
            state,
            kind: manifest.kind,
            guest_digest: manifest.guest_digest,
            cpu,
        })
    }

    /// Writes the template to `dir`, which must not exist: it appears there
    /// whole, or not at all.
    ///
    /// # Errors
    /// What the file system says.
    pub fn save(&self, dir: &Path) -> Result<Manifest, Error> {
        store::save(
            dir,
            self.kind,
            &self.guest_digest,
            &self.cpu,
            &Memory {
                image: &self.image,
                state: &self.state,
            },
        )
    }

    /// Forks a child: a VM of its own that goes on where the parent was frozen,
    /// with an identity of its own. It runs when this returns.
    ///
    /// # Errors
    /// A hostname that is none, a disk that another child has, or what KVM says.
    /// Nothing is left then.
    pub fn fork(&self, spec: ForkSpec) -> Result<Child, Error> {
        let identity = identity::draw(&spec.hostname)?;
        let (inbox, sink) = Inbox::new();
        let vm = Vm::restore(
            &self.host,
            &self.image,
            &self.state,
            spec.disks,
            &[(page::GPA, &identity.to_bytes())],
            sink,
        )?;
        Ok(Child::new(vm, inbox, identity.generation))
    }

    /// What one fork of this template costs in KVM itself: see [`vmm::floor`].
    ///
    /// # Errors
    /// What KVM says.
    pub fn floor(&self) -> Result<Duration, Error> {
        let identity = identity::draw("floor")?;
        let patches: [(u64, &[u8]); 1] = [(page::GPA, &identity.to_bytes())];
        Ok(vmm::floor::measure(
            &self.host,
            &self.image,
            &self.state,
            &patches,
        )?)
    }

    /// The memory that all children share.
    pub fn image(&self) -> &Image {
        &self.image
    }

    /// The frozen parent's state.
    pub fn state(&self) -> &VmState {
        &self.state
    }

    /// What is inside.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The digest of the kernel and agent that were booted; empty without.
    pub fn guest_digest(&self) -> &str {
        &self.guest_digest
    }

    /// The host on which it is open.
    pub fn host(&self) -> &Arc<Host> {
        &self.host
    }
}

/// How a guest ended, in one line.
pub(crate) fn death(event: &Event, vm: &Vm) -> String {
    let tail = console(vm);
    match event {
        Event::PowerOff => format!("it powered off{tail}"),
        Event::Reset => format!("it reset itself{tail}"),
        Event::BootFailed(line) => line.clone(),
        Event::Failed(reason) => format!("{reason}{tail}"),
        other => format!("it said {other:?} out of turn{tail}"),
    }
}

fn console(vm: &Vm) -> String {
    // A panic is followed by registers and traces: more than a screen of them.
    match last_words(vm.console_tail(200)) {
        lines if lines.is_empty() => "; its console is empty".into(),
        lines => format!("; its last words: {}", lines.join(" | ")),
    }
}

/// Five lines: those that end with the line in which the kernel says why it gave
/// up, or else the last.
fn last_words(mut lines: Vec<String>) -> Vec<String> {
    const PANIC: &str = "Kernel panic - not syncing";
    if let Some(at) = lines.iter().position(|line| line.contains(PANIC)) {
        lines.truncate(at + 1);
    }
    lines.split_off(lines.len().saturating_sub(5))
}

#[cfg(test)]
mod tests {
    use super::last_words;

    #[test]
    fn the_last_words_end_with_the_reason() {
        let lines = |text: &str| text.split(' ').map(String::from).collect::<Vec<_>>();
        assert_eq!(last_words(lines("a b c d e f")), lines("b c d e f"));
        assert_eq!(last_words(lines("a")), ["a"]);
        assert!(last_words(Vec::new()).is_empty());
        let panic = "[ 1.0] Kernel panic - not syncing: it is late".to_owned();
        let mut said = lines("a b");
        said.push(panic.clone());
        said.extend(lines("c d e f g h"));
        assert_eq!(last_words(said), ["a".to_owned(), "b".to_owned(), panic]);
    }
}
