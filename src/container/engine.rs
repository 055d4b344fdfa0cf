//! What can be done with containers, by whoever asks: the command line today.

use super::directory::{self, Directory};
use super::record::{Layer, Record, Spec, State, Status};
use super::store::{Store, name_taken};
use super::wire::{self, Answer, Request, Window};
use super::{LOG, ROOT, WRITABLE, id};
use crate::unfit::Unfit;
use crate::volume::Store as Volumes;
use crate::{disk, guest, net, templates};
use anyhow::{Context, Result, bail};
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// How often a free name is looked for.
const NAME_TRIES: usize = 32;
/// How long a supervisor that has said it ended may take to let go.
const LET_GO: Duration = Duration::from_secs(5);
/// How long one that has not said yet that its container runs may take to that.
const BEGIN: Duration = Duration::from_secs(60);
/// The status of a container whose supervisor was killed, and its VM with it.
const KILLED: u8 = 128 + SIGKILL as u8;

/// The signal that nothing survives.
pub const SIGKILL: i32 = 9;

/// A refusal that has an exit status of docker's.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Refused {
    message: String,
    /// The status.
    pub code: u8,
}

/// All containers of a state directory.
pub struct Engine {
    root: PathBuf,
    store: Store,
}

impl Engine {
    /// Opens the state directory `root`.
    ///
    /// # Errors
    /// One line.
    pub fn open(root: &Path) -> Result<Self> {
        // No command is held up by what an earlier one has left.
        if let Err(error) = net::Host::sweep_if_needed(root) {
            log::warn!("networks cannot be cleaned up: {error:#}");
        }
        Ok(Self {
            root: root.to_owned(),
            store: Store::open(root)?,
        })
    }

    /// Makes a container, and does not start it. Without a name it gets one.
    ///
    /// # Errors
    /// A name that is taken or none, or no disk. Nothing is left.
    pub fn create(&self, name: Option<String>, spec: Spec) -> Result<Record> {
        self.sweep();
        let name = match name {
            Some(name) => {
                id::check_name(&name)?;
                if self.store.has_name(&name)? {
                    return Err(name_taken(&name).into());
                }
                name
            }
            None => self.free_name()?,
        };
        let mut record = Record {
            id: id::new_id()?,
            name,
            spec,
            state: State::default(),
        };
        if record.spec.hostname.is_empty() {
            record.spec.hostname = id::short(&record.id).to_owned();
        }
        self.check_networks(&record.spec)?;
        let volumes = Volumes::of(&self.root).make_for(&record.spec.mounts)?;
        let (directory, ownership) =
            Directory::make(&self.root, &record.id, |dir| fill(dir, &record.spec))?;
        if let Err(error) = self.store.insert(&record) {
            if let Err(left) = directory.remove(ownership) {
                log::warn!("{left:#}");
            }
            return Err(error);
        }
        volumes.keep();
        Ok(record)
    }

    /// Removes the volumes of a container that is gone which have no name.
    ///
    /// # Errors
    /// What the file system says.
    pub fn remove_anonymous_volumes(&self, record: &Record) -> Result<()> {
        Volumes::of(&self.root).remove_anonymous(&record.spec.mounts, || {
            let all = self.store.list()?.into_iter();
            Ok(all
                .map(|record| (record.name, record.spec.mounts))
                .collect())
        })
    }

    /// Before anything is made: networks that are there, or that are made when they are used.
    fn check_networks(&self, spec: &Spec) -> Result<()> {
        if spec.network.is_default() {
            return Ok(());
        }
        let store = net::Store::open(&self.root)?;
        for one in &spec.network.networks {
            if !one.is_default() {
                store.find(&one.network)?;
            }
        }
        Ok(())
    }

    fn free_name(&self) -> Result<String> {
        for _ in 0..NAME_TRIES {
            let name = id::new_name()?;
            if !self.store.has_name(&name)? {
                return Ok(name);
            }
        }
        bail!("no free name was found: give one with --name")
    }

    /// Starts a container that is at rest; nobody sees its output but the log.
    ///
    /// # Errors
    /// [`Refused`], with docker's status.
    pub fn start(&self, record: &Record, window: Option<Window>) -> Result<()> {
        self.begin(record, false, window).map(drop)
    }

