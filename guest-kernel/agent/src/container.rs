//! The container: its first process, and those that are started beside it.

use crate::exec::Failure;
use crate::names::Names;
use crate::prepared::Prepared;
use crate::process::{Process, start_failed};
use crate::rootfs::Layers;
use crate::spawn::{self, Resources, SpawnError, Spawned};
use rustix::fd::{AsFd, OwnedFd};
use rustix::process::Pid;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use vm_run_abi::protocol::{CONTAINER, ContainerSpec, Event, HOOK, ProcessId, ProcessSpec, Stream};
use vm_run_abi::task::Task;

/// How many processes the host can have in a container at once.
const MAX_PROCESSES: usize = 256;

/// A process that the host has asked for, whose streams have not all come.
#[derive(Debug)]
enum Wanted {
    /// The first; without a program it only waits.
    First(Box<ContainerSpec>, Option<ProcessSpec>),
    /// One more.
    Exec(ProcessSpec),
    /// One more, which runs no program.
    Task(Task, Vec<Stream>),
}

impl Wanted {
    fn streams(&self) -> &[Stream] {
        match self {
            Self::First(_, None) => &[],
            Self::First(_, Some(process)) | Self::Exec(process) => &process.streams,
            Self::Task(_, streams) => streams,
        }
    }

    fn check(&self) -> Result<(), String> {
        if matches!(self, Self::Task(..)) && self.streams().contains(&Stream::Terminal) {
            return Err("a task has no terminal".to_owned());
        }
        check_streams(self.streams())
    }
}

/// What has come of a start.
#[derive(Debug)]
pub enum Start {
    /// It waits for streams, or nobody has asked for it.
    Waiting,
    /// It is on its way; these are the agent's ends of its pipes.
    Begun(Vec<(Stream, OwnedFd)>),
    /// It has not begun, and this is for the host.
    Failed(Event),
}

/// The container. There is one in the life of a child.
#[derive(Debug)]
pub struct Container {
    /// The first process, until it is started.
    prepared: Option<Prepared>,
    wanted: BTreeMap<ProcessId, Wanted>,
    processes: BTreeMap<ProcessId, Process>,
    /// The ids that were asked for: each stands for one process.
    used: BTreeSet<ProcessId>,
    /// Whether its disk outlives it.
    is_kept: bool,
    /// The first process by its pidfd, the way into its namespaces.
    entrance: Option<OwnedFd>,
    /// What keeps its namespaces and file systems to the end of the guest.
    held: Vec<OwnedFd>,
    /// What its root is put together of.
    layers: Option<Layers>,
    names: Option<Names>,
    /// Its domain, and lines of its /etc/hosts.
    surroundings: (String, String),
}

impl Container {
    /// The container whose first process this is.
    pub fn new(prepared: Prepared) -> Self {
        Self {
            prepared: Some(prepared),
            wanted: BTreeMap::new(),
            processes: BTreeMap::new(),
            used: BTreeSet::new(),
            is_kept: false,
            entrance: None,
            held: Vec::new(),
            layers: None,
            names: None,
            surroundings: (String::new(), String::new()),
        }
    }

    /// Its root is there, of these layers, with files that say who it is.
    pub fn has_root(&mut self, layers: Layers, names: Names) {
        self.layers = Some(layers);
        self.names = Some(names);
    }

    /// Lets go of its file systems: whoever comes next finds them as they were left.
    pub fn leave_root(&mut self) {
        self.layers = None;
        self.names = None;
    }

    /// Makes somebody else of it, as the guest is: it does not run meanwhile. The host
    /// knows nothing of other processes than the first, and counts anew.
    pub fn become_child(&mut self) -> io::Result<()> {
        self.used.retain(|id| *id == CONTAINER);
        self.wanted.clear();
        self.processes.retain(|id, _| *id == CONTAINER);
        let Some(names) = &self.names else {
            return Ok(());
        };
        let (domain, hosts) = &self.surroundings;
        names.write(&spawn::hostname(), domain, hosts)?;
        names.draw_machine_id()
    }

    /// Notes that the first process is to be started; `false` if it was before.
    pub fn ask(&mut self, container: ContainerSpec, process: Option<ProcessSpec>) -> bool {
        self.want(CONTAINER, Wanted::First(Box::new(container), process))
    }

    /// Notes that one more is to be started; `false` if the id was used before.
    pub fn ask_exec(&mut self, id: ProcessId, process: ProcessSpec) -> bool {
        is_free(id) && self.want(id, Wanted::Exec(process))
    }

    /// Notes that a task is to be done; `false` if the id was used before.
    pub fn ask_task(&mut self, id: ProcessId, task: Task, streams: Vec<Stream>) -> bool {
        is_free(id) && self.want(id, Wanted::Task(task, streams))
    }

    fn want(&mut self, id: ProcessId, wanted: Wanted) -> bool {
        let first = self.used.insert(id);
        if first {
            self.wanted.insert(id, wanted);
        }
        first
    }

