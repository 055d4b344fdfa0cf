//! Network device (virtio 1.2 §5.1) whose tap is bound late.
//!
//! A template is booted without a tap: what its guest sends is dropped, and it receives
//! nothing. A child's device is restored from the same state, address and all, and gets a
//! tap of its own; or none, and then no page of its queues is ever written.
//!
//! The tap speaks frames with the header of §5.1.6 before each, whose offloads the guest
//! and the host's kernel settle between them. The device looks at no more than that
//! header. A frame that it cannot pass on is dropped, as on any wire; one that is under
//! way at a freeze is lost with it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::fs::{OFlags, fcntl_getfl};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::chain::{Chain, ChainError};
use super::iov;
use super::queue::{DeviceIo, QueueError};
use super::{Progress, VirtioDevice, copy_config};

mod header;
mod limits;

use header::{HEADER_SIZE, Header};
use limits::{Direction, Limiter};
pub use limits::{Rate, RateLimit, RateLimits};

const TYPE_NET: u32 = 1;
const RX: usize = 0;
const TX: usize = 1;
const QUEUE_SIZES: &[u16] = &[256, 256];

const F_CSUM: u64 = 1 << 0;
const F_GUEST_CSUM: u64 = 1 << 1;
const F_MTU: u64 = 1 << 3;
const F_MAC: u64 = 1 << 5;
const F_GUEST_TSO4: u64 = 1 << 7;
const F_GUEST_TSO6: u64 = 1 << 8;
const F_GUEST_ECN: u64 = 1 << 9;
const F_HOST_TSO4: u64 = 1 << 11;
const F_HOST_TSO6: u64 = 1 << 12;
const F_HOST_ECN: u64 = 1 << 13;
const F_MRG_RXBUF: u64 = 1 << 15;

/// The shortest and the longest frame, in bytes: an Ethernet header; and one before the
/// 64 KiB of a packet that is cut into segments later, with two VLAN tags.
const FRAME_MIN: usize = 14;
const FRAME_MAX: usize = FRAME_MIN + 8 + (64 << 10);
/// The same with the header of the device.
const PACKET_MIN: usize = HEADER_SIZE + FRAME_MIN;
const PACKET_MAX: usize = HEADER_SIZE + FRAME_MAX;
/// The most data moved in one direction before others get their turn, in bytes.
const BURST_MAX: usize = 1 << 20;
/// What a frame counts for at least, and a chain of its own beside it: a bound on their
/// number.
const FRAME_COST: usize = 4096;

/// The least MTU that a device may have (§5.1.4.1).
const MTU_MIN: u16 = 68;

/// A network interface as the guest sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetState {
    /// Its Ethernet address.
    pub mac: [u8; 6],
    /// The longest packet of its network in bytes, without the Ethernet header.
    pub mtu: u16,
}

impl Default for NetState {
    /// An address out of those that anybody may give, and Ethernet's usual MTU.
    fn default() -> Self {
        Self {
            mac: [2, 0, 0, 0, 0, 1],
            mtu: 1500,
        }
    }
}

/// Why a network device could not be restored, or got no tap.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// All zeroes, or the address of a group.
    #[error("{0:02x?} is no address of an interface")]
    Mac([u8; 6]),
    /// Less than the specification allows.
    #[error("an MTU of {0} is too small")]
    Mtu(u16),
    /// It has a tap already.
    #[error("the network device has a tap already")]
    Bound,
    /// A read would wait for a frame, and all devices with it.
    #[error("the tap is not in non-blocking mode")]
    Blocking,
    /// A descriptor that was not opened for reading and writing.
    #[error("the tap is not open for reading and writing")]
    Access,
    /// The descriptor cannot be asked or watched.
    #[error("cannot use the tap")]
    Io(#[source] io::Error),
}

