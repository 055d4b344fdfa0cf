//! Device models. No KVM here, no threads: a device is handed guest memory, an
//! interrupt line (an eventfd) and its files, and looks nothing up.
//!
//! Every device is *restored from a state*; a fresh one is restored from the
//! state's `Default`. States are plain data and untrusted until `restore` has
//! checked them. Whatever a guest writes (registers, rings, descriptors,
//! packets) may stop that guest's device and nothing else.

/// A device behind a window of guest-physical addresses.
pub trait MmioDevice: Send {
    /// The guest loads `data.len()` bytes at `offset` into the window. What the
    /// device does not fill stays as the caller made it: zeroes.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// The guest stores `data` at `offset` into the window.
    fn write(&mut self, offset: u64, data: &[u8]);
}
