//! The system calls that rustix does not have, each behind a safe function.

use crate::devices::Instruction;
use rustix::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use rustix::process::Pid;
use std::ffi::{CStr, CString};
use std::io;
use std::mem::{size_of, zeroed};
use std::ptr;
use vm_run_abi::identity::ENTROPY_LEN;

/// `VMADDR_CID_HOST` (Linux include/uapi/linux/vm_sockets.h).
const HOST_CID: u32 = 2;

/// Turns the -1 of libc into the error of this thread.
fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

fn own(fd: RawFd) -> io::Result<OwnedFd> {
    let fd = check(fd)?;
    // SAFETY: the kernel has just returned this descriptor, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A listening vsock socket on `port` of any local address: the address of a
/// child may differ from its template's.
pub fn listen_vsock(port: u32) -> io::Result<OwnedFd> {
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: takes no pointers.
    let socket = own(unsafe { libc::socket(libc::AF_VSOCK, kind, 0) })?;
    // SAFETY: sockaddr_vm is plain integers, for which zero is a value.
    let mut address: libc::sockaddr_vm = unsafe { zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_port = port;
    address.svm_cid = libc::VMADDR_CID_ANY;
    // SAFETY: the address is a sockaddr_vm that lives through the call, with its size.
    check(unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            size_of::<libc::sockaddr_vm>() as libc::socklen_t,
        )
    })?;
    // SAFETY: takes no pointers.
    check(unsafe { libc::listen(socket.as_raw_fd(), 16) })?;
    Ok(socket)
}

/// Accepts a connection, not blocking and closed at exec. `Ok(None)` is one
/// that somebody else than the host made (a program in the guest, through vsock's
/// loopback): it has been closed.
pub fn accept_from_host(listener: BorrowedFd<'_>) -> io::Result<Option<OwnedFd>> {
    // SAFETY: sockaddr_storage is plain integers, for which zero is a value.
    let mut storage: libc::sockaddr_storage = unsafe { zeroed() };
    let mut len = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
    let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: the kernel writes at most `len` bytes, the size of the storage.
    let fd = own(unsafe {
        libc::accept4(
            listener.as_raw_fd(),
            (&raw mut storage).cast(),
            &raw mut len,
            flags,
        )
    })?;
    if i32::from(storage.ss_family) == libc::AF_VSOCK {
        // SAFETY: the kernel filled in a sockaddr_vm, as the family says, and
        // sockaddr_storage is large and aligned enough for every address.
        let address = unsafe { (&raw const storage).cast::<libc::sockaddr_vm>().read() };
        if address.svm_cid != HOST_CID {
            return Ok(None);
        }
    }
    Ok(Some(fd))
}

/// Blocks SIGCHLD, and returns a descriptor that is readable when one is pending.
pub fn child_signals() -> io::Result<OwnedFd> {
    // SAFETY: sigset_t is plain integers, for which zero is a value.
    let mut set: libc::sigset_t = unsafe { zeroed() };
    // SAFETY: the set lives through the call.
    check(unsafe { libc::sigaddset(&raw mut set, libc::SIGCHLD) })?;
    // SAFETY: the set lives through the call; no old set is asked for.
    check(unsafe { libc::sigprocmask(libc::SIG_BLOCK, &raw const set, ptr::null_mut()) })?;
    // SAFETY: the set lives through the call.
    own(unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) })
}

/// Gives every signal its default disposition and blocks none, as a new program
/// expects them. (Rust's start code ignores SIGPIPE, and ignored stays ignored
/// through an exec.)
pub fn reset_signals() -> io::Result<()> {
    // `struct kernel_sigaction`, all zero: SIG_DFL, no flags, nothing masked. The
    // C library's own call refuses the two signals that it keeps for itself.
    let default = [0_u64; 4];
    for signal in 1..=libc::SIGRTMAX() {
        if signal == libc::SIGKILL || signal == libc::SIGSTOP {
            continue;
        }
        // SAFETY: the kernel reads 32 bytes, and installs no handler.
        let result = unsafe {
            libc::syscall(
                libc::SYS_rt_sigaction,
                signal,
                default.as_ptr(),
                ptr::null_mut::<u64>(),
                size_of::<u64>(),
            )
        };
        check(result as libc::c_int)?;
    }
    // SAFETY: sigset_t is plain integers; all zero is the empty set on Linux.
    let none: libc::sigset_t = unsafe { zeroed() };
    // SAFETY: the set lives through the call; no old set is asked for.
    check(unsafe { libc::sigprocmask(libc::SIG_SETMASK, &raw const none, ptr::null_mut()) })?;
    Ok(())
}

