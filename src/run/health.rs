//! The options that say how a container is asked whether it is well.

use crate::container::HealthCheck;
use crate::image::{ImageConfig, ImageHealth};
use anyhow::{Context, Result, bail};
use std::time::Duration;

/// What can be typed.
#[derive(Debug, clap::Args)]
pub struct HealthArgs {
    /// A line for the shell that tells by its status whether the container is well
    #[arg(long, value_name = "LINE")]
    health_cmd: Option<String>,
    /// How long from one check to the next [default: 30s]
    #[arg(long, value_name = "TIME", value_parser = duration)]
    health_interval: Option<Duration>,
    /// How long a check may take [default: 30s]
    #[arg(long, value_name = "TIME", value_parser = duration)]
    health_timeout: Option<Duration>,
    /// So many failures in a row, and it is unhealthy [default: 3]
    #[arg(long, value_name = "N")]
    health_retries: Option<u32>,
    /// How long after its start failures do not count [default: 0s]
    #[arg(long, value_name = "TIME", value_parser = duration)]
    health_start_period: Option<Duration>,
    /// How long from one check to the next in that time [default: 5s]
    #[arg(long, value_name = "TIME", value_parser = duration)]
    health_start_interval: Option<Duration>,
    /// Do not check, whatever the image says
    #[arg(long)]
    no_healthcheck: bool,
}

/// Docker's interval and timeout.
const INTERVAL: Duration = Duration::from_secs(30);
/// Docker's interval in the start period.
const START_INTERVAL: Duration = Duration::from_secs(5);
/// Docker's retries.
const RETRIES: u32 = 3;
/// The shortest time that docker takes, and zero for a default.
const SHORTEST: Duration = Duration::from_millis(1);

impl HealthArgs {
    /// Whether anything was typed.
    pub fn is_given(&self) -> bool {
        self.no_healthcheck || self.health_cmd.is_some() || self.has_details()
    }

    fn has_details(&self) -> bool {
        let times = [
            self.health_interval,
            self.health_timeout,
            self.health_start_period,
            self.health_start_interval,
        ];
        self.health_retries.is_some() || times.iter().any(Option::is_some)
    }

    /// The check of a container of an image, if there is one.
    ///
    /// # Errors
    /// One line, in docker's words where docker has words.
    pub fn check(&self, config: &ImageConfig) -> Result<Option<HealthCheck>> {
        if self.no_healthcheck {
            if self.health_cmd.is_some() || self.has_details() {
                bail!("--no-healthcheck conflicts with --health-* options");
            }
            return Ok(None);
        }
        let none = ImageHealth::default();
        let image = config.health.as_ref().unwrap_or(&none);
        let test = match &self.health_cmd {
            Some(line) => vec!["CMD-SHELL".to_owned(), line.clone()],
            None => image.test.clone(),
        };
        match test.iter().map(String::as_str).collect::<Vec<_>>()[..] {
            [] | ["NONE"] => return Ok(None),
            ["CMD", _, ..] | ["CMD-SHELL", _] => {}
            _ => bail!("the image's health check {test:?} is none of CMD, CMD-SHELL and NONE"),
        }
        let shell = match &config.shell[..] {
            [] => vec!["/bin/sh".to_owned(), "-c".to_owned()],
            shell => shell.to_vec(),
        };
        let time = |typed: Option<Duration>, image: u64, default: Duration| {
            let image = Duration::from_nanos(image);
            let said = typed.unwrap_or(image);
            if said.is_zero() {
                default
            } else {
                said.max(SHORTEST)
            }
        };
        let retries = self.health_retries.unwrap_or(image.retries);
        Ok(Some(HealthCheck {
            test,
            shell,
            interval: time(self.health_interval, image.interval, INTERVAL),
            timeout: time(self.health_timeout, image.timeout, INTERVAL),
            start_period: time(self.health_start_period, image.start_period, Duration::ZERO),
            start_interval: time(
                self.health_start_interval,
                image.start_interval,
                START_INTERVAL,
            ),
            retries: if retries == 0 { RETRIES } else { retries },
        }))
    }
}

