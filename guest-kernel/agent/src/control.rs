//! The host's control connection: requests in, events out.

use crate::frame::{self, Broken, Reader};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::{Errno, write};
use std::collections::VecDeque;
use vm_run_abi::protocol::{Event, MAX_FRAME, Request};

/// The connection. Its socket does not block.
#[derive(Debug)]
pub struct Control {
    socket: OwnedFd,
    reader: Reader,
    /// Encoded events that the socket has not taken yet.
    unsent: VecDeque<u8>,
}

impl Control {
    /// Over a socket whose hello has been read.
    pub fn new(socket: OwnedFd) -> Self {
        Self {
            socket,
            reader: Reader::new(MAX_FRAME),
            unsent: VecDeque::new(),
        }
    }

    /// The socket.
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// The next request, or `None` if it has not all come yet.
    pub fn next_request(&mut self) -> Result<Option<Request>, Broken> {
        self.reader.next(&self.socket)
    }

    /// Sends an event, or keeps what the socket does not take for
    /// [`Self::flush`].
    pub fn send(&mut self, event: &Event) -> Result<(), Broken> {
        let bytes = frame::encode(event).map_err(|_| Broken::Undecodable)?;
        self.unsent.extend(bytes);
        self.flush()
    }

    /// Sends what is kept, as much as the socket takes.
    pub fn flush(&mut self) -> Result<(), Broken> {
        loop {
            let (bytes, _) = self.unsent.as_slices();
            if bytes.is_empty() {
                return Ok(());
            }
            match write(&self.socket, bytes) {
                Ok(n) => drop(self.unsent.drain(..n)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(()),
                Err(e) => return Err(Broken::Io(e)),
            }
        }
    }
}
