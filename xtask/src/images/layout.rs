//! Image archives around finished layers.

use anyhow::{Context, Result};
use flate2::GzBuilder;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use tar::{Builder, EntryType, Header};

/// How a layer is compressed.
pub enum Compression {
    /// gzip.
    Gzip,
    /// zstd.
    Zstd,
}

/// How the image's containers start.
pub struct Config<'a> {
    /// `NAME=VALUE`.
    pub env: &'a [&'a str],
    /// What every command is given to.
    pub entrypoint: &'a [&'a str],
    /// The command.
    pub cmd: &'a [&'a str],
    /// Where it starts; empty for `/`.
    pub working_dir: &'a str,
    /// What asks it to stop; empty for SIGTERM.
    pub stop_signal: &'a str,
    /// `PORT/PROTOCOL`.
    pub exposed_ports: &'a [&'a str],
    /// Directories.
    pub volumes: &'a [&'a str],
}

impl Config<'_> {
    /// One that says nothing.
    pub const EMPTY: Config<'static> = Config {
        env: &[],
        entrypoint: &[],
        cmd: &[],
        working_dir: "",
        stop_signal: "",
        exposed_ports: &[],
        volumes: &[],
    };

    /// As images have it: what is not said is left out.
    fn json(&self) -> Value {
        let set =
            |names: &[&str]| -> Value { names.iter().map(|name| (*name, json!({}))).collect() };
        let mut all = json!({ "Env": self.env, "Cmd": self.cmd });
        for (key, value, said) in [
            (
                "Entrypoint",
                json!(self.entrypoint),
                !self.entrypoint.is_empty(),
            ),
            (
                "WorkingDir",
                json!(self.working_dir),
                !self.working_dir.is_empty(),
            ),
            (
                "StopSignal",
                json!(self.stop_signal),
                !self.stop_signal.is_empty(),
            ),
            (
                "ExposedPorts",
                set(self.exposed_ports),
                !self.exposed_ports.is_empty(),
            ),
            ("Volumes", set(self.volumes), !self.volumes.is_empty()),
        ] {
            if said {
                all[key] = value;
            }
        }
        all
    }
}

/// When the images say they were made: fixed, so that the bytes are.
const CREATED: &str = "2023-11-14T22:13:20Z";

/// Writes what `docker save` writes, for one image of one layer.
pub fn write_docker_archive(
    target: &Path,
    name: &str,
    config: &Config<'_>,
    layer: Vec<u8>,
) -> Result<()> {
    let config = configuration(config, &[digest(&layer)]);
    let id = hex(&config);
    let layer_member = format!("{}/layer.tar", hex(&layer));
    let config_member = format!("{id}.json");
    let manifest =
        json!([{ "Config": config_member, "RepoTags": [name], "Layers": [layer_member] }]);
    let mut out = Output::create(target)?;
    out.member(&layer_member, &layer)?;
    out.member(&config_member, &config)?;
    out.member("manifest.json", manifest.to_string().as_bytes())?;
    out.finish()
}

/// Writes an OCI image layout as a tar, for one image.
pub fn write_oci(
    target: &Path,
    name: &str,
    config: &Config<'_>,
    layers: Vec<(Vec<u8>, Compression)>,
) -> Result<()> {
    let mut out = Output::create(target)?;
    let diff_ids: Vec<String> = layers.iter().map(|(layer, _)| digest(layer)).collect();
    let mut described = Vec::new();
    for (layer, compression) in layers {
        let (blob, suffix) = match compression {
            Compression::Gzip => (gzip(&layer)?, "gzip"),
            Compression::Zstd => (zstd::encode_all(layer.as_slice(), 3)?, "zstd"),
        };
        described.push(out.blob(
            &format!("application/vnd.oci.image.layer.v1.tar+{suffix}"),
            &blob,
        )?);
    }
    let config = out.blob(
        "application/vnd.oci.image.config.v1+json",
        &configuration(config, &diff_ids),
    )?;
    const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
    let manifest =
        json!({ "schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": described });
    let mut manifest = out.blob(MANIFEST, manifest.to_string().as_bytes())?;
    manifest["platform"] = json!({ "architecture": "amd64", "os": "linux" });
    manifest["annotations"] = json!({ "org.opencontainers.image.ref.name": name });
    let index = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [manifest],
    });
    out.member("index.json", index.to_string().as_bytes())?;
    out.member(
        "oci-layout",
        json!({ "imageLayoutVersion": "1.0.0" })
            .to_string()
            .as_bytes(),
    )?;
    out.finish()
}

fn configuration(config: &Config<'_>, diff_ids: &[String]) -> Vec<u8> {
    let json = json!({
        "architecture": "amd64",
        "os": "linux",
        "created": CREATED,
        "config": config.json(),
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    });
    json.to_string().into_bytes()
}

fn gzip(bytes: &[u8]) -> Result<Vec<u8>> {
    let mut out = GzBuilder::new()
        .mtime(0)
        .write(Vec::new(), flate2::Compression::fast());
    out.write_all(bytes)?;
    Ok(out.finish()?)
}

fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", hex(bytes))
}

/// An archive in the making.
struct Output {
    tar: Builder<BufWriter<File>>,
}

impl Output {
    fn create(target: &Path) -> Result<Output> {
        let file =
            File::create(target).with_context(|| format!("cannot write {}", target.display()))?;
        Ok(Output {
            tar: Builder::new(BufWriter::new(file)),
        })
    }

    fn member(&mut self, name: &str, content: &[u8]) -> Result<()> {
        let mut header = Header::new_gnu();
        header.set_entry_type(EntryType::Regular);
        header.set_mode(0o644);
        header.set_size(content.len() as u64);
        header.set_mtime(0);
        self.tar.append_data(&mut header, name, content)?;
        Ok(())
    }

    /// Adds a blob and returns its descriptor.
    fn blob(&mut self, media_type: &str, content: &[u8]) -> Result<Value> {
        self.member(&format!("blobs/sha256/{}", hex(content)), content)?;
        Ok(json!({ "mediaType": media_type, "digest": digest(content), "size": content.len() }))
    }

    fn finish(self) -> Result<()> {
        self.tar.into_inner()?.flush()?;
        Ok(())
    }
}
