//! Volumes: files of the host in containers, with their owners, and nothing else of it.

use crate::support::{Call, PATIENCE, own_root, python};
use rustix::process::{Pid, Signal, kill_process};
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Instant;
use tempfile::TempDir;

/// A directory of the host, on a file system that has everything.
fn directory() -> TempDir {
    tempfile::tempdir_in("/dev/shm").expect("a directory")
}

fn bind(from: &Path, to: &str) -> String {
    format!("{}:{to}", from.display())
}

/// What a shell in a container prints that does what it should.
fn sh(options: &[&str], script: &str) -> String {
    let ran = Call::run(&[options, &["busybox", "sh", "-c", script]].concat()).end();
    assert_eq!(ran.status, 0, "{script}: {ran}");
    ran.out()
}

fn lines(text: &str) -> Vec<&str> {
    text.lines().collect()
}

#[test]
fn what_a_container_makes_belongs_to_its_user_on_the_host() {
    let dir = directory();
    let volume = bind(dir.path(), "/v");
    let script = "cd /v; echo mine > by-root; mkdir -m 1777 open; touch given; chown 7:8 given
        cp /bin/busybox tool; chmod 4755 tool; stat -c %a:%u tool by-root";
    let out = sh(&["-v", &volume], script);
    assert_eq!(lines(&out), ["4755:0", "644:0"]);
    // A user drops the setuid bit of its file by writing to it; root does not.
    let script = "cd /v/open; echo its > by-user; cp /v/tool tool; chmod 4755 tool
        stat -c %a:%u tool; echo more >> tool; stat -c %a tool
        touch /v/refused || echo refused; cat /v/by-root";
    let out = sh(&["-v", &volume, "-u", "1000:1000"], script);
    assert_eq!(lines(&out), ["4755:1000", "755", "refused", "mine"]);
    let found = |name: &str| fs::metadata(dir.path().join(name)).expect("is there");
    for (name, uid, gid, mode) in [
        ("by-root", 0, 0, 0o644),
        ("open", 0, 0, 0o1777),
        ("given", 7, 8, 0o644),
        ("tool", 0, 0, 0o4755),
        ("open/by-user", 1000, 1000, 0o644),
        ("open/tool", 1000, 1000, 0o755),
    ] {
        let found = found(name);
        let seen = (found.uid(), found.gid(), found.mode() & 0o7777);
        assert_eq!(seen, (uid, gid, mode), "{name}");
    }
    assert_eq!(
        fs::read(dir.path().join("open/by-user")).expect("reads"),
        b"its\n"
    );
}

#[test]
fn files_are_the_same_on_both_sides_however_large_or_many() {
    let dir = directory();
    let data: Vec<u8> = (0..1_048_576_u32)
        .map(|n| (n.wrapping_mul(n) >> 7) as u8)
        .collect();
    fs::write(dir.path().join("in"), &data).expect("written");
    let script = "cd /v; cp in out; sha256sum < in; sha256sum < out; truncate -s 3000000 hole
        stat -c %s hole; echo a > a; echo b > b; mv a b; cat b; ls a 2> /dev/null || echo gone
        mkdir many; cd many; i=0; while [ $i -lt 400 ]; do : > file-with-a-name-$i; i=$((i + 1)); done
        ls | wc -l; rm file-with-a-name-1*; ls | wc -l; ln b c 2> /dev/null; ln ../b ../c; stat -c %h ../c";
    let out = sh(&["-v", &bind(dir.path(), "/v")], script);
    let out = lines(&out);
    assert_eq!(out[0], out[1]);
    assert_eq!(out[2..], ["3000000", "a", "gone", "400", "289", "2"]);
    assert!(fs::read(dir.path().join("out")).expect("reads") == data);
    assert_eq!(
        fs::read_dir(dir.path().join("many"))
            .expect("lists")
            .count(),
        289
    );
}

