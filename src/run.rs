//! `vm-run run`: what was typed, the checked plan, one fork.

mod warm;

use crate::args::size;
use crate::image::{self, ImageConfig, Store};
use crate::stdio::{self, Stdio};
use crate::templates::{self, MachineArgs};
use crate::workers::{self, JailArgs};
use crate::{disk, guest, signals};
use anyhow::{Context, Result, bail};
use fork::{
    CONTAINER, ContainerSpec, Disks, Error, ForkSpec, Host, Moment, Place, Pool, ProcessSpec,
    StartFailure, Stream, Template, Writable,
};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What can be typed after `run`.
#[derive(Debug, clap::Args)]
pub struct RunArgs {
    /// Keep standard input open, and give it to the container
    #[arg(short, long)]
    interactive: bool,
    /// Give the container a terminal
    #[arg(short, long)]
    tty: bool,
    /// Remove the container when it ends (always so, as yet)
    #[arg(long)]
    rm: bool,
    /// Set an environment variable; NAME alone takes the caller's value
    #[arg(short, long, value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// The working directory
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<String>,
    /// USER[:GROUP], names or numbers
    #[arg(short, long)]
    user: Option<String>,
    /// Run this instead of the image's entrypoint
    #[arg(long, value_name = "PROGRAM")]
    entrypoint: Option<String>,
    /// The hostname [default: the container's id]
    #[arg(long, value_name = "NAME")]
    hostname: Option<String>,
    /// Make the root file system read-only
    #[arg(long)]
    read_only: bool,
    /// Keep the writable layer in guest memory, at most so much, and not on disk
    #[arg(long, value_name = "SIZE", value_parser = size)]
    writable_memory: Option<u64>,
    /// Fork this template and not the default one. If a container is inside, it
    /// goes on; no IMAGE is given, and a command after -- runs beside it
    #[arg(long, value_name = "NAME")]
    template: Option<String>,
    #[command(flatten)]
    machine: MachineArgs,
    /// The trust domain: children share their template's memory only with others
    /// of the same
    #[arg(long, value_name = "NAME", default_value = fork::DEFAULT_DOMAIN)]
    domain: String,
    #[command(flatten)]
    jail: JailArgs,
    /// A directory or a file-system image (erofs, ext4) in the place of IMAGE
    #[arg(long, value_name = "PATH")]
    rootfs: Option<PathBuf>,
    /// Write how long each stage took to this file, as JSON
    #[arg(long, value_name = "FILE")]
    stages: Option<PathBuf>,
    /// IMAGE [COMMAND [ARG...]], or with --rootfs only the command
    #[arg(
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "IMAGE [COMMAND...]"
    )]
    words: Vec<String>,
}

