//! What the agent itself does in a container: see [`vm_run_abi::task`]. Everything here
//! runs in a process of its own, in the container's namespaces and as its root, so its
//! paths lead where the container's do, and never out of it.

mod changes;
mod processes;
mod stat;

use crate::rootfs::Layers;
use rustix::fd::AsFd;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use serde::Serialize;
use std::fmt;
use std::io::{self, BufReader, BufWriter, Read, Write};
use vm_run_abi::task::{TASK_CONFLICT, TASK_FAILED, TASK_NOT_FOUND, Task};
use vm_run_archive::{
    Error as Archive, Mounts, Pack, Plain, Resolve, TarReader, TarWriter, Unpack, pack, unpack,
};

/// Why a task ends with another status than zero.
#[derive(Debug)]
pub struct Failed {
    status: u8,
    line: String,
}

impl Failed {
    fn new(line: impl Into<String>) -> Self {
        Self {
            status: TASK_FAILED,
            line: line.into(),
        }
    }

    fn io(what: impl fmt::Display, error: impl Into<io::Error>) -> Self {
        let error = error.into();
        let line = format!("cannot {what}: {error}");
        let status = status(&error);
        Self { status, line }
    }
}

impl From<Archive> for Failed {
    fn from(error: Archive) -> Self {
        let status = match &error {
            Archive::Io { source, .. } => status(source),
            Archive::Conflict { .. } => TASK_CONFLICT,
            _ => TASK_FAILED,
        };
        let line = error.to_string();
        Self { status, line }
    }
}

fn status(error: &io::Error) -> u8 {
    match error.kind() {
        io::ErrorKind::NotFound => TASK_NOT_FOUND,
        io::ErrorKind::NotADirectory | io::ErrorKind::IsADirectory => TASK_CONFLICT,
        _ => TASK_FAILED,
    }
}

/// Does the task; the status to end with.
pub fn run(task: &Task, layers: Option<&Layers>) -> i32 {
    match obey(task, layers) {
        Ok(()) => 0,
        Err(failed) => {
            let line = failed.line.replace('\n', " ");
            // Where nobody listens the status has to do.
            writeln!(Stderr, "{line}").ok();
            failed.status.into()
        }
    }
}

fn obey(task: &Task, layers: Option<&Layers>) -> Result<(), Failed> {
    match task {
        Task::Pack {
            path,
            name,
            follow,
            one_mount,
        } => {
            let mounts = if *one_mount {
                Mounts::None
            } else {
                Mounts::Real
            };
            let path = &from_root(path)[..];
            let (name, follow) = (&name[..], *follow);
            let mut out = TarWriter::new(output());
            let what = Pack {
                path,
                name,
                follow,
                mounts,
            };
            pack(&what, &mut out)?;
            out.finish()?;
            Ok(())
        }
        Task::Unpack {
            path,
            owners,
            replace,
        } => take(&from_root(path), *owners, *replace),
        Task::Stat { path } => say(&stat::stat(&from_root(path))?),
        Task::Changes => {
            let layers = layers.ok_or_else(|| Failed::new("the container has no layers"))?;
            say(&changes::changes(layers)?)
        }
        Task::Processes => say(&processes::processes()?),
    }
}

/// Unpacks standard input, and reads it to its end: whoever writes is not to wait.
fn take(path: &[u8], owners: bool, replace: bool) -> Result<(), Failed> {
    let named = format!("open {}", String::from_utf8_lossy(path));
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory =
        rustix::fs::open(path, flags, Mode::empty()).map_err(|e| Failed::io(named, e))?;
    let how = Unpack {
        only: b"",
        // In the root, links that begin at the root stay in it.
        resolve: match path.iter().all(|byte| *byte == b'/') {
            true => Resolve::InRoot,
            false => Resolve::Beneath,
        },
        replace,
        owners,
        privileges: true,
    };
    let mut reader = TarReader::new(Plain(BufReader::with_capacity(BUFFER, Stdin)));
    unpack(directory.as_fd(), &how, &mut reader)?;
    let mut rest = reader.into_inner().0;
    io::copy(&mut rest, &mut io::sink()).map_err(|e| Failed::io("read the archive", e))?;
    Ok(())
}

/// Paths begin at the root, whatever they begin with.
fn from_root(path: &[u8]) -> Vec<u8> {
    [b"/", path].concat()
}

fn say(answer: &impl Serialize) -> Result<(), Failed> {
    let bytes = postcard::to_stdvec(answer).map_err(|e| Failed::new(e.to_string()))?;
    let mut out = output();
    out.write_all(&bytes)
        .and_then(|()| out.flush())
        .map_err(|e| Failed::io("answer", e))
}

/// What is read or written at once.
const BUFFER: usize = 64 << 10;

fn output() -> BufWriter<Stdout> {
    BufWriter::with_capacity(BUFFER, Stdout)
}

/// Standard output, without the buffer of lines that Rust's has.
struct Stdout;

impl Write for Stdout {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(rustix::io::write(rustix::stdio::stdout(), bytes)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Standard error.
struct Stderr;

impl Write for Stderr {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(rustix::io::write(rustix::stdio::stderr(), bytes)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Standard input, likewise.
struct Stdin;

impl Read for Stdin {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        loop {
            match rustix::io::read(rustix::stdio::stdin(), &mut *bytes) {
                Err(Errno::INTR) => {}
                read => return Ok(read?),
            }
        }
    }
}
