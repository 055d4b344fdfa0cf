//! Pulls over a network that is slow, breaks, and changes bytes.

use super::http::{Answer, Content, Http};
use super::proxy::{Faults, Proxy};
use super::{
    assert_nothing_left, command, digest, files, good, inspect, line, registry_with_noise, vm_run,
};
use serde_json::json;
use std::path::Path;
use std::process::Stdio;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
/// Bytes of a pull that are no layer: heads and documents.
const OVERHEAD: u64 = 32 << 10;

fn download(root: &Path, layer: &[u8]) -> std::path::PathBuf {
    root.join("images/downloads").join(&digest(layer)[7..])
}

fn blob(root: &Path, layer: &[u8]) -> std::path::PathBuf {
    root.join("images/blobs/sha256").join(&digest(layer)[7..])
}

#[test]
fn a_pull_that_is_cut_goes_on_where_it_was() {
    let (server, layer) = registry_with_noise(8 << 20);
    let faults = Faults {
        pause: Duration::from_millis(2),
        cuts: vec![2 * MIB, 2 * MIB + 1, 5 * MIB],
        ..Faults::default()
    };
    let proxy = Proxy::start(&server.address, faults);
    let root = tempfile::tempdir().unwrap();
    good(
        root.path(),
        &["pull", "-q", &format!("{}/a/b:1", proxy.address)],
    );
    assert!(std::fs::read(blob(root.path(), &layer)).unwrap() == layer);
    let whole = layer.len() as u64;
    let sent = proxy.sent();
    assert!((whole..whole + OVERHEAD).contains(&sent), "{sent} bytes");
}

#[test]
fn a_pull_that_is_killed_is_gone_on_with_by_the_next() {
    let (server, layer) = registry_with_noise(8 << 20);
    let slow = Faults {
        pause: Duration::from_millis(20),
        ..Faults::default()
    };
    let slow = Proxy::start(&server.address, slow);
    let root = tempfile::tempdir().unwrap();
    let mut child = command(root.path(), &["pull", &format!("{}/a/b:1", slow.address)])
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let path = download(root.path(), &layer);
    let there = || path.metadata().map_or(0, |meta| meta.len());
    let start = Instant::now();
    while there() < 2 * MIB {
        assert!(
            start.elapsed() < Duration::from_secs(60),
            "{} bytes",
            there()
        );
        std::thread::sleep(Duration::from_millis(5));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let kept = there();
    assert!(kept < layer.len() as u64, "killed too late");
    let fast = Proxy::start(&server.address, Faults::default());
    let name = format!("{}/a/b:1", fast.address);
    good(root.path(), &["pull", "-q", &name]);
    let rest = layer.len() as u64 - kept;
    let sent = fast.sent();
    assert!(
        (rest..rest + OVERHEAD).contains(&sent),
        "{sent} of {rest} bytes"
    );
    assert!(std::fs::read(blob(root.path(), &layer)).unwrap() == layer);
    // What is there is not fetched again.
    good(root.path(), &["pull", "-q", &name]);
    good(
        root.path(),
        &["pull", "-q", &format!("{}/a/b:1", server.address)],
    );
    assert!(fast.sent() - sent < OVERHEAD);
    assert_eq!(files(root.path(), "downloads").len(), 0);
}

#[test]
fn what_a_crash_made_of_a_download_is_found_out() {
    let (server, layer) = registry_with_noise(1 << 20);
    let root = tempfile::tempdir().unwrap();
    good(root.path(), &["ls"]);
    let name = format!("{}/a/b:1", server.address);
    for wrong in [
        vec![0; 1000],
        vec![0; layer.len()],
        vec![0; layer.len() + 1],
    ] {
        std::fs::write(download(root.path(), &layer), wrong).unwrap();
        good(root.path(), &["pull", "-q", &name]);
        assert!(std::fs::read(blob(root.path(), &layer)).unwrap() == layer);
        good(root.path(), &["rm", &name]);
        assert_nothing_left(root.path());
    }
}

#[test]
fn a_changed_byte_is_refused_and_nothing_of_it_kept() {
    let (server, layer) = registry_with_noise(4 << 20);
    let faults = Faults {
        flip: Some(2 * MIB),
        ..Faults::default()
    };
    let proxy = Proxy::start(&server.address, faults);
    let root = tempfile::tempdir().unwrap();
    let name = format!("{}/a/b:1", proxy.address);
    let refused = line(&vm_run(root.path(), &["pull", &name]));
    let expected = format!("the digest should be {}", digest(&layer));
    assert!(refused.contains(&expected), "{refused}");
    assert_nothing_left(root.path());
    // The byte passed by, so now all is well.
    good(root.path(), &["pull", "-q", &name]);
}

#[test]
fn two_pulls_of_one_layer_fetch_it_once() {
    let (server, layer) = registry_with_noise(4 << 20);
    let slow = Faults {
        pause: Duration::from_millis(5),
        ..Faults::default()
    };
    let proxy = Proxy::start(&server.address, slow);
    let root = tempfile::tempdir().unwrap();
    let name = format!("{}/a/b:1", proxy.address);
    let mut pulls: Vec<_> = (0..3)
        .map(|_| {
            command(root.path(), &["pull", "-q", &name])
                .stdout(Stdio::null())
                .spawn()
                .unwrap()
        })
        .collect();
    for pull in &mut pulls {
        assert!(pull.wait().unwrap().success());
    }
    let sent = proxy.sent();
    assert!(sent < layer.len() as u64 + 3 * OVERHEAD, "{sent} bytes");
    assert_eq!(inspect(root.path(), &name)["RepoTags"][0], name.as_str());
    assert_eq!(files(root.path(), "downloads").len(), 0);
}

/// An image of one layer in a registry of one's own making; its tag is `1`.
fn content(layer: &[u8]) -> Content {
    let mut content = Content::default();
    let config = json!({
        "architecture": "amd64", "os": "linux",
        "rootfs": { "type": "layers", "diff_ids": [digest(layer)] },
    })
    .to_string();
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": content.add(config.as_bytes()),
            "size": config.len(),
        },
        "layers": [{
            "mediaType": "application/vnd.oci.image.layer.v1.tar",
            "digest": content.add(layer),
            "size": layer.len(),
        }],
    });
    content.tag("1", manifest.to_string().as_bytes());
    content
}

