//! What runs in the jail in a VM's place: it tries to get out.

use fork::Host;
use fork::worker::{Thread, confine};
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use rustix::net::{RecvFlags, SendFlags, recv, send};
use rustix::process::{Pid, Resource, Rlimit, Signal, kill_process, setrlimit, test_kill_process};
use rustix::thread::{CapabilitySet, CapabilitySets, Gid, Uid};
use std::fs::{self, File};
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::UnixStream;
use std::process::{Command, ExitCode};
use std::thread;
use std::time::Duration;

/// Serves the test: one line in, lines out, `end`.
pub fn run(socket: OwnedFd, host: Host) -> ExitCode {
    let mut line = [0; 256];
    let Ok((_, len)) = recv(&socket, &mut line, RecvFlags::empty()) else {
        return ExitCode::FAILURE;
    };
    let line = String::from_utf8_lossy(&line[..len]).into_owned();
    let words: Vec<&str> = line.split(' ').collect();
    let said = match words.as_slice() {
        // The owner has closed the socket.
        [""] => return ExitCode::SUCCESS,
        ["reach", pid, port, name] => reach(pid, port, name),
        ["threads"] => vec![threads().to_string()],
        ["uname"] => vec![format!("{:?}", rustix::system::uname().nodename())],
        ["vm"] => vm(host),
        ["call", thread, name] => call(thread, name),
        _ => vec![format!("what is {line}?")],
    };
    for said in said.iter().map(String::as_str).chain(["end"]) {
        if send(&socket, said.as_bytes(), SendFlags::NOSIGNAL).is_err() {
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

/// What the first layer alone must refuse: each attempt that succeeds is a line.
fn reach(pid: &str, port: &str, name: &str) -> Vec<String> {
    let mut open = Vec::new();
    let mut must_fail = |what: &str, done: io::Result<()>| {
        if done.is_ok() {
            open.push(what.to_owned());
        }
    };
    for path in [
        "/",
        ".",
        "..",
        "/etc/passwd",
        "../../../../etc/passwd",
        "/dev/kvm",
        "/dev/null",
        "/proc/self/status",
        "/proc/1/root/etc/passwd",
        "/proc/self/fd/0",
        "/sys/fs/cgroup",
        "/sys/fs/cgroup/pids/cgroup.procs",
        "/tmp",
    ] {
        must_fail(path, File::open(path).map(drop));
        must_fail(path, fs::write(path, "x"));
    }
    must_fail("create a file", File::create("/x").map(drop));
    must_fail("create a directory", fs::create_dir("/x"));
    must_fail(
        "open by O_PATH",
        openat(CWD, "/", OFlags::PATH, Mode::empty())
            .and_then(|root| openat(root, "..", OFlags::RDONLY, Mode::empty()))
            .map(drop)
            .map_err(Into::into),
    );

    let port: u16 = port.parse().unwrap_or(0);
    for address in ["127.0.0.1", "::1", "8.8.8.8"] {
        let to = SocketAddr::new(address.parse().expect("an address"), port);
        let wait = Duration::from_secs(1);
        must_fail(address, TcpStream::connect_timeout(&to, wait).map(drop));
    }
    let abstract_name = std::os::unix::net::SocketAddr::from_abstract_name(name);
    let connected = abstract_name.and_then(|name| UnixStream::connect_addr(&name));
    must_fail("an abstract socket of the host", connected.map(drop));
    must_fail("a raw socket", raw(libc::SYS_socket, [2, 3, 1]));
    must_fail("a packet socket", raw(libc::SYS_socket, [17, 3, 0]));

    let owner: i32 = pid.parse().unwrap_or(0);
    if let Some(owner) = Pid::from_raw(owner) {
        must_fail(
            "signal the owner",
            test_kill_process(owner).map_err(Into::into),
        );
    }
    must_fail("signal anybody", raw(libc::SYS_kill, [-1, 0, 0]));
    let attach = i64::from(libc::PTRACE_ATTACH);
    must_fail("ptrace", raw(libc::SYS_ptrace, [attach, owner.into(), 0]));
    must_fail(
        "compare with another",
        raw(libc::SYS_kcmp, [owner.into(), owner.into(), 1]),
    );
    must_fail("pidfd", raw(libc::SYS_pidfd_open, [owner.into(), 0, 0]));

    for resource in [
        Resource::Nofile,
        Resource::Nproc,
        Resource::Core,
        Resource::Memlock,
        Resource::Fsize,
    ] {
        let most = Rlimit {
            current: Some(1 << 41),
            maximum: Some(1 << 41),
        };
        let raised = setrlimit(resource, most).map_err(Into::into);
        must_fail(&format!("raise {resource:?}"), raised);
    }

    let mounted = mount("none", "/", "tmpfs", MountFlags::empty(), None);
    must_fail("mount", mounted.map_err(Into::into));
    must_fail(
        "umount",
        unmount("/", UnmountFlags::DETACH).map_err(Into::into),
    );
    must_fail("chroot", rustix::process::chroot(".").map_err(Into::into));
    must_fail(
        "sethostname",
        rustix::system::sethostname(b"x").map_err(Into::into),
    );
    let root = Uid::ROOT;
    let uid = rustix::thread::set_thread_res_uid(root, root, root);
    must_fail("setuid", uid.map_err(Into::into));
    let root = Gid::ROOT;
    let gid = rustix::thread::set_thread_res_gid(root, root, root);
    must_fail("setgid", gid.map_err(Into::into));
    let groups = rustix::thread::set_thread_groups(&[root]);
    must_fail("setgroups", groups.map_err(Into::into));
    let all = CapabilitySet::SYS_ADMIN;
    let capabilities = CapabilitySets {
        effective: all,
        permitted: all,
        inheritable: all,
    };
    let raised = rustix::thread::set_capabilities(None, capabilities);
    must_fail("capset", raised.map_err(Into::into));
    must_fail(
        "drop no_new_privs",
        rustix::thread::set_no_new_privs(false).map_err(Into::into),
    );

    for program in ["/proc/self/exe", "/bin/sh", "sh"] {
        let ran = Command::new(program).status();
        must_fail(&format!("execute {program}"), ran.map(drop));
    }
    must_fail(
        "set the clock",
        raw(libc::SYS_clock_settime, [0, 0, 0]).and(Ok(())),
    );
    must_fail("iopl", raw(libc::SYS_iopl, [3, 0, 0]));
    must_fail("reboot", raw(libc::SYS_reboot, [0, 0, 0]));
    must_fail("a handle", raw(libc::SYS_open_by_handle_at, [-100, 0, 0]));
    open
}

/// How many threads it can have beside the first.
fn threads() -> usize {
    let (stop, stopped) = std::sync::mpsc::channel::<()>();
    let stopped = std::sync::Arc::new(std::sync::Mutex::new(stopped));
    let mut running = Vec::new();
    for _ in 0..1000 {
        let stopped = std::sync::Arc::clone(&stopped);
        let started = thread::Builder::new().stack_size(64 << 10).spawn(move || {
            drop(stopped.lock().map(|stopped| stopped.recv()));
        });
        match started {
            Ok(thread) => running.push(thread),
            Err(_) => break,
        }
    }
    drop(stop);
    let count = running.len();
    for thread in running {
        assert!(thread.join().is_ok());
    }
    count
}

/// A VM under the lists: boots, forks, and its child answers.
fn vm(host: Host) -> Vec<String> {
    let done = confine(Thread::Main)
        .map_err(|e| e.to_string())
        .and_then(|()| boot_and_fork(host).map_err(|e| e.to_string()));
    match done {
        Ok(true) => vec!["answered".into()],
        Ok(false) => vec!["a wrong answer".into()],
        Err(error) => vec![error],
    }
}

fn boot_and_fork(host: Host) -> Result<bool, fork::Error> {
    let template = fork::Template::boot(std::sync::Arc::new(host), &super::micro())?;
    let mut child = template.fork(fork::ForkSpec {
        hostname: "jailed".into(),
        ..fork::ForkSpec::default()
    })?;
    Ok(child.answer()? == child.expected_answer())
}

/// One call under one thread's list. It should not come back.
fn call(thread: &str, name: &str) -> Vec<String> {
    let name = name.to_owned();
    let attempt = move || match CALLS.iter().find(|call| call.0 == name) {
        Some((_, attempt)) => vec![format!("{name}: {:?}", attempt())],
        None => vec![format!("no call {name}")],
    };
    if let Err(error) = confine(Thread::Main) {
        return vec![error.to_string()];
    }
    let kind = match thread {
        "main" => return attempt(),
        "vcpu" => Thread::Vcpu,
        _ => Thread::Io,
    };
    let confined = thread::spawn(move || match confine(kind) {
        Ok(()) => attempt(),
        Err(error) => vec![error.to_string()],
    });
    confined.join().unwrap_or_else(|_| vec!["a panic".into()])
}

type Attempt = fn() -> io::Result<()>;

/// What every thread must be killed for.
pub const CALLS: &[(&str, Attempt)] = &[
    ("open-to-write", || File::create("/x").map(drop)),
    // What malloc(3) may try: it is refused, and nobody killed.
    ("open-to-read", || match File::open("/") {
        Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => Ok(()),
        done => done.and(Err(io::Error::other("it was opened"))),
    }),
    ("give-memory-back", || {
        // Below what malloc(3) maps by itself, and more than it keeps.
        let blocks: Vec<Vec<u8>> = (0..64).map(|_| vec![1; 100 << 10]).collect();
        drop(blocks);
        Ok(())
    }),
    ("openat2", || raw(libc::SYS_openat2, [-100, 0, 0])),
    ("unlink", || fs::remove_file("/x")),
    ("socket-unix", || raw(libc::SYS_socket, [1, 1, 0])),
    ("socket-inet", || raw(libc::SYS_socket, [2, 1, 0])),
    ("socket-inet6", || raw(libc::SYS_socket, [10, 2, 0])),
    ("socket-netlink", || raw(libc::SYS_socket, [16, 3, 0])),
    ("socket-packet", || raw(libc::SYS_socket, [17, 3, 0])),
    ("socket-alg", || raw(libc::SYS_socket, [38, 5, 0])),
    ("socket-vsock", || raw(libc::SYS_socket, [40, 1, 0])),
    ("socketpair-inet", || raw(libc::SYS_socketpair, [2, 1, 0])),
    // A datagram can be sent to any name; on a stream it cannot.
    ("socketpair-datagram", || {
        let datagrams = libc::SOCK_DGRAM | libc::SOCK_CLOEXEC;
        raw(libc::SYS_socketpair, [1, datagrams.into(), 0])
    }),
    ("connect", || raw(libc::SYS_connect, [3, 0, 0])),
    ("ptrace", || raw(libc::SYS_ptrace, [0, 0, 0])),
    ("fcntl-setown", || raw(libc::SYS_fcntl, [0, 8, 1])),
    ("process_vm_readv", || {
        raw(libc::SYS_process_vm_readv, [1, 0, 0])
    }),
    ("kill", || {
        Ok(kill_process(rustix::process::getpid(), Signal::TERM)?)
    }),
    ("tgkill-other", || raw(libc::SYS_tgkill, [2, 2, 34])),
    ("tgkill-term", || raw(libc::SYS_tgkill, [1, 1, 15])),
    ("fork", || raw(libc::SYS_fork, [0, 0, 0])),
    ("clone-process", || raw(libc::SYS_clone, [17, 0, 0])),
    ("clone-newnet", || {
        raw(libc::SYS_clone, [0x4000_0000 | 17, 0, 0])
    }),
    ("execve", || raw(libc::SYS_execve, [0, 0, 0])),
    ("spawn", || Command::new("/x").spawn().map(drop)),
    ("setrlimit", || raw(libc::SYS_prlimit64, [0, 7, 0])),
    ("setuid", || raw(libc::SYS_setuid, [0, 0, 0])),
    ("mount", || raw(libc::SYS_mount, [0, 0, 0])),
    ("unshare", || raw(libc::SYS_unshare, [0x1000_0000, 0, 0])),
    ("setns", || raw(libc::SYS_setns, [3, 0, 0])),
    ("mmap-exec", || raw(libc::SYS_mmap, [0, 4096, 1 | 4])),
    ("mprotect-exec", || raw(libc::SYS_mprotect, [0, 0, 4])),
    ("prctl-dumpable", || raw(libc::SYS_prctl, [4, 1, 0])),
    ("ioctl-tiocsti", || raw(libc::SYS_ioctl, [0, 0x5412, 0])),
    ("ioctl-create-pit", || {
        raw(libc::SYS_ioctl, [4, 0x4040_ae77, 0])
    }),
    ("ioctl-create-device", || {
        raw(libc::SYS_ioctl, [4, 0xc00c_aee0, 0])
    }),
    ("bpf", || raw(libc::SYS_bpf, [0, 0, 0])),
    ("perf_event_open", || {
        raw(libc::SYS_perf_event_open, [0, 0, 0])
    }),
    ("userfaultfd", || raw(libc::SYS_userfaultfd, [0, 0, 0])),
    ("io_uring_setup", || {
        raw(libc::SYS_io_uring_setup, [0, 0, 0])
    }),
    ("keyctl", || raw(libc::SYS_keyctl, [0, 0, 0])),
    ("personality", || {
        raw(libc::SYS_personality, [0x40_0000, 0, 0])
    }),
    ("x32", || raw(0x4000_0000 | libc::SYS_getpid, [0, 0, 0])),
    // What the main thread may do, and the others may not.
    ("memfd_create", || raw(libc::SYS_memfd_create, [0, 0, 0])),
    ("socketpair", || UnixStream::pair().map(drop)),
    ("recvmsg", || raw(libc::SYS_recvmsg, [3, 0, 0])),
    ("thread", || thread::Builder::new().spawn(|| ()).map(drop)),
    ("seccomp", || raw(libc::SYS_seccomp, [1, 0, 0])),
    ("ioctl-create-vm", || raw(libc::SYS_ioctl, [4, 0xae01, 0])),
    ("ioctl-memory-region", || {
        raw(libc::SYS_ioctl, [4, 0x4020_ae46, 0])
    }),
    // What only the event loop does.
    ("pwritev", || raw(libc::SYS_pwritev, [9, 0, 0])),
    // What only a vCPU does.
    ("ioctl-run", || raw(libc::SYS_ioctl, [9, 0xae80, 0])),
];

/// Those of [`CALLS`] that a thread may make after all.
pub fn allowed(thread: &str) -> &'static [&'static str] {
    match thread {
        "main" => &[
            "open-to-read",
            "give-memory-back",
            "memfd_create",
            "socketpair",
            "recvmsg",
            "thread",
            "seccomp",
            "ioctl-create-vm",
            "ioctl-memory-region",
            "pwritev",
            "ioctl-run",
        ],
        "vcpu" => &["open-to-read", "give-memory-back", "ioctl-run"],
        // Answers of the volumes' server come by the second.
        _ => &["open-to-read", "give-memory-back", "pwritev", "recvmsg"],
    }
}

/// A system call as it is, for what has no safe name.
#[allow(unsafe_code)]
fn raw(number: i64, arguments: [i64; 3]) -> io::Result<()> {
    let [a, b, c] = arguments;
    // SAFETY: every pointer among the arguments is null, so the kernel writes no memory
    // of this process; what is made or mapped is not used. The calls are to be refused.
    match unsafe { libc::syscall(number, a, b, c, 0, 0, 0) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}
