use super::load::Loaded;
use super::*;
use crate::image::archive::Input;
use crate::image::error::ImageError;
use crate::progress::Quiet;
use flate2::write::GzEncoder;
use serde_json::json;

/// A tar of regular files.
fn layer(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, data) in files {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        header.set_size(data.len() as u64);
        builder.append_data(&mut header, name, *data).unwrap();
    }
    builder.into_inner().unwrap()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// A docker-archive of one image, its layers stored as they are given here.
fn archive(tag: &str, layers: &[(Vec<u8>, Vec<u8>)]) -> Vec<u8> {
    let diff_ids: Vec<String> = layers
        .iter()
        .map(|(plain, _)| Hasher::digest(plain))
        .collect();
    let config = json!({
        "architecture": "amd64", "os": "linux", "config": { "Cmd": ["sh"], "Env": null, "User": "app" },
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    })
    .to_string();
    let names: Vec<String> = (0..layers.len())
        .map(|i| format!("{i}/layer.tar"))
        .collect();
    let manifest =
        json!([{ "Config": "config.json", "RepoTags": [tag], "Layers": names }]).to_string();
    let mut members: Vec<(&str, &[u8])> = names
        .iter()
        .zip(layers)
        .map(|(name, (_, stored))| (name.as_str(), stored.as_slice()))
        .collect();
    members.extend([
        ("config.json", config.as_bytes()),
        ("manifest.json", manifest.as_bytes()),
    ]);
    layer(&members)
}

fn plain(files: &[(&str, &[u8])]) -> (Vec<u8>, Vec<u8>) {
    let layer = layer(files);
    (layer.clone(), layer)
}

fn load(store: &Store, mut bytes: &[u8]) -> Result<Vec<Loaded>> {
    store.load(Input::Reader(&mut bytes), &Quiet)
}

/// Every file of the store but its locks and its index.
fn files(root: &Path) -> Vec<PathBuf> {
    FOLDERS
        .map(|folder| root.join("images").join(folder))
        .iter()
        .flat_map(|folder| fs::read_dir(folder).unwrap())
        .map(|entry| entry.unwrap().path())
        .collect()
}

#[test]
fn an_image_is_found_by_name_and_id_and_its_lost_rootfs_made_again() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    let loaded = load(&store, &archive("a:1", &[plain(&[("f", b"x")])])).unwrap();
    assert_eq!(loaded[0].name.as_deref(), Some("a:1"));
    let image = store.resolve("a:1").unwrap();
    assert_eq!(image.id, loaded[0].id);
    assert_eq!(
        (image.config.cmd, image.config.user),
        (vec!["sh".to_owned()], "app".to_owned())
    );
    let before = fs::read(&image.rootfs).unwrap();
    fs::remove_file(&image.rootfs).unwrap();
    let again = store.resolve(&image.id[7..19]).unwrap();
    assert_eq!(
        fs::read(&again.rootfs).unwrap(),
        before,
        "the same layers give the same bytes"
    );
    let error = store.resolve("b").unwrap_err().to_string();
    assert!(error.contains("no such image: b (get it with"), "{error}");
}

#[test]
fn removing_frees_what_no_other_image_uses() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    let shared = plain(&[("f", b"x")]);
    load(&store, &archive("a:1", std::slice::from_ref(&shared))).unwrap();
    let alone = files(root.path()).len();
    load(&store, &archive("b:1", &[shared, plain(&[("g", b"y")])])).unwrap();
    let removed = store.remove("b:1").unwrap();
    assert_eq!(removed.untagged, ["b:1"]);
    assert_eq!(removed.deleted.len(), 1);
    assert_eq!(files(root.path()).len(), alone);
    store.resolve("a:1").unwrap();
    store.remove("a:1").unwrap();
    assert!(files(root.path()).is_empty());
    assert!(matches!(
        store.remove("a:1"),
        Err(ImageError::NoSuchImage(_))
    ));
}

#[test]
fn a_rootfs_in_use_outlives_its_image() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    load(&store, &archive("a:1", &[plain(&[("f", b"x")])])).unwrap();
    let mut open = File::open(store.resolve("a:1").unwrap().rootfs).unwrap();
    store.remove("a:1").unwrap();
    let mut bytes = Vec::new();
    open.read_to_end(&mut bytes).unwrap();
    assert!(bytes.len() as u64 >= 2 * 4096);
}

#[test]
fn compressed_layers_give_the_image_that_plain_ones_give() {
    let (lower, upper) = (
        layer(&[("a", b"1"), ("b", &[7; 9000])]),
        layer(&[(".wh.a", b"")]),
    );
    let root = tempfile::tempdir().unwrap();
    let mut images = Vec::new();
    for (i, form) in [
        |x: &[u8]| x.to_vec(),
        gzip,
        |x: &[u8]| zstd::encode_all(x, 1).unwrap(),
    ]
    .iter()
    .enumerate()
    {
        let store = Store::open(&root.path().join(i.to_string())).unwrap();
        let bytes = archive(
            "a:1",
            &[(lower.clone(), form(&lower)), (upper.clone(), form(&upper))],
        );
        // The archive itself may be compressed too.
        load(&store, &if i == 1 { gzip(&bytes) } else { bytes }).unwrap();
        images.push(fs::read(store.resolve("a:1").unwrap().rootfs).unwrap());
    }
    assert_eq!(images[0], images[1]);
    assert_eq!(images[0], images[2]);
}