/// The network device.
#[derive(Debug)]
pub struct Net {
    state: NetState,
    /// Watches the tap, edge-triggered. Itself watched by the event loop, so a tap may
    /// come when the loop runs already.
    epoll: OwnedFd,
    link: Option<Link>,
}

/// A tap, and how far the device has come with it.
#[derive(Debug)]
struct Link {
    tap: OwnedFd,
    /// There may be a frame to read. When the guest has no buffers it stays so, and
    /// nobody looks before the guest provides some: the event was taken.
    readable: bool,
    /// The tap was full. It tells when it is no more.
    full: bool,
    /// A frame with its header, read when it was not known yet where it fits.
    buffer: Vec<u8>,
    /// Bytes in the buffer that are not the guest's yet.
    pending: usize,
    /// What holds frames back, if anything.
    limiter: Option<Box<Limiter>>,
    /// A tap that fails over and over fills no log.
    warned: bool,
}

/// What has become of a frame that is to go to the guest.
enum Delivery {
    Done,
    /// The guest has too few buffers, and notifies when it provides more.
    NoBuffers,
}

impl Net {
    /// A device in `state`, without a tap.
    ///
    /// # Errors
    /// A state that no device has.
    pub fn restore(state: &NetState) -> Result<Self, NetError> {
        if state.mac[0] & 1 != 0 || state.mac == [0; 6] {
            return Err(NetError::Mac(state.mac));
        }
        if state.mtu < MTU_MIN {
            return Err(NetError::Mtu(state.mtu));
        }
        Ok(Self {
            state: state.clone(),
            epoll: epoll::create(CreateFlags::CLOEXEC).map_err(|e| NetError::Io(e.into()))?,
            link: None,
        })
    }

