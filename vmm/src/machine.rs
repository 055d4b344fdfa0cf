//! The whole machine, in one place: which devices it has, where they are, and
//! how they are saved and restored. A device that is not in [`Devices`] and in
//! [`DevicesState`] does not compile into the machine.
//!
//! | device | registers | interrupt |
//! |---|---|---|
//! | serial console | ports 0x3f8..0x400 | 4 |
//! | reset (i8042) | port 0x64 | |
//! | doorbell | 0xd0000000 | |
//! | virtio-rng | 0xd0001000 | 5 |
//! | virtio-vsock | 0xd0002000 | 6 |
//! | virtio-blk `vda`: the root image, read-only | 0xd0003000 | 7 |
//! | virtio-blk `vdb`: a writable layer that is mounted before the freeze | 0xd0004000 | 8 |
//! | virtio-blk `vdc`: any other writable layer | 0xd0005000 | 9 |
//! | virtio-pmem: the root image again, mapped (`window.rs`) | 0xd0006000 | 10 |
//! | virtio-fs `volumes`: what the child's file server serves | 0xd0007000 | 11 |
//! | virtio-net `eth0`: the same addresses in all children | 0xd0008000 | 12 |
//! | virtio-balloon: what the guest does not use is the host's again | 0xd0009000 | 13 |
//!
//! The disks' slots, the window, the tag and the addresses are part of a template; the
//! files behind them, the server, and the tap are bound at the fork.

use crate::error::Error;
use crate::io::Io;
use crate::kvm::KvmVm;
use crate::layout::{SERIAL_IRQ, SERIAL_PORT, VIRTIO_IRQ, VIRTIO_MMIO, VIRTIO_MMIO_SIZE, Window};
use crate::moment::Moment;
use devices::virtio::balloon::{Balloon, BalloonState};
use devices::virtio::block::{Block, BlockState};
use devices::virtio::fs::{Fs, FsState};
use devices::virtio::mmio::{MmioTransport, TransportState};
use devices::virtio::net::{Net, NetState, RateLimits};
use devices::virtio::pmem::{Pmem, PmemState};
use devices::virtio::rng::{Rng, RngState};
use devices::virtio::vsock::{Vsock, VsockState};
use devices::virtio::{DiskFiles, VirtioDevice};
use devices::{Console, DeviceMemory, Interrupt, MmioDevice, Serial, SerialState, i8042};
use event_manager::MutEventSubscriber;
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use vm_run_abi::{PAGE_SIZE, doorbell, network};

/// How many virtio-mmio windows the machine has.
pub(crate) const VIRTIO_DEVICES: u32 = 9;

/// How large the disks claim to be, in sectors of 512 bytes. A driver reads
/// the size when it probes, in the parent, long before a file is bound; reads
/// behind the file's end give zeroes.
const DISK_SECTORS: u64 = (1 << 40) / 512;

/// What a network device is bound to.
#[derive(Debug)]
pub struct Tap {
    /// See [`Net::bind`].
    pub descriptor: OwnedFd,
    /// How fast frames may go through it.
    pub limits: RateLimits,
}

/// What a running VM tells whoever runs it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The guest is at its fork point, and that vCPU is parked.
    ForkPoint {
        /// The guest's version of the agreement.
        version: u64,
        /// When the store left the guest.
        at: Moment,
    },
    /// The guest has applied the identity of this generation.
    IdentityApplied {
        /// As it read it.
        generation: u64,
        /// When the vCPU that says so first entered the guest.
        entered: Moment,
        /// When the store left the guest.
        at: Moment,
    },
    /// The guest's kernel has taken the identity that [`Vm::renew`](crate::Vm::renew)
    /// gave it.
    IdentityTaken {
        /// As it read it.
        generation: u64,
    },
    /// A guest without Linux has answered, and is parked.
    Answer {
        /// The value.
        value: u64,
        /// When its vCPU first entered the guest.
        entered: Moment,
        /// When the store left the guest.
        at: Moment,
    },
    /// The guest cannot boot, and says why.
    BootFailed(String),
    /// The guest has powered off.
    PowerOff,
    /// The guest has reset itself: after a panic, as a rule.
    Reset,
    /// The guest did what no guest may, or KVM failed.
    Failed(String),
}

