//! The host's side of a container's network.

#[allow(dead_code, unused_imports, reason = "the supervisor is to run it")]
pub mod dns;
#[allow(dead_code, unused_imports, reason = "the supervisor is to run it")]
pub mod proxy;
mod service;
