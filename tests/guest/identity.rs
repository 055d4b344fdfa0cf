//! What must differ in each child does, from its first instruction on.

use crate::support::{Call, field, fork_busybox, host, python, shell, start_shell, world};
use fork::Template;
use std::collections::HashSet;
use std::io::Read;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// All random sources that a program has: the device, the kernel's own generator
/// by two files, and what the exec gave the program (AT_RANDOM seeds its stack
/// protector).
const ASK: &str = "
    echo device=$(head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \\n')
    echo uuid=$(cat /proc/sys/kernel/random/uuid)
    echo boot=$(cat /proc/sys/kernel/random/boot_id)
    echo name=$(hostname)
    echo clock=$(date +%s)
    echo monotonic=$(cut -d. -f1 /proc/uptime)";

#[test]
fn ten_children_at_once_have_ten_identities() {
    let template = Template::open(host(), &world().root.join("templates/default-256m-1c"));
    let template = template.expect("opens");
    let asked = now();
    let mut children: Vec<_> = (0..10)
        .map(|i| fork_busybox(&template, &format!("child-{i}")))
        .collect();
    let streams: Vec<_> = children
        .iter_mut()
        .map(|child| start_shell(child, ASK))
        .collect();
    let answers: Vec<String> = streams
        .into_iter()
        .map(|mut stream| {
            let mut text = String::new();
            stream.read_to_string(&mut text).expect("reads");
            text
        })
        .collect();
    for child in &mut children {
        assert_eq!(child.wait().expect("ends").code(), 0);
    }
    let took = now() - asked;
    let all = |name| answers.iter().map(|a| field(a, name)).collect::<Vec<_>>();
    for name in ["device", "uuid", "boot"] {
        let values = all(name);
        let different: HashSet<_> = values.iter().collect();
        assert_eq!(different.len(), 10, "{name}: {values:?}");
    }
    assert!(all("device").iter().all(|hex| hex.len() == 64));
    let names: Vec<String> = (0..10).map(|i| format!("child-{i}")).collect();
    assert_eq!(all("name"), names);
    for clock in all("clock") {
        // The template is older than that: its own clock would be before `asked`.
        let clock = Duration::from_secs(clock.parse().expect("a number"));
        let early = asked.saturating_sub(clock);
        let late = clock.saturating_sub(asked + took);
        assert!(
            early.max(late) < Duration::from_secs(3),
            "{clock:?} {asked:?} {took:?}"
        );
    }
}

#[test]
fn getrandom_differs_between_runs() {
    let script = "import os; print(os.getrandom(32).hex(), os.urandom(32).hex())";
    let run = || {
        let ran = Call::run(&[python(), "python3", "-c", script]).end();
        assert_eq!(ran.status, 0, "{ran}");
        ran.out()
    };
    let (first, second) = (run(), run());
    let values: HashSet<_> = first
        .split_whitespace()
        .chain(second.split_whitespace())
        .collect();
    assert_eq!(values.len(), 4, "{first}{second}");
}

#[test]
fn a_container_without_a_name_is_called_by_its_id() {
    let name = || Call::run(&["busybox", "hostname"]).end().out();
    let (first, second) = (name(), name());
    for name in [&first, &second] {
        let name = name.trim_end();
        assert!(
            name.len() == 12 && name.bytes().all(|b| b.is_ascii_hexdigit()),
            "{name}"
        );
    }
    assert_ne!(first, second);
}

#[test]
fn the_clock_runs_on_from_the_hosts() {
    let template = Template::open(host(), &world().root.join("templates/default-256m-1c"));
    let mut child = fork_busybox(&template.expect("opens"), "clock");
    let text = shell(&mut child, "date +%s; sleep 2; date +%s");
    let times: Vec<u64> = text
        .lines()
        .map(|line| line.parse().expect("a number"))
        .collect();
    assert!((2..=20).contains(&(times[1] - times[0])), "{text}");
}

fn now() -> Duration {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .expect("after 1970")
}
