//! What a container is to be, in docker's API, as the words that `vm-run create` has for
//! it: one place reads and checks them, and both faces refuse the same.

use docker_api::Error;
use docker_api::models::{
    ContainerCreateBody, HealthConfig, HostConfig, Mount, MountType, NetworkingConfig, PortMap,
};
use std::collections::HashMap;

/// Docker's words for what is here as it is anyway.
const DEFAULTS: [&str; 4] = ["", "default", "private", "runc"];

/// The words after `create`.
///
/// # Errors
/// What docker has and we have not.
pub fn of(name: Option<&str>, body: &ContainerCreateBody) -> Result<Vec<String>, Error> {
    let mut words = Words(vec!["create".into(), "--pull=never".into()]);
    words.value("name", name);
    words.own(body);
    if let Some(host) = &body.host_config {
        refuse(host)?;
        words.host(host)?;
    }
    let mode = body
        .host_config
        .as_ref()
        .and_then(|host| host.network_mode.as_deref());
    words.networks(mode, body.networking_config.as_ref(), body.network_disabled)?;
    words.command(body)?;
    Ok(words.0)
}

struct Words(Vec<String>);

impl Words {
    fn flag(&mut self, name: &str, is_set: Option<bool>) {
        if is_set == Some(true) {
            self.0.push(format!("--{name}"));
        }
    }

    /// In one word: a value may begin with a dash.
    fn value(&mut self, name: &str, value: Option<impl std::fmt::Display>) {
        if let Some(value) = value {
            self.0.push(format!("--{name}={value}"));
        }
    }

    fn text(&mut self, name: &str, value: &Option<String>) {
        self.value(name, value.as_deref().filter(|value| !value.is_empty()));
    }

    fn each(&mut self, name: &str, values: &Option<Vec<String>>) {
        for value in values.iter().flatten() {
            self.value(name, Some(value));
        }
    }

    fn pairs(&mut self, name: &str, separator: char, values: &Option<HashMap<String, String>>) {
        let mut all: Vec<_> = values.iter().flatten().collect();
        all.sort();
        for (key, value) in all {
            let value = match value.is_empty() && separator == ':' {
                true => key.clone(),
                false => format!("{key}{separator}{value}"),
            };
            self.value(name, Some(value));
        }
    }

    fn own(&mut self, body: &ContainerCreateBody) {
        self.text("hostname", &body.hostname);
        self.text("domainname", &body.domainname);
        self.text("user", &body.user);
        self.text("workdir", &body.working_dir);
        self.text("stop-signal", &body.stop_signal);
        self.value("stop-timeout", body.stop_timeout);
        self.flag("tty", body.tty);
        self.flag("interactive", body.open_stdin);
        for word in body.env.iter().flatten() {
            // Without a value it would be the daemon's own.
            if word.contains('=') {
                self.value("env", Some(word));
            }
        }
        self.pairs("label", '=', &body.labels);
        for path in body.volumes.iter().flatten() {
            self.value("volume", Some(path));
        }
        if let Some(health) = &body.healthcheck {
            self.health(health);
        }
    }

    fn health(&mut self, health: &HealthConfig) {
        match health.test.as_deref().unwrap_or_default() {
            [none] if none == "NONE" => self.0.push("--no-healthcheck".into()),
            [kind, line] if kind == "CMD-SHELL" => self.value("health-cmd", Some(line)),
            [kind, line @ ..] if kind == "CMD" => {
                let quoted = shlex::try_join(line.iter().map(String::as_str));
                self.value("health-cmd", quoted.ok());
            }
            _ => {}
        }
        let time = |nanoseconds: Option<i64>| {
            let some = nanoseconds.filter(|nanoseconds| *nanoseconds > 0);
            some.map(|nanoseconds| format!("{nanoseconds}ns"))
        };
        self.value("health-interval", time(health.interval));
        self.value("health-timeout", time(health.timeout));
        self.value("health-start-period", time(health.start_period));
        self.value("health-start-interval", time(health.start_interval));
        self.value("health-retries", health.retries.filter(|count| *count > 0));
    }

