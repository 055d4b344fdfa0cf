//! The calls of docker's API: what each is of the engine's.

use super::execs::{self, Execs};
use super::sessions::{self, Ends};
use super::waits::Waits;
use super::{describe, images, networks, words};
use crate::container::wire::{Answer, Request};
use crate::container::{
    self, Engine, Output as LogOutput, Record, Refused, SIGKILL, Status, Wanted, parse_signal,
};
use crate::image::Store;
use crate::image::error::ImageError;
use crate::lock::lock;
use crate::unfit::Unfit;
use anyhow::Result;
use docker_api::models::{
    ChangeType, ContainerCreateBody, ContainerCreateResponse, ContainerSummary,
    ContainerTopResponse, ExecConfig, ExecInspectResponse, FilesystemChange,
    ImageDeleteResponseItem, ImageSummary, NetworkConnectRequest, NetworkCreateRequest,
    NetworkDisconnectRequest, SystemInfo, SystemVersion,
};
use docker_api::{Condition, Error, Exit, Logs, LogsOf, Output, Session, Stop, Waiting, Window};
use fork::task::ChangeKind;
use serde_json::Value;
use std::collections::{HashMap, HashSet};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::mpsc;

/// How many lines of a log wait for a client.
const LINES: usize = 256;
/// How often it is looked whether a container that has ended is gone: at first, since most
/// of those for whose removal somebody waits are removed at once, and later.
const PAUSE: Duration = Duration::from_millis(20);
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// The status of a container that could not be started, if there is no better one.
const FAILED: u8 = 128;

/// The engine behind the API.
pub struct Api(Arc<Inner>);

struct Inner {
    root: PathBuf,
    waits: Waits,
    /// The ids of those for whose end a thread waits.
    watched: Mutex<HashSet<String>>,
    execs: Execs,
    /// Who has attached to a container before it was started, by its id.
    early: Mutex<HashMap<String, Vec<Early>>>,
}

struct Early {
    stdin: bool,
    ends: Ends,
}

impl Api {
    /// Of a state directory.
    ///
    /// # Errors
    /// One line.
    pub fn open(root: &Path) -> Result<Self> {
        Engine::open(root)?;
        Ok(Self(Arc::new(Inner {
            root: root.to_owned(),
            waits: Waits::default(),
            watched: Mutex::default(),
            execs: Execs::default(),
            early: Mutex::default(),
        })))
    }

    /// Does something with an engine.
    fn with<T>(&self, call: impl FnOnce(&Engine) -> Result<T>) -> Result<T, Error> {
        self.0.with(call)
    }

    /// The same with a container.
    fn of<T>(
        &self,
        container: &str,
        call: impl FnOnce(&Engine, Record) -> Result<T>,
    ) -> Result<T, Error> {
        self.with(|engine| call(engine, engine.find(container)?))
    }

    fn store(&self) -> Result<Store, Error> {
        Store::open(&self.0.root).map_err(images::refused)
    }
}

impl Inner {
    /// With one that is opened for it, as every command does: what killed processes have
    /// left is looked for then.
    fn with<T>(&self, call: impl FnOnce(&Engine) -> Result<T>) -> Result<T, Error> {
        let done = Engine::open(&self.root).and_then(|engine| call(&engine));
        done.map_err(refusal)
    }

    /// It has ended: whoever waits is told, also of its removal, which its supervisor sees
    /// to.
    fn ended(self: &Arc<Self>, id: &str, status: u8) {
        if !self.waits.ended(id, status.into()) {
            return;
        }
        let (this, id) = (Arc::clone(self), id.to_owned());
        let watching = sessions::thread("removal", move || {
            let mut pause = PAUSE;
            while this.waits.are_for_removal(&id) {
                if this.with(|engine| engine.find(&id)).is_err() {
                    this.waits.removed(&id);
                }
                std::thread::sleep(pause);
                pause = PAUSE_MAX.min(pause * 2);
            }
        });
        if let Err(error) = watching {
            log::warn!("{error:#}");
        }
    }

