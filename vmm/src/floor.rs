//! The floor: what a fork costs in KVM itself. The very calls of a fork (same
//! memory, same CPUID, same full state of vCPUs and interrupt controllers), on
//! one thread, with no device, no event loop and no logic.

use crate::error::Error;
use crate::host::Host;
use crate::kvm::KvmVm;
use crate::machine::Bus;
use crate::memory::{Image, Ram};
use crate::vm::{VmState, restore_state};
use kvm_ioctls::VcpuExit;
use std::time::{Duration, Instant};

/// How often a guest may exit for something else before its first store to the
/// doorbell: a guest that never gets there is an error, not a hang.
const EXITS_MAX: u32 = 100_000;

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
    patches: &[(u64, &[u8])],
) -> Result<Duration, Error> {
    let begin = Instant::now();
    state.check()?;
    let vcpus = state.vcpus.len() as u8;
    let (kvm, mut fds, _) = KvmVm::new(host, vcpus, || Ram::private(image))?;
    for (gpa, bytes) in patches {
        kvm.ram.write(*gpa, bytes)?;
    }
    restore_state(&kvm, &fds, state)?;
    let Some(vcpu) = fds.first_mut() else {
        return Err(Error::State("no vCPU".into()));
    };
    for _ in 0..EXITS_MAX {
        match vcpu.run() {
            Ok(VcpuExit::MmioWrite(gpa, _)) if Bus::doorbell_offset(gpa).is_some() => {
                return Ok(begin.elapsed());
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
