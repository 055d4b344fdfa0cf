//! A stream of a process: bytes between its pipe or terminal in the guest and
//! its socket to the host, with back-pressure, and never a wait for one stream.

use rustix::buffer::spare_capacity;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::{Errno, read, write};
use rustix::net::{Shutdown, shutdown};

/// What is read at once: what a pipe holds.
const BUFFER: usize = 64 << 10;

/// How many buffers one stream may move before the others get their turn.
const TURN: usize = 8;

/// What a turn of a stream has come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// Nothing can move until a descriptor becomes ready.
    Waiting,
    /// There is more to move: come back without waiting.
    More,
    /// It is over.
    Over,
}

/// The guest's end of a stream, which a process of the container has the other
/// end of. The descriptors do not block.
#[derive(Debug)]
pub struct End {
    guest: OwnedFd,
    to_guest: Option<Copy>,
    to_host: Option<Copy>,
    /// The slave side of a terminal, held so that the terminal does not hang up
    /// while no process of the container has it open.
    slave: Option<OwnedFd>,
}

impl End {
    /// The write end of a stdin pipe, fed by the host.
    pub fn input(pipe: OwnedFd) -> Self {
        Self {
            guest: pipe,
            to_guest: Some(Copy::default()),
            to_host: None,
            slave: None,
        }
    }

    /// The read end of a stdout or stderr pipe.
    pub fn output(pipe: OwnedFd) -> Self {
        Self {
            to_guest: None,
            to_host: Some(Copy::default()),
            ..Self::input(pipe)
        }
    }

    /// The master side of a terminal, and a slave side to hold.
    pub fn terminal(master: OwnedFd, slave: OwnedFd) -> Self {
        Self {
            to_host: Some(Copy::default()),
            slave: Some(slave),
            ..Self::input(master)
        }
    }

    /// Whether this is a terminal, whose process has not ended.
    pub fn is_terminal(&self) -> bool {
        self.slave.is_some()
    }

    /// The pipe or the terminal.
    pub fn guest(&self) -> BorrowedFd<'_> {
        self.guest.as_fd()
    }

    /// The guest was forked, and this end's host is no more: whatever it has found out of
    /// that is forgotten. What the process has written so far, that host has.
    pub fn part(&mut self) {
        match &mut self.to_host {
            // Nothing but an input has no way to the host.
            None => drop(self.to_guest.get_or_insert_default()),
            Some(copy) => *copy = Copy::default(),
        }
    }

    /// Its process has ended: nobody reads any more, and what was written is
    /// still to be delivered.
    pub fn process_ended(&mut self) {
        self.to_guest = None;
        self.slave = None;
    }
}

/// One stream: an end in the guest, and the host's connection. They are watched
/// edge-triggered: a turn ends at EAGAIN, or says that there is [`Turn::More`].
#[derive(Debug)]
pub struct Link {
    /// The guest's end.
    pub end: End,
    host: OwnedFd,
}

impl Link {
    /// Ties the two.
    pub fn new(mut end: End, host: OwnedFd) -> Self {
        if end.is_terminal() {
            // The host before may have closed its half; this one has not.
            end.to_guest.get_or_insert_default();
        }
        Self { end, host }
    }

    /// Unties them. What the host has sent and the process has not taken stays
    /// with the guest's end, as far as it has been read.
    pub fn untie(self) -> (End, OwnedFd) {
        (self.end, self.host)
    }

    /// The two descriptors to watch, for reading and writing both.
    pub fn descriptors(&self) -> [BorrowedFd<'_>; 2] {
        [self.end.guest.as_fd(), self.host.as_fd()]
    }

    /// A descriptor reported an error. For an input that is the end of it: the
    /// last reader is gone, or the host is. An output finds out as it writes,
    /// and may still have something to deliver.
    pub fn failed(&mut self) {
        if self.end.to_host.is_none() {
            self.end.to_guest = None;
        }
    }

    /// Moves what can be moved.
    pub fn turn(&mut self) -> Turn {
        let input = self.turn_input();
        match (input, self.deliver()) {
            (_, Turn::Over) => Turn::Over,
            (Turn::More, _) | (_, Turn::More) => Turn::More,
            _ if self.end.to_guest.is_none() && self.end.to_host.is_none() => Turn::Over,
            _ => Turn::Waiting,
        }
    }

    fn turn_input(&mut self) -> Turn {
        let Some(copy) = &mut self.end.to_guest else {
            return Turn::Waiting;
        };
        let turn = copy.turn(self.host.as_fd(), self.end.guest.as_fd());
        if turn == Turn::Over {
            self.end.to_guest = None;
        }
        turn
    }

