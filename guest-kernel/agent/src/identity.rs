//! What a child does first: it becomes somebody.

use crate::doorbell::{Doorbell, IdentityPage, on_small_stack};
use crate::poll::{Poll, Token};
use crate::sys;
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{Mode, OFlags, open};
use rustix::io::{Errno, pwrite};
use rustix::time::{ClockId, Timespec, clock_settime};
use std::io;
use vm_run_abi::identity::{Connections, Identity, Invalid};

/// Everything that the step from the fork point to the applied identity needs,
/// made ready before the fork point: after it, nothing is opened or allocated.
#[derive(Debug)]
pub struct ForkPoint {
    doorbell: Doorbell,
    page: IdentityPage,
    random: OwnedFd,
    /// Where the kernel is told of the generation (`linux/patches/0003-…`): it draws a
    /// new boot_id, and wakes whoever polls. `None` on a kernel of a user's own.
    generation: Option<OwnedFd>,
}

/// What a child knows of itself, once it has its identity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Child {
    /// See [`Identity::generation`].
    pub generation: u64,
    /// See [`Identity::connections`].
    pub connections: Connections,
}

const GENERATION: &str = "/proc/sys/kernel/random/generation";

/// Where the kernel says that the guest was forked while it ran, and is told to let the
/// container's programs go on (`linux/patches/0006-…`).
const HELD: &str = "/proc/sys/kernel/vmrun_held";

impl ForkPoint {
    /// Opens what is needed.
    pub fn prepare(doorbell: Doorbell) -> Result<Self, String> {
        let page = IdentityPage::map()
            .map_err(|e| format!("cannot map the identity page through /dev/mem: {e}"))?;
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        let random = open("/dev/urandom", flags, Mode::empty())
            .map_err(|e| format!("cannot open /dev/urandom: {e}"))?;
        let flags = OFlags::WRONLY | OFlags::CLOEXEC;
        let generation = match open(GENERATION, flags, Mode::empty()) {
            Ok(file) => Some(file),
            Err(Errno::NOENT) => None,
            Err(e) => return Err(format!("cannot open {GENERATION}: {e}")),
        };
        Ok(Self {
            doorbell,
            page,
            random,
            generation,
        })
    }

    /// Rings the fork point until this is a child, and makes its identity hold:
    /// the result is who it is. An error must end the guest: nothing may run
    /// under a twin's identity.
    ///
    /// Static, because a static lies in the program's image: from the fork point to
    /// the identity nothing of the ordinary stack or of the heap is touched.
    pub fn become_child(&'static self) -> Result<Child, String> {
        let mut result = Err(String::new());
        on_small_stack(|| {
            let child = self.take_identity();
            // The entropy has been passed by value: whoever freezes this child is
            // not to find it in what the calls have left.
            sys::wipe_stack();
            if let Ok(child) = child {
                self.doorbell.identity_applied(child.generation);
            }
            result = child;
        });
        let child = result?;
        self.tell_kernel(child.generation)?;
        Ok(child)
    }

    /// Not on the way to the acknowledgement: it is a write by way of /proc, six pages
    /// more. Nothing but the agent runs yet.
    fn tell_kernel(&self, generation: u64) -> Result<(), String> {
        let Some(file) = &self.generation else {
            return Ok(());
        };
        let text = generation.to_string();
        let written = pwrite(file, text.as_bytes(), 0);
        written.map_err(|e| format!("cannot write {GENERATION}: {e}"))?;
        Ok(())
    }

    /// A function of its own so that its frame can be wiped.
    #[inline(never)]
    fn take_identity(&self) -> Result<Child, String> {
        let identity = loop {
            self.doorbell.fork_point();
            match Identity::from_bytes(&self.page.read()) {
                Ok(identity) => break identity,
                Err(Invalid::NoMagic) => {}
                Err(e) => return Err(e.to_string()),
            }
        };
        self.page.wipe_entropy();
        self.apply(&identity)?;
        Ok(Child {
            generation: identity.generation,
            connections: identity.connections,
        })
    }

    fn apply(&self, identity: &Identity) -> Result<(), String> {
        sys::reseed(self.random.as_fd(), &identity.entropy)
            .map_err(|e| format!("cannot reseed the kernel's random numbers: {e}"))?;
        clock_settime(ClockId::Realtime, timespec(identity.realtime_ns))
            .map_err(|e| format!("cannot set the clock: {e}"))?;
        set_hostname(identity)
    }
}

/// The way to an identity of a guest that is forked while it runs: the kernel has taken its
/// part before anything ran, and holds the container's programs.
#[derive(Debug)]
pub struct LiveFork {
    fork_point: &'static ForkPoint,
    held: OwnedFd,
}

impl LiveFork {
    /// `None` on a kernel of a user's own.
    pub fn prepare(fork_point: &'static ForkPoint) -> Result<Option<Self>, String> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        match open(HELD, flags, Mode::empty()) {
            Ok(held) => Ok(Some(Self { fork_point, held })),
            Err(Errno::NOENT) => Ok(None),
            Err(e) => Err(format!("cannot open {HELD}: {e}")),
        }
    }

    /// Has `poll` say when it has happened.
    pub fn watch(&self, poll: &Poll) -> io::Result<()> {
        poll.watch_for_change(&self.held, Token::Forked)
    }

    /// Whether the one of this generation is somebody else by now.
    pub fn has_happened(&self, generation: u64) -> bool {
        let page = Identity::from_bytes(&self.fork_point.page.read());
        page.is_ok_and(|page| page.live && page.generation != generation)
    }

    /// Takes what the kernel has left: the hostname.
    pub fn take_identity(&self) -> Result<Child, String> {
        let identity = Identity::from_bytes(&self.fork_point.page.read());
        let identity = identity.map_err(|e| e.to_string())?;
        set_hostname(&identity)?;
        Ok(Child {
            generation: identity.generation,
            connections: identity.connections,
        })
    }

    /// Tells the monitor that the identity holds, and lets the container's programs run.
    pub fn release(&self, child: Child) -> io::Result<()> {
        self.fork_point.doorbell.identity_applied(child.generation);
        pwrite(&self.held, b"0", 0)?;
        Ok(())
    }
}

fn set_hostname(identity: &Identity) -> Result<(), String> {
    rustix::system::sethostname(identity.hostname().as_bytes())
        .map_err(|e| format!("cannot set the hostname: {e}"))
}

fn timespec(ns: u64) -> Timespec {
    const SECOND: u64 = 1_000_000_000;
    Timespec {
        tv_sec: (ns / SECOND) as i64,
        tv_nsec: (ns % SECOND) as i64,
    }
}
