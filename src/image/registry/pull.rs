//! An image from a registry.

use super::download::{Layer, forget};
use super::{AT_ONCE, Access, Repository, block_on, network, persist};
use crate::image::digest::{Hasher, hex};
use crate::image::documents::{Configuration, DEEPEST_INDEX, Document, check_manifest, leads_here};
use crate::image::error::{Context, ImageError, Result};
use crate::image::index::Record;
use crate::image::reference::{Reference, by_digest};
use crate::image::store::{Parts, Store};
use crate::progress::{Bars, Progress};
use futures_util::{StreamExt, TryStreamExt};
use oci_client::RegistryOperation;
use oci_spec::image::{Descriptor, ImageIndex, ImageManifest};
use std::collections::BTreeSet;
use std::io::ErrorKind;

/// What a pull brought.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pulled {
    /// The image's full name, by tag or by digest.
    pub name: String,
    /// The digest of what the reference names: a manifest or an index.
    pub digest: String,
    /// Whether the reference led to the same image before.
    pub is_known: bool,
}

/// An image's documents.
struct Found {
    manifest: Vec<u8>,
    parsed: Box<ImageManifest>,
    /// Of what the reference names.
    digest: String,
}

/// Brings an image into the store. Layers that are there are not fetched, and one that
/// was cut is gone on with.
///
/// # Errors
/// [`ImageError`]; after one of them only what a later pull can go on with is left.
pub fn pull(
    store: &Store,
    wanted: &Reference,
    access: &Access,
    (bars, progress): (&Bars, &dyn Progress),
) -> Result<Pulled> {
    store.making(|| {
        let name = match &wanted.digest {
            Some(digest) => by_digest(&wanted.name, digest),
            None => wanted.name.to_string(),
        };
        let before = store.record(&name).map(|record| record.config);
        let (record, digest) =
            block_on(fetch(store, wanted, access, bars))?.finish(store, wanted, progress)?;
        Ok(Pulled {
            name,
            digest,
            is_known: before.is_ok_and(|before| before == record.config),
        })
    })
}

/// What is in the store when the network is done with.
enum Fetched {
    /// Nothing was missing.
    Known(Record, String),
    /// Documents and layers.
    New {
        found: Found,
        config: Vec<u8>,
        layers: Vec<String>,
    },
}

impl Fetched {
    fn finish(
        self,
        store: &Store,
        wanted: &Reference,
        progress: &dyn Progress,
    ) -> Result<(Record, String)> {
        let names = match wanted.digest {
            Some(_) => Vec::new(),
            None => vec![wanted.name.to_string()],
        };
        let (record, digest) = match self {
            Fetched::Known(record, digest) => {
                let digests = vec![by_digest(&wanted.name, &digest)];
                let record = Record {
                    names,
                    digests,
                    ..record
                };
                (record, digest)
            }
            Fetched::New {
                found,
                config,
                layers,
            } => {
                let parts = Parts {
                    manifest: Some(&found.manifest),
                    config: &config,
                    layers,
                    names,
                    digests: vec![by_digest(&wanted.name, &found.digest)],
                };
                (store.complete(parts, progress)?, found.digest)
            }
        };
        store.enter(std::slice::from_ref(&record))?;
        Ok((record, digest))
    }
}

async fn fetch(store: &Store, wanted: &Reference, access: &Access, bars: &Bars) -> Result<Fetched> {
    let repository = Repository::open(&wanted.name, access, RegistryOperation::Pull).await?;
    let limits = store.limits();
    let found = repository.find(wanted, limits.json).await?;
    check_manifest(&found.parsed, limits)?;
    let config_digest = found.parsed.config().digest().to_string();
    if let Some(record) = store.known(&config_digest)? {
        return Ok(Fetched::Known(record, found.digest));
    }
    let config = repository
        .small_blob(found.parsed.config(), limits.json)
        .await?;
    let layers: Vec<Layer> = found.parsed.layers().iter().map(layer).collect();
    Configuration::parse(&config, limits)?.check_layers(layers.len())?;
    let missing: BTreeSet<&Layer> = layers
        .iter()
        .filter_map(|layer| match store.blob_path(&layer.digest) {
            Ok(path) => (!path.exists()).then_some(Ok(layer)),
            Err(error) => Some(Err(error)),
        })
        .collect::<Result<_>>()?;
    if let Err(error) = repository.download_all(store, &missing, bars).await {
        if !matches!(error, ImageError::Network { .. }) {
            for layer in missing {
                forget(store, layer)?;
            }
        }
        return Err(error);
    }
    for layer in missing {
        adopt(store, layer)?;
    }
    Ok(Fetched::New {
        found,
        config,
        layers: layers.into_iter().map(|layer| layer.digest).collect(),
    })
}

