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

/// A program for a VM without a kernel.
#[derive(Debug)]
pub struct Program {
    /// Its machine code.
    pub code: &'static [u8],
    /// MSRs to set before it runs: (index, value).
    pub msrs: &'static [(u32, u64)],
    /// Whether all vCPUs begin in it, each with its number in RDI; else the first does,
    /// and the others wait to be started.
    pub everywhere: bool,
}

const REGISTER: u64 = 0x1111_1111_1111_1111;
const XMM: u64 = 0x2222_2222_2222_2222;
const MEMORY: u64 = 0x3333_3333_3333_3333;

/// The guest of `bench fork --guest micro`: rings its fork point with one value
/// live in a register, one in an XSAVE register and one in memory that it wrote
/// after boot; a child then answers [`expected_answer`].
#[rustfmt::skip]
pub static FORK_BENCH: Program = Program {
    msrs: &[],
    everywhere: false,
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
);

/// What a right child of [`FORK_BENCH`] answers.
pub fn expected_answer(generation: u64) -> u64 {
    REGISTER.wrapping_add(XMM).wrapping_add(MEMORY) ^ generation
}

const STAR: u32 = 0xc000_0081;
const LSTAR: u32 = 0xc000_0082;
const SYSCALL_MASK: u32 = 0xc000_0084;
const HANDLER: u64 = CODE + 0x20;

/// The probe of `doctor`: makes one SYSCALL, and answers with the privilege
/// level at which its handler runs. On VMX and SVM: 0. On PVM the handler is
/// reached without leaving ring 3, so a Linux kernel cannot run.
#[rustfmt::skip]
pub static SYSCALL_PROBE: Program = Program {
    msrs: &[
        // Ring 0 selectors from bit 32 on: code 0x08, stack 0x10.
        (STAR, 0x08 << 32),
        (LSTAR, HANDLER),
        (SYSCALL_MASK, 0),
    ],
    everywhere: false,
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
