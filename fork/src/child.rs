//! A child: one VM of its own, and the container in it.
//!
//! ```text
//!   Forked --confirm--> Confirmed --start, attach--> Started --wait--> Ended
//!      any --a failure--> Poisoned: nothing works any more but dropping it
//! ```
//! A child has no thread: whoever calls it waits, for the VM's news and the
//! agent's events together.

mod hear;
mod identity;
mod live;

mod task;

pub use self::live::LiveFork;

use self::hear::Next;
use crate::agent::{Control, Remote};
use crate::disk::Slot;
use crate::error::Error;
use crate::machine::{Machine, News};
use crate::stages::{ForkPath, Stages};
use crate::stats::ChildStats;
use crate::template::{Kind, Template, TemplateInfo, Warm};
use std::collections::HashMap;
use std::fs::File;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vm_run_abi::VERSION;
use vm_run_abi::protocol::{
    CONTAINER, ContainerSpec, Event, ExitStatus, Hello, Hook, Hooks, PORT, ProcessId, ProcessSpec,
    Request, Stream, Writable,
};
use vmm::Moment;

/// How long a child may take from its first instruction to having its identity,
/// and the agent to answer a request. It needs milliseconds; the rest is for a
/// host that is very busy, or emulated.
const TIMEOUT: Duration = Duration::from_secs(30);

const POISONED: &str = "has failed and cannot be used any more";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Forked,
    Confirmed,
    Started,
    Ended,
    Poisoned,
}

/// A forked VM. Dropping it ends the VM at once, whatever runs in it.
pub struct Child {
    machine: Machine,
    vcpus: u8,
    control: Option<Control>,
    born: Born,
    phase: Phase,
    path: ForkPath,
    template: Arc<TemplateInfo>,
    stages: Stages,
    /// What was heard while something else was waited for.
    exits: HashMap<ProcessId, ExitStatus>,
    is_warm: bool,
    is_paused: bool,
    next_process: ProcessId,
    /// The container's streams, to be closed when it is frozen.
    streams: Vec<UnixStream>,
    /// What the container is: for a template of it.
    container: Warm,
}

/// What a child knows of itself from its fork.
#[derive(Debug)]
pub(crate) struct Born {
    pub(crate) generation: u64,
    pub(crate) hostname: String,
    /// Its root image: for a template of it.
    pub(crate) root: Option<File>,
    /// Whether its VM stops, or has stopped, at the identity.
    pub(crate) is_held: bool,
    /// A template of it would have to have them too.
    pub(crate) has_volumes: bool,
    /// Where its writable layer is, if that is on a disk.
    pub(crate) slot: Option<Slot>,
    /// The files of that, the lowest first.
    pub(crate) layers: Vec<File>,
    /// Whether there may be one more, which is written.
    pub(crate) is_disk_unknown: bool,
    /// Whether it has a tap.
    pub(crate) has_network: bool,
}

/// A process in a child, seen from the host.
#[derive(Debug)]
pub struct Process {
    /// To its stdin: shutting down the writing half is end-of-file.
    pub stdin: Option<UnixStream>,
    /// From its stdout: at its end when all writers in the guest are gone.
    pub stdout: Option<UnixStream>,
    /// From its stderr, likewise.
    pub stderr: Option<UnixStream>,
    /// Its terminal, both ways.
    pub terminal: Option<UnixStream>,
    /// For signals and window sizes, from any thread.
    pub remote: Remote,
}

impl Child {
    pub(crate) fn new(
        machine: Machine,
        template: Arc<TemplateInfo>,
        vcpus: u8,
        path: ForkPath,
        born: Born,
    ) -> Self {
        let fork = machine.timeline();
        let container = template.warm.clone().unwrap_or_default();
        Self {
            machine,
            vcpus,
            control: None,
            born,
            phase: Phase::Forked,
            path,
            template,
            stages: Stages {
                fork,
                entered: None,
                confirmed: None,
                started: None,
                exited: None,
            },
            exits: HashMap::new(),
            is_warm: false,
            is_paused: false,
            next_process: CONTAINER + 1,
            streams: Vec::new(),
            container,
        }
    }

    /// Lets a child go on that was to be held ([`ForkSpec::hold`]
    /// (crate::ForkSpec::hold)); it is confirmed first if that was not done.
    /// Starting or attaching does this by itself.
    ///
    /// # Errors
    /// As [`Self::confirm`].
    pub fn release(&mut self) -> Result<(), Error> {
        if self.phase == Phase::Forked {
            self.confirm()?;
        }
        if std::mem::take(&mut self.born.is_held) {
            let released = self.machine.resume();
            let phase = self.phase;
            return self.settle(released, phase);
        }
        Ok(())
    }

