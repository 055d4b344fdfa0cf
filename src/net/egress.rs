//! Where a container may go: the outside, if nothing is said, or only what is named.

use super::publish::Protocol;
use anyhow::{Context, Result, bail};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use std::net::IpAddr;
use std::ops::RangeInclusive;

/// How many words there may be: each packet is held against all.
const ALLOWED_MAX: usize = 64;

/// A container's policy.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Egress {
    /// All of the outside, and its own networks, but for link-local addresses, where
    /// clouds keep their secrets.
    #[default]
    Outside,
    /// This, and nothing else.
    Only(Vec<Allowed>),
}

/// Something that a container may reach.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Allowed {
    /// The host's name servers may be asked, through the container's own.
    Dns,
    /// The containers of its networks.
    Networks,
    /// Addresses.
    Net {
        /// Which.
        net: IpNet,
        /// All, if none.
        ports: Option<RangeInclusive<u16>>,
        /// All, if none; of those with ports, if there are ports.
        protocol: Option<Protocol>,
    },
}

impl Egress {
    /// Reads words, each `none`, `dns`, `networks`, or `CIDR[:PORT[-PORT]][/tcp|udp]` with
    /// an IPv6 CIDR in brackets if a port follows.
    ///
    /// # Errors
    /// One line.
    pub fn parse(words: &[String]) -> Result<Self> {
        if words.is_empty() {
            return Ok(Self::Outside);
        }
        let mut allowed = Vec::new();
        for word in words.iter().filter(|word| *word != "none") {
            allowed.push(Allowed::parse(word).with_context(|| format!("--egress {word}"))?);
        }
        if words.iter().any(|word| word == "none") && !allowed.is_empty() {
            bail!("--egress none stands alone");
        }
        if allowed.len() > ALLOWED_MAX {
            bail!("--egress is given {ALLOWED_MAX} times at most: name larger networks");
        }
        Ok(Self::Only(allowed))
    }

    /// Whether names of the outside are looked up for it.
    pub fn has_dns(&self) -> bool {
        match self {
            Self::Outside => true,
            Self::Only(allowed) => allowed.contains(&Allowed::Dns),
        }
    }
}

impl Allowed {
    fn parse(word: &str) -> Result<Self> {
        match word {
            "dns" => return Ok(Self::Dns),
            "networks" => return Ok(Self::Networks),
            _ => {}
        }
        const FORM: &str = "it is none, dns, networks, or CIDR[:PORT[-PORT]][/tcp|udp]";
        let (place, protocol) = match word.rsplit_once('/') {
            Some((place, "tcp")) => (place, Some(Protocol::Tcp)),
            Some((place, "udp")) => (place, Some(Protocol::Udp)),
            _ => (word, None),
        };
        let (net, ports) = split(place).context(FORM)?;
        Ok(Self::Net {
            net: parse_net(net).context(FORM)?,
            ports: ports.map(parse_ports).transpose()?,
            protocol,
        })
    }
}

/// A net and its ports.
fn split(text: &str) -> Option<(&str, Option<&str>)> {
    if let Some(rest) = text.strip_prefix('[') {
        let (net, rest) = rest.split_once(']')?;
        return match rest {
            "" => Some((net, None)),
            _ => Some((net, Some(rest.strip_prefix(':')?))),
        };
    }
    // More than one colon is IPv6, without a port.
    match text.split_once(':') {
        Some((net, ports)) if !ports.contains(':') => Some((net, Some(ports))),
        _ => Some((text, None)),
    }
}

fn parse_net(text: &str) -> Option<IpNet> {
    let net = text.parse::<IpNet>().ok();
    let net = net.or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from))?;
    Some(net.trunc())
}

/// `PORT` or `PORT-PORT`.
///
/// # Errors
/// One line.
pub fn parse_ports(text: &str) -> Result<RangeInclusive<u16>> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let port = |text: &str| text.parse::<u16>().ok().filter(|port| *port != 0);
    match (port(first), port(last)) {
        (Some(first), Some(last)) if first <= last => Ok(first..=last),
        _ => bail!("{text:?} is no port: one is 1 to 65535, several are FIRST-LAST"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &[&str]) -> Result<Egress> {
        let words: Vec<String> = words.iter().map(|word| (*word).into()).collect();
        Egress::parse(&words)
    }

    fn net(net: &str, ports: Option<RangeInclusive<u16>>, protocol: Option<Protocol>) -> Allowed {
        Allowed::Net {
            net: net.parse().expect(net),
            ports,
            protocol,
        }
    }

    #[test]
    fn nothing_said_is_the_outside_and_what_is_said_is_all() {
        assert_eq!(parse(&[]).expect("fine"), Egress::Outside);
        assert_eq!(parse(&["none"]).expect("fine"), Egress::Only(Vec::new()));
        let all = parse(&[
            "dns",
            "networks",
            "10.1.2.3/8",
            "192.0.2.1:443/tcp",
            "192.0.2.0/24:1000-2000",
            "[2001:db8::/32]:53/udp",
            "2001:db8::1",
        ]);
        let expected = vec![
            Allowed::Dns,
            Allowed::Networks,
            net("10.0.0.0/8", None, None),
            net("192.0.2.1/32", Some(443..=443), Some(Protocol::Tcp)),
            net("192.0.2.0/24", Some(1000..=2000), None),
            net("2001:db8::/32", Some(53..=53), Some(Protocol::Udp)),
            net("2001:db8::1/128", None, None),
        ];
        assert_eq!(all.expect("fine"), Egress::Only(expected));
    }

    #[test]
    fn what_is_wrong_is_refused_in_one_line() {
        for word in [
            "",
            "example.com",
            "10.0.0.0/33",
            "10.0.0.1:0",
            "10.0.0.1:9-8",
            "10.0.0.1:x",
            "[2001:db8::1",
            "[2001:db8::1]443",
            "10.0.0.1/icmp",
        ] {
            let error = format!("{:#}", parse(&[word]).expect_err(word));
            assert!(
                error.starts_with("--egress") && !error.contains('\n'),
                "{error}"
            );
        }
        assert!(parse(&["none", "dns"]).is_err());
        let many: Vec<String> = (0..65).map(|n| format!("192.0.2.{n}")).collect();
        assert!(Egress::parse(&many).is_err());
    }
}
