//! `vm-run daemon`, and docker's own client.

use crate::support::{Call, PATIENCE, Ran, Running, own_root};
use rustix::process::Signal;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tempfile::TempDir;

const IMAGE: &str = "busybox";

/// A daemon over a state directory of its own.
struct Daemon {
    running: Option<Running>,
    root: TempDir,
    directory: TempDir,
}

impl Daemon {
    fn start() -> Self {
        // With its default template, which takes long to boot here.
        let ran = Call::run(&[IMAGE, "true"]).end();
        assert_eq!(ran.status, 0, "{ran}");
        let mut this = Self {
            running: None,
            root: own_root(),
            directory: tempfile::tempdir().expect("a directory"),
        };
        this.begin();
        this
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("docker.sock")
    }

    fn begin(&mut self) {
        let socket = self.socket();
        let words = ["daemon".as_ref(), "--socket".as_ref(), socket.as_os_str()];
        self.running = Some(Call::vm_run_in(self.root.path(), &words).start());
        let until = Instant::now() + PATIENCE;
        while std::os::unix::net::UnixStream::connect(&socket).is_err() {
            assert!(Instant::now() < until, "it does not listen");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// As a host that is out of memory does.
    fn kill(&mut self) {
        let running = self.running.take().expect("runs");
        running.signal(Signal::KILL);
        running.end();
    }

    fn call(&self, words: &[&str]) -> Call {
        let host = format!("unix://{}", self.socket().display());
        let config = self.directory.path().join("config");
        Call::program("docker")
            .env("DOCKER_HOST", host)
            .env("DOCKER_CONFIG", config)
            .args(words)
    }

    fn docker(&self, words: &[&str]) -> Ran {
        self.call(words).end()
    }

    /// The containers with a label, and where they stand.
    fn listed(&self, label: &str) -> String {
        let filter = format!("label={label}");
        let format = "{{.Names}} {{.State}}";
        self.said(&["ps", "-a", "--filter", &filter, "--format", format])
    }

    /// What it prints when it succeeds.
    fn said(&self, words: &[&str]) -> String {
        let ran = self.docker(words);
        assert_eq!(ran.status, 0, "docker {words:?}: {ran}");
        ran.out().trim_end().to_owned()
    }
}

#[test]
fn docker_runs_a_container_and_has_its_streams_and_status() {
    let daemon = Daemon::start();
    assert!(
        daemon
            .said(&["version"])
            .contains("1.47 (minimum version 1.24)")
    );
    let script = "read a; echo out $a; echo err >&2; exit 7";
    let words = ["run", "-i", "--rm", "-e", "A=b", IMAGE, "sh", "-c", script];
    let ran = daemon.call(&words).end_with(b"in\n");
    assert_eq!(
        (ran.status, ran.out(), ran.err()),
        (7, "out in\n".into(), "err\n".into())
    );
    // What cannot be started, and is removed for all that.
    let ran = daemon.docker(&["run", "--rm", "--name", "dk-none", IMAGE, "no-such-program"]);
    assert_eq!(ran.status, 127, "{ran}");
    assert!(ran.err().contains("executable file not found"), "{ran}");
    let ran = daemon.docker(&["rm", "dk-none"]);
    assert!(
        ran.status == 1 && ran.err().contains("No such container: dk-none"),
        "{ran}"
    );
    let ran = daemon.docker(&["run", "--rm", "--network=host", IMAGE, "true"]);
    assert!(
        ran.status == 125 && ran.err().contains("does not support"),
        "{ran}"
    );
}

#[test]
fn docker_does_with_a_container_what_it_can_do_and_outlives_the_daemon() {
    let mut daemon = Daemon::start();
    let script = "echo up; trap 'exit 5' TERM; while :; do sleep 0.1; done";
    let label = "dk=life";
    let id = daemon.said(&[
        "run", "-d", "--name", "dk-life", "-l", label, IMAGE, "sh", "-c", script,
    ]);
    let taken = daemon.docker(&["create", "--name", "dk-life", IMAGE]);
    assert!(
        taken.status == 1 && taken.err().contains("is taken"),
        "{taken}"
    );
    assert_eq!(daemon.listed("dk=life"), "dk-life running");
    assert_eq!(daemon.said(&["exec", "dk-life", "hostname"]), id[..12]);
    let ran = daemon
        .call(&["exec", "-i", "dk-life", "sh", "-c", "cat; exit 3"])
        .end_with(b"x");
    assert_eq!((ran.status, ran.out()), (3, "x".into()));
    assert_eq!(
        daemon
            .docker(&["exec", "dk-life", "no-such-program"])
            .status,
        127
    );
    assert_eq!(daemon.said(&["logs", "dk-life"]), "up");
    assert!(daemon.said(&["top", "dk-life"]).contains("sleep"));
    daemon.said(&["exec", "dk-life", "touch", "/new"]);
    assert!(daemon.said(&["diff", "dk-life"]).contains("A /new"));
    daemon.said(&["pause", "dk-life"]);
    assert_eq!(daemon.listed("dk=life"), "dk-life paused");
    assert_eq!(daemon.docker(&["exec", "dk-life", "true"]).status, 1);
    daemon.said(&["unpause", "dk-life"]);
    let stats = daemon.said(&[
        "stats",
        "--no-stream",
        "--format",
        "{{.Name}} {{.MemUsage}}",
        "dk-life",
    ]);
    assert!(
        stats.starts_with("dk-life ") && stats.ends_with("256MiB"),
        "{stats}"
    );

    // The daemon dies, and another one takes its place.
    daemon.kill();
    daemon.begin();
    assert_eq!(daemon.listed("dk=life"), "dk-life running");
    assert_eq!(
        daemon.said(&["exec", "dk-life", "cat", "/proc/1/comm"]),
        "sh"
    );
    daemon.said(&["rename", "dk-life", "dk-renamed"]);
    let waiting = daemon.call(&["wait", "dk-renamed"]).start();
    daemon.said(&["stop", "dk-renamed"]);
    let waited = waiting.end();
    assert_eq!((waited.status, waited.out()), (0, "5\n".into()), "{waited}");
    assert_eq!(daemon.listed("dk=life"), "dk-renamed exited");
    // What it wrote is still there.
    daemon.said(&["start", "dk-renamed"]);
    assert_eq!(daemon.said(&["exec", "dk-renamed", "ls", "/new"]), "/new");
    daemon.said(&["rm", "-f", "dk-renamed"]);
    assert_eq!(daemon.listed("dk=life"), "");
}

#[test]
fn docker_makes_networks_and_volumes_for_containers() {
    let daemon = Daemon::start();
    daemon.said(&["network", "create", "--label", "dk=1", "dk-net"]);
    daemon.said(&["volume", "create", "dk-vol"]);
    let networks = [
        "network",
        "ls",
        "--filter",
        "label=dk",
        "--format",
        "{{.Name}}",
    ];
    assert_eq!(daemon.said(&networks), "dk-net");
    assert!(daemon.said(&["volume", "ls", "-q"]).contains("dk-vol"));
    let script = "echo kept > /v/file; exec sleep 1000";
    let words = [
        "run",
        "-d",
        "--name",
        "dk-server",
        "--network",
        "dk-net",
        "-v",
        "dk-vol:/v",
    ];
    daemon.said(&[&words[..], &[IMAGE, "sh", "-c", script]].concat());
    let address = "{{(index .NetworkSettings.Networks \"dk-net\").IPAddress}}";
    let address = daemon.said(&["inspect", "-f", address, "dk-server"]);
    let words = [
        "run",
        "--rm",
        "--network",
        "dk-net",
        "-v",
        "dk-vol:/v:ro",
        IMAGE,
    ];
    let script = "cat /v/file; nslookup dk-server | tail -n 3";
    let said = daemon.said(&[&words[..], &["sh", "-c", script]].concat());
    assert!(
        said.starts_with("kept") && said.contains(&address),
        "{said}"
    );
    for words in [["network", "rm", "dk-net"], ["volume", "rm", "dk-vol"]] {
        let ran = daemon.docker(&words);
        assert!(ran.status == 1 && ran.err().contains("in use"), "{ran}");
    }
    daemon.said(&["rm", "-f", "dk-server"]);
    daemon.said(&["network", "rm", "dk-net"]);
    daemon.said(&["volume", "rm", "dk-vol"]);
    let ran = daemon.docker(&["inspect", "dk-net"]);
    assert!(
        ran.status == 1 && ran.err().contains("o such object"),
        "{ran}"
    );
}

#[test]
fn docker_names_and_removes_images() {
    let daemon = Daemon::start();
    let images = || daemon.said(&["images", "--format", "{{.Repository}}:{{.Tag}}"]);
    daemon.said(&["tag", IMAGE, "dk/tagged:1"]);
    assert!(
        images().lines().any(|name| name == "dk/tagged:1"),
        "{}",
        images()
    );
    let id = |name: &str| daemon.said(&["image", "inspect", "-f", "{{.Id}}", name]);
    assert_eq!(id("dk/tagged:1"), id(IMAGE));
    assert_eq!(
        daemon.said(&["rmi", "dk/tagged:1"]),
        "Untagged: dk/tagged:1"
    );
    assert!(!images().contains("dk/tagged"));
    let ran = daemon.docker(&["rmi", "dk/none"]);
    assert!(
        ran.status == 1 && ran.err().contains("No such image"),
        "{ran}"
    );
}
