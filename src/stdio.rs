//! Standard input, output and error of a container, copied to and from ours.

use crate::terminal::Raw;
use anyhow::{Context, Result};
use fork::Moment;
use fork::Process;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;

/// Our side, ready before the container starts.
pub struct Stdio {
    interactive: bool,
    raw: Option<Raw>,
}

/// The copying threads of a container's outputs.
pub struct Copies {
    outputs: Vec<JoinHandle<Option<Moment>>>,
    _raw: Option<Raw>,
}

impl Stdio {
    /// With both, every key that is typed is the container's; with `tty` alone,
    /// only its output is shown, as docker has it.
    ///
    /// # Errors
    /// A terminal that was asked for and is not there.
    pub fn new(tty: bool, interactive: bool) -> Result<Self> {
        let raw = (tty && interactive).then(Raw::new).transpose()?;
        Ok(Self { interactive, raw })
    }

    /// Begins to copy.
    ///
    /// # Errors
    /// No thread.
    pub fn connect(self, process: Process) -> Result<Copies> {
        let Process {
            stdin,
            stdout,
            stderr,
            terminal,
            ..
        } = process;
        let mut outputs = Vec::new();
        if let Some(terminal) = terminal {
            if self.interactive {
                let to = terminal.try_clone().context("dup")?;
                input("terminal-in", to)?;
            }
            outputs.push(output("terminal-out", terminal, io::stdout())?);
        }
        match stdin {
            Some(stdin) if self.interactive => input("stdin", stdin)?,
            // One that the container has closed already is no error.
            Some(stdin) => drop(stdin.shutdown(Shutdown::Write)),
            None => {}
        }
        if let Some(stdout) = stdout {
            outputs.push(output("stdout", stdout, io::stdout())?);
        }
        if let Some(stderr) = stderr {
            outputs.push(output("stderr", stderr, io::stderr())?);
        }
        Ok(Copies {
            outputs,
            _raw: self.raw,
        })
    }
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
    Ok(Copies {
        outputs,
        _raw: None,
    })
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
    /// Waits until all output has been copied; tells when its first byte came.
    ///
    /// # Errors
    /// A thread that has panicked.
    pub fn finish(self) -> Result<Option<Moment>> {
        let mut first: Option<Moment> = None;
        for output in self.outputs {
            let at = output
                .join()
                .map_err(|_| anyhow::anyhow!("a copying thread has panicked"))?;
            first = [first, at].into_iter().flatten().min();
        }
        Ok(first)
    }
}

/// Copies our standard input into the container until either ends. The thread is
/// left alone at the end: it may be waiting for a key.
fn input(name: &str, mut to: UnixStream) -> Result<()> {
    std::thread::Builder::new()
        .name(name.into())
        .spawn(move || {
            // Unbuffered: a line buffer would hold back what was typed.
            let copied = io::copy(&mut io::stdin().lock(), &mut to)
                .and_then(|_| to.shutdown(Shutdown::Write));
            if let Err(error) = copied {
                // The container does not read any more.
                log::debug!("standard input: {error}");
            }
        })
        .context("cannot start a thread")?;
    Ok(())
}

/// Copies one output until its end. If ours is closed, the rest is read and
/// dropped, so that the container does not stop.
fn output(
    name: &'static str,
    mut from: UnixStream,
    mut to: impl Write + Send + 'static,
) -> Result<JoinHandle<Option<Moment>>> {
    std::thread::Builder::new()
        .name(name.into())
        .spawn(move || {
            let mut first = None;
            let mut open = true;
            let mut buffer = vec![0; 1 << 16];
            loop {
                let n = match from.read(&mut buffer) {
                    Ok(0) => return first,
                    Ok(n) => n,
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                    Err(error) => {
                        log::debug!("{name}: {error}");
                        return first;
                    }
                };
                first = first.or_else(|| Some(Moment::now()));
                if open && let Err(error) = to.write_all(&buffer[..n]).and_then(|()| to.flush()) {
                    log::debug!("{name}: {error}");
                    open = false;
                }
            }
        })
        .context("cannot start a thread")
}
