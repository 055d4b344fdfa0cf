//! `save`, `import`, `tag`, `inspect` and `prune`.

use super::archive::{self, Entry, digest, gzip, layer, oci_directory, tar};
use super::{good, load, refused_line, rootfs, simple, stored, vm_run};
use serde_json::{Value, json};
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

fn inspect(root: &Path, image: &str) -> Value {
    let mut all: Value = serde_json::from_str(&good(root, &["inspect", image])).unwrap();
    all[0].take()
}

/// A store with an image of two layers that came in as gzip.
fn store() -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    let base = layer(&[Entry::file("a", b"1")]);
    let upper = layer(&[Entry::file("b", b"2")]);
    let layers = [base, upper].map(|layer| (digest(&layer), gzip(&layer)));
    let folder = root.path().join("layout");
    oci_directory(&folder, "team/tool:v1", &layers);
    good(root.path(), &["load", folder.to_str().unwrap()]);
    root
}

#[test]
fn what_is_saved_is_loaded_as_it_was() {
    let first = store();
    let before = inspect(first.path(), "team/tool:v1");
    good(first.path(), &["tag", "team/tool:v1", "other"]);
    for format in ["docker-archive", "oci-archive", "oci-dir"] {
        let target = first.path().join(format);
        let args = ["save", "-o", target.to_str().unwrap(), "--format", format];
        let images = ["team/tool:v1", "other"];
        assert_eq!(good(first.path(), &[&args[..], &images].concat()), "");
        let second = tempfile::tempdir().unwrap();
        let loaded = good(second.path(), &["load", target.to_str().unwrap()]);
        let mut names: Vec<&str> = loaded.lines().collect();
        names.sort_unstable();
        let expected = ["Loaded image: other:latest", "Loaded image: team/tool:v1"];
        assert_eq!(names, expected, "{format}");
        let after = inspect(second.path(), "team/tool:v1");
        for field in ["Id", "Descriptor", "RootFS", "Config"] {
            assert_eq!(after[field], before[field], "{format}: {field}");
        }
        // The same images give the same bytes.
        if format != "oci-dir" {
            let out = vm_run(
                first.path(),
                &[&["save", "--format", format][..], &images].concat(),
            );
            assert!(out.stdout == std::fs::read(&target).unwrap());
        }
    }
}

/// docker before version 25 knows only the manifest.json, and finds all else by it.
#[test]
fn a_saved_archive_is_docker_s() {
    let first = store();
    let archive = first.path().join("saved.tar");
    let id = inspect(first.path(), "team/tool:v1")["Id"].take();
    good(
        first.path(),
        &["save", "-o", archive.to_str().unwrap(), "team/tool:v1"],
    );
    let folder = tempfile::tempdir().unwrap();
    let status = Command::new("tar")
        .args(["-x", "-f"])
        .arg(&archive)
        .current_dir(&folder)
        .status();
    assert!(status.unwrap().success());
    let read = |name: &str| std::fs::read(folder.path().join(name)).unwrap();
    let manifest: Value = serde_json::from_slice(&read("manifest.json")).unwrap();
    let image = &manifest[0];
    assert_eq!(image["RepoTags"], json!(["team/tool:v1"]));
    let config = read(image["Config"].as_str().unwrap());
    assert_eq!(digest(&config), id.as_str().unwrap());
    let config: Value = serde_json::from_slice(&config).unwrap();
    let diff_ids = config["rootfs"]["diff_ids"].as_array().unwrap();
    let layers = image["Layers"].as_array().unwrap();
    assert_eq!(layers.len(), diff_ids.len());
    for (layer, diff_id) in layers.iter().zip(diff_ids) {
        let mut plain = Vec::new();
        let packed = read(layer.as_str().unwrap());
        std::io::Read::read_to_end(&mut flate2::read::GzDecoder::new(&packed[..]), &mut plain)
            .unwrap();
        assert_eq!(digest(&plain), diff_id.as_str().unwrap());
    }
    // By its id it has no name.
    let out = vm_run(first.path(), &["save", id.as_str().unwrap()]);
    let second = tempfile::tempdir().unwrap();
    let loaded = load(second.path(), &out.stdout);
    let loaded = String::from_utf8(loaded.stdout).unwrap();
    assert_eq!(
        loaded,
        format!("Loaded image ID: {}\n", id.as_str().unwrap())
    );
}

