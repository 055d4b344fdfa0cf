//! Ends that nobody planned.

use crate::support::{Call, listing, own_root};
use rustix::process::Signal;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

#[test]
fn a_guest_that_panics_is_reported_in_one_line_with_its_last_words() {
    let own = own_root();
    let root = own.path();
    // Nothing in a container can make this kernel panic, unless it is told to.
    let cmdline = "sysctl.vm.panic_on_oom=1";
    let options = ["--name", "fragile", "--memory", "64m", "--cmdline", cmdline];
    let built = Call::template_build_in(root, &options).end();
    assert_eq!(
        (built.status, built.out()),
        (0, "fragile\n".into()),
        "{built}"
    );
    let before = listing(root);
    let line = Call::run_in(
        root,
        &["--template", "fragile", "busybox", "tail", "/dev/zero"],
    )
    .refused(125);
    assert!(line.contains("died") && line.contains("panic"), "{line}");
    assert_eq!(listing(root), before);
    assert_eq!(processes_over(root), [0; 0]);
}

#[test]
fn a_container_that_takes_all_memory_ends_and_the_guest_lives() {
    let own = own_root();
    let script = "tail /dev/zero; echo status=$?";
    let options = ["--memory", "64m", "busybox", "sh", "-c", script];
    let ran = Call::run_in(own.path(), &options).end();
    assert_eq!((ran.status, ran.out()), (0, "status=137\n".into()), "{ran}");
}

#[test]
fn vm_run_killed_leaves_nothing_behind() {
    let own = own_root();
    let root = own.path();
    let before = (listing(root), mounts(), sockets());
    let script = "head -c 8388608 /dev/urandom > /on-disk; echo ready; sleep 1000";
    let mut running = Call::run_in(root, &["-i", "busybox", "sh", "-c", script]).start();
    running.expect("ready");
    assert_eq!(processes_over(root).len(), 1);
    running.signal(Signal::KILL);
    assert_eq!(running.end().status, 137);
    let deadline = Instant::now() + Duration::from_secs(10);
    while !processes_over(root).is_empty() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(processes_over(root), [0; 0]);
    assert_eq!((listing(root), mounts(), sockets()), before);
    let next = Call::run_in(root, &["busybox", "echo", "well"]).end();
    assert_eq!((next.status, next.out()), (0, "well\n".into()), "{next}");
    assert_eq!(listing(root), before.0);
}

/// The processes that name this directory on their command line.
fn processes_over(root: &Path) -> Vec<u32> {
    let root = root.to_str().expect("text");
    fs::read_dir("/proc")
        .expect("lists")
        .flatten()
        .filter_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            let line = fs::read(entry.path().join("cmdline")).ok()?;
            String::from_utf8_lossy(&line).contains(root).then_some(pid)
        })
        .collect()
}

fn mounts() -> String {
    fs::read_to_string("/proc/self/mountinfo").expect("reads")
}

/// The names of all Unix sockets that have one.
fn sockets() -> Vec<String> {
    fs::read_to_string("/proc/net/unix")
        .expect("reads")
        .lines()
        .filter_map(|line| line.split_whitespace().nth(7).map(String::from))
        .collect()
}
