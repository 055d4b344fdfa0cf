//! `vm-run bench live`: what a fork takes of a source that runs, and when its children do.
//! docs/benchmark.md says where each clock starts and stops.

use super::plot::{self, Line, Panel};
use super::report::{Samples, micros};
use crate::args::size;
use crate::doctor;
use crate::progress::{Bar, Progress};
use crate::workers::{self, JailArgs};
use anyhow::{Context, Result, ensure};
use fork::micro::{self, LiveLoad};
use fork::{BootSpec, CaptureCost, Child, ForkSpec, Host, LiveFork, Moment, Place, Template};
use serde_json::{Value, json};
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;

/// Where the source writes single pages: so many bytes, from the eighth mebibyte on.
const AREA: u64 = 8 * MIB;

/// How long the source writes single pages before it is forked.
const BEFORE: Duration = Duration::from_millis(10);

/// Over how long its pace is taken, before the fork and after.
const WINDOW: Duration = Duration::from_millis(100);

/// A benchmark of live forks.
#[derive(Debug, Clone, clap::Args)]
pub struct LiveBench {
    /// Guest memory: a number and k, m or g; a multiple of 2 MiB
    #[arg(short, long, value_parser = size, default_value = "512m")]
    pub memory: u64,
    /// How much of it is written again between two forks
    #[arg(long, value_parser = size, default_value = "16m")]
    pub dirty: u64,
    /// In runs of this length, spread evenly
    #[arg(long, value_parser = size, default_value = "64k")]
    pub run: u64,
    /// How much a writer of single pages, at random, writes in a second
    #[arg(long, value_parser = size, default_value = "100m")]
    pub pace: u64,
    /// How many children each fork has
    #[arg(long, value_name = "CHILDREN", default_value_t = 1)]
    pub children: usize,
    /// How many forks
    #[arg(short, value_name = "N", default_value_t = 30)]
    pub n: u32,
    /// Then forks of a fork of a fork, so deep
    #[arg(long, value_name = "LEVELS", default_value_t = 0)]
    pub depth: u32,
    /// On each of these levels other pages than on those before
    #[arg(long, requires = "depth")]
    pub fresh: bool,
    /// Measure guests of many sizes, and draw what they take into this file (SVG)
    #[arg(long, value_name = "FILE", conflicts_with_all = ["memory", "dirty", "depth"])]
    pub plot: Option<PathBuf>,
    #[command(flatten)]
    pub jail: JailArgs,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Does it.
///
/// # Errors
/// A child that answers wrong, or not at all.
pub fn cli(bench: &LiveBench) -> Result<()> {
    ensure!(
        bench.n > 0 && bench.children > 0,
        "at least one fork, and one child"
    );
    let host = Arc::new(Host::open()?);
    let facts = doctor::host_facts(&host);
    if let Some(file) = &bench.plot {
        return plotted(bench, &host, &facts, file);
    }
    let template = Arc::new(template(bench, &host)?);
    let place = Place::Workers(workers::start_aloud(bench.jail)?);
    let run = measure(bench, &template, &place)?;
    let depth = (bench.depth > 0)
        .then(|| deep(bench, &template, &place))
        .transpose()?;
    let report = json!({ "host": facts, "run": run, "depth": depth });
    let mut out = std::io::stdout().lock();
    if bench.json {
        writeln!(out, "{}", serde_json::to_string_pretty(&report)?)?;
    } else {
        for (name, value) in report.as_object().into_iter().flatten() {
            writeln!(out, "{name}: {value}")?;
        }
    }
    Ok(())
}

/// What is drawn: guests of so many MiB, of which so many are written between two forks.
const SIZES: [u64; 5] = [256, 512, 1024, 2048, 4096];
const DIRTY: [u64; 3] = [4, 16, 64];

fn plotted(bench: &LiveBench, host: &Arc<Host>, facts: &Value, file: &Path) -> Result<()> {
    let place = Place::Workers(workers::start_aloud(bench.jail)?);
    let mut panels = [
        ("pause of the source, ms, p50", "pause_us"),
        (
            "then to the first child's first instruction, ms, p50",
            "first_child_us",
        ),
    ]
    .map(|(title, figure)| {
        (
            figure,
            Panel {
                title,
                lines: Vec::new(),
            },
        )
    });
    let mut out = std::io::stdout().lock();
    for dirty in DIRTY {
        let mut points = panels.each_ref().map(|_| Vec::new());
        for size in SIZES {
            let bench = LiveBench {
                memory: size * MIB,
                dirty: dirty * MIB,
                ..bench.clone()
            };
            let run = measure(&bench, &template(&bench, host)?, &place)?;
            for ((figure, _), points) in panels.iter().zip(&mut points) {
                let us = run[figure]["p50"].as_f64().context("a figure is missing")?;
                points.push((size, us / 1000.0));
            }
            writeln!(out, "{run}")?;
        }
        for ((_, panel), points) in panels.iter_mut().zip(points) {
            let dirty_mib = dirty;
            panel.lines.push(Line { dirty_mib, points });
        }
    }
    let footnote = format!(
        "named by what is written between two forks, in runs of {} KiB; {} forks each; {} on {}, Linux {}",
        bench.run >> 10,
        bench.n,
        facts["kvm"].as_str().unwrap_or_default(),
        facts["cpu"].as_str().unwrap_or_default(),
        facts["kernel"].as_str().unwrap_or_default(),
    );
    let svg = plot::draw(&panels.map(|(_, panel)| panel), &footnote);
    std::fs::write(file, svg).with_context(|| format!("cannot write {}", file.display()))
}

fn template(bench: &LiveBench, host: &Arc<Host>) -> Result<Template> {
    ensure!(
        bench.run >= PAGE && bench.run.is_multiple_of(PAGE),
        "--run: whole pages"
    );
    ensure!(bench.pace >= PAGE, "--pace: a page in a second at least");
    let first = 8 * MIB + AREA;
    let (runs, room) = (bench.dirty / bench.run, bench.memory.saturating_sub(first));
    // The guest maps its first gibibytes only, up to the devices.
    let room = room.min((3 << 30) - first);
    let shift = if bench.fresh { bench.run } else { 0 };
    // So often it writes its runs.
    let times = u64::from(bench.n.max(bench.depth)) + 2;
    let room = room.saturating_sub(shift * times);
    ensure!(
        runs > 0 && bench.dirty <= room,
        "--dirty: no more than there is"
    );
    let ticks = (u64::from(host.tsc_khz()?) * 1000).saturating_mul(PAGE) / bench.pace;
    // It must not be through before it is forked, and its pace known: making many children
    // ready takes a while.
    let phase = WINDOW * 4 + Duration::from_millis(10) * bench.children as u32;
    let load = LiveLoad {
        first,
        runs,
        stride: room / runs / PAGE * PAGE,
        pages: bench.run / PAGE,
        ticks,
        area: 8 * MIB,
        area_pages: AREA / PAGE,
        shift,
        writes: bench.pace * phase.as_millis() as u64 / 1000 / PAGE,
    };
    let spec = BootSpec {
        memory: bench.memory,
        program: micro::live_bench(&load),
        ..BootSpec::default()
    };
    Ok(Template::boot(Arc::clone(host), &spec)?)
}

fn specs(count: usize) -> Vec<ForkSpec> {
    (0..count).map(|_| ForkSpec::default()).collect()
}

/// Lets it write its runs, and then single pages.
fn writes(source: &mut Child) -> Result<()> {
    source.answer()?;
    source.unpause()?;
    std::thread::sleep(BEFORE);
    Ok(())
}

/// Waits until each has found that it is another.
fn running(children: Vec<Result<Child, fork::Error>>) -> Result<Vec<(Child, Moment)>> {
    children
        .into_iter()
        .map(|child| {
            let mut child = child?;
            let answer = child.answer()?;
            ensure!(Some(answer) == child.generation(), "a child is not itself");
            let entered = child
                .stages()
                .entered
                .context("a child without a beginning")?;
            Ok((child, entered))
        })
        .collect()
}

fn measure(bench: &LiveBench, template: &Template, place: &Place) -> Result<Value> {
    let progress = Bar::default();
    progress.begin("forking", Some(u64::from(bench.n)));
    let mut source = template.fork(ForkSpec::default())?;
    let clock = Clock::of(&source)?;
    let mut all = All::default();
    for i in 0..=bench.n {
        writes(&mut source)?;
        let (forked, counts) = clock.over(|| {
            let forked = source.fork(place, specs(bench.children), None);
            std::thread::sleep(WINDOW);
            forked
        })?;
        let LiveFork { children, cost } = forked?;
        let children = running(children)?;
        // The first pays for what the others share, and copies all that there is.
        if i > 0 {
            all.push(&cost, children.iter().map(|(_, entered)| *entered));
            all.pace.extend(counts.kept(&cost));
            progress.advance(1);
        }
        drop(children);
        template.host().settle();
    }
    progress.end();
    Ok(all.json(bench))
}

/// A chain: each level writes its runs again, and is forked.
fn deep(bench: &LiveBench, template: &Arc<Template>, place: &Place) -> Result<Value> {
    let pool = fork::Pool::new(Arc::clone(template), place.clone(), 0)?;
    let mut source = pool.fork(ForkSpec::default())?;
    let mut levels = Vec::new();
    for _ in 0..=bench.depth {
        writes(&mut source)?;
        let LiveFork { children, cost } = source.fork(place, specs(1), None)?;
        let (mut child, entered) = running(children)?.pop().context("no child")?;
        // As what runs containers does in the background.
        if let Some(merged) = child.memory()?.merge()? {
            child.use_merged(&merged)?;
        }
        levels.push(json!({
            "first_instruction_us": micros(entered.since(cost.resumed)),
            "pause_us": micros(cost.resumed.since(cost.stopping)),
            "copying_us": micros(cost.stopping.since(cost.asked)),
            "pages": cost.pages,
        }));
        child.unpause()?;
        source = child;
    }
    Ok(json!(levels))
}

/// What was measured of all forks.
#[derive(Default)]
struct All {
    copying: Samples,
    stopping: Samples,
    saving: Samples,
    pause: Samples,
    first: Samples,
    last: Samples,
    rounds: u64,
    pages: u64,
    copied_stopped: u64,
    count: u64,
    /// After the pause, of what it was before.
    pace: Vec<f64>,
}

impl All {
    fn push(&mut self, cost: &CaptureCost, entered: impl Iterator<Item = Moment> + Clone) {
        self.copying.push(cost.stopping.since(cost.asked));
        self.stopping.push(cost.stopped.since(cost.stopping));
        self.saving.push(cost.saved.since(cost.stopped));
        self.pause.push(cost.resumed.since(cost.stopping));
        let since = |at: Moment| at.since(cost.resumed);
        self.first
            .push(entered.clone().min().map(since).unwrap_or_default());
        self.last.push(entered.max().map(since).unwrap_or_default());
        self.rounds += u64::from(cost.rounds);
        self.pages += cost.pages;
        self.copied_stopped += cost.copied_stopped;
        self.count += 1;
    }

