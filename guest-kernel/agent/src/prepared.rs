//! The container's first process. It is made before the fork point, with all of its
//! container that is not late-bound, and waits there; after the fork it is told what
//! to become. What is made ahead, a template makes once and none of its children.
//!
//! Its memory is the template's until its exec: nothing may be drawn here that has to
//! differ between children. The program gets its addresses, its canary and its
//! `AT_RANDOM` from the exec, when the child has its identity.

use crate::exec::{Failure, Program};
use crate::frame::{self, Reader};
use crate::init::Init;
use crate::jail::{self, System};
use crate::network;
use crate::options;
use crate::report::{self, Report, Reporter};
use crate::rootfs::{self, Layers};
use crate::spawn::{self, Resources, Spawned, Stdio};
use crate::sys;
use crate::volumes;
use crate::warm;
use rustix::fd::{AsFd, OwnedFd};
use rustix::io::Errno;
use rustix::mm::{MlockAllFlags, mlockall, munlockall};
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, send, socketpair};
use std::fmt::Display;
use vm_run_abi::protocol::{ContainerSpec, MAX_FRAME, ProcessSpec, Stream};

/// A first process that waits for its program.
#[derive(Debug)]
pub struct Prepared {
    process: Spawned,
    /// Where it is told.
    orders: OwnedFd,
}

impl Prepared {
    /// Makes the process: PID 1 of new namespaces, in the container's cgroup. Returns
    /// when everything that can be done ahead is done.
    ///
    /// There is no UTS namespace among them: the hostname of the guest, which the
    /// agent sets at the fork point, is the container's.
    ///
    /// # Errors
    /// In such a guest no container can start.
    pub fn fork(resources: &Resources) -> Result<Self, Failure> {
        let failed = |e: Errno| Failure::other(format!("cannot make pipes for a container: {e}"));
        let (reports, reporter) = report::channel().map_err(failed)?;
        let flags = SocketFlags::CLOEXEC;
        let (orders, told) =
            socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(failed)?;
        let all = [Stream::Stdin, Stream::Stdout, Stream::Stderr];
        let (pipes, stdio) = Stdio::open(&all).map_err(failed)?;
        let namespaces = libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWIPC;
        let forked = sys::fork_into(namespaces, Some(resources.cgroup.as_fd()))
            .map_err(|e| Failure::other(format!("cannot make a process: {e}")))?;
        let Some((pid, pidfd)) = forked else {
            // The end of the agent is to be the end of what is read from it.
            drop((orders, pipes));
            spawn::in_child(&reporter, || live(resources, &reporter, &told, stdio));
        };
        drop((reporter, told, stdio));
        let lost = |why: &str| Failure::other(format!("a container's process is lost: {why}"));
        let held = match report::await_report(reports.as_fd()) {
            Ok(Report::Prepared(held)) => held,
            Ok(Report::Failed(failure)) => return Err(failure),
            Ok(_) => return Err(lost("it has ended")),
            Err(e) => return Err(lost(&e.to_string())),
        };
        let process = Spawned {
            pid,
            pidfd: Some(pidfd),
            reports,
            pipes,
            held,
        };
        Ok(Self { process, orders })
    }

    /// Has it finish the container, and become its program; without one, it waits to be
    /// killed.
    pub fn start(
        mut self,
        container: &ContainerSpec,
        process: Option<&ProcessSpec>,
    ) -> Result<Spawned, Failure> {
        let order = frame::encode(&(container, process))
            .map_err(|e| Failure::other(format!("the container cannot be described: {e}")))?;
        let mut rest = &order[..];
        while !rest.is_empty() {
            match send(&self.orders, rest, SendFlags::NOSIGNAL) {
                Ok(sent) => rest = &rest[sent..],
                Err(Errno::INTR) => {}
                Err(e) => {
                    let message = format!("the container's process has gone: {e}");
                    return Err(Failure::other(message));
                }
            }
        }
        let streams = process.map_or(&[][..], |process| &process.streams);
        self.process.pipes.retain(|(s, _)| streams.contains(s));
        Ok(self.process)
    }
}

