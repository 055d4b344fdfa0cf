//! Linux by its 64-bit boot protocol (Documentation/arch/x86/boot.rst).

use crate::error::{ConfigError, Error};
use crate::layout::{
    CMDLINE, CMDLINE_MAX, HIGH_RAM, INITRAMFS_MAX, KERNEL_MIN, MPTABLE, VIRTIO_IRQ, VIRTIO_MMIO,
    VIRTIO_MMIO_SIZE, ZERO_PAGE, e820,
};
use crate::memory::Ram;
use crate::x86_64::{boot, mptable};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::{BzImage, Cmdline, Elf, KernelLoader, KernelLoaderResult, load_cmdline};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use vm_memory::{ByteValued, Bytes, GuestAddress};
use vm_run_abi::PAGE_SIZE;

/// What every guest is told.
///
/// - `reboot=k panic=-1`: a panic resets at once, through the one port that is there;
/// - `i8042.*`: the rest of a keyboard controller is not there, do not probe it;
/// - `no_timer_check`, `tsc=reliable`: no PIT to test against, KVM knows the TSC;
/// - `random.trust_cpu=on`: the first keys do not wait; a child gets its own anyway;
/// - `cryptomgr.notests`, `rcupdate.rcu_expedited=1`: seconds of boot, for nothing;
/// - `swiotlb=noforce`: no bounce buffers, all devices see all memory;
/// - `8250.nr_uarts=1`: the serial ports that are not there, do not probe them;
/// - `dummy.numdummies=0`: no `dummy0` among the container's interfaces;
/// - `sysctl.vm.compaction_proactiveness=0`: else kcompactd wakes twice a second;
/// - `slab_max_order=0`: a new slab is one page to write where it can be, not eight;
/// - `?hash_entries`: tables as large as the memory suggests give a child a page of
///   its own for nearly each name that it looks up.
///
/// - `cgroup.memory=nokmem`: counting the kernel's memory by cgroup touches a page more
///   for most slabs; a container's kernel memory is bounded by its guest.
///
/// docs/kernel.md shows this line.
const CMDLINE_BASE: &str = "console=ttyS0 quiet reboot=k panic=-1 \
     i8042.noaux i8042.nomux i8042.nopnp i8042.dumbkbd \
     no_timer_check tsc=reliable random.trust_cpu=on cryptomgr.notests \
     rcupdate.rcu_expedited=1 swiotlb=noforce 8250.nr_uarts=1 dummy.numdummies=0 \
     sysctl.vm.compaction_proactiveness=0 slab_max_order=0 \
     dhash_entries=4096 ihash_entries=2048 mhash_entries=512 mphash_entries=512 \
     cgroup.memory=nokmem";

/// XLF_KERNEL_64 of `xloadflags`: the image has the 64-bit entry point.
const XLF_KERNEL_64: u16 = 1;
/// A bzImage has its 64-bit entry point 0x200 behind its 32-bit one.
const ENTRY_64: u64 = 0x200;
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// Loads everything that Linux reads before its own first instruction; returns
/// where that is.
pub(crate) fn load(
    ram: &Ram,
    vcpus: u8,
    virtio_devices: u32,
    kernel: &Path,
    initramfs: &Path,
    extra: &str,
) -> Result<u64, Error> {
    let (entry, loaded) = load_kernel(ram, kernel)?;
    let (initramfs_at, initramfs_len) = load_initramfs(ram, initramfs, loaded.kernel_end)?;
    let cmdline_len = write_cmdline(ram, virtio_devices, extra)?;
    ram.write(MPTABLE, &mptable::build(vcpus))?;
    boot::write_gdt(ram)?;
    boot::write_page_tables(ram)?;

    let mut params = boot_params {
        hdr: loaded.setup_header.unwrap_or_default(),
        ..Default::default()
    };
    params.hdr.boot_flag = 0xaa55;
    params.hdr.header = u32::from_le_bytes(*b"HdrS");
    // "Undefined" loader: there is no number for us.
    params.hdr.type_of_loader = 0xff;
    params.hdr.kernel_alignment = 0x0100_0000;
    params.hdr.cmd_line_ptr = CMDLINE as u32;
    params.hdr.cmdline_size = cmdline_len as u32;
    params.hdr.ramdisk_image = initramfs_at as u32;
    params.hdr.ramdisk_size = initramfs_len as u32;
    let map = e820(ram.ranges());
    for (slot, (addr, size, usable)) in params.e820_table.iter_mut().zip(&map) {
        *slot = boot_e820_entry {
            addr: *addr,
            size: *size,
            r#type: if *usable { E820_RAM } else { E820_RESERVED },
        };
    }
    params.e820_entries = map.len() as u8;
    ram.write(ZERO_PAGE, params.as_slice())?;
    Ok(entry)
}

