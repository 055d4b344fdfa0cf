//! `vm-run bench fork`: what a fork costs, stage by stage, beside the floor.
//! docs/benchmark.md says where each clock starts and stops.

use crate::doctor;
use crate::guest::{self, GuestArgs};
use crate::progress::{Bar, Progress};
use crate::templates::MachineArgs;
use anyhow::{Context, Result, ensure};
use clap::{Subcommand, ValueEnum};
use fork::{BootSpec, ForkSpec, Host, Stages, Template};
use serde_json::{Value, json};
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What can be measured.
#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// A fork, from the request to the child's first word, beside what KVM
    /// itself takes for it in the same run
    Fork(ForkBench),
}

/// A benchmark of forks.
#[derive(Debug, Clone, clap::Args)]
pub struct ForkBench {
    /// What runs in the child
    #[arg(long, value_enum, default_value_t = GuestKind::Micro)]
    pub guest: GuestKind,
    /// How many forks, each after the one before is gone
    #[arg(short, value_name = "N", default_value_t = 100)]
    pub n: u32,
    #[command(flatten)]
    pub machine: MachineArgs,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// The guests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum GuestKind {
    /// A few instructions: runs on any KVM
    Micro,
    /// Linux, up to its agent's confirmation of its identity
    Linux,
}

/// Does it.
///
/// # Errors
/// A child that answers wrong, or not at all.
pub fn cli(command: BenchCommand, _root: &Path) -> Result<()> {
    let BenchCommand::Fork(bench) = command;
    ensure!(bench.n > 0, "-n: at least one fork");
    let host = Arc::new(Host::open()?);
    let facts = doctor::host_facts(&host);
    let run = measure(&bench, host)?;
    let mut out = std::io::stdout().lock();
    if bench.json {
        let report = json!({ "host": facts, "runs": [run] });
        writeln!(out, "{}", serde_json::to_string_pretty(&report)?)?;
    } else {
        write!(out, "{}", table(&facts, &run))?;
    }
    Ok(())
}

/// Runs floor and fork in turn, `n` times each.
///
/// # Errors
/// As [`cli`].
pub fn measure(bench: &ForkBench, host: Arc<Host>) -> Result<Value> {
    let guest = match bench.guest {
        GuestKind::Micro => None,
        GuestKind::Linux => Some(guest::find(&GuestArgs::default())?.guest),
    };
    let spec = BootSpec {
        memory: bench.machine.memory,
        vcpus: bench.machine.cpus,
        guest,
        cmdline: String::new(),
        timeout: Duration::from_secs(bench.machine.boot_timeout),
    };
    let progress = Bar::default();
    progress.begin("booting", None);
    let boot = Instant::now();
    let template = Template::boot(host, &spec)?;
    let boot = boot.elapsed();
    progress.end();
    let mut floor = Samples::default();
    let mut fork = Samples::default();
    let mut stages: Vec<(&str, Samples)> = Vec::new();
    progress.begin("forking", Some(u64::from(bench.n)));
    // One of each unmeasured: the first of a process pays for what is shared.
    for i in 0..=bench.n {
        let at_floor = template.floor()?;
        let asked = Instant::now();
        let (answered, one) = one_fork(&template, bench.guest)?;
        if i == 0 {
            continue;
        }
        floor.0.push(at_floor);
        fork.0.push(answered - asked);
        for (k, (name, took)) in split(asked, &one).into_iter().enumerate() {
            if stages.len() == k {
                stages.push((name, Samples::default()));
            }
            stages[k].1.0.push(took);
        }
        progress.advance(1);
    }
    progress.end();
    let ratio = fork.at(50).as_secs_f64() / floor.at(50).as_secs_f64();
    let stages: serde_json::Map<String, Value> = stages
        .into_iter()
        .map(|(name, mut s)| {
            (
                name.into(),
                json!({ "p50": micros(s.at(50)), "p99": micros(s.at(99)) }),
            )
        })
        .collect();
    Ok(json!({
        "guest": match bench.guest { GuestKind::Micro => "micro", GuestKind::Linux => "linux" },
        "mode": "cold",
        "memory_mib": bench.machine.memory >> 20,
        "vcpus": bench.machine.cpus,
        "n": bench.n,
        "boot_us": micros(boot),
        "floor_us": floor.json(),
        "fork_us": fork.json(),
        "ratio_p50": (ratio * 1000.0).round() / 1000.0,
        "stages_us": stages,
    }))
}

