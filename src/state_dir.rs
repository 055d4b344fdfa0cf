//! Where vm-run keeps what it makes.

use anyhow::{Context, Result};
use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

/// The state directory, made if it is missing: `--root`, else /var/lib/vm-run
/// for root, else the XDG state directory.
///
/// # Errors
/// No home, or a directory that cannot be made.
pub fn resolve(given: Option<PathBuf>) -> Result<PathBuf> {
    let dir = match given {
        Some(dir) => dir,
        None if rustix::process::geteuid().is_root() => PathBuf::from("/var/lib/vm-run"),
        None => match std::env::var_os("XDG_STATE_HOME") {
            Some(state) => Path::new(&state).join("vm-run"),
            None => {
                let home = std::env::var_os("HOME").context("HOME is not set: give --root DIR")?;
                Path::new(&home).join(".local/state/vm-run")
            }
        },
    };
    // Templates hold guest memory: for their owner's eyes.
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&dir)
        .with_context(|| format!("cannot make the state directory {}", dir.display()))?;
    std::path::absolute(&dir).with_context(|| format!("cannot resolve {}", dir.display()))
}
