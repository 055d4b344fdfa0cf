//! The guest without an agent of `tests/guest/instants.rs`.

use crate::cpio::Archive;
use crate::{agent, host};
use anyhow::{Context, Result};
use std::fs;
use std::path::PathBuf;

/// Builds its first process and packs it as an initramfs, in the target directory.
pub fn ensure() -> Result<PathBuf> {
    let program = agent::build_static("vm-run-twins", "twins")?;
    let program =
        fs::read(&program).with_context(|| format!("cannot read {}", program.display()))?;
    let mut archive = Archive::default();
    archive.directory("dev");
    archive.character("dev/console", 0o600, [5, 1]);
    archive.file("init", 0o755, &program);
    let path = host::root().join("guest-kernel/target/twins.cpio");
    fs::write(&path, archive.finish())
        .with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}
