//! A vCPU's state: read from KVM and given back in the orders that KVM wants.
//! The orders are written once, over the trait [`Calls`], so that a test can
//! record them.

use super::timer::{self, HeldTimer};
use crate::error::Error;
use crate::x86_64::msr;
use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, Xsave, kvm_debugregs, kvm_lapic_state, kvm_mp_state,
    kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

/// All of a vCPU that a guest can notice, ready to be passed to KVM.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VcpuState {
    pub(crate) cpuid: CpuId,
    pub(crate) tsc_khz: u32,
    pub(crate) mp_state: kvm_mp_state,
    pub(crate) regs: kvm_regs,
    pub(crate) sregs: kvm_sregs,
    pub(crate) xsave: Xsave,
    pub(crate) xcrs: kvm_xcrs,
    pub(crate) debugregs: kvm_debugregs,
    pub(crate) lapic: kvm_lapic_state,
    /// All but the next two.
    pub(crate) msrs: Msrs,
    /// IA32_TSC: set when the guest is about to run, since it counts from there.
    pub(crate) tsc: Option<Msrs>,
    /// IA32_TSC_DEADLINE, for its own last call.
    pub(crate) deadline: Option<Msrs>,
    pub(crate) events: kvm_vcpu_events,
}

/// The KVM calls that restore a vCPU; implemented by [`VcpuFd`], and by a
/// recorder in tests.
pub(crate) trait Calls {
    fn tsc_khz(&self, khz: u32) -> Result<(), Error>;
    fn cpuid(&self, cpuid: &CpuId) -> Result<(), Error>;
    fn mp_state(&self, state: kvm_mp_state) -> Result<(), Error>;
    fn regs(&self, regs: &kvm_regs) -> Result<(), Error>;
    fn sregs(&self, sregs: &kvm_sregs) -> Result<(), Error>;
    fn xsave(&self, xsave: &Xsave) -> Result<(), Error>;
    fn xcrs(&self, xcrs: &kvm_xcrs) -> Result<(), Error>;
    fn debugregs(&self, regs: &kvm_debugregs) -> Result<(), Error>;
    fn lapic(&self, lapic: &kvm_lapic_state) -> Result<(), Error>;
    fn msrs(&self, msrs: &Msrs) -> Result<(), Error>;
    /// IA32_TSC_DEADLINE as it is: 0 when no timer runs. None: there is no such MSR.
    fn deadline(&self) -> Result<Option<u64>, Error>;
    fn events(&self, events: &kvm_vcpu_events) -> Result<(), Error>;
    /// KVM_KVMCLOCK_CTRL: tells the guest's watchdogs that it was stopped.
    fn kvmclock_ctrl(&self) -> Result<(), Error>;
}

/// Makes a fresh vCPU the one that `s` was saved of. `host_khz` is the frequency
/// that KVM chose for it. Then comes [`load`].
pub(crate) fn identify(vcpu: &impl Calls, s: &VcpuState, host_khz: u32) -> Result<(), Error> {
    // A TSC within 250 ppm is left alone, as KVM itself does
    // (arch/x86/kvm/x86.c, tsc_tolerance_ppm): scaling costs at every entry.
    if s.tsc_khz != 0 && s.tsc_khz.abs_diff(host_khz) > host_khz / 4000 {
        vcpu.tsc_khz(s.tsc_khz)?;
    }
    // Before MSRs: from Linux 6.13 on KVM refuses MSRs that CPUID does not show.
    vcpu.cpuid(&s.cpuid)
}

/// Gives the vCPU all of `s` that does not run with time. Then comes [`begin`].
pub(crate) fn load(vcpu: &impl Calls, s: &VcpuState) -> Result<(), Error> {
    vcpu.mp_state(s.mp_state)?;
    // Clears pending exceptions, so events come later.
    vcpu.regs(&s.regs)?;
    // Sets the APIC base, so the LAPIC comes later.
    vcpu.sregs(&s.sregs)?;
    vcpu.xsave(&s.xsave)?;
    vcpu.xcrs(&s.xcrs)?;
    vcpu.debugregs(&s.debugregs)?;
    // Before the deadline: the timer needs a configured LAPIC.
    vcpu.lapic(&s.lapic)?;
    vcpu.msrs(&s.msrs)?;
    vcpu.events(&s.events)
}

