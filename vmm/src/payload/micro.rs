//! Guests of a few instructions. They need no Linux, so they run on any KVM, a
//! PVM too: they measure a fork, and probe a host.
//!
//! A program starts in ring 3 (PVM interprets ring 0, at about 0.6 µs an
//! instruction) at [`CODE`], with the first 4 GiB mapped to themselves and no
//! interrupts.

use crate::error::Error;
use crate::layout::{MICRO_CODE, MICRO_DATA};
use crate::memory::Ram;
use crate::x86_64::boot;
use vm_run_abi::{VERSION, doorbell, identity};

/// Where a program is loaded, and begins.
pub const CODE: u64 = MICRO_CODE;

/// Where its data are.
pub const DATA: u64 = MICRO_DATA;

/// A program for a VM without a kernel.
#[derive(Debug, Clone)]
pub struct Program {
    /// Its machine code.
    pub code: &'static [u8],
    /// MSRs to set before it runs: (index, value).
    pub msrs: &'static [(u32, u64)],
    /// Whether all vCPUs begin in it, each with its number in RDI; else the first does,
    /// and the others wait to be started.
    pub everywhere: bool,
    /// What it finds at [`DATA`].
    pub data: Vec<u64>,
}

const REGISTER: u64 = 0x1111_1111_1111_1111;
const XMM: u64 = 0x2222_2222_2222_2222;
const MEMORY: u64 = 0x3333_3333_3333_3333;

/// The guest of `bench fork --guest micro`: rings its fork point with one value
/// live in a register, one in an XSAVE register and one in memory that it wrote
/// after boot; a child then answers [`expected_answer`].
#[rustfmt::skip]
pub const FORK_BENCH: Program = Program {
    msrs: &[],
    everywhere: false,
    data: Vec::new(),
    code: &[
        0x48, 0xbb, 0x11, 0x11, 0x11, 0x11, 0x11, 0x11, 0x11, 0x11, // movabs rbx, REGISTER
        0x48, 0xb8, 0x22, 0x22, 0x22, 0x22, 0x22, 0x22, 0x22, 0x22, // movabs rax, XMM
        0x66, 0x48, 0x0f, 0x6e, 0xd8,                               // movq xmm3, rax
        0xb9, 0x00, 0x10, 0x01, 0x00,                               // mov ecx, MICRO_DATA
        0x48, 0xb8, 0x33, 0x33, 0x33, 0x33, 0x33, 0x33, 0x33, 0x33, // movabs rax, MEMORY
        0x48, 0x89, 0x01,                                           // mov [rcx], rax
        0xbf, 0x00, 0x00, 0x00, 0xd0,                               // mov edi, doorbell::GPA
        0xbe, 0x08, 0xe0, 0x09, 0x00,                               // mov esi, identity::GPA + 8
                                                                    // parent:
        0xb8, VERSION as u8, 0x00, 0x00, 0x00,                      // mov eax, VERSION
        0x48, 0x89, 0x07,                                           // mov [rdi + FORK_POINT], rax
        0x48, 0x8b, 0x16,                                           // mov rdx, [rsi]
        0x48, 0x85, 0xd2,                                           // test rdx, rdx
        0x74, 0xf0,                                                 // jz parent
        0x66, 0x49, 0x0f, 0x7e, 0xd8,                               // movq r8, xmm3
        0x49, 0x01, 0xd8,                                           // add r8, rbx
        0x4c, 0x03, 0x01,                                           // add r8, [rcx]
        0x49, 0x31, 0xd0,                                           // xor r8, rdx
        0x4c, 0x89, 0x47, 0x28,                                     // mov [rdi + ANSWER], r8
        0xf3, 0x90,                                                 // done: pause
        0xeb, 0xfc,                                                 // jmp done
    ],
};

// The code above holds these as numbers.
const _: () = assert!(
    MICRO_DATA == 0x1_1000
        && doorbell::GPA == 0xd000_0000
        && identity::GPA == 0x9_e000
        && VERSION < 256
        && doorbell::FORK_POINT == 0
        && doorbell::ANSWER == 0x28
        && DATA == 0x1_1000
);

