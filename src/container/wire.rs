//! What a container's supervisor and its clients say to each other, on its socket.
//!
//! A frame is a kind (one byte), a length (u32, little-endian) and as many bytes. The
//! client's first is a [`Request`] in JSON, the supervisor's first the [`Answer`] to
//! it. After [`Request::Start`], [`Request::Attach`], [`Request::Exec`] and
//! [`Request::Task`] the connection is a session: input, sizes and signals go one way, output the other, and
//! the last frame is [`Frame::Ended`]. After any other there is nothing more.

use crate::net::Membership;
use anyhow::{Context, Result, bail};
use fork::task::Task;
use fork::{Parcel, WindowSize};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

/// The longest frame: room for the longest command line and environment that Linux
/// takes, in JSON.
const FRAME_MAX: usize = 16 << 20;

/// What a client wants.
#[derive(Debug, Serialize, Deserialize)]
pub enum Request {
    /// Begin; only from whoever started the supervisor, and once.
    Start {
        /// Whether it is a session from then on.
        attach: bool,
        /// The size of its terminal.
        window: Option<Window>,
    },
    /// In the place of [`Request::Start`]: begin as a fork of a container that runs.
    /// Answered when all is ready for its picture, and again when it has begun.
    StartFork,
    /// Be one more client of the first process.
    Attach {
        /// Whether input may come.
        stdin: bool,
    },
    /// In the place of [`Request::Start`]: open the container's files, and start nothing,
    /// until the connection is closed by whoever asked. Answered when they are open, and
    /// again when they are closed.
    Open,
    /// Start one more process.
    Exec(Exec),
    /// Have something done in the container.
    Task(Task),
    /// Send a signal to the first process, by number.
    Signal(i32),
    /// End: by a signal, and by SIGKILL if it has not in so many seconds. Answered when
    /// it has.
    Stop {
        /// Instead of the container's own.
        signal: Option<i32>,
        /// Instead of the container's own.
        timeout: Option<u32>,
    },
    /// End, in any way. Answered when it has.
    Kill,
    /// Stop the vCPUs.
    Pause,
    /// Let them go on.
    Unpause,
    /// Answered when the container has ended for good.
    Wait,
    /// What it costs.
    Stats,
    /// Take a picture of it. The answer is followed by descriptors.
    Capture,
    /// Bring it back to where it was when this template was made of it.
    Rewind(String),
    /// Put it on one more network.
    Connect(Membership),
    /// Take it off a network, by name.
    Disconnect(String),
}

/// The size of a terminal, in characters.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Window {
    rows: u16,
    cols: u16,
}

impl Window {
    /// Of our own terminal, if there is one.
    pub fn ours() -> Option<Self> {
        crate::terminal::window_size().map(|size| Self {
            rows: size.rows,
            cols: size.cols,
        })
    }

    /// Of so many lines and columns.
    pub fn of(rows: u16, cols: u16) -> Self {
        Self { rows, cols }
    }

    /// As the library has it.
    pub fn size(self) -> WindowSize {
        WindowSize {
            rows: self.rows,
            cols: self.cols,
        }
    }
}

/// One more process.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Exec {
    /// The command line.
    pub args: Vec<String>,
    /// `NAME=value`, over the container's own.
    pub env: Vec<String>,
    /// Instead of the container's.
    pub cwd: Option<String>,
    /// Instead of the container's.
    pub user: Option<String>,
    /// Whether it is on a terminal.
    pub tty: bool,
    /// Whether it has a standard input.
    pub stdin: bool,
    /// Whether nobody sees its output, or waits for it.
    pub detach: bool,
    /// The size of its terminal.
    pub window: Option<Window>,
    /// Whether it has all capabilities.
    #[serde(default)]
    pub privileged: bool,
}

/// What becomes of a request.
#[derive(Debug, Serialize, Deserialize)]
pub enum Answer {
    /// It is done, or has begun.
    Done,
    /// The container has begun.
    Started {
        /// When its stages were reached.
        stages: Box<fork::Stages>,
        /// What a person has to be told, a line each.
        notices: Vec<String>,
    },
    /// The container has ended, with this status.
    Ended(u8),
    /// What it costs.
    Stats(Stats),
    /// A picture is there: see [`Picture::receive`].
    Captured(Label),
    /// It cannot be done.
    Failed {
        /// One line.
        message: String,
        /// The status that docker gives for it.
        code: u8,
    },
}

/// What a container costs its host, now.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Stats {
    /// Guest memory that it alone has, in KiB.
    pub guest_private: u64,
    /// All memory that it alone has, in KiB.
    pub private: u64,
    /// Its proportional set size, in KiB.
    pub pss: u64,
    /// What it has touched of its root image, shared through the host's page cache, in
    /// KiB; `None` if it reads the image from its disk.
    pub root_mapped: Option<u64>,
    /// Processor time of its worker, in microseconds.
    pub cpu_us: u64,
}

