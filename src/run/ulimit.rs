//! `--ulimit NAME=SOFT[:HARD]` (docker/go-units ulimit.go).

use crate::container::Ulimit;
use anyhow::{Result, bail};

/// Docker's names, and their numbers (Linux include/uapi/asm-generic/resource.h).
const NAMES: [(&str, u32); 15] = [
    ("core", 4),
    ("cpu", 0),
    ("data", 2),
    ("fsize", 1),
    ("locks", 10),
    ("memlock", 8),
    ("msgqueue", 12),
    ("nice", 13),
    ("nofile", 7),
    ("nproc", 6),
    ("rss", 5),
    ("rtprio", 14),
    ("rttime", 15),
    ("sigpending", 11),
    ("stack", 3),
];

const NO_LIMIT: i64 = -1;

/// Reads one.
///
/// # Errors
/// In docker's words.
pub fn parse(text: &str) -> Result<Ulimit> {
    let Some((name, limits)) = text.split_once('=') else {
        bail!("invalid ulimit argument: {text}");
    };
    let Some((name, resource)) = NAMES.iter().find(|(known, _)| *known == name) else {
        bail!("invalid ulimit type: {name}");
    };
    let numbers: Option<Vec<i64>> = limits
        .split(':')
        .map(|number| number.parse().ok().filter(|n| *n >= NO_LIMIT))
        .collect();
    let (soft, hard) = match numbers.as_deref() {
        Some([both]) => (*both, *both),
        Some([soft, hard]) => (*soft, *hard),
        Some(_) => bail!(
            "too many limit value arguments - {limits}, can only have up to two, `soft[:hard]`"
        ),
        None => bail!("invalid ulimit argument: {text}"),
    };
    let is_above = |a: i64, b: i64| b != NO_LIMIT && (a == NO_LIMIT || a > b);
    if is_above(soft, hard) {
        bail!("ulimit soft limit must be less than or equal to hard limit: {soft} > {hard}");
    }
    Ok(Ulimit {
        name: (*name).to_owned(),
        resource: *resource,
        soft,
        hard,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_read_as_docker_does() {
        let read = |text: &str| parse(text).map(|one| (one.resource, one.soft, one.hard));
        assert_eq!(read("nofile=64:128").expect("both"), (7, 64, 128));
        assert_eq!(read("core=0").expect("one"), (4, 0, 0));
        assert_eq!(read("memlock=-1:-1").expect("none"), (8, -1, -1));
        assert_eq!(read("nproc=5:-1").expect("half"), (6, 5, -1));
        for (bad, why) in [
            ("nofile", "invalid ulimit argument"),
            ("nofile=", "invalid ulimit argument"),
            ("nofile=-2", "invalid ulimit argument"),
            ("nofile=1:x", "invalid ulimit argument"),
            ("files=1", "invalid ulimit type: files"),
            ("nofile=1:2:3", "too many"),
            ("nofile=5:3", "5 > 3"),
            ("nofile=-1:3", "-1 > 3"),
        ] {
            let error = parse(bad).expect_err(bad).to_string();
            assert!(error.contains(why), "{bad}: {error}");
        }
    }
}
