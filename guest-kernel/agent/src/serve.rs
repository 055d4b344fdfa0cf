//! The event loop: one thread, everything that can wait is in one epoll.

mod freeze;
mod hooks;
mod live;

use crate::container::{Container, Start};
use crate::control::Control;
use crate::drawn::Drawn;
use crate::frame::{Broken, Reader};
use crate::identity::LiveFork;
use crate::poll::{Poll, Token, meaning};
use crate::prepared::Prepared;
use crate::process::Happened;
use crate::spawn::{Resources, resize};
use crate::streams::{End, Link, Turn};
use crate::sys;
use crate::warm::Warm;
use freeze::{Attachment, Stage};
use hooks::Hooking;
use rustix::event::{Timespec, epoll};
use rustix::fd::{AsFd, OwnedFd};
use rustix::io::Errno;
use rustix::process::{Pid, WaitOptions, WaitStatus};
use std::collections::BTreeMap;
use std::io;
use std::time::{Duration, Instant};
use vm_run_abi::protocol::{CONTAINER, Event, HOOK, Hello, ProcessId, Request, Stream, WindowSize};

/// The longest [`Hello`], in bytes; it holds two small enums and a number.
const MAX_HELLO: usize = 16;

/// How many connections may be waiting for their [`Hello`].
const MAX_GREETING: usize = 16;

/// How many streams may be waiting for their process.
const MAX_ARRIVED: usize = 1024;

/// How long the container may take to die when the host has gone.
const LAST_PATIENCE: Duration = Duration::from_secs(5);

/// A connection that has not said yet what it is for.
#[derive(Debug)]
struct Greeting {
    socket: OwnedFd,
    reader: Reader,
}

/// A stream that has come and that no process has yet.
#[derive(Debug)]
struct Arrived {
    process: ProcessId,
    stream: Stream,
    socket: OwnedFd,
}

/// A stream of a process that is tied to the host.
#[derive(Debug)]
struct Tied {
    process: ProcessId,
    stream: Stream,
    link: Link,
}

/// Why the loop has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Done {
    /// The host has gone, and so has the container.
    Over,
    /// The container is frozen and every connection closed: the next is the fork
    /// point, then [`Server::become_child`].
    Frozen,
}

/// The agent after the fork point.
#[derive(Debug)]
pub struct Server {
    poll: Poll,
    listener: OwnedFd,
    signals: OwnedFd,
    resources: Resources,
    /// For tokens.
    next_number: u64,
    greetings: BTreeMap<u64, Greeting>,
    control: Option<Control>,
    arrived: Vec<Arrived>,
    streams: BTreeMap<u64, Tied>,
    /// Streams that stopped only to let others have their turn.
    unfinished: Vec<u64>,
    container: Container,
    /// Whether it is on the guest's own network.
    is_connected: bool,
    warm: Option<Warm>,
    hooking: Hooking,
    /// What the kernel has drawn for threads that are frozen.
    drawn: Vec<Drawn>,
    stage: Stage,
    /// Who this guest is, and how it learns that it is somebody else.
    generation: u64,
    live_fork: Option<LiveFork>,
    attachment: Attachment,
    /// Streams of the first process that are tied to no host.
    loose: Vec<(Stream, End)>,
    /// How the first process has ended.
    ended: Option<Event>,
    /// When the host has gone: until when the container may take to end.
    deadline: Option<Instant>,
}

impl Server {
    /// Makes the loop ready: whatever it needs before the first connection is
    /// open when this returns. `signals` is [`sys::child_signals`].
    /// Without `live_fork` this guest cannot be forked while it runs.
    pub fn new(
        listener: OwnedFd,
        signals: OwnedFd,
        resources: Resources,
        prepared: Prepared,
        live_fork: Option<LiveFork>,
    ) -> io::Result<Self> {
        let poll = Poll::new()?;
        if let Some(live_fork) = &live_fork {
            live_fork.watch(&poll)?;
        }
        poll.watch_for_input(&listener, Token::Listener)?;
        poll.watch_for_input(&signals, Token::Signals)?;
        Ok(Self {
            poll,
            listener,
            signals,
            resources,
            next_number: 0,
            greetings: BTreeMap::new(),
            control: None,
            arrived: Vec::new(),
            streams: BTreeMap::new(),
            unfinished: Vec::new(),
            container: Container::new(prepared),
            is_connected: false,
            warm: None,
            hooking: Hooking::default(),
            drawn: Vec::new(),
            stage: Stage::Serving,
            generation: 0,
            live_fork,
            attachment: Attachment::Tied,
            loose: Vec::new(),
            ended: None,
            deadline: None,
        })
    }

