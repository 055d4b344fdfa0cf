//! The two pages that the guest shares with its monitor, mapped through
//! `/dev/mem` before the fork point.

use rustix::fs::{Mode, OFlags, open};
use rustix::io::Result;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap};
use std::mem::offset_of;
use std::ptr::{NonNull, read_volatile, write_volatile};
use vm_run_abi::{PAGE_SIZE, VERSION, doorbell, identity};

const PAGE: usize = PAGE_SIZE as usize;

/// The doorbell page. See [`vm_run_abi::doorbell`].
#[derive(Debug, Clone, Copy)]
pub struct Doorbell(NonNull<u64>);

// SAFETY: the mapping is never taken away, and the stores to it are single
// instructions that have no memory behind them.
unsafe impl Send for Doorbell {}
// SAFETY: as above.
unsafe impl Sync for Doorbell {}

impl Doorbell {
    /// Maps the page. Not cached: it is a device.
    pub fn map() -> Result<Self> {
        map(doorbell::GPA, OFlags::RDWR | OFlags::SYNC, ProtFlags::WRITE).map(Self)
    }

    /// The fork point: returns in the parent, and in every child.
    #[inline(always)]
    pub fn fork_point(self) {
        self.ring(doorbell::FORK_POINT, u64::from(VERSION));
    }

    /// The identity of this generation is in force.
    #[inline(always)]
    pub fn identity_applied(self, generation: u64) {
        self.ring(doorbell::IDENTITY_APPLIED, generation);
    }

    /// Asks for the power to be cut; the monitor does not let this return.
    pub fn power_off(self) {
        self.ring(doorbell::POWER_OFF, 0);
    }

    /// Tells the monitor's user why this guest cannot go on.
    pub fn boot_failed(self, line: &str) {
        for byte in line.bytes().take(doorbell::MESSAGE_MAX) {
            let byte = if byte == b'\n' { b' ' } else { byte };
            self.ring(doorbell::MESSAGE, u64::from(byte));
        }
        self.ring(doorbell::BOOT_FAILED, 0);
    }

    #[inline(always)]
    fn ring(self, register: u64, value: u64) {
        // SAFETY: the registers are below 4096, aligned to 8 and so inside the
        // mapping; a store has no effect on this process's memory.
        unsafe { write_volatile(self.0.byte_add(register as usize).as_ptr(), value) };
    }
}

/// The identity page. See [`vm_run_abi::identity`].
#[derive(Debug, Clone, Copy)]
pub struct IdentityPage(NonNull<u64>);

/// The used part of the page in words, for the volatile copy.
const WORDS: usize = identity::SIZE / 8;
const _: () = assert!(identity::SIZE.is_multiple_of(8) && identity::SIZE <= PAGE);

/// Where the entropy lies in the page, in words (see the table at
/// [`identity::Identity`]).
const ENTROPY_AT: usize = 24 / 8;
const ENTROPY_WORDS: usize = identity::ENTROPY_LEN / 8;

/// The page's first bytes as words, so that one copy can be seen as both.
#[repr(C)]
union Copied {
    words: [u64; WORDS],
    bytes: [u8; identity::SIZE],
}
const _: () = assert!(offset_of!(Copied, bytes) == 0);

impl IdentityPage {
    /// Maps the page. Cached: it is ordinary memory that the kernel leaves alone.
    pub fn map() -> Result<Self> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        map(identity::GPA, OFlags::RDWR, protection).map(Self)
    }

    /// Copies what the page holds now: the monitor may have changed it at any
    /// return from [`Doorbell::fork_point`].
    #[inline(always)]
    pub fn read(self) -> [u8; identity::SIZE] {
        let mut words = [0; WORDS];
        for (i, word) in words.iter_mut().enumerate() {
            // SAFETY: `i` is below WORDS, which is inside the mapped page.
            *word = unsafe { read_volatile(self.0.add(i).as_ptr()) };
        }
        // SAFETY: both members are plain bytes of the same size.
        unsafe { Copied { words }.bytes }
    }

    /// Wipes the entropy out of the page: it must not be found again by whoever
    /// freezes this child.
    #[inline(always)]
    pub fn wipe_entropy(self) {
        for i in ENTROPY_AT..ENTROPY_AT + ENTROPY_WORDS {
            // SAFETY: inside the used part of the mapped page.
            unsafe { write_volatile(self.0.add(i).as_ptr(), 0) };
        }
    }
}

/// Maps one page of guest-physical addresses for the life of the process.
fn map(gpa: u64, flags: OFlags, protection: ProtFlags) -> Result<NonNull<u64>> {
    let memory = open("/dev/mem", flags | OFlags::CLOEXEC, Mode::empty())?;
    // SAFETY: a new mapping at an address of the kernel's choice; /dev/mem gives
    // neither page to anybody else (a hole, and a range reserved by the e820 map).
    let page = unsafe {
        mmap(
            std::ptr::null_mut(),
            PAGE,
            protection,
            MapFlags::SHARED,
            &memory,
            gpa,
        )
    }?;
    // SAFETY: this is the mapping made above. The processes of the container
    // have no business with it.
    unsafe { madvise(page, PAGE, Advice::LinuxDontFork) }?;
    NonNull::new(page.cast()).ok_or(rustix::io::Errno::FAULT)
}
