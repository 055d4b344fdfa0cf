//! The lists: each call, which threads may make it, and why.

use super::Thread;

/// A system call that is allowed, if all checks of one alternative hold; without
/// alternatives, always.
pub(super) struct Call {
    pub(super) number: i64,
    threads: u8,
    pub(super) alternatives: Vec<Vec<Check>>,
}

/// What must be so of an argument (counted from 0), of which the lower 32 bits count.
pub(super) enum Check {
    Is(u8, u32),
    /// All of these bits.
    With(u8, u32),
    /// None of these bits.
    Without(u8, u32),
}

pub(super) const MAIN: u8 = 1;
const VCPU: u8 = 1 << 1 | MAIN;
const IO: u8 = 1 << 2 | MAIN;
const ALL: u8 = VCPU | IO;

/// The list of one kind of threads, in a process with the pid `pid`.
pub(super) fn of(thread: Thread, pid: u32) -> Vec<Call> {
    let bit = match thread {
        Thread::Main => MAIN,
        Thread::Vcpu => VCPU & !MAIN,
        Thread::Io => IO & !MAIN,
    };
    let lists = [runtime(), signals(pid), threads(), files(), sockets()];
    let mut list: Vec<Call> = lists.into_iter().flatten().collect();
    list.push(fcntl(thread));
    list.push(ioctl(thread));
    list.retain(|call| call.threads & bit != 0);
    list
}

pub(super) fn always(threads: u8, number: i64) -> Call {
    when(threads, number, Vec::new())
}

pub(super) fn when(threads: u8, number: i64, alternatives: Vec<Vec<Check>>) -> Call {
    Call {
        number,
        threads,
        alternatives,
    }
}

/// What the C library and Rust's own do anywhere.
fn runtime() -> Vec<Call> {
    let exec = libc::PROT_EXEC as u32;
    vec![
        // The heap; guest memory, and the root image over its window. Never memory
        // that can be executed.
        always(ALL, libc::SYS_brk),
        when(ALL, libc::SYS_mmap, vec![vec![Check::Without(2, exec)]]),
        when(ALL, libc::SYS_mprotect, vec![vec![Check::Without(2, exec)]]),
        always(ALL, libc::SYS_munmap),
        // realloc(3) of large blocks.
        always(ALL, libc::SYS_mremap),
        // The heap gives pages back, and an ending thread its stack.
        always(ALL, libc::SYS_madvise),
        // malloc(3) counts CPUs when threads contend for its arenas.
        always(ALL, libc::SYS_sched_getaffinity),
        // Locks, channels, joins.
        always(ALL, libc::SYS_futex),
        always(ALL, libc::SYS_sched_yield),
        // Where the vDSO has no clock, as on a host whose TSC is unstable.
        always(ALL, libc::SYS_clock_gettime),
        // Seeds of hash maps; the guest's random numbers.
        always(ALL, libc::SYS_getrandom),
        always(ALL, libc::SYS_gettid),
        always(ALL, libc::SYS_getpid),
        // A call that a stop and SIGCONT have interrupted.
        always(ALL, libc::SYS_restart_syscall),
        always(ALL, libc::SYS_exit),
        always(ALL, libc::SYS_exit_group),
    ]
}

fn signals(pid: u32) -> Vec<Call> {
    let to_itself = |signal: i32| vec![Check::Is(0, pid), Check::Is(2, signal as u32)];
    vec![
        // Return from the handler of a kick.
        always(ALL, libc::SYS_rt_sigreturn),
        // pthread_kill(3) and thread start and end block signals for a moment.
        always(ALL, libc::SYS_rt_sigprocmask),
        // Rust gives each thread a stack for the handler of stack overflows.
        always(ALL, libc::SYS_sigaltstack),
        // The handler of the kick, at the first VM.
        always(MAIN, libc::SYS_rt_sigaction),
        // Kicks of vCPUs, and abort(3): its own threads only.
        when(
            ALL,
            libc::SYS_tgkill,
            vec![to_itself(libc::SIGRTMIN()), to_itself(libc::SIGABRT)],
        ),
    ]
}

/// What starts and confines threads.
fn threads() -> Vec<Call> {
    let thread = (libc::CLONE_VM
        | libc::CLONE_FS
        | libc::CLONE_FILES
        | libc::CLONE_SIGHAND
        | libc::CLONE_THREAD
        | libc::CLONE_SYSVSEM
        | libc::CLONE_SETTLS
        | libc::CLONE_PARENT_SETTID
        | libc::CLONE_CHILD_CLEARTID) as u32;
    // musl still sets a flag that has no effect any more (clone(2)).
    let detached = libc::CLONE_DETACHED as u32;
    let option = |option: i32| vec![Check::Is(0, option as u32)];
    vec![
        // Threads, exactly as pthread_create(3) makes them; no processes, no namespaces.
        when(
            MAIN,
            libc::SYS_clone,
            vec![
                vec![Check::Is(0, thread)],
                vec![Check::Is(0, thread | detached)],
            ],
        ),
        // Answered with ENOSYS by the other filter, whose word counts for more.
        always(MAIN, libc::SYS_clone3),
        always(MAIN, libc::SYS_set_robust_list),
        always(MAIN, libc::SYS_rseq),
        // The thread's name; what seccomp demands before a filter.
        when(
            MAIN,
            libc::SYS_prctl,
            vec![option(libc::PR_SET_NAME), option(libc::PR_SET_NO_NEW_PRIVS)],
        ),
        // A thread's own list, which can only take away.
        when(
            MAIN,
            libc::SYS_seccomp,
            vec![vec![Check::Is(0, libc::SECCOMP_SET_MODE_FILTER)]],
        ),
    ]
}

