//! System V and POSIX IPC, and the descriptors that programs wait on.

use super::{Probe, c};
use crate::kernel::{Answer, call, out, ptr};

pub const PROBES: &[Probe] = &[
    ("sysv shared memory", shared_memory),
    ("sysv semaphores", semaphores),
    ("sysv messages", messages),
    ("posix message queue", message_queue),
    ("epoll", epoll),
    ("eventfd", || {
        call(libc::SYS_eventfd2, &[1, libc::EFD_SEMAPHORE as u64])
    }),
    ("signalfd", || {
        call(libc::SYS_signalfd4, &[u64::MAX, ptr(&0u64), 8, 0])
    }),
    ("timerfd", || {
        call(libc::SYS_timerfd_create, &[libc::CLOCK_BOOTTIME as u64, 0])
    }),
    ("inotify", inotify),
    ("dnotify", dnotify),
    ("fanotify of an unprivileged group", || {
        call(libc::SYS_fanotify_init, &[0x200, 0])
    }),
    ("io_uring", io_uring),
    ("aio", aio),
    ("pseudo terminal", || {
        super::open(crate::container::PSEUDO_TERMINALS, libc::O_RDWR)
    }),
];

fn shared_memory() -> Answer {
    let id = call(libc::SYS_shmget, &[libc::IPC_PRIVATE as u64, 4096, 0o600])?;
    let at = call(libc::SYS_shmat, &[id as u64, 0, 0]);
    call(libc::SYS_shmctl, &[id as u64, libc::IPC_RMID as u64, 0])?;
    at
}

fn semaphores() -> Answer {
    let id = call(libc::SYS_semget, &[libc::IPC_PRIVATE as u64, 1, 0o600])?;
    // struct sembuf: number, operation, flags.
    let raise = [0i16, 1, 0];
    let raised = call(libc::SYS_semop, &[id as u64, ptr(&raise), 1]);
    call(libc::SYS_semctl, &[id as u64, 0, libc::IPC_RMID as u64])?;
    raised
}

fn messages() -> Answer {
    let id = call(libc::SYS_msgget, &[libc::IPC_PRIVATE as u64, 0o600])?;
    let message = [1u64, 0];
    let sent = call(libc::SYS_msgsnd, &[id as u64, ptr(&message), 8, 0]);
    call(libc::SYS_msgctl, &[id as u64, libc::IPC_RMID as u64, 0])?;
    sent
}

fn message_queue() -> Answer {
    let name = c"walk";
    let flags = (libc::O_CREAT | libc::O_RDWR) as u64;
    let queue = call(libc::SYS_mq_open, &[c(name), flags, 0o600, 0])?;
    call(libc::SYS_mq_unlink, &[c(name)])?;
    call(libc::SYS_mq_timedsend, &[queue as u64, ptr(b"x"), 1, 0, 0])
}

fn epoll() -> Answer {
    let epoll = call(libc::SYS_epoll_create1, &[0])?;
    let event = call(libc::SYS_eventfd2, &[1, 0])?;
    // struct epoll_event, packed: events, then 8 bytes of the caller's.
    let mut wanted = [libc::EPOLLIN as u32, 0, 0];
    call(
        libc::SYS_epoll_ctl,
        &[
            epoll as u64,
            libc::EPOLL_CTL_ADD as u64,
            event as u64,
            ptr(&wanted),
        ],
    )?;
    let timeout = [0u64, 0];
    call(
        libc::SYS_epoll_pwait2,
        &[epoll as u64, out(&mut wanted), 1, ptr(&timeout), 0, 0],
    )
}

fn inotify() -> Answer {
    let inotify = call(libc::SYS_inotify_init1, &[0])?;
    call(
        libc::SYS_inotify_add_watch,
        &[inotify as u64, c(c"/tmp"), u64::from(libc::IN_CREATE)],
    )
}

fn dnotify() -> Answer {
    const DN_CREATE: u64 = 4;
    let folder = super::open(c"/tmp", libc::O_RDONLY | libc::O_DIRECTORY)?;
    call(
        libc::SYS_fcntl,
        &[folder as u64, libc::F_NOTIFY as u64, DN_CREATE],
    )
}

fn io_uring() -> Answer {
    // struct io_uring_params, 120 bytes, all default.
    let mut params = [0u32; 30];
    let ring = call(libc::SYS_io_uring_setup, &[4, out(&mut params)])?;
    const REGISTER_PROBE: u64 = 8;
    let mut operations = [0u8; 16 + 8 * 64];
    call(
        libc::SYS_io_uring_register,
        &[ring as u64, REGISTER_PROBE, out(&mut operations), 64],
    )
}

fn aio() -> Answer {
    let mut context = 0u64;
    call(libc::SYS_io_setup, &[1, out(&mut context)])?;
    call(libc::SYS_io_destroy, &[context])
}