    /// Starts a container that is at rest, and is its first client.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_attached(
        &self,
        record: &Record,
        window: Option<Window>,
    ) -> Result<(UnixStream, fork::Stages)> {
        self.begin(record, true, window)
    }

    fn begin(
        &self,
        record: &Record,
        attach: bool,
        window: Option<Window>,
    ) -> Result<(UnixStream, fork::Stages)> {
        self.ensure_template(record)?;
        let mut ours = self.supervise(record)?;
        wire::send(&mut ours, &Request::Start { attach, window })
            .context("the supervisor has gone")?;
        match answer(&mut ours)? {
            Answer::Started { stages, notices } => {
                for notice in notices {
                    eprintln!("vm-run: {notice}");
                }
                Ok((ours, *stages))
            }
            other => bail!("the supervisor speaks out of turn: {other:?}"),
        }
    }

    /// Opens the files of a container that is at rest, until the connection is closed.
    ///
    /// # Errors
    /// One that is in use, or that cannot be forked.
    pub fn open_files(&self, record: &Record) -> Result<UnixStream> {
        self.ensure_template(record)?;
        let mut ours = self.supervise(record)?;
        wire::send(&mut ours, &Request::Open).context("the supervisor has gone")?;
        match answer(&mut ours)? {
            Answer::Done => Ok(ours),
            other => bail!("the supervisor speaks out of turn: {other:?}"),
        }
    }

    /// Here, where a person sees its progress; the supervisor finds it then.
    fn ensure_template(&self, record: &Record) -> Result<()> {
        if record.spec.template.is_none() {
            let machine = record.spec.machine();
            templates::ensure_default(&self.root, &machine, &record.spec.domain)?;
        }
        Ok(())
    }

    /// Starts a supervisor, which waits to be told what for.
    pub(super) fn supervise(&self, record: &Record) -> Result<UnixStream> {
        let (ours, theirs) = UnixStream::pair().context("cannot make a socket pair")?;
        let program = std::env::current_exe().context("cannot find our own program")?;
        let supervisor = Command::new(program)
            .arg("--root")
            .arg(&self.root)
            .args(["supervise", &record.id])
            .stdin(OwnedFd::from(theirs))
            .stdout(Stdio::null())
            .stderr(self.complaints(record)?)
            .current_dir("/")
            .spawn()
            .context("cannot start a supervisor")?;
        reap(supervisor)?;
        Ok(ours)
    }

    /// What a supervisor says that is nobody's answer.
    fn complaints(&self, record: &Record) -> Result<fs::File> {
        let path = Directory::of(&self.root, &record.id).path("supervisor.log");
        fs::File::create(&path).with_context(|| format!("cannot write {}", path.display()))
    }

    /// The container of a name, an id, or an unambiguous beginning of an id, as it
    /// stands now.
    ///
    /// # Errors
    /// None, or several.
    pub fn find(&self, wanted: &str) -> Result<Record> {
        self.settle(self.store.find(wanted)?)
    }

    /// All containers, the newest first, as they stand now.
    ///
    /// # Errors
    /// The database's.
    pub fn list(&self) -> Result<Vec<Record>> {
        let all = self.store.list()?;
        all.into_iter()
            .filter(|record| !self.is_forsaken(record))
            .map(|record| self.settle(record))
            .collect()
    }

    /// Whether it was to be a fork, and whoever wanted that was killed before it had a
    /// supervisor. It is removed then.
    fn is_forsaken(&self, record: &Record) -> bool {
        let age = jiff::Timestamp::now().duration_since(record.spec.created);
        let is_young = Duration::try_from(age).unwrap_or_default() < BEGIN;
        let is_begun = record.state.status != Status::Created;
        if record.spec.origin.is_none() || is_begun || is_young {
            return false;
        }
        let removed = self.remove(record, false);
        removed.is_ok()
    }

    /// A record that says that a container lives is right only as long as somebody
    /// owns it: the rest is the word of a supervisor that was killed, or of a host that
    /// has crashed.
    fn settle(&self, mut record: Record) -> Result<Record> {
        if !record.state.status.is_live() {
            return Ok(record);
        }
        let directory = self.directory(&record);
        if directory.is_owned().unwrap_or(false) {
            return Ok(record);
        }
        // It may have ended, and been written, since it was read.
        let Ok(again) = self.store.find(&record.id) else {
            return Ok(record);
        };
        record = again;
        if record.state.status.is_live() && !directory.is_owned().unwrap_or(false) {
            record.state.status = Status::Exited;
            record.state.exit_code = KILLED;
            record.state.supervisor = None;
            record.state.finished = Some(jiff::Timestamp::now());
            record.state.error = "its supervisor was killed, or the host has restarted".into();
            self.store.set_state(&record.id, &record.state)?;
        }
        Ok(record)
    }

    /// Asks the container's supervisor, and waits for its answer.
    ///
    /// # Errors
    /// A container that is not running; what the supervisor says.
    pub fn ask(&self, record: &Record, request: &Request) -> Result<(Answer, UnixStream)> {
        if !record.state.status.is_live() {
            return Err(not_running(record).into());
        }
        self.ask_owner(record, request)
    }

    /// The same of whoever owns the container, running or not.
    ///
    /// # Errors
    /// As [`Self::ask`].
    pub fn ask_owner(&self, record: &Record, request: &Request) -> Result<(Answer, UnixStream)> {
        let connected = self.directory(record).connect();
        let mut stream = connected.map_err(|_| not_running(record))?;
        wire::send(&mut stream, request).context("the container's supervisor has gone")?;
        Ok((answer(&mut stream)?, stream))
    }

    /// Makes one more client of a container's first process.
    ///
    /// # Errors
    /// As [`Self::ask`].
    pub fn attach(&self, record: &Record, stdin: bool) -> Result<UnixStream> {
        match self.ask(record, &Request::Attach { stdin })? {
            (Answer::Done, stream) => Ok(stream),
            (other, _) => bail!("the supervisor speaks out of turn: {other:?}"),
        }
    }

    /// Sends a signal to a container's first process; after SIGKILL it has ended.
    ///
    /// # Errors
    /// As [`Self::ask`].
    pub fn kill(&self, record: &Record, signal: i32) -> Result<()> {
        let request = match signal {
            SIGKILL => Request::Kill,
            other => Request::Signal(other),
        };
        self.ask(record, &request).map(drop)
    }

    /// Ends a container; what has ended already stays so.
    ///
    /// # Errors
    /// What its supervisor says.
    pub fn end(&self, record: &Record, request: &Request) -> Result<()> {
        if !record.state.status.is_live() {
            return Ok(());
        }
        let ended = self.ask(record, request);
        // It may have ended while we asked.
        if ended.is_err()
            && !self
                .find(&record.id)
                .is_ok_and(|r| r.state.status.is_live())
        {
            return Ok(());
        }
        ended.map(drop)
    }

    /// Waits until a container that lives has ended; its status.
    ///
    /// # Errors
    /// What its supervisor says.
    pub fn wait(&self, record: &Record) -> Result<u8> {
        if record.state.status.is_live()
            && let Ok((Answer::Ended(status), _)) = self.ask(record, &Request::Wait)
        {
            return Ok(status);
        }
        Ok(self.find(&record.id)?.state.exit_code)
    }

    /// Removes a container that is at rest; with `force`, one that lives is ended, and one
    /// that is on its way to that is waited for.
    ///
    /// # Errors
    /// One that lives, or the file system's.
    pub fn remove(&self, record: &Record, force: bool) -> Result<()> {
        let deadline = Instant::now() + BEGIN;
        let mut now = record.clone();
        loop {
            if now.state.status.is_live() {
                if !force {
                    let (name, status) = (&now.name, now.state.status.word());
                    let why = format!(
                        "container {name} is {status}: stop it first, or remove it with --force"
                    );
                    return Err(Unfit::conflict(why).into());
                }
                self.end(&now, &Request::Kill)?;
            }
            // One that removes itself is gone by now.
            if self.store.find(&now.id).is_err() {
                return Ok(());
            }
            if self.remove_directory(&now)? {
                break;
            }
            if !force || Instant::now() >= deadline {
                return Err(Unfit::conflict(format!(
                    "container {} is in use: it is being started, or its files are open",
                    now.name
                ))
                .into());
            }
            if let Ok(again) = self.find(&now.id) {
                now = again;
            }
        }
        self.store.remove(&record.id)?;
        if record.spec.auto_remove {
            self.remove_anonymous_volumes(record)?;
        }
        Ok(())
    }

    /// After a start that failed: removes a container that is to be removed when it
    /// ends, if its supervisor has not.
    pub fn clean_up(&self, record: &Record) {
        if record.spec.auto_remove
            && self.store.has_id(&record.id).unwrap_or(false)
            && let Err(error) = self.remove(record, true)
        {
            log::warn!("{error:#}");
        }
    }

    /// False if somebody owns it.
    fn remove_directory(&self, record: &Record) -> Result<bool> {
        let directory = self.directory(record);
        if !directory.exists() {
            return Ok(true);
        }
        match directory.own(LET_GO) {
            Ok(Some(ownership)) => directory.remove(ownership).map(|()| true),
            Ok(None) => Ok(false),
            // By itself, at its end.
            Err(_) if !directory.exists() => Ok(true),
            Err(error) => Err(error),
        }
    }

    /// Gives it another name.
    ///
    /// # Errors
    /// A name that is taken, or none.
    pub fn rename(&self, record: &Record, name: &str) -> Result<()> {
        id::check_name(name)?;
        self.store.rename(&record.id, name)?;
        if record.spec.network.is_connected() {
            net::Store::open(&self.root)?.rename(&record.id, name)?;
        }
        Ok(())
    }

    /// Puts a container on one more network; at once if it runs.
    ///
    /// # Errors
    /// No such network, or one that it is on.
    pub fn connect(&self, record: &Record, membership: &net::Membership) -> Result<()> {
        let mut spec = record.spec.clone();
        let on_it = |one: &net::Membership| one.network == membership.network;
        if spec.network.networks.iter().any(on_it) {
            let (name, network) = (&record.name, &membership.network);
            bail!("container {name} is on network {network} already");
        }
        if record.state.status.is_live() {
            self.ask(record, &Request::Connect(membership.clone()))?;
        }
        spec.network.networks.push(membership.clone());
        self.store.set_spec(&record.id, &spec)
    }

    /// Takes a container off a network; at once if it runs.
    ///
    /// # Errors
    /// One that it is not on.
    pub fn disconnect(&self, record: &Record, network: &str) -> Result<()> {
        let mut spec = record.spec.clone();
        let networks = &mut spec.network.networks;
        let Some(at) = networks.iter().position(|one| one.network == network) else {
            bail!("container {} is not on network {network}", record.name);
        };
        networks.remove(at);
        if record.state.status.is_live() {
            self.ask(record, &Request::Disconnect(network.to_owned()))?;
        }
        self.store.set_spec(&record.id, &spec)
    }

    /// Docker's objects for what of the host's it sees.
    pub fn mounts(&self, record: &Record) -> Vec<serde_json::Value> {
        let mounts = record.spec.mounts.iter();
        mounts.map(|mount| mount.object(&self.root)).collect()
    }

    /// Where its root file system is.
    pub(super) fn root_of(&self, record: &Record) -> PathBuf {
        self.directory(record).path(ROOT)
    }

    /// Where its log is.
    pub fn log_path(&self, record: &Record) -> PathBuf {
        self.directory(record).path(LOG)
    }

    /// What its disk takes, in bytes, but for what others have too.
    pub fn disk_bytes(&self, record: &Record) -> u64 {
        self.directory(record).layers(false).bytes()
    }

    fn directory(&self, record: &Record) -> Directory {
        Directory::of(&self.root, &record.id)
    }

    /// Removes what killed processes have left.
    fn sweep(&self) {
        directory::sweep(&self.root, |id| self.store.has_id(id));
    }
}

