//! The options of `run` and `create` that most containers do without: what can be
//! typed, and what of it is refused.

use super::health::HealthArgs;
use super::{tmpfs, ulimit};
use crate::args::size;
use crate::container::{HOST_GATEWAY, Options, normalize_capability};
use crate::image::ImageConfig;
use crate::net::Naming;
use anyhow::{Context, Result, bail};
use std::net::IpAddr;
use std::path::PathBuf;

/// What can be typed.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Options as docker's")]
pub struct OptionArgs {
    /// Let root do more: a capability, or ALL
    #[arg(long, value_name = "CAPABILITY")]
    cap_add: Vec<String>,
    /// Let root do less: a capability, or ALL
    #[arg(long, value_name = "CAPABILITY")]
    cap_drop: Vec<String>,
    /// Let it do everything in its virtual machine, with all of that's devices
    #[arg(long)]
    privileged: bool,
    /// no-new-privileges[=true|false]; what switches off confinement that is not there
    /// is taken too
    #[arg(long, value_name = "OPTION")]
    security_opt: Vec<String>,
    /// Limit a resource of its processes; -1 is no limit
    #[arg(long, value_name = "NAME=SOFT[:HARD]")]
    ulimit: Vec<String>,
    /// Mount a file system in memory
    #[arg(long, value_name = "PATH[:OPTIONS]")]
    tmpfs: Vec<String>,
    /// The size of /dev/shm [default: 64m]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    shm_size: Option<u64>,
    /// Run an init as PID 1, which hands on signals and reaps orphans
    #[arg(long)]
    init: bool,
    /// Be in one more group, a name or a number
    #[arg(long, value_name = "GROUP")]
    group_add: Vec<String>,
    /// Set a kernel parameter
    #[arg(long, value_name = "NAME=VALUE")]
    sysctl: Vec<String>,
    /// Add a line to /etc/hosts
    #[arg(long, value_name = "HOST:ADDRESS")]
    add_host: Vec<String>,
    /// Name a server in /etc/resolv.conf
    #[arg(long, value_name = "ADDRESS")]
    dns: Vec<String>,
    /// Look for names in this domain, too; . for none
    #[arg(long, value_name = "DOMAIN")]
    dns_search: Vec<String>,
    /// Set an option of the resolver
    #[arg(long, visible_alias = "dns-opt", value_name = "OPTION")]
    dns_option: Vec<String>,
    /// The NIS domain name
    #[arg(long, value_name = "NAME")]
    domainname: Option<String>,
    /// How much rather than others its processes are ended when memory is out
    #[arg(long, value_name = "-1000..1000", allow_negative_numbers = true)]
    oom_score_adj: Option<i32>,
    /// The most processes; -1 or 0 for no limit
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pids_limit: Option<i64>,
    /// Set the labels of a file, one a line
    #[arg(long, value_name = "FILE")]
    pub(super) label_file: Vec<PathBuf>,
    /// Write the container's id to this file
    #[arg(long, value_name = "FILE")]
    pub(super) cidfile: Option<PathBuf>,
    #[command(flatten)]
    health: HealthArgs,
}

/// What /etc/hosts and /etc/resolv.conf may hold of a user's, in bytes: they are in
/// the guest's memory.
const NAMES_MAX: usize = 32 << 10;

impl OptionArgs {
    /// The checked options of a container of an image.
    ///
    /// # Errors
    /// One line, in docker's words where docker has words.
    pub fn check(&self, config: &ImageConfig) -> Result<Options> {
        let capabilities = |names: &[String]| -> Result<Vec<String>> {
            names
                .iter()
                .map(|name| normalize_capability(name))
                .collect()
        };
        let ulimits = self.ulimit.iter().map(|text| ulimit::parse(text));
        let options = Options {
            cap_add: capabilities(&self.cap_add).context("--cap-add")?,
            cap_drop: capabilities(&self.cap_drop).context("--cap-drop")?,
            privileged: self.privileged,
            no_new_privileges: no_new_privileges(&self.security_opt)?,
            security_opt: self.security_opt.clone(),
            ulimits: ulimits.collect::<Result<_>>()?,
            tmpfs: self
                .tmpfs
                .iter()
                .map(|text| tmpfs::parse(text))
                .collect::<Result<_>>()?,
            shm_size: self.shm_size.map(shm_size).transpose()?,
            init: self.init,
            group_add: self.group_add.clone(),
            sysctls: self
                .sysctl
                .iter()
                .map(|text| sysctl(text))
                .collect::<Result<_>>()?,
            extra_hosts: self
                .add_host
                .iter()
                .map(|text| host(text))
                .collect::<Result<_>>()?,
            dns: self
                .dns
                .iter()
                .map(|text| server(text))
                .collect::<Result<_>>()?,
            dns_search: words(&self.dns_search, "--dns-search")?,
            dns_options: words(&self.dns_option, "--dns-option")?,
            domainname: words(self.domainname.as_slice(), "--domainname")?.concat(),
            oom_score_adj: self.oom_score_adj.map(oom_score_adj).transpose()?,
            pids_limit: self
                .pids_limit
                .and_then(|n| u64::try_from(n).ok())
                .filter(|n| *n > 0),
            health: self.health.check(config)?,
            exposed_ports: config.exposed_ports.keys().cloned().collect(),
            ..Options::default()
        };
        let naming = Naming::without_network(&options.dns);
        if options.hosts(&naming).len() + options.resolv_conf(&naming).len() > NAMES_MAX {
            bail!("--add-host, --dns and their like are {NAMES_MAX} bytes at most, all together");
        }
        Ok(options)
    }

