//! Registries that lie: each is refused in one line, and nothing is left behind.

use super::archive::tar;
use super::http::{Answer, Content, Http};
use super::{Entry, assert_nothing_left, digest, files, good, gzip, inspect, layer, line, vm_run};
use serde_json::{Value, json};

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

fn described(content: &mut Content, media_type: &str, bytes: &[u8]) -> Value {
    let digest = content.add(bytes);
    json!({ "mediaType": media_type, "digest": digest, "size": bytes.len() })
}

fn configuration(architecture: &str, diff_ids: &[String]) -> Vec<u8> {
    let configuration = json!({
        "architecture": architecture, "os": "linux",
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    });
    configuration.to_string().into_bytes()
}

/// Adds an image of these layers, gzip'ed; returns its manifest.
fn image(content: &mut Content, architecture: &str, layers: &[Vec<u8>]) -> Value {
    let diff_ids: Vec<String> = layers.iter().map(|layer| digest(layer)).collect();
    let config = configuration(architecture, &diff_ids);
    let config = described(content, CONFIG, &config);
    let layers: Vec<Value> = layers
        .iter()
        .map(|layer| described(content, LAYER, &gzip(layer)))
        .collect();
    json!({ "schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers })
}

fn bytes(json: &Value) -> Vec<u8> {
    json.to_string().into_bytes()
}

fn serve(content: Content) -> Http {
    Http::serve(move |request| content.answer(request))
}

/// Pulls the tag `1` of what must be refused.
fn refused(registry: &Http) -> String {
    let root = tempfile::tempdir().unwrap();
    let out = vm_run(root.path(), &["pull", &format!("{}/x:1", registry.address)]);
    let line = line(&out);
    assert_nothing_left(root.path());
    line
}

fn one_file() -> Vec<Vec<u8>> {
    vec![layer(&[Entry::file("f", b"x")])]
}

#[test]
fn of_many_platforms_this_one_is_chosen() {
    let mut content = Content::default();
    let mut entries = Vec::new();
    for (os, architecture) in [("windows", "amd64"), ("linux", "arm64"), ("linux", "amd64")] {
        let layers = [layer(&[Entry::file(architecture, os.as_bytes())])];
        let manifest = bytes(&image(&mut content, architecture, &layers));
        let mut entry = described(&mut content, MANIFEST, &manifest);
        entry["platform"] = json!({ "os": os, "architecture": architecture });
        entries.push(entry);
    }
    // buildkit's attestation, which has no layers that could be one.
    let mut attestation = entries[0].clone();
    attestation["platform"] = json!({ "os": "unknown", "architecture": "unknown" });
    attestation["annotations"] = json!({ "vnd.docker.reference.type": "attestation-manifest" });
    entries.insert(0, attestation);
    let index =
        |entries: &[Value]| json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": entries });
    let inner = described(&mut content, INDEX, &bytes(&index(&entries)));
    let outer = bytes(&index(&[inner]));
    content.tag("1", &outer);
    content.tag("elsewhere", &bytes(&index(&entries[..3])));
    let registry = serve(content);
    let root = tempfile::tempdir().unwrap();
    let name = format!("{}/x:1", registry.address);
    good(root.path(), &["pull", &name]);
    let pulled = inspect(root.path(), &name);
    let at = format!("{}/x@{}", registry.address, digest(&outer));
    assert_eq!(pulled["RepoDigests"], json!([at]));
    assert_eq!(pulled["Descriptor"]["digest"], entries[3]["digest"]);
    let blobs = registry.paths();
    assert_eq!(blobs.iter().filter(|p| p.contains("/blobs/")).count(), 2);
    let root = tempfile::tempdir().unwrap();
    let name = format!("{}/x:elsewhere", registry.address);
    let line = line(&vm_run(root.path(), &["pull", &name]));
    assert!(line.contains("is for linux/arm64, windows/amd64"), "{line}");
    assert_nothing_left(root.path());
}

#[test]
fn a_shared_layer_is_fetched_once() {
    let mut content = Content::default();
    let base = layer(&[Entry::file("base", b"1")]);
    let upper = layer(&[Entry::file("upper", b"2")]);
    let small = image(&mut content, "amd64", std::slice::from_ref(&base));
    let large = image(&mut content, "amd64", &[base.clone(), upper, base.clone()]);
    content.tag("small", &bytes(&small));
    content.tag("large", &bytes(&large));
    let registry = serve(content);
    let root = tempfile::tempdir().unwrap();
    for tag in ["small", "large"] {
        good(
            root.path(),
            &["pull", &format!("{}/x:{tag}", registry.address)],
        );
    }
    let path = format!("/v2/x/blobs/{}", digest(&gzip(&base)));
    let asked = registry.paths();
    assert_eq!(asked.iter().filter(|asked| **asked == path).count(), 1);
    assert_eq!(files(root.path(), "rootfs").len(), 2);
}

#[test]
fn wrong_digests_are_refused_wherever_they_are() {
    let honest = |content: &mut Content| image(content, "amd64", &one_file());
    for (part, said) in [
        ("config", "the image's configuration: the digest should be"),
        ("layers", "layer sha256:"),
    ] {
        let mut content = Content::default();
        let manifest = honest(&mut content);
        let target = match part {
            "config" => &manifest["config"],
            _ => &manifest["layers"][0],
        };
        let length = target["size"].as_u64().unwrap() as usize;
        content.lie(target["digest"].as_str().unwrap(), &vec![b'x'; length]);
        content.tag("1", &bytes(&manifest));
        let line = refused(&serve(content));
        assert!(
            line.contains(said) && line.contains("the digest should be"),
            "{line}"
        );
    }
    // A manifest, by the digest that the user gave.
    let mut content = Content::default();
    let manifest = bytes(&honest(&mut content));
    let wanted = digest(b"another");
    content.lie(&wanted, &manifest);
    let registry = serve(content);
    let root = tempfile::tempdir().unwrap();
    let name = format!("{}/x@{wanted}", registry.address);
    let said = line(&vm_run(root.path(), &["pull", &name]));
    assert!(
        said.contains("the manifest: the digest should be"),
        "{said}"
    );
    assert_nothing_left(root.path());
    // A layer that is no tar of the configuration's.
    let mut content = Content::default();
    let mut manifest = honest(&mut content);
    let other = gzip(&layer(&[Entry::file("f", b"other")]));
    manifest["layers"][0] = described(&mut content, LAYER, &other);
    content.tag("1", &bytes(&manifest));
    let said = refused(&serve(content));
    assert!(said.contains("layer: the digest should be"), "{said}");
}

#[test]
fn sizes_are_held_to() {
    // Longer than the manifest says.
    let mut content = Content::default();
    let mut manifest = image(&mut content, "amd64", &one_file());
    manifest["layers"][0]["size"] = json!(10);
    content.tag("1", &bytes(&manifest));
    assert!(refused(&serve(content)).contains("is longer than the 10 bytes"));
    let mut content = Content::default();
    let mut manifest = image(&mut content, "amd64", &one_file());
    manifest["config"]["size"] = json!(10);
    content.tag("1", &bytes(&manifest));
    assert!(refused(&serve(content)).contains("the configuration is longer"));
    // More than fits.
    for (part, size) in [("config", 5_u64 << 20), ("layer", 65 << 30)] {
        let mut content = Content::default();
        let mut manifest = image(&mut content, "amd64", &one_file());
        match part {
            "config" => manifest["config"]["size"] = json!(size),
            _ => manifest["layers"][0]["size"] = json!(size),
        }
        content.tag("1", &bytes(&manifest));
        assert!(refused(&serve(content)).contains("more than"), "{part}");
    }
    // Ten thousand layers: refused by the manifest, and none fetched.
    let mut content = Content::default();
    let mut manifest = image(&mut content, "amd64", &one_file());
    let one = manifest["layers"][0].clone();
    manifest["layers"] = vec![one; 10_000].into();
    content.tag("1", &bytes(&manifest));
    let registry = serve(content);
    assert!(refused(&registry).contains("10000 layers, and 127 is the most"));
    assert!(!registry.paths().iter().any(|path| path.contains("/blobs/")));
}

#[test]
fn an_endless_manifest_is_cut_off() {
    let registry = Http::serve(|request| Answer {
        status: 200,
        body: vec![b' '; 64 << 10],
        endless: request.path != "/v2/",
        ..Answer::default()
    });
    assert!(refused(&registry).contains("the manifest has more than 4194304 bytes"));
}

#[test]
fn documents_that_are_none_are_refused() {
    let mut content = Content::default();
    let manifest = image(&mut content, "amd64", &one_file());
    let mut both = manifest.clone();
    both["manifests"] = json!([]);
    let cases = [
        (b"<html>".to_vec(), "an image manifest: expected value"),
        (b"{}".to_vec(), "neither manifest nor index"),
        (bytes(&both), "manifest and index at once"),
        (
            bytes(&json!({ "schemaVersion": 1, "fsLayers": [] })),
            "schema 1",
        ),
        (
            bytes(&json!({ "schemaVersion": 2, "manifests": [] })),
            "its index names no image",
        ),
    ];
    for (document, said) in cases {
        let mut content = content.clone();
        content.tag("1", &document);
        let line = refused(&serve(content));
        assert!(line.contains(said), "{line}");
    }
    // An index that leads to itself cannot be made; one that leads deep can.
    let mut inner = bytes(&manifest);
    content.add(&inner);
    for _ in 0..6 {
        let entry = described(&mut content, INDEX, &inner);
        inner = bytes(&json!({ "schemaVersion": 2, "manifests": [entry] }));
    }
    content.tag("1", &inner);
    assert!(refused(&serve(content)).contains("too deep"));
}

#[test]
fn evil_layers_are_refused_after_the_network_too() {
    let cases = [
        (vec![Entry::file("../x", b"")], "../x"),
        (
            vec![Entry::symlink("s", "s"), Entry::file("s/x", b"")],
            "too many symbolic links",
        ),
        (
            vec![Entry::hard_link("h", "/etc/passwd")],
            "not in the image",
        ),
    ];
    for (entries, said) in cases {
        let mut content = Content::default();
        let manifest = image(&mut content, "amd64", &[tar(&entries)]);
        content.tag("1", &bytes(&manifest));
        let line = refused(&serve(content));
        assert!(line.contains(said), "{line}");
    }
    let mut content = Content::default();
    let whole = one_file();
    let cut = gzip(&whole[0]);
    let cut = &cut[..cut.len() / 2];
    let config = configuration("amd64", &[digest(&whole[0])]);
    let manifest = json!({
        "schemaVersion": 2,
        "config": described(&mut content, CONFIG, &config),
        "layers": [described(&mut content, LAYER, cut)],
    });
    content.tag("1", &bytes(&manifest));
    let line = refused(&serve(content));
    assert!(line.contains("damaged or cut"), "{line}");
}