/// What a right child of [`FORK_BENCH`] answers.
pub fn expected_answer(generation: u64) -> u64 {
    REGISTER.wrapping_add(XMM).wrapping_add(MEMORY) ^ generation
}

/// How the guest of `bench live` writes its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LiveLoad {
    /// Where its first run of pages begins; each further one [`Self::stride`] bytes on.
    pub first: u64,
    /// How many runs.
    pub runs: u64,
    /// In bytes.
    pub stride: u64,
    /// How many pages each has.
    pub pages: u64,
    /// How many ticks of the TSC lie between two writes of single pages.
    pub ticks: u64,
    /// Where those lie: from here on, in bytes...
    pub area: u64,
    /// ... so many pages, a power of two.
    pub area_pages: u64,
    /// How many such writes there are before the runs are written again.
    pub writes: u64,
    /// By how much the runs lie further on each time, in bytes.
    pub shift: u64,
}

/// How many single pages a guest of [`live_bench`] has written, at [`DATA`].
pub const LIVE_COUNT: u64 = DATA;

/// The guest of `bench live`. A child of it writes all its runs and answers with its
/// generation; when it goes on, it writes single pages, at random and in time, and the
/// runs again. Whenever it finds that it has another generation, it answers with that.
pub fn live_bench(load: &LiveLoad) -> Program {
    Program {
        data: vec![
            0,
            load.first,
            load.runs,
            load.stride,
            load.pages,
            load.ticks,
            load.area,
            (load.area_pages - 1) << 12,
            load.writes,
            load.shift,
        ],
        ..LIVE_BENCH
    }
}

#[rustfmt::skip]
const LIVE_BENCH: Program = Program {
    msrs: &[],
    everywhere: false,
    data: Vec::new(),
    code: &[
        0xbf, 0x00, 0x00, 0x00, 0xd0,          // mov edi, 0xd0000000
        0xbe, 0x08, 0xe0, 0x09, 0x00,          // mov esi, 0x9e008
        0xbd, 0x00, 0x10, 0x01, 0x00,          // mov ebp, 0x11000
        0x41, 0xb8, 0xed, 0x5e, 0x00, 0x00,    // mov r8d, 0x5eed
        0xb8, VERSION as u8, 0x00, 0x00, 0x00, // parent: mov eax, VERSION
        0x48, 0x89, 0x07,                      // mov [rdi], rax
        0x4c, 0x8b, 0x26,                      // mov r12, [rsi]
        0x4d, 0x85, 0xe4,                      // test r12, r12
        0x74, 0xf0,                            // je parent
        0x49, 0xff, 0xc5,                      // round: inc r13
        0x48, 0x8b, 0x5d, 0x08,                // mov rbx, [rbp+0x8]
        0x48, 0x8b, 0x4d, 0x10,                // mov rcx, [rbp+0x10]
        0x48, 0x89, 0xd8,                      // run: mov rax, rbx
        0x48, 0x8b, 0x55, 0x20,                // mov rdx, [rbp+0x20]
        0x4c, 0x89, 0x28,                      // page: mov [rax], r13
        0x48, 0x05, 0x00, 0x10, 0x00, 0x00,    // add rax, 0x1000
        0x48, 0xff, 0xca,                      // dec rdx
        0x75, 0xf2,                            // jne page
        0x48, 0x03, 0x5d, 0x18,                // add rbx, [rbp+0x18]
        0x48, 0xff, 0xc9,                      // dec rcx
        0x75, 0xe2,                            // jne run
        0x48, 0x8b, 0x45, 0x48,                // mov rax, [rbp+0x48]
        0x48, 0x01, 0x45, 0x08,                // add [rbp+0x8], rax
        0x4c, 0x89, 0x67, 0x28,                // answer: mov [rdi+0x28], r12
        0x4c, 0x8b, 0x7d, 0x40,                // mov r15, [rbp+0x40]
        0x0f, 0x31,                            // rdtsc
        0x48, 0xc1, 0xe2, 0x20,                // shl rdx, 0x20
        0x48, 0x09, 0xc2,                      // or rdx, rax
        0x49, 0x89, 0xd6,                      // mov r14, rdx
        0x48, 0x8b, 0x06,                      // write: mov rax, [rsi]
        0x4c, 0x39, 0xe0,                      // cmp rax, r12
        0x49, 0x89, 0xc4,                      // mov r12, rax
        0x75, 0xe1,                            // jne answer
        0x0f, 0x31,                            // rdtsc
        0x48, 0xc1, 0xe2, 0x20,                // shl rdx, 0x20
        0x48, 0x09, 0xc2,                      // or rdx, rax
        0x4c, 0x39, 0xf2,                      // cmp rdx, r14
        0x72, 0xe7,                            // jb write
        0x4c, 0x03, 0x75, 0x28,                // add r14, [rbp+0x28]
        0x4c, 0x89, 0xc0,                      // mov rax, r8
        0x48, 0xc1, 0xe0, 0x0d,                // shl rax, 0xd
        0x49, 0x31, 0xc0,                      // xor r8, rax
        0x4c, 0x89, 0xc0,                      // mov rax, r8
        0x48, 0xc1, 0xe8, 0x07,                // shr rax, 0x7
        0x49, 0x31, 0xc0,                      // xor r8, rax
        0x4c, 0x89, 0xc0,                      // mov rax, r8
        0x48, 0xc1, 0xe0, 0x11,                // shl rax, 0x11
        0x49, 0x31, 0xc0,                      // xor r8, rax
        0x4c, 0x89, 0xc0,                      // mov rax, r8
        0x48, 0x23, 0x45, 0x38,                // and rax, [rbp+0x38]
        0x48, 0x03, 0x45, 0x30,                // add rax, [rbp+0x30]
        0x4c, 0x89, 0x00,                      // mov [rax], r8
        0x48, 0xff, 0x45, 0x00,                // inc [rbp+0x0]
        0x49, 0xff, 0xcf,                      // dec r15
        0x75, 0xae,                            // jne write
        0xe9, 0x64, 0xff, 0xff, 0xff,          // jmp round
    ],
};

