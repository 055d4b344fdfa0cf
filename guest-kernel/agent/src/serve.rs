//! The event loop: one thread, everything that can wait is in one epoll.

use crate::container::{Container, Happened};
use crate::frame::{self, Broken, Reader};
use crate::spawn::Resources;
use crate::streams::{Link, Turn};
use crate::sys;
use rustix::buffer::spare_capacity;
use rustix::event::{Timespec, epoll};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use rustix::process::{Pid, WaitOptions, WaitStatus};
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::time::{Duration, Instant};
use vm_run_abi::protocol::{CONTAINER, Event, Hello, MAX_FRAME, Request, Stream};

/// The longest [`Hello`], in bytes; it holds two small enums and a number.
const MAX_HELLO: usize = 16;

/// How many connections may be waiting for their [`Hello`].
const MAX_GREETING: usize = 16;

/// How many streams a process can have.
const MAX_STREAMS: usize = 3;

/// How long the container may take to die when the host has gone.
const LAST_PATIENCE: Duration = Duration::from_secs(5);

/// What an epoll event is about.
type Token = u64;
const LISTENER: Token = 0;
const SIGNALS: Token = 1;
const CONTROL: Token = 2;
const REPORTS: Token = 3;
/// Greetings and links count up from here; no number is used twice.
const FIRST_FREE: Token = 16;

/// A connection that has not said yet what it is for.
#[derive(Debug)]
struct Greeting {
    socket: OwnedFd,
    reader: Reader,
}

/// The host's control connection.
#[derive(Debug)]
struct Control {
    socket: OwnedFd,
    reader: Reader,
    /// Encoded events that the socket has not taken yet.
    unsent: VecDeque<u8>,
}

/// The agent after the fork point.
#[derive(Debug)]
pub struct Server {
    epoll: OwnedFd,
    listener: OwnedFd,
    signals: OwnedFd,
    resources: Resources,
    next_token: Token,
    greetings: BTreeMap<Token, Greeting>,
    control: Option<Control>,
    /// Streams that have come and whose process has not started.
    arrived: Vec<(Stream, OwnedFd)>,
    links: BTreeMap<Token, Link>,
    /// Links that stopped only to let others have their turn.
    unfinished: Vec<Token>,
    container: Container,
    /// When the host has gone: until when the container may take to end.
    deadline: Option<Instant>,
}

