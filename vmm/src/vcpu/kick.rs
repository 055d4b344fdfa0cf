//! Getting a vCPU out of KVM_RUN from another thread, without losing a kick.
//!
//! A signal alone is not enough: one that arrives just before the ioctl is
//! taken and gone. So the handler also sets `immediate_exit` in the vCPU's
//! kvm_run page, which makes the next KVM_RUN return at once (KVM api.rst 5).

use crate::error::Error;
use kvm_ioctls::VcpuFd;
use std::cell::Cell;
use std::ptr;
use std::sync::Once;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

thread_local! {
    /// `kvm_run.immediate_exit` of the vCPU that this thread runs, or null.
    /// Const-initialised and without a destructor, so that reading it in a
    /// signal handler is a plain load.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

/// The signal that kicks.
pub(crate) fn signal() -> i32 {
    SIGRTMIN()
}

/// Installs the handler, once for the process.
pub(crate) fn install() -> Result<(), Error> {
    static INSTALL: Once = Once::new();
    let mut result = Ok(());
    INSTALL.call_once(|| result = register_signal_handler(signal(), on_kick));
    result.map_err(|e| Error::Os {
        what: "sigaction",
        source: e.into(),
    })
}

extern "C" fn on_kick(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let flag = IMMEDIATE_EXIT.get();
    if !flag.is_null() {
        // SAFETY: `Kickable` sets the pointer only while the vCPU that owns the
        // page is borrowed by this very thread, and clears it before that ends.
        unsafe { flag.write_volatile(1) };
    }
}

/// While it lives, this thread can be kicked out of the vCPU's KVM_RUN.
pub(crate) struct Kickable;

impl Kickable {
    /// The caller keeps `vcpu` on this thread, and alive, as long as the guard:
    /// `thread::main` declares the guard after the vCPU, so it drops first.
    pub(crate) fn new(vcpu: &mut VcpuFd) -> Self {
        IMMEDIATE_EXIT.set(&raw mut vcpu.get_kvm_run().immediate_exit);
        Self
    }
}

impl Drop for Kickable {
    fn drop(&mut self) {
        IMMEDIATE_EXIT.set(ptr::null_mut());
    }
}
