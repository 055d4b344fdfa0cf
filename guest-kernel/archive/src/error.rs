//! What can be wrong with an archive, or with what is made of it.

use std::fmt;
use std::io;

/// Why an archive cannot be read, written or unpacked: one line.
#[derive(Debug)]
pub enum Error {
    /// The tar stream is cut, corrupt or of an unknown kind.
    Tar(String),
    /// An entry that must not or cannot be taken.
    Entry {
        /// The entry's path, made printable.
        entry: String,
        /// Why it is refused.
        reason: String,
    },
    /// A directory is in the way of something else, or the other way round.
    Conflict {
        /// The entry's path, made printable.
        entry: String,
        /// What is there.
        reason: &'static str,
    },
    /// More than anything has a reason to be.
    Limit(String),
    /// The system says no.
    Io {
        /// What was tried, and on which file.
        what: String,
        /// Its answer.
        source: io::Error,
    },
}

/// The result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tar(what) => write!(f, "corrupt or truncated tar: {what}"),
            Self::Entry { entry, reason } => write!(f, "entry {entry}: {reason}"),
            Self::Conflict { entry, reason } => write!(f, "entry {entry}: {reason}"),
            Self::Limit(what) => write!(f, "refused: {what}"),
            Self::Io { what, source } => write!(f, "cannot {what}: {source}"),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Io { source, .. } => Some(source),
            _ => None,
        }
    }
}

impl From<Error> for io::Error {
    /// Lets an error cross a `Read` or `Write`; [`Context::context`] takes it out again.
    fn from(error: Error) -> Self {
        io::Error::other(error)
    }
}

/// Names what was tried when the system says no.
pub trait Context<T> {
    /// Turns the error into [`Error::Io`], or back into the one that travelled inside.
    fn context(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<io::Error>> Context<T> for std::result::Result<T, E> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| match error.into().downcast::<Error>() {
            Ok(inner) => inner,
            Err(source) => Error::Io {
                what: what(),
                source,
            },
        })
    }
}

/// A name from an archive, made fit for one line of a terminal.
pub fn printable(name: &[u8]) -> String {
    const LONGEST: usize = 160;
    let text = String::from_utf8_lossy(name);
    let mut shown: String = text
        .chars()
        .take(LONGEST)
        .flat_map(char::escape_debug)
        .collect();
    if text.chars().nth(LONGEST).is_some() {
        shown.push_str("...");
    }
    shown
}
