//! `cargo xtask agent`: the guest's PID 1, built static and packed as an
//! initramfs.

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
    let agent = build()?;
    let agent = fs::read(&agent).with_context(|| format!("cannot read {}", agent.display()))?;
    let archive = initramfs(&agent)?;
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

/// Builds the static binary, in the guest workspace's own target directory.
fn build() -> Result<PathBuf> {
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
            .args(["--package", "vm-run-agent", "--bin", "vm-run-agent"])
            .args(["--target", TARGET])
            .arg("--target-dir")
            .arg(&target),
    )
    .context("cannot build the guest's agent")?;
    Ok(target.join(TARGET).join("release").join("vm-run-agent"))
}

/// Static, and with no path of this machine in it: the digest of the guest must
/// not depend on where it was built.
fn rustflags(workspace: &Path) -> String {
    let mut flags = vec!["-C target-feature=+crt-static".to_owned()];
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cargo")));
    flags.push(format!("--remap-path-prefix={}=guest", workspace.display()));
    if let Some(home) = home {
        flags.push(format!("--remap-path-prefix={}=cargo", home.display()));
    }
    flags.join(" ")
}

/// An entry's type, `S_IFMT` of its mode.
#[derive(Clone, Copy)]
enum Kind {
    Directory,
    File,
    Character { major: u32, minor: u32 },
}

/// The initramfs: the agent as /init, the directories that it mounts on, and the
/// two devices that must be there before it has mounted anything (its standard
/// streams: the kernel opens /dev/console for it, and Rust's start code opens
/// /dev/null where there is no console).
fn initramfs(agent: &[u8]) -> Result<Vec<u8>> {
    let console = Kind::Character { major: 5, minor: 1 };
    let null = Kind::Character { major: 1, minor: 3 };
    let mut archive = Archive::default();
    for directory in ["dev", "mnt", "proc", "sys"] {
        archive.entry(directory, Kind::Directory, 0o755, &[])?;
    }
    archive.entry("dev/console", console, 0o600, &[])?;
    archive.entry("dev/null", null, 0o666, &[])?;
    archive.entry("init", Kind::File, 0o755, agent)?;
    archive.finish()
}

/// A cpio archive of the "newc" format (Linux
/// Documentation/driver-api/early-userspace/buffer-format.rst). Owners are root
/// and times zero: the same content gives the same bytes.
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    fn entry(&mut self, name: &str, kind: Kind, permissions: u32, content: &[u8]) -> Result<()> {
        let (kind, major, minor) = match kind {
            Kind::Directory => (0o040_000, 0, 0),
            Kind::File => (0o100_000, 0, 0),
            Kind::Character { major, minor } => (0o020_000, major, minor),
        };
        self.entries += 1;
        let size = u32::try_from(content.len()).context("a cpio entry holds at most 4 GiB")?;
        let name_size = name.len() as u32 + 1;
        let fields = [
            self.entries,       // inode
            kind | permissions, // mode
            0,                  // uid
            0,                  // gid
            1,                  // links
            0,                  // mtime
            size,
            0, // device, major and minor
            0,
            major,
            minor,
            name_size,
            0, // checksum: none in this format
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes
                .extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
        Ok(())
    }

    /// Names and contents end at a multiple of four.
    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Result<Vec<u8>> {
        self.entry("TRAILER!!!", Kind::File, 0, &[])?;
        Ok(self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_initramfs_is_a_cpio_archive_of_what_it_should_hold() {
        let archive = initramfs(b"agent").unwrap();
        assert_eq!(archive, initramfs(b"agent").unwrap());
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
            if name == "init" {
                assert_eq!(&rest[content..content + size], b"agent");
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
            ]
        );
    }
}
