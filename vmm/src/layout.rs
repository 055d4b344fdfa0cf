//! The guest-physical address map.
//!
//! ```text
//! 0            boot tables, zero page, command line      RAM
//! 0x9e000      identity page                             RAM, reserved in e820
//! 0x9fc00      MP table                                  RAM, reserved in e820
//! 0x100000     kernel, initramfs                         RAM
//! 3 GiB        the hole: doorbell, virtio-mmio windows, IOAPIC, LAPIC, TSS
//! 4 GiB        the rest of RAM, if there is more than 3 GiB
//! next GiB     the root window: a child's root image, read-only
//! ```

use crate::error::ConfigError;
use vm_run_abi::{PAGE_SIZE, doorbell, identity};

/// Where RAM stops below 4 GiB.
pub const HOLE_START: u64 = 3 << 30;
/// Where RAM goes on.
pub const HOLE_END: u64 = 4 << 30;
/// The least memory that a guest may have: a kernel, an agent and a shell.
pub const MEMORY_MIN: u64 = 64 << 20;
/// The most: what 46 bits of physical address, the common least of hosts, allow
/// with room to spare.
pub const MEMORY_MAX: u64 = 1 << 40;
/// The most vCPUs: the MP table has to fit below 640 KiB.
pub const VCPUS_MAX: u8 = 32;

pub(crate) const GDT: u64 = 0x500;
pub(crate) const ZERO_PAGE: u64 = 0x7000;
pub(crate) const BOOT_STACK: u64 = 0x8ff0;
/// Six pages: PML4, PDPT and four page directories.
pub(crate) const PAGE_TABLES: u64 = 0x9000;
pub(crate) const MICRO_CODE: u64 = 0x1_0000;
pub(crate) const MICRO_DATA: u64 = 0x1_1000;
pub(crate) const CMDLINE: u64 = 0x2_0000;
pub(crate) const CMDLINE_MAX: usize = 2048;
pub(crate) const LOW_RAM_END: u64 = identity::GPA;
pub(crate) const MPTABLE: u64 = 0x9_fc00;
pub(crate) const HIGH_RAM: u64 = 0x10_0000;
/// linux-loader checks that nothing of the kernel lies below.
pub(crate) const KERNEL_MIN: u64 = HIGH_RAM;
/// Linux wants the initramfs below 2 GiB (boot_params' initrd_addr_max).
pub(crate) const INITRAMFS_MAX: u64 = 0x7fff_f000;

/// The first virtio-mmio window; one page each, right after the doorbell.
pub(crate) const VIRTIO_MMIO: u64 = doorbell::GPA + PAGE_SIZE;
pub(crate) const VIRTIO_MMIO_SIZE: u64 = PAGE_SIZE;
/// The first virtio-mmio interrupt: an IOAPIC pin, edge-triggered.
pub(crate) const VIRTIO_IRQ: u32 = 5;
pub(crate) const SERIAL_PORT: u16 = 0x3f8;
pub(crate) const SERIAL_IRQ: u32 = 4;

pub(crate) const IOAPIC: u32 = 0xfec0_0000;
pub(crate) const LAPIC: u32 = 0xfee0_0000;
/// KVM api.rst 4.41 (KVM_SET_TSS_ADDR): three pages below 4 GiB that are in no
/// memory slot; 4.78 (KVM_SET_IDENTITY_MAP_ADDR): one page likewise.
pub(crate) const TSS: u64 = 0xfffb_d000;
pub(crate) const IDENTITY_MAP: u64 = 0xfffb_c000;

// What the monitor places does not overlap.
const _: () = {
    assert!(BOOT_STACK < PAGE_TABLES && PAGE_TABLES + 6 * PAGE_SIZE <= MICRO_CODE);
    assert!(MICRO_DATA + PAGE_SIZE <= CMDLINE);
    assert!(CMDLINE + CMDLINE_MAX as u64 <= identity::GPA);
    assert!(identity::GPA + PAGE_SIZE <= MPTABLE);
    assert!(HOLE_START <= doorbell::GPA && doorbell::GPA < IOAPIC as u64);
};

/// A stretch of RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RamRange {
    /// Guest-physical start.
    pub gpa: u64,
    /// Length in bytes, a multiple of the page.
    pub len: u64,
    /// Where it begins in the memory file.
    pub file_offset: u64,
}

