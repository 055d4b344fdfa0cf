//! A new process: its pipes, its namespaces, and its way to its program. The
//! container's first one is [`crate::prepared`]'s; the way is the same.
//!
//! The new process prepares itself (the functions from [`in_child`] on) and
//! reports of it ([`crate::report`]).

use crate::devices::Rules;
use crate::exec::{self, Failure, Program};
use crate::freezer::Freezer;
use crate::jail;
use crate::mounts;
use crate::network::Network;
use crate::options;
use crate::report::{self, Reporter};
use crate::rootfs::{Disks, Layers};
use crate::sys;
use crate::tasks;
use crate::warm;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{Mode, OFlags, fcntl_setfl, open};
use rustix::io::Errno;
use rustix::mount::MountFlags;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, Uid};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};
use rustix::thread::{ThreadNameSpaceType, move_into_thread_name_spaces, set_no_new_privs};
use std::io;
use vm_run_abi::protocol::{ContainerSpec, ProcessSpec, Stream, WindowSize, Writable};
use vm_run_abi::task::Task;

/// What the guest gives to its container.
#[derive(Debug)]
pub struct Resources {
    /// The disks.
    pub disks: Disks,
    /// The directory of the container's cgroup.
    pub cgroup: OwnedFd,
    /// The freezer of that cgroup.
    pub freezer: Freezer,
    /// What it may open. The rules are enforced by its first process, which has
    /// its disks to mount before.
    pub rules: Rules,
    /// The guest's own network, if its kernel has a driver for the interface.
    pub network: Option<Network>,
    /// The path of the program `warm` (docs/warm.md), which a container that is
    /// to be warm finds a copy of.
    pub helper: String,
    /// The agent itself by a pidfd, for the way back from the namespaces of the
    /// container.
    pub agent: OwnedFd,
}

/// A process on its way to its program.
#[derive(Debug)]
pub struct Spawned {
    /// As the agent sees it.
    pub pid: Pid,
    /// The same, as a descriptor.
    pub pidfd: Option<OwnedFd>,
    /// What it reports; see [`report::next_report`].
    pub reports: OwnedFd,
    /// The agent's ends of its pipes, which do not block.
    pub pipes: Vec<(Stream, OwnedFd)>,
    /// Of the container's first process, to be held to the end of the guest:
    /// [`crate::jail::namespaces`] and [`crate::rootfs::Empty`].
    pub held: Vec<OwnedFd>,
}

/// Why there is no new process.
#[derive(Debug)]
pub enum SpawnError {
    /// And nothing else has changed.
    Failed(Failure),
    /// And the agent is not where it was: the guest cannot go on.
    Lost(io::Error),
}

