//! A template from an archive: a stranger's, until all of it is checked.
//!
//! The names of its files are those that its manifest leads to, never the archive's; no
//! blob is unpacked to more than the manifest says.

use super::artifact::{ARTIFACT, Descriptor, Document, Index, REF_NAME, TITLE, media_type};
use super::pieces::Pieces;
use crate::image::archive::Archive;
use crate::image::digest::{HashReader, Hasher, hex};
use crate::image::error::printable;
use crate::image::limits::Limits;
use crate::progress::Progress;
use anyhow::{Context, Result, bail};
use fork::{Manifest, NamedPart, SparseWriter};
use serde::de::DeserializeOwned;
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// More than any machine's memory and disks.
const MOST_BYTES: u64 = 1 << 40;
/// Where the template is, as long as it has no name.
const HERE: &str = "in the archive";
/// Said of what may be an image.
const IMAGE: &str = "it is no template: load an image with vm-run image load";

/// A template in an archive.
pub struct Found {
    /// What it is.
    pub manifest: Manifest,
    /// Its name where it was exported, if the archive says so.
    pub name: Option<String>,
    /// The manifest, as it was written.
    text: Vec<u8>,
    /// The blob of each of the manifest's files.
    layers: Vec<Descriptor>,
}

/// Reads the documents of an archive.
///
/// # Errors
/// What is wrong with them; an archive of an image, or of several templates.
pub fn find(archive: &Archive, limits: &Limits) -> Result<Found> {
    let Some(index) = archive.document("index.json", limits.json)? else {
        if archive.document("manifest.json", limits.json)?.is_some() {
            bail!("{IMAGE}");
        }
        bail!(
            "it is no OCI image layout, for it has no index.json: make one with vm-run template export"
        );
    };
    let index: Index = parse("index.json", &index)?;
    let [top] = index.manifests.as_slice() else {
        bail!(
            "it has {} manifests, and one template has one",
            index.manifests.len()
        );
    };
    let document = document(archive, top, limits)?;
    let Ok(document) = parse::<Document>("the manifest", &document) else {
        bail!("{IMAGE}");
    };
    if document.artifact_type != ARTIFACT {
        bail!("{IMAGE}");
    }
    let text = self::document(archive, &document.config, limits)?;
    let manifest = Manifest::parse(Path::new(HERE), &text)?;
    check_layers(&manifest.files(), &document.layers)?;
    check_sizes(&manifest)?;
    check_words(&manifest)?;
    Ok(Found {
        manifest,
        name: top.annotations.get(REF_NAME).cloned(),
        text,
        layers: document.layers,
    })
}