    fn host(&mut self, host: &HostConfig) -> Result<(), Error> {
        let positive = |number: Option<i64>| number.filter(|number| *number > 0);
        self.flag("rm", host.auto_remove);
        self.flag("privileged", host.privileged);
        self.flag("init", host.init);
        self.flag("read-only", host.readonly_rootfs);
        self.flag("publish-all", host.publish_all_ports);
        self.each("volume", &host.binds);
        self.each("cap-add", &host.cap_add);
        self.each("cap-drop", &host.cap_drop);
        self.each("dns", &host.dns);
        self.each("dns-search", &host.dns_search);
        self.each("dns-option", &host.dns_options);
        self.each("add-host", &host.extra_hosts);
        self.each("group-add", &host.group_add);
        self.each("security-opt", &host.security_opt);
        self.pairs("sysctl", '=', &host.sysctls);
        self.pairs("tmpfs", ':', &host.tmpfs);
        self.pairs("storage-opt", '=', &host.storage_opt);
        self.value("memory", positive(host.memory));
        self.value("shm-size", positive(host.shm_size));
        self.value("pids-limit", positive(host.pids_limit));
        self.value(
            "oom-score-adj",
            host.oom_score_adj.filter(|score| *score != 0),
        );
        self.value("cpus", cpus(host).map(|nano| nano as f64 / 1e9));
        for limit in host.ulimits.iter().flatten() {
            let (soft, hard) = (limit.soft.unwrap_or(-1), limit.hard.unwrap_or(-1));
            let name = limit.name.as_deref().unwrap_or_default();
            self.value("ulimit", Some(format!("{name}={soft}:{hard}")));
        }
        if let Some(policy) = &host.restart_policy
            && let Some(name) = &policy.name
        {
            let most = policy.maximum_retry_count.filter(|most| *most > 0);
            let name = name.to_string();
            self.value(
                "restart",
                match most {
                    _ if name.is_empty() => None,
                    Some(most) => Some(format!("{name}:{most}")),
                    None => Some(name),
                },
            );
        }
        if let Some(log) = &host.log_config {
            let driver = log.typ.as_deref().unwrap_or_default();
            if !matches!(driver, "" | "json-file") {
                return Err(unsupported("the logging driver", driver));
            }
            self.pairs("log-opt", '=', &log.config);
        }
        for mount in host.mounts.iter().flatten() {
            if mount.typ == Some(MountType::TMPFS) {
                let size = mount
                    .tmpfs_options
                    .as_ref()
                    .and_then(|options| options.size_bytes);
                let path = mount.target.as_deref().unwrap_or_default();
                let text = match size.filter(|size| *size > 0) {
                    Some(size) => format!("{path}:size={size}"),
                    None => path.to_owned(),
                };
                self.value("tmpfs", Some(text));
                continue;
            }
            let words = mount_words(mount)?;
            self.value("mount", Some(words));
        }
        if let Some(ports) = &host.port_bindings {
            self.ports(ports);
        }
        Ok(())
    }

    fn ports(&mut self, ports: &PortMap) {
        let mut all: Vec<_> = ports.iter().collect();
        all.sort_by_key(|(port, _)| *port);
        for (port, bindings) in all {
            for binding in bindings.iter().flatten() {
                let given = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
                let address = given(&binding.host_ip).map(|address| match address.contains(':') {
                    true => format!("[{address}]:"),
                    false => format!("{address}:"),
                });
                let number = given(&binding.host_port).filter(|number| number != "0");
                let text = match (address, number) {
                    (None, None) => port.clone(),
                    (address, number) => format!(
                        "{}{}:{port}",
                        address.unwrap_or_default(),
                        number.unwrap_or_default()
                    ),
                };
                self.value("publish", Some(text));
            }
        }
    }

    fn networks(
        &mut self,
        mode: Option<&str>,
        config: Option<&NetworkingConfig>,
        is_disabled: Option<bool>,
    ) -> Result<(), Error> {
        let endpoints = config.and_then(|config| config.endpoints_config.as_ref());
        let mut names: Vec<&str> = endpoints
            .iter()
            .flat_map(|all| all.keys())
            .map(String::as_str)
            .collect();
        // The client's word for what is there if nothing is said.
        names.retain(|name| *name != "default");
        names.sort_unstable();
        match mode {
            _ if is_disabled == Some(true) => names = vec!["none"],
            Some("host") => return Err(unsupported("the network mode", "host")),
            Some(mode) if mode.starts_with("container:") => {
                return Err(unsupported("the network mode", mode));
            }
            None | Some("" | "default") => {}
            // The first one is the main one.
            Some(mode) => {
                names.retain(|name| *name != mode);
                names.insert(0, mode);
            }
        }
        for name in &names {
            self.value("network", Some(name));
        }
        for endpoint in endpoints.iter().flat_map(|all| all.values()) {
            self.each("network-alias", &endpoint.aliases);
            let given = endpoint.ipam_config.as_ref();
            if let Some(given) = given {
                self.text("ip", &given.ipv4_address);
            }
        }
        Ok(())
    }

