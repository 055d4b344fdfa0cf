//! The two pages that the guest shares with its monitor, mapped through
//! `/dev/mem` before the fork point; and the stack of the step between them.
//!
//! A processor under nested paging writes to each page table that it walks, so each
//! is a page of the child's own. The two pages and the stack lie in the program's
//! image, which is linked to be inside one region of 2 MiB: four tables serve all.

use rustix::fs::{Mode, OFlags, open};
use rustix::io::Result;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap};
use std::arch::asm;
use std::cell::UnsafeCell;
use std::mem::offset_of;
use std::ptr::{NonNull, read_volatile, write_volatile};
use std::sync::atomic::{AtomicBool, Ordering};
use vm_run_abi::{PAGE_SIZE, VERSION, doorbell, identity};

const PAGE: usize = PAGE_SIZE as usize;

/// Room for a page in the program's image. Only its address is used.
#[repr(C, align(4096))]
struct Place(UnsafeCell<[u8; PAGE]>);

// SAFETY: nobody reads or writes a place as Rust sees it: a mapping is put over it,
// or it is a stack, which one step at a time has the use of.
unsafe impl Sync for Place {}

impl Place {
    const fn new() -> Self {
        Self(UnsafeCell::new([0; PAGE]))
    }
}

static DOORBELL_AT: Place = Place::new();
static IDENTITY_AT: Place = Place::new();

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
        let flags = OFlags::RDWR | OFlags::SYNC;
        map(&DOORBELL_AT, doorbell::GPA, flags, ProtFlags::WRITE).map(Self)
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

// SAFETY: the mapping is never taken away, and every access is volatile and of
// whole words, as with a monitor that writes the page at the same time.
unsafe impl Send for IdentityPage {}
// SAFETY: as above.
unsafe impl Sync for IdentityPage {}

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
        map(&IDENTITY_AT, identity::GPA, OFlags::RDWR, protection).map(Self)
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

/// The stack of the step to the identity. A page is more than it takes: what is
/// deeper than that is only the text of an error.
#[repr(C)]
struct Stack {
    /// Where an overflow would go: nothing else is here.
    spare: Place,
    used: Place,
}

static STACK: Stack = Stack {
    spare: Place::new(),
    used: Place::new(),
};

/// Whether the stack is in use.
static BUSY: AtomicBool = AtomicBool::new(false);

/// Calls `step` on a stack of one page in the program's image.
///
/// # Panics
/// If a step is on that stack already.
pub fn on_small_stack<F: FnMut()>(mut step: F) {
    extern "C" fn enter<F: FnMut()>(step: *mut F) {
        // SAFETY: the exclusive borrow below, which lives through the call.
        unsafe { (*step)() };
    }
    assert!(!BUSY.swap(true, Ordering::Acquire), "the stack is in use");
    let top = STACK.used.0.get().wrapping_add(1);
    // SAFETY: `top` is the end of a page that nobody else uses, as BUSY
    // says, aligned to 16 as a call wants it. r12 is kept by every C function, so
    // the old stack is back when the call returns; an unwinding step aborts at the
    // C boundary. All registers that a C function may change are declared.
    unsafe {
        asm!(
            "xchg rsp, r12",
            "call {enter}",
            "mov rsp, r12",
            enter = sym enter::<F>,
            in("rdi") &raw mut step,
            inout("r12") top => _,
            clobber_abi("C"),
        );
    }
    BUSY.store(false, Ordering::Release);
}

/// Maps one page of guest-physical addresses for the life of the process.
fn map(
    place: &'static Place,
    gpa: u64,
    flags: OFlags,
    protection: ProtFlags,
) -> Result<NonNull<u64>> {
    let memory = open("/dev/mem", flags | OFlags::CLOEXEC, Mode::empty())?;
    // SAFETY: the mapping takes the place of one page that nothing else lies in, and
    // that is not used but by its address; /dev/mem gives neither page to anybody
    // else (a hole, and a range reserved by the e820 map).
    let page = unsafe {
        mmap(
            place.0.get().cast(),
            PAGE,
            protection,
            MapFlags::SHARED | MapFlags::FIXED,
            &memory,
            gpa,
        )
    }?;
    // SAFETY: this is the mapping made above. The processes of the container
    // have no business with it.
    unsafe { madvise(page, PAGE, Advice::LinuxDontFork) }?;
    NonNull::new(page.cast()).ok_or(rustix::io::Errno::FAULT)
}
