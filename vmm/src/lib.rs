//! One virtual machine: boot, restore, pause, save, run. Owns KVM and every
//! mapping of guest memory; knows nothing of templates, containers or identity.
//!
//! Read [`machine`](Event) to know the machine, `vm.rs` for its life,
//! `vcpu/thread.rs` for a vCPU's.
//!
//! `unsafe` is in five files, for calls that the compiler cannot check: `kvm.rs`
//! (memory slots), `vcpu/state.rs` (XSAVE buffers), `vcpu/kick.rs` (the signal
//! handler), `window.rs` (a file mapped over a window) and `memory/overlay.rs` (one
//! mapped over memory).

#![deny(unsafe_code)]

mod capture;
mod error;
pub mod floor;
mod host;
mod io;
#[allow(unsafe_code)]
mod kvm;
mod layout;
mod machine;
mod memory;
mod moment;
pub mod payload;
mod prepared;
mod probe;
mod reaper;
mod vcpu;
mod vm;
#[allow(unsafe_code)]
mod window;
mod x86_64;

pub use capture::{Capture, CaptureCost, CaptureSpec, Captured};
pub use devices::Console;
pub use devices::virtio::block::{LAYERS_MAX as DISK_LAYERS_MAX, format_overlay, merge_overlays};
pub use devices::virtio::fs::OP_CLAIM;
pub use devices::virtio::{DiskFiles, Rate, RateLimit, RateLimits};
pub use error::{ConfigError, Error, HostError};
pub use host::{Cpu, Host, ThreadKind, ThreadStart, VMS_PER_PROCESS};
pub use layout::{MEMORY_MAX, MEMORY_MIN, RamRange, VCPUS_MAX};
pub use machine::{Disks, Event, EventSink, Tap};
pub use memory::{Image, LAYERS_MAX, Merged, Ram, Run, mappings_left};
pub use moment::Moment;
pub use payload::Payload;
pub use prepared::{Birth, Prepared, Shell, fork};
pub use probe::Isolation;
pub use reaper::VmCounts;
pub use vcpu::state::VcpuState;
pub use vm::{Timeline, Vm, VmConfig, VmState};
