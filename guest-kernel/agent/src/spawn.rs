//! A new process: its pipes, its namespaces, and what it reports of its own
//! start.
//!
//! The new process prepares itself (the functions from [`in_child`] on) and
//! reports over a socket that closes at its exec: messages, each a packet.

use crate::devices::Rules;
use crate::exec::{self, Failure, Program};
use crate::jail;
use crate::mounts;
use crate::rootfs::{self, Disks};
use crate::sys;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{Mode, OFlags, fcntl_setfl, open};
use rustix::io::{Errno, IoSlice, IoSliceMut};
use rustix::mount::MountFlags;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, Uid};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};
use std::io;
use std::mem::MaybeUninit;
use vm_run_abi::protocol::{
    ContainerSpec, ProcessSpec, StartFailure, Stream, WindowSize, Writable,
};

/// What the guest gives to its container.
#[derive(Debug)]
pub struct Resources {
    /// The disks.
    pub disks: Disks,
    /// The directory of the container's cgroup.
    pub cgroup: OwnedFd,
    /// What it may open. The rules are applied by its first process, which has
    /// its disks to mount before.
    pub rules: Rules,
}

/// A process on its way to its program.
#[derive(Debug)]
pub struct Spawned {
    /// As the agent sees it.
    pub pid: Pid,
    /// What it reports; see [`next_report`].
    pub reports: OwnedFd,
    /// The agent's ends of its pipes, which do not block.
    pub pipes: Vec<(Stream, OwnedFd)>,
}

/// A step on the way of a new process.
#[derive(Debug)]
pub enum Report {
    /// The terminal: master and slave side.
    Terminal(OwnedFd, OwnedFd),
    /// All is ready, the exec is next.
    Ready,
    /// It could not be started, and is about to end.
    Failed(Failure),
    /// The socket is closed. After [`Report::Ready`] and with no
    /// [`Report::Failed`] the program runs.
    End,
}

/// Starts the container's first process: PID 1 of new namespaces, in its cgroup.
pub fn container(
    resources: &Resources,
    container: &ContainerSpec,
    process: &ProcessSpec,
) -> Result<Spawned, Failure> {
    let failed = |e: Errno| Failure::other(format!("cannot make pipes for the process: {e}"));
    let (reports, reporter) = socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .map_err(failed)?;
    fcntl_setfl(&reports, OFlags::NONBLOCK).map_err(failed)?;
    let (pipes, stdio) = Stdio::open(&process.streams).map_err(failed)?;
    let namespaces =
        libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
    let forked = sys::fork_into(namespaces, Some(resources.cgroup.as_fd()))
        .map_err(|e| Failure::other(format!("cannot make a process: {e}")))?;
    let Some(pid) = forked else {
        in_child(resources, container, process, &reporter, stdio);
    };
    Ok(Spawned {
        pid,
        reports,
        pipes,
    })
}

/// The process's ends of its pipes: stdin, stdout, stderr, where it has them.
#[derive(Debug, Default)]
struct Stdio([Option<OwnedFd>; 3]);

impl Stdio {
    /// Makes the pipes, the agent's ends first. A terminal has none.
    fn open(streams: &[Stream]) -> Result<(Vec<(Stream, OwnedFd)>, Self), Errno> {
        let mut ours = Vec::new();
        let mut theirs = Self::default();
        for stream in streams {
            let (reader, writer) = match stream {
                Stream::Terminal => continue,
                Stream::Stdin | Stream::Stdout | Stream::Stderr => pipe_with(PipeFlags::CLOEXEC)?,
            };
            let (at, our, their) = match stream {
                Stream::Stdin => (0, writer, reader),
                Stream::Stdout => (1, reader, writer),
                Stream::Stderr | Stream::Terminal => (2, reader, writer),
            };
            fcntl_setfl(&our, OFlags::NONBLOCK)?;
            ours.push((*stream, our));
            theirs.0[at] = Some(their);
        }
        Ok((ours, theirs))
    }
}

