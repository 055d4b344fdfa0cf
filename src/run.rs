//! `vm-run run` and `vm-run create`: what was typed, and the checked plan of a
//! container.

mod health;
mod machine;
mod options;
mod tmpfs;
mod ulimit;
mod warm;

use crate::args::size;
use crate::container::cli::{Session, attend};
use crate::container::{
    Engine, Keys, Layer, LogLimits, Options, Record, RestartPolicy, Spec, parse_signal, set_env,
};
use crate::image::{self, Access, ImageConfig, PullPolicy, Store};
use crate::net::{self, NetworkArgs};
use crate::templates;
use crate::volume::{self, VolumeArgs};
use crate::workers::JailArgs;
use anyhow::{Context, Result, anyhow, bail};
use fork::Moment;
use machine::SizeArgs;
use options::OptionArgs;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

/// What `stop` sends, if nobody says anything.
const SIGTERM: i32 = 15;

/// What can be typed after `create`, and after `run` too.
#[derive(Debug, clap::Args)]
pub struct CreateArgs {
    /// The container's name [default: one that is made up]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Keep standard input open, and give it to the container
    #[arg(short, long)]
    interactive: bool,
    /// Give the container a terminal
    #[arg(short, long)]
    tty: bool,
    /// Remove the container when it ends
    #[arg(long)]
    rm: bool,
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
    /// Run this instead of the image's entrypoint
    #[arg(long, value_name = "PROGRAM")]
    entrypoint: Option<String>,
    /// The hostname [default: the container's id]
    #[arg(long, value_name = "NAME")]
    hostname: Option<String>,
    /// Set a label
    #[arg(short, long, value_name = "NAME=VALUE")]
    label: Vec<String>,
    /// What `stop` sends [default: the image's, or SIGTERM]
    #[arg(long, value_name = "SIGNAL")]
    stop_signal: Option<String>,
    /// How long `stop` waits before it kills, in seconds
    #[arg(long, value_name = "SECONDS", default_value = "10")]
    stop_timeout: u32,
    /// Start it again when it ends: no, always, unless-stopped, on-failure[:N]
    #[arg(long, value_name = "POLICY", default_value = "no")]
    restart: String,
    /// How its log is kept: max-size=SIZE, max-file=N
    #[arg(long, value_name = "NAME=VALUE")]
    log_opt: Vec<String>,
    /// Make the root file system read-only
    #[arg(long)]
    read_only: bool,
    /// Keep the writable layer in guest memory, at most so much, and not on disk
    #[arg(long, value_name = "SIZE", value_parser = size)]
    writable_memory: Option<u64>,
    /// How its writable layer is kept: size=SIZE
    #[arg(long, value_name = "NAME=VALUE")]
    storage_opt: Vec<String>,
    /// Fork this template and not the default one. If a container is inside, it
    /// goes on; no IMAGE is given, and a command after -- runs beside it
    #[arg(long, value_name = "NAME")]
    template: Option<String>,
    /// What becomes of the connections to the outside that the container in TEMPLATE had:
    /// its programs are told that they are gone, or they stay open [default: reset]
    #[arg(long, value_name = "WHAT", value_enum)]
    connections: Option<Connections>,
    #[command(flatten)]
    size: SizeArgs,
    /// The trust domain: children share their template's memory only with others
    /// of the same
    #[arg(long, value_name = "NAME", default_value = fork::DEFAULT_DOMAIN)]
    domain: String,
    #[command(flatten)]
    jail: JailArgs,
    #[command(flatten)]
    volumes: VolumeArgs,
    #[command(flatten)]
    network: NetworkArgs,
    /// A directory or a file-system image (erofs, ext4) in the place of IMAGE
    #[arg(long, value_name = "PATH")]
    rootfs: Option<PathBuf>,
    /// When to pull IMAGE from its registry
    #[arg(long, value_name = "WHEN", value_enum, default_value_t)]
    pull: PullPolicy,
    #[command(flatten)]
    options: OptionArgs,
    /// IMAGE [COMMAND [ARG...]], or with --rootfs only the command
    #[arg(
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "IMAGE [COMMAND...]"
    )]
    words: Vec<String>,
}

