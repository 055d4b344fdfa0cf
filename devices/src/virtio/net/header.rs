//! The header before each frame (virtio 1.2 §5.1.6), both ways.
//!
//! Of what it may ask for, only what was settled with the guest comes through: the
//! host's kernel never sees an offload that the device does not offer, nor the guest one
//! that it has not taken.

use super::{
    F_CSUM, F_GUEST_CSUM, F_GUEST_ECN, F_GUEST_TSO4, F_GUEST_TSO6, F_HOST_ECN, F_HOST_TSO4,
    F_HOST_TSO6,
};
use crate::virtio::chain::{Buffers, ChainError};

/// `struct virtio_net_hdr`: flags, gso_type, hdr_len, gso_size, csum_start, csum_offset,
/// num_buffers. With VERSION_1, num_buffers is always there.
pub(super) const HEADER_SIZE: usize = 12;

const FLAGS: usize = 0;
const GSO_TYPE: usize = 1;
const NUM_BUFFERS: usize = 10;

const NEEDS_CSUM: u8 = 1;
const DATA_VALID: u8 = 2;

const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_ECN: u8 = 0x80;

/// Which features let a header ask for what, in one direction.
struct Offloads {
    checksum: u64,
    tcpv4: u64,
    tcpv6: u64,
    ecn: u64,
}

const TO_HOST: Offloads = Offloads {
    checksum: F_CSUM,
    tcpv4: F_HOST_TSO4,
    tcpv6: F_HOST_TSO6,
    ecn: F_HOST_ECN,
};

const TO_GUEST: Offloads = Offloads {
    checksum: F_GUEST_CSUM,
    tcpv4: F_GUEST_TSO4,
    tcpv6: F_GUEST_TSO6,
    ecn: F_GUEST_ECN,
};

impl Offloads {
    /// Whether `features` have all that a header asks for.
    fn allow(&self, header: &[u8; HEADER_SIZE], features: u64) -> bool {
        let has = |feature| features & feature != 0;
        let wants_checksum = header[FLAGS] & NEEDS_CSUM != 0;
        let gso = header[GSO_TYPE];
        let segments = match gso & !GSO_ECN {
            GSO_NONE => gso & GSO_ECN == 0,
            // Each segment gets a checksum (§5.1.6.2).
            GSO_TCPV4 => wants_checksum && has(self.tcpv4),
            GSO_TCPV6 => wants_checksum && has(self.tcpv6),
            _ => false,
        };
        segments && (!wants_checksum || has(self.checksum)) && (gso & GSO_ECN == 0 || has(self.ecn))
    }
}

/// A header of the guest. The guest may change what lies in its memory: the copy is what
/// counts, and what is sent.
pub(super) struct Header([u8; HEADER_SIZE]);

impl Header {
    pub(super) fn read(from: &mut Buffers<'_>) -> Result<Self, ChainError> {
        let mut bytes = [0; HEADER_SIZE];
        from.read_exact(&mut bytes)?;
        Ok(Self(bytes))
    }

    /// Whether it asks for nothing that was not settled with the guest.
    pub(super) fn fits_host(&self, features: u64) -> bool {
        TO_HOST.allow(&self.0, features)
    }

    /// As the tap takes it: without the bits that are not a driver's to set.
    pub(super) fn for_host(&self) -> [u8; HEADER_SIZE] {
        let mut bytes = self.0;
        bytes[FLAGS] &= NEEDS_CSUM;
        bytes[NUM_BUFFERS..].fill(0);
        bytes
    }

    /// What the tap gave, as the guest takes it, in `buffers` chains; `None` if it does
    /// not. The tap leaves the last two bytes as they are (Linux drivers/net/tun.c,
    /// tun_put_user).
    pub(super) fn from_host(
        mut bytes: [u8; HEADER_SIZE],
        features: u64,
        buffers: u16,
    ) -> Option<[u8; HEADER_SIZE]> {
        if !TO_GUEST.allow(&bytes, features) {
            return None;
        }
        bytes[FLAGS] &= if features & F_GUEST_CSUM != 0 {
            NEEDS_CSUM | DATA_VALID
        } else {
            0
        };
        set_buffers(&mut bytes, buffers);
        Some(bytes)
    }
}

/// Says in how many chains the guest finds the frame at the front of which the header
/// is.
pub(super) fn set_buffers(frame: &mut [u8], count: u16) {
    if let Some(field) = frame.get_mut(NUM_BUFFERS..HEADER_SIZE) {
        field.copy_from_slice(&count.to_le_bytes());
    }
}
