//! Templates on their way through archives.

use crate::child;
use crate::live::{LOAD, begins, template};
use fork::{Manifest, Template};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;

/// A state directory with the templates `one`, and `two` of a child of it.
struct Root(tempfile::TempDir);

impl Root {
    fn new() -> Self {
        let this = Self::empty();
        let one = template(&LOAD);
        one.save(&this.template("one")).expect("saves");
        let host = Arc::clone(one.host());
        let one = Template::open(host, &this.template("one")).expect("opens");
        let mut source = one.fork(child("source")).expect("forks");
        begins(&mut source);
        let (picture, _) = source.capture("", None).expect("is captured");
        picture.save(&this.template("two")).expect("saves");
        this
    }

    fn empty() -> Self {
        Self(tempfile::tempdir().expect("a directory"))
    }

    fn template(&self, name: &str) -> PathBuf {
        self.0.path().join("templates").join(name)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vm-run"));
        command.arg("--root").arg(self.0.path());
        command.arg("template").args(args);
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().expect("runs")
    }

    /// What it prints, if it complains of nothing.
    fn said(&self, args: &[&str]) -> String {
        let ran = self.run(args);
        let err = String::from_utf8_lossy(&ran.stderr);
        assert!(ran.status.success() && err.is_empty(), "{args:?}: {err}");
        String::from_utf8(ran.stdout)
            .expect("text")
            .trim_end()
            .into()
    }

    /// The line with which it refuses.
    fn refused(&self, args: &[&str]) -> String {
        let ran = self.run(args);
        let line = String::from_utf8(ran.stderr).expect("text");
        assert_eq!(ran.status.code(), Some(125), "{args:?}: {line}");
        assert_eq!(line.trim_end().lines().count(), 1, "{line}");
        line
    }

    fn export(&self, name: &str) -> PathBuf {
        let path = self.path(&format!("{name}.tar"));
        self.said(&["export", name, "-o", text(&path)]);
        path
    }

    /// What is in the place of templates.
    fn left(&self) -> Vec<String> {
        let entries = fs::read_dir(self.path("templates")).expect("lists");
        let mut names: Vec<String> = entries
            .map(|entry| {
                entry
                    .expect("an entry")
                    .file_name()
                    .into_string()
                    .expect("text")
            })
            .filter(|name| name != ".lock")
            .collect();
        names.sort();
        names
    }
}

fn text(path: &Path) -> &str {
    path.to_str().expect("text")
}

#[test]
fn a_template_goes_through_an_archive() {
    let root = Root::new();
    let archive = root.export("two");
    let bytes = fs::read(&archive).expect("reads");
    // To standard output, and the same again.
    assert!(root.run(&["export", "two"]).stdout == bytes);
    assert!(bytes.len() < 8 << 20, "{} bytes", bytes.len());

    let other = Root::empty();
    let import = ["import", "-i", text(&archive)];
    assert_eq!(other.said(&import), "two");
    let mut piped = other.command(&["import", "--name", "piped"]);
    piped.stdin(File::open(&archive).expect("opens"));
    assert!(piped.status().expect("runs").success());
    let layout = other.path("layout");
    tar::Archive::new(bytes.as_slice())
        .unpack(&layout)
        .expect("unpacks");
    other.said(&["import", "-i", text(&layout), "--name", "unpacked"]);
    assert_eq!(other.left(), ["piped", "two", "unpacked"]);
    for name in other.left() {
        other.said(&["inspect", "--verify", &name]);
        for file in ["state", "memory", "memory.0", "manifest.json"] {
            let read = |root: &Root, name| fs::read(root.template(name).join(file));
            let [one, two] = [read(&root, "two"), read(&other, &name)].map(|r| r.expect("reads"));
            assert!(one == two, "{file}");
        }
        let host = Arc::new(fork::Host::open().expect("these tests need /dev/kvm"));
        let opened = Template::open(host, &other.template(&name)).expect("opens");
        let mut child = opened.fork(child("imported")).expect("forks");
        let answer = child.answer().expect("answers");
        assert_eq!(Some(answer), child.generation());
    }
    let line = other.refused(&import);
    assert!(line.contains("there is a template two already"), "{line}");
    let line = other.refused(&["import", "-i", text(&archive), "--name", "../x"]);
    assert!(line.contains("is no template name"), "{line}");
}

#[test]
fn a_base_is_the_same_blob_for_all_that_share_it() {
    let root = Root::new();
    let layers =
        ["one", "two"].map(|name| Parts::read(&root.export(name)).document["layers"].clone());
    let of = |layers: &Value, title: &str| {
        let all = layers.as_array().expect("layers");
        let is_it =
            |layer: &&Value| layer["annotations"]["org.opencontainers.image.title"] == title;
        all.iter().find(is_it).map(|layer| layer["digest"].clone())
    };
    let [one, two] = layers;
    assert!(of(&one, "memory").is_some());
    assert_eq!(of(&one, "memory"), of(&two, "memory"));
    assert_eq!(
        (of(&one, "memory.0"), of(&two, "memory.0").is_some()),
        (None, true)
    );
}

