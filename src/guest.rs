//! Finding the guest: kernel, agent, and the empty writable disk, made together.

use anyhow::{Context, Result, bail};
use fork::Guest;
use std::path::{Path, PathBuf};

/// The environment variable that names a guest's directory.
const VARIABLE: &str = "VM_RUN_GUEST";

/// A guest, as it was installed.
#[derive(Debug, Clone)]
pub struct Found {
    /// Its files.
    pub guest: Guest,
    /// What `cargo xtask guest` says that their digest is.
    noted_digest: Option<String>,
}

impl Found {
    /// The digest of them, as it was noted when they were built, so
    /// that a run need not read them; a template's own was computed at its boot.
    ///
    /// # Errors
    /// Files that cannot be read.
    pub fn digest(&self) -> Result<String> {
        match &self.noted_digest {
            Some(digest) => Ok(digest.clone()),
            None => Ok(self.guest.digest()?),
        }
    }
}

/// What the user chose instead of what is found.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct GuestArgs {
    /// A vmlinux or bzImage with the options that docs/kernel.md lists
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// The agent, packed as an initramfs
    #[arg(long, value_name = "FILE")]
    pub agent: Option<PathBuf>,
}

/// Finds the guest: `$VM_RUN_GUEST`, `../lib/vm-run` beside the program,
/// /usr/lib/vm-run, the content cache of `cargo xtask`; and puts the chosen files
/// in the place of what was found.
///
/// # Errors
/// No guest anywhere: where it was looked for, and what to do.
pub fn find(chosen: &GuestArgs) -> Result<Found> {
    let candidates = candidates();
    let found = candidates.iter().find_map(|dir| in_dir(dir));
    let mut found = found.with_context(|| {
        let places: Vec<_> = candidates.iter().map(|d| d.display().to_string()).collect();
        format!(
            "no guest (vmlinux, initramfs, writable.blocks) in {}: run cargo xtask guest, or set {VARIABLE}",
            places.join(", ")
        )
    })?;
    for (file, place) in [
        (&chosen.kernel, &mut found.guest.kernel),
        (&chosen.agent, &mut found.guest.initramfs),
    ] {
        if let Some(file) = file {
            if !file.is_file() {
                bail!("{}: no such file", file.display());
            }
            place.clone_from(file);
            found.noted_digest = None;
        }
    }
    Ok(found)
}

fn in_dir(dir: &Path) -> Option<Found> {
    let guest = Guest::in_dir(dir)?;
    let noted_digest = std::fs::read_to_string(dir.join("digest"))
        .ok()
        .map(|text| text.trim().to_owned());
    guest.disk.is_some().then_some(Found {
        guest,
        noted_digest,
    })
}

fn candidates() -> Vec<PathBuf> {
    if let Some(dir) = std::env::var_os(VARIABLE) {
        return vec![PathBuf::from(dir)];
    }
    let mut all = Vec::new();
    if let Ok(program) = std::env::current_exe()
        && let Some(prefix) = program.parent().and_then(Path::parent)
    {
        all.push(prefix.join("lib/vm-run"));
    }
    all.push(PathBuf::from("/usr/lib/vm-run"));
    let cache = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache")));
    if let Some(cache) = cache {
        all.push(cache.join("vm-run/guest/current"));
    }
    all
}
