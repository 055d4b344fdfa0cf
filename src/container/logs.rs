//! `vm-run logs`.

use super::engine::Engine;
use super::log::{Entry, Output, Reader};
use super::record::Record;
use anyhow::{Context, Result};
use jiff::{SignedDuration, Timestamp};
use std::collections::VecDeque;
use std::io::Write;
use std::time::Duration;

/// How often a followed log is looked at.
const PAUSE: Duration = Duration::from_millis(100);

/// What can be typed after `logs`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Go on until the container ends
    #[arg(short, long)]
    follow: bool,
    /// The last so many lines only
    #[arg(short = 'n', long, value_name = "N")]
    tail: Option<String>,
    /// Lines since then: an RFC 3339 time, seconds since 1970, or so long ago (90s, 5m, 2h)
    #[arg(long, value_name = "TIME")]
    since: Option<String>,
    /// Lines until then
    #[arg(long, value_name = "TIME")]
    until: Option<String>,
    /// Before each line, when it was said
    #[arg(short, long)]
    timestamps: bool,
    /// The container's name or id
    container: String,
}

/// What of a log is wanted, in docker's notation.
#[derive(Debug, Default)]
pub struct Wanted {
    /// The last so many lines only.
    pub tail: Option<usize>,
    /// From then on.
    pub since: Option<String>,
    /// Until then.
    pub until: Option<String>,
    /// Until the container ends, and not only what is there.
    pub follow: bool,
}

/// Prints it.
///
/// # Errors
/// One line.
pub fn show(engine: &Engine, args: &Args) -> Result<()> {
    let wanted = Wanted {
        tail: match args.tail.as_deref() {
            None | Some("all") => None,
            Some(n) => Some(n.parse().context("--tail is a number of lines, or all")?),
        },
        since: args.since.clone(),
        until: args.until.clone(),
        follow: args.follow,
    };
    let timestamps = args.timestamps;
    let record = engine.find(&args.container)?;
    read(
        engine,
        record,
        &wanted,
        || false,
        |entry| {
            let line = entry.line(timestamps);
            match entry.stream {
                Output::Stdout => std::io::stdout().write_all(line.as_bytes())?,
                Output::Stderr => std::io::stderr().write_all(line.as_bytes())?,
            }
            Ok(())
        },
    )
}

/// Reads what is wanted of a container's log, an entry at a time. `is_left` is asked now and
/// then while there is nothing to read.
///
/// # Errors
/// A time that is none, what the file system says, or what `take` says, which ends it.
pub fn read(
    engine: &Engine,
    record: Record,
    wanted: &Wanted,
    is_left: impl Fn() -> bool,
    mut take: impl FnMut(&Entry<'_>) -> Result<()>,
) -> Result<()> {
    let span = Span::of(wanted, Timestamp::now())?;
    let mut reader = Reader::open(&engine.log_path(&record), record.spec.log.max_files)?;
    let mut waiting = VecDeque::new();
    while let Some(entry) = reader.next()? {
        if !span.has(&entry) {
            continue;
        }
        match wanted.tail {
            Some(0) => {}
            Some(tail) => {
                if waiting.len() == tail {
                    waiting.pop_front();
                }
                waiting.push_back(entry);
            }
            None => take(&entry)?,
        }
    }
    waiting.iter().try_for_each(&mut take)?;
    if !wanted.follow {
        return Ok(());
    }
    let mut is_live = record.state.status.is_live();
    loop {
        while let Some(entry) = reader.next()? {
            if span.is_over(&entry) {
                return Ok(());
            }
            if span.has(&entry) {
                take(&entry)?;
            }
        }
        // Once more after it has ended, for what it said last.
        if !is_live || is_left() {
            return Ok(());
        }
        std::thread::sleep(PAUSE);
        let now = engine.find(&record.id);
        is_live = now.is_ok_and(|record| record.state.status.is_live());
    }
}

/// From when to when.
struct Span {
    since: Option<Timestamp>,
    until: Option<Timestamp>,
}

impl Span {
    fn of(wanted: &Wanted, now: Timestamp) -> Result<Self> {
        let time =
            |text: &Option<String>| text.as_deref().map(|text| moment(text, now)).transpose();
        Ok(Self {
            since: time(&wanted.since)?,
            until: time(&wanted.until)?,
        })
    }

    fn has(&self, entry: &Entry<'_>) -> bool {
        self.since.is_none_or(|since| entry.time >= since) && !self.is_over(entry)
    }

    fn is_over(&self, entry: &Entry<'_>) -> bool {
        self.until.is_some_and(|until| entry.time > until)
    }
}

/// A time as docker reads it.
fn moment(text: &str, now: Timestamp) -> Result<Timestamp> {
    let what = || {
        format!("{text:?} is no time: give an RFC 3339 time, seconds since 1970, or 90s, 5m, 2h")
    };
    if let Ok(seconds) = text.parse::<f64>() {
        let since_1970 = SignedDuration::try_from_secs_f64(seconds).with_context(what)?;
        return Timestamp::from_duration(since_1970).with_context(what);
    }
    if let Ok(time) = text.parse::<Timestamp>() {
        return Ok(time);
    }
    let ago: SignedDuration = text.parse().ok().with_context(what)?;
    now.checked_sub(ago).with_context(what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_as_docker_does() {
        let now = Timestamp::from_second(1_000_000).expect("a time");
        let second = |text| moment(text, now).map(Timestamp::as_second);
        assert_eq!(second("90s").expect("ago"), 999_910);
        assert_eq!(second("2h").expect("ago"), 992_800);
        assert_eq!(second("5m30s").expect("ago"), 999_670);
        assert_eq!(second("1234").expect("since 1970"), 1234);
        assert_eq!(second("1970-01-02T00:00:00Z").expect("a date"), 86_400);
        for bad in ["", "yesterday", "5 parsecs"] {
            assert!(moment(bad, now).is_err(), "{bad}");
        }
    }
}
