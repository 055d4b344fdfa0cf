//! Virtio 1.2 devices on the memory-mapped transport.
//!
//! A device model sees its queues through [`DeviceIo`] and never a register; the
//! transport ([`mmio`]) sees registers and never a request.

pub mod balloon;
pub mod block;
pub mod chain;
pub mod fs;
#[allow(unsafe_code)]
mod iov;
pub mod mmio;
pub mod net;
pub mod pmem;
pub mod queue;
pub mod rng;
pub mod vsock;

use std::fmt::Debug;
use std::os::fd::BorrowedFd;

use serde::{Serialize, de::DeserializeOwned};

pub use balloon::{Balloon, BalloonState, Reclaim};
pub use block::{Block, BlockError, BlockState, DiskFiles};
pub use chain::{Buffers, Chain, ChainError};
pub use fs::{Fs, FsError, FsState};
pub use mmio::{MmioTransport, RestoreError, TransportState};
pub use net::{Net, NetError, NetState, Rate, RateLimit, RateLimits};
pub use pmem::{Pmem, PmemError, PmemState};
pub use queue::{DeviceIo, QueueError, QueueState};
pub use rng::{Rng, RngState};
pub use vsock::{Vsock, VsockError, VsockState};

/// Feature bits of the transport and its queues (virtio 1.2 §6).
pub mod feature {
    /// Descriptors may point to a table of descriptors.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// Notifications and interrupts are suppressed by ring index.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// Not a legacy device; without it a driver is refused.
    pub const VERSION_1: u64 = 1 << 32;
}

/// Whether a device is through with a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// All that could be done is done; the next notification brings more.
    Done,
    /// A bound on the work of one call was reached: call again, after others had
    /// their turn.
    More,
}

/// A virtio device model, free of registers and of the transport.
///
/// All I/O is done inside these calls. An error stops the device until its
/// driver resets it (`DEVICE_NEEDS_RESET`): it means that the guest broke the
/// rules of a ring, and nothing that follows in that ring can be trusted.
pub trait VirtioDevice: Send {
    /// The device's own state, without what the transport knows. `Default` gives
    /// a fresh device, and `Device::restore` refuses what no device can be in.
    type State: Serialize + DeserializeOwned + Clone + PartialEq + Debug + Default;

    /// Device type (virtio 1.2 §5).
    fn device_type(&self) -> u32;

    /// The largest size of each queue; a power of two each.
    fn queue_sizes(&self) -> &'static [u16];

    /// The device's own feature bits. The transport adds those of [`feature`].
    fn features(&self) -> u64;

    /// Fills `data` from the configuration space at `offset`; what lies beyond
    /// stays as it is. No device of ours has a configuration to write.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// The driver made buffers of queue `queue` available, or might have.
    fn process_queue(
        &mut self,
        queue: usize,
        io: &mut DeviceIo<'_>,
    ) -> Result<Progress, QueueError>;

    /// The descriptor to watch for the device's host side, the same one for the
    /// device's whole life. `None`: the device has no host side that speaks first.
    fn host_events(&self) -> Option<BorrowedFd<'_>>;

    /// [`VirtioDevice::host_events`] is readable. `More` has every queue processed
    /// again.
    fn process_host_events(&mut self, io: &mut DeviceIo<'_>) -> Result<Progress, QueueError>;

    /// The driver reset the device: everything begun for it is over.
    fn reset(&mut self);

    /// The state now. The device is at rest, since whoever calls holds its lock.
    fn save(&self) -> Self::State;
}

/// Copies the part of a configuration space that a read of `data.len()` bytes at
/// `offset` covers.
pub(crate) fn copy_config(config: &[u8], offset: u64, data: &mut [u8]) {
    let Some(from) = usize::try_from(offset)
        .ok()
        .and_then(|offset| config.get(offset..))
    else {
        return;
    };
    let len = from.len().min(data.len());
    data[..len].copy_from_slice(&from[..len]);
}
