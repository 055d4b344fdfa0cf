//! `vm-run template ...`, and the default template of `run`.

mod artifact;
mod export;
mod import;
mod pieces;

use crate::args::size;
use crate::guest::{self, GuestArgs};
use crate::image::archive::{Archive, Input};
use crate::image::layer::Scratch;
use crate::image::limits::Limits;
use crate::output;
use crate::progress::{Bar, Progress};
use crate::warm::{self, WarmArgs};
use anyhow::{Context, Result, bail};
use clap::Subcommand;
use fork::{BootSpec, Host, Manifest, Template};
use rustix::fs::{FlockOperation, flock};
use std::fs::{self, File};
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Memory of a guest, in bytes, if nothing is said.
pub const MEMORY: &str = "256m";
/// Its vCPUs.
pub const CPUS: &str = "1";
/// Seconds that a boot may take.
pub const BOOT_TIMEOUT: &str = "10";

/// What can be done with templates.
#[derive(Debug, Subcommand)]
pub enum TemplateCommand {
    /// Boot a parent and freeze it: bare, or with a warm container inside
    Build {
        /// The template's name [default: the one that `run` looks for; with
        /// --image, the image's]
        #[arg(long)]
        name: Option<String>,
        #[command(flatten)]
        machine: MachineArgs,
        #[command(flatten)]
        guest: GuestArgs,
        /// More words for the kernel's command line
        #[arg(long, value_name = "WORDS", default_value = "")]
        cmdline: String,
        /// The trust domain whose children share the template's memory
        #[arg(long, value_name = "NAME", default_value = fork::DEFAULT_DOMAIN)]
        domain: String,
        #[command(flatten)]
        warm: Box<WarmArgs>,
    },
    /// List templates
    Ls {
        /// Print a JSON array
        #[arg(long)]
        json: bool,
    },
    /// Print a template's manifest
    Inspect {
        /// Its name
        name: String,
        /// Read all of it, and check it
        #[arg(long)]
        verify: bool,
    },
    /// Write a template into an archive, to standard output if it is no terminal
    Export {
        /// Its name
        name: String,
        /// The file to write: a tar of an OCI image layout
        #[arg(short, long, value_name = "FILE")]
        output: Option<PathBuf>,
    },
    /// Take a template from an archive that export has written
    Import {
        /// The archive, or the directory of an OCI image layout; `-` or nothing for
        /// standard input
        #[arg(short, long, value_name = "FILE")]
        input: Option<PathBuf>,
        /// The template's name [default: the one that it was exported by]
        #[arg(long)]
        name: Option<String>,
    },
    /// Remove templates
    Rm {
        /// Their names
        #[arg(required = true)]
        names: Vec<String>,
    },
}

/// The size of a machine.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct MachineArgs {
    /// Guest memory: a number and k, m or g; a multiple of 2 MiB
    #[arg(short, long, value_parser = size, default_value = MEMORY)]
    pub memory: u64,
    /// How many vCPUs
    #[arg(long, default_value = CPUS)]
    pub cpus: u8,
    /// How long the guest may take to boot, in seconds
    #[arg(long, value_name = "SECONDS", default_value = BOOT_TIMEOUT)]
    pub boot_timeout: u64,
}

/// Does it.
///
/// # Errors
/// One line.
pub fn cli(command: TemplateCommand, root: &Path) -> Result<()> {
    let shelf = Shelf::open(root)?;
    let mut out = std::io::stdout().lock();
    match command {
        TemplateCommand::Build {
            name,
            machine,
            guest,
            cmdline,
            domain,
            warm,
        } => {
            let inside = warm.image.as_deref().zip(warm.warm.as_deref());
            let name = match (name, inside) {
                (Some(name), _) => name,
                (None, Some((image, _))) => name_of_image(image),
                (None, None) => default_name(&machine, &domain)?,
            };
            check_name("trust domain", &domain)?;
            let dir = shelf.free(&name)?;
            match inside {
                Some(inside) => {
                    let template = warm::build(&warm, inside, &machine, &domain, root)?;
                    let _lock = shelf.lock()?;
                    // Somebody else may have taken the name meanwhile.
                    save(&template, &shelf.free(&name)?)?;
                }
                None => {
                    let _lock = shelf.lock()?;
                    let spec = boot_spec(&machine, &guest, &cmdline, &domain)?;
                    save(&boot(&spec, Arc::new(Host::open()?))?, &dir)?;
                }
            }
            writeln!(out, "{name}")?;
        }
        TemplateCommand::Ls { json } => list(&shelf, json, &mut out)?,
        TemplateCommand::Inspect { name, verify } => {
            let dir = shelf.existing(&name)?;
            let manifest = Manifest::read(&dir)?;
            if verify {
                manifest.verify(&dir)?;
            }
            writeln!(out, "{}", serde_json::to_string_pretty(&manifest)?)?;
        }
        TemplateCommand::Export { name, output } => {
            let dir = shelf.existing(&name)?;
            let bar = Bar::default();
            output::write_archive(output.as_deref(), |out| {
                export::export(&name, &dir, out, &shelf.0, &bar)
            })
            .with_context(|| format!("cannot export {name}"))?;
        }
        TemplateCommand::Import { input, name } => {
            let input = input.filter(|path| path != Path::new("-"));
            let shown = input.as_deref().unwrap_or(Path::new("standard input"));
            let name = take_in(&shelf, input.as_deref(), name)
                .with_context(|| format!("cannot import {}", shown.display()))?;
            writeln!(out, "{name}")?;
        }
        TemplateCommand::Rm { names } => {
            let _lock = shelf.lock()?;
            for name in names {
                remove(&shelf.existing(&name)?)?;
                writeln!(out, "{name}")?;
            }
        }
    }
    Ok(())
}

