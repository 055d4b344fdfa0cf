//! The jail of workers, tried from inside and looked at from outside. Needs root and
//! /dev/kvm.
//!
//! This program is also the worker, with [`probe`] in a VM's place, so it has a `main`
//! of its own.

mod broker;
mod probe;
mod support;

use fork::BootSpec;
use fork::worker::{Jail, Limits, Workers};
use std::process::ExitCode;
use std::time::Duration;
use support::*;

fn main() -> ExitCode {
    let role = std::env::args().skip(1).find(|word| !word.starts_with("-"));
    match role.as_deref() {
        Some("spawner" | "worker" | "broker") => fork::worker::main_with(probe::run),
        Some("owner") => owner(),
        filter => run_tests(TESTS, filter.unwrap_or_default()),
    }
}

const TESTS: &[(&str, fn())] = &[
    (
        "nothing_outside_is_within_reach",
        nothing_outside_is_within_reach,
    ),
    (
        "what_is_not_listed_kills_each_kind_of_thread",
        what_is_not_listed_kills,
    ),
    (
        "a_broker_has_its_volumes_and_no_more",
        broker::has_its_volumes_and_no_more,
    ),
    (
        "a_broker_serves_owners_and_keeps_read_only_what_is",
        broker::serves_owners_and_keeps_read_only,
    ),
    ("a_broker_ends_with_its_guest", broker::ends_with_its_guest),
    (
        "a_broker_hands_over_what_its_guest_knows",
        broker::hands_over_what_its_guest_knows,
    ),
    ("a_vm_lives_under_the_lists", a_vm_lives_under_the_lists),
    (
        "a_worker_has_what_it_was_given_and_no_more",
        a_worker_has_no_more,
    ),
    ("limits_are_in_force", limits_are_in_force),
    (
        "without_a_jail_the_lists_remain",
        without_a_jail_the_lists_remain,
    ),
    (
        "workers_are_started_from_many_threads",
        workers_from_many_threads,
    ),
    (
        "a_worker_that_ends_leaves_nothing",
        a_worker_that_ends_leaves_nothing,
    ),
    (
        "dropping_the_workers_ends_them",
        dropping_the_workers_ends_them,
    ),
    ("a_killed_spawner_takes_its_workers_along", a_killed_spawner),
    (
        "a_killed_owner_leaves_nothing",
        a_killed_owner_leaves_nothing,
    ),
    (
        "a_program_that_is_no_worker_is_an_error",
        a_program_that_is_no_worker,
    ),
];

/// A guest of a few instructions.
fn micro() -> BootSpec {
    BootSpec {
        memory: 64 << 20,
        vcpus: 2,
        timeout: Duration::from_secs(20),
        ..BootSpec::default()
    }
}

fn nothing_outside_is_within_reach() {
    let tcp = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = tcp.local_addr().expect("its address").port();
    let name = format!("vm-run-jail-{}", std::process::id());
    let _unix = listen_abstract(&name);
    let workers = start(Jail::On(Limits::default()));
    let pid = std::process::id();
    let reached = ask(&workers, &format!("reach {pid} {port} {name}"));
    assert_eq!(reached, ["end"], "within reach");
    assert_eq!(ask(&workers, "uname"), ["\"vm-run\"", "end"]);
}

fn what_is_not_listed_kills() {
    let workers = start(Jail::On(Limits::default()));
    let mut killed = 0;
    for thread in ["main", "vcpu", "io"] {
        for (name, _) in probe::CALLS {
            let said = ask(&workers, &format!("call {thread} {name}"));
            if probe::allowed(thread).contains(name) {
                assert_eq!(
                    said.last().map(String::as_str),
                    Some("end"),
                    "{thread} {name}"
                );
                let is_refused = *name == "open-to-read";
                assert!(!is_refused || said[0] == "open-to-read: Ok(())", "{said:?}");
            } else {
                assert!(said.is_empty(), "{thread}: {said:?}");
                killed += 1;
            }
        }
    }
    let counts = settled(&workers);
    assert_eq!(counts.violations, killed);
    assert_eq!(counts.gone, 3 * probe::CALLS.len() as u64);
}

