//! Containers that are asked whether they are well, and what `inspect` says of what was
//! asked for.

use crate::containers::Host;
use serde_json::{Value, json};

fn inspect(host: &Host, name: &str) -> Value {
    let text = host.does(&["inspect", name]);
    let mut all: Value = serde_json::from_str(&text).expect("JSON");
    all[0].take()
}

#[test]
fn a_container_is_as_well_as_its_probes_say() {
    let host = Host::new();
    let health = [
        "--health-cmd",
        "echo probed; test -e /well",
        "--health-interval",
        "100ms",
    ];
    let rest = [
        "--health-retries",
        "2",
        "--name",
        "ill",
        "busybox",
        "sleep",
        "1000",
    ];
    host.detached(&[&health[..], &rest].concat());
    assert!(host.does(&["ps"]).contains("(health: starting)") || is(&host, "unhealthy"));
    host.wait_for("two failures", || is(&host, "unhealthy"));
    let state = &inspect(&host, "ill")["State"]["Health"];
    assert!(state["FailingStreak"].as_u64() >= Some(2), "{state}");
    assert_eq!(state["Log"][0]["ExitCode"], 1);
    assert_eq!(state["Log"][0]["Output"], "probed\n");
    assert!(host.does(&["ps"]).contains("(unhealthy)"));
    host.does(&["exec", "ill", "touch", "/well"]);
    host.wait_for("a success", || is(&host, "healthy"));
    assert!(host.does(&["ps"]).contains("(healthy)"));

    // A probe that takes too long is ended, and none is made of one that stands still.
    let slow = ["--health-cmd", "sleep 1000", "--health-interval", "100ms"];
    let rest = [
        "--health-timeout",
        "1s",
        "--name",
        "slow",
        "busybox",
        "sleep",
        "1000",
    ];
    host.detached(&[&slow[..], &rest].concat());
    let log = || {
        inspect(&host, "slow")["State"]["Health"]["Log"]
            .get(0)
            .cloned()
            .unwrap_or_default()
    };
    host.wait_for("a probe's end", || !log().is_null());
    assert_eq!(log()["ExitCode"], -1);
    let said = log()["Output"].take();
    assert!(
        said.as_str()
            .is_some_and(|said| said.contains("exceeded timeout")),
        "{said}"
    );
}

fn is(host: &Host, status: &str) -> bool {
    inspect(host, "ill")["State"]["Health"]["Status"] == status
}

#[test]
fn what_was_asked_for_is_told_and_an_exec_has_it_too() {
    let host = Host::new();
    let file = tempfile::tempdir().expect("a directory");
    let (cid, labels) = (file.path().join("cid"), file.path().join("labels"));
    std::fs::write(&labels, "one=1\ntwo=2\n").expect("writes");
    let (cid, labels) = (cid.to_str().expect("text"), labels.to_str().expect("text"));
    let asked = [
        "--cap-add",
        "sys_time",
        "--cap-drop",
        "MKNOD",
        "--ulimit",
        "nofile=64:128",
        "--init",
        "--tmpfs",
        "/run:size=1m",
        "--group-add",
        "77",
        "--shm-size",
        "8m",
        "--dns",
        "192.0.2.1",
        "-m",
        "64m",
        "--cpus",
        "0.5",
        "--label-file",
        labels,
        "--cidfile",
        cid,
        "--oom-score-adj",
        "5",
        "--name",
        "asked",
        "busybox",
        "sleep",
        "1000",
    ];
    let id = host.detached(&asked);
    assert_eq!(std::fs::read_to_string(cid).expect("reads"), id);
    let object = inspect(&host, "asked");
    let of_host = &object["HostConfig"];
    for (name, value) in [
        ("CapAdd", json!(["CAP_SYS_TIME"])),
        ("CapDrop", json!(["CAP_MKNOD"])),
        (
            "Ulimits",
            json!([{ "Name": "nofile", "Soft": 64, "Hard": 128 }]),
        ),
        ("Init", json!(true)),
        ("Privileged", json!(false)),
        ("Tmpfs", json!({ "/run": "size=1m" })),
        ("GroupAdd", json!(["77"])),
        ("ShmSize", json!(8 << 20)),
        ("Dns", json!(["192.0.2.1"])),
        ("Memory", json!(64 << 20)),
        ("NanoCpus", json!(500_000_000)),
        ("OomScoreAdj", json!(5)),
    ] {
        assert_eq!(of_host[name], value, "{name}: {object}");
    }
    assert_eq!(
        object["Config"]["Labels"],
        json!({ "one": "1", "two": "2" })
    );
    assert_eq!(object["VmRun"]["MachineMemory"], json!(256 << 20));
    assert_eq!(object["VmRun"]["MachineCpus"], 1);
    let identity = &object["VmRun"]["Identity"];
    assert_eq!(identity["Hostname"], object["Config"]["Hostname"]);
    let renewed = json!(["random", "clock", "hostname", "machine-id"]);
    assert_eq!(identity["Renewed"], renewed);
    let generation = identity["Generation"].as_str().expect("it has one");
    let generation = u64::from_str_radix(generation, 16).expect("digits");
    let file = "/proc/sys/kernel/random/generation";
    let in_guest = host.does(&["exec", "asked", "cat", file]);
    assert_eq!(in_guest.trim_end(), generation.to_string());
    let script = "id -G; ulimit -n; grep CapEff /proc/self/status | cut -f2";
    let said = host.does(&["exec", "asked", "sh", "-c", script]);
    assert!(
        said.contains("77") && said.ends_with("64\n00000000a20425fb\n"),
        "{said}"
    );
    let all = ["exec", "--privileged", "asked", "sh", "-c", script];
    assert!(host.does(&all).ends_with("000001ffffffffff\n"));
    // The file is another's now.
    let again = host.ran(&["create", "--cidfile", cid, "busybox", "true"]);
    assert!(
        again.status == 125 && again.err().contains("container ID file found"),
        "{again}"
    );
}