/// Where the templates are.
struct Shelf(PathBuf);

impl Shelf {
    fn open(root: &Path) -> Result<Self> {
        let dir = root.join("templates");
        fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        Ok(Self(dir))
    }

    /// A template's directory. Names become paths, so they are checked here.
    fn dir(&self, name: &str) -> Result<PathBuf> {
        check_name("template name", name)?;
        Ok(self.0.join(name))
    }

    /// The directory of a template that is not there yet.
    fn free(&self, name: &str) -> Result<PathBuf> {
        let dir = self.dir(name)?;
        if dir.exists() {
            bail!("there is a template {name} already: remove it first, or choose another name");
        }
        Ok(dir)
    }

    fn existing(&self, name: &str) -> Result<PathBuf> {
        let dir = self.dir(name)?;
        if !dir.is_dir() {
            bail!("no template {name}: build it with vm-run template build --name {name}");
        }
        Ok(dir)
    }

    /// One builder at a time: the second finds what the first has built.
    fn lock(&self) -> Result<File> {
        let path = self.0.join(".lock");
        let file =
            File::create(&path).with_context(|| format!("cannot open {}", path.display()))?;
        flock(&file, FlockOperation::LockExclusive)
            .with_context(|| format!("cannot lock {}", path.display()))?;
        self.sweep();
        Ok(file)
    }

    /// Removes what a killed vm-run has left half-made or half-removed; the lock
    /// is held, so nobody is still at it.
    fn sweep(&self) {
        let left = fs::read_dir(&self.0).into_iter().flatten().flatten();
        for entry in left {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if (name.starts_with(".new-") || name.starts_with(".old-"))
                && let Err(error) = fs::remove_dir_all(entry.path())
            {
                log::warn!("cannot remove {}: {error}", entry.path().display());
            }
        }
    }
}

fn is_legal(c: char) -> bool {
    c.is_ascii_alphanumeric() || "_.-".contains(c)
}

fn check_name(what: &str, name: &str) -> Result<()> {
    let first = |c: char| c.is_ascii_alphanumeric();
    if name.len() > 128 || !name.starts_with(first) || !name.chars().all(is_legal) {
        bail!("{name:?} is no {what}: letters, digits, _ . -, and a letter or digit first");
    }
    Ok(())
}

/// The name of a default template; those of another domain are others.
///
/// # Errors
/// A domain that cannot be part of a name.
pub fn default_name(machine: &MachineArgs, domain: &str) -> Result<String> {
    check_name("trust domain", domain)?;
    let name = format!("default-{}m-{}c", machine.memory >> 20, machine.cpus);
    Ok(match domain {
        fork::DEFAULT_DOMAIN => name,
        other => format!("{other}.{name}"),
    })
}

/// Whether [`default_name`] could give this name.
fn is_default(name: &str) -> bool {
    name.split('.')
        .next_back()
        .is_some_and(|last| last.starts_with("default-"))
}

/// What is legal in an image's name and not in a template's becomes a `-`.
fn name_of_image(image: &str) -> String {
    let legal = |c| if is_legal(c) { c } else { '-' };
    image.chars().map(legal).collect()
}

/// The template with this name.
///
/// # Errors
/// No such template, or a spoilt one.
pub fn open(root: &Path, host: Arc<Host>, name: &str) -> Result<Template> {
    let dir = Shelf::open(root)?.existing(name)?;
    Ok(Template::open(host, &dir)?)
}

