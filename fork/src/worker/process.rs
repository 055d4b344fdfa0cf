//! The worker program: what it is started as, and where it is found.

use super::packet;
use super::serve;
use super::spawner::{self, Start};
use crate::jail::{self, Thread};
use crate::volumes::broker;
use rustix::stdio::dup2_stdin;
use rustix::thread::set_name;
use rustix::time::{ClockId, clock_gettime};
use std::env;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use vmm::{Host, ThreadKind};

/// The worker program's file name.
const PROGRAM: &str = "vm-run-worker";

/// What it is started as.
pub(super) const SPAWNER: &str = "spawner";
pub(super) const WORKER: &str = "worker";
pub(super) const BROKER: &str = "broker";

/// The first packet of a worker to its owner: it is in its jail, or why not.
pub(super) type Entered = Result<(), String>;

/// Finds the worker program: `$VM_RUN_WORKER`, else beside the executable, in
/// `../lib/vm-run/` beside its directory, or in `/usr/lib/vm-run`.
pub fn find_program() -> Option<PathBuf> {
    if let Some(given) = env::var_os("VM_RUN_WORKER") {
        return Some(given.into());
    }
    let beside = env::current_exe().ok();
    let beside = beside.as_deref().and_then(Path::parent);
    [
        beside.map(|dir| dir.join(PROGRAM)),
        beside.map(|dir| dir.join("../lib/vm-run").join(PROGRAM)),
        Some(Path::new("/usr/lib/vm-run").join(PROGRAM)),
    ]
    .into_iter()
    .flatten()
    .find(|path| path.is_file())
}

/// `main` of the worker program.
pub fn main() -> ExitCode {
    main_with(|socket, host| match serve_vm(socket, host) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            last_words(&error.to_string());
            ExitCode::FAILURE
        }
    })
}

/// Lists the system calls of each thread, and serves. The main thread's list comes
/// first: all others inherit it.
fn serve_vm(socket: OwnedFd, mut host: Host) -> io::Result<()> {
    jail::confine(Thread::Main).map_err(io::Error::other)?;
    host.on_thread_start(Arc::new(|kind| {
        let thread = match kind {
            ThreadKind::Vcpu => Thread::Vcpu,
            ThreadKind::Io => Thread::Io,
        };
        if let Err(error) = jail::confine(thread) {
            last_words(&error.to_string());
            std::process::exit(1);
        }
    }));
    serve::run(host, socket)
}

/// [`main`] with something else than VMs in the jail: for tests of the jail.
/// `payload` gets the socket to the owner, after the packet that tells it that the
/// worker is in its jail.
#[doc(hidden)]
pub fn main_with(payload: impl FnOnce(OwnedFd, Host) -> ExitCode) -> ExitCode {
    // It was executed as /proc/self/exe, and is called so otherwise.
    if let Err(errno) = set_name(c"vm-run-worker") {
        last_words(&format!("PR_SET_NAME: {errno}"));
    }
    let role = env::args_os().nth(1);
    let socket = match take_stdin() {
        Ok(socket) => socket,
        Err(error) => {
            last_words(&format!("standard input: {error}"));
            return ExitCode::FAILURE;
        }
    };
    let done = match role.as_deref().and_then(OsStr::to_str) {
        Some(SPAWNER) => spawner::run(socket).map(|()| ExitCode::SUCCESS),
        Some(WORKER) => worker(socket, payload),
        Some(BROKER) => broker(&socket).map(|()| ExitCode::SUCCESS),
        _ => Err(io::Error::other(
            "this program is started by vm-run, not by hand",
        )),
    };
    done.unwrap_or_else(|error| {
        last_words(&error.to_string());
        ExitCode::FAILURE
    })
}

/// The socket, and nothing more to read at descriptor 0.
fn take_stdin() -> io::Result<OwnedFd> {
    let socket = io::stdin().as_fd().try_clone_to_owned()?;
    dup2_stdin(File::open("/dev/null")?)?;
    Ok(socket)
}

/// A line for the spawner, which shows it when the worker has died. Nobody may be
/// there to read it.
fn last_words(line: &str) {
    if writeln!(io::stderr(), "{PROGRAM}: {line}").is_err() {
        log::error!("{line}");
    }
}

/// A broker: waits until it is in its cgroup; the rest is said by its owner.
fn broker(socket: &OwnedFd) -> io::Result<()> {
    match packet::receive::<Start>(socket)? {
        Some(_) => broker::run(socket),
        None => Ok(()),
    }
}

/// A worker: waits until it is in its cgroup, takes /dev/kvm, enters the jail.
fn worker(
    socket: OwnedFd,
    payload: impl FnOnce(OwnedFd, Host) -> ExitCode,
) -> io::Result<ExitCode> {
    let Some((start, _)) = packet::receive::<Start>(&socket)? else {
        return Ok(ExitCode::SUCCESS);
    };
    // rustix looks for the vDSO at the first reading of a clock, by calls that the
    // jail does not have.
    let _now = clock_gettime(ClockId::Monotonic);
    let entered = Host::open()
        .map_err(|error| error.to_string())
        .and_then(|host| {
            jail::enter(&start.confinement, socket.as_fd(), io::stderr().as_fd())
                .map_err(|error| format!("the worker cannot enter its jail: {error}"))?;
            Ok(host)
        });
    match entered {
        Ok(host) => {
            packet::send(&socket, &Entered::Ok(()), &[])?;
            Ok(payload(socket, host))
        }
        Err(line) => {
            packet::send(&socket, &Entered::Err(line), &[])?;
            Ok(ExitCode::FAILURE)
        }
    }
}
