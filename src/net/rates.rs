//! How fast a container's network is: bytes and packets in a second, in and out.

use crate::args;
use anyhow::{Result, bail};
use fork::{Rate, RateLimit, RateLimits};
use std::num::NonZeroU64;

/// What may go at once after a silence is what goes in this part of a second.
const BURST: u64 = 10;

/// Reads `--network-bps` and `--network-pps`: a number for both ways, or `in=` and `out=`
/// as the container sees it.
///
/// # Errors
/// One line.
pub fn parse(bytes: &[String], packets: &[String]) -> Result<RateLimits> {
    let mut limits = RateLimits::default();
    for word in bytes {
        apply(&mut limits, "--network-bps", word, |limit| &mut limit.bytes)?;
    }
    for word in packets {
        apply(&mut limits, "--network-pps", word, |limit| {
            &mut limit.frames
        })?;
    }
    Ok(limits)
}

fn apply(
    limits: &mut RateLimits,
    option: &str,
    word: &str,
    of: fn(&mut RateLimit) -> &mut Option<Rate>,
) -> Result<()> {
    let (ways, number) = match word.split_once('=') {
        None => (vec![&mut limits.to_guest, &mut limits.from_guest], word),
        Some(("in", number)) => (vec![&mut limits.to_guest], number),
        Some(("out", number)) => (vec![&mut limits.from_guest], number),
        Some(_) => bail!("{option} {word}: it is N, in=N or out=N"),
    };
    let Some(per_second) = args::size(number).ok().and_then(NonZeroU64::new) else {
        bail!("{option} {word}: N is a number above 0, with k, m or g if wanted");
    };
    for way in ways {
        let burst = per_second.get() / BURST;
        let rate = Rate { per_second, burst };
        if of(way).replace(rate).is_some() {
            bail!("{option} {word}: that way has its limit already");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(words: &[&str]) -> Vec<String> {
        words.iter().map(|word| (*word).to_owned()).collect()
    }

    fn per_second(rate: Option<Rate>) -> Option<u64> {
        rate.map(|rate| rate.per_second.get())
    }

    #[test]
    fn a_number_is_for_both_ways_and_a_way_can_be_named() {
        assert_eq!(parse(&[], &[]).expect("fine"), RateLimits::default());
        let limits = parse(&words(&["in=10m", "out=1k"]), &words(&["500"])).expect("fine");
        assert_eq!(per_second(limits.to_guest.bytes), Some(10 << 20));
        assert_eq!(per_second(limits.from_guest.bytes), Some(1 << 10));
        assert_eq!(per_second(limits.to_guest.frames), Some(500));
        assert_eq!(limits.to_guest.frames, limits.from_guest.frames);
    }

    #[test]
    fn what_is_wrong_is_refused_in_one_line() {
        for word in ["", "0", "-1", "x", "in=", "up=1", "in=out=1"] {
            for (bytes, packets) in [(vec![word], vec![]), (vec![], vec![word])] {
                let error = parse(&words(&bytes), &words(&packets)).expect_err(word);
                assert!(format!("{error:#}").contains(word), "{error:#}");
            }
        }
        assert!(parse(&words(&["1m", "in=2m"]), &[]).is_err());
    }
}
