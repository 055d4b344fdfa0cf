//! What a guest is told of its CPU: what KVM supports, less what a child cannot
//! take with it, and with the topology of this VM.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
const VMX: u32 = 1 << 5;
const HTT: u32 = 1 << 28;
const SVM: u32 = 1 << 2;

/// KVM's paravirtual features (api: Linux Documentation/virt/kvm/x86/cpuid.rst)
/// that stay: clocks, steal time, PV EOI, PV unhalt, TLB flush, yield and IPIs.
/// Asynchronous page faults go: a fault that the parent waits for would be
/// answered in no child. Migration control goes: it is for encrypted guests.
const KVM_FEATURES_OUT: u32 = 1 << 4 | 1 << 10 | 1 << 14 | 1 << 17;

/// The CPUID of vCPU `id` of `vcpus`.
pub(crate) fn for_vcpu(supported: &CpuId, id: u8, vcpus: u8) -> Vec<kvm_cpuid_entry2> {
    let xcr0 = xsave_mask(supported);
    supported
        .as_slice()
        .iter()
        .filter(|e| xsave_component_is_legal(e, xcr0))
        .map(|entry| {
            let mut entry = *entry;
            filter(&mut entry, u32::from(id), u32::from(vcpus));
            entry
        })
        .collect()
}

fn filter(e: &mut kvm_cpuid_entry2, id: u32, vcpus: u32) {
    // How many bits of the APIC id name the CPU in its package.
    let bits = u32::BITS - (vcpus - 1).leading_zeros();
    match e.function {
        0x1 => {
            e.ecx = (e.ecx | TSC_DEADLINE | HYPERVISOR) & !VMX;
            e.ebx = (e.ebx & 0xffff) | (1 << bits) << 16 | id << 24;
            e.edx = if vcpus > 1 { e.edx | HTT } else { e.edx & !HTT };
        }
        // Caches: each belongs to one core, the package holds all cores.
        0x4 if e.eax & 0x1f != 0 => {
            e.eax = (e.eax & 0x3fff) | ((1 << bits) - 1) << 26;
        }
        // No performance counters: their state is not saved.
        0xa => clear(e),
        0xb | 0x1f => topology(e, id, vcpus, bits),
        // No nested virtualization: its state is not saved.
        0x8000_0001 => e.ecx &= !SVM,
        0x8000_000a => clear(e),
        0x8000_0008 => e.ecx = bits << 12 | (vcpus - 1),
        0x8000_001e => {
            e.eax = id;
            e.ebx = id;
            e.ecx = 0;
        }
        0x4000_0001 => e.eax &= !KVM_FEATURES_OUT,
        _ => {}
    }
}

/// Extended topology (SDM volume 2, CPUID leaf 0BH): one thread a core, all
/// cores in one package.
fn topology(e: &mut kvm_cpuid_entry2, id: u32, vcpus: u32, bits: u32) {
    (e.eax, e.ebx, e.ecx) = match e.index {
        0 => (0, 1, 1 << 8),
        1 => (bits, vcpus, 2 << 8 | 1),
        other => (0, 0, other & 0xff),
    };
    e.edx = id;
}

fn clear(e: &mut kvm_cpuid_entry2) {
    (e.eax, e.ebx, e.ecx, e.edx) = (0, 0, 0, 0);
}

/// XCR0 and XSS components that KVM lets a guest enable (leaf 0xD).
fn xsave_mask(supported: &CpuId) -> u64 {
    supported
        .as_slice()
        .iter()
        .filter(|e| e.function == 0xd)
        .map(|e| match e.index {
            0 => u64::from(e.eax) | u64::from(e.edx) << 32,
            1 => u64::from(e.ecx) | u64::from(e.edx) << 32,
            _ => 0,
        })
        .fold(0, |all, part| all | part)
}

/// Drops the descriptions of XSAVE components that the guest can never enable:
/// KVM passes them through when it runs nested in QEMU's TCG, and Linux then
/// complains of an inconsistent layout.
fn xsave_component_is_legal(e: &kvm_cpuid_entry2, mask: u64) -> bool {
    e.function != 0xd || e.index < 2 || (e.index < 64 && mask & (1 << e.index) != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32, regs: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = regs;
        kvm_cpuid_entry2 {
            function,
            index,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        }
    }

    fn filtered(entries: &[kvm_cpuid_entry2], id: u8, vcpus: u8) -> Vec<kvm_cpuid_entry2> {
        for_vcpu(&CpuId::from_entries(entries).expect("few"), id, vcpus)
    }

    #[test]
    fn a_guest_sees_a_hypervisor_a_deadline_timer_and_no_vmx_or_svm() {
        let all = filtered(
            &[
                entry(1, 0, [0, 0xffff_ffff, VMX, HTT]),
                entry(0x8000_0001, 0, [0, 0, SVM | 1, 0]),
            ],
            0,
            1,
        );
        assert_eq!(all[0].ecx, TSC_DEADLINE | HYPERVISOR);
        assert_eq!((all[0].ebx, all[0].edx & HTT), (1 << 16 | 0xffff, 0));
        assert_eq!(all[1].ecx, 1);
    }

    #[test]
    fn four_vcpus_are_four_cores_of_one_package() {
        let leaves = [
            entry(1, 0, [0; 4]),
            entry(0xb, 0, [9; 4]),
            entry(0xb, 1, [9; 4]),
            entry(0xb, 2, [9; 4]),
        ];
        let all = filtered(&leaves, 3, 4);
        assert_eq!(all[0].ebx, 4 << 16 | 3 << 24);
        assert_eq!(all[0].edx & HTT, HTT);
        assert_eq!((all[1].eax, all[1].ebx, all[1].edx), (0, 1, 3));
        assert_eq!((all[2].eax, all[2].ebx, all[2].ecx), (2, 4, 0x201));
        assert_eq!((all[3].eax, all[3].ebx), (0, 0));
    }

    #[test]
    fn xsave_components_outside_xcr0_are_not_described() {
        let leaves = [
            entry(0xd, 0, [7, 0, 0, 0]),
            entry(0xd, 1, [0, 0, 1 << 11, 0]),
            entry(0xd, 2, [256, 576, 0, 0]),
            entry(0xd, 9, [8, 2696, 0, 0]),
            entry(0xd, 11, [16, 0, 1, 0]),
        ];
        let kept: Vec<u32> = filtered(&leaves, 0, 1).iter().map(|e| e.index).collect();
        assert_eq!(kept, [0, 1, 2, 11]);
    }
}