#[test]
fn a_link_in_a_volume_leads_nowhere_but_into_the_container() {
    let outside = directory();
    fs::write(outside.path().join("secret"), "the host's").expect("written");
    let dir = directory();
    symlink("/etc/hostname", dir.path().join("absolute")).expect("a link");
    symlink(outside.path(), dir.path().join("outside")).expect("a link");
    let up = format!("../../../../../../..{}/secret", outside.path().display());
    symlink(up, dir.path().join("up")).expect("a link");
    fs::create_dir(dir.path().join("in")).expect("made");
    fs::write(dir.path().join("in/secret"), "mine").expect("written");
    // One flips what the other looks at.
    let script = format!(
        "cd /v; cat absolute; cat up outside/secret 2> /dev/null || echo none
        (while :; do ln -sfn in x; ln -sfn {} x; done) & flipper=$!
        i=0; while [ $i -lt 300 ]; do cat x/secret 2> /dev/null; i=$((i + 1)); done | sort -u
        kill $flipper",
        outside.path().display()
    );
    let options = ["--hostname", "guest", "-v", &bind(dir.path(), "/v")];
    let out = sh(&options, &script);
    assert_eq!(lines(&out)[..2], ["guest", "none"]);
    assert!(!out.contains("host's"), "{out}");
}

#[test]
fn read_only_is_read_only_and_a_file_can_be_a_volume() {
    let dir = directory();
    fs::write(dir.path().join("f"), "old\n").expect("written");
    fs::create_dir(dir.path().join("ro")).expect("made");
    fs::write(dir.path().join("ro/x"), "x\n").expect("written");
    let read_only = bind(&dir.path().join("ro"), "/a/b/ro:ro");
    let mount = format!(
        "type=bind,src={},dst=/etc/f,readonly=false",
        dir.path().join("f").display()
    );
    let script = "cat /a/b/ro/x /etc/f; for c in 'touch y' 'rm x' 'chmod 0 x' 'mv x z'; do
            (cd /a/b/ro; $c) 2>&1 | grep -c 'Read-only file system'; done; echo new > /etc/f
        mkfifo /w/p && (echo through > /w/p & cat /w/p); mknod /w/null c 1 3 || echo refused";
    let writable = bind(dir.path(), "/w");
    let options = ["-v", &read_only, "--mount", &mount, "-v", &writable];
    let ran = Call::run(&[&options[..], &["busybox", "sh", "-c", script]].concat()).end();
    let said = ran.out();
    let expected = ["x", "old", "1", "1", "1", "1", "through", "refused"];
    assert_eq!(lines(&said), expected, "{ran}");
    assert!(ran.err().contains("Operation not permitted"), "{ran}");
    assert_eq!(fs::read(dir.path().join("f")).expect("reads"), b"new\n");
    assert_eq!(
        fs::metadata(dir.path().join("ro/x")).expect("there").mode() & 0o777,
        0o644
    );
}

#[test]
fn named_volumes_persist_and_anonymous_ones_go_with_their_container() {
    let root = own_root();
    let vm_run = |words: &[&str]| Call::vm_run_in(root.path(), words);
    let names = || {
        let ran = vm_run(&["volume", "ls", "-q"]).end();
        ran.out().lines().map(str::to_owned).collect::<Vec<_>>()
    };
    let run = |words: &[&str]| {
        let ran = Call::run_in(root.path(), words).end();
        assert_eq!(ran.status, 0, "{ran}");
        ran.out()
    };
    // What the image has there is in it, the first time; the rest is what was written.
    let script = "echo kept > /etc/kept; echo own > /anonymous/x; head -1 /etc/passwd";
    let words = [
        "-v",
        "data:/etc",
        "-v",
        "/anonymous",
        "busybox",
        "sh",
        "-c",
        script,
    ];
    let first = run(&words);
    assert_eq!(names(), ["data"]);
    let read = "cat /d/kept; head -1 /d/passwd; touch /d/x || echo refused";
    let again = run(&["-v", "data:/d:ro", "busybox", "sh", "-c", read]);
    assert_eq!(again, format!("kept\n{first}refused\n"));

    let words = [
        "create", "--name", "user", "-v", "data:/d", "-v", "/a", "busybox", "true",
    ];
    assert_eq!(vm_run(&words).end().status, 0);
    assert_eq!(names().len(), 2);
    let refused = vm_run(&["volume", "rm", "data"]).refused(125);
    assert!(refused.contains("in use by container user"), "{refused}");
    let inspected = vm_run(&["inspect", "user"]).end().out();
    let inspected: serde_json::Value = serde_json::from_str(&inspected).expect("JSON");
    let mounts = &inspected[0]["Mounts"];
    assert_eq!(mounts[0]["Name"], "data");
    assert_eq!(mounts[1]["Destination"], "/a");
    assert_eq!(vm_run(&["rm", "-v", "user"]).end().status, 0);
    assert_eq!(names(), ["data"]);
    assert_eq!(vm_run(&["volume", "rm", "data"]).end().out(), "data\n");
    assert!(names().is_empty());
}

