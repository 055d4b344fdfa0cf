//! The spawner's own side: one thread, one loop.

use super::{Counts, Jail, Reply, Request, Start, VERSION};
use crate::jail::Confinement;
use crate::jail::cgroup::{Cgroups, Group};
use crate::worker::packet;
use crate::worker::process::{BROKER, WORKER};
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};
use rustix::process::{
    Pid, PidfdFlags, Resource, Rlimit, Signal, getrlimit, pidfd_open, setrlimit, setsid,
};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};
use std::collections::HashMap;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};

/// Added to a worker's pid, as this process sees it, for its uid: far above the users
/// of hosts and the ranges that user namespaces are given (subuid(5)), and pids have at
/// most 22 bits, so no two workers have the same.
const UID_BASE: u32 = 0x7000_0000;

/// What a worker can say on its way out, in bytes.
const LAST_WORDS: usize = 4096;

const SIGKILL: i32 = Signal::KILL.as_raw();
/// What seccomp kills with (seccomp(2), SECCOMP_RET_KILL_PROCESS).
const SIGSYS: i32 = Signal::SYS.as_raw();

/// The token of the owner's socket; workers count from 1.
const OWNER: u64 = 0;

struct Spawner {
    owner: OwnedFd,
    epoll: OwnedFd,
    /// With a jail: this process's own PID namespace, to come back to.
    jail: Option<(u32, OwnedFd)>,
    cgroups: Cgroups,
    workers: HashMap<u64, Worker>,
    counts: Counts,
}

struct Worker {
    process: Child,
    group: Option<Group>,
    /// What it writes to stderr stays in this pipe until it has ended.
    stderr: OwnedFd,
    pidfd: OwnedFd,
}

/// Serves the owner until it closes its socket, then ends all workers.
pub(in crate::worker) fn run(owner: OwnedFd) -> io::Result<()> {
    // What the owner's parent left open, and forgot to mark, is not for workers.
    close_fds::set_fds_cloexec(3, &[]);
    // A terminal's ^C is the owner's to act on.
    setsid()?;
    raise_descriptors()?;
    let Some((Request::Configure { version, jail }, _)) = packet::receive(&owner)? else {
        return Ok(());
    };
    let mut spawner = match configure(owner.try_clone()?, &version, &jail) {
        Ok(spawner) => spawner,
        Err(error) => return packet::send(&owner, &Reply::Failed(error.to_string()), &[]),
    };
    drop(owner);
    let missing = spawner.cgroups.missing().to_vec();
    packet::send(&spawner.owner, &Reply::Configured { missing }, &[])?;
    let served = spawner.serve();
    spawner.end();
    served
}

fn configure(owner: OwnedFd, version: &str, jail: &Jail) -> io::Result<Spawner> {
    if version != VERSION {
        return Err(io::Error::other(format!(
            "the worker program is version {VERSION}, and this is {version}: install both together"
        )));
    }
    let epoll = epoll::create(CreateFlags::CLOEXEC)?;
    epoll::add(&epoll, &owner, EventData::new_u64(OWNER), EventFlags::IN)?;
    let (jail, cgroups) = match jail {
        Jail::On(limits) => {
            let flags = OFlags::RDONLY | OFlags::CLOEXEC;
            let own = open("/proc/self/ns/pid", flags, Mode::empty())?;
            (Some((limits.processes, own)), Cgroups::prepare(limits))
        }
        Jail::Off => (None, Cgroups::default()),
    };
    Ok(Spawner {
        owner,
        epoll,
        jail,
        cgroups,
        workers: HashMap::new(),
        counts: Counts::default(),
    })
}

/// Two descriptors for each worker, and there may be a thousand.
fn raise_descriptors() -> io::Result<()> {
    let maximum = getrlimit(Resource::Nofile).maximum;
    let all = Rlimit {
        current: maximum,
        maximum,
    };
    Ok(setrlimit(Resource::Nofile, all)?)
}

