//! Files of containers, running and at rest, and what these have changed.

use crate::containers::Host;
use crate::support::Call;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::Path;
use vm_run_archive::{Plain, TarReader};

/// A directory with one of everything.
fn tree(dir: &Path) {
    fs::create_dir_all(dir.join("in/deep")).expect("makes");
    fs::write(dir.join("in/file"), "text\n").expect("writes");
    fs::set_permissions(dir.join("in/file"), fs::Permissions::from_mode(0o640)).expect("chmod");
    chown(dir.join("in/file"), Some(7), Some(8)).expect("chown");
    fs::hard_link(dir.join("in/file"), dir.join("twin")).expect("links");
    symlink("../in/file", dir.join("in/link")).expect("links");
    fs::write(dir.join(OsStr::from_bytes(b"odd\xff name\n")), "odd").expect("writes");
    let mut big = Vec::with_capacity(5 << 20);
    let mut word = 0x9e37_79b9_7f4a_7c15_u64;
    while big.len() < 5 << 20 {
        word = word.wrapping_mul(0xd134_2543_de82_ef95).wrapping_add(1);
        big.extend_from_slice(&word.to_be_bytes());
    }
    fs::write(dir.join("in/deep/big"), big).expect("writes");
}

/// Everything of a tree that a copy keeps.
fn told(dir: &Path) -> Vec<String> {
    let mut all = Vec::new();
    let mut left = vec![dir.to_path_buf()];
    while let Some(path) = left.pop() {
        let found = fs::symlink_metadata(&path).expect("stat");
        let name = path.strip_prefix(dir).expect("below").to_owned();
        let inner = if found.is_dir() {
            let entries = fs::read_dir(&path).expect("lists");
            left.extend(entries.map(|entry| entry.expect("lists").path()));
            "directory".to_owned()
        } else if found.is_symlink() {
            format!("{:?}", fs::read_link(&path).expect("reads"))
        } else {
            format!(
                "{:?} {}",
                blake(&fs::read(&path).expect("reads")),
                found.nlink()
            )
        };
        let (mode, time) = (found.mode(), found.mtime());
        all.push(format!("{name:?} {mode:o} {time} {inner}"));
    }
    all.sort();
    all
}

/// Enough to tell contents apart.
fn blake(bytes: &[u8]) -> (usize, u64) {
    let mix = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
    (bytes.len(), bytes.iter().fold(0xcbf2_9ce4_8422_2325, mix))
}

fn text(path: &Path) -> &str {
    path.to_str().expect("text")
}

#[test]
fn files_go_in_and_out_of_containers_that_run_and_that_do_not() {
    let host = Host::new();
    let here = tempfile::tempdir().expect("a directory");
    let from = here.path().join("from");
    tree(&from);
    let script = "sleep 1000";
    host.does(&["create", "--name", "box", "busybox", "sh", "-c", script]);
    // Before it has ever begun; with the owners, and without.
    host.does(&["cp", "-a", text(&from), "box:/srv"]);
    host.does(&["cp", &format!("{}/in/.", text(&from)), "box:/home"]);
    host.does(&["start", "box"]);
    let look = "stat -c '%u %g %a %h' /srv/in/file /home/file; cat /srv/in/link; ls -A /home";
    assert_eq!(
        host.does(&["exec", "box", "sh", "-c", look]),
        "7 8 640 2\n0 0 640 1\ntext\napp\ndeep\nfile\nlink\n"
    );
    let running = here.path().join("running");
    host.does(&["cp", "box:/srv", text(&running)]);
    assert_eq!(told(&running), told(&from));
    // Into what is there; and through a link, if that is asked for.
    let there = here.path().join("there");
    fs::create_dir(&there).expect("makes");
    host.does(&["cp", "box:/srv/in/link", text(&there)]);
    assert!(there.join("link").is_symlink());
    host.does(&["cp", "-L", "box:/srv/in/link", text(&there)]);
    assert_eq!(
        fs::read_to_string(there.join("link")).expect("reads"),
        "text\n"
    );
    let changes = host.does(&["diff", "box"]);
    assert!(changes.contains("A /srv\nA /srv/in\n"), "{changes}");
    host.does(&["stop", "-t", "0", "box"]);
    let stopped = here.path().join("stopped");
    host.does(&["cp", "box:/srv/", text(&stopped)]);
    assert_eq!(told(&stopped), told(&from));
    assert_eq!(host.does(&["diff", "box"]), changes);
    // What cannot be.
    for (words, why) in [
        (["cp", "box:/no/such", "."], "No such file"),
        (["cp", "box:/srv", text(&there.join("link"))], "over a file"),
        (["cp", text(&from), "box:/etc/passwd"], "over a file"),
        (
            ["cp", "box:/etc/passwd", "box:/tmp"],
            "one container to another",
        ),
        (["cp", text(&from), text(&there)], "CONTAINER:PATH"),
    ] {
        let line = Call::vm_run_in(host.root(), &words).refused(125);
        assert!(line.contains(why), "{line}");
    }
    host.does(&["start", "box"]);
    assert_eq!(host.does(&["exec", "box", "cat", "/srv/in/link"]), "text\n");
}