/// Runs the container; returns its exit status.
///
/// # Errors
/// One line; [`exit_code`] tells which status it stands for.
pub fn run(args: &RunArgs, root: &Path) -> Result<u8> {
    let asked = Moment::now();
    // First: the worker comes up while the rest is found.
    let workers = workers::start(args.jail)?;
    workers.spawn_ahead()?;
    let host = Arc::new(Host::open()?);
    let named = match &args.template {
        Some(name) => Some(templates::open(root, Arc::clone(&host), name)?),
        None => None,
    };
    let inside = named.as_ref().and_then(Template::warm);
    let plan = match inside {
        Some(inside) => warm::plan(args, inside, std::env::args_os())?,
        None => plan(args, root)?,
    };
    let template = match named {
        Some(template) => template,
        None => templates::default_for(root, host, &args.machine, &args.domain)?,
    };
    let signals = signals::Catcher::new()?;
    let stdio = Stdio::new(args.tty, args.interactive)?;
    let pool = Pool::new(Arc::new(template), Place::Workers(workers), 0)?;
    let mut child = pool.fork(ForkSpec {
        hostname: plan.hostname,
        disks: plan.disks,
        domain: args.domain.clone(),
        ..ForkSpec::default()
    })?;
    let process = match plan.work {
        Work::Start(container, process) => child.start(container, process)?,
        Work::GoOn(streams) => child.attach(&streams)?,
        Work::Beside(streams, process) => {
            stdio::discard(child.attach(&streams)?)?;
            child.exec(process)?
        }
    };
    let id = process.remote.process();
    signals.forward_to(process.remote.clone())?;
    let streams = stdio.connect(process)?;
    let status = match id {
        CONTAINER => child.wait()?,
        beside => child.wait_for(beside)?,
    };
    let first_output = streams.finish()?;
    let stages = child.stages();
    drop(child);
    if let Some(path) = &args.stages {
        let json = crate::bench::stages_json(asked, &stages, first_output, Moment::now());
        std::fs::write(path, json.to_string())
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(status.code())
}

/// The status that docker gives for a failure, if it has one of its own.
pub fn exit_code(error: &anyhow::Error) -> Option<u8> {
    match error.downcast_ref::<Error>()? {
        Error::Start { reason, .. } => match reason {
            StartFailure::NotFound => Some(127),
            StartFailure::NotExecutable => Some(126),
            StartFailure::Other => None,
        },
        _ => None,
    }
}

/// What is to be done, checked as far as it can be before the fork.
struct Plan {
    hostname: String,
    disks: Disks,
    work: Work,
}

/// What happens in the child.
enum Work {
    /// A container is started.
    Start(ContainerSpec, ProcessSpec),
    /// The container inside goes on, with these streams.
    GoOn(Vec<Stream>),
    /// A process is started beside the container inside, of which nobody sees these
    /// streams.
    Beside(Vec<Stream>, ProcessSpec),
}

/// The plan for a child of a bare template.
fn plan(args: &RunArgs, root: &Path) -> Result<Plan> {
    let store = Store::open(root)?;
    let (rootfs, config, command) = match &args.rootfs {
        Some(path) if path.is_dir() => {
            let image = image::rootfs_from_dir(&store, path)?;
            (image, ImageConfig::default(), &args.words[..])
        }
        Some(path) => (path.clone(), ImageConfig::default(), &args.words[..]),
        None => {
            let (name, command) = args
                .words
                .split_first()
                .context("no IMAGE: name one, or give --rootfs PATH")?;
            let image = store.resolve(name)?;
            log::info!("{name} is {}", image.id);
            (image.rootfs, image.config, command)
        }
    };
    let argv = command_line(args, &config, command);
    if argv.is_empty() {
        bail!("no command: the image names none, so give one");
    }
    let writable = match (args.read_only, args.writable_memory) {
        (true, Some(_)) => bail!("--read-only and --writable-memory exclude each other"),
        (true, None) => Writable::Nothing,
        (false, Some(limit)) => Writable::Memory { limit },
        (false, None) => Writable::Disk,
    };
    let mut env = terminal_env(args, config.env);
    for word in &args.env {
        set_env(&mut env, word);
    }
    let cwd = args.workdir.clone().unwrap_or(config.working_dir);
    let process = ProcessSpec {
        args: argv,
        env,
        cwd: if cwd.is_empty() { "/".into() } else { cwd },
        user: args.user.clone().unwrap_or(config.user),
        streams: streams(args),
        window: crate::terminal::window_size(),
    };
    Ok(Plan {
        hostname: hostname(args)?,
        disks: Disks {
            root: Some(
                File::open(&rootfs).with_context(|| format!("cannot open {}", rootfs.display()))?,
            ),
            writable: match writable {
                Writable::Disk => {
                    let empty = guest::find(&guest::GuestArgs::default())?.writable;
                    Some(disk::new_disk(&empty, root)?)
                }
                _ => None,
            },
        },
        work: Work::Start(
            ContainerSpec {
                writable,
                warm: false,
            },
            process,
        ),
    })
}

fn hostname(args: &RunArgs) -> Result<String> {
    match &args.hostname {
        Some(name) => Ok(name.clone()),
        None => random_id(),
    }
}

/// The streams of a process that is started.
fn streams(args: &RunArgs) -> Vec<Stream> {
    match (args.tty, args.interactive) {
        (true, _) => vec![Stream::Terminal],
        (false, true) => vec![Stream::Stdin, Stream::Stdout, Stream::Stderr],
        (false, false) => vec![Stream::Stdout, Stream::Stderr],
    }
}

/// As docker has it: a process on a terminal has a TERM.
fn terminal_env(args: &RunArgs, mut env: Vec<String>) -> Vec<String> {
    if args.tty && !env.iter().any(|e| e.starts_with("TERM=")) {
        env.push("TERM=xterm".into());
    }
    env
}

/// Entrypoint and command as docker puts them together: a new entrypoint drops
/// the image's command, a command replaces it.
fn command_line(args: &RunArgs, config: &ImageConfig, command: &[String]) -> Vec<String> {
    let (mut line, default) = match &args.entrypoint {
        Some(program) if program.is_empty() => (Vec::new(), &[][..]),
        Some(program) => (vec![program.clone()], &[][..]),
        None => (config.entrypoint.clone(), &config.cmd[..]),
    };
    line.extend_from_slice(if command.is_empty() { default } else { command });
    line
}

fn set_env(env: &mut Vec<String>, word: &str) {
    let (name, value) = match word.split_once('=') {
        Some((name, value)) => (name, Some(value.to_owned())),
        None => (word, std::env::var(word).ok()),
    };
    env.retain(|e| e.split_once('=').map_or(e.as_str(), |(n, _)| n) != name);
    if let Some(value) = value {
        env.push(format!("{name}={value}"));
    }
}

/// Twelve hexadecimal digits, as docker shows.
fn random_id() -> Result<String> {
    let mut bytes = [0_u8; 6];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
        .context("getrandom")?;
    Ok(bytes.iter().map(|b| format!("{b:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        run: RunArgs,
    }

    fn line(words: &[&str], command: &[&str]) -> Vec<String> {
        let args = Line::parse_from([&["run"], words].concat()).run;
        let config = ImageConfig {
            entrypoint: vec!["/entry".into()],
            cmd: vec!["default".into()],
            ..ImageConfig::default()
        };
        let command: Vec<String> = command.iter().map(|w| (*w).into()).collect();
        command_line(&args, &config, &command)
    }

    #[test]
    fn entrypoint_and_command_combine_as_in_docker() {
        assert_eq!(line(&["i"], &[]), ["/entry", "default"]);
        assert_eq!(line(&["i"], &["a", "b"]), ["/entry", "a", "b"]);
        assert_eq!(line(&["--entrypoint", "sh", "i"], &[]), ["sh"]);
        assert_eq!(line(&["--entrypoint", "sh", "i"], &["-c"]), ["sh", "-c"]);
        assert_eq!(line(&["--entrypoint", "", "i"], &["ls"]), ["ls"]);
    }

    #[test]
    fn options_after_the_image_are_the_containers() {
        let args = Line::parse_from(["run", "-i", "img", "sh", "-c", "--help", "-i"]).run;
        assert!(args.interactive);
        assert_eq!(args.words, ["img", "sh", "-c", "--help", "-i"]);
    }

    #[test]
    fn a_variable_is_set_once() {
        let mut env = vec!["A=1".to_owned(), "B=2".to_owned()];
        set_env(&mut env, "A=3");
        set_env(&mut env, "NO_SUCH_VARIABLE_HERE");
        assert_eq!(env, ["B=2", "A=3"]);
    }
}