    /// An option that was given and decides how a container starts.
    pub fn given(&self) -> Option<&'static str> {
        let all = [
            (!self.cap_add.is_empty(), "--cap-add"),
            (!self.cap_drop.is_empty(), "--cap-drop"),
            (self.privileged, "--privileged"),
            (!self.security_opt.is_empty(), "--security-opt"),
            (!self.ulimit.is_empty(), "--ulimit"),
            (!self.tmpfs.is_empty(), "--tmpfs"),
            (self.shm_size.is_some(), "--shm-size"),
            (self.init, "--init"),
            (!self.group_add.is_empty(), "--group-add"),
            (!self.sysctl.is_empty(), "--sysctl"),
            (!self.add_host.is_empty(), "--add-host"),
            (!self.dns.is_empty(), "--dns"),
            (!self.dns_search.is_empty(), "--dns-search"),
            (!self.dns_option.is_empty(), "--dns-option"),
            (self.domainname.is_some(), "--domainname"),
            (self.oom_score_adj.is_some(), "--oom-score-adj"),
            (self.pids_limit.is_some(), "--pids-limit"),
            (self.health.is_given(), "a health check"),
        ];
        all.iter().find(|(given, _)| *given).map(|(_, name)| *name)
    }
}

/// Whether these forbid new privileges. A container's kernel is its own, and has no
/// other confinement that could be chosen.
fn no_new_privileges(options: &[String]) -> Result<bool> {
    let mut forbids = false;
    for option in options {
        match option.replacen(':', "=", 1).as_str() {
            "no-new-privileges" | "no-new-privileges=true" => forbids = true,
            "no-new-privileges=false" => forbids = false,
            "seccomp=unconfined" | "apparmor=unconfined" | "label=disable" => {}
            _ => bail!(
                "invalid --security-opt: {option:?}: it is no-new-privileges; a container has no seccomp profile, AppArmor or SELinux to choose"
            ),
        }
    }
    Ok(forbids)
}

fn shm_size(size: u64) -> Result<u64> {
    // A tmpfs takes zero for no limit.
    if size == 0 {
        bail!("--shm-size is more than zero");
    }
    Ok(size)
}

fn oom_score_adj(score: i32) -> Result<i32> {
    if !(-1000..=1000).contains(&score) {
        bail!("invalid value {score}, range for oom score adj is [-1000, 1000]");
    }
    Ok(score)
}

/// Those of the IPC and the network namespace (docker/cli opts/opts.go,
/// `ValidateSysctl`).
fn sysctl(text: &str) -> Result<(String, String)> {
    const NAMES: [&str; 8] = [
        "kernel.msgmax",
        "kernel.msgmnb",
        "kernel.msgmni",
        "kernel.sem",
        "kernel.shmall",
        "kernel.shmmax",
        "kernel.shmmni",
        "kernel.shm_rmid_forced",
    ];
    let is_part = |part: &str| {
        !part.is_empty()
            && part
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"_-".contains(&b))
    };
    let allowed = text.split_once('=').filter(|(name, value)| {
        let known =
            NAMES.contains(name) || name.starts_with("net.") || name.starts_with("fs.mqueue.");
        known && name.split('.').all(is_part) && !value.contains(['\0', '\n'])
    });
    let Some((name, value)) = allowed else {
        bail!("sysctl '{text}' is not allowed");
    };
    Ok((name.to_owned(), value.to_owned()))
}

