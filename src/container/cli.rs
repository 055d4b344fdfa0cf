//! The commands on containers that are there: from words to a call, from its result
//! to lines.

use super::client::Terminal;
use super::engine::Engine;
use super::keys::Keys;
use super::record::{Record, Status};
use super::wire::{Answer, Exec, Request, Window};
use super::{copy, fork, inside, logs, parse_signal, show};
use ::fork::{Moment, Stages};
use anyhow::{Result, bail};
use clap::Subcommand;
use std::io::Write;
use std::path::{Path, PathBuf};

/// What can be done with containers.
#[derive(Debug, Subcommand)]
pub enum ContainerCommand {
    /// Start containers that are not running
    Start {
        /// Show their output, and end with the last
        #[arg(short, long)]
        attach: bool,
        /// Give it our standard input; with a single container
        #[arg(short, long)]
        interactive: bool,
        /// The keys that leave it alone [default: ctrl-p,ctrl-q]
        #[arg(long, value_name = "KEYS", value_parser = Keys::parse)]
        detach_keys: Option<Keys>,
        /// Names or ids
        #[arg(required = true, value_name = "CONTAINER")]
        containers: Vec<String>,
    },
    /// End containers: by their stop signal, and by SIGKILL if that does not
    Stop(StopArgs),
    /// Stop containers, and start them again
    Restart(StopArgs),
    /// Send a signal to containers
    Kill {
        /// Which
        #[arg(short, long, default_value = "KILL")]
        signal: String,
        /// Names or ids
        #[arg(required = true, value_name = "CONTAINER")]
        containers: Vec<String>,
    },
    /// Stop the vCPUs of containers
    Pause {
        /// Names or ids
        #[arg(required = true, value_name = "CONTAINER")]
        containers: Vec<String>,
    },
    /// Let paused containers go on
    Unpause {
        /// Names or ids
        #[arg(required = true, value_name = "CONTAINER")]
        containers: Vec<String>,
    },
    /// Wait until containers have ended, and print their statuses
    Wait {
        /// Names or ids
        #[arg(required = true, value_name = "CONTAINER")]
        containers: Vec<String>,
    },
    /// Remove containers, and all that is theirs
    Rm {
        /// End those that run
        #[arg(short, long)]
        force: bool,
        /// Remove their volumes that have no name, too
        #[arg(short, long)]
        volumes: bool,
        /// Names or ids
        #[arg(required = true, value_name = "CONTAINER")]
        containers: Vec<String>,
    },
    /// Remove all containers that are not running
    Prune {
        /// Do not ask
        #[arg(short, long)]
        force: bool,
    },
    /// Give a container another name
    Rename {
        /// Its name or id
        container: String,
        /// The new name
        name: String,
    },
    /// List containers
    Ps {
        /// Those that have ended, too
        #[arg(short, long)]
        all: bool,
        /// Print ids only
        #[arg(short, long)]
        quiet: bool,
        /// Print ids and commands whole
        #[arg(long)]
        no_trunc: bool,
        /// Each below the one that it was forked from
        #[arg(long, conflicts_with_all = ["quiet", "json"])]
        tree: bool,
        /// Print a JSON array
        #[arg(long, conflicts_with = "quiet")]
        json: bool,
    },
    /// Print all that is known of containers, as a JSON array
    Inspect {
        /// Names or ids
        #[arg(required = true, value_name = "CONTAINER")]
        containers: Vec<String>,
    },
    /// Print what a container has said
    Logs(logs::Args),
    /// Print which ports of the host are a container's
    Port {
        /// Its name or id
        container: String,
        /// Only this port of the container
        #[arg(value_name = "PORT[/PROTOCOL]")]
        port: Option<String>,
    },
    /// Fork a container that runs: new ones go on where it is
    Fork(fork::Args),
    /// Make a template of a container that runs, which runs on
    Freeze(fork::FreezeArgs),
    /// Bring a container that runs back to where it was when a template was made of it
    Rewind {
        /// Its name or id
        container: String,
        /// The template, made of it by freeze
        template: String,
    },
    /// Run one more command in a container
    Exec(ExecArgs),
    /// Show a running container's output, and give it our input
    Attach {
        /// Give it none
        #[arg(long)]
        no_stdin: bool,
        /// The keys that leave it alone [default: ctrl-p,ctrl-q]
        #[arg(long, value_name = "KEYS", value_parser = Keys::parse)]
        detach_keys: Option<Keys>,
        /// Its name or id
        container: String,
    },
    /// Copy files between a container, running or not, and here
    Cp(copy::CopyArgs),
    /// Print what a container has changed of its image: C changed, A added, D deleted
    Diff {
        /// Its name or id
        container: String,
    },
    /// Print what runs in a container
    Top {
        /// Its name or id
        container: String,
        /// Options of ps; taken, and of no effect
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
        options: Vec<String>,
    },
    /// Write all files of a container as a tar
    Export {
        /// Where to, instead of standard output
        #[arg(short, long, value_name = "FILE")]
        output: Option<PathBuf>,
        /// Its name or id
        container: String,
    },
    /// Print what running containers cost
    Stats {
        /// Print a JSON array
        #[arg(long)]
        json: bool,
        /// Names or ids [default: all that run]
        containers: Vec<String>,
    },
}

