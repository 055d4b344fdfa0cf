//! `warm`, for shells: says that the container is warm, and returns in each child
//! of the template, with the child's generation on stdout (docs/warm.md).
//!
//! No C library and no standard one: it is copied into every warm container, runs
//! in any image, and wakes in every child.

#![no_std]
#![no_main]

use core::arch::{asm, naked_asm};

const READ: usize = 0;
const WRITE: usize = 1;
const SOCKET: usize = 41;
const CONNECT: usize = 42;
const EXIT_GROUP: usize = 231;

const AF_UNIX: u16 = 1;
const SOCK_STREAM: usize = 1;
/// `EINTR`, as the kernel returns it.
const INTERRUPTED: isize = -4;

const STDOUT: usize = 1;
const STDERR: usize = 2;

/// Where the agent listens. A zero ends it, the other makes the address even.
const PATH: [u8; 18] = *b"/run/vm-run/sock\0\0";

/// `struct sockaddr_un`, as much of it as the path takes.
#[repr(C)]
struct Address {
    family: u16,
    path: [u8; PATH.len()],
}

/// How an answer begins.
const CHILD: [u8; 6] = *b"child ";

/// The longest answer: that, sixteen digits and the end of the line.
const ANSWER_MAX: usize = CHILD.len() + 17;

/// Where the kernel begins: the stack is aligned, and no return is possible.
///
/// # Safety
/// For the kernel alone.
#[unsafe(no_mangle)]
#[unsafe(naked)]
unsafe extern "C" fn _start() -> ! {
    naked_asm!("xor ebp, ebp", "and rsp, -16", "call {main}", "ud2", main = sym main)
}

extern "C" fn main() -> ! {
    let line = match ask() {
        Ok(line) => line,
        Err(why) => end(STDERR, why, 1),
    };
    let is_child = line.bytes.iter().zip(CHILD).all(|(a, b)| *a == b);
    match line.bytes.get(CHILD.len()..line.len) {
        Some(generation) if is_child => end(STDOUT, generation, 0),
        _ => end(STDERR, b"warm: an answer that is none\n", 1),
    }
}

/// A line of the agent's, with its end.
struct Line {
    bytes: [u8; ANSWER_MAX],
    len: usize,
}

/// Says that the container is warm and waits for the answer.
fn ask() -> Result<Line, &'static [u8]> {
    let address = Address {
        family: AF_UNIX,
        path: PATH,
    };
    let pointer = &raw const address as usize;
    let socket = call(SOCKET, [AF_UNIX.into(), SOCK_STREAM, 0]);
    let Ok(socket) = usize::try_from(socket) else {
        return Err(b"warm: cannot make a socket\n");
    };
    if call(CONNECT, [socket, pointer, size_of::<Address>()]) != 0 {
        return Err(b"warm: cannot connect to /run/vm-run/sock\n");
    }
    if !write_all(socket, b"warm\n") {
        return Err(b"warm: cannot write to /run/vm-run/sock\n");
    }
    let mut line = Line {
        bytes: [0; ANSWER_MAX],
        len: 0,
    };
    while line.len < ANSWER_MAX {
        let rest = line.bytes.as_mut_ptr().wrapping_add(line.len) as usize;
        match call(READ, [socket, rest, ANSWER_MAX - line.len]) {
            INTERRUPTED => {}
            n if n > 0 => line.len += n.unsigned_abs(),
            _ => return Err(b"warm: the connection has ended\n"),
        }
        if line.bytes.get(line.len - 1) == Some(&b'\n') {
            break;
        }
    }
    Ok(line)
}

fn write_all(fd: usize, mut bytes: &[u8]) -> bool {
    while !bytes.is_empty() {
        match call(WRITE, [fd, bytes.as_ptr() as usize, bytes.len()]) {
            INTERRUPTED => {}
            n if n > 0 => bytes = bytes.get(n.unsigned_abs()..).unwrap_or_default(),
            _ => return false,
        }
    }
    true
}

/// Writes the last line and ends the process.
fn end(fd: usize, line: &[u8], status: usize) -> ! {
    let status = if write_all(fd, line) { status } else { 1 };
    loop {
        call(EXIT_GROUP, [status, 0, 0]);
    }
}

/// A system call of three arguments; a negative result is an error's number.
///
/// Each use in this file passes pointers to memory that lives through the call,
/// with its size.
fn call(number: usize, [a, b, c]: [usize; 3]) -> isize {
    let result;
    // SAFETY: the calls above read and write only the memory that they are given,
    // which is this program's; the registers that the kernel changes are named.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") number => result,
            in("rdi") a,
            in("rsi") b,
            in("rdx") c,
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
    result
}

/// What the compiler calls to copy memory (its own rule for programs without a C
/// library).
///
/// # Safety
/// As memcpy(3).
#[unsafe(no_mangle)]
#[unsafe(naked)]
unsafe extern "C" fn memcpy(_to: *mut u8, _from: *const u8, _len: usize) -> *mut u8 {
    naked_asm!("mov rax, rdi", "mov rcx, rdx", "rep movsb", "ret")
}

/// The same to fill it.
///
/// # Safety
/// As memset(3).
#[unsafe(no_mangle)]
#[unsafe(naked)]
unsafe extern "C" fn memset(_to: *mut u8, _byte: i32, _len: usize) -> *mut u8 {
    naked_asm!(
        "mov r8, rdi",
        "mov eax, esi",
        "mov rcx, rdx",
        "rep stosb",
        "mov rax, r8",
        "ret"
    )
}

/// Named by the core library's tables for unwinding, and never called: nothing
/// unwinds here.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    end(STDERR, b"warm: this is a bug\n", 2)
}
