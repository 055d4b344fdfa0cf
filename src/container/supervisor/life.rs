//! One life of the container: a child is forked, its process started, and whatever
//! clients want of it is done until it ends.

use super::session::{Client, DRAIN, Farewells, Session, SharedLog, lock};
use crate::bell::Bell;
use crate::container::directory::Directory;
use crate::container::record::{Identity, Layer, Record, Spec};
use crate::container::wire::{self, Answer, Exec, Stats, Window};
use crate::container::{ROOT, WRITABLE, set_env};
use crate::net::{Attachment, Naming};
use crate::templates;
use anyhow::{Context, Result, bail};
use fork::task::Task;
use fork::{
    CONTAINER, Child, Connections, ContainerSpec, Disks, ForkSpec, Host, Place, Pool, Process,
    ProcessId, ProcessSpec, Stages, Stream, Template, WindowSize, Writable,
};
use rustix::fd::AsFd;
use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// What is asked of a live container. Each is answered on the channel it brings.
pub enum Order {
    Exec(Exec, Vec<Arc<Client>>, SyncSender<Result<Arc<Session>>>),
    Task(Task, Vec<Arc<Client>>, SyncSender<Result<Arc<Session>>>),
    Pause(SyncSender<Result<()>>),
    Unpause(SyncSender<Result<()>>),
    Stats(SyncSender<Result<Stats>>),
    /// All that its first process has written has gone to whoever watches.
    HeardOut,
    /// End the virtual machine, whatever runs in it.
    End,
}

/// The way for orders into a life.
#[derive(Clone)]
pub struct Orders {
    sender: Sender<Order>,
    bell: Bell,
}

impl Orders {
    /// False if there is nobody to obey any more.
    pub fn send(&self, order: Order) -> bool {
        if self.sender.send(order).is_err() {
            return false;
        }
        self.bell.ring();
        true
    }
}

/// Everything that lives are made of, made once.
pub struct Mother {
    pool: Pool,
    /// The template's.
    name: String,
    notices: Vec<String>,
    spec: Spec,
    directory: Directory,
    /// The state directory.
    root: PathBuf,
    log: SharedLog,
    farewells: Arc<Farewells>,
    network: SharedNetwork,
}

/// What connects the container, if anything does.
pub type SharedNetwork = Arc<Mutex<Option<Attachment>>>;

/// A container that runs.
pub struct Life {
    child: Child,
    /// Its first process; or the one beside a container that goes on.
    pub main: Arc<Session>,
    main_id: ProcessId,
    others: HashMap<ProcessId, Other>,
    orders: Receiver<Order>,
    way: Orders,
    spec: Spec,
    is_paused: bool,
    farewells: Arc<Farewells>,
}

/// One more process of the container.
struct Other {
    session: Arc<Session>,
    /// How long its end waits for outputs that something else may hold open.
    drain: Option<Duration>,
}

impl Mother {
    /// Finds or builds the template, and has workers started.
    ///
    /// # Errors
    /// One line.
    pub fn new(
        root: &Path,
        record: &Record,
        directory: &Directory,
        log: SharedLog,
        farewells: Arc<Farewells>,
        network: SharedNetwork,
    ) -> Result<Self> {
        let spec = record.spec.clone();
        // First: the worker comes up while the rest is found.
        let (workers, notices) = crate::workers::start(crate::workers::JailArgs {
            no_jail: spec.no_jail,
        })?;
        workers.spawn_ahead()?;
        let host = Arc::new(Host::open()?);
        let machine = spec.machine();
        let (template, name) = match &spec.template {
            Some(name) => (templates::open(root, host, name)?, name.clone()),
            None => (
                templates::default_for(root, host, &machine, &spec.domain)?,
                templates::default_name(&machine, &spec.domain)?,
            ),
        };
        let pool = Pool::new(Arc::new(template), Place::Workers(workers), 0)?;
        Ok(Self {
            pool,
            name,
            notices,
            spec,
            directory: directory.clone(),
            root: root.to_owned(),
            log,
            farewells,
            network,
        })
    }

    fn template(&self) -> &Template {
        self.pool.template()
    }

