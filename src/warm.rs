//! `vm-run template build --warm`: a container is started in a child of a bare
//! template, and frozen when it says that it is warm. docs/warm.md tells how.

mod hooks;

use crate::args::size;
use crate::container::{Options, new_id};
use crate::image::{Access, ImageConfig, PullPolicy, Store, obtain};
use crate::net::{self, Attachment, Who};
use crate::stdio::{self, Copies};
use crate::templates::{self, MachineArgs};
use crate::workers::{self, JailArgs};
use anyhow::Result;
use fork::{
    Child, ContainerOptions, ContainerSpec, Disks, Error, ForkSpec, Host, Place, Pool, ProcessSpec,
    StartFailure, Stream, Template, Writable,
};
use hooks::HookArgs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// The container inside a template.
#[derive(Debug, clap::Args)]
pub struct WarmArgs {
    /// Put a container of this image into the template
    #[arg(long, value_name = "IMAGE", requires = "warm")]
    pub image: Option<String>,
    /// What runs in it until it says that it is warm: a line for /bin/sh -c, or a
    /// JSON array of words; the image's entrypoint is left out
    #[arg(long, value_name = "CMD", requires = "image",
        conflicts_with_all = ["kernel", "agent", "cmdline"])]
    pub warm: Option<String>,
    /// How long it may take to be warm, in seconds
    #[arg(long, value_name = "SECONDS", default_value = "60", requires = "warm")]
    warm_timeout: u64,
    /// The most that its writable layer takes of the guest's memory, where it is
    /// kept [default: half]
    #[arg(long, value_name = "SIZE", value_parser = size, requires = "warm")]
    writable_memory: Option<u64>,
    /// The network of the container while it warms, without which its children have none:
    /// bridge, one of one's own, or none [default: bridge, and none without root]
    #[arg(long, value_name = "NETWORK", requires = "warm")]
    network: Option<String>,
    #[command(flatten)]
    hooks: HookArgs,
    #[command(flatten)]
    jail: JailArgs,
}

/// Makes the template of `image` with `line` running inside. Nothing is saved yet.
///
/// # Errors
/// An image or a command that is not there, or a container that does not become
/// warm: it ended, or took too long. Nothing is left then.
pub fn build(
    args: &WarmArgs,
    (image, line): (&str, &str),
    machine: &MachineArgs,
    domain: &str,
    root: &Path,
) -> Result<Template> {
    let workers = workers::start_aloud(args.jail)?;
    let store = Store::open(root)?;
    let found = obtain(&store, image, PullPolicy::Missing, &Access::default())?;
    let rootfs = found.open_rootfs()?;
    let host = Arc::new(Host::open()?);
    let bare = templates::default_for(root, host, machine, domain)?;
    let pool = Pool::new(Arc::new(bare), Place::Workers(workers), 0)?;
    let network = connect(args.network.as_deref(), root)?;
    let mut child = pool.fork(ForkSpec {
        hostname: "warm".into(),
        disks: Disks {
            root: Some(rootfs),
            writable: None,
        },
        domain: domain.into(),
        network: network.as_ref().map(Attachment::tap).transpose()?,
        ..ForkSpec::default()
    })?;
    let container = ContainerSpec {
        writable: Writable::Memory {
            limit: args.writable_memory.unwrap_or(machine.memory / 2),
        },
        warm: true,
        options: match &network {
            Some(network) => Options::default().container(machine.cpus, &network.naming(&[])),
            None => ContainerOptions::default(),
        },
        hooks: hooks::chosen(&args.hooks, &found.config.labels)?,
        ..ContainerSpec::default()
    };
    let mut process = match child.start(container, process(&found.config, line)) {
        Err(Error::Start { reason, .. }) if is_line(line) && reason == StartFailure::NotFound => {
            return Err(no_shell(image, reason));
        }
        started => started?,
    };
    // It stays open: the program is to see no end of its input while it warms.
    let _stdin = process.stdin.take();
    let output = stdio::to_stderr(process)?;
    freeze(child, Duration::from_secs(args.warm_timeout), image, output)
}

/// Puts the container on a network until it is frozen.
fn connect(wanted: Option<&str>, root: &Path) -> Result<Option<Attachment>> {
    let network = match wanted {
        Some("none") => return Ok(None),
        Some(name) => name,
        None if rustix::process::geteuid().is_root() => net::DEFAULT,
        None => return Ok(None),
    };
    let plan = net::Plan::of(network);
    let who = Who {
        root,
        id: &new_id()?,
        name: "warm",
        dns: &[],
    };
    Attachment::new(&who, &plan).map(Some)
}

/// Waits until the container is warm, and freezes it. What it says until then comes
/// before what is said of it.
fn freeze(mut child: Child, timeout: Duration, image: &str, output: Copies) -> Result<Template> {
    let frozen = match child.await_warm(timeout) {
        Ok(()) => child.freeze(image),
        Err(error) => {
            // Its streams end with it.
            child.end();
            Err(error)
        }
    };
    output.finish()?;
    Ok(frozen?)
}

/// What runs in the container: as the image has it, but for the command.
fn process(config: &ImageConfig, line: &str) -> ProcessSpec {
    ProcessSpec {
        args: words(line),
        env: config.env.clone(),
        cwd: match config.working_dir.as_str() {
            "" => "/".into(),
            dir => dir.into(),
        },
        user: config.user.clone(),
        streams: vec![Stream::Stdin, Stream::Stdout, Stream::Stderr],
        ..ProcessSpec::default()
    }
}

/// Docker's two forms of a command (Dockerfile reference, "Shell and exec form"):
/// a JSON array of words, or a line for the shell.
fn words(line: &str) -> Vec<String> {
    match serde_json::from_str::<Vec<String>>(line) {
        Ok(words) if !words.is_empty() => words,
        _ => ["/bin/sh", "-c", line].map(String::from).into(),
    }
}

fn is_line(line: &str) -> bool {
    words(line).last().is_some_and(|last| last == line)
}

fn no_shell(image: &str, reason: StartFailure) -> anyhow::Error {
    let message = format!(
        "{image} has no /bin/sh to run the command with: give --warm a JSON array, as in '[\"/app\", \"--serve\"]'"
    );
    Error::Start { reason, message }.into()
}

#[cfg(test)]
mod tests {
    use super::words;

    #[test]
    fn a_command_is_a_line_or_an_array_as_in_docker() {
        let shell = |line: &str| vec!["/bin/sh".to_owned(), "-c".to_owned(), line.to_owned()];
        assert_eq!(words("python3 -i"), shell("python3 -i"));
        assert_eq!(words(r#"["a", "b c"]"#), ["a", "b c"]);
        // As docker has it: what is no array of words is a line.
        for line in ["[]", "['a']", "[1]", "[ -f /x ] && /x"] {
            assert_eq!(words(line), shell(line));
        }
    }
}
