//! What the guest tests run in containers and no image has: programs in C, static, so that
//! any root will do.

use crate::cpio::Archive;
use crate::host;
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// By their sources.
const SOURCES: [&str; 3] = [
    "tests/guest/programs/drawing.c",
    "tests/guest/programs/scribble.c",
    "guest-kernel/generation/examples/generation.c",
];

/// A module for Node, which brings the libraries.
const MODULE: &str = "guest-kernel/generation/examples/reseed.c";

/// The first process of a guest of its own.
const SILENT: &str = "tests/guest/programs/silent.c";

/// The number of /dev/mem (Linux Documentation/admin-guide/devices.txt).
const DEV_MEM: [u32; 2] = [1, 1];

/// Compiles them, and returns the directory that they are in.
pub fn ensure() -> Result<PathBuf> {
    let root = host::root();
    let dir = root.join("target/programs");
    fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    for source in SOURCES {
        let source = root.join(source);
        let name = source.file_stem().context("a source without a name")?;
        let header = root.join("guest-kernel/generation");
        let mut cc = static_cc(&source, &dir.join(name));
        host::run(cc.arg("-pthread").arg("-I").arg(header))?;
    }
    let module = ["-shared", "-fPIC", "-Os", "-s"];
    host::run(cc(&root.join(MODULE), &dir.join("reseed.node")).args(module))?;
    Ok(dir)
}

/// The initramfs of a guest that does not confirm its identity.
pub fn silent_guest() -> Result<PathBuf> {
    let root = host::root();
    let abi = root.join("guest-kernel/abi/src/lib.rs");
    let abi = fs::read_to_string(&abi).with_context(|| format!("cannot read {}", abi.display()))?;
    let version = abi
        .lines()
        .find_map(|line| {
            line.strip_prefix("pub const VERSION: u32 = ")?
                .strip_suffix(';')
        })
        .context("the agreement has no version")?;
    let program = root.join("target/silent");
    host::run(static_cc(&root.join(SILENT), &program).arg(format!("-DVERSION={version}")))?;
    let mut archive = Archive::default();
    archive.directory("dev");
    archive.character("dev/mem", 0o600, DEV_MEM);
    archive.file("init", 0o755, &fs::read(&program)?);
    let path = root.join("target/silent.initramfs");
    fs::write(&path, archive.finish())
        .with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}

fn static_cc(source: &Path, program: &Path) -> Command {
    let mut command = cc(source, program);
    command.args(["-static", "-O2"]);
    command
}

fn cc(source: &Path, program: &Path) -> Command {
    let mut command = Command::new("cc");
    let strict = ["-Wall", "-Wextra", "-Werror", "-o"];
    command.args(strict).arg(program).arg(source);
    command
}