    /// Starts the container of a bare child. The child is confirmed first if that
    /// was not done.
    ///
    /// # Errors
    /// A process that cannot be started, with docker's reason for it. A warm
    /// container on a disk: the child can still be given another.
    pub fn start(
        &mut self,
        mut container: ContainerSpec,
        process: ProcessSpec,
    ) -> Result<Process, Error> {
        if container.warm && container.writable == Writable::Disk {
            return Err(Error::Request(
                "a warm container cannot have its writable layer on a disk, which its children would not have: keep it in guest memory",
            ));
        }
        if container.warm && self.born.has_volumes {
            return Err(Error::Request(
                "a warm container cannot have volumes, which its children would not have",
            ));
        }
        if !container.warm && container.hooks != Hooks::default() {
            return Err(Error::Request(
                "only a warm container has hooks: nothing else is frozen",
            ));
        }
        self.expect_fresh(Kind::Bare, "has a container inside: attach to it")?;
        let streams = process.streams.clone();
        let warm = container.warm;
        self.container = Warm {
            image: String::new(),
            command: process.args.clone(),
            env: process.env.clone(),
            cwd: process.cwd.clone(),
            user: process.user.clone(),
            streams: process.streams.clone(),
            has_network: self.born.has_network,
            hooks: container.hooks.clone(),
        };
        self.complete(&mut container);
        let request = Request::StartContainer { container, process };
        // Started and Exited; and Warm, where it may come.
        let events = 2 + u32::from(warm);
        let result = self.begin(CONTAINER, &streams, &request, events);
        self.settle(result, Phase::Started)
    }

    /// Says what the fork has decided of the container's surroundings.
    fn complete(&self, container: &mut ContainerSpec) {
        container.mapped_root = self.machine.root_image().is_some();
        container.mounted_disk = self.born.slot == Some(Slot::Mounted);
        container.network = self.born.has_network;
    }

    /// Ties streams to the container that a child was born with, of a warm template or of
    /// a child that ran, once the child's hook has done its work.
    ///
    /// # Errors
    /// A child of a bare template, one whose hook has failed, or one whose agent does not
    /// answer.
    pub fn attach(&mut self, streams: &[Stream]) -> Result<Process, Error> {
        self.expect_fresh(Kind::Warm, "has no container to attach to: start one")?;
        let request = Request::Attach {
            streams: streams.to_vec(),
        };
        let result = self.begin(CONTAINER, streams, &request, 2);
        self.settle(result, Phase::Started)
    }

    /// Starts one more process in the container.
    ///
    /// # Errors
    /// A process that cannot be started, with docker's reason for it; the
    /// container runs on.
    pub fn exec(&mut self, process: ProcessSpec) -> Result<Process, Error> {
        self.expect(Phase::Started, "has no container to run it in")?;
        let id = self.next_process;
        self.next_process += 1;
        let streams = process.streams.clone();
        match self.begin(id, &streams, &Request::Exec { id, process }, 2) {
            Err(error @ (Error::Start { .. } | Error::TooLong { .. })) => Err(error),
            other => self.settle(other, Phase::Started),
        }
    }

    /// Waits for the container to end. Its output streams are at their end soon
    /// after, if not before.
    ///
    /// # Errors
    /// A guest that dies instead, with its last console lines.
    pub fn wait(&mut self) -> Result<ExitStatus, Error> {
        let status = self.wait_for(CONTAINER)?;
        self.stages.exited = Some(Moment::now());
        self.phase = Phase::Ended;
        Ok(status)
    }

    /// Waits for one process of the container to end; see [`Remote::process`].
    /// What ended meanwhile is remembered.
    ///
    /// # Errors
    /// As [`Self::wait`].
    pub fn wait_for(&mut self, process: ProcessId) -> Result<ExitStatus, Error> {
        self.expect(Phase::Started, "has no container to wait for")?;
        loop {
            if let Some(status) = self.exits.remove(&process) {
                return Ok(status);
            }
            let heard = self.hear(None);
            self.settle(heard, Phase::Started)?;
        }
    }

    /// Waits until the container says that it is warm.
    ///
    /// # Errors
    /// A container that ends instead, or does not say so in time.
    pub fn await_warm(&mut self, timeout: Duration) -> Result<(), Error> {
        self.expect(Phase::Started, "has no container that could be warm")?;
        let deadline = Instant::now() + timeout;
        while !self.is_warm {
            if let Some(status) = self.exits.get(&CONTAINER) {
                let status = status.code();
                return Err(Error::NotWarm(format!("it ended with status {status}")));
            }
            if Instant::now() >= deadline {
                let seconds = timeout.as_secs();
                return Err(Error::NotWarm(format!("it did not say so in {seconds} s")));
            }
            let heard = self.hear(Some(deadline));
            self.settle(heard, Phase::Started)?;
        }
        Ok(())
    }