    /// Whoever waits for the end of a container that could not be started has waited
    /// enough.
    fn could_not_start(self: &Arc<Self>, engine: &Engine, record: &Record, why: &anyhow::Error) {
        engine.clean_up(record);
        let refused = why.downcast_ref::<Refused>();
        self.ended(&record.id, refused.map_or(FAILED, |refused| refused.code));
    }

    /// Waits for the end of a container that runs, in a thread: one, however many ask.
    fn watch(self: &Arc<Self>, record: Record) -> Result<()> {
        if !lock(&self.watched).insert(record.id.clone()) {
            return Ok(());
        }
        let this = Arc::clone(self);
        let id = record.id.clone();
        let watching = sessions::thread("wait", move || {
            let ended = this.with(|engine| engine.wait(&record));
            lock(&this.watched).remove(&record.id);
            match ended {
                Ok(status) => this.ended(&record.id, status),
                // It was removed with its end, and whoever was attached has told of that.
                Err(error) => log::debug!("{error}"),
            }
        });
        watching.inspect_err(|_| {
            lock(&self.watched).remove(&id);
        })
    }

    /// Gives a client the streams of a container that runs.
    fn join(self: &Arc<Self>, id: &str, ends: Ends, stream: UnixStream) -> Result<()> {
        let (this, id) = (Arc::clone(self), id.to_owned());
        ends.join(stream, move |status| {
            if let Some(status) = status {
                this.ended(&id, status);
            }
        })
    }
}

/// Docker's number for what the engine says.
fn refusal(error: anyhow::Error) -> Error {
    let message = capitalized(&crate::line(&error));
    if let Some(unfit) = error.downcast_ref::<Unfit>() {
        return match unfit.is_missing() {
            true => Error::not_found(message),
            false => Error::conflict(message),
        };
    }
    if let Some(refused) = error.downcast_ref::<Refused>() {
        // A command that is not there, or none: the client makes a status of the words.
        return match refused.code {
            126 | 127 => Error::bad_parameter(message),
            _ => Error::failed(message),
        };
    }
    match error.downcast::<ImageError>() {
        Ok(error) => images::refused(error),
        Err(_) => Error::failed(message),
    }
}

fn capitalized(text: &str) -> String {
    let mut chars = text.chars();
    match chars.next() {
        Some(first) => first.to_uppercase().chain(chars).collect(),
        None => String::new(),
    }
}

fn stop_request(how: &Stop) -> Result<Request, Error> {
    let bad = |error: anyhow::Error| Error::bad_parameter(format!("{error:#}"));
    let signal = how.signal.as_deref().map(parse_signal).transpose();
    Ok(Request::Stop {
        signal: signal.map_err(bad)?,
        // Docker's -1 is for ever.
        timeout: how
            .timeout
            .map(|seconds| u32::try_from(seconds).unwrap_or(u32::MAX)),
    })
}

impl docker_api::Engine for Api {
    fn version(&self) -> SystemVersion {
        describe::version()
    }

    fn info(&self) -> Result<SystemInfo, Error> {
        let records = self.with(Engine::list)?;
        let images = self.store()?.list().map_err(images::refused)?.len();
        Ok(describe::info(&self.0.root, &records, images))
    }

    fn create(
        &self,
        name: Option<String>,
        body: ContainerCreateBody,
    ) -> Result<ContainerCreateResponse, Error> {
        let words = words::of(name.as_deref(), &body)?;
        let is_watched = body.stdin_once.unwrap_or_default();
        let record =
            self.with(|engine| crate::run::create_of(engine, &words, is_watched, &self.0.root));
        let record = record.map_err(of_the_request)?;
        Ok(ContainerCreateResponse {
            id: record.id,
            warnings: Vec::new(),
        })
    }

    fn containers(&self) -> Result<Vec<ContainerSummary>, Error> {
        self.with(|engine| {
            let records = engine.list()?;
            records
                .iter()
                .map(|record| describe::summary(engine, record))
                .collect()
        })
    }

