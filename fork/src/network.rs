//! The network of a child: a tap that its owner has made.
//!
//! Nothing here makes one. It takes privileges that a library's user may not have, and
//! what lies behind it is the owner's to choose: `docs/library.md` has the calls.

use rustix::fd::OwnedFd;
use vmm::{RateLimits, Tap};

/// What a child is connected to.
///
/// The guest's side is the same in all children (see [`addresses`](crate::addresses));
/// so each tap belongs into a network namespace of its own, in which it has the gateway's
/// addresses, that of Ethernet too.
#[derive(Debug)]
pub struct Network {
    /// An open tap, of this child alone, in non-blocking mode: made by TUNSETIFF with
    /// IFF_TAP, IFF_NO_PI and IFF_VNET_HDR; with a header of 12 bytes (TUNSETVNETHDRSZ),
    /// little-endian; and with the offloads TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6 and
    /// TUN_F_TSO_ECN (TUNSETOFFLOAD). The child's process makes no such call.
    ///
    /// It is closed when the child ends; so is the interface, unless it is a persistent
    /// one.
    pub tap: OwnedFd,
    /// How fast frames may go through it. What the guest may not send yet waits in the
    /// guest; what it may not receive yet waits in the tap, which drops what it has no
    /// room for.
    pub limits: RateLimits,
}

impl Network {
    pub(crate) fn into_tap(self) -> Tap {
        Tap {
            descriptor: self.tap,
            limits: self.limits,
        }
    }
}
