//! `vm-run fork` and `freeze`: containers, and templates, that go on where a container is
//! now.
//!
//! ```text
//!   us                         supervisors of the new ones    supervisor of the source
//!   records, directories  -->  workers, networks
//!                         <--  ready
//!   Capture               -------------------------------->   a picture, as descriptors
//!   the picture           -->  child, attached
//! ```
//! So the source is stopped once, whatever their number, and when all else is done.

use super::engine::{Engine, answer};
use super::record::{Layer, Origin, Record, RestartPolicy, Spec, Status};
use super::wire::{self, Answer, Request};
use crate::net::{Membership, Publish};
use crate::templates;
use anyhow::{Result, bail};
use fork::{Host, Template};
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

/// The most children of one call.
const CHILDREN_MAX: usize = 1000;

/// What can be typed.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// How many
    #[arg(short = 'n', long, value_name = "N", default_value = "1")]
    count: usize,
    /// The name of the new container; of several, the beginning of their names [default:
    /// names that are made up]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// The hostname of the new container [default: its id]
    #[arg(long, value_name = "NAME")]
    hostname: Option<String>,
    /// Make a port of it one of the host's: those of its source are the source's
    #[arg(short, long, value_name = "[[ADDRESS:]PORT:]PORT[/udp]")]
    publish: Vec<String>,
    /// Remove it when it ends
    #[arg(long)]
    rm: bool,
    /// Let the connections to the outside stay open that its source has, of which it has
    /// none by itself; they are reset otherwise
    #[arg(long)]
    keep_connections: bool,
    /// The name or id of a container that runs
    container: String,
}

/// Does it, and prints the new containers' ids.
///
/// # Errors
/// One line. Nothing is left of containers that could not be made.
pub fn run(engine: &Engine, args: &Args) -> Result<u8> {
    if !(1..=CHILDREN_MAX).contains(&args.count) {
        bail!("--count is 1 to {CHILDREN_MAX}");
    }
    if args.count > 1 && !args.publish.is_empty() {
        bail!(
            "--publish is for one container: {} cannot have the same port",
            args.count
        );
    }
    let source = engine.find(&args.container)?;
    check_runs(&source)?;
    let mut publish = Vec::new();
    for text in &args.publish {
        publish.extend(Publish::parse(text)?);
    }
    let plans: Vec<_> = (1..=args.count)
        .map(|number| {
            let name = args.name.as_ref().map(|name| match args.count {
                1 => name.clone(),
                _ => format!("{name}-{number}"),
            });
            (name, plan(engine, &source, args, &publish))
        })
        .collect();
    let mut failed = None;
    let mut out = std::io::stdout();
    for made in engine.fork(&source, plans)? {
        match made {
            Ok(record) => writeln!(out, "{}", record.id)?,
            Err(error) => {
                if let Some(before) = failed.replace(error) {
                    eprintln!("vm-run: {}", crate::line(&before));
                }
            }
        }
    }
    failed.map_or(Ok(0), Err)
}

/// What can be typed after `freeze`.
#[derive(Debug, clap::Args)]
pub struct FreezeArgs {
    /// The name of the template
    #[arg(long = "as", value_name = "NAME")]
    name: String,
    /// The name or id of a container that runs
    container: String,
}

/// Makes a template of a container that runs, and runs on: `run --template` goes on where
/// it is now.
///
/// # Errors
/// One line. No template is left then.
pub fn freeze(engine: &Engine, args: &FreezeArgs, root: &Path) -> Result<()> {
    let source = engine.find(&args.container)?;
    check_runs(&source)?;
    if !source.spec.mounts.is_empty() {
        bail!(
            "container {} has volumes (its image may ask for them): it can be forked, and not frozen, for what it has open there is on no disk",
            source.name
        );
    }
    templates::check_free(root, &args.name)?;
    let picture = engine.capture(&source)?;
    let host = Arc::new(Host::open()?);
    let template = Template::unpack(host, picture.into_parcel())?;
    templates::keep(root, &args.name, &template)?;
    writeln!(std::io::stdout(), "{}", args.name)?;
    Ok(())
}

fn check_runs(source: &Record) -> Result<()> {
    let name = &source.name;
    match source.state.status {
        Status::Running | Status::Paused => Ok(()),
        other => bail!(
            "container {name} is {}, and does not run: start it first",
            other.word()
        ),
    }
}