    fn json(mut self, bench: &LiveBench) -> Value {
        let mean = |sum: u64| (sum as f64 / self.count as f64 * 10.0).round() / 10.0;
        self.pace.sort_by(f64::total_cmp);
        let pace = self.pace.get(self.pace.len() / 2).copied();
        json!({
            "memory_mib": bench.memory >> 20,
            "dirty_mib": bench.dirty >> 20,
            "run_kib": bench.run >> 10,
            "pace_mib_s": bench.pace >> 20,
            "children": bench.children,
            "n": bench.n,
            "copying_us": self.copying.json(),
            "pause_us": self.pause.json(),
            "of_it_stopping_us": self.stopping.json(),
            "of_it_saving_us": self.saving.json(),
            "first_child_us": self.first.json(),
            "all_children_us": self.last.json(),
            "rounds": mean(self.rounds),
            "pages": mean(self.pages),
            "pages_in_the_pause": mean(self.copied_stopped),
            "pace_after_p50": pace.map(|pace| (pace * 1000.0).round() / 1000.0),
        })
    }
}

/// Counts what the source writes, from outside.
struct Clock {
    memory: File,
    at: u64,
}

/// The source's count at many moments.
struct Counts(Vec<(Moment, u64)>);

impl Clock {
    fn of(source: &Child) -> Result<Self> {
        let (address, _) = *source.mappings().first().context("it is elsewhere")?;
        Ok(Self {
            memory: File::open("/proc/self/mem").context("/proc/self/mem")?,
            at: address + micro::LIVE_COUNT,
        })
    }

