//! What networks are on the host: a bridge for each that somebody is on, and one table of
//! rules. Both follow from the database, so whoever changes that makes them right, and
//! whoever comes after a crash does as well.

use super::links::Links;
use super::namespace::{has_ipv6, set_parameter};
use super::owner::{self, Owner};
use super::store::{DEFAULT, Endpoint, Network, Store};
use super::{firewall, pool, rules};
use anyhow::{Context, Result, anyhow, bail};
use ipnet::IpNet;
use rustix::fs::{FlockOperation, flock};
use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// All networks of a state directory, with nobody else at them.
pub struct Host {
    pub store: Store,
    root: PathBuf,
    _lock: File,
}

impl Host {
    /// Waits until nobody else is at them, and removes what killed processes have left.
    ///
    /// # Errors
    /// One line.
    pub fn lock(root: &Path) -> Result<Self> {
        let directory = owner::directory(root);
        std::fs::create_dir_all(&directory)
            .with_context(|| format!("cannot make {}", directory.display()))?;
        let path = directory.join(".lock");
        let lock =
            File::create(&path).with_context(|| format!("cannot open {}", path.display()))?;
        flock(&lock, FlockOperation::LockExclusive)
            .with_context(|| format!("cannot lock {}", path.display()))?;
        let mut host = Self {
            store: Store::open(root)?,
            root: root.to_owned(),
            _lock: lock,
        };
        host.sweep()?;
        Ok(host)
    }

    /// Removes what killed processes have left, if there can be any.
    ///
    /// # Errors
    /// One line.
    pub fn sweep_if_needed(root: &Path) -> Result<()> {
        if !root.join("networks.db").exists() {
            return Ok(());
        }
        let left = Store::open(root)?.endpoints()?;
        if left.iter().any(|one| Owner::is_gone(root, &one.owner)) {
            Self::lock(root)?;
        }
        Ok(())
    }

    fn sweep(&mut self) -> Result<()> {
        let mut has_swept = false;
        for endpoint in self.store.endpoints()? {
            // Its namespace went with the last process that had it open, and all in it.
            if Owner::is_gone(&self.root, &endpoint.owner) {
                self.store.leave(&endpoint.owner, None)?;
                Owner::forget(&self.root, &endpoint.owner)?;
                has_swept = true;
            }
        }
        if has_swept {
            self.settle()?;
        }
        Ok(())
    }

    /// The bridge of a network that somebody is to be on: its number, and the network,
    /// which may have got other addresses. The host forwards from now on.
    ///
    /// # Errors
    /// No bridges in this kernel, no privilege, or addresses that the host has already.
    pub fn bridge(&mut self, network: Network) -> Result<(Network, u32)> {
        if let Ok(index) = Links::new().index(&network.bridge()) {
            return Ok((network, index));
        }
        let network = self.out_of_the_way(network)?;
        let index = Self::make_bridge(&network)?;
        Ok((network, index))
    }

    /// The host has come to have other networks since this one was made. The default one
    /// moves, if nobody is on it.
    fn out_of_the_way(&mut self, mut network: Network) -> Result<Network> {
        let Some(other) = pool::in_the_way(&network.spec) else {
            return Ok(network);
        };
        let endpoints = self.store.endpoints()?;
        let is_used = endpoints.iter().any(|one| one.network == network.id);
        if network.name != DEFAULT || is_used {
            bail!(
                "network {} ({}) is where this host has {other}: remove that, or make the network anew",
                network.name,
                network.spec.ipv4
            );
        }
        let taken: Vec<IpNet> = self.store.list()?.iter().flat_map(Network::nets).collect();
        network.spec.ipv4 = pool::free_net(&network.id, &taken)?;
        self.store.set_spec(&network)?;
        Ok(network)
    }