    /// An entrypoint is a program and its first words here; docker's may be empty, which
    /// takes the image's away.
    fn command(&mut self, body: &ContainerCreateBody) -> Result<(), Error> {
        let image = body.image.as_deref().unwrap_or_default();
        if image.is_empty() {
            return Err(Error::bad_parameter("no image is named"));
        }
        let mut rest: Vec<String> = Vec::new();
        if let Some(entrypoint) = &body.entrypoint {
            let words = entrypoint.split_first();
            let is_none = |word: &&String| word.is_empty();
            match words {
                Some((first, more)) if !is_none(&first) => {
                    self.value("entrypoint", Some(first));
                    rest.extend_from_slice(more);
                }
                _ => self.value("entrypoint", Some("")),
            }
        }
        rest.extend(body.cmd.iter().flatten().cloned());
        self.0.push(image.to_owned());
        self.0.append(&mut rest);
        Ok(())
    }
}

/// How many processors, in billionths: docker has two ways to say it.
fn cpus(host: &HostConfig) -> Option<i64> {
    let given = |number: Option<i64>| number.filter(|number| *number > 0);
    given(host.nano_cpus).or_else(|| {
        let quota = given(host.cpu_quota)?;
        let period = given(host.cpu_period).unwrap_or(100_000);
        Some(quota.saturating_mul(1_000_000_000) / period)
    })
}

fn mount_words(mount: &Mount) -> Result<String, Error> {
    let kind = match mount.typ {
        Some(MountType::BIND) => "bind",
        Some(MountType::VOLUME) | None => "volume",
        Some(other) => return Err(unsupported("a mount of the type", &other.to_string())),
    };
    let mut words = format!("type={kind}");
    for (name, value) in [("src", &mount.source), ("dst", &mount.target)] {
        if let Some(value) = value.as_ref().filter(|value| !value.is_empty()) {
            // A comma would begin another word.
            words += &match value.contains([',', '"']) {
                true => format!(",\"{name}={}\"", value.replace('"', "\"\"")),
                false => format!(",{name}={value}"),
            };
        }
    }
    if mount.read_only == Some(true) {
        words += ",readonly";
    }
    Ok(words)
}

fn unsupported(what: &str, which: &str) -> Error {
    Error::not_supported(format!("vm-run does not support {what} {which:?}"))
}

