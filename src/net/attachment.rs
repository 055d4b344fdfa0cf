//! A container on its networks, from the address that it gets to the last of its rules.
//! All of it goes when this is dropped; and when its process is killed, with the namespace
//! and at the next lock of [`Host`].

use super::dns::{self, Upstream};
use super::egress::Egress;
use super::host::{Host, explained};
use super::links::{Links, Mac, Pair};
use super::names::Peers;
use super::namespace::{Namespace, has_ipv6, set_parameter};
use super::owner::Owner;
use super::ports::{self, Published};
use super::service::Service;
use super::store::{Endpoint, Join, Network};
use super::{Membership, Naming, Plan, firewall, tap};
use anyhow::{Context, Result, bail};
use fork::addresses;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use rustix::fd::{AsFd, OwnedFd};
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How many networks a container may be on: a digit of its interfaces' names.
pub const NETWORKS_MAX: usize = 16;

/// How long the tap of a virtual machine that has ended may be there still.
const LET_GO: Duration = Duration::from_secs(5);

/// The host's.
const RESOLV_CONF: &str = "/etc/resolv.conf";

/// Of whom, for a new [`Attachment`].
pub struct Who<'a> {
    /// The state directory.
    pub root: &'a Path,
    /// The container's id.
    pub id: &'a str,
    pub name: &'a str,
    /// The name servers that were asked for; the host's if there are none.
    pub dns: &'a [String],
}

/// A container that is on networks.
pub struct Attachment {
    owner: Owner,
    namespace: Namespace,
    plan: Plan,
    /// In the order of the plan, which is that of the interfaces; the first has the way out.
    joined: Vec<Joined>,
    peers: Arc<Peers>,
    dns: Option<Service>,
    published: Published,
}

/// One of its networks.
struct Joined {
    network: Network,
    endpoint: Endpoint,
    /// The number of its interface.
    number: usize,
}

impl Attachment {
    /// Connects a container; its taps come later, one for each of its lives.
    ///
    /// # Errors
    /// One line; nothing is left then.
    pub fn new(who: &Who<'_>, plan: &Plan) -> Result<Self> {
        tap::ensure_node()?;
        let namespace = Namespace::new().map_err(|error| match error.downcast::<io::Error>() {
            Ok(error) => explained(error),
            Err(error) => error,
        })?;
        namespace
            .within(prepare)
            .map_err(explained)
            .context("cannot set up a network namespace")?;
        let mut host = Host::lock(who.root)?;
        let mut attachment = Self {
            owner: Owner::new(who.root, who.id)?,
            namespace,
            plan: plan.clone(),
            joined: Vec::new(),
            peers: Arc::new(Peers::open(who.root)?),
            dns: None,
            published: Published::default(),
        };
        let joined = attachment.join(&mut host, who.name, &plan.networks);
        // The rest is the container's own, and nobody waits for it. What has failed is
        // dropped, which takes the lock again.
        drop(host);
        joined?;
        attachment.set_up(who)?;
        Ok(attachment)
    }

    fn join(&mut self, host: &mut Host, name: &str, networks: &[Membership]) -> Result<()> {
        for membership in networks {
            let is_free = |number: &usize| self.joined.iter().all(|one| one.number != *number);
            let number = (0..NETWORKS_MAX).find(is_free);
            let number = number
                .with_context(|| format!("a container is on {NETWORKS_MAX} networks at most"))?;
            let joined = join(host, &self.namespace, &self.owner, name, membership, number)?;
            self.joined.push(joined);
        }
        self.lead_ports(host)?;
        host.settle()
    }

    fn set_up(&mut self, who: &Who<'_>) -> Result<()> {
        self.refresh()?;
        let has_dns = self.plan.egress.has_dns();
        let upstream = has_dns.then(|| upstream(who.dns)).transpose()?;
        let (udp, tcp) = self
            .namespace
            .within(name_server)
            .context("cannot listen for questions about names")?;
        let names = Arc::clone(&self.peers) as Arc<dyn dns::Names>;
        self.dns = Some(dns::serve(udp, tcp, names, upstream)?);
        self.published = ports::publish(&self.plan.publish, &self.namespace)?;
        if self.published.ports().is_empty() {
            return Ok(());
        }
        let host = Host::lock(who.root)?;
        self.lead_ports(&host)?;
        host.settle()
    }

