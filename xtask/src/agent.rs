//! `cargo xtask agent`: the guest's PID 1 and the program `warm`, built static and
//! packed as an initramfs.

use crate::cpio::Archive;
use crate::host;
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// `cargo xtask agent`
#[derive(clap::Args)]
pub struct Args {}

/// Builds the agent and prints the path of its initramfs.
pub fn run(_args: &Args) -> Result<()> {
    println!("{}", ensure()?.display());
    Ok(())
}

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Builds the agent as the checkout has it, and returns its initramfs in the
/// cache. The same agent gives the same bytes and the same path.
pub fn ensure() -> Result<PathBuf> {
    let build = |program| {
        let path = build_static("vm-run-agent", program)?;
        fs::read(&path).with_context(|| format!("cannot read {}", path.display()))
    };
    let archive = initramfs(&build("vm-run-agent")?, &build("warm")?);
    let dir = host::cache_dir()?
        .join("agent")
        .join(host::key(&[&archive]));
    let path = dir.join("initramfs");
    if !path.exists() {
        fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        // Whole or not at all, whoever else makes it at the same time.
        let unfinished = dir.join(format!("initramfs.{}", std::process::id()));
        fs::write(&unfinished, &archive)
            .and_then(|()| fs::rename(&unfinished, &path))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(path)
}

/// Builds a static program of the guest's workspace, in its own target directory.
pub fn build_static(package: &str, program: &str) -> Result<PathBuf> {
    let workspace = host::root().join("guest-kernel");
    let target = workspace.join("target");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    host::run(
        Command::new(cargo)
            .current_dir(&workspace)
            // Flags for one target only: build scripts and macros are not static.
            .env_remove("CARGO_ENCODED_RUSTFLAGS")
            .env("RUSTFLAGS", rustflags(&workspace))
            .args(["build", "--release", "--locked", "--quiet"])
            .args(["--package", package, "--bin", program])
            .args(["--target", TARGET])
            .arg("--target-dir")
            .arg(&target),
    )
    .with_context(|| format!("cannot build {package}"))?;
    Ok(target.join(TARGET).join("release").join(program))
}

/// Static, and with no path of this machine in it: the digest of the guest must
/// not depend on where it was built. At the linker's own address, 2 MiB, and not one
/// that the kernel chooses: code and data then lie in one region of 2 MiB, below one
/// page table, and each table that a child uses is a page of its own
/// (docs/faults.md). Other programs have their addresses at random as before.
fn rustflags(workspace: &Path) -> String {
    let mut flags = vec![
        "-C target-feature=+crt-static".to_owned(),
        "-C relocation-model=static".to_owned(),
    ];
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cargo")));
    flags.push(format!("--remap-path-prefix={}=guest", workspace.display()));
    if let Some(home) = home {
        flags.push(format!("--remap-path-prefix={}=cargo", home.display()));
    }
    flags.join(" ")
}

/// The initramfs: the agent as /init, the program that it gives to warm containers,
/// the directories that it mounts on, and the two devices that must be there before it has mounted anything (its standard
/// streams: the kernel opens /dev/console for it, and Rust's start code opens
/// /dev/null where there is no console).
fn initramfs(agent: &[u8], warm: &[u8]) -> Vec<u8> {
    let mut archive = Archive::default();
    for directory in ["dev", "mnt", "proc", "sys"] {
        archive.directory(directory);
    }
    archive.character("dev/console", 0o600, [5, 1]);
    archive.character("dev/null", 0o666, [1, 3]);
    archive.file("init", 0o755, agent);
    archive.file("warm", 0o755, warm);
    archive.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_initramfs_is_a_cpio_archive_of_what_it_should_hold() {
        let archive = initramfs(b"agent", b"warm");
        assert_eq!(archive, initramfs(b"agent", b"warm"));
        assert_eq!(archive.len() % 4, 0);
        let mut rest = &archive[..];
        let mut found = Vec::new();
        loop {
            assert_eq!(&rest[..6], b"070701");
            let field = |i: usize| {
                let hex = std::str::from_utf8(&rest[6 + 8 * i..14 + 8 * i]).unwrap();
                u32::from_str_radix(hex, 16).unwrap() as usize
            };
            let (mode, size, name_size) = (field(1), field(6), field(11));
            let name = std::str::from_utf8(&rest[110..110 + name_size - 1]).unwrap();
            if name == "TRAILER!!!" {
                break;
            }
            found.push((name, mode, field(9), field(10)));
            let content = (110 + name_size).next_multiple_of(4);
            match name {
                "init" => assert_eq!(&rest[content..content + size], b"agent"),
                "warm" => assert_eq!(&rest[content..content + size], b"warm"),
                _ => {}
            }
            rest = &rest[(content + size).next_multiple_of(4)..];
        }
        assert_eq!(
            found,
            [
                ("dev", 0o040_755, 0, 0),
                ("mnt", 0o040_755, 0, 0),
                ("proc", 0o040_755, 0, 0),
                ("sys", 0o040_755, 0, 0),
                ("dev/console", 0o020_600, 5, 1),
                ("dev/null", 0o020_666, 1, 3),
                ("init", 0o100_755, 0, 0),
                ("warm", 0o100_755, 0, 0),
            ]
        );
    }
}
