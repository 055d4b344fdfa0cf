//! A layer blob: decompressed, its digest checked, its entries merged into the tree.

use super::digest::{HashReader, Hasher};
use super::error::{Context, ImageError, Result};
use super::limits::Limits;
use super::merge;
use super::tree::Tree;
use crate::progress::Progress;
use std::cell::Cell;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use vm_run_archive::{Stream, TarReader};

const BUFFER: usize = 128 << 10;
/// 2^27 bytes: what `zstd --long` asks for by default, and zstd's own bound.
const ZSTD_WINDOW_LOG: u32 = 27;

/// How a stream is compressed, by its first bytes; media types are often wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Not at all.
    None,
    /// gzip, of one or several members.
    Gzip,
    /// zstd.
    Zstd,
}

impl Compression {
    /// Tells from the first bytes of a stream.
    pub fn of(first: &[u8]) -> Compression {
        match first {
            [0x1f, 0x8b, ..] => Compression::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Compression::Zstd,
            // A zstd skippable frame, which pzstd and eStargz-like tools put first.
            [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Compression::Zstd,
            _ => Compression::None,
        }
    }
}

/// The uncompressed bytes of `input`, and what its compression is.
///
/// # Errors
/// Those of reading `input`.
pub fn decompress<'a, R: Read + 'a>(input: R) -> io::Result<(Box<dyn Read + 'a>, Compression)> {
    let mut input = BufReader::with_capacity(BUFFER, input);
    let compression = Compression::of(input.fill_buf()?);
    let stream: Box<dyn Read + 'a> = match compression {
        Compression::None => Box::new(input),
        Compression::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(input)),
        Compression::Zstd => {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(input)?;
            decoder.window_log_max(ZSTD_WINDOW_LOG)?;
            Box::new(decoder)
        }
    };
    Ok((stream, compression))
}

/// Merges the layer in `blob`, number `number` from the bottom, into `tree`.
///
/// The bytes of its files stay in `blob` if that is a plain tar, else in an unnamed
/// temporary file in `scratch`, which lives as long as the tree refers to it.
/// `before` is how many bytes the layers below unpacked to. Returns how many they
/// are with this one.
///
/// # Errors
/// [`ImageError`], whose message does not yet name the layer.
pub fn unpack(
    blob: File,
    diff_id: &str,
    number: u16,
    tree: &mut Tree,
    scratch: &Scratch<'_>,
    before: u64,
) -> Result<u64> {
    let size = blob.metadata().context(|| "stat a layer".to_owned())?.len();
    scratch
        .progress
        .begin(&format!("Unpacking layer {}", number + 1), Some(size));
    let same = blob
        .try_clone()
        .context(|| "share a layer's file".to_owned())?;
    let metered = Metered::new(same, scratch.progress);
    let compressed = metered.count();
    let (stream, compression) = decompress(metered).context(|| "read a layer".to_owned())?;
    let spool = match compression {
        Compression::None => None,
        _ => Some(
            tempfile::tempfile_in(scratch.directory)
                .context(|| "make a temporary file".to_owned())?,
        ),
    };
    let file = match &spool {
        Some(spool) => Arc::new(
            spool
                .try_clone()
                .context(|| "share a temporary file".to_owned())?,
        ),
        None => Arc::new(blob),
    };
    let unpacker = Unpacker {
        stream: HashReader::new(stream),
        spool,
        compressed,
        limits: scratch.limits,
        before,
    };
    let mut tar = TarReader::new(unpacker);
    while let Some(entry) = tar.next_entry()? {
        merge::apply(tree, entry, number, &file)?;
    }
    let mut unpacker = tar.into_inner();
    unpacker.drain().context(|| "read a layer".to_owned())?;
    let total = before + unpacker.stream.count();
    Hasher::check("layer", diff_id, &unpacker.stream.finish())?;
    scratch.progress.end();
    Ok(total)
}

/// What unpacking needs of its surroundings.
pub struct Scratch<'a> {
    /// Where temporary files may be made.
    pub directory: &'a Path,
    /// The bounds.
    pub limits: &'a Limits,
    /// Is told how far it has come.
    pub progress: &'a dyn Progress,
}

/// A reader that counts what is read, and tells the progress.
pub struct Metered<'a, R> {
    inner: R,
    count: Rc<Cell<u64>>,
    progress: &'a dyn Progress,
}

impl<'a, R: Read> Metered<'a, R> {
    /// A reader of `inner`.
    pub fn new(inner: R, progress: &'a dyn Progress) -> Self {
        Metered {
            inner,
            count: Rc::default(),
            progress,
        }
    }

    /// The count, which goes on while the reader is buried in others.
    pub fn count(&self) -> Rc<Cell<u64>> {
        Rc::clone(&self.count)
    }
}

impl<R: Read> Read for Metered<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.count.set(self.count.get() + count as u64);
        self.progress.advance(count as u64);
        Ok(count)
    }
}

/// The uncompressed stream: hashed, bounded, and kept in the spool on its way.
struct Unpacker<'a> {
    stream: HashReader<Box<dyn Read + 'a>>,
    spool: Option<File>,
    compressed: Rc<Cell<u64>>,
    limits: &'a Limits,
    before: u64,
}

impl Unpacker<'_> {
    /// Reads to the end, for the digest.
    fn drain(&mut self) -> io::Result<()> {
        let mut buffer = vec![0; BUFFER];
        while self.read(&mut buffer)? > 0 {}
        Ok(())
    }
}

impl Read for Unpacker<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.stream.read(buffer).map_err(corrupt)?;
        if let Some(spool) = &mut self.spool {
            let unpacked = self.stream.count();
            self.limits
                .check_unpacked(self.compressed.get(), unpacked)?;
            self.limits
                .check_unpacked(u64::MAX, self.before + unpacked)?;
            spool.write_all(&buffer[..count])?;
        } else {
            self.limits
                .check_unpacked(u64::MAX, self.before + self.stream.count())?;
        }
        Ok(count)
    }
}

impl Stream for Unpacker<'_> {
    fn skip(&mut self, mut count: u64) -> io::Result<()> {
        let mut buffer = vec![0; BUFFER.min(usize::try_from(count).unwrap_or(BUFFER))];
        while count > 0 {
            let part = buffer
                .len()
                .min(usize::try_from(count).unwrap_or(usize::MAX));
            match self.read(&mut buffer[..part]) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(read) => count -= read as u64,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// What a decompressor says of its input is said of the image, not of the system.
fn corrupt(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::InvalidInput
        | io::ErrorKind::InvalidData
        | io::ErrorKind::UnexpectedEof
        | io::ErrorKind::Other => {
            ImageError::Tar(format!("the compressed stream is damaged or cut ({error})")).into()
        }
        _ => error,
    }
}