    /// Has the hook of a child whose container is warm do its work, freezes the child, and
    /// makes a template of it, with `image` as what people call its image. Its streams are
    /// closed; each child of the template has them anew.
    ///
    /// # Errors
    /// A container that cannot be frozen, or what the monitor says. The child is
    /// gone in any case.
    pub fn freeze(mut self, image: &str) -> Result<Template, Error> {
        self.expect(Phase::Started, "has no container to freeze")?;
        if self.born.has_volumes {
            return Err(Error::Request(
                "a child with volumes cannot be frozen: its children would not have them",
            ));
        }
        let Some(control) = &mut self.control else {
            return Err(Error::State("has no agent to freeze it"));
        };
        control.request(&Request::Freeze, 1)?;
        match self.answered()? {
            Event::Frozen => {}
            Event::FreezeFailed { message } => return Err(Error::NotWarm(message)),
            _ => return Err(out_of_turn()),
        }
        for stream in self.streams.drain(..) {
            // Other handles to it are closed by this too. One that the guest has
            // closed already is no error.
            stream.shutdown(Shutdown::Both).ok();
        }
        self.control = None;
        self.await_fork_point()?;
        let warm = Warm {
            image: image.into(),
            ..self.container
        };
        let (memory, state) = self.machine.freeze()?;
        Ok(Template::frozen(
            &self.template,
            warm,
            self.born.root,
            memory,
            state,
        ))
    }

    /// Waits for the answer of a guest without Linux. It stands still when it has given
    /// one, until [`Self::unpause`].
    ///
    /// # Errors
    /// A guest that does not answer.
    pub fn answer(&mut self) -> Result<u64, Error> {
        if self.template.kind != Kind::Micro || self.phase == Phase::Poisoned {
            return Err(Error::State("has nothing to answer"));
        }
        let deadline = Instant::now() + TIMEOUT;
        let result = loop {
            match self.next(Some(deadline), None) {
                Ok(Next::News(News::Answer { value, entered, at })) => {
                    self.stages.entered = Some(entered);
                    self.stages.confirmed = Some(at);
                    break Ok(value);
                }
                Ok(Next::News(News::Dead(why))) => break Err(Error::Died(why)),
                Ok(Next::News(_)) => {}
                Ok(_) => break Err(Error::Died("it does not answer".into())),
                Err(error) => break Err(error),
            }
        };
        self.settle(result, Phase::Ended)
    }

    /// What a right guest without Linux answers in this child.
    pub fn expected_answer(&self) -> u64 {
        vmm::payload::micro::expected_answer(self.born.generation)
    }

    /// Kills the container: [`Self::wait`] tells when it has ended.
    ///
    /// # Errors
    /// A child without a container, or one that is gone.
    pub fn kill(&self) -> Result<(), Error> {
        const SIGKILL: i32 = 9;
        match &self.control {
            Some(control) => control.remote(CONTAINER).signal(SIGKILL),
            None => Err(Error::State("has no container to kill")),
        }
    }

    /// Stops its vCPUs, wherever they are, until [`Self::unpause`]. Whoever asks the
    /// agent for something meanwhile waits in vain.
    ///
    /// # Errors
    /// A vCPU that cannot stop.
    pub fn pause(&mut self) -> Result<(), Error> {
        self.machine.pause()?;
        self.is_paused = true;
        Ok(())
    }

    /// Lets them go on. The guest's clocks have gone on meanwhile.
    ///
    /// # Errors
    /// A child that is gone.
    pub fn unpause(&mut self) -> Result<(), Error> {
        self.machine.resume()?;
        self.is_paused = false;
        Ok(())
    }

    /// The files of its writable layer, the lowest first; none if that is not on a disk.
    /// Each fork adds one, and a disk has [`DISK_LAYERS_MAX`](crate::DISK_LAYERS_MAX):
    /// see [`Self::replace_layers`].
    pub fn layers(&self) -> &[File] {
        &self.born.layers
    }

    /// Has one file in the place of the `count` layers above the lowest, of which
    /// [`merge_overlays`](crate::merge_overlays) has made it, while they were not written any
    /// more. The child notices nothing. `merged` is the child's from here on: no lock of
    /// somebody else's may be on it.
    ///
    /// # Errors
    /// Fewer layers, not counting the one that is written, or a file that is none.
    pub fn replace_layers(&mut self, count: usize, merged: File) -> Result<(), Error> {
        let own = merged.try_clone().map_err(Error::Process)?;
        self.machine.replace_layers(count, merged)?;
        self.born.layers.splice(1..=count, [own]);
        Ok(())
    }

    /// What it costs its host in memory, now.
    ///
    /// # Errors
    /// What /proc says.
    pub fn stats(&self) -> Result<ChildStats, Error> {
        self.machine.stats()
    }