    /// Connects it to `tap`, an open tap (Linux Documentation/networking/tuntap.rst) of
    /// which its owner has seen to this: it is in non-blocking mode; it has IFF_TAP,
    /// IFF_NO_PI and IFF_VNET_HDR (TUNSETIFF), a header of 12 bytes (TUNSETVNETHDRSZ)
    /// in little-endian order (TUNSETVNETLE); and it hands on checksums and segments of
    /// TCP undone (TUNSETOFFLOAD: TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, TUN_F_TSO_ECN),
    /// which only a guest that takes them can have. The device does none of this
    /// itself: it makes no ioctl. What goes through it, either way, is held back by
    /// `limits`; without any, there is no timer.
    ///
    /// # Errors
    /// A second tap, a descriptor that is none, or no descriptor for a timer.
    pub fn bind(&mut self, tap: OwnedFd, limits: RateLimits) -> Result<(), NetError> {
        if self.link.is_some() {
            return Err(NetError::Bound);
        }
        let flags = fcntl_getfl(&tap).map_err(|e| NetError::Io(e.into()))?;
        if flags & OFlags::ACCMODE != OFlags::RDWR {
            return Err(NetError::Access);
        }
        if !flags.contains(OFlags::NONBLOCK) {
            return Err(NetError::Blocking);
        }
        let limiter = Limiter::new(limits).map_err(NetError::Io)?;
        let watch = |what: BorrowedFd<'_>, key, flags| {
            epoll::add(&self.epoll, what, EventData::new_u64(key), flags)
                .map_err(|e| NetError::Io(e.into()))
        };
        watch(tap.as_fd(), TAP, WATCHED)?;
        if let Some(limiter) = &limiter {
            watch(limiter.as_fd(), TIMER, EventFlags::IN | EventFlags::ET)?;
        }
        self.link = Some(Link {
            tap,
            readable: true,
            full: false,
            buffer: Vec::new(),
            pending: 0,
            limiter,
            warned: false,
        });
        Ok(())
    }

    /// Whether it has a tap.
    pub fn has_tap(&self) -> bool {
        self.link.is_some()
    }

    /// Takes the frames that the guest sends.
    fn transmit(&mut self, io: &mut DeviceIo<'_>) -> Result<Progress, QueueError> {
        let mut moved = 0;
        while moved < BURST_MAX {
            if self.link.as_mut().is_some_and(|link| !link.takes_frames()) {
                return Ok(Progress::Done);
            }
            let Some(mut chain) = io.pop_or_wait(TX)? else {
                return Ok(Progress::Done);
            };
            let len = chain.readable.len();
            moved += FRAME_COST + len;
            if let Some(link) = &mut self.link {
                let sent = link.send(&mut chain, io.features());
                match sent.map_err(|source| QueueError::Chain { queue: TX, source })? {
                    Sent::Taken => link.charge(Direction::FromGuest, len.min(PACKET_MAX)),
                    Sent::Full => {
                        io.undo_pop(TX);
                        link.wait_for_room(&self.epoll);
                        return Ok(Progress::Done);
                    }
                }
            }
            io.push_used(TX, &chain, 0)?;
        }
        Ok(Progress::More)
    }

    /// Hands the guest the frames that the tap has for it.
    fn receive(&mut self, io: &mut DeviceIo<'_>) -> Result<Progress, QueueError> {
        let Some(link) = &mut self.link else {
            return Ok(Progress::Done);
        };
        let mut moved = 0;
        while moved < BURST_MAX {
            if link.pending == 0 {
                if !link.readable || !link.admits(Direction::ToGuest) {
                    return Ok(Progress::Done);
                }
                // Nothing is read for which there is no place at all.
                let Some(chain) = io.pop_or_wait(RX)? else {
                    return Ok(Progress::Done);
                };
                moved += FRAME_COST;
                if chain.writable.len() >= PACKET_MAX {
                    moved += link.receive_into(chain, io)?;
                    continue;
                }
                io.undo_pop(RX);
                link.fill(io.features());
            }
            let len = link.pending;
            match link.deliver(io, &mut moved)? {
                Delivery::Done => moved += len,
                Delivery::NoBuffers => return Ok(Progress::Done),
            }
        }
        Ok(Progress::More)
    }

    /// Learns what the tap has said, and the timer.
    fn take_host_events(&mut self) {
        let mut events = Vec::with_capacity(2);
        let now = rustix::event::Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let spare = rustix::buffer::spare_capacity(&mut events);
        if let Err(error) = epoll::wait(&self.epoll, spare, Some(&now)) {
            log::debug!("network: epoll: {error}");
        }
        let Some(link) = &mut self.link else {
            return;
        };
        for event in events {
            if event.data.u64() == TIMER {
                link.limiter.iter_mut().for_each(|limiter| limiter.wake());
                continue;
            }
            // What has failed is found out by a read, and by a write.
            let failed = EventFlags::ERR | EventFlags::HUP;
            let flags = event.flags;
            link.readable |= flags.intersects(EventFlags::IN | failed);
            link.full &= !flags.intersects(EventFlags::OUT | failed);
        }
    }
}

/// What is watched.
const TAP: u64 = 0;
const TIMER: u64 = 1;

const WATCHED: EventFlags = EventFlags::IN.union(EventFlags::OUT).union(EventFlags::ET);

/// What has become of a frame of the guest.
enum Sent {
    /// It was sent, or is dropped.
    Taken,
    /// The tap has no room for it now.
    Full,
}

impl Link {
    /// Whether a frame may go in that direction now. If not, the timer tells when.
    fn admits(&mut self, direction: Direction) -> bool {
        let limiter = self.limiter.as_mut();
        limiter.is_none_or(|limiter| limiter.admits(direction))
    }

    /// Whether a frame of the guest may go now. If not, an event tells when.
    fn takes_frames(&mut self) -> bool {
        !self.full && self.admits(Direction::FromGuest)
    }

    /// Whether the guest may have frames that could not go.
    fn holds_up(&self) -> bool {
        self.full || self.limiter.is_some()
    }

    /// A frame has gone, with its header so long.
    fn charge(&mut self, direction: Direction, len: usize) {
        if let Some(limiter) = &mut self.limiter {
            limiter.charge(direction, len.saturating_sub(HEADER_SIZE));
        }
    }

