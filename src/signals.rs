//! Signals that reach vm-run and are meant for its container.

use anyhow::{Context, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGWINCH};
use signal_hook::iterator::Signals;

/// Catches signals from its making on, and keeps them until there is somebody
/// to give them to.
pub struct Catcher(Signals);

impl Catcher {
    /// # Errors
    /// A signal that cannot be caught.
    pub fn new() -> Result<Self> {
        Signals::new([SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGWINCH])
            .map(Self)
            .context("cannot catch signals")
    }

    /// Every signal that comes, for ever.
    pub fn forever(mut self) -> impl Iterator<Item = i32> {
        std::iter::from_fn(move || self.0.forever().next())
    }
}
