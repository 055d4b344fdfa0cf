use super::*;

const MILLI: Nanos = SECOND / 1000;

fn rate(per_second: u64, burst: u64) -> Rate {
    Rate {
        per_second: NonZeroU64::new(per_second).unwrap(),
        burst,
    }
}

fn bytes(per_second: u64, burst: u64) -> Pace {
    Pace::new(RateLimit {
        bytes: Some(rate(per_second, burst)),
        frames: None,
    })
}

/// Sends frames one after another as soon as each may go, until it is so late: how many
/// bytes.
fn sent(pace: &mut Pace, len: usize, from: Nanos, until: Nanos) -> u128 {
    let (mut now, mut sent) = (from, 0);
    while now < until {
        match pace.pause(now) {
            Some(pause) => now += pause,
            None => {
                pace.charge(now, len);
                sent += len as u128;
            }
        }
    }
    sent
}

#[test]
fn the_rate_is_kept_whatever_the_frames() {
    for per_second in [1_000_000, 1_000_000_000] {
        for len in [60, 1514, 65_550] {
            let mut pace = bytes(per_second, 100_000);
            let sent = sent(&mut pace, len, 0, 10 * SECOND);
            let fair = 10 * u128::from(per_second) + 100_000;
            let slack = len as u128 + fair / 1000;
            assert!(sent <= fair + slack, "{per_second} {len}: {sent}");
            assert!(sent + slack >= fair, "{per_second} {len}: {sent}");
        }
    }
}

#[test]
fn a_frame_larger_than_the_bucket_passes_and_is_paid_for() {
    let mut pace = bytes(1000, 0);
    assert_eq!(pace.pause(0), None);
    pace.charge(0, 65_000);
    let pause = pace.pause(0).unwrap();
    assert_eq!(pause, 65 * SECOND - BURST_MIN);
    assert!(pace.pause(pause - 1).is_some());
    assert_eq!(pace.pause(pause), None);
}

#[test]
fn a_silence_saves_no_more_than_a_burst() {
    let mut pace = bytes(1_000_000, 50_000);
    let at_once = |pace: &mut Pace, now| sent(pace, 1000, now, now + 1);
    assert_eq!(at_once(&mut pace, 0), 51_000);
    assert_eq!(at_once(&mut pace, 1000 * SECOND), 51_000);
    // What one millisecond gives.
    assert_eq!(at_once(&mut pace, 1000 * SECOND + 2 * MILLI), 2000);
}

#[test]
fn pauses_are_neither_too_short_nor_too_long() {
    let mut pace = bytes(1_000_000_000, 0);
    while pace.pause(0).is_none() {
        pace.charge(0, 60);
    }
    assert_eq!(pace.pause(0), Some(PAUSE_MIN));
    let mut pace = bytes(1, 0);
    pace.charge(0, 65_550);
    assert_eq!(pace.pause(0), Some(PAUSE_MAX));
    // Numbers that nobody means.
    let mut pace = bytes(1, u64::MAX);
    for now in [0, SECOND, Nanos::from(u64::MAX)] {
        pace.charge(now, usize::MAX);
        assert!(pace.pause(now).is_none_or(|pause| pause <= PAUSE_MAX));
    }
}

#[test]
fn both_bytes_and_frames_count() {
    let limit = RateLimit {
        bytes: Some(rate(1_000_000, 0)),
        frames: Some(rate(100, 0)),
    };
    let mut pace = Pace::new(limit);
    assert_eq!(sent(&mut pace, 60, 0, 10 * SECOND) / 60, 1001);
    let mut pace = Pace::new(limit);
    let large = sent(&mut pace, 50_000, 0, 10 * SECOND) / 50_000;
    assert!((200..=201).contains(&large), "{large}");
}

#[test]
fn without_a_limit_there_is_nothing() {
    assert!(Limiter::new(RateLimits::default()).unwrap().is_none());
    let limits = RateLimits {
        to_guest: RateLimit {
            frames: Some(rate(1, 1)),
            ..RateLimit::default()
        },
        ..RateLimits::default()
    };
    let mut limiter = Limiter::new(limits).unwrap().unwrap();
    for _ in 0..100 {
        assert!(limiter.admits(Direction::FromGuest));
        limiter.charge(Direction::FromGuest, 65_000);
    }
}
