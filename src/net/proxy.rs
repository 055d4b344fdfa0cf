//! Published ports as the host itself sees them.
//!
//! Packets that come from outside are translated by the host's kernel, and never get here.
//! Those that the host sends to an address of its own, loopback above all, do not pass
//! where they would be translated; a socket at the published port takes them, and keeps the
//! port from others. What it takes is handed on to a socket in the container's network
//! namespace.
//!
//! Each port has one thread, whatever comes.

mod tcp;
mod udp;

pub use tcp::serve as serve_tcp;
pub use udp::serve as serve_udp;
