//! Device models. No KVM here, no threads: a device is handed guest memory, an
//! interrupt line and its files, and looks nothing up.
//!
//! Every device is *restored from a state*; a fresh one is restored from the
//! state's `Default`. States are plain data and untrusted until `restore` has
//! checked them. Whatever a guest writes (registers, rings, descriptors,
//! packets) may stop that guest's device and nothing else.
//!
//! All I/O is done inside a call into the device: whoever holds the locks of all
//! devices, and has stopped the vCPUs, sees them at rest and can save them.

#![deny(unsafe_code)]

pub mod console;
pub mod i8042;
mod memory;
pub mod serial;
#[cfg(any(test, feature = "test-utils"))]
pub mod testing;
pub mod virtio;

pub use console::Console;
pub use memory::{DeviceMemory, GuestMemory, GuestSlice, WriteLog};
pub use serial::{Serial, SerialState};

use std::io;
use vmm_sys_util::eventfd::EventFd;

/// An edge-triggered interrupt line.
pub trait Interrupt: Send + Sync {
    /// Raises one interrupt.
    ///
    /// # Errors
    /// What the system says.
    fn raise(&self) -> io::Result<()>;
}

/// Each write is an interrupt, to whoever reads it.
impl Interrupt for EventFd {
    fn raise(&self) -> io::Result<()> {
        self.write(1)
    }
}

/// A device behind a window of guest-physical addresses.
pub trait MmioDevice: Send {
    /// The guest loads `data.len()` bytes at `offset` into the window. What the
    /// device does not fill stays as the caller made it: zeroes.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// The guest stores `data` at `offset` into the window.
    fn write(&mut self, offset: u64, data: &[u8]);
}
