//! Tells a program in a vm-run guest whether its machine has been forked since it last
//! looked: then what it holds of random numbers, of names or of time may be a sibling's
//! too. `docs/identity.md` says what changes in a child; `vm_run_generation.h`, beside
//! this crate, is the same for C.
//!
//! ```no_run
//! use vm_run_generation::Generation;
//!
//! // Once, as early as the state that has to differ.
//! let mut generation = Generation::open()?;
//! // Whenever that state is about to be used: one system call.
//! if let Some(generation) = &mut generation
//!     && generation.has_changed()?
//! {
//!     // Reseed.
//! }
//! # Ok::<(), std::io::Error>(())
//! ```
//!
//! Or have a thread in [`Generation::wait`], or watch it as a descriptor for POLLPRI:
//! each change is told once.

#![forbid(unsafe_code)]

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// Where the kernel of vm-run's guests says it.
pub const PATH: &str = "/proc/sys/kernel/random/generation";

/// The longest number of 64 bits, and the end of its line.
const TEXT_MAX: usize = 21;

/// The machine's generation: 0 in one that was booted, another number at random in each
/// child of it.
#[derive(Debug)]
pub struct Generation {
    file: File,
    last: u64,
}

impl Generation {
    /// Opens the file and reads it. `None`: this kernel has none, and nobody tells of a
    /// fork if there is one.
    ///
    /// # Errors
    /// What the file system says, or a file that holds no number.
    pub fn open() -> io::Result<Option<Self>> {
        Self::open_at(Path::new(PATH))
    }

    /// The same at another place, for tests.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_at(path: &Path) -> io::Result<Option<Self>> {
        let file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let last = read(&file)?;
        Ok(Some(Self { file, last }))
    }

    /// What it was when it was last read.
    pub fn last(&self) -> u64 {
        self.last
    }

    /// Reads it: whether the machine has been forked since the last time.
    ///
    /// # Errors
    /// What the file system says.
    pub fn has_changed(&mut self) -> io::Result<bool> {
        let before = std::mem::replace(&mut self.last, read(&self.file)?);
        Ok(self.last != before)
    }

    /// Waits until the machine has been forked since the last time, at most so long:
    /// whether it has.
    ///
    /// # Errors
    /// What the file system says.
    pub fn wait(&mut self, timeout: Option<Duration>) -> io::Result<bool> {
        let begun = Instant::now();
        // What came before the poll is in the number; what comes after it is told.
        while !self.has_changed()? {
            let left = timeout.map(|timeout| timeout.saturating_sub(begun.elapsed()));
            if left == Some(Duration::ZERO) {
                return Ok(false);
            }
            let left = left.map(|left| Timespec {
                tv_sec: left.as_secs() as i64,
                tv_nsec: left.subsec_nanos().into(),
            });
            let mut watched = [PollFd::new(&self.file, PollFlags::PRI)];
            match poll(&mut watched, left.as_ref()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(true)
    }
}

impl AsFd for Generation {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn read(file: &File) -> io::Result<u64> {
    let mut text = [0; TEXT_MAX];
    let len = file.read_at(&mut text, 0)?;
    let number = str::from_utf8(&text[..len]).ok();
    let number = number.and_then(|number| number.trim_end().parse().ok());
    number.ok_or_else(|| io::ErrorKind::InvalidData.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn a_change_is_told_once() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("generation");
        assert!(Generation::open_at(&path).expect("no error").is_none());
        fs::write(&path, "0\n").expect("written");
        let generation = Generation::open_at(&path).expect("opens");
        let mut generation = generation.expect("is there");
        assert_eq!(generation.last(), 0);
        assert!(!generation.has_changed().expect("reads"));
        let short = Some(Duration::from_millis(20));
        assert!(!generation.wait(short).expect("waits"));
        fs::write(&path, format!("{}\n", u64::MAX)).expect("written");
        assert!(generation.wait(None).expect("waits"));
        assert_eq!(generation.last(), u64::MAX);
        assert!(!generation.has_changed().expect("reads"));
    }

    #[test]
    fn what_is_no_number_is_an_error() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("generation");
        for text in ["", "\n", "x\n", "-1\n", "18446744073709551616\n"] {
            fs::write(&path, text).expect("written");
            let error = Generation::open_at(&path).expect_err(text);
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{text}");
        }
    }
}