    fn inspect(&self, container: &str) -> Result<Value, Error> {
        self.of(container, |engine, record| {
            Ok(container::object(engine, &record))
        })
    }

    fn start(&self, container: &str) -> Result<bool, Error> {
        self.of(container, |engine, record| {
            if record.state.status.is_live() {
                return Ok(false);
            }
            let early = lock(&self.0.early).remove(&record.id).unwrap_or_default();
            let mut early = early.into_iter().filter(|one| !one.ends.are_alone());
            // The first is there from the first byte on.
            let started = match early.next() {
                None => engine.start(&record, None),
                Some(first) => engine
                    .start_attached(&record, None)
                    .and_then(|(stream, _)| self.0.join(&record.id, first.ends, stream)),
            };
            if let Err(error) = started {
                self.0.could_not_start(engine, &record, &error);
                return Err(error);
            }
            let Ok(now) = engine.find(&record.id) else {
                // It has ended, and is gone.
                return Ok(true);
            };
            for Early { stdin, ends } in early {
                if let Ok(stream) = engine.attach(&now, stdin) {
                    self.0.join(&record.id, ends, stream)?;
                }
            }
            self.0.watch(now)?;
            Ok(true)
        })
    }

    fn stop(&self, container: &str, how: &Stop) -> Result<bool, Error> {
        let request = stop_request(how)?;
        self.of(container, |engine, record| {
            let was_live = record.state.status.is_live();
            engine.end(&record, &request)?;
            Ok(was_live)
        })
    }

    fn restart(&self, container: &str, how: &Stop) -> Result<(), Error> {
        self.stop(container, how)?;
        self.start(container).map(drop)
    }

    fn kill(&self, container: &str, signal: Option<&str>) -> Result<(), Error> {
        let signal = signal.map_or(Ok(SIGKILL), parse_signal);
        let signal = signal.map_err(|error| Error::bad_parameter(format!("{error:#}")))?;
        self.of(container, |engine, record| engine.kill(&record, signal))
    }

    fn pause(&self, container: &str) -> Result<(), Error> {
        self.of(container, |engine, record| {
            if record.state.status == Status::Paused {
                let why = format!("container {container} is already paused");
                return Err(Unfit::conflict(why).into());
            }
            engine.ask(&record, &Request::Pause).map(drop)
        })
    }

    fn unpause(&self, container: &str) -> Result<(), Error> {
        self.of(container, |engine, record| {
            engine.ask(&record, &Request::Unpause).map(drop)
        })
    }

    fn rename(&self, container: &str, name: &str) -> Result<(), Error> {
        self.of(container, |engine, record| engine.rename(&record, name))
    }

    fn remove(&self, container: &str, force: bool, volumes: bool) -> Result<(), Error> {
        self.of(container, |engine, record| {
            engine.remove(&record, force)?;
            if volumes {
                engine.remove_anonymous_volumes(&record)?;
            }
            lock(&self.0.early).remove(&record.id);
            self.0.waits.removed(&record.id);
            Ok(())
        })
    }

    fn wait(&self, container: &str, condition: Condition) -> Result<Waiting, Error> {
        self.of(container, |_, record| {
            let is_live = record.state.status.is_live();
            if !is_live && condition == Condition::NotRunning {
                let (tell, waiting) = tokio::sync::oneshot::channel();
                let status = record.state.exit_code.into();
                // Its receiver is there.
                tell.send(Exit {
                    status,
                    error: None,
                })
                .ok();
                return Ok(waiting);
            }
            let waiting = self.0.waits.enter(&record.id, condition);
            if is_live {
                self.0.watch(record)?;
            }
            Ok(waiting)
        })
    }

    fn attach(&self, container: &str, stdin: bool) -> Result<Session, Error> {
        self.of(container, |engine, record| {
            let (session, ends) = sessions::pair(record.spec.tty);
            let stdin = stdin && record.spec.stdin;
            if !record.state.status.is_live() {
                let mut early = lock(&self.0.early);
                let early = early.entry(record.id).or_default();
                early.retain(|one| !one.ends.are_alone());
                early.push(Early { stdin, ends });
                return Ok(session);
            }
            let stream = engine.attach(&record, stdin)?;
            self.0.join(&record.id, ends, stream)?;
            Ok(session)
        })
    }

