//! `vm-run fork` and `freeze` on the command line.

use crate::support::{Call, Ran, own_root};
use rustix::process::Signal;
use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// Counts, for as long as it runs.
const COUNTS: &str = "i=0; while :; do i=$((i + 1)); echo $i > /i; usleep 10000; done";

fn vm_run(root: &Path, args: &[&str]) -> Ran {
    Call::vm_run_in(root, args).end()
}

/// What it prints, if it succeeds and complains of nothing.
fn said(root: &Path, args: &[&str]) -> String {
    let ran = vm_run(root, args);
    assert_eq!(
        (ran.status, ran.err()),
        (0, String::new()),
        "{args:?}: {ran}"
    );
    ran.out().trim_end().to_owned()
}

fn inspect(root: &Path, name: &str) -> serde_json::Value {
    let text = said(root, &["inspect", name]);
    serde_json::from_str::<serde_json::Value>(&text).expect("JSON")[0].take()
}

fn start(root: &Path, name: &str, more: &[&str], script: &str) {
    let run = ["run", "-d", "--name", name];
    said(
        root,
        &[&run, more, &["busybox", "sh", "-c", script]].concat(),
    );
}

/// How far it has counted. Between two numbers the file may be empty for a moment, and
/// before the first it is not there.
fn count(root: &Path, name: &str) -> u64 {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let ran = vm_run(root, &["exec", name, "cat", "/i"]);
        match ran.out().trim().parse() {
            Ok(number) => return number,
            Err(_) => assert!(Instant::now() < deadline, "{ran}"),
        }
    }
}

