//! Packet headers (virtio 1.2 §5.10.6).

use crate::virtio::{Buffers, ChainError};

/// Size of a header in bytes.
pub(super) const HEADER_SIZE: usize = 44;

pub(super) const TYPE_STREAM: u16 = 1;

/// Operations (§5.10.6.1).
pub(super) mod op {
    pub(in crate::virtio::vsock) const REQUEST: u16 = 1;
    pub(in crate::virtio::vsock) const RESPONSE: u16 = 2;
    pub(in crate::virtio::vsock) const RST: u16 = 3;
    pub(in crate::virtio::vsock) const SHUTDOWN: u16 = 4;
    pub(in crate::virtio::vsock) const RW: u16 = 5;
    pub(in crate::virtio::vsock) const CREDIT_UPDATE: u16 = 6;
    pub(in crate::virtio::vsock) const CREDIT_REQUEST: u16 = 7;
}

/// Flags of SHUTDOWN: what the sender of the packet will do no more (§5.10.6.6).
pub(super) mod shutdown {
    pub(in crate::virtio::vsock) const RECEIVE: u32 = 1;
    pub(in crate::virtio::vsock) const SEND: u32 = 2;
    pub(in crate::virtio::vsock) const BOTH: u32 = RECEIVE | SEND;
}

/// `struct virtio_vsock_hdr`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) src_cid: u64,
    pub(super) dst_cid: u64,
    pub(super) src_port: u32,
    pub(super) dst_port: u32,
    /// Bytes of payload after the header.
    pub(super) len: u32,
    pub(super) kind: u16,
    pub(super) op: u16,
    pub(super) flags: u32,
    /// The sender's receive buffer in bytes.
    pub(super) buf_alloc: u32,
    /// Bytes the sender has taken out of it so far, modulo 2^32.
    pub(super) fwd_cnt: u32,
}

/// Little-endian fields, one after the other.
struct Fields<'b>(&'b [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        match self.0.split_first_chunk() {
            Some((field, rest)) => {
                self.0 = rest;
                *field
            }
            None => [0; N],
        }
    }
}

impl Header {
    /// Takes a header off the front of `buffers`.
    pub(super) fn read(buffers: &mut Buffers<'_>) -> Result<Self, ChainError> {
        let mut raw = [0; HEADER_SIZE];
        buffers.read_exact(&mut raw)?;
        let mut fields = Fields(&raw);
        Ok(Self {
            src_cid: u64::from_le_bytes(fields.take()),
            dst_cid: u64::from_le_bytes(fields.take()),
            src_port: u32::from_le_bytes(fields.take()),
            dst_port: u32::from_le_bytes(fields.take()),
            len: u32::from_le_bytes(fields.take()),
            kind: u16::from_le_bytes(fields.take()),
            op: u16::from_le_bytes(fields.take()),
            flags: u32::from_le_bytes(fields.take()),
            buf_alloc: u32::from_le_bytes(fields.take()),
            fwd_cnt: u32::from_le_bytes(fields.take()),
        })
    }

    pub(super) fn to_bytes(self) -> [u8; HEADER_SIZE] {
        let mut raw = [0; HEADER_SIZE];
        let fields: [&[u8]; 10] = [
            &self.src_cid.to_le_bytes(),
            &self.dst_cid.to_le_bytes(),
            &self.src_port.to_le_bytes(),
            &self.dst_port.to_le_bytes(),
            &self.len.to_le_bytes(),
            &self.kind.to_le_bytes(),
            &self.op.to_le_bytes(),
            &self.flags.to_le_bytes(),
            &self.buf_alloc.to_le_bytes(),
            &self.fwd_cnt.to_le_bytes(),
        ];
        let mut rest = raw.as_mut_slice();
        for field in fields {
            let (now, later) = rest.split_at_mut(field.len());
            now.copy_from_slice(field);
            rest = later;
        }
        raw
    }
}
