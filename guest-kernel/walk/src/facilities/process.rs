//! Processes, their namespaces, limits, filters and keys, and other ABIs.

use super::{Probe, c, expect, open};
use crate::kernel::{Answer, call, end, out, ptr};
use std::arch::asm;

pub const PROBES: &[Probe] = &[
    ("user namespace", || unshare(libc::CLONE_NEWUSER)),
    ("user namespace with root mapped", || {
        become_root_of_new_user_namespace(0)
    }),
    ("pid namespace in a user namespace", || {
        become_root_of_new_user_namespace(libc::CLONE_NEWPID)
    }),
    ("net namespace in a user namespace", || {
        become_root_of_new_user_namespace(libc::CLONE_NEWNET)
    }),
    ("time namespace in a user namespace", || {
        become_root_of_new_user_namespace(libc::CLONE_NEWTIME)
    }),
    ("cgroup namespace in a user namespace", || {
        become_root_of_new_user_namespace(libc::CLONE_NEWCGROUP)
    }),
    ("net namespace without the capability", || {
        unshare(libc::CLONE_NEWNET)
    }),
    ("clone3 with a pidfd", clone3),
    ("pidfd_open", || {
        call(libc::SYS_pidfd_open, &[u64::from(std::process::id()), 0])
    }),
    ("pidfd_getfd", || {
        let own = call(libc::SYS_pidfd_open, &[u64::from(std::process::id()), 0])?;
        call(libc::SYS_pidfd_getfd, &[own as u64, 0, 0])
    }),
    ("pidfd_send_signal", || {
        let own = call(libc::SYS_pidfd_open, &[u64::from(std::process::id()), 0])?;
        call(libc::SYS_pidfd_send_signal, &[own as u64, 0, 0, 0])
    }),
    ("futex with priority inheritance", || {
        call(
            libc::SYS_futex,
            &[ptr(&0u32), libc::FUTEX_LOCK_PI as u64, 0, 0],
        )
    }),
    ("futex_waitv", futex_waitv),
    ("futex2 wake", || {
        call(454, &[ptr(&0u32), u64::from(u32::MAX), 1, 2])
    }),
    ("set_robust_list", || {
        call(libc::SYS_set_robust_list, &[ptr(&[0u64; 3]), 24])
    }),
    ("rseq", || {
        #[repr(align(32))]
        struct Area([u32; 8]);
        let mut area = Area([0; 8]);
        call(libc::SYS_rseq, &[out(&mut area.0), 32, 0, 0x5305_3053])
    }),
    ("kcmp", || {
        let own = u64::from(std::process::id());
        call(libc::SYS_kcmp, &[own, own, 0, 0, 0])
    }),
    ("seccomp filter", seccomp_filter),
    ("seccomp user notification", || {
        const GET_ACTION_AVAIL: u64 = 2;
        call(
            libc::SYS_seccomp,
            &[GET_ACTION_AVAIL, 0, ptr(&libc::SECCOMP_RET_USER_NOTIF)],
        )
    }),
    ("landlock version", || {
        call(libc::SYS_landlock_create_ruleset, &[0, 0, 1])
    }),
    ("landlock ruleset", || {
        let access = [1u64, 0];
        call(libc::SYS_landlock_create_ruleset, &[ptr(&access), 8, 0])
    }),
    ("bpf map", || {
        // union bpf_attr for MAP_CREATE: array, key 4, value 4, 1 entry.
        let attributes = [2u32, 4, 4, 1, 0, 0, 0, 0];
        call(libc::SYS_bpf, &[0, ptr(&attributes), 32])
    }),
    ("perf event of software", || {
        // struct perf_event_attr: PERF_TYPE_SOFTWARE, size 64, CPU_CLOCK.
        let mut attributes = [0u32; 16];
        attributes[0] = 1;
        attributes[1] = 64;
        call(
            libc::SYS_perf_event_open,
            &[ptr(&attributes), 0, u64::MAX, u64::MAX, 0],
        )
    }),
    ("key added", || {
        const SESSION: u64 = -3i64 as u64;
        call(
            libc::SYS_add_key,
            &[c(c"user"), c(c"walk"), ptr(b"x"), 1, SESSION],
        )
    }),
    ("key of type logon", || {
        const PROCESS: u64 = -2i64 as u64;
        call(
            libc::SYS_add_key,
            &[c(c"logon"), c(c"walk:x"), ptr(b"x"), 1, PROCESS],
        )
    }),
    ("persistent keyring", || {
        call(libc::SYS_keyctl, &[22, u64::from(u32::MAX), -2i64 as u64])
    }),
    ("keyctl dh", || {
        call(libc::SYS_keyctl, &[23, ptr(&[0u32; 3]), 0, 0, 0])
    }),
    ("keyctl capabilities", || {
        call(libc::SYS_keyctl, &[31, out(&mut [0u8; 2]), 2])
    }),
    ("prctl of the memory map", || {
        const SET_MM_MAP_SIZE: u64 = 15;
        call(
            libc::SYS_prctl,
            &[
                libc::PR_SET_MM as u64,
                SET_MM_MAP_SIZE,
                out(&mut 0u32),
                0,
                0,
            ],
        )
    }),
    ("prctl memory merge", || {
        call(libc::SYS_prctl, &[67, 1, 0, 0, 0])
    }),
    ("prctl core scheduling", || {
        call(libc::SYS_prctl, &[62, 1, 0, 0, 0])
    }),
    ("prctl name of memory", || {
        call(libc::SYS_prctl, &[0x5356_4d41, 0, 0, 0, 0])
    }),
    ("prctl no huge pages", || {
        call(libc::SYS_prctl, &[41, 1, 0, 0, 0])
    }),
    ("prctl child subreaper", || {
        call(libc::SYS_prctl, &[36, 1, 0, 0, 0])
    }),
    ("scheduling batch", || {
        call(libc::SYS_sched_setscheduler, &[0, 3, ptr(&0i32)])
    }),
    ("scheduling fifo", || {
        call(libc::SYS_sched_setscheduler, &[0, 1, ptr(&1i32)])
    }),
    ("scheduling deadline", || {
        // struct sched_attr: size 48, policy 6, runtime, deadline, period.
        let attributes = [48u64 | 6 << 32, 0, 0, 1_000_000, 2_000_000, 2_000_000];
        call(libc::SYS_sched_setattr, &[0, ptr(&attributes), 0])
    }),
    ("affinity", || {
        call(libc::SYS_sched_setaffinity, &[0, 8, ptr(&u64::MAX)])
    }),
    ("io priority", || {
        call(libc::SYS_ioprio_set, &[1, 0, 2 << 13 | 4])
    }),
    ("rlimit", || {
        call(libc::SYS_prlimit64, &[0, 7, 0, out(&mut [0u64; 2])])
    }),
    ("ptrace of a child", || {
        call(libc::SYS_ptrace, &[0, 0, 0, 0])
    }),
    ("local descriptor table", || {
        call(libc::SYS_modify_ldt, &[0, out(&mut [0u8; 64]), 64])
    }),
    ("16-bit segment", || {
        // struct user_desc: entry 0, base 0, limit 0xffff, a 16-bit data segment.
        let segment = [0u32, 0, 0xffff, 0b100_0000];
        call(libc::SYS_modify_ldt, &[1, ptr(&segment), 16])
    }),
    ("io ports", || call(libc::SYS_ioperm, &[0x80, 1, 1])),
    ("io privilege", || call(libc::SYS_iopl, &[3])),
    ("int 0x80 in a 64-bit program", int80),
    ("32-bit program", || run_elf32(&ELF32)),
    ("x32 call", || call(0x4000_0000 + libc::SYS_getpid, &[])),
    ("call by the vsyscall page", vsyscall),
    ("script", || {
        let status = run(c"/tmp/script", b"#!/no/such/interpreter\n")?;
        expect(status == libc::ENOENT, status)
    }),
    ("program of no known format", || {
        let status = run(c"/tmp/unknown", b"no program at all")?;
        expect(status == libc::ENOEXEC, status)
    }),
    ("hostname without the capability", || {
        call(libc::SYS_sethostname, &[ptr(b"x"), 1])
    }),
    ("kernel log", || call(libc::SYS_syslog, &[10, 0, 0])),
];

