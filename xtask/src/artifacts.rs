//! Building with cargo, and learning where the results are.

use crate::host;
use anyhow::{Context, Result, bail};
use cargo_metadata::Message;
use std::io::BufReader;
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// An executable that cargo has built.
#[derive(Debug)]
pub struct Executable {
    /// The target's name: a binary's, a test's.
    pub name: String,
    /// Where it is.
    pub path: PathBuf,
}

/// A cargo command at the top of the checkout.
pub fn cargo(args: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(host::root()).args(args);
    // What the cargo that runs us says of our own package: some build scripts are run
    // again when it changes, and cargo called by hand says nothing.
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") {
            command.env_remove(name);
        }
    }
    command
}

/// Runs a cargo command that builds, and returns the executables it made or found
/// made.
pub fn build(args: &[&str]) -> Result<Vec<Executable>> {
    let mut child = cargo(args)
        .arg("--message-format=json-render-diagnostics")
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start cargo")?;
    let stdout = child.stdout.take().context("cargo has no output")?;
    let mut executables = Vec::new();
    for message in Message::parse_stream(BufReader::new(stdout)) {
        if let Message::CompilerArtifact(artifact) = message?
            && let Some(path) = artifact.executable
        {
            executables.push(Executable {
                name: artifact.target.name,
                path: path.into(),
            });
        }
    }
    let status = child.wait()?;
    if !status.success() {
        bail!("cargo {}: {status}", args.join(" "));
    }
    Ok(executables)
}

/// The program, and its workers' program, which it looks for beside itself.
#[derive(Debug)]
pub struct Programs {
    /// vm-run.
    pub vm_run: PathBuf,
    /// vm-run-worker.
    pub worker: PathBuf,
}

/// Builds both, as `profile` (`--release`, or nothing) says.
pub fn programs(profile: &[&str]) -> Result<Programs> {
    let args = [
        &["build", "--locked", "--package", "vm-run", "--bins"],
        profile,
    ]
    .concat();
    let executables = build(&args)?;
    let find = |name: &str| {
        let found = executables
            .iter()
            .find(|executable| executable.name == name);
        found
            .map(|executable| executable.path.clone())
            .with_context(|| format!("cargo {} made no {name}", args.join(" ")))
    };
    Ok(Programs {
        vm_run: find("vm-run")?,
        worker: find("vm-run-worker")?,
    })
}

/// The one executable called `name` that `args` builds.
pub fn build_one(args: &[&str], name: &str) -> Result<PathBuf> {
    build(args)?
        .into_iter()
        .find(|executable| executable.name == name)
        .map(|executable| executable.path)
        .with_context(|| format!("cargo {} made no {name}", args.join(" ")))
}
