//! The memory-mapped transport, version 2 (virtio 1.2 §4.2).

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::queue::{DeviceIo, QueueError, QueueState, VirtQueue};
use super::{Progress, VirtioDevice, feature};
use crate::{DeviceMemory, Interrupt, MmioDevice};

/// Size of the window of guest-physical addresses, in bytes.
pub const WINDOW_SIZE: u64 = 0x1000;

/// Register offsets (§4.2.2).
pub mod register {
    #![allow(missing_docs)] // named as in the table of the specification
    pub const MAGIC_VALUE: u64 = 0x000;
    pub const VERSION: u64 = 0x004;
    pub const DEVICE_ID: u64 = 0x008;
    pub const VENDOR_ID: u64 = 0x00c;
    pub const DEVICE_FEATURES: u64 = 0x010;
    pub const DEVICE_FEATURES_SEL: u64 = 0x014;
    pub const DRIVER_FEATURES: u64 = 0x020;
    pub const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub const QUEUE_SEL: u64 = 0x030;
    pub const QUEUE_NUM_MAX: u64 = 0x034;
    pub const QUEUE_NUM: u64 = 0x038;
    pub const QUEUE_READY: u64 = 0x044;
    pub const QUEUE_NOTIFY: u64 = 0x050;
    pub const INTERRUPT_STATUS: u64 = 0x060;
    pub const INTERRUPT_ACK: u64 = 0x064;
    pub const STATUS: u64 = 0x070;
    pub const QUEUE_DESC_LOW: u64 = 0x080;
    pub const QUEUE_DESC_HIGH: u64 = 0x084;
    pub const QUEUE_DRIVER_LOW: u64 = 0x090;
    pub const QUEUE_DRIVER_HIGH: u64 = 0x094;
    pub const QUEUE_DEVICE_LOW: u64 = 0x0a0;
    pub const QUEUE_DEVICE_HIGH: u64 = 0x0a4;
    pub const SHM_LEN_LOW: u64 = 0x0b0;
    pub const SHM_BASE_HIGH: u64 = 0x0bc;
    pub const CONFIG_GENERATION: u64 = 0x0fc;
    pub const CONFIG: u64 = 0x100;
}

/// Bits of the status register (§2.1).
pub mod status {
    #![allow(missing_docs)] // named as in the specification
    pub const ACKNOWLEDGE: u32 = 1;
    pub const DRIVER: u32 = 2;
    pub const DRIVER_OK: u32 = 4;
    pub const FEATURES_OK: u32 = 8;
    pub const NEEDS_RESET: u32 = 64;
    pub const FAILED: u32 = 128;
}

/// Bits of the interrupt status register (§4.2.2).
pub mod interrupt {
    /// The device used a buffer.
    pub const USED_BUFFER: u32 = 1;
    /// The configuration or the status changed.
    pub const CONFIG_CHANGE: u32 = 2;
}

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const MMIO_VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"vmrn");

/// Why a transport could not be restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// Another number of queues than the device has.
    #[error("state has {found} queues, the device {expected}")]
    QueueCount {
        /// What the device has.
        expected: usize,
        /// What the state has.
        found: usize,
    },
    /// A queue that cannot be: size, address.
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// More chains in flight than the queue has entries.
    #[error("queue {0}: indices are further apart than the queue is long")]
    QueueIndices(usize),
    /// A queue that is ready before the features are settled.
    #[error("queue {0} is ready in a device that is not set up")]
    QueueTooEarly(usize),
    /// Features that the device does not offer, or lack of those it insists on.
    #[error("acknowledged features {acked:#x} do not fit those offered, {offered:#x}")]
    Features {
        /// What the state says that the driver acknowledged.
        acked: u64,
        /// What the device offers.
        offered: u64,
    },
    /// A status that no driver can have reached.
    #[error("impossible device status {0:#x}")]
    Status(u32),
    /// Interrupt bits that do not exist.
    #[error("impossible interrupt status {0:#x}")]
    InterruptStatus(u32),
    /// The notification eventfd could not be made.
    #[error("cannot make an eventfd")]
    EventFd(#[source] io::Error),
}

