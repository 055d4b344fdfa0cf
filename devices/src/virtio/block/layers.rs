//! The bytes of a disk: a file, or files over each other.
//!
//! A disk whose guest was forked while it ran goes on in a layer of its own, for each of
//! the family: an overlay, which has the blocks that were written since. What was before is
//! below it, shared by all and never written again. No data are copied at the fork.
//!
//! A bit of an overlay gets to the disk after the block that it tells of: a flush writes the
//! data first, then the bitmap. So an overlay whose owner was killed is as a disk that has
//! lost its power: what was flushed is there.

use super::bitmap::{BLOCK, Bitmap, Unfit, format_overlay, read_all, write_all};
use super::{BlockError, Buffers, iov};
use rustix::fs::{
    FallocateFlags, FlockOperation, OFlags, fallocate, fcntl_getfl, fdatasync, flock,
};
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;

/// The most files behind a disk.
pub const LAYERS_MAX: usize = 32;

/// The files behind one disk, the lowest first; the last is the one that is written. The
/// first is a plain image, each other one an overlay ([`super::format_overlay`]).
#[derive(Debug)]
pub struct DiskFiles(pub Vec<File>);

impl From<File> for DiskFiles {
    fn from(file: File) -> Self {
        Self(vec![file])
    }
}

/// One file.
#[derive(Debug)]
struct Layer {
    file: File,
    /// Of an overlay; a plain image has every block.
    bitmap: Option<Bitmap>,
}

impl Layer {
    fn has(&self, block: u64) -> bool {
        self.bitmap.as_ref().is_none_or(|bitmap| bitmap.has(block))
    }

    fn wrote(&mut self, blocks: std::ops::Range<u64>) {
        if let Some(bitmap) = &mut self.bitmap {
            bitmap.set(blocks);
        }
    }
}

/// The files of a disk, open and locked.
#[derive(Debug)]
pub(super) struct Layers {
    /// The lowest first.
    below: Vec<Layer>,
    top: Layer,
    /// In bytes; nothing past it is ever written.
    len: u64,
    /// Whether all that is below is on its disk.
    is_below_synced: bool,
}

impl Layers {
    pub(super) fn bind(
        DiskFiles(files): DiskFiles,
        capacity: u64,
        read_only: bool,
    ) -> Result<Self, BlockError> {
        if files.len() > LAYERS_MAX || (read_only && files.len() > 1) {
            return Err(BlockError::TooManyLayers(files.len()));
        }
        let count = files.len();
        let mut below: Vec<Layer> = Vec::new();
        let mut len = 0;
        for (number, file) in (1..).zip(files) {
            check_access(&file, number == count && !read_only)?;
            let bitmap = match number {
                1 => {
                    // Only now, when it is locked: nobody else of ours changes it any more.
                    len = file.metadata().map_err(BlockError::Io)?.len();
                    if len > capacity {
                        return Err(BlockError::FileTooLarge {
                            file: len,
                            capacity,
                        });
                    }
                    None
                }
                _ => Some(read_bitmap(&file, len)?),
            };
            below.push(Layer { file, bitmap });
        }
        let top = below.pop().ok_or(BlockError::TooManyLayers(0))?;
        Ok(Self {
            below,
            top,
            len,
            is_below_synced: false,
        })
    }

    /// In bytes.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// The file that is written.
    pub(super) fn file(&self) -> &File {
        &self.top.file
    }

    /// How many files there are.
    pub(super) fn count(&self) -> usize {
        self.below.len() + 1
    }

    /// Reads from `offset`; what is not the disk's any more is left in `buffers`.
    pub(super) fn read(&self, mut offset: u64, buffers: &mut Buffers<'_>) -> io::Result<()> {
        while !buffers.is_empty() && offset < self.len {
            let (layer, end) = self.run(offset, offset + buffers.len() as u64);
            let rest = buffers.split_off((end - offset) as usize);
            while !buffers.is_empty() {
                let count = iov::preadv(layer.file.as_fd(), buffers.slices(), offset)?;
                if count == 0 {
                    // Somebody has cut it short.
                    buffers.fill_zero();
                    break;
                }
                buffers.advance(count);
                offset += count as u64;
            }
            offset = end;
            *buffers = rest;
        }
        Ok(())
    }

    /// The layer with the block at `offset`, and how far it, or the disk, goes; at most to
    /// `limit`.
    fn run(&self, offset: u64, limit: u64) -> (&Layer, u64) {
        let limit = limit.min(self.len);
        if self.below.is_empty() {
            return (&self.top, limit);
        }
        let first = self.newest(offset / BLOCK);
        let mut end = offset;
        while end < limit && std::ptr::eq(self.newest(end / BLOCK), first) {
            end = ((end / BLOCK + 1) * BLOCK).min(limit);
        }
        (first, end)
    }

