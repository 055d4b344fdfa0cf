//! An engine whose containers are rows of a table, and whose processes say in capitals what
//! they hear.

use bytes::Bytes;
use docker_api::models::{
    ContainerCreateBody, ContainerCreateResponse, ContainerSummary, ContainerTopResponse,
    ExecConfig, ExecInspectResponse, FilesystemChange, ImageDeleteResponseItem, ImageSummary,
    NetworkConnectRequest, NetworkCreateRequest, NetworkDisconnectRequest, SystemInfo,
    SystemVersion,
};
use docker_api::{
    Condition, Engine, Error, Exit, Input, Logs, LogsOf, Output, Result, Session, Stop, Waiting,
    Window,
};
use serde_json::{Value, json};
use std::sync::{Mutex, MutexGuard};
use tokio::sync::{mpsc, oneshot};

#[derive(Default)]
pub struct Fake(Mutex<State>);

#[derive(Default)]
struct State {
    containers: Vec<Container>,
    execs: Vec<String>,
    made: usize,
}

struct Container {
    id: String,
    name: String,
    body: ContainerCreateBody,
    state: &'static str,
    status: i64,
    waiting: Vec<oneshot::Sender<Exit>>,
}

impl Fake {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("no test panics with it")
    }

    fn with<T>(&self, wanted: &str, act: impl FnOnce(&mut Container) -> Result<T>) -> Result<T> {
        let mut state = self.lock();
        let found = state
            .containers
            .iter_mut()
            .find(|one| one.id == wanted || one.name == wanted);
        act(found.ok_or_else(|| Error::not_found(format!("No such container: {wanted}")))?)
    }

    /// Its process has ended.
    pub fn end(&self, container: &str, status: i64) {
        let end = |one: &mut Container| {
            (one.state, one.status) = ("exited", status);
            for waiting in one.waiting.drain(..) {
                waiting
                    .send(Exit {
                        status,
                        error: None,
                    })
                    .ok();
            }
            Ok(())
        };
        self.with(container, end).expect("is there");
    }
}

/// A process that says in capitals what it hears, and ends with its input.
fn echo(tty: bool) -> Session {
    let (said, output) = mpsc::channel(4);
    let (input, mut heard) = mpsc::channel(4);
    std::thread::spawn(move || {
        while let Some(Input::Bytes(bytes)) = heard.blocking_recv() {
            let bytes: Bytes = bytes.to_ascii_uppercase().into();
            if said.blocking_send(Output::Stdout(bytes)).is_err() {
                return;
            }
        }
    });
    Session { tty, output, input }
}

impl Engine for Fake {
    fn version(&self) -> SystemVersion {
        SystemVersion {
            api_version: Some(docker_api::API_VERSION.into()),
            ..SystemVersion::default()
        }
    }

    fn info(&self) -> Result<SystemInfo> {
        Ok(SystemInfo::default())
    }

    fn create(
        &self,
        name: Option<String>,
        body: ContainerCreateBody,
    ) -> Result<ContainerCreateResponse> {
        let mut state = self.lock();
        state.made += 1;
        let id = format!("{:064x}", state.made);
        let name = name.unwrap_or_else(|| format!("made-{}", state.made));
        if state.containers.iter().any(|one| one.name == name) {
            return Err(Error::conflict(format!("The name {name} is taken")));
        }
        state.containers.push(Container {
            id: id.clone(),
            name,
            body,
            state: "created",
            status: 0,
            waiting: Vec::new(),
        });
        Ok(ContainerCreateResponse {
            id,
            warnings: Vec::new(),
        })
    }

    fn containers(&self) -> Result<Vec<ContainerSummary>> {
        let state = self.lock();
        let all = state.containers.iter().map(|one| {
            json!({
                "Id": one.id,
                "Names": [format!("/{}", one.name)],
                "Image": one.body.image,
                "Labels": one.body.labels,
                "State": one.state,
            })
        });
        Ok(serde_json::from_value(all.collect()).expect("summaries"))
    }

    fn inspect(&self, container: &str) -> Result<Value> {
        self.with(container, |one| Ok(json!({ "Id": one.id })))
    }

    fn start(&self, container: &str) -> Result<bool> {
        self.with(container, |one| {
            let was = std::mem::replace(&mut one.state, "running");
            Ok(was != "running")
        })
    }

    fn stop(&self, container: &str, _how: &Stop) -> Result<bool> {
        self.with(container, |one| {
            let was = std::mem::replace(&mut one.state, "exited");
            Ok(was == "running")
        })
    }

    fn restart(&self, container: &str, _how: &Stop) -> Result<()> {
        self.start(container).map(drop)
    }

    fn kill(&self, container: &str, _signal: Option<&str>) -> Result<()> {
        self.stop(container, &Stop::default()).map(drop)
    }