/// What becomes of the source's plan.
fn plan(engine: &Engine, source: &Record, args: &Args, publish: &[Publish]) -> Spec {
    let mut spec = source.spec.clone();
    spec.created = jiff::Timestamp::now();
    spec.origin = Some(Origin {
        id: source.id.clone(),
        name: source.name.clone(),
        template: source.state.template.clone(),
    });
    spec.rootfs = spec.rootfs.map(|_| engine.root_of(source));
    spec.hostname = args.hostname.clone().unwrap_or_default();
    spec.auto_remove = args.rm;
    spec.restart = RestartPolicy::No;
    // Whoever attaches later is one of many.
    spec.stdin_once = false;
    spec.keep_connections = args.keep_connections;
    spec.network.publish = publish.to_vec();
    for Membership { aliases, ipv4, .. } in &mut spec.network.networks {
        aliases.clear();
        *ipv4 = None;
    }
    if source.spec.template.is_some() && spec.writable == Layer::Inside {
        // What ran beside the container is left behind.
        spec.args.clear();
    }
    spec
}

impl Engine {
    /// Forks a container that runs: one new container for each plan.
    ///
    /// # Errors
    /// A name that is taken, or a source that cannot be forked: then nothing is left. A
    /// child that fails by itself is an error in its place, and nothing is left of it.
    pub fn fork(
        &self,
        source: &Record,
        plans: Vec<(Option<String>, Spec)>,
    ) -> Result<Vec<Result<Record>>> {
        let mut children: Vec<(Record, Result<UnixStream>)> = Vec::new();
        let made = self
            .prepare_children(plans, &mut children)
            .and_then(|()| self.capture(source));
        let picture = match made {
            Ok(picture) => picture,
            Err(error) => {
                for (record, supervisor) in children {
                    // It waits for a picture no longer.
                    drop(supervisor);
                    self.discard(&record);
                }
                return Err(error);
            }
        };
        // All of them, before any is waited for.
        let handed: Vec<_> = children
            .into_iter()
            .map(|(record, supervisor)| {
                let handed = supervisor.and_then(|mut supervisor| {
                    picture.send(&mut supervisor)?;
                    Ok(supervisor)
                });
                (record, handed)
            })
            .collect();
        Ok(handed
            .into_iter()
            .map(|(record, handed)| self.await_child(record, handed))
            .collect())
    }

    /// Makes them, and waits until each wants nothing but the picture.
    fn prepare_children(
        &self,
        plans: Vec<(Option<String>, Spec)>,
        children: &mut Vec<(Record, Result<UnixStream>)>,
    ) -> Result<()> {
        for (name, spec) in plans {
            let record = self.create(name, spec)?;
            let supervisor = self.supervise(&record).and_then(|mut supervisor| {
                wire::send(&mut supervisor, &Request::StartFork)?;
                Ok(supervisor)
            });
            children.push((record, supervisor));
        }
        for (_, supervisor) in children.iter_mut() {
            let ready = match supervisor {
                Ok(supervisor) => answer(supervisor),
                Err(_) => continue,
            };
            match ready {
                Ok(Answer::Done) => {}
                Ok(other) => bail!("a supervisor speaks out of turn: {other:?}"),
                Err(error) => *supervisor = Err(error),
            }
        }
        // Rather than stop the source for nothing.
        match children
            .iter_mut()
            .all(|(_, supervisor)| supervisor.is_err())
        {
            true => match children.pop() {
                Some((record, Err(error))) => {
                    self.discard(&record);
                    Err(error)
                }
                _ => Ok(()),
            },
            false => Ok(()),
        }
    }

    /// A picture of a container that runs.
    ///
    /// # Errors
    /// One that cannot be forked.
    pub fn capture(&self, source: &Record) -> Result<wire::Picture> {
        match self.ask(source, &Request::Capture)? {
            (Answer::Captured(label), mut stream) => wire::Picture::receive(label, &mut stream),
            (other, _) => bail!("the supervisor speaks out of turn: {other:?}"),
        }
    }

    fn await_child(&self, record: Record, supervisor: Result<UnixStream>) -> Result<Record> {
        let begun = supervisor.and_then(|mut supervisor| match answer(&mut supervisor)? {
            Answer::Started { .. } => Ok(()),
            other => bail!("a supervisor speaks out of turn: {other:?}"),
        });
        match begun {
            Ok(()) => Ok(record),
            Err(error) => {
                self.discard(&record);
                Err(error)
            }
        }
    }

    /// Removes a container that never began.
    fn discard(&self, record: &Record) {
        if let Err(error) = self.remove(record, true) {
            log::warn!("{error:#}");
        }
    }
}
