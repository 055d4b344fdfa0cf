//! vm-run: from words to a checked plan, from the plan to one library call.

mod args;
mod bell;
mod bench;
mod container;
mod daemon;
mod database;
mod disk;
mod doctor;
mod guest;
mod image;
mod lock;
mod net;
mod output;
mod progress;
mod run;
mod selftest;
mod signals;
mod state_dir;
mod stdio;
mod templates;
mod terminal;
mod unfit;
mod volume;
mod warm;
mod workers;

use args::{Args, Command};
use clap::Parser;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
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
        // It logs what it returns as well.
        .filter_module("rustls_platform_verifier", log::LevelFilter::Off)
        .init();
    if let Err(error) = raise_descriptors() {
        log::warn!("the limit of open files stays as it is: {error}");
    }
    match dispatch(args) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("vm-run: {}", line(&error));
            ExitCode::from(exit_code(&error).unwrap_or(FAILED))
        }
    }
}

/// The status that docker gives for a failure, if it has one of its own.
fn exit_code(error: &anyhow::Error) -> Option<u8> {
    if let Some(refused) = error.downcast_ref::<container::Refused>() {
        return Some(refused.code);
    }
    match error.downcast_ref::<fork::Error>()? {
        fork::Error::Start { reason, .. } => match reason {
            fork::StartFailure::NotFound => Some(127),
            fork::StartFailure::NotExecutable => Some(126),
            fork::StartFailure::Other => None,
        },
        _ => None,
    }
}

/// A child in a worker costs its owner a descriptor, and there may be a thousand;
/// the usual soft limit is 1024.
fn raise_descriptors() -> rustix::io::Result<()> {
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(
        Resource::Nofile,
        Rlimit {
            current: maximum,
            maximum,
        },
    )
}

/// An error and its causes in one line; a cause that is in the line already, as
/// many errors of the libraries name theirs, is not said twice.
fn line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if line.is_empty() {
            line = cause;
        } else if !line.ends_with(&cause) {
            line = format!("{line}: {cause}");
        }
    }
    line
}

fn dispatch(args: Args) -> anyhow::Result<u8> {
    let root = || state_dir::resolve(args.root.clone());
    match args.command {
        Command::Run(plan) => run::run(&plan, &root()?),
        Command::Create(plan) => run::create(&plan, &root()?),
        Command::Container(command) => container::cli::run(command, &root()?),
        Command::Supervise { id } => container::supervisor::main(&root()?, &id).map(|()| 0),
        Command::Image(command) => image::cli::run(command, &root()?).map(|()| 0),
        Command::Network(command) => net::cli::run(command, &root()?).map(|()| 0),
        Command::Volume(command) => volume::cli::run(command, &root()?).map(|()| 0),
        Command::Template(command) => templates::cli(command, &root()?).map(|()| 0),
        Command::Daemon(args) => daemon::run(&args, &root()?),
        Command::Bench(bench) => bench::cli(bench).map(|()| 0),
        Command::Doctor { json } => doctor::cli(json),
        Command::Selftest { json } => selftest::cli(json),
    }
}

#[cfg(test)]
mod tests {
    use super::line;
    use anyhow::Context;

    #[test]
    fn no_cause_is_said_twice() {
        let source = std::io::Error::from_raw_os_error(28);
        let full = source.to_string();
        let path = "/disk".into();
        let what = "write";
        let error = Err::<(), _>(fork::Error::Io { path, what, source }).context("no template");
        let error = error.expect_err("one");
        assert_eq!(line(&error), format!("no template: /disk: write: {full}"));
    }
}
