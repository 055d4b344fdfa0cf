//! A warm container on its way to the fork point, and from there to a host.

use super::Server;
use super::hooks::When;
use crate::connections;
use crate::container::check_streams;
use crate::drawn;
use crate::identity::Child;
use crate::poll::Token;
use crate::streams::Turn;
use rustix::event::epoll::EventFlags;
use rustix::fd::{AsFd, OwnedFd};
use rustix::net::{Shutdown, shutdown};
use std::collections::BTreeMap;
use std::io;
use std::time::{Duration, Instant};
use vm_run_abi::identity::Connections;
use vm_run_abi::protocol::{CONTAINER, Event, Stream};

/// How long a container may take to stop, and the host to read what it has
/// written.
const PATIENCE: Duration = Duration::from_secs(10);

/// How far the guest is from the fork point.
#[derive(Debug)]
pub(super) enum Stage {
    /// It is not going there.
    Serving,
    /// The command of its hook runs in the container.
    Hooking,
    /// The container is told to stop; until when it may take.
    Freezing(Instant),
    /// It has stopped, and the host reads what it has written.
    Delivering(Instant),
    /// All is said, and the host closes its connections: these, and that for
    /// control.
    Leaving(BTreeMap<u64, OwnedFd>),
}

impl Stage {
    /// When it has taken too long.
    pub(super) fn until(&self) -> Option<Instant> {
        match self {
            Self::Freezing(until) | Self::Delivering(until) => Some(*until),
            Self::Serving | Self::Hooking | Self::Leaving(_) => None,
        }
    }

    /// Whether it goes there, and may not arrive.
    pub(super) fn is_on_the_way(&self) -> bool {
        matches!(self, Self::Hooking) || self.until().is_some()
    }

    /// Whether no more is to be started or tied.
    pub(super) fn is_leaving(&self) -> bool {
        matches!(self, Self::Leaving(_))
    }

    /// Something has happened to a connection that the host is to close.
    pub(super) fn left(&mut self, number: u64, flags: EventFlags) {
        if let Self::Leaving(connections) = self
            && flags.intersects(EventFlags::HUP | EventFlags::ERR)
        {
            connections.remove(&number);
        }
    }
}

/// How the first process stands to its host.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Attachment {
    /// The host has started it, or is attached to it.
    Tied,
    /// The host is a new one. It is told of the process's end when it attaches.
    Loose {
        /// The event of that.
        ended: Option<Event>,
    },
    /// The host has asked for these streams, and they have not all come.
    Asked {
        /// Which.
        streams: Vec<Stream>,
        /// As above.
        ended: Option<Event>,
    },
    /// The child's hook has failed: whoever attaches is told so.
    Refused {
        /// How.
        why: String,
    },
}

impl Server {
    /// The request to freeze; `false` if it makes no sense.
    pub(super) fn freeze(&mut self) -> io::Result<bool> {
        let is_asked = matches!(self.attachment, Attachment::Asked { .. });
        if self.stage.is_on_the_way() || is_asked {
            return Ok(false);
        }
        let begun = match self.check_freeze() {
            Ok(()) => self.begin_hook(When::PreFreeze)?,
            Err(why) => Err(why),
        };
        match begun {
            Ok(true) => self.stage = Stage::Hooking,
            Ok(false) => self.begin_freezing(),
            Err(why) => self.freeze_failed(why),
        }
        Ok(true)
    }

    /// Has the container stop, if it may.
    pub(super) fn begin_freezing(&mut self) {
        let begun = self.check_freeze().and_then(|()| self.stop_container());
        self.stage = match begun {
            Ok(()) => Stage::Freezing(Instant::now() + PATIENCE),
            Err(why) => {
                self.freeze_failed(why);
                Stage::Serving
            }
        };
    }

    fn check_freeze(&self) -> Result<(), String> {
        if self.warm.is_none() {
            return Err("the container was not started as a warm one".to_owned());
        }
        let only_first = self.streams.values().all(|tied| tied.process == CONTAINER);
        if !self.container.is_alone() || !only_first {
            return Err("the container's first process must run, and no other".to_owned());
        }
        Ok(())
    }

    fn stop_container(&mut self) -> Result<(), String> {
        let freezer = &self.resources.freezer;
        freezer
            .freeze()
            .and_then(|()| self.poll.watch_for_change(freezer.events(), Token::Freezer))
            .map_err(|e| format!("cannot freeze the container: {e}"))
    }

    /// Takes the steps that can be taken, from the request to the event.
    pub(super) fn go_on_freezing(&mut self) -> io::Result<()> {
        let Some(until) = self.stage.until() else {
            return Ok(());
        };
        if matches!(self.stage, Stage::Freezing(_)) && self.resources.freezer.is_frozen()? {
            self.poll.remove(self.resources.freezer.events())?;
            self.drawn = drawn::find(self.resources.cgroup.as_fd())?;
            self.stage = Stage::Delivering(until);
            if let Some(warm) = &mut self.warm
                && warm.catch_up(&self.poll)?
            {
                self.send(&Event::Warm);
            }
        }
        if matches!(self.stage, Stage::Delivering(_)) && self.deliver_all() {
            self.let_go()?;
            self.send(&Event::Frozen);
        }
        if self.stage.until().is_some() && Instant::now() >= until {
            self.stop_freezing(match self.stage {
                Stage::Freezing(_) => "the container does not stop",
                _ => "the host does not read what the container has written",
            });
        }
        Ok(())
    }

