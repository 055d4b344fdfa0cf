//! `vm-run image pull` and `push`: against docker-registry, over bad networks, and
//! against registries that lie.

#[expect(dead_code, reason = "the tests of `image` use the rest")]
#[path = "../image/archive.rs"]
mod archive;
mod evil;
mod http;
mod login;
mod network;
mod proxy;
mod server;

use archive::{Entry, digest, gzip, layer, oci_directory};
use server::Server;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use tempfile::TempDir;

/// `vm-run image ...` of a user who has no configuration and no proxy.
pub fn command(root: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vm-run"));
    command
        .arg("--root")
        .arg(root)
        .arg("image")
        .args(args)
        .env("DOCKER_CONFIG", root.join("no-docker"))
        .stdin(Stdio::null());
    for name in ["http_proxy", "https_proxy", "all_proxy"] {
        command.env_remove(name);
        command.env_remove(name.to_ascii_uppercase());
    }
    command
}

/// Runs it to its end.
pub fn vm_run(root: &Path, args: &[&str]) -> Output {
    command(root, args).output().unwrap()
}

/// Runs what must succeed; returns its standard output.
pub fn good(root: &Path, args: &[&str]) -> String {
    text(vm_run(root, args))
}

/// The standard output of what must have succeeded in silence.
pub fn text(out: Output) -> String {
    let error = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{error}");
    assert_eq!(error, "", "no progress in a pipe");
    String::from_utf8(out.stdout).unwrap()
}

/// The line of what must have been refused.
pub fn line(out: &Output) -> String {
    let line = String::from_utf8_lossy(&out.stderr).trim_end().to_owned();
    assert_eq!(out.status.code(), Some(125), "{line}");
    assert!(
        !line.contains('\n') && line.starts_with("vm-run: "),
        "{line:?}"
    );
    assert!(out.stdout.is_empty());
    line
}

/// The files in a folder of the store.
pub fn files(root: &Path, folder: &str) -> Vec<PathBuf> {
    let folder = root.join("images").join(folder);
    std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect()
}

/// That a store is as good as new.
pub fn assert_nothing_left(root: &Path) {
    for folder in ["blobs/sha256", "rootfs", "downloads", "tmp"] {
        assert_eq!(files(root, folder), Vec::<PathBuf>::new(), "{folder}");
    }
    assert_eq!(good(root, &["ls", "--json"]).trim(), "[]");
}

/// Bytes that no compression makes fewer.
pub fn noise(length: usize) -> Vec<u8> {
    let mut state: u64 = 0x9e37_79b9_7f4a_7c15;
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.flatten().take(length).collect()
}

/// Two layers, gzip'ed, as they are to arrive everywhere.
fn layers() -> Vec<(String, Vec<u8>)> {
    let base = layer(&[Entry::file("etc/motd", b"hello"), Entry::file("old", b"1")]);
    let upper = layer(&[Entry::file(".wh.old", b""), Entry::file("new", b"2")]);
    [base, upper]
        .map(|layer| (digest(&layer), gzip(&layer)))
        .to_vec()
}

/// A store with an image of these layers, by this name.
pub fn store_with(name: &str, layers: &[(String, Vec<u8>)]) -> TempDir {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join("layout");
    oci_directory(&folder, name, layers);
    good(root.path(), &["load", folder.to_str().unwrap()]);
    root
}

/// A registry with an image of one layer of so much noise, `a/b:1`; returns the
/// layer's bytes.
fn registry_with_noise(length: usize) -> (Server, Vec<u8>) {
    let server = Server::start();
    let name = format!("{}/a/b:1", server.address);
    let bytes = layer(&[Entry::file("noise", &noise(length))]);
    let store = store_with(&name, &[(digest(&bytes), bytes.clone())]);
    good(store.path(), &["push", &name]);
    (server, bytes)
}