fn not_running(record: &Record) -> Unfit {
    Unfit::conflict(format!("container {} is not running", record.name))
}

/// What belongs to a container before it begins.
fn fill(dir: &Path, spec: &Spec) -> Result<()> {
    if let Some(rootfs) = &spec.rootfs {
        let link = dir.join(ROOT);
        // A hard link outlives the image; where there can be none, a symbolic one has
        // to do.
        if fs::hard_link(rootfs, &link).is_err() {
            let rootfs = fs::canonicalize(rootfs)
                .with_context(|| format!("cannot find {}", rootfs.display()))?;
            std::os::unix::fs::symlink(rootfs, &link)
                .with_context(|| format!("cannot make {}", link.display()))?;
        }
    }
    // One of the usual size is made when it is known on which template it begins.
    if let (Layer::Disk, Some(size)) = (spec.writable, spec.writable_size) {
        let guest = guest::find(&guest::GuestArgs::default())?.guest;
        let list = guest.disk.context("the guest has no empty disk")?;
        let path = dir.join(WRITABLE);
        let file = fs::File::create_new(&path)
            .with_context(|| format!("cannot make {}", path.display()))?;
        disk::write_smaller(&list, &file, size)?;
        if !spec.auto_remove {
            file.sync_all()
                .with_context(|| format!("cannot write {}", path.display()))?;
        }
    }
    Ok(())
}

/// A supervisor outlives us or not: its end is nobody's business but the kernel's.
fn reap(mut supervisor: std::process::Child) -> Result<()> {
    std::thread::Builder::new()
        .name("reaper".into())
        .stack_size(64 << 10)
        .spawn(move || supervisor.wait().map(drop))
        .map(drop)
        .context("cannot start a thread")
}

/// What a supervisor answers.
///
/// # Errors
/// [`Refused`], or a supervisor that has gone.
pub fn answer(stream: &mut UnixStream) -> Result<Answer> {
    const GONE: &str = "the container's supervisor has gone";
    match wire::receive(stream).context(GONE)? {
        Some(Answer::Failed { message, code }) => Err(Refused { message, code }.into()),
        Some(answer) => Ok(answer),
        None => bail!(GONE),
    }
}
