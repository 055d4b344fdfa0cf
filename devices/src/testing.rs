//! A fake guest: memory, a driver that knows the rules, an interrupt line and an
//! event loop, and no KVM. For tests, and for the fuzz targets.
//!
//! It panics where a driver would find its device broken.

use std::collections::HashMap;
use std::fmt::Debug;
use std::sync::{Arc, Mutex, MutexGuard};

use event_manager::{EventManager, SubscriberOps};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::virtio::mmio::{register, status};
use crate::virtio::{MmioTransport, TransportState, VirtioDevice, feature};
use crate::{GuestMemory, MmioDevice};

/// Bytes of guest memory.
pub const MEMORY_SIZE: usize = 64 << 20;
/// Largest buffer of a descriptor that [`FakeGuest::submit`] makes, in bytes.
pub const BUFFER_MAX: usize = 68 << 10;

const RINGS: u64 = 0x1_0000;
const RING_STRIDE: u64 = 0x1_0000;
const BUFFERS: u64 = 0x10_0000;

/// Descriptor flags (virtio 1.2 §2.7.5).
pub mod flag {
    #![allow(missing_docs)] // named as in the specification
    pub const NEXT: u16 = 1;
    pub const WRITE: u16 = 2;
    pub const INDIRECT: u16 = 4;
}

/// One buffer of a request.
#[derive(Clone, Debug)]
pub enum Buffer {
    /// Bytes for the device.
    Out(Vec<u8>),
    /// Room for that many bytes of the device.
    In(usize),
}

/// A request that the device has given back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Used {
    /// First descriptor of its chain.
    pub head: u16,
    /// What the device says that it wrote, in bytes.
    pub len: usize,
    /// The device-writable buffers, one after the other, whole.
    pub data: Vec<u8>,
}

/// The driver's side of a queue.
#[derive(Clone, Debug)]
pub struct DriverQueue {
    size: u16,
    desc: u64,
    avail: u64,
    used: u64,
    free: Vec<u16>,
    /// Descriptors of each chain under way.
    chains: HashMap<u16, Vec<u16>>,
    /// Device-writable lengths, by descriptor.
    room: HashMap<u16, usize>,
    next_avail: u16,
    notified: u16,
    next_used: u16,
}

/// A guest with one device.
pub struct FakeGuest<D: VirtioDevice> {
    memory: GuestMemory,
    device: Arc<Mutex<MmioTransport<D>>>,
    events: EventManager<Arc<Mutex<MmioTransport<D>>>>,
    irq: EventFd,
    queues: Vec<DriverQueue>,
    features: u64,
}

/// What a fork takes over: both sides of the device, and the memory.
pub struct Snapshot<S> {
    /// State of the transport.
    pub transport: TransportState,
    /// State of the device.
    pub device: S,
    memory: GuestMemory,
    queues: Vec<DriverQueue>,
    features: u64,
}

/// Guest memory, all zero.
pub fn memory() -> GuestMemory {
    GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY_SIZE)]).expect("guest memory")
}

impl<D: VirtioDevice> FakeGuest<D> {
    /// A guest whose driver has set the device up with all its features.
    pub fn boot(device: D) -> Self {
        Self::boot_with(device, u64::MAX)
    }

    /// The same, with no more features than `wanted`.
    pub fn boot_with(device: D, wanted: u64) -> Self {
        let mut guest = Self::power_on(device, memory(), &TransportState::default());
        assert!(guest.set_up(wanted), "FEATURES_OK was refused");
        guest
    }

    /// A guest before its driver has touched the device.
    pub fn power_on(device: D, memory: GuestMemory, state: &TransportState) -> Self {
        let irq = EventFd::new(EFD_NONBLOCK).expect("eventfd");
        let line = Arc::new(irq.try_clone().expect("eventfd"));
        let device = MmioTransport::restore(device, memory.clone(), line, state).expect("restore");
        let device = Arc::new(Mutex::new(device));
        let mut events = EventManager::new().expect("epoll");
        events.add_subscriber(device.clone());
        Self {
            memory,
            device,
            events,
            irq,
            queues: Vec::new(),
            features: 0,
        }
    }

