//! A VM made ready to run as a child: everything that can be done before it is
//! known which child it will be.
//!
//! ```text
//!   caller          | VM, memory, chips, vCPUs, vCPU 0's state | disks, identity, clocks, Go
//!   vCPU 0's thread |     other threads .... devices, then it polls ...................... runs
//!   other vCPUs'    |                          their state ............................... run
//! ```
//! A cold fork does both halves in a row; a pool does the first ahead, and only
//! [`Prepared::start`] is left.
//!
//! The caller does all that vCPU 0 needs, and hands it over when it can run: on a
//! host whose idle CPUs sleep, one wake of another thread costs as much as a
//! vCPU's whole state.

use crate::error::Error;
use crate::host::Host;
use crate::io::IoThread;
use crate::kvm::{KvmVm, Made};
use crate::machine::{Bus, Devices, Disks, EventSink};
use crate::memory::{Image, Ram};
use crate::moment::Moment;
use crate::reaper::{Parts, Reaper};
use crate::vcpu::gate::Gate;
use crate::vcpu::handle::Vcpu;
use crate::vcpu::state;
use crate::vcpu::thread::{self, Go, Order, Restore, Seat};
use crate::vm::{Timeline, Vm, VmState};
use devices::Console;
use kvm_ioctls::VcpuFd;
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::Receiver;

/// What makes a VM one child and no other.
pub struct Birth {
    /// The files behind its disks.
    pub disks: Disks,
    /// (Guest-physical address, bytes), written into its memory.
    pub patches: Vec<(u64, Vec<u8>)>,
    /// Where its events go.
    pub events: EventSink,
}

/// A VM that lacks only its identity and its disks. Dropping it ends it.
pub struct Prepared {
    host: Arc<Host>,
    parts: Unused,
    state: Arc<VmState>,
    first: VcpuFd,
    console: Console,
    made: Made,
    loaded: Moment,
    /// What the other vCPUs say when they are loaded.
    loading: Vec<Receiver<Result<Moment, Error>>>,
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
        let mut this = Self::make(host, image, state, Console::new())?;
        this.settle()?;
        Ok(this)
    }

    fn make(
        host: &Arc<Host>,
        image: &Image,
        state: &Arc<VmState>,
        console: Console,
    ) -> Result<Self, Error> {
        state.check()?;
        let permit = host.permit()?;
        let count = state.vcpus.len() as u8;
        let (kvm, made) = KvmVm::new(host, || Ram::private(image))?;
        // Not before: KVM_CREATE_VM takes all locks of the address space, and a
        // thread that comes up maps its stack.
        let (first, threads) = spawn_all(host, count)?;
        let mut fds = kvm.populate(count)?;
        state.check_sizes(kvm.xsave_size)?;
        let devices = make_devices(&first, &kvm, state, &console)?;
        let chips = kvm.chips(fds.len());
        let restore = || Restore {
            state: Arc::clone(state),
            chips: Arc::clone(&chips),
        };
        let (others, mut io) = heard(&threads)?;
        let mut vcpus = vec![first];
        vcpus.extend(others);
        let others = fds.split_off(1);
        let first = fds.pop().ok_or_else(|| Error::State("no vCPU".into()))?;
        let mut loading = Vec::new();
        for (vcpu, fd) in vcpus.iter().skip(1).zip(others) {
            loading.push(vcpu.take(Seat::new(host, &kvm, fd, Some(restore())))?);
        }
        restore().load(0, &first)?;
        let devices = heard(&devices)?;
        io.run(devices.subscribers())?;
        let parts = Parts {
            vcpus,
            io,
            devices,
            kvm,
            permit,
        };
        Ok(Self {
            host: Arc::clone(host),
            parts: Unused {
                parts: Some(parts),
                reaper: Arc::clone(&host.reaper),
            },
            state: Arc::clone(state),
            first,
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
        let Some(parts) = &self.parts.parts else {
            return Err(Error::Phase("gone"));
        };
        parts.devices.bind(birth.disks)?;
        for (gpa, bytes) in &birth.patches {
            parts.kvm.ram.write(*gpa, bytes)?;
        }
        self.state.vm.set_clock(&parts.kvm.fd)?;
        parts.devices.kick();
        if let Some(state) = self.state.vcpus.first() {
            state::begin(&self.first, state)?;
        }
        let Some(first) = parts.vcpus.first() else {
            return Err(Error::Phase("gone"));
        };
        // Loaded, and begun: nothing is left to be restored from.
        let seat = Seat::new(&self.host, &parts.kvm, self.first, None);
        first.take(seat)?;
        go(parts, &birth.events)?;
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

/// What another thread was asked for.
type Answer<T> = Receiver<Result<T, Error>>;

fn heard<T>(answer: &Answer<T>) -> Result<T, Error> {
    answer.recv().map_err(|_| Error::Unresponsive(0))?
}

/// Starts vCPU 0's thread, which starts all others.
fn spawn_all(host: &Arc<Host>, vcpus: u8) -> Result<(Vcpu, Answer<(Vec<Vcpu>, IoThread)>), Error> {
    let first = Vcpu::spawn(0, |orders| thread::main(0, orders))?;
    let host = Arc::clone(host);
    let threads = first.help(move || Ok((spawn(1..vcpus)?, IoThread::spawn(&host)?)))?;
    Ok((first, threads))
}

/// Has vCPU 0's thread make the devices.
fn make_devices(
    first: &Vcpu,
    kvm: &KvmVm,
    state: &Arc<VmState>,
    console: &Console,
) -> Result<Answer<Devices>, Error> {
    let (vm, memory) = (Arc::clone(&kvm.fd), kvm.ram.memory().clone());
    let (state, console) = (Arc::clone(state), console.clone());
    first.help(move || Devices::restore(&state.devices, &vm, &memory, &console))
}

/// Threads for vCPUs.
pub(crate) fn spawn(vcpus: Range<u8>) -> Result<Vec<Vcpu>, Error> {
    vcpus
        .map(|id| Vcpu::spawn(id, move |orders| thread::main(id, orders)))
        .collect()
}

/// Lets all vCPUs run; none does before all have begun.
pub(crate) fn go(parts: &Parts, events: &EventSink) -> Result<(), Error> {
    let bus = Arc::new(Bus::new(&parts.devices));
    let gate = Gate::new(parts.vcpus.len());
    // All arrivals first: a vCPU that cannot be told breaks the gate by that.
    let arrivals: Vec<_> = parts.vcpus.iter().map(|_| gate.arrival()).collect();
    // The first vCPU last: it has nothing left to wait for then.
    for (vcpu, arrival) in parts.vcpus.iter().zip(arrivals).rev() {
        vcpu.send(Order::Go(Box::new(Go {
            bus: Arc::clone(&bus),
            events: Arc::clone(events),
            arrival,
        })))?;
    }
    Ok(())
}

impl std::fmt::Debug for Prepared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Prepared").finish_non_exhaustive()
    }
}
