//! Split virtqueues (virtio 1.2 §2.7): `virtio-queue` does the rings; here are
//! the registers before a ring is ready, the state, and what a device sees.

use std::sync::atomic::{Ordering, fence};

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory as _, Permissions};

use super::chain::{Chain, ChainError};
use crate::{DeviceMemory, GuestMemory};

/// What a driver broke in a queue.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// A ring that is not wholly in guest memory, misaligned, or of a size that
    /// is no power of two or beyond the maximum.
    #[error("queue {0}: bad size or address")]
    Setup(usize),
    /// The rings themselves are inconsistent.
    #[error("queue {queue}: {source}")]
    Ring {
        /// Index of the queue.
        queue: usize,
        /// What the ring says.
        source: virtio_queue::Error,
    },
    /// A descriptor chain is broken.
    #[error("queue {queue}: {source}")]
    Chain {
        /// Index of the queue.
        queue: usize,
        /// What is wrong with it.
        source: ChainError,
    },
}

/// One queue as its driver set it up, and how far the device has come in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueueState {
    /// Entries.
    pub size: u16,
    /// Whether the driver has enabled it.
    pub ready: bool,
    /// Guest-physical address of the descriptor table.
    pub desc_table: u64,
    /// Guest-physical address of the available (driver) ring.
    pub avail_ring: u64,
    /// Guest-physical address of the used (device) ring.
    pub used_ring: u64,
    /// Available chains taken so far, modulo 2^16.
    pub next_avail: u16,
    /// Used chains given back so far, modulo 2^16.
    pub next_used: u16,
}

impl QueueState {
    fn fresh(max_size: u16) -> Self {
        Self {
            size: max_size,
            ready: false,
            desc_table: 0,
            avail_ring: 0,
            used_ring: 0,
            next_avail: 0,
            next_used: 0,
        }
    }
}

/// A queue of the transport: registers, and the ring once it is ready.
#[derive(Debug)]
pub(super) struct VirtQueue {
    index: usize,
    max_size: u16,
    /// Stale in `ready`, `next_avail` and `next_used` while `ring` is there.
    pub(super) registers: QueueState,
    ring: Option<Queue>,
    /// Chains given back since the driver was last asked whether it wants to know.
    used_added: u16,
}

impl VirtQueue {
    pub(super) fn new(index: usize, max_size: u16) -> Self {
        Self {
            index,
            max_size,
            registers: QueueState::fresh(max_size),
            ring: None,
            used_added: 0,
        }
    }

    /// A queue in `state`, which is untrusted.
    pub(super) fn restore(
        index: usize,
        max_size: u16,
        state: &QueueState,
        memory: &GuestMemory,
        event_idx: bool,
    ) -> Result<Self, QueueError> {
        let mut queue = Self::new(index, max_size);
        queue.registers = state.clone();
        if state.ready {
            queue.enable(memory, event_idx)?;
        } else {
            queue.disable();
        }
        Ok(queue)
    }

    pub(super) fn save(&self) -> QueueState {
        let mut state = self.registers.clone();
        state.ready = self.is_ready();
        if let Some(ring) = &self.ring {
            state.next_avail = ring.next_avail();
            state.next_used = ring.next_used();
        }
        state
    }

    pub(super) fn max_size(&self) -> u16 {
        self.max_size
    }

    pub(super) fn is_ready(&self) -> bool {
        self.ring.is_some()
    }

    /// Makes the ring from the registers, at the indices that they hold.
    pub(super) fn enable(
        &mut self,
        memory: &GuestMemory,
        event_idx: bool,
    ) -> Result<(), QueueError> {
        let r = &self.registers;
        let ring = Queue::try_from(virtio_queue::QueueState {
            max_size: self.max_size,
            next_avail: r.next_avail,
            next_used: r.next_used,
            event_idx_enabled: event_idx,
            size: r.size,
            ready: true,
            desc_table: r.desc_table,
            avail_ring: r.avail_ring,
            used_ring: r.used_ring,
        })
        .map_err(|_| QueueError::Setup(self.index))?;
        // `Queue::is_valid` checks the same, but logs each failure: a guest could
        // fill the log. Address 0 stands for "not set" in the queue.
        let size = usize::from(r.size);
        let inside = |address: u64, len: usize, access| {
            memory.check_range(GuestAddress(address), len, access)
        };
        let valid = r.avail_ring != 0
            && inside(r.desc_table, 16 * size, Permissions::Read)
            && inside(r.avail_ring, 6 + 2 * size, Permissions::Read)
            && inside(r.used_ring, 6 + 8 * size, Permissions::Write);
        if !valid {
            return Err(QueueError::Setup(self.index));
        }
        self.ring = Some(ring);
        Ok(())
    }

    /// Stops the ring; a driver that enables it again starts it from the front.
    pub(super) fn disable(&mut self) {
        self.ring = None;
        self.used_added = 0;
        self.registers.next_avail = 0;
        self.registers.next_used = 0;
    }

