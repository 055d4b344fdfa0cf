//! One life of the container: a child is forked, its process started, and whatever
//! clients want of it is done until it ends.

use super::session::{Client, DRAIN, Farewells, Session, SharedLog};
use crate::bell::Bell;
use crate::container::layers::Layers;
use crate::container::record::{Identity, Spec};
use crate::container::set_env;
use crate::container::wire::{self, Answer, Exec, Stats, Window};
use crate::lock::lock;
use crate::templates;
use anyhow::{Context, Result, anyhow, bail};
use fork::task::Task;
use fork::{
    CONTAINER, Child, Host, Merged, Parcel, Process, ProcessId, ProcessSpec, Stream, Template, Warm,
};
use rustix::fd::AsFd;
use std::collections::HashMap;
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel};
use std::time::Duration;

/// A disk with so many layers is to have fewer; at most
/// [`DISK_LAYERS_MAX`](fork::DISK_LAYERS_MAX) can be there before it has.
const MERGE_AT: usize = 8;

/// What is asked of a live container. Each is answered on the channel it brings.
pub enum Order {
    Exec(Exec, Vec<Arc<Client>>, SyncSender<Result<Arc<Session>>>),
    Task(Task, Vec<Arc<Client>>, SyncSender<Result<Arc<Session>>>),
    Pause(SyncSender<Result<()>>),
    Unpause(SyncSender<Result<()>>),
    Stats(SyncSender<Result<Stats>>),
    Capture(SyncSender<Result<Parcel>>),
    /// So many layers of its disk have become one.
    Merged(usize, Result<File>),
    /// Some layers of its memory were made one, if there were many.
    MergedMemory(std::result::Result<Option<Merged>, fork::VmError>),
    /// To the template of this name.
    Rewind(String, SyncSender<Result<()>>),
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
    disk: Layers,
    is_merging: bool,
    /// The state directory.
    root: PathBuf,
    host: Arc<Host>,
    is_paused: bool,
    farewells: Arc<Farewells>,
}

/// How a life ends.
pub enum Ending {
    /// The container has, with this status.
    Exited(u8),
    /// It is to go on where this template is; whoever wants that waits.
    Rewind(Arc<Template>, SyncSender<Result<()>>),
}

/// One more process of the container.
struct Other {
    session: Arc<Session>,
    /// How long its end waits for outputs that something else may hold open.
    drain: Option<Duration>,
}

/// What a life is made of.
pub struct LifeSpec {
    pub child: Child,
    pub main: Arc<Session>,
    pub main_id: ProcessId,
    pub spec: Spec,
    pub disk: Layers,
    /// The state directory.
    pub root: PathBuf,
    pub host: Arc<Host>,
    pub farewells: Arc<Farewells>,
}

/// The streams of a process.
pub(super) fn streams(tty: bool, stdin: bool) -> Vec<Stream> {
    match (tty, stdin) {
        (true, _) => vec![Stream::Terminal],
        (false, true) => vec![Stream::Stdin, Stream::Stdout, Stream::Stderr],
        (false, false) => vec![Stream::Stdout, Stream::Stderr],
    }
}

impl Life {
    /// A container that has begun.
    ///
    /// # Errors
    /// No descriptor.
    pub fn new(of: LifeSpec) -> Result<Self> {
        let (sender, orders) = channel();
        let bell = Bell::new().context("cannot make an eventfd")?;
        Ok(Self {
            child: of.child,
            main: of.main,
            main_id: of.main_id,
            others: HashMap::new(),
            orders,
            way: Orders { sender, bell },
            spec: of.spec,
            disk: of.disk,
            is_merging: false,
            root: of.root,
            host: of.host,
            is_paused: false,
            farewells: of.farewells,
        })
    }

    /// What its child has become.
    pub fn identity(&self) -> Option<Identity> {
        let generation = self.child.generation()?;
        Some(Identity::new(generation, &self.spec.hostname))
    }

    /// The way in for orders.
    pub fn orders(&self) -> Orders {
        self.way.clone()
    }