/// How containers are ended.
#[derive(Debug, clap::Args)]
pub struct StopArgs {
    /// The signal [default: the container's own]
    #[arg(short, long)]
    signal: Option<String>,
    /// How long to wait before SIGKILL, in seconds [default: the container's own]
    #[arg(
        short,
        long = "timeout",
        visible_alias = "time",
        value_name = "SECONDS"
    )]
    timeout: Option<u32>,
    /// Names or ids
    #[arg(required = true, value_name = "CONTAINER")]
    containers: Vec<String>,
}

/// One more command.
#[derive(Debug, clap::Args)]
pub struct ExecArgs {
    /// Give it our standard input
    #[arg(short, long)]
    interactive: bool,
    /// Give it a terminal
    #[arg(short, long)]
    tty: bool,
    /// Do not wait for it
    #[arg(short, long)]
    detach: bool,
    /// Set an environment variable; NAME alone takes the caller's value
    #[arg(short, long, value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// Set the variables of a file, one a line
    #[arg(long, value_name = "FILE")]
    env_file: Vec<PathBuf>,
    /// The working directory
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<String>,
    /// USER[:GROUP], names or numbers
    #[arg(short, long)]
    user: Option<String>,
    /// Give it all capabilities
    #[arg(long)]
    privileged: bool,
    /// The keys that leave it alone [default: ctrl-p,ctrl-q]
    #[arg(long, value_name = "KEYS", value_parser = Keys::parse)]
    detach_keys: Option<Keys>,
    /// The container's name or id
    container: String,
    /// The command
    #[arg(
        required = true,
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "COMMAND"
    )]
    command: Vec<String>,
}