    /// What comes to published ports goes in by the first network.
    fn lead_ports(&mut self, host: &Host) -> Result<()> {
        let ports = self.published.ports();
        match self.joined.first_mut() {
            Some(first) if first.endpoint.ports != ports => {
                first.endpoint.ports = ports.to_vec();
                host.store.set_ports(&first.endpoint)
            }
            _ => Ok(()),
        }
    }

    /// A tap for the container's next child. That of the last one may be closed a moment
    /// after its owner has heard of its end, and is waited for.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn tap(&self) -> Result<fork::Network> {
        let deadline = Instant::now() + LET_GO;
        let tap = loop {
            match self.namespace.within(open_tap) {
                Err(error)
                    if error.kind() == io::ErrorKind::ResourceBusy && Instant::now() < deadline =>
                {
                    std::thread::sleep(Duration::from_millis(1));
                }
                made => break made.context("cannot make a tap")?,
            }
        };
        Ok(fork::Network {
            tap,
            limits: self.plan.rates,
        })
    }

    /// Connects the container to one more network, which its guest does not notice.
    ///
    /// # Errors
    /// One that it is on already, or as [`Self::new`].
    pub fn connect(&mut self, name: &str, membership: &Membership) -> Result<()> {
        let mut host = Host::lock(self.owner.root())?;
        let network = host.store.find_or_default(&membership.network)?;
        if self.is_on(&network) {
            bail!("the container is on network {} already", network.name);
        }
        let done = self
            .join(&mut host, name, std::slice::from_ref(membership))
            .and_then(|()| self.refresh());
        if done.is_err() {
            self.leave(&mut host, &network.id)?;
        }
        done
    }

    /// Takes the container off a network.
    ///
    /// # Errors
    /// One that it is not on.
    pub fn disconnect(&mut self, network: &str) -> Result<()> {
        let mut host = Host::lock(self.owner.root())?;
        let network = host.store.find(network)?;
        if !self.is_on(&network) {
            bail!("the container is not on network {}", network.name);
        }
        self.leave(&mut host, &network.id)?;
        self.refresh()
    }

    fn is_on(&self, network: &Network) -> bool {
        let mut all = self.joined.iter();
        all.any(|joined| joined.network.id == network.id)
    }

    fn leave(&mut self, host: &mut Host, network: &str) -> Result<()> {
        let (gone, left) = std::mem::take(&mut self.joined)
            .into_iter()
            .partition(|joined| joined.network.id == network);
        self.joined = left;
        let gone: Vec<Joined> = gone;
        for joined in &gone {
            Links::new()
                .remove(&joined.pair())
                .context("cannot remove an interface")?;
        }
        host.store.leave(self.owner.id(), Some(network))?;
        self.lead_ports(host)?;
        host.settle()
    }

    /// Makes the namespace what its networks are now.
    fn refresh(&self) -> Result<()> {
        for joined in &self.joined {
            joined.set_up(&self.namespace)?;
        }
        route(&self.namespace, &self.joined)?;
        install_rules(&self.namespace, &self.plan, &self.joined)?;
        let named = self
            .joined
            .iter()
            .filter(|joined| joined.network.has_names());
        self.peers
            .set_networks(named.map(|joined| joined.network.id.clone()).collect());
        Ok(())
    }

    /// What the container is told of names: to ask its gateway; or, where it has no names
    /// beside it and may reach what it wants, whom it has named itself (docker's two ways).
    pub fn naming(&self, dns: &[String]) -> Naming {
        let gateway = self.joined.first().and_then(|joined| {
            let first = joined.network.gateways().next();
            first.map(|net| net.addr())
        });
        if !dns.is_empty() && self.plan.is_default() && self.plan.egress == Egress::Outside {
            return Naming {
                gateway,
                ..Naming::without_network(dns)
            };
        }
        let text = std::fs::read_to_string(RESOLV_CONF).unwrap_or_default();
        Naming {
            servers: vec![IpAddr::from(addresses::IPV4_GATEWAY).to_string()],
            search: search(&text),
            // A name without dots is a container's before it is one of a domain's.
            options: vec!["ndots:0".into()],
            gateway,
        }
    }

    /// Where it is, for whoever looks at the container.
    pub fn places(&self) -> Vec<super::Place> {
        let places = self.joined.iter().map(|joined| super::Place {
            network: joined.network.name.clone(),
            network_id: joined.network.id.clone(),
            ipv4: joined.ipv4(),
            ipv6: joined.ipv6(),
            gateway: joined.network.gateways().next().map(|net| net.addr()),
            aliases: joined.endpoint.aliases.clone(),
        });
        places.collect()
    }

    #[cfg(test)]
    pub fn namespace_of_test(&self) -> &Namespace {
        &self.namespace
    }

    /// The host's ports that lead to it.
    pub fn ports(&self) -> &[super::publish::Publish] {
        self.published.ports()
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        // Its interfaces go with the namespace, in the background and many at a time: to
        // remove one waits for every processor (RCU).
        let gone =
            Host::lock(self.owner.root()).and_then(|mut host| forget(&mut host, &self.owner));
        if let Err(error) = gone {
            log::warn!("a container's network is left for the next to clean up: {error:#}");
        }
    }
}

