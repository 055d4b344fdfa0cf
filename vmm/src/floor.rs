//! The floor: what a fork costs in KVM itself. The very calls of a fork (same
//! memory, same CPUID, same full state of vCPUs and interrupt controllers), on
//! one thread, with no device, no event loop and no logic.

use crate::error::Error;
use crate::host::Host;
use crate::kvm::{Ahead, KvmVm};
use crate::machine::Bus;
use crate::memory::{Image, Ram};
use crate::moment::Moment;
use crate::vcpu::state;
use crate::vm::VmState;
use kvm_ioctls::{VcpuExit, VcpuFd};
use std::time::Duration;

/// How often a guest may exit for something else before its first store to the
/// doorbell: a guest that never gets there is an error, not a hang.
const EXITS_MAX: u32 = 100_000;

/// Writes into the child's memory: (guest-physical address, bytes).
pub type Patches<'a> = &'a [(u64, &'a [u8])];

/// From the call to the first store to the doorbell page: the same moment at
/// which [`Event::Answer`](crate::Event::Answer) and
/// [`Event::IdentityApplied`](crate::Event::IdentityApplied) are stamped.
///
/// # Errors
/// A state that is not usable here, what KVM says, or a guest that does not get
/// to its doorbell without devices.
pub fn measure(
    host: &Host,
    image: &Image,
    state: &VmState,
    patches: Patches<'_>,
) -> Result<Duration, Error> {
    let begin = Moment::now();
    state.check()?;
    let vcpus = state.vcpus.len() as u8;
    let (kvm, _) = KvmVm::new(host, || Ram::private(image))?;
    let fds = kvm.populate(vcpus)?;
    identify(&fds, state)?;
    load(&kvm, &fds, state)?;
    finish(&kvm, fds, state, patches).map(|end| end.since(begin))
}

/// A VM with interrupt controllers, vCPUs and CPUID, made ahead of time.
pub struct Pooled(Ahead);

impl Pooled {
    /// Makes it. Its registrations have begun a grace period, which the first
    /// memory slot waits for: leave it alone for some jiffies before it is measured.
    ///
    /// # Errors
    /// As [`measure`].
    pub fn new(host: &Host, state: &VmState) -> Result<Self, Error> {
        state.check()?;
        let ahead = Ahead::new(host, state.vcpus.len() as u8)?;
        identify(&ahead.vcpus, state)?;
        Ok(Self(ahead))
    }

    /// What is left to do: memory, its slots, all state, run.
    ///
    /// # Errors
    /// As [`measure`].
    pub fn measure(
        self,
        image: &Image,
        state: &VmState,
        patches: Patches<'_>,
    ) -> Result<Duration, Error> {
        let begin = Moment::now();
        let (kvm, fds) = self.0.map(Ram::private(image)?)?;
        load(&kvm, &fds, state)?;
        finish(&kvm, fds, state, patches).map(|end| end.since(begin))
    }
}

fn identify(fds: &[VcpuFd], state: &VmState) -> Result<(), Error> {
    for (vcpu, state) in fds.iter().zip(&state.vcpus) {
        state::identify(vcpu, state, vcpu.get_tsc_khz().unwrap_or(state.tsc_khz))?;
    }
    Ok(())
}

fn load(kvm: &KvmVm, fds: &[VcpuFd], state: &VmState) -> Result<(), Error> {
    state.check_sizes(kvm.xsave_size)?;
    let chips = kvm.chips(fds.len());
    for (vcpu, vcpu_state) in fds.iter().zip(&state.vcpus) {
        state::load(vcpu, vcpu_state)?;
        chips.vcpu_loaded(&state.vm)?;
    }
    Ok(())
}

/// The identity, the clocks, and the guest up to its doorbell.
fn finish(
    kvm: &KvmVm,
    mut fds: Vec<VcpuFd>,
    state: &VmState,
    patches: Patches<'_>,
) -> Result<Moment, Error> {
    for (gpa, bytes) in patches {
        kvm.ram.write(*gpa, bytes)?;
    }
    state.vm.set_clock(&kvm.fd)?;
    for (vcpu, state) in fds.iter().zip(&state.vcpus) {
        state::begin(vcpu, state)?;
    }
    let Some(vcpu) = fds.first_mut() else {
        return Err(Error::State("no vCPU".into()));
    };
    for _ in 0..EXITS_MAX {
        match vcpu.run() {
            Ok(VcpuExit::MmioWrite(gpa, _)) if Bus::doorbell_offset(gpa).is_some() => {
                return Ok(Moment::now());
            }
            Ok(VcpuExit::MmioWrite(..) | VcpuExit::IoOut(..) | VcpuExit::Intr) => {}
            Ok(VcpuExit::MmioRead(_, data) | VcpuExit::IoIn(_, data)) => data.fill(0),
            Ok(_) => break,
            Err(e) if e.errno() == libc::EINTR || e.errno() == libc::EAGAIN => {}
            Err(e) => return Err(Error::kvm("KVM_RUN")(e)),
        }
    }
    Err(Error::Phase("nowhere near its doorbell"))
}

/// How many pages [`cow_fault`] writes.
const FAULTS: u64 = 64;

/// What a process's first write to a page of a base costs it, with all the VMs
/// that now live in it: KVM has an MMU notifier for each, and the kernel calls
/// them all at such a fault.
///
/// # Errors
/// What mmap says.
pub fn cow_fault(image: &Image) -> Result<Duration, Error> {
    // The first pass brings the base's pages into memory.
    cow_faults(image)?;
    cow_faults(image)
}

fn cow_faults(image: &Image) -> Result<Duration, Error> {
    let ram = Ram::private(image)?;
    let first = image.bytes().min(crate::layout::HOLE_START) / 2;
    let begin = Moment::now();
    for page in 0..FAULTS {
        // Two pages apart: nothing is done for the neighbour's sake.
        ram.write(first + page * 2 * vm_run_abi::PAGE_SIZE, &[1])?;
    }
    Ok(Moment::now().since(begin) / FAULTS as u32)
}
