//! Whether this host has what a container's network takes.

use super::egress::Egress;
use super::host::explained;
use super::links::{Links, Pair};
use super::namespace::Namespace;
use super::{firewall, tap};
use anyhow::{Context, Result};
use rustix::fd::AsFd;

/// Makes one of each: a bridge, a pair, a tap, and a container's rules, in namespaces
/// that go with the trial.
///
/// # Errors
/// The first that cannot be made.
pub fn trial() -> Result<()> {
    tap::ensure_node()?;
    let (host, container) = (Namespace::new()?, Namespace::new()?);
    host.within(|| {
        let mut links = Links::new();
        let bridge = links.add_bridge("trial")?;
        links.add_pair(&Pair {
            name: "trial-pair",
            bridge,
            namespace: container.as_fd(),
            peer: "eth0",
            mac: [2, 0, 0, 0, 0, 2],
        })
    })
    .map_err(explained)
    .context("no bridge, or no pair of interfaces (veth)")?;
    container
        .within(|| tap::make().map(drop))
        .map_err(explained)
        .context("no tap")?;
    container
        .within(|| firewall::of_container(&Egress::Outside, &[]).install())
        .map_err(explained)
        .context("no rules of nf_tables")
}