    /// What the person who starts it has to be told.
    pub fn notices(&self) -> &[String] {
        &self.notices
    }

    /// What it forks, for people.
    pub fn template_name(&self) -> String {
        self.name.clone()
    }

    /// Forks a child and starts the container in it. `begun` is told when it has begun
    /// and before its first output is taken, and gives those who are to see that.
    ///
    /// # Errors
    /// What forbids it; a [`fork::Error`] within tells docker's status.
    pub fn give_birth(
        &self,
        window: Option<WindowSize>,
        begun: impl FnOnce(&Stages) -> Vec<Arc<Client>>,
    ) -> Result<Life> {
        let mut child = self.fork()?;
        let process = match (self.template().warm(), self.spec.args.is_empty()) {
            (None, _) => {
                let container = ContainerSpec {
                    kept: self.spec.writable == Layer::Disk && !self.spec.auto_remove,
                    options: self.spec.options.container(self.spec.cpus, &self.naming()),
                    ..self.container()
                };
                child.start(container, first_process(&self.spec, window))?
            }
            (Some(warm), true) => child.attach(&warm.streams)?,
            (Some(warm), false) => {
                // Nobody has anything to say to it, and its input is not to end.
                let unseen: Vec<Stream> = warm
                    .streams
                    .iter()
                    .copied()
                    .filter(|stream| *stream != Stream::Stdin)
                    .collect();
                crate::stdio::discard(child.attach(&unseen)?)?;
                child.exec(first_process(&self.spec, window))?
            }
        };
        let main_id = process.remote.process();
        let clients = begun(&child.stages());
        let main = Session::new(process, Some(&self.log), clients)?;
        if !self.spec.stdin {
            // Of a container that goes on: nobody will say anything to it.
            main.end_input();
        }
        self.life(child, main, main_id)
    }

    /// Forks a child and opens the container's files in it.
    ///
    /// # Errors
    /// As [`Self::give_birth`].
    pub fn open(&self) -> Result<Life> {
        let mut child = self.fork()?;
        let process = child.open(ContainerSpec {
            kept: self.spec.writable == Layer::Disk,
            ..self.container()
        })?;
        let main_id = process.remote.process();
        let main = Session::new(process, None, Vec::new())?;
        self.life(child, main, main_id)
    }

    fn fork(&self) -> Result<Child> {
        Ok(self.pool.fork(ForkSpec {
            hostname: self.spec.hostname.clone(),
            disks: self.disks()?,
            domain: self.spec.domain.clone(),
            volumes: self.volumes()?,
            network: self.tap()?,
            connections: match self.spec.keep_connections {
                true => Connections::Keep,
                false => Connections::Reset,
            },
            ..ForkSpec::default()
        })?)
    }

    fn tap(&self) -> Result<Option<fork::Network>> {
        let network = lock(&self.network);
        network.as_ref().map(Attachment::tap).transpose()
    }

    fn naming(&self) -> Naming {
        let dns = &self.spec.options.dns;
        match &*lock(&self.network) {
            Some(network) => network.naming(dns),
            None => Naming::without_network(dns),
        }
    }

    /// Its file systems.
    fn container(&self) -> ContainerSpec {
        ContainerSpec {
            writable: match self.spec.writable {
                Layer::Disk | Layer::Inside => Writable::Disk,
                Layer::Memory(limit) => Writable::Memory { limit },
                Layer::Nothing => Writable::Nothing,
            },
            volumes: (self.spec.mounts.iter().enumerate())
                .map(|(number, mount)| mount.in_guest(number))
                .collect(),
            ..ContainerSpec::default()
        }
    }

    fn life(&self, child: Child, main: Arc<Session>, main_id: ProcessId) -> Result<Life> {
        let (sender, orders) = channel();
        let bell = Bell::new().context("cannot make an eventfd")?;
        Ok(Life {
            child,
            main,
            main_id,
            others: HashMap::new(),
            orders,
            way: Orders { sender, bell },
            spec: self.spec.clone(),
            is_paused: false,
            farewells: Arc::clone(&self.farewells),
        })
    }

    fn volumes(&self) -> Result<Vec<fork::Volume>> {
        let mounts = self.spec.mounts.iter();
        mounts.map(|mount| mount.open(&self.root)).collect()
    }

