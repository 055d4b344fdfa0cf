//! `cargo xtask kernel`: the guest kernel ("Photon Pico"), built from Debian's
//! kernel source with the configuration of `guest-kernel/linux` and kept in the
//! cache by the digest of all that goes into it. docs/kernel.md is its manual.

mod build;
mod config;
mod source;
mod walk;

use crate::host;
use anyhow::{Context, Result, bail};
use source::Source;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

/// What a kernel build needs, all of it Debian packages.
const BUILD_NEEDS: &[&str] = &[
    "bc",
    "bison",
    "flex",
    "gcc",
    "libc6-dev",
    "libelf-dev",
    "libssl-dev",
    "make",
    "patch",
    "xz-utils",
    "zstd",
];

/// `cargo xtask kernel`
#[derive(clap::Args)]
pub struct Args {
    /// Build from this kernel source (a tar file) instead of Debian's package
    #[arg(long, value_name = "TARBALL")]
    source: Option<PathBuf>,
    /// Build a bzImage from Debian's own configuration plus the options that
    /// vm-run needs built in: what a user's own kernel may look like
    #[arg(long)]
    debian: bool,
    /// Boot it in QEMU and compare what it answers to programs with what Debian's
    /// kernel answers
    #[arg(long, conflicts_with = "debian")]
    walk: bool,
}

/// Builds the guest kernel, if the cache does not hold it, and prints its path.
pub fn run(args: &Args) -> Result<()> {
    let flavour = if args.debian {
        Flavour::Debian
    } else {
        Flavour::Pico
    };
    let image = build(flavour, args.source.as_deref())?;
    println!("{}", image.display());
    if args.walk {
        walk::compare(&image)
    } else {
        Ok(())
    }
}

/// The path of the guest kernel, an uncompressed `vmlinux`; built first (some
/// minutes) if the cache does not hold it.
pub fn ensure() -> Result<PathBuf> {
    build(Flavour::Pico, None)
}

/// A kernel of Debian's configuration and the options that vm-run needs: what a
/// user's own may be. Built first if the cache does not hold it.
pub fn ensure_debian() -> Result<PathBuf> {
    build(Flavour::Debian, None)
}

/// Builds the walk, a static program, and returns its path.
pub fn walk_program() -> Result<PathBuf> {
    walk::build()
}

/// Which kernel is built.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Flavour {
    /// The guest kernel of vm-run.
    Pico,
    /// Debian's configuration, with what vm-run needs built in.
    Debian,
}

impl Flavour {
    /// What `make` is asked for.
    fn target(self) -> &'static str {
        match self {
            Flavour::Pico => "vmlinux",
            Flavour::Debian => "bzImage",
        }
    }

    /// Where the build leaves the image, in the source tree.
    fn image(self) -> &'static str {
        match self {
            Flavour::Pico => "vmlinux",
            Flavour::Debian => "arch/x86/boot/bzImage",
        }
    }

    /// About how many objects a whole build makes (measured with 6.12.117); it
    /// scales the progress bar and nothing else.
    fn objects(self) -> u64 {
        match self {
            Flavour::Pico => 2_000,
            Flavour::Debian => 5_500,
        }
    }
}

/// All that goes into a kernel.
struct Recipe {
    flavour: Flavour,
    source: Source,
    /// The `.config` to start from; empty for `allnoconfig`.
    base: String,
    /// What is asked over the base, in Kconfig's syntax.
    demands: String,
    /// In the order in which they apply.
    patches: Vec<PathBuf>,
}

impl Recipe {
    fn new(flavour: Flavour, tarball: Option<&Path>) -> Result<Self> {
        let folder = folder();
        let read = |name: &str| {
            let path = folder.join(name);
            fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
        };
        let series = read("version")?;
        let series = series.trim();
        let (base, demands, patches) = match flavour {
            Flavour::Pico => (
                String::new(),
                read("config")?,
                patches(&folder.join("patches"))?,
            ),
            Flavour::Debian => (
                source::debian_config(series)?,
                read("debian.config")? + &read("required")?,
                Vec::new(),
            ),
        };
        let source = match tarball {
            Some(path) => Source::tarball(path)?,
            None => Source::debian(series)?,
        };
        Ok(Recipe {
            flavour,
            source,
            base,
            demands,
            patches,
        })
    }

    /// The digest of all that goes into the kernel, the compiler included.
    fn key(&self) -> Result<String> {
        let compiler = host::output(Command::new("gcc").arg("--version"))?;
        let mut parts = vec![
            self.flavour.target().as_bytes().to_vec(),
            self.source.identity().as_bytes().to_vec(),
            self.base.clone().into_bytes(),
            self.demands.clone().into_bytes(),
            compiler
                .lines()
                .next()
                .unwrap_or_default()
                .as_bytes()
                .to_vec(),
        ];
        for patch in &self.patches {
            parts
                .push(fs::read(patch).with_context(|| format!("cannot read {}", patch.display()))?);
        }
        let parts: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
        Ok(host::key(&parts))
    }
}

/// `guest-kernel/linux`.
fn folder() -> PathBuf {
    host::root().join("guest-kernel/linux")
}

/// The patches in a folder, by name; none if there is no such folder.
fn patches(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => {
            return Err(error).with_context(|| format!("cannot read {}", folder.display()));
        }
    };
    let mut patches = entries
        .map(|entry| Ok(entry?.path()))
        .collect::<std::io::Result<Vec<_>>>()
        .with_context(|| format!("cannot read {}", folder.display()))?;
    patches.retain(|path| {
        path.extension()
            .is_some_and(|extension| extension == "patch")
    });
    patches.sort();
    Ok(patches)
}

/// The cached image, built first if it is not there.
fn build(flavour: Flavour, tarball: Option<&Path>) -> Result<PathBuf> {
    host::apt_install(BUILD_NEEDS)?;
    let recipe = Recipe::new(flavour, tarball)?;
    let cache = host::cache_dir()?.join("kernel");
    fs::create_dir_all(&cache).with_context(|| format!("cannot make {}", cache.display()))?;
    let entry = cache.join(recipe.key()?);
    let image = entry.join(flavour.target());
    if image.exists() {
        return Ok(image);
    }
    // One build at a time, whoever asks; the second finds the first one's result.
    let lock = File::create(cache.join("lock")).context("cannot make the kernel cache's lock")?;
    lock.lock().context("cannot lock the kernel cache")?;
    if image.exists() {
        return Ok(image);
    }
    let tree = cache.join("build");
    remove(&tree)?;
    let staged = cache.join("staged");
    remove(&staged)?;
    fs::create_dir_all(&staged).with_context(|| format!("cannot make {}", staged.display()))?;
    // A tree that failed stays, to be looked at, until the next build.
    build::build(&recipe, &tree, &staged)?;
    fs::rename(&staged, &entry).with_context(|| format!("cannot make {}", entry.display()))?;
    remove(&tree)?;
    if !image.exists() {
        bail!("{}: the build left no image", image.display());
    }
    Ok(image)
}

/// Removes a folder and all in it, if it is there.
fn remove(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", folder.display()))
        }
        _ => Ok(()),
    }
}
