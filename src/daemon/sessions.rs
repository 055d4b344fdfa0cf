//! The streams of a container's process: the supervisor's frames on one side, pieces of
//! bytes on the other. A thread for each direction, as long as both ends are there.

use crate::container::wire::{self, Frame, Window};
use anyhow::{Context, Result};
use docker_api::{Input, Output, Session};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use tokio::sync::mpsc;

/// How many pieces of bytes are on their way at most.
const PIECES: usize = 8;

/// What a thread that only copies needs.
const STACK: usize = 128 << 10;

/// The end of a session that somebody is to be given, and what is needed to give it to
/// them.
pub struct Ends {
    output: mpsc::Sender<Output>,
    input: mpsc::Receiver<Input>,
}

/// A session whose process may not be there yet.
pub fn pair(tty: bool) -> (Session, Ends) {
    let (output, said) = mpsc::channel(PIECES);
    let (heard, input) = mpsc::channel(PIECES);
    let session = Session {
        tty,
        output: said,
        input: heard,
    };
    (session, Ends { output, input })
}

impl Ends {
    /// Copies until either end is gone. `ended` is told how the process has ended, if it
    /// has.
    ///
    /// # Errors
    /// No thread.
    pub fn join(
        self,
        stream: UnixStream,
        ended: impl FnOnce(Option<u8>) + Send + 'static,
    ) -> Result<()> {
        let to = stream.try_clone().context("dup")?;
        let Self { output, input } = self;
        thread("session-input", move || hear(input, to))?;
        thread("session-output", move || ended(say(stream, &output)))
    }

    /// Whether the client has gone.
    pub fn are_alone(&self) -> bool {
        self.output.is_closed()
    }

    /// Says one thing, and ends.
    pub fn say(self, text: String) {
        // Nobody may be there to hear it.
        self.output.try_send(Output::Stdout(text.into())).ok();
    }
}

/// Reads all of a session's output, for nobody; how it ended.
pub fn drain(stream: UnixStream, ended: impl FnOnce(Option<u8>) + Send + 'static) -> Result<()> {
    thread("session-output", move || {
        let (output, nobody) = mpsc::channel(1);
        drop(nobody);
        ended(say_to(stream, &output, false));
    })
}

/// A thread that waits and copies.
pub fn thread(name: &str, body: impl FnOnce() + Send + 'static) -> Result<()> {
    std::thread::Builder::new()
        .name(name.into())
        .stack_size(STACK)
        .spawn(body)
        .map(drop)
        .context("cannot start a thread")
}

fn hear(mut input: mpsc::Receiver<Input>, mut to: UnixStream) {
    while let Some(piece) = input.blocking_recv() {
        let frame = match piece {
            Input::Bytes(bytes) => Frame::Input(bytes.into()),
            Input::End => Frame::InputEnded,
        };
        if wire::send_frame(&mut to, &frame).is_err() {
            return;
        }
    }
}

fn say(stream: UnixStream, output: &mpsc::Sender<Output>) -> Option<u8> {
    say_to(stream, output, true)
}

/// `needs_client`: whether it ends with who hears it.
fn say_to(mut stream: UnixStream, output: &mpsc::Sender<Output>, needs_client: bool) -> Option<u8> {
    loop {
        let piece = match wire::receive_frame(&mut stream) {
            Ok(Some(Frame::Stdout(bytes))) => Output::Stdout(bytes.into()),
            Ok(Some(Frame::Stderr(bytes))) => Output::Stderr(bytes.into()),
            Ok(Some(Frame::Ended { status, .. })) => return Some(status),
            Ok(_) | Err(_) => return None,
        };
        if output.blocking_send(piece).is_err() && needs_client {
            // The client has gone: the supervisor is to know.
            stream.shutdown(Shutdown::Both).ok();
            return None;
        }
    }
}

/// Tells the terminal at the other end of a session its size.
///
/// # Errors
/// A supervisor that has gone.
pub fn resize(stream: &mut UnixStream, window: docker_api::Window) -> Result<()> {
    let size = Window::of(window.rows, window.cols).size();
    wire::send_frame(stream, &Frame::Resize(size))
}