/// malloc(3) looks into /proc/sys/vm/overcommit_memory before it first gives back memory of
/// a thread's arena (glibc, check_may_shrink_heap), and takes no for an answer: it is
/// answered with ENOSYS by the other filter.
pub(super) fn open_to_read() -> Call {
    let flags = (libc::O_RDONLY | libc::O_CLOEXEC) as u32;
    when(ALL, libc::SYS_openat, vec![vec![Check::Is(2, flags)]])
}

/// Descriptors that were given, and those without a name. There is no open(2).
fn files() -> Vec<Call> {
    let of_descriptor = |flags| vec![vec![Check::With(flags, libc::AT_EMPTY_PATH as u32)]];
    vec![
        open_to_read(),
        // Eventfds; the last words to stderr.
        always(ALL, libc::SYS_read),
        always(ALL, libc::SYS_write),
        // A vCPU closes its descriptor, and resets devices with theirs.
        always(ALL, libc::SYS_close),
        always(MAIN, libc::SYS_eventfd2),
        // EventFd::try_clone.
        always(MAIN, libc::SYS_dup),
        // Guest memory, and a state, that is handed over at a freeze; sealed.
        always(MAIN, libc::SYS_memfd_create),
        always(MAIN, libc::SYS_ftruncate),
        // The size of a disk and of a base; a path could only name what is in the root.
        when(MAIN, libc::SYS_statx, of_descriptor(2)),
        when(MAIN, libc::SYS_newfstatat, of_descriptor(3)),
        always(MAIN, libc::SYS_fstat),
        // Holes of a memory that is frozen again; the start of a state.
        always(MAIN, libc::SYS_lseek),
        // The page map and a frozen memory; the bitmap of a disk's layer, and blocks that
        // are written in part.
        always(IO, libc::SYS_pread64),
        always(IO, libc::SYS_pwrite64),
        // One disk, one writer.
        always(MAIN, libc::SYS_flock),
        // Disks.
        always(IO, libc::SYS_preadv),
        always(IO, libc::SYS_pwritev),
        always(IO, libc::SYS_fdatasync),
        // Discard and write-zeroes.
        always(IO, libc::SYS_fallocate),
        // Streams of the guest's vsock; frames of its network.
        always(IO, libc::SYS_readv),
        always(IO, libc::SYS_writev),
        // The event loop; a vCPU that resets a device takes it out.
        always(IO, libc::SYS_epoll_create1),
        always(ALL, libc::SYS_epoll_ctl),
        always(IO, libc::SYS_epoll_wait),
        always(ALL, libc::SYS_epoll_pwait),
        always(IO, libc::SYS_epoll_pwait2),
        // The pace of a network that has a limit: made when the tap is bound.
        always(MAIN, libc::SYS_timerfd_create),
        always(IO, libc::SYS_timerfd_settime),
        always(MAIN, libc::SYS_poll),
        always(MAIN, libc::SYS_ppoll),
    ]
}

/// Streams between the guest's vsock and the owner: pairs, of which one end is handed
/// over. There is no socket(2).
fn sockets() -> Vec<Call> {
    // Not datagrams: sendto(2) sends those to any socket by its name.
    let stream = libc::SOCK_STREAM | libc::SOCK_CLOEXEC;
    vec![
        when(
            MAIN,
            libc::SYS_socketpair,
            vec![vec![
                Check::Is(0, libc::AF_UNIX as u32),
                Check::Is(1, stream as u32),
            ]],
        ),
        // The owner's packets; answers of the volumes' server.
        always(IO, libc::SYS_recvmsg),
        // Events go to the owner from the thread on which they happen.
        always(ALL, libc::SYS_sendmsg),
        always(IO, libc::SYS_recvfrom),
        always(IO, libc::SYS_sendto),
        // That the volumes' server is at a socket for packets.
        when(
            MAIN,
            libc::SYS_getsockopt,
            vec![vec![
                Check::Is(1, libc::SOL_SOCKET as u32),
                Check::Is(2, libc::SO_TYPE as u32),
            ]],
        ),
        // A connection that the guest ends, or the device's reset.
        always(ALL, libc::SYS_shutdown),
    ]
}

