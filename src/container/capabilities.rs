//! Capabilities of a container, by docker's names and rules
//! (moby oci/caps/utils.go, `TweakCapabilities`).

use anyhow::{Result, bail};

/// By number (Linux include/uapi/linux/capability.h).
const NAMES: [&str; 41] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
];

/// Those of a container that asks for nothing (moby oci/caps/defaults.go).
const DEFAULT: [&str; 14] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
];

/// Stands for all of them.
const ALL: &str = "ALL";

/// Every one that there is, and will be.
pub const EVERY: u64 = u64::MAX;

/// Docker's notation of a capability that was typed.
///
/// # Errors
/// One that Linux does not have, in docker's words.
pub fn normalize(text: &str) -> Result<String> {
    let name = text.trim().to_ascii_uppercase();
    if name == ALL {
        return Ok(name);
    }
    let name = match name.strip_prefix("CAP_") {
        Some(_) => name,
        None => format!("CAP_{name}"),
    };
    if bit(&name) == 0 {
        bail!("invalid capability: {name:?}");
    }
    Ok(name)
}

/// What a container may do that adds and drops these, all [`normalize`]d, a bit for
/// each.
pub fn set(add: &[String], drop: &[String]) -> u64 {
    let added = add.iter().fold(0, |set, name| set | bit(name));
    let dropped = drop.iter().fold(0, |set, name| set | bit(name));
    let has_all = |names: &[String]| names.iter().any(|name| name == ALL);
    if has_all(add) {
        EVERY & !dropped
    } else if has_all(drop) {
        added
    } else {
        DEFAULT.iter().fold(0, |set, name| set | bit(name)) & !dropped | added
    }
}

fn bit(name: &str) -> u64 {
    let found = NAMES.iter().position(|known| *known == name);
    found.map_or(0, |number| 1 << number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_dockers() {
        for text in ["NET_ADMIN", "net_admin", "CAP_NET_ADMIN", "cap_net_admin"] {
            assert_eq!(normalize(text).expect(text), "CAP_NET_ADMIN");
        }
        assert_eq!(normalize("all").expect("all"), "ALL");
        let error = normalize("FLY").expect_err("there is none");
        assert_eq!(error.to_string(), "invalid capability: \"CAP_FLY\"");
    }

    #[test]
    fn what_is_added_and_dropped_is_dockers() {
        let names = |names: &[&str]| -> Vec<String> {
            names.iter().map(|n| normalize(n).expect(n)).collect()
        };
        let set = |add: &[&str], drop: &[&str]| set(&names(add), &names(drop));
        // The agent's default, and docker's `CapEff` in /proc/self/status.
        assert_eq!(set(&[], &[]), 0xa804_25fb);
        assert_eq!(set(&["SYS_TIME"], &["CHOWN"]), 0xa804_25fb & !1 | 1 << 25);
        assert_eq!(set(&["CHOWN"], &["ALL"]), 1);
        assert_eq!(set(&["ALL"], &["CHOWN"]), !1);
        // Dropped first, then added.
        assert_eq!(set(&["CHOWN"], &["CHOWN"]), 0xa804_25fb);
    }
}