/// Blocks every signal that can be blocked.
pub fn block_signals() -> io::Result<()> {
    let all = all_signals()?;
    // SAFETY: the set lives through the call; no old set is asked for.
    check(unsafe { libc::sigprocmask(libc::SIG_SETMASK, &raw const all, ptr::null_mut()) })?;
    Ok(())
}

/// The next signal, whichever it is; all have to be blocked.
pub fn await_signal() -> io::Result<i32> {
    let all = all_signals()?;
    // SAFETY: the set lives through the call; nothing more is asked for.
    check(unsafe { libc::sigwaitinfo(&raw const all, ptr::null_mut()) })
}

fn all_signals() -> io::Result<libc::sigset_t> {
    // SAFETY: sigset_t is plain integers, for which zero is a value.
    let mut all: libc::sigset_t = unsafe { zeroed() };
    // SAFETY: the set lives through the call.
    check(unsafe { libc::sigfillset(&raw mut all) })?;
    Ok(all)
}

/// Sets a limit of this process; rustix knows only the named ones.
pub fn set_limit(resource: u32, soft: u64, hard: u64) -> io::Result<()> {
    let limit = libc::rlimit {
        rlim_cur: soft,
        rlim_max: hard,
    };
    // SAFETY: the kernel reads one rlimit, which lives through the call.
    check(unsafe { libc::setrlimit(resource as _, &raw const limit) })?;
    Ok(())
}

/// Sends any signal by its number; rustix knows only the named ones.
pub fn kill(pid: Pid, signal: i32) -> io::Result<()> {
    // SAFETY: takes no pointers.
    check(unsafe { libc::kill(pid.as_raw_nonzero().get(), signal) })?;
    Ok(())
}

/// The same to all processes of the group that `leader` leads.
pub fn kill_group(leader: Pid, signal: i32) -> io::Result<()> {
    // SAFETY: takes no pointers.
    check(unsafe { libc::kill(-leader.as_raw_nonzero().get(), signal) })?;
    Ok(())
}

/// Of Linux include/uapi/linux/sched.h; libc's constant is too narrow for it.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Forks into new namespaces (`CLONE_NEW*` in `namespaces`) and into the cgroup
/// whose directory is given. `None` is the child, PID 1 if it has a new PID
/// namespace; the parent gets its number and its pidfd.
///
/// The child may do anything, allocate too, because the process must have one
/// thread only: no lock can be held by a thread that the child lacks.
pub fn fork_into(
    namespaces: libc::c_int,
    cgroup: Option<BorrowedFd<'_>>,
) -> io::Result<Option<(Pid, OwnedFd)>> {
    let mut pidfd: RawFd = -1;
    // SAFETY: clone_args is plain integers, for which zero is a value.
    let mut args: libc::clone_args = unsafe { zeroed() };
    args.flags = (namespaces | libc::CLONE_PIDFD) as u64;
    args.pidfd = &raw mut pidfd as u64;
    args.exit_signal = libc::SIGCHLD as u64;
    if let Some(cgroup) = cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = cgroup.as_raw_fd() as u64;
    }
    // SAFETY: the arguments live through the call, and the kernel writes one
    // descriptor to `pidfd`. Without CLONE_VM the child has its own copy of this
    // memory and returns here on its own copy of this stack, as after fork(2).
    let pid = unsafe {
        libc::syscall(
            libc::SYS_clone3,
            &raw const args,
            size_of::<libc::clone_args>(),
        )
    };
    if pid < 0 {
        return Err(io::Error::last_os_error());
    }
    match Pid::from_raw(pid as i32) {
        Some(pid) => Ok(Some((pid, own(pidfd)?))),
        None => Ok(None),
    }
}

