//! A container's name server, at its gateway's address: it answers for the names of the
//! container's networks, and asks the host's servers about all others.
//!
//! One thread does all of it with poll(2): no question waits for another one, a guest
//! gets no thread by asking, and the few descriptors that there may be (a hundred) are
//! gathered anew each time, so that there is no second list of them to keep right.
//! Whatever the guest sends is bounded: the length of a message, the questions that are
//! open, its connections, and the time for each.
//!
//! An answer that a server has cut short goes to the guest as it is; the guest asks again
//! by TCP, and so does this.

use self::frames::Frames;
use self::message::{QUESTION_MAX, Transport, Verdict};
use self::upstream::Exchange;
use super::service::{Service, timespec};
use crate::bell::Bell;
use domain::base::iana::Rcode;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::io::{self, ErrorKind};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant};

mod frames;
mod message;
mod upstream;

pub use message::Names;
pub use upstream::Upstream;

/// Questions that are asked of servers at once. Docker's server has as many for each
/// container, and more.
const QUESTIONS_MAX: usize = 64;
/// Connections of the guest at once.
const CONNECTIONS_MAX: usize = 16;
/// How long all servers together may take. The guest's own patience is shorter, often.
const PATIENCE: Duration = Duration::from_secs(15);
/// How long a connection has for its next question, and to take an answer (RFC 7766
/// §6.2.3: a few seconds).
const IDLE: Duration = Duration::from_secs(10);
/// After a connection could not be accepted: there may be no descriptor left.
const PAUSE: Duration = Duration::from_millis(100);
/// Messages taken by UDP before others get their turn.
const BURST: usize = 64;
/// No datagram is longer, in bytes.
const DATAGRAM_MAX: usize = 64 << 10;

/// Answers questions that come to `udp` and `tcp`. `upstream` is asked from the network
/// namespace of the calling thread; without it, what is not about us is refused.
///
/// # Errors
/// No thread, or no descriptor.
pub fn serve(
    udp: UdpSocket,
    tcp: TcpListener,
    names: Arc<dyn Names>,
    upstream: Option<Upstream>,
) -> io::Result<Service> {
    udp.set_nonblocking(true)?;
    tcp.set_nonblocking(true)?;
    let mut server = Server {
        udp,
        tcp,
        names,
        upstream,
        questions: BTreeMap::new(),
        connections: BTreeMap::new(),
        last_key: 0,
        accepts_from: None,
        buffer: vec![0; DATAGRAM_MAX],
    };
    Service::start("dns", move |stop| {
        if let Err(error) = server.run(stop) {
            log::error!("a container has lost its name server: {error}");
        }
    })
}

struct Server {
    udp: UdpSocket,
    tcp: TcpListener,
    names: Arc<dyn Names>,
    upstream: Option<Upstream>,
    questions: BTreeMap<u64, Question>,
    connections: BTreeMap<u64, Connection>,
    last_key: u64,
    /// No connection is accepted before, if it is set.
    accepts_from: Option<Instant>,
    /// For datagrams.
    buffer: Vec<u8>,
}

/// Who has asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Client {
    Udp(SocketAddr),
    /// By this connection.
    Tcp(u64),
}

impl Client {
    fn transport(self) -> Transport {
        match self {
            Self::Udp(_) => Transport::Udp,
            Self::Tcp(_) => Transport::Tcp,
        }
    }
}

/// A question that is asked of servers, one after another.
struct Question {
    client: Client,
    message: Vec<u8>,
    /// How many have been asked.
    asked: usize,
    exchange: Option<Exchange>,
    /// When the next one is asked.
    until: Instant,
    /// When none is asked any more.
    end: Instant,
    /// A server has answered that it has failed. It is what the guest gets, if none knows
    /// more.
    failure: Option<Vec<u8>>,
}

struct Connection {
    frames: Frames<TcpStream>,
    /// It has a question to which there is no answer yet.
    is_waiting: bool,
    /// The guest asks nothing more.
    has_ended: bool,
    until: Instant,
}

impl Connection {
    fn interest(&self) -> PollFlags {
        if self.frames.is_sending() {
            PollFlags::OUT
        } else if self.is_waiting {
            // Its end is told in any case.
            PollFlags::empty()
        } else {
            PollFlags::IN
        }
    }
}

/// What something has happened to.
#[derive(Clone, Copy)]
enum Source {
    Stop,
    Udp,
    Tcp,
    Question(u64),
    Connection(u64),
}

