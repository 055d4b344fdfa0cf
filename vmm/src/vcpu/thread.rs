//! The thread of one vCPU: one match on exits, and orders from the controller.
//!
//! ```text
//!   Running --Pause--> Paused --Resume--> Running
//!   Running --fork point, answer--> Paused      (by itself, event sent)
//!   any     --Stop, or the controller is gone--> ended
//!   Running --power-off, reset, failure--> ended (event sent)
//! ```

use super::kick::Kickable;
use super::state::{self, VcpuState};
use crate::error::Error;
use crate::machine::{Bus, Event, EventSink};
use kvm_ioctls::{VcpuExit, VcpuFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError};
use std::time::Instant;
use vm_run_abi::doorbell::Ring;

/// From the controller. Each is answered on the channel that it brings.
pub(crate) enum Order {
    /// Stop at the next instruction boundary, with no exit pending.
    Pause(SyncSender<Result<(), Error>>),
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

/// What a vCPU thread is given.
pub(crate) struct Context {
    pub(crate) id: u8,
    pub(crate) vcpu: VcpuFd,
    pub(crate) bus: Arc<Bus>,
    pub(crate) orders: Receiver<Order>,
    pub(crate) events: EventSink,
    pub(crate) host_msrs: Arc<[u32]>,
    pub(crate) xsave_size: usize,
    /// A guest says this once; a hostile one must not fill the channel.
    pub(crate) identity_told: bool,
}

enum Next {
    Run,
    Park,
    End,
}

/// Runs the vCPU until it ends or the controller drops its orders.
pub(crate) fn main(mut context: Context) {
    let kickable = Kickable::new(&mut context.vcpu);
    let ended = context.run();
    drop(kickable);
    if let Err(error) = ended {
        context.tell(Event::Failed(error.to_string()));
    }
}

impl Context {
    fn run(&mut self) -> Result<(), Error> {
        self.tell(Event::Entered(Instant::now()));
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
            Order::ReadTsc(reply) => reply.send(Err(Error::Phase("running"))).is_ok(),
            Order::Save { reply, .. } => reply.send(Err(Error::Phase("running"))).is_ok(),
        }
    }

    /// Waits, out of KVM_RUN, for orders. False: the end.
    fn park(&mut self) -> bool {
        loop {
            let heard = match self.orders.recv() {
                Ok(Order::Resume) => return true,
                Ok(Order::Pause(reply)) => reply.send(self.complete_exit()).is_ok(),
                Ok(Order::ReadTsc(reply)) => reply.send(state::read_tsc(&self.vcpu)).is_ok(),
                Ok(Order::Save { tsc, reply }) => {
                    let state = state::save(&self.vcpu, &self.host_msrs, tsc, self.xsave_size);
                    reply.send(state.map(Box::new)).is_ok()
                }
                Err(_) => return false,
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
                    Some(ring) => return Ok(self.rung(ring)),
                    None => log::debug!("vCPU {}: stray store to the doorbell", self.id),
                },
                None => self.bus.mmio_write(gpa, data),
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

    fn rung(&mut self, ring: Ring) -> Next {
        let now = Instant::now();
        match ring {
            Ring::ForkPoint { version } => self.tell(Event::ForkPoint { version, at: now }),
            Ring::Answer(value) => self.tell(Event::Answer { value, at: now }),
            Ring::IdentityApplied { generation } => {
                if !std::mem::replace(&mut self.identity_told, true) {
                    let at = now;
                    self.tell(Event::IdentityApplied { generation, at });
                }
                return Next::Run;
            }
            Ring::Message(byte) => {
                self.bus.message(byte);
                return Next::Run;
            }
            Ring::BootFailed => {
                self.tell(Event::BootFailed(self.bus.take_message()));
                return Next::End;
            }
            Ring::PowerOff => {
                self.tell(Event::PowerOff);
                return Next::End;
            }
        }
        Next::Park
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