/// Keeps a template under a name that is free.
///
/// # Errors
/// A name that is taken or none, or what the file system says. Nothing is left then.
pub fn keep(root: &Path, name: &str, template: &Template) -> Result<()> {
    let shelf = Shelf::open(root)?;
    let _lock = shelf.lock()?;
    save(template, &shelf.free(name)?)
}

/// Whether a template could be kept under this name.
///
/// # Errors
/// As [`keep`].
pub fn check_free(root: &Path, name: &str) -> Result<()> {
    Shelf::open(root)?.free(name).map(drop)
}

/// What the template with this name is.
///
/// # Errors
/// As [`open`].
pub fn manifest(root: &Path, name: &str) -> Result<Manifest> {
    let dir = Shelf::open(root)?.existing(name)?;
    Ok(Manifest::read(&dir)?)
}

/// The default template of a domain for such a machine. It is built if it is
/// missing, was made elsewhere, or from another guest.
///
/// # Errors
/// A guest that does not boot.
pub fn default_for(
    root: &Path,
    host: Arc<Host>,
    machine: &MachineArgs,
    domain: &str,
) -> Result<Template> {
    let shelf = Shelf::open(root)?;
    let dir = shelf.dir(&default_name(machine, domain)?)?;
    if let Some(template) = usable(&dir, &host) {
        return Ok(template);
    }
    let _lock = shelf.lock()?;
    // Somebody else may have built it while we waited.
    if let Some(template) = usable(&dir, &host) {
        return Ok(template);
    }
    if dir.exists() {
        remove(&dir)?;
    }
    let spec = boot_spec(machine, &GuestArgs::default(), "", domain)?;
    save(&boot(&spec, Arc::clone(&host))?, &dir)?;
    // From disk, as the next run will: all children share the page cache.
    Ok(Template::open(host, &dir)?)
}

/// Builds the default template, unless it is there.
///
/// # Errors
/// As [`default_for`].
pub fn ensure_default(root: &Path, machine: &MachineArgs, domain: &str) -> Result<()> {
    default_for(root, Arc::new(Host::open()?), machine, domain).map(drop)
}

/// Opens a default template if it is there and is of today's guest.
fn usable(dir: &Path, host: &Arc<Host>) -> Option<Template> {
    if !dir.exists() {
        return None;
    }
    let opened = Template::open(Arc::clone(host), dir);
    let template = match opened {
        Ok(template) => template,
        Err(error) => {
            eprintln!("vm-run: {error}: rebuilding it");
            return None;
        }
    };
    // Without a guest to rebuild from, an old template is better than none.
    let stale = guest::find(&GuestArgs::default())
        .ok()
        .and_then(|found| found.digest().ok())
        .is_some_and(|digest| digest != template.guest_digest());
    if stale {
        eprintln!(
            "vm-run: the guest has changed since {} was built: rebuilding it",
            dir.display()
        );
        return None;
    }
    Some(template)
}

fn boot_spec(
    machine: &MachineArgs,
    chosen: &GuestArgs,
    cmdline: &str,
    domain: &str,
) -> Result<BootSpec> {
    Ok(BootSpec {
        memory: machine.memory,
        vcpus: machine.cpus,
        guest: Some(guest::find(chosen)?.guest),
        cmdline: cmdline.into(),
        timeout: Duration::from_secs(machine.boot_timeout),
        domain: domain.into(),
        ..BootSpec::default()
    })
}

fn boot(spec: &BootSpec, host: Arc<Host>) -> Result<Template> {
    let progress = Bar::default();
    progress.begin("booting the template", None);
    let template = Template::boot(host, spec)?;
    progress.end();
    Ok(template)
}

fn save(template: &Template, dir: &Path) -> Result<()> {
    let progress = Bar::default();
    progress.begin("writing the template", None);
    template.save(dir)?;
    progress.end();
    Ok(())
}