/// What is left to do when the guest is about to run: its time goes on here. Its timer
/// may be held back until the guest has its identity.
pub(crate) fn begin(vcpu: &impl Calls, s: &VcpuState) -> Result<Option<HeldTimer>, Error> {
    if let Some(tsc) = &s.tsc {
        vcpu.msrs(tsc)?;
    }
    let held = timer::arm(vcpu, s)?;
    vcpu.kvmclock_ctrl()?;
    Ok(held)
}

impl Calls for VcpuFd {
    fn tsc_khz(&self, khz: u32) -> Result<(), Error> {
        self.set_tsc_khz(khz).map_err(Error::kvm("KVM_SET_TSC_KHZ"))
    }
    fn cpuid(&self, cpuid: &CpuId) -> Result<(), Error> {
        self.set_cpuid2(cpuid).map_err(Error::kvm("KVM_SET_CPUID2"))
    }
    fn mp_state(&self, state: kvm_mp_state) -> Result<(), Error> {
        self.set_mp_state(state)
            .map_err(Error::kvm("KVM_SET_MP_STATE"))
    }
    fn regs(&self, regs: &kvm_regs) -> Result<(), Error> {
        self.set_regs(regs).map_err(Error::kvm("KVM_SET_REGS"))
    }
    fn sregs(&self, sregs: &kvm_sregs) -> Result<(), Error> {
        self.set_sregs(sregs).map_err(Error::kvm("KVM_SET_SREGS"))
    }
    #[allow(unsafe_code)]
    fn xsave(&self, xsave: &Xsave) -> Result<(), Error> {
        // SAFETY: KVM reads as many bytes as KVM_CAP_XSAVE2 says, at most. The
        // buffer is that long: `save` made it so, and `vm::restore_state` holds
        // a state from disk against this host's size.
        unsafe { self.set_xsave2(xsave) }.map_err(Error::kvm("KVM_SET_XSAVE"))
    }
    fn xcrs(&self, xcrs: &kvm_xcrs) -> Result<(), Error> {
        self.set_xcrs(xcrs).map_err(Error::kvm("KVM_SET_XCRS"))
    }
    fn debugregs(&self, regs: &kvm_debugregs) -> Result<(), Error> {
        self.set_debug_regs(regs)
            .map_err(Error::kvm("KVM_SET_DEBUGREGS"))
    }
    fn lapic(&self, lapic: &kvm_lapic_state) -> Result<(), Error> {
        self.set_lapic(lapic).map_err(Error::kvm("KVM_SET_LAPIC"))
    }
    fn msrs(&self, msrs: &Msrs) -> Result<(), Error> {
        let set = self.set_msrs(msrs).map_err(Error::kvm("KVM_SET_MSRS"))?;
        all_taken(set, msrs.as_slice())
    }
    fn deadline(&self) -> Result<Option<u64>, Error> {
        let msrs = read_msrs(self, &[msr::IA32_TSC_DEADLINE])?;
        Ok(msrs.first().map(|m| m.data))
    }
    fn events(&self, events: &kvm_vcpu_events) -> Result<(), Error> {
        self.set_vcpu_events(events)
            .map_err(Error::kvm("KVM_SET_VCPU_EVENTS"))
    }
    fn kvmclock_ctrl(&self) -> Result<(), Error> {
        match VcpuFd::kvmclock_ctrl(self) {
            // The guest has no kvmclock: nothing to tell (api.rst 4.70).
            Err(e) if e.errno() == libc::EINVAL => Ok(()),
            other => other.map_err(Error::kvm("KVM_KVMCLOCK_CTRL")),
        }
    }
}

/// KVM_SET_MSRS stops at the first MSR that it refuses, and does not fail.
fn all_taken(set: usize, msrs: &[kvm_msr_entry]) -> Result<(), Error> {
    match msrs.get(set) {
        None => Ok(()),
        Some(refused) => Err(Error::Msr {
            set,
            len: msrs.len(),
            msr: refused.index,
        }),
    }
}