/// Clocks whose answer does not depend on the host's devices (the alarm clocks
/// need a real-time clock chip).
pub const CLOCKS: &[(u64, &str)] = &[
    (0, "realtime"),
    (1, "monotonic"),
    (2, "process"),
    (3, "thread"),
    (4, "monotonic_raw"),
    (5, "realtime_coarse"),
    (6, "monotonic_coarse"),
    (7, "boottime"),
    (11, "tai"),
];

pub fn clock(id: u64) -> Answer {
    call(libc::SYS_clock_gettime, &[id, out(&mut [0u64; 2])])
}

pub fn timer(id: u64) -> Answer {
    call(libc::SYS_timer_create, &[id, 0, out(&mut 0i32)])
}

fn unshare(flags: i32) -> Answer {
    call(libc::SYS_unshare, &[flags as u64])
}

/// Enters a new user namespace, and with it others, and maps root to the caller.
pub fn become_root_of_new_user_namespace(others: i32) -> Answer {
    unshare(libc::CLONE_NEWUSER)?;
    for (path, text) in [
        (c"/proc/self/setgroups", &b"deny"[..]),
        (c"/proc/self/uid_map", b"0 0 1"),
        (c"/proc/self/gid_map", b"0 0 1"),
    ] {
        let file = open(path, libc::O_WRONLY)?;
        call(
            libc::SYS_write,
            &[file as u64, ptr(text), text.len() as u64],
        )?;
    }
    unshare(others)
}

