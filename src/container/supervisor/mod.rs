//! The process that owns one container while it lives: `vm-run supervise ID`, started
//! by whoever starts the container, and outliving it.
//!
//! ```text
//!   starter --Start--> supervisor --> spawner --> worker (the VM)
//!   clients --socket--> threads --orders--> the life's own thread
//! ```
//! It has the container's lock, its socket, its log and its child; it writes the
//! container's state, and starts it again as its policy says. Its first client comes
//! as its standard input, so that nothing of the first output is lost.

mod life;
mod mother;
mod open;
mod probe;
mod serve;
mod session;

use self::life::{Ending, Life};
use self::mother::{Mother, MotherSpec, SharedNetwork};
use self::serve::{Now, Shared};
use self::session::{Client, Farewells, Session, SharedLog};
use super::directory::{Directory, Ownership};
use super::engine::Engine;
use super::health::Health;
use super::log::Log;
use super::record::{Record, Status};
use super::store::Store;
use super::wire::{self, Answer, Request, Window};
use crate::lock::lock;
use crate::net::{Attachment, Who};
use anyhow::{Context, Result, bail};
use fork::{Host, Template, WindowSize};
use jiff::Timestamp;
use rustix::fd::AsFd;
use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// How long others may look whether the container is owned.
const PATIENCE: Duration = Duration::from_secs(1);
/// The first pause before a restart; each one is twice as long (docker's).
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// The longest.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// A life that long was a good one: the pauses begin anew.
const GOOD_LIFE: Duration = Duration::from_secs(10);

/// Owns the container until it has ended for good.
///
/// # Errors
/// One line, for the starter has been told already where there is one.
pub fn main(root: &Path, id: &str) -> Result<()> {
    let mut starter = take_stdin()?;
    begin(root, id, &mut starter).inspect_err(|error| {
        // It may have gone, or know already.
        wire::send(&mut starter, &failed(error)).ok();
    })
}

/// Our standard input, as the connection that it is.
fn take_stdin() -> Result<UnixStream> {
    let stdin = std::io::stdin();
    let starter = stdin.as_fd().try_clone_to_owned().context("dup")?;
    let null = File::open("/dev/null").context("cannot open /dev/null")?;
    rustix::stdio::dup2_stdin(&null).context("dup2")?;
    // Signals of the starter's terminal are not for us.
    match rustix::process::setsid() {
        // The leader of a group has one already.
        Ok(_) | Err(rustix::io::Errno::PERM) => Ok(UnixStream::from(starter)),
        Err(error) => Err(error).context("setsid"),
    }
}

fn begin(root: &Path, id: &str, starter: &mut UnixStream) -> Result<()> {
    let directory = Directory::of(root, id);
    let Some(ownership) = directory.own(PATIENCE)? else {
        bail!("the container is in use: it runs, or its files are open");
    };
    let store = Store::open(root)?;
    let record = store.find(id)?;
    let listener = directory.listen(&ownership)?;
    let log = Arc::new(Mutex::new(Log::open(
        directory.path(super::LOG),
        record.spec.log,
    )?));
    let farewells = Arc::new(Farewells::default());
    let shared = Shared::new(store, record.clone(), Arc::clone(&farewells));
    let network = shared.network();
    let of_mother = |network, is_fork| MotherSpec {
        root,
        record: &record,
        directory: &directory,
        log: Arc::clone(&log),
        farewells: Arc::clone(&farewells),
        network,
        is_fork,
    };
    let (attach, window, is_fork) = match wire::receive(starter)? {
        Some(Request::Start { attach, window }) => (attach, window.map(Window::size), false),
        Some(Request::StartFork) => (false, None, true),
        Some(Request::Open) => {
            // Nothing runs in it, so nothing of it is on a network.
            let of_mother = of_mother(SharedNetwork::default(), false);
            let mother = Mother::new(of_mother, |host| mother::find_template(root, &record, host))?;
            return open::hold(&mother, listener, &shared, starter, ownership);
        }
        // Whoever wanted it has thought better of it.
        None => return Ok(()),
        Some(_) => bail!("a supervisor is started first of all"),
    };
    serve::listen(listener, &shared)?;
    serve::heed_signals(&shared)?;
    let supervisor = Supervisor {
        root: root.to_owned(),
        shared,
        network: Arc::clone(&network),
        farewells: Arc::clone(&farewells),
        log: Arc::clone(&log),
        starter: starter.try_clone().context("dup")?,
        attach,
        window,
        is_fork,
    };
    let find = |host| {
        supervisor.connect()?;
        match is_fork {
            true => supervisor.receive_picture(host),
            false => mother::find_template(root, &record, host),
        }
    };
    let ended =
        Mother::new(of_mother(network, is_fork), find).and_then(|mother| supervisor.lives(&mother));
    supervisor.end(&directory, ownership, ended)
}