    fn resize(&self, container: &str, window: Window) -> Result<(), Error> {
        self.of(container, |engine, record| {
            // A client that says nothing else.
            sessions::resize(&mut engine.attach(&record, false)?, window)
        })
    }

    fn logs(&self, container: &str, of: LogsOf) -> Result<Logs, Error> {
        let record = self.with(|engine| engine.find(container))?;
        let tty = record.spec.tty;
        let wanted = Wanted {
            tail: of.tail,
            since: of.since,
            until: of.until,
            follow: of.follow,
        };
        let (tell, lines) = mpsc::channel(LINES);
        let this = Arc::clone(&self.0);
        let reading = move || {
            let read = this.with(|engine| {
                let is_gone = || tell.is_closed();
                container::read_log(engine, record, &wanted, is_gone, |entry| {
                    let line = entry.line(of.timestamps).into_bytes().into();
                    Ok(tell.blocking_send(match entry.stream {
                        LogOutput::Stdout => Output::Stdout(line),
                        LogOutput::Stderr => Output::Stderr(line),
                    })?)
                })
            });
            if let Err(error) = read {
                log::debug!("a log was not read to its end: {error}");
            }
        };
        sessions::thread("logs", reading).map_err(refusal)?;
        Ok(Logs { tty, lines })
    }

    fn top(&self, container: &str) -> Result<ContainerTopResponse, Error> {
        let table = self.of(container, |engine, record| {
            container::processes(engine, &record)
        })?;
        let mut rows = table.into_iter().map(Vec::from);
        Ok(ContainerTopResponse {
            titles: rows.next(),
            processes: Some(rows.collect()),
        })
    }

    fn stats(&self, container: &str) -> Result<Value, Error> {
        self.of(container, |engine, record| {
            let (answer, _) = engine.ask(&record, &Request::Stats)?;
            let Answer::Stats(stats) = answer else {
                anyhow::bail!("the supervisor speaks out of turn: {answer:?}");
            };
            Ok(describe::stats(&record, &stats))
        })
    }

    fn changes(&self, container: &str) -> Result<Vec<FilesystemChange>, Error> {
        let changes = self.of(container, |engine, record| {
            container::changes(engine, &record)
        })?;
        let change = |change: fork::task::Change| FilesystemChange {
            path: String::from_utf8_lossy(&change.path).into_owned(),
            kind: match change.kind {
                ChangeKind::Changed => ChangeType::_0,
                ChangeKind::Added => ChangeType::_1,
                ChangeKind::Deleted => ChangeType::_2,
            },
        };
        Ok(changes.into_iter().map(change).collect())
    }

    fn exec_create(&self, container: &str, exec: ExecConfig) -> Result<String, Error> {
        self.of(container, |_, record| match record.state.status {
            Status::Running => self.0.execs.make(&record, exec),
            Status::Paused => Err(Unfit::conflict(format!(
                "container {container} is paused, unpause the container before exec"
            ))
            .into()),
            _ => Err(Unfit::conflict(format!("container {} is not running", record.id)).into()),
        })
    }

