//! A VM made ready to run as a child: everything that can be done before it is
//! known which child it will be.
//!
//! ```text
//!   caller          | VM, memory, chips, vCPUs, vCPU 0's state | disks, identity, clocks, Go
//!   vCPU 0's thread |                                                                       runs
//!   other vCPUs'    |                          their state ............................... run
//! ```
//! A cold fork does both halves in a row; a pool does the first ahead, and only
//! [`Prepared::start`] is left. Of a parent that still runs there is no state yet: its
//! children are made as a [`Shell`], all that they have in common with any other VM.
//!
//! The caller does all that vCPU 0 needs, and hands it over when it can run: on a
//! host whose idle CPUs sleep, one wake of another thread costs as much as a
//! vCPU's whole state.

use crate::error::Error;
use crate::host::Host;
use crate::io::Io;
use crate::kvm::{KvmVm, Made};
use crate::machine::{Bus, Devices, Disks, EventSink, Tap};
use crate::memory::{Image, Ram};
use crate::moment::Moment;
use crate::reaper::{Parts, Permit, Reaper};
use crate::vcpu::gate::Gate;
use crate::vcpu::handle::Vcpu;
use crate::vcpu::state;
use crate::vcpu::thread::{Go, Order, Restore, Seat};
use crate::vm::{Timeline, Vm, VmState};
use devices::Console;
use kvm_ioctls::VcpuFd;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::Receiver;

/// What makes a VM one child and no other.
pub struct Birth {
    /// The files behind its disks.
    pub disks: Disks,
    /// The server of its volumes: see [`devices::virtio::fs::Fs::bind`].
    pub volumes: Option<OwnedFd>,
    /// The tap of its network.
    pub tap: Option<Tap>,
    /// Whether the root image is mapped into the guest too, if it fits its root
    /// window: it shares the image's pages with all who map them.
    pub map_root: bool,
    /// (Guest-physical address, bytes), written into its memory.
    pub patches: Vec<(u64, Vec<u8>)>,
    /// Where its events go.
    pub events: EventSink,
    /// Whether the vCPU that applies its identity stops then, until
    /// [`Vm::resume`].
    pub hold: bool,
}

/// A VM that lacks only its identity and its disks. Dropping it ends it.
pub struct Prepared {
    host: Arc<Host>,
    parts: Unused,
    state: Arc<VmState>,
    first: VcpuFd,
    /// Of vCPU 0, if it was started ahead.
    thread: Option<Vcpu>,
    console: Console,
    made: Made,
    loaded: Moment,
    /// What the other vCPUs say when they are loaded.
    loading: Vec<Receiver<Result<Moment, Error>>>,
}

/// A VM with memory and vCPUs that have no state yet. Dropping it ends it.
pub struct Shell {
    host: Arc<Host>,
    kvm: KvmVm,
    permit: Permit,
    fds: Vec<VcpuFd>,
    made: Made,
    /// Of vCPU 0, if it was started ahead.
    thread: Option<Vcpu>,
}

impl Shell {
    /// Makes one with `vcpus` vCPUs, over the base of `image`.
    ///
    /// # Errors
    /// More vCPUs than a VM has, more VMs than this process allows, or what KVM says.
    pub fn new(host: &Arc<Host>, image: &Image, vcpus: u8) -> Result<Self, Error> {
        let mut this = Self::make(host, vcpus, || Ram::over_base(image))?;
        this.thread = Some(Vcpu::spawn(0)?);
        Ok(this)
    }

    fn make(
        host: &Arc<Host>,
        vcpus: u8,
        map: impl FnOnce() -> Result<Ram, Error>,
    ) -> Result<Self, Error> {
        let permit = host.permit()?;
        let (kvm, made) = KvmVm::new(host, map)?;
        let fds = kvm.populate(vcpus)?;
        Ok(Self {
            host: Arc::clone(host),
            kvm,
            permit,
            fds,
            made,
            thread: None,
        })
    }

