//! Sparse files as blobs: pieces of one length, each a frame of zstd.
//!
//! A piece of zeroes is always the same frame, and costs neither compression nor the
//! opposite: a disk has ten gibibytes, and most of them are holes. The same file gives the
//! same blob, however much of it is a hole.

use crate::progress::Progress;
use anyhow::{Context, Result, bail};
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use zstd::bulk::{Compressor, Decompressor};
use zstd::zstd_safe::{compress_bound, find_frame_compressed_size};

/// What of a file is in one frame.
const PIECE: usize = 4 << 20;
/// Memory compresses about as well with the next ones, which take longer.
const LEVEL: i32 = 3;

/// Compresses the first `bytes` bytes of a file.
///
/// # Errors
/// What the file system says.
pub fn compress(
    from: &File,
    bytes: u64,
    to: &mut dyn Write,
    progress: &dyn Progress,
) -> Result<()> {
    let mut compressor = Compressor::new(LEVEL)?;
    let mut buffer = vec![0; PIECE];
    let zeroes = compressor.compress(&buffer)?;
    for at in (0..bytes).step_by(PIECE) {
        let len = (bytes - at).min(PIECE as u64);
        let piece = &mut buffer[..len as usize];
        if is_hole(from, at, len)? {
            piece.fill(0);
        } else {
            from.read_exact_at(piece, at)?;
        }
        if piece.len() == PIECE && is_zeroes(piece) {
            to.write_all(&zeroes)?;
        } else {
            to.write_all(&compressor.compress(piece)?)?;
        }
        progress.advance(len);
    }
    Ok(())
}

fn is_hole(file: &File, at: u64, len: u64) -> io::Result<bool> {
    match seek(file, SeekFrom::Data(at)) {
        Ok(data) => Ok(data >= at + len),
        Err(Errno::NXIO) => Ok(true),
        Err(e) => Err(e.into()),
    }
}

fn is_zeroes(bytes: &[u8]) -> bool {
    bytes.first() == Some(&0) && bytes[1..] == bytes[..bytes.len() - 1]
}

/// A blob on its way to a file again. It is a stranger's.
pub struct Pieces<R> {
    from: R,
    /// What was read, and how far it was used.
    read: Vec<u8>,
    used: usize,
    piece: Vec<u8>,
    zeroes: Vec<u8>,
    decompressor: Decompressor<'static>,
}

impl<R: Read> Pieces<R> {
    /// The pieces of a blob.
    ///
    /// # Errors
    /// What zstd says.
    pub fn new(from: R) -> Result<Self> {
        Ok(Self {
            from,
            read: Vec::new(),
            used: 0,
            piece: Vec::with_capacity(PIECE),
            zeroes: Compressor::new(LEVEL)?.compress(&vec![0; PIECE])?,
            decompressor: Decompressor::new()?,
        })
    }

    /// Hands each piece that is not all zeroes to `write`, with its place. Returns how many
    /// bytes there were, which are `most` at most.
    ///
    /// # Errors
    /// A stream that is damaged or longer, or what `write` says.
    pub fn unpack(
        mut self,
        most: u64,
        mut write: impl FnMut(&[u8], u64) -> Result<()>,
        progress: &dyn Progress,
    ) -> Result<u64> {
        let mut at = 0;
        while self.fill().context("it cannot be read")? {
            if at % PIECE as u64 != 0 {
                bail!("it is damaged: a piece is too short");
            }
            let ahead = &self.read[self.used..];
            let len = if ahead.starts_with(&self.zeroes) {
                self.used += self.zeroes.len();
                PIECE as u64
            } else {
                let size = find_frame_compressed_size(ahead).ok();
                let frame = size.and_then(|size| ahead.get(..size));
                let frame = frame.context("it is damaged or cut")?;
                let unpacked = self
                    .decompressor
                    .decompress_to_buffer(frame, &mut self.piece);
                let len = unpacked.context("it is damaged or cut")? as u64;
                self.used += frame.len();
                if len <= most - at {
                    write(&self.piece, at)?;
                }
                len
            };
            if len > most - at {
                bail!("it unpacks to more than the {most} bytes that the manifest says");
            }
            at += len;
            progress.advance(len);
        }
        Ok(at)
    }