/// Takes a template in from an archive, and returns its name.
fn take_in(shelf: &Shelf, input: Option<&Path>, name: Option<String>) -> Result<String> {
    let bar = Bar::default();
    let limits = Limits::default();
    let scratch = Scratch {
        directory: &shelf.0,
        limits: &limits,
        progress: &bar,
    };
    let archive = match input {
        Some(path) => Archive::open(Input::Path(path), &scratch)?,
        None => {
            let mut stdin = std::io::stdin().lock();
            if stdin.is_terminal() {
                bail!("nothing to import: give -i FILE, or an archive on standard input");
            }
            Archive::open(Input::Reader(&mut stdin), &scratch)?
        }
    };
    let found = import::find(&archive, &limits)?;
    check_name("trust domain", &found.manifest.domain)?;
    let name = match (name, &found.name) {
        (Some(name), _) => name,
        (None, None) => bail!("the archive does not name it: give it a name with --name"),
        (None, Some(name)) if is_default(name) => bail!(
            "{name:?} is the name of a template that run takes by itself: choose one with --name"
        ),
        (None, Some(name)) => name.clone(),
    };
    let _lock = shelf.lock()?;
    let dir = shelf.free(&name)?;
    let beside = tempfile::Builder::new()
        .prefix(".new-")
        .tempdir_in(&shelf.0)
        .with_context(|| format!("cannot write to {}", shelf.0.display()))?;
    import::unpack(&archive, &found, beside.path(), &bar)?;
    fork::rename_into_place(beside, &dir)?;
    drop(bar);
    match Host::open() {
        Ok(host) => {
            if let Err(error) = found.manifest.check_cpu(&dir, &host.cpu()) {
                eprintln!("vm-run: this host cannot run it: {error}");
            }
        }
        Err(error) => eprintln!("vm-run: it cannot be told whether this host can run it: {error}"),
    }
    Ok(name)
}

fn list(shelf: &Shelf, json: bool, out: &mut impl Write) -> Result<()> {
    let mut names: Vec<String> = fs::read_dir(&shelf.0)?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| !name.starts_with('.'))
        .collect();
    names.sort();
    let mut rows = Vec::new();
    for name in names {
        match Manifest::read(&shelf.0.join(&name)) {
            Ok(manifest) => rows.push((name, manifest)),
            Err(error) => eprintln!("vm-run: {error}"),
        }
    }
    if json {
        let all: Vec<_> = rows
            .iter()
            .map(|(name, m)| {
                serde_json::json!({
                    "name": name, "kind": m.kind, "memory": m.memory_bytes,
                    "vcpus": m.vcpus, "created": m.created, "domain": m.domain,
                    "image": m.warm.as_ref().map(|w| &w.image),
                    "command": m.warm.as_ref().map(|w| &w.command),
                })
            })
            .collect();
        writeln!(out, "{}", serde_json::to_string_pretty(&all)?)?;
        return Ok(());
    }
    writeln!(
        out,
        "{:<32} {:<6} {:>10} {:>5}  IMAGE",
        "NAME", "KIND", "MEMORY", "CPUS"
    )?;
    for (name, m) in rows {
        let kind = serde_json::to_value(m.kind)?;
        writeln!(
            out,
            "{name:<32} {:<6} {:>6} MiB {:>5}  {}",
            kind.as_str().unwrap_or_default(),
            m.memory_bytes >> 20,
            m.vcpus,
            m.warm.as_ref().map_or("-", |warm| &warm.image),
        )?;
    }
    Ok(())
}

/// Removes a template: it is renamed away first, so that nobody opens half of it.
/// Children that run keep its memory.
fn remove(dir: &Path) -> Result<()> {
    let parent = dir.parent().unwrap_or(dir);
    let away = tempfile::Builder::new()
        .prefix(".old-")
        .tempdir_in(parent)
        .with_context(|| format!("cannot write to {}", parent.display()))?;
    fs::rename(dir, away.path().join("t"))
        .with_context(|| format!("cannot remove {}", dir.display()))?;
    away.close()
        .with_context(|| format!("cannot remove all of {}", dir.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_no_other_paths() {
        for bad in ["", "..", ".new-x", "a/b", "-x", "\u{e9}", &"x".repeat(129)] {
            assert!(check_name("template name", bad).is_err(), "{bad}");
        }
        for image in ["busybox", "host:5000/a/b:1.2", "a@sha256:0123"] {
            let name = name_of_image(image);
            check_name("template name", &name).expect(&name);
        }
        assert_eq!(name_of_image("host:5000/a/b:1.2"), "host-5000-a-b-1.2");
    }

    #[test]
    fn each_domain_has_default_templates_of_its_own() {
        let machine = MachineArgs {
            memory: 256 << 20,
            cpus: 1,
            boot_timeout: 1,
        };
        let name = |domain| default_name(&machine, domain);
        assert_eq!(name("default").expect("legal"), "default-256m-1c");
        assert_eq!(name("tenant").expect("legal"), "tenant.default-256m-1c");
        assert!(name("../x").is_err());
        assert!(is_default("default-256m-1c") && is_default("a.b.default-512m-2c"));
        assert!(!is_default("mine") && !is_default("default"));
    }
}
