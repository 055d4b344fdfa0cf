//! Entry points for fuzzing: what a stranger's bytes go through, without a store.

use super::archive::{Archive, Input};
use super::documents;
use super::erofs;
use super::error::{Context, Result};
use super::layer::Scratch;
use super::limits::Limits;
use super::merge;
use super::tree::Tree;
use crate::progress::Quiet;
use std::fs::File;
use std::io::{self, Read, Write};
use std::sync::Arc;
use vm_run_archive::{Stream, TarReader};

/// Bounds small enough for thousands of runs a second.
fn limits() -> Limits {
    Limits {
        json: 1 << 16,
        inodes: 1 << 12,
        metadata: 1 << 20,
        unpacked: 1 << 24,
        ratio_from: 1 << 20,
        ..Limits::default()
    }
}

struct Bytes<'a>(&'a [u8]);

impl Read for Bytes<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Stream for Bytes<'_> {
    fn skip(&mut self, count: u64) -> io::Result<()> {
        let count = usize::try_from(count).map_err(|_| io::ErrorKind::UnexpectedEof)?;
        self.0 = self.0.get(count..).ok_or(io::ErrorKind::UnexpectedEof)?;
        Ok(())
    }
}

/// An uncompressed layer: read, merged, and written as an EROFS image.
///
/// # Errors
/// What a load of this layer would say.
pub fn layer(bytes: &[u8]) -> Result<()> {
    let limits = limits();
    let spool = spool(bytes)?;
    let mut tree = Tree::new(&limits);
    let mut reader = TarReader::new(Bytes(bytes));
    while let Some(entry) = reader.next_entry()? {
        merge::apply(&mut tree, entry, 1, &spool)?;
    }
    erofs::write(&tree, [0; 16], &scratch_file()?, &Quiet)
}

/// The outside of an archive: its members, its manifest and configuration.
///
/// # Errors
/// What a load of this archive would say.
pub fn archive(mut bytes: &[u8]) -> Result<()> {
    let limits = limits();
    let scratch = Scratch {
        directory: &std::env::temp_dir(),
        limits: &limits,
        progress: &Quiet,
    };
    let archive = Archive::open(Input::Reader(&mut bytes), &scratch)?;
    for image in documents::find(&archive, &limits)? {
        documents::Configuration::parse(&image.config, &limits)?.chain_id();
    }
    Ok(())
}

fn scratch_file() -> Result<File> {
    tempfile::tempfile().context(|| "make a temporary file".to_owned())
}

fn spool(bytes: &[u8]) -> Result<Arc<File>> {
    let mut file = scratch_file()?;
    file.write_all(bytes)
        .context(|| "write a temporary file".to_owned())?;
    Ok(Arc::new(file))
}
