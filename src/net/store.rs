//! The networks there are, and who is on them: one database in the state directory.
//!
//! An endpoint is written before anything of it is made on the host, and forgotten when all
//! of it is gone: what is found here of a container that nobody owns is what a killed
//! process has left.

use super::pool;
use super::publish::Publish;
use crate::container::{check_name, new_id};
use crate::database;
use crate::unfit::Unfit;
use anyhow::{Context, Result, bail};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use rusqlite::{Connection, OptionalExtension, Row, TransactionBehavior, params};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::Path;

const TABLES: &str = "CREATE TABLE network (
    id   TEXT PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    spec TEXT NOT NULL,
    last INTEGER NOT NULL
) STRICT;
CREATE TABLE endpoint (
    network TEXT NOT NULL REFERENCES network(id),
    owner   TEXT NOT NULL,
    name    TEXT NOT NULL,
    aliases TEXT NOT NULL,
    ipv4    INTEGER NOT NULL,
    ipv6    TEXT,
    ports   TEXT NOT NULL,
    PRIMARY KEY (network, owner),
    UNIQUE (network, ipv4)
) STRICT;";

/// The network of a container that asks for none: made when it is first used.
pub const DEFAULT: &str = "bridge";

/// Names that mean something else.
const RESERVED: [&str; 4] = ["none", "host", "default", "container"];

/// A network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Network {
    /// 64 hexadecimal digits.
    pub id: String,
    pub name: String,
    pub spec: NetworkSpec,
}

/// What was asked for when it was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkSpec {
    pub created: jiff::Timestamp,
    pub ipv4: Ipv4Net,
    pub ipv6: Option<Ipv6Net>,
    /// Whether there is no way out.
    pub internal: bool,
    /// Whether the host's own services can be reached.
    #[serde(default)]
    pub host_access: bool,
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
}

impl Network {
    /// Its bridge on the host. The id is at random, so no other state directory has it.
    pub fn bridge(&self) -> String {
        format!("{}{}", super::firewall::BRIDGES, &self.id[..10])
    }

    /// The host's addresses on it, with the lengths of their nets.
    pub fn gateways(&self) -> impl Iterator<Item = IpNet> {
        let ipv4 = Ipv4Net::new_assert(first(self.spec.ipv4), self.spec.ipv4.prefix_len());
        let ipv6 = self.spec.ipv6.map(|net| {
            let first = Ipv6Addr::from_bits(net.network().to_bits() | 1);
            Ipv6Net::new_assert(first, net.prefix_len())
        });
        [Some(IpNet::V4(ipv4)), ipv6.map(IpNet::V6)]
            .into_iter()
            .flatten()
    }

    /// What it is made of.
    pub fn nets(&self) -> impl Iterator<Item = IpNet> {
        let ipv6 = self.spec.ipv6.map(IpNet::V6);
        [Some(IpNet::V4(self.spec.ipv4)), ipv6]
            .into_iter()
            .flatten()
    }

    /// Whether containers find each other by name: not on the default one, as in docker.
    pub fn has_names(&self) -> bool {
        self.name != DEFAULT
    }
}

fn first(net: Ipv4Net) -> Ipv4Addr {
    Ipv4Addr::from_bits(net.network().to_bits() | 1)
}

/// A container on a network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// The network's id.
    pub network: String,
    /// Whose it is: see [`super::owner`].
    pub owner: String,
    /// The container's name.
    pub name: String,
    /// How else it is called there.
    pub aliases: Vec<String>,
    pub ipv4: Ipv4Addr,
    pub ipv6: Option<Ipv6Addr>,
    /// The host's ports that lead to it.
    pub ports: Vec<Publish>,
}

/// An endpoint that is to be.
pub struct Join<'a> {
    pub network: &'a Network,
    pub owner: &'a str,
    pub name: &'a str,
    pub aliases: &'a [String],
    /// One that was asked for.
    pub ipv4: Option<Ipv4Addr>,
}

/// The database.
pub struct Store(Connection);

impl Store {
    /// Opens that of the state directory `root`, making it if need be.
    ///
    /// # Errors
    /// One line.
    pub fn open(root: &Path) -> Result<Self> {
        database::open(&root.join("networks.db"), TABLES).map(Self)
    }

    /// Makes a network. Nothing of it is on the host before a container is on it.
    ///
    /// # Errors
    /// A name that is taken or none, or nets that overlap with others.
    pub fn create(&mut self, name: &str, wanted: &pool::Wanted) -> Result<Network> {
        check_name(name).map_err(|_| {
            anyhow::anyhow!("{name:?} is no name of a network: two or more letters, digits, _ . -")
        })?;
        if RESERVED.contains(&name) {
            bail!("{name} means something else: choose another name");
        }
        let change = self
            .0
            .transaction_with_behavior(TransactionBehavior::Immediate)?;
        let all = networks(&change)?;
        if all.iter().any(|network| network.name == name) {
            return Err(Unfit::conflict(format!("there is a network {name} already")).into());
        }
        let taken: Vec<IpNet> = all.iter().flat_map(Network::nets).collect();
        let id = new_id()?;
        let spec = wanted.spec(&id, &taken)?;
        change.execute(
            "INSERT INTO network (id, name, spec, last) VALUES (?1, ?2, ?3, 0)",
            (&id, name, serde_json::to_string(&spec)?),
        )?;
        change.commit()?;
        let name = name.to_owned();
        Ok(Network { id, name, spec })
    }

