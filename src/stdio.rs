//! Output of a container that is not a session's.

use anyhow::{Context, Result};
use fork::Process;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;

/// The copying threads of a container's outputs.
pub struct Copies {
    outputs: Vec<JoinHandle<()>>,
}

/// Copies all that a process without a terminal says to our standard error. Its
/// input is the caller's to keep open.
///
/// # Errors
/// No thread.
pub fn to_stderr(process: Process) -> Result<Copies> {
    let mut outputs = Vec::new();
    for (name, from) in [("stdout", process.stdout), ("stderr", process.stderr)] {
        if let Some(from) = from {
            outputs.push(output(name, from, io::stderr())?);
        }
    }
    Ok(Copies { outputs })
}

/// Reads all that a process says and drops it, so that it does not stop.
///
/// # Errors
/// No thread.
pub fn discard(process: Process) -> Result<()> {
    let from = [process.stdout, process.stderr, process.terminal];
    for from in from.into_iter().flatten() {
        // Nobody waits for its end.
        drop(output("discarded", from, io::sink())?);
    }
    Ok(())
}

impl Copies {
    /// Waits until all output has been copied.
    ///
    /// # Errors
    /// A thread that has panicked.
    pub fn finish(self) -> Result<()> {
        for output in self.outputs {
            let ended = output.join();
            ended.map_err(|_| anyhow::anyhow!("a copying thread has panicked"))?;
        }
        Ok(())
    }
}

/// Copies one output until its end. If ours is closed, the rest is read and
/// dropped, so that the container does not stop.
fn output(
    name: &'static str,
    mut from: UnixStream,
    mut to: impl Write + Send + 'static,
) -> Result<JoinHandle<()>> {
    std::thread::Builder::new()
        .name(name.into())
        .spawn(move || {
            let mut open = true;
            let mut buffer = vec![0; 1 << 16];
            loop {
                let n = match from.read(&mut buffer) {
                    Ok(0) => return,
                    Ok(n) => n,
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                    Err(error) => {
                        log::debug!("{name}: {error}");
                        return;
                    }
                };
                if open && let Err(error) = to.write_all(&buffer[..n]).and_then(|()| to.flush()) {
                    log::debug!("{name}: {error}");
                    open = false;
                }
            }
        })
        .context("cannot start a thread")
}