/// Reads the state of a vCPU that is out of KVM_RUN with no exit pending.
/// `tsc` replaces the value that is read, so that all vCPUs of a VM get the same.
pub(crate) fn save(
    vcpu: &VcpuFd,
    host_msrs: &[u32],
    tsc: Option<u64>,
    xsave_size: usize,
) -> Result<VcpuState, Error> {
    // First: it runs kvm_apic_accept_events, which may change all the rest.
    let mp_state = vcpu
        .get_mp_state()
        .map_err(Error::kvm("KVM_GET_MP_STATE"))?;
    let regs = vcpu.get_regs().map_err(Error::kvm("KVM_GET_REGS"))?;
    let sregs = vcpu.get_sregs().map_err(Error::kvm("KVM_GET_SREGS"))?;
    let xsave = get_xsave(vcpu, xsave_size)?;
    let xcrs = vcpu.get_xcrs().map_err(Error::kvm("KVM_GET_XCRS"))?;
    let debugregs = vcpu
        .get_debug_regs()
        .map_err(Error::kvm("KVM_GET_DEBUGREGS"))?;
    let lapic = vcpu.get_lapic().map_err(Error::kvm("KVM_GET_LAPIC"))?;
    let tsc_khz = vcpu.get_tsc_khz().unwrap_or(0);
    let cpuid = vcpu
        .get_cpuid2(KVM_MAX_CPUID_ENTRIES)
        .map_err(Error::kvm("KVM_GET_CPUID2"))?;
    let mut msrs = read_msrs(vcpu, &msr::candidates(host_msrs))?;
    if let (Some(tsc), Some(entry)) = (tsc, msrs.iter_mut().find(|m| m.index == msr::IA32_TSC)) {
        entry.data = tsc;
    }
    let sorted = msr::sort(&msrs);
    let alone = |entry: Option<kvm_msr_entry>| entry.map(|e| msrs_of(&[e])).transpose();
    // Last: all the others may still change what is pending.
    let events = vcpu
        .get_vcpu_events()
        .map_err(Error::kvm("KVM_GET_VCPU_EVENTS"))?;
    Ok(VcpuState {
        cpuid,
        tsc_khz,
        mp_state,
        regs,
        sregs,
        xsave,
        xcrs,
        debugregs,
        lapic,
        msrs: msrs_of(&sorted.plain)?,
        tsc: alone(sorted.tsc)?,
        deadline: alone(sorted.deadline)?,
        events,
    })
}

/// The TSC of a vCPU, now.
pub(crate) fn read_tsc(vcpu: &VcpuFd) -> Result<Option<u64>, Error> {
    let msrs = read_msrs(vcpu, &[msr::IA32_TSC])?;
    Ok(msrs.first().map(|m| m.data))
}

#[allow(unsafe_code)]
fn get_xsave(vcpu: &VcpuFd, size: usize) -> Result<Xsave, Error> {
    // The fixed part holds 4096 bytes; what is over goes into the flexible part.
    let extra = size.saturating_sub(4096).div_ceil(4);
    let mut xsave =
        Xsave::new(extra).map_err(|e| Error::State(format!("XSAVE of {size} bytes: {e:?}")))?;
    // SAFETY: KVM writes as many bytes as KVM_CAP_XSAVE2 says, which is `size`,
    // and the buffer holds 4096 + 4 * extra >= size bytes.
    unsafe { vcpu.get_xsave2(&mut xsave) }.map_err(Error::kvm("KVM_GET_XSAVE2"))?;
    Ok(xsave)
}

/// Reads all of `wanted` that this vCPU has. KVM_GET_MSRS stops at the first
/// that it has not: that one is left out, and the rest is read on.
fn read_msrs(vcpu: &VcpuFd, wanted: &[u32]) -> Result<Vec<kvm_msr_entry>, Error> {
    let mut read = Vec::with_capacity(wanted.len());
    let mut rest = wanted;
    while !rest.is_empty() {
        let chunk = rest.len().min(kvm_bindings::KVM_MAX_MSR_ENTRIES);
        let entries: Vec<kvm_msr_entry> = rest[..chunk]
            .iter()
            .map(|&index| kvm_msr_entry {
                index,
                ..Default::default()
            })
            .collect();
        let mut msrs = msrs_of(&entries)?;
        let got = vcpu
            .get_msrs(&mut msrs)
            .map_err(Error::kvm("KVM_GET_MSRS"))?;
        read.extend_from_slice(&msrs.as_slice()[..got]);
        rest = if got == chunk {
            &rest[chunk..]
        } else {
            &rest[got + 1..]
        };
    }
    Ok(read)
}