    /// The network of a name, or of the beginning of an id.
    ///
    /// # Errors
    /// None, or several.
    pub fn find(&self, wanted: &str) -> Result<Network> {
        let all = self.list()?;
        if let Some(named) = all.iter().find(|network| network.name == wanted) {
            return Ok(named.clone());
        }
        let mut found = all
            .into_iter()
            .filter(|network| wanted.len() >= 2 && network.id.starts_with(wanted));
        match (found.next(), found.next()) {
            (Some(one), None) => Ok(one),
            (Some(_), Some(_)) => bail!("{wanted} is the beginning of more than one id"),
            (None, _) => Err(Unfit::missing(format!(
                "there is no network {wanted}: make one with `network create`"
            ))
            .into()),
        }
    }

    /// The same; the default one is made if it is not there.
    ///
    /// # Errors
    /// As [`Self::find`].
    pub fn find_or_default(&mut self, wanted: &str) -> Result<Network> {
        if wanted == DEFAULT
            && !self.list()?.iter().any(|network| network.name == wanted)
            && let Err(error) = self.create(DEFAULT, &pool::Wanted::default())
        {
            // Somebody else may have been faster.
            return self.find(wanted).map_err(|_| error);
        }
        self.find(wanted)
    }

    /// All networks, by name.
    ///
    /// # Errors
    /// The database's.
    pub fn list(&self) -> Result<Vec<Network>> {
        networks(&self.0)
    }

    /// Replaces what a network is.
    ///
    /// # Errors
    /// The database's.
    pub fn set_spec(&self, network: &Network) -> Result<()> {
        self.0.execute(
            "UPDATE network SET spec = ?2 WHERE id = ?1",
            (&network.id, serde_json::to_string(&network.spec)?),
        )?;
        Ok(())
    }

    /// Forgets a network.
    ///
    /// # Errors
    /// One that a container is on.
    pub fn remove(&mut self, network: &Network) -> Result<()> {
        let change = self
            .0
            .transaction_with_behavior(TransactionBehavior::Immediate)?;
        let on_it: Option<String> = change
            .query_row(
                "SELECT name FROM endpoint WHERE network = ?1",
                [&network.id],
                |row| row.get(0),
            )
            .optional()?;
        if let Some(container) = on_it {
            return Err(Unfit::conflict(format!(
                "network {} is in use by container {container}: stop or disconnect it first",
                network.name
            ))
            .into());
        }
        change.execute("DELETE FROM network WHERE id = ?1", [&network.id])?;
        Ok(change.commit()?)
    }

    /// Puts a container on a network, at an address that is free.
    ///
    /// # Errors
    /// An address that is not, or none left.
    pub fn join(&mut self, join: &Join<'_>) -> Result<Endpoint> {
        let Join {
            network,
            ipv4,
            name,
            ..
        } = join;
        let change = self
            .0
            .transaction_with_behavior(TransactionBehavior::Immediate)?;
        let taken: BTreeSet<u32> = {
            let mut ask = change.prepare("SELECT ipv4 FROM endpoint WHERE network = ?1")?;
            let rows = ask.query_map([&network.id], |row| row.get(0))?;
            rows.collect::<rusqlite::Result<_>>()?
        };
        let last: u32 = change.query_row(
            "SELECT last FROM network WHERE id = ?1",
            [&network.id],
            |row| row.get(0),
        )?;
        let ipv4 = match ipv4 {
            Some(wanted) => checked_address(network, *wanted, &taken)?,
            None => free_address(network, last, &taken)?,
        };
        let endpoint = Endpoint {
            network: network.id.clone(),
            owner: join.owner.to_owned(),
            name: (*name).to_owned(),
            aliases: join.aliases.to_vec(),
            ipv4,
            ipv6: network.spec.ipv6.map(|net| beside(net, ipv4, network)),
            ports: Vec::new(),
        };
        change.execute(
            "INSERT INTO endpoint (network, owner, name, aliases, ipv4, ipv6, ports)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, '[]')",
            params![
                endpoint.network,
                endpoint.owner,
                endpoint.name,
                serde_json::to_string(&endpoint.aliases)?,
                ipv4.to_bits(),
                endpoint.ipv6.map(|address| address.to_string()),
            ],
        )?;
        change.execute(
            "UPDATE network SET last = ?2 WHERE id = ?1",
            (&network.id, ipv4.to_bits()),
        )?;
        change.commit()?;
        Ok(endpoint)
    }