/// Where a VM's events go. Called on a vCPU's thread, so it must not wait. A
/// guest makes at most one event of each kind until it is resumed.
pub type EventSink = Arc<dyn Fn(Event) + Send + Sync>;

/// The files behind the disks of one VM.
#[derive(Debug, Default)]
pub struct Disks {
    /// The root image; many VMs may share it.
    pub root: Option<File>,
    /// The writable layer that the guest had mounted when it was frozen, as it was then;
    /// no other VM may have it.
    pub mounted: Option<DiskFiles>,
    /// Any other writable layer; no other VM may have it.
    pub writable: Option<DiskFiles>,
}

/// All devices of one VM; a clone is of the same.
#[derive(Clone)]
pub(crate) struct Devices {
    pub(crate) serial: Arc<Mutex<Serial>>,
    pub(crate) rng: Arc<Mutex<MmioTransport<Rng>>>,
    pub(crate) vsock: Arc<Mutex<MmioTransport<Vsock>>>,
    pub(crate) root: Arc<Mutex<MmioTransport<Block>>>,
    pub(crate) mounted: Arc<Mutex<MmioTransport<Block>>>,
    pub(crate) writable: Arc<Mutex<MmioTransport<Block>>>,
    pub(crate) pmem: Arc<Mutex<MmioTransport<Pmem>>>,
    pub(crate) volumes: Arc<Mutex<MmioTransport<Fs>>>,
    pub(crate) net: Arc<Mutex<MmioTransport<Net>>>,
    pub(crate) balloon: Arc<Mutex<MmioTransport<Balloon>>>,
}

/// As much as a picture of a VM cannot do without.
pub(crate) const UNCOVERED: &str =
    "to be captured with one more layer for its disk, if it has one, and with none otherwise";

/// A virtio device, and that it is at rest.
pub(crate) type Still<'d, D> = MutexGuard<'d, MmioTransport<D>>;

/// All devices of one VM, at rest: none writes guest memory or raises an interrupt.
pub(crate) struct Held<'d> {
    serial: MutexGuard<'d, Serial>,
    rng: Still<'d, Rng>,
    vsock: Still<'d, Vsock>,
    root: Still<'d, Block>,
    mounted: Still<'d, Block>,
    writable: Still<'d, Block>,
    pmem: Still<'d, Pmem>,
    volumes: Still<'d, Fs>,
    net: Still<'d, Net>,
    balloon: Still<'d, Balloon>,
}

impl Held<'_> {
    /// Puts a fresh layer over the writable one that is on a disk, if there is one.
    pub(crate) fn cover(&mut self, top: Option<File>) -> Result<(), Error> {
        let disks = [&mut self.mounted, &mut self.writable];
        let bound = disks.into_iter().find(|disk| disk.device().layers() > 0);
        match (bound, top) {
            (Some(disk), Some(top)) => disk
                .device_mut()
                .cover(top)
                .map_err(refused("the writable disk")),
            (None, None) => Ok(()),
            _ => Err(Error::Phase(UNCOVERED)),
        }
    }

    /// Has the server of the volumes keep what the guest knows of them.
    pub(crate) fn claim(&mut self, claim: Option<OwnedFd>) -> Result<(), Error> {
        let claimed = claim.map(|claim| self.volumes.device_mut().claim(claim));
        claimed
            .transpose()
            .map_err(refused("the volumes"))
            .map(drop)
    }

    /// Reads all states.
    pub(crate) fn save(&self) -> DevicesState {
        DevicesState {
            serial: self.serial.save(),
            rng: save(&self.rng),
            vsock: save(&self.vsock),
            root: save(&self.root),
            mounted: save(&self.mounted),
            writable: save(&self.writable),
            pmem: save(&self.pmem),
            volumes: save(&self.volumes),
            net: save(&self.net),
            balloon: save(&self.balloon),
        }
    }
}

/// A virtio device's state, registers and all.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Virtio<S> {
    transport: TransportState,
    device: S,
}

/// The state of all devices of one VM.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct DevicesState {
    serial: SerialState,
    rng: Virtio<RngState>,
    vsock: Virtio<VsockState>,
    root: Virtio<BlockState>,
    mounted: Virtio<BlockState>,
    writable: Virtio<BlockState>,
    pmem: Virtio<PmemState>,
    volumes: Virtio<FsState>,
    net: Virtio<NetState>,
    balloon: Virtio<BalloonState>,
}

