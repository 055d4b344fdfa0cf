//! `vm-run bench fork`: what a fork costs, stage by stage, beside the floor.
//! docs/benchmark.md says where each clock starts and stops.

mod live;
mod measure;
mod plot;
mod report;

pub use live::LiveBench;
pub use measure::measure;
pub use report::stages_json;

use crate::doctor;
use crate::templates::MachineArgs;
use crate::workers::JailArgs;
use anyhow::{Result, ensure};
use clap::{Subcommand, ValueEnum};
use fork::Host;
use serde_json::json;
use std::io::Write;
use std::sync::Arc;

/// What can be measured.
#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// A fork, from the request to the child's first word, beside what KVM
    /// itself takes for it in the same run
    Fork(ForkBench),
    /// Forks of a guest of a few instructions that runs, and writes its memory all the
    /// while
    Live(LiveBench),
}

/// A benchmark of forks.
#[derive(Debug, Clone, clap::Args)]
pub struct ForkBench {
    /// What runs in the child
    #[arg(long, value_enum, default_value_t = GuestKind::Micro)]
    pub guest: GuestKind,
    /// Where the child's VM comes from [default: each in turn]
    #[arg(long = "mode", value_enum, value_name = "MODE")]
    pub modes: Vec<Mode>,
    /// How many forks, each after the one before is gone
    #[arg(short, value_name = "N", default_value_t = 100)]
    pub n: u32,
    /// Then keep so many children alive at once, and say what each costs
    /// [default: 8 in one process, 32 in workers]
    #[arg(long, value_name = "CHILDREN")]
    pub alive: Option<usize>,
    /// Then ask for so many children in one request (pool-worker)
    #[arg(long, value_name = "CHILDREN")]
    pub at_once: Option<usize>,
    #[command(flatten)]
    pub machine: MachineArgs,
    #[command(flatten)]
    pub jail: JailArgs,
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

/// Where a child's VM comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// Made at the fork, in this process
    Cold,
    /// From a pool, in this process
    PoolInprocess,
    /// From a pool, in a jailed process of its own
    PoolWorker,
}

impl Mode {
    /// As it is typed.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cold => "cold",
            Self::PoolInprocess => "pool-inprocess",
            Self::PoolWorker => "pool-worker",
        }
    }
}

/// Does it.
///
/// # Errors
/// A child that answers wrong, or not at all.
pub fn cli(command: BenchCommand) -> Result<()> {
    let bench = match command {
        BenchCommand::Fork(bench) => bench,
        BenchCommand::Live(bench) => return live::cli(&bench),
    };
    ensure!(bench.n > 0, "-n: at least one fork");
    let modes = match bench.modes.as_slice() {
        [] => &[Mode::Cold, Mode::PoolInprocess, Mode::PoolWorker],
        chosen => chosen,
    };
    let host = Arc::new(Host::open()?);
    let facts = doctor::host_facts(&host);
    let mut runs = Vec::new();
    for mode in modes {
        runs.push(measure(&bench, *mode, Arc::clone(&host))?);
    }
    let mut out = std::io::stdout().lock();
    if bench.json {
        let report = json!({ "host": facts, "runs": runs });
        writeln!(out, "{}", serde_json::to_string_pretty(&report)?)?;
    } else {
        write!(out, "{}", report::table(&facts, &runs))?;
    }
    Ok(())
}
