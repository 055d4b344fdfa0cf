//! What was made to be started in a container, and what became of it. In memory: docker
//! forgets them with the daemon too.

use super::sessions;
use crate::container::Record;
use crate::container::wire::Exec;
use crate::lock::lock;
use anyhow::Result;
use docker_api::models::{ExecConfig, ExecInspectResponse, ProcessConfig};
use docker_api::{Error, Window};
use std::collections::HashMap;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

/// The most that are kept: those that have ended go first.
const KEPT: usize = 4096;

/// All of them, by their ids.
#[derive(Default)]
pub struct Execs(Mutex<Table>);

#[derive(Default)]
struct Table {
    all: HashMap<String, Arc<Mutex<One>>>,
    /// The oldest first.
    order: Vec<String>,
}

/// One of them.
pub struct One {
    /// The container's id.
    pub container: String,
    config: ExecConfig,
    stage: Stage,
}

enum Stage {
    Made,
    Starting,
    /// With its session, for the size of its terminal.
    Running(UnixStream),
    Ended(u8),
}

impl One {
    /// What the supervisor is asked for.
    fn request(&self, window: Option<Window>) -> Exec {
        let config = &self.config;
        let mut env = config.env.clone().unwrap_or_default();
        // Not the daemon's own.
        env.retain(|word| word.contains('='));
        let tty = config.tty.unwrap_or_default();
        if tty && !env.iter().any(|word| word.starts_with("TERM=")) {
            env.push("TERM=xterm".into());
        }
        let given = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
        Exec {
            args: config.cmd.clone().unwrap_or_default(),
            env,
            cwd: given(&config.working_dir),
            user: given(&config.user),
            tty,
            stdin: config.attach_stdin.unwrap_or_default(),
            // Somebody has to know how it ends.
            detach: false,
            window: window
                .map(|window| crate::container::wire::Window::of(window.rows, window.cols)),
            privileged: config.privileged.unwrap_or_default(),
        }
    }

    /// Whether it is on a terminal.
    pub fn tty(&self) -> bool {
        self.config.tty.unwrap_or_default()
    }

    fn inspect(&self, id: &str) -> ExecInspectResponse {
        let config = &self.config;
        let mut words = config.cmd.clone().unwrap_or_default().into_iter();
        let attached = |stream: Option<bool>| Some(stream.unwrap_or_default());
        ExecInspectResponse {
            can_remove: Some(false),
            detach_keys: Some(String::new()),
            id: Some(id.to_owned()),
            running: Some(matches!(self.stage, Stage::Running(_) | Stage::Starting)),
            exit_code: match self.stage {
                Stage::Ended(status) => Some(status.into()),
                _ => None,
            },
            process_config: Some(ProcessConfig {
                privileged: config.privileged,
                user: config.user.clone(),
                tty: Some(self.tty()),
                entrypoint: words.next(),
                arguments: Some(words.collect()),
            }),
            open_stdin: attached(config.attach_stdin),
            open_stderr: attached(config.attach_stderr),
            open_stdout: attached(config.attach_stdout),
            container_id: Some(self.container.clone()),
            // It has none on the host.
            pid: Some(0),
        }
    }
}

impl Execs {
    /// Keeps it, and gives its id.
    ///
    /// # Errors
    /// No random numbers.
    pub fn make(&self, record: &Record, config: ExecConfig) -> Result<String> {
        let id = crate::container::new_id()?;
        let one = One {
            container: record.id.clone(),
            config,
            stage: Stage::Made,
        };
        let mut table = lock(&self.0);
        table.make_room();
        table.order.push(id.clone());
        table.all.insert(id.clone(), Arc::new(Mutex::new(one)));
        Ok(id)
    }

    /// Takes what is to be started; nobody else gets it.
    ///
    /// # Errors
    /// None of that id, or one that was started already.
    pub fn take(&self, id: &str, window: Option<Window>) -> Result<(Arc<Mutex<One>>, Exec), Error> {
        let one = self.find(id)?;
        let mut locked = lock(&one);
        if !matches!(locked.stage, Stage::Made) {
            return Err(Error::conflict(format!(
                "exec command {id} is already running"
            )));
        }
        locked.stage = Stage::Starting;
        let request = locked.request(window);
        drop(locked);
        Ok((one, request))
    }

    /// # Errors
    /// None of that id.
    pub fn inspect(&self, id: &str) -> Result<ExecInspectResponse, Error> {
        Ok(lock(&*self.find(id)?).inspect(id))
    }

    /// Tells its terminal its size.
    ///
    /// # Errors
    /// None of that id, or one that does not run.
    pub fn resize(&self, id: &str, window: Window) -> Result<(), Error> {
        let one = self.find(id)?;
        let mut one = lock(&one);
        match &mut one.stage {
            Stage::Running(stream) => sessions::resize(stream, window)
                .map_err(|error| Error::failed(format!("{error:#}"))),
            _ => Err(Error::conflict(format!("exec process {id} is not running"))),
        }
    }

    fn find(&self, id: &str) -> Result<Arc<Mutex<One>>, Error> {
        let found = lock(&self.0).all.get(id).cloned();
        found.ok_or_else(|| Error::not_found(format!("No such exec instance: {id}")))
    }
}

impl Table {
    fn make_room(&mut self) {
        while self.order.len() >= KEPT {
            let ended = |id: &String| {
                let one = self.all.get(id);
                one.is_none_or(|one| matches!(lock(one).stage, Stage::Ended(_)))
            };
            let at = self.order.iter().position(ended).unwrap_or(0);
            let id = self.order.remove(at);
            self.all.remove(&id);
        }
    }
}

/// It runs, at the other end of this.
pub fn runs(one: &Mutex<One>, stream: UnixStream) {
    lock(one).stage = Stage::Running(stream);
}

/// It has ended, or could not be started.
pub fn ended(one: &Mutex<One>, status: Option<u8>) {
    // A supervisor that has gone took it along.
    lock(one).stage = Stage::Ended(status.unwrap_or(128 + 9));
}
