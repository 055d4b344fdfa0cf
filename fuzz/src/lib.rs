//! A hostile guest: any register, any ring, any descriptor, any packet, in any
//! order, with forks in between.

use arbitrary::Arbitrary;
use devices::MmioDevice;
use devices::testing::{self, FakeGuest};
use devices::virtio::VirtioDevice;
use devices::virtio::mmio::register;
use vm_memory::{Bytes, GuestAddress};

/// Where the rings of the fake guest lie.
const RINGS: u64 = 0x1_0000;
/// Where the harness puts the buffers of its chains.
const BUFFERS: u64 = 0x40_0000;
const BUFFER_STRIDE: u64 = 0x2_0000;

/// A buffer of a chain that is well-formed but for its content.
#[derive(Arbitrary, Debug)]
pub struct Buffer {
    write: bool,
    /// Length of a device-writable buffer.
    room: u32,
    /// Content of a device-readable one.
    bytes: Vec<u8>,
}

/// One thing that a guest can do to a device.
#[derive(Arbitrary, Debug)]
pub enum Action {
    /// Access of any width in the window.
    Read { offset: u16, len: u8 },
    /// Access of any width in the window.
    Write { offset: u16, bytes: Vec<u8> },
    /// A register of the table, so that the fuzzer need not guess them.
    Register { index: u8, value: u32 },
    /// The probe of an honest driver, with these features.
    SetUp { features: u64 },
    /// A word of the rings.
    Ring { at: u16, value: u16 },
    /// A descriptor of any content.
    Descriptor {
        queue: u8,
        index: u8,
        address: u64,
        len: u32,
        flags: u16,
        next: u16,
    },
    /// A chain without formal faults, made available.
    Chain { queue: u8, buffers: Vec<Buffer> },
    /// A descriptor made available.
    Available { queue: u8, head: u16 },
    /// A notification.
    Notify { queue: u8 },
    /// The event loop's turn.
    Run,
    /// Freeze, and go on in a child.
    Fork,
}

const REGISTERS: [u64; 22] = [
    register::DEVICE_FEATURES_SEL,
    register::DRIVER_FEATURES,
    register::DRIVER_FEATURES_SEL,
    register::QUEUE_SEL,
    register::QUEUE_NUM,
    register::QUEUE_READY,
    register::QUEUE_NOTIFY,
    register::INTERRUPT_ACK,
    register::STATUS,
    register::QUEUE_DESC_LOW,
    register::QUEUE_DESC_HIGH,
    register::QUEUE_DRIVER_LOW,
    register::QUEUE_DRIVER_HIGH,
    register::QUEUE_DEVICE_LOW,
    register::QUEUE_DEVICE_HIGH,
    register::DEVICE_FEATURES,
    register::QUEUE_NUM_MAX,
    register::INTERRUPT_STATUS,
    register::SHM_LEN_LOW,
    register::CONFIG_GENERATION,
    register::CONFIG,
    register::MAGIC_VALUE,
];

/// A guest gone bad.
pub struct Hostile<D: VirtioDevice> {
    /// The guest.
    pub guest: FakeGuest<D>,
    queues: usize,
    /// The next free descriptor of the harness' own chains.
    next: u16,
}

impl<D: VirtioDevice> Hostile<D> {
    /// A guest whose driver has set `device` up.
    pub fn new(device: D) -> Self {
        let queues = device.queue_sizes().len();
        Self {
            guest: FakeGuest::boot(device),
            queues,
            next: 0,
        }
    }

    /// Does `action`; `restore` makes the device of a fork.
    pub fn act(&mut self, action: Action, restore: impl Fn(&D::State) -> D) {
        match action {
            Action::Read { offset, len } => {
                let mut data = vec![0; usize::from(len)];
                self.guest.device().read(offset.into(), &mut data);
            }
            Action::Write { offset, bytes } => self.guest.device().write(offset.into(), &bytes),
            Action::Register { index, value } => {
                let offset = REGISTERS[usize::from(index) % REGISTERS.len()];
                self.guest.read(offset);
                self.guest.write(offset, value);
            }
            Action::SetUp { features } => {
                self.guest.set_up(features);
            }
            Action::Ring { at, value } => {
                let at = GuestAddress(RINGS + 2 * u64::from(at));
                self.guest.memory().write_obj(value, at).expect("ring");
            }
            Action::Descriptor {
                queue,
                index,
                address,
                len,
                flags,
                next,
            } => self.descriptor(queue, index.into(), (address, len), flags, next),
            Action::Chain { queue, buffers } => self.chain(queue, buffers),
            Action::Available { queue, head } => self.available(queue, head),
            Action::Notify { queue } => self.guest.write(register::QUEUE_NOTIFY, queue.into()),
            Action::Run => self.guest.run(),
            Action::Fork => self.fork(restore),
        }
    }

    /// An honest request, so that the fuzzer need not guess its form.
    pub fn submit(&mut self, queue: usize, buffers: &[testing::Buffer]) {
        if self.guest.is_set_up() && self.guest.room(queue) >= buffers.len() {
            let head = self.guest.make_chain(queue, buffers);
            self.guest.make_available(queue, head);
            self.guest.write(register::QUEUE_NOTIFY, queue as u32);
        }
    }

    fn descriptor(&mut self, queue: u8, index: u16, buffer: (u64, u32), flags: u16, next: u16) {
        let queue = usize::from(queue) % self.queues;
        if self.guest.is_set_up() {
            self.guest
                .write_descriptor(queue, index, buffer, flags, next);
        }
    }

    fn available(&mut self, queue: u8, head: u16) {
        let queue = usize::from(queue) % self.queues;
        if self.guest.is_set_up() {
            self.guest.make_available(queue, head);
            self.guest.write(register::QUEUE_NOTIFY, queue as u32);
        }
    }

    fn chain(&mut self, queue: u8, buffers: Vec<Buffer>) {
        let head = self.next % 16;
        let count = buffers.len().min(16);
        for (index, buffer) in buffers.into_iter().take(16).enumerate() {
            let index = index as u16;
            let address = BUFFERS + BUFFER_STRIDE * u64::from(head + index);
            let (len, mut flags) = if buffer.write {
                (buffer.room % 0x1_1000, 2)
            } else {
                let at = GuestAddress(address);
                self.guest
                    .memory()
                    .write_slice(&buffer.bytes, at)
                    .expect("buffer");
                (buffer.bytes.len() as u32, 0)
            };
            if usize::from(index) + 1 < count {
                flags |= 1;
            }
            let next = (head + index + 1) % 16;
            self.descriptor(queue, (head + index) % 16, (address, len), flags, next);
        }
        self.available(queue, head);
        self.next = self.next.wrapping_add(count as u16);
    }

    /// What is restored is what was saved, whatever the guest did before.
    fn fork(&mut self, restore: impl Fn(&D::State) -> D) {
        let frozen = self.guest.freeze();
        let child = FakeGuest::thaw(restore(&frozen.device), &frozen);
        let again = child.freeze();
        assert_eq!(again.device, frozen.device);
        assert_eq!(again.transport.queues, frozen.transport.queues);
        assert_eq!(again.transport.status, frozen.transport.status);
        self.guest = child;
    }
}
