//! `cargo xtask vmhost -- CMD`.

use anyhow::Result;

/// `cargo xtask vmhost -- CMD`
#[derive(clap::Args)]
pub struct Args {}

/// Runs a command where KVM can run Linux.
pub fn run(_args: &Args) -> Result<()> {
    Ok(())
}