    /// Sends one frame of the guest.
    fn send(&mut self, chain: &mut Chain<'_>, features: u64) -> Result<Sent, ChainError> {
        let header = Header::read(&mut chain.readable)?;
        let frame = &chain.readable;
        // A chain has no more descriptors than the queue entries: one call takes them all.
        let is_frame = (FRAME_MIN..=FRAME_MAX).contains(&frame.len());
        if !is_frame || !header.fits_host(features) {
            return Ok(Sent::Taken);
        }
        match iov::write_frame(self.tap.as_fd(), &header.for_host(), frame.slices()) {
            Ok(_) => Ok(Sent::Taken),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Sent::Full),
            Err(error) => {
                // A header that the host's kernel finds wrong is the guest's affair.
                if error.raw_os_error() != Some(Errno::INVAL.raw_os_error()) {
                    self.report("a frame is lost", &error);
                }
                Ok(Sent::Taken)
            }
        }
    }

    /// To be told when there is room. To ask anew gives the event at once if there is
    /// some by now.
    fn wait_for_room(&mut self, epoll: &OwnedFd) {
        self.full = true;
        if let Err(error) = epoll::modify(epoll, &self.tap, EventData::new_u64(TAP), WATCHED) {
            // Without the event it would be full for ever: frames are lost instead.
            self.full = false;
            self.report("it cannot be watched", &error.into());
        }
    }

    /// Reads one frame into `chain`, which any frame fits into, and gives it to the
    /// guest. The number of bytes read.
    fn receive_into<'m>(
        &mut self,
        mut chain: Chain<'m>,
        io: &mut DeviceIo<'m>,
    ) -> Result<usize, QueueError> {
        let frame = chain.writable.split_off(HEADER_SIZE);
        let mut bytes = [0; HEADER_SIZE];
        let read = iov::read_frame(self.tap.as_fd(), &mut bytes, frame.slices());
        let Some(len) = self.has_read(read) else {
            io.undo_pop(RX);
            return Ok(0);
        };
        let header = Header::from_host(bytes, io.features(), 1);
        let Some(header) = header.filter(|_| len >= PACKET_MIN) else {
            io.undo_pop(RX);
            return Ok(len);
        };
        chain
            .writable
            .write_all(&header)
            .map_err(|source| QueueError::Chain { queue: RX, source })?;
        io.push_used(RX, &chain, len)?;
        Ok(len)
    }

    /// Reads one frame into the buffer, unless it is one that the guest cannot take.
    fn fill(&mut self, features: u64) {
        self.buffer.resize(PACKET_MAX, 0);
        let read = rustix::io::retry_on_intr(|| rustix::io::read(&self.tap, &mut self.buffer[..]));
        let Some(len) = self.has_read(read.map_err(io::Error::from)) else {
            return;
        };
        if let Some((head, _)) = self.buffer.split_first_chunk_mut::<HEADER_SIZE>()
            && let Some(header) = Header::from_host(*head, features, 0)
            && len >= PACKET_MIN
        {
            *head = header;
            self.pending = len;
        }
    }

    /// What a read has given: `None` if there is no frame.
    fn has_read(&mut self, read: io::Result<usize>) -> Option<usize> {
        match read {
            Ok(len) if len > 0 => {
                self.charge(Direction::ToGuest, len);
                return Some(len);
            }
            // The end of what was no tap.
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => self.report("nothing can be read", &error),
        }
        self.readable = false;
        None
    }

    /// Gives the frame in the buffer to the guest, in as many chains as it takes. The
    /// guest sees all of them at once. Each costs `moved`.
    fn deliver(
        &mut self,
        io: &mut DeviceIo<'_>,
        moved: &mut usize,
    ) -> Result<Delivery, QueueError> {
        if self.pending == 0 {
            return Ok(Delivery::Done);
        }
        let most = if io.features() & F_MRG_RXBUF != 0 {
            io.size(RX)
        } else {
            1
        };
        let failed = |source| QueueError::Chain { queue: RX, source };
        let mut chains: Vec<Chain<'_>> = Vec::new();
        let mut room = 0;
        while room < self.pending {
            let popped = if chains.len() < usize::from(most) {
                io.pop(RX)?
            } else {
                // More than the guest could ever have for it.
                self.pending = 0;
                None
            };
            let Some(chain) = popped else {
                chains.iter().for_each(|_| io.undo_pop(RX));
                let count = chains.len() as u16;
                if self.pending == 0 {
                    return Ok(Delivery::Done);
                }
                if !io.notify_beyond(RX, count)? {
                    return Ok(Delivery::NoBuffers);
                }
                (room, chains) = (0, Vec::new());
                continue;
            };
            *moved += FRAME_COST / 16;
            let least = if chains.is_empty() { HEADER_SIZE } else { 1 };
            if chain.writable.len() < least {
                return Err(failed(ChainError::TooShort));
            }
            room += chain.writable.len();
            chains.push(chain);
        }
        // No more than the queue is long.
        let count = chains.len() as u16;
        let frame = &mut self.buffer[..std::mem::take(&mut self.pending)];
        header::set_buffers(frame, count);
        let mut rest = &*frame;
        let mut used = Vec::with_capacity(chains.len());
        for mut chain in chains {
            let (now, later) = rest.split_at(chain.writable.len().min(rest.len()));
            chain.writable.write_all(now).map_err(failed)?;
            used.push((chain, now.len()));
            rest = later;
        }
        io.push_used_together(RX, &used)?;
        Ok(Delivery::Done)
    }

    /// The host's side has failed: worth one line.
    fn report(&mut self, what: &str, error: &io::Error) {
        if std::mem::replace(&mut self.warned, true) {
            log::debug!("tap: {what}: {error}");
        } else {
            log::warn!("the tap of a virtual machine fails: {what}: {error}");
        }
    }
}

