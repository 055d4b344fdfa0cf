//! The JSON documents of an image: which images an archive holds, what their layers
//! are, and how their containers start.

use super::archive::{Archive, Opened};
use super::digest::{Hasher, hex};
use super::error::{ImageError, Result, printable};
use super::limits::Limits;
use super::name::Name;
use oci_spec::image::{Arch, Descriptor, ImageIndex, ImageManifest, Os};
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Full image names in an OCI index (containerd, docker save since 25).
const ANNOTATION_IMAGE_NAME: &str = "io.containerd.image.name";
/// A full name or only a tag, by the image specification.
const ANNOTATION_REF_NAME: &str = "org.opencontainers.image.ref.name";
/// Marks buildkit's attestations, which are no images.
const ANNOTATION_REFERENCE_TYPE: &str = "vnd.docker.reference.type";
/// Indexes inside indexes.
pub const DEEPEST_INDEX: usize = 4;

/// How a container of an image starts, unless its user says otherwise.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ImageConfig {
    /// The program and its first arguments.
    #[serde(rename = "Entrypoint", deserialize_with = "or_default")]
    pub entrypoint: Vec<String>,
    /// What follows the entrypoint; a user's command takes its place.
    #[serde(rename = "Cmd", deserialize_with = "or_default")]
    pub cmd: Vec<String>,
    /// `NAME=VALUE`.
    #[serde(rename = "Env", deserialize_with = "or_default")]
    pub env: Vec<String>,
    /// The directory to start in; empty for `/`.
    #[serde(rename = "WorkingDir", deserialize_with = "or_default")]
    pub working_dir: String,
    /// `USER[:GROUP]`, each a name or a number; empty for root.
    #[serde(rename = "User", deserialize_with = "or_default")]
    pub user: String,
    /// The signal that asks it to stop, by name or number; empty for SIGTERM.
    #[serde(rename = "StopSignal", deserialize_with = "or_default")]
    pub stop_signal: String,
    /// Free-form.
    #[serde(rename = "Labels", deserialize_with = "or_default")]
    pub labels: BTreeMap<String, String>,
    /// How its containers are asked whether they are well.
    #[serde(rename = "Healthcheck", skip_serializing_if = "Option::is_none")]
    pub health: Option<ImageHealth>,
    /// The shell of its commands that are one line; empty for `/bin/sh -c`.
    #[serde(rename = "Shell", deserialize_with = "or_default")]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub shell: Vec<String>,
    /// Ports that its programs listen on, `PORT/PROTOCOL` each; what they are mapped to
    /// is always an empty object.
    #[serde(rename = "ExposedPorts", deserialize_with = "or_default")]
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub exposed_ports: BTreeMap<String, serde_json::Value>,
    /// Where it wants volumes: the names count.
    #[serde(
        rename = "Volumes",
        deserialize_with = "or_default",
        skip_serializing_if = "BTreeMap::is_empty"
    )]
    pub volumes: BTreeMap<String, serde_json::Value>,
}

/// Docker's health check of an image; times in nanoseconds, zero for what is not said.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct ImageHealth {
    /// Nothing, `NONE`, `CMD` and a command line, or `CMD-SHELL` and a line.
    #[serde(deserialize_with = "or_default")]
    pub test: Vec<String>,
    /// From one to the next.
    pub interval: u64,
    /// For one.
    pub timeout: u64,
    /// In which a failure does not count.
    pub start_period: u64,
    /// From one to the next in that time.
    pub start_interval: u64,
    /// So many failures in a row.
    pub retries: u32,
}

/// An image's configuration: what of it decides anything here.
#[derive(Clone, Debug, Deserialize)]
pub struct Configuration {
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    os: String,
    /// When the image was made, RFC 3339.
    #[serde(default)]
    pub created: Option<String>,
    /// How its containers start.
    #[serde(default, deserialize_with = "or_default")]
    pub config: ImageConfig,
    rootfs: RootFs,
}

#[derive(Clone, Debug, Deserialize)]
struct RootFs {
    #[serde(default, deserialize_with = "or_default")]
    diff_ids: Vec<String>,
}

/// docker writes `null` where it means nothing.
fn or_default<'de, D, T>(deserializer: D) -> std::result::Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Deserialize<'de> + Default,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