fn fcntl(thread: Thread) -> Call {
    // Rust's debug builds look whether a descriptor is open before they close it.
    let mut commands = vec![libc::F_GETFD];
    if thread == Thread::Main {
        // Copies, the mode of a disk, and the seals of memory.
        commands.extend([
            libc::F_DUPFD_CLOEXEC,
            libc::F_GETFL,
            libc::F_SETFL,
            libc::F_ADD_SEALS,
            libc::F_GET_SEALS,
        ]);
    }
    let alternatives = commands
        .into_iter()
        .map(|command| vec![Check::Is(1, command as u32)]);
    when(ALL, libc::SYS_fcntl, alternatives.collect())
}

/// KVM's requests, on descriptors that KVM gave. /dev/kvm itself is open.
fn ioctl(thread: Thread) -> Call {
    // An interrupt of a device, by whoever serves it.
    let line = kvm(WRITE, 0x61, 8); // KVM_IRQ_LINE
    let vcpu = [
        kvm(NONE, 0x80, 0),         // KVM_RUN: first, for it is the hot one
        line,                       // registers of a device may raise it
        kvm(WRITE, 0x89, 8),        // KVM_SET_MSRS: time goes on
        kvm(NONE, 0xad, 0),         // KVM_KVMCLOCK_CTRL: likewise
        kvm(READ, 0x81, 144),       // KVM_GET_REGS: this one and the rest at a freeze
        kvm(READ, 0x83, 312),       // KVM_GET_SREGS
        kvm(READ | WRITE, 0x88, 8), // KVM_GET_MSRS
        kvm(READ, 0x8e, 1024),      // KVM_GET_LAPIC
        kvm(READ | WRITE, 0x91, 8), // KVM_GET_CPUID2
        kvm(READ, 0x98, 4),         // KVM_GET_MP_STATE
        kvm(READ, 0x9f, 64),        // KVM_GET_VCPU_EVENTS
        kvm(READ, 0xa1, 128),       // KVM_GET_DEBUGREGS
        kvm(NONE, 0xa3, 0),         // KVM_GET_TSC_KHZ
        kvm(READ, 0xcf, 4096),      // KVM_GET_XSAVE2
        kvm(READ, 0xa6, 392),       // KVM_GET_XCRS
    ];
    // A VM is made and loaded before anything of its guest runs.
    let vm = [
        kvm(NONE, 0x01, 0),           // KVM_CREATE_VM
        kvm(NONE, 0x03, 0),           // KVM_CHECK_EXTENSION
        kvm(NONE, 0x04, 0),           // KVM_GET_VCPU_MMAP_SIZE
        kvm(NONE, 0x41, 0),           // KVM_CREATE_VCPU
        kvm(WRITE, 0x42, 16),         // KVM_GET_DIRTY_LOG: a picture of one that runs
        kvm(WRITE, 0x46, 32),         // KVM_SET_USER_MEMORY_REGION
        kvm(NONE, 0x47, 0),           // KVM_SET_TSS_ADDR
        kvm(WRITE, 0x48, 8),          // KVM_SET_IDENTITY_MAP_ADDR
        kvm(NONE, 0x60, 0),           // KVM_CREATE_IRQCHIP
        kvm(READ | WRITE, 0x62, 520), // KVM_GET_IRQCHIP
        kvm(READ, 0x63, 520),         // KVM_SET_IRQCHIP
        kvm(WRITE, 0x7b, 48),         // KVM_SET_CLOCK
        kvm(READ, 0x7c, 48),          // KVM_GET_CLOCK
        kvm(WRITE, 0x82, 144),        // KVM_SET_REGS
        kvm(WRITE, 0x84, 312),        // KVM_SET_SREGS
        kvm(WRITE, 0x8f, 1024),       // KVM_SET_LAPIC
        kvm(WRITE, 0x90, 8),          // KVM_SET_CPUID2
        kvm(WRITE, 0x99, 4),          // KVM_SET_MP_STATE
        kvm(WRITE, 0xa0, 64),         // KVM_SET_VCPU_EVENTS
        kvm(WRITE, 0xa2, 128),        // KVM_SET_DEBUGREGS
        kvm(NONE, 0xa2, 0),           // KVM_SET_TSC_KHZ
        kvm(WRITE, 0xa5, 4096),       // KVM_SET_XSAVE
        kvm(WRITE, 0xa7, 392),        // KVM_SET_XCRS
        kvm(WRITE, 0xa5, 32),         // KVM_SIGNAL_MSI: a new identity
        libc::FIONBIO as u32,         // UnixStream::set_nonblocking
    ];
    let requests: Vec<u32> = match thread {
        Thread::Main => vcpu.into_iter().chain(vm).collect(),
        Thread::Vcpu => vcpu.to_vec(),
        Thread::Io => vec![line],
    };
    let alternatives = requests
        .into_iter()
        .map(|request| vec![Check::Is(1, request)]);
    when(ALL, libc::SYS_ioctl, alternatives.collect())
}

const NONE: u32 = 0;
const WRITE: u32 = 1;
const READ: u32 = 2;

/// A request of KVM (linux/kvm.h) by direction, number and its structure's size, as
/// `_IOC` puts it together (asm-generic/ioctl.h).
const fn kvm(direction: u32, number: u32, size: u32) -> u32 {
    direction << 30 | size << 16 | 0xae << 8 | number
}
