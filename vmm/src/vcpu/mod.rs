//! A virtual CPU: its state, and the thread that runs it.

#[allow(unsafe_code)]
pub(crate) mod kick;
#[allow(unsafe_code)]
pub(crate) mod state;
pub(crate) mod thread;
