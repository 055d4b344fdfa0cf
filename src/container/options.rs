//! What a container has asked for and most have not, as its record keeps it. Each has
//! been checked when the container was made.

use super::capabilities;
use crate::net::Naming;
use fork::{ContainerOptions, Limit, ProcessOptions, Tmpfs};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::time::Duration;

/// All of it; the default of each is docker's.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Options {
    /// Capabilities beyond docker's default, in docker's notation.
    pub cap_add: Vec<String>,
    /// Capabilities of that default which are not wanted.
    pub cap_drop: Vec<String>,
    /// Whether it may do everything in its guest.
    pub privileged: bool,
    /// Whether no program gives it more privileges.
    pub no_new_privileges: bool,
    /// The security options as they were typed.
    pub security_opt: Vec<String>,
    /// Limits of its processes.
    pub ulimits: Vec<Ulimit>,
    /// File systems in memory, by path.
    pub tmpfs: BTreeMap<String, Memory>,
    /// The size of /dev/shm in bytes.
    pub shm_size: Option<u64>,
    /// Whether its PID 1 is an init.
    pub init: bool,
    /// Groups of its processes beyond the user's.
    pub group_add: Vec<String>,
    /// Kernel parameters.
    pub sysctls: BTreeMap<String, String>,
    /// More hosts, `NAME:ADDRESS` each; an address may be [`HOST_GATEWAY`].
    pub extra_hosts: Vec<String>,
    /// Name servers.
    pub dns: Vec<String>,
    /// Domains in which names are looked for.
    pub dns_search: Vec<String>,
    /// Options of the resolver.
    pub dns_options: Vec<String>,
    /// The NIS domain.
    pub domainname: String,
    /// How much rather than others its processes are ended when memory is out.
    pub oom_score_adj: Option<i32>,
    /// The most memory in bytes; its machine's is another matter.
    pub memory: Option<u64>,
    /// The most processors, in billionths.
    pub nano_cpus: Option<u64>,
    /// The most processes.
    pub pids_limit: Option<u64>,
    /// How it is asked whether it is well.
    pub health: Option<HealthCheck>,
    /// Ports that its image speaks of, `PORT/PROTOCOL` each.
    pub exposed_ports: Vec<String>,
}

/// A limit of a resource; -1 is none.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ulimit {
    /// Docker's name.
    pub name: String,
    /// `RLIMIT_*`.
    pub resource: u32,
    /// What the process is told.
    pub soft: i64,
    /// What it may raise that to.
    pub hard: i64,
}

/// A file system in memory.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// As it was typed.
    pub options: String,
    /// The flags of mount(2).
    pub flags: u32,
    /// The options of tmpfs.
    pub data: String,
}

/// How a container is asked whether it is well.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HealthCheck {
    /// Docker's: `CMD` and a command line, or `CMD-SHELL` and a line for the shell.
    pub test: Vec<String>,
    /// The shell, and its option.
    pub shell: Vec<String>,
    /// How long from one to the next.
    pub interval: Duration,
    /// How long one may take.
    pub timeout: Duration,
    /// How long after its start a failure does not count.
    pub start_period: Duration,
    /// How long from one to the next in that time.
    pub start_interval: Duration,
    /// So many failures in a row, and it is unwell.
    pub retries: u32,
}

impl HealthCheck {
    /// The command line of a probe.
    pub fn command(&self) -> Vec<String> {
        match self.test.split_first() {
            Some((kind, line)) if kind == "CMD-SHELL" => {
                self.shell.iter().chain(line).cloned().collect()
            }
            Some((_, line)) => line.to_vec(),
            None => Vec::new(),
        }
    }
}

const NANO: u64 = 1_000_000_000;

/// Docker's word for the host's address on the container's first network.
pub const HOST_GATEWAY: &str = "host-gateway";

/// Docker's size of /dev/shm.
const SHM_SIZE: u64 = 64 << 20;

