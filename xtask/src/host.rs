//! What every task needs of the machine: the cache, Debian's packages, commands
//! that fail loudly.

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Where things that are dear to make are kept, outside the checkout: each in a
/// folder or file whose name holds the digest of all that went into it.
pub fn cache_dir() -> Result<PathBuf> {
    let base = match std::env::var_os("XDG_CACHE_HOME") {
        Some(dir) => PathBuf::from(dir),
        None => PathBuf::from(
            std::env::var_os("HOME").context("neither XDG_CACHE_HOME nor HOME is set")?,
        )
        .join(".cache"),
    };
    let dir = base.join("vm-run");
    std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    Ok(dir)
}

/// The top of the checkout.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .map(Path::to_path_buf)
        .unwrap_or_default()
}

/// The first 16 hex digits of the SHA-256 over all `parts`, each with its length.
pub fn key(parts: &[&[u8]]) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hash.finalize()
        .iter()
        .take(8)
        .map(|b| format!("{b:02x}"))
        .collect()
}

/// Runs a command to its end; an error names it.
pub fn run(command: &mut Command) -> Result<()> {
    let status = command
        .status()
        .with_context(|| format!("cannot start {:?}", command.get_program()))?;
    if !status.success() {
        bail!("{}: {status}", name(command));
    }
    Ok(())
}

/// Runs a command and returns its standard output.
pub fn output(command: &mut Command) -> Result<String> {
    let out = command
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot start {:?}", command.get_program()))?;
    if !out.status.success() {
        bail!("{}: {}", name(command), out.status);
    }
    String::from_utf8(out.stdout).with_context(|| format!("{} printed no UTF-8", name(command)))
}

/// Its program and arguments, and not what it has in its environment.
fn name(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let words: Vec<_> = words.map(|word| word.to_string_lossy()).collect();
    words.join(" ")
}

/// Installs the Debian packages that are not there yet; quiet when none is missing.
pub fn apt_install(packages: &[&str]) -> Result<()> {
    let missing: Vec<&str> = packages
        .iter()
        .copied()
        .filter(|package| !is_installed(package))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    eprintln!("xtask: apt-get install {}", missing.join(" "));
    let apt = |args: &[&str]| {
        run(Command::new("apt-get")
            .env("DEBIAN_FRONTEND", "noninteractive")
            .args(["-qq", "-o", "Dpkg::Use-Pty=0"])
            .args(args)
            .stdout(Stdio::null()))
        .with_context(|| format!("install these by hand: {}", missing.join(" ")))
    };
    apt(&["update"])?;
    apt(&[&["install", "-y", "--no-install-recommends"], &missing[..]].concat())
}

/// Has docker's own client, of whatever version: Debian's, if there is none yet.
pub fn ensure_docker_client() -> Result<()> {
    let is_there = |directory: std::path::PathBuf| directory.join("docker").is_file();
    let path = std::env::var_os("PATH").unwrap_or_default();
    match std::env::split_paths(&path).any(is_there) {
        true => Ok(()),
        false => apt_install(&["docker.io"]),
    }
}

/// The version of a package that apt would install. Refreshes apt's lists if they
/// do not know the package.
pub fn apt_candidate(package: &str) -> Result<String> {
    if let Some(version) = known_candidate(package)? {
        return Ok(version);
    }
    run(Command::new("apt-get")
        .args(["-qq", "update"])
        .stdout(Stdio::null()))?;
    known_candidate(package)?.with_context(|| format!("apt knows no package {package}"))
}

fn known_candidate(package: &str) -> Result<Option<String>> {
    let policy = output(
        Command::new("apt-cache")
            .env("LC_ALL", "C")
            .args(["policy", package]),
    )?;
    Ok(policy
        .lines()
        .find_map(|line| line.trim().strip_prefix("Candidate: "))
        .filter(|version| *version != "(none)")
        .map(str::to_owned))
}

/// Downloads a package at a version into a folder, without installing it, and
/// returns the path of its `.deb`.
pub fn apt_download(package: &str, version: &str, folder: &Path) -> Result<PathBuf> {
    // As root apt would drop to its own user, who may not write into the folder.
    run(Command::new("apt-get")
        .args(["-qq", "-o", "APT::Sandbox::User=root", "download"])
        .arg(format!("{package}={version}"))
        .current_dir(folder)
        .stdout(Stdio::null()))?;
    let prefix = format!("{package}_");
    for entry in
        std::fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?
    {
        let path = entry
            .with_context(|| format!("cannot read {}", folder.display()))?
            .path();
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if name.starts_with(&prefix) && name.ends_with(".deb") {
            return Ok(path);
        }
    }
    bail!(
        "apt-get download {package}={version} left no file in {}",
        folder.display()
    )
}

fn is_installed(package: &str) -> bool {
    Command::new("dpkg-query")
        .args(["-W", "-f=${db:Status-Status}", package])
        .stderr(Stdio::null())
        .output()
        .is_ok_and(|out| out.stdout == b"installed")
}