fn a_vm_lives_under_the_lists() {
    for jail in [Jail::On(Limits::default()), Jail::Off] {
        let workers = start(jail);
        assert_eq!(ask(&workers, "vm"), ["answered", "end"]);
        assert_eq!(settled(&workers).violations, 0);
    }
}

fn a_worker_has_no_more() {
    // What a careless program leaves open for its children.
    let careless = leaked_descriptor();
    let workers = start(Jail::On(Limits::default()));
    let (a, b) = (
        workers.spawn().expect("a worker"),
        workers.spawn().expect("a worker"),
    );
    drop(careless);
    for namespace in ["mnt", "pid", "net", "ipc", "uts", "cgroup"] {
        let of = |pid: &str| link(&format!("/proc/{pid}/ns/{namespace}"));
        let (first, second) = (of(&a.1.to_string()), of(&b.1.to_string()));
        assert_ne!(first, of("self"), "{namespace}");
        assert_ne!(first, second, "{namespace}");
    }
    let uid = 0x7000_0000 + a.1.as_raw_nonzero().get() as u32;
    for (field, value) in [
        ("Uid", format!("{uid} {uid} {uid} {uid}")),
        ("Gid", format!("{uid} {uid} {uid} {uid}")),
        ("Groups", String::new()),
        ("CapInh", "0000000000000000".into()),
        ("CapPrm", "0000000000000000".into()),
        ("CapEff", "0000000000000000".into()),
        ("CapBnd", "0000000000000000".into()),
        ("CapAmb", "0000000000000000".into()),
        ("NoNewPrivs", "1".into()),
        ("Threads", "1".into()),
    ] {
        assert_eq!(status(a.1, field), value, "{field}");
    }
    let mut open = descriptors(a.1);
    open.sort();
    let kinds: Vec<_> = open
        .iter()
        .map(|to| to.split(':').next().unwrap_or(""))
        .collect();
    let null = "/dev/null";
    assert!(kinds.starts_with(&["/dev/kvm", null, null]), "{open:?}");
    for kind in &kinds[3..] {
        let own_pages = kind.starts_with("/proc/") && kind.ends_with("/pagemap");
        assert!(own_pages || ["pipe", "socket"].contains(kind), "{open:?}");
    }
    assert!(kinds.len() <= 6, "{open:?}");
    // Its owner can still account for it.
    assert!(std::fs::read_to_string(format!("/proc/{}/smaps_rollup", a.1)).is_ok());
}

fn limits_are_in_force() {
    let limits = Limits {
        memory: Some(256 << 20),
        processes: 12,
        cpus: Some(0.5),
    };
    let workers = start(Jail::On(limits));
    let worker = workers.spawn().expect("a worker");
    let controllers = [
        ("memory", "memory.max"),
        ("pids", "pids.max"),
        ("cpu", "cpu.max"),
    ];
    for (controller, file) in controllers {
        let missing = workers
            .missing()
            .iter()
            .any(|line| line.contains(controller));
        match cgroup_file(worker.1, controller, file) {
            None => assert!(missing, "{controller} is silently not there"),
            Some(value) => {
                assert!(!missing, "{controller}");
                let wanted = match controller {
                    "memory" => "268435456",
                    "pids" => "12",
                    _ => "50000",
                };
                assert_eq!(value.split(' ').next(), Some(wanted), "{controller}");
            }
        }
    }
    drop(worker);
    let said = ask(&workers, "threads");
    let threads: usize = said[0].parse().expect("a number");
    assert!(
        (1..12).contains(&threads),
        "{threads} threads beside the first"
    );
}

