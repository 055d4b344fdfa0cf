//! Messages on a TCP stream: each has its length before it, in two bytes
//! (RFC 1035 §4.2.2).

use std::io::{self, ErrorKind, Read, Write};

const PREFIX: usize = 2;

/// Read at once, in bytes.
const CHUNK: usize = 2048;

/// One end of a stream in non-blocking mode, one message each way at a time.
#[derive(Debug)]
pub struct Frames<S> {
    stream: S,
    /// The longest message that is taken, in bytes.
    most: usize,
    input: Vec<u8>,
    output: Vec<u8>,
    /// How much of the output the stream has taken.
    sent: usize,
}

impl<S> Frames<S> {
    pub fn new(stream: S, most: usize) -> Self {
        Self {
            stream,
            most,
            input: Vec::new(),
            output: Vec::new(),
            sent: 0,
        }
    }

    pub fn stream(&self) -> &S {
        &self.stream
    }

    /// Whether there is something to be sent still.
    pub fn is_sending(&self) -> bool {
        self.sent < self.output.len()
    }

    /// To be sent, when all before has been.
    pub fn put(&mut self, message: &[u8]) {
        debug_assert!(!self.is_sending());
        let Ok(len) = u16::try_from(message.len()) else {
            // No message is that long: none is made, and none was read.
            return;
        };
        self.sent = 0;
        self.output.clear();
        self.output.extend(len.to_be_bytes());
        self.output.extend(message);
    }

    /// Takes the first message that has been read whole.
    ///
    /// # Errors
    /// One that is longer than what is taken.
    pub fn take(&mut self) -> io::Result<Option<Vec<u8>>> {
        let Some((prefix, rest)) = self.input.split_first_chunk::<PREFIX>() else {
            return Ok(None);
        };
        let len = usize::from(u16::from_be_bytes(*prefix));
        if len > self.most {
            return Err(ErrorKind::InvalidData.into());
        }
        let Some(message) = rest.get(..len) else {
            return Ok(None);
        };
        let message = message.to_vec();
        self.input.drain(..PREFIX + len);
        Ok(Some(message))
    }
}

impl<S: Read + Write> Frames<S> {
    /// Sends what there is to be sent, as far as the stream takes it now.
    ///
    /// # Errors
    /// The stream's.
    pub fn send(&mut self) -> io::Result<()> {
        while self.is_sending() {
            match self.stream.write(&self.output[self.sent..]) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(count) => self.sent += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.output = Vec::new();
        self.sent = 0;
        Ok(())
    }

    /// Reads what has come, but no more than a message and what comes with its end.
    ///
    /// # Errors
    /// The stream's; its end is one.
    pub fn receive(&mut self) -> io::Result<()> {
        let mut chunk = [0; CHUNK];
        while self.input.len() < PREFIX + self.most {
            match self.stream.read(&mut chunk) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(count) => self.input.extend(&chunk[..count]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}
