//! The end of VMs, off everybody's way: closing one takes KVM some 15 ms (grace
//! periods of RCU and SRCU), so a thread does it, and it is counted.

use crate::error::Error;
use crate::io::Io;
use crate::kvm::KvmVm;
use crate::machine::Devices;
use crate::vcpu::handle::Vcpu;
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a fork waits for the places of VMs that are being closed.
const PATIENCE: Duration = Duration::from_secs(10);

/// All of a VM that takes time to end.
pub(crate) struct Parts {
    // Fields drop in this order: vCPUs first, so that no device is touched by a
    // guest; then the event loop; the memory after KVM's VM; the place last.
    pub(crate) vcpus: Vec<Vcpu>,
    pub(crate) io: Arc<Io>,
    pub(crate) devices: Devices,
    pub(crate) kvm: KvmVm,
    pub(crate) permit: Permit,
}

/// How many VMs a [`Host`](crate::Host) has and had.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct VmCounts {
    /// In use.
    pub alive: usize,
    /// Dropped, and not closed yet.
    pub ending: usize,
    /// Closed.
    pub ended: u64,
}

/// A VM's place in the process. Dropped when the VM is closed.
#[derive(Debug)]
pub(crate) struct Permit {
    ledger: Arc<Ledger>,
    ending: bool,
}

#[derive(Debug)]
struct Ledger {
    most: usize,
    counts: Mutex<VmCounts>,
    changed: Condvar,
}

impl Ledger {
    fn lock(&self) -> MutexGuard<'_, VmCounts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Permit {
    /// The VM is not used any more.
    fn end(&mut self) {
        if !std::mem::replace(&mut self.ending, true) {
            let mut counts = self.ledger.lock();
            counts.alive -= 1;
            counts.ending += 1;
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.end();
        let mut counts = self.ledger.lock();
        counts.ending -= 1;
        counts.ended += 1;
        drop(counts);
        self.ledger.changed.notify_all();
    }
}

/// Closes VMs on a thread of its own. Dropping it waits until all are closed.
pub(crate) struct Reaper {
    ledger: Arc<Ledger>,
    thread: Mutex<Option<(Sender<Parts>, JoinHandle<()>)>>,
}

impl Reaper {
    pub(crate) fn new(most: usize) -> Self {
        Self {
            ledger: Arc::new(Ledger {
                most,
                counts: Mutex::default(),
                changed: Condvar::new(),
            }),
            thread: Mutex::default(),
        }
    }

    pub(crate) fn counts(&self) -> VmCounts {
        *self.ledger.lock()
    }

    /// A place for one more VM. It waits for those that are ending.
    pub(crate) fn permit(&self) -> Result<Permit, Error> {
        let most = self.ledger.most;
        let deadline = Instant::now() + PATIENCE;
        let mut counts = self.ledger.lock();
        while counts.alive + counts.ending >= most {
            let left = deadline.saturating_duration_since(Instant::now());
            if counts.alive >= most || left.is_zero() {
                return Err(Error::TooMany { most });
            }
            let waited = self.ledger.changed.wait_timeout(counts, left);
            counts = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        counts.alive += 1;
        Ok(Permit {
            ledger: Arc::clone(&self.ledger),
            ending: false,
        })
    }

    /// Stops the VM at once, and has the rest of it ended.
    pub(crate) fn bury(&self, mut parts: Parts) {
        parts.permit.end();
        for vcpu in &mut parts.vcpus {
            vcpu.stop();
        }
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        if thread.is_none() {
            *thread = start();
        }
        if let Some((queue, _)) = &*thread {
            // Without its thread it ends here and now.
            drop(queue.send(parts));
        }
    }

    pub(crate) fn settle(&self) {
        let mut counts = self.ledger.lock();
        while counts.ending > 0 {
            counts = self
                .ledger
                .changed
                .wait(counts)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

fn start() -> Option<(Sender<Parts>, JoinHandle<()>)> {
    let (queue, parts) = mpsc::channel::<Parts>();
    let thread = std::thread::Builder::new()
        .name("vm-reaper".into())
        .spawn(move || parts.into_iter().for_each(drop));
    match thread {
        Ok(thread) => Some((queue, thread)),
        Err(error) => {
            log::warn!("no thread to close virtual machines: {error}");
            None
        }
    }
}

impl Drop for Reaper {
    fn drop(&mut self) {
        let thread = self.thread.get_mut();
        let Some((queue, thread)) = thread.unwrap_or_else(PoisonError::into_inner).take() else {
            return;
        };
        drop(queue);
        if thread.join().is_err() {
            log::error!("the thread that closes virtual machines has panicked");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_had_again_when_its_vm_is_closed_and_not_before() {
        let reaper = Reaper::new(2);
        let mut first = reaper.permit().expect("a place");
        let _second = reaper.permit().expect("a place");
        assert!(matches!(reaper.permit(), Err(Error::TooMany { most: 2 })));
        first.end();
        let counts = reaper.counts();
        assert_eq!((counts.alive, counts.ending, counts.ended), (1, 1, 0));
        // One that is ending is waited for.
        let closing = std::thread::spawn(move || drop(first));
        let third = reaper.permit().expect("a place");
        closing.join().expect("no panic");
        drop(third);
        assert_eq!(reaper.counts().ended, 2);
    }
}