impl Spawner {
    fn serve(&mut self) -> io::Result<()> {
        loop {
            for token in self.wait()? {
                match token {
                    OWNER => {
                        if !self.answer()? {
                            return Ok(());
                        }
                    }
                    worker => self.reap(worker),
                }
            }
        }
    }

    fn wait(&self) -> io::Result<Vec<u64>> {
        let mut events = Vec::with_capacity(64);
        loop {
            match epoll::wait(
                &self.epoll,
                rustix::buffer::spare_capacity(&mut events),
                None,
            ) {
                Err(Errno::INTR) => {}
                done => {
                    done?;
                    return Ok(events.iter().map(|event| event.data.u64()).collect());
                }
            }
        }
    }

    /// Answers one request. False: the owner has gone.
    fn answer(&mut self) -> io::Result<bool> {
        let Some((request, _)) = packet::receive(&self.owner)? else {
            return Ok(false);
        };
        let (reply, socket) = match request {
            Request::Spawn => self.reply_with(WORKER),
            Request::Broker if self.jail.is_none() => {
                let line = "volumes are served from a jail: be root, and leave out --no-jail";
                (Reply::Failed(line.into()), None)
            }
            Request::Broker => self.reply_with(BROKER),
            Request::Counts => (Reply::Counts(self.counts), None),
            Request::Configure { .. } => (Reply::Failed("configured already".into()), None),
        };
        let descriptors: Vec<_> = socket.iter().map(AsFd::as_fd).collect();
        match packet::send(&self.owner, &reply, &descriptors) {
            // The owner has died since it asked.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
            done => done.map(|()| true),
        }
    }

    fn reply_with(&mut self, role: &str) -> (Reply, Option<OwnedFd>) {
        match self.spawn(role) {
            Ok((pid, socket)) => (Reply::Spawned { pid }, Some(socket)),
            Err(error) => (Reply::Failed(error.to_string()), None),
        }
    }

