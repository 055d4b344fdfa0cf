//! What must differ in each child does, from its first instruction on.

use crate::support::{
    Call, boot_timeout, children, field, fork_busybox, host, python, shell, start_shell, variable,
    world,
};
use fork::{BootSpec, ContainerSpec, Error, Guest, ProcessSpec, Template};
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
    echo generation=$(cat /proc/sys/kernel/random/generation)
    echo name=$(hostname)
    echo clock=$(date +%s)
    echo monotonic=$(cut -d. -f1 /proc/uptime)";

/// How many live at the same time.
const AT_ONCE: usize = 5;

#[test]
fn many_children_have_identities_of_their_own() {
    let template = Template::open(host(), &world().root.join("templates/default-256m-1c"));
    let template = template.expect("opens");
    let rounds = children(20).div_ceil(AT_ONCE);
    let answers: Vec<String> = (0..rounds).flat_map(|_| ask_children(&template)).collect();
    for name in ["device", "uuid", "boot", "generation"] {
        let values: Vec<&str> = answers.iter().map(|a| field(a, name)).collect();
        let different: HashSet<_> = values.iter().collect();
        assert_eq!(different.len(), answers.len(), "{name}: {values:?}");
    }
    assert!(answers.iter().all(|a| field(a, "device").len() == 64));
    assert!(answers.iter().all(|a| field(a, "generation") != "0"));
}

/// Asks as many as live at the same time; their names and clocks are right.
fn ask_children(template: &Template) -> Vec<String> {
    let asked = now();
    let mut children: Vec<_> = (0..AT_ONCE)
        .map(|i| fork_busybox(template, &format!("child-{i}")))
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
    for (i, answer) in answers.iter().enumerate() {
        assert_eq!(field(answer, "name"), format!("child-{i}"));
        // The template is older than that: its own clock would be before `asked`.
        let clock = Duration::from_secs(field(answer, "clock").parse().expect("a number"));
        let early = asked.saturating_sub(clock);
        let late = clock.saturating_sub(asked + took);
        assert!(
            early.max(late) < Duration::from_secs(3),
            "{clock:?} {asked:?} {took:?}"
        );
    }
    answers
}

/// A guest that comes to its fork point and never says that it has its identity.
#[test]
fn a_child_that_does_not_confirm_its_identity_is_given_no_container() {
    let guest = Guest {
        kernel: variable("VM_RUN_GUEST").join("vmlinux"),
        initramfs: variable("VM_RUN_TEST_SILENT"),
        disk: None,
    };
    let spec = BootSpec {
        memory: 64 << 20,
        guest: Some(guest),
        timeout: boot_timeout(),
        ..BootSpec::default()
    };
    let template = Template::boot(host(), &spec).expect("boots");
    let mut child = fork_busybox(&template, "silent");
    let mut start = || {
        let process = ProcessSpec {
            args: vec!["true".into()],
            ..ProcessSpec::default()
        };
        child.start(ContainerSpec::default(), process)
    };
    let refused = start().expect_err("it has said nothing");
    assert!(matches!(refused, Error::Identity(_)), "{refused}");
    // And whoever asks later gets none either.
    let refused = start().expect_err("it has failed");
    assert!(matches!(refused, Error::State(_)), "{refused}");
    assert_eq!(child.generation(), None);
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
