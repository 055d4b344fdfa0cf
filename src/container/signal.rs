//! Signals as people and images name them.

use anyhow::{Context, Result};

/// The highest number: SIGRTMAX.
const HIGHEST: i32 = 64;

/// The number of `SIGTERM`, `term` or `15`.
///
/// # Errors
/// Anything else, in one line.
pub fn parse(text: &str) -> Result<i32> {
    let wanted = text.trim().to_ascii_uppercase();
    let wanted = wanted.strip_prefix("SIG").unwrap_or(&wanted);
    let number = wanted.parse().ok().filter(|n| (1..=HIGHEST).contains(n));
    let real_time = || {
        let (base, offset) = match wanted.strip_prefix("RTMIN") {
            Some(offset) => (34, offset),
            None => (HIGHEST, wanted.strip_prefix("RTMAX")?),
        };
        let offset: i32 = if offset.is_empty() {
            0
        } else {
            offset.parse().ok()?
        };
        Some(base + offset).filter(|n| (34..=HIGHEST).contains(n))
    };
    let named = || {
        (1..32).find(|n| {
            let name = signal_hook::low_level::signal_name(*n);
            name.and_then(|name| name.strip_prefix("SIG")) == Some(wanted)
        })
    };
    number
        .or_else(named)
        .or_else(real_time)
        .or_else(|| {
            OTHERS
                .iter()
                .find(|(name, _)| *name == wanted)
                .map(|(_, n)| *n)
        })
        .with_context(|| format!("{text:?} is no signal: give its name or number"))
}

/// Names that the crate does not know (signal(7), x86-64).
const OTHERS: [(&str, i32); 6] = [
    ("STKFLT", 16),
    ("PWR", 30),
    ("POLL", 29),
    ("IO", 29),
    ("CLD", 17),
    ("IOT", 6),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_have_names_and_numbers() {
        for (text, number) in [
            ("SIGTERM", 15),
            ("term", 15),
            ("9", 9),
            ("SIGQUIT", 3),
            ("usr1", 10),
            ("WINCH", 28),
            ("SIGRTMIN+3", 37),
            ("RTMAX", 64),
            ("SIGPWR", 30),
        ] {
            assert_eq!(parse(text).expect(text), number, "{text}");
        }
        for bad in ["", "0", "65", "SIGNOTHING", "-1", "RTMIN+40"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