impl Server {
    /// Makes the loop ready: whatever it needs before the first connection is
    /// open when this returns. `signals` is [`sys::child_signals`].
    pub fn new(listener: OwnedFd, signals: OwnedFd, resources: Resources) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        for (fd, token) in [(&listener, LISTENER), (&signals, SIGNALS)] {
            let data = epoll::EventData::new_u64(token);
            epoll::add(&epoll, fd, data, epoll::EventFlags::IN)?;
        }
        Ok(Self {
            epoll,
            listener,
            signals,
            resources,
            next_token: FIRST_FREE,
            greetings: BTreeMap::new(),
            control: None,
            arrived: Vec::new(),
            links: BTreeMap::new(),
            unfinished: Vec::new(),
            container: Container::default(),
            deadline: None,
        })
    }

    /// Serves until the host closes the control connection, and the container
    /// has ended.
    pub fn run(&mut self) -> io::Result<()> {
        let mut events = Vec::with_capacity(32);
        loop {
            events.clear();
            let timeout = self.timeout();
            match epoll::wait(&self.epoll, spare_capacity(&mut events), timeout.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
            for event in &events {
                let (flags, data) = (event.flags, event.data);
                self.dispatch(data.u64(), flags)?;
            }
            for token in std::mem::take(&mut self.unfinished) {
                self.turn(token);
            }
            let expired = self.deadline.is_some_and(|at| Instant::now() >= at);
            if expired || (self.deadline.is_some() && !self.container.is_alive()) {
                return Ok(());
            }
        }
    }

    fn timeout(&self) -> Option<Timespec> {
        let wait = match (self.unfinished.is_empty(), self.deadline) {
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
            LISTENER => self.accept(),
            SIGNALS => self.reap(),
            CONTROL => {
                self.read_control();
                self.flush_control();
                Ok(())
            }
            REPORTS => {
                let happened = self.container.read_reports()?;
                self.tell(happened);
                Ok(())
            }
            token if self.greetings.contains_key(&token) => self.greet(token),
            token => {
                if flags.intersects(epoll::EventFlags::ERR)
                    && let Some(link) = self.links.get_mut(&token)
                {
                    link.failed();
                }
                self.turn(token);
                Ok(())
            }
        }
    }

    fn watch(&self, fd: BorrowedFd<'_>, token: Token) -> io::Result<()> {
        let flags = epoll::EventFlags::IN
            | epoll::EventFlags::OUT
            | epoll::EventFlags::RDHUP
            | epoll::EventFlags::ET;
        Ok(epoll::add(
            &self.epoll,
            fd,
            epoll::EventData::new_u64(token),
            flags,
        )?)
    }

    fn new_token(&mut self) -> Token {
        let token = self.next_token;
        self.next_token += 1;
        token
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
        let token = self.new_token();
        self.watch(socket.as_fd(), token)?;
        let reader = Reader::new(MAX_HELLO);
        self.greetings.insert(token, Greeting { socket, reader });
        self.greet(token)
    }

    /// Reads what a connection is for, and puts it there. A connection that
    /// nobody expects is closed.
    fn greet(&mut self, token: Token) -> io::Result<()> {
        let Some(greeting) = self.greetings.get_mut(&token) else {
            return Ok(());
        };
        let hello = match greeting.reader.next(&greeting.socket) {
            Ok(None) => return Ok(()),
            Ok(Some(hello)) => Some(hello),
            Err(_) => None,
        };
        let Some(Greeting { socket, .. }) = self.greetings.remove(&token) else {
            return Ok(());
        };
        epoll::delete(&self.epoll, &socket)?;
        match hello {
            Some(Hello::Control) if self.control.is_none() && self.deadline.is_none() => {
                self.watch(socket.as_fd(), CONTROL)?;
                self.control = Some(Control {
                    socket,
                    reader: Reader::new(MAX_FRAME),
                    unsent: VecDeque::new(),
                });
                self.read_control();
            }
            Some(Hello::Stdio {
                process: CONTAINER,
                stream,
            }) if self.expects(stream) => {
                self.arrived.push((stream, socket));
                self.start_if_complete();
            }
            _ => {}
        }
        Ok(())
    }

    fn expects(&self, stream: Stream) -> bool {
        !self.container.is_started()
            && self.arrived.len() < MAX_STREAMS
            && self.arrived.iter().all(|(other, _)| *other != stream)
    }

    fn read_control(&mut self) {
        while let Some(control) = &mut self.control {
            match control.reader.next(&control.socket) {
                Ok(None) => return,
                Ok(Some(request)) => {
                    if self.obey(request).is_err() {
                        self.host_has_gone();
                    }
                }
                Err(_) => self.host_has_gone(),
            }
        }
    }

    fn obey(&mut self, request: Request) -> Result<(), Broken> {
        match request {
            Request::StartContainer { container, process } => {
                if !self.container.ask(container, process) {
                    return Err(Broken::Undecodable);
                }
                self.start_if_complete();
            }
            Request::Signal {
                process: CONTAINER,
                signal,
            } => self.container.signal(signal),
            Request::Resize {
                process: CONTAINER,
                size,
            } => self.container.resize(size, self.links.values()),
            Request::Exec { .. } | Request::Freeze | Request::Attach { .. } => {
                return Err(Broken::Undecodable);
            }
            // A process that there is not.
            Request::Signal { .. } | Request::Resize { .. } => {}
        }
        Ok(())
    }

    /// Without its host the guest has no purpose: the container is killed, and
    /// the loop ends when it is gone.
    fn host_has_gone(&mut self) {
        self.control = None;
        self.deadline = Some(Instant::now() + LAST_PATIENCE);
        self.container.signal(libc::SIGKILL);
    }

    fn start_if_complete(&mut self) {
        let arrived: Vec<Stream> = self.arrived.iter().map(|(stream, _)| *stream).collect();
        let Some(started) = self.container.start(&self.resources, &arrived) else {
            return;
        };
        let streams = std::mem::take(&mut self.arrived);
        let result = started.and_then(|pipes| self.connect(pipes, streams).map_err(failed));
        if let Err(happened) = result {
            self.tell(vec![happened]);
        }
    }

    /// Ties the pipes of the new process to the connections of the host, and
    /// listens to its reports.
    fn connect(
        &mut self,
        pipes: Vec<(Stream, OwnedFd)>,
        mut streams: Vec<(Stream, OwnedFd)>,
    ) -> io::Result<()> {
        if let Some(reports) = self.container.reports() {
            let data = epoll::EventData::new_u64(REPORTS);
            epoll::add(&self.epoll, reports, data, epoll::EventFlags::IN)?;
        }
        for (stream, pipe) in pipes {
            let Some(at) = streams.iter().position(|(other, _)| *other == stream) else {
                continue;
            };
            let (_, host) = streams.swap_remove(at);
            self.add_link(match stream {
                Stream::Stdin => Link::input(pipe, host),
                Stream::Stdout | Stream::Stderr | Stream::Terminal => Link::output(pipe, host),
            })?;
        }
        // The terminal's connection waits for the terminal.
        self.arrived = streams;
        Ok(())
    }

    fn add_link(&mut self, link: Link) -> io::Result<()> {
        let token = self.new_token();
        for fd in link.descriptors() {
            self.watch(fd, token)?;
        }
        self.links.insert(token, link);
        self.turn(token);
        Ok(())
    }

    fn turn(&mut self, token: Token) {
        let Some(link) = self.links.get_mut(&token) else {
            return;
        };
        match link.turn() {
            Turn::Waiting => {}
            Turn::More => {
                if !self.unfinished.contains(&token) {
                    self.unfinished.push(token);
                }
            }
            // Closing the descriptors takes them out of the epoll: no other
            // process has these open files.
            Turn::Over => drop(self.links.remove(&token)),
        }
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
        if !self.container.is(pid) {
            return Ok(());
        }
        let reported = self.container.read_reports()?;
        self.tell(reported);
        // With the first process of a PID namespace the kernel has ended all
        // others of it: what is in the pipes now is all that will ever be.
        for link in self.links.values_mut() {
            link.container_ended();
        }
        let tokens: Vec<Token> = self.links.keys().copied().collect();
        for token in tokens {
            self.turn(token);
        }
        let happened = self.container.ended(status);
        self.tell(vec![happened]);
        Ok(())
    }

    /// Acts on what has happened to the container, and tells the host.
    fn tell(&mut self, happened: Vec<Happened>) {
        for what in happened {
            match what {
                Happened::Terminal(master, slave) => {
                    let at = self
                        .arrived
                        .iter()
                        .position(|(s, _)| *s == Stream::Terminal);
                    if let Some(at) = at {
                        let (_, host) = self.arrived.swap_remove(at);
                        // Without a terminal the host sees its stream closed.
                        self.add_link(Link::terminal(master, slave, host)).ok();
                    }
                }
                Happened::Event(event) => {
                    if matches!(event, Event::StartFailed { .. }) {
                        self.arrived.clear();
                        self.links.clear();
                    }
                    self.send(&event);
                }
            }
        }
    }

    fn send(&mut self, event: &Event) {
        let Some(control) = &mut self.control else {
            return;
        };
        match frame::encode(event) {
            Ok(bytes) => control.unsent.extend(bytes),
            Err(_) => self.host_has_gone(),
        }
        self.flush_control();
    }

    fn flush_control(&mut self) {
        while let Some(control) = &mut self.control {
            let (bytes, _) = control.unsent.as_slices();
            if bytes.is_empty() {
                return;
            }
            match rustix::io::write(&control.socket, bytes) {
                Ok(n) => drop(control.unsent.drain(..n)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                Err(_) => self.host_has_gone(),
            }
        }
    }
}

fn failed(e: io::Error) -> Happened {
    Happened::start_failed(format!("cannot watch the process: {e}"))
}