    /// Has a whole frame ready, if there is one left.
    fn fill(&mut self) -> io::Result<bool> {
        let frame = compress_bound(PIECE);
        if self.read.len() - self.used < frame {
            self.read.drain(..self.used);
            self.used = 0;
            // Twice as much, so that small frames are not moved one by one.
            let more = 2 * frame - self.read.len();
            self.from
                .by_ref()
                .take(more as u64)
                .read_to_end(&mut self.read)?;
        }
        Ok(self.used < self.read.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::Quiet;

    const MIB: usize = 1 << 20;

    fn packed(file: &File, bytes: u64) -> Vec<u8> {
        let mut blob = Vec::new();
        compress(file, bytes, &mut blob, &Quiet).expect("compresses");
        blob
    }

    fn file(contents: &[(usize, &[u8])], len: usize) -> File {
        let file = tempfile::tempfile().expect("a file");
        file.set_len(len as u64).expect("sized");
        for (at, bytes) in contents {
            file.write_all_at(bytes, *at as u64).expect("writes");
        }
        file
    }

    fn unpacked(blob: &[u8], most: usize) -> Result<Vec<u8>> {
        let mut all = vec![0; most];
        let put = |bytes: &[u8], at: u64| {
            all[at as usize..][..bytes.len()].copy_from_slice(bytes);
            Ok(())
        };
        let len = Pieces::new(blob)?.unpack(most as u64, put, &Quiet)?;
        all.truncate(len as usize);
        Ok(all)
    }

    #[test]
    fn a_file_comes_out_as_it_went_in() {
        for len in [0, 1, 4 * MIB, 30 * MIB + 5] {
            let mut expected = vec![0; len];
            let ends: Vec<(usize, &[u8])> = match len {
                0 => Vec::new(),
                _ => vec![(len - 1, b"x"), (len / 2, b"y")],
            };
            for (at, bytes) in &ends {
                expected[*at] = bytes[0];
            }
            let blob = packed(&file(&ends, len), len as u64);
            assert!(blob.len() < 4096, "{} bytes", blob.len());
            assert!(unpacked(&blob, len).expect("unpacks") == expected);
            // Zeroes that are no hole are the same.
            let full = file(&[(0, &expected)], len);
            assert!(packed(&full, len as u64) == blob);
            if len > 0 {
                assert!(unpacked(&blob, len - 1).is_err(), "more than it may");
                let cut = unpacked(&blob[..blob.len() - 1], len);
                assert!(cut.is_err(), "cut");
            }
        }
    }

    #[test]
    fn what_does_not_compress_goes_through() {
        let mut state = 1u64;
        let mut random = vec![0; 9 * MIB];
        for word in random.chunks_exact_mut(8) {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1);
            let mixed = (state ^ (state >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            word.copy_from_slice(&mixed.to_le_bytes());
        }
        let blob = packed(&file(&[(0, &random)], random.len()), random.len() as u64);
        assert!(unpacked(&blob, random.len()).expect("unpacks") == random);
    }

    #[test]
    fn pieces_of_another_length_are_refused() {
        let frame = |len: usize| zstd::bulk::compress(&vec![7; len], LEVEL).expect("a frame");
        for (expected, blob) in [
            ("damaged", frame(PIECE + 1)),
            ("too short", [frame(100), frame(100)].concat()),
            ("damaged", b"plain".to_vec()),
            ("damaged", [frame(PIECE), b"more".to_vec()].concat()),
        ] {
            let line = format!("{:#}", unpacked(&blob, 3 * PIECE).expect_err(expected));
            assert!(line.contains(expected), "{line}");
        }
        let whole = [frame(PIECE), frame(5)].concat();
        let all = unpacked(&whole, 2 * PIECE).expect("unpacks");
        assert!(all == vec![7; PIECE + 5]);
    }
}
