//! What may go where: the rules in a container's namespace, and those of the host.
//!
//! ```text
//!   guest 192.0.0.2 -- tap0 [container's namespace] eth0 10.x -- bridge [host] -- outside
//!                            translates both ways                 translates again
//! ```

use super::egress::{Allowed, Egress};
use super::publish::Protocol;
use super::rules::{
    Chain, Entry, Hook, IPPROTO_TCP, IPPROTO_UDP, Interface, Map, Rule, Table, Then, When,
};
use super::store::{Endpoint, Network};
use super::tap;
use fork::addresses;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// What the names of all bridges of vm-run begin with, whatever its state directory.
pub const BRIDGES: &str = "vmr-";

/// The table in a container's namespace.
const CONTAINER_TABLE: &str = "vm-run";

const DNS: u16 = 53;

/// Where clouds have what no container is to know (the instance's credentials, RFC 3927),
/// unless it was allowed by name.
const METADATA: [IpNet; 2] = [
    IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(169, 254, 0, 0), 16)),
    IpNet::V6(Ipv6Net::new_assert(
        Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254),
        128,
    )),
];

fn rule<const N: usize>(when: [When; N], then: Then) -> Rule {
    Rule {
        when: when.into(),
        then,
    }
}

fn from_tap() -> When {
    When::From(Interface::Named(tap::NAME.into()))
}

fn to_tap() -> When {
    When::To(Interface::Named(tap::NAME.into()))
}

/// All addresses of one end of the tap, as nets.
fn hosts(ipv4: [u8; 4], ipv6: [u8; 16]) -> [IpNet; 2] {
    [IpAddr::from(ipv4).into(), IpAddr::from(ipv6).into()]
}

fn guest() -> [IpNet; 2] {
    hosts(addresses::IPV4, addresses::IPV6)
}

fn gateway() -> [IpNet; 2] {
    hosts(addresses::IPV4_GATEWAY, addresses::IPV6_GATEWAY)
}

/// The rules in the namespace of a container that may reach what `egress` allows, and is
/// on the networks `own`.
pub fn of_container(egress: &Egress, own: &[IpNet]) -> Table {
    let chain = |name, hook, rules| Chain { name, hook, rules };
    Table {
        name: CONTAINER_TABLE.into(),
        maps: Vec::new(),
        chains: vec![
            chain("spoofed", Hook::Raw, unspoofed()),
            chain("inward", Hook::DestinationNat, inward()),
            chain("outward", Hook::SourceNat, outward()),
            chain("own", Hook::Input, own_services()),
            chain("through", Hook::Forward, through(egress, own)),
        ],
    }
}

/// Whoever sends as somebody else is not heard, and leaves no trace: neither a connection
/// nor a neighbour, of which the host's kernel has one table for all namespaces.
fn unspoofed() -> Vec<Rule> {
    let mut rules = Vec::new();
    for host in guest() {
        rules.push(rule([from_tap(), When::Source(host)], Then::Accept));
    }
    // Asking whether an address is free (RFC 4862, 5.4.2).
    let nobody = IpAddr::V6(Ipv6Addr::UNSPECIFIED).into();
    rules.push(rule([from_tap(), When::Source(nobody)], Then::Accept));
    rules.push(rule([from_tap()], Then::Drop));
    rules
}

/// What comes for this namespace is for the guest; also what it sends to itself by its
/// address outside.
fn inward() -> Vec<Rule> {
    let mut rules = Vec::new();
    for host in gateway() {
        rules.push(rule([from_tap(), When::Destination(host)], Then::Accept));
    }
    for (family, to) in [When::Ipv4, When::Ipv6].into_iter().zip(guest()) {
        rules.push(rule([When::ToUs, family], Then::Redirect(to.addr())));
    }
    rules
}

fn outward() -> Vec<Rule> {
    let not_to_tap = When::NotTo(Interface::Named(tap::NAME.into()));
    let mut rules = vec![rule([not_to_tap], Then::Masquerade)];
    for host in guest() {
        rules.push(rule([to_tap(), When::Source(host)], Then::Masquerade));
    }
    rules
}

/// To the namespace itself: names are asked here, and nothing else.
fn own_services() -> Vec<Rule> {
    let mut rules = vec![rule([When::Known], Then::Accept)];
    for control in When::control() {
        rules.push(rule([control], Then::Accept));
    }
    for protocol in [IPPROTO_UDP, IPPROTO_TCP] {
        let asked = [from_tap(), When::Protocol(protocol), When::Ports(DNS..=DNS)];
        rules.push(rule(asked, Then::Accept));
    }
    rules.push(rule([from_tap()], Then::Reject));
    rules.push(rule(
        [When::NotFrom(Interface::Named("lo".into()))],
        Then::Drop,
    ));
    rules
}

fn through(egress: &Egress, own: &[IpNet]) -> Vec<Rule> {
    let mut rules = vec![
        rule([When::Invalid], Then::Drop),
        rule([When::Known], Then::Accept),
        rule([to_tap(), When::Translated], Then::Accept),
        rule([to_tap()], Then::Drop),
    ];
    match egress {
        Egress::Outside => {
            for net in METADATA {
                rules.push(rule([When::Destination(net)], Then::Reject));
            }
        }
        Egress::Only(allowed) => {
            for one in allowed {
                rules.extend(allow(one, own));
            }
            rules.push(rule([from_tap()], Then::Reject));
        }
    }
    rules
}