fn forget(host: &mut Host, owner: &Owner) -> Result<()> {
    host.store.leave(owner.id(), None)?;
    Owner::forget(owner.root(), owner.id())?;
    host.settle()
}

/// A namespace that forwards, makes no address itself, and believes nobody who sends from
/// elsewhere than where they live.
fn prepare() -> io::Result<()> {
    set_parameter("net.ipv4.ip_forward", "1")?;
    for name in ["all", "default"] {
        set_parameter(&format!("net.ipv4.conf.{name}.rp_filter"), "1")?;
    }
    if has_ipv6() {
        set_parameter("net.ipv6.conf.all.forwarding", "1")?;
        set_parameter("net.ipv6.conf.default.addr_gen_mode", "1")?;
    }
    let mut links = Links::new();
    let loopback = links.index("lo")?;
    links.set_up(loopback, None)?;
    // The addresses that are listened on are the tap's, which comes with each life anew.
    for address in gateways() {
        links.add_address(loopback, address.addr().into())?;
    }
    Ok(())
}

/// The tap's addresses.
fn gateways() -> impl Iterator<Item = IpNet> {
    let ipv4 = Ipv4Net::new_assert(addresses::IPV4_GATEWAY.into(), addresses::IPV4_PREFIX);
    let ipv6 = Ipv6Net::new_assert(addresses::IPV6_GATEWAY.into(), addresses::IPV6_PREFIX);
    [Some(IpNet::V4(ipv4)), has_ipv6().then_some(IpNet::V6(ipv6))]
        .into_iter()
        .flatten()
}

fn open_tap() -> io::Result<OwnedFd> {
    let tap = tap::make()?;
    let mut links = Links::new();
    let index = links.index(tap::NAME)?;
    links.set_up(index, Some(addresses::GATEWAY_MAC))?;
    for address in gateways() {
        links.add_address(index, address)?;
        let guest = match address {
            IpNet::V4(_) => addresses::IPV4.into(),
            IpNet::V6(_) => addresses::IPV6.into(),
        };
        links.add_neighbour(index, guest, addresses::MAC)?;
    }
    Ok(tap)
}

fn name_server() -> io::Result<(UdpSocket, TcpListener)> {
    let address = SocketAddr::from((addresses::IPV4_GATEWAY, 53));
    Ok((UdpSocket::bind(address)?, TcpListener::bind(address)?))
}

/// The host's domains: the last line counts (resolv.conf(5)).
fn search(resolv_conf: &str) -> Vec<String> {
    let mut lines = resolv_conf.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        matches!(words.next(), Some("search" | "domain")).then(|| words.map(String::from).collect())
    });
    lines.next_back().unwrap_or_default()
}

/// The servers that were asked for, or the host's.
fn upstream(wanted: &[String]) -> Result<Upstream> {
    if wanted.is_empty() {
        let text = std::fs::read_to_string(RESOLV_CONF).unwrap_or_default();
        return Ok(Upstream::from_resolv_conf(&text));
    }
    let servers = wanted.iter().map(|text| {
        let address: IpAddr = text.parse().with_context(|| format!("--dns {text}"))?;
        Ok(SocketAddr::new(address, 53))
    });
    Ok(Upstream::new(servers.collect::<Result<_>>()?))
}

