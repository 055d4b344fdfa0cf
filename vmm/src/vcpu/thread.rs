//! The thread of one vCPU: one match on exits, and orders from the controller.
//!
//! ```text
//!   Waiting --Take--> Loaded --Go--> Running
//!   Running --Pause--> Paused --Resume--> Running
//!   Running --fork point, answer--> Paused      (by itself, event sent)
//!   any     --the controller is gone--> ended
//!   Running --power-off, reset, failure--> ended (event sent)
//! ```

use super::gate::Arrival;
use super::kick::Kickable;
use super::state::{self, VcpuState};
use super::timer::HeldTimer;
use crate::error::Error;
use crate::host::{Host, ThreadKind, ThreadStart};
use crate::kvm::{Chips, KvmVm};
use crate::machine::{Bus, Event, EventSink};
use crate::moment::Moment;
use crate::vm::VmState;
use kvm_ioctls::{VcpuExit, VcpuFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError};
use vm_run_abi::doorbell::Ring;

/// From the controller. Each is answered on the channel that it brings.
pub(crate) enum Order {
    /// Have this vCPU, and load it. Comes before the rest.
    Take {
        seat: Box<Seat>,
        /// To be told when it was loaded.
        loaded: SyncSender<Result<Moment, Error>>,
    },
    /// Run. Comes next.
    Go(Box<Go>),
    /// Stop at the next instruction boundary, with no exit pending.
    Pause(SyncSender<Result<(), Error>>),
    /// The guest is about to take a new identity, and may say so (paused only).
    Renew(SyncSender<Result<(), Error>>),
    /// Read the TSC (paused only).
    ReadTsc(SyncSender<Result<Option<u64>, Error>>),
    /// Read the state (paused only).
    Save {
        tsc: Option<u64>,
        reply: SyncSender<Result<Box<VcpuState>, Error>>,
    },
    /// Run on.
    Resume,
}

/// A vCPU, and what belongs to it alone.
pub(crate) struct Seat {
    vcpu: VcpuFd,
    /// Called when the vCPU is about to run.
    confine: ThreadStart,
    /// What it is restored from; `None` when it is set up already.
    restore: Option<Restore>,
    /// Its timer, if it has begun and that was held back.
    timer: Option<HeldTimer>,
    host_msrs: Arc<[u32]>,
    xsave_size: usize,
}

/// What a vCPU is restored from, as a part of its VM.
pub(crate) struct Restore {
    pub(crate) state: Arc<VmState>,
    /// Shared by all vCPUs: restored by whoever is loaded last.
    pub(crate) chips: Arc<Chips>,
}

/// What a vCPU needs to run.
pub(crate) struct Go {
    pub(crate) bus: Arc<Bus>,
    pub(crate) events: EventSink,
    pub(crate) arrival: Arrival,
    /// Whether it stops when the guest has applied its identity.
    pub(crate) hold: bool,
}

struct Context<'a> {
    id: u8,
    vcpu: VcpuFd,
    bus: Arc<Bus>,
    orders: &'a Receiver<Order>,
    events: EventSink,
    host_msrs: Arc<[u32]>,
    xsave_size: usize,
    hold: bool,
    timer: Option<HeldTimer>,
    /// When it first entered the guest.
    entered: Moment,
    /// A guest says this once; a hostile one must not fill the channel.
    identity_told: bool,
    /// Likewise, and once more after each [`Order::Renew`].
    renewal_told: bool,
}

enum Next {
    Run,
    Park,
    End,
}

/// Runs the vCPU that the controller gives.
pub(crate) fn main(id: u8, orders: &Receiver<Order>) {
    let Ok(Order::Take { mut seat, loaded }) = orders.recv() else {
        return;
    };
    let result = seat.load(id).map(|()| Moment::now());
    let failed = result.is_err();
    // Nobody asks about a vCPU that needed no loading.
    loaded.send(result).ok();
    if failed {
        return;
    }
    let Ok(Order::Go(go)) = orders.recv() else {
        return;
    };
    (seat.confine)(ThreadKind::Vcpu);
    match seat.begin(id) {
        Ok(()) => run(id, *seat, *go, orders),
        // The gate breaks with `go`, and no other vCPU runs.
        Err(error) => (go.events)(Event::Failed(error.to_string())),
    }
}