/// A part of a session.
#[derive(Debug, PartialEq, Eq)]
pub enum Frame {
    /// From the client: for its standard input.
    Input(Vec<u8>),
    /// From the client: there will be no more input.
    InputEnded,
    /// From the client: its terminal has another size.
    Resize(WindowSize),
    /// From the client: a signal for it, by number.
    Signal(i32),
    /// To the client: of its standard output, or its terminal.
    Stdout(Vec<u8>),
    /// To the client: of its standard error.
    Stderr(Vec<u8>),
    /// To the client: it has ended. The last frame.
    Ended {
        /// Its status.
        status: u8,
        /// Why, if it was by no doing of its own: one line.
        why: String,
    },
}

/// What comes before the descriptors of a picture.
#[derive(Debug, Serialize, Deserialize)]
pub struct Label {
    /// See [`Parcel::label`].
    text: Vec<u8>,
    /// How many descriptors follow.
    files: usize,
}

/// A picture of a container that ran: all that a child of it is made of.
pub struct Picture(Parcel);

/// Descriptors that go with one byte; Linux takes 253 (SCM_MAX_FD).
const FILES_AT_ONCE: usize = 64;

/// As many as a picture can have: a root image, a base, a state, and layers.
const FILES_MAX: usize = 256;

impl Picture {
    /// Of a template that has been taken apart.
    pub fn new(parcel: Parcel) -> Self {
        Self(parcel)
    }

    /// The parts.
    pub fn into_parcel(self) -> Parcel {
        self.0
    }

    /// Sends it after an answer; or by itself.
    ///
    /// # Errors
    /// A peer that is gone.
    pub fn send(&self, to: &mut UnixStream) -> Result<()> {
        send(to, &Answer::Captured(self.label()))?;
        self.send_files(to)
    }

    fn label(&self) -> Label {
        Label {
            text: self.0.label.clone(),
            files: self.0.files.len(),
        }
    }

    fn send_files(&self, to: &mut UnixStream) -> Result<()> {
        for files in self.0.files.chunks(FILES_AT_ONCE) {
            let files: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FILES_AT_ONCE))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !control.push(SendAncillaryMessage::ScmRights(&files)) {
                bail!("too many descriptors for a message");
            }
            let byte = [IoSlice::new(&[FILES])];
            sendmsg(&*to, &byte, &mut control, SendFlags::NOSIGNAL)?;
        }
        Ok(())
    }

    /// Receives what follows its label.
    ///
    /// # Errors
    /// A peer that is gone, or does not keep to the rules.
    pub fn receive(label: Label, from: &mut UnixStream) -> Result<Self> {
        if label.files > FILES_MAX {
            bail!("a picture of {} files, which are too many", label.files);
        }
        let mut files: Vec<OwnedFd> = Vec::new();
        while files.len() < label.files {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FILES_AT_ONCE))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut byte = [0];
            let mut slices = [IoSliceMut::new(&mut byte)];
            let got = recvmsg(&*from, &mut slices, &mut control, RecvFlags::CMSG_CLOEXEC)?;
            let before = files.len();
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                    files.extend(descriptors);
                }
            }
            if got.bytes != 1 || byte != [FILES] || files.len() == before {
                bail!("a picture that is cut short");
            }
        }
        Ok(Self(Parcel {
            label: label.text,
            files,
        }))
    }
}

const MESSAGE: u8 = 0;
/// Of [`Frame::Input`], for those who send input without owning it.
pub const INPUT: u8 = 1;
const INPUT_ENDED: u8 = 2;
const RESIZE: u8 = 3;
const SIGNAL: u8 = 4;
/// Of [`Frame::Stdout`], for those who copy output without owning it.
pub const STDOUT: u8 = 5;
/// Of [`Frame::Stderr`], likewise.
pub const STDERR: u8 = 6;
const ENDED: u8 = 7;
/// Beside it come descriptors; it has no length.
const FILES: u8 = 8;

/// Sends a request or an answer.
///
/// # Errors
/// A peer that is gone.
pub fn send(to: &mut impl Write, message: &impl Serialize) -> Result<()> {
    put(to, MESSAGE, &serde_json::to_vec(message)?)
}

/// Receives a request or an answer; `None` at the end of the connection.
///
/// # Errors
/// A peer that does not keep to the rules.
pub fn receive<T: DeserializeOwned>(from: &mut impl Read) -> Result<Option<T>> {
    match get(from)? {
        None => Ok(None),
        Some((MESSAGE, bytes)) => {
            let message = serde_json::from_slice(&bytes);
            message.map(Some).context("a message that is none of ours")
        }
        Some((kind, _)) => bail!("a frame of kind {kind} out of turn"),
    }
}