/// Reads a time as Go does: `1m30s`, `500ms`, `1.5h`.
///
/// # Errors
/// Anything else, or more than a year.
pub fn duration(text: &str) -> Result<Duration> {
    const UNITS: [(&str, f64); 7] = [
        ("ns", 1e-9),
        ("us", 1e-6),
        ("µs", 1e-6),
        ("ms", 1e-3),
        ("s", 1.0),
        ("m", 60.0),
        ("h", 3600.0),
    ];
    const LONGEST: f64 = 366.0 * 24.0 * 3600.0;
    let wrong = || format!("{text:?}: a time is numbers with units, as 1m30s or 500ms");
    if text == "0" {
        return Ok(Duration::ZERO);
    }
    let mut seconds = 0.0;
    let mut rest = text;
    while !rest.is_empty() || seconds == 0.0 && rest.len() == text.len() {
        let digits = rest
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .with_context(wrong)?;
        let (number, after) = rest.split_at(digits);
        let unit_len = after
            .find(|c: char| c.is_ascii_digit() || c == '.')
            .unwrap_or(after.len());
        let (unit, after) = after.split_at(unit_len);
        let number: f64 = number.parse().ok().with_context(wrong)?;
        let known = UNITS.iter().find(|(name, _)| *name == unit);
        seconds += number * known.with_context(wrong)?.1;
        rest = after;
    }
    if seconds > LONGEST {
        bail!("{text:?} is longer than a year");
    }
    Ok(Duration::from_secs_f64(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: HealthArgs,
    }

    fn check(words: &[&str], image: Option<ImageHealth>) -> Result<Option<HealthCheck>> {
        let config = ImageConfig {
            health: image,
            ..ImageConfig::default()
        };
        Line::parse_from([&["run"], words].concat())
            .args
            .check(&config)
    }

    fn image(test: &[&str]) -> Option<ImageHealth> {
        Some(ImageHealth {
            test: test.iter().map(|word| (*word).to_owned()).collect(),
            interval: 2_000_000_000,
            ..ImageHealth::default()
        })
    }

    #[test]
    fn what_is_typed_goes_over_what_the_image_says() {
        assert_eq!(check(&[], None).expect("fine"), None);
        assert_eq!(check(&["--health-retries", "2"], None).expect("fine"), None);
        assert_eq!(check(&[], image(&["NONE"])).expect("fine"), None);
        assert_eq!(
            check(&["--no-healthcheck"], image(&["CMD", "x"])).expect("fine"),
            None
        );
        let of_image = check(&["--health-retries", "7"], image(&["CMD", "probe", "-q"]));
        let of_image = of_image.expect("fine").expect("there is one");
        assert_eq!(of_image.command(), ["probe", "-q"]);
        assert_eq!(of_image.interval, Duration::from_secs(2));
        assert_eq!((of_image.timeout, of_image.retries), (INTERVAL, 7));
        let words = ["--health-cmd", "test -e /x", "--health-interval", "100ms"];
        let typed = check(&words, image(&["CMD", "probe"]))
            .expect("fine")
            .expect("one");
        assert_eq!(typed.command(), ["/bin/sh", "-c", "test -e /x"]);
        assert_eq!(typed.interval, Duration::from_millis(100));
        assert!(check(&["--no-healthcheck", "--health-cmd", "x"], None).is_err());
        for bad in [
            &["CMD"][..],
            &["CMD-SHELL"],
            &["SHELL", "x"],
            &["CMD-SHELL", "a", "b"],
        ] {
            assert!(check(&[], image(bad)).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn times_are_gos() {
        let read = |text: &str| duration(text).map(|time| time.as_millis());
        for (text, milliseconds) in [
            ("0", 0),
            ("0s", 0),
            ("500ms", 500),
            ("1m30s", 90_000),
            ("1.5h", 5_400_000),
        ] {
            assert_eq!(read(text).expect(text), milliseconds);
        }
        for bad in ["", "5", "s", "1x", "-1s", "1..5s", "99999999h", "1s5"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }
}
