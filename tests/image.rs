//! `vm-run image` as a process: what scripts see, bad input, concurrency, sudden
//! death, and the file system images held against other programs' judgement.

#[path = "image/archive.rs"]
mod archive;
#[path = "image/attributes.rs"]
mod attributes;
#[path = "image/commands.rs"]
mod commands;
#[path = "image/evil.rs"]
mod evil;

use archive::{Entry, digest, docker_archive, gzip, layer, oci_directory, tar};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

fn vm_run(root: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_vm-run"))
        .arg("--root")
        .arg(root)
        .arg("image")
        .args(args)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

/// Runs a command that must succeed; returns its standard output.
fn good(root: &Path, args: &[&str]) -> String {
    let out = vm_run(root, args);
    assert!(
        out.status.success(),
        "{args:?}: {}",
        String::from_utf8_lossy(&out.stderr)
    );
    String::from_utf8(out.stdout).unwrap()
}

fn load(root: &Path, bytes: &[u8]) -> Output {
    let file = root.join("input.tar");
    std::fs::write(&file, bytes).unwrap();
    vm_run(root, &["load", file.to_str().unwrap()])
}

/// Loads what must be refused: exit status 125, one line, nothing left. Returns the
/// line.
fn refused(bytes: &[u8]) -> String {
    let root = tempfile::tempdir().unwrap();
    let out = load(root.path(), bytes);
    refused_line(root.path(), &out)
}

fn refused_line(root: &Path, out: &Output) -> String {
    let line = String::from_utf8_lossy(&out.stderr).trim_end().to_owned();
    assert_eq!(out.status.code(), Some(125), "{line}");
    assert!(
        !line.contains('\n') && line.starts_with("vm-run: "),
        "{line:?}"
    );
    assert!(out.stdout.is_empty());
    assert_eq!(stored(root), Vec::<PathBuf>::new(), "{line}");
    assert_eq!(good(root, &["ls", "--json"]).trim(), "[]");
    line
}

/// The files that a store holds.
fn stored(root: &Path) -> Vec<PathBuf> {
    let folders = ["blobs/sha256", "rootfs", "downloads", "tmp"]
        .map(|folder| root.join("images").join(folder));
    let mut files: Vec<PathBuf> = folders
        .iter()
        .flat_map(|folder| std::fs::read_dir(folder).unwrap())
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    files
}

fn rootfs(root: &Path) -> PathBuf {
    let is_image = |path: &&PathBuf| path.extension().is_some_and(|ending| ending == "erofs");
    stored(root).iter().find(is_image).unwrap().clone()
}

fn simple(tag: &str) -> Vec<u8> {
    docker_archive(tag, "amd64", &[layer(&[Entry::file("etc/motd", b"hello")])])
}

#[test]
fn load_ls_and_rm_print_what_scripts_rely_on() {
    let root = tempfile::tempdir().unwrap();
    let out = load(root.path(), &simple("busybox"));
    assert_eq!(
        String::from_utf8_lossy(&out.stdout),
        "Loaded image: busybox:latest\n"
    );
    assert!(out.stderr.is_empty(), "no progress in a pipe");
    let table = good(root.path(), &["ls"]);
    let lines: Vec<Vec<&str>> = table
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    assert_eq!(
        lines[0],
        ["REPOSITORY", "TAG", "IMAGE", "ID", "CREATED", "SIZE"]
    );
    assert_eq!(lines[1][..2], ["busybox", "latest"]);
    let json: serde_json::Value =
        serde_json::from_str(&good(root.path(), &["ls", "--json"])).unwrap();
    let id = json[0]["id"].as_str().unwrap();
    assert_eq!(json[0]["names"][0], "busybox:latest");
    let removed = good(root.path(), &["rm", "busybox"]);
    assert_eq!(
        removed,
        format!("Untagged: busybox:latest\nDeleted: {id}\n")
    );
    assert_eq!(stored(root.path()), Vec::<PathBuf>::new());
    let out = vm_run(root.path(), &["rm", "busybox"]);
    assert_eq!(out.status.code(), Some(125));
}

#[test]
fn standard_input_and_i_are_inputs_too() {
    let root = tempfile::tempdir().unwrap();
    let file = root.path().join("a.tar.gz");
    std::fs::write(&file, gzip(&simple("a"))).unwrap();
    assert_eq!(
        good(root.path(), &["load", "-i", file.to_str().unwrap()]),
        "Loaded image: a:latest\n"
    );
    for args in [&["load"][..], &["load", "-"]] {
        let out = Command::new(env!("CARGO_BIN_EXE_vm-run"))
            .arg("--root")
            .arg(root.path())
            .arg("image")
            .args(args)
            .stdin(std::fs::File::open(&file).unwrap())
            .output()
            .unwrap();
        assert_eq!(
            String::from_utf8_lossy(&out.stdout),
            "Loaded image: a:latest\n"
        );
    }
}

#[test]
fn a_second_load_changes_nothing() {
    let root = tempfile::tempdir().unwrap();
    load(root.path(), &simple("a"));
    let first = stored(root.path());
    load(root.path(), &simple("a"));
    assert_eq!(stored(root.path()), first);
    load(root.path(), &simple("b"));
    assert_eq!(
        stored(root.path()),
        first,
        "another name for the same image"
    );
    assert_eq!(good(root.path(), &["ls"]).lines().count(), 3);
    good(root.path(), &["rm", "a"]);
    assert_eq!(stored(root.path()), first);
}

#[test]
fn hostile_entries_are_refused_by_name() {
    let cases = [
        (vec![Entry::file("../x", b"")], "../x"),
        (vec![Entry::file("a/../../x", b"")], "a/../../x"),
        (
            vec![Entry::hard_link("h", "../../etc/passwd")],
            "hard link out of the image",
        ),
        (
            vec![Entry::hard_link("h", "/etc/passwd")],
            "not in the image",
        ),
        (vec![Entry::file("f", b""), Entry::file("f/x", b"")], "f/x"),
        (
            vec![Entry::symlink("s", "s"), Entry::file("s/x", b"")],
            "s/x",
        ),
    ];
    for (entries, expected) in cases {
        let line = refused(&docker_archive("a", "amd64", &[layer(&entries)]));
        assert!(line.contains(expected), "{line}");
    }
}

#[test]
fn a_link_to_the_host_leads_into_the_image() {
    let root = tempfile::tempdir().unwrap();
    let outside = tempfile::tempdir().unwrap();
    let target = outside.path().to_str().unwrap();
    let entries = [
        Entry::symlink("evil", target),
        Entry::file("evil/planted", b"x"),
    ];
    let out = load(
        root.path(),
        &docker_archive("a", "amd64", &[layer(&entries)]),
    );
    assert!(out.status.success(), "{out:?}");
    assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 0);
    let tree = extract(&rootfs(root.path()));
    assert!(
        tree.path()
            .join(target.trim_start_matches('/'))
            .join("planted")
            .exists()
    );
}