/// What would change what a container can do and cannot be had here; what only says how
/// the host is to share itself out has no meaning in a virtual machine, and is left alone.
fn refuse(host: &HostConfig) -> Result<(), Error> {
    let modes = [
        ("the IPC mode", &host.ipc_mode, "shareable"),
        ("the PID mode", &host.pid_mode, ""),
        ("the UTS mode", &host.uts_mode, ""),
        ("the user namespace mode", &host.userns_mode, ""),
        ("the runtime", &host.runtime, "vm-run"),
        ("the volume driver", &host.volume_driver, "local"),
    ];
    for (what, given, also) in modes {
        let given = given.as_deref().unwrap_or_default();
        if !DEFAULTS.contains(&given) && given != also {
            return Err(unsupported(what, given));
        }
    }
    let lists = [
        (
            "devices",
            host.devices.as_ref().is_some_and(|all| !all.is_empty()),
        ),
        (
            "device requests",
            host.device_requests
                .as_ref()
                .is_some_and(|all| !all.is_empty()),
        ),
        (
            "links",
            host.links.as_ref().is_some_and(|all| !all.is_empty()),
        ),
        (
            "volumes of another container",
            host.volumes_from
                .as_ref()
                .is_some_and(|all| !all.is_empty()),
        ),
    ];
    match lists.iter().find(|(_, is_given)| *is_given) {
        Some((what, _)) => Err(Error::not_supported(format!(
            "vm-run does not support {what}"
        ))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn words(body: serde_json::Value) -> Result<Vec<String>, Error> {
        let body = serde_json::from_value(body).expect("a body");
        of(Some("name"), &body).map(|words| words[3..].to_vec())
    }

    #[test]
    fn what_dockers_client_sends_is_what_would_be_typed() {
        // `docker run -it --rm -e A=b -p 8080:80 -v /a:/b:ro --memory 64m IMAGE sh`, of 28.
        let body = json!({
            "Hostname": "", "User": "", "Tty": true, "OpenStdin": true, "StdinOnce": true,
            "Env": ["A=b", "LEFT_OUT"], "Cmd": ["sh"], "Image": "alpine", "Volumes": {},
            "WorkingDir": "", "Entrypoint": null, "OnBuild": null, "Labels": {"l": "", "m": "n"},
            "HostConfig": {
                "Binds": ["/a:/b:ro"], "NetworkMode": "default", "AutoRemove": true,
                "PortBindings": {"80/tcp": [{"HostIp": "", "HostPort": "8080"}]},
                "RestartPolicy": {"Name": "no", "MaximumRetryCount": 0},
                "LogConfig": {"Type": "", "Config": {}}, "CgroupnsMode": "",
                "IpcMode": "", "PidMode": "", "Memory": 67108864, "NanoCpus": 0,
                "PidsLimit": 0, "OomScoreAdj": 0, "MaskedPaths": null, "ReadonlyPaths": null,
            },
            "NetworkingConfig": {"EndpointsConfig": {"default": {}}},
        });
        let expected = [
            "--tty",
            "--interactive",
            "--env=A=b",
            "--label=l=",
            "--label=m=n",
            "--rm",
            "--volume=/a:/b:ro",
            "--memory=67108864",
            "--restart=no",
            "--publish=8080:80/tcp",
            "alpine",
            "sh",
        ];
        assert_eq!(words(body).expect("words"), expected);
    }

    #[test]
    fn entrypoints_ports_and_mounts_have_words() {
        let body = json!({
            "Image": "i", "Entrypoint": ["a", "-b"], "Cmd": ["-c"],
            "HostConfig": {
                "NanoCpus": 1_500_000_000, "NetworkMode": "front",
                "PortBindings": {
                    "1/udp": [{"HostIp": "::1", "HostPort": "2"}, {"HostPort": "0"}],
                },
                "Mounts": [{"Type": "volume", "Source": "v", "Target": "/x,y", "ReadOnly": true}],
                "Tmpfs": {"/t": "", "/u": "size=1m"},
                "Ulimits": [{"Name": "nofile", "Soft": 1, "Hard": 2}],
            },
            "NetworkingConfig": {"EndpointsConfig": {"back": {"Aliases": ["me"]}}},
        });
        let expected = [
            "--tmpfs=/t",
            "--tmpfs=/u:size=1m",
            "--cpus=1.5",
            "--ulimit=nofile=1:2",
            "--mount=type=volume,src=v,\"dst=/x,y\",readonly",
            "--publish=[::1]:2:1/udp",
            "--publish=1/udp",
            "--network=front",
            "--network=back",
            "--network-alias=me",
            "--entrypoint=a",
            "i",
            "-b",
            "-c",
        ];
        assert_eq!(words(body).expect("words"), expected);
    }

    #[test]
    fn what_is_not_there_is_refused() {
        for host in [
            json!({"NetworkMode": "host"}),
            json!({"PidMode": "host"}),
            json!({"IpcMode": "host"}),
            json!({"Links": ["a:b"]}),
            json!({"Devices": [{"PathOnHost": "/dev/x"}]}),
            json!({"LogConfig": {"Type": "syslog"}}),
            json!({"Mounts": [{"Type": "npipe"}]}),
        ] {
            let refused = words(json!({"Image": "i", "HostConfig": host}));
            assert_eq!(refused.map_err(|error| error.status()), Err(501), "{host}");
        }
        let refused = words(json!({"Cmd": ["a"]}));
        assert_eq!(refused.map_err(|error| error.status()), Err(400));
    }
}
