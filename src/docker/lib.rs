//! The Docker Engine API, over HTTP, for an engine, whichever it is.
//!
//! ```text
//! engine      what an engine has to be able to do      (the program's: `src/daemon/`)
//! server      connections, and their limits
//! version     which version a client speaks
//! routes      a path is a call of the engine's: system, containers, execs, images,
//!             networks, volumes
//! session     the streams of a process, over a connection that was taken from HTTP
//! query       what stands in an address
//! error       docker's statuses and messages
//! ```
//! Bodies have the types of docker's own description of its API (`bollard-stubs`), where
//! the engine does not give docker's objects already.

mod containers;
mod engine;
mod error;
mod execs;
mod images;
mod networks;
mod query;
mod routes;
mod server;
mod session;
mod system;
mod version;
mod volumes;

pub use bollard_stubs::models;
pub use engine::{
    Condition, Engine, Exit, Input, Logs, LogsOf, Output, Session, Stop, Waiting, Window,
};
pub use error::{Error, Result};
pub use server::{Limits, serve};
pub use version::{API_VERSION, API_VERSION_MIN};