    /// Lives: obeys, until the container ends or is to be another.
    ///
    /// # Errors
    /// A virtual machine that dies instead.
    pub fn live(&mut self) -> Result<Ending> {
        let bell = self.way.bell.clone();
        loop {
            match self.child.next_exit(bell.as_fd())? {
                Some((process, status)) if process == self.main_id => {
                    self.hear_out()?;
                    return Ok(Ending::Exited(status.code()));
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
                        match order {
                            Order::End => {
                                const KILLED: u8 = 128 + 9;
                                return Ok(Ending::Exited(KILLED));
                            }
                            Order::Rewind(name, reply) => match self.checkpoint(&name) {
                                Ok(template) => {
                                    return Ok(Ending::Rewind(Arc::new(template), reply));
                                }
                                Err(error) => drop(reply.send(Err(error))),
                            },
                            order => self.obey(order),
                        }
                    }
                }
            }
        }
    }

    /// The template of this name, if this container can go on from there.
    fn checkpoint(&self, name: &str) -> Result<Template> {
        let template = templates::open(&self.root, Arc::clone(&self.host), name)?;
        let (image, args) = (&self.spec.image, &self.spec.args);
        // One that came from a template itself has no command of its own.
        let is_of_it =
            |inside: &Warm| inside.image == *image && (args.is_empty() || inside.command == *args);
        if !template.is_live() || !template.warm().is_some_and(is_of_it) {
            bail!("template {name} was not made of such a container that ran: see freeze --as");
        }
        if !self.spec.mounts.is_empty() {
            bail!("this container has volumes, and template {name} knows of none");
        }
        Ok(template)
    }

    /// Waits until what the first process has written has gone to whoever watches: one who
    /// reads slowly is to miss nothing. Who ends the container waits for nobody.
    fn hear_out(&mut self) -> Result<()> {
        let (main, way) = (Arc::clone(&self.main), self.way.clone());
        spawn("drain", move || {
            main.drain(Some(DRAIN));
            way.send(Order::HeardOut);
        })?;
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
            Order::Capture(reply) => {
                reply.send(self.capture()).ok();
            }
            Order::MergedMemory(merged) => {
                if let Err(error) = self.merged_memory(merged) {
                    log::error!("the layers of its memory stay as they are: {error:#}");
                }
            }
            Order::Merged(count, merged) => {
                if let Err(error) = self.merged(count, merged) {
                    log::error!("the layers of its disk stay as they are: {error:#}");
                }
            }
            Order::Rewind(_, reply) => {
                reply.send(Err(anyhow!("the container has ended"))).ok();
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

    /// In the background, if there are many: makes one of the layers of its memory and of
    /// its disk that are not written any more.
    fn begin_merging(&mut self) -> Result<()> {
        let (memory, way) = (self.child.memory()?, self.way.clone());
        if memory.has_many_layers() {
            spawn("merge-memory", move || {
                way.send(Order::MergedMemory(memory.merge()));
            })?;
        }
        let layers = self.child.layers();
        if self.is_merging || layers.len() < MERGE_AT {
            return Ok(());
        }
        let (lowest, between) = (&layers[0], &layers[1..layers.len() - 1]);
        let size = lowest.metadata().context("stat")?.len();
        let between = between.iter().map(File::try_clone);
        let between = between
            .collect::<std::io::Result<Vec<_>>>()
            .context("dup")?;
        let (disk, way) = (self.disk.clone(), self.way.clone());
        spawn("merge-disk", move || {
            let merged = disk.merge(&between, size);
            way.send(Order::Merged(between.len(), merged));
        })?;
        self.is_merging = true;
        Ok(())
    }

    /// In the background: has what was just covered on the disk. What tells of its blocks
    /// was written before they are there, so a host that loses its power now would lose
    /// more than the guest has not flushed.
    fn sync_covered(&self) -> Result<()> {
        let [.., covered, _] = self.child.layers() else {
            return Ok(());
        };
        if !self.disk.is_durable() {
            return Ok(());
        }
        let covered = covered.try_clone().context("dup")?;
        spawn("sync", move || {
            if let Err(error) = covered.sync_data() {
                log::error!("what lies below its disk's new layer is not synced: {error}");
            }
        })
    }

    fn merged(&mut self, count: usize, merged: Result<File>) -> Result<()> {
        self.is_merging = false;
        self.child.replace_layers(count, merged?)?;
        self.disk.put_merged(count)
    }

    fn merged_memory(
        &mut self,
        merged: std::result::Result<Option<Merged>, fork::VmError>,
    ) -> Result<()> {
        if let Some(merged) = merged? {
            self.child.use_merged(&merged)?;
        }
        Ok(())
    }

    fn capture(&mut self) -> Result<Parcel> {
        // One without a disk has no layers.
        let top = match self.child.layers().len() {
            0 => None,
            count => Some(self.disk.add_top(count)?),
        };
        let (template, _) = self.child.capture(&self.spec.image, top)?;
        if let Err(error) = self.sync_covered() {
            log::error!("what lies below its disk's new layer is not synced: {error:#}");
        }
        if let Err(error) = self.begin_merging() {
            log::error!("the layers of its disk stay as they are: {error:#}");
        }
        Ok(template.pack()?)
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

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<()> {
    std::thread::Builder::new()
        .name(name.into())
        .stack_size(128 << 10)
        .spawn(body)
        .context("cannot start a thread")
        .map(drop)
}

/// There will be no more output for now.
pub fn finish(log: &SharedLog) {
    if let Err(error) = lock(log).finish() {
        log::error!("{error:#}");
    }
}
