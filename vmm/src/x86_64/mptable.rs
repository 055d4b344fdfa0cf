//! The MP table: how a guest without ACPI learns of its CPUs and interrupts
//! (Intel MultiProcessor Specification 1.4; Linux arch/x86/kernel/mpparse.c,
//! which looks for it in the last KiB below 640 KiB).

use crate::layout::{IOAPIC, LAPIC, MPTABLE};

const IOAPIC_PINS: u8 = 24;
const APIC_VERSION: u8 = 0x14;

/// The bytes for [`MPTABLE`]: the floating pointer, then the table.
pub(crate) fn build(vcpus: u8) -> Vec<u8> {
    let ioapic_id = vcpus;
    let mut entries = Vec::new();
    let mut count: u16 = 0;
    let mut entry = |bytes: &[u8]| {
        entries.extend_from_slice(bytes);
        count += 1;
    };

    for id in 0..vcpus {
        // Enabled; the first is the bootstrap processor.
        let flags = if id == 0 { 3 } else { 1 };
        let mut cpu = [0; 20];
        cpu[1] = id;
        cpu[2] = APIC_VERSION;
        cpu[3] = flags;
        // Family 6, with an APIC and an FPU: Linux reads CPUID anyway.
        cpu[4..8].copy_from_slice(&0x600_u32.to_le_bytes());
        cpu[8..12].copy_from_slice(&0x201_u32.to_le_bytes());
        entry(&cpu);
    }
    entry(&[1, 0, b'I', b'S', b'A', b' ', b' ', b' ']);
    let mut ioapic = [2, ioapic_id, APIC_VERSION, 1, 0, 0, 0, 0];
    ioapic[4..].copy_from_slice(&IOAPIC.to_le_bytes());
    entry(&ioapic);
    for pin in 0..IOAPIC_PINS {
        // An ISA interrupt (edge, active high) on the pin of its number.
        entry(&[3, 0, 0, 0, 0, pin, ioapic_id, pin]);
    }
    // Local interrupts: ExtINT on LINT0, NMI on LINT1, of every CPU.
    entry(&[4, 3, 0, 0, 0, 0, 0, 0]);
    entry(&[4, 1, 0, 0, 0, 0, 0xff, 1]);

    let mut table = Vec::with_capacity(44 + entries.len());
    table.extend_from_slice(b"PCMP");
    table.extend_from_slice(&(44 + entries.len() as u16).to_le_bytes());
    table.extend_from_slice(&[4, 0]);
    table.extend_from_slice(b"VM-RUN  ");
    table.extend_from_slice(b"000000000000");
    table.extend_from_slice(&[0; 6]);
    table.extend_from_slice(&count.to_le_bytes());
    table.extend_from_slice(&LAPIC.to_le_bytes());
    table.extend_from_slice(&[0; 4]);
    table.extend_from_slice(&entries);
    table[7] = checksum(&table);

    let mut pointer = Vec::with_capacity(16 + table.len());
    pointer.extend_from_slice(b"_MP_");
    pointer.extend_from_slice(&(MPTABLE as u32 + 16).to_le_bytes());
    pointer.extend_from_slice(&[1, 4, 0, 0, 0, 0, 0, 0]);
    pointer[10] = checksum(&pointer);
    pointer.extend_from_slice(&table);
    pointer
}

/// The byte that makes all bytes add up to zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0_u8, |sum, b| sum.wrapping_sub(*b))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::VCPUS_MAX;

    #[test]
    fn both_parts_add_up_to_zero_and_fit_below_640_kib() {
        for vcpus in [1, 2, VCPUS_MAX] {
            let bytes = build(vcpus);
            assert_eq!(checksum(&bytes[..16]), 0);
            assert_eq!(checksum(&bytes[16..]), 0);
            assert!(MPTABLE + bytes.len() as u64 <= 0xa_0000);
        }
    }

    #[test]
    fn each_cpu_has_an_entry_and_the_first_boots() {
        let bytes = build(2);
        let cpus: Vec<&[u8]> = bytes[60..100].chunks(20).collect();
        assert_eq!((cpus[0][0], cpus[0][1], cpus[0][3]), (0, 0, 3));
        assert_eq!((cpus[1][0], cpus[1][1], cpus[1][3]), (0, 1, 1));
        let entries = u16::from_le_bytes([bytes[50], bytes[51]]);
        assert_eq!(entries, 2 + 1 + 1 + 24 + 2);
    }
}