impl Server {
    fn run(&mut self, stop: &Bell) -> io::Result<()> {
        loop {
            for source in self.wait(stop)? {
                match source {
                    Source::Stop => return Ok(()),
                    Source::Udp => self.hear(),
                    Source::Tcp => self.accept(),
                    Source::Question(key) => self.advance(key),
                    Source::Connection(key) => self.go_on(key),
                }
            }
            self.expire();
        }
    }

    /// Waits until something happens, or is due.
    fn wait(&self, stop: &Bell) -> io::Result<Vec<Source>> {
        let mut sources = vec![Source::Stop, Source::Udp];
        let mut watched = vec![
            PollFd::new(stop, PollFlags::IN),
            PollFd::new(&self.udp, PollFlags::IN),
        ];
        if self.connections.len() < CONNECTIONS_MAX && self.accepts_from.is_none() {
            sources.push(Source::Tcp);
            watched.push(PollFd::new(&self.tcp, PollFlags::IN));
        }
        for (key, question) in &self.questions {
            if let Some(exchange) = &question.exchange {
                sources.push(Source::Question(*key));
                watched.push(PollFd::new(exchange, exchange.interest()));
            }
        }
        for (key, connection) in &self.connections {
            sources.push(Source::Connection(*key));
            let stream = connection.frames.stream();
            watched.push(PollFd::new(stream, connection.interest()));
        }
        let patience = self
            .due()
            .map(|due| timespec(due.saturating_duration_since(Instant::now())));
        match poll(&mut watched, patience.as_ref()) {
            Ok(_) => {}
            Err(Errno::INTR) => return Ok(Vec::new()),
            Err(error) => return Err(error.into()),
        }
        let happened = sources.into_iter().zip(&watched);
        Ok(happened
            .filter(|(_, watched)| !watched.revents().is_empty())
            .map(|(source, _)| source)
            .collect())
    }

    /// When the next thing is due.
    fn due(&self) -> Option<Instant> {
        let questions = self.questions.values().map(|question| question.until);
        let idle = self.connections.values().filter(|it| !it.is_waiting);
        questions
            .chain(idle.map(|it| it.until))
            .chain(self.accepts_from)
            .min()
    }

    /// Does what is due.
    fn expire(&mut self) {
        let now = Instant::now();
        let late = self.questions.iter().filter(|(_, it)| it.until <= now);
        for key in late.map(|(key, _)| *key).collect::<Vec<_>>() {
            self.ask_next(key);
        }
        self.connections
            .retain(|_, it| it.is_waiting || it.until > now);
        self.accepts_from = self.accepts_from.filter(|from| *from > now);
    }

    fn new_key(&mut self) -> u64 {
        self.last_key += 1;
        self.last_key
    }

    /// Takes what has come by UDP.
    fn hear(&mut self) {
        for _ in 0..BURST {
            let (len, client) = match self.udp.recv_from(&mut self.buffer) {
                Ok(received) => received,
                Err(error) => {
                    if error.kind() != ErrorKind::WouldBlock {
                        log::debug!("dns: {error}");
                    }
                    return;
                }
            };
            if len <= QUESTION_MAX {
                let message = self.buffer[..len].to_vec();
                self.take(message, Client::Udp(client));
            }
        }
    }

