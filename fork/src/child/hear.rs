//! What a child waits for: its VM's news and its agent's events, together.

use super::{Child, Phase};
use crate::agent::Heard;
use crate::error::Error;
use crate::machine::News;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, BorrowedFd};
use rustix::io::Errno;
use std::time::{Duration, Instant};
use vm_run_abi::protocol::{CONTAINER, Event, ExitStatus, ProcessId};
use vmm::Moment;

/// How long a guest may take to explain that its agent has gone.
const LAST_WORDS: Duration = Duration::from_secs(1);

pub(super) enum Next {
    News(News),
    Heard(Heard),
    Timeout,
    /// What else was waited for is there.
    Woken,
}

/// What has ended a wait.
enum Bell {
    Rung,
    Silent,
    Other,
}

impl Child {
    /// Waits until a process of the container ends, or `until` is readable: `None`.
    /// For an owner that has other things to wait for. As with [`Self::wait`], the end
    /// of the container is told last, and once.
    ///
    /// # Errors
    /// A guest that dies, with its last console lines.
    pub fn next_exit(
        &mut self,
        until: BorrowedFd<'_>,
    ) -> Result<Option<(ProcessId, ExitStatus)>, Error> {
        self.expect(Phase::Started, "has no container to wait for")?;
        loop {
            // The container's own has the lowest number, and comes last.
            if let Some(process) = self.exits.keys().copied().max()
                && let Some(status) = self.exits.remove(&process)
            {
                if process == CONTAINER {
                    self.stages.exited = Some(Moment::now());
                    self.phase = Phase::Ended;
                }
                return Ok(Some((process, status)));
            }
            let heard = match self.next(None, Some(until)) {
                Ok(Next::Woken) => return Ok(None),
                Ok(next) => self.note(next).map(drop),
                Err(error) => Err(error),
            };
            self.settle(heard, Phase::Started)?;
        }
    }

    /// The agent's answer to a request. What happens by itself is noted.
    pub(super) fn answered(&mut self) -> Result<Event, Error> {
        let deadline = Instant::now() + self.patience();
        loop {
            match self.hear(Some(deadline))? {
                Some(answer) => return Ok(answer),
                None if Instant::now() >= deadline => {
                    return Err(Error::Died("the agent does not answer".into()));
                }
                None => {}
            }
        }
    }

    /// Waits for the agent's next word, at most to the deadline. What happens by
    /// itself is noted; an answer to a request is returned.
    pub(super) fn hear(&mut self, deadline: Option<Instant>) -> Result<Option<Event>, Error> {
        let next = self.next(deadline, None)?;
        self.note(next)
    }

    pub(super) fn note(&mut self, next: Next) -> Result<Option<Event>, Error> {
        match next {
            Next::Heard(Heard::Event(Event::Exited { process, status })) => {
                self.exits.insert(process, status);
                Ok(None)
            }
            Next::Heard(Heard::Event(Event::Warm)) => {
                self.is_warm = true;
                Ok(None)
            }
            Next::Heard(Heard::Event(answer)) => Ok(Some(answer)),
            Next::Heard(Heard::Gone(why)) => Err(self.explain(why)),
            Next::Heard(Heard::Nothing) | Next::Timeout | Next::Woken => Ok(None),
            Next::News(News::Dead(why)) => Err(Error::Died(why)),
            Next::News(_) => Ok(None),
        }
    }

    /// An agent that has gone is followed, or explained, by its guest.
    fn explain(&mut self, why: String) -> Error {
        self.control = None;
        let deadline = Instant::now() + LAST_WORDS;
        loop {
            match self.next(Some(deadline), None) {
                Ok(Next::News(News::Dead(why))) => return Error::Died(why),
                Ok(Next::News(_)) => {}
                Ok(_) | Err(_) => return Error::Died(why),
            }
        }
    }

    /// The next thing that happens. What has come is told before `until`.
    pub(super) fn next(
        &mut self,
        deadline: Option<Instant>,
        until: Option<BorrowedFd<'_>>,
    ) -> Result<Next, Error> {
        loop {
            if let Some(news) = self.machine.news() {
                return Ok(Next::News(news));
            }
            if let Some(control) = &mut self.control {
                match control.hear() {
                    Heard::Nothing => {}
                    heard => return Ok(Next::Heard(heard)),
                }
            }
            match self.wait_for_bell(deadline, until)? {
                Bell::Rung => {}
                Bell::Silent => return Ok(Next::Timeout),
                Bell::Other => return Ok(Next::Woken),
            }
        }
    }

    /// Waits for the VM, its agent, `until`, or the deadline.
    fn wait_for_bell(
        &self,
        deadline: Option<Instant>,
        until: Option<BorrowedFd<'_>>,
    ) -> Result<Bell, Error> {
        let bell = self.machine.bell();
        let control = self.control.as_ref().map(AsFd::as_fd);
        let mut waiting: Vec<PollFd<'_>> = [Some(bell), control, until]
            .into_iter()
            .flatten()
            .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN))
            .collect();
        let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
        let timeout = left.map(|left| Timespec {
            tv_sec: left.as_secs() as i64,
            tv_nsec: left.subsec_nanos().into(),
        });
        match poll(&mut waiting, timeout.as_ref()) {
            Ok(0) => Ok(Bell::Silent),
            Err(Errno::INTR) => Ok(Bell::Rung),
            Ok(_) => {
                let count = waiting.len() - usize::from(until.is_some());
                let rung = waiting[..count].iter().any(|fd| !fd.revents().is_empty());
                Ok(if rung { Bell::Rung } else { Bell::Other })
            }
            Err(e) => Err(Error::Died(format!("cannot wait for it: {e}"))),
        }
    }
}