    fn make_bridge(network: &Network) -> Result<u32> {
        let mut links = Links::new();
        let name = network.bridge();
        let what = || format!("cannot make the bridge of network {}", network.name);
        let make = |links: &mut Links| -> io::Result<u32> {
            let index = links.add_bridge(&name)?;
            let has_ipv6 = network.spec.ipv6.is_some() && has_ipv6();
            // No address of its own making: what is there is told by the database.
            set_ipv6(&format!("net.ipv6.conf.{name}.addr_gen_mode"), "1")?;
            set_ipv6(&format!("net.ipv6.conf.{name}.accept_ra"), "0")?;
            for gateway in network
                .gateways()
                .filter(|net| has_ipv6 || net.addr().is_ipv4())
            {
                links.add_address(index, gateway)?;
            }
            links.set_up(index, None)?;
            forward(has_ipv6)?;
            Ok(index)
        };
        make(&mut links)
            .inspect_err(|_| {
                if let Err(error) = links.remove(&name) {
                    log::warn!("cannot remove {name}: {error}");
                }
            })
            .map_err(explained)
            .with_context(what)
    }

    /// Makes bridges and rules what the database says: what nobody is on goes.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn settle(&self) -> Result<()> {
        let endpoints = self.store.endpoints()?;
        let (used, unused): (Vec<Network>, Vec<Network>) = self
            .store
            .list()?
            .into_iter()
            .partition(|network| endpoints.iter().any(|one| one.network == network.id));
        let mut links = Links::new();
        for network in &unused {
            links
                .remove(&network.bridge())
                .with_context(|| format!("cannot remove the bridge of {}", network.name))?;
        }
        self.install(&used, &endpoints)
    }

    fn install(&self, networks: &[Network], endpoints: &[Endpoint]) -> Result<()> {
        let name = self.table()?;
        let done = if networks.is_empty() {
            rules::remove(&name)
        } else {
            firewall::of_host(&name, networks, endpoints).install()
        };
        done.map_err(explained)
            .with_context(|| format!("cannot change the firewall's table {name}"))
    }

    /// A state directory has a table of its own, named by what it is on its host.
    fn table(&self) -> Result<String> {
        let found = std::fs::metadata(&self.root)
            .with_context(|| format!("cannot find {}", self.root.display()))?;
        Ok(format!("vm-run-{:x}-{:x}", found.dev(), found.ino()))
    }
}

/// Lets the host forward what comes from bridges, as docker does.
fn forward(has_ipv6: bool) -> io::Result<()> {
    let is_on = |path: &str| std::fs::read_to_string(path).is_ok_and(|text| text.trim() == "1");
    if !is_on("/proc/sys/net/ipv4/ip_forward") {
        log::info!("net.ipv4.ip_forward is set to 1");
        set_parameter("net.ipv4.ip_forward", "1")?;
    }
    if has_ipv6 && !is_on("/proc/sys/net/ipv6/conf/all/forwarding") {
        keep_routers()?;
        log::info!("net.ipv6.conf.all.forwarding is set to 1");
        set_parameter("net.ipv6.conf.all.forwarding", "1")?;
    }
    Ok(())
}

/// A host that forwards takes no more routes from routers, unless it is told to (linux
/// ip-sysctl.rst, `accept_ra`): it must not lose the one it lives by.
fn keep_routers() -> io::Result<()> {
    for entry in std::fs::read_dir("/proc/sys/net/ipv6/conf")? {
        let path = entry?.path().join("accept_ra");
        if std::fs::read_to_string(&path).is_ok_and(|text| text.trim() == "1") {
            std::fs::write(&path, "2")?;
        }
    }
    Ok(())
}

/// Where there is no IPv6 there is nothing to set.
fn set_ipv6(name: &str, value: &str) -> io::Result<()> {
    if has_ipv6() {
        set_parameter(name, value)?;
    }
    Ok(())
}

/// What to do about an error of the kernel's.
pub fn explained(error: io::Error) -> anyhow::Error {
    match error.kind() {
        ErrorKind::PermissionDenied => {
            anyhow!("a network takes root: be root, or say --network none ({error})")
        }
        ErrorKind::Unsupported => anyhow!(
            "this kernel has no bridge, veth or nf_tables: load them, or say --network none ({error})"
        ),
        _ => error.into(),
    }
}
