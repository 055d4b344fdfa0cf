//! An image to a registry.

use super::{AT_ONCE, Access, Repository, block_on, persist};
use crate::image::digest::{HashReader, Hasher, hex};
use crate::image::documents::parse;
use crate::image::error::{Context, ImageError, Result};
use crate::image::index::Record;
use crate::image::name::Name;
use crate::image::reference::by_digest;
use crate::image::store::Store;
use crate::progress::{Bars, Line};
use bytes::Bytes;
use futures_util::{Stream, StreamExt, TryStreamExt};
use oci_client::RegistryOperation;
use oci_client::errors::OciDistributionError;
use reqwest::header::HeaderValue;
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read, Seek};

/// Bytes of one piece of a body.
const PIECE: usize = 128 << 10;

/// Gives the image of a name to the registry of that name: the blobs as they came in,
/// so that its digest there is the one here. Blobs that are there are not sent.
/// Returns the manifest's digest.
///
/// # Errors
/// [`ImageError`]; the registry has the tag only when all of the image is there.
pub fn push(store: &Store, name: &Name, access: &Access, bars: &Bars) -> Result<String> {
    // While it goes out, nothing of it is swept away.
    let busy = store.busy()?;
    let record = store.record(&name.to_string())?;
    block_on(send(store, name, &record, access, bars))?;
    drop(busy);
    let digest = record.manifest.clone();
    store.enter(&[Record {
        names: Vec::new(),
        digests: vec![by_digest(name, &digest)],
        ..record
    }])?;
    Ok(digest)
}

async fn send(
    store: &Store,
    name: &Name,
    record: &Record,
    access: &Access,
    bars: &Bars,
) -> Result<()> {
    let repository = Repository::open(name, access, RegistryOperation::Push).await?;
    let manifest = store.document(&record.manifest)?;
    Hasher::check("the manifest", &record.manifest, &Hasher::digest(&manifest))?;
    let blobs: BTreeSet<&String> = record.layers.iter().chain([&record.config]).collect();
    futures_util::stream::iter(blobs)
        .map(|digest| repository.send_blob(store, digest, bars))
        .buffer_unordered(AT_ONCE)
        .try_collect::<()>()
        .await?;
    repository.send_manifest(&manifest, &record.manifest).await
}

impl Repository {
    async fn send_blob(&self, store: &Store, digest: &str, bars: &Bars) -> Result<()> {
        let there = persist(async || {
            let answer = self.client.blob_exists(&self.reference, digest).await;
            answer.map_err(|error| self.failure(error))
        });
        if there.await? {
            return Ok(());
        }
        let path = store.blob_path(digest)?;
        let what = || format!("read {}", path.display());
        let mut file = File::open(&path).context(what)?;
        let size = file.metadata().context(what)?.len();
        check(&mut file, digest).context(what)?;
        persist(async || {
            let line = bars.begin(&format!("Layer {}", &hex(digest)?[..12]), size);
            file.rewind().context(what)?;
            let file = file.try_clone().context(what)?;
            let sent = self.client.push_blob_stream(
                &self.reference,
                pieces(file, line),
                digest,
                Some(size),
            );
            sent.await.map(drop).map_err(|error| self.failure(error))
        })
        .await
    }

    async fn send_manifest(&self, manifest: &[u8], digest: &str) -> Result<()> {
        let parsed: Value = parse("the image's manifest", manifest)?;
        let media_type = parsed["mediaType"]
            .as_str()
            .unwrap_or("application/vnd.oci.image.manifest.v1+json");
        let content_type = HeaderValue::from_str(media_type)
            .map_err(|_| ImageError::Archive("its manifest has no usable media type".to_owned()))?;
        persist(async || {
            let sent = self.client.push_manifest_raw(
                &self.reference,
                manifest.to_vec(),
                content_type.clone(),
            );
            sent.await.map(drop).map_err(|error| self.failure(error))
        })
        .await?;
        // What the registry has is what was meant.
        let there = self
            .client
            .fetch_manifest_digest(&self.reference, &self.auth)
            .await
            .map_err(|error| self.failure(error))?;
        Hasher::check("the manifest in the registry", digest, &there)
    }
}

/// Holds a blob of the store against its digest before others get it.
fn check(file: &mut File, digest: &str) -> std::io::Result<()> {
    let mut hashed = HashReader::new(file);
    let mut buffer = vec![0; PIECE];
    while hashed.read(&mut buffer)? > 0 {}
    Hasher::check("a blob of the store", digest, &hashed.finish())?;
    Ok(())
}

/// A file as the body of a request.
fn pieces(
    file: File,
    line: Line,
) -> impl Stream<Item = Result<Bytes, OciDistributionError>> + Send + 'static {
    futures_util::stream::try_unfold((file, line, 0), |(mut file, line, sent)| async move {
        let mut piece = vec![0; PIECE];
        let count = file.read(&mut piece)?;
        if count == 0 {
            return Ok(None);
        }
        piece.truncate(count);
        let sent = sent + count as u64;
        line.reached(sent);
        Ok(Some((Bytes::from(piece), (file, line, sent))))
    })
}