const STAR: u32 = 0xc000_0081;
const LSTAR: u32 = 0xc000_0082;
const SYSCALL_MASK: u32 = 0xc000_0084;
const HANDLER: u64 = CODE + 0x20;

/// The probe of `doctor`: makes one SYSCALL, and answers with the privilege
/// level at which its handler runs. On VMX and SVM: 0. On PVM the handler is
/// reached without leaving ring 3, so a Linux kernel cannot run.
#[rustfmt::skip]
pub const SYSCALL_PROBE: Program = Program {
    msrs: &[
        // Ring 0 selectors from bit 32 on: code 0x08, stack 0x10.
        (STAR, 0x08 << 32),
        (LSTAR, HANDLER),
        (SYSCALL_MASK, 0),
    ],
    everywhere: false,
    data: Vec::new(),
    code: &[
        0xbf, 0x00, 0x00, 0x00, 0xd0,                   // mov edi, doorbell::GPA
        0x0f, 0x05,                                     // syscall
        0x0f, 0x0b,                                     // ud2
        0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, // up to HANDLER
        0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90,
        0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90,
        0x31, 0xc0,                                     // xor eax, eax
        0x66, 0x8c, 0xc8,                               // mov ax, cs
        0x83, 0xe0, 0x03,                               // and eax, 3
        0x48, 0x89, 0x47, 0x28,                         // mov [rdi + ANSWER], rax
        0xf3, 0x90,                                     // done: pause
        0xeb, 0xfc,                                     // jmp done
    ],
};

pub(crate) fn load(ram: &Ram, program: &Program) -> Result<(), Error> {
    boot::write_gdt(ram)?;
    boot::write_page_tables(ram)?;
    let data: Vec<u8> = program
        .data
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .collect();
    ram.write(DATA, &data)?;
    ram.write(CODE, program.code)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_probes_handler_is_where_lstar_points() {
        let at = (HANDLER - CODE) as usize;
        assert_eq!(SYSCALL_PROBE.code[at..at + 2], [0x31, 0xc0]);
    }
}