impl Options {
    /// What the guest, which has so many processors, is told of the container; its names
    /// come from its network, if it has one.
    pub fn container(&self, cpus: u8, naming: &Naming) -> ContainerOptions {
        let all = u64::from(cpus) * NANO;
        let nano_cpus = self.nano_cpus.filter(|nano| *nano < all);
        ContainerOptions {
            privileged: self.privileged,
            init: self.init,
            tmpfs: self
                .tmpfs
                .iter()
                .map(|(path, memory)| Tmpfs {
                    path: path.clone(),
                    flags: memory.flags,
                    data: memory.data.clone(),
                })
                .collect(),
            shm_size: self.shm_size,
            sysctls: self.sysctls.clone().into_iter().collect(),
            domainname: self.domainname.clone(),
            hosts: self.hosts(naming),
            resolv_conf: self.resolv_conf(naming),
            memory: self.memory,
            // Of each 100 ms, in microseconds.
            cpu_quota: nano_cpus.map(|nano| nano * 100_000 / NANO),
            pids: self.pids_limit,
        }
    }

    /// What it is told of a process, of the container's first or of one that may do
    /// everything.
    pub fn process(&self, privileged: bool) -> ProcessOptions {
        let is_default = self.cap_add.is_empty() && self.cap_drop.is_empty();
        ProcessOptions {
            capabilities: match (self.privileged || privileged, is_default) {
                (true, _) => Some(capabilities::EVERY),
                (false, true) => None,
                (false, false) => Some(capabilities::set(&self.cap_add, &self.cap_drop)),
            },
            no_new_privileges: self.no_new_privileges,
            groups: self.group_add.clone(),
            limits: self.ulimits.iter().map(Ulimit::limit).collect(),
            oom_score_adj: self.oom_score_adj,
        }
    }

    /// Lines for /etc/hosts.
    pub fn hosts(&self, naming: &Naming) -> String {
        let hosts = self
            .extra_hosts
            .iter()
            .filter_map(|host| host.split_once(':'));
        let line = |(name, address): (&str, &str)| match (address, naming.gateway) {
            (HOST_GATEWAY, Some(gateway)) => format!("{gateway}\t{name}\n"),
            (HOST_GATEWAY, None) => String::new(),
            _ => format!("{address}\t{name}\n"),
        };
        hosts.map(line).collect()
    }

    /// The content of /etc/resolv.conf: nothing, if there is nothing to say.
    pub fn resolv_conf(&self, naming: &Naming) -> String {
        let mut text = String::new();
        for server in &naming.servers {
            text += &format!("nameserver {server}\n");
        }
        let said = |own: &[String], naming: &[String]| match own {
            [] => naming.join(" "),
            own => own.join(" "),
        };
        let search = said(&self.dns_search, &naming.search);
        // Docker's word for no domain at all.
        if !search.is_empty() && !self.dns_search.iter().any(|domain| domain == ".") {
            text += &format!("search {search}\n");
        }
        let options = said(&self.dns_options, &naming.options);
        if !options.is_empty() {
            text += &format!("options {options}\n");
        }
        text
    }

    /// Adds docker's fields of all this to an object of `inspect`.
    pub fn describe(&self, object: &mut Value) {
        let strings = |map: &BTreeMap<String, Memory>| -> BTreeMap<String, String> {
            let all = map.iter();
            all.map(|(path, memory)| (path.clone(), memory.options.clone()))
                .collect()
        };
        let ulimits: Vec<Value> = self
            .ulimits
            .iter()
            .map(|one| json!({ "Name": one.name, "Soft": one.soft, "Hard": one.hard }))
            .collect();
        let host = [
            ("CapAdd", json!(self.cap_add)),
            ("CapDrop", json!(self.cap_drop)),
            ("Privileged", json!(self.privileged)),
            ("SecurityOpt", json!(self.security_opt)),
            ("Ulimits", json!(ulimits)),
            ("Tmpfs", json!(strings(&self.tmpfs))),
            ("ShmSize", json!(self.shm_size.unwrap_or(SHM_SIZE))),
            ("Init", json!(self.init)),
            ("GroupAdd", json!(self.group_add)),
            ("Sysctls", json!(self.sysctls)),
            ("ExtraHosts", json!(self.extra_hosts)),
            ("Dns", json!(self.dns)),
            ("DnsSearch", json!(self.dns_search)),
            ("DnsOptions", json!(self.dns_options)),
            ("OomScoreAdj", json!(self.oom_score_adj.unwrap_or_default())),
            ("PidsLimit", json!(self.pids_limit)),
            // Zero is no limit.
            ("Memory", json!(self.memory.unwrap_or_default())),
            ("NanoCpus", json!(self.nano_cpus.unwrap_or_default())),
        ];
        for (name, value) in host {
            object["HostConfig"][name] = value;
        }
        object["Config"]["Domainname"] = json!(self.domainname);
        let ports: BTreeMap<&str, Value> = self
            .exposed_ports
            .iter()
            .map(|port| (port.as_str(), json!({})))
            .collect();
        if !ports.is_empty() {
            object["Config"]["ExposedPorts"] = json!(ports);
        }
        if let Some(check) = &self.health {
            object["Config"]["Healthcheck"] = check.describe();
        }
    }
}