/// The new process, to its exec or its end.
fn in_child(
    resources: &Resources,
    container: &ContainerSpec,
    process: &ProcessSpec,
    reporter: &OwnedFd,
    stdio: Stdio,
) -> ! {
    // The agent's hook would end the guest.
    drop(std::panic::take_hook());
    let failure = match prepare(resources, container, process, reporter, stdio) {
        Ok(program) => match send(reporter.as_fd(), READY, &[], &[]) {
            Ok(()) => program.exec(),
            Err(e) => Failure::other(format!("cannot report: {e}")),
        },
        Err(failure) => failure,
    };
    let reason = match failure.reason {
        StartFailure::NotFound => 0,
        StartFailure::NotExecutable => 1,
        StartFailure::Other => 2,
    };
    let message = truncate(&failure.message);
    let sent = send(
        reporter.as_fd(),
        FAILED,
        &[&[reason], message.as_bytes()],
        &[],
    );
    // With no report the agent sees an end before the program, which is right too.
    sys::exit_now(if sent.is_ok() { 1 } else { 2 })
}

/// Everything between the fork and the exec. The order matters: mounts before
/// the root changes, the root before its files are looked at, privileges last.
fn prepare(
    resources: &Resources,
    container: &ContainerSpec,
    process: &ProcessSpec,
    reporter: &OwnedFd,
    stdio: Stdio,
) -> Result<Program, Failure> {
    sys::new_cgroup_namespace().map_err(|e| Failure::other(format!("no cgroup namespace: {e}")))?;
    jail::make_mounts_private()?;
    let root = rootfs::mount_root(&resources.disks, &container.writable)?;
    let rules = resources.rules.apply(resources.cgroup.as_fd());
    rules.map_err(|e| Failure::other(format!("cannot restrict its devices: {e}")))?;
    let system = rustix::system::uname();
    let hostname = system.nodename().to_string_lossy();
    let files = jail::generate_files(&hostname)?;
    jail::enter(&root)?;
    jail::mount_system()?;
    files.place()?;

    let user = exec::find_user(&process.user)?;
    let uid = Uid::from_raw(user.uid);
    let has_terminal = process.streams.contains(&Stream::Terminal);
    let stdio_failed = |e: Errno| Failure::other(format!("cannot set up stdio: {e}"));
    rustix::process::setsid().map_err(stdio_failed)?;
    if has_terminal {
        terminal(process.window, uid, reporter)?;
    } else {
        connect(stdio, uid).map_err(stdio_failed)?;
    }
    exec::enter_directory(&process.cwd)?;
    jail::protect_system()?;
    if container.writable == Writable::Nothing {
        mounts::make_read_only("/", MountFlags::NOATIME)?;
    }
    rustix::process::umask(Mode::WGRP | Mode::WOTH);
    exec::become_user(&user)?;
    let program = Program::find(process, &user, &hostname)?;
    sys::close_on_exec_from_3()
        .and_then(|()| sys::reset_signals())
        .map_err(|e| Failure::other(format!("cannot clean up before the exec: {e}")))?;
    Ok(program)
}

/// Makes the pipes stdin, stdout and stderr, with /dev/null for those that are
/// missing. The pipes become the user's own, who may open /dev/stdout anew.
fn connect(stdio: Stdio, uid: Uid) -> Result<(), Errno> {
    let null = open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    for pipe in stdio.0.iter().flatten() {
        rustix::fs::fchown(pipe, Some(uid), None)?;
    }
    let [stdin, stdout, stderr] = &stdio.0;
    rustix::stdio::dup2_stdin(stdin.as_ref().unwrap_or(&null))?;
    rustix::stdio::dup2_stdout(stdout.as_ref().unwrap_or(&null))?;
    rustix::stdio::dup2_stderr(stderr.as_ref().unwrap_or(&null))
}

