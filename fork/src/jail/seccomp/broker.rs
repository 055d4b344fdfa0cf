//! The list of a broker: each call, and why. It opens files by name, which no worker may;
//! it makes no process, no thread, no socket and no mount.

use super::calls::{Call, Check, MAIN, always, when};

/// For a process with the pid `pid`.
pub(super) fn list(pid: u32) -> Vec<Call> {
    [
        runtime(pid),
        conversation(),
        names(),
        content(),
        attributes(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// What the C library and Rust's own do anywhere.
fn runtime(pid: u32) -> Vec<Call> {
    let exec = libc::PROT_EXEC as u32;
    let abort = libc::SIGABRT as u32;
    let call = |number| always(MAIN, number);
    vec![
        // The heap: never memory that can be executed.
        call(libc::SYS_brk),
        when(MAIN, libc::SYS_mmap, vec![vec![Check::Without(2, exec)]]),
        when(
            MAIN,
            libc::SYS_mprotect,
            vec![vec![Check::Without(2, exec)]],
        ),
        call(libc::SYS_munmap),
        call(libc::SYS_mremap),
        call(libc::SYS_madvise),
        call(libc::SYS_futex),
        // Seeds of hash maps.
        call(libc::SYS_getrandom),
        // abort(3), and the end.
        call(libc::SYS_gettid),
        call(libc::SYS_getpid),
        call(libc::SYS_rt_sigprocmask),
        call(libc::SYS_rt_sigreturn),
        call(libc::SYS_sigaltstack),
        when(
            MAIN,
            libc::SYS_tgkill,
            vec![vec![Check::Is(0, pid), Check::Is(2, abort)]],
        ),
        // A call that a stop and SIGCONT have interrupted.
        call(libc::SYS_restart_syscall),
        call(libc::SYS_exit),
        call(libc::SYS_exit_group),
    ]
}

/// Requests and answers, on the socket of its guest, and on those of forks.
fn conversation() -> Vec<Call> {
    vec![
        // The socket of a claim comes with a packet.
        always(MAIN, libc::SYS_recvmsg),
        always(MAIN, libc::SYS_sendto),
        // The packet that it is in its jail, and what the brokers of forks are handed.
        always(MAIN, libc::SYS_sendmsg),
        always(MAIN, libc::SYS_poll),
        always(MAIN, libc::SYS_ppoll),
        // Last words to stderr.
        always(MAIN, libc::SYS_write),
    ]
}

/// All that is about names, relative to a descriptor: what the root holds are volumes.
fn names() -> Vec<Call> {
    let calls = [
        libc::SYS_openat,
        libc::SYS_mkdirat,
        // Without CAP_MKNOD it makes no devices.
        libc::SYS_mknodat,
        libc::SYS_symlinkat,
        libc::SYS_linkat,
        libc::SYS_unlinkat,
        libc::SYS_renameat2,
        libc::SYS_readlinkat,
        libc::SYS_getdents64,
        // The owner of what is made.
        libc::SYS_setresuid,
        libc::SYS_setresgid,
    ];
    calls.map(|number| always(MAIN, number)).into()
}

fn content() -> Vec<Call> {
    let mut list: Vec<Call> = [
        libc::SYS_close,
        libc::SYS_pread64,
        libc::SYS_pwrite64,
        libc::SYS_lseek,
        libc::SYS_ftruncate,
        libc::SYS_fallocate,
        libc::SYS_fsync,
        libc::SYS_fdatasync,
    ]
    .map(|number| always(MAIN, number))
    .into();
    // Rust's debug builds look whether a descriptor is open before they close it.
    let looks = vec![vec![Check::Is(1, libc::F_GETFD as u32)]];
    list.push(when(MAIN, libc::SYS_fcntl, looks));
    list
}

fn attributes() -> Vec<Call> {
    let calls = [
        libc::SYS_statx,
        libc::SYS_fstatfs,
        libc::SYS_fchmod,
        libc::SYS_fchmodat,
        libc::SYS_fchownat,
        libc::SYS_utimensat,
        // By the path of a descriptor, for what has no other way.
        libc::SYS_setxattr,
        libc::SYS_getxattr,
        libc::SYS_listxattr,
        libc::SYS_removexattr,
    ];
    calls.map(|number| always(MAIN, number)).into()
}