impl From<Failure> for SpawnError {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

/// Starts one more process in the container that `entrance` is the first process
/// of, by its pidfd.
pub fn exec(
    resources: &Resources,
    entrance: BorrowedFd<'_>,
    process: &ProcessSpec,
) -> Result<Spawned, SpawnError> {
    beside(resources, entrance, &process.streams, |reporter, stdio| {
        in_child(&reporter, || {
            enter(entrance)?;
            to_program(process, None, stdio, &reporter, &hostname())
        })
    })
}

/// Starts a task in the container that `entrance` is the first process of.
pub fn task(
    resources: &Resources,
    entrance: BorrowedFd<'_>,
    task: &Task,
    streams: &[Stream],
    layers: Option<&Layers>,
) -> Result<Spawned, SpawnError> {
    beside(resources, entrance, streams, |reporter, stdio| {
        drop(std::panic::take_hook());
        let code = match to_task(entrance, stdio, &reporter, layers) {
            Ok(()) => tasks::run(task, layers),
            // With no report the agent sees an end before the task, which is right too.
            Err(failure) => reporter.failed(&failure).map_or(2, |()| 1),
        };
        sys::exit_now(code)
    })
}

/// From the agent's copy to a process of the container that does a task: it keeps the
/// agent's memory, and nothing else of it.
fn to_task(
    entrance: BorrowedFd<'_>,
    stdio: Stdio,
    reporter: &Reporter,
    layers: Option<&Layers>,
) -> Result<(), Failure> {
    enter(entrance)?;
    rustix::process::setsid()
        .and_then(|_| connect(stdio, Uid::ROOT))
        .map_err(|e| Failure::other(format!("cannot set up stdio: {e}")))?;
    rustix::process::umask(Mode::empty());
    sys::reset_signals()
        .map_err(|e| Failure::other(format!("cannot clean up before the task: {e}")))?;
    let sent = reporter.done();
    sent.map_err(|e| Failure::other(format!("cannot report: {e}")))?;
    let kept = layers.map_or(Vec::new(), |l| vec![l.upper.as_fd(), l.image.as_fd()]);
    // Whoever waits for the end of a stream of the agent's is not to wait for us.
    sys::close_from_3_but(&kept)
        .map_err(|e| Failure::other(format!("cannot clean up before the task: {e}")))
}

/// Makes one more process of the container, and has it live `live`.
fn beside(
    resources: &Resources,
    entrance: BorrowedFd<'_>,
    streams: &[Stream],
    live: impl FnOnce(Reporter, Stdio) -> i32,
) -> Result<Spawned, SpawnError> {
    // It concerns the children that are made from here on, and not the agent.
    let children = ThreadNameSpaceType::PROCESS_ID;
    move_into_thread_name_spaces(entrance, children)
        .map_err(|e| Failure::other(format!("cannot enter the container: {e}")))?;
    let spawned = spawn_beside(resources, streams, live);
    move_into_thread_name_spaces(resources.agent.as_fd(), children)
        .map_err(|e| SpawnError::Lost(e.into()))?;
    Ok(spawned?)
}

fn spawn_beside(
    resources: &Resources,
    streams: &[Stream],
    live: impl FnOnce(Reporter, Stdio) -> i32,
) -> Result<Spawned, Failure> {
    let failed = |e: Errno| Failure::other(format!("cannot make pipes for the process: {e}"));
    let (reports, reporter) = report::channel().map_err(failed)?;
    let (pipes, stdio) = Stdio::open(streams).map_err(failed)?;
    let forked = sys::fork_into(0, Some(resources.cgroup.as_fd()))
        .map_err(|e| Failure::other(format!("cannot make a process: {e}")))?;
    let Some((pid, pidfd)) = forked else {
        sys::exit_now(live(reporter, stdio))
    };
    Ok(Spawned {
        pid,
        pidfd: Some(pidfd),
        reports,
        pipes,
        held: Vec::new(),
    })
}

/// The process's ends of its pipes: stdin, stdout, stderr, where it has them.
#[derive(Debug, Default)]
pub struct Stdio([Option<OwnedFd>; 3]);

impl Stdio {
    /// Makes the pipes, the agent's ends first. A terminal has none.
    pub fn open(streams: &[Stream]) -> Result<(Vec<(Stream, OwnedFd)>, Self), Errno> {
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

    /// Closes those that are not wanted.
    pub fn keep(&mut self, streams: &[Stream]) {
        let all = [Stream::Stdin, Stream::Stdout, Stream::Stderr];
        for (pipe, stream) in self.0.iter_mut().zip(all) {
            pipe.take_if(|_| !streams.contains(&stream));
        }
    }
}

/// The new process, to its exec or its end.
pub fn in_child(reporter: &Reporter, prepare: impl FnOnce() -> Result<Program, Failure>) -> ! {
    // The agent's hook would end the guest.
    drop(std::panic::take_hook());
    let failure = match prepare() {
        Ok(program) => match reporter.ready() {
            Ok(()) => program.exec(),
            Err(e) => Failure::other(format!("cannot report: {e}")),
        },
        Err(failure) => failure,
    };
    // With no report the agent sees an end before the program, which is right too.
    let sent = reporter.failed(&failure);
    sys::exit_now(if sent.is_ok() { 1 } else { 2 })
}

/// The guest's, which is the container's.
pub fn hostname() -> String {
    let system = rustix::system::uname();
    system.nodename().to_string_lossy().into_owned()
}

/// From the container's root to the exec. `first` is for its first process. The order
/// matters: privileges are given up last.
pub fn to_program(
    process: &ProcessSpec,
    first: Option<&ContainerSpec>,
    stdio: Stdio,
    reporter: &Reporter,
    hostname: &str,
) -> Result<Program, Failure> {
    let options = &process.options;
    let user = exec::find_user(&process.user, &options.groups)?;
    let uid = Uid::from_raw(user.uid);
    let stdio_failed = |e: Errno| Failure::other(format!("cannot set up stdio: {e}"));
    rustix::process::setsid().map_err(stdio_failed)?;
    if process.streams.contains(&Stream::Terminal) {
        terminal(process.window, uid, reporter, first.is_some())?;
    } else {
        connect(stdio, uid).map_err(stdio_failed)?;
    }
    exec::enter_directory(&process.cwd)?;
    if first.is_some_and(|container| container.writable == Writable::Nothing) {
        mounts::make_read_only("/", MountFlags::NOATIME)?;
    }
    rustix::process::umask(Mode::WGRP | Mode::WOTH);
    options::restrict(options)?;
    exec::become_user(&user, options.capabilities)?;
    let warm = first.is_some_and(|container| container.warm);
    let added: &[&str] = if warm { &[warm::VARIABLE] } else { &[] };
    let program = Program::find(process, &user, hostname, added)?;
    sys::close_on_exec_from_3()
        .and_then(|()| sys::reset_signals())
        .map_err(|e| Failure::other(format!("cannot clean up before the exec: {e}")))?;
    if options.no_new_privileges {
        set_no_new_privs(true)
            .map_err(|e| Failure::other(format!("cannot give up new privileges: {e}")))?;
    }
    Ok(program)
}

/// Enters the namespaces of the container's first process. A mount namespace
/// brings its root with it.
fn enter(first: BorrowedFd<'_>) -> Result<(), Failure> {
    let all = ThreadNameSpaceType::MOUNT
        | ThreadNameSpaceType::INTER_PROCESS_COMMUNICATION
        | ThreadNameSpaceType::CONTROL_GROUP
        | ThreadNameSpaceType::NETWORK;
    move_into_thread_name_spaces(first, all)
        .map_err(|e| Failure::other(format!("cannot enter the container: {e}")))
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
/// stdin, stdout, stderr and, for the first process, the console, and sends it
/// to the agent.
fn terminal(
    window: Option<WindowSize>,
    uid: Uid,
    reporter: &Reporter,
    is_first: bool,
) -> Result<(), Failure> {
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
    if is_first {
        // The first terminal of a devpts that was made a moment ago.
        jail::bind_console("/dev/pts/0")?;
    }
    rustix::process::ioctl_tiocsctty(&slave).map_err(failed)?;
    rustix::stdio::dup2_stdin(&slave).map_err(failed)?;
    rustix::stdio::dup2_stdout(&slave).map_err(failed)?;
    rustix::stdio::dup2_stderr(&slave).map_err(failed)?;
    fcntl_setfl(&master, OFlags::NONBLOCK).map_err(failed)?;
    reporter.terminal(&master, &slave).map_err(failed)
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