    /// Where its memory lies in this process, (address, length) in bytes: of a child in a
    /// worker, nowhere. For measuring.
    pub fn mappings(&self) -> Vec<(u64, u64)> {
        self.machine.mappings()
    }

    /// Whether a pool had its VM.
    pub fn path(&self) -> ForkPath {
        self.path
    }

    /// Its generation, once it has confirmed that its identity holds: that it has
    /// reseeded its kernel's random numbers, set the clock, and taken its hostname.
    pub fn generation(&self) -> Option<u64> {
        let is_confirmed = !matches!(self.phase, Phase::Forked | Phase::Poisoned);
        is_confirmed.then_some(self.born.generation)
    }

    /// When it reached each stage.
    pub fn stages(&self) -> Stages {
        self.stages
    }

    /// Ends the VM, and waits until nothing is left of it.
    pub fn end(self) {
        self.machine.end();
    }

    /// How long the agent may take to answer: it may have a hook to see through first.
    fn patience(&self) -> Duration {
        let hooks = &self.container.hooks;
        let mut both = [&hooks.pre_freeze, &hooks.post_fork].into_iter().flatten();
        if both.any(|hook| matches!(hook, Hook::Command(_))) {
            return TIMEOUT + Duration::from_millis(hooks.limit_ms.into());
        }
        TIMEOUT
    }

    fn expect(&self, phase: Phase, otherwise: &'static str) -> Result<(), Error> {
        match self.phase {
            now if now == phase => Ok(()),
            Phase::Poisoned => Err(Error::State(POISONED)),
            _ => Err(Error::State(otherwise)),
        }
    }

    fn expect_fresh(&mut self, kind: Kind, otherwise: &'static str) -> Result<(), Error> {
        if self.template.kind != kind {
            return Err(Error::State(otherwise));
        }
        self.release()?;
        self.expect(Phase::Confirmed, "has a container already")
    }

    fn settle<T>(&mut self, result: Result<T, Error>, next: Phase) -> Result<T, Error> {
        self.phase = if result.is_ok() {
            next
        } else {
            Phase::Poisoned
        };
        result
    }

    fn await_fork_point(&mut self) -> Result<(), Error> {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            match self.next(Some(deadline), None)? {
                Next::News(News::ForkPoint { version }) if version == u64::from(VERSION) => {
                    return Ok(());
                }
                Next::News(News::ForkPoint { version }) => {
                    return Err(Error::Version { guest: version });
                }
                Next::News(News::Dead(why)) => return Err(Error::Died(why)),
                Next::News(_) => {}
                Next::Timeout => {
                    return Err(Error::Died("it did not reach its fork point".into()));
                }
                Next::Heard(_) | Next::Woken => return Err(out_of_turn()),
            }
        }
    }

    /// Connects streams, asks for a process, and waits until it has started.
    fn begin(
        &mut self,
        id: ProcessId,
        streams: &[Stream],
        request: &Request,
        events: u32,
    ) -> Result<Process, Error> {
        let mut connect = |wanted: Stream| -> Result<Option<UnixStream>, Error> {
            if !streams.contains(&wanted) {
                return Ok(None);
            }
            let stream = self.machine.connect(PORT)?;
            let (process, stream_of) = (id, wanted);
            crate::agent::send(
                &stream,
                &Hello::Stdio {
                    process,
                    stream: stream_of,
                },
            )?;
            if id == CONTAINER {
                let handle = stream.try_clone();
                self.streams
                    .push(handle.map_err(|e| Error::Died(format!("no descriptor: {e}")))?);
            }
            Ok(Some(stream))
        };
        let (stdin, stdout) = (connect(Stream::Stdin)?, connect(Stream::Stdout)?);
        let (stderr, terminal) = (connect(Stream::Stderr)?, connect(Stream::Terminal)?);
        let control = match &mut self.control {
            Some(control) => control,
            None => {
                let stream = self.machine.connect(PORT)?;
                crate::agent::send(&stream, &Hello::Control)?;
                self.control.insert(Control::new(stream)?)
            }
        };
        control.request(request, events)?;
        let remote = control.remote(id);
        match self.answered()? {
            Event::Started { process } if process == id => {}
            Event::StartFailed {
                process,
                reason,
                message,
            } if process == id => return Err(Error::Start { reason, message }),
            _ => return Err(out_of_turn()),
        }
        if id == CONTAINER {
            self.stages.started = Some(Moment::now());
        }
        Ok(Process {
            stdin,
            stdout,
            stderr,
            terminal,
            remote,
        })
    }
}

fn out_of_turn() -> Error {
    Error::Died("the agent speaks out of turn".into())
}

impl std::fmt::Debug for Child {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Child")
            .field("generation", &self.born.generation)
            .field("phase", &self.phase)
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}