/// The new process, to its exec. The order matters: mounts before the root changes,
/// the root before its files are looked at, privileges last.
fn live(
    resources: &Resources,
    reporter: &Reporter,
    told: &OwnedFd,
    mut stdio: Stdio,
) -> Result<Program, Failure> {
    let step = |what: &str, e: &dyn Display| Failure::other(format!("cannot {what}: {e}"));
    sys::new_cgroup_namespace().map_err(|e| step("make a cgroup namespace", &e))?;
    jail::make_mounts_private()?;
    rootfs::make_mount_points()?;
    let empty = rootfs::mount_empty(&resources.disks)?;
    let system = System::prepare(network::leave)?;
    settle().map_err(|e| step("lock memory", &e))?;
    let namespaces = jail::namespaces()?;
    let held = namespaces.iter().chain(empty.iter().map(|empty| &empty.0));
    let held: Vec<_> = held.chain(system.views()).map(AsFd::as_fd).collect();
    reporter.prepared(&held).map_err(|e| step("report", &e))?;

    // The fork point is here.
    let order: (ContainerSpec, Option<ProcessSpec>) = match Reader::new(MAX_FRAME).next(told) {
        Ok(Some(order)) => order,
        // The socket blocks.
        Ok(None) => return Err(step("wait", &Errno::AGAIN)),
        Err(e) => return Err(step("be told of a program", &e)),
    };
    let (container, process) = order;
    let hostname = spawn::hostname();
    if container.network {
        match &resources.network {
            Some(network) => network.enter()?,
            None => return Err(step("connect it", &"the kernel lacks CONFIG_VIRTIO_NET")),
        }
    }
    let root = rootfs::mount_root(&resources.disks, &container, empty.as_ref())?;
    let layers = Layers::open()?;
    let mut volumes = volumes::take(
        &resources.disks.volumes,
        &container.volumes,
        &container.options.tmpfs,
    )?;
    let wanted = &container.options;
    if !wanted.privileged {
        let enforced = resources.rules.enforce();
        enforced.map_err(|e| step("restrict its devices", &e))?;
    }
    options::set_kernel(wanted, resources.cgroup.as_fd())?;
    let init = wanted.init.then(Init::open).transpose()?;
    let helper = if container.warm {
        let path = &resources.helper;
        Some(std::fs::read(path).map_err(|e| step(&format!("read {path}"), &e))?)
    } else {
        None
    };
    jail::enter(&root)?;
    volumes.place_under()?;
    let names = system.place(&hostname, container.network, wanted)?;
    let sent = reporter.root(&layers, &names);
    sent.map_err(|e| step("report", &e))?;
    options::complete(wanted)?;
    volumes.place_over()?;
    options::lock_tmpfs(&wanted.tmpfs)?;
    if let Some(helper) = helper {
        let listener = warm::place(&helper)?;
        let sent = reporter.warm(&listener);
        sent.map_err(|e| step("report", &e))?;
    }
    let Some(process) = process else {
        drop(stdio);
        return Err(wait(reporter));
    };
    stdio.keep(&process.streams);
    let program = spawn::to_program(&process, Some(&container), stdio, reporter, &hostname)?;
    if let Some(init) = init {
        let has_terminal = process.streams.contains(&Stream::Terminal);
        init.split(&process.args, has_terminal)?;
    }
    Ok(program)
}

/// Waits for its end, which is the container's. Returns only why it cannot.
fn wait(reporter: &Reporter) -> Failure {
    match reporter.done() {
        Ok(()) => loop {
            rustix::event::pause();
        },
        Err(e) => Failure::other(format!("cannot report: {e}")),
    }
}

/// Has this process's memory be its own, and mapped: it is the agent's until it is
/// written to, and each page would be copied in each child. Nothing stays locked: the
/// exec has less to undo.
fn settle() -> Result<(), Errno> {
    mlockall(MlockAllFlags::CURRENT)?;
    munlockall()
}
