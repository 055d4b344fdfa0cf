//! Who is who, for the questions of one container.

use super::dns::Names;
use super::store::{Endpoint, Store};
use crate::lock::lock;
use anyhow::Result;
use std::net::IpAddr;
use std::path::Path;
use std::sync::{Mutex, MutexGuard};

/// As many letters of an id as people are shown are a name, too.
const SHORT_ID: usize = 12;

/// The containers on the networks of one.
pub struct Peers(Mutex<Inner>);

struct Inner {
    store: Store,
    /// The ids of those networks on which containers have names.
    networks: Vec<String>,
}

impl Peers {
    /// On no network yet.
    ///
    /// # Errors
    /// The database's.
    pub fn open(root: &Path) -> Result<Self> {
        Ok(Self(Mutex::new(Inner {
            store: Store::open(root)?,
            networks: Vec::new(),
        })))
    }

    /// From now on it is on these.
    pub fn set_networks(&self, networks: Vec<String>) {
        self.lock().networks = networks;
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        lock(&self.0)
    }

    fn find<T>(&self, mut of: impl FnMut(&Endpoint) -> Option<T>) -> Vec<T> {
        let inner = self.lock();
        if inner.networks.is_empty() {
            return Vec::new();
        }
        let all = inner.store.endpoints().unwrap_or_else(|error| {
            log::warn!("names cannot be looked up: {error:#}");
            Vec::new()
        });
        let near = all
            .iter()
            .filter(|one| inner.networks.contains(&one.network));
        near.filter_map(&mut of).collect()
    }
}

impl Names for Peers {
    fn addresses(&self, name: &str) -> Option<Vec<IpAddr>> {
        let found = self.find(|one| is_called(one, name).then(|| addresses(one)));
        (!found.is_empty()).then(|| found.concat())
    }

    fn name_of(&self, address: IpAddr) -> Option<String> {
        let named = |one: &Endpoint| addresses(one).contains(&address).then(|| one.name.clone());
        self.find(named).pop()
    }
}

fn is_called(endpoint: &Endpoint, name: &str) -> bool {
    let mut names = [&endpoint.name].into_iter().chain(&endpoint.aliases);
    names.any(|one| one.eq_ignore_ascii_case(name)) || endpoint.owner.get(..SHORT_ID) == Some(name)
}

fn addresses(endpoint: &Endpoint) -> Vec<IpAddr> {
    let ipv4 = Some(endpoint.ipv4.into());
    let ipv6 = endpoint.ipv6.map(IpAddr::from);
    [ipv4, ipv6].into_iter().flatten().collect()
}
