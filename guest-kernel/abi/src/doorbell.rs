//! The doorbell: a page of guest-physical addresses with no memory behind it.
//! A store there leaves the guest at once (`KVM_EXIT_MMIO`), from user space
//! and with no guest kernel code in between, and says one thing to the monitor.
//!
//! The agent maps it through `/dev/mem`. Every register is written with one
//! aligned 8-byte store; reads return zero.

/// The guest-physical address of the doorbell page.
pub const GPA: u64 = 0xd000_0000;

/// The fork point. The value is [`crate::VERSION`]. When the store retires,
/// the guest is either the parent still (the identity page's generation is 0)
/// or a child.
pub const FORK_POINT: u64 = 0x00;
/// The identity has been applied. The value is the generation that was read.
pub const IDENTITY_APPLIED: u64 = 0x08;
/// Power off. The value is not used.
pub const POWER_OFF: u64 = 0x10;
/// One byte (the value's lowest) of a line for the monitor's user. The line is
/// shown when [`BOOT_FAILED`] is rung.
pub const MESSAGE: u64 = 0x18;
/// The guest cannot reach its fork point; the line in [`MESSAGE`] says why.
pub const BOOT_FAILED: u64 = 0x20;
/// A guest without Linux (`bench fork --guest micro`, the probes of `doctor`)
/// answers with a value.
pub const ANSWER: u64 = 0x28;
/// The kernel has taken the identity by the interrupt [`crate::identity::VECTOR`], and
/// no program has run since that was raised. The value is the generation that was read.
pub const IDENTITY_TAKEN: u64 = 0x30;

/// The longest line that [`MESSAGE`] builds; bytes after it are dropped.
pub const MESSAGE_MAX: usize = 1024;

/// One store to the doorbell page, decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ring {
    /// See [`FORK_POINT`].
    ForkPoint {
        /// The guest's [`crate::VERSION`].
        version: u64,
    },
    /// See [`IDENTITY_APPLIED`].
    IdentityApplied {
        /// The generation that the guest read from the identity page.
        generation: u64,
    },
    /// See [`POWER_OFF`].
    PowerOff,
    /// See [`MESSAGE`].
    Message(u8),
    /// See [`BOOT_FAILED`].
    BootFailed,
    /// See [`ANSWER`].
    Answer(u64),
    /// See [`IDENTITY_TAKEN`].
    IdentityTaken {
        /// The generation that the guest read from the identity page.
        generation: u64,
    },
}

impl Ring {
    /// Decodes a store of `data` at `offset` into the page. `None` for anything
    /// but an 8-byte store to a known register: the guest wrote nonsense, which
    /// is its own affair.
    pub fn decode(offset: u64, data: &[u8]) -> Option<Self> {
        let value = u64::from_le_bytes(data.try_into().ok()?);
        Some(match offset {
            FORK_POINT => Self::ForkPoint { version: value },
            IDENTITY_APPLIED => Self::IdentityApplied { generation: value },
            POWER_OFF => Self::PowerOff,
            MESSAGE => Self::Message(value as u8),
            BOOT_FAILED => Self::BootFailed,
            ANSWER => Self::Answer(value),
            IDENTITY_TAKEN => Self::IdentityTaken { generation: value },
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_stores_to_known_registers_mean_something() {
        assert_eq!(
            Ring::decode(FORK_POINT, &1u64.to_le_bytes()),
            Some(Ring::ForkPoint { version: 1 })
        );
        assert_eq!(
            Ring::decode(MESSAGE, &0x1_41u64.to_le_bytes()),
            Some(Ring::Message(0x41))
        );
        assert_eq!(Ring::decode(FORK_POINT, &1u32.to_le_bytes()), None);
        assert_eq!(Ring::decode(FORK_POINT, &[]), None);
        assert_eq!(Ring::decode(0x38, &1u64.to_le_bytes()), None);
        assert_eq!(Ring::decode(4, &1u64.to_le_bytes()), None);
    }
}
