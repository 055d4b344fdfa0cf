//! Entropy device (virtio 1.2 §5.4): the host's CRNG.

use std::os::fd::BorrowedFd;

use rustix::rand::{GetRandomFlags, getrandom};
use serde::{Deserialize, Serialize};

use super::queue::{DeviceIo, QueueError};
use super::{Buffers, Progress, VirtioDevice};

const TYPE_ENTROPY: u32 = 4;
const QUEUE_SIZES: &[u16] = &[64];

/// The most bytes given for one request; a shorter answer is allowed (§5.4.6.2).
const REQUEST_MAX: usize = 64 * 1024;
/// The most requests answered before others get their turn.
const BURST_MAX: usize = 16;

/// An entropy device has no state of its own.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RngState {}

/// The entropy device. A forked guest gets other bytes than its siblings.
#[derive(Debug, Default)]
pub struct Rng {}

impl Rng {
    /// The device in `state`: it has none, so this cannot fail.
    pub fn restore(_state: &RngState) -> Self {
        Self {}
    }
}

/// Fills the front of `buffers` with random bytes, and gives their number.
fn fill(buffers: &mut Buffers<'_>) -> usize {
    let wanted = buffers.len().min(REQUEST_MAX);
    let mut block = [0; 4096];
    let mut done = 0;
    while done < wanted {
        let count = block.len().min(wanted - done);
        // Interrupted, or the host's CRNG is not ready: a short answer.
        let Ok(count) = getrandom(&mut block[..count], GetRandomFlags::empty()) else {
            break;
        };
        if buffers.write_all(&block[..count]).is_err() {
            break;
        }
        done += count;
    }
    done
}

impl VirtioDevice for Rng {
    type State = RngState;

    fn device_type(&self) -> u32 {
        TYPE_ENTROPY
    }

    fn queue_sizes(&self) -> &'static [u16] {
        QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn process_queue(
        &mut self,
        queue: usize,
        io: &mut DeviceIo<'_>,
    ) -> Result<Progress, QueueError> {
        for _ in 0..BURST_MAX {
            let Some(mut chain) = io.pop_or_wait(queue)? else {
                return Ok(Progress::Done);
            };
            let written = fill(&mut chain.writable);
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

    fn save(&self) -> RngState {
        RngState {}
    }
}

#[cfg(test)]
mod tests;