/// Makes a terminal of the container's own devpts the controlling terminal,
/// stdin, stdout, stderr and the console, and sends it to the agent.
fn terminal(window: Option<WindowSize>, uid: Uid, reporter: &OwnedFd) -> Result<(), Failure> {
    let failed = |e: Errno| Failure::other(format!("cannot make a terminal: {e}"));
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let master = open("/dev/pts/ptmx", flags, Mode::empty()).map_err(failed)?;
    unlockpt(&master).map_err(failed)?;
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let slave = ioctl_tiocgptpeer(&master, flags).map_err(failed)?;
    if let Some(size) = window {
        resize(slave.as_fd(), size).map_err(failed)?;
    }
    rustix::fs::fchown(&slave, Some(uid), None).map_err(failed)?;
    // The first terminal of a devpts that was made a moment ago.
    jail::bind_console("/dev/pts/0")?;
    rustix::process::ioctl_tiocsctty(&slave).map_err(failed)?;
    rustix::stdio::dup2_stdin(&slave).map_err(failed)?;
    rustix::stdio::dup2_stdout(&slave).map_err(failed)?;
    rustix::stdio::dup2_stderr(&slave).map_err(failed)?;
    fcntl_setfl(&master, OFlags::NONBLOCK).map_err(failed)?;
    let both = [master.as_fd(), slave.as_fd()];
    send(reporter.as_fd(), TERMINAL, &[], &both).map_err(failed)
}

/// Sets a terminal's size; either side of it will do.
pub fn resize(terminal: BorrowedFd<'_>, size: WindowSize) -> Result<(), Errno> {
    let size = Winsize {
        ws_row: size.rows,
        ws_col: size.cols,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    tcsetwinsize(terminal, size)
}

/// The first byte of a report.
const TERMINAL: u8 = b'T';
const READY: u8 = b'R';
const FAILED: u8 = b'F';

/// The longest report, in bytes. Messages quote paths and arguments.
const REPORT_MAX: usize = 8 << 10;

/// As much of `message` as a report holds.
fn truncate(message: &str) -> &str {
    &message[..message.floor_char_boundary(REPORT_MAX - 2)]
}

fn send(
    reporter: BorrowedFd<'_>,
    kind: u8,
    parts: &[&[u8]],
    descriptors: &[BorrowedFd<'_>],
) -> Result<(), Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(Errno::NOBUFS);
    }
    let kind = [kind];
    let mut slices = vec![IoSlice::new(&kind)];
    slices.extend(parts.iter().map(|part| IoSlice::new(part)));
    sendmsg(reporter, &slices, &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// The next thing that a new process reports; `None` if there is nothing now.
pub fn next_report(reports: BorrowedFd<'_>) -> io::Result<Option<Report>> {
    let mut bytes = [0; REPORT_MAX];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut slices = [IoSliceMut::new(&mut bytes)];
    let flags = RecvFlags::CMSG_CLOEXEC;
    let len = match recvmsg(reports, &mut slices, &mut control, flags) {
        Ok(message) => message.bytes,
        Err(Errno::AGAIN | Errno::INTR) => return Ok(None),
        Err(e) => return Err(e.into()),
    };
    let mut descriptors = control.drain().flat_map(|message| match message {
        RecvAncillaryMessage::ScmRights(descriptors) => descriptors.collect::<Vec<_>>(),
        _ => Vec::new(),
    });
    let both = (descriptors.next(), descriptors.next());
    drop(descriptors);
    Ok(Some(match (bytes[..len].split_first(), both) {
        (None, _) => Report::End,
        (Some((&TERMINAL, [])), (Some(master), Some(slave))) => Report::Terminal(master, slave),
        (Some((&READY, [])), _) => Report::Ready,
        (Some((&FAILED, [reason, message @ ..])), _) => Report::Failed(Failure {
            reason: match reason {
                0 => StartFailure::NotFound,
                1 => StartFailure::NotExecutable,
                _ => StartFailure::Other,
            },
            message: String::from_utf8_lossy(message).into_owned(),
        }),
        _ => return Err(io::ErrorKind::InvalidData.into()),
    }))
}