/// Whether the layers are the manifest's files.
fn check_layers(files: &[NamedPart<'_>], layers: &[Descriptor]) -> Result<()> {
    for file in files {
        let count = layers.iter().filter(|layer| title(layer) == file.name);
        match count.count() {
            1 => {}
            0 => bail!("{} is missing: export the template again", file.name),
            more => bail!(
                "it has {more} layers called {}: export the template again",
                file.name
            ),
        }
    }
    if files.len() != layers.len() {
        bail!(
            "it has {} layers, and its template {} files",
            layers.len(),
            files.len()
        );
    }
    for (file, layer) in files.iter().zip(layers) {
        let found = (title(layer), layer.media_type.as_str());
        let expected = (file.name.as_str(), media_type(file.content));
        if found != expected {
            let [found, expected] =
                [found, expected].map(|(name, kind)| format!("{name} ({kind})"));
            bail!(
                "there is a layer {} in place of {expected}",
                printable(found.as_bytes())
            );
        }
    }
    Ok(())
}

/// Whether they are no longer than a machine can have them.
fn check_sizes(manifest: &Manifest) -> Result<()> {
    let files = manifest.files();
    let sizes = files.iter().map(|file| file.part.bytes);
    let total = sizes.fold(0, u64::saturating_add);
    if total > MOST_BYTES {
        bail!("its files have {total} bytes, and {MOST_BYTES} is the most");
    }
    Ok(())
}

/// Whether what is shown to people can be.
fn check_words(manifest: &Manifest) -> Result<()> {
    let shown = [&manifest.written_by, &manifest.cpu.vendor];
    let image = manifest.warm.as_ref().map(|warm| &warm.image);
    for word in shown.into_iter().chain(image) {
        if word.chars().any(char::is_control) {
            bail!(
                "its manifest has control characters: {}",
                printable(word.as_bytes())
            );
        }
    }
    Ok(())
}

fn title(layer: &Descriptor) -> &str {
    layer.annotations.get(TITLE).map_or("", String::as_str)
}

/// Unpacks the template into an empty directory, and checks all of it.
///
/// # Errors
/// A blob that is not what its digest, its size or the manifest says, or what the file system
/// says.
pub fn unpack(
    archive: &Archive,
    found: &Found,
    into: &Path,
    progress: &dyn Progress,
) -> Result<()> {
    for (file, layer) in found.manifest.files().iter().zip(&found.layers) {
        progress.begin(&format!("Importing {}", file.name), Some(file.part.bytes));
        unpack_file(archive, layer, file, into, progress).with_context(|| file.name.clone())?;
        progress.end();
    }
    Manifest::write_text(into, &found.text)?;
    progress.begin("Checking the template", None);
    found.manifest.verify(into).map_err(in_the_archive)?;
    progress.end();
    Ok(())
}

fn in_the_archive(error: fork::Error) -> fork::Error {
    match error {
        fork::Error::Template { reason, .. } => fork::Error::Template {
            path: HERE.into(),
            reason,
        },
        other => other,
    }
}

fn unpack_file(
    archive: &Archive,
    layer: &Descriptor,
    file: &NamedPart<'_>,
    into: &Path,
    progress: &dyn Progress,
) -> Result<()> {
    let bytes = file.part.bytes;
    let path = into.join(&file.name);
    let shown = || format!("cannot write {}", path.display());
    let to = File::create_new(&path).with_context(shown)?;
    let mut blob = HashReader::new(open(archive, layer)?);
    let mut writer = SparseWriter::new(&to);
    let put = |piece: &[u8], at: u64| writer.write_at(piece, at).with_context(shown);
    let at = Pieces::new(&mut blob)?.unpack(bytes, put, progress)?;
    if at < bytes {
        bail!("it unpacks to {at} bytes, and the manifest says {bytes}");
    }
    Hasher::check("its blob", &layer.digest, &blob.finish())?;
    writer.finish(bytes).with_context(shown)?;
    Ok(())
}

/// A blob of the size that it should have.
fn open(archive: &Archive, descriptor: &Descriptor) -> Result<impl Read + use<>> {
    let digest = &descriptor.digest;
    let blob = archive.member(&format!("blobs/sha256/{}", hex(digest)?))?;
    let blob = blob.with_context(|| format!("the blob {digest} is missing"))?;
    let (found, expected) = (blob.left(), descriptor.size);
    if found != expected {
        bail!("the blob {digest} has {found} bytes, and its descriptor says {expected}");
    }
    Ok(blob)
}

/// A small blob.
fn document(archive: &Archive, descriptor: &Descriptor, limits: &Limits) -> Result<Vec<u8>> {
    let (digest, size) = (&descriptor.digest, descriptor.size);
    if size > limits.json {
        bail!(
            "a document has {size} bytes, and {} is the most",
            limits.json
        );
    }
    let mut bytes = Vec::new();
    open(archive, descriptor)?.read_to_end(&mut bytes)?;
    Hasher::check("a document", digest, &Hasher::digest(&bytes))?;
    Ok(bytes)
}

fn parse<T: DeserializeOwned>(what: &str, bytes: &[u8]) -> Result<T> {
    serde_json::from_slice(bytes).with_context(|| format!("{what} cannot be read"))
}
