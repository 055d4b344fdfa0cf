//! Thousands of forks of a guest of a few instructions: `cargo xtask soak` runs them,
//! for they take minutes.

#[path = "micro/census.rs"]
mod census;
#[path = "micro/soak.rs"]
mod soak;

use census::{await_same, is_alone};
use fork::{BootSpec, ForkSpec, Host, Place, Pool, Template};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::sync::Arc;
use std::time::Instant;

fn boot(memory_mib: u64) -> Template {
    let host = Host::open().expect("these tests need /dev/kvm");
    let spec = BootSpec {
        memory: memory_mib << 20,
        ..BootSpec::default()
    };
    Template::boot(Arc::new(host), &spec).expect("boots")
}

fn child(hostname: &str) -> ForkSpec {
    ForkSpec {
        hostname: hostname.into(),
        ..ForkSpec::default()
    }
}

#[test]
fn ten_thousand_forks_in_this_process_leave_nothing() {
    if is_alone("ten_thousand_forks_in_this_process_leave_nothing") {
        soak::in_this_process(10_000);
    }
}

#[test]
fn ten_thousand_forks_in_workers_leave_nothing() {
    if is_alone("ten_thousand_forks_in_workers_leave_nothing") {
        soak::in_workers(10_000);
    }
}

#[test]
fn a_thousand_children_in_workers_live_and_answer_at_once() {
    if is_alone("a_thousand_children_in_workers_live_and_answer_at_once") {
        alive_at_once(1000);
    }
}

/// `n` children alive at once, each in a worker, each answering.
fn alive_at_once(n: usize) {
    raise_descriptors();
    let directory = tempfile::tempdir().expect("a directory");
    let template = soak::on_disk(directory.path());
    let workers = Arc::new(soak::workers());
    let available = available_kib();
    let place = Place::Workers(Arc::clone(&workers));
    let pool = Pool::new(template, place, 0).expect("a pool");
    let begin = Instant::now();
    let mut children: Vec<_> = (0..n)
        .map(|i| pool.fork(child(&format!("c{i}"))).expect("forks"))
        .collect();
    let mut answers: Vec<u64> = children
        .iter_mut()
        .map(|child| {
            let answer = child.answer().expect("answers");
            assert_eq!(answer, child.expected_answer());
            answer
        })
        .collect();
    let took = begin.elapsed();
    answers.sort_unstable();
    answers.dedup();
    assert_eq!(answers.len(), n, "no two are the same");
    let counts = workers.counts().expect("a spawner");
    assert_eq!(counts.started - counts.gone, n as u64, "all are alive");
    let each = available.saturating_sub(available_kib()) / n as u64;
    println!("{n} children alive at once: {took:?}, {each} KiB of MemAvailable each");
    let begin = Instant::now();
    drop(children);
    await_same("all have ended", &(n as u64), || {
        workers.counts().expect("a spawner").gone
    });
    let counts = workers.counts().expect("a spawner");
    assert_eq!(counts.violations, 0, "{counts:?}");
    println!("their end: {:?}", begin.elapsed());
}

/// A child in a worker costs its owner a descriptor.
fn raise_descriptors() {
    let maximum = getrlimit(Resource::Nofile).maximum;
    let all = Rlimit {
        current: maximum,
        maximum,
    };
    setrlimit(Resource::Nofile, all).expect("up to the hard limit");
}

fn available_kib() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").expect("reads");
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|l| l.trim().strip_suffix(" kB"));
    kib.and_then(|n| n.parse().ok()).expect("a number")
}
