//! The state in which a guest begins: 64-bit mode, the first 4 GiB mapped to
//! themselves, no interrupts (Linux Documentation/arch/x86/boot.rst, "64-bit
//! Boot Protocol").

use crate::error::Error;
use crate::layout::{BOOT_STACK, GDT, PAGE_TABLES, ZERO_PAGE};
use crate::memory::Ram;
use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use vm_run_abi::PAGE_SIZE;

const CR0_PE_ET_NE_WP_PG: u64 = 1 | 1 << 4 | 1 << 5 | 1 << 16 | 1 << 31;
const CR4_PAE_OSFXSR_OSXMMEXCPT: u64 = 1 << 5 | 1 << 9 | 1 << 10;
const EFER_SCE_LME_LMA: u64 = 1 | 1 << 8 | 1 << 10;
const PRESENT_WRITE_USER: u64 = 7;
const HUGE: u64 = 1 << 7;

/// At which privilege the first instruction runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ring {
    /// A kernel.
    Kernel,
    /// A guest that is one user program and nothing else.
    User,
}

/// Maps the first 4 GiB to themselves by pages of 2 MiB. Everything is open to
/// user mode: there is none at boot, but for guests that are nothing else.
pub(crate) fn write_page_tables(ram: &Ram) -> Result<(), Error> {
    let table = |n: u64| PAGE_TABLES + n * PAGE_SIZE;
    ram.write(table(0), &(table(1) | PRESENT_WRITE_USER).to_le_bytes())?;
    for gib in 0..4_u64 {
        let directory = table(2 + gib);
        ram.write(
            table(1) + gib * 8,
            &(directory | PRESENT_WRITE_USER).to_le_bytes(),
        )?;
        let entries: Vec<u8> = (0..512_u64)
            .flat_map(|i| ((gib << 30 | i << 21) | PRESENT_WRITE_USER | HUGE).to_le_bytes())
            .collect();
        ram.write(directory, &entries)?;
    }
    Ok(())
}

/// The descriptors that the selectors below name: null, 64-bit code and data of
/// ring 0, TSS (two entries), then data and code of ring 3. Linux loads its own.
pub(crate) fn write_gdt(ram: &Ram) -> Result<(), Error> {
    let descriptors: [u64; 7] = [
        0,
        0x00af_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x0000_8b00_0000_ffff,
        0,
        0x00cf_f300_0000_ffff,
        0x00af_fb00_0000_ffff,
    ];
    for (i, descriptor) in (0_u64..).zip(descriptors) {
        ram.write(GDT + i * 8, &descriptor.to_le_bytes())?;
    }
    Ok(())
}

/// Turns the registers of a fresh vCPU into those of 64-bit mode.
pub(crate) fn set_long_mode(sregs: &mut kvm_sregs, ring: Ring) {
    let (code, data, dpl) = match ring {
        Ring::Kernel => (0x08, 0x10, 0),
        Ring::User => (0x33, 0x2b, 3),
    };
    let segment = |selector, type_, l, s| kvm_segment {
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        dpl,
        db: u8::from(l == 0),
        s,
        l,
        g: 1,
        ..Default::default()
    };
    sregs.cs = segment(code, 0xb, 1, 1);
    let data = segment(data, 0x3, 0, 1);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment {
        limit: 0xffff,
        selector: 0x18,
        type_: 0xb,
        present: 1,
        ..Default::default()
    };
    sregs.gdt.base = GDT;
    sregs.gdt.limit = 7 * 8 - 1;
    sregs.cr0 = CR0_PE_ET_NE_WP_PG;
    sregs.cr3 = PAGE_TABLES;
    sregs.cr4 = CR4_PAE_OSFXSR_OSXMMEXCPT;
    sregs.efer = EFER_SCE_LME_LMA;
}

/// The general registers at `entry`. RSI points to the zero page.
pub(crate) fn registers(entry: u64) -> kvm_regs {
    kvm_regs {
        rip: entry,
        rsp: BOOT_STACK,
        rsi: ZERO_PAGE,
        // Bit 1 is always set (SDM volume 1, 3.4.3); interrupts are off.
        rflags: 2,
        ..Default::default()
    }
}
