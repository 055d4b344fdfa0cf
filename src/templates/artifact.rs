//! A template as an OCI artifact in an image layout (image-spec 1.1): its manifest is the
//! configuration, each of its other files a layer.

use fork::Content;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What the artifact is.
pub const ARTIFACT: &str = "application/vnd.vm-run.template.v1";
/// The template's `manifest.json`.
pub const CONFIG: &str = "application/vnd.vm-run.template.config.v1+json";
/// A manifest of the OCI.
pub const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// An index of the OCI.
pub const INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// The annotation of a layer that has its file's name.
pub const TITLE: &str = "org.opencontainers.image.title";
/// The annotation of a manifest that has the template's name.
pub const REF_NAME: &str = "org.opencontainers.image.ref.name";

/// `index.json`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Index {
    /// 2.
    pub schema_version: u32,
    /// [`INDEX`]; not all write it.
    #[serde(default)]
    pub media_type: String,
    /// What there is.
    pub manifests: Vec<Descriptor>,
}

/// The artifact's manifest.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Document {
    /// 2.
    pub schema_version: u32,
    /// [`MANIFEST`].
    #[serde(default)]
    pub media_type: String,
    /// [`ARTIFACT`] if it is one of ours.
    #[serde(default)]
    pub artifact_type: String,
    /// The template's manifest.
    pub config: Descriptor,
    /// Its other files, in the order of [`fork::Manifest::files`].
    pub layers: Vec<Descriptor>,
}

/// What a document says of a blob.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// What it holds.
    pub media_type: String,
    /// Of a manifest, what it is the manifest of.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub artifact_type: String,
    /// `sha256:` and its digest.
    pub digest: String,
    /// Its length.
    pub size: u64,
    /// Names.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

/// What the blob of a file is called. All are compressed.
pub fn media_type(content: Content) -> &'static str {
    match content {
        Content::State => "application/vnd.vm-run.template.state.v1+zstd",
        Content::Memory => "application/vnd.vm-run.template.memory.v1+zstd",
        Content::Root => "application/vnd.vm-run.template.root.v1+zstd",
        Content::DiskLayer => "application/vnd.vm-run.template.disk.v1+zstd",
        Content::EmptyDisk => "application/vnd.vm-run.template.empty-disk.v1+zstd",
    }
}