#[test]
fn corrupt_and_foreign_archives_are_refused() {
    let whole = simple("a");
    for length in [0, 100, 512, 700, 1600, 3000] {
        refused(&whole[..length]);
    }
    refused(b"this is no archive at all");
    refused(&gzip(&whole)[..60]);
    assert!(refused(&tar(&[Entry::file("bin/sh", b"")])).contains("neither a manifest.json"));
    let arm = docker_archive("a", "arm64", &[layer(&[])]);
    assert!(refused(&arm).contains("the image is for linux/arm64"));
    let cut = layer(&[Entry::file("f", &[7; 5000])]);
    let packed = gzip(&cut);
    let bytes = archive::docker_archive_of(
        "a",
        "amd64",
        &[(digest(&cut), packed[..packed.len() / 2].to_vec())],
    );
    let line = refused(&bytes);
    assert!(line.contains("damaged or cut"), "{line}");
    let bytes = archive::docker_archive_of("a", "amd64", &[(digest(b"other"), cut)]);
    let line = refused(&bytes);
    assert!(line.contains("the digest should be"), "{line}");
}

#[test]
fn oci_layouts_are_checked_blob_by_blob() {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join("layout");
    let base = layer(&[Entry::file("a", b"1")]);
    oci_directory(&folder, "tool:v1", &[(digest(&base), gzip(&base))]);
    let path = folder.to_str().unwrap();
    assert_eq!(
        good(root.path(), &["load", path]),
        "Loaded image: tool:v1\n"
    );
    good(root.path(), &["rm", "tool:v1"]);
    // The same as a tar, from standard input.
    let packed = Command::new("tar")
        .args(["-c", "-C", path, "."])
        .output()
        .unwrap()
        .stdout;
    assert!(load(root.path(), &packed).status.success());
    good(root.path(), &["rm", "tool:v1"]);
    let blob = folder
        .join("blobs/sha256")
        .join(digest(&gzip(&base)).trim_start_matches("sha256:"));
    std::fs::write(&blob, b"something else").unwrap();
    let line = refused_line(root.path(), &vm_run(root.path(), &["load", path]));
    assert!(line.contains("the digest should be"), "{line}");
    std::fs::remove_file(&blob).unwrap();
    let line = refused_line(root.path(), &vm_run(root.path(), &["load", path]));
    assert!(line.contains("is missing"), "{line}");
    std::os::unix::fs::symlink("/etc/passwd", &blob).unwrap();
    refused_line(root.path(), &vm_run(root.path(), &["load", path]));
}