struct Supervisor {
    /// The state directory.
    root: PathBuf,
    shared: Arc<Shared>,
    network: SharedNetwork,
    farewells: Arc<Farewells>,
    log: SharedLog,
    /// Whoever started it, and whether it watches the first life.
    starter: UnixStream,
    attach: bool,
    window: Option<WindowSize>,
    /// Whether it begins as a fork of one that runs.
    is_fork: bool,
}

/// How a life has ended.
struct Ended {
    status: u8,
    /// If it was by no doing of the container's.
    error: String,
    main: Arc<Session>,
}

impl Supervisor {
    /// One life after another, as the policy has it; the last one's end. An error is
    /// one before the first began.
    fn lives(&self, mother: &Mother) -> Result<Ended> {
        let mut pause = FIRST_PAUSE;
        let mut ended = self.first_life(mother)?;
        loop {
            life::finish(&self.log);
            let (policy, restarts) = self
                .shared
                .read(|record| (record.spec.restart, record.state.restarts));
            if self.shared.is_stopping() || !policy.wants(ended.status, restarts) {
                return Ok(ended);
            }
            self.shared.change(|state| {
                state.status = Status::Restarting;
                state.exit_code = ended.status;
                state.finished = Some(Timestamp::now());
                state.restarts += 1;
            })?;
            ended
                .main
                .farewell(ended.status, &ended.error, None, &self.farewells)?;
            if self.shared.wait_for_stop(pause) {
                return Ok(ended);
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
            let begun = Instant::now();
            ended = match mother.give_birth(None, |_| Vec::new()) {
                Ok(life) => self.live(mother, life)?,
                Err(error) => Ended {
                    status: exit_status(&error),
                    error: one_line(&error),
                    main: ended.main,
                },
            };
            if begun.elapsed() >= GOOD_LIFE {
                pause = FIRST_PAUSE;
            }
        }
    }

    /// Puts the container on its networks, on which it stays from life to life.
    fn connect(&self) -> Result<()> {
        let record = self.shared.read(Record::clone);
        if record.spec.network.is_connected() {
            let who = Who {
                root: &self.root,
                id: &record.id,
                name: &record.name,
                dns: &record.spec.options.dns,
            };
            *lock(&self.network) = Some(Attachment::new(&who, &record.spec.network)?);
        }
        Ok(())
    }

    /// Says that all is ready for it, and takes the picture of the container's source.
    fn receive_picture(&self, host: Arc<Host>) -> Result<(Template, String)> {
        let mut starter = self.starter.try_clone().context("dup")?;
        wire::send(&mut starter, &Answer::Done)?;
        match wire::receive(&mut starter)? {
            Some(Answer::Captured(label)) => {
                let picture = wire::Picture::receive(label, &mut starter)?;
                let template = Template::unpack(host, picture.into_parcel())?;
                let origin = self.shared.read(|record| record.spec.origin.clone());
                Ok((
                    template,
                    origin.map_or_else(String::new, |origin| origin.template),
                ))
            }
            _ => bail!("whoever wanted the fork has gone"),
        }
    }

    fn first_life(&self, mother: &Mother) -> Result<Ended> {
        let mut input = None;
        let life = mother.give_birth(self.window, |stages| {
            let answer = Answer::Started {
                stages: Box::new(*stages),
                notices: mother.notices().to_vec(),
            };
            let client = self.starter.try_clone().map(Client::new);
            let told = client.map_err(anyhow::Error::from).and_then(|client| {
                client.with(|to| wire::send(to, &answer))?;
                Ok(client)
            });
            match told {
                Ok(client) if self.attach => {
                    input = Some(Arc::clone(&client));
                    vec![client]
                }
                Ok(_) => Vec::new(),
                Err(error) => {
                    log::debug!("the starter has gone: {error}");
                    Vec::new()
                }
            }
        })?;
        if let Some(client) = input {
            let stream = self.starter.try_clone().context("dup")?;
            serve::take_input(stream, client, Arc::clone(&life.main), &self.shared)?;
        }
        self.live(mother, life)
    }

    fn live(&self, mother: &Mother, life: Life) -> Result<Ended> {
        let template = mother.template_name();
        self.shared.change(|state| {
            state.supervisor = Some(std::process::id());
            state.started = Some(Timestamp::now());
            state.finished = None;
            state.exit_code = 0;
            state.error.clear();
            state.template = template;
            if let Some(network) = &*lock(&self.network) {
                state.places = network.places();
                state.ports = network.ports().to_vec();
            }
        })?;
        let mut life = life;
        loop {
            let (main, lived) = self.live_once(life)?;
            let (status, error) = match lived {
                Ok(Ending::Exited(status)) => (status, String::new()),
                Ok(Ending::Rewind(template, reply)) => {
                    const REWOUND: &str = "the container was brought back to a checkpoint";
                    main.farewell(
                        crate::FAILED,
                        REWOUND,
                        Some(Duration::ZERO),
                        &self.farewells,
                    )?;
                    match mother.bring_back(template) {
                        Ok(next) => {
                            // Whoever asked may have gone.
                            reply.send(Ok(())).ok();
                            life = next;
                            continue;
                        }
                        Err(error) => {
                            let line = one_line(&error);
                            reply.send(Err(error)).ok();
                            (crate::FAILED, line)
                        }
                    }
                }
                Err(error) => (exit_status(&error), one_line(&error)),
            };
            return Ok(Ended {
                status,
                error,
                main,
            });
        }
    }

    /// To the end of one virtual machine.
    fn live_once(&self, mut life: Life) -> Result<(Arc<Session>, Result<Ending>)> {
        let is_probed = self
            .shared
            .read(|record| record.spec.options.health.is_some());
        self.shared.change(|state| {
            state.status = Status::Running;
            state.health = is_probed.then(Health::default);
            state.identity = life.identity();
        })?;
        self.shared.set_now(Now::Living {
            orders: life.orders(),
            main: Arc::clone(&life.main),
        });
        let watch = probe::watch(&self.shared)?;
        let lived = life.live();
        drop(watch);
        self.shared.set_now(Now::Between);
        Ok((life.bury()?, lived))
    }

    /// Of a container that is gone: the volumes that nobody gave a name.
    fn remove_volumes(&self) -> Result<()> {
        let record = self.shared.read(Record::clone);
        if record.spec.mounts.is_empty() {
            return Ok(());
        }
        Engine::open(&self.root)?.remove_anonymous_volumes(&record)
    }

    /// The end for good: the record first, then the lock, then whoever waits.
    fn end(&self, directory: &Directory, ownership: Ownership, ended: Result<Ended>) -> Result<()> {
        life::finish(&self.log);
        // Whoever hears of the end may want its ports.
        drop(lock(&self.network).take());
        let status = ended
            .as_ref()
            .map_or_else(exit_status, |ended| ended.status);
        let has_begun = ended.is_ok();
        // Whoever waits is told even if the disk is full.
        let written = self.shared.change(|state| {
            state.supervisor = None;
            state.exit_code = status;
            state.places.clear();
            state.ports.clear();
            if has_begun {
                state.status = Status::Exited;
                state.finished = Some(Timestamp::now());
            }
            state.error = match &ended {
                Ok(ended) => ended.error.clone(),
                Err(error) => one_line(error),
            };
        });
        let is_temporary = self.shared.read(|record| record.spec.auto_remove);
        // A fork that never began is nothing that anybody has asked to keep.
        let removed = if is_temporary || (self.is_fork && !has_begun) {
            // The directory first: on a full disk that makes room for the rest.
            directory
                .remove(ownership)
                .and_then(|()| self.shared.forget())
                .and_then(|()| self.remove_volumes())
        } else {
            drop(ownership);
            Ok(())
        };
        self.shared.set_now(Now::Over(status));
        match &ended {
            Ok(ended) => ended
                .main
                .farewell(status, &ended.error, None, &self.farewells)?,
            Err(error) => {
                // It may have gone.
                let mut starter = self.starter.try_clone().context("dup")?;
                wire::send(&mut starter, &failed(error)).ok();
            }
        }
        self.farewells.wait();
        written.and(removed)
    }
}

/// What a client is told of an error.
fn failed(error: &anyhow::Error) -> Answer {
    Answer::Failed {
        message: one_line(error),
        code: exit_status(error),
    }
}

fn one_line(error: &anyhow::Error) -> String {
    crate::line(error).replace('\n', " ")
}

fn exit_status(error: &anyhow::Error) -> u8 {
    crate::exit_code(error).unwrap_or(crate::FAILED)
}
