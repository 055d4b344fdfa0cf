//! The control connection to the agent. Whatever comes from there was written
//! by a guest.

use crate::error::Error;
use rustix::fd::{AsFd, BorrowedFd};
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use serde::Serialize;
use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use vm_run_abi::protocol::{Event, MAX_EVENT_FRAME, MAX_FRAME, ProcessId, Request, WindowSize};

/// Sends one frame.
pub(crate) fn send(mut stream: &UnixStream, message: &impl Serialize) -> Result<(), Error> {
    let body = postcard::to_stdvec(message)
        .map_err(|e| Error::Died(format!("a request that cannot be encoded: {e}")))?;
    if body.len() > MAX_FRAME {
        return Err(Error::TooLong {
            bytes: body.len(),
            max: MAX_FRAME,
        });
    }
    let mut frame = (body.len() as u32).to_le_bytes().to_vec();
    frame.extend_from_slice(&body);
    stream
        .write_all(&frame)
        .map_err(|e| Error::Died(format!("the agent does not listen: {e}")))
}

/// The control connection.
pub(crate) struct Control {
    stream: UnixStream,
    writer: Arc<Mutex<UnixStream>>,
    events: Events,
}

/// The next word of the agent.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Heard {
    /// Something.
    Event(Event),
    /// Nothing now.
    Nothing,
    /// The connection has ended, or broken the rules: which.
    Gone(String),
}

impl Control {
    pub(crate) fn new(stream: UnixStream) -> Result<Self, Error> {
        let writer = stream
            .try_clone()
            .map_err(|e| Error::Died(format!("cannot write to the agent: {e}")))?;
        Ok(Self {
            stream,
            writer: Arc::new(Mutex::new(writer)),
            events: Events::default(),
        })
    }

    /// Sends a request, and lets the agent say so many events more for it.
    pub(crate) fn request(&mut self, request: &Request, events: u32) -> Result<(), Error> {
        self.events.allow(events);
        send(&lock(&self.writer), request)
    }

    /// Reads what has come. It never waits.
    pub(crate) fn hear(&mut self) -> Heard {
        loop {
            match self.events.next() {
                Ok(Some(event)) => return Heard::Event(event),
                Ok(None) => {}
                Err(why) => return Heard::Gone(why),
            }
            let mut bytes = [0; 4096];
            match recv(&self.stream, &mut bytes, RecvFlags::DONTWAIT) {
                Ok((0, _)) => return Heard::Gone("the agent's connection ended".into()),
                Ok((got, _)) => self.events.feed(&bytes[..got]),
                Err(Errno::AGAIN) => return Heard::Nothing,
                Err(Errno::INTR) => {}
                Err(e) => return Heard::Gone(format!("the agent's connection ended: {e}")),
            }
        }
    }

    pub(crate) fn remote(&self, process: ProcessId) -> Remote {
        Remote {
            writer: Arc::clone(&self.writer),
            process,
        }
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        // Remotes may live on, and hold the same connection. One that the guest
        // has closed already is no error.
        self.stream.shutdown(Shutdown::Both).ok();
    }
}

impl AsFd for Control {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// Frames of events, from bytes. A guest may send no more events than it was
/// allowed, so that it fills no memory; and no frame is kept beyond the longest.
#[derive(Debug, Default)]
pub(crate) struct Events {
    bytes: Vec<u8>,
    allowance: u32,
}

impl Events {
    pub(crate) fn allow(&mut self, more: u32) {
        self.allowance = self.allowance.saturating_add(more);
    }

    pub(crate) fn feed(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// The next event that has come whole; or why there will be none.
    pub(crate) fn next(&mut self) -> Result<Option<Event>, String> {
        let Some(header) = self.bytes.first_chunk::<4>() else {
            return Ok(None);
        };
        let len = u32::from_le_bytes(*header) as usize;
        if len > MAX_EVENT_FRAME {
            return Err("the agent sent a frame that is too long".into());
        }
        let Some(body) = self.bytes.get(4..4 + len) else {
            return Ok(None);
        };
        let event = postcard::from_bytes(body)
            .map_err(|_| "the agent sent a frame that is no event".to_owned())?;
        self.allowance = self
            .allowance
            .checked_sub(1)
            .ok_or("the agent said more than it was asked")?;
        self.bytes.drain(..4 + len);
        Ok(Some(event))
    }
}

/// Reaches one process of a child, from any thread.
#[derive(Debug, Clone)]
pub struct Remote {
    writer: Arc<Mutex<UnixStream>>,
    process: ProcessId,
}

impl Remote {
    /// Sends it a signal, by number. To one that has ended: nothing happens.
    ///
    /// # Errors
    /// A child that is gone.
    pub fn signal(&self, signal: i32) -> Result<(), Error> {
        let process = self.process;
        send(&lock(&self.writer), &Request::Signal { process, signal })
    }

    /// Tells it the new size of its terminal.
    ///
    /// # Errors
    /// A child that is gone.
    pub fn resize(&self, size: WindowSize) -> Result<(), Error> {
        let process = self.process;
        send(&lock(&self.writer), &Request::Resize { process, size })
    }

    /// Which process it is, within its child.
    pub fn process(&self) -> ProcessId {
        self.process
    }
}

/// A writer that panicked has written a whole frame or none that matters: the
/// agent drops a connection that it cannot decode.
fn lock(stream: &Mutex<UnixStream>) -> MutexGuard<'_, UnixStream> {
    stream.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_run_abi::protocol::{CONTAINER, ExitStatus};

    fn frame(event: &Event) -> Vec<u8> {
        let body = postcard::to_stdvec(event).expect("encodes");
        [(body.len() as u32).to_le_bytes().as_slice(), &body].concat()
    }

    fn read_all(bytes: &[u8], allowance: u32) -> (Vec<Event>, Option<String>) {
        let mut incoming = Events::default();
        incoming.allow(allowance);
        let mut events = Vec::new();
        // Byte by byte: a stream has no borders.
        for byte in bytes {
            incoming.feed(&[*byte]);
            match incoming.next() {
                Ok(event) => events.extend(event),
                Err(why) => return (events, Some(why)),
            }
        }
        (events, None)
    }

    #[test]
    fn events_arrive_and_too_many_are_cut_off() {
        let started = Event::Started { process: CONTAINER };
        let exited = Event::Exited {
            process: CONTAINER,
            status: ExitStatus::Code(7),
        };
        let bytes = [frame(&started), frame(&exited), frame(&started)].concat();
        let (events, why) = read_all(&bytes, 2);
        assert_eq!(events, [started, exited]);
        let more = "the agent said more than it was asked";
        assert_eq!(why.as_deref(), Some(more));
    }

    #[test]
    fn hostile_frames_end_the_connection() {
        let giant = [u32::MAX.to_le_bytes().as_slice(), &[0; 64]].concat();
        let garbage = [3_u32.to_le_bytes().as_slice(), &[0xff; 3]].concat();
        for bytes in [giant, garbage] {
            let (events, why) = read_all(&bytes, 9);
            assert!(events.is_empty() && why.is_some());
        }
    }

    #[test]
    fn a_connection_that_ends_is_told_after_what_it_said() {
        let (ours, mut theirs) = UnixStream::pair().expect("a pair");
        let mut control = Control::new(ours).expect("a control");
        assert_eq!(control.hear(), Heard::Nothing);
        control.events.allow(1);
        let event = Event::Started { process: CONTAINER };
        theirs.write_all(&frame(&event)).expect("written");
        drop(theirs);
        assert_eq!(control.hear(), Heard::Event(event));
        assert!(matches!(control.hear(), Heard::Gone(_)));
    }
}
