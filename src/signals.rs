//! Signals that reach vm-run and are meant for its container.

use anyhow::{Context, Result};
use fork::Remote;
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

    /// From now on every signal goes to the container's first process, and a new
    /// window size to its terminal.
    ///
    /// # Errors
    /// No thread.
    pub fn forward_to(mut self, remote: Remote) -> Result<()> {
        std::thread::Builder::new()
            .name("signals".into())
            .spawn(move || {
                for signal in self.0.forever() {
                    let sent = match (signal, crate::terminal::window_size()) {
                        (SIGWINCH, Some(size)) => remote.resize(size),
                        (SIGWINCH, None) => Ok(()),
                        _ => remote.signal(signal),
                    };
                    if let Err(error) = sent {
                        log::debug!("signal {signal}: {error}");
                        return;
                    }
                }
            })
            .context("cannot start a thread")?;
        Ok(())
    }
}