#[test]
fn a_template_of_another_cpu_is_taken_and_its_owner_told() {
    let root = Root::new();
    let mut parts = Parts::read(&root.export("one"));
    parts.config["cpu"]["vendor"] = json!("Elsewhere");
    let archive = root.path("other.tar");
    parts.write(&archive, "other");
    let ran = root.run(&["import", "-i", text(&archive)]);
    let line = String::from_utf8_lossy(&ran.stderr);
    assert!(ran.status.success(), "{line}");
    assert!(
        line.contains("this host cannot run it") && line.contains("Elsewhere"),
        "{line}"
    );
    root.said(&["inspect", "--verify", "other"]);
}

#[test]
fn an_archive_chooses_no_template_that_run_takes_by_itself() {
    let root = Root::new();
    let archive = root.path("default.tar");
    Parts::read(&root.export("one")).write(&archive, "default-256m-1c");
    let line = root.refused(&["import", "-i", text(&archive)]);
    assert!(line.contains("choose one with --name"), "{line}");
    root.said(&["import", "-i", text(&archive), "--name", "mine"]);
    assert_eq!(root.left(), ["mine", "one", "two"]);
}

#[test]
fn an_archive_that_lies_leaves_nothing() {
    type Spoil = fn(&mut Parts);
    let cases: [(&str, Spoil); 18] = [
        ("the digest should be sha256:0000", |parts| {
            let bytes = parts.blobs[&parts.digest(1)].clone();
            let other = format!("sha256:{}", "0".repeat(64));
            parts.document["layers"][1]["digest"] = json!(other);
            parts.blobs.insert(other, bytes);
        }),
        ("its descriptor says", |parts| {
            let size = parts.document["layers"][0]["size"]
                .as_u64()
                .expect("a size");
            parts.document["layers"][0]["size"] = json!(size + 1);
        }),
        ("memory.0: it unpacks to more than", |parts| {
            parts.config["memory"][1]["bytes"] = json!(4096);
        }),
        ("memory: it unpacks to 67108864 bytes", |parts| {
            parts.config["memory"][0]["bytes"] = json!(128 << 20);
        }),
        ("is the most", |parts| {
            parts.config["memory"][0]["bytes"] = json!(u64::MAX);
        }),
        ("memory is missing", |parts| {
            let title = "../../../evil";
            parts.document["layers"][1]["annotations"][TITLE] = json!(title);
        }),
        ("memory is missing", |parts| {
            layers(parts).remove(1);
        }),
        ("2 layers called memory", |parts| {
            let again = layers(parts)[1].clone();
            layers(parts).push(again);
        }),
        ("it has 4 layers", |parts| {
            let mut more = layers(parts)[1].clone();
            more["annotations"][TITLE] = json!("more");
            layers(parts).push(more);
        }),
        ("in place of", |parts| layers(parts).swap(0, 1)),
        ("is missing", |parts| {
            let digest = parts.digest(2);
            parts.blobs.remove(&digest);
        }),
        ("state: it is damaged or cut", |parts| {
            parts.put(0, b"plain".to_vec());
        }),
        ("it is damaged or cut", |parts| {
            let mut cut = parts.blobs[&parts.digest(0)].clone();
            cut.truncate(cut.len() / 2);
            parts.put(0, cut);
        }),
        ("its manifest is spoilt", |parts| {
            parts.config = json!({ "a": 1 })
        }),
        ("it has format 9", |parts| parts.config["format"] = json!(9)),
        ("its memory.0 is not what was written", |parts| {
            parts.config["memory"][1]["sha256"] = json!("0".repeat(64));
        }),
        ("control characters", |parts| {
            parts.config["written_by"] = json!("\u{1b}[2J");
        }),
        ("vm-run image load", |parts| {
            parts.document["artifactType"] = json!("application/vnd.example");
        }),
    ];
    let root = Root::new();
    let archive = root.export("two");
    let spoilt = root.path("spoilt.tar");
    for (expected, spoil) in cases {
        let mut parts = Parts::read(&archive);
        spoil(&mut parts);
        parts.write(&spoilt, "spoilt");
        let line = root.refused(&["import", "-i", text(&spoilt)]);
        assert!(line.contains(expected), "{expected}: {line}");
        assert_eq!(root.left(), ["one", "two"], "{expected}");
    }
    // It was not the test that spoilt them.
    Parts::read(&archive).write(&spoilt, "spoilt");
    assert_eq!(root.said(&["import", "-i", text(&spoilt)]), "spoilt");
}

