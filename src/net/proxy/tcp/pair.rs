//! Two connections of which each says what the other hears.

use rustix::event::epoll::EventFlags;
use rustix::net::sockopt::set_socket_linger;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::Duration;

/// Moved in one direction before others get their turn, in bytes.
const TURN: usize = 1 << 20;

#[derive(Clone, Copy, Debug)]
pub enum Side {
    Client,
    Guest,
}

/// How far a pair has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// It waits for an event.
    Rest,
    /// It can go on at once.
    More,
    /// Both have said all.
    Over,
}

#[derive(Debug)]
pub struct Pair {
    client: End,
    guest: End,
    forth: Flow,
    back: Flow,
}

impl Pair {
    pub fn new(client: TcpStream, guest: TcpStream) -> io::Result<Self> {
        Ok(Self {
            client: End::new(client)?,
            guest: End::new(guest)?,
            forth: Flow::default(),
            back: Flow::default(),
        })
    }

    pub fn stream(&self, side: Side) -> &TcpStream {
        match side {
            Side::Client => &self.client.stream,
            Side::Guest => &self.guest.stream,
        }
    }

    /// Learns what has happened to one side.
    pub fn note(&mut self, side: Side, flags: EventFlags) {
        match side {
            Side::Client => self.client.note(flags),
            Side::Guest => self.guest.note(flags),
        }
    }

    /// Moves what can be moved now, through `buffer`.
    ///
    /// # Errors
    /// One side has broken off: the other is to be told by a reset.
    pub fn advance(&mut self, buffer: &mut [u8]) -> io::Result<Progress> {
        match self.flow(buffer) {
            Ok(Progress::Rest) if self.client.has_failed || self.guest.has_failed => {
                // Nobody has found out, because nothing could be said or heard.
                Err(ErrorKind::ConnectionReset.into())
            }
            Ok(progress) => Ok(progress),
            Err(error) => {
                self.save(buffer);
                Err(error)
            }
        }
    }

    /// One side has broken off, which a write may have found out: what it said before is
    /// still to be heard. Its end is no end in order.
    fn save(&mut self, buffer: &mut [u8]) {
        let (client, guest) = (&mut self.client, &mut self.guest);
        (client.is_readable, guest.is_readable) = (true, true);
        self.back.carry(guest, client, buffer).ok();
        self.forth.carry(client, guest, buffer).ok();
    }

    fn flow(&mut self, buffer: &mut [u8]) -> io::Result<Progress> {
        let back = self.back.run(&mut self.guest, &mut self.client, buffer);
        let forth = self.forth.run(&mut self.client, &mut self.guest, buffer);
        Ok(match (back?, forth?) {
            (Progress::Over, Progress::Over) => Progress::Over,
            (Progress::More, _) | (_, Progress::More) => Progress::More,
            _ => Progress::Rest,
        })
    }

    /// Breaks both off.
    pub fn reset(self) {
        reset(self.client.stream);
        reset(self.guest.stream);
    }
}

/// Closes a connection so that the other side sees that something is wrong (SO_LINGER in
/// socket(7)).
pub fn reset(stream: TcpStream) {
    if let Err(error) = set_socket_linger(&stream, Some(Duration::ZERO)) {
        log::debug!("proxy: a connection is closed, not reset: {error}");
    }
}

/// One of the connections.
#[derive(Debug)]
struct End {
    stream: TcpStream,
    /// There may be something to read.
    is_readable: bool,
    /// It may take something. One that is connecting does not.
    is_writable: bool,
    has_failed: bool,
}

impl End {
    fn new(stream: TcpStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        // Whoever waits for more before it sends has done so.
        stream.set_nodelay(true)?;
        Ok(Self {
            stream,
            is_readable: false,
            is_writable: false,
            has_failed: false,
        })
    }

    fn note(&mut self, flags: EventFlags) {
        let ended = EventFlags::HUP | EventFlags::ERR;
        self.is_readable |= flags.intersects(EventFlags::IN | EventFlags::RDHUP | ended);
        self.is_writable |= flags.intersects(EventFlags::OUT | ended);
        self.has_failed |= flags.contains(EventFlags::ERR);
    }

    /// `None` if there is nothing now, 0 at the end.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        let read = would_block(retry(|| self.stream.read(buffer)))?;
        self.is_readable = read.is_some();
        Ok(read)
    }

    /// How much it has taken.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = would_block(retry(|| self.stream.write(bytes)))?;
        self.is_writable = written.is_some();
        Ok(written.unwrap_or(0))
    }
}

fn retry(mut call: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match call() {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            done => return done,
        }
    }
}

fn would_block(done: io::Result<usize>) -> io::Result<Option<usize>> {
    match done {
        Ok(count) => Ok(Some(count)),
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(error),
    }
}

/// What goes in one direction. Nothing is read as long as something that was read before
/// has not been taken; so it is never more than what is read at once, and none at all
/// where both sides keep up.
#[derive(Debug, Default)]
struct Flow {
    rest: Vec<u8>,
    /// How much of it has been taken.
    taken: usize,
    is_over: bool,
}

impl Flow {
    fn run(&mut self, from: &mut End, to: &mut End, buffer: &mut [u8]) -> io::Result<Progress> {
        if self.is_over {
            return Ok(Progress::Over);
        }
        let progress = self.carry(from, to, buffer)?;
        if progress == Progress::Over {
            to.stream.shutdown(Shutdown::Write)?;
            self.is_over = true;
        }
        Ok(progress)
    }

    /// It is over when all has been taken that was said.
    fn carry(&mut self, from: &mut End, to: &mut End, buffer: &mut [u8]) -> io::Result<Progress> {
        let mut moved = 0;
        loop {
            if !to.is_writable {
                return Ok(Progress::Rest);
            }
            if !self.rest.is_empty() {
                self.flush(to)?;
                continue;
            }
            if !from.is_readable {
                return Ok(Progress::Rest);
            }
            if moved >= TURN {
                return Ok(Progress::More);
            }
            match from.read(buffer)? {
                None => {}
                Some(0) => return Ok(Progress::Over),
                Some(count) => {
                    moved += count;
                    let taken = to.write(&buffer[..count])?;
                    self.rest = buffer[taken..count].to_vec();
                }
            }
        }
    }

    fn flush(&mut self, to: &mut End) -> io::Result<()> {
        self.taken += to.write(&self.rest[self.taken..])?;
        if self.taken == self.rest.len() {
            (self.rest, self.taken) = (Vec::new(), 0);
        }
        Ok(())
    }
}