#[test]
fn a_save_that_fails_leaves_nothing() {
    let root = store();
    let target = root.path().join("target");
    let path = target.to_str().unwrap();
    let listing = || {
        let names = std::fs::read_dir(root.path()).unwrap();
        let mut names: Vec<_> = names.map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    };
    let before = listing();
    let blob = stored(root.path()).remove(0);
    let whole = std::fs::read(&blob).unwrap();
    let mut damaged = whole.clone();
    damaged[0] ^= 1;
    for format in ["docker-archive", "oci-dir"] {
        let args = ["save", "-o", path, "--format", format];
        let out = vm_run(root.path(), &[&args[..], &["no-such"]].concat());
        assert_eq!(out.status.code(), Some(125));
        std::fs::write(&blob, &damaged).unwrap();
        let out = vm_run(root.path(), &[&args[..], &["team/tool:v1"]].concat());
        let line = String::from_utf8_lossy(&out.stderr);
        assert!(line.contains("the digest should be"), "{line}");
        std::fs::write(&blob, &whole).unwrap();
        assert_eq!(listing(), before, "{format}");
    }
    std::fs::create_dir(&target).unwrap();
    std::fs::write(target.join("own"), b"").unwrap();
    let out = vm_run(
        root.path(),
        &["save", "-o", path, "--format", "oci-dir", "team/tool:v1"],
    );
    assert_eq!(out.status.code(), Some(125), "not over somebody's files");
    assert_eq!(std::fs::read_dir(&target).unwrap().count(), 1);
    let out = vm_run(
        root.path(),
        &["save", "--format", "oci-dir", "team/tool:v1"],
    );
    assert!(String::from_utf8_lossy(&out.stderr).contains("give it with -o"));
}

#[test]
fn a_root_file_system_becomes_an_image() {
    let entries = [
        Entry::directory("etc", 0o755),
        Entry::file("etc/motd", b"hello"),
    ];
    let plain = tar(&entries);
    let mut images = Vec::new();
    for bytes in [
        plain.clone(),
        gzip(&plain),
        zstd::encode_all(&plain[..], 1).unwrap(),
    ] {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join("rootfs.tar");
        std::fs::write(&file, &bytes).unwrap();
        let change = [
            "-c",
            r#"CMD ["/bin/sh"]"#,
            "--change",
            "ENV A=1",
            "-c",
            "USER app",
            "-m",
            "by hand",
        ];
        let args = [
            &["import"][..],
            &change,
            &[file.to_str().unwrap(), "mine:1"],
        ]
        .concat();
        let id = good(root.path(), &args);
        let image = inspect(root.path(), "mine:1");
        assert_eq!(id, format!("{}\n", image["Id"].as_str().unwrap()));
        let config = json!({ "Cmd": ["/bin/sh"], "Env": ["A=1"], "User": "app" });
        assert_eq!(image["Config"], config);
        assert_eq!(image["Comment"], "by hand");
        assert_eq!(image["RootFS"]["Layers"], json!([digest(&plain)]));
        // 2026-01-02T03:04:05...Z
        let created = image["Created"].as_str().unwrap();
        assert!(
            created.ends_with('Z') && created.as_bytes()[10] == b'T',
            "{created}"
        );
        images.push(std::fs::read(rootfs(root.path())).unwrap());
    }
    assert!(images[0] == images[1] && images[0] == images[2]);
}