impl DevicesState {
    /// A machine that was just switched on, with its root window at `window`.
    pub(crate) fn new(window: Window) -> Self {
        let disk = |id: &str, read_only| Virtio {
            transport: TransportState::default(),
            device: BlockState {
                capacity_sectors: DISK_SECTORS,
                read_only,
                id: id.into(),
            },
        };
        Self {
            serial: SerialState::default(),
            rng: Virtio::default(),
            vsock: Virtio::default(),
            root: disk("root", true),
            mounted: disk("mounted", false),
            writable: disk("writable", false),
            pmem: Virtio {
                transport: TransportState::default(),
                device: state_of(window),
            },
            volumes: Virtio::default(),
            net: Virtio {
                transport: TransportState::default(),
                device: NetState {
                    mac: network::MAC,
                    mtu: network::MTU,
                },
            },
            balloon: Virtio::default(),
        }
    }
}

impl Devices {
    /// Makes all devices of `kvm` in the state `s`, and wires their interrupts. The
    /// disks have no files yet.
    pub(crate) fn restore(s: &DevicesState, kvm: &KvmVm, console: &Console) -> Result<Self, Error> {
        let vm = &kvm.fd;
        let memory = &DeviceMemory {
            ram: kvm.ram.memory().clone(),
            rom: Some(kvm.window.memory().clone()),
        };
        if s.pmem.device != state_of(kvm.window.place()) {
            return Err(Error::State("its root window lies elsewhere".into()));
        }
        let irq = |gsi: u32| -> Arc<dyn Interrupt> {
            Arc::new(Line {
                vm: Arc::clone(vm),
                gsi,
            })
        };
        let serial = Serial::restore(irq(SERIAL_IRQ), console.clone(), &s.serial)
            .map_err(refused("the serial port"))?;
        let root = Block::restore(&s.root.device).map_err(refused("the root disk"))?;
        let mounted = Block::restore(&s.mounted.device).map_err(refused("the mounted disk"))?;
        let writable = Block::restore(&s.writable.device).map_err(refused("the writable disk"))?;
        let vsock = Vsock::restore(&s.vsock.device).map_err(refused("vsock"))?;
        let rng = Rng::restore(&s.rng.device);
        let pmem = Pmem::restore(&s.pmem.device).map_err(refused("the root window"))?;
        let volumes = Fs::restore(&s.volumes.device);
        let net = Net::restore(&s.net.device).map_err(refused("the network device"))?;
        let balloon = Balloon::restore(&s.balloon.device, kvm.ram.reclaimer());
        Ok(Self {
            serial: Arc::new(Mutex::new(serial)),
            rng: attach(rng, memory, irq(VIRTIO_IRQ), &s.rng.transport)?,
            vsock: attach(vsock, memory, irq(VIRTIO_IRQ + 1), &s.vsock.transport)?,
            root: attach(root, memory, irq(VIRTIO_IRQ + 2), &s.root.transport)?,
            mounted: attach(mounted, memory, irq(VIRTIO_IRQ + 3), &s.mounted.transport)?,
            writable: attach(writable, memory, irq(VIRTIO_IRQ + 4), &s.writable.transport)?,
            pmem: attach(pmem, memory, irq(VIRTIO_IRQ + 5), &s.pmem.transport)?,
            volumes: attach(volumes, memory, irq(VIRTIO_IRQ + 6), &s.volumes.transport)?,
            net: attach(net, memory, irq(VIRTIO_IRQ + 7), &s.net.transport)?,
            balloon: attach(balloon, memory, irq(VIRTIO_IRQ + 8), &s.balloon.transport)?,
        })
    }

    /// Binds the disks' files, the volumes' server and the network's tap, before the
    /// guest runs.
    pub(crate) fn bind(
        &self,
        disks: Disks,
        volumes: Option<OwnedFd>,
        tap: Option<Tap>,
    ) -> Result<(), Error> {
        if let Some(tap) = tap {
            lock(&self.net)
                .device_mut()
                .bind(tap.descriptor, tap.limits)
                .map_err(refused("the network"))?;
        }
        if let Some(server) = volumes {
            lock(&self.volumes)
                .device_mut()
                .bind(server)
                .map_err(refused("the volumes"))?;
        }
        for (device, files, name) in [
            (&self.root, disks.root.map(DiskFiles::from), "the root disk"),
            (&self.mounted, disks.mounted, "the mounted disk"),
            (&self.writable, disks.writable, "the writable disk"),
        ] {
            if let Some(files) = files {
                lock(device)
                    .device_mut()
                    .bind(files)
                    .map_err(refused(name))?;
            }
        }
        Ok(())
    }

