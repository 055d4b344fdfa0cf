//! SHA-256 digests as `sha256:HEX`.

use super::error::{ImageError, Result};
use sha2::{Digest, Sha256};
use std::io::{self, Read};

const PREFIX: &str = "sha256:";

/// Hashes what it is given.
#[derive(Clone, Default)]
pub struct Hasher(Sha256);

impl Hasher {
    /// Adds bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The digest of all bytes.
    pub fn finish(self) -> String {
        let hex = |byte: &u8| format!("{byte:02x}");
        PREFIX.to_owned() + &self.0.finalize().iter().map(hex).collect::<String>()
    }

    /// The digest of `bytes`.
    pub fn digest(bytes: &[u8]) -> String {
        let mut hasher = Hasher::default();
        hasher.update(bytes);
        hasher.finish()
    }

    /// Compares a declared digest with the content's.
    ///
    /// # Errors
    /// [`ImageError::Digest`] when they differ.
    pub fn check(what: &str, expected: &str, found: &str) -> Result<()> {
        if expected == found {
            return Ok(());
        }
        Err(ImageError::Digest {
            what: what.to_owned(),
            expected: expected.to_owned(),
            found: found.to_owned(),
        })
    }
}

/// Checks that a digest is `sha256:` and 64 lower-case hex digits, and returns
/// these: as a file name they lead nowhere.
///
/// # Errors
/// [`ImageError::Archive`] for anything else.
pub fn hex(digest: &str) -> Result<&str> {
    digest
        .strip_prefix(PREFIX)
        .filter(|hex| {
            hex.len() == 64 && hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
        })
        .ok_or_else(|| {
            ImageError::Archive(format!(
                "{:?} is not a SHA-256 digest",
                digest.chars().take(100).collect::<String>()
            ))
        })
}

/// A reader that hashes and counts what passes.
pub struct HashReader<R> {
    inner: R,
    hasher: Hasher,
    count: u64,
}

impl<R: Read> HashReader<R> {
    /// A reader of `inner`.
    pub fn new(inner: R) -> Self {
        HashReader {
            inner,
            hasher: Hasher::default(),
            count: 0,
        }
    }

    /// Bytes that have passed.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The digest of what has passed.
    pub fn finish(self) -> String {
        self.hasher.finish()
    }
}

impl<R: Read> Read for HashReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.hasher.update(&buffer[..count]);
        self.count += count as u64;
        Ok(count)
    }
}