impl VirtioDevice for Net {
    type State = NetState;

    fn device_type(&self) -> u32 {
        TYPE_NET
    }

    fn queue_sizes(&self) -> &'static [u16] {
        QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        let from_guest = F_CSUM | F_HOST_TSO4 | F_HOST_TSO6 | F_HOST_ECN;
        let to_guest = F_GUEST_CSUM | F_GUEST_TSO4 | F_GUEST_TSO6 | F_GUEST_ECN;
        F_MAC | F_MTU | F_MRG_RXBUF | from_guest | to_guest
    }

    /// The layout is that of §5.1.4; fields of features not offered are zero.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; 12];
        config[..6].copy_from_slice(&self.state.mac);
        config[10..].copy_from_slice(&self.state.mtu.to_le_bytes());
        copy_config(&config, offset, data);
    }

    fn process_queue(
        &mut self,
        queue: usize,
        io: &mut DeviceIo<'_>,
    ) -> Result<Progress, QueueError> {
        if queue == RX {
            self.receive(io)
        } else {
            self.transmit(io)
        }
    }

    fn host_events(&self) -> Option<BorrowedFd<'_>> {
        Some(self.epoll.as_fd())
    }

    fn process_host_events(&mut self, io: &mut DeviceIo<'_>) -> Result<Progress, QueueError> {
        let held_up = self.link.as_ref().is_some_and(Link::holds_up);
        self.take_host_events();
        let received = self.receive(io)?;
        if held_up && self.transmit(io)? == Progress::More {
            return Ok(Progress::More);
        }
        Ok(received)
    }

    /// What was read for it is lost; the tap stays.
    fn reset(&mut self) {
        if let Some(link) = &mut self.link {
            link.pending = 0;
        }
    }

    fn save(&self) -> NetState {
        self.state.clone()
    }
}

#[cfg(test)]
mod tests;
