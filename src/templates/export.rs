//! A template on its way into an archive.

use super::artifact::{
    ARTIFACT, CONFIG, Descriptor, Document, INDEX, Index, MANIFEST, REF_NAME, TITLE, media_type,
};
use super::pieces;
use crate::image::digest::{Hasher, hex};
use crate::image::sink::{LAYOUT, Sink, TarSink};
use crate::progress::Progress;
use anyhow::{Context, Result};
use fork::{Manifest, NamedPart};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Seek, Write};
use std::path::Path;

/// A file, compressed.
struct Blob {
    file: File,
    size: u64,
    digest: String,
}

/// Writes the template `name` in `dir` as a tar of an OCI image layout. `scratch` is where
/// temporary files may be made.
///
/// # Errors
/// A template that is not what was written, or what the file system says.
pub fn export(
    name: &str,
    dir: &Path,
    out: &mut dyn Write,
    scratch: &Path,
    progress: &dyn Progress,
) -> Result<()> {
    let text = Manifest::read_text(dir)?;
    let manifest = Manifest::parse(dir, &text)?;
    let parts = manifest.files();
    // All are open before one is read: a template that is removed meanwhile is whole.
    let open = |part: &NamedPart<'_>| {
        let path = dir.join(&part.name);
        File::open(&path).with_context(|| format!("cannot open {}", path.display()))
    };
    let files = parts.iter().map(open).collect::<Result<Vec<File>>>()?;
    progress.begin(&format!("Checking {name}"), None);
    manifest.verify(dir)?;
    progress.end();
    let mut tar = TarSink::new(out);
    tar.document("oci-layout", LAYOUT)?;
    let config = put_document(&mut tar, CONFIG, &text)?;
    let mut written = BTreeSet::new();
    let mut layers = Vec::new();
    for (part, file) in parts.iter().zip(&files) {
        let label = format!("Exporting {}", part.name);
        progress.begin(&label, Some(part.part.bytes));
        let blob = compress(file, part.part.bytes, scratch, progress)
            .with_context(|| format!("cannot compress {}", part.name))?;
        if written.insert(blob.digest.clone()) {
            tar.member(&member(&blob.digest)?, blob.size, &mut &blob.file)?;
        }
        progress.end();
        layers.push(Descriptor {
            annotations: BTreeMap::from([(TITLE.into(), part.name.clone())]),
            size: blob.size,
            ..descriptor(media_type(part.content), blob.digest)
        });
    }
    let document = Document {
        schema_version: 2,
        media_type: MANIFEST.into(),
        artifact_type: ARTIFACT.into(),
        config,
        layers,
    };
    let mut top = put_document(&mut tar, MANIFEST, &serde_json::to_vec(&document)?)?;
    top.artifact_type = ARTIFACT.into();
    top.annotations.insert(REF_NAME.into(), name.into());
    let index = Index {
        schema_version: 2,
        media_type: INDEX.into(),
        manifests: vec![top],
    };
    tar.document("index.json", &serde_json::to_vec(&index)?)?;
    Ok(tar.finish()?)
}

fn put_document(tar: &mut TarSink<'_>, media_type: &str, bytes: &[u8]) -> Result<Descriptor> {
    let digest = Hasher::digest(bytes);
    tar.document(&member(&digest)?, bytes)?;
    Ok(Descriptor {
        size: bytes.len() as u64,
        ..descriptor(media_type, digest)
    })
}

fn descriptor(media_type: &str, digest: String) -> Descriptor {
    Descriptor {
        media_type: media_type.into(),
        artifact_type: String::new(),
        digest,
        size: 0,
        annotations: BTreeMap::new(),
    }
}

fn member(digest: &str) -> Result<String> {
    Ok(format!("blobs/sha256/{}", hex(digest)?))
}

/// Compresses a file into a temporary one.
fn compress(file: &File, bytes: u64, scratch: &Path, progress: &dyn Progress) -> Result<Blob> {
    let mut blob = Hashed {
        file: tempfile::tempfile_in(scratch)?,
        hasher: Hasher::default(),
        size: 0,
    };
    pieces::compress(file, bytes, &mut blob, progress)?;
    blob.file.rewind()?;
    Ok(Blob {
        file: blob.file,
        size: blob.size,
        digest: blob.hasher.finish(),
    })
}

/// A file of which is known what was written.
struct Hashed {
    file: File,
    hasher: Hasher,
    size: u64,
}

impl Write for Hashed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.file.write(bytes)?;
        self.hasher.update(&bytes[..count]);
        self.size += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}