/// Does it.
///
/// # Errors
/// One line.
pub fn run(command: ContainerCommand, root: &Path) -> Result<u8> {
    let engine = Engine::open(root)?;
    let mut out = std::io::stdout();
    match command {
        ContainerCommand::Start {
            attach,
            interactive,
            detach_keys,
            containers,
        } => return start(&engine, attach, interactive, detach_keys, &containers),
        ContainerCommand::Stop(args) => {
            let request = stop_request(&args)?;
            return each(&engine, &args.containers, |record| {
                engine.end(record, &request())
            });
        }
        ContainerCommand::Restart(args) => {
            let request = stop_request(&args)?;
            return each(&engine, &args.containers, |record| {
                engine.end(record, &request())?;
                engine.start(record, None).map(drop)
            });
        }
        ContainerCommand::Port { container, port } => {
            let record = engine.find(&container)?;
            let lines = crate::net::port_lines(&record, port.as_deref());
            if let (Some(port), []) = (&port, &lines[..]) {
                bail!("no public port {port} published for {container}");
            }
            for line in lines {
                writeln!(out, "{line}")?;
            }
        }
        ContainerCommand::Kill { signal, containers } => {
            let signal = parse_signal(&signal)?;
            return each(&engine, &containers, |record| engine.kill(record, signal));
        }
        ContainerCommand::Pause { containers } => {
            return each(&engine, &containers, |record| {
                engine.ask(record, &Request::Pause).map(drop)
            });
        }
        ContainerCommand::Unpause { containers } => {
            return each(&engine, &containers, |record| {
                engine.ask(record, &Request::Unpause).map(drop)
            });
        }
        ContainerCommand::Wait { containers } => {
            for wanted in containers {
                writeln!(out, "{}", engine.wait(&engine.find(&wanted)?)?)?;
            }
        }
        ContainerCommand::Rm {
            force,
            volumes,
            containers,
        } => {
            return each(&engine, &containers, |record| {
                engine.remove(record, force)?;
                if volumes {
                    engine.remove_anonymous_volumes(record)?;
                }
                Ok(())
            });
        }
        ContainerCommand::Prune { force } => return prune(&engine, force),
        ContainerCommand::Rename { container, name } => {
            engine.rename(&engine.find(&container)?, &name)?;
        }
        ContainerCommand::Ps {
            all,
            quiet,
            no_trunc,
            tree,
            json,
        } => {
            let mut records = engine.list()?;
            records.retain(|record| all || record.state.status.is_live());
            match (quiet, json) {
                (true, _) => show::ids(&records, no_trunc, &mut out)?,
                (_, true) => show::json(&engine, &records, &mut out)?,
                _ if tree => show::table(&show::as_tree(records), no_trunc, &mut out)?,
                _ => show::table(&records, no_trunc, &mut out)?,
            }
        }
        ContainerCommand::Inspect { containers } => {
            let records = containers
                .iter()
                .map(|wanted| engine.find(wanted))
                .collect::<Result<Vec<_>>>()?;
            show::json(&engine, &records, &mut out)?;
        }
        ContainerCommand::Logs(args) => logs::show(&engine, &args)?,
        ContainerCommand::Fork(args) => return fork::run(&engine, &args),
        ContainerCommand::Freeze(args) => fork::freeze(&engine, &args, root)?,
        ContainerCommand::Rewind {
            container,
            template,
        } => {
            engine.ask(&engine.find(&container)?, &Request::Rewind(template))?;
            writeln!(out, "{container}")?;
        }
        ContainerCommand::Exec(args) => return exec(&engine, args),
        ContainerCommand::Attach {
            no_stdin,
            detach_keys,
            container,
        } => {
            let record = engine.find(&container)?;
            let stdin = record.spec.stdin && !no_stdin;
            let session = Session::new(record.spec.tty, stdin, detach_keys)?;
            let stream = engine.attach(&record, stdin)?;
            return session.0.attend(stream)?.0.status();
        }
        ContainerCommand::Cp(args) => copy::copy(&engine, &args)?,
        ContainerCommand::Diff { container } => inside::diff(&engine, &container, &mut out)?,
        ContainerCommand::Top { container, .. } => inside::top(&engine, &container, &mut out)?,
        ContainerCommand::Export { output, container } => {
            copy::export(&engine, &container, output.as_deref())?;
        }
        ContainerCommand::Stats { json, containers } => {
            stats(&engine, &containers, json)?;
        }
    }
    Ok(0)
}

/// Does it with each, and prints the name of each with which it was done; as docker,
/// goes on after a failure.
fn each(engine: &Engine, containers: &[String], act: impl Fn(&Record) -> Result<()>) -> Result<u8> {
    let mut failed = None;
    for wanted in containers {
        match engine.find(wanted).and_then(|record| act(&record)) {
            Ok(()) => writeln!(std::io::stdout(), "{wanted}")?,
            Err(error) => {
                if let Some(before) = failed.replace(error) {
                    eprintln!("vm-run: {}", crate::line(&before));
                }
            }
        }
    }
    failed.map_or(Ok(0), Err)
}

/// Our side of a container's first process.
pub struct Session(Terminal);

impl Session {
    /// # Errors
    /// A terminal that was asked for and is not there.
    pub fn new(tty: bool, interactive: bool, keys: Option<Keys>) -> Result<Self> {
        let terminal = Terminal::new(tty, interactive, true)?;
        Ok(Self(terminal.left_by(keys)))
    }
}