#[test]
fn archives_go_by_standard_streams() {
    let host = Host::new();
    host.detached(&["--name", "box", "busybox", "sleep", "1000"]);
    let out = host.ran(&["cp", "box:/etc/passwd", "-"]);
    assert_eq!(out.status, 0, "{out}");
    let mut reader = TarReader::new(Plain(&out.stdout[..]));
    let entry = reader.next_entry().expect("a tar").expect("an entry");
    assert_eq!(entry.path, b"passwd");
    let given = Call::vm_run_in(host.root(), &["cp", "-", "box:/tmp"]).end_with(&out.stdout);
    assert_eq!(given.status, 0, "{given}");
    let same = "cmp /etc/passwd /tmp/passwd && echo same";
    assert_eq!(host.does(&["exec", "box", "sh", "-c", same]), "same\n");
    let rubbish = Call::vm_run_in(host.root(), &["cp", "-", "box:/tmp"]).end_with(&[7; 100_000]);
    assert!(
        rubbish.status == 125 && rubbish.err().contains("tar"),
        "{rubbish}"
    );
    host.does(&["exec", "box", "sh", "-c", "echo kept > /tmp/mine"]);
    let exported = host.ran(&["export", "box"]);
    assert_eq!(exported.status, 0);
    let mut reader = TarReader::new(Plain(&exported.stdout[..]));
    let mut names = Vec::new();
    while let Some(entry) = reader.next_entry().expect("a tar") {
        names.push(String::from_utf8(entry.path).expect("text"));
    }
    let is_there = |name: &str| names.iter().any(|n| n == name);
    assert!(is_there("tmp/mine") && is_there("bin/busybox") && is_there("proc/"));
    assert!(!names.iter().any(|name| name.starts_with("proc/1")));
}

#[test]
fn what_was_changed_and_what_runs_is_told() {
    let host = Host::new();
    let script = "echo x >> /etc/passwd; rm /etc/group; rm -r /home; mkdir /home; touch /home/new;
        echo ready; sleep 1234; true";
    host.detached(&["--name", "box", "busybox", "sh", "-c", script]);
    host.wait_for("its first word", || {
        host.does(&["logs", "box"]) == "ready\n"
    });
    let changes = host.does(&["diff", "box"]);
    for line in ["C /etc", "C /etc/passwd", "D /etc/group", "A /home/new"] {
        assert!(changes.lines().any(|l| l == line), "{line} in {changes}");
    }
    let top = host.does(&["top", "box", "-ef"]);
    let rows: Vec<&str> = top.lines().collect();
    assert!(
        rows[0].starts_with("UID   PID") && rows[0].ends_with("CMD"),
        "{top}"
    );
    assert!(
        rows[1].contains("sh -c") && rows[2].ends_with("sleep 1234"),
        "{top}"
    );
    host.does(&["kill", "box"]);
    host.does(&["wait", "box"]);
    assert_eq!(host.does(&["diff", "box"]), changes);
    let refused = Call::vm_run_in(host.root(), &["top", "box"]).refused(125);
    assert!(refused.contains("exited"), "{refused}");
}

#[test]
fn a_container_is_used_one_way_at_a_time() {
    let host = Host::new();
    let id = host.does(&["create", "--name", "box", "busybox", "sleep", "1000"]);
    // Its files are open for as long as the archive has not ended.
    let open = Call::vm_run_in(host.root(), &["cp", "-", "box:/tmp"]).start();
    let socket = host
        .root()
        .join("containers")
        .join(id.trim_end())
        .join("control");
    host.wait_for("its opening", || socket.exists());
    let refused = Call::vm_run_in(host.root(), &["start", "box"]).refused(125);
    assert!(refused.contains("in use"), "{refused}");
    let ended = open.end();
    // An input of nothing is an empty archive.
    assert_eq!(ended.status, 0, "{ended}");
    host.does(&["start", "box"]);
    host.does(&["pause", "box"]);
    let refused = Call::vm_run_in(host.root(), &["diff", "box"]).refused(125);
    assert!(refused.contains("unpause"), "{refused}");
    // A layer in memory ends with its container; its image stays.
    let memory = ["--name", "brief", "--writable-memory", "16m", "busybox"];
    host.does(&[&["create"], &memory[..], &["true"]].concat());
    let here = tempfile::tempdir().expect("a directory");
    host.does(&["cp", "brief:/etc/passwd", text(here.path())]);
    let copied = here.path().join("passwd");
    let words = ["cp", text(&copied), "brief:/tmp"];
    let refused = Call::vm_run_in(host.root(), &words).refused(125);
    assert!(refused.contains("keeps nothing"), "{refused}");
}

#[test]
fn a_full_layer_is_an_error_inside_and_nothing_worse() {
    let host = Host::new();
    let script = "dd if=/dev/zero of=/big bs=1M 2>&1 | grep -c 'No space left'; rm /big;
        echo more > /small && cat /small; df -k / | tail -1 | awk '{print $2}'";
    let words = ["--name", "full", "--storage-opt", "size=48m", "busybox"];
    let ran = Call::run_to_keep(host.root(), &[&words[..], &["sh", "-c", script]].concat()).end();
    assert_eq!(ran.status, 0, "{ran}");
    let lines: Vec<String> = ran.out().lines().map(str::to_owned).collect();
    assert_eq!(&lines[..2], ["1", "more"], "{ran}");
    let kib: u64 = lines[2].parse().expect("a number");
    // The journal takes 8 MiB of it, the tables 2.
    assert!((37 << 10..48 << 10).contains(&kib), "{ran}");
    let inspected = host.does(&["inspect", "full"]);
    let inspected: serde_json::Value = serde_json::from_str(&inspected).expect("JSON");
    assert_eq!(inspected[0]["HostConfig"]["StorageOpt"]["size"], "50331648");
    let taken = inspected[0]["VmRun"]["WritableBytes"]
        .as_u64()
        .expect("a number");
    assert!(taken <= 48 << 20, "{taken}");
    for size in ["size=1m", "size=11g", "size=x", "shape=round"] {
        let words = ["create", "--storage-opt", size, "busybox", "true"];
        Call::vm_run_in(host.root(), &words).refused(125);
    }
}