    fn pop<'m>(
        &mut self,
        memory: &'m DeviceMemory,
        places: impl FnMut(GuestAddress, usize),
    ) -> Result<Option<Chain<'m>>, QueueError> {
        let queue = self.index;
        let Some(ring) = &mut self.ring else {
            return Ok(None);
        };
        let size = ring.size();
        let mut available = ring
            .iter(&memory.ram)
            .map_err(|source| QueueError::Ring { queue, source })?;
        available
            .next()
            .map(|chain| Chain::parse(memory, size, chain, places))
            .transpose()
            .map_err(|source| QueueError::Chain { queue, source })
    }

    fn push_used(
        &mut self,
        memory: &GuestMemory,
        head: u16,
        written: u32,
    ) -> Result<(), QueueError> {
        let queue = self.index;
        if let Some(ring) = &mut self.ring {
            ring.add_used(memory, head, written)
                .map_err(|source| QueueError::Ring { queue, source })?;
            self.used_added = self.used_added.saturating_add(1);
        }
        Ok(())
    }

    /// Gives several chains back, of which the driver sees all or none.
    fn push_used_together(
        &mut self,
        memory: &GuestMemory,
        chains: &[(u16, u32)],
    ) -> Result<(), QueueError> {
        let Some((last, others)) = chains.split_last() else {
            return Ok(());
        };
        if let Some(ring) = &mut self.ring {
            let queue = self.index;
            let mut next = ring.next_used();
            for (head, written) in others {
                // §2.7.8: elements of a head and a length follow flags and index.
                let offset = 4 + 8 * u64::from(next % ring.size());
                let at = GuestAddress(ring.used_ring().saturating_add(offset));
                let element = [u32::from(*head).to_le(), written.to_le()];
                memory
                    .write_obj(element, at)
                    .map_err(|e| QueueError::Ring {
                        queue,
                        source: virtio_queue::Error::GuestMemory(e),
                    })?;
                next = next.wrapping_add(1);
            }
            // The index is stored with the last.
            ring.set_next_used(next);
            // No more than the queue is long.
            self.used_added = self.used_added.saturating_add(others.len() as u16);
        }
        self.push_used(memory, last.0, last.1)
    }

    /// Chains that are available and not taken.
    fn available(&self, memory: &GuestMemory) -> Result<u16, QueueError> {
        let queue = self.index;
        let Some(ring) = &self.ring else {
            return Ok(0);
        };
        let index = ring
            .avail_idx(memory, Ordering::Acquire)
            .map_err(|source| QueueError::Ring { queue, source })?;
        Ok(index.0.wrapping_sub(ring.next_avail()))
    }

    /// Asks the driver to notify when more than `count` chains are available. True
    /// if it is so already.
    ///
    /// What `Queue::enable_notification` does for a count of 0, except that it does
    /// not write what is there: a write costs a forked guest a page of its own.
    fn notify_beyond(&mut self, memory: &GuestMemory, count: u16) -> Result<bool, QueueError> {
        let queue = self.index;
        let Some(ring) = &self.ring else {
            return Ok(false);
        };
        let memory_failed = |e| QueueError::Ring {
            queue,
            source: virtio_queue::Error::GuestMemory(e),
        };
        if ring.event_idx_enabled() {
            // §2.7.8: avail_event follows the used elements.
            let offset = 4 + 8 * u64::from(ring.size());
            let avail_event = GuestAddress(ring.used_ring().saturating_add(offset));
            let wanted = ring.next_avail().wrapping_add(count);
            let armed: u16 = memory
                .load(avail_event, Ordering::Relaxed)
                .map_err(memory_failed)?;
            if u16::from_le(armed) != wanted {
                memory
                    .store(wanted.to_le(), avail_event, Ordering::Relaxed)
                    .map_err(memory_failed)?;
            }
        }
        // The driver publishes a chain, then looks at avail_event; we do the
        // reverse, and one of the two must see the other.
        fence(Ordering::SeqCst);
        Ok(self.available(memory)? > count)
    }

    /// Whether the driver is to be interrupted for what was given back since the
    /// last call (§2.7.7.2).
    pub(super) fn take_interrupt(&mut self, memory: &GuestMemory) -> Result<bool, QueueError> {
        let queue = self.index;
        let added = std::mem::take(&mut self.used_added);
        let Some(ring) = self.ring.as_ref().filter(|_| added != 0) else {
            return Ok(false);
        };
        if !ring.event_idx_enabled() {
            return Ok(true);
        }
        // The driver stores used_event, then looks at the index; we do the reverse, and
        // one of the two must see the other.
        fence(Ordering::SeqCst);
        // §2.7.6: used_event follows the available heads.
        let offset = 4 + 2 * u64::from(ring.size());
        let used_event: u16 = memory
            .load(
                GuestAddress(ring.avail_ring().saturating_add(offset)),
                Ordering::Relaxed,
            )
            .map_err(|e| QueueError::Ring {
                queue,
                source: virtio_queue::Error::GuestMemory(e),
            })?;
        let ahead = ring.next_used().wrapping_sub(u16::from_le(used_event));
        Ok(ahead.wrapping_sub(1) < added)
    }
}

