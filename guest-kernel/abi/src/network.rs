//! The network of a guest: one interface, [`INTERFACE`], at the same addresses in every
//! child. A fork changes none of them, so nothing in the guest has to be told.
//!
//! What makes a child itself is outside: its tap lies in a network namespace of its own,
//! in which its owner gives all of the gateway's addresses to the tap, and translates what goes
//! farther. A guest has no use for an address of the host's, or of another child.
//!
//! The IPv4 addresses are out of 192.0.0.0/29, which is for the two ends of a link behind
//! a translator (RFC 7335), so that no network that a container wants to reach has them;
//! those of IPv6 are unique local ones (RFC 4193). The guest has no link-local address:
//! the kernel speaks of each that it makes, and a template is to be quiet.

/// The name of the interface in the guest.
pub const INTERFACE: &str = "eth0";

/// Its Ethernet address: locally administered, and "vmrun".
pub const MAC: [u8; 6] = [0x02, b'v', b'm', b'r', b'u', b'n'];

/// The gateway's, which is that of the tap: a container that was frozen with a guest
/// remembers it, and its children's gateways must be where it was.
pub const GATEWAY_MAC: [u8; 6] = [0x02, b'v', b'm', b'r', b'u', 1];

/// The longest packet, in bytes, without the Ethernet header.
pub const MTU: u16 = 1500;

/// Its IPv4 address.
pub const IPV4: [u8; 4] = [192, 0, 0, 2];
/// The gateway's, which is all that the guest finds on its network.
pub const IPV4_GATEWAY: [u8; 4] = [192, 0, 0, 1];
/// Bits of the network in both.
pub const IPV4_PREFIX: u8 = 29;

/// Its IPv6 address: fd76:6d72:756e::2.
pub const IPV6: [u8; 16] = ipv6(2);
/// The gateway's: fd76:6d72:756e::1.
pub const IPV6_GATEWAY: [u8; 16] = ipv6(1);
/// Bits of the network in both.
pub const IPV6_PREFIX: u8 = 64;

const fn ipv6(host: u8) -> [u8; 16] {
    let (mut address, mut at) = ([0; 16], 1);
    address[0] = 0xfd;
    while at < MAC.len() {
        address[at] = MAC[at];
        at += 1;
    }
    address[15] = host;
    address
}
