//! Ports of the host that are a container's: docker's notation.

use super::egress::parse_ports;
use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use std::net::{IpAddr, Ipv4Addr};

/// A protocol that has ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    Tcp,
    Udp,
}

impl Protocol {
    /// Docker's word.
    pub fn word(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }
}

/// A port that was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Publish {
    /// The host's address; the unspecified one for all, of both families.
    pub host: IpAddr,
    /// The host's port; zero for one that is free.
    pub host_port: u16,
    pub container_port: u16,
    pub protocol: Protocol,
}

/// A range of ports is so long at most: each is a socket.
const RANGE_MAX: usize = 1024;

impl Publish {
    /// Reads `[[ADDRESS:][PORT[-PORT]]:]PORT[-PORT][/tcp|udp]`.
    ///
    /// # Errors
    /// One line.
    pub fn parse(text: &str) -> Result<Vec<Self>> {
        Self::parse_all(text).with_context(|| format!("-p {text}"))
    }

    fn parse_all(text: &str) -> Result<Vec<Self>> {
        let (rest, protocol) = match text.split_once('/') {
            None => (text, Protocol::Tcp),
            Some((rest, "tcp")) => (rest, Protocol::Tcp),
            Some((rest, "udp")) => (rest, Protocol::Udp),
            Some((_, other)) => bail!("the protocol is tcp or udp, not {other:?}"),
        };
        let (host, rest) = split_address(rest)?;
        let (host_ports, container_ports) = match rest.rsplit_once(':') {
            Some((host, container)) => (host, container),
            None => ("", rest),
        };
        let container = parse_ports(container_ports)?;
        if container.len() > RANGE_MAX {
            bail!("a range is {RANGE_MAX} ports at most");
        }
        let publish = |host_port, container_port| Self {
            host,
            host_port,
            container_port,
            protocol,
        };
        if host_ports.is_empty() {
            return Ok(container.map(|port| publish(0, port)).collect());
        }
        let on_host = parse_ports(host_ports)?;
        if on_host.len() != container.len() {
            bail!("the two ranges have different lengths");
        }
        Ok(on_host
            .zip(container)
            .map(|(host, container)| publish(host, container))
            .collect())
    }

    /// Of an image's `PORT[-PORT]/PROTOCOL`, at any free port of the host; nothing for
    /// another protocol.
    pub fn exposed(text: &str) -> Vec<Self> {
        Self::parse_all(text).unwrap_or_default()
    }
}

/// The address in front, if there is one.
fn split_address(text: &str) -> Result<(IpAddr, &str)> {
    let any = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
    let bad = |address: &str| format!("{address:?} is no address of a host");
    if let Some(rest) = text.strip_prefix('[') {
        let (address, rest) = rest.split_once("]:").with_context(|| bad(text))?;
        return Ok((address.parse().with_context(|| bad(address))?, rest));
    }
    // With two colons, the first of three parts is one.
    match text.split_once(':') {
        Some((address, rest)) if rest.contains(':') => {
            let address = match address {
                "" => any,
                _ => address.parse().with_context(|| bad(address))?,
            };
            Ok((address, rest))
        }
        _ => Ok((any, text)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(host: &str, host_port: u16, container_port: u16, protocol: Protocol) -> Publish {
        Publish {
            host: host.parse().expect(host),
            host_port,
            container_port,
            protocol,
        }
    }

    #[test]
    fn ports_are_read_as_docker_reads_them() {
        use Protocol::{Tcp, Udp};
        for (text, expected) in [
            ("80", vec![one("0.0.0.0", 0, 80, Tcp)]),
            ("8080:80", vec![one("0.0.0.0", 8080, 80, Tcp)]),
            ("53:53/udp", vec![one("0.0.0.0", 53, 53, Udp)]),
            ("127.0.0.1:8080:80", vec![one("127.0.0.1", 8080, 80, Tcp)]),
            ("127.0.0.1::80", vec![one("127.0.0.1", 0, 80, Tcp)]),
            ("[::1]:8080:80", vec![one("::1", 8080, 80, Tcp)]),
            (
                "8000-8001:80-81/tcp",
                vec![one("0.0.0.0", 8000, 80, Tcp), one("0.0.0.0", 8001, 81, Tcp)],
            ),
        ] {
            assert_eq!(Publish::parse(text).expect(text), expected, "{text}");
        }
        assert_eq!(Publish::exposed("53/udp"), [one("0.0.0.0", 0, 53, Udp)]);
        assert_eq!(Publish::exposed("7/sctp"), []);
    }

    #[test]
    fn what_is_wrong_is_refused_in_one_line() {
        for text in [
            "",
            "x",
            "0",
            "70000",
            "80/sctp",
            "1-2:80",
            "host:1:80",
            "[::1:80",
            "1:2:3:4",
            "9-8:9-8",
            "1-2000:1-2000",
        ] {
            let error = format!("{:#}", Publish::parse(text).expect_err(text));
            assert!(error.starts_with("-p") && !error.contains('\n'), "{error}");
        }
    }
}