    /// The driver's probe (§3.1.1). False if the device refused the features.
    pub fn set_up(&mut self, wanted: u64) -> bool {
        assert_eq!(self.read(register::MAGIC_VALUE), 0x7472_6976);
        assert_eq!(self.read(register::VERSION), 2);
        self.write(register::STATUS, 0);
        assert_eq!(self.read(register::STATUS), 0);
        self.write(register::STATUS, status::ACKNOWLEDGE);
        self.write(register::STATUS, status::ACKNOWLEDGE | status::DRIVER);
        self.features = self.offered() & wanted;
        for (sel, half) in [(0, self.features as u32), (1, (self.features >> 32) as u32)] {
            self.write(register::DRIVER_FEATURES_SEL, sel);
            self.write(register::DRIVER_FEATURES, half);
        }
        let mut bits = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK;
        self.write(register::STATUS, bits);
        if self.read(register::STATUS) & status::FEATURES_OK == 0 {
            return false;
        }
        self.set_up_queues();
        bits |= status::DRIVER_OK;
        self.write(register::STATUS, bits);
        true
    }

    /// The features that the device offers.
    pub fn offered(&mut self) -> u64 {
        let half = |sel| {
            self.write(register::DEVICE_FEATURES_SEL, sel);
            u64::from(self.read(register::DEVICE_FEATURES))
        };
        half(0) | half(1) << 32
    }

    fn set_up_queues(&mut self) {
        self.queues.clear();
        for index in 0u16.. {
            self.write(register::QUEUE_SEL, index.into());
            let size = self.read(register::QUEUE_NUM_MAX) as u16;
            if size == 0 {
                return;
            }
            let queue = DriverQueue::new(index, size);
            self.memory
                .write_slice(&[0; RING_STRIDE as usize], GuestAddress(queue.desc))
                .expect("rings");
            self.write(register::QUEUE_NUM, size.into());
            self.write(register::QUEUE_DESC_LOW, queue.desc as u32);
            self.write(register::QUEUE_DESC_HIGH, 0);
            self.write(register::QUEUE_DRIVER_LOW, queue.avail as u32);
            self.write(register::QUEUE_DRIVER_HIGH, 0);
            self.write(register::QUEUE_DEVICE_LOW, queue.used as u32);
            self.write(register::QUEUE_DEVICE_HIGH, 0);
            self.write(register::QUEUE_READY, 1);
            assert_eq!(self.read(register::QUEUE_READY), 1);
            self.queues.push(queue);
        }
    }