    /// The newest layer that has a block.
    fn newest(&self, block: u64) -> &Layer {
        let mut newest = self.below.iter().chain([&self.top]).rev();
        newest.find(|layer| layer.has(block)).unwrap_or(&self.top)
    }

    /// Writes at `offset`; all of it lies on the disk.
    pub(super) fn write(&mut self, mut offset: u64, buffers: &mut Buffers<'_>) -> io::Result<()> {
        while !buffers.is_empty() {
            let end = self.ready(offset, offset + buffers.len() as u64)?;
            let rest = buffers.split_off((end - offset) as usize);
            let blocks = offset / BLOCK..end.div_ceil(BLOCK);
            while !buffers.is_empty() {
                let count = iov::pwritev(self.top.file.as_fd(), buffers.slices(), offset)?;
                if count == 0 {
                    return Err(io::ErrorKind::WriteZero.into());
                }
                buffers.advance(count);
                offset += count as u64;
            }
            self.top.wrote(blocks);
            *buffers = rest;
        }
        Ok(())
    }

    /// Sees to it that the top may be written at `offset`, and says how far, at most to
    /// `limit`: whole blocks as they are, a part of one when the rest of it is there.
    fn ready(&mut self, offset: u64, limit: u64) -> io::Result<u64> {
        if self.below.is_empty() {
            return Ok(limit);
        }
        let block_end = |at: u64| ((at / BLOCK + 1) * BLOCK).min(self.len);
        let is_whole = offset.is_multiple_of(BLOCK) && limit >= block_end(offset);
        if is_whole {
            // The last one may be cut by the end of the disk.
            return Ok(match limit == self.len {
                true => limit,
                false => limit / BLOCK * BLOCK,
            });
        }
        let end = block_end(offset).min(limit);
        self.copy_up(offset / BLOCK)?;
        Ok(end)
    }

    /// Has the top have this block.
    fn copy_up(&mut self, block: u64) -> io::Result<()> {
        if self.top.has(block) {
            return Ok(());
        }
        let at = block * BLOCK;
        let len = (self.len - at).min(BLOCK) as usize;
        let mut bytes = [0; BLOCK as usize];
        read_all(&self.newest(block).file, &mut bytes[..len], at)?;
        write_all(&self.top.file, &bytes[..len], at)?;
        self.top.wrote(block..block + 1);
        Ok(())
    }

    /// Has all that was written be on its disk.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        if !self.is_below_synced {
            // What its guest, or that of which it was forked, wrote before the fork.
            for layer in &self.below {
                fdatasync(&layer.file)?;
            }
            self.is_below_synced = true;
        }
        fdatasync(&self.top.file)?;
        if let Some(bitmap) = &mut self.top.bitmap
            && bitmap.write(&self.top.file)?
        {
            fdatasync(&self.top.file)?;
        }
        Ok(())
    }

    /// Makes a range of the disk read as zeroes. What of it are parts of blocks that the
    /// top does not have is left as it is if that `is_advice`.
    ///
    /// # Errors
    /// `OPNOTSUPP` of a file system that cannot.
    pub(super) fn clear(
        &mut self,
        offset: u64,
        len: u64,
        unmap: bool,
        is_advice: bool,
    ) -> Result<(), Errno> {
        let end = offset.saturating_add(len).min(self.len);
        if end <= offset {
            return Ok(());
        }
        let (mut from, mut to) = (offset, end);
        if !self.below.is_empty() {
            from = offset.next_multiple_of(BLOCK);
            if end != self.len {
                to = end / BLOCK * BLOCK;
            }
            if !is_advice {
                self.clear_part(offset, from.min(end))?;
                self.clear_part(to.max(offset), end)?;
            }
        }
        if from >= to {
            return Ok(());
        }
        let keep = FallocateFlags::KEEP_SIZE;
        let attempt = |flags| fallocate(&self.top.file, keep | flags, from, to - from);
        let mut result = Err(Errno::OPNOTSUPP);
        if !unmap {
            result = attempt(FallocateFlags::ZERO_RANGE);
        }
        if result == Err(Errno::OPNOTSUPP) {
            result = attempt(FallocateFlags::PUNCH_HOLE);
        }
        result?;
        self.top.wrote(from / BLOCK..to.div_ceil(BLOCK));
        Ok(())
    }

    /// The same of a part of one block.
    fn clear_part(&mut self, from: u64, to: u64) -> Result<(), Errno> {
        if from >= to {
            return Ok(());
        }
        let zeroes = [0; BLOCK as usize];
        let len = (to - from).min(BLOCK) as usize;
        self.copy_up(from / BLOCK)
            .and_then(|()| write_all(&self.top.file, &zeroes[..len], from))
            .map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::IO))
    }

    /// Puts `top`, a fresh overlay, over all.
    pub(super) fn cover(&mut self, top: File) -> Result<(), BlockError> {
        if self.count() >= LAYERS_MAX {
            return Err(BlockError::TooManyLayers(LAYERS_MAX + 1));
        }
        check_access(&top, true)?;
        let bitmap = Some(read_bitmap(&top, self.len)?);
        self.write_bitmap().map_err(BlockError::Io)?;
        lock(&self.top.file, FlockOperation::NonBlockingLockShared)?;
        let top = Layer { file: top, bitmap };
        self.below.push(std::mem::replace(&mut self.top, top));
        self.is_below_synced = false;
        Ok(())
    }

    /// Has one file in the place of the `count` overlays above the lowest file; see
    /// [`merge_overlays`].
    pub(super) fn replace(&mut self, count: usize, merged: File) -> Result<(), BlockError> {
        if count == 0 || count >= self.below.len() {
            return Err(BlockError::Overlay("it is for more layers than there are"));
        }
        check_access(&merged, false)?;
        let bitmap = Some(read_bitmap(&merged, self.len)?);
        let layer = Layer {
            file: merged,
            bitmap,
        };
        self.below.splice(1..=count, [layer]);
        self.is_below_synced = false;
        Ok(())
    }

    fn write_bitmap(&mut self) -> io::Result<bool> {
        match &mut self.top.bitmap {
            Some(bitmap) => bitmap.write(&self.top.file),
            None => Ok(false),
        }
    }
}

