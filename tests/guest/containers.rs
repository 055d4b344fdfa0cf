//! Containers that outlive the command that started them.

use crate::support::{Call, PATIENCE, Ran, own_root};
use std::path::Path;
use std::time::{Duration, Instant};

/// One state directory, and what is done in it.
pub struct Host(tempfile::TempDir);

impl Host {
    pub fn new() -> Self {
        Self(own_root())
    }

    pub fn root(&self) -> &Path {
        self.0.path()
    }

    /// Any command.
    pub fn ran(&self, words: &[&str]) -> Ran {
        Call::vm_run_in(self.root(), words).end()
    }

    /// One that works; what it prints.
    pub fn does(&self, words: &[&str]) -> String {
        let ran = self.ran(words);
        assert_eq!(ran.status, 0, "{words:?}: {ran}");
        ran.out()
    }

    /// `run -d`; the id that it prints.
    pub fn detached(&self, words: &[&str]) -> String {
        let ran = Call::run_to_keep(self.root(), &[&["-d"], words].concat()).end();
        assert_eq!(ran.status, 0, "{words:?}: {ran}");
        let out = ran.out();
        let id = out.strip_suffix('\n').expect("a line");
        assert!(id.len() == 64 && !id.contains('\n'), "{out}");
        id.to_owned()
    }

    /// A line for each container, of its name and status.
    fn statuses(&self) -> Vec<(String, String)> {
        let listed = self.does(&["ps", "-a", "--json"]);
        let listed: serde_json::Value = serde_json::from_str(&listed).expect("JSON");
        let word = |value: &serde_json::Value| value.as_str().expect("text").to_owned();
        let all = listed.as_array().expect("an array").iter();
        all.map(|one| (word(&one["Name"]), word(&one["State"]["Status"])))
            .collect()
    }

