//! Where the kernel's source comes from: Debian's `linux-source` package (their
//! patches applied), or a tar file.

use crate::host;
use anyhow::{Context, Result};
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A kernel's source that can be named before it is fetched.
pub enum Source {
    /// A Debian package, at the version that apt would install.
    Debian {
        /// Its name, as `linux-source-6.12`.
        package: String,
        /// Its version, as `6.12.117-1~deb12u1`.
        version: String,
    },
    /// A tar file.
    Tarball {
        /// Where it is.
        path: PathBuf,
        /// Its SHA-256, in hexadecimal.
        digest: String,
    },
}

impl Source {
    /// Debian's source of a series (as `6.12`).
    pub fn debian(series: &str) -> Result<Self> {
        let package = format!("linux-source-{series}");
        let version = host::apt_candidate(&package).with_context(|| {
            format!("no package {package}: give the kernel's source with --source TARBALL")
        })?;
        Ok(Source::Debian { package, version })
    }

    /// A tar file, compressed or not.
    pub fn tarball(path: &Path) -> Result<Self> {
        let mut file =
            File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
        let mut hash = Sha256::new();
        io::copy(&mut file, &mut HashWriter(&mut hash))
            .with_context(|| format!("cannot read {}", path.display()))?;
        let digest = hash
            .finalize()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        Ok(Source::Tarball {
            path: path.to_path_buf(),
            digest,
        })
    }

    /// What names this very source, for people and for the cache's key.
    pub fn identity(&self) -> String {
        match self {
            Source::Debian { package, version } => format!("{package} {version}"),
            Source::Tarball { digest, .. } => format!("sha256:{digest}"),
        }
    }

    /// Fetches and unpacks the source, so that `tree` is its top.
    pub fn unpack(&self, tree: &Path) -> Result<()> {
        fs::create_dir_all(tree).with_context(|| format!("cannot make {}", tree.display()))?;
        match self {
            Source::Debian { package, version } => {
                let fetched = tree.join("debian-package");
                let files = unpack_package(package, version, &fetched)?;
                extract(&files.join(format!("usr/src/{package}.tar.xz")), tree)?;
                fs::remove_dir_all(&fetched)
                    .with_context(|| format!("cannot remove {}", fetched.display()))
            }
            Source::Tarball { path, .. } => extract(path, tree),
        }
    }
}

/// Feeds what is written to a hash.
struct HashWriter<'a>(&'a mut Sha256);

impl io::Write for HashWriter<'_> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.0.update(data);
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Debian's own configuration of a series for virtual machines, its "cloud" flavour:
/// a stock kernel in all but the drivers for hardware that no guest has.
pub fn debian_config(series: &str) -> Result<String> {
    let package = format!("linux-config-{series}");
    let version = host::apt_candidate(&package).with_context(|| format!("no package {package}"))?;
    let folder = tempfile::tempdir().context("cannot make a temporary folder")?;
    let files = unpack_package(&package, &version, folder.path())?;
    let config = files.join(format!(
        "usr/src/{package}/config.amd64_none_cloud-amd64.xz"
    ));
    host::output(Command::new("xz").arg("-dc").arg(config))
}

/// Downloads a package into `folder` and unpacks it there, uninstalled; returns
/// the folder of its files.
fn unpack_package(package: &str, version: &str, folder: &Path) -> Result<PathBuf> {
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let deb = host::apt_download(package, version, folder)?;
    let files = folder.join("files");
    host::run(Command::new("dpkg-deb").arg("-x").arg(&deb).arg(&files))?;
    fs::remove_file(&deb).with_context(|| format!("cannot remove {}", deb.display()))?;
    Ok(files)
}

/// Unpacks a tar file without its top folder.
fn extract(tarball: &Path, tree: &Path) -> Result<()> {
    host::run(
        Command::new("tar")
            .arg("--strip-components=1")
            .arg("-xf")
            .arg(tarball)
            .arg("-C")
            .arg(tree),
    )
}
