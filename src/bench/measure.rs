//! The measuring itself.

use super::report::{Samples, StageSamples, micros};
use super::{ForkBench, GuestKind, Mode};
use crate::guest::{self, GuestArgs};
use crate::progress::{Bar, Progress};
use crate::workers;
use anyhow::{Context, Result, bail, ensure};
use fork::{BootSpec, Child, ForkPath, ForkSpec, Host, Place, Pool, Template};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a VM that was made for a pooled floor is left alone: until the grace
/// period that its making has begun is over, as for one that waits in a pool.
const RIPENING: Duration = Duration::from_millis(50);

/// How long a pool may take to fill, for each VM.
const FILLING: Duration = Duration::from_secs(10);

/// Runs floor and fork in turn, `n` times each, then what else was asked for.
///
/// # Errors
/// A child that answers wrong or not at all, or a pool that does not serve.
pub fn measure(bench: &ForkBench, mode: Mode, host: Arc<Host>) -> Result<Value> {
    let progress = Bar::default();
    progress.begin("booting", None);
    let begin = Instant::now();
    let template = Arc::new(Template::boot(Arc::clone(&host), &boot_spec(bench)?)?);
    let boot = begin.elapsed();
    progress.end();
    let forks = Forks::new(bench, mode, Arc::clone(&template))?;
    let (mut floor, mut fork) = (Samples::default(), Samples::default());
    let mut stages = StageSamples::default();
    let mut cow_fault = Duration::ZERO;
    progress.begin("forking", Some(u64::from(bench.n)));
    // One of each unmeasured: the first of a process pays for what is shared.
    for i in 0..=bench.n {
        let at_floor = forks.floor()?;
        let child = forks.one()?;
        let s = child.stages();
        if i > 0 {
            let answered = s.confirmed.context("a child without an answer")?;
            floor.push(at_floor);
            fork.push(answered.since(s.fork.asked));
            stages.push(&s);
            progress.advance(1);
        }
        if i == bench.n {
            cow_fault = template.cow_fault()?;
        }
        child.end();
        host.settle();
    }
    progress.end();
    let ratio = fork.at(50).as_secs_f64() / floor.at(50).as_secs_f64();
    let at_once = forks.at_once(bench, floor.at(50))?;
    let per_child = forks.alive(bench)?;
    let mut run = json!({
        "guest": match bench.guest { GuestKind::Micro => "micro", GuestKind::Linux => "linux" },
        "mode": mode.name(),
        "memory_mib": bench.machine.memory >> 20,
        "vcpus": bench.machine.cpus,
        "n": bench.n,
        "boot_us": micros(boot),
        "floor_us": floor.json(),
        "fork_us": fork.json(),
        "ratio_p50": (ratio * 1000.0).round() / 1000.0,
        "stages_us": stages.json(),
        "cow_fault_us": micros(cow_fault),
        "per_child_kib": per_child,
    });
    if let Some(at_once) = at_once {
        run["at_once"] = at_once;
    }
    Ok(run)
}

fn boot_spec(bench: &ForkBench) -> Result<BootSpec> {
    let guest = match bench.guest {
        GuestKind::Micro => None,
        GuestKind::Linux => Some(guest::find(&GuestArgs::default())?.guest),
    };
    Ok(BootSpec {
        memory: bench.machine.memory,
        vcpus: bench.machine.cpus,
        guest,
        timeout: Duration::from_secs(bench.machine.boot_timeout),
        ..BootSpec::default()
    })
}

/// Makes forks in one of the modes.
struct Forks {
    guest: GuestKind,
    mode: Mode,
    template: Arc<Template>,
    place: Place,
    /// Of one VM: the next is made while nothing is measured.
    pool: Option<Pool>,
}

impl Forks {
    fn new(bench: &ForkBench, mode: Mode, template: Arc<Template>) -> Result<Self> {
        let place = match mode {
            Mode::Cold | Mode::PoolInprocess => Place::ThisProcess,
            Mode::PoolWorker => Place::Workers(workers::start_aloud(bench.jail)?),
        };
        let pool = match mode {
            Mode::Cold => None,
            Mode::PoolInprocess | Mode::PoolWorker => {
                Some(Pool::new(Arc::clone(&template), place.clone(), 1)?)
            }
        };
        Ok(Self {
            guest: bench.guest,
            mode,
            template,
            place,
            pool,
        })
    }

