//! Ends that nobody planned.

use crate::support::{Call, PATIENCE, listing, own_root};
use rustix::process::Signal;
use std::fs;
use std::path::Path;
use std::process::Command;
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
    wait_for_no_processes(root);
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
fn vm_run_killed_leaves_its_container_to_its_supervisor() {
    let own = own_root();
    let root = own.path();
    let before = (listing(root), mounts(), sockets());
    let script = "head -c 8388608 /dev/urandom > /on-disk; echo ready; sleep 1000";
    let args = ["--name", "orphan", "busybox", "sh", "-c", script];
    let mut running = Call::run_in(root, &args).start();
    running.expect("ready");
    running.signal(Signal::KILL);
    assert_eq!(running.end().status, 137);
    let count = Call::vm_run_in(root, &["exec", "orphan", "wc", "-c", "/on-disk"]).end();
    assert_eq!(
        (count.status, count.out()),
        (0, "8388608 /on-disk\n".into()),
        "{count}"
    );
    let removed = Call::vm_run_in(root, &["rm", "-f", "orphan"]).end();
    assert_eq!(
        (removed.status, removed.out()),
        (0, "orphan\n".into()),
        "{removed}"
    );
    wait_for_no_processes(root);
    assert_eq!((listing(root), mounts(), sockets()), before);
    assert_eq!(containers(root), 0);
}

#[test]
fn a_killed_supervisor_takes_its_container_along_and_the_record_says_so() {
    let own = own_root();
    let root = own.path();
    let args = [
        "-d",
        "--name",
        "kept",
        "busybox",
        "sh",
        "-c",
        // Killed when there is much to write.
        "echo > /kept; sync; echo synced
        while :; do mkdir /d; cp -r /bin /etc /d; sync; rm -r /d; done",
    ];
    let begun = Call::run_to_keep(root, &args).end();
    assert_eq!(begun.status, 0, "{begun}");
    let deadline = Instant::now() + PATIENCE;
    while Call::vm_run_in(root, &["logs", "kept"]).end().out() != "synced\n" {
        assert!(Instant::now() < deadline, "the container does not begin");
        std::thread::sleep(Duration::from_millis(100));
    }
    for pid in processes_over(root) {
        let pid = rustix::process::Pid::from_raw(pid as i32).expect("a pid");
        rustix::process::kill_process(pid, Signal::KILL).expect("killed");
    }
    wait_for_no_processes(root);
    check_disk(root);
    let waited = Call::vm_run_in(root, &["wait", "kept"]).end();
    assert_eq!(
        (waited.status, waited.out()),
        (0, "137\n".into()),
        "{waited}"
    );
    let inspected = Call::vm_run_in(root, &["inspect", "kept"]).end();
    assert!(
        inspected.out().contains("its supervisor was killed"),
        "{inspected}"
    );
    let next = Call::vm_run_in(root, &["start", "kept"]).end();
    assert_eq!(next.status, 0, "{next}");
    let kept = Call::vm_run_in(root, &["exec", "kept", "ls", "/kept"]).end();
    assert_eq!((kept.status, kept.out()), (0, "/kept\n".into()), "{kept}");
    let removed = Call::vm_run_in(root, &["rm", "-f", "kept"]).end();
    assert_eq!(removed.status, 0, "{removed}");
    wait_for_no_processes(root);
    assert_eq!(containers(root), 0);
}

/// Looks whether the only container's file system is sound, once its journal is played
/// back, in a copy of its disk.
fn check_disk(root: &Path) {
    let disk = (listing(&root.join("containers")).into_iter())
        .find(|path| path.ends_with("writable"))
        .expect("it has a disk");
    let copy = tempfile::NamedTempFile::new().expect("a file");
    let copied = Command::new("cp")
        .arg("--sparse=always")
        .args([&disk, copy.path()])
        .status();
    assert!(copied.expect("cp").success());
    let checked = Command::new("e2fsck")
        .args(["-f", "-p"])
        .arg(copy.path())
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .output()
        .expect("e2fsck");
    let said = String::from_utf8_lossy(&checked.stdout);
    assert!(said.contains("recovering journal"), "{said}");
    // It mends what a crash may leave, the superblock's counts (1), and refuses more.
    assert!(matches!(checked.status.code(), Some(0 | 1)), "{said}");
}

/// How many directories of containers there are.
fn containers(root: &Path) -> usize {
    fs::read_dir(root.join("containers")).map_or(0, Iterator::count)
}

fn wait_for_no_processes(root: &Path) {
    let deadline = Instant::now() + PATIENCE;
    while !processes_over(root).is_empty() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(processes_over(root), [0; 0]);
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