    /// Maps the layers of `image`, which has its base, as far as they are there: the rest
    /// comes with [`Self::load`].
    ///
    /// # Errors
    /// What mmap says.
    pub fn lay(&mut self, image: &Image) -> Result<(), Error> {
        self.kvm.ram.lay_over(image)
    }

    /// Gives it the layers of `image`, which has its base, and the state `state`.
    ///
    /// # Errors
    /// A state that is not usable here, or of another number of vCPUs; or what KVM says.
    /// Nothing is left.
    pub fn load(mut self, image: &Image, state: &Arc<VmState>) -> Result<Prepared, Error> {
        state.check()?;
        self.kvm.ram.lay_over(image)?;
        Prepared::of(self, state, Console::new())?.ahead()
    }
}

impl std::fmt::Debug for Shell {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shell").finish_non_exhaustive()
    }
}

/// A VM's parts, buried when they are dropped.
struct Unused {
    parts: Option<Parts>,
    reaper: Arc<Reaper>,
}

impl Drop for Unused {
    fn drop(&mut self) {
        if let Some(parts) = self.parts.take() {
            self.reaper.bury(parts);
        }
    }
}

/// Makes a VM over `image` in the state `state` that is a child at once: both
/// halves in a row. `console` is to be its console; `asked` is when somebody asked
/// for the child.
///
/// # Errors
/// As [`Prepared::new`] and [`Prepared::start`].
pub fn fork(
    host: &Arc<Host>,
    image: &Image,
    state: &Arc<VmState>,
    console: Console,
    asked: Moment,
    birth: Birth,
) -> Result<Vm, Error> {
    Prepared::make(host, image, state, console)?.start(asked, birth)
}

impl Prepared {
    /// Makes a VM over `image` in the state `state`.
    ///
    /// # Errors
    /// A state that is not usable here, more VMs than this process allows, or
    /// what KVM says. Nothing is left.
    pub fn new(host: &Arc<Host>, image: &Image, state: &Arc<VmState>) -> Result<Self, Error> {
        Self::make(host, image, state, Console::new())?.ahead()
    }

    /// To be started later: all that can be done before is done.
    fn ahead(mut self) -> Result<Self, Error> {
        let this = &mut self;
        this.settle()?;
        if this.thread.is_none() {
            this.thread = Some(Vcpu::spawn(0)?);
        }
        // Ahead of time is the time for it; and a confined vCPU could not start it.
        if let Some(parts) = &this.parts.parts {
            parts.io.ensure()?;
        }
        Ok(self)
    }

    fn make(
        host: &Arc<Host>,
        image: &Image,
        state: &Arc<VmState>,
        console: Console,
    ) -> Result<Self, Error> {
        state.check()?;
        let count = state.vcpus.len() as u8;
        let shell = Shell::make(host, count, || Ram::private(image))?;
        Self::of(shell, state, console)
    }

    /// Loads a shell that has the memory already; the state was checked by itself.
    fn of(shell: Shell, state: &Arc<VmState>, console: Console) -> Result<Self, Error> {
        state.check_sizes(shell.kvm.xsave_size)?;
        if state.vcpus.len() != shell.fds.len() {
            return Err(Error::State(format!("{} vCPUs", state.vcpus.len())));
        }
        let Shell {
            host,
            kvm,
            permit,
            mut fds,
            made,
            thread,
        } = shell;
        let chips = kvm.chips(fds.len());
        let restore = || Restore {
            state: Arc::clone(state),
            chips: Arc::clone(&chips),
        };
        let others = fds.split_off(1);
        let first = fds.pop().ok_or_else(|| Error::State("no vCPU".into()))?;
        let mut vcpus = Vec::new();
        let mut loading = Vec::new();
        for (id, fd) in (1..).zip(others) {
            let vcpu = Vcpu::spawn(id)?;
            loading.push(vcpu.take(Seat::new(&host, &kvm, fd, Some(restore())))?);
            vcpus.push(vcpu);
        }
        restore().load(0, &first)?;
        let devices = Devices::restore(&state.devices, &kvm, &console)?;
        let io = Io::new(&host, devices.subscribers());
        let parts = Parts {
            vcpus,
            io,
            devices,
            kvm,
            permit,
        };
        let reaper = Arc::clone(&host.reaper);
        Ok(Self {
            host,
            parts: Unused {
                parts: Some(parts),
                reaper,
            },
            state: Arc::clone(state),
            first,
            thread,
            console,
            made,
            loaded: Moment::now(),
            loading,
        })
    }