#[test]
fn bombs_are_refused_and_leave_nothing() {
    let root = tempfile::tempdir().unwrap();
    let limits = Limits {
        ratio_from: 1 << 20,
        unpacked: 32 << 20,
        ..Limits::default()
    };
    let store = Store::open(root.path()).unwrap().with_limits(limits);
    let zeros = layer(&[("zeros", &vec![0; 8 << 20])]);
    let error = load(&store, &archive("a:1", &[(zeros.clone(), gzip(&zeros))])).unwrap_err();
    assert!(error.to_string().contains("decompression bomb"), "{error}");
    let wide = layer(&[("a", &vec![1; 20 << 20])]);
    let bytes = archive("a:1", &[(wide.clone(), wide.clone()), (wide.clone(), wide)]);
    assert!(matches!(load(&store, &bytes), Err(ImageError::Limit(_))));
    let many = vec![plain(&[("f", b"x")]); 128];
    let error = load(&store, &archive("a:1", &many)).unwrap_err();
    assert!(error.to_string().contains("128 layers"), "{error}");
    assert!(files(root.path()).is_empty());
    assert!(store.list().unwrap().is_empty());
}

#[test]
fn a_directory_is_one_image_until_it_changes() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("etc")).unwrap();
    fs::write(dir.path().join("etc/passwd"), "root").unwrap();
    std::os::unix::fs::symlink("/etc/shadow", dir.path().join("escape")).unwrap();
    fs::hard_link(dir.path().join("etc/passwd"), dir.path().join("hard")).unwrap();
    let first = rootfs_from_dir(&store, dir.path()).unwrap();
    assert_eq!(rootfs_from_dir(&store, dir.path()).unwrap(), first);
    fs::write(dir.path().join("big"), vec![7; 3 * 4096 + 5]).unwrap();
    assert_eq!(
        unpacked_difference(&rootfs_from_dir(&store, dir.path()).unwrap(), dir.path()),
        ""
    );
    fs::write(dir.path().join("etc/passwd"), "toor").unwrap();
    let second = rootfs_from_dir(&store, dir.path()).unwrap();
    assert_ne!(second, first);
    assert!(!first.exists(), "the image of the former state is gone");
    // A load sweeps the store, but these are not its to take.
    load(&store, &archive("a:1", &[plain(&[("f", b"x")])])).unwrap();
    assert!(second.exists());
    assert!(matches!(
        rootfs_from_dir(&store, &dir.path().join("hard")),
        Err(ImageError::Io { .. })
    ));
}

/// What differs between a directory and an image of it that erofs-utils unpacked.
fn unpacked_difference(image: &Path, dir: &Path) -> String {
    let folder = tempfile::tempdir().unwrap();
    let tree = folder.path().join("tree");
    let extract = format!("--extract={}", tree.display());
    let out = std::process::Command::new("fsck.erofs")
        .args([&extract, "--no-preserve-owner"])
        .arg(image)
        .output();
    let out = out.expect("fsck.erofs of Debian's erofs-utils is needed");
    assert!(
        out.status.success(),
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
    let out = std::process::Command::new("diff")
        .args(["-r", "--no-dereference"])
        .args([tree.as_path(), dir])
        .output();
    String::from_utf8(out.unwrap().stdout).unwrap()
}

/// Whatever a byte is changed to, and wherever an archive is cut, a load ends in an
/// image or in an error, never in a panic, and an error leaves nothing.
#[test]
fn mutated_archives_never_panic() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    let lower = layer(&[("etc/passwd", b"root"), ("bin/sh", &[1; 600]), ("d/x", b"")]);
    let upper = layer(&[("d/.wh.x", b""), ("d/.wh..wh..opq", b"")]);
    let base = archive(
        "a:1",
        &[(lower.clone(), lower), (upper.clone(), gzip(&upper))],
    );
    let mut state: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut random = move |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % below as u64) as usize
    };
    let layer_alone = layer(&[("etc/passwd", b"root"), ("d/.wh.x", b"")]);
    let mut refused = 0;
    for _ in 0..400 {
        let mut bytes = base.clone();
        for _ in 0..1 + random(4) {
            let at = random(bytes.len());
            bytes[at] = random(256) as u8;
        }
        if random(4) == 0 {
            bytes.truncate(random(bytes.len()));
        }
        let mut other = layer_alone.clone();
        other[random(layer_alone.len())] = random(256) as u8;
        refused += usize::from(crate::image::fuzz::layer(&other).is_err());
        refused += usize::from(crate::image::fuzz::archive(&bytes).is_err());
        if load(&store, &bytes).is_err() {
            refused += 1;
        }
    }
    assert!(refused > 50, "only {refused} refused");
    for image in store.list().unwrap() {
        store.remove(&image.id).unwrap();
    }
    assert!(files(root.path()).is_empty());
}
