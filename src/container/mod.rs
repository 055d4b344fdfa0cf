//! Containers: their records, their directories, and the processes that own them.
//!
//! ```text
//! engine      what can be done with containers, by whoever asks
//! record      what is kept of one                      (store: in a database)
//! directory   what belongs to one: lock, socket, disks, log
//! supervisor  the process that owns one while it lives
//! wire        what its clients say to it               (client: a session on a terminal)
//! fork        new ones that go on where one is
//! layers      its disk, which others may have parts of
//! files       what is done with its files                      (copy: to and from ours)
//! log         what it has said                         (logs: shown)
//! ```

mod capabilities;
pub mod cli;
mod client;
mod copy;
mod directory;
mod engine;
mod files;
mod fork;
mod health;
mod id;
mod inside;
mod keys;
mod layers;
mod log;
mod logs;
mod options;
mod record;
mod show;
mod signal;
mod store;
pub mod supervisor;
pub mod wire;

pub use capabilities::normalize as normalize_capability;
pub use engine::{Engine, Refused, SIGKILL};
pub use id::{check_name, is_id, new_id};
pub use inside::{changes, processes};
pub use keys::Keys;
pub use log::Output;
pub use logs::{Wanted, read as read_log};
pub use options::{HOST_GATEWAY, HealthCheck, Memory, Options, Ulimit};
pub use record::{Layer, LogLimits, Record, RestartPolicy, Spec, Status};
pub use show::{columns, object, status};
pub use signal::parse as parse_signal;

/// Its root file system, in its directory.
const ROOT: &str = "root";
/// Its writable layer.
const WRITABLE: &str = "writable";
/// What it has said.
const LOG: &str = "log";

/// Sets a variable; `NAME` alone takes the caller's value, or takes it out if the
/// caller has none.
pub fn set_env(env: &mut Vec<String>, word: &str) {
    let name = word.split('=').next().unwrap_or(word);
    env.retain(|e| e.split('=').next() != Some(name));
    if word.contains('=') {
        env.push(word.to_owned());
    } else if let Ok(value) = std::env::var(name) {
        env.push(format!("{name}={value}"));
    }
}
