//! The images of the demo and the tests: real ones, made of Debian packages without
//! a registry. Packages are unpacked from tar to tar, so this needs no root, and the
//! same packages give the same bytes.

mod deb;
mod layer;
mod layout;
pub mod workloads;

use crate::host;
use anyhow::{Context, Result};
use deb::Package;
use layer::Layer;
use layout::{Compression, Config};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Changes when the images would, for the same packages.
const VERSION: &str = "1";
/// The user of tests that must not be root.
const APP_PASSWD: &str = "app:x:1000:1000:app:/home/app:/bin/sh\n";
const APP_GROUP: &str = "app:x:1000:\n";
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The lower layer of the Debian image.
const DEBIAN_BASE: &[&str] = &[
    "base-files",
    "base-passwd",
    "bash",
    "coreutils",
    "dash",
    "debianutils",
    "findutils",
    "grep",
    "gzip",
    "hostname",
    "libc-bin",
    "procps",
    "sed",
    "tar",
    "util-linux",
];
/// The upper one, with what it needs beside the lower.
const DEBIAN_PYTHON: &[&str] = &["python3"];
/// A file of base-files that the upper layer hides, so that every load of the image
/// proves a whiteout.
const HIDDEN: &str = "etc/issue.net";

/// `cargo xtask images`
pub fn run() -> Result<()> {
    println!("{}", ensure_busybox()?.display());
    println!("{}", ensure_debian_python()?.display());
    for (_, path) in workloads::ensure_all()? {
        println!("{}", path.display());
    }
    Ok(())
}

/// A docker-archive of `busybox:latest`: Debian's static busybox with all its applets.
pub fn ensure_busybox() -> Result<PathBuf> {
    let packages = deb::closure(&["busybox-static"])?;
    ensure("busybox", &packages, |target| {
        let files = deb::download(&packages)?;
        let mut layer = Layer::new();
        for directory in [
            "bin", "dev", "etc", "home", "proc", "run", "sbin", "sys", "usr", "usr/bin",
            "usr/sbin", "var",
        ] {
            layer.directory(directory, 0o755, 0)?;
        }
        layer.directory("root", 0o700, 0)?;
        layer.directory("home/app", 0o755, 1000)?;
        layer.directory("tmp", 0o1777, 0)?;
        layer.directory("var/tmp", 0o1777, 0)?;
        let busybox = deb::extract(&files, "busybox-static", "bin/busybox")?;
        layer.file("bin/busybox", 0o755, &busybox)?;
        for applet in applets(&busybox)? {
            layer.symlink(&applet, "/bin/busybox")?;
        }
        let passwd = [
            "root:x:0:0:root:/root:/bin/sh\n",
            "nobody:x:65534:65534:nobody:/:/bin/false\n",
            APP_PASSWD,
        ];
        let group = [
            "root:x:0:\n",
            "tty:x:5:\n",
            "audio:x:29:app\n",
            "nogroup:x:65534:\n",
            APP_GROUP,
        ];
        layer.file("etc/passwd", 0o644, passwd.concat().as_bytes())?;
        layer.file("etc/group", 0o644, group.concat().as_bytes())?;
        let config = Config {
            env: &[PATH],
            cmd: &["sh"],
            ..Config::EMPTY
        };
        layout::write_docker_archive(target, "busybox:latest", &config, layer.finish()?)
    })
}

/// An OCI layout (tar) of `debian-python:bookworm`: a small Debian in a gzip layer,
/// Python in a zstd layer above it.
pub fn ensure_debian_python() -> Result<PathBuf> {
    let base = deb::closure(DEBIAN_BASE)?;
    let all = deb::closure(&[DEBIAN_BASE, DEBIAN_PYTHON].concat())?;
    ensure("debian-python", &all, |target| {
        let files = deb::download(&all)?;
        let (lower, upper): (Vec<PathBuf>, Vec<PathBuf>) = files
            .into_iter()
            .partition(|file| base.iter().any(|package| package.is_file(file)));
        let config = Config {
            env: &[PATH, "LANG=C.UTF-8"],
            cmd: &["python3"],
            ..Config::EMPTY
        };
        let layers = vec![
            (debian_base(&lower)?, Compression::Gzip),
            (debian_python(&upper)?, Compression::Zstd),
        ];
        layout::write_oci(target, "debian-python:bookworm", &config, layers)
    })
}