/// Moves the calling process into a cgroup namespace whose root is the cgroup
/// that it is in.
pub fn new_cgroup_namespace() -> io::Result<()> {
    // SAFETY: takes no pointers, and shares no descriptors or memory anew.
    check(unsafe { libc::unshare(libc::CLONE_NEWCGROUP) })?;
    Ok(())
}

/// Moves the calling process into a network namespace of its own.
pub fn new_network_namespace() -> io::Result<()> {
    // SAFETY: takes no pointers, and shares no descriptors or memory anew.
    check(unsafe { libc::unshare(libc::CLONE_NEWNET) })?;
    Ok(())
}

/// Marks every descriptor from 3 on to be closed at exec.
pub fn close_on_exec_from_3() -> io::Result<()> {
    // SAFETY: takes no pointers, and closes nothing now.
    let result = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            3,
            libc::c_uint::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
    check(result as libc::c_int)?;
    Ok(())
}

/// Closes every descriptor from 3 on but these. Only for a process that ends by
/// [`exit_now`] and drops nothing that it had before.
pub fn close_from_3_but(kept: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut kept: Vec<libc::c_uint> = kept.iter().map(|fd| fd.as_raw_fd() as _).collect();
    kept.sort_unstable();
    let mut first: libc::c_uint = 3;
    for next in kept.into_iter().map(Some).chain([None]) {
        let last = next.map_or(libc::c_uint::MAX, |fd| fd.wrapping_sub(1));
        if first <= last {
            // SAFETY: takes no pointers; whoever had these descriptors is not asked again.
            let closed = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
            check(closed as libc::c_int)?;
        }
        first = next.map_or(first, |fd| fd + 1);
    }
    Ok(())
}

/// Becomes another program; returns only the reason why not.
pub fn exec(path: &CStr, args: &[CString], env: &[CString]) -> io::Error {
    let pointers = |strings: &[CString]| -> Vec<*const libc::c_char> {
        let all = strings.iter().map(|string| string.as_ptr());
        all.chain([ptr::null()]).collect()
    };
    let (args, env) = (pointers(args), pointers(env));
    // SAFETY: both arrays end in a null pointer, and they and their strings live
    // through the call.
    unsafe { libc::execve(path.as_ptr(), args.as_ptr(), env.as_ptr()) };
    io::Error::last_os_error()
}

/// Becomes the program in an open file, with an empty environment; returns only the
/// reason why not.
pub fn exec_file(file: &OwnedFd, args: &[CString]) -> io::Error {
    let mut args: Vec<*const libc::c_char> = args.iter().map(|arg| arg.as_ptr()).collect();
    args.push(ptr::null());
    let env: [*const libc::c_char; 1] = [ptr::null()];
    // SAFETY: the path is an empty string; both arrays end in a null pointer, and they
    // and their strings live through the call.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            file.as_raw_fd(),
            c"".as_ptr(),
            args.as_ptr(),
            env.as_ptr(),
            libc::AT_EMPTY_PATH,
        )
    };
    io::Error::last_os_error()
}

/// Ends the process at once, without the exit handlers of the one it was forked
/// from.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: never returns, touches no memory.
    unsafe { libc::_exit(code) }
}

/// `struct rand_pool_info` of Linux include/uapi/linux/random.h, with a buffer.
#[repr(C)]
struct RandPoolInfo {
    entropy_count: libc::c_int,
    buf_size: libc::c_int,
    buf: [u8; ENTROPY_LEN],
}

const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
const RNDRESEEDCRNG: libc::c_ulong = 0x5207;