fn allow(allowed: &Allowed, own: &[IpNet]) -> Vec<Rule> {
    match allowed {
        // The namespace's services answer that.
        Allowed::Dns => Vec::new(),
        Allowed::Networks => own
            .iter()
            .map(|net| rule([When::Destination(*net)], Then::Accept))
            .collect(),
        Allowed::Net {
            net,
            ports,
            protocol,
        } => {
            let protocols = match protocol {
                Some(protocol) => vec![When::Protocol(protocol.number())],
                // Ports are those of TCP and UDP, and of nothing else.
                None if ports.is_some() => [IPPROTO_TCP, IPPROTO_UDP].map(When::Protocol).into(),
                None => Vec::new(),
            };
            let rule = |protocol: Option<When>| Rule {
                when: [When::Destination(*net)]
                    .into_iter()
                    .chain(protocol)
                    .chain(ports.clone().map(When::Ports))
                    .collect(),
                then: Then::Accept,
            };
            if protocols.is_empty() {
                return vec![rule(None)];
            }
            protocols.into_iter().map(|one| rule(Some(one))).collect()
        }
    }
}

const ANY: &str = "published";
const AT: &str = "published-at";

/// The rules of the host for the networks that are there, and for the ports that their
/// containers publish.
pub fn of_host(name: &str, networks: &[Network], endpoints: &[Endpoint]) -> Table {
    let chain = |name, hook, rules| Chain { name, hook, rules };
    Table {
        name: name.into(),
        maps: maps(endpoints),
        chains: vec![
            chain("inward", Hook::DestinationNat, published()),
            chain("outward", Hook::SourceNat, translated(networks)),
            chain("host", Hook::Input, host_services(networks)),
            chain("through", Hook::Forward, between(networks)),
        ],
    }
}

fn from_bridges() -> When {
    When::From(Interface::Prefix(BRIDGES))
}

fn to_bridges() -> When {
    When::To(Interface::Prefix(BRIDGES))
}

fn maps(endpoints: &[Endpoint]) -> Vec<Map> {
    let all = endpoints.iter().flat_map(|endpoint| {
        let ports = endpoint.ports.iter();
        // What is bound to the loopback is not to be had from outside.
        let outside = ports.filter(|port| !port.host.is_loopback());
        outside.map(|port| (endpoint.ipv4, *port))
    });
    let (mut any, mut at) = (Vec::new(), Vec::new());
    for (container, port) in all {
        let mut entry = Entry {
            address: None,
            protocol: port.protocol.number(),
            port: port.host_port,
            to: (container, port.container_port),
        };
        match port.host {
            IpAddr::V4(host) if !host.is_unspecified() => {
                entry.address = Some(host);
                at.push(entry);
            }
            IpAddr::V4(_) => any.push(entry),
            // By the proxy.
            IpAddr::V6(_) => {}
        }
    }
    let map = |name, has_address, entries| Map {
        name,
        has_address,
        entries,
    };
    vec![map(ANY, false, any), map(AT, true, at)]
}

/// Of the host's own ports, those that are a container's, for whoever comes from outside:
/// what the host itself sends is served by a proxy.
fn published() -> Vec<Rule> {
    let mut rules = vec![rule([from_bridges()], Then::Accept)];
    for then in [Then::RedirectByAddress(AT), Then::RedirectByPort(ANY)] {
        rules.push(rule([When::Ipv4, When::ToUs], then));
    }
    rules
}

fn translated(networks: &[Network]) -> Vec<Rule> {
    let outside = networks.iter().filter(|network| !network.spec.internal);
    let of_net = |network: &Network, net: IpNet| {
        let not_inside = When::NotTo(Interface::Named(network.bridge()));
        rule([When::Source(net), not_inside], Then::Masquerade)
    };
    outside
        .flat_map(|network| network.nets().map(|net| of_net(network, net)))
        .collect()
}

fn from(network: &Network) -> When {
    When::From(Interface::Named(network.bridge()))
}

fn to(network: &Network) -> When {
    When::To(Interface::Named(network.bridge()))
}

/// A container does not reach the host itself, but for the gateway's answers to pings and
/// what the host has asked it; unless its network is one that may. Each rule is for a
/// network of ours: another state directory has rules of its own.
fn host_services(networks: &[Network]) -> Vec<Rule> {
    let mut rules = Vec::new();
    for network in networks.iter().filter(|network| !network.spec.host_access) {
        rules.push(rule([from(network), When::Known], Then::Accept));
        for control in When::control() {
            rules.push(rule([from(network), control], Then::Accept));
        }
        rules.push(rule([from(network)], Then::Reject));
    }
    rules
}

/// Between the bridges and the rest of the world.
fn between(networks: &[Network]) -> Vec<Rule> {
    let mut rules = Vec::new();
    for network in networks {
        // Seen here only where the host has bridged packets filtered
        // (net.bridge.bridge-nf-call-iptables).
        rules.push(rule([from(network), to(network)], Then::Accept));
    }
    for network in networks {
        rules.push(rule([from(network), to_bridges()], Then::Reject));
        rules.push(rule([from_bridges(), to(network)], Then::Reject));
        if network.spec.internal {
            rules.push(rule([from(network)], Then::Reject));
            rules.push(rule([to(network)], Then::Drop));
        }
        rules.push(rule([to(network), When::Known], Then::Accept));
        rules.push(rule([to(network), When::Translated], Then::Accept));
        rules.push(rule([to(network)], Then::Drop));
    }
    rules
}

impl Protocol {
    /// Its number in IP's header.
    fn number(self) -> u8 {
        match self {
            Self::Tcp => IPPROTO_TCP,
            Self::Udp => IPPROTO_UDP,
        }
    }
}
