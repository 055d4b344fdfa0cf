//! Image archives for tests, made by hand so that they can be wrong.

use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::json;
use sha2::{Digest, Sha256};
use std::io::Write;
use std::path::Path;
use tar::{EntryType, Header};

/// An attribute with a newline in it, which `bin/exact` has.
pub const NOTE: &[u8] = b"two\nlines";
/// A file capability (vfs_cap_data, version 2: CAP_NET_RAW), which it has too.
pub const CAPABILITY: &[u8] = &[
    1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
];

/// One member of a tar.
#[derive(Clone)]
pub struct Entry {
    path: String,
    link: String,
    kind: EntryType,
    mode: u32,
    owner: (u64, u64),
    device: (u32, u32),
    data: Vec<u8>,
}

impl Entry {
    fn new(kind: EntryType, path: &str) -> Entry {
        Entry {
            path: path.to_owned(),
            link: String::new(),
            kind,
            mode: 0o644,
            owner: (0, 0),
            device: (0, 0),
            data: Vec::new(),
        }
    }

    pub fn file(path: &str, data: &[u8]) -> Entry {
        Entry {
            data: data.to_vec(),
            ..Entry::new(EntryType::Regular, path)
        }
    }

    pub fn directory(path: &str, mode: u32) -> Entry {
        Entry {
            mode,
            ..Entry::new(EntryType::Directory, path)
        }
    }

    pub fn symlink(path: &str, target: &str) -> Entry {
        Entry {
            link: target.to_owned(),
            ..Entry::new(EntryType::Symlink, path)
        }
    }

    pub fn hard_link(path: &str, target: &str) -> Entry {
        Entry {
            link: target.to_owned(),
            ..Entry::new(EntryType::Link, path)
        }
    }

    pub fn character_device(path: &str, major: u32, minor: u32) -> Entry {
        Entry {
            device: (major, minor),
            ..Entry::new(EntryType::Char, path)
        }
    }

    pub fn block_device(path: &str, major: u32, minor: u32) -> Entry {
        Entry {
            device: (major, minor),
            ..Entry::new(EntryType::Block, path)
        }
    }

    pub fn fifo(path: &str) -> Entry {
        Entry::new(EntryType::Fifo, path)
    }

    pub fn mode(self, mode: u32) -> Entry {
        Entry { mode, ..self }
    }

    pub fn owner(self, uid: u64, gid: u64) -> Entry {
        Entry {
            owner: (uid, gid),
            ..self
        }
    }

    pub fn path(&self) -> &str {
        &self.path
    }

    /// The header by its raw fields: the tar crate refuses to write `..`.
    fn header(&self) -> Header {
        let mut header = Header::new_gnu();
        header.set_entry_type(self.kind);
        header.set_mode(self.mode);
        header.set_uid(self.owner.0);
        header.set_gid(self.owner.1);
        header.set_mtime(1_600_000_000);
        header.set_size(self.data.len() as u64);
        header.set_device_major(self.device.0).unwrap();
        header.set_device_minor(self.device.1).unwrap();
        let old = header.as_old_mut();
        let short = self.path.len().min(old.name.len());
        old.name[..short].copy_from_slice(&self.path.as_bytes()[..short]);
        old.linkname[..self.link.len()].copy_from_slice(self.link.as_bytes());
        header.set_cksum();
        header
    }
}

fn long_name(path: &str) -> Vec<u8> {
    let mut header = Header::new_gnu();
    header.set_entry_type(EntryType::GNULongName);
    header.set_size(path.len() as u64 + 1);
    header.set_cksum();
    member(&header, format!("{path}\0").as_bytes())
}

/// pax records with the two attributes.
fn attributes() -> Vec<u8> {
    let mut data = Vec::new();
    for (key, value) in [
        ("SCHILY.xattr.user.note", NOTE),
        ("SCHILY.xattr.security.capability", CAPABILITY),
    ] {
        let rest = key.len() + value.len() + 3;
        let length = (rest..)
            .find(|length| *length == rest + length.to_string().len())
            .unwrap();
        data.extend(format!("{length} {key}=").as_bytes());
        data.extend(value);
        data.push(b'\n');
    }
    let mut header = Header::new_ustar();
    header.set_entry_type(EntryType::XHeader);
    header.set_size(data.len() as u64);
    header.set_cksum();
    member(&header, &data)
}