/// The registers of a transport. `Default` is a device after power-on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TransportState {
    /// Which 32 feature bits of the device are read.
    pub device_features_sel: u32,
    /// Which 32 feature bits of the driver are written.
    pub driver_features_sel: u32,
    /// Feature bits that the driver acknowledged.
    pub driver_features: u64,
    /// The queue that the queue registers mean.
    pub queue_sel: u32,
    /// See [`status`].
    pub status: u32,
    /// See [`interrupt`].
    pub interrupt_status: u32,
    /// Changes with each change of the configuration space.
    pub config_generation: u32,
    /// Bit *n*: the driver notified queue *n*, and the device has not looked yet.
    pub pending_queues: u32,
    /// One for each queue of the device, or none at all: all fresh.
    pub queues: Vec<QueueState>,
}

/// A virtio device with its registers, its queues and its interrupt line.
///
/// Shared as `Arc<Mutex<_>>` between the vCPU threads ([`MmioDevice`]) and the
/// thread of the event loop ([`MutEventSubscriber`]). A guest's notification only
/// marks the queue and wakes the loop; the loop does the I/O.
pub struct MmioTransport<D: VirtioDevice> {
    device: D,
    memory: DeviceMemory,
    irq: Arc<dyn Interrupt>,
    notify: EventFd,
    /// All but the queues, which live in `queues`.
    registers: TransportState,
    queues: Vec<VirtQueue>,
    /// A guest that breaks its device over and over fills no log.
    warned: bool,
}

impl<D: VirtioDevice> MmioTransport<D> {
    /// Puts `device` on the bus in `state`, which is untrusted. `irq` is raised
    /// once for each interrupt. Nothing is processed before [`Self::kick`] or the
    /// next notification.
    pub fn restore(
        device: D,
        memory: impl Into<DeviceMemory>,
        irq: Arc<dyn Interrupt>,
        state: &TransportState,
    ) -> Result<Self, RestoreError> {
        let memory = memory.into();
        let sizes = device.queue_sizes();
        let offered = offered_features(&device);
        check_registers(state, offered)?;
        if !state.queues.is_empty() && state.queues.len() != sizes.len() {
            return Err(RestoreError::QueueCount {
                expected: sizes.len(),
                found: state.queues.len(),
            });
        }
        let event_idx = state.driver_features & feature::EVENT_IDX != 0;
        let mut queues = Vec::with_capacity(sizes.len());
        for (index, &max_size) in sizes.iter().enumerate() {
            queues.push(match state.queues.get(index) {
                None => VirtQueue::new(index, max_size),
                Some(queue) => {
                    check_queue(index, queue, state.status)?;
                    VirtQueue::restore(index, max_size, queue, &memory.ram, event_idx)?
                }
            });
        }
        Ok(Self {
            device,
            memory,
            irq,
            notify: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(RestoreError::EventFd)?,
            registers: TransportState {
                queues: Vec::new(),
                ..state.clone()
            },
            queues,
            warned: false,
        })
    }

    /// The registers and queues now; the device's own state is
    /// [`VirtioDevice::save`].
    pub fn save(&self) -> TransportState {
        TransportState {
            queues: self.queues.iter().map(VirtQueue::save).collect(),
            ..self.registers.clone()
        }
    }

    /// The device model.
    pub fn device(&self) -> &D {
        &self.device
    }

    /// The device model, for what its host side does to it.
    pub fn device_mut(&mut self) -> &mut D {
        &mut self.device
    }

    /// After a restore, when memory and interrupt controller are whole: has the
    /// loop look at every queue again, and repeats an interrupt that the driver
    /// has not acknowledged.
    ///
    /// With EVENT_IDX a chain that became available about the time of the save
    /// may have crossed `avail_event` unseen; its driver will not notify again,
    /// and without this look the queue is dead.
    ///
    /// False if no driver has set the device up: then there is nothing to look at.
    pub fn kick(&mut self) -> bool {
        if !self.is_running() {
            return false;
        }
        self.mark_all_queues();
        if self.registers.interrupt_status != 0 {
            self.interrupt(0);
        }
        true
    }

