//! The last steps of every image's way in: its documents, its root file system, its
//! line in the index.

use super::Store;
use crate::image::documents::Configuration;
use crate::image::error::{Context, Result};
use crate::image::index::{Index, Record};
use crate::image::layer::Compression;
use crate::progress::{Progress, Quiet};
use std::fs::File;
use std::io::Read;

/// An image whose layers are in the store as blobs.
pub struct Parts<'a> {
    /// Its manifest; `None` to make one.
    pub manifest: Option<&'a [u8]>,
    /// Its configuration.
    pub config: &'a [u8],
    /// The digests of its layers' blobs, from the bottom.
    pub layers: Vec<String>,
    /// Full names.
    pub names: Vec<String>,
    /// What a registry calls it.
    pub digests: Vec<String>,
}

impl Store {
    /// Keeps the documents and makes the root file system, by which every layer is
    /// checked. The index does not name the image yet.
    ///
    /// # Errors
    /// [`ImageError`](crate::image::error::ImageError): what is wrong with the image,
    /// or with the disk.
    pub fn complete(&self, parts: Parts<'_>, progress: &dyn Progress) -> Result<Record> {
        let configuration = Configuration::parse(parts.config, &self.limits)?;
        configuration.check_layers(parts.layers.len())?;
        let config = self.keep(&mut &*parts.config, None, &Quiet)?;
        let manifest = match parts.manifest {
            Some(bytes) => bytes.to_vec(),
            None => self.manifest(&config, parts.config.len() as u64, &parts.layers)?,
        };
        let manifest = self.keep(&mut manifest.as_slice(), None, &Quiet)?;
        self.build(&configuration, &parts.layers, progress)?;
        Ok(Record {
            config,
            manifest,
            layers: parts.layers,
            chain_id: configuration.chain_id(),
            names: parts.names,
            digests: parts.digests,
        })
    }

    /// Enters complete images into the index: all of them, or on an error none.
    ///
    /// # Errors
    /// [`ImageError`](crate::image::error::ImageError) of the disk.
    pub fn enter(&self, records: &[Record]) -> Result<()> {
        Index::update(&self.directory, |index| {
            records
                .iter()
                .cloned()
                .for_each(|record| index.enter(record));
            Ok(())
        })
    }

    /// The image of this configuration, if it is in the store and whole.
    ///
    /// # Errors
    /// [`ImageError`](crate::image::error::ImageError) when the store cannot be read.
    pub fn known(&self, config: &str) -> Result<Option<Record>> {
        let index = Index::read(&self.directory)?;
        let Some(record) = index.images.iter().find(|known| known.config == config) else {
            return Ok(None);
        };
        for digest in record.blobs() {
            if !self.blob_path(digest)?.exists() {
                return Ok(None);
            }
        }
        let rootfs = self.rootfs_path(&record.chain_id)?;
        Ok(rootfs.exists().then(|| record.clone()))
    }

    /// The manifest that an archive of docker's lacks.
    fn manifest(&self, config: &str, config_size: u64, layers: &[String]) -> Result<Vec<u8>> {
        let mut described = Vec::new();
        for digest in layers {
            let path = self.blob_path(digest)?;
            let file = File::open(&path).context(|| format!("open {}", path.display()))?;
            let size = file
                .metadata()
                .context(|| format!("stat {}", path.display()))?
                .len();
            let mut first = Vec::new();
            file.take(4)
                .read_to_end(&mut first)
                .context(|| format!("read {}", path.display()))?;
            let suffix = match Compression::of(&first) {
                Compression::None => "",
                Compression::Gzip => "+gzip",
                Compression::Zstd => "+zstd",
            };
            let media_type = format!("application/vnd.oci.image.layer.v1.tar{suffix}");
            described.push(
                serde_json::json!({ "mediaType": media_type, "digest": digest, "size": size }),
            );
        }
        let manifest = serde_json::json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {
                "mediaType": "application/vnd.oci.image.config.v1+json",
                "digest": config,
                "size": config_size,
            },
            "layers": described,
        });
        Ok(manifest.to_string().into_bytes())
    }
}
