//! Where the vCPUs of one VM wait for each other, so that none runs before all
//! have their state.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// A gate for so many vCPUs. It opens when all have arrived, and breaks when one
/// of them ends before.
#[derive(Debug)]
pub(crate) struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    missing: usize,
    broken: bool,
}

/// One vCPU's duty to arrive. Dropped before that, it breaks the gate.
#[derive(Debug)]
pub(crate) struct Arrival {
    gate: Arc<Gate>,
    arrived: bool,
}

impl Gate {
    pub(crate) fn new(vcpus: usize) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State {
                missing: vcpus,
                broken: false,
            }),
            changed: Condvar::new(),
        })
    }

    pub(crate) fn arrival(self: &Arc<Self>) -> Arrival {
        Arrival {
            gate: Arc::clone(self),
            arrived: false,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Arrival {
    /// Waits for the others. False: one of them will not come.
    pub(crate) fn pass(mut self) -> bool {
        self.arrived = true;
        let mut state = self.gate.lock();
        state.missing = state.missing.saturating_sub(1);
        if state.missing == 0 {
            self.gate.changed.notify_all();
        }
        while state.missing > 0 && !state.broken {
            state = self
                .gate
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        !state.broken
    }
}

impl Drop for Arrival {
    fn drop(&mut self) {
        if !self.arrived {
            self.gate.lock().broken = true;
            self.gate.changed.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    #[test]
    fn a_gate_opens_for_all_or_for_none() {
        for lost in [false, true] {
            let gate = Gate::new(3);
            let mut arrivals: Vec<_> = (0..3).map(|_| gate.arrival()).collect();
            let last = arrivals.pop().expect("three");
            let waiting: Vec<_> = arrivals
                .into_iter()
                .map(|arrival| thread::spawn(move || arrival.pass()))
                .collect();
            if lost {
                drop(last);
            } else {
                assert!(last.pass());
            }
            for thread in waiting {
                assert_eq!(thread.join().expect("no panic"), !lost);
            }
        }
    }
}