    fn pause(&self, container: &str) -> Result<()> {
        self.with(container, |_| Ok(()))
    }

    fn unpause(&self, container: &str) -> Result<()> {
        self.with(container, |_| Ok(()))
    }

    fn rename(&self, container: &str, name: &str) -> Result<()> {
        self.with(container, |one| {
            one.name = name.to_owned();
            Ok(())
        })
    }

    fn remove(&self, container: &str, _force: bool, _volumes: bool) -> Result<()> {
        let id = self.with(container, |one| Ok(one.id.clone()))?;
        self.lock().containers.retain(|one| one.id != id);
        Ok(())
    }

    fn wait(&self, container: &str, _condition: Condition) -> Result<Waiting> {
        self.with(container, |one| {
            let (tell, waiting) = oneshot::channel();
            one.waiting.push(tell);
            Ok(waiting)
        })
    }

    fn attach(&self, container: &str, _stdin: bool) -> Result<Session> {
        self.with(container, |one| Ok(echo(one.body.tty == Some(true))))
    }

    fn resize(&self, container: &str, _window: Window) -> Result<()> {
        self.with(container, |_| Ok(()))
    }

    fn logs(&self, container: &str, _of: LogsOf) -> Result<Logs> {
        let (_, lines) = mpsc::channel(1);
        self.with(container, |_| Ok(Logs { tty: false, lines }))
    }

    fn top(&self, container: &str) -> Result<ContainerTopResponse> {
        self.with(container, |_| Ok(ContainerTopResponse::default()))
    }

    fn stats(&self, container: &str) -> Result<Value> {
        self.with(container, |one| Ok(json!({ "id": one.id })))
    }

    fn changes(&self, container: &str) -> Result<Vec<FilesystemChange>> {
        self.with(container, |_| Ok(Vec::new()))
    }

    fn exec_create(&self, container: &str, _exec: ExecConfig) -> Result<String> {
        self.with(container, |_| Ok(()))?;
        let mut state = self.lock();
        let id = format!("exec-{}", state.execs.len());
        state.execs.push(id.clone());
        Ok(id)
    }

    fn exec_start(&self, exec: &str, detach: bool, _: Option<Window>) -> Result<Option<Session>> {
        if !self.lock().execs.iter().any(|one| one == exec) {
            return Err(Error::not_found(format!("No such exec instance: {exec}")));
        }
        Ok((!detach).then(|| echo(false)))
    }

    fn exec_resize(&self, _exec: &str, _window: Window) -> Result<()> {
        Ok(())
    }

    fn exec_inspect(&self, _exec: &str) -> Result<ExecInspectResponse> {
        Ok(ExecInspectResponse::default())
    }

    fn images(&self) -> Result<Vec<ImageSummary>> {
        Ok(Vec::new())
    }

    fn image(&self, image: &str) -> Result<Value> {
        Err(Error::not_found(format!("No such image: {image}")))
    }

    fn pull(&self, _image: &str, _auth: Option<&str>) -> Result<mpsc::Receiver<Value>> {
        let (_, told) = mpsc::channel(1);
        Ok(told)
    }

    fn image_tag(&self, _image: &str, _name: &str) -> Result<()> {
        Ok(())
    }

    fn image_remove(&self, _image: &str, _force: bool) -> Result<Vec<ImageDeleteResponseItem>> {
        Ok(Vec::new())
    }

    fn networks(&self) -> Result<Vec<Value>> {
        Ok(vec![
            json!({ "Name": "bridge", "Labels": { "a": "b" } }),
            json!({ "Name": "own" }),
        ])
    }

    fn network(&self, network: &str) -> Result<Value> {
        Err(Error::not_found(format!("network {network} not found")))
    }

    fn network_create(&self, request: NetworkCreateRequest) -> Result<String> {
        Ok(request.name)
    }

    fn network_remove(&self, network: &str) -> Result<()> {
        self.network(network).map(drop)
    }

    fn network_connect(&self, _network: &str, request: NetworkConnectRequest) -> Result<()> {
        self.with(&request.container, |_| Ok(()))
    }

    fn network_disconnect(&self, _network: &str, request: NetworkDisconnectRequest) -> Result<()> {
        self.with(&request.container, |_| Ok(()))
    }

    fn volumes(&self) -> Result<Vec<Value>> {
        Ok(vec![json!({ "Name": "v", "Driver": "local" })])
    }

    fn volume(&self, name: &str) -> Result<Value> {
        Err(Error::not_found(format!("get {name}: no such volume")))
    }

    fn volume_create(&self, name: Option<String>) -> Result<Value> {
        Ok(json!({ "Name": name }))
    }

    fn volume_remove(&self, name: &str, force: bool) -> Result<()> {
        match force {
            true => Ok(()),
            false => self.volume(name).map(drop),
        }
    }
}
