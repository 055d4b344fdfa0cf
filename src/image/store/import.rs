//! An image from the tar of a root file system.

use super::{Parts, Store};
use crate::image::archive::Input;
use crate::image::changes::StartConfig;
use crate::image::digest::{HashReader, hex};
use crate::image::error::{Context, ImageError, Result};
use crate::image::layer::{Metered, decompress};
use crate::image::name::Name;
use crate::progress::Progress;
use serde_json::json;
use std::fs::File;
use std::io::Read;

/// What an import is told beside the tar.
pub struct Import {
    /// How the image's containers start.
    pub config: StartConfig,
    /// A line for the image's history.
    pub message: Option<String>,
    /// The image's name.
    pub name: Option<Name>,
}

impl Store {
    /// Makes an image of one layer of a tar, compressed or not. Returns its id.
    ///
    /// # Errors
    /// [`ImageError`]: what is wrong with the tar, or with the disk.
    pub fn import(
        &self,
        input: Input<'_>,
        import: &Import,
        progress: &dyn Progress,
    ) -> Result<String> {
        self.making(|| {
            let layer = match input {
                Input::Reader(reader) => self.keep_layer(reader, progress)?,
                Input::Path(path) => {
                    let shown = || format!("open {}", path.display());
                    let mut file = File::open(path).context(shown)?;
                    if file.metadata().context(shown)?.is_dir() {
                        return Err(ImageError::Archive(
                            "it is a directory (run --rootfs takes one as it is)".to_owned(),
                        ));
                    }
                    self.keep_layer(&mut file, progress)?
                }
            };
            let diff_id = self.diff_id(&layer, progress)?;
            let config = configuration(import, &diff_id);
            let parts = Parts {
                manifest: None,
                config: &config,
                layers: vec![layer],
                names: import.name.iter().map(Name::to_string).collect(),
                digests: Vec::new(),
            };
            let record = self.complete(parts, progress)?;
            let id = record.config.clone();
            self.enter(&[record])?;
            Ok(id)
        })
    }

    fn keep_layer(&self, input: &mut dyn Read, progress: &dyn Progress) -> Result<String> {
        progress.begin("Reading the archive", None);
        let digest = self.keep(input, None, progress)?;
        progress.end();
        Ok(digest)
    }

    /// The digest of a layer's uncompressed tar.
    fn diff_id(&self, layer: &str, progress: &dyn Progress) -> Result<String> {
        let path = self.blob_path(layer)?;
        let blob = File::open(&path).context(|| format!("open {}", path.display()))?;
        let size = blob
            .metadata()
            .context(|| format!("stat {}", path.display()))?
            .len();
        if size == 0 {
            return Err(ImageError::Tar("it is empty".to_owned()));
        }
        progress.begin(&format!("Reading {}", &hex(layer)?[..12]), Some(size));
        let metered = Metered::new(blob, progress);
        let compressed = metered.count();
        let (stream, _) = decompress(metered).context(|| "read the archive".to_owned())?;
        let mut hashed = HashReader::new(stream);
        let mut buffer = vec![0; 128 << 10];
        loop {
            let count = hashed.read(&mut buffer).map_err(|error| {
                ImageError::Tar(format!("the compressed stream is damaged or cut ({error})"))
            })?;
            if count == 0 {
                break;
            }
            self.limits
                .check_unpacked(compressed.get(), hashed.count())?;
        }
        progress.end();
        Ok(hashed.finish())
    }
}

/// The configuration that the tar lacks (image-spec, config.md).
fn configuration(import: &Import, diff_id: &str) -> Vec<u8> {
    let now = jiff::Timestamp::now().to_string();
    let message = import.message.as_deref().unwrap_or_default();
    let configuration = json!({
        "architecture": "amd64",
        "os": "linux",
        "created": now,
        "comment": message,
        "config": import.config,
        "rootfs": { "type": "layers", "diff_ids": [diff_id] },
        "history": [{ "created": now, "comment": message }],
    });
    configuration.to_string().into_bytes()
}
