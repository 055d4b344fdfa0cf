//! Which MSRs belong to a vCPU's state, and in what order they go back.

use kvm_bindings::kvm_msr_entry;

pub(crate) const IA32_TSC: u32 = 0x10;
pub(crate) const IA32_TSC_DEADLINE: u32 = 0x6e0;
pub(crate) const IA32_MISC_ENABLE: u32 = 0x1a0;
pub(crate) const MTRR_DEF_TYPE: u32 = 0x2ff;

/// MTRRs are part of a vCPU and not of KVM_GET_MSR_INDEX_LIST
/// (arch/x86/kvm/mtrr.c): variable ranges, fixed ranges, default type.
const MTRRS: [std::ops::RangeInclusive<u32>; 5] = [
    0x200..=0x20f,
    0x250..=0x250,
    0x258..=0x259,
    0x268..=0x26f,
    0x2ff..=0x2ff,
];

/// MSR_KVM_WALL_CLOCK and its newer number hold no state: a write has KVM fill in a
/// page of the guest once, for who reads it right after (KVM's msr.rst). Given back,
/// they would only have a child own that page.
const WALL_CLOCK: [u32; 2] = [0x11, 0x4b56_4d00];

/// All that may hold state: what KVM lists, and the MTRRs.
pub(crate) fn candidates(listed: &[u32]) -> Vec<u32> {
    let mut all = listed.to_vec();
    all.extend(MTRRS.into_iter().flatten());
    all.retain(|msr| !WALL_CLOCK.contains(msr));
    all.sort_unstable();
    all.dedup();
    all
}

/// MSRs by when they go back.
#[derive(Debug, Default)]
pub(crate) struct Sorted {
    /// Whenever.
    pub(crate) plain: Vec<kvm_msr_entry>,
    /// IA32_TSC: when the guest is about to run.
    pub(crate) tsc: Option<kvm_msr_entry>,
    /// IA32_TSC_DEADLINE: in a call of its own, after everything else.
    pub(crate) deadline: Option<kvm_msr_entry>,
}

/// A deadline of zero is a timer that has fired, or will at once: if its interrupt
/// was not yet taken it is lost with the parent's LAPIC timer, so the child's is
/// set to a moment that has passed and fires again (firecracker#4099: guests stuck
/// in sleep).
pub(crate) fn sort(saved: &[kvm_msr_entry]) -> Sorted {
    let find = |index| saved.iter().find(|m| m.index == index).copied();
    let tsc = find(IA32_TSC);
    let mut deadline = find(IA32_TSC_DEADLINE);
    if let (Some(deadline), Some(tsc)) = (deadline.as_mut(), tsc)
        && deadline.data == 0
    {
        deadline.data = tsc.data;
    }
    let plain = |m: &&kvm_msr_entry| m.index != IA32_TSC && m.index != IA32_TSC_DEADLINE;
    Sorted {
        plain: saved.iter().filter(plain).copied().collect(),
        tsc,
        deadline,
    }
}

/// What a fresh vCPU is given besides KVM's own reset values: fast strings, and
/// memory that is write-back by default (no firmware runs that would say so).
pub(crate) fn at_boot() -> [kvm_msr_entry; 2] {
    [(IA32_MISC_ENABLE, 1), (MTRR_DEF_TYPE, 1 << 11 | 6)].map(|(index, data)| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn msr(index: u32, data: u64) -> kvm_msr_entry {
        kvm_msr_entry {
            index,
            data,
            ..Default::default()
        }
    }

    #[test]
    fn tsc_and_deadline_go_alone() {
        let saved = [msr(0x174, 1), msr(IA32_TSC_DEADLINE, 77), msr(IA32_TSC, 50)];
        let sorted = sort(&saved);
        assert_eq!(sorted.plain, [msr(0x174, 1)]);
        assert_eq!(sorted.tsc.map(|m| m.data), Some(50));
        assert_eq!(sorted.deadline.map(|m| m.data), Some(77));
    }

    #[test]
    fn a_timer_that_has_fired_fires_again() {
        let saved = [msr(IA32_TSC_DEADLINE, 0), msr(IA32_TSC, 50)];
        assert_eq!(sort(&saved).deadline.map(|m| m.data), Some(50));
    }

    #[test]
    fn candidates_hold_the_mtrrs_once() {
        let all = candidates(&[0x174, MTRR_DEF_TYPE]);
        assert_eq!(all.iter().filter(|i| **i == MTRR_DEF_TYPE).count(), 1);
        assert!(all.contains(&0x174) && all.contains(&0x26f));
    }

    #[test]
    fn candidates_are_without_the_wall_clock() {
        let all = candidates(&[0x11, 0x12, 0x4b56_4d00, 0x4b56_4d01]);
        assert!(!all.contains(&0x11) && !all.contains(&0x4b56_4d00));
        assert!(all.contains(&0x12) && all.contains(&0x4b56_4d01));
    }
}
