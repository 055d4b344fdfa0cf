//! Kernel configurations: what is asked, and whether Kconfig granted it.

use std::collections::BTreeMap;

/// What moby's `check-config.sh` calls generally necessary on a host of this
/// kernel, cgroup v2 and its controllers included.
pub const MOBY_NECESSARY: &[&str] = &[
    "NAMESPACES",
    "NET_NS",
    "PID_NS",
    "IPC_NS",
    "UTS_NS",
    "CGROUPS",
    "CGROUP_SCHED",
    "CGROUP_CPUACCT",
    "CGROUP_DEVICE",
    "CGROUP_FREEZER",
    "CGROUP_PIDS",
    "CGROUP_BPF",
    "CPUSETS",
    "MEMCG",
    "BLK_CGROUP",
    "KEYS",
    "VETH",
    "BRIDGE",
    "BRIDGE_NETFILTER",
    "IP_NF_FILTER",
    "IP_NF_MANGLE",
    "IP_NF_TARGET_MASQUERADE",
    "IP6_NF_FILTER",
    "IP6_NF_MANGLE",
    "IP6_NF_TARGET_MASQUERADE",
    "NETFILTER_XT_MATCH_ADDRTYPE",
    "NETFILTER_XT_MATCH_CONNTRACK",
    "NETFILTER_XT_MATCH_IPVS",
    "NETFILTER_XT_MARK",
    "IP_NF_RAW",
    "IP_NF_NAT",
    "IP6_NF_RAW",
    "IP6_NF_NAT",
    "NF_NAT",
    "POSIX_MQUEUE",
];

/// The options of a configuration or fragment: name (without `CONFIG_`) to value,
/// `n` for "is not set".
pub fn parse(text: &str) -> BTreeMap<&str, &str> {
    text.lines().filter_map(option).collect()
}

fn option(line: &str) -> Option<(&str, &str)> {
    let line = line.trim();
    if let Some(set) = line.strip_prefix("CONFIG_") {
        return set.split_once('=');
    }
    let unset = line
        .strip_prefix("# CONFIG_")?
        .strip_suffix(" is not set")?;
    Some((unset, "n"))
}

/// The demands that a final configuration does not meet, one line for each.
pub fn unmet(demands: &str, config: &str) -> Vec<String> {
    let config = parse(config);
    parse(demands)
        .into_iter()
        .filter_map(|(name, wanted)| {
            let got = config.get(name).copied().unwrap_or("n");
            (got != wanted).then(|| format!("CONFIG_{name}: {wanted} was asked, {got} came out"))
        })
        .collect()
}

/// Which of `names` are not built into a kernel of this configuration.
pub fn not_built_in<'a>(names: &[&'a str], config: &str) -> Vec<&'a str> {
    let config = parse(config);
    names
        .iter()
        .copied()
        .filter(|name| config.get(name) != Some(&"y"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(path: &str) -> String {
        std::fs::read_to_string(crate::host::root().join(path)).expect(path)
    }

    #[test]
    fn options_are_parsed_and_comments_are_not() {
        let options = parse(
            "# A comment. CONFIG_X=y\nCONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=\"a=b\"\n\nCONFIG_D=10\n",
        );
        let expected = [("A", "y"), ("B", "n"), ("C", "\"a=b\""), ("D", "10")];
        assert_eq!(options, expected.into_iter().collect());
    }

    #[test]
    fn a_demand_is_unmet_when_the_option_is_off_absent_or_a_module() {
        let demands =
            "CONFIG_A=y\nCONFIG_B=y\nCONFIG_C=y\n# CONFIG_D is not set\n# CONFIG_E is not set\n";
        let config = "CONFIG_A=m\n# CONFIG_B is not set\nCONFIG_D=y\n";
        let unmet = unmet(demands, config);
        assert_eq!(unmet.len(), 4, "{unmet:?}");
        assert!(unmet[0].contains("CONFIG_A: y was asked, m came out"));
        assert!(unmet[3].contains("CONFIG_D: n was asked, y came out"));
    }

    #[test]
    fn our_fragment_asks_for_all_that_booting_needs() {
        let config = read("guest-kernel/linux/config");
        let required = read("guest-kernel/linux/required");
        let names: Vec<&str> = parse(&required).into_keys().collect();
        let missing = not_built_in(&names, &config);
        assert!(
            missing.is_empty(),
            "not asked in guest-kernel/linux/config: {missing:?}"
        );
    }

    #[test]
    fn what_the_agent_can_miss_is_in_the_list() {
        let required = read("guest-kernel/linux/required");
        let required = parse(&required);
        let sources = crate::host::root().join("guest-kernel/agent/src");
        for source in std::fs::read_dir(sources).expect("the agent's sources") {
            let source = source.expect("a source").path();
            if source.is_dir() {
                continue;
            }
            let source = std::fs::read_to_string(source).expect("text");
            let named = source
                .split('"')
                .filter_map(|word| word.strip_prefix("CONFIG_"));
            let unlisted: Vec<_> = named.filter(|name| !required.contains_key(name)).collect();
            assert!(
                unlisted.is_empty(),
                "not in guest-kernel/linux/required: {unlisted:?}"
            );
        }
    }

    #[test]
    fn our_fragment_asks_for_what_moby_needs() {
        let missing = not_built_in(MOBY_NECESSARY, &read("guest-kernel/linux/config"));
        assert!(
            missing.is_empty(),
            "not asked in guest-kernel/linux/config: {missing:?}"
        );
    }

    #[test]
    fn the_manual_lists_exactly_what_booting_needs() {
        let manual = read("docs/kernel.md");
        let table = manual
            .split("<!-- required -->")
            .nth(1)
            .expect("docs/kernel.md marks its table with <!-- required -->");
        let listed: Vec<&str> = table
            .split('`')
            .filter_map(|word| word.strip_prefix("CONFIG_"))
            .collect();
        let required = read("guest-kernel/linux/required");
        let mut sorted = listed.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, parse(&required).into_keys().collect::<Vec<_>>());
    }

    #[test]
    fn every_mitigation_is_asked_for_and_none_is_turned_off() {
        let config = read("guest-kernel/linux/config");
        let off: Vec<_> = parse(&config)
            .into_iter()
            .filter(|(name, value)| name.starts_with("MITIGATION_") && *value != "y")
            .collect();
        assert!(off.is_empty(), "{off:?}");
    }
}