/// What can be typed after `--connections`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Connections {
    Reset,
    Keep,
}

/// What can be typed after `run`.
#[derive(Debug, clap::Args)]
pub struct RunArgs {
    /// Leave the container running, and print its id
    #[arg(short, long)]
    detach: bool,
    /// Write how long each stage took to this file, as JSON
    #[arg(long, value_name = "FILE", conflicts_with = "detach")]
    stages: Option<PathBuf>,
    /// The keys that leave it alone [default: ctrl-p,ctrl-q]
    #[arg(long, value_name = "KEYS", value_parser = Keys::parse)]
    detach_keys: Option<Keys>,
    #[command(flatten)]
    create: CreateArgs,
}

/// `vm-run create`: prints the id.
///
/// # Errors
/// One line.
pub fn create(args: &CreateArgs, root: &Path) -> Result<u8> {
    let engine = Engine::open(root)?;
    let record = make(&engine, args, plan(args, true, root)?)?;
    writeln!(std::io::stdout(), "{}", record.id)?;
    Ok(0)
}

/// Makes a container of the words after `vm-run`, for another face.
///
/// # Errors
/// One line.
pub fn create_of(
    engine: &Engine,
    words: &[String],
    is_watched: bool,
    root: &Path,
) -> Result<Record> {
    #[derive(clap::Parser)]
    struct Words {
        #[command(flatten)]
        create: CreateArgs,
    }
    // What is wrong with a word is said in its first line.
    let args = <Words as clap::Parser>::try_parse_from(words).map_err(|error| {
        let text = error.to_string();
        let line = text.lines().next().unwrap_or_default();
        anyhow!("{}", line.trim_start_matches("error: "))
    })?;
    let spec = plan(&args.create, is_watched, root)?;
    make(engine, &args.create, spec)
}

