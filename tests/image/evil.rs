//! Images made to harm. Each is refused in one line, and nothing of it is left.

use super::archive::{self, Entry, digest, gzip, layer, tar};
use super::{load, refused, stored};
use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::json;
use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

#[test]
fn ten_gibibytes_of_zeros_are_seen_through_early() {
    const SIZE: u64 = 10 << 30;
    // A tar of one such file, gzip'ed: 10 MiB. Members of gzip one after the other are
    // one stream, so the zeros need to be compressed only once.
    const PART: u64 = 64 << 20;
    let mut head = tar::Header::new_gnu();
    head.set_path("zeros").unwrap();
    head.set_mode(0o644);
    head.set_size(SIZE);
    head.set_cksum();
    let mut bomb = gzip(head.as_bytes());
    let mut part = GzEncoder::new(Vec::new(), Compression::best());
    part.write_all(&vec![0; PART as usize]).unwrap();
    let part = part.finish().unwrap();
    for _ in 0..SIZE / PART {
        bomb.extend(&part);
    }
    assert!(bomb.len() < 16 << 20);
    let diff_id = digest(b"never reached");
    let bytes = archive::docker_archive_of("a", "amd64", &[(diff_id, bomb.clone())]);
    let start = Instant::now();
    let line = refused(&bytes);
    assert!(line.contains("a decompression bomb"), "{line}");
    // As the whole archive, and as a file of it.
    for bytes in [bomb, gzip(&bytes)] {
        let line = refused(&bytes);
        assert!(line.contains("a decompression bomb"), "{line}");
    }
    // Ten GiB take longer.
    assert!(
        start.elapsed() < Duration::from_secs(30),
        "{:?}",
        start.elapsed()
    );
}

#[test]
fn ten_thousand_layers_are_refused_by_their_number() {
    let one = layer(&[]);
    let names: Vec<String> = (0..10_000).map(|_| "0/layer.tar".to_owned()).collect();
    let diff_ids = vec![digest(&one); 10_000];
    let config = json!({
        "architecture": "amd64", "os": "linux",
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    });
    let manifest = json!([{ "Config": "config.json", "RepoTags": ["a"], "Layers": names }]);
    let bytes = tar(&[
        Entry::file("0/layer.tar", &one),
        Entry::file("config.json", config.to_string().as_bytes()),
        Entry::file("manifest.json", manifest.to_string().as_bytes()),
    ]);
    let line = refused(&bytes);
    assert!(line.contains("10000 layers, and 127 is the most"), "{line}");
    // The configuration alone may say so.
    let manifest =
        json!([{ "Config": "config.json", "RepoTags": ["a"], "Layers": ["0/layer.tar"] }]);
    let bytes = tar(&[
        Entry::file("0/layer.tar", &one),
        Entry::file("config.json", config.to_string().as_bytes()),
        Entry::file("manifest.json", manifest.to_string().as_bytes()),
    ]);
    assert!(refused(&bytes).contains("10000 layers"));
}

#[test]
fn large_documents_and_many_members_are_refused() {
    let big = format!("[{}]", " ".repeat(5 << 20));
    let line = refused(&tar(&[Entry::file("manifest.json", big.as_bytes())]));
    assert!(line.contains("manifest.json has more than"), "{line}");
    let many: Vec<Entry> = (0..70_000)
        .map(|i| Entry::file(&i.to_string(), b""))
        .collect();
    assert!(refused(&tar(&many)).contains("more than 65536 members"));
    let deep = "[".repeat(100_000);
    refused(&tar(&[Entry::file("manifest.json", deep.as_bytes())]));
}

/// The race of a link that is made between a check and a use: here in one archive, in
/// which the name is a directory, a link, and a parent in turn.
#[test]
fn a_link_in_the_place_of_a_directory_leads_nowhere() {
    let outside = tempfile::tempdir().unwrap();
    let target = outside.path().to_str().unwrap();
    let first = [Entry::directory("d", 0o755), Entry::file("d/own", b"1")];
    let second = [
        Entry::symlink("d", target),
        Entry::file("d/planted", b"2"),
        Entry::directory("d", 0o755),
        Entry::file("d/later", b"3"),
        Entry::symlink("up", "../../../../../../.."),
        Entry::file(&format!("up{target}/planted"), b"4"),
        Entry::hard_link("d/hard", &format!("up{target}/planted")),
    ];
    let root = tempfile::tempdir().unwrap();
    let bytes = archive::docker_archive("a", "amd64", &[layer(&first), layer(&second)]);
    let out = load(root.path(), &bytes);
    assert!(out.status.success(), "{out:?}");
    assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 0);
    let tree = super::extract(&super::rootfs(root.path()));
    let read = |path: &str| std::fs::read(tree.path().join(path)).unwrap();
    assert_eq!(read("d/later"), b"3");
    assert_eq!(read("d/hard"), b"4");
    assert_eq!(read(&format!("{}/planted", &target[1..])), b"4");
    assert!(!tree.path().join("d/own").exists());
}

/// Members of the outer archive are looked up by name, and never opened on the host.
#[test]
fn an_archive_s_own_names_lead_nowhere() {
    let config = "../../../../../../etc/hostname";
    for layers in [
        json!(["/etc/passwd"]),
        json!(["../../etc/passwd"]),
        json!(["link"]),
    ] {
        let manifest = json!([{ "Config": config, "RepoTags": ["a"], "Layers": layers }]);
        let manifest = manifest.to_string();
        let line = refused(&tar(&[
            Entry::symlink("link", "/etc/passwd"),
            Entry::file("manifest.json", manifest.as_bytes()),
        ]));
        assert!(line.contains("is missing"), "{line}");
    }
    let manifest = json!([{ "Config": "loop", "RepoTags": ["a"], "Layers": [] }]).to_string();
    let line = refused(&tar(&[
        Entry::symlink("loop", "loop"),
        Entry::file("manifest.json", manifest.as_bytes()),
    ]));
    assert!(line.contains("links in circles"), "{line}");
}

/// A terminal is not the image's to write on.
#[test]
fn what_an_image_says_is_shown_harmless() {
    let evil = "\u{1b}]0;x\u{7}\n";
    let line = refused(&archive::docker_archive("a", evil, &[layer(&[])]));
    assert!(!line.contains('\u{1b}'), "{line:?}");
    let line = refused(&archive::docker_archive(
        "a",
        "amd64",
        &[layer(&[Entry::file(&format!("{evil}/../x"), b"")])],
    ));
    assert!(!line.contains('\u{1b}'), "{line:?}");
    let root = tempfile::tempdir().unwrap();
    let bytes = archive::docker_archive(evil, "amd64", &[layer(&[])]);
    let out = load(root.path(), &bytes);
    assert!(!String::from_utf8_lossy(&out.stderr).contains('\u{1b}'));
    assert_eq!(stored(root.path()), Vec::<PathBuf>::new());
}
