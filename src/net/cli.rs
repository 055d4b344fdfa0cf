//! `vm-run network`.

use super::pool::Wanted;
use super::store::{DEFAULT, Endpoint, Network, Store};
use super::{Host, Membership};
use crate::container::Engine;
use crate::container::columns;
use crate::unfit::Unfit;
use anyhow::{Result, bail};
use clap::Subcommand;
use ipnet::IpNet;
use serde_json::{Value, json};
use std::io::Write;
use std::net::Ipv4Addr;
use std::path::Path;

/// What can be done with networks.
#[derive(Debug, Subcommand)]
pub enum NetworkCommand {
    /// Make a network, and print its id
    Create(CreateArgs),
    /// List networks
    Ls {
        /// Print ids only
        #[arg(short, long)]
        quiet: bool,
        /// Print a JSON array
        #[arg(long, conflicts_with = "quiet")]
        json: bool,
    },
    /// Print all that is known of networks, as a JSON array
    Inspect {
        /// Names or ids
        #[arg(required = true, value_name = "NETWORK")]
        networks: Vec<String>,
    },
    /// Remove networks that no container is on
    Rm {
        /// One that is not there is no failure
        #[arg(short, long)]
        force: bool,
        /// Names or ids
        #[arg(required = true, value_name = "NETWORK")]
        networks: Vec<String>,
    },
    /// Remove all networks that no container is to be on
    Prune {
        /// Do not ask
        #[arg(short, long)]
        force: bool,
    },
    /// Put a container on one more network, while it runs or not
    Connect {
        /// One more name of it there
        #[arg(long, value_name = "NAME")]
        alias: Vec<String>,
        /// Its address there
        #[arg(long, value_name = "ADDRESS")]
        ip: Option<Ipv4Addr>,
        /// Name or id
        network: String,
        /// Name or id
        container: String,
    },
    /// Take a container off a network, while it runs or not
    Disconnect {
        /// Name or id
        network: String,
        /// Name or id
        container: String,
    },
}

/// A network that is to be.
#[derive(Debug, clap::Args)]
pub struct CreateArgs {
    /// Its addresses; one of each family may be given [default: some that nobody has]
    #[arg(long, value_name = "CIDR")]
    pub subnet: Vec<IpNet>,
    /// Give it IPv6 as well
    #[arg(long)]
    pub ipv6: bool,
    /// Leave it without a way out
    #[arg(long)]
    pub internal: bool,
    /// Let its containers reach the host's own services
    #[arg(long)]
    pub host_access: bool,
    /// Set a label
    #[arg(long, value_name = "NAME=VALUE")]
    pub label: Vec<String>,
    /// Its name
    pub name: String,
}

/// Does it.
///
/// # Errors
/// One line.
pub fn run(command: NetworkCommand, root: &Path) -> Result<()> {
    // It removes what killed processes have left.
    let engine = Engine::open(root)?;
    let mut out = std::io::stdout();
    match command {
        NetworkCommand::Create(args) => {
            let made = Store::open(root)?.create(&args.name, &args.wanted()?)?;
            writeln!(out, "{}", made.id)?;
        }
        NetworkCommand::Ls { quiet, json } => {
            let mut store = Store::open(root)?;
            // It is there for whoever asks, used or not.
            store.find_or_default(DEFAULT)?;
            list(&store, quiet, json, &mut out)?;
        }
        NetworkCommand::Inspect { networks } => {
            let mut store = Store::open(root)?;
            let found = networks.iter().map(|name| store.find_or_default(name));
            let found = found.collect::<Result<Vec<_>>>()?;
            print(&store, &found, &mut out)?;
        }
        NetworkCommand::Rm { force, networks } => {
            let mut host = Host::lock(root)?;
            for wanted in networks {
                match host.store.find(&wanted) {
                    Err(_) if force => {}
                    found => remove(&mut host, &engine, &found?)?,
                }
                writeln!(out, "{wanted}")?;
            }
        }
        NetworkCommand::Prune { force } => {
            if !force {
                bail!(
                    "this removes networks that no container is on: say --force if that is meant"
                );
            }
            let mut host = Host::lock(root)?;
            for network in host.store.list()? {
                // One that is in use is not meant.
                if network.name != DEFAULT && remove(&mut host, &engine, &network).is_ok() {
                    writeln!(out, "{}", network.name)?;
                }
            }
        }
        NetworkCommand::Connect {
            alias,
            ip,
            network,
            container,
        } => {
            let membership = membership(root, &network, alias, ip)?;
            engine.connect(&engine.find(&container)?, &membership)?;
        }
        NetworkCommand::Disconnect { network, container } => {
            let network = Store::open(root)?.find(&network)?.name;
            engine.disconnect(&engine.find(&container)?, &network)?;
        }
    }
    Ok(())
}