#[test]
fn processes_share_a_store() {
    let root = tempfile::tempdir().unwrap();
    let archives: Vec<PathBuf> = (0..4)
        .map(|i| {
            let file = root.path().join(format!("{i}.tar"));
            let entries = [
                Entry::file("shared", b"s"),
                Entry::file("own", &[i; 70_000]),
            ];
            let layers = [layer(&entries[..1]), layer(&entries[1..])];
            std::fs::write(
                &file,
                docker_archive(&format!("image{i}"), "amd64", &layers),
            )
            .unwrap();
            file
        })
        .collect();
    let children: Vec<_> = archives
        .iter()
        .chain(&archives)
        .map(|file| {
            Command::new(env!("CARGO_BIN_EXE_vm-run"))
                .arg("--root")
                .arg(root.path())
                .args(["image", "load", "-i"])
                .arg(file)
                .stdout(Stdio::null())
                .spawn()
                .unwrap()
        })
        .collect();
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
    assert_eq!(good(root.path(), &["ls"]).lines().count(), 5);
    let names: Vec<String> = (0..4).map(|i| format!("image{i}")).collect();
    for name in &names {
        good(root.path(), &["rm", name]);
    }
    assert_eq!(stored(root.path()), Vec::<PathBuf>::new());
}

/// A load that is killed at any moment leaves a store that works, and what it left
/// half-made goes with the next load.
#[test]
fn a_killed_load_leaves_a_usable_store() {
    let root = tempfile::tempdir().unwrap();
    let file = root.path().join("a.tar");
    let noise: Vec<u8> = (0..8_000_000u32)
        .flat_map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes())
        .collect();
    let base = layer(&[Entry::file("big", &noise)]);
    std::fs::write(
        &file,
        archive::docker_archive_of("a", "amd64", &[(digest(&base), gzip(&base))]),
    )
    .unwrap();
    for delay in [1, 5, 20, 50, 100, 200, 400, 800] {
        let mut child = Command::new(env!("CARGO_BIN_EXE_vm-run"))
            .arg("--root")
            .arg(root.path())
            .args(["image", "load", "-i"])
            .arg(&file)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(std::time::Duration::from_millis(delay));
        child.kill().unwrap();
        child.wait().unwrap();
        good(root.path(), &["ls"]);
    }
    good(root.path(), &["load", "-i", file.to_str().unwrap()]);
    assert_eq!(
        stored(root.path()).len(),
        4,
        "a layer, a configuration, a manifest, a root file system"
    );
    good(root.path(), &["rm", "a"]);
    assert_eq!(stored(root.path()), Vec::<PathBuf>::new());
}

/// An image with one of everything.
fn everything() -> Vec<Entry> {
    let mut entries = vec![
        Entry::directory("bin", 0o755),
        Entry::file("bin/exact", &[1; 8192]),
        Entry::file("bin/tail", &[2; 12_388])
            .mode(0o4755)
            .owner(1000, 70_000),
        Entry::file("bin/nearly", &[3; 4095]),
        Entry::file("bin/empty", b""),
        Entry::hard_link("bin/hard", "bin/tail"),
        Entry::symlink("lib", "/usr/lib"),
        Entry::directory("tmp", 0o1777),
        Entry::character_device("null", 1, 3),
        Entry::fifo("fifo"),
        Entry::directory("many", 0o700),
    ];
    let name = |i: usize| format!("many/{i:05}-{}", "n".repeat(i % 200));
    entries.extend((0..1500).map(|i| Entry::file(&name(i), &vec![(i % 251) as u8; i])));
    entries
}

/// Unpacks a file system image with erofs-utils, which also checks it.
fn extract(image: &Path) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let target = format!("--extract={}", folder.path().join("tree").display());
    let out = Command::new("fsck.erofs")
        .args([target.as_str(), "--no-preserve-owner"])
        .arg(image)
        .output()
        .expect("fsck.erofs of Debian's erofs-utils is needed");
    assert!(
        out.status.success(),
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
    let moved = tempfile::tempdir().unwrap();
    std::fs::rename(folder.path().join("tree"), moved.path()).unwrap();
    moved
}

