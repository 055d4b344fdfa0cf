//! Memory balloon device (virtio 1.2 §5.5), of which only free page reporting is used:
//! the guest says which of its memory is free, and the host has that again.
//!
//! The balloon proper is never inflated: it would take memory that the guest uses.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vm_memory::GuestAddress;

use super::queue::{DeviceIo, QueueError};
use super::{Progress, VirtioDevice, copy_config};

const TYPE_BALLOON: u32 = 5;
/// Inflate and deflate, which every driver sets up; and reports, of which Linux makes one
/// at a time, of up to 32 descriptors. A queue of a feature that was not offered has no
/// number to Linux, whatever §5.5.2 says (drivers/virtio/virtio_mmio.c, vm_find_vqs).
const QUEUE_SIZES: &[u16] = &[64, 64, 64];
const REPORTING: usize = 2;

/// VIRTIO_BALLOON_F_REPORTING (§5.5.3).
const FEATURE_REPORTING: u64 = 1 << 5;
/// §5.5.4: `num_pages`, how large the balloon is to be, and `actual`, how large it is.
const CONFIG: [u8; 8] = [0; 8];

/// The most requests answered before others get their turn.
const BURST_MAX: usize = 16;

/// Whoever has mapped a guest's memory.
pub trait Reclaim: Send + Sync {
    /// The guest uses `len` bytes at `at` for nothing. They are in its memory; the guest
    /// may lie, and it may use them again at any time.
    fn reclaim(&self, at: GuestAddress, len: usize);
}

/// A balloon device has no state of its own.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonState {}

/// The memory balloon device.
pub struct Balloon {
    memory: Arc<dyn Reclaim>,
}

impl Balloon {
    /// The device in `state`, which is none, so this cannot fail. What is free goes to
    /// `memory`.
    pub fn restore(_state: &BalloonState, memory: Arc<dyn Reclaim>) -> Self {
        Self { memory }
    }
}

impl VirtioDevice for Balloon {
    type State = BalloonState;

    fn device_type(&self) -> u32 {
        TYPE_BALLOON
    }

    fn queue_sizes(&self) -> &'static [u16] {
        QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        FEATURE_REPORTING
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        copy_config(&CONFIG, offset, data);
    }

    fn process_queue(
        &mut self,
        queue: usize,
        io: &mut DeviceIo<'_>,
    ) -> Result<Progress, QueueError> {
        for _ in 0..BURST_MAX {
            let mut free = Vec::new();
            let Some(chain) = io.pop_places_or_wait(queue, &mut free)? else {
                return Ok(Progress::Done);
            };
            if queue == REPORTING {
                for (at, len) in free {
                    self.memory.reclaim(at, len);
                }
            }
            io.push_used(queue, &chain, 0)?;
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

    fn save(&self) -> BalloonState {
        BalloonState {}
    }
}

#[cfg(test)]
mod tests;