    fn count(&self) -> std::io::Result<u64> {
        let mut word = [0; 8];
        self.memory.read_exact_at(&mut word, self.at)?;
        Ok(u64::from_le_bytes(word))
    }

    /// Counts while `body` does something, and for a window before.
    fn over<T>(&self, body: impl FnOnce() -> T) -> Result<(T, Counts)> {
        let is_over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let counting = scope.spawn(|| -> std::io::Result<Counts> {
                let mut counts = Vec::new();
                while !is_over.load(Ordering::Relaxed) {
                    counts.push((Moment::now(), self.count()?));
                    std::thread::sleep(Duration::from_millis(1));
                }
                Ok(Counts(counts))
            });
            std::thread::sleep(WINDOW);
            let done = body();
            is_over.store(true, Ordering::Relaxed);
            let counts = counting.join().ok().context("the counting has failed")??;
            Ok((done, counts))
        })
    }
}

impl Counts {
    /// The source's pace in the window after the pause, of that in the window before the
    /// fork was asked for.
    fn kept(&self, cost: &CaptureCost) -> Option<f64> {
        let before = self.0.iter().filter(|(at, _)| *at <= cost.asked);
        let is_after = |at: &Moment| *at >= cost.resumed && at.since(cost.resumed) <= WINDOW;
        let after = self.0.iter().filter(|(at, _)| is_after(at));
        Some(pace(after)? / pace(before)?)
    }
}

/// Pages in a second.
fn pace<'a>(mut counts: impl DoubleEndedIterator<Item = &'a (Moment, u64)>) -> Option<f64> {
    let ((first, from), (last, to)) = (counts.next()?, counts.next_back()?);
    Some((to - from) as f64 / last.since(*first).as_secs_f64())
}
