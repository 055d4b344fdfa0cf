//! What is kept of a container: what was asked for, and what became of it.

use super::health::Health;
use super::options::Options;
use crate::net;
use crate::templates::MachineArgs;
use crate::volume::Mount;
use anyhow::{Result, bail};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// A container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// 64 hexadecimal digits.
    pub id: String,
    /// One container's at a time.
    pub name: String,
    /// What was asked for.
    pub spec: Spec,
    /// What became of it.
    pub state: State,
}

/// What was asked for when the container was made. Of all this only its networks change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spec {
    /// When.
    pub created: Timestamp,
    /// The image as it was named, or the path given with `--rootfs`.
    pub image: String,
    /// Its id, if it is one of the store.
    pub image_id: Option<String>,
    /// Its root file system, an image of one; none for a container that is in its
    /// template.
    pub rootfs: Option<PathBuf>,
    /// The container that it was forked from, if that ran.
    #[serde(default)]
    pub origin: Option<Origin>,
    /// The template that was named.
    pub template: Option<String>,
    /// The command line of its first process; empty if the container is in its template
    /// and goes on.
    pub args: Vec<String>,
    /// `NAME=value`, each.
    pub env: Vec<String>,
    /// The working directory.
    pub cwd: String,
    /// `USER[:GROUP]`; empty for root.
    pub user: String,
    /// The name of its machine.
    pub hostname: String,
    /// Whether its first process is on a terminal.
    pub tty: bool,
    /// Whether its first process has a standard input.
    pub stdin: bool,
    /// Whether that ends with the first client that leaves.
    pub stdin_once: bool,
    /// For people and tools.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// What `stop` sends, by number.
    pub stop_signal: i32,
    /// How long `stop` waits before it kills, in seconds.
    pub stop_timeout: u32,
    /// Where its writes go.
    pub writable: Layer,
    /// The size of a layer on a disk, in bytes, if it is not the usual one.
    #[serde(default)]
    pub writable_size: Option<u64>,
    /// Guest memory in bytes.
    pub memory: u64,
    /// Its vCPUs.
    pub cpus: u8,
    /// How long a template may take to boot, in seconds.
    pub boot_timeout: u64,
    /// The trust domain.
    pub domain: String,
    /// Whether its VM has no jail.
    pub no_jail: bool,
    /// Whether it is removed when it ends.
    pub auto_remove: bool,
    /// What of the host's it sees.
    #[serde(default)]
    pub mounts: Vec<Mount>,
    /// How it is connected.
    #[serde(default)]
    pub network: net::Plan,
    /// Whether the connections stay open that the container in its template had.
    #[serde(default)]
    pub keep_connections: bool,
    /// Whether it is started again when it ends.
    #[serde(default)]
    pub restart: RestartPolicy,
    /// How much of its output is kept.
    #[serde(default)]
    pub log: LogLimits,
    /// What most do not ask for.
    #[serde(default)]
    pub options: Options,
}

/// A container from which others were forked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Origin {
    /// Its id.
    pub id: String,
    /// Its name, then.
    pub name: String,
    /// The template that it came from itself.
    pub template: String,
}

impl Spec {
    /// The machine that it needs.
    pub fn machine(&self) -> MachineArgs {
        MachineArgs {
            memory: self.memory,
            cpus: self.cpus,
            boot_timeout: self.boot_timeout,
        }
    }
}

/// The writable layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Layer {
    /// A file of the container's own, kept until it is removed.
    Disk,
    /// Guest memory, at most so many bytes; gone when it stops.
    Memory(u64),
    /// None: the root is read-only.
    Nothing,
    /// In its template, with the rest.
    Inside,
}

/// When a container is started again, as docker has it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RestartPolicy {
    /// Never.
    #[default]
    No,
    /// Whenever it ends, until it is stopped.
    Always,
    /// The same; and once stopped it stays so, whatever is restarted.
    UnlessStopped,
    /// When it fails, at most so often; zero is no bound.
    OnFailure(u32),
}

impl RestartPolicy {
    /// Reads docker's notation: `no`, `always`, `unless-stopped`, `on-failure[:N]`.
    ///
    /// # Errors
    /// Anything else, in one line.
    pub fn parse(text: &str) -> Result<Self> {
        Ok(match text.split_once(':') {
            None => match text {
                "no" | "" => Self::No,
                "always" => Self::Always,
                "unless-stopped" => Self::UnlessStopped,
                "on-failure" => Self::OnFailure(0),
                _ => bail!(
                    "{text:?}: a restart policy is no, always, unless-stopped or on-failure[:N]"
                ),
            },
            Some(("on-failure", most)) => Self::OnFailure(most.parse()?),
            Some(_) => bail!("{text:?}: only on-failure takes a number"),
        })
    }

