//! The first process of a guest without an agent, for tests of what a child is.
//!
//! It draws random numbers on each CPU without end, by system call and by the vDSO in
//! turn, and prints the first that it draws as somebody new: the CPU, the way, the
//! generations in the identity page before and after, and the number; and once, what time
//! it is. In a parent it prints nothing, and so is nearly always at drawing when it is stopped.
//!
//! With the word `mute` on the kernel's command line it goes to the fork point as the
//! agent does, and then never says that it has an identity.

mod vdso;

use std::ptr::{NonNull, read_volatile, write_volatile};
use std::time::{SystemTime, UNIX_EPOCH};
use vdso::Vdso;
use vm_run_abi::{PAGE_SIZE, VERSION, doorbell, identity};

/// How many numbers of each way are shown.
const SHOWN: u32 = 4;

fn main() {
    make_node("/dev/mem", 1);
    if std::env::args().any(|word| word == "mute") {
        let doorbell = map(doorbell::GPA, libc::PROT_WRITE);
        // SAFETY: the register is in the page, which is mapped for good.
        unsafe { write_volatile(doorbell.as_ptr(), u64::from(VERSION)) };
        loop {
            std::thread::park();
        }
    }
    let page = map(identity::GPA, libc::PROT_READ);
    let mut cpu = 0;
    for other in 1..cpus() {
        // SAFETY: there is one thread.
        if unsafe { libc::fork() } == 0 {
            cpu = other;
            break;
        }
    }
    pin(cpu);
    let vdso = Vdso::find().expect("the vDSO has getrandom");
    println!("{cpu} is drawing");
    draw(cpu, page, vdso);
}

fn draw(cpu: usize, page: NonNull<u64>, mut vdso: Vdso) {
    // SAFETY: the second word of the page, which is mapped for good.
    let generation = || unsafe { read_volatile(page.as_ptr().add(1)) };
    let mut last = 0;
    let mut shown = 2 * SHOWN;
    loop {
        for way in ["call", "vdso"] {
            let before = generation();
            let number = match way {
                "call" => by_call(),
                _ => vdso.draw(),
            };
            let after = generation();
            if after != last {
                last = after;
                shown = 0;
                println!("{cpu} time {after:016x} {}", seconds());
            }
            if shown < 2 * SHOWN {
                shown += 1;
                println!("{cpu} {way} {before:016x} {after:016x} {number:016x}");
            }
        }
    }
}

fn by_call() -> u64 {
    let mut number = 0_u64;
    // SAFETY: the buffer is as long as is said.
    let got = unsafe { libc::syscall(libc::SYS_getrandom, &raw mut number, 8_usize, 0) };
    assert_eq!(got, 8);
    number
}

/// The wall clock's.
fn seconds() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map(|since| since.as_secs()).unwrap_or_default()
}

fn cpus() -> usize {
    // SAFETY: plain bits.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: the set is as long as is said.
    unsafe { libc::sched_getaffinity(0, size_of_val(&set), &raw mut set) };
    // SAFETY: reads the set.
    unsafe { libc::CPU_COUNT(&set) as usize }
}

fn pin(cpu: usize) {
    // SAFETY: plain bits.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: the number is below the size of the set: it was counted in one.
    unsafe { libc::CPU_SET(cpu, &mut set) };
    // SAFETY: the set is as long as is said.
    let done = unsafe { libc::sched_setaffinity(0, size_of_val(&set), &raw const set) };
    assert_eq!(done, 0);
}

/// A character device of the memory driver.
fn make_node(path: &str, minor: u32) {
    let path = std::ffi::CString::new(path).expect("no zero in it");
    // SAFETY: a path that ends with zero.
    let done = unsafe {
        libc::mknod(
            path.as_ptr(),
            libc::S_IFCHR | 0o600,
            libc::makedev(1, minor),
        )
    };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
}

/// Maps one page of guest-physical addresses for good.
fn map(gpa: u64, protection: i32) -> NonNull<u64> {
    let memory = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/mem")
        .expect("opens");
    // SAFETY: a new mapping, of a page that nobody has another use for.
    let page = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            PAGE_SIZE as usize,
            protection,
            libc::MAP_SHARED,
            std::os::fd::AsRawFd::as_raw_fd(&memory),
            gpa as libc::off_t,
        )
    };
    assert_ne!(
        page,
        libc::MAP_FAILED,
        "{}",
        std::io::Error::last_os_error()
    );
    NonNull::new(page.cast()).expect("not at zero")
}