    /// Serves until the host closes the control connection and the container has
    /// ended, or until both are frozen.
    pub fn run(&mut self) -> io::Result<Done> {
        let mut events = Vec::with_capacity(32);
        loop {
            self.poll.wait(&mut events, self.timeout())?;
            if self.is_reborn() {
                self.go_on_as_another()?;
            }
            for (token, flags) in events.iter().filter_map(meaning) {
                self.dispatch(token, flags)?;
            }
            for number in std::mem::take(&mut self.unfinished) {
                self.turn(number);
            }
            self.hurry_hook();
            self.go_on_freezing()?;
            if self.is_at_fork_point() {
                return Ok(Done::Frozen);
            }
            let expired = self.deadline.is_some_and(|at| Instant::now() >= at);
            if expired || (self.deadline.is_some() && !self.container.is_alive()) {
                return Ok(Done::Over);
            }
        }
    }

    fn timeout(&self) -> Option<Timespec> {
        let hook = self.hooking.until();
        let until = self.stage.until().into_iter().chain(hook);
        let next = until.chain(self.deadline).min();
        let wait = match (self.unfinished.is_empty(), next) {
            (false, _) => Duration::ZERO,
            (true, None) => return None,
            (true, Some(at)) => at.saturating_duration_since(Instant::now()),
        };
        Some(Timespec {
            tv_sec: wait.as_secs() as i64,
            tv_nsec: wait.subsec_nanos().into(),
        })
    }

    fn dispatch(&mut self, token: Token, flags: epoll::EventFlags) -> io::Result<()> {
        match token {
            Token::Listener => self.accept(),
            Token::Signals => self.reap(),
            Token::Control => {
                self.read_control()?;
                self.flush_control();
                Ok(())
            }
            // They are looked at after every event.
            Token::Freezer | Token::Forked => Ok(()),
            Token::WarmListener => match &mut self.warm {
                Some(warm) => warm.accept(&self.poll).map(drop),
                None => Ok(()),
            },
            Token::WarmClient(number) => {
                if self.warm.as_mut().is_some_and(|warm| warm.read(number)) {
                    self.send(&Event::Warm);
                }
                Ok(())
            }
            Token::Reports(id) => self.read_reports(id),
            Token::Greeting(number) => self.greet(number),
            Token::Stream(number) => {
                if flags.intersects(epoll::EventFlags::ERR)
                    && let Some(tied) = self.streams.get_mut(&number)
                {
                    tied.link.failed();
                }
                self.turn(number);
                Ok(())
            }
            Token::Leaving(number) => {
                self.stage.left(number, flags);
                Ok(())
            }
            Token::Hook(number) => self.hear_hook(number),
        }
    }

    fn new_number(&mut self) -> u64 {
        self.next_number += 1;
        self.next_number
    }

    /// Takes one connection; the listener is level-triggered and calls again.
    fn accept(&mut self) -> io::Result<()> {
        use io::ErrorKind::{ConnectionAborted, Interrupted, WouldBlock};
        let socket = match sys::accept_from_host(self.listener.as_fd()) {
            Ok(Some(socket)) => socket,
            Ok(None) => return Ok(()),
            Err(e) if matches!(e.kind(), WouldBlock | Interrupted | ConnectionAborted) => {
                return Ok(());
            }
            Err(e) => return Err(e),
        };
        if self.greetings.len() >= MAX_GREETING {
            return Ok(());
        }
        let number = self.new_number();
        self.poll.watch_edges(&socket, Token::Greeting(number))?;
        let reader = Reader::new(MAX_HELLO);
        self.greetings.insert(number, Greeting { socket, reader });
        self.greet(number)
    }

    /// Reads what a connection is for, and puts it there. A connection that
    /// nobody expects is closed.
    fn greet(&mut self, number: u64) -> io::Result<()> {
        let Some(greeting) = self.greetings.get_mut(&number) else {
            return Ok(());
        };
        let hello = match greeting.reader.next(&greeting.socket) {
            Ok(None) => return Ok(()),
            Ok(Some(hello)) => Some(hello),
            Err(_) => None,
        };
        let Some(Greeting { socket, .. }) = self.greetings.remove(&number) else {
            return Ok(());
        };
        self.poll.remove(&socket)?;
        match hello {
            Some(Hello::Control) if self.expects_control() => {
                let control = Control::new(socket);
                self.poll.watch_edges(control.socket(), Token::Control)?;
                self.control = Some(control);
                self.read_control()
            }
            Some(Hello::Stdio { process, stream }) if self.expects(process, stream) => {
                self.arrived.push(Arrived {
                    process,
                    stream,
                    socket,
                });
                self.streams_have_come(process)
            }
            _ => Ok(()),
        }
    }

