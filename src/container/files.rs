//! What is done with a container's files and processes: by the agent of its guest, for the
//! host never looks into what a guest has written. The agent of a running container is
//! there; for one at rest a child is forked whose only purpose this is.

use super::engine::{Engine, answer};
use super::record::{Layer, Record, Status};
use super::wire::{self, Answer, Frame, Request};
use anyhow::{Context, Result, bail};
use fork::task::{TASK_NOT_FOUND, Task};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::de::DeserializeOwned;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use vm_run_archive::printable;

/// The longest answer that is no archive: room for a million changes.
const ANSWER_MAX: u64 = 64 << 20;
/// The longest complaint of a guest's.
const COMPLAINT_MAX: usize = 4096;
/// What is sent at once.
const PIECE: usize = 32 << 10;

/// A task that the guest could not do, in the guest's words.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct TaskFailed {
    message: String,
    status: u8,
}

impl TaskFailed {
    /// Whether that was because its path is not there.
    pub fn is_not_found(error: &anyhow::Error) -> bool {
        let failed = error.downcast_ref::<Self>();
        failed.is_some_and(|failed| failed.status == TASK_NOT_FOUND)
    }
}

/// A container whose files can be reached.
pub struct Files<'a> {
    engine: &'a Engine,
    record: &'a Record,
    /// Of one that is at rest: they are open for as long as this is.
    opened: Option<UnixStream>,
}

impl<'a> Files<'a> {
    /// Of a container that runs, or is at rest.
    ///
    /// # Errors
    /// One that is neither, or that keeps nothing when it is at rest.
    pub fn of(engine: &'a Engine, record: &'a Record) -> Result<Self> {
        let name = &record.name;
        let opened = match (record.state.status, record.spec.writable) {
            (Status::Running, _) => None,
            (Status::Paused, _) => bail!("container {name} is paused: unpause it first"),
            (Status::Restarting, _) => bail!("container {name} is being restarted: try again"),
            (Status::Created | Status::Exited, Layer::Inside) => bail!(
                "container {name} is in its template and keeps nothing when it stops: start it first"
            ),
            (Status::Created | Status::Exited, _) => {
                let opened = engine.open_files(record);
                Some(opened.with_context(|| format!("cannot open the files of {name}"))?)
            }
        };
        Ok(Self {
            engine,
            record,
            opened,
        })
    }

    /// Refuses what is to be written where nothing is kept.
    ///
    /// # Errors
    /// A container at rest whose layer is not on a disk.
    pub fn check_kept(&self) -> Result<()> {
        if self.opened.is_some() && self.record.spec.writable != Layer::Disk {
            let name = &self.record.name;
            bail!(
                "container {name} keeps nothing that is written while it is stopped: start it first"
            );
        }
        Ok(())
    }

    /// Begins a task.
    ///
    /// # Errors
    /// A container that has ended meanwhile.
    pub fn task(&self, task: Task) -> Result<Errand> {
        let request = Request::Task(task);
        let (answer, stream) = match self.opened {
            Some(_) => self.engine.ask_owner(self.record, &request)?,
            None => self.engine.ask(self.record, &request)?,
        };
        match answer {
            Answer::Done => Ok(Errand::new(stream)),
            other => bail!("the supervisor speaks out of turn: {other:?}"),
        }
    }

    /// Does a task whose answer is one value.
    ///
    /// # Errors
    /// [`TaskFailed`], or an answer that is none.
    pub fn ask<T: DeserializeOwned>(&self, task: Task) -> Result<T> {
        let mut errand = self.task(task)?;
        let mut bytes = Vec::new();
        let read = (&mut errand).take(ANSWER_MAX).read_to_end(&mut bytes);
        read.context("the container's supervisor has gone")?;
        if bytes.len() as u64 == ANSWER_MAX {
            bail!("the guest answers more than is sensible");
        }
        errand.finish()?;
        postcard::from_bytes(&bytes).context("the guest answers what cannot be read")
    }

    /// Closes them: what was written is on the disk when this returns.
    ///
    /// # Errors
    /// A child that has died on the way.
    pub fn close(self) -> Result<()> {
        let Some(mut opened) = self.opened else {
            return Ok(());
        };
        let closed = opened.shutdown(Shutdown::Write).map_err(Into::into);
        let closed = closed.and_then(|()| answer(&mut opened).map(drop));
        closed.with_context(|| format!("cannot close the files of {}", self.record.name))
    }
}

/// A task that is under way. What it says is read from it.
pub struct Errand {
    stream: UnixStream,
    said: Vec<u8>,
    /// What of that has been read.
    at: usize,
    complaint: Vec<u8>,
    ended: Option<(u8, String)>,
}