    /// Writes which ports of the host lead to an endpoint.
    ///
    /// # Errors
    /// The database's.
    pub fn set_ports(&self, endpoint: &Endpoint) -> Result<()> {
        self.0.execute(
            "UPDATE endpoint SET ports = ?3 WHERE network = ?1 AND owner = ?2",
            (
                &endpoint.network,
                &endpoint.owner,
                serde_json::to_string(&endpoint.ports)?,
            ),
        )?;
        Ok(())
    }

    /// Gives a container another name on all networks.
    ///
    /// # Errors
    /// The database's.
    pub fn rename(&self, owner: &str, name: &str) -> Result<()> {
        self.0.execute(
            "UPDATE endpoint SET name = ?2 WHERE owner = ?1",
            (owner, name),
        )?;
        Ok(())
    }

    /// Forgets an owner's endpoints: that on one network, or all.
    ///
    /// # Errors
    /// The database's.
    pub fn leave(&self, owner: &str, network: Option<&str>) -> Result<()> {
        self.0.execute(
            "DELETE FROM endpoint WHERE owner = ?1 AND (?2 IS NULL OR network = ?2)",
            (owner, network),
        )?;
        Ok(())
    }

    /// All endpoints.
    ///
    /// # Errors
    /// The database's.
    pub fn endpoints(&self) -> Result<Vec<Endpoint>> {
        let mut ask = self.0.prepare(
            "SELECT network, owner, name, aliases, ipv4, ipv6, ports FROM endpoint
             ORDER BY network, ipv4",
        )?;
        let rows = ask.query_map([], endpoint)?;
        Ok(rows.collect::<rusqlite::Result<_>>()?)
    }
}

fn networks(connection: &Connection) -> Result<Vec<Network>> {
    let mut ask = connection.prepare("SELECT id, name, spec FROM network ORDER BY name")?;
    let rows = ask.query_map([], |row| {
        Ok(Network {
            id: row.get(0)?,
            name: row.get(1)?,
            spec: json(row, 2)?,
        })
    })?;
    Ok(rows.collect::<rusqlite::Result<_>>()?)
}

fn endpoint(row: &Row<'_>) -> rusqlite::Result<Endpoint> {
    let ipv6: Option<String> = row.get(5)?;
    Ok(Endpoint {
        network: row.get(0)?,
        owner: row.get(1)?,
        name: row.get(2)?,
        aliases: json(row, 3)?,
        ipv4: Ipv4Addr::from_bits(row.get(4)?),
        ipv6: ipv6.and_then(|text| text.parse().ok()),
        ports: json(row, 6)?,
    })
}

fn json<T: for<'de> Deserialize<'de>>(row: &Row<'_>, column: usize) -> rusqlite::Result<T> {
    let text: String = row.get(column)?;
    serde_json::from_str(&text).map_err(|error| {
        let kind = rusqlite::types::Type::Text;
        rusqlite::Error::FromSqlConversionFailure(column, kind, Box::new(error))
    })
}

/// The numbers of a network's containers.
fn numbers(network: &Network) -> std::ops::Range<u32> {
    let net = network.spec.ipv4;
    net.network().to_bits() + 2..net.broadcast().to_bits()
}

fn checked_address(network: &Network, wanted: Ipv4Addr, taken: &BTreeSet<u32>) -> Result<Ipv4Addr> {
    let (name, net) = (&network.name, network.spec.ipv4);
    if !numbers(network).contains(&wanted.to_bits()) {
        bail!("{wanted} is no address for a container on {name} ({net})");
    }
    if taken.contains(&wanted.to_bits()) {
        bail!("{wanted} is taken by another container on {name}");
    }
    Ok(wanted)
}

/// The next after the last that was given: one that was somebody's until now may still be
/// looked for there, and its interface be on its way out.
fn free_address(network: &Network, last: u32, taken: &BTreeSet<u32>) -> Result<Ipv4Addr> {
    let all = numbers(network);
    let next = last.saturating_add(1).clamp(all.start, all.end);
    let mut in_turn = (next..all.end).chain(all.start..next);
    let free = in_turn.find(|address| !taken.contains(address));
    let (name, net) = (&network.name, network.spec.ipv4);
    let free = free.with_context(|| format!("no address is left on {name} ({net})"))?;
    Ok(Ipv4Addr::from_bits(free))
}

/// The address with the same number in the other net.
fn beside(net: Ipv6Net, ipv4: Ipv4Addr, network: &Network) -> Ipv6Addr {
    let number = ipv4.to_bits() - network.spec.ipv4.network().to_bits();
    Ipv6Addr::from_bits(net.network().to_bits() | u128::from(number))
}