impl Configuration {
    /// Reads a configuration and checks that it can run here.
    ///
    /// # Errors
    /// [`ImageError::Platform`] for another processor or system,
    /// [`ImageError::Archive`] and [`ImageError::Limit`] for one that is malformed.
    pub fn parse(bytes: &[u8], limits: &Limits) -> Result<Configuration> {
        let configuration: Configuration = parse("the image's configuration", bytes)?;
        if configuration.architecture != "amd64" || configuration.os != "linux" {
            let part = |text: &str| match text {
                "" => "unknown".to_owned(),
                text => text.chars().take(40).flat_map(char::escape_debug).collect(),
            };
            let platform = format!(
                "{}/{}",
                part(&configuration.os),
                part(&configuration.architecture)
            );
            return Err(ImageError::Platform(platform));
        }
        let count = configuration.rootfs.diff_ids.len();
        if count > limits.layers {
            return Err(ImageError::Limit(format!(
                "the image has {count} layers, and {} is the most",
                limits.layers
            )));
        }
        for diff_id in configuration.diff_ids() {
            hex(diff_id)?;
        }
        Ok(configuration)
    }

    /// Checks that there is a blob for each layer.
    ///
    /// # Errors
    /// [`ImageError::Archive`] when there are more or fewer.
    pub fn check_layers(&self, given: usize) -> Result<()> {
        let named = self.diff_ids().len();
        if named != given {
            return Err(ImageError::Archive(format!(
                "its configuration names {named} layers, and {given} are given"
            )));
        }
        Ok(())
    }

    /// The digests of the layers' uncompressed tars, from the bottom.
    pub fn diff_ids(&self) -> &[String] {
        &self.rootfs.diff_ids
    }

    /// The name of this stack of layers (image-spec, config.md, "Layer ChainID").
    pub fn chain_id(&self) -> String {
        let mut layers = self.diff_ids().iter();
        let Some(first) = layers.next() else {
            return Hasher::digest(b"");
        };
        layers.fold(first.clone(), |chain, layer| {
            Hasher::digest(format!("{chain} {layer}").as_bytes())
        })
    }
}

/// One image of an archive.
pub struct Found {
    /// Names that the archive gives it.
    pub names: Vec<Name>,
    /// Its manifest's bytes; `None` in a docker archive, which has none.
    pub manifest: Option<Vec<u8>>,
    /// Its configuration's bytes, their digest checked.
    pub config: Vec<u8>,
    /// Its layers, from the bottom.
    pub layers: Vec<FoundLayer>,
}

/// A layer's place in the archive.
pub struct FoundLayer {
    member: String,
    /// The blob's digest, where the archive declares one.
    pub digest: Option<String>,
}

impl FoundLayer {
    /// Opens the blob.
    ///
    /// # Errors
    /// [`ImageError::Archive`] when it is not in the archive.
    pub fn open(&self, archive: &Archive) -> Result<Opened> {
        archive
            .member(&self.member)?
            .ok_or_else(|| missing(&self.member))
    }
}

/// An entry of a docker archive's manifest.json.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerImage {
    config: String,
    #[serde(default, deserialize_with = "or_default")]
    repo_tags: Vec<String>,
    #[serde(default, deserialize_with = "or_default")]
    layers: Vec<String>,
}

/// The images of an archive that can run here.
///
/// # Errors
/// [`ImageError`] when there is none, or a document is missing or malformed.
pub fn find(archive: &Archive, limits: &Limits) -> Result<Vec<Found>> {
    let docker = archive.document("manifest.json", limits.json)?;
    let docker: Vec<DockerImage> =
        docker.map_or(Ok(Vec::new()), |bytes| parse("manifest.json", &bytes))?;
    let index = archive.document("index.json", limits.json)?;
    if docker.len() > limits.images {
        return Err(ImageError::Limit(format!(
            "the archive has more than {} images",
            limits.images
        )));
    }
    match index {
        // docker 25 writes both; the OCI one has the true manifests.
        Some(bytes) => find_oci(archive, &bytes, &docker, limits),
        None if docker.is_empty() => Err(ImageError::Archive(
            "it has neither a manifest.json (docker save) nor an index.json (OCI layout)"
                .to_owned(),
        )),
        None => docker
            .iter()
            .map(|image| find_docker(archive, image, limits))
            .collect(),
    }
}

fn find_docker(archive: &Archive, image: &DockerImage, limits: &Limits) -> Result<Found> {
    if image.layers.len() > limits.layers {
        return Err(ImageError::Limit(format!(
            "the image has {} layers, and {} is the most",
            image.layers.len(),
            limits.layers
        )));
    }
    let config = archive
        .document(&image.config, limits.json)?
        .ok_or_else(|| missing(&image.config))?;
    let layers = image
        .layers
        .iter()
        .map(|member| FoundLayer {
            member: member.clone(),
            digest: None,
        })
        .collect();
    // The configuration's file is named by its digest: `HEX.json` or `blobs/sha256/HEX`.
    let stem = image.config.rsplit('/').next().unwrap_or_default();
    let declared = format!("sha256:{}", stem.trim_end_matches(".json"));
    if hex(&declared).is_ok() {
        Hasher::check(
            "the image's configuration",
            &declared,
            &Hasher::digest(&config),
        )?;
    }
    Ok(Found {
        names: names(&image.repo_tags)?,
        manifest: None,
        config,
        layers,
    })
}