#[test]
fn an_import_takes_standard_input_and_refuses_what_is_none() {
    let root = tempfile::tempdir().unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_vm-run"))
        .arg("--root")
        .arg(root.path())
        .args(["image", "import", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let bytes = tar(&[Entry::file("f", b"x")]);
    child.stdin.take().unwrap().write_all(&bytes).unwrap();
    let out = child.wait_with_output().unwrap();
    let id = String::from_utf8(out.stdout).unwrap();
    assert_eq!(inspect(root.path(), id.trim())["RepoTags"], json!([]));
    let folder = root.path().to_str().unwrap();
    let file = root.path().join("f");
    let path = file.to_str().unwrap();
    let gzip = gzip(&bytes);
    for (content, args, said) in [
        (&b""[..], vec![path], "it is empty"),
        (b"no tar at all", vec![path], "in the middle of a header"),
        (&gzip[..gzip.len() / 2], vec![path], "damaged or cut"),
        (b"", vec![folder], "it is a directory"),
        (&bytes, vec![path, "Bad"], "is not an image name"),
        (
            &bytes,
            vec!["-c", "RUN true", path],
            "the change \"RUN true\" is refused",
        ),
    ] {
        let root = tempfile::tempdir().unwrap();
        std::fs::write(&file, content).unwrap();
        let out = vm_run(root.path(), &[&["import"][..], &args].concat());
        let line = refused_line(root.path(), &out);
        assert!(line.contains(said), "{line}");
    }
}

#[test]
fn a_tag_is_a_name_like_others() {
    let root = store();
    good(root.path(), &["tag", "team/tool:v1", "a"]);
    let id = inspect(root.path(), "a")["Id"].take();
    good(root.path(), &["tag", &id.as_str().unwrap()[7..19], "b:2"]);
    let names = json!(["team/tool:v1", "a:latest", "b:2"]);
    assert_eq!(inspect(root.path(), "a")["RepoTags"], names);
    // A name that another image has changes hands.
    load(root.path(), &simple("other"));
    good(root.path(), &["tag", "other", "a"]);
    assert_ne!(inspect(root.path(), "a")["Id"], id);
    for (args, said) in [
        (["tag", "no-such", "c"], "no such image"),
        (["tag", "b:2", "UPPER"], "is not an image name"),
        (["tag", "b:2", "c@sha256:00"], "is not an image name"),
    ] {
        let out = vm_run(root.path(), &args);
        let line = String::from_utf8_lossy(&out.stderr);
        assert!(line.contains(said), "{line}");
    }
}

#[test]
fn prune_takes_what_has_no_name_and_all_takes_all_but_what_is_used() {
    let root = store();
    let download = root.path().join("images/downloads").join("0".repeat(64));
    let fill = || std::fs::write(&download, b"unfinished").unwrap();
    fill();
    good(root.path(), &["tag", "team/tool:v1", "used"]);
    load(root.path(), &simple("a"));
    let b = archive::docker_archive("b", "amd64", &[layer(&[Entry::file("b", b"b")])]);
    load(root.path(), &b);
    let nameless = inspect(root.path(), "b")["Id"].take();
    good(root.path(), &["tag", "a", "b"]);
    assert!(download.exists(), "a load leaves downloads to their pull");
    // Without an answer nothing happens.
    let asked = good(root.path(), &["prune"]);
    assert_eq!(
        asked,
        "This removes every image that has no name. Go on? [y/N] "
    );
    let pruned = good(root.path(), &["prune", "-f"]);
    let mut lines = pruned.lines();
    let deleted = format!("Deleted: {}", nameless.as_str().unwrap());
    assert_eq!(lines.next(), Some(deleted.as_str()));
    assert!(lines.next().unwrap().starts_with("Total reclaimed space: "));
    assert!(!download.exists());
    assert_eq!(good(root.path(), &["ls"]).lines().count(), 5);
    // As a container has it.
    let image = inspect(root.path(), "used")["GraphDriver"]["Data"]["Image"].take();
    let open = std::fs::File::open(image.as_str().unwrap()).unwrap();
    open.lock_shared().unwrap();
    good(root.path(), &["prune", "-a", "-f"]);
    assert_eq!(good(root.path(), &["ls"]).lines().count(), 3);
    drop(open);
    let pruned = good(root.path(), &["prune", "--all", "--force"]);
    assert!(pruned.contains("Untagged: used:latest\n"), "{pruned}");
    assert_eq!(stored(root.path()), Vec::<std::path::PathBuf>::new());
    assert_eq!(
        good(root.path(), &["prune", "-f"]),
        "Total reclaimed space: 0 B\n"
    );
}