/// A container's place on a network, checked.
///
/// # Errors
/// No such network, or an alias that is no name.
pub fn membership(
    root: &Path,
    network: &str,
    aliases: Vec<String>,
    ipv4: Option<Ipv4Addr>,
) -> Result<Membership> {
    for alias in &aliases {
        crate::container::check_name(alias)?;
    }
    Ok(Membership {
        network: Store::open(root)?.find_or_default(network)?.name,
        aliases,
        ipv4,
    })
}

impl CreateArgs {
    /// What is to be made, checked.
    ///
    /// # Errors
    /// One line.
    pub fn wanted(&self) -> Result<Wanted> {
        let mut wanted = Wanted {
            has_ipv6: self.ipv6,
            internal: self.internal,
            host_access: self.host_access,
            ..Wanted::default()
        };
        for subnet in &self.subnet {
            let is_second = match subnet {
                IpNet::V4(net) => wanted.ipv4.replace(*net).is_some(),
                IpNet::V6(net) => wanted.ipv6.replace(*net).is_some(),
            };
            if is_second {
                bail!("--subnet {subnet}: one of each family is enough");
            }
        }
        for label in &self.label {
            let (name, value) = label.split_once('=').unwrap_or((label, ""));
            wanted.labels.insert(name.to_owned(), value.to_owned());
        }
        Ok(wanted)
    }
}

/// Removes a network. One that a container is to be on when it starts again stays.
///
/// # Errors
/// One that is in use.
pub fn remove(host: &mut Host, engine: &Engine, network: &Network) -> Result<()> {
    for record in engine.list()? {
        let mut memberships = record.spec.network.networks.iter();
        if network.name != DEFAULT && memberships.any(|one| one.network == network.name) {
            return Err(Unfit::conflict(format!(
                "network {} is in use by container {}: disconnect or remove it first",
                network.name, record.name
            ))
            .into());
        }
    }
    host.store.remove(network)?;
    host.settle()
}

fn list(store: &Store, quiet: bool, as_json: bool, out: &mut impl Write) -> Result<()> {
    let all = store.list()?;
    if as_json {
        return print(store, &all, out);
    }
    if quiet {
        for network in &all {
            writeln!(out, "{}", short(network))?;
        }
        return Ok(());
    }
    let mut rows = vec![["NETWORK ID", "NAME", "DRIVER", "SCOPE"].map(String::from)];
    rows.extend(all.iter().map(|network| {
        [
            short(network).to_owned(),
            network.name.clone(),
            "bridge".into(),
            "local".into(),
        ]
    }));
    columns(&rows, out)
}

fn short(network: &Network) -> &str {
    &network.id[..12]
}

/// Docker's objects of networks.
///
/// # Errors
/// The database's.
pub fn objects(store: &Store, networks: &[Network]) -> Result<Vec<Value>> {
    let endpoints = store.endpoints()?;
    let all = networks.iter();
    Ok(all.map(|network| object(network, &endpoints)).collect())
}

fn print(store: &Store, networks: &[Network], out: &mut impl Write) -> Result<()> {
    let objects = objects(store, networks)?;
    Ok(writeln!(
        out,
        "{}",
        serde_json::to_string_pretty(&objects)?
    )?)
}

fn object(network: &Network, endpoints: &[Endpoint]) -> Value {
    let config: Vec<Value> = network
        .nets()
        .zip(network.gateways())
        .map(|(net, gateway)| json!({ "Subnet": net, "Gateway": gateway.addr() }))
        .collect();
    let containers: serde_json::Map<String, Value> = endpoints
        .iter()
        .filter(|one| one.network == network.id)
        .map(|one| {
            let length = network.spec.ipv4.prefix_len();
            let of_one = json!({
                "Name": one.name,
                "IPv4Address": format!("{}/{length}", one.ipv4),
                "IPv6Address": one.ipv6.map(|address| address.to_string()).unwrap_or_default(),
            });
            (one.owner.clone(), of_one)
        })
        .collect();
    json!({
        "Name": network.name,
        "Id": network.id,
        "Created": network.spec.created.to_string(),
        "Scope": "local",
        "Driver": "bridge",
        "EnableIPv6": network.spec.ipv6.is_some(),
        "IPAM": { "Driver": "default", "Config": config },
        "Internal": network.spec.internal,
        "Containers": containers,
        "Options": { "host-access": network.spec.host_access.to_string() },
        "Labels": network.spec.labels,
    })
}