/// Mixes `entropy` into the kernel's pool, all of its bits credited, and makes
/// the CRNG take a new key from it at once. `random` is an open /dev/urandom.
pub fn reseed(random: BorrowedFd<'_>, entropy: &[u8; ENTROPY_LEN]) -> io::Result<()> {
    let info = RandPoolInfo {
        entropy_count: (ENTROPY_LEN * 8) as libc::c_int,
        buf_size: ENTROPY_LEN as libc::c_int,
        buf: *entropy,
    };
    // SAFETY: the kernel reads the header and `buf_size` bytes after it, all
    // inside `info`.
    check(unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, &raw const info) })?;
    // SAFETY: this request takes no argument.
    check(unsafe { libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG) })?;
    Ok(())
}

/// Overwrites 3 KiB of stack below the caller's frame, where functions that have
/// returned may have left secrets. With the caller's frame that is less than a page.
#[inline(never)]
pub fn wipe_stack() {
    let mut below = [0_u64; 384];
    for word in &mut below {
        // SAFETY: `word` is a valid, exclusive reference.
        unsafe { ptr::write_volatile(word, 0) };
    }
}

/// Brings a network interface up.
pub fn interface_up(name: &str) -> io::Result<()> {
    let mut request = interface(name)?;
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    ask_network(libc::AF_INET, libc::SIOCSIFFLAGS, &request)
}

/// Gives an interface its IPv4 address, in a network of `prefix` bits.
pub fn set_ipv4(name: &str, address: [u8; 4], prefix: u8) -> io::Result<()> {
    let mut request = interface(name)?;
    request.ifr_ifru.ifru_addr = ipv4(address);
    ask_network(libc::AF_INET, libc::SIOCSIFADDR, &request)?;
    let mask = u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0);
    request.ifr_ifru.ifru_netmask = ipv4(mask.to_be_bytes());
    ask_network(libc::AF_INET, libc::SIOCSIFNETMASK, &request)
}

/// Gives the interface of this number one more IPv6 address, in a network of `prefix`
/// bits.
pub fn add_ipv6(index: u32, address: [u8; 16], prefix: u8) -> io::Result<()> {
    let request = libc::in6_ifreq {
        ifr6_addr: libc::in6_addr { s6_addr: address },
        ifr6_prefixlen: prefix.into(),
        ifr6_ifindex: index as libc::c_int,
    };
    ask_network(libc::AF_INET6, libc::SIOCSIFADDR, &request)
}

/// `struct rtentry` of Linux include/uapi/linux/route.h.
#[repr(C)]
struct Route {
    pad1: libc::c_ulong,
    destination: libc::sockaddr,
    gateway: libc::sockaddr,
    mask: libc::sockaddr,
    flags: libc::c_ushort,
    pad2: libc::c_short,
    pad3: libc::c_ulong,
    pad4: usize,
    metric: libc::c_short,
    /// Of the interface's name, or null.
    device: usize,
    mtu: libc::c_ulong,
    window: libc::c_ulong,
    irtt: libc::c_ushort,
}

/// `struct in6_rtmsg` of Linux include/uapi/linux/ipv6_route.h.
#[repr(C)]
struct Ipv6Route {
    destination: [u8; 16],
    source: [u8; 16],
    gateway: [u8; 16],
    kind: u32,
    destination_len: u16,
    source_len: u16,
    metric: u32,
    info: libc::c_ulong,
    flags: u32,
    index: libc::c_int,
}

/// `RTF_UP | RTF_GATEWAY` of both files.
const TO_GATEWAY: u16 = 1 | 2;

/// Sends by `gateway` whatever goes nowhere else by IPv4.
pub fn add_ipv4_default(gateway: [u8; 4]) -> io::Result<()> {
    // SAFETY: a route is plain integers, for which zero is a value.
    let mut route: Route = unsafe { zeroed() };
    route.destination = ipv4([0; 4]);
    route.gateway = ipv4(gateway);
    route.mask = ipv4([0; 4]);
    route.flags = TO_GATEWAY;
    ask_network(libc::AF_INET, libc::SIOCADDRT, &route)
}

