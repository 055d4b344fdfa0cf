//! What makes lives: the template, workers, disks and the network of a container, found
//! once.

use super::life::{Life, LifeSpec, streams};
use super::session::{Client, Farewells, Session, SharedLog};
use crate::container::directory::Directory;
use crate::container::id;
use crate::container::layers::Layers;
use crate::container::log::Output;
use crate::container::record::{Layer, Record, Spec};
use crate::container::{ROOT, WRITABLE};
use crate::lock::lock;
use crate::net::{Attachment, Naming};
use crate::templates;
use anyhow::{Context, Result};
use fork::worker::Workers;
use fork::{
    Child, Connections, ContainerSpec, Disks, ForkSpec, Host, Place, Pool, ProcessId, ProcessSpec,
    Stages, Stream, Template, WindowSize, Writable,
};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

/// What connects the container, if anything does.
pub type SharedNetwork = Arc<Mutex<Option<Attachment>>>;

/// What lives are made with.
pub struct MotherSpec<'a> {
    /// The state directory.
    pub root: &'a Path,
    pub record: &'a Record,
    pub directory: &'a Directory,
    pub log: SharedLog,
    pub farewells: Arc<Farewells>,
    pub network: SharedNetwork,
    /// Whether it begins as a fork of one that runs.
    pub is_fork: bool,
}

/// The template of a container that is started, and its name.
///
/// # Errors
/// One line.
pub fn find_template(root: &Path, record: &Record, host: Arc<Host>) -> Result<(Template, String)> {
    let spec = &record.spec;
    let machine = spec.machine();
    Ok(match &spec.template {
        Some(name) => (templates::open(root, host, name)?, name.clone()),
        None => (
            templates::default_for(root, host, &machine, &spec.domain)?,
            templates::default_name(&machine, &spec.domain)?,
        ),
    })
}

/// Everything that lives are made of, made once.
pub struct Mother {
    pool: Pool,
    workers: Arc<Workers>,
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
    /// Whether the template is a picture of the container's source.
    is_fork: bool,
}

impl Mother {
    /// Has workers started, and finds the template and its name.
    ///
    /// # Errors
    /// One line.
    pub fn new(
        of: MotherSpec<'_>,
        find: impl FnOnce(Arc<Host>) -> Result<(Template, String)>,
    ) -> Result<Self> {
        let spec = of.record.spec.clone();
        // First: the worker comes up while the rest is found.
        let (workers, notices) = crate::workers::start(crate::workers::JailArgs {
            no_jail: spec.no_jail,
        })?;
        workers.spawn_ahead()?;
        let (template, name) = find(Arc::new(Host::open()?))?;
        let place = Place::Workers(Arc::clone(&workers));
        let pool = Pool::new(Arc::new(template), place, 0)?;
        Ok(Self {
            pool,
            workers,
            name,
            notices,
            spec,
            directory: of.directory.clone(),
            root: of.root.to_owned(),
            log: of.log,
            farewells: of.farewells,
            network: of.network,
            is_fork: of.is_fork,
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
        let mut child = self.fork(&self.pool, self.disks()?)?;
        let process = match (self.template().warm(), self.spec.args.is_empty()) {
            (None, _) => {
                let container = ContainerSpec {
                    kept: self.spec.writable == Layer::Disk && !self.spec.auto_remove,
                    options: self.spec.options.container(self.spec.cpus, &self.naming()),
                    ..self.container()
                };
                child.start(container, first_process(&self.spec, window))?
            }
            (Some(warm), _) if self.is_fork => {
                self.name_source()?;
                child.attach(&warm.streams)?
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

    /// Begins the log of a container that was forked while it ran.
    fn name_source(&self) -> Result<()> {
        let Some(source) = &self.spec.origin else {
            return Ok(());
        };
        let line = format!(
            "vm-run: forked from {} ({}), which ran\n",
            source.name,
            id::short(&source.id)
        );
        lock(&self.log).write(Output::Stderr, line.as_bytes())
    }

    /// Forks a child and opens the container's files in it.
    ///
    /// # Errors
    /// As [`Self::give_birth`].
    pub fn open(&self) -> Result<Life> {
        let mut child = self.fork(&self.pool, self.disks()?)?;
        let process = child.open(ContainerSpec {
            kept: self.spec.writable == Layer::Disk,
            ..self.container()
        })?;
        let main_id = process.remote.process();
        let main = Session::new(process, None, Vec::new())?;
        self.life(child, main, main_id)
    }

    /// Forks a child that goes on as the template has the container.
    ///
    /// # Errors
    /// As [`Self::give_birth`].
    pub fn bring_back(&self, template: Arc<Template>) -> Result<Life> {
        let pool = Pool::new(template, Place::Workers(Arc::clone(&self.workers)), 0)?;
        let mut child = self.fork(&pool, self.disks_over(pool.template())?)?;
        let warm = pool
            .template()
            .warm()
            .context("there is no container in it")?;
        let process = child.attach(&warm.streams)?;
        let main_id = process.remote.process();
        let main = Session::new(process, Some(&self.log), Vec::new())?;
        self.life(child, main, main_id)
    }

    fn fork(&self, pool: &Pool, disks: Disks) -> Result<Child> {
        Ok(pool.fork(ForkSpec {
            hostname: self.spec.hostname.clone(),
            disks,
            domain: self.spec.domain.clone(),
            // Of a container that ran they come with its picture.
            volumes: match pool.template().is_live() {
                true => Vec::new(),
                false => self.volumes()?,
            },
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
        Life::new(LifeSpec {
            child,
            main,
            main_id,
            spec: self.spec.clone(),
            disk: self.layers(),
            root: self.root.clone(),
            host: Arc::clone(self.template().host()),
            farewells: Arc::clone(&self.farewells),
        })
    }

    fn volumes(&self) -> Result<Vec<fork::Volume>> {
        let mounts = self.spec.mounts.iter();
        mounts.map(|mount| mount.open(&self.root)).collect()
    }

    fn layers(&self) -> Layers {
        self.directory.layers(!self.spec.auto_remove)
    }

    /// Of a container that ran when a picture of it was taken: what is not in that.
    fn disks_over(&self, template: &Template) -> Result<Disks> {
        Ok(Disks {
            root: None,
            writable: match template.layers() {
                [] => None,
                lower => Some(self.layers().adopt(lower)?.into()),
            },
        })
    }

    /// Makes its writable layer, if it has none yet: the empty disk that this template
    /// has mounted. It is there whole or not at all; we hold the container's lock.
    fn ensure_writable(&self) -> Result<()> {
        if self.layers().exists() {
            return Ok(());
        }
        let path = self.directory.path(WRITABLE);
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
        if self.template().is_live() {
            return self.disks_over(self.template());
        }
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
                    self.layers().open()?
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