    fn expects_control(&self) -> bool {
        self.control.is_none() && self.deadline.is_none() && !self.stage.is_leaving()
    }

    fn expects(&self, process: ProcessId, stream: Stream) -> bool {
        let is_new = |a: &Arrived| (a.process, a.stream) != (process, stream);
        let to_attach = process == CONTAINER && self.attachment != Attachment::Tied;
        !self.stage.is_leaving()
            && (to_attach || self.container.awaits(process))
            && self.arrived.len() < MAX_ARRIVED
            && self.arrived.iter().all(is_new)
    }

    fn read_control(&mut self) -> io::Result<()> {
        while let Some(control) = &mut self.control {
            match control.next_request() {
                Ok(None) => break,
                Ok(Some(request)) => {
                    if self.obey(request)?.is_err() {
                        self.host_has_gone();
                    }
                }
                Err(_) => self.host_has_gone(),
            }
        }
        Ok(())
    }

    /// Does what the host asks. The outer error is the end of the guest, the
    /// inner one is nonsense.
    fn obey(&mut self, request: Request) -> io::Result<Result<(), Broken>> {
        let sense = match request {
            _ if self.stage.is_leaving() => false,
            Request::StartContainer { container, process } => {
                let hooking = container.warm.then(|| Hooking::new(&container, &process));
                self.is_connected = container.network;
                let sense = self.container.ask(container, Some(process));
                if sense && let Some(hooking) = hooking {
                    self.hooking = hooking;
                }
                self.streams_have_come(CONTAINER)?;
                sense
            }
            Request::OpenContainer { container } => {
                let sense = self.container.ask(container, None);
                self.streams_have_come(CONTAINER)?;
                sense
            }
            Request::Task { id, task, streams } => {
                let sense = self.container.ask_task(id, task, streams);
                self.streams_have_come(id)?;
                sense
            }
            Request::Exec { id, process } => {
                let sense = self.container.ask_exec(id, process);
                self.streams_have_come(id)?;
                sense
            }
            Request::Freeze => self.freeze()?,
            Request::Attach { streams } => self.attach(streams)?,
            Request::Signal { process, signal } => {
                // To one that there is not: nothing.
                if let Some(process) = self.container.get_mut(process) {
                    process.signal(signal);
                }
                true
            }
            Request::Resize { process, size } => {
                self.resize(process, size);
                true
            }
        };
        Ok(if sense {
            Ok(())
        } else {
            Err(Broken::Undecodable)
        })
    }

    fn resize(&mut self, id: ProcessId, size: WindowSize) {
        if let Some(process) = self.container.get_mut(id) {
            process.resize(size);
        }
        let tied = self.streams.values().filter(|tied| tied.process == id);
        let loose = self.loose.iter().filter(|_| id == CONTAINER);
        let ends = tied
            .map(|tied| &tied.link.end)
            .chain(loose.map(|(_, end)| end));
        for end in ends.filter(|end| end.is_terminal()) {
            // A terminal that has hung up has no size to set.
            resize(end.guest(), size).ok();
        }
    }

    /// Without its host the guest has no purpose: the container is killed, and
    /// the loop ends when it is gone.
    fn host_has_gone(&mut self) {
        self.control = None;
        if self.stage.is_leaving() || self.is_reborn() {
            return;
        }
        self.deadline = Some(Instant::now() + LAST_PATIENCE);
        if let Some(first) = self.container.get_mut(CONTAINER) {
            first.signal(libc::SIGKILL);
        }
    }

    /// Goes on with the process that has waited for its streams.
    fn streams_have_come(&mut self, id: ProcessId) -> io::Result<()> {
        if id == CONTAINER && self.attachment != Attachment::Tied {
            return self.attach_if_complete();
        }
        let of_process = self.arrived.iter().filter(|a| a.process == id);
        let arrived: Vec<Stream> = of_process.map(|a| a.stream).collect();
        match self.container.start(id, &self.resources, &arrived)? {
            Start::Waiting => {}
            Start::Begun(pipes) => {
                if let Some(reports) = self.container.get_mut(id).and_then(|p| p.reports()) {
                    self.poll.watch_for_input(reports, Token::Reports(id))?;
                }
                for (stream, pipe) in pipes {
                    let end = match stream {
                        Stream::Stdin => End::input(pipe),
                        Stream::Stdout | Stream::Stderr | Stream::Terminal => End::output(pipe),
                    };
                    self.tie(id, stream, end)?;
                }
                // Its terminal's connection waits for the terminal.
                self.arrived
                    .retain(|a| a.process != id || a.stream == Stream::Terminal);
            }
            Start::Failed(event) => self.tell(id, &event),
        }
        Ok(())
    }