    /// Whether a container that has ended with `code` after so many restarts is
    /// started again.
    pub fn wants(self, code: u8, restarts: u32) -> bool {
        match self {
            Self::No => false,
            Self::Always | Self::UnlessStopped => true,
            Self::OnFailure(most) => code != 0 && (most == 0 || restarts < most),
        }
    }
}

/// How much of a container's output is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogLimits {
    /// Bytes of one file.
    pub max_size: u64,
    /// Files.
    pub max_files: u32,
}

impl Default for LogLimits {
    /// Sixty megabytes in all: docker keeps everything, and fills disks.
    fn default() -> Self {
        Self {
            max_size: 20 << 20,
            max_files: 3,
        }
    }
}

/// What became of a container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Where it stands.
    pub status: Status,
    /// The process that owns it while it runs; see [`super::directory`] for whether it
    /// still does.
    pub supervisor: Option<u32>,
    /// When it last began.
    pub started: Option<Timestamp>,
    /// When it last ended.
    pub finished: Option<Timestamp>,
    /// How it last ended; 128 and the number for a signal.
    pub exit_code: u8,
    /// Why it could not begin, or ended by no doing of its own: one line.
    #[serde(default)]
    pub error: String,
    /// How often its policy has started it again.
    #[serde(default)]
    pub restarts: u32,
    /// The template that it was last forked from.
    #[serde(default)]
    pub template: String,
    /// Where it is on its networks, while it lives.
    #[serde(default)]
    pub places: Vec<net::Place>,
    /// The host's ports that lead to it, while it lives.
    #[serde(default)]
    pub ports: Vec<net::Publish>,
    /// Whether it is well, if it is asked.
    #[serde(default)]
    pub health: Option<Health>,
    /// What it last became at its fork.
    #[serde(default)]
    pub identity: Option<Identity>,
}

/// What the child has confirmed of its identity, and what has then been done in it: all
/// of it, or there would be no container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Identity {
    /// 16 hexadecimal digits, different in each child of a template.
    pub generation: String,
    /// The name of its machine, by the kernel, `/etc/hostname` and `/etc/hosts`.
    pub hostname: String,
    /// What is no other child's: see docs/identity.md.
    pub renewed: Vec<String>,
}

impl Identity {
    /// Of a child with this generation.
    pub fn new(generation: u64, hostname: &str) -> Self {
        Self {
            generation: format!("{generation:016x}"),
            hostname: hostname.into(),
            renewed: ["random", "clock", "hostname", "machine-id"]
                .map(String::from)
                .into(),
        }
    }
}

/// Where a container stands, in docker's words.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// It has not begun yet.
    #[default]
    Created,
    /// Its first process runs.
    Running,
    /// Its vCPUs are stopped.
    Paused,
    /// It has ended, and its policy will start it again.
    Restarting,
    /// It has ended.
    Exited,
}

impl Status {
    /// Whether somebody must own it.
    pub fn is_live(self) -> bool {
        matches!(self, Self::Running | Self::Paused | Self::Restarting)
    }

    /// Docker's word.
    pub fn word(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Restarting => "restarting",
            Self::Exited => "exited",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn restart_policies_are_dockers() {
        use RestartPolicy::{Always, No, OnFailure, UnlessStopped};
        for (text, policy) in [
            ("no", No),
            ("always", Always),
            ("unless-stopped", UnlessStopped),
            ("on-failure", OnFailure(0)),
            ("on-failure:3", OnFailure(3)),
        ] {
            assert_eq!(RestartPolicy::parse(text).expect(text), policy);
        }
        for bad in ["sometimes", "always:3", "on-failure:x"] {
            assert!(RestartPolicy::parse(bad).is_err(), "{bad}");
        }
        assert!(Always.wants(0, 99) && !No.wants(1, 0));
        assert!(OnFailure(2).wants(1, 1) && !OnFailure(2).wants(1, 2));
        assert!(!OnFailure(0).wants(0, 0) && OnFailure(0).wants(1, 99));
    }
}
