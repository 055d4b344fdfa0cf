//! How fast frames may go: a bucket of tokens for each thing that is counted, in each
//! direction.
//!
//! A frame goes as soon as the bucket owes nothing, whatever its size, and the bucket may
//! owe for it afterwards: so the largest frame passes the smallest bucket, and the rate
//! is kept in the long run.

use std::io;
use std::num::NonZeroU64;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use rustix::event::Timespec;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, timerfd_create, timerfd_settime,
};
use serde::{Deserialize, Serialize};

/// So much in a second, and at once after a silence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rate {
    /// In the long run.
    pub per_second: NonZeroU64,
    /// How much may go without a pause, when nothing has for long enough. It is never
    /// less than what goes in four milliseconds.
    pub burst: u64,
}

/// What bounds the frames in one direction. By default, nothing does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimit {
    /// Their bytes, from the Ethernet header on.
    pub bytes: Option<Rate>,
    /// Their number. One that is cut into segments later counts once.
    pub frames: Option<Rate>,
}

/// What bounds the traffic of a network device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimits {
    /// What the guest sends.
    pub from_guest: RateLimit,
    /// What it receives.
    pub to_guest: RateLimit,
}

/// A duration, or a time since the limiter was made, in nanoseconds: enough for any number
/// of bytes at any rate.
type Nanos = u128;

const SECOND: Nanos = 1_000_000_000;
/// The least burst. With it, a device that waits at least [`PAUSE_MIN`] still keeps its
/// rate.
const BURST_MIN: Nanos = SECOND / 250;
/// The shortest pause, so that small frames at a high rate do not cost a timer each.
const PAUSE_MIN: Nanos = SECOND / 1000;
/// The longest: whoever waits looks again after it.
const PAUSE_MAX: Nanos = 3600 * SECOND;

/// Tokens, counted by the time at which there will be no more of them: full.
#[derive(Debug)]
struct Bucket {
    per_second: Nanos,
    /// How long it takes to fill.
    depth: Nanos,
    full_at: Nanos,
}

impl Bucket {
    fn new(rate: Rate) -> Self {
        let per_second = Nanos::from(rate.per_second.get());
        Self {
            per_second,
            depth: (Nanos::from(rate.burst) * SECOND / per_second).max(BURST_MIN),
            full_at: 0,
        }
    }

    /// When it owes nothing.
    fn ready_at(&self) -> Nanos {
        self.full_at.saturating_sub(self.depth)
    }

    fn charge(&mut self, now: Nanos, amount: usize) {
        let worth = amount as Nanos * SECOND / self.per_second;
        self.full_at = self.full_at.max(now) + worth;
    }
}

/// One direction.
#[derive(Debug)]
struct Pace {
    bytes: Option<Bucket>,
    frames: Option<Bucket>,
}

impl Pace {
    fn new(limit: RateLimit) -> Self {
        Self {
            bytes: limit.bytes.map(Bucket::new),
            frames: limit.frames.map(Bucket::new),
        }
    }

    fn buckets(&self) -> impl Iterator<Item = &Bucket> {
        self.bytes.iter().chain(&self.frames)
    }

    /// How long the next frame has to wait: `None` if it may go.
    fn pause(&self, now: Nanos) -> Option<Nanos> {
        let ready_at = self.buckets().map(Bucket::ready_at).max()?;
        (ready_at > now).then(|| (ready_at - now).clamp(PAUSE_MIN, PAUSE_MAX))
    }

    fn charge(&mut self, now: Nanos, len: usize) {
        if let Some(bytes) = &mut self.bytes {
            bytes.charge(now, len);
        }
        if let Some(frames) = &mut self.frames {
            frames.charge(now, 1);
        }
    }
}

/// Which way a frame goes.
#[derive(Clone, Copy, Debug)]
pub(super) enum Direction {
    FromGuest,
    ToGuest,
}

/// What holds the frames of one device back.
#[derive(Debug)]
pub(super) struct Limiter {
    start: Instant,
    from_guest: Pace,
    to_guest: Pace,
    /// Tells when a direction may go on (timerfd_create(2)).
    timer: OwnedFd,
    /// When it does, if it is set.
    wakes_at: Option<Nanos>,
}

impl Limiter {
    /// `None` if there is nothing to hold back.
    pub(super) fn new(limits: RateLimits) -> io::Result<Option<Box<Self>>> {
        if limits == RateLimits::default() {
            return Ok(None);
        }
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        Ok(Some(Box::new(Self {
            start: Instant::now(),
            from_guest: Pace::new(limits.from_guest),
            to_guest: Pace::new(limits.to_guest),
            timer: timerfd_create(TimerfdClockId::Monotonic, flags)?,
            wakes_at: None,
        })))
    }

    fn now(&self) -> Nanos {
        self.start.elapsed().as_nanos()
    }

    fn pace(&mut self, direction: Direction) -> &mut Pace {
        match direction {
            Direction::FromGuest => &mut self.from_guest,
            Direction::ToGuest => &mut self.to_guest,
        }
    }

    /// Whether a frame may go now. If not, the timer tells when to ask again.
    pub(super) fn admits(&mut self, direction: Direction) -> bool {
        let now = self.now();
        let Some(pause) = self.pace(direction).pause(now) else {
            return true;
        };
        match self.wake_in(now, pause) {
            Ok(()) => false,
            Err(error) => {
                // Without a timer it would wait for ever.
                log::debug!("network: no timer: {error}");
                true
            }
        }
    }

    fn wake_in(&mut self, now: Nanos, pause: Nanos) -> io::Result<()> {
        let at = now + pause;
        if self.wakes_at.is_some_and(|earlier| earlier <= at) {
            return Ok(());
        }
        let once = Itimerspec {
            it_interval: timespec(0),
            it_value: timespec(pause),
        };
        timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once)?;
        self.wakes_at = Some(at);
        Ok(())
    }

    /// The timer has told.
    pub(super) fn wake(&mut self) {
        self.wakes_at = None;
    }

    /// A frame of that many bytes has gone.
    pub(super) fn charge(&mut self, direction: Direction, len: usize) {
        let now = self.now();
        self.pace(direction).charge(now, len);
    }
}

/// Of a pause: no more than an hour.
fn timespec(pause: Nanos) -> Timespec {
    Timespec {
        tv_sec: (pause / SECOND) as i64,
        tv_nsec: (pause % SECOND) as _,
    }
}

impl AsFd for Limiter {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }
}

#[cfg(test)]
mod tests;
