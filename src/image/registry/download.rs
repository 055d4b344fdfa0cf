//! One layer on its way: a file named by its digest, which survives a cut.
//!
//! The file is locked by whoever writes it; another pull of the same layer waits, and
//! finds it whole. What is there from an earlier time is hashed again and gone on
//! from, with a range request; the digest of the whole decides at the end.

use super::{Repository, network, persist};
use crate::image::digest::{Hasher, hex};
use crate::image::error::{Context, ImageError, Result};
use crate::image::store::Store;
use crate::progress::{Bars, Line};
use futures_util::StreamExt;
use oci_client::client::{BlobResponse, SizedStream};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// A layer as its manifest describes it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Layer {
    /// Of the blob, as it is transferred.
    pub digest: String,
    /// Its bytes.
    pub size: u64,
}

/// The file, locked, and what is known of it.
struct Partial {
    file: File,
    path: PathBuf,
    length: u64,
    hasher: Hasher,
}

impl Repository {
    /// Brings a layer into the store's folder of downloads, its digest checked.
    ///
    /// # Errors
    /// [`ImageError::Network`] when the connection broke too often: what came is kept.
    /// [`ImageError::Digest`] and [`ImageError::Registry`] for wrong content, of which
    /// nothing is kept.
    pub async fn download(&self, store: &Store, layer: &Layer, bars: &Bars) -> Result<()> {
        let label = format!("Layer {}", &hex(&layer.digest)?[..12]);
        let line = bars.begin(&label, layer.size);
        let mut partial = Partial::open(store.download_path(&layer.digest)?).await?;
        if store.blob_path(&layer.digest)?.exists() {
            // Another pull brought it while this one waited.
            partial.discard();
            return Ok(());
        }
        let inherited = partial.length > 0;
        match self.fill(&mut partial, layer, &line).await {
            // The fault may be in what an earlier pull left, if the machine crashed.
            Err(ImageError::Digest { .. }) if inherited => {
                partial.restart()?;
                self.fill(&mut partial, layer, &line).await
            }
            other => other,
        }
        .inspect_err(|error| {
            if !matches!(error, ImageError::Network { .. } | ImageError::Io { .. }) {
                partial.discard();
            }
        })
    }

    async fn fill(&self, partial: &mut Partial, layer: &Layer, line: &Line) -> Result<()> {
        if partial.length > layer.size {
            partial.restart()?;
        }
        persist(async || self.go_on(partial, layer, line).await).await?;
        Hasher::check(
            &format!("layer {}", layer.digest),
            &layer.digest,
            &partial.hasher.clone().finish(),
        )?;
        let what = || format!("write {}", partial.path.display());
        partial.file.sync_all().context(what)
    }

    /// Asks for what is missing, and takes what comes.
    async fn go_on(&self, partial: &mut Partial, layer: &Layer, line: &Line) -> Result<()> {
        line.reached(partial.length);
        if partial.length == layer.size {
            return Ok(());
        }
        let answer = self.client.pull_blob_stream_partial(
            &self.reference,
            layer.digest.as_str(),
            partial.length,
            None,
        );
        let stream = match answer.await.map_err(|error| self.failure(error))? {
            BlobResponse::Partial(stream) => stream,
            BlobResponse::Full(stream) => {
                // The registry knows no ranges.
                partial.restart()?;
                stream
            }
        };
        self.take(stream, partial, layer, line).await
    }

    async fn take(
        &self,
        mut stream: SizedStream,
        partial: &mut Partial,
        layer: &Layer,
        line: &Line,
    ) -> Result<()> {
        while partial.length < layer.size {
            let Some(chunk) = stream.next().await else {
                return Err(self.busy("the connection was cut"));
            };
            let chunk = chunk.map_err(|error| network(&self.host, &error))?;
            if chunk.len() as u64 > layer.size - partial.length {
                return Err(self.registry_says(&format!(
                    "layer {} is longer than the {} bytes that the manifest says",
                    layer.digest, layer.size
                )));
            }
            partial.append(&chunk)?;
            line.reached(partial.length);
        }
        Ok(())
    }
}

impl Partial {
    /// Opens the file, waits for its lock, and hashes what is there.
    async fn open(path: PathBuf) -> Result<Partial> {
        let shown = || format!("open {}", path.display());
        let file = loop {
            let file = File::options()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(&path)
                .context(shown)?;
            let file = locked(file).await.context(shown)?;
            if is_still(&path, &file) {
                break file;
            }
        };
        let mut partial = Partial {
            file,
            path,
            length: 0,
            hasher: Hasher::default(),
        };
        partial.hash()?;
        Ok(partial)
    }

    fn hash(&mut self) -> Result<()> {
        let what = || format!("read {}", self.path.display());
        let mut buffer = vec![0; 128 << 10];
        loop {
            let count = self.file.read(&mut buffer).context(what)?;
            if count == 0 {
                return Ok(());
            }
            self.hasher.update(&buffer[..count]);
            self.length += count as u64;
        }
    }

    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        let what = || format!("write {}", self.path.display());
        self.file.write_all(bytes).context(what)?;
        self.hasher.update(bytes);
        self.length += bytes.len() as u64;
        Ok(())
    }

    fn restart(&mut self) -> Result<()> {
        let what = || format!("write {}", self.path.display());
        self.file.set_len(0).context(what)?;
        self.file.seek(SeekFrom::Start(0)).context(what)?;
        self.length = 0;
        self.hasher = Hasher::default();
        Ok(())
    }

    /// Removes the file, while it is still locked.
    fn discard(&self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            log::warn!("cannot remove {}: {error}", self.path.display());
        }
    }
}

/// Waits for the lock on another thread: other layers go on meanwhile.
async fn locked(file: File) -> std::io::Result<File> {
    let waiting = tokio::task::spawn_blocking(move || file.lock().map(|()| file));
    waiting.await.map_err(std::io::Error::other)?
}

/// Whether `path` still names the open file: while this one waited, another pull may
/// have moved or removed it.
fn is_still(path: &Path, file: &File) -> bool {
    match (std::fs::metadata(path), file.metadata()) {
        (Ok(named), Ok(open)) => (named.dev(), named.ino()) == (open.dev(), open.ino()),
        _ => false,
    }
}

/// Removes what came of a layer, unless another pull is at it.
pub fn forget(store: &Store, layer: &Layer) -> Result<()> {
    let path = store.download_path(&layer.digest)?;
    let is_free = File::open(&path).is_ok_and(|file| file.try_lock().is_ok());
    if is_free {
        std::fs::remove_file(&path).context(|| format!("remove {}", path.display()))?;
    }
    Ok(())
}