    /// The disk with the writable layer, if there is one.
    pub(crate) fn writable(&self) -> Option<Still<'_, Block>> {
        let mut disks = [&self.mounted, &self.writable]
            .into_iter()
            .map(|disk| lock(disk));
        disks.find(|disk| disk.device().layers() > 0)
    }

    /// See [`Block::replace`], of the writable layer.
    pub(crate) fn replace_layers(&self, count: usize, merged: File) -> Result<(), Error> {
        let mut disk = self.writable().ok_or(Error::Phase("without a disk"))?;
        disk.device_mut()
            .replace(count, merged)
            .map_err(refused("the writable disk"))
    }

    /// Stops all devices, for as long as what is returned lives: whoever holds a
    /// device's lock sees it at rest. The vCPUs are stopped before.
    pub(crate) fn hold(&self) -> Held<'_> {
        Held {
            serial: lock(&self.serial),
            rng: lock(&self.rng),
            vsock: lock(&self.vsock),
            root: lock(&self.root),
            mounted: lock(&self.mounted),
            writable: lock(&self.writable),
            pmem: lock(&self.pmem),
            volumes: lock(&self.volumes),
            net: lock(&self.net),
            balloon: lock(&self.balloon),
        }
    }

    /// After a restore: has every device look at its queues again. False if no
    /// device has anything to do.
    pub(crate) fn kick(&self) -> bool {
        [
            lock(&self.rng).kick(),
            lock(&self.vsock).kick(),
            lock(&self.root).kick(),
            lock(&self.mounted).kick(),
            lock(&self.writable).kick(),
            lock(&self.pmem).kick(),
            self.kick_volumes(),
            self.kick_net(),
            lock(&self.balloon).kick(),
        ]
        .contains(&true)
    }

    /// A look at queues writes to pages that were the template's. Without a server nobody
    /// has mounted anything, so there is nothing to see.
    fn kick_volumes(&self) -> bool {
        let mut volumes = lock(&self.volumes);
        volumes.device().has_server() && volumes.kick()
    }

    /// Likewise: without a tap nothing comes, and what goes is lost anyway.
    fn kick_net(&self) -> bool {
        let mut net = lock(&self.net);
        net.device().has_tap() && net.kick()
    }

    /// In the order of their windows.
    fn windows(&self) -> [Arc<Mutex<dyn MmioDevice>>; VIRTIO_DEVICES as usize] {
        [
            self.rng.clone(),
            self.vsock.clone(),
            self.root.clone(),
            self.mounted.clone(),
            self.writable.clone(),
            self.pmem.clone(),
            self.volumes.clone(),
            self.net.clone(),
            self.balloon.clone(),
        ]
    }

    /// For the event loop.
    pub(crate) fn subscribers(&self) -> Vec<Arc<Mutex<dyn MutEventSubscriber + Send>>> {
        vec![
            self.rng.clone(),
            self.vsock.clone(),
            self.root.clone(),
            self.mounted.clone(),
            self.writable.clone(),
            self.pmem.clone(),
            self.volumes.clone(),
            self.net.clone(),
            self.balloon.clone(),
        ]
    }
}

/// What a guest is told of its root window.
fn state_of(window: Window) -> PmemState {
    PmemState {
        start: window.gpa,
        size: window.len,
    }
}

/// An input of the interrupt controllers. Raised by an ioctl, at once and by the
/// raising thread: KVM hands an irqfd of an IOAPIC input to a worker of its own
/// (Linux virt/kvm/eventfd.c, irqfd_wakeup), and each would be two more calls for
/// a fork to make, and more for KVM to wait for at the end.
struct Line {
    vm: Arc<VmFd>,
    gsi: u32,
}

impl Interrupt for Line {
    fn raise(&self) -> io::Result<()> {
        self.vm.set_irq_line(self.gsi, true)?;
        Ok(self.vm.set_irq_line(self.gsi, false)?)
    }
}

