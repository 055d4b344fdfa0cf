//! What a VM boots: Linux, or a few instructions.

pub(crate) mod linux;
pub mod micro;

use std::path::PathBuf;

/// What a fresh VM is loaded with.
#[derive(Debug, Clone)]
pub enum Payload {
    /// A Linux kernel with an initramfs.
    Linux {
        /// A `vmlinux` or a `bzImage`.
        kernel: PathBuf,
        /// A cpio archive.
        initramfs: PathBuf,
        /// More words for the kernel's command line, after our own.
        cmdline: String,
    },
    /// A program in user mode of a machine without a kernel: see [`micro`].
    Micro(micro::Program),
}