    /// Ties an end in the guest to the connection of the host that has come for
    /// it. Without one the end is closed.
    fn tie(&mut self, process: ProcessId, stream: Stream, end: End) -> io::Result<()> {
        let wanted = |a: &Arrived| (a.process, a.stream) == (process, stream);
        let Some(at) = self.arrived.iter().position(wanted) else {
            return Ok(());
        };
        let link = Link::new(end, self.arrived.swap_remove(at).socket);
        let number = self.new_number();
        for fd in link.descriptors() {
            self.poll.watch_edges(fd, Token::Stream(number))?;
        }
        self.streams.insert(
            number,
            Tied {
                process,
                stream,
                link,
            },
        );
        self.turn(number);
        Ok(())
    }

    fn turn(&mut self, number: u64) {
        let Some(tied) = self.streams.get_mut(&number) else {
            return;
        };
        match tied.link.turn() {
            Turn::Waiting => {}
            Turn::More => self.come_back(number),
            // It was another's: see Self::go_on_as_another.
            Turn::Over if self.is_reborn() => {}
            // Closing the descriptors takes them out of the epoll, once no new
            // process has them either.
            Turn::Over => drop(self.streams.remove(&number)),
        }
    }

    fn come_back(&mut self, number: u64) {
        if !self.unfinished.contains(&number) {
            self.unfinished.push(number);
        }
    }

    fn read_reports(&mut self, id: ProcessId) -> io::Result<()> {
        let Some(process) = self.container.get_mut(id) else {
            return Ok(());
        };
        for happened in process.read_reports()? {
            match happened {
                Happened::Terminal(master, slave) => {
                    self.tie(id, Stream::Terminal, End::terminal(master, slave))?;
                }
                Happened::Root(layers, names) => self.container.has_root(layers, names),
                Happened::Warm(listener) => {
                    self.warm = Some(Warm::new(listener, &self.poll)?);
                }
                // That it runs: the host knows nothing of it.
                Happened::Event(_) if id == HOOK => {}
                Happened::Event(event) => self.tell(id, &event),
            }
        }
        Ok(())
    }

    /// Reaps every process that has ended: the container's, and orphans of the
    /// guest.
    fn reap(&mut self) -> io::Result<()> {
        let mut pending = [0; 128];
        while matches!(rustix::io::read(&self.signals, &mut pending), Ok(n) if n > 0) {}
        loop {
            match rustix::process::wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => self.reaped(pid, status)?,
                Ok(None) | Err(Errno::CHILD) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    fn reaped(&mut self, pid: Pid, status: WaitStatus) -> io::Result<()> {
        let Some(id) = self.container.find(pid) else {
            return Ok(());
        };
        self.read_reports(id)?;
        // With the first process of a PID namespace the kernel has ended all
        // others of it, and waits for us to reap them before: what is in the
        // pipes now is all that will ever be.
        let concerned = |tied: &Tied| id == CONTAINER || tied.process == id;
        let mut numbers = Vec::new();
        for (number, tied) in self.streams.iter_mut().filter(|(_, tied)| concerned(tied)) {
            tied.link.end.process_ended();
            numbers.push(*number);
        }
        for number in numbers {
            self.turn(number);
        }
        if id == CONTAINER {
            self.first_has_ended();
            self.container.leave_root();
            if self.container.is_kept() {
                // Whoever hears of the end may cut the power.
                rustix::fs::sync();
            }
        }
        match self.container.take(id).map(|process| process.ended(status)) {
            Some(event) if id == HOOK => self.hook_has_ended(&event)?,
            Some(event) => self.tell(id, &event),
            None => {}
        }
        Ok(())
    }

    /// Tells the host what has become of a process.
    fn tell(&mut self, id: ProcessId, event: &Event) {
        if matches!(event, Event::StartFailed { .. }) {
            self.arrived.retain(|a| a.process != id);
            self.streams.retain(|_, tied| tied.process != id);
        }
        if id == CONTAINER && matches!(event, Event::Exited { .. }) {
            self.ended = Some(event.clone());
        }
        match (&mut self.attachment, event) {
            // The host has not asked yet.
            (
                Attachment::Loose { ended } | Attachment::Asked { ended, .. },
                Event::Exited { .. },
            ) if id == CONTAINER => {
                *ended = Some(event.clone());
            }
            _ => self.send(event),
        }
    }

    fn send(&mut self, event: &Event) {
        if let Some(control) = &mut self.control
            && control.send(event).is_err()
        {
            self.host_has_gone();
        }
    }

    fn flush_control(&mut self) {
        if let Some(control) = &mut self.control
            && control.flush().is_err()
        {
            self.host_has_gone();
        }
    }
}