    /// Makes its writable layer, if it has none yet: the empty disk that this template
    /// has mounted. It is there whole or not at all; we hold the container's lock.
    fn ensure_writable(&self) -> Result<()> {
        let path = self.directory.path(WRITABLE);
        if path.exists() {
            return Ok(());
        }
        let empty = self.template().empty_disk();
        let empty = empty.context("the template has no empty disk: remove and rebuild it")?;
        let unfinished = path.with_extension("new");
        let write = || {
            let file = File::create(&unfinished)?;
            empty.write_to(&file)?;
            if !self.spec.auto_remove {
                file.sync_all()?;
            }
            std::fs::rename(&unfinished, &path)
        };
        write().with_context(|| format!("cannot make {}", path.display()))
    }

    fn disks(&self) -> Result<Disks> {
        let open = |name: &str, write: bool| {
            let path = self.directory.path(name);
            File::options()
                .read(true)
                .write(write)
                .open(&path)
                .with_context(|| format!("cannot open {}", path.display()))
        };
        Ok(Disks {
            root: match self.spec.rootfs {
                Some(_) => Some(open(ROOT, false)?),
                None => None,
            },
            writable: match self.spec.writable {
                Layer::Disk => {
                    self.ensure_writable()?;
                    Some(open(WRITABLE, true)?)
                }
                Layer::Memory(_) | Layer::Nothing | Layer::Inside => None,
            },
        })
    }
}

fn first_process(spec: &Spec, window: Option<WindowSize>) -> ProcessSpec {
    ProcessSpec {
        args: spec.args.clone(),
        env: spec.env.clone(),
        cwd: spec.cwd.clone(),
        user: spec.user.clone(),
        streams: streams(spec.tty, spec.stdin),
        window,
        options: spec.options.process(false),
    }
}

/// The streams of a process.
fn streams(tty: bool, stdin: bool) -> Vec<Stream> {
    match (tty, stdin) {
        (true, _) => vec![Stream::Terminal],
        (false, true) => vec![Stream::Stdin, Stream::Stdout, Stream::Stderr],
        (false, false) => vec![Stream::Stdout, Stream::Stderr],
    }
}

impl Life {
    /// What its child has become.
    pub fn identity(&self) -> Option<Identity> {
        let generation = self.child.generation()?;
        Some(Identity::new(generation, &self.spec.hostname))
    }

    /// The way in for orders.
    pub fn orders(&self) -> Orders {
        self.way.clone()
    }

    /// Lives: obeys, until the container ends; the result is its status.
    ///
    /// # Errors
    /// A virtual machine that dies instead.
    pub fn live(&mut self) -> Result<u8> {
        let bell = self.way.bell.clone();
        loop {
            match self.child.next_exit(bell.as_fd())? {
                Some((process, status)) if process == self.main_id => {
                    self.hear_out()?;
                    return Ok(status.code());
                }
                // A container that was beside the command, or has been told of.
                Some((process, status)) => {
                    if let Some(Other { session, drain }) = self.others.remove(&process) {
                        session.farewell(status.code(), "", drain, &self.farewells)?;
                    } else if process == CONTAINER {
                        bail!("the container ended, with status {}", status.code());
                    }
                }
                None => {
                    bell.hush();
                    while let Ok(order) = self.orders.try_recv() {
                        if matches!(order, Order::End) {
                            const KILLED: u8 = 128 + 9;
                            return Ok(KILLED);
                        }
                        self.obey(order);
                    }
                }
            }
        }
    }

    /// Waits until what the first process has written has gone to whoever watches: one who
    /// reads slowly is to miss nothing. Who ends the container waits for nobody.
    fn hear_out(&mut self) -> Result<()> {
        let (main, way) = (Arc::clone(&self.main), self.way.clone());
        std::thread::Builder::new()
            .name("drain".into())
            .stack_size(128 << 10)
            .spawn(move || {
                main.drain(Some(DRAIN));
                way.send(Order::HeardOut);
            })
            .context("cannot start a thread")?;
        // It ends with an order, for we have a way to ourselves.
        while let Ok(order) = self.orders.recv() {
            match order {
                Order::HeardOut | Order::End => break,
                order => self.obey(order),
            }
        }
        Ok(())
    }

