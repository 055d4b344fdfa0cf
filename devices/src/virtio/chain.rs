//! Descriptor chains, checked whole before any byte of them is used.
//!
//! The iterator of `virtio-queue` ends silently where a chain is broken; here a
//! chain is either well-formed or an error. Guest memory is only ever reached
//! through volatile slices: the guest may write it at the same time.

use vm_memory::{GuestAddress, GuestMemory as _, Permissions};

use crate::{DeviceMemory, GuestMemory, GuestSlice};

/// What is wrong with a descriptor chain (virtio 1.2 §2.7.4, §2.7.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// No last descriptor: a loop, an index outside the table, an unreadable
    /// table, a table inside a table, or more than 2^32 bytes.
    #[error("descriptor chain has no end")]
    Endless,
    /// More descriptors than the queue has entries.
    #[error("descriptor chain is longer than its queue")]
    TooLong,
    /// A buffer that is not wholly in guest memory; or, of bytes that are looked at, in
    /// memory that is only for system calls.
    #[error("descriptor points outside guest memory")]
    Address,
    /// A device-readable descriptor after a device-writable one.
    #[error("readable descriptor after a writable one")]
    Order,
    /// Less room or data than the request needs.
    #[error("descriptor chain is too short for its request")]
    TooShort,
}

/// The bytes of one direction of a chain, consumed from the front.
#[derive(Debug, Default)]
pub struct Buffers<'m> {
    slices: Vec<GuestSlice<'m>>,
    /// Slices before this one are consumed.
    first: usize,
    len: usize,
    /// Slices from this one on are only for system calls: see [`DeviceMemory::rom`].
    rom_from: Option<usize>,
}

impl<'m> Buffers<'m> {
    /// Bytes left.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no byte is left.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The slices that are left, in order; none is empty. For system calls.
    pub(crate) fn slices(&self) -> &[GuestSlice<'m>] {
        &self.slices[self.first..]
    }

    fn push(&mut self, slice: GuestSlice<'m>) {
        if !slice.is_empty() {
            self.len += slice.len();
            self.slices.push(slice);
        }
    }

    /// Drops the first `count` bytes, or all if there are fewer.
    pub fn advance(&mut self, count: usize) {
        let mut count = count.min(self.len);
        self.len -= count;
        while let Some(front) = self.slices.get_mut(self.first) {
            if count < front.len() {
                // `offset` cannot fail: count is within the slice.
                if let Ok(rest) = front.offset(count) {
                    *front = rest;
                }
                return;
            }
            count -= front.len();
            self.first += 1;
        }
    }

    /// Cuts these buffers after `at` bytes and gives the rest, which is empty if
    /// there are no more than `at`.
    pub fn split_off(&mut self, at: usize) -> Buffers<'m> {
        let mut rest = Buffers::default();
        if at >= self.len {
            return rest;
        }
        let (mut kept, mut cut) = (at, self.slices.len());
        for (index, slice) in self.slices.iter().enumerate().skip(self.first) {
            if kept < slice.len() {
                cut = index;
                break;
            }
            kept -= slice.len();
        }
        let mut tail = self.slices.split_off(cut).into_iter();
        if let Some((head, end)) = tail.next().and_then(|s| s.split_at(kept).ok()) {
            if !head.is_empty() {
                self.slices.push(head);
            }
            rest.push(end);
        }
        tail.for_each(|slice| rest.push(slice));
        rest.rom_from = self.rom_from.map(|at| at.saturating_sub(cut));
        self.len = at;
        rest
    }

    /// Fills `data` from the front.
    pub fn read_exact(&mut self, data: &mut [u8]) -> Result<(), ChainError> {
        if data.len() > self.len {
            return Err(ChainError::TooShort);
        }
        let mut done = 0;
        for (index, slice) in self.slices.iter().enumerate().skip(self.first) {
            if done == data.len() {
                break;
            }
            if self.rom_from.is_some_and(|rom| index >= rom) {
                return Err(ChainError::Address);
            }
            done += slice.copy_to(&mut data[done..]);
        }
        self.advance(done);
        Ok(())
    }

    /// Writes all of `data` at the front.
    pub fn write_all(&mut self, data: &[u8]) -> Result<(), ChainError> {
        if data.len() > self.len {
            return Err(ChainError::TooShort);
        }
        let mut rest = data;
        for slice in self.slices() {
            let (now, later) = rest.split_at(slice.len().min(rest.len()));
            slice.copy_from(now);
            rest = later;
            if rest.is_empty() {
                break;
            }
        }
        self.advance(data.len());
        Ok(())
    }

    /// Writes zeroes over all that is left.
    pub fn fill_zero(&mut self) {
        const ZEROES: [u8; 4096] = [0; 4096];
        while !self.is_empty() {
            let count = self.len.min(ZEROES.len());
            if self.write_all(&ZEROES[..count]).is_err() {
                return;
            }
        }
    }
}

/// One request of a driver.
#[derive(Debug)]
pub struct Chain<'m> {
    head: u16,
    /// What the device may read.
    pub readable: Buffers<'m>,
    /// What the device may write.
    pub writable: Buffers<'m>,
}

impl<'m> Chain<'m> {
    /// Checks `chain` against `memory` and the size of its queue. `writable_at` is told
    /// where each buffer lies that the device may write.
    pub(crate) fn parse(
        memory: &'m DeviceMemory,
        queue_size: u16,
        mut chain: virtio_queue::DescriptorChain<&'m GuestMemory>,
        mut writable_at: impl FnMut(GuestAddress, usize),
    ) -> Result<Self, ChainError> {
        let mut parsed = Self {
            head: chain.head_index(),
            readable: Buffers::default(),
            writable: Buffers::default(),
        };
        let mut writing = false;
        // An indirect table may have 65535 entries, but a chain no more than the
        // queue (§2.7.5.3.1).
        for _ in 0..queue_size {
            let descriptor = chain.next().ok_or(ChainError::Endless)?;
            let (buffers, access) = if descriptor.is_write_only() {
                writing = true;
                (&mut parsed.writable, Permissions::Write)
            } else if writing {
                return Err(ChainError::Order);
            } else {
                (&mut parsed.readable, Permissions::Read)
            };
            let (address, len) = (descriptor.addr(), descriptor.len() as usize);
            let memory = match &memory.rom {
                Some(rom) if !writing && !memory.ram.check_range(address, len, access) => {
                    buffers.rom_from.get_or_insert(buffers.slices.len());
                    rom
                }
                _ => &memory.ram,
            };
            let slices = memory
                .get_slices(address, len, access)
                .map_err(|_| ChainError::Address)?;
            for slice in slices {
                buffers.push(slice.map_err(|_| ChainError::Address)?);
            }
            if writing {
                writable_at(address, len);
            }
            if !descriptor.has_next() {
                return Ok(parsed);
            }
        }
        Err(ChainError::TooLong)
    }

    /// Index of the first descriptor: the name of this request in the rings.
    pub fn head(&self) -> u16 {
        self.head
    }
}

#[cfg(test)]
mod tests;