    /// Takes a connection of the guest.
    fn accept(&mut self) {
        let accepted = self.tcp.accept().and_then(|(stream, _)| {
            stream.set_nonblocking(true)?;
            Ok(stream)
        });
        match accepted {
            Ok(stream) => {
                let key = self.new_key();
                let connection = Connection {
                    frames: Frames::new(stream, QUESTION_MAX),
                    is_waiting: false,
                    has_ended: false,
                    until: Instant::now() + IDLE,
                };
                self.connections.insert(key, connection);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => {
                log::debug!("dns: cannot accept a connection: {error}");
                self.accepts_from = Some(Instant::now() + PAUSE);
            }
        }
    }

    /// A connection can go on, or has ended.
    fn go_on(&mut self, key: u64) {
        if let Err(error) = self.try_to_go_on(key) {
            log::debug!("dns: a connection ends: {error}");
            self.hang_up(key);
        }
    }

    fn try_to_go_on(&mut self, key: u64) -> io::Result<()> {
        let Some(connection) = self.connections.get_mut(&key) else {
            return Ok(());
        };
        if connection.is_waiting {
            // It is told of nothing but its end.
            return Err(ErrorKind::ConnectionReset.into());
        }
        let frames = &mut connection.frames;
        frames.send()?;
        if frames.is_sending() {
            return Ok(());
        }
        if !connection.has_ended {
            match frames.receive() {
                Err(error) if error.kind() == ErrorKind::UnexpectedEof => {
                    connection.has_ended = true;
                }
                received => received?,
            }
        }
        match frames.take()? {
            Some(message) => {
                connection.is_waiting = true;
                self.take(message, Client::Tcp(key));
                Ok(())
            }
            None if connection.has_ended => Err(ErrorKind::UnexpectedEof.into()),
            None => Ok(()),
        }
    }

    /// Ends a connection, and whatever it waits for.
    fn hang_up(&mut self, key: u64) {
        self.connections.remove(&key);
        self.questions
            .retain(|_, question| question.client != Client::Tcp(key));
    }

    /// A message of the guest.
    fn take(&mut self, message: Vec<u8>, client: Client) {
        match (
            message::judge(&message, client.transport(), &*self.names),
            client,
        ) {
            (Verdict::Answer(answer), _) => self.reply(client, &answer),
            (Verdict::Forward, _) => self.forward(message, client),
            (Verdict::Drop, Client::Udp(_)) => {}
            (Verdict::Drop, Client::Tcp(key)) => self.hang_up(key),
        }
    }

    fn reply(&mut self, client: Client, answer: &[u8]) {
        match client {
            Client::Udp(address) => {
                // What finds no room is lost, as on any network.
                if let Err(error) = self.udp.send_to(answer, address) {
                    log::debug!("dns: an answer is lost: {error}");
                }
            }
            Client::Tcp(key) => {
                // It is sent when the loop finds that there is room.
                if let Some(connection) = self.connections.get_mut(&key) {
                    connection.frames.put(answer);
                    connection.is_waiting = false;
                    connection.until = Instant::now() + IDLE;
                }
            }
        }
    }

    fn refuse(&mut self, question: &[u8], client: Client, code: Rcode) {
        if let Some(answer) = message::refuse(question, code) {
            self.reply(client, &answer);
        }
    }

    /// Asks the host's servers.
    fn forward(&mut self, message: Vec<u8>, client: Client) {
        if self.upstream.is_none() {
            return self.refuse(&message, client, Rcode::REFUSED);
        }
        let id = message::id(&message);
        let is_again = |it: &Question| it.client == client && message::id(&it.message) == id;
        if self.questions.values().any(is_again) {
            // The guest has lost patience; the answer may come all the same.
            return;
        }
        if self.questions.len() >= QUESTIONS_MAX {
            return self.refuse(&message, client, Rcode::SERVFAIL);
        }
        let key = self.new_key();
        let end = Instant::now() + PATIENCE;
        let question = Question {
            client,
            message,
            asked: 0,
            exchange: None,
            until: end,
            end,
            failure: None,
        };
        self.questions.insert(key, question);
        self.ask_next(key);
    }

    /// Asks the next server; after the last one, the guest gets what there is.
    fn ask_next(&mut self, key: u64) {
        let (Some(upstream), Some(question)) = (&self.upstream, self.questions.get_mut(&key))
        else {
            return;
        };
        question.exchange = None;
        let servers = upstream.servers.iter().cycle();
        let most = upstream.servers.len() * usize::from(upstream.attempts);
        for server in servers.take(most).skip(question.asked) {
            let now = Instant::now();
            if now >= question.end {
                break;
            }
            question.asked += 1;
            match Exchange::begin(*server, &question.message, question.client.transport()) {
                Ok(exchange) => {
                    question.exchange = Some(exchange);
                    question.until = question.end.min(now + upstream.timeout);
                    return;
                }
                Err(error) => log::debug!("dns: cannot ask {server}: {error}"),
            }
        }
        let Some(question) = self.questions.remove(&key) else {
            return;
        };
        match question.failure {
            Some(answer) => self.reply(question.client, &answer),
            None => self.refuse(&question.message, question.client, Rcode::SERVFAIL),
        }
    }

    /// Something has come from a server.
    fn advance(&mut self, key: u64) {
        let Some(question) = self.questions.get_mut(&key) else {
            return;
        };
        let Some(exchange) = &mut question.exchange else {
            return;
        };
        match exchange.advance(&mut self.buffer) {
            Ok(None) => {}
            Ok(Some(mut answer)) => {
                message::set_id(&mut answer, message::id(&question.message).unwrap_or(0));
                if message::is_failure(&answer) {
                    question.failure = Some(answer);
                    self.ask_next(key);
                } else if let Some(question) = self.questions.remove(&key) {
                    self.reply(question.client, &answer);
                }
            }
            Err(error) => {
                log::debug!("dns: a server has failed: {error}");
                self.ask_next(key);
            }
        }
    }
}

#[cfg(test)]
mod tests;