    pub fn wait_for(&self, what: &str, is_so: impl Fn() -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !is_so() {
            assert!(Instant::now() < deadline, "{what} does not come");
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

impl Drop for Host {
    /// Nothing is to run on when a test has failed.
    fn drop(&mut self) {
        let ids = self.ran(&["ps", "-aq"]).out();
        for id in ids.lines() {
            self.ran(&["rm", "-f", id]);
        }
    }
}

#[test]
fn a_detached_container_is_logged_execed_into_stopped_and_started_again() {
    let host = Host::new();
    let script = "echo begun; echo also >&2; trap 'echo ending; exit 3' TERM;
        echo life >> /lives; while :; do sleep 1; done";
    let id = host.detached(&["--name", "web", "busybox", "sh", "-c", script]);
    assert_eq!(host.statuses(), [("/web".into(), "running".into())]);
    host.wait_for("its first words", || {
        host.does(&["logs", "web"]) == "begun\n"
    });
    assert_eq!(host.ran(&["logs", "web"]).err(), "also\n");
    // By name, by id, by the beginning of an id.
    for wanted in ["web", &id, &id[..6]] {
        assert_eq!(host.does(&["exec", wanted, "cat", "/lives"]), "life\n");
    }
    let status = host.ran(&["exec", "web", "sh", "-c", "exit 9"]);
    assert_eq!(status.status, 9);
    assert_eq!(host.ran(&["exec", "web", "no-such-program"]).status, 127);
    assert_eq!(
        host.does(&[
            "exec",
            "-e",
            "A=b",
            "-w",
            "/tmp",
            "web",
            "sh",
            "-c",
            "echo $A $PWD"
        ]),
        "b /tmp\n"
    );
    assert_eq!(host.does(&["stop", "web"]), "web\n");
    assert_eq!(host.does(&["wait", "web"]), "3\n");
    assert_eq!(host.statuses(), [("/web".into(), "exited".into())]);
    assert_eq!(host.does(&["logs", "--tail", "1", "web"]), "ending\n");
    assert_eq!(host.does(&["ps", "-q"]), "");
    assert!(host.does(&["ps", "-a"]).contains("Exited (3)"));
    // What it wrote is there when it is started again.
    assert_eq!(host.does(&["start", "web"]), "web\n");
    host.wait_for("its second life", || {
        host.does(&["exec", "web", "cat", "/lives"]) == "life\nlife\n"
    });
    let refused = host.ran(&["rm", "web"]);
    assert!(
        refused.status == 125 && refused.err().contains("--force"),
        "{refused}"
    );
    assert_eq!(host.does(&["kill", "web"]), "web\n");
    assert_eq!(host.does(&["wait", "web"]), "137\n");
    host.does(&["rename", "web", "old"]);
    assert_eq!(host.does(&["rm", "old"]), "old\n");
    assert_eq!(host.statuses(), []);
}

#[test]
fn a_paused_container_stands_still_and_goes_on() {
    let host = Host::new();
    let script = "i=0; while :; do echo $i; i=$((i+1)); sleep 0.1; done";
    host.detached(&["--name", "clock", "busybox", "sh", "-c", script]);
    let lines = || host.does(&["logs", "clock"]).lines().count();
    host.wait_for("a word", || lines() > 1);
    host.does(&["pause", "clock"]);
    assert_eq!(host.statuses(), [("/clock".into(), "paused".into())]);
    let refused = host.ran(&["exec", "clock", "true"]);
    assert!(
        refused.status == 125 && refused.err().contains("paused"),
        "{refused}"
    );
    let before = lines();
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(lines(), before);
    host.does(&["unpause", "clock"]);
    host.wait_for("another word", || lines() > before + 1);
    host.does(&["pause", "clock"]);
    host.does(&["rm", "-f", "clock"]);
    assert_eq!(host.statuses(), []);
}

#[test]
fn policies_start_containers_again_until_they_are_stopped() {
    let host = Host::new();
    let counted = |name: &str| {
        let inspected = host.does(&["inspect", name]);
        let inspected: serde_json::Value = serde_json::from_str(&inspected).expect("JSON");
        let count = inspected[0]["RestartCount"].as_u64().expect("a number");
        let status = inspected[0]["State"]["Status"].as_str().expect("text");
        (count, status.to_owned())
    };
    let script = "echo again; exit 4";
    host.detached(&[
        "--name",
        "fails",
        "--restart",
        "on-failure:2",
        "busybox",
        "sh",
        "-c",
        script,
    ]);
    assert_eq!(host.does(&["wait", "fails"]), "4\n");
    assert_eq!(counted("fails"), (2, "exited".into()));
    assert_eq!(host.does(&["logs", "fails"]), "again\n".repeat(3));
    host.detached(&["--name", "always", "--restart", "always", "busybox", "true"]);
    host.wait_for("a restart", || counted("always").0 >= 1);
    host.does(&["stop", "always"]);
    let (count, status) = counted("always");
    assert_eq!(status, "exited");
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(counted("always").0, count);
}

#[test]
fn clients_attach_and_leave_and_names_are_unique() {
    let host = Host::new();
    host.detached(&["-i", "--name", "cat", "busybox", "cat"]);
    let taken = Call::run_to_keep(host.root(), &["-d", "--name", "cat", "busybox", "true"]).end();
    assert!(
        taken.status == 125 && taken.err().contains("taken"),
        "{taken}"
    );
    let mut first = Call::vm_run_in(host.root(), &["attach", "cat"]).start();
    let mut second = Call::vm_run_in(host.root(), &["attach", "--no-stdin", "cat"]).start();
    first.say("hello");
    first.expect("hello");
    // Whoever comes late misses what was said before.
    let deadline = Instant::now() + PATIENCE;
    while !second.has("hello again") {
        assert!(Instant::now() < deadline, "it hears nothing");
        first.say("hello again");
        std::thread::sleep(Duration::from_millis(200));
    }
    let killed = host.does(&["kill", "-s", "TERM", "cat"]);
    assert_eq!(killed, "cat\n");
    // PID 1 of a namespace that does not ask for a signal does not get it.
    assert_eq!(host.statuses(), [("/cat".into(), "running".into())]);
    host.does(&["stop", "-t", "1", "cat"]);
    for client in [first, second] {
        assert_eq!(client.end().status, 137);
    }
    // A container that was made and not started begins with its first client.
    let id = host.does(&["create", "--name", "later", "busybox", "echo", "at last"]);
    assert_eq!(id.len(), 65);
    assert_eq!(host.does(&["start", "-a", "later"]), "at last\n");
    assert_eq!(host.does(&["logs", "later"]), "at last\n");
}

#[test]
fn what_runs_costs_something_and_what_ends_can_be_pruned() {
    let host = Host::new();
    host.detached(&["--name", "runs", "busybox", "sleep", "1000"]);
    host.detached(&["--name", "ends", "busybox", "true"]);
    host.does(&["wait", "ends"]);
    let stats = host.does(&["stats", "--json"]);
    let stats: serde_json::Value = serde_json::from_str(&stats).expect("JSON");
    assert_eq!(stats[0]["Name"], "runs");
    for name in ["GuestPrivateKiB", "PrivateKiB", "PssKiB"] {
        assert!(stats[0][name].as_u64() > Some(0), "{stats}");
    }
    assert_eq!(host.does(&["prune", "-f"]).lines().count(), 1);
    assert_eq!(host.statuses(), [("/runs".into(), "running".into())]);
}