    /// Delivers what the container has written: whether the host has it all.
    fn deliver_all(&mut self) -> bool {
        let mut turns = Vec::new();
        for (number, tied) in &mut self.streams {
            turns.push((*number, tied.link.deliver(), tied.link.is_delivered()));
        }
        let mut all = true;
        for (number, turn, is_delivered) in turns {
            match turn {
                Turn::Waiting => all &= is_delivered,
                Turn::More => {
                    all = false;
                    self.come_back(number);
                }
                Turn::Over => drop(self.streams.remove(&number)),
            }
        }
        all
    }

    /// Takes the host's connections from the streams of the container, whose own
    /// ends stay open: it is not to know.
    fn let_go(&mut self) -> io::Result<()> {
        let mut connections = BTreeMap::new();
        for (number, tied) in std::mem::take(&mut self.streams) {
            let (end, host) = tied.link.untie();
            self.poll.remove(end.guest())?;
            self.poll.remove(&host)?;
            // The host has all that comes. If it has gone, there is nobody left
            // to tell.
            shutdown(&host, Shutdown::Write).ok();
            self.poll.watch_edges(&host, Token::Leaving(number))?;
            connections.insert(number, host);
            self.loose.push((tied.stream, end));
        }
        self.unfinished.clear();
        self.arrived.clear();
        if let Attachment::Tied = self.attachment {
            // Its end, too, is for the next host from here on.
            self.attachment = Attachment::Loose { ended: None };
        }
        self.stage = Stage::Leaving(connections);
        Ok(())
    }

    /// The first process has ended: its loose streams end too, and a freeze
    /// fails.
    pub(super) fn first_has_ended(&mut self) {
        for (_, end) in &mut self.loose {
            end.process_ended();
        }
        if self.stage.is_on_the_way() {
            self.stop_freezing("the container has ended");
        }
    }

    pub(super) fn stop_freezing(&mut self, why: &str) {
        let freezer = &self.resources.freezer;
        if matches!(self.stage, Stage::Freezing(_)) {
            // Of a descriptor that was added at the beginning.
            self.poll.remove(freezer.events()).ok();
        }
        self.stage = Stage::Serving;
        match freezer.thaw() {
            Ok(()) => self.freeze_failed(why.to_owned()),
            Err(e) => self.freeze_failed(format!("{why}; and it does not run on: {e}")),
        }
    }

    fn freeze_failed(&mut self, message: String) {
        self.send(&Event::FreezeFailed { message });
    }

    /// Whether the next instruction may be the fork point.
    pub(super) fn is_at_fork_point(&self) -> bool {
        let Stage::Leaving(connections) = &self.stage else {
            return false;
        };
        self.control.is_none() && connections.is_empty() && self.greetings.is_empty()
    }

    /// After the fork point, and after the identity of this child has been applied: lets
    /// the container that [`super::Done::Frozen`] told of run as a child.
    /// Without one there is nothing to do. An error must end the guest.
    pub fn become_child(&mut self, child: Child) -> io::Result<()> {
        self.generation = child.generation;
        let Stage::Leaving(_) = self.stage else {
            return Ok(());
        };
        self.make_child(child)?;
        for drawn in std::mem::take(&mut self.drawn) {
            drawn.again()?;
        }
        self.stage = Stage::Serving;
        // From here on the container runs.
        self.resources.freezer.thaw()?;
        if let Err(why) = self.begin_hook(When::PostFork)? {
            self.refuse(why);
        }
        Ok(())
    }

    /// What there is to do in every child with a container inside, which does not run.
    pub(super) fn make_child(&mut self, child: Child) -> io::Result<()> {
        if let Some(warm) = &mut self.warm {
            warm.become_child(child.generation);
        }
        self.container.become_child()?;
        if self.is_connected && child.connections == Connections::Reset {
            connections::reset()?;
        }
        Ok(())
    }

    /// The request to attach; `false` if it makes no sense.
    pub(super) fn attach(&mut self, streams: Vec<Stream>) -> io::Result<bool> {
        if let Attachment::Refused { why } = &mut self.attachment {
            let why = std::mem::take(why);
            self.tell_refused(why);
            return Ok(true);
        }
        let Attachment::Loose { ended } = &mut self.attachment else {
            return Ok(false);
        };
        if check_streams(&streams).is_err() {
            return Ok(false);
        }
        let ended = ended.take();
        self.attachment = Attachment::Asked { streams, ended };
        self.attach_if_complete()?;
        Ok(true)
    }

    /// Ties the streams that the host has asked for, once they have all come and the
    /// child's hook has done its work.
    pub(super) fn attach_if_complete(&mut self) -> io::Result<()> {
        let Attachment::Asked { streams, .. } = &self.attachment else {
            return Ok(());
        };
        let has_come = |stream: &Stream| {
            let mut all = self.arrived.iter();
            all.any(|a| (a.process, a.stream) == (CONTAINER, *stream))
        };
        if self.hooking.is_running() || !streams.iter().all(has_come) {
            return Ok(());
        }
        let attachment = std::mem::replace(&mut self.attachment, Attachment::Tied);
        let Attachment::Asked { streams, ended } = attachment else {
            return Ok(());
        };
        self.send(&Event::Started { process: CONTAINER });
        for (stream, end) in std::mem::take(&mut self.loose) {
            if streams.contains(&stream) {
                self.tie(CONTAINER, stream, end)?;
            } else {
                self.loose.push((stream, end));
            }
        }
        // What is left is for streams that the process does not have.
        self.arrived.retain(|a| a.process != CONTAINER);
        if let Some(event) = ended {
            self.send(&event);
        }
        Ok(())
    }
}