    /// The transport, locked.
    pub fn device(&self) -> MutexGuard<'_, MmioTransport<D>> {
        self.device.lock().expect("no test panics with the lock")
    }

    /// The guest's memory.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Loads a register.
    pub fn read(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.device().read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// Stores to a register.
    pub fn write(&self, offset: u64, value: u32) {
        self.device().write(offset, &value.to_le_bytes());
    }

    /// Reads `N` bytes of the configuration space.
    pub fn config<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        self.device().read(register::CONFIG + offset, &mut data);
        data
    }

    /// Whether the device has declared itself broken.
    pub fn needs_reset(&self) -> bool {
        self.read(register::STATUS) & status::NEEDS_RESET != 0
    }

    /// Interrupts since the last call.
    pub fn interrupts(&self) -> u64 {
        self.irq.read().unwrap_or(0)
    }

    /// Makes a request available and notifies the device if it wants to know.
    pub fn submit(&mut self, queue: usize, buffers: &[Buffer]) -> u16 {
        let head = self.make_chain(queue, buffers);
        self.make_available(queue, head);
        self.notify(queue);
        head
    }

    /// Writes the descriptors of a request, and gives the first.
    pub fn make_chain(&mut self, queue: usize, buffers: &[Buffer]) -> u16 {
        let q = &mut self.queues[queue];
        assert!(q.free.len() >= buffers.len(), "queue {queue} is full");
        let indices = q.free.split_off(q.free.len() - buffers.len());
        let mut chain = indices.iter().copied().peekable();
        for buffer in buffers {
            let index = chain.next().expect("one for each buffer");
            let address = buffer_address(queue, index);
            let (len, mut flags) = match buffer {
                Buffer::Out(data) => (data.len(), 0),
                Buffer::In(len) => (*len, flag::WRITE),
            };
            assert!(len <= BUFFER_MAX);
            if let Buffer::Out(data) = buffer {
                self.memory
                    .write_slice(data, GuestAddress(address))
                    .expect("buffer");
            } else {
                q.room.insert(index, len);
            }
            let next = chain.peek().copied();
            if next.is_some() {
                flags |= flag::NEXT;
            }
            let at = q.desc + 16 * u64::from(index);
            write_descriptor(
                &self.memory,
                at,
                address,
                len as u32,
                flags,
                next.unwrap_or(0),
            );
        }
        let head = indices[0];
        q.chains.insert(head, indices);
        head
    }

    /// Writes one descriptor, right or wrong.
    pub fn write_descriptor(
        &mut self,
        queue: usize,
        index: u16,
        (address, len): (u64, u32),
        flags: u16,
        next: u16,
    ) {
        let at = self.queues[queue].desc + 16 * u64::from(index);
        write_descriptor(&self.memory, at, address, len, flags, next);
    }

    /// Puts a chain into the available ring, without a notification.
    pub fn make_available(&mut self, queue: usize, head: u16) {
        let q = &mut self.queues[queue];
        let slot = q.avail + 4 + 2 * u64::from(q.next_avail % q.size);
        self.memory
            .write_obj(head.to_le(), GuestAddress(slot))
            .expect("ring");
        q.next_avail = q.next_avail.wrapping_add(1);
        self.memory
            .write_obj(q.next_avail.to_le(), GuestAddress(q.avail + 2))
            .expect("ring");
    }

    /// Notifies the device, unless it has said that it need not know (§2.7.10).
    pub fn notify(&mut self, queue: usize) {
        let q = &mut self.queues[queue];
        let (old, new) = (q.notified, q.next_avail);
        q.notified = new;
        if self.features & feature::EVENT_IDX != 0 {
            let at = q.used + 4 + 8 * u64::from(q.size);
            let event: u16 = self.memory.read_obj(GuestAddress(at)).expect("ring");
            let event = u16::from_le(event);
            if new.wrapping_sub(event).wrapping_sub(1) >= new.wrapping_sub(old) {
                return;
            }
        }
        self.write(register::QUEUE_NOTIFY, queue as u32);
    }

    /// Runs the event loop until nothing happens any more.
    pub fn run(&mut self) {
        for _ in 0..10_000 {
            if self.events.run_with_timeout(0).expect("event loop") == 0 {
                return;
            }
        }
        panic!("the device never comes to rest");
    }

    /// Runs the event loop until something happened, for `milliseconds` at most.
    pub fn wait(&mut self, milliseconds: i32) {
        self.events
            .run_with_timeout(milliseconds)
            .expect("event loop");
    }

    /// Takes the next request that the device has given back.
    pub fn used(&mut self, queue: usize) -> Option<Used> {
        let q = &mut self.queues[queue];
        let index: u16 = self
            .memory
            .read_obj(GuestAddress(q.used + 2))
            .expect("ring");
        if u16::from_le(index) == q.next_used {
            return None;
        }
        let at = q.used + 4 + 8 * u64::from(q.next_used % q.size);
        let [head, len]: [u32; 2] = self.memory.read_obj(GuestAddress(at)).expect("ring");
        let head = u16::try_from(u32::from_le(head)).expect("head");
        q.next_used = q.next_used.wrapping_add(1);
        // used_event: the next one is to interrupt.
        let event = q.avail + 4 + 2 * u64::from(q.size);
        self.memory
            .write_obj(q.next_used.to_le(), GuestAddress(event))
            .expect("ring");
        let chain = q.chains.remove(&head).expect("a chain that was available");
        let mut data = Vec::new();
        for &index in &chain {
            if let Some(len) = q.room.remove(&index) {
                let start = data.len();
                data.resize(start + len, 0);
                self.memory
                    .read_slice(
                        &mut data[start..],
                        GuestAddress(buffer_address(queue, index)),
                    )
                    .expect("buffer");
            }
        }
        q.free.extend(chain);
        Some(Used {
            head,
            len: u32::from_le(len) as usize,
            data,
        })
    }

    /// Whether the driver has come to the queues.
    pub fn is_set_up(&self) -> bool {
        !self.queues.is_empty()
    }

    /// Free descriptors of a queue.
    pub fn room(&self, queue: usize) -> usize {
        self.queues[queue].free.len()
    }

    /// One request from its submission to its answer.
    pub fn request(&mut self, queue: usize, buffers: &[Buffer]) -> Used {
        let head = self.submit(queue, buffers);
        self.run();
        let used = self.used(queue).expect("an answer");
        assert_eq!(used.head, head);
        used
    }

    /// Freezes the guest. It must not go on afterwards: the snapshot has its
    /// memory.
    pub fn freeze(&self) -> Snapshot<D::State> {
        let device = self.device();
        Snapshot {
            transport: device.save(),
            device: device.device().save(),
            memory: self.memory.clone(),
            queues: self.queues.clone(),
            features: self.features,
        }
    }

    /// The guest of a snapshot, with `device` restored from the device's state.
    pub fn thaw(device: D, snapshot: &Snapshot<D::State>) -> Self {
        let mut guest = Self::power_on(device, snapshot.memory.clone(), &snapshot.transport);
        guest.queues = snapshot.queues.clone();
        guest.features = snapshot.features;
        guest.device().kick();
        guest
    }
}

