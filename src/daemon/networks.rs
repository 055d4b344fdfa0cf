//! Networks and volumes, as docker's API has them.

use crate::container::{Engine, new_id};
use crate::net::cli::{CreateArgs, membership, objects, remove as remove_network};
use crate::net::{DEFAULT, Host, Store};
use crate::volume::Store as Volumes;
use crate::volume::cli::{mounts, object};
use anyhow::{Context, Result, bail};
use docker_api::models::{EndpointSettings, NetworkCreateRequest};
use serde_json::Value;
use std::path::Path;

/// All networks.
pub fn list(root: &Path) -> Result<Vec<Value>> {
    let mut store = Store::open(root)?;
    // It is there for whoever asks, used or not.
    store.find_or_default(DEFAULT)?;
    objects(&store, &store.list()?)
}

/// One of them.
pub fn inspect(root: &Path, network: &str) -> Result<Value> {
    let mut store = Store::open(root)?;
    let found = store.find_or_default(network)?;
    let mut one = objects(&store, &[found])?;
    one.pop().context("it has gone")
}

/// Makes one; its id.
pub fn create(root: &Path, request: NetworkCreateRequest) -> Result<String> {
    let driver = request.driver.as_deref().unwrap_or_default();
    if !matches!(driver, "" | "bridge" | "default") {
        bail!("vm-run does not support the network driver {driver:?}");
    }
    let ipam = request.ipam.unwrap_or_default();
    let mut subnet = Vec::new();
    for config in ipam.config.iter().flatten() {
        if config.ip_range.is_some() || config.gateway.is_some() {
            bail!("vm-run does not support --ip-range and --gateway: a subnet is enough");
        }
        if let Some(text) = &config.subnet {
            let parsed = text.parse();
            subnet.push(parsed.with_context(|| format!("{text:?} is no subnet"))?);
        }
    }
    let labels = request.labels.unwrap_or_default();
    let args = CreateArgs {
        subnet,
        ipv6: request.enable_ipv6.unwrap_or_default(),
        internal: request.internal.unwrap_or_default(),
        host_access: false,
        label: labels
            .iter()
            .map(|(name, value)| format!("{name}={value}"))
            .collect(),
        name: request.name,
    };
    Ok(Store::open(root)?.create(&args.name, &args.wanted()?)?.id)
}

/// Removes one.
pub fn remove(root: &Path, engine: &Engine, network: &str) -> Result<()> {
    let mut host = Host::lock(root)?;
    let found = host.store.find(network)?;
    remove_network(&mut host, engine, &found)
}

/// Puts a container on one.
pub fn connect(
    root: &Path,
    engine: &Engine,
    network: &str,
    container: &str,
    endpoint: &EndpointSettings,
) -> Result<()> {
    let given = endpoint.ipam_config.as_ref();
    let address = given.and_then(|given| given.ipv4_address.as_deref());
    let address = address.filter(|address| !address.is_empty());
    let address = address.map(str::parse).transpose();
    let address = address.context("no IPv4 address")?;
    let aliases = endpoint.aliases.clone().unwrap_or_default();
    let membership = membership(root, network, aliases, address)?;
    engine.connect(&engine.find(container)?, &membership)
}

/// Takes a container off one.
pub fn disconnect(root: &Path, engine: &Engine, network: &str, container: &str) -> Result<()> {
    let network = Store::open(root)?.find(network)?.name;
    engine.disconnect(&engine.find(container)?, &network)
}

/// All volumes.
pub fn volumes(root: &Path) -> Result<Vec<Value>> {
    let store = Volumes::of(root);
    let names = store.names()?;
    names.iter().map(|name| object(&store, name)).collect()
}

/// One of them.
pub fn volume(root: &Path, name: &str) -> Result<Value> {
    let store = Volumes::of(root);
    store.check_exists(name)?;
    object(&store, name)
}

/// Makes one, if it is not there.
pub fn make_volume(root: &Path, name: Option<String>) -> Result<Value> {
    let store = Volumes::of(root);
    let name = name.map_or_else(new_id, Ok)?;
    store.make(&name)?;
    object(&store, &name)
}

/// Removes one.
pub fn remove_volume(root: &Path, engine: &Engine, name: &str, force: bool) -> Result<()> {
    let store = Volumes::of(root);
    if force && !store.exists(name)? {
        return Ok(());
    }
    store.remove(name, || mounts(engine))
}