fn run(id: u8, seat: Seat, go: Go, orders: &Receiver<Order>) {
    let mut context = Context {
        id,
        vcpu: seat.vcpu,
        bus: go.bus,
        orders,
        events: go.events,
        host_msrs: seat.host_msrs,
        xsave_size: seat.xsave_size,
        hold: go.hold,
        timer: seat.timer,
        entered: Moment::now(),
        identity_told: false,
        renewal_told: false,
    };
    drop(seat.restore);
    let kickable = Kickable::new(&mut context.vcpu);
    // If the gate is broken another vCPU has failed, and tells.
    let ended = if go.arrival.pass() {
        context.run()
    } else {
        Ok(())
    };
    drop(kickable);
    if let Err(error) = ended {
        context.tell(Event::Failed(error.to_string()));
    }
}

impl Seat {
    pub(crate) fn new(host: &Host, kvm: &KvmVm, vcpu: VcpuFd, restore: Option<Restore>) -> Self {
        Self {
            vcpu,
            confine: host.thread_start(),
            restore,
            timer: None,
            host_msrs: Arc::clone(&host.msrs),
            xsave_size: kvm.xsave_size,
        }
    }

    /// A vCPU that has begun.
    pub(crate) fn with_timer(self, timer: Option<HeldTimer>) -> Self {
        Self { timer, ..self }
    }

    fn load(&self, id: u8) -> Result<(), Error> {
        match &self.restore {
            Some(restore) => restore.load(id, &self.vcpu),
            None => Ok(()),
        }
    }

    fn begin(&mut self, id: u8) -> Result<(), Error> {
        if let Some(restore) = &self.restore {
            self.timer = state::begin(&self.vcpu, restore.of(id)?)?;
        }
        Ok(())
    }
}

impl Restore {
    /// Gives a vCPU all of its state that does not run with time.
    pub(crate) fn load(&self, id: u8, vcpu: &VcpuFd) -> Result<(), Error> {
        let state = self.of(id)?;
        // A KVM that cannot tell scales nothing: 0 Hz differs from nothing.
        let host_khz = vcpu.get_tsc_khz().unwrap_or(state.tsc_khz);
        state::identify(vcpu, state, host_khz)?;
        state::load(vcpu, state)?;
        self.chips.vcpu_loaded(&self.state.vm)
    }

    pub(crate) fn of(&self, id: u8) -> Result<&VcpuState, Error> {
        let state = self.state.vcpus.get(usize::from(id));
        state.ok_or_else(|| Error::State(format!("no vCPU {id}")))
    }
}