fn debian_base(packages: &[PathBuf]) -> Result<Vec<u8>> {
    let mut layer = Layer::new();
    layer.directory("usr", 0o755, 0)?;
    for (alias, place) in [
        ("bin", "usr/bin"),
        ("lib", "usr/lib"),
        ("lib64", "usr/lib64"),
        ("sbin", "usr/sbin"),
    ] {
        layer.directory(place, 0o755, 0)?;
        layer.symlink(alias, place)?;
    }
    for package in packages {
        layer.package(package)?;
    }
    // What base-passwd's installation script would do.
    for kind in ["passwd", "group"] {
        layer.file(&format!("etc/{kind}"), 0o644, &accounts(packages, kind)?)?;
    }
    layer.directory("home/app", 0o755, 1000)?;
    if !layer.has("usr/bin/sh") {
        layer.symlink("usr/bin/sh", "dash")?;
    }
    layer.finish()
}

/// The base's `/etc/passwd` or `/etc/group`.
fn accounts(packages: &[PathBuf], kind: &str) -> Result<Vec<u8>> {
    let master = format!("usr/share/base-passwd/{kind}.master");
    let mut all = deb::extract(packages, "base-passwd", &master)?;
    let app = if kind == "passwd" {
        APP_PASSWD
    } else {
        APP_GROUP
    };
    all.extend_from_slice(app.as_bytes());
    Ok(all)
}

fn debian_python(packages: &[PathBuf]) -> Result<Vec<u8>> {
    let mut layer = Layer::new();
    for package in packages {
        layer.package(package)?;
    }
    let (folder, name) = HIDDEN
        .rsplit_once('/')
        .context("a hidden file in no folder")?;
    layer.file(&format!("{folder}/.wh.{name}"), 0o644, &[])?;
    layer.finish()
}

/// The paths under which busybox wants to be called.
fn applets(busybox: &[u8]) -> Result<Vec<String>> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("busybox");
    let mut file = File::create(&path)?;
    file.write_all(busybox)?;
    drop(file);
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    let list = host::output(Command::new(&path).arg("--list-full"))?;
    Ok(list
        .lines()
        .filter(|applet| *applet != "bin/busybox")
        .map(str::to_owned)
        .collect())
}

/// The image `name` made of these packages, made now if it is not in the cache.
fn ensure(
    name: &str,
    packages: &[Package],
    make: impl FnOnce(&Path) -> Result<()>,
) -> Result<PathBuf> {
    let source = [
        include_str!("images.rs"),
        include_str!("images/layer.rs"),
        include_str!("images/layout.rs"),
        include_str!("images/workloads.rs"),
    ];
    let mut parts = vec![VERSION.as_bytes()];
    parts.extend(source.iter().map(|text| text.as_bytes()));
    parts.extend(packages.iter().map(|package| package.identity.as_bytes()));
    let target = host::cache_dir()?.join(format!("image-{name}-{}.tar", host::key(&parts)));
    if target.exists() {
        return Ok(target);
    }
    eprintln!(
        "xtask: making the image {name} from {} Debian packages",
        packages.len()
    );
    let folder = target.parent().context("the cache has no folder")?;
    let new = tempfile::NamedTempFile::new_in(folder)?;
    make(new.path())?;
    new.as_file().sync_all()?;
    new.persist(&target)
        .with_context(|| format!("cannot write {}", target.display()))?;
    Ok(target)
}