fn find_oci(
    archive: &Archive,
    index: &[u8],
    docker: &[DockerImage],
    limits: &Limits,
) -> Result<Vec<Found>> {
    let index: ImageIndex = parse("index.json", index)?;
    let mut found: Vec<Found> = Vec::new();
    let mut elsewhere = None;
    if index.manifests().len() > limits.images {
        return Err(ImageError::Limit(format!(
            "the archive has more than {} images",
            limits.images
        )));
    }
    for descriptor in index.manifests() {
        let manifest = match choose(archive, descriptor, limits, DEEPEST_INDEX) {
            Ok(Some(manifest)) => manifest,
            Ok(None) => continue,
            Err(ImageError::Platform(platform)) => {
                elsewhere = Some(platform);
                continue;
            }
            Err(error) => return Err(error),
        };
        let mut image = match manifest_to_found(archive, manifest, limits) {
            Err(ImageError::Platform(platform)) => {
                elsewhere = Some(platform);
                continue;
            }
            other => other?,
        };
        image.names = oci_names(descriptor)?;
        if image.names.is_empty() {
            let config = Hasher::digest(&image.config);
            let same =
                |image: &&DockerImage| hex(&config).is_ok_and(|hex| image.config.contains(hex));
            image.names = names(
                docker
                    .iter()
                    .find(same)
                    .map_or(&[], |image| image.repo_tags.as_slice()),
            )?;
        }
        match found
            .iter_mut()
            .find(|other| other.manifest == image.manifest)
        {
            Some(other) => other.names.append(&mut image.names),
            None => found.push(image),
        }
    }
    match (found.is_empty(), elsewhere) {
        (false, _) => Ok(found),
        (true, Some(platform)) => Err(ImageError::Platform(platform)),
        (true, None) => Err(ImageError::Archive(
            "its index.json names no image".to_owned(),
        )),
    }
}

/// A document that a reference can lead to.
pub enum Document {
    /// One image.
    Manifest(Box<ImageManifest>),
    /// Images, as a rule one for each platform.
    Index(Box<ImageIndex>),
}

impl Document {
    /// Reads a document by its content alone.
    ///
    /// # Errors
    /// [`ImageError::Archive`] for anything else, and for one that could be read as
    /// either: two programs would see two images under one digest (CVE-2021-41190).
    pub fn parse(bytes: &[u8]) -> Result<Document> {
        #[derive(Deserialize)]
        struct Shape {
            manifests: Option<IgnoredAny>,
            layers: Option<IgnoredAny>,
            #[serde(rename = "fsLayers")]
            old_layers: Option<IgnoredAny>,
        }
        let shape: Shape = parse("an image manifest", bytes)?;
        let unusable = |reason: &str| Err(ImageError::Archive(reason.to_owned()));
        match (shape.manifests, shape.layers, shape.old_layers) {
            (Some(_), None, None) => parse("an image index", bytes).map(Document::Index),
            (None, Some(_), None) => parse("an image manifest", bytes).map(Document::Manifest),
            (None, None, Some(_)) => unusable("its manifest is of docker's schema 1 of 2014"),
            (None, None, None) => unusable("a document that is neither manifest nor index"),
            _ => unusable("a document that is manifest and index at once"),
        }
    }
}

/// Whether a descriptor of an index is of an image.
///
/// # Errors
/// [`ImageError::Platform`] when it is of one that cannot run here.
pub fn leads_here(descriptor: &Descriptor) -> Result<bool> {
    if annotation(descriptor, ANNOTATION_REFERENCE_TYPE).is_some() {
        return Ok(false);
    }
    match descriptor.platform() {
        Some(platform)
            if *platform.os() != Os::Linux || *platform.architecture() != Arch::Amd64 =>
        {
            let named = format!("{}/{}", platform.os(), platform.architecture());
            Err(ImageError::Platform(printable(named.as_bytes())))
        }
        _ => Ok(true),
    }
}

