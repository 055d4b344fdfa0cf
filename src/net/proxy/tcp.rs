//! Connections, each of which is one to the guest.
//!
//! All events are edge-triggered (epoll(7)), so nothing is asked of the kernel but when
//! something has changed, and a connection that nobody takes from costs nothing. To
//! connect may take as long as the guest likes: it is done in a thread that ends with it,
//! of which there are few.

use self::pair::{Pair, Progress, Side};
use crate::bell::Bell;
use crate::net::service::{Service, Watch};
use rustix::event::epoll::EventFlags;
use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, ErrorKind};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

mod pair;

/// Connections at once. Others wait in the listener's queue.
const CONNECTIONS_MAX: usize = 1024;
/// Connections of which the guest has not heard yet, at once.
const CONNECTING_MAX: usize = 32;
/// After a connection could not be accepted: there may be no descriptor left.
const PAUSE: Duration = Duration::from_millis(100);
/// Moved at once, in bytes.
const CHUNK: usize = 64 << 10;
/// What a thread that connects has for a stack, in bytes.
const STACK: usize = 128 << 10;

/// Makes a connection to the guest. It is called in a thread of its own, which waits for
/// it, and outlives the service if it must. A stream that is in non-blocking mode may be
/// connecting still, and then no thread waits.
pub type Connect = Arc<dyn Fn() -> io::Result<TcpStream> + Send + Sync>;

const STOP: u64 = 0;
const CONNECTED: u64 = 1;
const LISTENER: u64 = 2;
/// Numbers of connections begin above: their streams have twice the number for a key, and
/// one more.
const NUMBERS: u64 = 2;

/// Connects each client of `listener`.
///
/// # Errors
/// No thread, or no descriptor.
pub fn serve(listener: TcpListener, connect: Connect) -> io::Result<Service> {
    let mut proxy = Proxy::new(listener, connect)?;
    Service::start("proxy", move |stop| {
        if let Err(error) = proxy.run(stop) {
            log::error!("a published port is served no more: {error}");
        }
    })
}

struct Proxy {
    listener: TcpListener,
    connect: Connect,
    watch: Watch,
    /// Those for which a thread is connecting.
    clients: BTreeMap<u64, TcpStream>,
    pairs: BTreeMap<u64, Pair>,
    /// Those that may have something to do.
    ready: BTreeSet<u64>,
    last_number: u64,
    /// There may be a client to accept.
    is_acceptable: bool,
    /// None is accepted before, if it is set.
    accepts_from: Option<Instant>,
    /// Rings when a thread has something to say.
    bell: Bell,
    sender: Sender<Connected>,
    connected: Receiver<Connected>,
    buffer: Vec<u8>,
}

/// What a thread has to say of a connection.
type Connected = (u64, io::Result<TcpStream>);

impl Proxy {
    fn new(listener: TcpListener, connect: Connect) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let (sender, connected) = channel();
        Ok(Self {
            listener,
            connect,
            watch: Watch::new()?,
            clients: BTreeMap::new(),
            pairs: BTreeMap::new(),
            ready: BTreeSet::new(),
            last_number: NUMBERS,
            is_acceptable: false,
            accepts_from: None,
            bell: Bell::new()?,
            sender,
            connected,
            buffer: vec![0; CHUNK],
        })
    }

    fn run(&mut self, stop: &Bell) -> io::Result<()> {
        let edge = EventFlags::IN | EventFlags::ET;
        self.watch.add(stop, STOP, EventFlags::IN)?;
        self.watch.add(&self.bell, CONNECTED, EventFlags::IN)?;
        self.watch.add(&self.listener, LISTENER, edge)?;
        loop {
            for (key, flags) in self.watch.wait(self.patience())? {
                match key {
                    STOP => return Ok(()),
                    CONNECTED => self.take_connected(),
                    LISTENER => self.is_acceptable = true,
                    stream => self.note(stream, flags),
                }
            }
            self.accept();
            for number in std::mem::take(&mut self.ready) {
                self.advance(number);
            }
        }
    }

    fn patience(&self) -> Option<Duration> {
        if !self.ready.is_empty() {
            return Some(Duration::ZERO);
        }
        let from = self.accepts_from?;
        Some(from.saturating_duration_since(Instant::now()))
    }

    /// Takes the clients that there are, as far as there is room for them.
    fn accept(&mut self) {
        self.accepts_from = self.accepts_from.filter(|from| *from > Instant::now());
        while self.is_acceptable && self.accepts_from.is_none() && self.has_room() {
            match self.listener.accept() {
                Ok((client, _)) => self.begin(client),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.is_acceptable = false;
                }
                // It has gone meanwhile.
                Err(error) if error.kind() == ErrorKind::ConnectionAborted => {}
                Err(error) => {
                    log::debug!("proxy: cannot accept a connection: {error}");
                    self.accepts_from = Some(Instant::now() + PAUSE);
                }
            }
        }
    }

    fn has_room(&self) -> bool {
        let connecting = self.clients.len();
        connecting < CONNECTING_MAX && connecting + self.pairs.len() < CONNECTIONS_MAX
    }

    fn begin(&mut self, client: TcpStream) {
        self.last_number += 1;
        let number = self.last_number;
        let connect = Arc::clone(&self.connect);
        let (sender, bell) = (self.sender.clone(), self.bell.clone());
        let thread = std::thread::Builder::new()
            .name("connect".into())
            .stack_size(STACK)
            .spawn(move || {
                // Nobody may be left to hear of it.
                sender.send((number, connect())).ok();
                bell.ring();
            });
        match thread {
            Ok(_) => {
                self.clients.insert(number, client);
            }
            Err(error) => {
                log::debug!("proxy: no thread: {error}");
                pair::reset(client);
            }
        }
    }

    fn take_connected(&mut self) {
        self.bell.hush();
        while let Ok((number, guest)) = self.connected.try_recv() {
            let Some(client) = self.clients.remove(&number) else {
                continue;
            };
            match guest {
                Ok(guest) => {
                    if let Err(error) = self.join(number, client, guest) {
                        log::debug!("proxy: a connection is lost: {error}");
                    }
                }
                Err(error) => {
                    log::debug!("proxy: the guest cannot be reached: {error}");
                    pair::reset(client);
                }
            }
        }
    }

    fn join(&mut self, number: u64, client: TcpStream, guest: TcpStream) -> io::Result<()> {
        let pair = Pair::new(client, guest)?;
        let wanted = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        self.watch
            .add(pair.stream(Side::Client), 2 * number, wanted)?;
        self.watch
            .add(pair.stream(Side::Guest), 2 * number + 1, wanted)?;
        self.pairs.insert(number, pair);
        Ok(())
    }

    /// Something has happened to a stream.
    fn note(&mut self, key: u64, flags: EventFlags) {
        let number = key / 2;
        let side = if key.is_multiple_of(2) {
            Side::Client
        } else {
            Side::Guest
        };
        // It may have ended in this turn.
        if let Some(pair) = self.pairs.get_mut(&number) {
            pair.note(side, flags);
            self.ready.insert(number);
        }
    }

    fn advance(&mut self, number: u64) {
        let Some(pair) = self.pairs.get_mut(&number) else {
            return;
        };
        match pair.advance(&mut self.buffer) {
            Ok(Progress::Rest) => {}
            Ok(Progress::More) => {
                self.ready.insert(number);
            }
            Ok(Progress::Over) => {
                self.pairs.remove(&number);
            }
            Err(error) => {
                log::debug!("proxy: a connection is reset: {error}");
                if let Some(pair) = self.pairs.remove(&number) {
                    pair.reset();
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