/// The same by IPv6, on the interface of this number.
pub fn add_ipv6_default(index: u32, gateway: [u8; 16]) -> io::Result<()> {
    let route = Ipv6Route {
        destination: [0; 16],
        source: [0; 16],
        gateway,
        kind: 0,
        destination_len: 0,
        source_len: 0,
        metric: 1024,
        info: 0,
        flags: TO_GATEWAY.into(),
        index: index as libc::c_int,
    };
    ask_network(libc::AF_INET6, libc::SIOCADDRT, &route)
}

/// A request that concerns the interface of this name.
fn interface(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: ifreq is integers and unions of integers and pointers, for which
    // zero is a value.
    let mut request: libc::ifreq = unsafe { zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    Ok(request)
}

fn ipv4(address: [u8; 4]) -> libc::sockaddr {
    // A sockaddr_in has its port in the first two bytes.
    let mut data = [0; 14];
    for (to, from) in data[2..].iter_mut().zip(address) {
        *to = from as libc::c_char;
    }
    libc::sockaddr {
        sa_family: libc::AF_INET as libc::sa_family_t,
        sa_data: data,
    }
}

/// Asks the network of the kernel, by an ioctl on a socket of this family. `request` is
/// the structure that `number` takes, which the kernel only reads.
fn ask_network<T>(family: libc::c_int, number: libc::c_ulong, request: &T) -> io::Result<()> {
    let kind = libc::SOCK_DGRAM | libc::SOCK_CLOEXEC;
    // SAFETY: takes no pointers.
    let socket = own(unsafe { libc::socket(family, kind, 0) })?;
    // SAFETY: the callers, all above, pass the structure of their number, with no pointer
    // in it but null; it lives through the call, and these requests write nothing to it.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), number, ptr::from_ref(request)) })?;
    Ok(())
}

/// The fields of `union bpf_attr` for BPF_PROG_LOAD (Linux
/// include/uapi/linux/bpf.h), as far as they are used.
#[repr(C)]
struct ProgramLoad {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
}

/// The same for BPF_LINK_CREATE.
#[repr(C)]
struct LinkCreate {
    prog_fd: u32,
    target_fd: u32,
    attach_type: u32,
    flags: u32,
}

/// The same for BPF_LINK_UPDATE.
#[repr(C)]
struct LinkUpdate {
    link_fd: u32,
    new_prog_fd: u32,
    flags: u32,
    old_prog_fd: u32,
}

const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_LINK_UPDATE: libc::c_int = 29;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;

/// Loads a program that decides on accesses to devices.
pub fn load_device_program(program: &[Instruction]) -> io::Result<OwnedFd> {
    let load = ProgramLoad {
        prog_type: BPF_PROG_TYPE_CGROUP_DEVICE,
        insn_cnt: program.len() as u32,
        insns: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
    };
    // SAFETY: the kernel reads the attributes, as many instructions as they say
    // and the string, which all live through the call, and checks the program.
    own(unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_LOAD,
            &raw const load,
            size_of::<ProgramLoad>(),
        )
    } as RawFd)
}

/// Attaches such a program to a cgroup, for as long as the link is held.
pub fn link_device_program(program: BorrowedFd<'_>, cgroup: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let create = LinkCreate {
        prog_fd: program.as_raw_fd() as u32,
        target_fd: cgroup.as_raw_fd() as u32,
        attach_type: BPF_CGROUP_DEVICE,
        flags: 0,
    };
    // SAFETY: the kernel reads the attributes, which live through the call.
    own(unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_LINK_CREATE,
            &raw const create,
            size_of::<LinkCreate>(),
        )
    } as RawFd)
}

/// Puts another program in the place of the one that a link holds.
pub fn replace_linked_program(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let update = LinkUpdate {
        link_fd: link.as_raw_fd() as u32,
        new_prog_fd: program.as_raw_fd() as u32,
        flags: 0,
        old_prog_fd: 0,
    };
    // SAFETY: the kernel reads the attributes, which live through the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_LINK_UPDATE,
            &raw const update,
            size_of::<LinkUpdate>(),
        )
    };
    check(result as libc::c_int)?;
    Ok(())
}