fn load_kernel(ram: &Ram, path: &Path) -> Result<(u64, KernelLoaderResult), Error> {
    let bad = |reason: String| Error::Kernel {
        path: path.to_path_buf(),
        reason,
    };
    let mut file = File::open(path).map_err(|e| bad(format!("cannot open the kernel: {e}")))?;
    let mut magic = [0; 4];
    file.read_exact(&mut magic)
        .and_then(|()| file.seek(SeekFrom::Start(0)))
        .map_err(|e| bad(format!("cannot read the kernel: {e}")))?;
    let lowest = Some(GuestAddress(KERNEL_MIN));
    if magic == *b"\x7fELF" {
        let loaded = Elf::load(ram.memory(), None, &mut file, lowest)
            .map_err(|e| bad(format!("not a vmlinux that fits this guest: {e}")))?;
        return Ok((loaded.kernel_load.0, loaded));
    }
    let loaded = BzImage::load(ram.memory(), None, &mut file, lowest)
        .map_err(|_| bad("neither a vmlinux (ELF) nor a bzImage".into()))?;
    let flags = loaded.setup_header.map_or(0, |h| h.xloadflags);
    if flags & XLF_KERNEL_64 == 0 {
        return Err(bad("a bzImage without the 64-bit entry point".into()));
    }
    Ok((loaded.kernel_load.0 + ENTRY_64, loaded))
}

/// Puts the initramfs as high as Linux allows, so that the kernel has room to
/// unpack itself below.
fn load_initramfs(ram: &Ram, path: &Path, kernel_end: u64) -> Result<(u64, u64), Error> {
    let bad = |reason: String| Error::Kernel {
        path: path.to_path_buf(),
        reason,
    };
    let mut file = File::open(path).map_err(|e| bad(format!("cannot open the initramfs: {e}")))?;
    let len = file
        .metadata()
        .map_err(|e| bad(format!("cannot stat the initramfs: {e}")))?
        .len();
    let low = ram.ranges().first().map_or(0, |range| range.len);
    let end = low.min(INITRAMFS_MAX);
    let at = end
        .checked_sub(len)
        .map(|at| at & !(PAGE_SIZE - 1))
        .filter(|at| *at >= kernel_end.max(HIGH_RAM))
        .ok_or_else(|| {
            bad(format!(
                "too little memory for the kernel and an initramfs of {len} bytes: give the guest more with --memory"
            ))
        })?;
    ram.memory()
        .read_exact_volatile_from(GuestAddress(at), &mut file, len as usize)
        .map_err(|e| bad(format!("cannot read the initramfs: {e}")))?;
    Ok((at, len))
}

fn write_cmdline(ram: &Ram, virtio_devices: u32, extra: &str) -> Result<usize, Error> {
    let build = || -> linux_loader::cmdline::Result<Cmdline> {
        let mut cmdline = Cmdline::new(CMDLINE_MAX)?;
        cmdline.insert_str(CMDLINE_BASE)?;
        for i in 0..virtio_devices {
            cmdline.add_virtio_mmio_device(
                VIRTIO_MMIO_SIZE,
                GuestAddress(VIRTIO_MMIO + u64::from(i) * VIRTIO_MMIO_SIZE),
                VIRTIO_IRQ + i,
                None,
            )?;
        }
        if !extra.is_empty() {
            cmdline.insert_str(extra)?;
        }
        Ok(cmdline)
    };
    let cmdline = build().map_err(|_| ConfigError::CommandLine)?;
    load_cmdline(ram.memory(), GuestAddress(CMDLINE), &cmdline)
        .map_err(|_| ConfigError::CommandLine)?;
    Ok(cmdline
        .as_cstring()
        .map_err(|_| ConfigError::CommandLine)?
        .as_bytes_with_nul()
        .len())
}
