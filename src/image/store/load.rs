//! Images from archives.

use super::{Parts, Store};
use crate::image::archive::{Archive, Input};
use crate::image::digest::Hasher;
use crate::image::documents::{Configuration, Found, find};
use crate::image::error::Result;
use crate::image::index::Record;
use crate::image::name::Name;
use crate::image::reference::familiar;
use crate::progress::Progress;

/// One reference of a load.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loaded {
    /// The image's name, short; `None` when the archive gave it none.
    pub name: Option<String>,
    /// The image's id, `sha256:HEX`.
    pub id: String,
}

impl Store {
    /// Loads the images of an archive: all of them, or on an error none.
    ///
    /// # Errors
    /// [`ImageError`](crate::image::error::ImageError): what is wrong with the archive,
    /// or with the disk.
    pub fn load(&self, input: Input<'_>, progress: &dyn Progress) -> Result<Vec<Loaded>> {
        self.making(|| self.load_all(input, progress))
    }

    fn load_all(&self, input: Input<'_>, progress: &dyn Progress) -> Result<Vec<Loaded>> {
        let tmp = self.scratch_directory();
        let archive = Archive::open(input, &self.scratch(&tmp, progress))?;
        let found = find(&archive, &self.limits)?;
        let records = found
            .iter()
            .map(|image| self.load_one(&archive, image, progress))
            .collect::<Result<Vec<Record>>>()?;
        self.enter(&records)?;
        Ok(records.iter().flat_map(loaded).collect())
    }

    /// Brings one image's blobs and root file system into the store, which does not
    /// name them yet.
    fn load_one(
        &self,
        archive: &Archive,
        image: &Found,
        progress: &dyn Progress,
    ) -> Result<Record> {
        let configuration = Configuration::parse(&image.config, &self.limits)?;
        configuration.check_layers(image.layers.len())?;
        let names: Vec<String> = image.names.iter().map(Name::to_string).collect();
        if let Some(known) = self.known(&Hasher::digest(&image.config))? {
            return Ok(Record {
                names,
                digests: Vec::new(),
                ..known
            });
        }
        let mut layers = Vec::new();
        for (number, (layer, diff_id)) in image
            .layers
            .iter()
            .zip(configuration.diff_ids())
            .enumerate()
        {
            // A docker archive's layers are plain tars as a rule: a known one has
            // the name of its content.
            let likely = layer.digest.as_deref().unwrap_or(diff_id);
            if self.blob_path(likely)?.exists() {
                layers.push(likely.to_owned());
                continue;
            }
            let mut blob = layer.open(archive)?;
            progress.begin(&format!("Copying layer {}", number + 1), Some(blob.left()));
            layers.push(self.keep(&mut blob, layer.digest.as_deref(), progress)?);
            progress.end();
        }
        let parts = Parts {
            manifest: image.manifest.as_deref(),
            config: &image.config,
            layers,
            names,
            digests: Vec::new(),
        };
        self.complete(parts, progress)
    }
}

/// A line for each name, or one for an image that has none.
fn loaded(record: &Record) -> Vec<Loaded> {
    let id = &record.config;
    let line = |name: Option<String>| Loaded {
        name,
        id: id.clone(),
    };
    match record.names.as_slice() {
        [] => vec![line(None)],
        names => names
            .iter()
            .map(|name| line(Some(familiar(name))))
            .collect(),
    }
}