#[test]
fn erofs_utils_unpack_what_tar_unpacks() {
    let root = tempfile::tempdir().unwrap();
    // Devices need privileges to unpack, and diff takes no two pipes for the same.
    let entries: Vec<Entry> = everything()
        .into_iter()
        .filter(|entry| !matches!(entry.path(), "null" | "fifo"))
        .collect();
    let bytes = layer(&entries);
    load(
        root.path(),
        &docker_archive("a", "amd64", std::slice::from_ref(&bytes)),
    );
    let ours = extract(&rootfs(root.path()));
    let theirs = tempfile::tempdir().unwrap();
    let file = root.path().join("layer.tar");
    std::fs::write(&file, &bytes).unwrap();
    let status = Command::new("tar")
        .args(["-x", "--no-same-owner", "-C"])
        .arg(theirs.path())
        .arg("-f")
        .arg(&file)
        .status();
    assert!(status.unwrap().success());
    let diff = Command::new("diff")
        .args(["-r", "--no-dereference"])
        .args([ours.path(), theirs.path()])
        .output()
        .unwrap();
    assert!(
        diff.status.success(),
        "{}",
        String::from_utf8_lossy(&diff.stdout)
    );
}

/// Linux itself reads the image as it reads tar's result, to the last attribute.
#[test]
fn linux_mounts_what_tar_unpacks() {
    let filesystems = std::fs::read_to_string("/proc/filesystems").unwrap();
    if !rustix::process::geteuid().is_root() || !filesystems.contains("erofs") {
        eprintln!("not tried: mounting needs root and a kernel with erofs");
        return;
    }
    let root = tempfile::tempdir().unwrap();
    let bytes = layer(&everything());
    load(
        root.path(),
        &docker_archive("a", "amd64", std::slice::from_ref(&bytes)),
    );
    let theirs = root.path().join("theirs");
    let ours = root.path().join("ours");
    std::fs::create_dir(&theirs).unwrap();
    std::fs::create_dir(&ours).unwrap();
    let file = root.path().join("layer.tar");
    std::fs::write(&file, &bytes).unwrap();
    let run = |program: &str, args: &[&std::ffi::OsStr]| {
        Command::new(program).args(args).status().unwrap().success()
    };
    let words = [
        "-x",
        "-p",
        "--same-owner",
        "--xattrs",
        "--xattrs-include=*",
        "-C",
    ]
    .map(std::ffi::OsStr::new);
    let image = rootfs(root.path());
    assert!(run(
        "tar",
        &[
            &words[..],
            &[theirs.as_os_str(), "-f".as_ref(), file.as_os_str()]
        ]
        .concat()
    ));
    let mount = ["-t", "erofs", "-o", "loop,ro"].map(std::ffi::OsStr::new);
    assert!(run(
        "mount",
        &[&mount[..], &[image.as_os_str(), ours.as_os_str()]].concat()
    ));
    let listing = |folder: &Path| {
        let script = "find . -mindepth 1 ! -type d -printf '%p %y %m %U %G %n %s %T@ %l\\n' | sort; \
                      find . -mindepth 1 -type d -printf '%p %y %m %U %G %n\\n' | sort; \
                      find . -type f -print0 | sort -z | xargs -0 sha256sum; stat -c '%t %T' null; find . | wc -l";
        let out = Command::new("sh")
            .args(["-c", script])
            .current_dir(folder)
            .output()
            .unwrap();
        String::from_utf8(out.stdout).unwrap()
    };
    let (mine, reference) = (listing(&ours), listing(&theirs));
    let xattr = |folder: &Path, name: &str| {
        let mut value = [0; 64];
        let length = rustix::fs::getxattr(folder.join("bin/exact"), name, &mut value).unwrap();
        value[..length].to_vec()
    };
    let attributes = ["user.note", "security.capability"].map(|name| xattr(&ours, name));
    assert!(run("umount", &[ours.as_os_str()]));
    assert!(mine.lines().count() > 1500);
    for (mine, reference) in mine.lines().zip(reference.lines()) {
        assert_eq!(mine, reference);
    }
    assert_eq!(mine, reference);
    assert_eq!(
        attributes,
        [archive::NOTE.to_vec(), archive::CAPABILITY.to_vec()]
    );
}
