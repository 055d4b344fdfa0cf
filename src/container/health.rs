//! Whether a container is well, by what its probes have said: docker's rules.

use super::options::HealthCheck;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// Probes that are remembered.
const REMEMBERED: usize = 5;
/// Bytes of a probe's output that are.
pub const OUTPUT_MAX: usize = 4096;

/// How a container is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Health {
    /// In a word.
    pub status: HealthStatus,
    /// So many probes have failed in a row.
    pub failing_streak: u32,
    /// The last ones.
    pub log: Vec<Probe>,
}

/// In docker's words.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HealthStatus {
    /// Nobody knows yet.
    #[default]
    Starting,
    /// The last probe was passed.
    Healthy,
    /// Too many in a row have failed.
    Unhealthy,
}

/// One probe.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Probe {
    /// When it began.
    pub start: Timestamp,
    /// When it ended.
    pub end: Timestamp,
    /// Its status; -1 if it had none in time.
    pub exit_code: i32,
    /// The beginning of what it said.
    pub output: String,
}

impl Health {
    /// Takes in one more probe. One that fails in the start period does not count.
    pub fn note(&mut self, probe: Probe, check: &HealthCheck, in_start_period: bool) {
        if probe.exit_code == 0 {
            self.failing_streak = 0;
            self.status = HealthStatus::Healthy;
        } else if !(in_start_period && self.status == HealthStatus::Starting) {
            self.failing_streak += 1;
            if self.failing_streak >= check.retries {
                self.status = HealthStatus::Unhealthy;
            }
        }
        self.log.push(probe);
        if self.log.len() > REMEMBERED {
            self.log.remove(0);
        }
    }

    /// What `ps` adds to where the container stands.
    pub fn words(&self) -> &'static str {
        match self.status {
            HealthStatus::Starting => " (health: starting)",
            HealthStatus::Healthy => " (healthy)",
            HealthStatus::Unhealthy => " (unhealthy)",
        }
    }

    /// Docker's object.
    pub fn describe(&self) -> Value {
        let log: Vec<Value> = self
            .log
            .iter()
            .map(|probe| {
                json!({
                    "Start": probe.start.to_string(),
                    "End": probe.end.to_string(),
                    "ExitCode": probe.exit_code,
                    "Output": probe.output,
                })
            })
            .collect();
        json!({ "Status": self.status, "FailingStreak": self.failing_streak, "Log": log })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn three_failures_in_a_row_and_one_success_turn_it() {
        let second = Duration::from_secs(1);
        let check = HealthCheck {
            test: vec!["CMD-SHELL".into(), "exit 1".into()],
            shell: vec!["/bin/sh".into(), "-c".into()],
            interval: second,
            timeout: second,
            start_period: second,
            start_interval: second,
            retries: 3,
        };
        assert_eq!(check.command(), ["/bin/sh", "-c", "exit 1"]);
        let mut health = Health::default();
        let mut note = |exit_code, early| {
            let start = Timestamp::UNIX_EPOCH;
            let output = String::new();
            let probe = Probe {
                start,
                end: start,
                exit_code,
                output,
            };
            health.note(probe, &check, early);
            (health.status, health.failing_streak, health.log.len())
        };
        use HealthStatus::{Healthy, Starting, Unhealthy};
        assert_eq!(note(1, true), (Starting, 0, 1));
        assert_eq!(note(1, false), (Starting, 1, 2));
        assert_eq!(note(-1, false), (Starting, 2, 3));
        assert_eq!(note(1, false), (Unhealthy, 3, 4));
        assert_eq!(note(0, false), (Healthy, 0, 5));
        // The start is over with the first success.
        assert_eq!(note(1, true), (Healthy, 1, 5));
    }
}
