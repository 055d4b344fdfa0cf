//! Debian packages: which ones are needed, where they are, what is in them.

use crate::host;
use anyhow::{Context, Result, bail};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};

/// A package as the archive's signed lists have it.
#[derive(Clone)]
pub struct Package {
    /// The name of its file, version included.
    file: String,
    /// Its file and digest: all that decides its content.
    pub identity: String,
}

impl Package {
    /// Its name alone.
    pub fn name(&self) -> &str {
        self.file.split('_').next().unwrap_or_default()
    }

    /// Whether `path` is this package's file.
    pub fn is_file(&self, path: &Path) -> bool {
        path.file_name()
            .is_some_and(|name| name == self.file.as_str())
    }
}

/// apt as if on a machine with nothing installed, so that it names everything that a
/// package needs, and keeps what it downloads in our cache.
fn apt(folder: &Path) -> Result<Command> {
    let status = folder.join("status");
    std::fs::create_dir_all(folder.join("partial")).context("cannot make the cache of packages")?;
    std::fs::write(&status, "").context("cannot make an empty package status")?;
    let mut command = Command::new("apt-get");
    command
        .args([
            "-qq",
            "-y",
            "--no-install-recommends",
            "-o",
            "Debug::NoLocking=1",
            "-o",
            "APT::Sandbox::User=root",
        ])
        .args([
            "-o",
            "APT::Get::AllowUnauthenticated=false",
            "-o",
            "Dpkg::Use-Pty=0",
        ])
        .arg("-o")
        .arg(format!("Dir::State::status={}", status.display()))
        .arg("-o")
        .arg(format!("Dir::Cache::archives={}", folder.display()))
        .env("LC_ALL", "C");
    Ok(command)
}

fn folder() -> Result<PathBuf> {
    Ok(host::cache_dir()?.join("debs"))
}

/// The packages and all that they depend on.
pub fn closure(names: &[&str]) -> Result<Vec<Package>> {
    let scratch = tempfile::tempdir()?;
    let ask = || -> Result<Vec<Package>> {
        let list = host::output(
            apt(scratch.path())?
                .args(["--print-uris", "install"])
                .args(names),
        )?;
        Ok(list.lines().filter_map(parse_uri).collect())
    };
    let mut packages = match ask() {
        Ok(packages) if !packages.is_empty() => packages,
        _ => {
            eprintln!("xtask: apt-get update");
            host::run(Command::new("apt-get").args(["-qq", "update"]))?;
            ask()?
        }
    };
    packages.sort_by(|a, b| a.file.cmp(&b.file));
    if packages.is_empty() {
        bail!("apt knows no packages {names:?}");
    }
    Ok(packages)
}

/// `'URI' FILE SIZE ALGORITHM:DIGEST`
fn parse_uri(line: &str) -> Option<Package> {
    let mut words = line.strip_prefix('\'')?.split_whitespace();
    let _uri = words.next()?;
    let file = words.next()?.to_owned();
    let identity = format!("{file} {}", words.collect::<Vec<_>>().join(" "));
    Some(Package { file, identity })
}

/// Downloads packages and returns their files in the same order.
pub fn download(packages: &[Package]) -> Result<Vec<PathBuf>> {
    let folder = folder()?;
    let names: Vec<String> = packages
        .iter()
        .map(|package| exact(&package.file))
        .collect::<Result<_>>()?;
    host::run(
        apt(&folder)?
            .args(["--download-only", "install"])
            .args(&names)
            .stdout(Stdio::null()),
    )?;
    let files: Vec<PathBuf> = packages
        .iter()
        .map(|package| folder.join(&package.file))
        .collect();
    match files.iter().find(|file| !file.exists()) {
        Some(missing) => bail!("apt did not download {}", missing.display()),
        None => Ok(files),
    }
}

/// `NAME_VERSION_ARCH.deb` as apt's `NAME=VERSION`.
fn exact(file: &str) -> Result<String> {
    let mut parts = file.split('_');
    match (parts.next(), parts.next()) {
        (Some(name), Some(version)) => Ok(format!("{name}={}", version.replace("%3a", ":"))),
        _ => bail!("not the name of a package's file: {file}"),
    }
}

/// A package's files as a stream of tar.
pub struct Files {
    child: Child,
    stdout: ChildStdout,
}

/// Opens a package.
pub fn open(package: &Path) -> Result<Files> {
    let mut child = Command::new("dpkg-deb")
        .arg("--fsys-tarfile")
        .arg(package)
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start dpkg-deb")?;
    let stdout = child.stdout.take().context("dpkg-deb has no output")?;
    Ok(Files { child, stdout })
}

impl Files {
    /// Reads what is left and checks that the package was whole.
    pub fn close(mut self) -> Result<()> {
        std::io::copy(&mut self.stdout, &mut std::io::sink())?;
        let status = self.child.wait()?;
        if !status.success() {
            bail!("dpkg-deb: {status}");
        }
        Ok(())
    }
}

impl Read for Files {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.stdout.read(buffer)
    }
}

/// One file of one of the packages.
pub fn extract(packages: &[PathBuf], name: &str, path: &str) -> Result<Vec<u8>> {
    let prefix = format!("{name}_");
    let is_it = |file: &&PathBuf| {
        file.file_name()
            .is_some_and(|f| f.to_string_lossy().starts_with(&prefix))
    };
    let package = packages
        .iter()
        .find(is_it)
        .with_context(|| format!("no package {name}"))?;
    let mut files = open(package)?;
    let mut found = None;
    let mut archive = tar::Archive::new(&mut files);
    for entry in archive.entries()? {
        let mut entry = entry?;
        if entry
            .path()?
            .strip_prefix("./")
            .is_ok_and(|here| here == Path::new(path))
        {
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes)?;
            found = Some(bytes);
        }
    }
    files.close()?;
    found.with_context(|| format!("no {path} in the package {name}"))
}