fn inspect(root: &Path, image: &str) -> serde_json::Value {
    let mut all: serde_json::Value =
        serde_json::from_str(&good(root, &["inspect", image])).unwrap();
    all[0].take()
}

#[test]
fn an_image_comes_back_as_it_went() {
    let server = Server::start();
    let name = format!("{}/team/tool:v1", server.address);
    let first = store_with(&name, &layers());
    let pushed = good(first.path(), &["push", &name]);
    let before = inspect(first.path(), &name);
    let manifest = before["Descriptor"]["digest"].as_str().unwrap().to_owned();
    assert_eq!(pushed, format!("Digest: {manifest}\n{name}\n"));
    // Again: everything is there.
    assert_eq!(
        good(first.path(), &["push", "-q", &name]),
        format!("{name}\n")
    );

    let second = tempfile::tempdir().unwrap();
    let pulled = good(second.path(), &["pull", &name]);
    assert_eq!(
        pulled,
        format!("Digest: {manifest}\nStatus: Downloaded newer image for {name}\n{name}\n")
    );
    let again = good(second.path(), &["pull", &name]);
    assert!(again.contains("Status: Image is up to date"), "{again}");
    let after = inspect(second.path(), &name);
    for field in [
        "Id",
        "RootFS",
        "Config",
        "Descriptor",
        "RepoTags",
        "RepoDigests",
    ] {
        assert_eq!(after[field], before[field], "{field}");
    }
    for (_, blob) in layers() {
        let path = format!("images/blobs/sha256/{}", &digest(&blob)[7..]);
        assert_eq!(std::fs::read(second.path().join(path)).unwrap(), blob);
    }
    assert_eq!(files(second.path(), "downloads"), Vec::<PathBuf>::new());
}

#[test]
fn a_digest_is_a_name_too() {
    let server = Server::start();
    let name = format!("{}/team/tool", server.address);
    let first = store_with(&format!("{name}:v1"), &layers());
    good(first.path(), &["push", &format!("{name}:v1")]);
    let manifest = inspect(first.path(), &format!("{name}:v1"))["Descriptor"]["digest"].take();
    let digest = manifest.as_str().unwrap();
    let root = tempfile::tempdir().unwrap();
    // With a digest the tag says nothing.
    let both = format!("{name}:nonsense@{digest}");
    let printed = good(root.path(), &["pull", &both]);
    assert!(
        printed.ends_with(&format!("\n{name}@{digest}\n")),
        "{printed}"
    );
    let image = inspect(root.path(), &both);
    assert_eq!(image["RepoTags"].as_array().unwrap().len(), 0);
    assert_eq!(image["RepoDigests"][0], format!("{name}@{digest}"));
    // Pulled by its tag too, it is one image, which the last name takes along.
    good(root.path(), &["pull", &format!("{name}:v1")]);
    assert_eq!(good(root.path(), &["ls"]).lines().count(), 2);
    good(root.path(), &["rm", &format!("{name}@{digest}")]);
    good(root.path(), &["rm", &format!("{name}:v1")]);
    assert_nothing_left(root.path());
}

#[test]
fn what_is_not_there_is_one_line() {
    let server = Server::start();
    let root = tempfile::tempdir().unwrap();
    let refused = |image: &str| line(&vm_run(root.path(), &["pull", image]));
    let missing = refused(&format!("{}/no/such:tag", server.address));
    assert!(
        missing.contains("has no such image, or not for you"),
        "{missing}"
    );
    let nobody = refused("127.0.0.1:1/x");
    assert!(
        nobody.contains("cannot reach 127.0.0.1:1: Connection refused"),
        "{nobody}"
    );
    assert!(refused("No/Name").contains("is not an image name"));
    let pushed = line(&vm_run(root.path(), &["push", "127.0.0.1:1/x"]));
    assert!(
        pushed.contains("no such image: 127.0.0.1:1/x:latest"),
        "{pushed}"
    );
    assert_nothing_left(root.path());
}