/// `vm-run run`: runs the container; returns its exit status, or prints its id.
///
/// # Errors
/// One line; [`crate::exit_code`] tells which status it stands for.
pub fn run(args: &RunArgs, root: &Path) -> Result<u8> {
    let asked = Moment::now();
    let engine = Engine::open(root)?;
    let spec = plan(&args.create, !args.detach, root)?;
    let (tty, interactive) = (spec.tty, args.create.interactive);
    let session = (!args.detach)
        .then(|| Session::new(tty, interactive, args.detach_keys.clone()))
        .transpose()?;
    let record = make(&engine, &args.create, spec)?;
    let Some(session) = session else {
        engine
            .start(&record, None)
            .inspect_err(|_| engine.clean_up(&record))?;
        writeln!(std::io::stdout(), "{}", record.id)?;
        return Ok(0);
    };
    let ended = attend(&engine, &record, session).inspect_err(|_| engine.clean_up(&record))?;
    if let Some(path) = &args.stages {
        let json =
            crate::bench::stages_json(asked, &ended.stages, ended.first_output, Moment::now());
        std::fs::write(path, json.to_string())
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(ended.status)
}

/// Makes the container, and writes its id where that is asked for.
fn make(engine: &Engine, args: &CreateArgs, spec: Spec) -> Result<Record> {
    let Some(path) = &args.options.cidfile else {
        return engine.create(args.name.clone(), spec);
    };
    // Before anything is made: the file is another container's if it is there.
    let mut file = File::create_new(path).map_err(|error| match error.kind() {
        ErrorKind::AlreadyExists => anyhow!(
            "container ID file found, make sure the other container isn't running or delete {}",
            path.display()
        ),
        _ => anyhow!(
            "cannot make the container ID file {}: {error}",
            path.display()
        ),
    })?;
    let made = engine.create(args.name.clone(), spec).and_then(|record| {
        if let Err(error) = file.write_all(record.id.as_bytes()) {
            engine.remove(&record, false)?;
            return Err(error).with_context(|| format!("cannot write {}", path.display()));
        }
        Ok(record)
    });
    if made.is_err() {
        std::fs::remove_file(path).ok();
    }
    made
}

/// The plan of a container. `is_watched` is whether its first client is there from its
/// first byte on, and its input ends with that client's.
fn plan(args: &CreateArgs, is_watched: bool, root: &Path) -> Result<Spec> {
    let mut spec = blank(args, is_watched)?;
    let manifest = args
        .template
        .as_deref()
        .map(|name| templates::manifest(root, name))
        .transpose()?;
    if let Some((name, manifest)) = args.template.as_deref().zip(manifest.as_ref()) {
        let machine = args.size.machine_of(name, manifest)?;
        (spec.memory, spec.cpus) = (machine.memory, machine.cpus);
    }
    match manifest
        .as_ref()
        .and_then(|manifest| manifest.warm.as_ref())
    {
        Some(inside) => warm::plan(&mut spec, args, inside, std::env::args_os())?,
        None => plan_bare(&mut spec, args, root)?,
    }
    for label in file_words(&args.options.label_file)?
        .iter()
        .chain(&args.label)
    {
        let (name, value) = label.split_once('=').unwrap_or((label, ""));
        spec.labels.insert(name.to_owned(), value.to_owned());
    }
    if let Some(signal) = &args.stop_signal {
        spec.stop_signal = parse_signal(signal)?;
    }
    Ok(spec)
}

/// A plan that knows nothing of an image or a template yet.
fn blank(args: &CreateArgs, is_watched: bool) -> Result<Spec> {
    let restart = RestartPolicy::parse(&args.restart)?;
    let machine = args.size.machine()?;
    if args.rm && restart != RestartPolicy::No {
        bail!("--rm and --restart exclude each other");
    }
    Ok(Spec {
        created: jiff::Timestamp::now(),
        image: String::new(),
        image_id: None,
        rootfs: None,
        origin: None,
        template: args.template.clone(),
        args: Vec::new(),
        env: Vec::new(),
        cwd: "/".into(),
        user: String::new(),
        hostname: args.hostname.clone().unwrap_or_default(),
        tty: args.tty,
        stdin: args.interactive,
        stdin_once: args.interactive && is_watched,
        labels: BTreeMap::new(),
        stop_signal: SIGTERM,
        stop_timeout: args.stop_timeout,
        writable: Layer::Disk,
        writable_size: layer_size(&args.storage_opt)?,
        memory: machine.memory,
        cpus: machine.cpus,
        boot_timeout: machine.boot_timeout,
        domain: args.domain.clone(),
        no_jail: args.jail.no_jail,
        auto_remove: args.rm,
        mounts: Vec::new(),
        network: net::Plan::default(),
        keep_connections: args.connections == Some(Connections::Keep),
        restart,
        log: log_limits(&args.log_opt)?,
        options: Options::default(),
    })
}

/// The plan for a child of a bare template.
fn plan_bare(spec: &mut Spec, args: &CreateArgs, root: &Path) -> Result<()> {
    if args.connections.is_some() {
        bail!("--connections is for a template with a container inside, and this one has none");
    }
    if let Some(word) = args.words.first().filter(|word| word.starts_with('-')) {
        bail!("there is no option {word}: see --help");
    }
    let store = Store::open(root)?;
    let (config, command) = match &args.rootfs {
        Some(path) => {
            spec.image = path.display().to_string();
            spec.rootfs = Some(if path.is_dir() {
                image::rootfs_from_dir(&store, path)?
            } else {
                path.clone()
            });
            (ImageConfig::default(), &args.words[..])
        }
        None => {
            let (name, command) = args
                .words
                .split_first()
                .context("no IMAGE: name one, or give --rootfs PATH")?;
            let image = image::obtain(&store, name, args.pull, &Access::default())?;
            log::info!("{name} is {}", image.id);
            spec.image = name.clone();
            spec.image_id = Some(image.id);
            spec.rootfs = Some(image.rootfs);
            (image.config, command)
        }
    };
    spec.options = args.options.check(&config)?;
    spec.options.memory = args.size.memory();
    spec.options.nano_cpus = args.size.nano_cpus();
    spec.network = network(args, &config)?;
    // A volume under a tmpfs would be seen by nobody.
    let is_seen = |path: &&String| !spec.options.tmpfs.contains_key(path.trim_end_matches('/'));
    let of_image: Vec<String> = config.volumes.keys().filter(is_seen).cloned().collect();
    spec.mounts = volume::plan(&args.volumes, &of_image)?;
    if spec.no_jail && !spec.mounts.is_empty() {
        bail!(
            "volumes are served from a jail: be root and leave out --no-jail, or leave out the volumes"
        );
    }
    spec.args = command_line(args, &config, command);
    if spec.args.is_empty() {
        bail!("no command: the image names none, so give one");
    }
    spec.writable = match (args.read_only, args.writable_memory) {
        (true, Some(_)) => bail!("--read-only and --writable-memory exclude each other"),
        (true, None) => Layer::Nothing,
        (false, Some(limit)) => Layer::Memory(limit),
        (false, None) => Layer::Disk,
    };
    if spec.writable_size.is_some() && spec.writable != Layer::Disk {
        bail!("--storage-opt size is for a writable layer on a disk, and this one is not");
    }
    spec.env = terminal_env(args, config.env);
    for word in file_words(&args.env_file)?.iter().chain(&args.env) {
        set_env(&mut spec.env, word);
    }
    let cwd = args.workdir.clone().unwrap_or(config.working_dir);
    if !cwd.is_empty() {
        spec.cwd = cwd;
    }
    spec.user = args.user.clone().unwrap_or(config.user);
    spec.labels = config.labels;
    if !config.stop_signal.is_empty() {
        spec.stop_signal = parse_signal(&config.stop_signal)?;
    }
    Ok(())
}

/// How it is connected; one that asked for nothing and gets nothing is told why.
fn network(args: &CreateArgs, config: &ImageConfig) -> Result<net::Plan> {
    let is_root = rustix::process::geteuid().is_root();
    let (plan, notice) = args.network.plan(config, is_root)?;
    if let Some(notice) = notice {
        eprintln!("vm-run: {notice}");
    }
    Ok(plan)
}

/// Docker's names of what is kept of a log.
fn log_limits(options: &[String]) -> Result<LogLimits> {
    let mut limits = LogLimits::default();
    for option in options {
        match option.split_once('=') {
            Some(("max-size", value)) => {
                limits.max_size = size(value).map_err(anyhow::Error::msg)?;
            }
            Some(("max-file", value)) => {
                let files = value.parse().ok().filter(|n| *n >= 1);
                limits.max_files = files.context("max-file is one or more")?;
            }
            _ => bail!("{option:?}: a log option is max-size=SIZE or max-file=N"),
        }
    }
    Ok(limits)
}

/// Docker's names of how a writable layer is kept.
fn layer_size(options: &[String]) -> Result<Option<u64>> {
    let mut size_of_layer = None;
    for option in options {
        match option.split_once('=') {
            Some(("size", value)) => {
                let bytes = size(value).map_err(anyhow::Error::msg)?;
                crate::disk::check_size(bytes)?;
                size_of_layer = Some(bytes);
            }
            _ => bail!("{option:?}: a storage option is size=SIZE"),
        }
    }
    Ok(size_of_layer)
}

/// The variables of files: docker's format, a word a line, `#` before a comment.
///
/// # Errors
/// A file that cannot be read.
pub fn file_words(files: &[PathBuf]) -> Result<Vec<String>> {
    let mut words = Vec::new();
    for path in files {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read {}", path.display()))?;
        let lines = text.lines().map(str::trim_start);
        words.extend(
            lines
                .filter(|line| !line.is_empty() && !line.starts_with('#'))
                .map(str::to_owned),
        );
    }
    Ok(words)
}

/// As docker has it: a process on a terminal has a TERM.
fn terminal_env(args: &CreateArgs, mut env: Vec<String>) -> Vec<String> {
    if args.tty && !env.iter().any(|e| e.starts_with("TERM=")) {
        env.push("TERM=xterm".into());
    }
    env
}
/// Entrypoint and command as docker puts them together: a new entrypoint drops
/// the image's command, a command replaces it.
fn command_line(args: &CreateArgs, config: &ImageConfig, command: &[String]) -> Vec<String> {
    let (mut line, default) = match &args.entrypoint {
        Some(program) if program.is_empty() => (Vec::new(), &[][..]),
        Some(program) => (vec![program.clone()], &[][..]),
        None => (config.entrypoint.clone(), &config.cmd[..]),
    };
    line.extend_from_slice(if command.is_empty() { default } else { command });
    line
}
#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        run: CreateArgs,
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
