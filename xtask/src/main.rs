//! The project's own tools: `cargo xtask NAME`. What CI calls is what is called
//! at home.

mod agent;
mod arrows;
mod artifacts;
mod check;
mod cpio;
mod demo;
mod guest;
mod host;
mod images;
mod install;
mod kernel;
mod programs;
mod soak;
mod test;
mod twins;
mod vmhost;

use anyhow::Result;
use clap::{Parser, Subcommand};
use std::process::ExitCode;

#[derive(Parser)]
#[command(name = "cargo xtask", about = "The project's own tools")]
struct Args {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Boot one parent, fork ten children over two images, show what they do
    Demo(demo::Args),
    /// Run every test, on a host that can run it
    Test(test::Args),
    /// What is too long for every change: ten thousand forks, another host kernel, a
    /// user's kernel, fuzzing
    Soak(soak::Args),
    /// Formatting, lints, dependencies and licences, arrows between crates
    Check,
    /// Measure a fork: vm-run bench fork, optimised, with these words after it
    Bench {
        /// For vm-run bench fork
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        words: Vec<String>,
    },
    /// Install a tree that runs with neither cargo nor a checkout
    Install(install::Args),
    /// Build the guest's agent and pack it as an initramfs (cached by content)
    Agent(agent::Args),
    /// Build the guest: kernel, agent and the empty writable disk
    Guest,
    /// Make the demo's images from Debian packages (cached by content)
    Images,
    /// Build the guest kernel (cached by content)
    Kernel(kernel::Args),
    /// Run a command where KVM can run Linux: here, or on an emulated host
    Vmhost(vmhost::Args),
}

fn main() -> ExitCode {
    match run(Args::parse().task) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: Task) -> Result<()> {
    match task {
        Task::Demo(args) => demo::run(&args),
        Task::Test(args) => test::run(&args),
        Task::Soak(args) => soak::run(&args),
        Task::Check => check::run(),
        Task::Bench { words } => bench(&words),
        Task::Install(args) => install::run(&args),
        Task::Agent(args) => agent::run(&args),
        Task::Guest => guest::ensure().map(|dir| println!("{}", dir.display())),
        Task::Images => images::run(),
        Task::Kernel(args) => kernel::run(&args),
        Task::Vmhost(args) => vmhost::run(&args),
    }
}

/// Micro guests run on any KVM, so here; Linux guests under `cargo xtask vmhost`.
fn bench(words: &[String]) -> Result<()> {
    let program = artifacts::programs(&["--release"])?.vm_run;
    host::run(
        std::process::Command::new(program)
            .args(["bench", "fork"])
            .args(words),
    )
}
