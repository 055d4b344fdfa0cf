//! Block device (virtio 1.2 §5.2) whose file is bound late.
//!
//! A template is booted with no file bound and with the capacity that the state
//! gives: its guest finds a disk of that size, empty, on which writes fail. A
//! child's device is restored from the same state *with* a file, whose bytes
//! then appear on the disk the guest already knows. The guest must not have
//! cached any of it: the disk is mounted after the fork.
//!
//! What lies past the end of the file, and within the capacity, reads as zeroes
//! and cannot be written: the file never grows.
//!
//! A guest that is forked while it runs goes on in a file of its own over what it shares
//! with its source: see `layers.rs`.

mod bitmap;
mod layers;

use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;

use rustix::io::Errno;
use serde::{Deserialize, Serialize};

pub use self::bitmap::format_overlay;
use self::layers::Layers;
pub use self::layers::{DiskFiles, LAYERS_MAX, merge_overlays};
use super::chain::{Buffers, Chain, ChainError};
use super::iov;
use super::queue::{DeviceIo, QueueError};
use super::{Progress, VirtioDevice, copy_config};

/// Bytes of a sector: the unit of the protocol whatever the block size (§5.2.3).
pub const SECTOR_SIZE: u64 = 512;
/// Longest id, in bytes (§5.2.6).
pub const ID_LEN: usize = 20;

const TYPE_BLOCK: u32 = 2;
const QUEUE_SIZES: &[u16] = &[256];

const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

const S_OK: u8 = 0;
const S_IOERR: u8 = 1;
const S_UNSUPP: u8 = 2;

/// A request's descriptors, less its header and its status byte.
const SEG_MAX: u32 = 254;
/// The most data of one request, in bytes. Linux asks for 1.25 MiB at most unless
/// its administrator raises max_sectors_kb.
const REQUEST_MAX: usize = 64 << 20;
/// The most data moved before others get their turn, in bytes.
const BURST_MAX: usize = 16 << 20;
/// The most sectors of one discard or write-zeroes segment: 1 GiB.
const DISCARD_SECTORS_MAX: u32 = 1 << 21;
/// The most segments of one discard or write-zeroes request.
const DISCARD_SEGMENTS_MAX: u32 = 16;
/// Holes are made in whole pages by every file system that makes any.
const DISCARD_ALIGNMENT: u32 = 8;

const SEGMENT_SIZE: usize = 16;
const SEGMENT_UNMAP: u32 = 1;

/// A disk as the guest sees it. `Default` is an empty one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockState {
    /// Size of the disk in sectors of 512 bytes, at least that of any file bound.
    pub capacity_sectors: u64,
    /// The guest is told so, and refused if it writes all the same.
    pub read_only: bool,
    /// What the guest reads as the disk's serial number: up to 20 bytes.
    pub id: String,
}

