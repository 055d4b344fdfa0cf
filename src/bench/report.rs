//! What was measured, for people and for programs.

use fork::{Moment, Stages};
use serde_json::{Map, Value, json};
use std::time::Duration;

/// Times of one thing, many times over.
#[derive(Debug, Default)]
pub struct Samples(pub Vec<Duration>);

impl Samples {
    /// The percentile `p`: the smallest sample that `p` in a hundred do not exceed.
    pub fn at(&mut self, p: usize) -> Duration {
        self.0.sort_unstable();
        let rank = (self.0.len() * p).div_ceil(100).max(1);
        self.0.get(rank - 1).copied().unwrap_or_default()
    }

    /// One more.
    pub fn push(&mut self, time: Duration) {
        self.0.push(time);
    }

    pub fn json(&mut self) -> Value {
        json!({
            "p50": micros(self.at(50)),
            "p90": micros(self.at(90)),
            "p99": micros(self.at(99)),
        })
    }
}

/// Stages by name, in the order in which they come.
#[derive(Debug, Default)]
pub struct StageSamples(Vec<(&'static str, Samples)>);

impl StageSamples {
    /// Adds one fork's.
    pub fn push(&mut self, s: &Stages) {
        let entered = s.entered.unwrap_or(s.fork.restored);
        let confirmed = s.confirmed.unwrap_or(entered);
        let mut at = s.fork.asked;
        let ends = [
            ("vm_made", s.fork.vm_made),
            ("memory_mapped", s.fork.memory_mapped),
            ("state_restored", s.fork.restored),
            ("first_entry", entered),
            ("answer", confirmed),
        ];
        for (k, (name, end)) in ends.into_iter().enumerate() {
            if self.0.len() == k {
                self.0.push((name, Samples::default()));
            }
            self.0[k].1.0.push(end.since(at));
            at = at.max(end);
        }
    }

    pub fn json(self) -> Value {
        let each = self.0.into_iter().map(|(name, mut s)| {
            let both = json!({ "p50": micros(s.at(50)), "p99": micros(s.at(99)) });
            (name.to_owned(), both)
        });
        Value::Object(each.collect::<Map<_, _>>())
    }
}

/// The stages of a container's run, each as microseconds since the request.
pub fn stages_json(asked: Moment, s: &Stages, first_output: Option<Moment>, gone: Moment) -> Value {
    let since = |at: Option<Moment>| at.map(|at| micros(at.since(asked)));
    json!({
        "fork_asked": since(Some(s.fork.asked)),
        "vm_made": since(Some(s.fork.vm_made)),
        "memory_mapped": since(Some(s.fork.memory_mapped)),
        "state_restored": since(Some(s.fork.restored)),
        "first_entry": since(s.entered),
        "identity_confirmed": since(s.confirmed),
        "started": since(s.started),
        "first_output": since(first_output),
        "exit_seen": since(s.exited),
        "gone": since(Some(gone)),
    })
}

pub fn micros(d: Duration) -> f64 {
    (d.as_secs_f64() * 1e7).round() / 10.0
}

/// One host's runs, as tables.
pub fn table(facts: &Value, runs: &[Value]) -> String {
    let word = |v: &Value| v.as_str().unwrap_or("?").to_owned();
    let mut text = format!(
        "{}, Linux {}, KVM: {}\n",
        word(&facts["cpu"]),
        word(&facts["kernel"]),
        word(&facts["kvm"]),
    );
    for run in runs {
        text += &format!(
            "\n{} guest, {} MiB, {} vCPU, {} forks, {}\n",
            word(&run["guest"]),
            run["memory_mib"],
            run["vcpus"],
            run["n"],
            word(&run["mode"]),
        );
        text += &row("µs", ["p50", "p90", "p99"].map(String::from));
        text += &times("floor", &run["floor_us"]);
        text += &times("fork", &run["fork_us"]);
        for (name, v) in run["stages_us"].as_object().into_iter().flatten() {
            text += &times(&format!("  {name}"), v);
        }
        let kib = &run["per_child_kib"];
        text += &format!(
            "ratio fork / floor at p50: {}\n\
             a copy-on-write fault: {} µs\n\
             each of {} children: {} KiB private, {} KiB PSS, {} KiB of the kernel's\n",
            run["ratio_p50"],
            run["cow_fault_us"],
            kib["children"],
            kib["private"],
            kib["pss"],
            kib["kernel"],
        );
        if let Some(burst) = run["at_once"].as_object() {
            text += &format!(
                "{} children from one request: {} µs; floor x children / cores: {} µs; ratio {}\n",
                burst["n"], burst["us"], burst["floor_us"], burst["ratio"],
            );
        }
    }
    text
}

fn row(name: &str, cells: [String; 3]) -> String {
    let [a, b, c] = cells;
    format!("{name:<16} {a:>10} {b:>10} {c:>10}\n")
}

fn times(name: &str, v: &Value) -> String {
    let cell = |p: &str| v[p].as_f64().map_or(String::new(), |us| format!("{us:.1}"));
    row(name, [cell("p50"), cell("p90"), cell("p99")])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_samples() {
        let mut s = Samples((1..=100).rev().map(Duration::from_micros).collect());
        assert_eq!(s.at(50), Duration::from_micros(50));
        assert_eq!(s.at(99), Duration::from_micros(99));
        let mut one = Samples(vec![Duration::from_micros(7)]);
        assert_eq!(
            (one.at(50), one.at(99)),
            (one.at(1), Duration::from_micros(7))
        );
    }
}
