//! vm-run: from words to a checked plan, from the plan to one library call.

mod args;
mod bench;
mod disk;
mod doctor;
mod guest;
mod image;
mod progress;
mod run;
mod selftest;
mod signals;
mod state_dir;
mod stdio;
mod templates;
mod terminal;

use args::{Args, Command};
use clap::Parser;
use std::process::ExitCode;

/// vm-run's own failures, as docker has them.
const FAILED: u8 = 125;

fn main() -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) => {
            // Help and version are no failure, and go to stdout.
            let code = if error.use_stderr() { FAILED } else { 0 };
            return match error.print() {
                Ok(()) => ExitCode::from(code),
                Err(_) => ExitCode::from(FAILED),
            };
        }
    };
    env_logger::Builder::new()
        .filter_level(args.log)
        .format_target(false)
        .init();
    match dispatch(args) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("vm-run: {error:#}");
            ExitCode::from(run::exit_code(&error).unwrap_or(FAILED))
        }
    }
}

fn dispatch(args: Args) -> anyhow::Result<u8> {
    let root = || state_dir::resolve(args.root.clone());
    match args.command {
        Command::Run(plan) => run::run(&plan, &root()?),
        Command::Image(command) => image::cli::run(command, &root()?).map(|()| 0),
        Command::Template(command) => templates::cli(command, &root()?).map(|()| 0),
        Command::Bench(bench) => bench::cli(bench, &root()?).map(|()| 0),
        Command::Doctor { json } => doctor::cli(json),
        Command::Selftest { json } => selftest::cli(json),
    }
}