    /// Whoever asks and has gone since needs no answer.
    fn obey(&mut self, order: Order) {
        match order {
            Order::Exec(exec, clients, reply) => {
                let done = self.exec(exec, clients);
                reply.send(done).ok();
            }
            Order::Task(task, clients, reply) => {
                let done = self.task(task, clients);
                reply.send(done).ok();
            }
            Order::Pause(reply) => {
                reply.send(self.pause()).ok();
            }
            Order::Unpause(reply) => {
                reply.send(self.unpause()).ok();
            }
            Order::Stats(reply) => {
                reply.send(self.stats()).ok();
            }
            Order::HeardOut | Order::End => {}
        }
    }

    fn exec(&mut self, exec: Exec, clients: Vec<Arc<Client>>) -> Result<Arc<Session>> {
        self.check_not_paused()?;
        let mut env = self.spec.env.clone();
        for word in exec.env {
            set_env(&mut env, &word);
        }
        let process = self.child.exec(ProcessSpec {
            args: exec.args,
            env,
            cwd: exec.cwd.unwrap_or_else(|| self.spec.cwd.clone()),
            user: exec.user.unwrap_or_else(|| self.spec.user.clone()),
            streams: streams(exec.tty, exec.stdin),
            window: exec.window.map(Window::size),
            options: self.spec.options.process(exec.privileged),
        })?;
        self.watch(process, clients, Some(DRAIN))
    }

    fn task(&mut self, task: Task, clients: Vec<Arc<Client>>) -> Result<Arc<Session>> {
        self.check_not_paused()?;
        let mut streams = vec![Stream::Stdout, Stream::Stderr];
        if matches!(task, Task::Unpack { .. }) {
            streams.push(Stream::Stdin);
        }
        let process = self.child.task(task, &streams)?;
        // Nothing holds its output but itself, and every byte of it is wanted.
        self.watch(process, clients, None)
    }

    fn check_not_paused(&self) -> Result<()> {
        if self.is_paused {
            bail!("the container is paused: unpause it first");
        }
        Ok(())
    }

    fn watch(
        &mut self,
        process: Process,
        clients: Vec<Arc<Client>>,
        drain: Option<Duration>,
    ) -> Result<Arc<Session>> {
        let id = process.remote.process();
        for client in &clients {
            // Before its first output. One that has gone is found out later.
            client.with(|to| wire::send(to, &Answer::Done)).ok();
        }
        let session = Session::new(process, None, clients)?;
        let other = Other {
            session: Arc::clone(&session),
            drain,
        };
        self.others.insert(id, other);
        Ok(session)
    }

    fn pause(&mut self) -> Result<()> {
        if self.is_paused {
            bail!("the container is paused already");
        }
        self.child.pause()?;
        self.is_paused = true;
        Ok(())
    }

    fn unpause(&mut self) -> Result<()> {
        if !self.is_paused {
            bail!("the container is not paused");
        }
        self.child.unpause()?;
        self.is_paused = false;
        Ok(())
    }

    fn stats(&self) -> Result<Stats> {
        let stats = self.child.stats()?;
        Ok(Stats {
            guest_private: stats.guest_private,
            private: stats.private,
            pss: stats.pss,
            root_mapped: stats.root_mapped,
            cpu_us: stats.cpu_us,
        })
    }

    /// What is left of its other processes is told that they have ended with it.
    ///
    /// # Errors
    /// No thread.
    pub fn bury(mut self) -> Result<Arc<Session>> {
        for (_, Other { session, .. }) in self.others.drain() {
            const KILLED: u8 = 128 + 9;
            session.farewell(KILLED, "", Some(DRAIN), &self.farewells)?;
        }
        let main = Arc::clone(&self.main);
        // Until its worker has gone: whoever is told of its end may start it again, and
        // its disk must be free.
        self.child.end();
        Ok(main)
    }
}

/// There will be no more output for now.
pub fn finish(log: &SharedLog) {
    if let Err(error) = lock(log).finish() {
        log::error!("{error:#}");
    }
}
