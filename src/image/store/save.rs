//! Images on their way into archives.
//!
//! Blobs go out as they came in, so what docker or another store loads has the
//! digests that it had. A docker-archive is what docker itself writes since version
//! 25: an OCI layout, and a `manifest.json` in which older ones look for the members.
//! Every blob is held against its digest on the way.

use super::Store;
use crate::image::digest::{HashReader, Hasher, hex};
use crate::image::documents::parse;
use crate::image::error::{Context, Result};
use crate::image::index::{Index, Record, sync_directory};
use crate::image::name::Name;
use crate::image::sink::{FolderSink, LAYOUT, Sink, TarSink};
use crate::progress::Progress;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::fs::{self, File, Permissions};
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// What `image save` writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// A tar for `docker load`, which is an OCI layout as well
    #[default]
    DockerArchive,
    /// A tar of an OCI image layout, and nothing else
    OciArchive,
    /// An OCI image layout in a new directory
    OciDir,
}

/// An image to save, and the names that it is saved by.
struct Saved {
    record: Record,
    names: Vec<Name>,
}

impl Store {
    /// Writes images as one tar.
    ///
    /// # Errors
    /// [`ImageError::NoSuchImage`], [`ImageError::Ambiguous`],
    /// [`ImageError::Digest`] for a damaged blob, or the disk's.
    pub fn save_archive(
        &self,
        wanted: &[String],
        format: Format,
        out: &mut dyn Write,
        progress: &dyn Progress,
    ) -> Result<()> {
        let _busy = self.busy()?;
        let images = self.find_saved(wanted)?;
        let mut tar = TarSink::new(out);
        self.write_layout(&images, &mut tar, progress)?;
        if format == Format::DockerArchive {
            let bytes = docker_manifest(&images)?.to_string();
            tar.document("manifest.json", bytes.as_bytes())?;
        }
        tar.finish()
    }

    /// Writes images as an OCI layout in the directory `target`, which must be
    /// missing or empty. On an error it is as it was.
    ///
    /// # Errors
    /// Those of [`Store::save_archive`].
    pub fn save_directory(
        &self,
        wanted: &[String],
        target: &Path,
        progress: &dyn Progress,
    ) -> Result<()> {
        let _busy = self.busy()?;
        let images = self.find_saved(wanted)?;
        let shown = || format!("write {}", target.display());
        let parent = match target.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        };
        let new = tempfile::Builder::new()
            .prefix(".vm-run-save-")
            .permissions(Permissions::from_mode(0o755))
            .tempdir_in(parent)
            .context(shown)?;
        let blobs = new.path().join("blobs/sha256");
        fs::create_dir_all(&blobs).context(shown)?;
        self.write_layout(&images, &mut FolderSink::new(new.path()), progress)?;
        for folder in [&blobs, &new.path().join("blobs"), new.path()] {
            sync_directory(folder)?;
        }
        // A rename takes the place of an empty directory, and of nothing else.
        fs::rename(new.path(), target).context(shown)?;
        // Nothing is left under the temporary name.
        drop(new.keep());
        sync_directory(parent)
    }

    fn find_saved(&self, wanted: &[String]) -> Result<Vec<Saved>> {
        let index = Index::read(&self.directory)?;
        let mut images: Vec<Saved> = Vec::new();
        for wanted in wanted {
            let record = index.find(wanted)?;
            let name = match Name::parse(wanted) {
                Ok(name) if record.names.contains(&name.to_string()) => Some(name),
                _ => None,
            };
            let known = images
                .iter_mut()
                .find(|image| image.record.config == record.config);
            match known {
                Some(image) => image.names.extend(name),
                None => images.push(Saved {
                    record: record.clone(),
                    names: name.into_iter().collect(),
                }),
            }
        }
        for image in &mut images {
            image.names.sort();
            image.names.dedup();
        }
        Ok(images)
    }

    /// The files of an OCI image layout (image-spec, image-layout.md).
    fn write_layout(
        &self,
        images: &[Saved],
        sink: &mut dyn Sink,
        progress: &dyn Progress,
    ) -> Result<()> {
        sink.document("oci-layout", LAYOUT)?;
        let blobs: BTreeSet<&String> = images
            .iter()
            .flat_map(|image| image.record.blobs())
            .collect();
        for digest in blobs {
            let path = self.blob_path(digest)?;
            let shown = || format!("read {}", path.display());
            let file = File::open(&path).context(shown)?;
            let size = file.metadata().context(shown)?.len();
            let hex = hex(digest)?;
            progress.begin(&format!("Saving {}", &hex[..12]), Some(size));
            let mut hashed = HashReader::new(file.take(size));
            sink.member(&format!("blobs/sha256/{hex}"), size, &mut hashed)?;
            Hasher::check("a blob of the store", digest, &hashed.finish())?;
            progress.advance(size);
            progress.end();
        }
        let index = self.layout_index(images)?.to_string();
        sink.document("index.json", index.as_bytes())
    }

    /// A descriptor for each name, with the annotations by which docker and
    /// containerd know it again.
    fn layout_index(&self, images: &[Saved]) -> Result<Value> {
        let mut manifests = Vec::new();
        for Saved { record, names } in images {
            let bytes = self.document(&record.manifest)?;
            let manifest: Value = parse("the image's manifest", &bytes)?;
            let media_type = manifest["mediaType"]
                .as_str()
                .unwrap_or("application/vnd.oci.image.manifest.v1+json");
            let descriptor = json!({
                "mediaType": media_type,
                "digest": record.manifest,
                "size": bytes.len(),
                "platform": { "architecture": "amd64", "os": "linux" },
            });
            let named = names.iter().map(|name| {
                let mut descriptor = descriptor.clone();
                descriptor["annotations"] = json!({
                    "io.containerd.image.name": name.to_string(),
                    "org.opencontainers.image.ref.name": name.tag(),
                });
                descriptor
            });
            let before = manifests.len();
            manifests.extend(named);
            if manifests.len() == before {
                manifests.push(descriptor);
            }
        }
        Ok(json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": manifests,
        }))
    }
}

/// docker's own table of contents (moby, image/tarexport).
fn docker_manifest(images: &[Saved]) -> Result<Value> {
    let member = |digest: &String| Ok(format!("blobs/sha256/{}", hex(digest)?));
    let images = images.iter().map(|Saved { record, names }| {
        let tags: Vec<String> = names.iter().map(Name::familiar).collect();
        let layers = record
            .layers
            .iter()
            .map(member)
            .collect::<Result<Vec<String>>>()?;
        Ok(json!({
            "Config": member(&record.config)?,
            "RepoTags": tags,
            "Layers": layers,
        }))
    });
    images.collect::<Result<Vec<Value>>>().map(Value::from)
}