/// A device's view of its queues, for the time of one call.
pub struct DeviceIo<'m> {
    memory: &'m DeviceMemory,
    queues: &'m mut [VirtQueue],
    features: u64,
}

impl<'m> DeviceIo<'m> {
    pub(super) fn new(
        memory: &'m DeviceMemory,
        queues: &'m mut [VirtQueue],
        features: u64,
    ) -> Self {
        Self {
            memory,
            queues,
            features,
        }
    }

    /// The features that the driver has taken.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Entries of a queue; none if it is not set up.
    pub fn size(&self, queue: usize) -> u16 {
        let ring = self.queues.get(queue).and_then(|q| q.ring.as_ref());
        ring.map_or(0, QueueT::size)
    }

    /// Takes the next available chain; `None` if there is none, or the queue is
    /// not set up.
    pub fn pop(&mut self, queue: usize) -> Result<Option<Chain<'m>>, QueueError> {
        match self.queues.get_mut(queue) {
            Some(q) => q.pop(self.memory, |_, _| {}),
            None => Ok(None),
        }
    }

    /// Takes the next available chain. If there is none, the driver is asked to notify of
    /// the next, and one that came meanwhile, without a notification, is taken. Looks
    /// twice at most: a driver that takes chains away again keeps nobody here.
    pub fn pop_or_wait(&mut self, queue: usize) -> Result<Option<Chain<'m>>, QueueError> {
        match self.pop(queue)? {
            None if self.enable_notification(queue)? => self.pop(queue),
            popped => Ok(popped),
        }
    }

    /// The same, and adds to `places` where in the guest what the device may write lies:
    /// (address, bytes), all of it memory.
    pub fn pop_places_or_wait(
        &mut self,
        queue: usize,
        places: &mut Vec<(GuestAddress, usize)>,
    ) -> Result<Option<Chain<'m>>, QueueError> {
        let mut pop = |io: &mut Self| match io.queues.get_mut(queue) {
            Some(q) => q.pop(io.memory, |at, len| places.push((at, len))),
            None => Ok(None),
        };
        match pop(self)? {
            None if self.enable_notification(queue)? => pop(self),
            popped => Ok(popped),
        }
    }

    /// Puts the chain that was popped last back, unused.
    pub fn undo_pop(&mut self, queue: usize) {
        if let Some(ring) = self.queues.get_mut(queue).and_then(|q| q.ring.as_mut()) {
            ring.go_to_previous_position();
        }
    }

    /// Gives a chain back to the driver, with the number of bytes written to it.
    pub fn push_used(
        &mut self,
        queue: usize,
        chain: &Chain<'m>,
        written: usize,
    ) -> Result<(), QueueError> {
        match self.queues.get_mut(queue) {
            // A chain has no more than 2^32 - 1 bytes.
            Some(q) => q.push_used(
                &self.memory.ram,
                chain.head(),
                u32::try_from(written).unwrap_or(u32::MAX),
            ),
            None => Ok(()),
        }
    }

    /// Gives several chains back at once, each with the number of bytes written to it:
    /// the driver sees all of them or none.
    pub fn push_used_together(
        &mut self,
        queue: usize,
        chains: &[(Chain<'m>, usize)],
    ) -> Result<(), QueueError> {
        let used: Vec<(u16, u32)> = chains
            .iter()
            .map(|(chain, written)| (chain.head(), u32::try_from(*written).unwrap_or(u32::MAX)))
            .collect();
        match self.queues.get_mut(queue) {
            Some(q) => q.push_used_together(&self.memory.ram, &used),
            None => Ok(()),
        }
    }

    /// Asks the driver to notify of the next chain. True if one is there already
    /// (it may have come without a notification): go on with it.
    fn enable_notification(&mut self, queue: usize) -> Result<bool, QueueError> {
        self.notify_beyond(queue, 0)
    }

    /// Asks the driver to notify when more than `count` chains are available. True
    /// if it is so already.
    pub fn notify_beyond(&mut self, queue: usize, count: u16) -> Result<bool, QueueError> {
        match self.queues.get_mut(queue) {
            Some(q) => q.notify_beyond(&self.memory.ram, count),
            None => Ok(false),
        }
    }

    /// Number of chains that are available and not taken.
    pub fn available(&self, queue: usize) -> Result<u16, QueueError> {
        match self.queues.get(queue) {
            Some(q) => q.available(&self.memory.ram),
            None => Ok(0),
        }
    }
}
