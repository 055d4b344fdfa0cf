//! What the loop waits for: an epoll, and the names of what is in it.

use rustix::buffer::spare_capacity;
use rustix::event::{Timespec, epoll};
use rustix::fd::{AsFd, OwnedFd};
use rustix::io::Errno;
use std::io;
use vm_run_abi::protocol::ProcessId;

/// What an event is about. A number is never used twice for the same kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Token {
    /// A connection waits to be accepted.
    Listener,
    /// A process has ended.
    Signals,
    /// The host's control connection.
    Control,
    /// The container's cgroup has changed.
    Freezer,
    /// A process of the container waits to be accepted.
    WarmListener,
    /// One that has been.
    WarmClient(u64),
    /// What a new process reports.
    Reports(ProcessId),
    /// A connection that has not said what it is for.
    Greeting(u64),
    /// Either side of a stream.
    Stream(u64),
    /// A connection that the host is to close.
    Leaving(u64),
    /// What a hook's command says.
    Hook(u64),
    /// The guest was forked while it ran.
    Forked,
}

impl Token {
    fn to_u64(self) -> u64 {
        let (kind, number) = match self {
            Self::Listener => (0, 0),
            Self::Signals => (1, 0),
            Self::Control => (2, 0),
            Self::Freezer => (3, 0),
            Self::WarmListener => (4, 0),
            Self::WarmClient(number) => (5, number),
            Self::Reports(process) => (6, u64::from(process)),
            Self::Greeting(number) => (7, number),
            Self::Stream(number) => (8, number),
            Self::Leaving(number) => (9, number),
            Self::Hook(number) => (10, number),
            Self::Forked => (11, 0),
        };
        number << 4 | kind
    }

    fn from_u64(value: u64) -> Option<Self> {
        let number = value >> 4;
        Some(match value & 15 {
            0 => Self::Listener,
            1 => Self::Signals,
            2 => Self::Control,
            3 => Self::Freezer,
            4 => Self::WarmListener,
            5 => Self::WarmClient(number),
            6 => Self::Reports(number as ProcessId),
            7 => Self::Greeting(number),
            8 => Self::Stream(number),
            9 => Self::Leaving(number),
            10 => Self::Hook(number),
            11 => Self::Forked,
            _ => return None,
        })
    }
}

/// An epoll.
#[derive(Debug)]
pub struct Poll(OwnedFd);

impl Poll {
    /// Makes one.
    pub fn new() -> io::Result<Self> {
        Ok(Self(epoll::create(epoll::CreateFlags::CLOEXEC)?))
    }

    /// Watches for something to read or accept, told again until it is taken.
    pub fn watch_for_input(&self, fd: impl AsFd, token: Token) -> io::Result<()> {
        self.add(fd, token, epoll::EventFlags::IN)
    }

    /// Watches a file of sysfs or a cgroup for a change, told until it is read.
    pub fn watch_for_change(&self, fd: impl AsFd, token: Token) -> io::Result<()> {
        self.add(fd, token, epoll::EventFlags::PRI)
    }

    /// Watches both directions, told once at each change: readers and writers
    /// go on to EAGAIN.
    pub fn watch_edges(&self, fd: impl AsFd, token: Token) -> io::Result<()> {
        let flags = epoll::EventFlags::IN
            | epoll::EventFlags::OUT
            | epoll::EventFlags::RDHUP
            | epoll::EventFlags::ET;
        self.add(fd, token, flags)
    }

    fn add(&self, fd: impl AsFd, token: Token, flags: epoll::EventFlags) -> io::Result<()> {
        let data = epoll::EventData::new_u64(token.to_u64());
        Ok(epoll::add(&self.0, fd, data, flags)?)
    }

    /// Watches no longer.
    pub fn remove(&self, fd: impl AsFd) -> io::Result<()> {
        Ok(epoll::delete(&self.0, fd)?)
    }

    /// Waits for events and puts them into `events`; none after `timeout`, or
    /// after a signal.
    pub fn wait(
        &self,
        events: &mut Vec<epoll::Event>,
        timeout: Option<Timespec>,
    ) -> io::Result<()> {
        events.clear();
        match epoll::wait(&self.0, spare_capacity(events), timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }
}

/// What an event of [`Poll::wait`] is about, and its flags.
pub fn meaning(event: &epoll::Event) -> Option<(Token, epoll::EventFlags)> {
    let (flags, data) = (event.flags, event.data);
    Token::from_u64(data.u64()).map(|token| (token, flags))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_survive_the_kernel() {
        let all = [
            Token::Listener,
            Token::Signals,
            Token::Control,
            Token::Freezer,
            Token::WarmListener,
            Token::WarmClient(1),
            Token::Reports(ProcessId::MAX),
            Token::Greeting(1 << 40),
            Token::Stream(3),
            Token::Leaving(4),
            Token::Hook(1),
            Token::Forked,
        ];
        for token in all {
            assert_eq!(Token::from_u64(token.to_u64()), Some(token));
        }
        assert_eq!(Token::from_u64(15), None);
    }
}