    /// Has the loop look at every queue that is ready.
    fn mark_all_queues(&mut self) {
        for (index, queue) in self.queues.iter().enumerate() {
            if queue.is_ready() {
                self.registers.pending_queues |= 1 << index;
            }
        }
        if self.registers.pending_queues != 0 {
            self.wake_loop();
        }
    }

    /// Driver and device are at work: set up, and not broken.
    fn is_running(&self) -> bool {
        let s = self.registers.status;
        s & status::DRIVER_OK != 0 && s & status::NEEDS_RESET == 0
    }

    fn wake_loop(&self) {
        // Fails only when the counter is at its maximum: then the loop is awake.
        if let Err(error) = self.notify.write(1) {
            log::debug!("virtio notification: {error}");
        }
    }

    /// Adds `bits` to the interrupt status and raises the line.
    fn interrupt(&mut self, bits: u32) {
        self.registers.interrupt_status |= bits;
        if let Err(error) = self.irq.raise() {
            log::debug!("virtio interrupt: {error}");
        }
    }

    /// The loop's part of a notification: works off the queues that are marked.
    fn process_pending(&mut self) {
        if !self.is_running() {
            return;
        }
        let pending = std::mem::take(&mut self.registers.pending_queues);
        let features = self.registers.driver_features;
        let mut io = DeviceIo::new(&self.memory, &mut self.queues, features);
        let mut again = 0;
        let mut result = Ok(());
        for queue in (0..u32::BITS as usize).filter(|queue| pending & (1 << queue) != 0) {
            match self.device.process_queue(queue, &mut io) {
                Ok(Progress::Done) => {}
                Ok(Progress::More) => again |= 1 << queue,
                Err(error) => {
                    result = Err(error);
                    break;
                }
            }
        }
        self.registers.pending_queues |= again;
        self.finish(result);
        if again != 0 {
            self.wake_loop();
        }
    }

    /// The loop's part of what happens on the device's host side.
    fn process_host_events(&mut self) {
        // Not only when the driver runs: events of a stopped device have to be
        // taken too, or the loop would spin on them. It gets no buffers then.
        let queues = if self.is_running() {
            self.queues.as_mut_slice()
        } else {
            &mut []
        };
        let mut io = DeviceIo::new(&self.memory, queues, self.registers.driver_features);
        let result = self.device.process_host_events(&mut io);
        let more = matches!(result, Ok(Progress::More));
        self.finish(result.map(|_| ()));
        if more {
            self.mark_all_queues();
        }
    }

    /// Interrupts the driver if it wants to know what was given back; stops the
    /// device if its queues were found broken.
    fn finish(&mut self, mut result: Result<(), QueueError>) {
        let mut interrupt = false;
        for queue in &mut self.queues {
            match queue.take_interrupt(&self.memory.ram) {
                Ok(wanted) => interrupt |= wanted,
                Err(error) => result = result.and(Err(error)),
            }
        }
        if interrupt {
            self.interrupt(interrupt::USED_BUFFER);
        }
        if let Err(error) = result {
            self.fail(&error);
        }
    }

    /// The guest broke the device: it stands still until reset (§2.1.2).
    fn fail(&mut self, error: &QueueError) {
        let level = if self.warned {
            log::Level::Debug
        } else {
            log::Level::Warn
        };
        self.warned = true;
        log::log!(
            level,
            "virtio device {} stopped: {error}",
            self.device.device_type()
        );
        let was_running = self.is_running();
        self.registers.status |= status::NEEDS_RESET;
        self.queues.iter_mut().for_each(VirtQueue::disable);
        if was_running {
            self.interrupt(interrupt::CONFIG_CHANGE);
        }
    }

    fn reset(&mut self) {
        self.device.reset();
        self.registers = TransportState {
            config_generation: self.registers.config_generation,
            ..TransportState::default()
        };
        for (index, queue) in self.queues.iter_mut().enumerate() {
            *queue = VirtQueue::new(index, queue.max_size());
        }
    }

    fn selected(&self) -> Option<&VirtQueue> {
        self.queues.get(self.registers.queue_sel as usize)
    }