impl Drop for Layers {
    fn drop(&mut self) {
        if let Err(error) = self.write_bitmap() {
            log::warn!("what a disk has had written and not flushed is lost: {error}");
        }
    }
}

/// Writes what `overlays` are together, the lowest first, to `into`, an empty file: an
/// overlay in the place of them all. They are of a disk of `size` bytes, and nobody writes
/// them any more.
///
/// # Errors
/// A file that is no such overlay, or what the file system says.
pub fn merge_overlays(overlays: &[File], size: u64, into: &File) -> io::Result<()> {
    format_overlay(into, size)?;
    let mut bitmap = bitmap_of(into, size)?;
    let bitmaps = overlays.iter().map(|file| bitmap_of(file, size));
    let bitmaps = bitmaps.collect::<io::Result<Vec<_>>>()?;
    let mut bytes = [0; BLOCK as usize];
    for block in 0..size.div_ceil(BLOCK) {
        let mut newest = overlays.iter().zip(&bitmaps).rev();
        let Some((file, _)) = newest.find(|(_, bitmap)| bitmap.has(block)) else {
            continue;
        };
        let at = block * BLOCK;
        let len = (size - at).min(BLOCK) as usize;
        read_all(file, &mut bytes[..len], at)?;
        // A hole is as good.
        if bytes[..len].iter().any(|byte| *byte != 0) {
            write_all(into, &bytes[..len], at)?;
        }
        bitmap.set(block..block + 1);
    }
    fdatasync(into)?;
    bitmap.write(into)?;
    Ok(fdatasync(into)?)
}

fn bitmap_of(file: &File, size: u64) -> io::Result<Bitmap> {
    Bitmap::read(file, size).map_err(|unfit| match unfit {
        Unfit::Io(error) => error,
        Unfit::Length | Unfit::Trailer => io::ErrorKind::InvalidData.into(),
    })
}

/// Whether it is a file of the right kind, and locks it.
fn check_access(file: &File, write: bool) -> Result<(), BlockError> {
    if !file.metadata().map_err(BlockError::Io)?.is_file() {
        return Err(BlockError::NotAFile);
    }
    let flags = fcntl_getfl(file).map_err(|e| BlockError::Io(e.into()))?;
    match flags & OFlags::ACCMODE {
        mode if mode == OFlags::RDWR => {}
        mode if mode == OFlags::RDONLY && !write => {}
        _ => return Err(BlockError::Access),
    }
    lock(
        file,
        match write {
            true => FlockOperation::NonBlockingLockExclusive,
            false => FlockOperation::NonBlockingLockShared,
        },
    )
}

fn lock(file: &File, how: FlockOperation) -> Result<(), BlockError> {
    flock(file, how).map_err(|error| match error {
        Errno::WOULDBLOCK => BlockError::InUse,
        other => BlockError::Io(other.into()),
    })
}

fn read_bitmap(file: &File, len: u64) -> Result<Bitmap, BlockError> {
    Bitmap::read(file, len).map_err(|unfit| match unfit {
        Unfit::Length => BlockError::Overlay("it has another length than one of this disk"),
        Unfit::Trailer => BlockError::Overlay("its end does not say that it is one of this disk"),
        Unfit::Io(error) => BlockError::Io(error),
    })
}