pub(crate) fn msrs_of(entries: &[kvm_msr_entry]) -> Result<Msrs, Error> {
    Msrs::from_entries(entries).map_err(|e| Error::State(format!("{} MSRs: {e:?}", entries.len())))
}

impl VcpuState {
    /// Checks a state from disk as far as KVM itself does not.
    ///
    /// # Errors
    /// What would make a call below unsafe or senseless on this host.
    pub(crate) fn check(&self, xsave_size: usize) -> Result<(), Error> {
        let bytes = 4096 + 4 * self.xsave.as_slice().len();
        if bytes < xsave_size {
            return Err(Error::State(format!(
                "it holds {bytes} bytes of XSAVE state and this host's KVM wants {xsave_size}"
            )));
        }
        Ok(())
    }

    /// Makes an interrupt pending, as a message to its LAPIC does.
    pub(crate) fn interrupt(&mut self, vector: u8) {
        let (at, bit) = irr(vector);
        self.lapic.regs[at] |= bit;
    }

    /// Whether that interrupt is pending.
    pub(crate) fn has_interrupt(&self, vector: u8) -> bool {
        let (at, bit) = irr(vector);
        self.lapic.regs[at] & bit != 0
    }

    /// The guest's CPUID, for comparing CPUs.
    pub fn cpuid(&self) -> &CpuId {
        &self.cpuid
    }
}