/// Sends a part of a session.
///
/// # Errors
/// A peer that is gone.
pub fn send_frame(to: &mut impl Write, frame: &Frame) -> Result<()> {
    match frame {
        Frame::Input(bytes) => put(to, INPUT, bytes),
        Frame::InputEnded => put(to, INPUT_ENDED, &[]),
        Frame::Resize(size) => {
            let (rows, cols) = (size.rows.to_le_bytes(), size.cols.to_le_bytes());
            put(to, RESIZE, &[rows, cols].concat())
        }
        Frame::Signal(signal) => put(to, SIGNAL, &signal.to_le_bytes()),
        Frame::Stdout(bytes) => put(to, STDOUT, bytes),
        Frame::Stderr(bytes) => put(to, STDERR, bytes),
        Frame::Ended { status, why } => put(to, ENDED, &[&[*status], why.as_bytes()].concat()),
    }
}

/// Receives a part of a session; `None` at the end of the connection.
///
/// # Errors
/// A peer that does not keep to the rules.
pub fn receive_frame(from: &mut impl Read) -> Result<Option<Frame>> {
    let Some((kind, bytes)) = get(from)? else {
        return Ok(None);
    };
    let frame = match (kind, &bytes[..]) {
        (INPUT, _) => Frame::Input(bytes),
        (INPUT_ENDED, []) => Frame::InputEnded,
        (RESIZE, &[a, b, c, d]) => Frame::Resize(WindowSize {
            rows: u16::from_le_bytes([a, b]),
            cols: u16::from_le_bytes([c, d]),
        }),
        (SIGNAL, &[a, b, c, d]) => Frame::Signal(i32::from_le_bytes([a, b, c, d])),
        (STDOUT, _) => Frame::Stdout(bytes),
        (STDERR, _) => Frame::Stderr(bytes),
        (ENDED, [status, why @ ..]) => Frame::Ended {
            status: *status,
            why: String::from_utf8_lossy(why).into_owned(),
        },
        _ => bail!("a frame of kind {kind} that is none of ours"),
    };
    Ok(Some(frame))
}

/// Sends a frame of a kind as it is.
///
/// # Errors
/// A peer that is gone.
pub fn put(to: &mut impl Write, kind: u8, bytes: &[u8]) -> Result<()> {
    let mut frame = Vec::with_capacity(5 + bytes.len());
    frame.push(kind);
    frame.extend(u32::try_from(bytes.len())?.to_le_bytes());
    frame.extend_from_slice(bytes);
    Ok(to.write_all(&frame)?)
}

fn get(from: &mut impl Read) -> Result<Option<(u8, Vec<u8>)>> {
    let mut header = [0; 5];
    match from.read_exact(&mut header) {
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(None),
        other => other?,
    }
    let [kind, len @ ..] = header;
    let len = u32::from_le_bytes(len) as usize;
    if len > FRAME_MAX {
        bail!("a frame of {len} bytes, which is too long");
    }
    // As it comes: a length alone takes no memory.
    let mut bytes = Vec::new();
    from.take(len as u64).read_to_end(&mut bytes)?;
    if bytes.len() < len {
        return Ok(None);
    }
    Ok(Some((kind, bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_and_messages_come_as_they_went() {
        let frames = [
            Frame::Input(b"in".into()),
            Frame::InputEnded,
            Frame::Resize(WindowSize { rows: 24, cols: 80 }),
            Frame::Signal(15),
            Frame::Stdout(Vec::new()),
            Frame::Stderr(b"err".into()),
            Frame::Ended {
                status: 137,
                why: "it was late".into(),
            },
        ];
        let mut bytes = Vec::new();
        send(
            &mut bytes,
            &Request::Stop {
                signal: None,
                timeout: Some(3),
            },
        )
        .expect("sent");
        for frame in &frames {
            send_frame(&mut bytes, frame).expect("sent");
        }
        let mut from = &bytes[..];
        let request = receive::<Request>(&mut from).expect("received");
        assert!(matches!(
            request,
            Some(Request::Stop {
                signal: None,
                timeout: Some(3)
            })
        ));
        for frame in frames {
            assert_eq!(receive_frame(&mut from).expect("received"), Some(frame));
        }
        assert_eq!(receive_frame(&mut from).expect("received"), None);
    }

    #[test]
    fn what_is_no_frame_is_refused() {
        let long = [&[INPUT][..], &u32::MAX.to_le_bytes()].concat();
        let odd = [RESIZE, 1, 0, 0, 0, 9];
        for bytes in [&long[..], &odd] {
            assert!(receive_frame(&mut &bytes[..]).is_err());
        }
        assert!(receive::<Request>(&mut &[INPUT, 0, 0, 0, 0][..]).is_err());
        // A connection that ends in the middle is one that has ended.
        let cut = [INPUT, 9, 0, 0, 0, 1];
        assert_eq!(receive_frame(&mut &cut[..]).expect("ends"), None);
    }
}