fn attach<D: VirtioDevice>(
    device: D,
    memory: &DeviceMemory,
    irq: Arc<dyn Interrupt>,
    state: &TransportState,
) -> Result<Arc<Mutex<MmioTransport<D>>>, Error> {
    MmioTransport::restore(device, memory.clone(), irq, state)
        .map(|transport| Arc::new(Mutex::new(transport)))
        .map_err(refused("a virtio device"))
}

fn save<D: VirtioDevice>(device: &MmioTransport<D>) -> Virtio<D::State> {
    Virtio {
        transport: device.save(),
        device: device.device().save(),
    }
}

fn refused<E: std::fmt::Display>(device: &'static str) -> impl FnOnce(E) -> Error {
    move |e| Error::Device {
        device,
        reason: e.to_string(),
    }
}

/// A device whose thread has panicked is no worse than the guest can make it.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where the vCPUs' accesses go.
pub(crate) struct Bus {
    io: Arc<Io>,
    serial: Arc<Mutex<Serial>>,
    windows: [Arc<Mutex<dyn MmioDevice>>; VIRTIO_DEVICES as usize],
    message: Mutex<Vec<u8>>,
}

impl Bus {
    pub(crate) fn new(devices: &Devices, io: &Arc<Io>) -> Self {
        Self {
            io: Arc::clone(io),
            serial: Arc::clone(&devices.serial),
            windows: devices.windows(),
            message: Mutex::default(),
        }
    }

    /// The offset into the doorbell page, if `gpa` is in it.
    pub(crate) fn doorbell_offset(gpa: u64) -> Option<u64> {
        gpa.checked_sub(doorbell::GPA).filter(|at| *at < PAGE_SIZE)
    }

    fn window(&self, gpa: u64) -> Option<(MutexGuard<'_, dyn MmioDevice + 'static>, u64)> {
        let at = gpa.checked_sub(VIRTIO_MMIO)?;
        let window = self.windows.get((at / VIRTIO_MMIO_SIZE) as usize)?;
        Some((lock(window), at % VIRTIO_MMIO_SIZE))
    }

    /// Addresses that nobody answers read as ones, as on a real bus; the
    /// doorbell reads as zeroes.
    pub(crate) fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        match self.window(gpa) {
            Some((mut device, offset)) => {
                data.fill(0);
                device.read(offset, data);
            }
            None if Self::doorbell_offset(gpa).is_some() => data.fill(0),
            None => data.fill(0xff),
        }
    }

    /// # Errors
    /// No thread for the event loop, which a device may need from now on.
    pub(crate) fn mmio_write(&self, gpa: u64, data: &[u8]) -> Result<(), Error> {
        if let Some((mut device, offset)) = self.window(gpa) {
            device.write(offset, data);
            drop(device);
            self.io.ensure()?;
        }
        Ok(())
    }

    /// Ports are one byte wide here; KVM gives string output as many bytes for
    /// one port.
    pub(crate) fn port_read(&self, port: u16, data: &mut [u8]) {
        for byte in data {
            *byte = match serial_offset(port) {
                Some(offset) => lock(&self.serial).read(offset),
                None => i8042::read(port).unwrap_or(0xff),
            };
        }
    }

    /// True if the guest asks for a reset.
    pub(crate) fn port_write(&self, port: u16, data: &[u8]) -> bool {
        let mut reset = false;
        for &byte in data {
            match serial_offset(port) {
                Some(offset) => lock(&self.serial).write(offset, byte),
                None => reset |= i8042::is_reset(port, byte),
            }
        }
        reset
    }

    /// One more byte of the guest's message.
    pub(crate) fn message(&self, byte: u8) {
        let mut message = lock(&self.message);
        if message.len() < doorbell::MESSAGE_MAX {
            message.push(byte);
        }
    }

    /// The guest's message as one printable line.
    pub(crate) fn take_message(&self) -> String {
        let bytes = std::mem::take(&mut *lock(&self.message));
        String::from_utf8_lossy(&bytes)
            .chars()
            .map(|c| if c.is_control() { ' ' } else { c })
            .collect()
    }
}

fn serial_offset(port: u16) -> Option<u8> {
    port.checked_sub(SERIAL_PORT)
        .filter(|offset| *offset < 8)
        .map(|offset| offset as u8)
}