impl RamRange {
    /// Where it lies in the memory file.
    pub(crate) fn in_file(&self) -> std::ops::Range<u64> {
        self.file_offset..self.file_offset + self.len
    }
}

/// How `bytes` of RAM lie in guest-physical addresses: one range, or two around
/// the hole.
pub fn ram_ranges(bytes: u64) -> Result<Vec<RamRange>, ConfigError> {
    if !(MEMORY_MIN..=MEMORY_MAX).contains(&bytes) || !bytes.is_multiple_of(2 << 20) {
        return Err(ConfigError::Memory(bytes));
    }
    let low = bytes.min(HOLE_START);
    let mut ranges = vec![RamRange {
        gpa: 0,
        len: low,
        file_offset: 0,
    }];
    if bytes > low {
        ranges.push(RamRange {
            gpa: HOLE_END,
            len: bytes - low,
            file_offset: low,
        });
    }
    Ok(ranges)
}

/// A stretch of guest-physical addresses with a root image behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Window {
    /// Guest-physical start.
    pub(crate) gpa: u64,
    /// Length in bytes.
    pub(crate) len: u64,
}

/// Linux adds memory in sections of this size (arch/x86/include/asm/sparsemem.h).
const SECTION: u64 = 128 << 20;
/// The longest root window: a guest has 64 bytes of its RAM for each page of it.
const WINDOW_MAX: u64 = 1 << 30;

/// The root window of a guest with `bytes` of RAM, which [`ram_ranges`] has not
/// refused: behind RAM and the hole, twice as large as RAM, and at most 1 GiB.
pub(crate) fn root_window(bytes: u64) -> Window {
    let end = HOLE_END + bytes.saturating_sub(HOLE_START);
    Window {
        gpa: end.next_multiple_of(1 << 30),
        len: (2 * bytes).next_multiple_of(SECTION).min(WINDOW_MAX),
    }
}

/// The e820 map: (start, length, usable).
pub(crate) fn e820(ranges: &[RamRange]) -> Vec<(u64, u64, bool)> {
    let mut map = vec![
        (0, LOW_RAM_END, true),
        (LOW_RAM_END, 0xa_0000 - LOW_RAM_END, false),
    ];
    for range in ranges {
        let start = range.gpa.max(HIGH_RAM);
        map.push((start, range.gpa + range.len - start, true));
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_of_three_gib_has_one_range_and_a_larger_one_two() {
        assert_eq!(ram_ranges(3 << 30).map(|r| r.len()), Ok(1));
        let ranges = ram_ranges(4 << 30).unwrap_or_default();
        assert_eq!(
            ranges,
            [
                RamRange {
                    gpa: 0,
                    len: 3 << 30,
                    file_offset: 0
                },
                RamRange {
                    gpa: 4 << 30,
                    len: 1 << 30,
                    file_offset: 3 << 30
                },
            ]
        );
        assert_eq!(
            e820(&ranges),
            [
                (0, 0x9e000, true),
                (0x9e000, 0x2000, false),
                (0x100000, (3 << 30) - 0x100000, true),
                (4 << 30, 1 << 30, true),
            ]
        );
    }

    #[test]
    fn the_root_window_is_behind_all_ram() {
        let at = |gpa, len| Window { gpa, len };
        assert_eq!(root_window(64 << 20), at(4 << 30, 128 << 20));
        assert_eq!(root_window(66 << 20), at(4 << 30, 256 << 20));
        assert_eq!(root_window(256 << 20), at(4 << 30, 512 << 20));
        assert_eq!(root_window(3 << 30), at(4 << 30, 1 << 30));
        assert_eq!(root_window(4 << 30), at(5 << 30, 1 << 30));
        assert_eq!(root_window((3 << 30) + (2 << 20)), at(5 << 30, 1 << 30));
        assert_eq!(root_window(MEMORY_MAX).gpa, MEMORY_MAX + (1 << 30));
    }

    #[test]
    fn odd_sizes_are_refused() {
        for bytes in [
            0,
            MEMORY_MIN - 1,
            (256 << 20) + 4096,
            u64::MAX,
            MEMORY_MAX + (2 << 20),
        ] {
            assert_eq!(ram_ranges(bytes), Err(ConfigError::Memory(bytes)));
        }
    }
}