impl Errand {
    fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            said: Vec::new(),
            at: 0,
            complaint: Vec::new(),
            ended: None,
        }
    }

    /// Its standard input, until it is dropped.
    pub fn input(&mut self) -> Input<'_> {
        Input(self)
    }

    /// Takes what has come.
    fn hear(&mut self) -> Result<()> {
        match wire::receive_frame(&mut self.stream)? {
            Some(Frame::Stdout(bytes)) => (self.said, self.at) = (bytes, 0),
            Some(Frame::Stderr(bytes)) => {
                let room = COMPLAINT_MAX - self.complaint.len();
                self.complaint.extend(bytes.iter().take(room));
            }
            Some(Frame::Ended { status, why }) => self.ended = Some((status, why)),
            Some(_) => bail!("the supervisor speaks out of turn"),
            None => bail!("the container's supervisor has gone"),
        }
        Ok(())
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// [`TaskFailed`], or a supervisor that has gone.
    pub fn finish(mut self) -> Result<()> {
        loop {
            match self.ended.take() {
                None => self.hear()?,
                Some((0, _)) => return Ok(()),
                Some((_, why)) if !why.is_empty() => bail!(why),
                Some((status, _)) => {
                    let message = match self.complaint.trim_ascii_end() {
                        b"" => format!("the guest's task ended with status {status}"),
                        complaint => printable(complaint),
                    };
                    return Err(TaskFailed { message, status }.into());
                }
            }
        }
    }
}

impl Read for Errand {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        while self.at == self.said.len() && self.ended.is_none() {
            self.hear().map_err(io::Error::other)?;
        }
        let left = &self.said[self.at..];
        let got = left.len().min(bytes.len());
        bytes[..got].copy_from_slice(&left[..got]);
        self.at += got;
        Ok(got)
    }
}

/// The standard input of a task. It refuses more when the task has ended, or complains.
pub struct Input<'a>(&'a mut Errand);

impl Input<'_> {
    /// There will be no more.
    ///
    /// # Errors
    /// A supervisor that has gone.
    pub fn end(self) -> Result<()> {
        wire::send_frame(&mut self.0.stream, &Frame::InputEnded)
    }
}

impl Write for Input<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let mut heard = [PollFd::new(&self.0.stream, PollFlags::IN)];
        if poll(&mut heard, Some(&now))? > 0 {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let piece = &bytes[..bytes.len().min(PIECE)];
        let sent = wire::put(&mut self.0.stream, wire::INPUT, piece);
        sent.map_err(io::Error::other)?;
        Ok(piece.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A task, and a supervisor that says these frames of it.
    fn errand(frames: &[Frame]) -> (Errand, UnixStream) {
        let (ours, mut theirs) = UnixStream::pair().expect("a pair");
        for frame in frames {
            wire::send_frame(&mut theirs, frame).expect("sent");
        }
        (Errand::new(ours), theirs)
    }

    fn ended(status: u8, why: &str) -> Frame {
        let why = why.to_owned();
        Frame::Ended { status, why }
    }

    #[test]
    fn what_a_task_says_is_read_to_its_end() {
        let pieces = [&b"one "[..], b"", b"two"].map(|piece| Frame::Stdout(piece.to_vec()));
        let [one, none, two] = pieces;
        let (mut errand, _theirs) = errand(&[one, none, two, ended(0, "")]);
        let mut text = String::new();
        errand.read_to_string(&mut text).expect("read");
        assert_eq!(text, "one two");
        errand.finish().expect("it has ended well");
    }

    #[test]
    fn failures_are_told_in_one_line_that_does_nothing_to_a_terminal() {
        let complaint = Frame::Stderr(b"no \x1b[2J such\nfile\n".to_vec());
        let unread = Frame::Stdout(vec![7; 100]);
        let (failed, _theirs) = errand(&[unread, complaint, ended(TASK_NOT_FOUND, "")]);
        let error = failed.finish().expect_err("it has failed");
        assert_eq!(error.to_string(), "no \\u{1b}[2J such\\nfile");
        assert!(TaskFailed::is_not_found(&error));
        let (killed, _theirs) = errand(&[ended(137, "it was killed")]);
        let error = killed.finish().expect_err("it has failed");
        assert_eq!(error.to_string(), "it was killed");
        let (silent, _theirs) = errand(&[ended(1, "")]);
        let error = silent.finish().expect_err("it has failed");
        assert!(error.to_string().contains("status 1") && !TaskFailed::is_not_found(&error));
        let (alone, theirs) = errand(&[]);
        drop(theirs);
        alone.finish().expect_err("nobody is there");
    }

    #[test]
    fn a_task_that_has_failed_is_given_no_more() {
        let (mut errand, mut theirs) = errand(&[]);
        let mut input = errand.input();
        input.write_all(&[7; 3 * PIECE / 2]).expect("taken");
        let complaint = Frame::Stderr(b"full\n".to_vec());
        wire::send_frame(&mut theirs, &complaint).expect("sent");
        let refused = input.write_all(b"more").expect_err("refused");
        assert_eq!(refused.kind(), io::ErrorKind::BrokenPipe);
        let sent = [PIECE, PIECE / 2].map(|length| Some(Frame::Input(vec![7; length])));
        for frame in sent {
            assert_eq!(wire::receive_frame(&mut theirs).expect("received"), frame);
        }
    }
}
