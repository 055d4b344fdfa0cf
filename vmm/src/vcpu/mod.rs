//! A virtual CPU: its state, and the thread that runs it.

pub(crate) mod gate;
pub(crate) mod handle;
#[allow(unsafe_code)]
pub(crate) mod kick;
#[allow(unsafe_code)]
pub(crate) mod state;
pub(crate) mod thread;
pub(crate) mod timer;
