//! Which devices the container may open: a small BPF program on its cgroup, with
//! docker's default rules (moby oci/defaults.go, `DefaultLinuxResources`). A
//! container may make any device node, and open few; its own disks are none of
//! them.

use crate::sys;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use std::io;

/// One instruction, `struct bpf_insn` of Linux include/uapi/linux/bpf.h.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Instruction {
    code: u8,
    /// Destination in the low four bits, source in the high ones.
    registers: u8,
    offset: i16,
    immediate: i32,
}

/// Loads 32 bits from the context (`BPF_LDX | BPF_MEM | BPF_W`).
const LOAD: u8 = 0x61;
/// `BPF_ALU | BPF_AND | BPF_K`, 32 bits.
const AND: u8 = 0x54;
/// `BPF_ALU | BPF_RSH | BPF_K`, 32 bits.
const SHIFT_RIGHT: u8 = 0x74;
/// `BPF_ALU64 | BPF_MOV | BPF_K`.
const SET: u8 = 0xb7;
/// `BPF_ALU64 | BPF_MOV | BPF_X`.
const COPY: u8 = 0xbf;
/// `BPF_JMP | BPF_JNE | BPF_K`.
const JUMP_UNLESS_EQUAL: u8 = 0x55;
/// `BPF_JMP | BPF_EXIT`.
const EXIT: u8 = 0x95;

/// What the program is told, `struct bpf_cgroup_dev_ctx`: the offsets of its
/// fields. The first holds the access in its high half, the kind in its low one.
const ACCESS_AND_KIND: i16 = 0;
const MAJOR: i16 = 4;
const MINOR: i16 = 8;

/// `BPF_DEVCG_ACC_MKNOD`.
const ACCESS_MKNOD: i32 = 1;
/// `BPF_DEVCG_DEV_CHAR`.
const KIND_CHARACTER: i32 = 2;

/// The character devices that can be opened, each by its major and minor number,
/// or by its major alone.
const OPEN: [(i32, Option<i32>); 9] = [
    (1, Some(3)), // null
    (1, Some(5)), // zero
    (1, Some(7)), // full
    (1, Some(8)), // random
    (1, Some(9)), // urandom
    (5, Some(0)), // tty
    (5, Some(1)), // console
    (5, Some(2)), // ptmx
    (136, None),  // the terminals of devpts
];

const RESULT: u8 = 0;
const CONTEXT: u8 = 1;
const KIND: u8 = 2;
const ACCESS: u8 = 3;
const DEVICE_MAJOR: u8 = 4;
const DEVICE_MINOR: u8 = 5;

fn instruction(code: u8, registers: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction {
        code,
        registers,
        offset,
        immediate,
    }
}

fn load(to: u8, field: i16) -> Instruction {
    instruction(LOAD, to | CONTEXT << 4, field, 0)
}

/// Skips `count` instructions unless `register` holds `value`.
fn skip_unless(register: u8, value: i32, count: i16) -> Instruction {
    instruction(JUMP_UNLESS_EQUAL, register, count, value)
}

/// The two instructions that end the program with `allowed`.
fn answer(allowed: bool) -> [Instruction; 2] {
    [
        instruction(SET, RESULT, 0, i32::from(allowed)),
        instruction(EXIT, 0, 0, 0),
    ]
}

/// The program: it answers 1 for an access that is allowed, 0 for another.
fn program() -> Vec<Instruction> {
    let mut program = vec![
        load(KIND, ACCESS_AND_KIND),
        instruction(COPY, ACCESS | KIND << 4, 0, 0),
        instruction(AND, KIND, 0, 0xffff),
        instruction(SHIFT_RIGHT, ACCESS, 0, 16),
        load(DEVICE_MAJOR, MAJOR),
        load(DEVICE_MINOR, MINOR),
    ];
    program.push(skip_unless(ACCESS, ACCESS_MKNOD, 2));
    program.extend(answer(true));
    for (major, minor) in OPEN {
        program.push(skip_unless(
            KIND,
            KIND_CHARACTER,
            3 + i16::from(minor.is_some()),
        ));
        program.push(skip_unless(
            DEVICE_MAJOR,
            major,
            2 + i16::from(minor.is_some()),
        ));
        if let Some(minor) = minor {
            program.push(skip_unless(DEVICE_MINOR, minor, 2));
        }
        program.extend(answer(true));
    }
    program.extend(answer(false));
    program
}

/// Loads the rules into the kernel.
pub fn load_rules() -> io::Result<OwnedFd> {
    sys::load_device_program(&program())
}

/// The rules, all but in force on a cgroup: until [`Self::enforce`] every device can
/// be opened there. Attaching a program to a cgroup patches the kernel's code and
/// allocates; to replace it takes one pointer. Dropped, they are no longer there.
#[derive(Debug)]
pub struct Rules {
    /// Between a program and the cgroup.
    link: OwnedFd,
    rules: OwnedFd,
    /// It allows everything. Held, so that its end is not each child's to bring.
    _open: OwnedFd,
}

impl Rules {
    /// Loads them, and takes their place on a cgroup and all of its descendants.
    pub fn prepare(cgroup: BorrowedFd<'_>) -> io::Result<Self> {
        let open = sys::load_device_program(&answer(true))?;
        Ok(Self {
            link: sys::link_device_program(open.as_fd(), cgroup)?,
            rules: load_rules()?,
            _open: open,
        })
    }

    /// Puts them in force.
    pub fn enforce(&self) -> io::Result<()> {
        sys::replace_linked_program(self.link.as_fd(), self.rules.as_fd())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs the program as the kernel would.
    fn allows(kind: i32, access: i32, major: i32, minor: i32) -> bool {
        let program = program();
        let mut registers = [0_i32; 11];
        let mut at = 0;
        loop {
            let i = program[at];
            let (to, from) = (usize::from(i.registers & 15), usize::from(i.registers >> 4));
            at += 1;
            match i.code {
                LOAD => {
                    registers[to] = match i.offset {
                        ACCESS_AND_KIND => access << 16 | kind,
                        MAJOR => major,
                        MINOR => minor,
                        other => panic!("no field at {other}"),
                    }
                }
                AND => registers[to] &= i.immediate,
                SHIFT_RIGHT => registers[to] >>= i.immediate,
                SET => registers[to] = i.immediate,
                COPY => registers[to] = registers[from],
                JUMP_UNLESS_EQUAL if registers[to] == i.immediate => {}
                JUMP_UNLESS_EQUAL => at += usize::try_from(i.offset).unwrap(),
                EXIT => return registers[0] == 1,
                other => panic!("no instruction {other:#x}"),
            }
        }
    }

    #[test]
    fn the_rules_are_dockers() {
        const BLOCK: i32 = 1;
        const READ: i32 = 2;
        const WRITE: i32 = 4;
        for (major, minor) in [
            (1, 3),
            (1, 5),
            (1, 9),
            (5, 0),
            (5, 1),
            (5, 2),
            (136, 0),
            (136, 7),
        ] {
            assert!(allows(KIND_CHARACTER, READ | WRITE, major, minor));
            assert!(!allows(BLOCK, READ, major, minor));
        }
        // /dev/mem, /dev/kmsg, a virtio disk, tun.
        for (major, minor) in [(1, 1), (1, 11), (254, 0), (10, 200), (5, 3)] {
            assert!(!allows(KIND_CHARACTER, READ, major, minor));
            assert!(!allows(BLOCK, WRITE, major, minor));
            assert!(allows(BLOCK, ACCESS_MKNOD, major, minor));
            assert!(!allows(BLOCK, ACCESS_MKNOD | READ, major, minor));
        }
    }
}
