//! Which addresses a new network gets: what was asked for, or the first that nobody has,
//! neither another network nor the host's way to anywhere.

use super::links::Links;
use super::store::NetworkSpec;
use anyhow::{Context, Result, bail};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};

/// Where networks are cut from: docker's are elsewhere, and so are most homes and offices.
const POOL: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(10, 192, 0, 0), 11);

/// The length of one: four thousand containers, of which a bridge takes a thousand.
const LENGTH: u8 = 20;

/// The longest and the shortest prefix that a network may have.
const IPV4_LENGTHS: std::ops::RangeInclusive<u8> = 8..=29;
const IPV6_LENGTHS: std::ops::RangeInclusive<u8> = 16..=96;

/// What is asked of a network.
#[derive(Debug, Clone, Default)]
pub struct Wanted {
    pub ipv4: Option<Ipv4Net>,
    pub ipv6: Option<Ipv6Net>,
    /// Whether it has IPv6, of its own choice if none is given.
    pub has_ipv6: bool,
    pub internal: bool,
    pub host_access: bool,
    pub labels: BTreeMap<String, String>,
}

impl Wanted {
    /// With what was left open decided, for the network `id`.
    ///
    /// # Errors
    /// Nets that overlap with `taken`, or too small ones.
    pub fn spec(&self, id: &str, taken: &[IpNet]) -> Result<NetworkSpec> {
        let ipv4 = match self.ipv4 {
            Some(net) => checked(net.trunc().into(), taken).map(|()| net.trunc())?,
            None => free_net(id, taken)?,
        };
        let ipv6 = match self.ipv6 {
            Some(net) => Some(checked(net.trunc().into(), taken).map(|()| net.trunc())?),
            None => self.has_ipv6.then(|| unique_local(id)),
        };
        Ok(NetworkSpec {
            created: jiff::Timestamp::now(),
            ipv4,
            ipv6,
            internal: self.internal,
            host_access: self.host_access,
            labels: self.labels.clone(),
        })
    }
}

/// A net for the network `id`, that nobody has now.
///
/// # Errors
/// None is left.
pub fn free_net(id: &str, taken: &[IpNet]) -> Result<Ipv4Net> {
    free(id, taken, &host_destinations())
}

/// What of the host's is in the way of a network.
pub fn in_the_way(network: &NetworkSpec) -> Option<IpNet> {
    let own = [Some(IpNet::V4(network.ipv4)), network.ipv6.map(IpNet::V6)];
    let own = own.into_iter().flatten();
    let mut others = host_destinations().into_iter();
    let own: Vec<IpNet> = own.collect();
    others.find(|other| own.iter().any(|net| overlap(net, other)))
}

/// What cannot be asked cannot be avoided either: the kernel refuses then, in its words.
fn host_destinations() -> Vec<IpNet> {
    Links::new().destinations().unwrap_or_else(|error| {
        log::warn!("cannot list the host's routes: {error}");
        Vec::new()
    })
}

fn checked(net: IpNet, taken: &[IpNet]) -> Result<()> {
    let lengths = match net {
        IpNet::V4(_) => IPV4_LENGTHS,
        IpNet::V6(_) => IPV6_LENGTHS,
    };
    if !lengths.contains(&net.prefix_len()) {
        let (first, last) = (lengths.start(), lengths.end());
        bail!("--subnet {net}: its prefix is {first} to {last} bits long");
    }
    let other = taken.iter().find(|other| overlap(&net, other));
    match other {
        Some(other) => bail!("--subnet {net} overlaps with another network's {other}"),
        None => Ok(()),
    }
}

/// Not the first of all: another state directory of this host, whose networks are not on
/// it now, would choose the same.
fn free(id: &str, taken: &[IpNet], host: &[IpNet]) -> Result<Ipv4Net> {
    let all: Vec<Ipv4Net> = POOL.subnets(LENGTH).context("no nets")?.collect();
    let digits = usize::from_str_radix(id.get(..8).unwrap_or_default(), 16);
    let (before, from) = all.split_at(digits.unwrap_or_default() % all.len());
    let is_free = |net: &&Ipv4Net| {
        let mut others = taken.iter().chain(host);
        !others.any(|other| overlap(&IpNet::V4(**net), other))
    };
    let found = from.iter().chain(before).find(is_free);
    found
        .copied()
        .with_context(|| format!("all of {POOL} is taken: give a --subnet"))
}

fn overlap(one: &IpNet, other: &IpNet) -> bool {
    // A default route leads everywhere, and stands in nobody's way.
    other.prefix_len() != 0 && (one.contains(other) || other.contains(one))
}

/// One of RFC 4193, by the id's random digits.
fn unique_local(id: &str) -> Ipv6Net {
    let digits = u128::from_str_radix(&id[..14], 16).unwrap_or_default();
    let bits = 0xfd << 120 | digits << 64;
    Ipv6Net::new_assert(Ipv6Addr::from_bits(bits), 64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nets(texts: &[&str]) -> Vec<IpNet> {
        let parsed = texts.iter().map(|text| text.parse().expect(text));
        parsed.collect()
    }

    #[test]
    fn the_first_that_nobody_has_is_taken() {
        let free = |taken: &[&str], host: &[&str]| {
            let found = free("00000001", &nets(taken), &nets(host));
            found.expect("one").to_string()
        };
        assert_eq!(free(&[], &["0.0.0.0/0", "172.17.0.0/16"]), "10.192.16.0/20");
        assert_eq!(free(&["10.192.16.0/20"], &[]), "10.192.32.0/20");
        assert_eq!(
            free(&["10.192.16.0/20"], &["10.192.32.0/24"]),
            "10.192.48.0/20"
        );
        assert!(super::free("0", &nets(&["10.0.0.0/8"]), &[]).is_err());
    }

    #[test]
    fn what_is_asked_for_is_checked() {
        let wanted = |net: &str| Wanted {
            ipv4: Some(net.parse().expect(net)),
            ..Wanted::default()
        };
        let id = "ab".repeat(32);
        let taken = nets(&["10.1.0.0/16"]);
        let spec = wanted("10.2.3.4/24").spec(&id, &taken).expect("fine");
        assert_eq!(spec.ipv4.to_string(), "10.2.3.0/24");
        for bad in ["10.1.2.0/24", "10.0.0.0/8", "10.3.0.0/30", "10.0.0.0/4"] {
            let error = wanted(bad).spec(&id, &taken).expect_err(bad).to_string();
            assert!(
                error.starts_with("--subnet") && !error.contains('\n'),
                "{error}"
            );
        }
        let six = Wanted {
            has_ipv6: true,
            ..wanted("10.2.0.0/24")
        };
        let net = six.spec(&id, &[]).expect("fine").ipv6.expect("asked for");
        assert_eq!(net.to_string(), "fdab:abab:abab:abab::/64");
    }
}
