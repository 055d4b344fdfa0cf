//! What `run` and `create` take of networks.

use super::egress::Egress;
use super::publish::Publish;
use super::rates;
use super::store::DEFAULT;
use super::{Membership, Plan, attachment};
use crate::image::ImageConfig;
use anyhow::{Context, Result, bail};
use std::net::Ipv4Addr;

/// What can be typed.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Networks")]
pub struct NetworkArgs {
    /// Connect it: bridge, a network of one's own, or none; may be given more than once
    /// [default: bridge, and none without root]
    #[arg(long, visible_alias = "net", value_name = "NETWORK")]
    network: Vec<String>,
    /// One more name of it on its networks
    #[arg(long, visible_alias = "net-alias", value_name = "NAME")]
    network_alias: Vec<String>,
    /// Its address, on a network of one's own
    #[arg(long, value_name = "ADDRESS")]
    ip: Option<Ipv4Addr>,
    /// Make a port of it one of the host's
    #[arg(short, long, value_name = "[[ADDRESS:]PORT:]PORT[/udp]")]
    publish: Vec<String>,
    /// Make all ports that its image speaks of some of the host's
    #[arg(short = 'P', long)]
    publish_all: bool,
    /// Let it reach only this: none, dns, networks, or CIDR[:PORT[-PORT]][/tcp|udp]; may be
    /// given more than once [default: the outside]
    #[arg(long, value_name = "WHERE")]
    egress: Vec<String>,
    /// Let so many bytes go through its network in a second: both ways, or by in=N and
    /// out=N
    #[arg(long, value_name = "[in=|out=]N[kmg]")]
    network_bps: Vec<String>,
    /// The same for packets
    #[arg(long, value_name = "[in=|out=]N")]
    network_pps: Vec<String>,
}

/// A container that asked for nothing, and for whom nothing can be done, is told so.
const NO_ROOT: &str = "it has no network: that takes root (--network none says that this is meant)";

impl NetworkArgs {
    /// The checked plan, and what a person has to be told.
    ///
    /// # Errors
    /// One line.
    pub fn plan(
        &self,
        config: &ImageConfig,
        is_root: bool,
    ) -> Result<(Plan, Option<&'static str>)> {
        let mut plan = Plan {
            networks: self.networks(is_root)?,
            publish: Vec::new(),
            egress: Egress::parse(&self.egress)?,
            rates: rates::parse(&self.network_bps, &self.network_pps)?,
        };
        for text in &self.publish {
            plan.publish.extend(Publish::parse(text)?);
        }
        if self.publish_all {
            for text in config.exposed_ports.keys() {
                let exposed = Publish::exposed(text);
                let is_new = |one: &Publish| !plan.publish.iter().any(|p| is_same(p, one));
                let new: Vec<Publish> = exposed.into_iter().filter(is_new).collect();
                plan.publish.extend(new);
            }
        }
        if plan.is_connected() {
            return Ok((plan, None));
        }
        if let Some(option) = self.needs_network() {
            bail!("{option} is for a container with a network, and this one has none");
        }
        Ok((plan, self.network.is_empty().then_some(NO_ROOT)))
    }

