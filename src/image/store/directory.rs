//! Root file systems from directories of the host.

use super::Store;
use crate::image::digest::{Hasher, hex};
use crate::image::erofs;
use crate::image::error::{Context, ImageError, Result};
use crate::image::hostdir;
use crate::progress::Bar;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Begins the names of these root file systems, which no index names.
const PREFIX: &str = "dir-";

/// Whether a file of `rootfs/` was made of a directory.
pub fn is_of_directory(path: &Path) -> bool {
    path.file_name()
        .is_some_and(|name| name.as_bytes().starts_with(PREFIX.as_bytes()))
}

/// The EROFS image of a directory of the host: found in the store when nothing in
/// the directory changed since it was made, else made, in place of the last one.
///
/// # Errors
/// [`ImageError::Io`] when something in it cannot be read, [`ImageError::Changed`]
/// when it changes meanwhile, [`ImageError::Limit`] when it is too large.
pub fn rootfs_from_dir(store: &Store, dir: &Path) -> Result<PathBuf> {
    let _busy = store.busy()?;
    let path = dir
        .canonicalize()
        .context(|| format!("open the directory {}", dir.display()))?;
    let walked = hostdir::walk(&path, &store.limits)?;
    let place = Hasher::digest(path.as_os_str().as_bytes());
    let family = format!("{PREFIX}{}-", &hex(&place)?[..16]);
    let name = format!(
        "{family}{}.v{}.erofs",
        &hex(&walked.digest)?[..32],
        erofs::VERSION
    );
    let folder = store.directory.join("rootfs");
    let target = folder.join(&name);
    if target.exists() {
        return Ok(target);
    }
    store.write_rootfs(&walked.tree, &walked.digest, &target, &Bar::default())?;
    let shown = || format!("clean {}", folder.display());
    let again = hostdir::walk(&path, &store.limits)?;
    let stale = |entry: &Path| {
        let name_of = entry
            .file_name()
            .map(|name| name.as_bytes().to_vec())
            .unwrap_or_default();
        name_of.starts_with(family.as_bytes())
            && (name_of != name.as_bytes() || again.digest != walked.digest)
    };
    for entry in fs::read_dir(&folder).context(shown)? {
        let entry = entry.context(shown)?.path();
        if stale(&entry) {
            match fs::remove_file(&entry) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                other => other.context(shown)?,
            }
        }
    }
    if again.digest != walked.digest {
        return Err(ImageError::Changed(dir.display().to_string()));
    }
    Ok(target)
}