    fn read_register(&self, offset: u64) -> u32 {
        let r = &self.registers;
        match offset {
            register::MAGIC_VALUE => MAGIC,
            register::VERSION => MMIO_VERSION,
            register::DEVICE_ID => self.device.device_type(),
            register::VENDOR_ID => VENDOR,
            register::DEVICE_FEATURES => {
                half(offered_features(&self.device), r.device_features_sel)
            }
            register::QUEUE_NUM_MAX => self.selected().map_or(0, |q| q.max_size().into()),
            register::QUEUE_READY => self.selected().map_or(0, |q| q.is_ready().into()),
            register::INTERRUPT_STATUS => r.interrupt_status,
            register::STATUS => r.status,
            // No shared memory: length -1 (§4.2.2), and nowhere.
            register::SHM_LEN_LOW..=register::SHM_BASE_HIGH => u32::MAX,
            register::CONFIG_GENERATION => r.config_generation,
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        match offset {
            register::DEVICE_FEATURES_SEL => self.registers.device_features_sel = value,
            register::DRIVER_FEATURES_SEL => self.registers.driver_features_sel = value,
            register::DRIVER_FEATURES => self.write_driver_features(value),
            register::QUEUE_SEL => self.registers.queue_sel = value,
            register::QUEUE_NOTIFY => self.notified(value),
            register::INTERRUPT_ACK => self.registers.interrupt_status &= !value,
            register::STATUS => self.write_status(value),
            register::QUEUE_NUM | register::QUEUE_READY => self.write_queue(offset, value),
            register::QUEUE_DESC_LOW..=register::QUEUE_DEVICE_HIGH => {
                self.write_queue(offset, value);
            }
            _ => {}
        }
    }

    /// Features are the driver's to write between DRIVER and FEATURES_OK.
    fn write_driver_features(&mut self, value: u32) {
        let r = &mut self.registers;
        if r.status & (status::DRIVER | status::FEATURES_OK) != status::DRIVER {
            return;
        }
        let value = u64::from(value);
        match r.driver_features_sel {
            0 => r.driver_features = r.driver_features & !0xffff_ffff | value,
            1 => r.driver_features = r.driver_features & 0xffff_ffff | value << 32,
            _ => {}
        }
    }

    fn notified(&mut self, queue: u32) {
        if (queue as usize) < self.queues.len() {
            self.registers.pending_queues |= 1 << queue;
            // One that comes before DRIVER_OK keeps until then.
            if self.is_running() {
                self.wake_loop();
            }
        }
    }

    /// Bits are set one after the other, never cleared but by a reset (§2.1.1);
    /// what breaks the order is not taken over, and the driver reads it back.
    fn write_status(&mut self, value: u32) {
        if value == 0 {
            return self.reset();
        }
        let offered = offered_features(&self.device);
        let r = &mut self.registers;
        r.status |= value & (status::ACKNOWLEDGE | status::FAILED);
        if r.status & status::ACKNOWLEDGE != 0 {
            r.status |= value & status::DRIVER;
        }
        if r.status & status::DRIVER != 0 && features_fit(r.driver_features, offered) {
            r.status |= value & status::FEATURES_OK;
        }
        if r.status & status::FEATURES_OK != 0 {
            r.status |= value & status::DRIVER_OK;
        }
        if self.is_running() && self.registers.pending_queues != 0 {
            self.wake_loop();
        }
    }

    /// A queue is the driver's to set up between FEATURES_OK and its QUEUE_READY.
    fn write_queue(&mut self, offset: u64, value: u32) {
        let running = self.registers.status & (status::FEATURES_OK | status::NEEDS_RESET);
        let event_idx = self.registers.driver_features & feature::EVENT_IDX != 0;
        let Some(queue) = self.queues.get_mut(self.registers.queue_sel as usize) else {
            return;
        };
        if running != status::FEATURES_OK {
            return;
        }
        match (offset, value) {
            (register::QUEUE_READY, 0) => return queue.disable(),
            _ if queue.is_ready() => return,
            (register::QUEUE_READY, _) => {
                if let Err(error) = queue.enable(&self.memory.ram, event_idx) {
                    self.fail(&error);
                }
                return;
            }
            _ => {}
        }
        let r = &mut queue.registers;
        match offset {
            // A size that does not fit 16 bits becomes one that `enable` refuses.
            register::QUEUE_NUM => r.size = u16::try_from(value).unwrap_or(0),
            register::QUEUE_DESC_LOW => set_low(&mut r.desc_table, value),
            register::QUEUE_DESC_HIGH => set_high(&mut r.desc_table, value),
            register::QUEUE_DRIVER_LOW => set_low(&mut r.avail_ring, value),
            register::QUEUE_DRIVER_HIGH => set_high(&mut r.avail_ring, value),
            register::QUEUE_DEVICE_LOW => set_low(&mut r.used_ring, value),
            register::QUEUE_DEVICE_HIGH => set_high(&mut r.used_ring, value),
            _ => {}
        }
    }
}

fn offered_features<D: VirtioDevice>(device: &D) -> u64 {
    device.features() | feature::VERSION_1 | feature::EVENT_IDX | feature::INDIRECT_DESC
}

fn features_fit(acked: u64, offered: u64) -> bool {
    acked & !offered == 0 && acked & feature::VERSION_1 != 0
}

fn check_registers(state: &TransportState, offered: u64) -> Result<(), RestoreError> {
    let has = |bit| state.status & bit != 0;
    let known = status::ACKNOWLEDGE
        | status::DRIVER
        | status::FEATURES_OK
        | status::DRIVER_OK
        | status::NEEDS_RESET
        | status::FAILED;
    if state.status & !known != 0
        || has(status::DRIVER) && !has(status::ACKNOWLEDGE)
        || has(status::FEATURES_OK) && !has(status::DRIVER)
        || has(status::DRIVER_OK) && !has(status::FEATURES_OK)
    {
        return Err(RestoreError::Status(state.status));
    }
    if has(status::FEATURES_OK) && !features_fit(state.driver_features, offered) {
        return Err(RestoreError::Features {
            acked: state.driver_features,
            offered,
        });
    }
    if state.interrupt_status & !(interrupt::USED_BUFFER | interrupt::CONFIG_CHANGE) != 0 {
        return Err(RestoreError::InterruptStatus(state.interrupt_status));
    }
    Ok(())
}

fn check_queue(index: usize, queue: &QueueState, status: u32) -> Result<(), RestoreError> {
    if !queue.ready {
        return Ok(());
    }
    if status & status::FEATURES_OK == 0 {
        return Err(RestoreError::QueueTooEarly(index));
    }
    if queue.next_avail.wrapping_sub(queue.next_used) > queue.size {
        return Err(RestoreError::QueueIndices(index));
    }
    Ok(())
}

/// The 32 bits of `features` that selector `sel` means.
fn half(features: u64, sel: u32) -> u32 {
    match sel {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

fn set_low(address: &mut u64, value: u32) {
    *address = *address & !0xffff_ffff | u64::from(value);
}

fn set_high(address: &mut u64, value: u32) {
    *address = *address & 0xffff_ffff | u64::from(value) << 32;
}

impl<D: VirtioDevice> MmioDevice for MmioTransport<D> {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let Some(config) = offset.checked_sub(register::CONFIG) {
            self.device.read_config(config, data);
        } else if let Ok(data) = <&mut [u8; 4]>::try_from(data) {
            // Registers are 32 bits wide and only whole (§4.2.2.2).
            *data = self.read_register(offset).to_le_bytes();
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Ok(data) = <[u8; 4]>::try_from(data) {
            self.write_register(offset, u32::from_le_bytes(data));
        }
    }
}

impl<D: VirtioDevice> MutEventSubscriber for MmioTransport<D> {
    fn init(&mut self, ops: &mut EventOps) {
        let mut result = ops.add(Events::new(&self.notify, EventSet::IN));
        if let Some(fd) = self.device.host_events() {
            result = result.and(ops.add(Events::new(&fd, EventSet::IN)));
        }
        if let Err(error) = result {
            log::error!(
                "virtio device {} gets no events: {error}",
                self.device.device_type()
            );
        }
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        if events.fd() == self.notify.as_raw_fd() {
            if let Err(error) = self.notify.read() {
                log::debug!("virtio notification: {error}");
            }
            self.process_pending();
        } else {
            self.process_host_events();
        }
    }
}

#[cfg(test)]
mod tests;