/// Why a disk could not be restored.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// An id of more than 20 bytes.
    #[error("disk id {0:?} is longer than {ID_LEN} bytes")]
    IdTooLong(String),
    /// A capacity whose size in bytes no file offset can hold.
    #[error("a disk of {0} sectors is too large")]
    CapacityTooLarge(u64),
    /// Not a regular file.
    #[error("the disk's file is not a regular file")]
    NotAFile,
    /// A file that was not opened for reading, or not for writing if the disk is
    /// writable.
    #[error("the disk's file is not open for the access that the disk needs")]
    Access,
    /// A file that would not fit into the disk.
    #[error("a file of {file} bytes does not fit a disk of {capacity}")]
    FileTooLarge {
        /// Size of the file in bytes.
        file: u64,
        /// Capacity of the disk in bytes.
        capacity: u64,
    },
    /// The disk has a file already.
    #[error("the disk has a file already")]
    Bound,
    /// Another disk has the file: two guests never share one that either writes.
    #[error("the disk's file is in use by another virtual machine")]
    InUse,
    /// No file at all, or more than a disk has layers; one that is only read has one.
    #[error("{0} files are not what a disk consists of")]
    TooManyLayers(usize),
    /// A file over another that is none of this disk's.
    #[error("the disk's layer cannot be used: {0}")]
    Overlay(&'static str),
    /// The file cannot be asked or locked.
    #[error("cannot use the disk's file")]
    Io(#[source] io::Error),
}

/// The block device.
#[derive(Debug)]
pub struct Block {
    state: BlockState,
    layers: Option<Layers>,
    /// A disk that fails over and over fills no log.
    warned: bool,
}

impl Block {
    /// A disk in `state` that reads as zeroes, until a file is bound to it.
    ///
    /// # Errors
    /// A state that no disk has.
    pub fn restore(state: &BlockState) -> Result<Self, BlockError> {
        if state.id.len() > ID_LEN {
            return Err(BlockError::IdTooLong(state.id.clone()));
        }
        Self::capacity(state)?;
        Ok(Self {
            state: state.clone(),
            layers: None,
            warned: false,
        })
    }

    /// Puts the disk's bytes into these files. The guest notices nothing, so this is
    /// for a guest that has not read the disk yet, or has read these.
    ///
    /// A file is locked as long as the disk lives: exclusively if it is written, else
    /// shared. The lock (`flock(2)`) belongs to the open file description: hand each disk
    /// one of its own, never a duplicate.
    ///
    /// # Errors
    /// A file that the disk cannot have, or that another disk has.
    pub fn bind(&mut self, files: impl Into<DiskFiles>) -> Result<(), BlockError> {
        if self.layers.is_some() {
            return Err(BlockError::Bound);
        }
        let capacity = Self::capacity(&self.state)?;
        self.layers = Some(Layers::bind(files.into(), capacity, self.state.read_only)?);
        Ok(())
    }

    /// Puts `top`, a fresh overlay, over what a disk has, which is not written from here on:
    /// others may have it below theirs.
    ///
    /// # Errors
    /// A disk without a file, or that is only read; an overlay that is not this disk's, or
    /// one too many. Nothing has changed then.
    pub fn cover(&mut self, top: File) -> Result<(), BlockError> {
        match &mut self.layers {
            Some(layers) if !self.state.read_only => layers.cover(top),
            _ => Err(BlockError::Access),
        }
    }

    /// Puts one file into the place of the `count` overlays above the lowest file, and below
    /// the one that is written: what [`merge_overlays`] has made of them.
    ///
    /// # Errors
    /// Fewer overlays, or a file that is none of this disk. Nothing has changed then.
    pub fn replace(&mut self, count: usize, merged: File) -> Result<(), BlockError> {
        match &mut self.layers {
            Some(layers) => layers.replace(count, merged),
            None => Err(BlockError::Access),
        }
    }

    /// How many files are behind it.
    pub fn layers(&self) -> usize {
        self.layers.as_ref().map_or(0, Layers::count)
    }

    /// In bytes.
    fn capacity(state: &BlockState) -> Result<u64, BlockError> {
        state
            .capacity_sectors
            .checked_mul(SECTOR_SIZE)
            .filter(|&bytes| i64::try_from(bytes).is_ok())
            .ok_or(BlockError::CapacityTooLarge(state.capacity_sectors))
    }

    /// The file that is written, or the only one, if one is bound.
    pub fn file(&self) -> Option<&File> {
        self.layers.as_ref().map(Layers::file)
    }

    /// Carries out one request, and gives the number of bytes written to it.
    fn execute(&mut self, chain: &mut Chain<'_>) -> Result<usize, ChainError> {
        let mut header = [0; 16];
        chain.readable.read_exact(&mut header)?;
        let room = chain.writable.len();
        // The status is the last writable byte, wherever the data ends.
        let mut status_byte = match room.checked_sub(1) {
            Some(at) => chain.writable.split_off(at),
            None => return Err(ChainError::TooShort),
        };
        let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = header;
        let kind = u32::from_le_bytes([k0, k1, k2, k3]);
        let sector = u64::from_le_bytes(sector);
        let status = match self.dispatch(kind, sector, chain) {
            Ok(()) => S_OK,
            Err(Failure::Unsupported) => S_UNSUPP,
            Err(Failure::Refused) => S_IOERR,
            Err(Failure::Io(error)) => {
                self.report(kind, &error);
                S_IOERR
            }
        };
        status_byte.write_all(&[status])?;
        Ok(room - chain.writable.len())
    }

    fn dispatch(&mut self, kind: u32, sector: u64, chain: &mut Chain<'_>) -> Result<(), Failure> {
        match kind {
            T_IN => self.read(sector, &mut chain.writable),
            T_OUT => self.write(sector, &mut chain.readable),
            T_FLUSH => self.flush(),
            T_GET_ID => self.get_id(&mut chain.writable),
            T_DISCARD | T_WRITE_ZEROES => self.discard(kind, &mut chain.readable),
            _ => Err(Failure::Unsupported),
        }
    }

    /// The byte offset of a transfer of `len` bytes at `sector`, if it lies on
    /// the disk and is of whole sectors.
    fn range(&self, sector: u64, len: u64) -> Result<u64, Failure> {
        let sectors = len / SECTOR_SIZE;
        let end = sector.checked_add(sectors).ok_or(Failure::Refused)?;
        if !len.is_multiple_of(SECTOR_SIZE) || end > self.state.capacity_sectors {
            return Err(Failure::Refused);
        }
        Ok(sector * SECTOR_SIZE)
    }

    fn transfer(&self, sector: u64, buffers: &Buffers<'_>) -> Result<u64, Failure> {
        if buffers.len() > REQUEST_MAX {
            return Err(Failure::Refused);
        }
        self.range(sector, buffers.len() as u64)
    }

    fn read(&self, sector: u64, buffers: &mut Buffers<'_>) -> Result<(), Failure> {
        let offset = self.transfer(sector, buffers)?;
        if let Some(layers) = &self.layers {
            layers.read(offset, buffers)?;
        }
        buffers.fill_zero();
        Ok(())
    }

    fn write(&mut self, sector: u64, buffers: &mut Buffers<'_>) -> Result<(), Failure> {
        let offset = self.transfer(sector, buffers)?;
        let layers = self.writable()?;
        if offset + buffers.len() as u64 > layers.len() {
            return Err(Failure::Refused);
        }
        Ok(layers.write(offset, buffers)?)
    }

    fn flush(&mut self) -> Result<(), Failure> {
        match &mut self.layers {
            Some(layers) if !self.state.read_only => Ok(layers.flush()?),
            // Nothing was ever written.
            _ => Ok(()),
        }
    }

    fn get_id(&self, buffers: &mut Buffers<'_>) -> Result<(), Failure> {
        let mut id = [0; ID_LEN];
        id[..self.state.id.len()].copy_from_slice(self.state.id.as_bytes());
        buffers.write_all(&id).map_err(|_| Failure::Refused)
    }

    /// Discard and write-zeroes: the segments are checked first, then applied.
    fn discard(&mut self, kind: u32, buffers: &mut Buffers<'_>) -> Result<(), Failure> {
        self.writable()?;
        let count = buffers.len() / SEGMENT_SIZE;
        if count == 0
            || count > DISCARD_SEGMENTS_MAX as usize
            || !buffers.len().is_multiple_of(SEGMENT_SIZE)
        {
            return Err(Failure::Refused);
        }
        let mut segments = Vec::with_capacity(count);
        for _ in 0..count {
            let mut raw = [0; SEGMENT_SIZE];
            buffers.read_exact(&mut raw).map_err(|_| Failure::Refused)?;
            segments.push(self.segment(kind, raw)?);
        }
        let layers = self.writable()?;
        for Segment { offset, len, unmap } in segments {
            let is_advice = kind == T_DISCARD;
            match layers.clear(offset, len, unmap, is_advice) {
                Ok(()) => {}
                // A discard is advice (§5.2.6.2); zeroes the driver can write itself.
                Err(Errno::OPNOTSUPP) if is_advice => {}
                Err(Errno::OPNOTSUPP) => return Err(Failure::Unsupported),
                Err(error) => return Err(Failure::Io(error.into())),
            }
        }
        Ok(())
    }

    fn segment(&self, kind: u32, raw: [u8; SEGMENT_SIZE]) -> Result<Segment, Failure> {
        let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = raw;
        let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
        let flags = u32::from_le_bytes(flags);
        // §5.2.6.2: unknown bits, or "unmap" in a discard, are unsupported.
        let allowed = if kind == T_WRITE_ZEROES {
            SEGMENT_UNMAP
        } else {
            0
        };
        if flags & !allowed != 0 {
            return Err(Failure::Unsupported);
        }
        if sectors > DISCARD_SECTORS_MAX {
            return Err(Failure::Refused);
        }
        let len = u64::from(sectors) * SECTOR_SIZE;
        Ok(Segment {
            offset: self.range(sector, len)?,
            len,
            unmap: kind == T_DISCARD || flags & SEGMENT_UNMAP != 0,
        })
    }

    /// The files, if the guest may write them.
    fn writable(&mut self) -> Result<&mut Layers, Failure> {
        match &mut self.layers {
            Some(layers) if !self.state.read_only => Ok(layers),
            _ => Err(Failure::Refused),
        }
    }

    /// The host's disk failed the guest's: worth one line.
    fn report(&mut self, kind: u32, error: &io::Error) {
        if std::mem::replace(&mut self.warned, true) {
            log::debug!("disk {:?}: request {kind}: {error}", self.state.id);
        } else {
            log::warn!(
                "disk {:?}: request {kind} failed on the host: {error}",
                self.state.id
            );
        }
    }
}

/// Why a request was not carried out.
enum Failure {
    /// The guest asked for what cannot be done to this disk.
    Refused,
    /// The guest asked for what this device does not know.
    Unsupported,
    /// The host could not do it.
    Io(io::Error),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

struct Segment {
    /// Bytes.
    offset: u64,
    /// Bytes.
    len: u64,
    /// Give the space back.
    unmap: bool,
}

impl VirtioDevice for Block {
    type State = BlockState;

    fn device_type(&self) -> u32 {
        TYPE_BLOCK
    }

    fn queue_sizes(&self) -> &'static [u16] {
        QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        let access = if self.state.read_only {
            F_RO
        } else {
            F_FLUSH | F_DISCARD | F_WRITE_ZEROES
        };
        F_SEG_MAX | F_BLK_SIZE | access
    }

    /// The layout is that of §5.2.4; fields of features not offered are zero.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; 60];
        let mut put = |at: usize, bytes: &[u8]| {
            config[at..at + bytes.len()].copy_from_slice(bytes);
        };
        put(0, &self.state.capacity_sectors.to_le_bytes());
        put(12, &SEG_MAX.to_le_bytes());
        put(20, &(SECTOR_SIZE as u32).to_le_bytes());
        if !self.state.read_only {
            put(36, &DISCARD_SECTORS_MAX.to_le_bytes());
            put(40, &DISCARD_SEGMENTS_MAX.to_le_bytes());
            put(44, &DISCARD_ALIGNMENT.to_le_bytes());
            put(48, &DISCARD_SECTORS_MAX.to_le_bytes());
            put(52, &DISCARD_SEGMENTS_MAX.to_le_bytes());
            put(56, &[1]); // write-zeroes may unmap
        }
        copy_config(&config, offset, data);
    }

    fn process_queue(
        &mut self,
        queue: usize,
        io: &mut DeviceIo<'_>,
    ) -> Result<Progress, QueueError> {
        let mut moved = 0;
        while moved < BURST_MAX {
            let Some(mut chain) = io.pop_or_wait(queue)? else {
                return Ok(Progress::Done);
            };
            // Each request counts for a page at least: a bound on their number.
            moved += 4096 + chain.readable.len() + chain.writable.len();
            let written = self
                .execute(&mut chain)
                .map_err(|source| QueueError::Chain { queue, source })?;
            io.push_used(queue, &chain, written)?;
        }
        Ok(Progress::More)
    }

    fn host_events(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn process_host_events(&mut self, _io: &mut DeviceIo<'_>) -> Result<Progress, QueueError> {
        Ok(Progress::Done)
    }

    fn reset(&mut self) {}

    fn save(&self) -> BlockState {
        self.state.clone()
    }
}

#[cfg(test)]
mod tests;