impl Repository {
    /// The manifest for this machine that a reference leads to.
    async fn find(&self, wanted: &Reference, most: u64) -> Result<Found> {
        let first = wanted.digest.as_deref().unwrap_or(wanted.name.tag());
        let (mut bytes, digest) = persist(async || self.document(first, most).await).await?;
        for _ in 0..=DEEPEST_INDEX {
            let index = match Document::parse(&bytes)? {
                Document::Index(index) => index,
                Document::Manifest(parsed) => {
                    return Ok(Found {
                        manifest: bytes,
                        parsed,
                        digest,
                    });
                }
            };
            let next = choose(&index)?.digest().to_string();
            hex(&next)?;
            bytes = persist(async || self.document(&next, most).await).await?.0;
        }
        Err(ImageError::Limit(
            "an image index too deep in others".to_owned(),
        ))
    }

    /// A blob that is taken into memory.
    async fn small_blob(&self, descriptor: &Descriptor, most: u64) -> Result<Vec<u8>> {
        let size = descriptor.size();
        if size > most {
            return Err(ImageError::Limit(format!(
                "the image's configuration has more than {most} bytes"
            )));
        }
        let digest = descriptor.digest().to_string();
        hex(&digest)?;
        persist(async || {
            let answer = self
                .client
                .pull_blob_stream(&self.reference, digest.as_str());
            let mut stream = answer.await.map_err(|error| self.failure(error))?;
            let mut bytes = Vec::new();
            while (bytes.len() as u64) < size {
                let Some(chunk) = stream.next().await else {
                    return Err(self.busy("the connection was cut"));
                };
                let chunk = chunk.map_err(|error| network(&self.host, &error))?;
                if (bytes.len() + chunk.len()) as u64 > size {
                    return Err(self.registry_says("the configuration is longer than it should be"));
                }
                bytes.extend_from_slice(&chunk);
            }
            let found = Hasher::digest(&bytes);
            Hasher::check("the image's configuration", &digest, &found)?;
            Ok(bytes)
        })
        .await
    }

    async fn download_all(
        &self,
        store: &Store,
        missing: &BTreeSet<&Layer>,
        bars: &Bars,
    ) -> Result<()> {
        futures_util::stream::iter(missing)
            .map(|layer| self.download(store, layer, bars))
            .buffer_unordered(AT_ONCE)
            .try_collect::<()>()
            .await
    }
}

/// The first image of an index that runs here.
fn choose(index: &ImageIndex) -> Result<&Descriptor> {
    let mut platforms = BTreeSet::new();
    for descriptor in index.manifests() {
        match leads_here(descriptor) {
            Ok(true) => return Ok(descriptor),
            Ok(false) => {}
            Err(ImageError::Platform(platform)) => drop(platforms.insert(platform)),
            Err(error) => return Err(error),
        }
    }
    if platforms.is_empty() {
        return Err(ImageError::Archive("its index names no image".to_owned()));
    }
    let shown: Vec<String> = platforms.into_iter().take(8).collect();
    Err(ImageError::Platform(shown.join(", ")))
}

fn layer(descriptor: &Descriptor) -> Layer {
    Layer {
        digest: descriptor.digest().to_string(),
        size: descriptor.size(),
    }
}

/// Makes a whole download a blob. Another pull may have been faster.
fn adopt(store: &Store, layer: &Layer) -> Result<()> {
    let target = store.blob_path(&layer.digest)?;
    match std::fs::rename(store.download_path(&layer.digest)?, &target) {
        Err(error) if error.kind() == ErrorKind::NotFound && target.exists() => Ok(()),
        other => other.context(|| format!("write {}", target.display())),
    }
}