fn without_a_jail_the_lists_remain() {
    let workers = start(Jail::Off);
    let (_socket, pid) = workers.spawn().expect("a worker");
    assert_eq!(status(pid, "NoNewPrivs"), "1");
    assert_eq!(
        link(&format!("/proc/{pid}/ns/mnt")),
        link("/proc/self/ns/mnt")
    );
    assert!(ask(&workers, "call main open-to-write").is_empty());
    let refused = ask(&workers, "call io open-to-read");
    assert_eq!(refused, ["open-to-read: Ok(())", "end"]);
    assert!(ask(&workers, "call vcpu socket-unix").is_empty());
    drop(_socket);
    assert_eq!(settled(&workers).violations, 2);
}

fn workers_from_many_threads() {
    let workers = start(Jail::On(Limits::default()));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..5 {
                    assert_eq!(ask(&workers, "uname"), ["\"vm-run\"", "end"]);
                }
            });
        }
    });
    assert_eq!(settled(&workers).started, 20);
}

fn a_worker_that_ends_leaves_nothing() {
    let workers = start(Jail::On(Limits::default()));
    let (socket, pid) = workers.spawn().expect("a worker");
    let groups = cgroups(pid);
    drop(socket);
    let counts = settled(&workers);
    assert_eq!((counts.started, counts.gone, counts.violations), (1, 1, 0));
    assert!(!alive(pid));
    wait_until("its cgroups are gone", || {
        groups.iter().all(|group| !group.exists())
    });
}

fn dropping_the_workers_ends_them() {
    let workers = start(Jail::On(Limits::default()));
    let held: Vec<_> = (0..10)
        .map(|_| workers.spawn().expect("a worker"))
        .collect();
    let groups: Vec<_> = held.iter().flat_map(|worker| cgroups(worker.1)).collect();
    drop(workers);
    assert!(held.iter().all(|worker| !alive(worker.1)));
    assert!(groups.iter().all(|group| !group.exists()));
    assert!(
        groups
            .iter()
            .all(|group| group.parent().is_some_and(|spawner| !spawner.exists()))
    );
}

fn a_killed_spawner() {
    let workers = start(Jail::On(Limits::default()));
    let held: Vec<_> = (0..3).map(|_| workers.spawn().expect("a worker")).collect();
    let groups: Vec<_> = held.iter().flat_map(|worker| cgroups(worker.1)).collect();
    kill(&status(held[0].1, "PPid"));
    wait_until("the workers are gone", || {
        held.iter().all(|worker| !alive(worker.1))
    });
    assert!(workers.spawn().is_err());
    assert!(workers.counts().is_err());
    drop(workers);
    // The next one tidies up.
    drop(start(Jail::On(Limits::default())));
    assert!(groups.iter().all(|group| !group.exists()));
}

fn a_killed_owner_leaves_nothing() {
    let mut owner = this_program("owner");
    let pids = first_line(&mut owner);
    let pids: Vec<_> = pids.split(' ').map(pid).collect();
    let groups: Vec<_> = pids.iter().flat_map(|pid| cgroups(*pid)).collect();
    owner.kill().expect("killed");
    owner.wait().expect("reaped");
    wait_until("all are gone", || !pids.iter().any(|pid| alive(*pid)));
    wait_until("their cgroups are gone", || {
        groups.iter().all(|group| !group.exists())
    });
}

/// A program that is about to be killed.
fn owner() -> ExitCode {
    let workers = start(Jail::On(Limits::default()));
    let held: Vec<_> = (0..2).map(|_| workers.spawn().expect("a worker")).collect();
    let spawner = status(held[0].1, "PPid");
    println!("{} {} {spawner}", held[0].1, held[1].1);
    std::thread::park();
    ExitCode::SUCCESS
}

fn a_program_that_is_no_worker() {
    for program in ["/bin/true", "/nonexistent"] {
        let spec = fork::worker::WorkersSpec {
            program: program.into(),
            jail: Jail::Off,
        };
        assert!(Workers::start(spec).is_err(), "{program}");
    }
}