    /// Moves what can be moved to the host.
    pub fn deliver(&mut self) -> Turn {
        let Some(copy) = &mut self.end.to_host else {
            return Turn::Waiting;
        };
        let turn = copy.turn(self.end.guest.as_fd(), self.host.as_fd());
        if turn == Turn::Over {
            // End-of-file for the host before the close. If the host has gone
            // first there is nobody left to tell.
            shutdown(&self.host, Shutdown::Write).ok();
        }
        turn
    }

    /// After a [`Self::deliver`] that is waiting: whether it waits for the
    /// process, and not for the host.
    pub fn is_delivered(&self) -> bool {
        let copy = self.end.to_host.as_ref();
        copy.is_none_or(|copy| copy.written == copy.buffer.len())
    }
}

/// One direction: what has been read and not yet written.
#[derive(Debug, Default)]
struct Copy {
    buffer: Vec<u8>,
    written: usize,
}

impl Copy {
    fn turn(&mut self, from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> Turn {
        for _ in 0..TURN {
            while self.written < self.buffer.len() {
                match write(to, &self.buffer[self.written..]) {
                    Ok(n) => self.written += n,
                    Err(Errno::INTR) => {}
                    Err(Errno::AGAIN) => return Turn::Waiting,
                    // The reader is gone.
                    Err(_) => return Turn::Over,
                }
            }
            self.buffer.clear();
            self.written = 0;
            // Room is not touched before something is read into it.
            self.buffer.reserve_exact(BUFFER);
            match read(from, spare_capacity(&mut self.buffer)) {
                Ok(0) => return Turn::Over,
                Ok(_) | Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Turn::Waiting,
                // EIO is how a terminal says that its last slave is closed;
                // anything else ends the stream too.
                Err(_) => return Turn::Over,
            }
        }
        Turn::More
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::pipe::{PipeFlags, pipe_with};
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    fn socket() -> (UnixStream, OwnedFd) {
        let (host, agent) = UnixStream::pair().unwrap();
        agent.set_nonblocking(true).unwrap();
        (host, agent.into())
    }

    #[test]
    fn output_ends_with_the_last_writer_and_delivers_all_before() {
        let (mut host, agent) = socket();
        let (reader, writer) = pipe_with(PipeFlags::NONBLOCK).unwrap();
        let mut link = Link::new(End::output(reader), agent);
        assert_eq!(link.turn(), Turn::Waiting);
        write(&writer, b"last words").unwrap();
        drop(writer);
        assert_eq!(link.turn(), Turn::Over);
        let mut got = String::new();
        host.read_to_string(&mut got).unwrap();
        assert_eq!(got, "last words");
    }

    #[test]
    fn a_host_that_does_not_read_holds_the_stream_back() {
        let (mut host, agent) = socket();
        let (reader, writer) = pipe_with(PipeFlags::NONBLOCK).unwrap();
        let mut link = Link::new(End::output(reader), agent);
        let mut sent = 0;
        while let Ok(n) = write(&writer, &[7; 4096]) {
            sent += n;
            while link.turn() == Turn::More {}
        }
        assert!(sent < 16 << 20, "there was no back-pressure");
        drop(writer);
        let reader = std::thread::spawn(move || {
            let mut got = Vec::new();
            host.read_to_end(&mut got).unwrap();
            got.len()
        });
        while link.turn() != Turn::Over {
            std::thread::yield_now();
        }
        drop(link);
        assert_eq!(reader.join().unwrap(), sent);
    }

    #[test]
    fn input_ends_with_the_host_or_with_the_reader() {
        let (mut host, agent) = socket();
        let (reader, writer) = pipe_with(PipeFlags::NONBLOCK).unwrap();
        let mut link = Link::new(End::input(writer), agent);
        host.write_all(b"hi").unwrap();
        host.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(link.turn(), Turn::Over);
        drop(link);
        let mut got = [0; 8];
        assert_eq!(read(&reader, &mut got), Ok(2));
        assert_eq!(read(&reader, &mut got), Ok(0));

        let (mut host, agent) = socket();
        let (reader, writer) = pipe_with(PipeFlags::NONBLOCK).unwrap();
        let mut link = Link::new(End::input(writer), agent);
        drop(reader);
        host.write_all(b"to nobody").unwrap();
        assert_eq!(link.turn(), Turn::Over);
    }
}