    /// Its serial console.
    pub fn console(&self) -> &Console {
        &self.console
    }

    /// What its first vCPU was restored to.
    #[cfg(test)]
    pub(crate) fn first_state(&self) -> crate::vcpu::state::VcpuState {
        let parts = self.parts.parts.as_ref().expect("it is there");
        let xsave_size = parts.kvm.xsave_size;
        state::save(&self.first, &self.host.msrs, None, xsave_size).expect("saved")
    }

    /// Waits until all vCPUs are loaded.
    fn settle(&mut self) -> Result<(), Error> {
        for (id, reply) in (1..).zip(std::mem::take(&mut self.loading)) {
            let loaded = reply.recv().map_err(|_| Error::Unresponsive(id))??;
            self.loaded = self.loaded.max(loaded);
        }
        Ok(())
    }

    /// Makes it a child, and lets it run. `asked` is when somebody asked for the
    /// child.
    ///
    /// # Errors
    /// A disk that another VM has, or what KVM says. Nothing is left.
    pub fn start(mut self, asked: Moment, birth: Birth) -> Result<Vm, Error> {
        self.settle()?;
        let Some(parts) = &mut self.parts.parts else {
            return Err(Error::Phase("gone"));
        };
        if let Some(root) = birth.disks.root.as_ref().filter(|_| birth.map_root) {
            parts.kvm.window.bind(root)?;
        }
        parts.devices.bind(birth.disks, birth.volumes, birth.tap)?;
        for (gpa, bytes) in &birth.patches {
            parts.kvm.ram.write(*gpa, bytes)?;
        }
        self.state.vm.set_clock(&parts.kvm.fd)?;
        if parts.devices.kick() {
            parts.io.ensure()?;
        }
        let timer = match self.state.vcpus.first() {
            Some(state) => state::begin(&self.first, state)?,
            None => None,
        };
        let first = match self.thread.take() {
            Some(thread) => thread,
            None => Vcpu::spawn(0)?,
        };
        // Loaded, and begun: nothing is left to be restored from.
        first.take(Seat::new(&self.host, &parts.kvm, self.first, None).with_timer(timer))?;
        parts.vcpus.insert(0, first);
        go(parts, &birth.events, birth.hold)?;
        let Some(parts) = self.parts.parts.take() else {
            return Err(Error::Phase("gone"));
        };
        // What was made ahead was there when it was asked for.
        let timeline = Timeline {
            asked,
            vm_made: self.made.vm.max(asked),
            memory_mapped: self.made.memory.max(asked),
            restored: self.loaded.max(asked),
        };
        Ok(Vm::new(&self.host, parts, self.console, timeline))
    }
}

/// Lets all vCPUs run; none does before all have begun.
pub(crate) fn go(parts: &Parts, events: &EventSink, hold: bool) -> Result<(), Error> {
    let bus = Arc::new(Bus::new(&parts.devices, &parts.io));
    let gate = Gate::new(parts.vcpus.len());
    // All arrivals first: a vCPU that cannot be told breaks the gate by that.
    let arrivals: Vec<_> = parts.vcpus.iter().map(|_| gate.arrival()).collect();
    // The first vCPU last: it has nothing left to wait for then.
    for (vcpu, arrival) in parts.vcpus.iter().zip(arrivals).rev() {
        vcpu.send(Order::Go(Box::new(Go {
            bus: Arc::clone(&bus),
            events: Arc::clone(events),
            arrival,
            hold,
        })))?;
    }
    Ok(())
}

impl std::fmt::Debug for Prepared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Prepared").finish_non_exhaustive()
    }
}
