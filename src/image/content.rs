//! Where a regular file's bytes are until they are written into an image.

use super::error::{Context, ImageError, Result, printable};
use rustix::fs::{Mode, OFlags, ResolveFlags, Stat, openat2};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use vm_run_archive::Piece;

/// The bytes of a regular file.
#[derive(Clone, Debug)]
pub struct Content {
    size: u64,
    source: Source,
}

#[derive(Clone, Debug)]
enum Source {
    /// Runs of an unpacked layer; between them, holes.
    Layer { file: Arc<File>, pieces: Vec<Piece> },
    /// A file of a directory on the host.
    Host {
        root: Arc<OwnedFd>,
        path: Vec<u8>,
        stamp: Stamp,
    },
}

/// By which a file on the host is known to be unchanged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp([i128; 6]);

impl Stamp {
    /// The stamp of a file as `stat` has it.
    pub fn of(stat: &Stat) -> Stamp {
        let nanoseconds =
            |seconds: i64, nsec: u64| i128::from(seconds) * 1_000_000_000 + i128::from(nsec);
        Stamp([
            stat.st_dev.into(),
            stat.st_ino.into(),
            stat.st_size.into(),
            stat.st_mode.into(),
            nanoseconds(stat.st_mtime, stat.st_mtime_nsec),
            nanoseconds(stat.st_ctime, stat.st_ctime_nsec),
        ])
    }

    /// As bytes, for a digest.
    pub fn bytes(&self) -> Vec<u8> {
        self.0
            .iter()
            .flat_map(|field| field.to_le_bytes())
            .collect()
    }
}

/// A file's content, open for reading.
pub struct Opened<'a> {
    content: &'a Content,
    host: Option<File>,
}

impl Content {
    /// A file of an unpacked layer.
    pub fn from_layer(file: &Arc<File>, size: u64, pieces: Vec<Piece>) -> Content {
        Content {
            size,
            source: Source::Layer {
                file: Arc::clone(file),
                pieces,
            },
        }
    }

    /// The file `path` below the directory `root` on the host.
    pub fn from_host(root: &Arc<OwnedFd>, path: Vec<u8>, stat: &Stat) -> Content {
        let stamp = Stamp::of(stat);
        let source = Source::Host {
            root: Arc::clone(root),
            path,
            stamp,
        };
        Content {
            size: u64::try_from(stat.st_size).unwrap_or(0),
            source,
        }
    }

    /// Length in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Bytes of memory that it takes, roughly.
    pub fn memory(&self) -> usize {
        match &self.source {
            Source::Layer { pieces, .. } => size_of_val(pieces.as_slice()),
            Source::Host { path, .. } => path.len(),
        }
    }

    /// Opens the file.
    ///
    /// # Errors
    /// [`ImageError::Changed`] when a file on the host is not the one that was seen.
    pub fn open(&self) -> Result<Opened<'_>> {
        let host = match &self.source {
            Source::Layer { .. } => None,
            Source::Host { root, path, stamp } => {
                let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
                let beneath =
                    ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
                let file = openat2(root, path.as_slice(), flags, Mode::empty(), beneath)
                    .map_err(std::io::Error::from)
                    .context(|| format!("open {}", printable(path)))?;
                let stat = rustix::fs::fstat(&file)
                    .map_err(std::io::Error::from)
                    .context(|| format!("stat {}", printable(path)))?;
                if Stamp::of(&stat) != *stamp {
                    return Err(ImageError::Changed(printable(path)));
                }
                Some(File::from(file))
            }
        };
        Ok(Opened {
            content: self,
            host,
        })
    }
}

impl Opened<'_> {
    /// Fills `buffer` with the bytes from `offset` on, holes as zeros.
    ///
    /// # Errors
    /// [`ImageError::Changed`] when a file on the host became shorter.
    pub fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        match (&self.content.source, &self.host) {
            (Source::Layer { file, pieces }, _) => read_pieces(file, pieces, buffer, offset)
                .context(|| "read an unpacked layer".to_owned()),
            (Source::Host { path, .. }, Some(file)) => {
                file.read_exact_at(buffer, offset)
                    .map_err(|error| match error.kind() {
                        std::io::ErrorKind::UnexpectedEof => ImageError::Changed(printable(path)),
                        _ => ImageError::Io {
                            what: format!("read {}", printable(path)),
                            source: error,
                        },
                    })
            }
            (Source::Host { path, .. }, None) => Err(ImageError::Changed(printable(path))),
        }
    }
}

fn read_pieces(
    file: &File,
    pieces: &[Piece],
    buffer: &mut [u8],
    offset: u64,
) -> std::io::Result<()> {
    buffer.fill(0);
    let end = offset + buffer.len() as u64;
    let first = pieces.partition_point(|piece| piece.offset + piece.length <= offset);
    for piece in pieces[first..]
        .iter()
        .take_while(|piece| piece.offset < end)
    {
        let from = piece.offset.max(offset);
        let to = (piece.offset + piece.length).min(end);
        let part = &mut buffer[(from - offset) as usize..(to - offset) as usize];
        file.read_exact_at(part, piece.position + (from - piece.offset))?;
    }
    Ok(())
}
