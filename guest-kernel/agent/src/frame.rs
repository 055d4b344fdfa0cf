//! Frames of [`vm_run_abi::protocol`] on a socket that does not block.

use rustix::fd::AsFd;
use rustix::io::{Errno, read};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fmt;

/// Why a connection cannot be read on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Broken {
    /// The other side has ended it.
    Closed,
    /// Of this many bytes, more than the limit.
    TooLong(usize),
    /// The bytes are no message.
    Undecodable,
    /// The socket failed.
    Io(Errno),
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed => f.write_str("the connection has ended"),
            Self::TooLong(len) => write!(f, "a frame of {len} bytes is too long"),
            Self::Undecodable => f.write_str("a frame cannot be decoded"),
            Self::Io(e) => e.fmt(f),
        }
    }
}

impl std::error::Error for Broken {}

/// How much is read at once: memory grows with what has come, not with what a
/// length claims.
const CHUNK: usize = 64 << 10;

const HEADER: usize = 4;

/// Reads frames. It never reads beyond the frame that it is at, so that a socket
/// can be handed on after any frame.
#[derive(Debug)]
pub struct Reader {
    limit: usize,
    bytes: Vec<u8>,
}

impl Reader {
    /// A reader that refuses frames of more than `limit` bytes.
    pub fn new(limit: usize) -> Self {
        Self {
            limit,
            bytes: Vec::new(),
        }
    }

    /// The next message, or `None` if it has not all come yet.
    pub fn next<M: DeserializeOwned>(&mut self, socket: impl AsFd) -> Result<Option<M>, Broken> {
        loop {
            let want = self.wanted()?;
            if self.bytes.len() == want {
                let message = postcard::from_bytes(&self.bytes[HEADER..]);
                self.bytes = Vec::new();
                return message.map(Some).map_err(|_| Broken::Undecodable);
            }
            if !self.fill(&socket, want)? {
                return Ok(None);
            }
        }
    }

    /// How many bytes the frame has with its header, as far as is known.
    fn wanted(&self) -> Result<usize, Broken> {
        let Some(header) = self.bytes.first_chunk::<HEADER>() else {
            return Ok(HEADER);
        };
        let len = u32::from_le_bytes(*header) as usize;
        if len > self.limit {
            return Err(Broken::TooLong(len));
        }
        // An empty frame holds no message, and would read as "only the header".
        if len == 0 {
            return Err(Broken::Undecodable);
        }
        Ok(HEADER + len)
    }

    /// Reads once, up to `want` bytes in all; `false` if there is nothing now.
    fn fill(&mut self, socket: impl AsFd, want: usize) -> Result<bool, Broken> {
        let have = self.bytes.len();
        self.bytes.resize(want.min(have + CHUNK), 0);
        let result = read(&socket, &mut self.bytes[have..]);
        self.bytes.truncate(have + result.unwrap_or(0));
        match result {
            Ok(0) => Err(Broken::Closed),
            Ok(_) | Err(Errno::INTR) => Ok(true),
            Err(Errno::AGAIN) => Ok(false),
            Err(e) => Err(Broken::Io(e)),
        }
    }
}

/// A message as a frame.
pub fn encode(message: &impl Serialize) -> Result<Vec<u8>, postcard::Error> {
    let body = postcard::to_stdvec(message)?;
    let mut frame = Vec::with_capacity(HEADER + body.len());
    frame.extend_from_slice(&(body.len() as u32).to_le_bytes());
    frame.extend_from_slice(&body);
    Ok(frame)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::net::UnixStream;
    use vm_run_abi::protocol::{Hello, ProcessId, Stream};

    fn pair() -> (UnixStream, UnixStream) {
        let (host, agent) = UnixStream::pair().unwrap();
        agent.set_nonblocking(true).unwrap();
        (host, agent)
    }

    fn hello(process: ProcessId) -> Hello {
        Hello::Stdio {
            process,
            stream: Stream::Stdout,
        }
    }

    #[test]
    fn a_frame_may_come_byte_by_byte_and_nothing_after_it_is_read() {
        let (mut host, agent) = pair();
        let mut reader = Reader::new(64);
        for byte in encode(&hello(300)).unwrap() {
            assert_eq!(reader.next::<Hello>(&agent), Ok(None));
            host.write_all(&[byte]).unwrap();
        }
        host.write_all(b"raw").unwrap();
        assert_eq!(reader.next(&agent), Ok(Some(hello(300))));
        let mut rest = [0; 8];
        assert_eq!(read(&agent, &mut rest), Ok(3));
    }

    #[test]
    fn long_empty_and_undecodable_frames_are_refused() {
        let (mut host, agent) = pair();
        host.write_all(&65u32.to_le_bytes()).unwrap();
        assert_eq!(
            Reader::new(64).next::<Hello>(&agent),
            Err(Broken::TooLong(65))
        );
        host.write_all(&0u32.to_le_bytes()).unwrap();
        assert_eq!(
            Reader::new(64).next::<Hello>(&agent),
            Err(Broken::Undecodable)
        );
        host.write_all(&[2, 0, 0, 0, 0xff, 0xff]).unwrap();
        assert_eq!(
            Reader::new(64).next::<Hello>(&agent),
            Err(Broken::Undecodable)
        );
        host.write_all(&[2, 0, 0]).unwrap();
        drop(host);
        assert_eq!(Reader::new(64).next::<Hello>(&agent), Err(Broken::Closed));
    }
}
