//! Which blocks of a disk an overlay has: a bitmap behind its data.
//!
//! ```text
//!   0                     size, to a block          + a bit for each block, to a block
//!   | data, each block at its own place | bitmap    | trailer: `vmrunlay`, version, size |
//! ```
//! All integers are little-endian. The file is sparse, and has exactly that length.

use rustix::io::{pread, pwrite};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// The unit of a layer, in bytes.
pub(super) const BLOCK: u64 = 4096;

const MAGIC: [u8; 8] = *b"vmrunlay";
const VERSION: u64 = 1;
/// Bytes of the bitmap that are read, kept and written together.
const PIECE: usize = BLOCK as usize;
/// Blocks of which a piece tells.
const PIECE_BLOCKS: u64 = PIECE as u64 * 8;

/// Makes `file`, which is empty, an overlay in which nothing is written yet, for a disk of
/// `size` bytes.
///
/// # Errors
/// What the file system says.
pub fn format_overlay(file: &File, size: u64) -> io::Result<()> {
    let length = Length::of(size).ok_or(io::ErrorKind::FileTooLarge)?;
    file.set_len(length.all)?;
    let mut trailer = [0; 24];
    trailer[..8].copy_from_slice(&MAGIC);
    trailer[8..16].copy_from_slice(&VERSION.to_le_bytes());
    trailer[16..].copy_from_slice(&size.to_le_bytes());
    file.write_all_at(&trailer, length.all - BLOCK)
}

/// Where things are in an overlay, in bytes.
struct Length {
    bitmap: u64,
    pieces: usize,
    all: u64,
}

impl Length {
    /// `None` for a size that no file has.
    fn of(size: u64) -> Option<Self> {
        let bitmap = size.checked_next_multiple_of(BLOCK)?;
        let pieces = (bitmap / BLOCK).div_ceil(PIECE_BLOCKS);
        let all = bitmap.checked_add((pieces + 1) * BLOCK)?;
        i64::try_from(all).ok()?;
        Some(Self {
            bitmap,
            pieces: usize::try_from(pieces).ok()?,
            all,
        })
    }
}

/// The bitmap of an overlay, as its file has it and with what is not written yet.
#[derive(Debug)]
pub(super) struct Bitmap {
    /// Where it lies in the file, in bytes.
    at: u64,
    pieces: Vec<Piece>,
}

#[derive(Debug, Default, Clone)]
struct Piece {
    /// `None` if no bit is set.
    bits: Option<Box<[u8; PIECE]>>,
    is_dirty: bool,
}

impl Bitmap {
    /// Reads that of an overlay of a disk of `size` bytes.
    ///
    /// # Errors
    /// What is wrong with the file.
    pub(super) fn read(file: &File, size: u64) -> Result<Self, Unfit> {
        let length = Length::of(size).ok_or(Unfit::Length)?;
        if file.metadata()?.len() != length.all {
            return Err(Unfit::Length);
        }
        let mut trailer = [0; 24];
        file.read_exact_at(&mut trailer, length.all - BLOCK)?;
        let [magic, version, of] = [&trailer[..8], &trailer[8..16], &trailer[16..]];
        if magic != MAGIC || version != VERSION.to_le_bytes() || of != size.to_le_bytes() {
            return Err(Unfit::Trailer);
        }
        let mut pieces = vec![Piece::default(); length.pieces];
        for (piece, at) in pieces.iter_mut().zip((length.bitmap..).step_by(PIECE)) {
            let mut bits = [0; PIECE];
            file.read_exact_at(&mut bits, at)?;
            if bits.iter().any(|byte| *byte != 0) {
                piece.bits = Some(Box::new(bits));
            }
        }
        Ok(Self {
            at: length.bitmap,
            pieces,
        })
    }

    /// Whether the layer has this block, which is one of the disk.
    pub(super) fn has(&self, block: u64) -> bool {
        let piece = self.pieces.get((block / PIECE_BLOCKS) as usize);
        let bit = block % PIECE_BLOCKS;
        piece
            .and_then(|piece| piece.bits.as_ref())
            .is_some_and(|bits| bits[(bit / 8) as usize] & 1 << (bit % 8) != 0)
    }

    /// Notes that the layer has these blocks; in the file with [`Self::write`].
    pub(super) fn set(&mut self, blocks: std::ops::Range<u64>) {
        for block in blocks {
            let Some(piece) = self.pieces.get_mut((block / PIECE_BLOCKS) as usize) else {
                return;
            };
            let bits = piece.bits.get_or_insert_with(|| Box::new([0; PIECE]));
            let bit = block % PIECE_BLOCKS;
            let byte = &mut bits[(bit / 8) as usize];
            piece.is_dirty |= *byte & 1 << (bit % 8) == 0;
            *byte |= 1 << (bit % 8);
        }
    }

    /// Writes what is new of it; whether anything was.
    ///
    /// # Errors
    /// What the file system says; it is tried again next time.
    pub(super) fn write(&mut self, file: &File) -> io::Result<bool> {
        let mut any = false;
        for (piece, at) in self.pieces.iter_mut().zip((self.at..).step_by(PIECE)) {
            if let (Some(bits), true) = (&piece.bits, piece.is_dirty) {
                write_all(file, &bits[..], at)?;
                piece.is_dirty = false;
                any = true;
            }
        }
        Ok(any)
    }
}

/// Why a file is no overlay of a disk.
#[derive(Debug)]
pub(super) enum Unfit {
    Length,
    Trailer,
    Io(io::Error),
}

impl From<io::Error> for Unfit {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// pwrite(2) until all is written.
pub(super) fn write_all(file: &File, mut bytes: &[u8], mut at: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        match pwrite(file, bytes, at)? {
            0 => return Err(io::ErrorKind::WriteZero.into()),
            count => {
                bytes = &bytes[count..];
                at += count as u64;
            }
        }
    }
    Ok(())
}

/// pread(2) until `bytes` are full; what lies behind the file's end is zeroes.
pub(super) fn read_all(file: &File, bytes: &mut [u8], at: u64) -> io::Result<()> {
    let mut done = 0;
    while done < bytes.len() {
        match pread(file, &mut bytes[done..], at + done as u64)? {
            0 => break,
            count => done += count,
        }
    }
    bytes[done..].fill(0);
    Ok(())
}
