//! How a child comes to its identity, and to another.

use super::hear::Next;
use super::{Child, Phase, TIMEOUT};
use crate::error::Error;
use crate::identity;
use crate::machine::News;
use std::time::Instant;

impl Child {
    /// Waits until the guest has applied its identity.
    ///
    /// # Errors
    /// A guest that does not, or that applied another one: it is poisoned, and
    /// nothing is ever started in it.
    pub fn confirm(&mut self) -> Result<(), Error> {
        self.expect(Phase::Forked, "is not fresh from the fork")?;
        let result = self.await_identity();
        self.settle(result, Phase::Confirmed)
    }

    /// Makes somebody else of a child, at whatever instruction it is: it is stopped, and
    /// goes on with other random numbers, another generation and the host's time, of
    /// which its kernel knows before any program in it runs. Its hostname stays. For who
    /// has stopped it, for whatever reason, in a way that its programs are to know of;
    /// a held or paused child goes on by it.
    ///
    /// # Errors
    /// A child with no identity yet, a guest whose kernel is not vm-run's own, or one
    /// that does not take it: that is poisoned, and stopped as it is.
    pub fn renew_identity(&mut self) -> Result<(), Error> {
        let phase = self.phase;
        if !matches!(phase, Phase::Confirmed | Phase::Started) {
            self.expect(Phase::Confirmed, "has no identity, or is over")?;
        }
        let identity = identity::draw(&self.born.hostname)?;
        self.renew(identity.generation, &identity.to_bytes())
    }

    /// `page` is what the identity page is to begin with.
    fn renew(&mut self, generation: u64, page: &[u8]) -> Result<(), Error> {
        let phase = self.phase;
        let renewed = self
            .machine
            .renew(page)
            .and_then(|()| self.await_renewal(generation));
        if renewed.is_ok() {
            self.born.generation = generation;
            self.born.is_held = false;
        } else if let Err(error) = self.machine.pause() {
            log::debug!("a child that is nobody cannot be stopped: {error}");
        }
        self.settle(renewed, phase)
    }

    fn await_renewal(&mut self, wanted: u64) -> Result<(), Error> {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            match self.next(Some(deadline), None)? {
                Next::News(News::IdentityTaken { generation }) if generation == wanted => {
                    return Ok(());
                }
                Next::News(News::IdentityTaken { .. }) => {
                    return Err(Error::Identity(": it has another child's".into()));
                }
                Next::News(News::Dead(why)) => return Err(Error::Identity(format!(": {why}"))),
                Next::Timeout => return Err(self.has_no_identity()),
                // What its programs do meanwhile is theirs.
                next => drop(self.note(next)?),
            }
        }
    }

    fn await_identity(&mut self) -> Result<(), Error> {
        let deadline = Instant::now() + TIMEOUT;
        let mut next = self.next(Some(deadline), None)?;
        if let Next::News(News::IdentityTaken { generation }) = next
            && self.template.live.is_some()
            && generation == self.born.generation
        {
            // Its kernel's part; the agent's follows.
            next = self.next(Some(deadline), None)?;
        }
        match next {
            Next::News(News::IdentityApplied {
                generation,
                entered,
                at,
            }) if generation == self.born.generation => {
                self.stages.entered = Some(entered);
                self.stages.confirmed = Some(at);
                Ok(())
            }
            Next::News(News::IdentityApplied { .. }) => {
                Err(Error::Identity(": it has another child's".into()))
            }
            Next::News(News::Dead(why)) => Err(Error::Identity(format!(": {why}"))),
            Next::Timeout => Err(self.has_no_identity()),
            Next::News(_) | Next::Heard(_) | Next::Woken => {
                Err(Error::Identity(": it speaks out of turn".into()))
            }
        }
    }

    fn has_no_identity(&mut self) -> Error {
        let tail = self.machine.console_tail().join(" | ");
        let seconds = TIMEOUT.as_secs();
        Error::Identity(format!(" in {seconds} s; console: {tail}"))
    }
}
