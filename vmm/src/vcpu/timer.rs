//! The timer of the vCPU that steps to the child's identity.
//!
//! Its interrupts would fall into that step, and each writes to the kernel's tick,
//! its timers and what these have to do: up to fifty pages that are the child's own
//! before anybody asks for it (docs/faults.md). So the timer waits until the identity
//! holds, but no longer than [`PATIENCE_MS`]: a guest that sleeps before is woken.

use super::state::{Calls, VcpuState, msrs_of};
use crate::error::Error;
use crate::x86_64::msr;
use kvm_bindings::{Msrs, kvm_msr_entry};
use vm_run_abi::identity;

/// The longest that a timer is held back, in milliseconds of the guest.
const PATIENCE_MS: u64 = 1_000;

/// The privilege level of user space.
const USER: u8 = 3;

/// A deadline that was put off.
#[derive(Debug)]
pub(crate) struct HeldTimer {
    /// The TSC at which it fires now.
    until: u64,
    /// When the guest wants it.
    saved: Msrs,
}

/// Sets the saved deadline, or puts it off and returns what [`HeldTimer::release`]
/// sets it to later. Put off is that of a vCPU that was frozen in user space: this is
/// the one at the fork point, the others are idle in the kernel or at its call. One that
/// was stopped at any instruction takes its identity before the timer could fire.
pub(crate) fn arm(vcpu: &impl Calls, s: &VcpuState) -> Result<Option<HeldTimer>, Error> {
    let Some(saved) = &s.deadline else {
        return Ok(None);
    };
    let Some(until) = put_off(s) else {
        vcpu.msrs(saved)?;
        return Ok(None);
    };
    vcpu.msrs(&msrs_of(&[kvm_msr_entry {
        index: msr::IA32_TSC_DEADLINE,
        data: until,
        ..Default::default()
    }])?)?;
    Ok(Some(HeldTimer {
        until,
        saved: saved.clone(),
    }))
}

/// When a timer fires that is put off; `None` if it fires as saved.
fn put_off(s: &VcpuState) -> Option<u64> {
    let value = |msrs: &Option<Msrs>| msrs.as_ref()?.as_slice().first().map(|m| m.data);
    let (tsc, deadline) = (value(&s.tsc)?, value(&s.deadline)?);
    let until = tsc.checked_add(u64::from(s.tsc_khz) * PATIENCE_MS)?;
    let steps_to_identity = s.sregs.ss.dpl == USER && !s.has_interrupt(identity::VECTOR);
    (steps_to_identity && deadline < until).then_some(until)
}

impl HeldTimer {
    /// Sets the timer as the guest wants it. A moment that has passed fires at once.
    pub(crate) fn release(self, vcpu: &impl Calls) -> Result<(), Error> {
        // Another value is one that the guest has set since, or 0: it has fired.
        if vcpu.deadline()? == Some(self.until) {
            vcpu.msrs(&self.saved)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::state::tests::{Recorder, state};
    use super::*;

    /// What `state` holds: its TSC, its deadline, and when that fires if put off.
    const TSC: u64 = 5;
    const DEADLINE: u64 = 7;
    const UNTIL: u64 = TSC + 2_000_000 * PATIENCE_MS;

    fn in_user_space() -> VcpuState {
        let mut state = state();
        state.sregs.ss.dpl = USER;
        state
    }

    fn arm_with(state: &VcpuState) -> (Recorder, Option<HeldTimer>) {
        let vcpu = Recorder::default();
        let held = arm(&vcpu, state).expect("nothing fails");
        (vcpu, held)
    }

    #[test]
    fn the_timer_waits_for_the_identity_and_not_for_ever() {
        let (vcpu, held) = arm_with(&in_user_space());
        assert_eq!(vcpu.deadline.get(), Some(UNTIL));
        held.expect("held").release(&vcpu).expect("nothing fails");
        assert_eq!(vcpu.deadline.get(), Some(DEADLINE));
    }

    #[test]
    fn a_vcpu_in_the_kernel_has_its_timer_as_saved() {
        let (vcpu, held) = arm_with(&state());
        assert!(held.is_none());
        assert_eq!(vcpu.deadline.get(), Some(DEADLINE));
    }

    #[test]
    fn a_vcpu_that_is_interrupted_for_its_identity_has_its_timer_as_saved() {
        let mut state = in_user_space();
        state.interrupt(identity::VECTOR);
        // 0xf5: bit 21 of the last of eight registers.
        assert_eq!(state.lapic.regs[0x272], 1 << 5);
        assert!(!state.has_interrupt(identity::VECTOR - 1));
        let (vcpu, held) = arm_with(&state);
        assert!(held.is_none());
        assert_eq!(vcpu.deadline.get(), Some(DEADLINE));
    }

    #[test]
    fn a_timer_that_fires_later_anyway_stays() {
        let mut state = in_user_space();
        for deadline in [UNTIL, u64::MAX] {
            state.deadline.as_mut().expect("one").as_mut_slice()[0].data = deadline;
            let (vcpu, held) = arm_with(&state);
            assert!(held.is_none());
            assert_eq!(vcpu.deadline.get(), Some(deadline));
        }
    }

    #[test]
    fn a_frequency_or_time_that_is_none_puts_nothing_off() {
        let mut unknown = in_user_space();
        unknown.tsc_khz = 0;
        let mut late = in_user_space();
        late.tsc.as_mut().expect("one").as_mut_slice()[0].data = u64::MAX;
        for state in [unknown, late] {
            let (vcpu, held) = arm_with(&state);
            assert!(held.is_none());
            assert_eq!(vcpu.deadline.get(), Some(DEADLINE));
        }
    }

    #[test]
    fn what_the_guest_has_set_since_stays_and_so_does_a_timer_that_has_fired() {
        for now in [Some(UNTIL + 1), Some(0), None] {
            let (vcpu, held) = arm_with(&in_user_space());
            vcpu.deadline.set(now);
            held.expect("held").release(&vcpu).expect("nothing fails");
            assert_eq!(vcpu.deadline.get(), now);
        }
    }
}
