//! The terminal that vm-run was started on.

use anyhow::{Context, Result, bail};
use fork::WindowSize;
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr};
use std::io;

/// Its size, if standard output or input is one.
pub fn window_size() -> Option<WindowSize> {
    let size = tcgetwinsize(io::stdout())
        .or_else(|_| tcgetwinsize(io::stdin()))
        .ok()?;
    Some(WindowSize {
        rows: size.ws_row,
        cols: size.ws_col,
    })
}

/// While it lives, standard input gives every key as it is typed.
pub struct Raw(Termios);

impl Raw {
    /// # Errors
    /// If standard input is no terminal.
    pub fn new() -> Result<Self> {
        let stdin = io::stdin();
        if !isatty(&stdin) {
            bail!("the input is not a terminal: leave out -t");
        }
        let before = tcgetattr(&stdin).context("tcgetattr")?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&stdin, OptionalActions::Now, &raw).context("tcsetattr")?;
        Ok(Self(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        if let Err(error) = tcsetattr(io::stdin(), OptionalActions::Now, &self.0) {
            log::warn!("the terminal could not be set back: {error}");
        }
    }
}