impl HealthCheck {
    /// Docker's object; times in nanoseconds.
    fn describe(&self) -> Value {
        let nanoseconds = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        json!({
            "Test": self.test,
            "Interval": nanoseconds(self.interval),
            "Timeout": nanoseconds(self.timeout),
            "StartPeriod": nanoseconds(self.start_period),
            "StartInterval": nanoseconds(self.start_interval),
            "Retries": self.retries,
        })
    }
}

impl Ulimit {
    fn limit(&self) -> Limit {
        let value = |number: i64| u64::try_from(number).unwrap_or(u64::MAX);
        Limit {
            resource: self.resource,
            soft: value(self.soft),
            hard: value(self.hard),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_asked_for_is_nothing_told() {
        let options = Options::default();
        let nobody = Naming::default();
        assert_eq!(options.container(1, &nobody), ContainerOptions::default());
        assert_eq!(options.process(false), ProcessOptions::default());
        // A record of before has none of it.
        assert_eq!(
            serde_json::from_str::<Options>("{}").expect("loads"),
            options
        );
    }

    #[test]
    fn an_exec_may_do_everything_or_what_the_container_may() {
        let options = Options {
            cap_drop: vec!["ALL".into()],
            ..Options::default()
        };
        assert_eq!(options.process(false).capabilities, Some(0));
        assert_eq!(options.process(true).capabilities, Some(u64::MAX));
    }

    #[test]
    fn a_part_of_the_processors_is_a_part_of_the_time() {
        let quota = |nano_cpus, cpus| {
            let options = Options {
                nano_cpus,
                ..Options::default()
            };
            options.container(cpus, &Naming::default()).cpu_quota
        };
        assert_eq!(quota(Some(NANO / 2), 1), Some(50_000));
        assert_eq!(quota(Some(3 * NANO / 2), 2), Some(150_000));
        assert_eq!(quota(Some(2 * NANO), 2), None);
        assert_eq!(quota(None, 2), None);
    }

    #[test]
    fn the_resolver_is_told_in_its_words() {
        let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
        let options = Options {
            dns: words(&["192.0.2.1", "192.0.2.2"]),
            dns_search: words(&["a.example", "b.example"]),
            dns_options: words(&["ndots:2"]),
            extra_hosts: words(&["six:2001:db8::1", "four:192.0.2.9", "h:host-gateway"]),
            ..Options::default()
        };
        let nobody = Naming::without_network(&options.dns);
        assert_eq!(
            options.resolv_conf(&nobody),
            "nameserver 192.0.2.1\nnameserver 192.0.2.2\nsearch a.example b.example\noptions ndots:2\n"
        );
        assert_eq!(
            options.hosts(&nobody),
            "2001:db8::1\tsix\n192.0.2.9\tfour\n"
        );
        let naming = Naming {
            servers: words(&["192.0.0.1"]),
            search: words(&["host.example"]),
            options: words(&["ndots:0"]),
            gateway: Some([10, 0, 0, 1].into()),
        };
        assert!(options.hosts(&naming).ends_with("10.0.0.1\th\n"));
        assert_eq!(
            Options::default().resolv_conf(&naming),
            "nameserver 192.0.0.1\nsearch host.example\noptions ndots:0\n"
        );
    }
}