    /// Starts a worker, or a broker. When it is told to begin it is in its cgroup.
    fn spawn(&mut self, role: &str) -> io::Result<(i32, OwnedFd)> {
        let (owners, workers) = packet::pair()?;
        let (stderr, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        fcntl_setpipe_size(&stderr, LAST_WORDS)?;
        let id = self.counts.started + 1;
        let group = match self.jail {
            Some(_) => Some(
                self.cgroups
                    .create(&id.to_string())
                    .map_err(said("cgroup"))?,
            ),
            None => None,
        };
        let mut command = Command::new("/proc/self/exe");
        command
            .arg0("vm-run-worker")
            .arg(role)
            .stdin(Stdio::from(workers))
            .stderr(Stdio::from(write));
        let process = match self.start(&mut command) {
            Ok(process) => process,
            Err(error) => {
                if let Some(group) = group {
                    self.cgroups.remove(group);
                }
                return Err(error);
            }
        };
        // The write end: the worker alone keeps it.
        drop(command);
        self.counts.started += 1;
        let pid = Pid::from_child(&process);
        let mut worker = Worker {
            pidfd: match pidfd_open(pid, PidfdFlags::empty()) {
                Ok(pidfd) => pidfd,
                Err(errno) => {
                    self.bury(process, group, &stderr);
                    return Err(errno.into());
                }
            },
            process,
            group,
            stderr,
        };
        match self.begin(id, &mut worker, &owners) {
            Ok(()) => {
                self.workers.insert(id, worker);
                Ok((pid.as_raw_nonzero().get(), owners))
            }
            Err(error) => {
                self.bury(worker.process, worker.group, &worker.stderr);
                Err(error)
            }
        }
    }

    /// Starts the process; with a jail, as the first of a PID namespace. That
    /// namespace is for children only, and another can be made only from the own one
    /// (kernel/pid_namespace.c, copy_pid_ns).
    fn start(&self, command: &mut Command) -> io::Result<Child> {
        let Some((_, own)) = &self.jail else {
            return command.spawn();
        };
        // Deprecated because of CLONE_FILES, which this is not.
        #[allow(deprecated)]
        rustix::thread::unshare(UnshareFlags::NEWPID)
            .map_err(|errno| said("a PID namespace (the jail needs root)")(errno.into()))?;
        let process = command.spawn();
        move_into_link_name_space(own.as_fd(), Some(LinkNameSpaceType::ProcessID))?;
        process.map_err(said("the worker program"))
    }

    fn begin(&self, id: u64, worker: &mut Worker, socket: &OwnedFd) -> io::Result<()> {
        let pid = worker.process.id();
        if let Some(group) = &worker.group {
            group.add(pid).map_err(said("cgroup.procs"))?;
        }
        let confinement = match self.jail {
            Some((processes, _)) => Confinement::Full {
                uid: UID_BASE + pid,
                processes,
            },
            None => Confinement::Unprivileged,
        };
        packet::send(socket, &Start { confinement }, &[])?;
        let data = EventData::new_u64(id);
        Ok(epoll::add(
            &self.epoll,
            &worker.pidfd,
            data,
            EventFlags::IN,
        )?)
    }

    /// A worker has ended.
    fn reap(&mut self, id: u64) {
        if let Some(worker) = self.workers.remove(&id) {
            // Closing the pidfd takes it out of the epoll set.
            self.bury(worker.process, worker.group, &worker.stderr);
        }
    }

    /// Waits for a worker, ending it if need be, and takes away what it left.
    fn bury(&mut self, mut process: Child, group: Option<Group>, stderr: &OwnedFd) {
        let pid = process.id();
        match process.kill().and_then(|()| process.wait()) {
            Ok(status) => {
                if status.signal() == Some(SIGSYS) {
                    self.counts.violations += 1;
                }
                tell_of(pid, status, stderr);
            }
            Err(error) => tell(&format!("worker {pid}: {error}")),
        }
        if let Some(group) = group {
            self.cgroups.remove(group);
        }
        self.counts.gone += 1;
    }

    /// Ends everything. The workers are killed first and waited for then, so that they
    /// die side by side.
    fn end(mut self) {
        for worker in self.workers.values_mut() {
            if let Err(error) = worker.process.kill() {
                tell(&format!("worker {}: {error}", worker.process.id()));
            }
        }
        for (_, worker) in std::mem::take(&mut self.workers) {
            let pid = worker.process.id();
            let mut process = worker.process;
            if let Err(error) = process.wait() {
                tell(&format!("worker {pid}: {error}"));
            }
            if let Some(group) = worker.group {
                self.cgroups.remove(group);
            }
        }
        if !self.cgroups.end() {
            tell("cgroups of workers are left; the next start removes them");
        }
    }
}

fn said(what: &'static str) -> impl FnOnce(io::Error) -> io::Error {
    move |error| io::Error::new(error.kind(), format!("{what}: {error}"))
}

/// How a worker ended, where it was not as it should: by itself with success, or by
/// SIGKILL, which is how VMs are ended.
fn tell_of(pid: u32, status: ExitStatus, stderr: &OwnedFd) {
    if status.success() || status.signal() == Some(SIGKILL) {
        return;
    }
    let mut words = [0; LAST_WORDS];
    let len = rustix::io::read(stderr, &mut words).unwrap_or(0);
    let words = String::from_utf8_lossy(&words[..len]);
    tell(&format!("worker {pid} ended with {status}"));
    for line in words.lines() {
        // A worker may be a guest's by now: nothing of it reaches a terminal as it is.
        tell(&format!("worker {pid}: {}", line.escape_debug()));
    }
}

/// To the owner's stderr, if it still has one.
fn tell(line: &str) {
    if writeln!(io::stderr(), "vm-run: {line}").is_err() {
        log::debug!("{line}");
    }
}
