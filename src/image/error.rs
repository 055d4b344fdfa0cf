//! What can be wrong with an image, a name or the store.

use std::io;

pub use vm_run_archive::printable;

/// Why an image could not be had, found, given away or removed. Each message is one line;
/// the cause, where there is one, is the source.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The store has no image of this name or id.
    #[error("no such image: {0} (get it with `vm-run image pull` or `vm-run image load`)")]
    NoSuchImage(String),
    /// An id prefix fits several images.
    #[error("{0} is the beginning of more than one image id: give more of it")]
    Ambiguous(String),
    /// A name that the reference grammar does not allow.
    #[error("{name:?} is not an image name: {reason}")]
    BadName {
        /// The name as given.
        name: String,
        /// The rule that it breaks.
        reason: &'static str,
    },
    /// The image is for another operating system or processor.
    #[error("the image is for {0}, and only linux/amd64 runs here")]
    Platform(String),
    /// The input is no image archive, or one whose documents contradict each other.
    #[error("not a usable image archive: {0}")]
    Archive(String),
    /// A blob's content is not what its digest says.
    #[error("{what}: the digest should be {expected}, but the content has {found}")]
    Digest {
        /// The blob.
        what: String,
        /// As declared.
        expected: String,
        /// As computed.
        found: String,
    },
    /// The tar stream is cut, corrupt or of an unknown kind.
    #[error("corrupt or truncated tar: {0}")]
    Tar(String),
    /// An entry that must not or cannot be put in a root file system.
    #[error("entry {entry}: {reason}")]
    Entry {
        /// The entry's path, made printable.
        entry: String,
        /// Why it is refused.
        reason: String,
    },
    /// Over one of the [`Limits`](super::limits::Limits).
    #[error("refused: {0}")]
    Limit(String),
    /// A file changed while an image was made of it.
    #[error("{0} changed while it was read: try again")]
    Changed(String),
    /// An instruction that `image import` does not know, or cannot read.
    #[error("the change {change:?} is refused: {reason}")]
    Change {
        /// As given.
        change: String,
        /// Why.
        reason: &'static str,
    },
    /// The registry does not show the image to this user, which is all that it says
    /// of one that it does not have.
    #[error(
        "{registry} has no such image, or not for you (log in with --username and \
         --password-stdin, or in docker's config.json)"
    )]
    Denied {
        /// Its host and port.
        registry: String,
    },
    /// The registry answers what it should not, or that it will not.
    #[error("the registry {registry}: {reason}")]
    Registry {
        /// Its host and port.
        registry: String,
        /// What it said, made printable.
        reason: String,
    },
    /// The registry cannot be reached, or the connection broke too often.
    #[error("cannot reach {registry}: {reason}")]
    Network {
        /// Its host and port.
        registry: String,
        /// What failed.
        reason: String,
    },
    /// What docker's config.json says of a registry cannot be used.
    #[error("{file}: {reason}")]
    Credentials {
        /// The file.
        file: String,
        /// Why not.
        reason: String,
    },
    /// The store's own files are not as this program left them.
    #[error("the image store is damaged: {0}")]
    Store(String),
    /// An operation on a file failed.
    #[error("cannot {what}")]
    Io {
        /// What was tried, and on which file.
        what: String,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

/// The result of the image code.
pub type Result<T, E = ImageError> = std::result::Result<T, E>;

/// Names what was tried when the system says no.
pub trait Context<T> {
    /// Turns the error into [`ImageError::Io`], or back into the image error that
    /// travelled inside it.
    fn context(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T> Context<T> for io::Result<T> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| match source.downcast::<ImageError>() {
            Ok(inner) => inner,
            Err(source) => ImageError::Io {
                what: what(),
                source,
            },
        })
    }
}

impl From<ImageError> for io::Error {
    /// Lets an error cross a `Read` or `Write`; [`Context::context`] takes it out again.
    fn from(error: ImageError) -> Self {
        io::Error::other(error)
    }
}

impl From<vm_run_archive::Error> for ImageError {
    fn from(error: vm_run_archive::Error) -> Self {
        use vm_run_archive::Error;
        match error {
            Error::Tar(what) => Self::Tar(what),
            Error::Entry { entry, reason } => Self::Entry { entry, reason },
            Error::Conflict { entry, reason } => Self::Entry {
                entry,
                reason: reason.to_owned(),
            },
            Error::Limit(what) => Self::Limit(what),
            // An error of ours may have travelled through the stream.
            Error::Io { what, source } => match source.downcast::<Self>() {
                Ok(inner) => inner,
                Err(source) => Self::Io { what, source },
            },
        }
    }
}
