//! `cargo xtask install`: a tree that runs with neither cargo nor a checkout.

use crate::artifacts::{Programs, programs};
use crate::guest;
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};

/// `cargo xtask install`
#[derive(clap::Args)]
pub struct Args {
    /// Where to: PREFIX/bin/vm-run and PREFIX/lib/vm-run/
    #[arg(long, value_name = "DIR", default_value = "/usr/local")]
    prefix: PathBuf,
}

/// Installs, and prints where the program is.
pub fn run(args: &Args) -> Result<()> {
    println!("{}", into(&args.prefix)?.display());
    Ok(())
}

/// Builds an optimised vm-run, its workers' program and the guest, and copies them;
/// returns the program.
pub fn into(prefix: &Path) -> Result<PathBuf> {
    let Programs { vm_run, worker } = programs(&["--release"])?;
    let guest = guest::ensure()?;
    let lib = prefix.join("lib/vm-run");
    place(&worker, &lib, "vm-run-worker")?;
    for name in guest::FILES {
        place(&guest.join(name), &lib, name)?;
    }
    // Last: it finds the rest in place.
    place(&vm_run, &prefix.join("bin"), "vm-run")?;
    Ok(prefix.join("bin/vm-run"))
}

/// Copies a file beside its place, and renames it there: a running vm-run keeps
/// its old one.
fn place(from: &Path, dir: &Path, name: &str) -> Result<()> {
    let to = dir.join(name);
    let unfinished = dir.join(format!(".{name}.new"));
    fs::create_dir_all(dir)
        .and_then(|()| fs::copy(from, &unfinished))
        .and_then(|_| fs::rename(&unfinished, &to))
        .with_context(|| format!("cannot install {}", to.display()))
}
