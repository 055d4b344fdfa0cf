//! Whether this KVM can run a kernel: found by running ten instructions.

use crate::error::Error;
use crate::host::Host;
use crate::machine::{Disks, Event, EventSink};
use crate::payload::{Payload, micro};
use crate::vm::{Vm, VmConfig};
use std::sync::{Arc, mpsc};
use std::time::Duration;

/// What a SYSCALL in a guest's user mode does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isolation {
    /// It enters ring 0, as on hardware: VMX, SVM, or an emulation of them.
    Hardware,
    /// It jumps to the kernel's entry and stays in ring 3, as on PVM: a Linux
    /// that does not know of PVM cannot run.
    SyscallStaysInUserMode,
}

impl Host {
    /// Runs the probe, in some milliseconds.
    ///
    /// # Errors
    /// A guest that fails, or does not answer in ten seconds.
    pub fn isolation(&self) -> Result<Isolation, Error> {
        let (sender, events) = mpsc::channel();
        // The receiver outlives the VM.
        let sink: EventSink = Arc::new(move |event| drop(sender.send(event)));
        let config = VmConfig {
            memory: crate::layout::MEMORY_MIN,
            vcpus: 1,
            payload: Payload::Micro(micro::SYSCALL_PROBE),
        };
        let vm = Vm::boot(self, &config, Disks::default(), &sink)?;
        let isolation = match events.recv_timeout(Duration::from_secs(10)) {
            Ok(Event::Answer { value: 0, .. }) => Ok(Isolation::Hardware),
            Ok(Event::Answer { .. }) => Ok(Isolation::SyscallStaysInUserMode),
            Ok(Event::Failed(reason)) => Err(Error::Guest(reason)),
            Ok(_) | Err(_) => Err(Error::Unresponsive(0)),
        };
        drop(vm);
        isolation
    }
}