impl DriverQueue {
    fn new(index: u16, size: u16) -> Self {
        let desc = RINGS + RING_STRIDE * u64::from(index);
        Self {
            size,
            desc,
            avail: desc + 0x4000,
            used: desc + 0x8000,
            free: (0..size).collect(),
            chains: HashMap::new(),
            room: HashMap::new(),
            next_avail: 0,
            notified: 0,
            next_used: 0,
        }
    }
}

fn buffer_address(queue: usize, index: u16) -> u64 {
    BUFFERS + (queue as u64 * 256 + u64::from(index)) * (BUFFER_MAX as u64)
}

fn write_descriptor(memory: &GuestMemory, at: u64, address: u64, len: u32, flags: u16, next: u16) {
    let mut raw = [0; 16];
    raw[..8].copy_from_slice(&address.to_le_bytes());
    raw[8..12].copy_from_slice(&len.to_le_bytes());
    raw[12..14].copy_from_slice(&flags.to_le_bytes());
    raw[14..].copy_from_slice(&next.to_le_bytes());
    memory
        .write_slice(&raw, GuestAddress(at))
        .expect("descriptor table");
}

/// What every device has to do right when its guest is frozen and thawed.
///
/// `restore` makes the device of a state; `exercise` is a request or more, with
/// every answer taken, and may be called again and again.
pub fn conformance<D: VirtioDevice>(
    state: &D::State,
    restore: impl Fn(&D::State) -> D,
    exercise: impl Fn(&mut FakeGuest<D>),
) {
    // A device from its state is in that state, and a fresh transport is `Default`.
    let off = FakeGuest::power_on(restore(state), memory(), &TransportState::default()).freeze();
    assert_eq!(&off.device, state);
    assert!(off.transport.queues.iter().all(|queue| !queue.ready));
    let without_queues = TransportState {
        queues: Vec::new(),
        ..off.transport.clone()
    };
    assert_eq!(without_queues, TransportState::default());
    let again = FakeGuest::power_on(restore(state), memory(), &off.transport).freeze();
    assert_eq!(again.transport, off.transport);

    // What was saved at work is what is there after the restore, through bytes
    // too, and both sides go on where they were. More than once.
    let mut guest = FakeGuest::boot(restore(state));
    for _ in 0..3 {
        exercise(&mut guest);
        let frozen = guest.freeze();
        assert_same_through_bytes(&frozen.device);
        assert_same_through_bytes(&frozen.transport);
        let thawed = FakeGuest::thaw(restore(&frozen.device), &frozen);
        let refrozen = thawed.freeze();
        assert_eq!(refrozen.device, frozen.device);
        assert_eq!(at_rest(refrozen.transport), at_rest(frozen.transport));
        guest = thawed;
        guest.run();
    }
    exercise(&mut guest);
    assert!(!guest.needs_reset());

    // A reset takes it back to the start.
    assert!(guest.set_up(u64::MAX));
    exercise(&mut guest);
}

/// Which queues the loop has yet to look at is not part of the comparison: a
/// restored device looks at all.
fn at_rest(state: TransportState) -> TransportState {
    TransportState {
        pending_queues: 0,
        ..state
    }
}

fn assert_same_through_bytes<S>(state: &S)
where
    S: serde::Serialize + serde::de::DeserializeOwned + PartialEq + Debug,
{
    let bytes = postcard::to_stdvec(state).expect("a state is plain data");
    let back: S = postcard::from_bytes(&bytes).expect("what was written can be read");
    assert_eq!(&back, state);
}