fn clone3() -> Answer {
    let mut pidfd = 0i32;
    // struct clone_args: flags, pidfd, child_tid, parent_tid, exit_signal, ...
    let mut arguments = [0u64; 8];
    arguments[0] = libc::CLONE_PIDFD as u64;
    arguments[1] = out(&mut pidfd);
    arguments[4] = libc::SIGCHLD as u64;
    match call(libc::SYS_clone3, &[ptr(&arguments), 64])? {
        0 => end(0),
        child => call(libc::SYS_wait4, &[child as u64, 0, 0, 0]),
    }
}

fn futex_waitv() -> Answer {
    let word = 1u32;
    // struct futex_waitv: value (not what the word holds), address, flags (32 bits).
    let waiter = [0u64, ptr(&word), 2];
    match call(libc::SYS_futex_waitv, &[ptr(&waiter), 1, 0, 0, 1]) {
        Err(libc::EAGAIN) => Ok(0),
        other => other,
    }
}

fn seccomp_filter() -> Answer {
    call(
        libc::SYS_prctl,
        &[libc::PR_SET_NO_NEW_PRIVS as u64, 1, 0, 0, 0],
    )?;
    // struct sock_fprog: one instruction, "return ALLOW".
    let instruction = [0x0006u64 | u64::from(libc::SECCOMP_RET_ALLOW) << 32];
    let program = [1u64, ptr(&instruction)];
    const SET_MODE_FILTER: u64 = 1;
    call(libc::SYS_seccomp, &[SET_MODE_FILTER, 0, ptr(&program)])
}

/// getpid as a 32-bit program calls it.
fn int80() -> Answer {
    let mut result: i64 = 20;
    // SAFETY: the kernel saves all registers but the named ones; getpid reads no
    // argument. Without 32-bit calls the instruction faults and ends the probe.
    unsafe {
        asm!("int 0x80", inout("rax") result, out("r8") _, out("r9") _, out("r10") _, out("r11") _);
    }
    if (result as i32) < 0 {
        Err(-(result as i32))
    } else {
        Ok(result)
    }
}

