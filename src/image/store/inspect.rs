//! All that is known of an image, in the form of `docker image inspect`.

use super::Store;
use crate::image::documents::parse;
use crate::image::error::Result;
use crate::image::reference::familiar;
use serde_json::{Value, json};

impl Store {
    /// An image by the names that docker's API has (`ImageInspect`), where it has the
    /// fact. `Config` is the image's own, whole. `Size` is the root file system's.
    ///
    /// # Errors
    /// [`ImageError::NoSuchImage`](crate::image::error::ImageError::NoSuchImage),
    /// [`ImageError::Ambiguous`](crate::image::error::ImageError::Ambiguous), or the
    /// disk's.
    pub fn inspect(&self, wanted: &str) -> Result<Value> {
        let record = self.record(wanted)?;
        let bytes = self.document(&record.config)?;
        let configuration: Value = parse("the image's configuration", &bytes)?;
        let manifest = self.document(&record.manifest)?;
        let media_type = parse::<Value>("the image's manifest", &manifest)?["mediaType"].take();
        let text = |key: &str| match configuration[key].as_str() {
            Some(text) => text.to_owned(),
            None => String::new(),
        };
        let short =
            |names: &[String]| -> Vec<String> { names.iter().map(|name| familiar(name)).collect() };
        Ok(json!({
            "Id": record.config,
            "RepoTags": short(&record.names),
            "RepoDigests": short(&record.digests),
            "Comment": text("comment"),
            "Created": configuration["created"],
            "Author": text("author"),
            "Architecture": text("architecture"),
            "Variant": text("variant"),
            "Os": text("os"),
            "Size": self.size(&record)?,
            "GraphDriver": {
                "Name": "erofs",
                "Data": { "Image": self.rootfs_path(&record.chain_id)? },
            },
            "RootFS": { "Type": "layers", "Layers": configuration["rootfs"]["diff_ids"] },
            "Config": configuration["config"],
            "Descriptor": {
                "mediaType": media_type,
                "digest": record.manifest,
                "size": manifest.len(),
            },
        }))
    }
}