/// Holds a manifest against the bounds, before anything that it names is read.
///
/// # Errors
/// [`ImageError::Limit`].
pub fn check_manifest(manifest: &ImageManifest, limits: &Limits) -> Result<()> {
    let count = manifest.layers().len();
    if count > limits.layers {
        return Err(ImageError::Limit(format!(
            "the image has {count} layers, and {} is the most",
            limits.layers
        )));
    }
    let sizes = manifest.layers().iter().map(Descriptor::size);
    let total = sizes.fold(0, u64::saturating_add);
    // No layer grows by compression, but for its header.
    limits.check_unpacked(u64::MAX, total)
}

/// The manifest that a descriptor leads to, through indexes to linux/amd64; `None`
/// for what is no image.
fn choose(
    archive: &Archive,
    descriptor: &Descriptor,
    limits: &Limits,
    depth: usize,
) -> Result<Option<Vec<u8>>> {
    if !leads_here(descriptor)? {
        return Ok(None);
    }
    let bytes = blob(archive, descriptor, limits)?;
    let index = match Document::parse(&bytes)? {
        Document::Manifest(_) => return Ok(Some(bytes)),
        Document::Index(index) => index,
    };
    if depth == 0 {
        return Err(ImageError::Limit(
            "an image index too deep in others".to_owned(),
        ));
    }
    let mut platforms = Vec::new();
    for inner in index.manifests() {
        match choose(archive, inner, limits, depth - 1) {
            Ok(Some(manifest)) => return Ok(Some(manifest)),
            Ok(None) => {}
            Err(ImageError::Platform(platform)) => platforms.push(platform),
            Err(error) => return Err(error),
        }
    }
    platforms.truncate(8);
    Err(ImageError::Platform(platforms.join(", ")))
}

fn manifest_to_found(archive: &Archive, bytes: Vec<u8>, limits: &Limits) -> Result<Found> {
    let manifest: ImageManifest = parse("an image manifest", &bytes)?;
    check_manifest(&manifest, limits)?;
    let config = blob(archive, manifest.config(), limits)?;
    // Refuse another platform before looking at the layers, which may not be there.
    Configuration::parse(&config, limits)?;
    let layers = manifest
        .layers()
        .iter()
        .map(|layer| {
            let digest = layer.digest().to_string();
            Ok(FoundLayer {
                member: format!("blobs/sha256/{}", hex(&digest)?),
                digest: Some(digest),
            })
        })
        .collect::<Result<_>>()?;
    Ok(Found {
        names: Vec::new(),
        manifest: Some(bytes),
        config,
        layers,
    })
}

/// A document of an OCI layout, its digest and size checked.
fn blob(archive: &Archive, descriptor: &Descriptor, limits: &Limits) -> Result<Vec<u8>> {
    let digest = descriptor.digest().to_string();
    let member = format!("blobs/sha256/{}", hex(&digest)?);
    let bytes = archive
        .document(&member, limits.json)?
        .ok_or_else(|| missing(&member))?;
    Hasher::check(&member, &digest, &Hasher::digest(&bytes))?;
    if bytes.len() as u64 != descriptor.size() {
        return Err(ImageError::Archive(format!(
            "{member} has another size than its descriptor says"
        )));
    }
    Ok(bytes)
}

fn annotation<'a>(descriptor: &'a Descriptor, key: &str) -> Option<&'a str> {
    descriptor
        .annotations()
        .as_ref()?
        .get(key)
        .map(String::as_str)
}

/// A descriptor's names. A bare tag names no repository and so no image.
fn oci_names(descriptor: &Descriptor) -> Result<Vec<Name>> {
    let name = annotation(descriptor, ANNOTATION_IMAGE_NAME).or_else(|| {
        annotation(descriptor, ANNOTATION_REF_NAME).filter(|name| name.contains([':', '/']))
    });
    // containerd writes digests there too, of images that have no tag.
    name.filter(|name| !name.contains('@'))
        .map(Name::parse)
        .into_iter()
        .collect()
}

fn names(tags: &[String]) -> Result<Vec<Name>> {
    tags.iter().map(|tag| Name::parse(tag)).collect()
}

fn missing(member: &str) -> ImageError {
    let shown: String = member
        .chars()
        .take(160)
        .flat_map(char::escape_debug)
        .collect();
    ImageError::Archive(format!("{shown} is missing (is it cut off?)"))
}

/// Reads a JSON document that an image brought.
///
/// # Errors
/// [`ImageError::Archive`] with the place of the first mistake.
pub fn parse<'a, T: Deserialize<'a>>(what: &str, bytes: &'a [u8]) -> Result<T> {
    serde_json::from_slice(bytes).map_err(|error| {
        let reason: String = error
            .to_string()
            .chars()
            .take(200)
            .flat_map(char::escape_debug)
            .collect();
        ImageError::Archive(format!("{what}: {reason}"))
    })
}