/// Waits until it is so.
fn until(what: &str, is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(120);
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn containers_go_on_where_their_source_is() {
    let own = own_root();
    let root = own.path();
    let script = format!("echo begun; {COUNTS}");
    let more = [
        "--writable-memory",
        "16m",
        "--label",
        "kind=counter",
        "--restart",
        "always",
        "--env",
        "A=b",
    ];
    start(root, "source", &more, &script);
    until("it counts", || count(root, "source") > 10);
    let reached = count(root, "source");

    let ids = said(root, &["fork", "-n", "2", "--name", "f", "source"]);
    assert_eq!(ids.lines().count(), 2, "{ids}");
    for (name, id) in ["f-1", "f-2"].into_iter().zip(ids.lines()) {
        let first = count(root, name);
        assert!(first >= reached, "{first} after {reached}");
        until("it counts on", || count(root, name) > first);
        let found = inspect(root, name);
        assert_eq!(found["Id"], id);
        assert_eq!(found["State"]["Status"], "running");
        assert_eq!(found["VmRun"]["ForkedFrom"]["Name"], "source");
        assert_eq!(found["Config"]["Labels"]["kind"], "counter");
        assert_eq!(found["HostConfig"]["RestartPolicy"]["Name"], "no");
        assert_eq!(found["Config"]["Hostname"], id[..12]);
        assert_eq!(said(root, &["exec", name, "hostname"]), id[..12]);
        assert_eq!(said(root, &["exec", name, "sh", "-c", "echo $A"]), "b");
        // What the source has said is in the source's log.
        let logs = vm_run(root, &["logs", name]);
        assert_eq!(logs.out(), "", "{logs}");
        let line = logs.err();
        assert!(line.starts_with("vm-run: forked from source ("), "{line}");
    }
    let after = count(root, "source");
    until("the source counts on", || count(root, "source") > after);
    assert_eq!(said(root, &["logs", "source"]), "begun");

    // A fork of a fork; the tree shows it below its own source, which may go.
    said(root, &["fork", "--name", "grand", "f-1"]);
    let tree = said(root, &["ps", "--tree"]);
    let names: Vec<&str> = tree
        .lines()
        .skip(1)
        .map(|row| row.rsplit("   ").next().unwrap_or_default().trim())
        .collect();
    let of = |name: &str| names.iter().position(|found| *found == name);
    assert_eq!(of("source"), Some(0), "{tree}");
    assert!(of("└ f-1").is_some(), "{tree}");
    assert_eq!(of("└ grand"), of("└ f-1").map(|at| at + 1), "{tree}");
    said(root, &["rm", "-f", "f-1", "source"]);
    let now = count(root, "grand");
    until("it needs neither", || count(root, "grand") > now);
    said(root, &["rm", "-f", "grand", "f-2"]);
}

/// Writes who it is by a file that is open, and, when it is asked to, what it has open that
/// has no name any more.
const WRITES: &str = "cd /v; echo here > gone; exec 3>>log 4<gone; rm gone
    while :; do
        echo $(hostname) >&3
        test -e ask && test ! -e its-$(hostname) && cat <&4 > its-$(hostname)
        usleep 20000
    done";

#[test]
fn volumes_are_shared_and_what_is_open_there_stays_open() {
    let own = own_root();
    let root = own.path();
    let dir = tempfile::tempdir_in("/dev/shm").expect("a directory");
    let volume = format!("{}:/v", dir.path().display());
    let more = ["--rm", "-v", &volume, "-v", "/anonymous"];
    start(root, "source", &more, WRITES);
    let path = |name: &str| dir.path().join(name);
    let read = |name: &str| std::fs::read_to_string(path(name)).unwrap_or_default();
    let lines = |host: &str| read("log").lines().filter(|line| *line == host).count();
    let source = said(root, &["exec", "source", "hostname"]);
    until("the source writes", || lines(&source) > 3);
    said(
        root,
        &[
            "fork",
            "--rm",
            "--name",
            "one",
            "--hostname",
            "one",
            "source",
        ],
    );
    said(
        root,
        &["fork", "--rm", "--name", "two", "--hostname", "two", "one"],
    );
    let before = lines(&source);
    until("all three write", || {
        lines("one") > 3 && lines("two") > 3 && lines(&source) > before + 3
    });
    std::fs::write(path("ask"), "").expect("written");
    for host in [&source, "one", "two"] {
        until("each has it open", || {
            read(&format!("its-{host}")) == "here\n"
        });
    }
    // What one makes the others see; it all outlives the source, as do its mounts.
    said(
        root,
        &[
            "exec",
            "one",
            "sh",
            "-c",
            "mkdir /v/of-one; echo 1 > /anonymous/one",
        ],
    );
    said(root, &["exec", "source", "rmdir", "/v/of-one"]);
    said(root, &["rm", "-f", "source", "one"]);
    let now = lines("two");
    until("it writes on", || lines("two") > now + 3);
    assert_eq!(said(root, &["exec", "two", "cat", "/anonymous/one"]), "1");
    said(root, &["exec", "two", "sh", "-c", "echo new > /v/new"]);
    assert_eq!(read("new"), "new\n");
    said(root, &["rm", "-f", "two"]);
}

#[test]
fn one_that_is_paused_stays_so_and_its_forks_run() {
    let own = own_root();
    let root = own.path();
    start(root, "source", &["--writable-memory", "16m"], COUNTS);
    until("it counts", || count(root, "source") > 3);
    said(root, &["pause", "source"]);
    said(root, &["fork", "--rm", "--name", "fork", "source"]);
    let reached = count(root, "fork");
    until("the fork counts", || count(root, "fork") > reached + 10);
    assert_eq!(inspect(root, "source")["State"]["Status"], "paused");
    said(root, &["unpause", "source"]);
    let reached = count(root, "source");
    until("it counts on", || count(root, "source") > reached);
    said(root, &["rm", "-f", "source", "fork"]);
}

#[test]
fn what_cannot_be_forked_is_told_in_a_line() {
    let own = own_root();
    let root = own.path();
    start(root, "it", &[], "sleep 1000");
    let refused: [(&[&str], &str); 4] = [
        (&["fork", "none"], "none"),
        (&["fork", "-n", "0", "it"], "--count is 1 to"),
        (
            &["fork", "-n", "2", "-p", "80", "it"],
            "cannot have the same port",
        ),
        (&["fork", "-p", "x", "it"], "\"x\""),
    ];
    for (words, why) in refused {
        let line = Call::vm_run_in(root, words).refused(125);
        assert!(line.contains(why), "{words:?}: {line}");
    }
    start(root, "with", &["--rm", "-v", "/v"], "sleep 1000");
    let line = Call::vm_run_in(root, &["freeze", "with", "--as", "t"]).refused(125);
    assert!(line.contains("has volumes"), "{line}");
    said(root, &["rm", "-f", "with"]);
    let line = Call::vm_run_in(root, &["fork", "--name", "it", "it"]).refused(125);
    assert!(line.contains("is taken by another container"), "{line}");
    said(root, &["stop", "-t", "0", "it"]);
    let line = Call::vm_run_in(root, &["fork", "it"]).refused(125);
    assert!(line.contains("does not run: start it first"), "{line}");
    // Of all these attempts nothing is left.
    assert_eq!(said(root, &["ps", "-a"]).lines().count(), 2);
    said(root, &["rm", "it"]);
}

#[test]
fn a_container_that_runs_becomes_a_template() {
    let own = own_root();
    let root = own.path();
    start(root, "source", &[], COUNTS);
    until("it counts", || count(root, "source") > 10);
    let before = count(root, "source");
    assert_eq!(said(root, &["freeze", "source", "--as", "then"]), "then");
    let after = count(root, "source");
    until("it has gone on", || count(root, "source") > after + 50);
    said(root, &["template", "inspect", "--verify", "then"]);
    // Of its memory only what it has written is new on the disk.
    let memory = |name: &str| root.join("templates").join(name).join("memory");
    let ino = |name: &str| memory(name).metadata().expect("stats").ino();
    assert_eq!(ino("then"), ino("default-256m-1c"));
    let mut generations = BTreeSet::new();
    for name in ["one", "two"] {
        said(root, &["run", "-d", "--template", "then", "--name", name]);
        let now = count(root, name);
        assert!(now >= before, "{now} of {before}");
        until("it goes on", || count(root, name) > now);
        let generation = inspect(root, name)["VmRun"]["Identity"]["Generation"].to_string();
        generations.insert(generation);
        // And can be forked in its turn.
        said(
            root,
            &["fork", "--rm", "--name", &format!("{name}-fork"), name],
        );
    }
    assert_eq!(generations.len(), 2);
    let line = Call::vm_run_in(root, &["freeze", "source", "--as", "then"]).refused(125);
    assert!(line.contains("there is a template then already"), "{line}");
    said(
        root,
        &["rm", "-f", "source", "one", "two", "one-fork", "two-fork"],
    );
    // And through an archive.
    let archive = root.join("then.tar").display().to_string();
    said(root, &["template", "export", "then", "-o", &archive]);
    said(root, &["template", "rm", "then"]);
    assert_eq!(said(root, &["template", "import", "-i", &archive]), "then");
    said(
        root,
        &["run", "-d", "--template", "then", "--name", "three"],
    );
    let now = count(root, "three");
    assert!(now >= before, "{now} of {before}");
    until("it goes on", || count(root, "three") > now);
    said(root, &["rm", "-f", "three"]);
    said(root, &["template", "rm", "then"]);
}

/// What a file in it holds.
fn cat(root: &Path, name: &str, path: &str) -> String {
    said(root, &["exec", name, "cat", path])
}

fn put(root: &Path, name: &str, text: &str, path: &str) {
    said(
        root,
        &[
            "exec",
            name,
            "sh",
            "-c",
            &format!("echo {text} > {path}; sync"),
        ],
    );
}

#[test]
fn a_disk_is_shared_as_it_was_and_goes_on_apart() {
    let own = own_root();
    let root = own.path();
    // A file of its own in the background, written all the time.
    let writes = "i=0; while :; do i=$((i + 1)); echo $i >> /log; sync; done";
    start(root, "source", &[], writes);
    put(root, "source", "first", "/a");
    let big = "head -c 4000000 /dev/urandom > /big; sha256sum /big; sync";
    let sum = said(root, &["exec", "source", "sh", "-c", big]);
    said(root, &["fork", "--name", "one", "source"]);
    put(root, "source", "second", "/a");
    said(root, &["fork", "--name", "two", "source"]);
    said(root, &["fork", "--name", "three", "one"]);
    let all = ["source", "one", "two", "three"];
    let of = |path: &str| all.map(|name| cat(root, name, path));
    assert_eq!(of("/a"), ["second", "first", "second", "first"]);
    for name in all {
        put(root, name, name, "/own");
        put(root, name, name, "/a");
    }
    assert_eq!(
        (of("/own"), of("/a")),
        (all.map(String::from), all.map(String::from))
    );
    // The log has every line once, in order, in each.
    for name in all {
        let log = cat(root, name, "/log");
        let lines: Vec<u64> = log
            .lines()
            .map(|line| line.parse().expect("a number"))
            .collect();
        assert!(
            lines.iter().copied().eq(1..=lines.len() as u64),
            "{name}: {log}"
        );
        assert_eq!(said(root, &["exec", name, "sha256sum", "/big"]), sum);
    }
    // The lowest file is one for all of them.
    let lowest = |name: &str| {
        let id = inspect(root, name)["Id"].as_str().map(String::from);
        let dir = root.join("containers").join(id.expect("an id"));
        std::fs::metadata(dir.join("layers/0")).expect("is there")
    };
    assert_eq!(lowest("two").nlink(), all.len() as u64);
    // Started again, a fork is a new start of the same command on its own disk.
    said(root, &["rm", "-f", "source"]);
    said(root, &["stop", "-t", "0", "two"]);
    said(root, &["start", "two"]);
    assert_eq!(cat(root, "two", "/own"), "two");
    assert_eq!(said(root, &["exec", "two", "sha256sum", "/big"]), sum);
    // And can be forked as any other.
    said(root, &["fork", "--name", "four", "two"]);
    assert_eq!(cat(root, "four", "/own"), "two");
    // What is at rest is whole.
    said(root, &["stop", "-t", "0", "four"]);
    let copy = root.join("copied");
    let copied = copy.to_str().expect("a path");
    said(root, &["cp", "four:/own", copied]);
    assert_eq!(std::fs::read_to_string(&copy).expect("is there"), "two\n");
    said(root, &["rm", "-f", "one", "two", "three", "four"]);
}

#[test]
fn a_container_is_brought_back_with_its_disk() {
    let own = own_root();
    let root = own.path();
    start(root, "it", &[], COUNTS);
    until("it counts", || count(root, "it") > 10);
    put(root, "it", "then", "/a");
    said(root, &["freeze", "it", "--as", "then"]);
    let at = count(root, "it");
    put(root, "it", "later", "/a");
    until("it has gone on", || count(root, "it") > at + 60);
    said(root, &["freeze", "it", "--as", "later"]);
    let before = inspect(root, "it");
    for (name, range) in [("then", 0..at + 30), ("later", at + 30..u64::MAX)] {
        said(root, &["rewind", "it", name]);
        assert_eq!(cat(root, "it", "/a"), name);
        let now = count(root, "it");
        assert!(range.contains(&now), "{now} at {name}");
        until("it goes on", || count(root, "it") > now);
        put(root, "it", "lost", "/a");
    }
    let after = inspect(root, "it");
    assert_eq!(after["Id"], before["Id"]);
    assert_eq!(after["Config"]["Hostname"], before["Config"]["Hostname"]);
    let generation = |found: &serde_json::Value| found["VmRun"]["Identity"]["Generation"].clone();
    assert_ne!(generation(&after), generation(&before));
    // Elsewhere, too, and with a disk of its own.
    said(
        root,
        &["run", "-d", "--name", "other", "--template", "later"],
    );
    assert_eq!(
        (cat(root, "other", "/a"), cat(root, "it", "/a")),
        ("later".into(), "lost".into())
    );
    let line = Call::vm_run_in(root, &["rewind", "it", "default-256m-1c"]).refused(125);
    assert!(line.contains("was not made of such a container"), "{line}");
    said(root, &["rm", "-f", "it", "other"]);
    said(root, &["template", "rm", "then", "later"]);
}

/// More often than a disk has layers; in between they become one.
#[test]
fn a_container_with_a_disk_is_forked_again_and_again() {
    const FORKS: u32 = 9;
    let own = own_root();
    let root = own.path();
    let writes = "i=0; while :; do i=$((i + 1)); echo $i >> /log; sync; usleep 100000; done";
    start(root, "source", &[], writes);
    until("it writes", || {
        vm_run(root, &["exec", "source", "test", "-s", "/log"]).status == 0
    });
    let layers = || {
        let id = inspect(root, "source")["Id"].as_str().map(String::from);
        let dir = root
            .join("containers")
            .join(id.expect("an id"))
            .join("layers");
        let names = std::fs::read_dir(dir).expect("lists").flatten();
        names.filter(|one| one.path().extension().is_none()).count()
    };
    let mut most = 0;
    for number in 0..FORKS {
        said(root, &["fork", "--rm", "--name", "fork", "source"]);
        most = most.max(layers());
        if number + 2 >= FORKS {
            put(root, "fork", "forks", "/a");
            let log = cat(root, "fork", "/log");
            let lines = log.lines().enumerate();
            assert!(
                lines.clone().all(|(at, line)| line == (at + 1).to_string()),
                "{log}"
            );
            put(root, "source", &number.to_string(), "/a");
        }
        said(root, &["rm", "-f", "fork"]);
    }
    until("its layers become one", || layers() < most);
    // Started again, it has all of it.
    said(root, &["stop", "-t", "0", "source"]);
    said(root, &["start", "source"]);
    assert_eq!(cat(root, "source", "/a"), (FORKS - 1).to_string());
    said(root, &["rm", "-f", "source"]);
}

/// Whoever is killed in the middle of a fork, and whenever: the source goes on, what is
/// left is whole or goes, and the next fork is as any other.
#[test]
fn a_fork_that_is_killed_costs_its_source_nothing() {
    let moments = std::env::var("VM_RUN_TEST_KILLS").ok();
    let moments: u64 = moments.and_then(|n| n.parse().ok()).unwrap_or(2);
    let own = own_root();
    let root = own.path();
    // Says something wrong if it ever loses a step.
    let script = "i=0; while :; do i=$((i + 1)); echo $i > /i; sync; read -r n < /i
        test $n = $i || echo lost $n of $i; done";
    start(root, "source", &[], script);
    until("it counts", || count(root, "source") > 5);
    let begun = Instant::now();
    said(root, &["fork", "--name", "first", "source"]);
    let span = begun.elapsed();
    said(root, &["rm", "-f", "first"]);
    for moment in 0..moments {
        let name = format!("fork-{moment}");
        let running =
            Call::vm_run_in(root, &["fork", "-n", "2", "--name", &name, "source"]).start();
        std::thread::sleep(span * moment as u32 / moments as u32);
        running.signal(Signal::KILL);
        drop(running.end());
        let now = count(root, "source");
        until("the source goes on", || count(root, "source") > now);
        // Those that have their picture begin all the same; the others go.
        let is_settled = || {
            let states = said(root, &["ps", "-a", "--json"]);
            let all: serde_json::Value = serde_json::from_str(&states).expect("JSON");
            let all = all.as_array().cloned().unwrap_or_default();
            all.iter().all(|one| one["State"]["Status"] == "running")
        };
        until("all run or are gone", is_settled);
        for id in said(root, &["ps", "-aq"]).lines() {
            if inspect(root, id)["Name"] != "/source" {
                assert!(count(root, id) >= 5, "moment {moment}");
                said(root, &["rm", "-f", id]);
            }
        }
    }
    said(root, &["fork", "--name", "last", "source"]);
    let now = count(root, "last");
    until("the last one goes on", || count(root, "last") > now);
    assert_eq!(said(root, &["logs", "source"]), "");
    said(root, &["rm", "-f", "last", "source"]);
}
