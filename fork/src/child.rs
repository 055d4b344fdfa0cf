//! A child: one VM of its own, and the container in it.
//!
//! ```text
//!   Forked --confirm--> Confirmed --start--> Started --wait--> Ended
//!      any --a failure--> Poisoned: nothing works any more but dropping it
//! ```

use crate::agent::{Control, Remote};
use crate::error::Error;
use crate::template::death;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};
use vm_run_abi::protocol::{
    self, CONTAINER, ContainerSpec, ExitStatus, Hello, PORT, ProcessSpec, Request, Stream,
};
use vmm::{Event, EventSink, Timeline, Vm};

/// How long a child may take from its first instruction to having its identity,
/// and the agent to answer a request. It needs milliseconds; the rest is for a
/// host that is very busy, or emulated.
const TIMEOUT: Duration = Duration::from_secs(30);

/// What reaches a child's owner.
pub(crate) enum Message {
    Vm(Event),
    Agent(protocol::Event),
    /// The control connection has ended, and why.
    AgentGone(String),
}

/// Where a child's messages arrive.
pub(crate) struct Inbox {
    messages: Receiver<Message>,
    sender: Sender<Message>,
}

impl Inbox {
    pub(crate) fn new() -> (Self, EventSink) {
        let (sender, messages) = mpsc::channel();
        let to = sender.clone();
        // The inbox outlives the VM; after that nobody is told anything.
        let sink: EventSink = Arc::new(move |event| drop(to.send(Message::Vm(event))));
        (Self { messages, sender }, sink)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Forked,
    Confirmed,
    Started,
    Ended,
    Poisoned,
}

/// When a child reached each stage. What has not happened is `None`.
#[derive(Debug, Clone, Copy)]
pub struct Stages {
    /// The fork itself.
    pub fork: Timeline,
    /// The first vCPU entered the guest.
    pub entered: Option<Instant>,
    /// The guest had applied its identity, or a guest without Linux had answered.
    pub confirmed: Option<Instant>,
    /// The container's process had passed its exec.
    pub started: Option<Instant>,
    /// The container's exit was known.
    pub exited: Option<Instant>,
}

/// A forked VM. Dropping it ends the VM at once, whatever runs in it.
pub struct Child {
    // The VM drops before the control connection's reader is joined: with the VM
    // its vsock device closes the connection, which ends the reader.
    vm: Vm,
    control: Option<Control>,
    inbox: Inbox,
    generation: u64,
    phase: Phase,
    stages: Stages,
}

/// The container's first process, seen from the host.
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
    pub(crate) fn new(vm: Vm, inbox: Inbox, generation: u64) -> Self {
        let fork = vm.timeline();
        Self {
            vm,
            control: None,
            inbox,
            generation,
            phase: Phase::Forked,
            stages: Stages {
                fork,
                entered: None,
                confirmed: None,
                started: None,
                exited: None,
            },
        }
    }

    /// Waits until the guest has applied its identity.
    ///
    /// # Errors
    /// A guest that does not, or that applied another one: it is poisoned, and
    /// nothing is ever started in it.
    pub fn confirm(&mut self) -> Result<(), Error> {
        self.expect(Phase::Forked, "is not fresh from the fork")?;
        let result = self.await_identity();
        self.settle(result, Phase::Confirmed)
    }

    /// Starts the container. The child is confirmed first if that was not done.
    ///
    /// # Errors
    /// A process that cannot be started, with docker's reason for it.
    pub fn start(
        &mut self,
        container: ContainerSpec,
        process: ProcessSpec,
    ) -> Result<Process, Error> {
        if self.phase == Phase::Forked {
            self.confirm()?;
        }
        self.expect(Phase::Confirmed, "has a container already")?;
        let result = self.start_container(container, process);
        self.settle(result, Phase::Started)
    }

    /// Waits for the container to end. Its output streams are at their end soon
    /// after, if not before.
    ///
    /// # Errors
    /// A guest that dies instead, with its last console lines.
    pub fn wait(&mut self) -> Result<ExitStatus, Error> {
        self.expect(Phase::Started, "has no container to wait for")?;
        let result = loop {
            match self.receive(None) {
                Ok(protocol::Event::Exited {
                    process: CONTAINER,
                    status,
                }) => break Ok(status),
                Ok(_) => {}
                Err(error) => break Err(error),
            }
        };
        self.stages.exited = Some(Instant::now());
        self.settle(result, Phase::Ended)
    }

    /// Waits for the answer of a guest without Linux.
    ///
    /// # Errors
    /// A guest that does not answer.
    pub fn answer(&mut self) -> Result<u64, Error> {
        self.expect(Phase::Forked, "is not fresh from the fork")?;
        let result = loop {
            match self.inbox.messages.recv_timeout(TIMEOUT) {
                Ok(Message::Vm(Event::Entered(at))) => self.entered(at),
                Ok(Message::Vm(Event::Answer { value, at })) => {
                    self.stages.confirmed = Some(at);
                    break Ok(value);
                }
                Ok(Message::Vm(event)) => break Err(Error::Died(death(&event, &self.vm))),
                Ok(_) | Err(_) => break Err(Error::Died("it does not answer".into())),
            }
        };
        self.settle(result, Phase::Ended)
    }