/// `time` by its address of old; where the page is gone this faults and the probe
/// is killed.
fn vsyscall() -> Answer {
    const TIME: usize = 0xffff_ffff_ff60_0400;
    // SAFETY: the page holds a function of this type or is not there, which ends
    // the probe's own process.
    let time: extern "C" fn(*mut i64) -> i64 = unsafe { std::mem::transmute(TIME) };
    Ok(time(std::ptr::null_mut()))
}

/// A whole 32-bit program: `exit(42)` by int 0x80.
#[rustfmt::skip]
const ELF32: [u8; 96] = {
    let mut file = [0u8; 96];
    let parts: [(usize, &[u8]); 3] = [
        // ELF header: 32 bits, little-endian, version 1; EXEC, i386, version 1,
        // entry 0x08048054, program headers at 52; sizes 52 and 32, one of them.
        (0, &[0x7f, b'E', b'L', b'F', 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 3, 0, 1, 0, 0, 0,
              0x54, 0x80, 0x04, 0x08, 52, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 52, 0, 32, 0, 1, 0, 0, 0]),
        // Program header: LOAD all of the file at 0x08048000, readable, executable.
        (52, &[1, 0, 0, 0, 0, 0, 0, 0, 0x00, 0x80, 0x04, 0x08, 0x00, 0x80, 0x04, 0x08,
               96, 0, 0, 0, 96, 0, 0, 0, 5, 0, 0, 0, 0x00, 0x10, 0, 0]),
        // mov eax, 1; mov ebx, 42; int 0x80
        (84, &[0xb8, 1, 0, 0, 0, 0xbb, 42, 0, 0, 0, 0xcd, 0x80]),
    ];
    let mut part = 0;
    while part < parts.len() {
        let (at, bytes) = parts[part];
        let mut index = 0;
        while index < bytes.len() {
            file[at + index] = bytes[index];
            index += 1;
        }
        part += 1;
    }
    file
};

fn run_elf32(program: &[u8]) -> Answer {
    const EXIT_42: i64 = 1000 + 42;
    let status = run(c"/tmp/elf32", program)?;
    expect(i64::from(status) == EXIT_42, status)
}

/// Writes a program, runs it, and returns the errno of exec, or 1000 and the exit
/// status.
fn run(path: &std::ffi::CStr, program: &[u8]) -> Result<i32, i32> {
    let file = open(path, libc::O_CREAT | libc::O_WRONLY)?;
    call(
        libc::SYS_write,
        &[file as u64, ptr(program), program.len() as u64],
    )?;
    call(libc::SYS_fchmod, &[file as u64, 0o755])?;
    call(libc::SYS_close, &[file as u64])?;
    let mut pipe = [0i32; 2];
    call(libc::SYS_pipe2, &[out(&mut pipe), libc::O_CLOEXEC as u64])?;
    let child = call(libc::SYS_clone, &[libc::SIGCHLD as u64])?;
    if child == 0 {
        let failed = call(libc::SYS_execve, &[c(path), 0, 0])
            .err()
            .unwrap_or_default();
        let told = call(libc::SYS_write, &[pipe[1] as u64, ptr(&failed), 4]);
        end(i32::from(told.is_err()));
    }
    call(libc::SYS_close, &[pipe[1] as u64])?;
    let mut failed = 0i32;
    let told = call(libc::SYS_read, &[pipe[0] as u64, out(&mut failed), 4])?;
    let mut status = 0i32;
    call(libc::SYS_wait4, &[child as u64, out(&mut status), 0, 0])?;
    Ok(if told == 4 {
        failed
    } else {
        1000 + libc::WEXITSTATUS(status)
    })
}
