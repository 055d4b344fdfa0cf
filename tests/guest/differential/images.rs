//! The images of the cases: one root file system, made of layers with everything in it
//! that layers can have, under configurations that differ.

use super::archive::{Entry, digest, tar};
use crate::support::Call;
use serde_json::{Value, json};
use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::process::Command;

/// Busybox, linked statically.
const BUSYBOX: &str = "/bin/busybox";

const PASSWD: &[u8] = b"root::0:0:root:/root:/bin/sh\nweb:x:1000:1000::/home/web:/bin/sh\n";
const GROUP: &[u8] = b"root:x:0:\nadm:x:4:web\nvideo:x:44:web\nweb:x:1000:\n";

/// Loads them.
pub fn load(root: &Path) {
    let layers = [bottom(), top()].map(|layer| tar(&layer));
    let diff_ids: Vec<String> = layers.iter().map(|layer| digest(layer)).collect();
    let mut members = Vec::new();
    let mut names = Vec::new();
    for (number, layer) in layers.iter().enumerate() {
        names.push(format!("{number}/layer.tar"));
        members.push(Entry::file(&names[number], layer));
    }
    let mut manifest = Vec::new();
    for (tag, config) in configurations() {
        let config = json!({
            "architecture": "amd64", "os": "linux", "config": config,
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
        });
        let config = config.to_string().into_bytes();
        let name = format!("{}.json", digest(&config).trim_start_matches("sha256:"));
        members.push(Entry::file(&name, &config));
        manifest.push(json!({ "Config": name, "RepoTags": [tag], "Layers": names }));
    }
    let manifest = Value::from(manifest).to_string();
    members.push(Entry::file("manifest.json", manifest.as_bytes()));
    let file = tempfile::NamedTempFile::new().expect("a file");
    fs::write(file.path(), tar(&members)).expect("writes");
    let words: [&OsStr; 3] = ["image".as_ref(), "load".as_ref(), file.path().as_ref()];
    let loaded = Call::vm_run_in(root, &words).end();
    assert_eq!(loaded.status, 0, "{loaded}");
}

fn configurations() -> [(&'static str, Value); 3] {
    [
        (
            "odd:latest",
            json!({ "Cmd": ["sh", "-c", "echo by default"] }),
        ),
        ("odd:bare", json!({})),
        (
            "odd:full",
            json!({
                "Entrypoint": ["/bin/echo", "entry"],
                "Cmd": ["cmd"],
                "Env": ["PATH=/bin", "FROM=image"],
                "WorkingDir": "/work/dir",
                "User": "web:adm",
                "StopSignal": "SIGUSR1",
                "ExposedPorts": { "80/tcp": {} },
                "Labels": { "a": "b" },
            }),
        ),
    ]
}

fn bottom() -> Vec<Entry> {
    let busybox = fs::read(BUSYBOX).expect("busybox-static is installed");
    let mut entries = vec![
        Entry::directory("bin", 0o755),
        Entry::file("bin/busybox", &busybox).mode(0o755),
        // The archive gives it the capability to use raw sockets.
        Entry::file("bin/exact", &busybox).mode(0o755),
        Entry::directory("usr/suid", 0o755),
        Entry::file("usr/suid/busybox", &busybox).mode(0o4755),
        Entry::directory("etc", 0o755),
        Entry::file("etc/passwd", PASSWD),
        Entry::file("etc/group", GROUP),
        Entry::directory("root", 0o700),
        Entry::directory("home/web", 0o755).owner(1000, 1000),
        Entry::directory("tmp", 0o1777),
        Entry::directory("whole", 0o755),
        Entry::file("whole/gone", b"1"),
        Entry::file("whole/kept", b"1"),
        Entry::directory("opaque", 0o755),
        Entry::file("opaque/old", b"1"),
        Entry::file("tree/of/files", b"1"),
        Entry::file("replaced/by-a-file", b"1"),
        Entry::file("first", b"linked\n"),
    ];
    let list = Command::new(BUSYBOX).arg("--list").output().expect("runs");
    let list = String::from_utf8(list.stdout).expect("text");
    let links = list.lines().filter(|name| *name != "busybox");
    entries.extend(links.map(|name| Entry::symlink(&format!("bin/{name}"), "busybox")));
    entries
}

fn top() -> Vec<Entry> {
    vec![
        Entry::file("whole/.wh.gone", b""),
        Entry::file("opaque/.wh..wh..opq", b""),
        Entry::file("opaque/new", b"2"),
        Entry::file(".wh.tree", b""),
        Entry::file("replaced", b"a file now\n"),
        Entry::hard_link("second", "first"),
        // By this name it is busybox.
        Entry::directory("usr/capable", 0o755),
        Entry::hard_link("usr/capable/busybox", "bin/exact"),
        Entry::file("owned", b"").owner(1000, 44).mode(0o2640),
        Entry::fifo("fifo"),
        Entry::character_device("null", 1, 3),
    ]
}