#[test]
fn what_is_no_archive_of_a_template_is_refused() {
    let root = Root::new();
    let archive = root.export("one");
    let bytes = fs::read(&archive).expect("reads");
    let cut = root.path("cut.tar");
    fs::write(&cut, &bytes[..bytes.len() / 2]).expect("writes");
    root.refused(&["import", "-i", text(&cut)]);
    let docker = root.path("docker.tar");
    let mut tar = tar::Builder::new(File::create(&docker).expect("creates"));
    put(&mut tar, "manifest.json", b"[]");
    tar.finish().expect("writes");
    let line = root.refused(&["import", "-i", text(&docker)]);
    assert!(line.contains("vm-run image load"), "{line}");
    let mut empty = root.command(&["import"]);
    let ran = empty.stdin(Stdio::null()).output().expect("runs");
    assert_eq!(ran.status.code(), Some(125));
    assert_eq!(root.left(), ["one", "two"]);
    // Nor is a template exported that is not what was written.
    let state = root.template("one").join("state");
    let mut spoilt = fs::read(&state).expect("reads");
    spoilt[9] ^= 1;
    fs::write(&state, spoilt).expect("writes");
    let out = root.path("out.tar");
    let line = root.refused(&["export", "one", "-o", text(&out)]);
    assert!(line.contains("state is not what was written"), "{line}");
    assert!(!out.exists());
    assert!(Manifest::read(&root.template("one")).is_ok());
}

const TITLE: &str = "org.opencontainers.image.title";

/// An archive taken apart.
struct Parts {
    document: Value,
    config: Value,
    /// By digest; documents are made anew.
    blobs: BTreeMap<String, Vec<u8>>,
}

impl Parts {
    fn read(archive: &Path) -> Self {
        let mut members = BTreeMap::new();
        let mut tar = tar::Archive::new(File::open(archive).expect("opens"));
        for entry in tar.entries().expect("a tar") {
            let mut entry = entry.expect("an entry");
            let name = entry.path().expect("a name").display().to_string();
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).expect("reads");
            assert!(
                members.insert(name, bytes).is_none(),
                "no member is there twice"
            );
        }
        let parse = |bytes: &[u8]| serde_json::from_slice::<Value>(bytes).expect("JSON");
        let blob = |descriptor: &Value| {
            let digest = descriptor["digest"].as_str().expect("a digest");
            parse(&members[&format!("blobs/sha256/{}", &digest[7..])])
        };
        let index = parse(&members["index.json"]);
        let document = blob(&index["manifests"][0]);
        let config = blob(&document["config"]);
        let blobs = members
            .iter()
            .filter_map(|(name, bytes)| {
                let hex = name.strip_prefix("blobs/sha256/")?;
                Some((format!("sha256:{hex}"), bytes.clone()))
            })
            .collect();
        Self {
            document,
            config,
            blobs,
        }
    }

    fn digest(&self, layer: usize) -> String {
        let digest = self.document["layers"][layer]["digest"].as_str();
        digest.expect("a digest").into()
    }

    /// Puts a blob in place of a layer's.
    fn put(&mut self, layer: usize, bytes: Vec<u8>) {
        let digest = digest(&bytes);
        self.document["layers"][layer]["digest"] = json!(digest);
        self.document["layers"][layer]["size"] = json!(bytes.len());
        self.blobs.insert(digest, bytes);
    }

    fn write(&self, archive: &Path, name: &str) {
        let mut tar = tar::Builder::new(File::create(archive).expect("creates"));
        let mut blobs = self.blobs.clone();
        let mut add = |value: &Value| {
            let bytes = value.to_string().into_bytes();
            let digest = digest(&bytes);
            let size = bytes.len();
            blobs.insert(digest.clone(), bytes);
            (digest, size)
        };
        let mut document = self.document.clone();
        let (config, size) = add(&self.config);
        document["config"]["digest"] = json!(config);
        document["config"]["size"] = json!(size);
        let (digest, size) = add(&document);
        for (digest, bytes) in &blobs {
            put(&mut tar, &format!("blobs/sha256/{}", &digest[7..]), bytes);
        }
        let index = json!({ "schemaVersion": 2, "manifests": [{
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": digest,
            "size": size,
            "annotations": { "org.opencontainers.image.ref.name": name },
        }] });
        put(&mut tar, "index.json", index.to_string().as_bytes());
        tar.finish().expect("writes");
    }
}

fn layers(parts: &mut Parts) -> &mut Vec<Value> {
    parts.document["layers"].as_array_mut().expect("layers")
}

fn digest(bytes: &[u8]) -> String {
    let hex = |byte: &u8| format!("{byte:02x}");
    let digest: String = Sha256::digest(bytes).iter().map(hex).collect();
    format!("sha256:{digest}")
}

fn put(tar: &mut tar::Builder<File>, name: &str, bytes: &[u8]) {
    let mut header = tar::Header::new_gnu();
    header.set_size(bytes.len() as u64);
    header.set_mode(0o644);
    tar.append_data(&mut header, name, bytes).expect("writes");
}
