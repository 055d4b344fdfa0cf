//! Memory: special files, faults served by the program, other processes.

use super::{Probe, c, expect};
use crate::kernel::{Answer, call, out, ptr};

pub const PROBES: &[Probe] = &[
    ("memfd", || {
        call(
            libc::SYS_memfd_create,
            &[c(c"walk"), u64::from(libc::MFD_ALLOW_SEALING)],
        )
    }),
    ("memfd that may not be executed", || {
        const MFD_NOEXEC_SEAL: u64 = 8;
        call(libc::SYS_memfd_create, &[c(c"walk"), MFD_NOEXEC_SEAL])
    }),
    ("memfd of huge pages", || {
        call(
            libc::SYS_memfd_create,
            &[c(c"walk"), u64::from(libc::MFD_HUGETLB)],
        )
    }),
    ("memfd_secret", secret),
    ("userfaultfd for user mode", userfaultfd),
    ("madvise mergeable", || advise(libc::MADV_MERGEABLE)),
    ("madvise hugepage", || advise(libc::MADV_HUGEPAGE)),
    ("madvise free", || advise(libc::MADV_FREE)),
    ("madvise cold", || advise(libc::MADV_COLD)),
    ("madvise pageout", || advise(libc::MADV_PAGEOUT)),
    ("madvise populate_write", || {
        advise(libc::MADV_POPULATE_WRITE)
    }),
    ("mlock", || call(libc::SYS_mlock, &[map(0)? as u64, 4096])),
    ("mlock2 on fault", || {
        call(libc::SYS_mlock2, &[map(0)? as u64, 4096, 1])
    }),
    ("mseal", || {
        call(libc::SYS_mseal, &[map(0)? as u64, 4096, 0])
    }),
    ("process_vm_readv", read_own),
    ("process_madvise", process_madvise),
    ("cachestat", cachestat),
    ("membarrier query", || {
        call(libc::SYS_membarrier, &[0, 0, 0])
    }),
    ("membarrier private expedited", || {
        const PRIVATE_EXPEDITED: u64 = 1 << 3;
        const REGISTER_PRIVATE_EXPEDITED: u64 = 1 << 4;
        call(libc::SYS_membarrier, &[REGISTER_PRIVATE_EXPEDITED, 0, 0])?;
        call(libc::SYS_membarrier, &[PRIVATE_EXPEDITED, 0, 0])
    }),
    ("soft-dirty bits", || {
        let file = super::open(c"/proc/self/clear_refs", libc::O_WRONLY)?;
        call(libc::SYS_write, &[file as u64, ptr(b"4"), 1])
    }),
    ("mmap below 64 KiB", || mmap(0x1000, libc::MAP_FIXED)),
    ("mmap of 32 bits", || map(libc::MAP_32BIT)),
];

/// One anonymous page.
fn map(flags: i32) -> Answer {
    mmap(0, flags)
}

fn mmap(address: u64, flags: i32) -> Answer {
    let protection = (libc::PROT_READ | libc::PROT_WRITE) as u64;
    let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | flags) as u64;
    call(
        libc::SYS_mmap,
        &[address, 4096, protection, flags, u64::MAX, 0],
    )
}

fn advise(advice: i32) -> Answer {
    call(libc::SYS_madvise, &[map(0)? as u64, 4096, advice as u64])
}

fn secret() -> Answer {
    let file = call(libc::SYS_memfd_secret, &[0])?;
    call(libc::SYS_ftruncate, &[file as u64, 4096])?;
    let protection = (libc::PROT_READ | libc::PROT_WRITE) as u64;
    call(
        libc::SYS_mmap,
        &[0, 4096, protection, libc::MAP_SHARED as u64, file as u64, 0],
    )
}

fn userfaultfd() -> Answer {
    const USER_MODE_ONLY: u64 = 1;
    const UFFDIO_API: u64 = 0xc018_aa3f;
    let file = call(libc::SYS_userfaultfd, &[USER_MODE_ONLY])?;
    // struct uffdio_api: version, features wanted, ioctls offered.
    let mut api = [0xaau64, 0, 0];
    call(libc::SYS_ioctl, &[file as u64, UFFDIO_API, out(&mut api)])
}

fn read_own() -> Answer {
    let from = [7u8; 8];
    let mut to = [0u8; 8];
    let local = [out(&mut to), 8];
    let remote = [ptr(&from), 8];
    let own = u64::from(std::process::id());
    let read = call(
        libc::SYS_process_vm_readv,
        &[own, ptr(&local), 1, ptr(&remote), 1, 0],
    )?;
    expect(read == 8, libc::EIO)
}

fn process_madvise() -> Answer {
    let own = call(libc::SYS_pidfd_open, &[u64::from(std::process::id()), 0])?;
    let range = [map(0)? as u64, 4096];
    call(
        libc::SYS_process_madvise,
        &[own as u64, ptr(&range), 1, libc::MADV_COLD as u64, 0],
    )
}

fn cachestat() -> Answer {
    const CACHESTAT: i64 = 451;
    let file = super::open(c"/tmp/cachestat", libc::O_CREAT | libc::O_RDWR)?;
    let range = [0u64, 0];
    let mut counters = [0u64; 5];
    call(
        CACHESTAT,
        &[file as u64, ptr(&range), out(&mut counters), 0],
    )
}