/// The brokers of a container's supervisor: processes whose name and role say so.
fn brokers() -> Vec<Pid> {
    let all = fs::read_dir("/proc").expect("lists").flatten();
    all.filter_map(|entry| {
        let line = fs::read(entry.path().join("cmdline")).ok()?;
        if line != b"vm-run-worker\0broker\0" {
            return None;
        }
        Pid::from_raw(entry.file_name().to_str()?.parse().ok()?)
    })
    .collect()
}

#[test]
fn two_containers_share_a_volume_and_outlive_its_server() {
    let root = own_root();
    let dir = directory();
    let volume = bind(dir.path(), "/v");
    fs::write(dir.path().join("f"), "there\n").expect("written");
    let script = "until test -e /v/answer; do sleep 0.2; done; cat /v/answer > /v/seen; sleep 1000";
    let words = [
        "-d", "--name", "one", "-v", &volume, "busybox", "sh", "-c", script,
    ];
    let ran = Call::run_to_keep(root.path(), &words).end();
    assert_eq!(ran.status, 0, "{ran}");
    let words = [
        "-v",
        &volume,
        "busybox",
        "sh",
        "-c",
        "echo hello > /v/tmp; mv /v/tmp /v/answer",
    ];
    assert_eq!(Call::run_in(root.path(), &words).end().status, 0);
    let seen: PathBuf = dir.path().join("seen");
    wait_for("what the other has written", || {
        fs::read(&seen).is_ok_and(|seen| seen == b"hello\n")
    });

    let [broker] = brokers()[..] else {
        panic!("{:?}", brokers());
    };
    kill_process(broker, Signal::KILL).expect("killed");
    let exec = |script: &str| {
        let words = ["exec", "one", "sh", "-c", script];
        Call::vm_run_in(root.path(), &words).end()
    };
    let ran = exec("cat /v/f; echo alive");
    assert!(
        ran.err().contains("I/O error") || ran.err().contains("Input/output"),
        "{ran}"
    );
    assert_eq!(ran.out(), "alive\n", "{ran}");
    let stopped = Call::vm_run_in(root.path(), &["stop", "-t", "1", "one"]).end();
    assert_eq!(stopped.status, 0, "{stopped}");
    // Started again, it has a server again.
    let started = Call::vm_run_in(root.path(), &["start", "one"]).end();
    assert_eq!(started.status, 0, "{started}");
    assert_eq!(exec("cat /v/f").out(), "there\n");
    let removed = Call::vm_run_in(root.path(), &["rm", "-f", "one"]).end();
    assert_eq!(removed.status, 0, "{removed}");
    wait_for("the server's end", || brokers().is_empty());
}

fn wait_for(what: &str, is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "{what} does not come");
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
}

#[test]
fn memory_maps_reach_the_host_and_locks_hold_in_a_container() {
    let dir = directory();
    fs::write(dir.path().join("f"), vec![b'.'; 8192]).expect("written");
    let mode = fs::Permissions::from_mode(0o666);
    fs::set_permissions(dir.path().join("f"), mode).expect("set");
    let script = "
import mmap, fcntl, os
with open('/v/f', 'r+b') as f:
    m = mmap.mmap(f.fileno(), 8192)
    m[4090:4102] = b'through maps'
    m.flush()
    m[0:3] = b'end'
    m.close()
f = open('/v/f', 'r+b')
fcntl.lockf(f, fcntl.LOCK_EX)
g = open('/v/f', 'r+b')
fcntl.flock(g, fcntl.LOCK_EX)
if os.fork() == 0:
    for lock, how in ((fcntl.lockf, 'record'), (fcntl.flock, 'file')):
        try:
            with open('/v/f', 'r+b') as h:
                lock(h, fcntl.LOCK_EX | fcntl.LOCK_NB)
            print(how, 'not held')
        except BlockingIOError:
            print(how, 'held')
else:
    os.wait()
";
    let volume = bind(dir.path(), "/v");
    let ran = Call::run(&["-v", &volume, python(), "python3", "-c", script]).end();
    assert_eq!(ran.out(), "record held\nfile held\n", "{ran}");
    let on_host = fs::read(dir.path().join("f")).expect("reads");
    assert_eq!(&on_host[4090..4102], b"through maps");
    assert_eq!(&on_host[..3], b"end");
}