    /// An option that was given and asks for a network.
    pub fn given(&self) -> Option<&'static str> {
        let wants = self.network.iter().any(|name| name != "none");
        self.needs_network()
            .or_else(|| wants.then_some("--network"))
    }

    fn needs_network(&self) -> Option<&'static str> {
        let all = [
            (!self.publish.is_empty(), "--publish"),
            (self.publish_all, "--publish-all"),
            (!self.network_alias.is_empty(), "--network-alias"),
            (self.ip.is_some(), "--ip"),
            (!self.egress.is_empty(), "--egress"),
            (!self.network_bps.is_empty(), "--network-bps"),
            (!self.network_pps.is_empty(), "--network-pps"),
        ];
        all.iter().find(|(given, _)| *given).map(|(_, name)| *name)
    }

    fn networks(&self, is_root: bool) -> Result<Vec<Membership>> {
        let mut networks: Vec<Membership> = Vec::new();
        for name in &self.network {
            let name = match name.as_str() {
                "none" if self.network.len() == 1 => return Ok(Vec::new()),
                "none" => bail!("--network none stands alone"),
                "host" => bail!(
                    "--network host: a container has a kernel of its own, and not the host's network: publish ports with -p"
                ),
                "default" => DEFAULT,
                other if other.starts_with("container:") => bail!(
                    "--network {other}: a container has a kernel of its own, and cannot share another's network"
                ),
                other => other,
            };
            if networks.iter().any(|one| one.network == name) {
                bail!("--network {name} is given twice");
            }
            networks.push(Membership {
                network: name.to_owned(),
                ..Membership::default()
            });
        }
        if networks.is_empty() && is_root {
            networks.push(Membership {
                network: DEFAULT.to_owned(),
                ..Membership::default()
            });
        }
        if networks.len() > attachment::NETWORKS_MAX {
            bail!(
                "a container is on {} networks at most",
                attachment::NETWORKS_MAX
            );
        }
        self.details(&mut networks)?;
        Ok(networks)
    }

    fn details(&self, networks: &mut [Membership]) -> Result<()> {
        for alias in &self.network_alias {
            crate::container::check_name(alias)
                .with_context(|| format!("--network-alias {alias}"))?;
        }
        let own = networks.iter_mut().filter(|one| one.network != DEFAULT);
        for (number, one) in own.enumerate() {
            one.aliases.clone_from(&self.network_alias);
            if number == 0 {
                one.ipv4 = self.ip;
            }
        }
        let has_own = networks.iter().any(|one| one.network != DEFAULT);
        if !has_own && (self.ip.is_some() || !self.network_alias.is_empty()) {
            bail!(
                "--ip and --network-alias are for networks of one's own: make one with `network create`"
            );
        }
        Ok(())
    }
}

/// Whether they are the same port of the container.
fn is_same(one: &Publish, other: &Publish) -> bool {
    (one.container_port, one.protocol) == (other.container_port, other.protocol)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: NetworkArgs,
    }

    fn plan(words: &[&str], is_root: bool) -> Result<(Plan, Option<&'static str>)> {
        let line = Line::try_parse_from([&["run"], words].concat())?;
        let mut config = ImageConfig::default();
        for port in ["80/tcp", "53/udp"] {
            config
                .exposed_ports
                .insert(port.into(), serde_json::json!({}));
        }
        line.args.plan(&config, is_root)
    }

    fn names(words: &[&str]) -> Vec<String> {
        let (plan, _) = plan(words, true).expect("fine");
        plan.networks.into_iter().map(|one| one.network).collect()
    }

    #[test]
    fn root_is_on_the_bridge_and_others_are_told_that_they_are_not() {
        assert_eq!(names(&[]), ["bridge"]);
        assert_eq!(names(&["--network", "none"]), [""; 0]);
        assert_eq!(
            names(&["--network", "a", "--net", "default"]),
            ["a", "bridge"]
        );
        let (empty, notice) = plan(&[], false).expect("fine");
        assert!(!empty.is_connected() && notice.is_some());
        let (_, notice) = plan(&["--network", "none"], false).expect("fine");
        assert_eq!(notice, None);
    }

    #[test]
    fn all_exposed_ports_are_published_once() {
        let (plan, _) = plan(&["-P", "-p", "8080:80"], true).expect("fine");
        let ports: Vec<(u16, u16)> = plan
            .publish
            .iter()
            .map(|one| (one.host_port, one.container_port))
            .collect();
        assert_eq!(ports, [(8080, 80), (0, 53)]);
    }

    #[test]
    fn what_is_wrong_is_refused_in_one_line() {
        for (words, why) in [
            (&["--network", "host"][..], "kernel of its own"),
            (&["--network", "container:x"], "kernel of its own"),
            (&["--network", "none", "--network", "a"], "alone"),
            (&["--network", "none", "-p", "80"], "--publish is for"),
            (&["--network", "a", "--network", "a"], "twice"),
            (&["--ip", "10.0.0.2"], "one's own"),
            (
                &["--network-alias", "x y", "--network", "a"],
                "--network-alias",
            ),
        ] {
            let error = format!("{:#}", plan(words, true).expect_err(why));
            assert!(error.contains(why) && !error.contains('\n'), "{error}");
        }
    }
}