    fn exec_start(
        &self,
        exec: &str,
        detach: bool,
        window: Option<Window>,
    ) -> Result<Option<Session>, Error> {
        let (one, request) = self.0.execs.take(exec, window)?;
        let (container, tty) = {
            let one = lock(&one);
            (one.container.clone(), one.tty())
        };
        let asked = self.of(&container, |engine, record| {
            match engine.ask(&record, &Request::Exec(request)) {
                // What cannot be started has ended, with docker's status.
                Err(error) => match error.downcast::<Refused>() {
                    Ok(refused) => Ok(Err(refused)),
                    Err(error) => Err(error),
                },
                Ok((_, stream)) => Ok(Ok(stream)),
            }
        });
        let stream = match asked.inspect_err(|_| execs::ended(&one, None))? {
            Ok(stream) => stream,
            Err(refused) => {
                execs::ended(&one, Some(refused.code));
                if detach {
                    return Err(refusal(refused.into()));
                }
                let (session, ends) = sessions::pair(tty);
                ends.say(format!("{refused}\r\n"));
                return Ok(Some(session));
            }
        };
        let own = stream.try_clone().map_err(|error| refusal(error.into()))?;
        execs::runs(&one, own);
        let ended = move |status| execs::ended(&one, status);
        match detach {
            true => sessions::drain(stream, ended)
                .map_err(refusal)
                .map(|()| None),
            false => {
                let (session, ends) = sessions::pair(tty);
                ends.join(stream, ended).map_err(refusal)?;
                Ok(Some(session))
            }
        }
    }

    fn exec_resize(&self, exec: &str, window: Window) -> Result<(), Error> {
        self.0.execs.resize(exec, window)
    }

    fn exec_inspect(&self, exec: &str) -> Result<ExecInspectResponse, Error> {
        self.0.execs.inspect(exec)
    }

    fn images(&self) -> Result<Vec<ImageSummary>, Error> {
        images::list(&self.store()?)
    }

    fn image(&self, image: &str) -> Result<Value, Error> {
        self.store()?.inspect(image).map_err(images::refused)
    }

    fn pull(&self, image: &str, auth: Option<&str>) -> Result<mpsc::Receiver<Value>, Error> {
        images::pull(&self.0.root, image, auth)
    }

    fn image_tag(&self, image: &str, name: &str) -> Result<(), Error> {
        self.store()?.tag(image, name).map_err(images::refused)
    }

    fn image_remove(
        &self,
        image: &str,
        _force: bool,
    ) -> Result<Vec<ImageDeleteResponseItem>, Error> {
        images::remove(&self.store()?, image)
    }

    fn networks(&self) -> Result<Vec<Value>, Error> {
        self.with(|_| networks::list(&self.0.root))
    }

    fn network(&self, network: &str) -> Result<Value, Error> {
        self.with(|_| networks::inspect(&self.0.root, network))
    }

    fn network_create(&self, request: NetworkCreateRequest) -> Result<String, Error> {
        self.with(|_| networks::create(&self.0.root, request))
            .map_err(of_the_request)
    }

    fn network_remove(&self, network: &str) -> Result<(), Error> {
        self.with(|engine| networks::remove(&self.0.root, engine, network))
    }

    fn network_connect(&self, network: &str, request: NetworkConnectRequest) -> Result<(), Error> {
        let endpoint = request.endpoint_config.unwrap_or_default();
        let (root, container) = (&self.0.root, &request.container);
        self.with(|engine| networks::connect(root, engine, network, container, &endpoint))
            .map_err(of_the_request)
    }

    fn network_disconnect(
        &self,
        network: &str,
        request: NetworkDisconnectRequest,
    ) -> Result<(), Error> {
        let (root, container) = (&self.0.root, &request.container);
        self.with(|engine| networks::disconnect(root, engine, network, container))
            .map_err(of_the_request)
    }

    fn volumes(&self) -> Result<Vec<Value>, Error> {
        self.with(|_| networks::volumes(&self.0.root))
    }

    fn volume(&self, name: &str) -> Result<Value, Error> {
        self.with(|_| networks::volume(&self.0.root, name))
    }

    fn volume_create(&self, name: Option<String>) -> Result<Value, Error> {
        self.with(|_| networks::make_volume(&self.0.root, name))
            .map_err(of_the_request)
    }

    fn volume_remove(&self, name: &str, force: bool) -> Result<(), Error> {
        self.with(|engine| networks::remove_volume(&self.0.root, engine, name, force))
    }
}

/// What is wrong with what was asked for is no failure of ours.
fn of_the_request(error: Error) -> Error {
    match error.status() {
        500 => Error::bad_parameter(error.to_string()),
        _ => error,
    }
}