fn join(
    host: &mut Host,
    namespace: &Namespace,
    owner: &Owner,
    name: &str,
    membership: &Membership,
    number: usize,
) -> Result<Joined> {
    let network = host.store.find_or_default(&membership.network)?;
    if !network.has_names() && (membership.ipv4.is_some() || !membership.aliases.is_empty()) {
        bail!(
            "an address or an alias of one's own is for networks that somebody has made: see `network create`"
        );
    }
    let (network, bridge) = host.bridge(network)?;
    let endpoint = host.store.join(&Join {
        network: &network,
        owner: owner.id(),
        name,
        aliases: &membership.aliases,
        ipv4: membership.ipv4,
    })?;
    let joined = Joined {
        network,
        endpoint,
        number,
    };
    Links::new()
        .add_pair(&Pair {
            name: &joined.pair(),
            bridge,
            namespace: namespace.as_fd(),
            peer: &interface(number),
            mac: mac(&joined.endpoint),
        })
        .map_err(explained)
        .with_context(|| format!("cannot connect to network {}", joined.network.name))?;
    Ok(joined)
}

impl Joined {
    /// Gives its interface its addresses, and brings it up.
    fn set_up(&self, namespace: &Namespace) -> Result<()> {
        let set_up = || {
            let mut links = Links::new();
            let index = links.index(&interface(self.number))?;
            for address in self.addresses() {
                links.add_address(index, address)?;
            }
            links.set_up(index, None)
        };
        namespace
            .within(set_up)
            .with_context(|| format!("cannot set the addresses on {}", self.network.name))
    }

    /// The name of the host's end of the pair, where all containers' are side by side: as
    /// much of the owner's as there is room for, and the number of the interface.
    fn pair(&self) -> String {
        let owner = self.endpoint.owner.get(..11).unwrap_or_default();
        format!("vmr{owner}{:x}", self.number)
    }

    fn ipv4(&self) -> Ipv4Net {
        Ipv4Net::new_assert(self.endpoint.ipv4, self.network.spec.ipv4.prefix_len())
    }

    fn ipv6(&self) -> Option<Ipv6Net> {
        let ipv6 = self.endpoint.ipv6.zip(self.network.spec.ipv6);
        ipv6.map(|(address, net)| Ipv6Net::new_assert(address, net.prefix_len()))
    }

    /// As far as this kernel has them.
    fn addresses(&self) -> impl Iterator<Item = IpNet> {
        let ipv6 = self.ipv6().filter(|_| has_ipv6());
        [Some(IpNet::V4(self.ipv4())), ipv6.map(IpNet::V6)]
            .into_iter()
            .flatten()
    }
}

/// The name of an interface in the namespace.
fn interface(number: usize) -> String {
    format!("eth{number}")
}

/// By its address, as docker's: whoever gets that later is found at the same.
fn mac(endpoint: &Endpoint) -> Mac {
    let [a, b, c, d] = endpoint.ipv4.octets();
    [0x02, 0x42, a, b, c, d]
}

/// The way out is the first network's that has one.
fn route(namespace: &Namespace, joined: &[Joined]) -> Result<()> {
    let outside = joined.iter().find(|joined| !joined.network.spec.internal);
    let Some(outside) = outside else {
        return Ok(());
    };
    let has_ipv6 = has_ipv6();
    namespace
        .within(|| {
            let mut links = Links::new();
            for gateway in outside.network.gateways() {
                if has_ipv6 || gateway.addr().is_ipv4() {
                    links.add_default_route(gateway.addr())?;
                }
            }
            Ok(())
        })
        .context("cannot set the way out")
}

fn install_rules(namespace: &Namespace, plan: &Plan, joined: &[Joined]) -> Result<()> {
    let own: Vec<IpNet> = joined
        .iter()
        .flat_map(|joined| joined.network.nets())
        .collect();
    let table = firewall::of_container(&plan.egress, &own);
    namespace
        .within(|| table.install())
        .map_err(explained)
        .context("cannot set the container's rules")
}