    /// Starts a process, once it is asked for and the streams that it needs are
    /// among `arrived`. An error is the end of the guest.
    pub fn start(
        &mut self,
        id: ProcessId,
        resources: &Resources,
        arrived: &[Stream],
    ) -> io::Result<Start> {
        let Some(wanted) = self.wanted.get(&id) else {
            return Ok(Start::Waiting);
        };
        let checked = wanted.check();
        if checked.is_ok() && !wanted.streams().iter().all(|s| arrived.contains(s)) {
            return Ok(Start::Waiting);
        }
        let spawned = match (checked, self.wanted.remove(&id)) {
            (Ok(()), Some(wanted)) => self.spawn(&wanted, resources),
            (Ok(()), None) => return Ok(Start::Waiting),
            (Err(why), _) => Err(Failure::other(why).into()),
        };
        match spawned {
            Ok(mut spawned) => {
                let pipes = std::mem::take(&mut spawned.pipes);
                if id == CONTAINER {
                    self.entrance = spawned.pidfd.take();
                    self.held = std::mem::take(&mut spawned.held);
                }
                self.processes.insert(id, Process::new(id, spawned));
                Ok(Start::Begun(pipes))
            }
            Err(SpawnError::Failed(failure)) => Ok(Start::Failed(start_failed(id, failure))),
            Err(SpawnError::Lost(error)) => Err(error),
        }
    }

    fn spawn(&mut self, wanted: &Wanted, resources: &Resources) -> Result<Spawned, SpawnError> {
        if let Wanted::First(container, process) = wanted {
            self.is_kept = container.kept;
            let options = &container.options;
            self.surroundings = (options.domainname.clone(), options.hosts.clone());
            return match self.prepared.take() {
                Some(prepared) => Ok(prepared.start(container, process.as_ref())?),
                None => Err(Failure::other("the container was started before").into()),
            };
        }
        let running = self
            .processes
            .get(&CONTAINER)
            .is_some_and(Process::is_running);
        match &self.entrance {
            _ if self.processes.len() >= MAX_PROCESSES => {
                let message = format!("the container has {MAX_PROCESSES} processes already");
                Err(Failure::other(message).into())
            }
            Some(entrance) if running => match wanted {
                Wanted::Exec(process) => spawn::exec(resources, entrance.as_fd(), process),
                Wanted::Task(task, streams) => {
                    let layers = self.layers.as_ref();
                    spawn::task(resources, entrance.as_fd(), task, streams, layers)
                }
                Wanted::First(..) => Err(Failure::other("the container runs").into()),
            },
            _ => Err(Failure::other("the container is not running").into()),
        }
    }

    /// Starts the command of a hook, of which there is one at a time; the result is the
    /// agent's ends of its pipes.
    pub fn start_hook(
        &mut self,
        process: &ProcessSpec,
        resources: &Resources,
    ) -> Result<Vec<(Stream, OwnedFd)>, SpawnError> {
        let Some(entrance) = &self.entrance else {
            return Err(Failure::other("the container is not running").into());
        };
        let mut spawned = spawn::exec(resources, entrance.as_fd(), process)?;
        let pipes = std::mem::take(&mut spawned.pipes);
        self.processes.insert(HOOK, Process::new(HOOK, spawned));
        Ok(pipes)
    }

    /// A process that is there.
    pub fn get_mut(&mut self, id: ProcessId) -> Option<&mut Process> {
        self.processes.get_mut(&id)
    }

    /// Takes out a process, which has been reaped.
    pub fn take(&mut self, id: ProcessId) -> Option<Process> {
        if id == CONTAINER {
            self.entrance = None;
        }
        self.processes.remove(&id)
    }

    /// Whose number that is.
    pub fn find(&self, pid: Pid) -> Option<ProcessId> {
        let mut all = self.processes.iter();
        all.find(|(_, process)| process.pid() == pid)
            .map(|(id, _)| *id)
    }

    /// Whether its disk outlives it.
    pub fn is_kept(&self) -> bool {
        self.is_kept
    }

    /// Whether it has its first process.
    pub fn is_alive(&self) -> bool {
        self.processes.contains_key(&CONTAINER)
    }

    /// Whether the first process runs its program, and no other is there or is
    /// asked for.
    pub fn is_alone(&self) -> bool {
        let first = self
            .processes
            .get(&CONTAINER)
            .is_some_and(Process::is_running);
        first && self.processes.len() == 1 && self.wanted.is_empty()
    }

    /// Whether a process of this id is still to be started.
    pub fn awaits(&self, id: ProcessId) -> bool {
        !self.used.contains(&id) || self.wanted.contains_key(&id)
    }
}

/// Whether the host may call one more process so.
fn is_free(id: ProcessId) -> bool {
    id != CONTAINER && id != HOOK
}

/// Each stream once, and a terminal alone.
pub fn check_streams(streams: &[Stream]) -> Result<(), String> {
    let twice = (1..streams.len()).any(|i| streams[i..].contains(&streams[i - 1]));
    if twice {
        return Err("a stream is named twice".to_owned());
    }
    if streams.contains(&Stream::Terminal) && streams.len() > 1 {
        return Err("a terminal is the only stream of its process".to_owned());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use Stream::{Stderr, Stdin, Stdout, Terminal};

    #[test]
    fn streams_are_each_once_and_a_terminal_alone() {
        assert!(check_streams(&[]).is_ok());
        assert!(check_streams(&[Stdin, Stdout, Stderr]).is_ok());
        assert!(check_streams(&[Terminal]).is_ok());
        assert!(check_streams(&[Stdout, Stdin, Stdout]).is_err());
        assert!(check_streams(&[Terminal, Stdin]).is_err());
    }
}