    fn floor(&self) -> Result<Duration> {
        match self.mode {
            Mode::Cold => Ok(self.template.floor()?),
            Mode::PoolInprocess | Mode::PoolWorker => {
                let ahead = self.template.floor_ahead()?;
                std::thread::sleep(RIPENING);
                Ok(self.template.pooled_floor(ahead)?)
            }
        }
    }

    /// One fork, to the child's first word.
    fn one(&self) -> Result<Child> {
        let child = match &self.pool {
            None => self.template.fork(spec())?,
            Some(pool) => {
                pool.wait_full(FILLING)?;
                pool.fork(spec())?
            }
        };
        self.answered(child)
    }

    fn answered(&self, mut child: Child) -> Result<Child> {
        let expected = match self.mode {
            Mode::Cold => ForkPath::Cold,
            Mode::PoolInprocess | Mode::PoolWorker => ForkPath::Pooled,
        };
        ensure!(
            child.path() == expected,
            "a fork took the path {:?}: its figure would be of something else",
            child.path()
        );
        match self.guest {
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
        Ok(child)
    }

    /// Many children, from a pool that has them ready.
    fn many(&self, n: usize) -> Result<Vec<Child>> {
        let children = match self.mode {
            Mode::Cold => (0..n).map(|_| self.template.fork(spec())).collect(),
            Mode::PoolInprocess | Mode::PoolWorker => {
                let pool = Pool::new(Arc::clone(&self.template), self.place.clone(), n)?;
                pool.wait_full(FILLING * n as u32)?;
                // Nothing else is made while these are measured.
                pool.drain();
                pool.fork_many((0..n).map(|_| spec()).collect())
            }
        };
        children
            .into_iter()
            .map(|child| self.answered(child?))
            .collect()
    }

    /// Children of one request, against as many floors on all cores.
    fn at_once(&self, bench: &ForkBench, floor: Duration) -> Result<Option<Value>> {
        let Some(n) = bench.at_once else {
            return Ok(None);
        };
        if self.mode != Mode::PoolWorker {
            return Ok(None);
        }
        let children = self.many(n)?;
        let stages: Vec<_> = children.iter().map(Child::stages).collect();
        let asked = stages.iter().map(|s| s.fork.asked).min();
        let last = stages.iter().filter_map(|s| s.confirmed).max();
        let (Some(asked), Some(last)) = (asked, last) else {
            bail!("--at-once: at least one child");
        };
        let took = last.since(asked);
        let cores = std::thread::available_parallelism()?.get();
        let floors = floor * n as u32 / cores as u32;
        let ratio = took.as_secs_f64() / floors.as_secs_f64();
        children.into_iter().for_each(Child::end);
        Ok(Some(json!({
            "n": n,
            "us": micros(took),
            "cores": cores,
            "floor_us": micros(floors),
            "ratio": (ratio * 1000.0).round() / 1000.0,
        })))
    }

    /// What each of many costs in memory, while all are alive and idle.
    fn alive(&self, bench: &ForkBench) -> Result<Value> {
        let n = bench.alive.unwrap_or(match self.mode {
            Mode::Cold | Mode::PoolInprocess => 8,
            Mode::PoolWorker => 32,
        });
        let before = available()?;
        let children = self.many(n)?;
        let after = available()?;
        let mut private = 0;
        let mut pss = 0;
        for child in &children {
            let stats = child.stats()?;
            private += stats.private;
            pss += stats.pss;
        }
        let each = |kib: u64| kib / n.max(1) as u64;
        let value = json!({
            "children": n,
            "private": each(private),
            "pss": each(pss),
            // All that is gone, but for what the children have in user space.
            "kernel": each(before.saturating_sub(after).saturating_sub(private)),
        });
        children.into_iter().for_each(Child::end);
        Ok(value)
    }
}

fn spec() -> ForkSpec {
    ForkSpec {
        hostname: "bench".into(),
        ..ForkSpec::default()
    }
}

/// MemAvailable of the host, in KiB.
fn available() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").context("cannot read /proc/meminfo")?;
    text.lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| rest.trim().strip_suffix("kB")?.trim().parse().ok())
        .context("/proc/meminfo has no MemAvailable")
}
