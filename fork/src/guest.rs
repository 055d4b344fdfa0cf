//! The guest: a kernel, an agent and an empty disk that belong together.

use crate::error::Error;
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// The files that a parent boots from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guest {
    /// A `vmlinux` or a `bzImage`.
    pub kernel: PathBuf,
    /// The agent, packed as an initramfs.
    pub initramfs: PathBuf,
    /// What a container's writable layer begins as: the list of an
    /// [`EmptyDisk`](crate::EmptyDisk) that is an ext4. Without one, whoever wants a
    /// layer on a disk makes its file system.
    pub disk: Option<PathBuf>,
}

impl Guest {
    /// The guest in a directory, by the names that `cargo xtask` and the
    /// packages give: `vmlinux`, `initramfs` and `writable.blocks`.
    pub fn in_dir(dir: &Path) -> Option<Self> {
        let disk = dir.join("writable.blocks");
        let guest = Self {
            kernel: dir.join("vmlinux"),
            initramfs: dir.join("initramfs"),
            disk: disk.is_file().then_some(disk),
        };
        (guest.kernel.is_file() && guest.initramfs.is_file()).then_some(guest)
    }

    /// One digest over all files: SHA-256, hexadecimal.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn digest(&self) -> Result<String, Error> {
        let mut hash = Sha256::new();
        for path in [&self.kernel, &self.initramfs]
            .into_iter()
            .chain(&self.disk)
        {
            hash.update(sha256(path)?);
        }
        Ok(hex(&hash.finalize()))
    }
}

pub(crate) fn sha256(path: &Path) -> Result<Vec<u8>, Error> {
    let mut file = File::open(path).map_err(Error::io(path, "open"))?;
    let digest = sha256_of(&mut file).map_err(Error::io(path, "read"))?;
    Ok(digest)
}

pub(crate) fn sha256_of(reader: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match reader.read(&mut buffer)? {
            0 => return Ok(hash.finalize().to_vec()),
            n => hash.update(&buffer[..n]),
        }
    }
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
