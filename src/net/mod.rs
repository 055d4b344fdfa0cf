//! The host's side of networking.
//!
//! ```text
//! cli         network create, ls, inspect, rm, connect, ...     (args: what run takes)
//! attachment  a container on its networks, and all that is made for it
//! host        bridges and rules, as the database says            (owner: who lives)
//! store       networks and endpoints                             (pool: their addresses)
//! firewall    what may go where, as plain rules                  (rules: into the kernel)
//! links       interfaces, addresses, routes                      (namespace, tap)
//! ports       published ports                                    (publish: as typed)
//! egress      what a container may reach                         (rates: how fast)
//! show        in docker's words
//! dns, proxy  what a container's supervisor serves               (names: who is who)
//! ```

mod attachment;
pub mod cli;
mod dns;
mod egress;
mod firewall;
mod host;
mod links;
mod names;
mod namespace;
mod owner;
mod pool;
mod ports;
mod proxy;
mod publish;
mod rates;
mod rules;
mod run_args;
mod service;
mod show;
mod store;
mod tap;
#[cfg(test)]
mod tests;
mod trial;

pub use attachment::{Attachment, Who};
pub use host::Host;
pub use publish::Publish;
pub use run_args::NetworkArgs;
pub use show::{describe, port_lines, ports_column};
pub use store::{DEFAULT, Store};
pub use trial::trial;

use egress::Egress;
use fork::RateLimits;
use ipnet::{Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};
use std::net::{IpAddr, Ipv4Addr};

/// How a container is connected, as it was asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Plan {
    /// None of them: no network at all.
    pub networks: Vec<Membership>,
    pub publish: Vec<Publish>,
    pub egress: Egress,
    pub rates: RateLimits,
}

/// A network that a container is to be on.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Membership {
    /// Its name.
    pub network: String,
    /// How else the container is called there.
    pub aliases: Vec<String>,
    /// At one address, and no other.
    pub ipv4: Option<Ipv4Addr>,
}

/// Where a container is on a network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// The network's name.
    pub network: String,
    pub network_id: String,
    pub ipv4: Ipv4Net,
    pub ipv6: Option<Ipv6Net>,
    /// The host's address on it.
    pub gateway: Option<IpAddr>,
    pub aliases: Vec<String>,
}

/// What a container is told of names.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Naming {
    /// Whom to ask.
    pub servers: Vec<String>,
    /// The domains in which names are looked for, if the container has not said which.
    pub search: Vec<String>,
    /// The resolver's options, likewise.
    pub options: Vec<String>,
    /// The host.
    pub gateway: Option<IpAddr>,
}

impl Naming {
    /// Where nobody but `dns` can be asked.
    pub fn without_network(dns: &[String]) -> Self {
        Self {
            servers: dns.to_vec(),
            ..Self::default()
        }
    }
}

impl Plan {
    /// To be on one network, and no more.
    pub fn of(network: &str) -> Self {
        Self {
            networks: vec![Membership {
                network: network.to_owned(),
                ..Membership::default()
            }],
            ..Self::default()
        }
    }

    /// Whether there is any network.
    pub fn is_connected(&self) -> bool {
        !self.networks.is_empty()
    }

    /// Whether all of it is the network that everybody is on who asks for none.
    pub fn is_default(&self) -> bool {
        self.networks.iter().all(Membership::is_default)
    }
}

impl Membership {
    /// Whether it is of that network.
    pub fn is_default(&self) -> bool {
        self.network == store::DEFAULT
    }
}