/// `NAME:ADDRESS` or `NAME=ADDRESS`.
fn host(text: &str) -> Result<String> {
    let parts = text.split_once('=').or_else(|| text.split_once(':'));
    let legal = |name: &str| !name.is_empty() && !name.contains([' ', '\t', '\n', ':', '#']);
    let Some((name, address)) = parts.filter(|(name, _)| legal(name)) else {
        bail!("bad format for add-host: {text:?}");
    };
    if address == HOST_GATEWAY {
        return Ok(format!("{name}:{address}"));
    }
    let bare = address
        .strip_prefix('[')
        .and_then(|rest| rest.strip_suffix(']'));
    let Ok(address) = bare.unwrap_or(address).parse::<IpAddr>() else {
        bail!("invalid IP address in add-host: {address:?}");
    };
    Ok(format!("{name}:{address}"))
}

fn server(text: &str) -> Result<String> {
    match text.trim().parse::<IpAddr>() {
        Ok(address) => Ok(address.to_string()),
        Err(_) => bail!("IP address is not correctly formatted: {text}"),
    }
}

/// Words that become part of a line of a file.
fn words(all: &[String], option: &str) -> Result<Vec<String>> {
    for word in all {
        let is_word = |c: char| !c.is_whitespace() && !c.is_control();
        if word.is_empty() || word.len() > 255 || !word.chars().all(is_word) {
            bail!("invalid {option}: {word:?}");
        }
    }
    Ok(all.to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: OptionArgs,
    }

    fn checked(words: &[&str]) -> Result<Options> {
        let line = Line::try_parse_from([&["run"], words].concat())?;
        line.args.check(&ImageConfig::default())
    }

    #[test]
    fn nothing_typed_is_nothing_asked_for() {
        assert_eq!(checked(&[]).expect("is fine"), Options::default());
        let line = Line::parse_from(["run"]);
        assert_eq!(line.args.given(), None);
        let line = Line::parse_from(["run", "--init"]);
        assert_eq!(line.args.given(), Some("--init"));
    }

    #[test]
    fn what_is_typed_is_kept() {
        let options = checked(&[
            "--cap-add",
            "net_admin",
            "--cap-drop",
            "ALL",
            "--security-opt",
            "no-new-privileges",
            "--shm-size",
            "8m",
            "--sysctl",
            "net.ipv4.ip_forward=1",
            "--add-host",
            "db:192.0.2.1",
            "--add-host",
            "six=[2001:db8::1]",
            "--dns",
            "192.0.2.53",
            "--dns-search",
            "a.example",
            "--domainname",
            "example",
            "--oom-score-adj",
            "-500",
            "--pids-limit",
            "-1",
        ])
        .expect("is fine");
        assert_eq!(options.cap_add, ["CAP_NET_ADMIN"]);
        assert_eq!(options.cap_drop, ["ALL"]);
        assert!(options.no_new_privileges && options.shm_size == Some(8 << 20));
        assert_eq!(options.sysctls["net.ipv4.ip_forward"], "1");
        assert_eq!(options.extra_hosts, ["db:192.0.2.1", "six:2001:db8::1"]);
        assert_eq!(options.dns, ["192.0.2.53"]);
        assert_eq!(options.domainname, "example");
        assert_eq!(
            (options.oom_score_adj, options.pids_limit),
            (Some(-500), None)
        );
    }

    #[test]
    fn what_is_wrong_is_refused_in_one_line() {
        let cases = [
            (&["--cap-add", "FLY"][..], "invalid capability"),
            (&["--security-opt", "seccomp=x.json"], "no seccomp profile"),
            (&["--shm-size", "0"], "more than zero"),
            (&["--sysctl", "kernel.panic=1"], "not allowed"),
            (&["--sysctl", "net.ipv4/../../kernel=1"], "not allowed"),
            (&["--sysctl", "net..x=1"], "not allowed"),
            (&["--sysctl", "net.core.somaxconn"], "not allowed"),
            (&["--add-host", "db"], "bad format"),
            (&["--add-host", "d b:192.0.2.1"], "bad format"),
            (&["--add-host", "db:nowhere"], "invalid IP"),
            (&["--dns", "localhost"], "not correctly formatted"),
            (&["--dns-search", "a b"], "invalid --dns-search"),
            (
                &["--dns-option", "a\nnameserver 192.0.2.1"],
                "invalid --dns-option",
            ),
            (&["--domainname", ""], "invalid --domainname"),
            (&["--oom-score-adj", "1001"], "range"),
        ];
        for (words, why) in cases {
            let error = format!("{:#}", checked(words).expect_err("is refused"));
            assert!(
                error.contains(why) && !error.contains('\n'),
                "{words:?}: {error}"
            );
        }
        let many: Vec<String> = (0..2000)
            .map(|n| format!("--add-host=host-{n}:192.0.2.1"))
            .collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        assert!(checked(&many).is_err());
    }
}