fn member(header: &Header, data: &[u8]) -> Vec<u8> {
    let mut bytes = header.as_bytes().to_vec();
    bytes.extend(data);
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

pub fn tar(entries: &[Entry]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for entry in entries {
        if entry.path.len() > 99 {
            bytes.extend(long_name(&entry.path));
        }
        if entry.path == "bin/exact" {
            bytes.extend(attributes());
        }
        bytes.extend(member(&entry.header(), &entry.data));
    }
    bytes.resize(bytes.len() + 1024, 0);
    bytes
}

pub fn layer(entries: &[Entry]) -> Vec<u8> {
    tar(entries)
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

pub fn digest(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    format!("sha256:{hex}")
}

fn configuration(architecture: &str, diff_ids: &[String]) -> Vec<u8> {
    let json = json!({
        "architecture": architecture, "os": "linux", "created": "2024-01-02T03:04:05Z",
        "config": { "Cmd": ["sh"], "Entrypoint": null },
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    });
    json.to_string().into_bytes()
}

/// What `docker save` writes, of plain layers.
pub fn docker_archive(tag: &str, architecture: &str, layers: &[Vec<u8>]) -> Vec<u8> {
    let layers: Vec<(String, Vec<u8>)> = layers
        .iter()
        .map(|layer| (digest(layer), layer.clone()))
        .collect();
    docker_archive_of(tag, architecture, &layers)
}

/// The same of layers as they are given, with the diff ids that they claim.
pub fn docker_archive_of(tag: &str, architecture: &str, layers: &[(String, Vec<u8>)]) -> Vec<u8> {
    let diff_ids: Vec<String> = layers.iter().map(|(diff_id, _)| diff_id.clone()).collect();
    let config = configuration(architecture, &diff_ids);
    let config_name = format!("{}.json", digest(&config).trim_start_matches("sha256:"));
    let names: Vec<String> = (0..layers.len())
        .map(|number| format!("{number}/layer.tar"))
        .collect();
    let manifest = json!([{ "Config": config_name, "RepoTags": [tag], "Layers": names }]);
    let mut entries: Vec<Entry> = names
        .iter()
        .zip(layers)
        .map(|(name, (_, bytes))| Entry::file(name, bytes))
        .collect();
    entries.push(Entry::file(&config_name, &config));
    entries.push(Entry::file(
        "manifest.json",
        manifest.to_string().as_bytes(),
    ));
    tar(&entries)
}

/// An OCI layout in `folder`: an index of an index of two platforms.
pub fn oci_directory(folder: &Path, name: &str, layers: &[(String, Vec<u8>)]) {
    let blobs = folder.join("blobs/sha256");
    std::fs::create_dir_all(&blobs).unwrap();
    let blob = |media_type: &str, bytes: &[u8]| {
        let digest = digest(bytes);
        std::fs::write(blobs.join(digest.trim_start_matches("sha256:")), bytes).unwrap();
        json!({ "mediaType": format!("application/vnd.oci.image.{media_type}"), "digest": digest, "size": bytes.len() })
    };
    let diff_ids: Vec<String> = layers.iter().map(|(diff_id, _)| diff_id.clone()).collect();
    let config = blob("config.v1+json", &configuration("amd64", &diff_ids));
    let layers: Vec<_> = layers
        .iter()
        .map(|(_, bytes)| blob("layer.v1.tar+gzip", bytes))
        .collect();
    let manifest = json!({ "schemaVersion": 2, "config": config, "layers": layers });
    let mut manifest = blob("manifest.v1+json", manifest.to_string().as_bytes());
    manifest["platform"] = json!({ "os": "linux", "architecture": "amd64" });
    // The other platform's blobs are left out, as a sparse copy has it.
    let elsewhere = json!({
        "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest(b"elsewhere"), "size": 9,
        "platform": { "os": "linux", "architecture": "arm64", "variant": "v8" },
    });
    let index = json!({ "schemaVersion": 2, "manifests": [elsewhere, manifest] });
    let mut index = blob("index.v1+json", index.to_string().as_bytes());
    index["annotations"] = json!({ "org.opencontainers.image.ref.name": name });
    let top = json!({ "schemaVersion": 2, "manifests": [index] });
    std::fs::write(folder.join("index.json"), top.to_string()).unwrap();
    std::fs::write(
        folder.join("oci-layout"),
        r#"{"imageLayoutVersion":"1.0.0"}"#,
    )
    .unwrap();
}