impl Context<'_> {
    fn run(&mut self) -> Result<(), Error> {
        self.entered = Moment::now();
        loop {
            match self.orders.try_recv() {
                Ok(order) => {
                    if !self.obey(order) {
                        return Ok(());
                    }
                }
                Err(TryRecvError::Empty) => {}
                Err(TryRecvError::Disconnected) => return Ok(()),
            }
            match self.enter()? {
                Next::Run => {}
                Next::Park => {
                    if !self.park() {
                        return Ok(());
                    }
                }
                Next::End => return Ok(()),
            }
        }
    }

    /// The first order to a running vCPU. False: the end.
    fn obey(&mut self, order: Order) -> bool {
        match order {
            Order::Pause(reply) => {
                let done = self.complete_exit();
                let failed = done.is_err();
                // A controller that no longer listens is about to stop us.
                reply.send(done).is_ok() && !failed && self.park()
            }
            Order::Resume => true,
            Order::Renew(reply) => reply.send(Err(Error::Phase("running"))).is_ok(),
            Order::ReadTsc(reply) => reply.send(Err(Error::Phase("running"))).is_ok(),
            Order::Save { reply, .. } => reply.send(Err(Error::Phase("running"))).is_ok(),
            Order::Take { .. } | Order::Go(_) => false,
        }
    }

    /// Waits, out of KVM_RUN, for orders. False: the end.
    fn park(&mut self) -> bool {
        loop {
            let heard = match self.orders.recv() {
                Ok(Order::Resume) => return true,
                Ok(Order::Pause(reply)) => reply.send(self.complete_exit()).is_ok(),
                Ok(Order::Renew(reply)) => {
                    self.renewal_told = false;
                    reply.send(Ok(())).is_ok()
                }
                Ok(Order::ReadTsc(reply)) => reply.send(state::read_tsc(&self.vcpu)).is_ok(),
                Ok(Order::Save { tsc, reply }) => {
                    let state = state::save(&self.vcpu, &self.host_msrs, tsc, self.xsave_size);
                    reply.send(state.map(Box::new)).is_ok()
                }
                Ok(Order::Take { .. } | Order::Go(_)) | Err(_) => return false,
            };
            if !heard {
                return false;
            }
        }
    }

    /// After an MMIO or port exit the instruction is not over: KVM finishes it
    /// at the next KVM_RUN (api.rst 5, the note on KVM_EXIT_IO). With
    /// `immediate_exit` set, it finishes it and does nothing else. Without this
    /// a child would repeat the store that was its parent's fork point.
    fn complete_exit(&mut self) -> Result<(), Error> {
        self.vcpu.set_kvm_immediate_exit(1);
        let left = match self.vcpu.run() {
            Err(e) if e.errno() == libc::EINTR => Ok(()),
            Err(e) => Err(Error::kvm("KVM_RUN")(e)),
            // The second half of an access that crosses a page.
            Ok(_) => Err(Error::Phase("in the middle of an instruction")),
        };
        self.vcpu.set_kvm_immediate_exit(0);
        left
    }

    fn enter(&mut self) -> Result<Next, Error> {
        match self.vcpu.run() {
            Ok(VcpuExit::MmioWrite(gpa, data)) => match Bus::doorbell_offset(gpa) {
                Some(offset) => match Ring::decode(offset, data) {
                    Some(ring) => return self.rung(ring),
                    None => log::debug!("vCPU {}: stray store to the doorbell", self.id),
                },
                None => self.bus.mmio_write(gpa, data)?,
            },
            Ok(VcpuExit::MmioRead(gpa, data)) => self.bus.mmio_read(gpa, data),
            Ok(VcpuExit::IoOut(port, data)) => {
                if self.bus.port_write(port, data) {
                    self.tell(Event::Reset);
                    return Ok(Next::End);
                }
            }
            Ok(VcpuExit::IoIn(port, data)) => self.bus.port_read(port, data),
            Ok(VcpuExit::Shutdown) => {
                self.tell(Event::Failed("triple fault".into()));
                return Ok(Next::End);
            }
            Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen) => {}
            Ok(other) => {
                let exit = format!("{other:?}");
                let text = self.describe(&exit);
                self.tell(Event::Failed(text));
                return Ok(Next::End);
            }
            Err(e) if e.errno() == libc::EINTR => self.vcpu.set_kvm_immediate_exit(0),
            Err(e) if e.errno() == libc::EAGAIN => {}
            Err(e) => return Err(Error::kvm("KVM_RUN")(e)),
        }
        Ok(Next::Run)
    }

    fn rung(&mut self, ring: Ring) -> Result<Next, Error> {
        let now = Moment::now();
        match ring {
            Ring::ForkPoint { version } => self.tell(Event::ForkPoint { version, at: now }),
            Ring::Answer(value) => self.tell(Event::Answer {
                value,
                entered: self.entered,
                at: now,
            }),
            Ring::IdentityApplied { generation } => {
                if !std::mem::replace(&mut self.identity_told, true) {
                    self.tell(Event::IdentityApplied {
                        generation,
                        entered: self.entered,
                        at: now,
                    });
                    if let Some(timer) = self.timer.take() {
                        timer.release(&self.vcpu)?;
                    }
                    if self.hold {
                        return Ok(Next::Park);
                    }
                }
                return Ok(Next::Run);
            }
            Ring::IdentityTaken { generation } => {
                if !std::mem::replace(&mut self.renewal_told, true) {
                    self.tell(Event::IdentityTaken { generation });
                }
                return Ok(Next::Run);
            }
            Ring::Message(byte) => {
                self.bus.message(byte);
                return Ok(Next::Run);
            }
            Ring::BootFailed => {
                self.tell(Event::BootFailed(self.bus.take_message()));
                return Ok(Next::End);
            }
            Ring::PowerOff => {
                self.tell(Event::PowerOff);
                return Ok(Next::End);
            }
        }
        Ok(Next::Park)
    }

    /// An exit that no guest of ours should make, with what KVM says of it.
    fn describe(&mut self, exit: &str) -> String {
        let id = self.id;
        let rip = self.vcpu.get_regs().map(|r| r.rip).unwrap_or_default();
        format!("KVM stopped vCPU {id} at rip {rip:#x}: {exit}")
    }

    fn tell(&self, event: Event) {
        (self.events)(event);
    }
}