/// One fork, to the child's first word; the child is gone when this returns.
fn one_fork(template: &Template, guest: GuestKind) -> Result<(Instant, Stages)> {
    let mut child = template.fork(ForkSpec {
        hostname: "bench".into(),
        ..ForkSpec::default()
    })?;
    match guest {
        GuestKind::Micro => {
            let answer = child.answer()?;
            ensure!(
                answer == child.expected_answer(),
                "a child answered {answer:#x} and not {:#x}: its memory, registers or identity are wrong",
                child.expected_answer()
            );
        }
        GuestKind::Linux => child.confirm()?,
    }
    let stages = child.stages();
    let answered = stages.confirmed.context("a child without an answer")?;
    Ok((answered, stages))
}

/// How long each stage took.
fn split(asked: Instant, s: &Stages) -> Vec<(&'static str, Duration)> {
    let entered = s.entered.unwrap_or(s.fork.restored);
    let confirmed = s.confirmed.unwrap_or(entered);
    let mut at = asked;
    [
        ("vm_made", s.fork.vm_made),
        ("memory_mapped", s.fork.memory_mapped),
        ("state_restored", s.fork.restored),
        ("first_entry", entered),
        ("answer", confirmed),
    ]
    .map(|(name, end)| {
        let took = end.saturating_duration_since(at);
        at = end;
        (name, took)
    })
    .to_vec()
}

/// The stages of a container's run, each as microseconds since the request.
pub fn stages_json(
    asked: Instant,
    s: &Stages,
    first_output: Option<Instant>,
    gone: Instant,
) -> Value {
    let since = |at: Option<Instant>| at.map(|at| micros(at.saturating_duration_since(asked)));
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

#[derive(Default)]
struct Samples(Vec<Duration>);

impl Samples {
    /// The percentile `p`: the smallest sample that `p` in a hundred do not exceed.
    fn at(&mut self, p: usize) -> Duration {
        self.0.sort_unstable();
        let rank = (self.0.len() * p).div_ceil(100).max(1);
        self.0.get(rank - 1).copied().unwrap_or_default()
    }

    fn json(&mut self) -> Value {
        json!({
            "p50": micros(self.at(50)),
            "p90": micros(self.at(90)),
            "p99": micros(self.at(99)),
        })
    }
}

fn micros(d: Duration) -> f64 {
    (d.as_secs_f64() * 1e7).round() / 10.0
}

fn table(facts: &Value, run: &Value) -> String {
    let word = |v: &Value| v.as_str().unwrap_or("?").to_owned();
    let mut text = format!(
        "{}, Linux {}, KVM: {}\n{} guest, {} MiB, {} vCPU, {} forks, cold\n\n",
        word(&facts["cpu"]),
        word(&facts["kernel"]),
        word(&facts["kvm"]),
        word(&run["guest"]),
        run["memory_mib"],
        run["vcpus"],
        run["n"],
    );
    let mut row = |name: &str, v: &Value| {
        let cell = |p: &str| v[p].as_f64().map_or(String::new(), |us| format!("{us:.1}"));
        text += &format!(
            "{name:<16} {:>10} {:>10} {:>10}\n",
            cell("p50"),
            cell("p90"),
            cell("p99")
        );
    };
    row("µs", &json!({}));
    row("floor", &run["floor_us"]);
    row("fork", &run["fork_us"]);
    if let Some(stages) = run["stages_us"].as_object() {
        for (name, v) in stages {
            row(&format!("  {name}"), v);
        }
    }
    text = text.replacen(
        &format!("{:<16} {:>10} {:>10} {:>10}", "µs", "", "", ""),
        &format!("{:<16} {:>10} {:>10} {:>10}", "µs", "p50", "p90", "p99"),
        1,
    );
    text + &format!("\nratio fork / floor at p50: {}\n", run["ratio_p50"])
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
