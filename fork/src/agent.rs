//! The control connection to the agent. Whatever comes from there was written
//! by a guest.

use crate::child::Message;
use crate::error::Error;
use serde::Serialize;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
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

/// The control connection, and the thread that reads it.
pub(crate) struct Control {
    writer: Arc<Mutex<UnixStream>>,
    /// How many events the agent may yet send: each started process gives it
    /// two. A guest that sends more is cut off, so that it fills no memory.
    allowance: Arc<AtomicU32>,
    reader: Option<JoinHandle<()>>,
}

impl Control {
    pub(crate) fn new(stream: UnixStream, inbox: Sender<Message>) -> Result<Self, Error> {
        let os = |e: io::Error| Error::Died(format!("cannot follow the agent: {e}"));
        let mut from = stream.try_clone().map_err(os)?;
        let allowance = Arc::new(AtomicU32::new(0));
        let left = Arc::clone(&allowance);
        let reader = std::thread::Builder::new()
            .name("agent".into())
            .spawn(move || {
                let why = read_events(&mut from, &left, |event| {
                    inbox.send(Message::Agent(event)).is_ok()
                });
                // Without a child there is nobody to tell.
                drop(inbox.send(Message::AgentGone(why)));
            })
            .map_err(os)?;
        Ok(Self {
            writer: Arc::new(Mutex::new(stream)),
            allowance,
            reader: Some(reader),
        })
    }

    /// Sends a request that starts a process.
    pub(crate) fn start(&self, request: &Request) -> Result<(), Error> {
        self.allowance.fetch_add(2, Ordering::Relaxed);
        send(&lock(&self.writer), request)
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
        if let Some(reader) = self.reader.take()
            && reader.join().is_err()
        {
            log::error!("the reader of an agent's events has panicked");
        }
    }
}

/// Reads events until the connection ends or breaks the rules; says which.
pub(crate) fn read_events(
    from: &mut impl Read,
    allowance: &AtomicU32,
    mut deliver: impl FnMut(Event) -> bool,
) -> String {
    loop {
        let event = match read_event(from) {
            Ok(event) => event,
            Err(e) => return format!("the agent's connection ended: {e}"),
        };
        let granted = allowance
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1))
            .is_ok();
        if !granted {
            return "the agent said more than it was asked".into();
        }
        if !deliver(event) {
            return "nobody listens".into();
        }
    }
}

fn read_event(from: &mut impl Read) -> io::Result<Event> {
    let mut len = [0; 4];
    from.read_exact(&mut len)?;
    let len = u32::from_le_bytes(len) as usize;
    if len > MAX_EVENT_FRAME {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    let mut body = vec![0; len];
    from.read_exact(&mut body)?;
    postcard::from_bytes(&body).map_err(|_| io::ErrorKind::InvalidData.into())
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
}

/// A writer that panicked has written a whole frame or none that matters: the
/// agent drops a connection that it cannot decode.
fn lock(stream: &Mutex<UnixStream>) -> std::sync::MutexGuard<'_, UnixStream> {
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

    fn read_all(bytes: &[u8], allowance: u32) -> (Vec<Event>, String) {
        let mut events = Vec::new();
        let why = read_events(&mut &bytes[..], &AtomicU32::new(allowance), |event| {
            events.push(event);
            true
        });
        (events, why)
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
        assert_eq!(why, "the agent said more than it was asked");
    }

    #[test]
    fn hostile_frames_end_the_connection() {
        let giant = [u32::MAX.to_le_bytes().as_slice(), &[0; 64]].concat();
        let garbage = [3_u32.to_le_bytes().as_slice(), &[0xff; 3]].concat();
        let cut = &frame(&Event::Started { process: 1 })[..5];
        for bytes in [&giant[..], &garbage, cut, &[]] {
            let (events, why) = read_all(bytes, 9);
            assert!(events.is_empty() && why.starts_with("the agent's connection ended"));
        }
    }
}