    /// What a right guest without Linux answers in this child.
    pub fn expected_answer(&self) -> u64 {
        vmm::payload::micro::expected_answer(self.generation)
    }

    /// When it reached each stage.
    pub fn stages(&self) -> Stages {
        self.stages
    }

    fn expect(&self, phase: Phase, otherwise: &'static str) -> Result<(), Error> {
        match self.phase {
            now if now == phase => Ok(()),
            Phase::Poisoned => Err(Error::State("has failed and cannot be used any more")),
            _ => Err(Error::State(otherwise)),
        }
    }

    fn settle<T>(&mut self, result: Result<T, Error>, next: Phase) -> Result<T, Error> {
        self.phase = if result.is_ok() {
            next
        } else {
            Phase::Poisoned
        };
        result
    }

    fn entered(&mut self, at: Instant) {
        self.stages.entered = self
            .stages
            .entered
            .map_or(Some(at), |first| Some(first.min(at)));
    }

    fn await_identity(&mut self) -> Result<(), Error> {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.inbox.messages.recv_timeout(left) {
                Ok(Message::Vm(Event::Entered(at))) => self.entered(at),
                Ok(Message::Vm(Event::IdentityApplied { generation, at })) => {
                    if generation != self.generation {
                        return Err(Error::Identity(": it has another child's".into()));
                    }
                    self.stages.confirmed = Some(at);
                    return Ok(());
                }
                Ok(Message::Vm(event)) => {
                    let why = death(&event, &self.vm);
                    return Err(Error::Identity(format!(": {why}")));
                }
                Ok(_) => {}
                Err(_) => {
                    let tail = self.vm.console_tail(5).join(" | ");
                    let seconds = TIMEOUT.as_secs();
                    return Err(Error::Identity(format!(" in {seconds} s; console: {tail}")));
                }
            }
        }
    }

    fn start_container(
        &mut self,
        container: ContainerSpec,
        process: ProcessSpec,
    ) -> Result<Process, Error> {
        let connect = |hello: &Hello| {
            let stream = self
                .vm
                .connect(PORT)
                .map_err(|e| Error::Died(format!("cannot connect to the agent: {e}")))?;
            crate::agent::send(&stream, hello)?;
            Ok::<_, Error>(stream)
        };
        let stdio = |stream: Stream| {
            let wanted = process.streams.contains(&stream);
            let process = CONTAINER;
            wanted
                .then(|| connect(&Hello::Stdio { process, stream }))
                .transpose()
        };
        let (stdin, stdout) = (stdio(Stream::Stdin)?, stdio(Stream::Stdout)?);
        let (stderr, terminal) = (stdio(Stream::Stderr)?, stdio(Stream::Terminal)?);
        let control = Control::new(connect(&Hello::Control)?, self.inbox.sender.clone())?;
        control.start(&Request::StartContainer { container, process })?;
        let remote = control.remote(CONTAINER);
        self.control = Some(control);
        match self.receive(Some(TIMEOUT))? {
            protocol::Event::Started { process: CONTAINER } => {}
            protocol::Event::StartFailed {
                reason, message, ..
            } => return Err(Error::Start { reason, message }),
            _ => return Err(Error::Died("the agent speaks out of turn".into())),
        }
        self.stages.started = Some(Instant::now());
        Ok(Process {
            stdin,
            stdout,
            stderr,
            terminal,
            remote,
        })
    }

    /// The agent's next event, or why there will be none.
    fn receive(&mut self, timeout: Option<Duration>) -> Result<protocol::Event, Error> {
        let mut gone: Option<String> = None;
        loop {
            // An agent that has gone is followed, or explained, by its guest.
            let limit = match &gone {
                Some(_) => Some(Duration::from_secs(1)),
                None => timeout,
            };
            let message = match limit {
                Some(limit) => self.inbox.messages.recv_timeout(limit),
                None => self.inbox.messages.recv().map_err(RecvTimeoutError::from),
            };
            match message {
                Ok(Message::Agent(event)) => return Ok(event),
                Ok(Message::AgentGone(why)) => gone = Some(why),
                Ok(Message::Vm(Event::Entered(at))) => self.entered(at),
                Ok(Message::Vm(event)) => return Err(Error::Died(death(&event, &self.vm))),
                Err(_) => {
                    let why = gone.unwrap_or_else(|| "the agent does not answer".into());
                    return Err(Error::Died(why));
                }
            }
        }
    }
}

impl std::fmt::Debug for Child {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Child")
            .field("generation", &self.generation)
            .field("phase", &self.phase)
            .finish_non_exhaustive()
    }
}
