//! What an engine has to be able to do. Its calls may block: each is made on a thread for
//! that. Containers are named as people name them: by a name, an id, or the beginning of one.

use crate::error::Result;
use bollard_stubs::models::{
    ContainerCreateBody, ContainerCreateResponse, ContainerSummary, ContainerTopResponse,
    ExecConfig, ExecInspectResponse, FilesystemChange, ImageDeleteResponseItem, ImageSummary,
    NetworkConnectRequest, NetworkCreateRequest, NetworkDisconnectRequest, SystemInfo,
    SystemVersion,
};
use bytes::Bytes;
use serde_json::Value;
use tokio::sync::{mpsc, oneshot};

/// What a process has said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// On its standard output, or its terminal.
    Stdout(Bytes),
    /// On its standard error.
    Stderr(Bytes),
}

/// What a process is given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// On its standard input.
    Bytes(Bytes),
    /// There will be no more.
    End,
}

/// The streams of a process. Both are bounded: who does not read holds up the process, and
/// nobody else.
#[derive(Debug)]
pub struct Session {
    /// Whether it is on a terminal.
    pub tty: bool,
    /// What it says; ends with it.
    pub output: mpsc::Receiver<Output>,
    /// What it hears.
    pub input: mpsc::Sender<Input>,
}

/// What of a container's log is wanted, of both its outputs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LogsOf {
    /// Until the container ends, and not only what is there.
    pub follow: bool,
    /// With the time before each line.
    pub timestamps: bool,
    /// The last so many lines; all without.
    pub tail: Option<usize>,
    /// From then on, in docker's notation.
    pub since: Option<String>,
    /// Until then.
    pub until: Option<String>,
}

/// A log that is being read.
#[derive(Debug)]
pub struct Logs {
    /// Whether the container is on a terminal.
    pub tty: bool,
    /// Its lines.
    pub lines: mpsc::Receiver<Output>,
}

/// What is waited for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Condition {
    /// It does not run.
    #[default]
    NotRunning,
    /// It has ended once more.
    NextExit,
    /// It is gone.
    Removed,
}

/// How a container has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exit {
    /// Its status.
    pub status: i64,
    /// Why it could not be waited for, if so.
    pub error: Option<String>,
}

/// The end of a container, some time.
pub type Waiting = oneshot::Receiver<Exit>;

/// How a container is ended.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stop {
    /// By this signal and not its own.
    pub signal: Option<String>,
    /// So many seconds before it is killed; for ever if negative.
    pub timeout: Option<i64>,
}

/// The size of a terminal in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// Lines.
    pub rows: u16,
    /// Columns.
    pub cols: u16,
}

/// An engine. All errors have docker's status.
#[allow(missing_docs)] // Each is the call of docker's API of that name.
pub trait Engine: Send + Sync + 'static {
    fn version(&self) -> SystemVersion;
    fn info(&self) -> Result<SystemInfo>;

    fn create(
        &self,
        name: Option<String>,
        body: ContainerCreateBody,
    ) -> Result<ContainerCreateResponse>;
    /// All of them, the newest first.
    fn containers(&self) -> Result<Vec<ContainerSummary>>;
    /// Docker's object.
    fn inspect(&self, container: &str) -> Result<Value>;
    /// False if it runs already.
    fn start(&self, container: &str) -> Result<bool>;
    /// False if it does not run.
    fn stop(&self, container: &str, how: &Stop) -> Result<bool>;
    fn restart(&self, container: &str, how: &Stop) -> Result<()>;
    fn kill(&self, container: &str, signal: Option<&str>) -> Result<()>;
    fn pause(&self, container: &str) -> Result<()>;
    fn unpause(&self, container: &str) -> Result<()>;
    fn rename(&self, container: &str, name: &str) -> Result<()>;
    fn remove(&self, container: &str, force: bool, volumes: bool) -> Result<()>;
    fn wait(&self, container: &str, condition: Condition) -> Result<Waiting>;
    /// Of one that does not run yet: from its start on.
    fn attach(&self, container: &str, stdin: bool) -> Result<Session>;
    fn resize(&self, container: &str, window: Window) -> Result<()>;
    fn logs(&self, container: &str, of: LogsOf) -> Result<Logs>;
    fn top(&self, container: &str) -> Result<ContainerTopResponse>;
    /// Docker's object, as of now.
    fn stats(&self, container: &str) -> Result<Value>;
    fn changes(&self, container: &str) -> Result<Vec<FilesystemChange>>;

    /// The id of what is to be started.
    fn exec_create(&self, container: &str, exec: ExecConfig) -> Result<String>;
    /// Its streams, unless nobody is to see them.
    fn exec_start(
        &self,
        exec: &str,
        detach: bool,
        window: Option<Window>,
    ) -> Result<Option<Session>>;
    fn exec_resize(&self, exec: &str, window: Window) -> Result<()>;
    fn exec_inspect(&self, exec: &str) -> Result<ExecInspectResponse>;

    fn images(&self) -> Result<Vec<ImageSummary>>;
    /// Docker's object.
    fn image(&self, image: &str) -> Result<Value>;
    /// Docker's objects of progress, until it is done; a failure is the last.
    fn pull(&self, image: &str, auth: Option<&str>) -> Result<mpsc::Receiver<Value>>;
    fn image_tag(&self, image: &str, name: &str) -> Result<()>;
    fn image_remove(&self, image: &str, force: bool) -> Result<Vec<ImageDeleteResponseItem>>;

    /// Docker's objects.
    fn networks(&self) -> Result<Vec<Value>>;
    fn network(&self, network: &str) -> Result<Value>;
    /// Its id.
    fn network_create(&self, request: NetworkCreateRequest) -> Result<String>;
    fn network_remove(&self, network: &str) -> Result<()>;
    fn network_connect(&self, network: &str, request: NetworkConnectRequest) -> Result<()>;
    fn network_disconnect(&self, network: &str, request: NetworkDisconnectRequest) -> Result<()>;

    /// Docker's objects.
    fn volumes(&self) -> Result<Vec<Value>>;
    fn volume(&self, name: &str) -> Result<Value>;
    /// Without a name, one that is made up. One that is there stays as it is.
    fn volume_create(&self, name: Option<String>) -> Result<Value>;
    fn volume_remove(&self, name: &str, force: bool) -> Result<()>;
}
