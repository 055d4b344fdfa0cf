//! `cargo xtask kernel`.

use anyhow::Result;

/// `cargo xtask kernel`
#[derive(clap::Args)]
pub struct Args {}

/// Builds the guest kernel and prints its path.
pub fn run(_args: &Args) -> Result<()> {
    Ok(())
}