#[test]
fn a_busy_registry_is_asked_again_and_one_without_ranges_from_the_start() {
    let bytes = super::layer(&[super::Entry::file("f", &super::noise(100_000))]);
    let content = content(&bytes);
    let blob_path = format!("/v2/x/blobs/{}", digest(&bytes));
    let times = AtomicU32::new(0);
    let registry = Http::serve({
        let blob_path = blob_path.clone();
        move |request| {
            let mut answer = content.answer(request);
            if request.path != blob_path {
                return answer;
            }
            match times.fetch_add(1, Ordering::SeqCst) {
                0 => Answer {
                    status: 503,
                    body: b"\x1b[31mbusy\n".to_vec(),
                    ..Answer::default()
                },
                1 => {
                    let length = answer.body.len();
                    answer.body.truncate(length / 2);
                    answer.promised = Some(length);
                    answer
                }
                _ => answer,
            }
        }
    });
    let root = tempfile::tempdir().unwrap();
    let name = format!("{}/x:1", registry.address);
    good(root.path(), &["pull", "-q", &name]);
    let asked = registry.paths();
    let asked = asked.iter().filter(|path| **path == blob_path);
    assert_eq!(asked.count(), 3);
    assert!(std::fs::read(blob(root.path(), &bytes)).unwrap() == bytes);
}

#[test]
fn a_registry_that_stays_away_is_given_up() {
    let content = content(&super::layer(&[]));
    let registry = Http::serve(move |request| match request.path.contains("/blobs/") {
        true => Answer {
            status: 500,
            body: b"\x1b[31mno\n".to_vec(),
            ..Answer::default()
        },
        false => content.answer(request),
    });
    let root = tempfile::tempdir().unwrap();
    let refused = vm_run(root.path(), &["pull", &format!("{}/x:1", registry.address)]);
    let line = line(&refused);
    assert!(
        line.contains("500 Internal Server Error: \\u{1b}[31mno"),
        "{line}"
    );
    assert_nothing_left(root.path());
}