/// How a session with a container that was started has ended.
pub struct Attended {
    /// The container's status, or zero if the person has left.
    pub status: u8,
    /// Of its fork.
    pub stages: Stages,
    /// When it first said something.
    pub first_output: Option<Moment>,
}

/// Starts a container, and watches it to its end.
///
/// # Errors
/// One line.
pub fn attend(engine: &Engine, record: &Record, session: Session) -> Result<Attended> {
    let (stream, stages) = engine.start_attached(record, Window::ours())?;
    let (outcome, first_output) = session.0.attend(stream)?;
    Ok(Attended {
        status: outcome.status()?,
        stages,
        first_output,
    })
}

fn start(
    engine: &Engine,
    attach: bool,
    interactive: bool,
    keys: Option<Keys>,
    containers: &[String],
) -> Result<u8> {
    if !attach && !interactive {
        return each(engine, containers, |record| {
            // As docker has it: one that runs is as it should be.
            if record.state.status.is_live() {
                return Ok(());
            }
            engine.start(record, None).map(drop)
        });
    }
    let [container] = containers else {
        bail!("one container at a time can be attached to");
    };
    let record = engine.find(container)?;
    if record.state.status.is_live() {
        bail!("container {container} runs already: attach to it");
    }
    let interactive = interactive && record.spec.stdin;
    let session = Session::new(record.spec.tty, interactive, keys)?;
    Ok(attend(engine, &record, session)?.status)
}

fn stop_request(args: &StopArgs) -> Result<impl Fn() -> Request> {
    let signal = args.signal.as_deref().map(parse_signal).transpose()?;
    let timeout = args.timeout;
    Ok(move || Request::Stop { signal, timeout })
}

fn prune(engine: &Engine, force: bool) -> Result<u8> {
    if !force {
        bail!("this removes all containers that are not running: say --force if that is meant");
    }
    let mut freed = 0;
    for record in engine.list()? {
        if !record.state.status.is_live() {
            freed += engine.disk_bytes(&record);
            engine.remove(&record, false)?;
            writeln!(std::io::stdout(), "{}", record.id)?;
        }
    }
    eprintln!("vm-run: {} were freed", indicatif::DecimalBytes(freed));
    Ok(0)
}

fn exec(engine: &Engine, args: ExecArgs) -> Result<u8> {
    let record = engine.find(&args.container)?;
    if record.state.status == Status::Paused {
        bail!("container {} is paused: unpause it first", args.container);
    }
    let mut env = Vec::new();
    if args.tty {
        env.push("TERM=xterm".to_owned());
    }
    for word in crate::run::file_words(&args.env_file)?
        .iter()
        .chain(&args.env)
    {
        super::set_env(&mut env, word);
    }
    let interactive = args.interactive && !args.detach;
    // Signals that reach us are ours: docker forwards none to an exec.
    let terminal =
        Terminal::new(args.tty && !args.detach, interactive, args.tty)?.left_by(args.detach_keys);
    let request = Request::Exec(Exec {
        args: args.command,
        env,
        cwd: args.workdir,
        user: args.user,
        tty: args.tty,
        stdin: interactive,
        detach: args.detach,
        window: Window::ours(),
        privileged: args.privileged,
    });
    let (_, stream) = engine.ask(&record, &request)?;
    if args.detach {
        return Ok(0);
    }
    terminal.attend(stream)?.0.status()
}

fn stats(engine: &Engine, containers: &[String], json: bool) -> Result<()> {
    let records: Vec<Record> = if containers.is_empty() {
        let mut all = engine.list()?;
        all.retain(|record| record.state.status.is_live());
        all
    } else {
        containers
            .iter()
            .map(|wanted| engine.find(wanted))
            .collect::<Result<_>>()?
    };
    let mut rows = Vec::new();
    for record in records {
        match engine.ask(&record, &Request::Stats) {
            Ok((Answer::Stats(stats), _)) => rows.push((record, stats)),
            Ok((other, _)) => bail!("the supervisor speaks out of turn: {other:?}"),
            // It has ended meanwhile, and nobody asked for it by name.
            Err(_) if containers.is_empty() => {}
            Err(error) => return Err(error),
        }
    }
    show::stats(&rows, json, &mut std::io::stdout())
}
