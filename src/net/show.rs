//! The networks of a container as people and tools see them: docker's words and objects.

use super::publish::Publish;
use crate::container::Record;
use fork::addresses;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};

/// Docker's column of `ps`.
pub fn ports_column(record: &Record) -> String {
    let mut words: Vec<String> = Vec::new();
    for port in &record.state.ports {
        for address in hosts(port) {
            let (host, to) = (port.host_port, port_name(port));
            words.push(match address {
                IpAddr::V4(address) => format!("{address}:{host}->{to}"),
                IpAddr::V6(address) => format!("[{address}]:{host}->{to}"),
            });
        }
    }
    words.extend(unpublished(record).cloned());
    words.join(", ")
}

/// The lines of `port`: those of all ports, or of one, named `PORT[/PROTOCOL]`.
pub fn port_lines(record: &Record, wanted: Option<&str>) -> Vec<String> {
    let wanted = wanted.map(|text| match text.contains('/') {
        true => text.to_owned(),
        false => format!("{text}/tcp"),
    });
    let ports = record.state.ports.iter();
    let lines = ports.flat_map(|port| {
        let name = port_name(port);
        let is_meant = wanted.as_ref().is_none_or(|wanted| *wanted == name);
        let prefix = match &wanted {
            Some(_) => String::new(),
            None => format!("{name} -> "),
        };
        let line = move |address| format!("{prefix}{}", socket(address, port.host_port));
        hosts(port).into_iter().filter(move |_| is_meant).map(line)
    });
    lines.collect()
}

/// Adds docker's fields of its networks to an object of `inspect`.
pub fn describe(record: &Record, object: &mut Value) {
    let plan = &record.spec.network;
    let mode = plan.networks.first().map_or("none", |one| &one.network);
    object["HostConfig"]["NetworkMode"] = json!(mode);
    object["HostConfig"]["PortBindings"] = bindings(&plan.publish);
    object["VmRun"]["Egress"] = json!(plan.egress);
    object["VmRun"]["NetworkRates"] = json!(plan.rates);
    let mut ports = bindings(&record.state.ports);
    for name in unpublished(record) {
        ports[name] = Value::Null;
    }
    let networks: Map<String, Value> = record
        .state
        .places
        .iter()
        .map(|place| (place.network.clone(), endpoint(place)))
        .collect();
    object["NetworkSettings"] = json!({
        "Ports": ports,
        "Networks": networks,
        // What it has inside, as every container.
        "GuestAddresses": if plan.is_connected() {
            json!([IpAddr::from(addresses::IPV4), IpAddr::from(addresses::IPV6)])
        } else {
            json!([])
        },
    });
}

fn endpoint(place: &super::Place) -> Value {
    let ipv6 = place.ipv6;
    json!({
        "NetworkID": place.network_id,
        "Aliases": place.aliases,
        "Gateway": place.gateway,
        "IPAddress": place.ipv4.addr(),
        "IPPrefixLen": place.ipv4.prefix_len(),
        "GlobalIPv6Address": ipv6.map(|net| net.addr().to_string()).unwrap_or_default(),
        "GlobalIPv6PrefixLen": ipv6.map(|net| net.prefix_len()).unwrap_or_default(),
    })
}

/// Docker's map from a port of the container to those of the host.
fn bindings(ports: &[Publish]) -> Value {
    let mut all: BTreeMap<String, Vec<Value>> = BTreeMap::new();
    for port in ports {
        let of_one = all.entry(port_name(port)).or_default();
        for host in hosts(port) {
            of_one.push(json!({
                "HostIp": host,
                "HostPort": port.host_port.to_string(),
            }));
        }
    }
    json!(all)
}

/// The ports that its image speaks of and nobody has published.
fn unpublished(record: &Record) -> impl Iterator<Item = &String> {
    let is_published = |name: &String| {
        record
            .state
            .ports
            .iter()
            .any(|port| port_name(port) == *name)
    };
    let exposed = record.spec.options.exposed_ports.iter();
    exposed.filter(move |name| !is_published(name))
}

fn port_name(port: &Publish) -> String {
    format!("{}/{}", port.container_port, port.protocol.word())
}

/// Where it is bound: without an address, in both families.
fn hosts(port: &Publish) -> Vec<IpAddr> {
    let both = port.host.is_unspecified() && port.host.is_ipv4();
    let ipv6 = both.then_some(IpAddr::V6(Ipv6Addr::UNSPECIFIED));
    [port.host].into_iter().chain(ipv6).collect()
}

fn socket(address: IpAddr, port: u16) -> String {
    std::net::SocketAddr::new(address, port).to_string()
}
