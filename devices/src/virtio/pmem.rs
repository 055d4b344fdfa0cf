//! Persistent memory device (virtio 1.2 §5.19): tells a driver where a window of
//! memory lies, and answers its flushes.
//!
//! The bytes of the window are none of its business: whoever owns the machine's
//! memory puts them there. A window of ours is read-only, so nothing in it is ever
//! dirty, and a flush has nothing to do.

use std::os::fd::BorrowedFd;

use serde::{Deserialize, Serialize};

use super::chain::{Chain, ChainError};
use super::queue::{DeviceIo, QueueError};
use super::{Progress, VirtioDevice, copy_config};

const TYPE_PMEM: u32 = 27;
const QUEUE_SIZES: &[u16] = &[64];

/// Linux `include/uapi/linux/virtio_pmem.h`, VIRTIO_PMEM_REQ_TYPE_FLUSH.
const REQUEST_FLUSH: u32 = 0;
/// The answers of §5.19.6: done, or failed.
const OK: u32 = 0;
const FAILED: u32 = u32::MAX;

/// The most requests answered before others get their turn.
const BURST_MAX: usize = 64;
/// What a window begins and ends at, in bytes: a page.
const ALIGNMENT: u64 = 4096;

/// Where the window lies. `Default` is a window of no bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PmemState {
    /// Its first guest-physical address: a multiple of 4096.
    pub start: u64,
    /// Its size in bytes: a multiple of 4096.
    pub size: u64,
}

/// Why a device could not be restored.
#[derive(Debug, thiserror::Error)]
pub enum PmemError {
    /// Not in whole pages, or beyond the last address.
    #[error("a window of {size:#x} bytes at {start:#x} is none")]
    Window {
        /// Its first address.
        start: u64,
        /// Its size in bytes.
        size: u64,
    },
}

/// The persistent memory device.
#[derive(Debug, Default)]
pub struct Pmem {
    state: PmemState,
}

impl Pmem {
    /// The device in `state`.
    ///
    /// # Errors
    /// A window that no machine has.
    pub fn restore(state: &PmemState) -> Result<Self, PmemError> {
        let &PmemState { start, size } = state;
        let is_whole = start.is_multiple_of(ALIGNMENT) && size.is_multiple_of(ALIGNMENT);
        if !is_whole || start.checked_add(size).is_none() {
            return Err(PmemError::Window { start, size });
        }
        Ok(Self {
            state: state.clone(),
        })
    }

    /// Answers one request, and gives the number of bytes written to it.
    fn execute(chain: &mut Chain<'_>) -> Result<usize, ChainError> {
        let mut kind = [0; 4];
        chain.readable.read_exact(&mut kind)?;
        let answer = match u32::from_le_bytes(kind) {
            REQUEST_FLUSH => OK,
            _ => FAILED,
        };
        let answer = answer.to_le_bytes();
        chain.writable.write_all(&answer)?;
        Ok(answer.len())
    }
}

impl VirtioDevice for Pmem {
    type State = PmemState;

    fn device_type(&self) -> u32 {
        TYPE_PMEM
    }

    fn queue_sizes(&self) -> &'static [u16] {
        QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        0
    }

    /// The layout is that of §5.19.4.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; 16];
        config[..8].copy_from_slice(&self.state.start.to_le_bytes());
        config[8..].copy_from_slice(&self.state.size.to_le_bytes());
        copy_config(&config, offset, data);
    }

    fn process_queue(
        &mut self,
        queue: usize,
        io: &mut DeviceIo<'_>,
    ) -> Result<Progress, QueueError> {
        for _ in 0..BURST_MAX {
            let Some(mut chain) = io.pop_or_wait(queue)? else {
                return Ok(Progress::Done);
            };
            let written =
                Self::execute(&mut chain).map_err(|source| QueueError::Chain { queue, source })?;
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

    fn save(&self) -> PmemState {
        self.state.clone()
    }
}

#[cfg(test)]
mod tests;