/// The byte of [`kvm_lapic_state`] and the bit in it that say that a vector is pending:
/// eight registers of 32 vectors, one each 16 bytes (Intel SDM 3A, 11.8.4: IRR).
fn irr(vector: u8) -> (usize, std::ffi::c_char) {
    const IRR: usize = 0x200;
    let vector = usize::from(vector);
    let at = IRR + vector / 32 * 16 + vector % 32 / 8;
    (
        at,
        1_u8.rotate_left((vector % 8) as u32) as std::ffi::c_char,
    )
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::cell::{Cell, RefCell};

    fn restore(vcpu: &impl Calls, s: &VcpuState, host_khz: u32) -> Result<(), Error> {
        identify(vcpu, s, host_khz)?;
        load(vcpu, s)?;
        begin(vcpu, s).map(|_| ())
    }

    #[derive(Default)]
    pub(crate) struct Recorder {
        calls: RefCell<Vec<String>>,
        fail_at: Option<usize>,
        /// What IA32_TSC_DEADLINE holds.
        pub(crate) deadline: Cell<Option<u64>>,
    }

    impl Recorder {
        fn call(&self, name: impl Into<String>) -> Result<(), Error> {
            let mut calls = self.calls.borrow_mut();
            if self.fail_at == Some(calls.len()) {
                return Err(Error::Phase("broken on purpose"));
            }
            calls.push(name.into());
            Ok(())
        }
    }

    impl Calls for Recorder {
        fn tsc_khz(&self, khz: u32) -> Result<(), Error> {
            self.call(format!("tsc_khz {khz}"))
        }
        fn cpuid(&self, _: &CpuId) -> Result<(), Error> {
            self.call("cpuid")
        }
        fn mp_state(&self, _: kvm_mp_state) -> Result<(), Error> {
            self.call("mp_state")
        }
        fn regs(&self, _: &kvm_regs) -> Result<(), Error> {
            self.call("regs")
        }
        fn sregs(&self, _: &kvm_sregs) -> Result<(), Error> {
            self.call("sregs")
        }
        fn xsave(&self, _: &Xsave) -> Result<(), Error> {
            self.call("xsave")
        }
        fn xcrs(&self, _: &kvm_xcrs) -> Result<(), Error> {
            self.call("xcrs")
        }
        fn debugregs(&self, _: &kvm_debugregs) -> Result<(), Error> {
            self.call("debugregs")
        }
        fn lapic(&self, _: &kvm_lapic_state) -> Result<(), Error> {
            self.call("lapic")
        }
        fn msrs(&self, msrs: &Msrs) -> Result<(), Error> {
            let deadline = |m: &&kvm_msr_entry| m.index == msr::IA32_TSC_DEADLINE;
            if let Some(entry) = msrs.as_slice().iter().find(deadline) {
                self.deadline.set(Some(entry.data));
            }
            let indices: Vec<String> = msrs
                .as_slice()
                .iter()
                .map(|m| format!("{:#x}", m.index))
                .collect();
            self.call(format!("msrs {}", indices.join(" ")))
        }
        fn deadline(&self) -> Result<Option<u64>, Error> {
            self.call("deadline")?;
            Ok(self.deadline.get())
        }
        fn events(&self, _: &kvm_vcpu_events) -> Result<(), Error> {
            self.call("events")
        }
        fn kvmclock_ctrl(&self) -> Result<(), Error> {
            self.call("kvmclock_ctrl")
        }
    }

    pub(crate) fn state() -> VcpuState {
        let entry = |index, data| kvm_msr_entry {
            index,
            data,
            ..Default::default()
        };
        let saved = [
            entry(0x174, 1),
            entry(msr::IA32_TSC_DEADLINE, 7),
            entry(msr::IA32_TSC, 5),
        ];
        let sorted = msr::sort(&saved);
        let alone = |entry: Option<kvm_msr_entry>| entry.map(|e| msrs_of(&[e]).expect("one"));
        VcpuState {
            cpuid: CpuId::new(1).expect("one entry"),
            tsc_khz: 2_000_000,
            mp_state: Default::default(),
            regs: Default::default(),
            sregs: Default::default(),
            xsave: Xsave::new(0).expect("no extra"),
            xcrs: Default::default(),
            debugregs: Default::default(),
            lapic: Default::default(),
            msrs: msrs_of(&sorted.plain).expect("few"),
            tsc: alone(sorted.tsc),
            deadline: alone(sorted.deadline),
            events: Default::default(),
        }
    }

    const ORDER: [&str; 13] = [
        "cpuid",
        "mp_state",
        "regs",
        "sregs",
        "xsave",
        "xcrs",
        "debugregs",
        "lapic",
        "msrs 0x174",
        "events",
        "msrs 0x10",
        "msrs 0x6e0",
        "kvmclock_ctrl",
    ];

    #[test]
    fn a_vcpu_is_restored_in_the_order_that_kvm_wants() {
        let calls = Recorder::default();
        restore(&calls, &state(), 2_000_100).expect("nothing fails");
        assert_eq!(*calls.calls.borrow(), ORDER);
    }

    #[test]
    fn the_tsc_frequency_is_set_only_where_it_differs() {
        let calls = Recorder::default();
        restore(&calls, &state(), 2_600_000).expect("nothing fails");
        assert_eq!(calls.calls.borrow()[0], "tsc_khz 2000000");
    }

    #[test]
    fn each_failure_is_an_error_and_ends_the_restore() {
        for step in 0..ORDER.len() {
            let calls = Recorder {
                fail_at: Some(step),
                ..Default::default()
            };
            assert!(restore(&calls, &state(), 2_000_000).is_err());
            assert_eq!(calls.calls.borrow().len(), step);
        }
    }

    #[test]
    fn a_short_set_msrs_is_an_error_that_names_the_msr() {
        let msrs = [0x10, 0x174].map(|index| kvm_msr_entry {
            index,
            ..Default::default()
        });
        assert!(all_taken(2, &msrs).is_ok());
        let error = all_taken(1, &msrs).expect_err("short");
        assert!(matches!(
            error,
            Error::Msr {
                set: 1,
                len: 2,
                msr: 0x174
            }
        ));
    }

    #[test]
    fn a_state_with_too_little_xsave_is_refused() {
        assert!(state().check(4096).is_ok());
        assert!(matches!(state().check(11008), Err(Error::State(_))));
    }
}
