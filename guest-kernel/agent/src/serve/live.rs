//! A guest that was forked while it ran: what its agent has to do before the container's
//! programs go on in the child.
//!
//! The host of the parent is not this one's. Its connections are gone, which the agent may
//! find out before it knows why; so whoever concludes anything from the end of one asks
//! first whether it is still the same guest ([`Server::is_reborn`]). The identity page says
//! so before any vCPU of the child runs.

use super::Server;
use super::freeze::{Attachment, Stage};
use super::hooks::When;
use std::io;
use vm_run_abi::protocol::CONTAINER;

impl Server {
    /// Whether this is a child of the guest that it thinks it is.
    pub(super) fn is_reborn(&self) -> bool {
        let live_fork = self.live_fork.as_ref();
        live_fork.is_some_and(|fork| fork.has_happened(self.generation))
    }

    /// Makes the guest what the identity page says, and lets the container's programs go
    /// on. An error is the end of the guest.
    pub(super) fn go_on_as_another(&mut self) -> io::Result<()> {
        if !matches!(self.stage, Stage::Serving) {
            return Err(io::Error::other("it was forked on its way to a fork point"));
        }
        let Some(live_fork) = &self.live_fork else {
            return Ok(());
        };
        let child = live_fork.take_identity().map_err(io::Error::other)?;
        self.leave_host()?;
        self.make_child(child)?;
        self.generation = child.generation;
        if let Some(live_fork) = &self.live_fork {
            live_fork.release(child)?;
        }
        if let Err(why) = self.begin_hook(When::PostFork)? {
            self.refuse(why);
        }
        Ok(())
    }

    /// Drops all that came from the parent's host. The container's first process keeps its
    /// ends of the streams and is not to know; other processes that the host has started
    /// find theirs closed.
    fn leave_host(&mut self) -> io::Result<()> {
        self.control = None;
        self.deadline = None;
        self.greetings.clear();
        self.arrived.clear();
        self.unfinished.clear();
        self.hooking.forget();
        for (_, tied) in std::mem::take(&mut self.streams) {
            let (mut end, host) = tied.link.untie();
            self.poll.remove(end.guest())?;
            self.poll.remove(&host)?;
            if tied.process == CONTAINER {
                end.part();
                self.loose.push((tied.stream, end));
            }
        }
        self.attachment = Attachment::Loose {
            ended: self.ended.clone(),
        };
        Ok(())
    }
}
