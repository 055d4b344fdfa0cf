//! What is at a path, as docker tells it.

use super::Failed;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use vm_run_abi::task::PathStat;

/// Looks at a path from the root. A link at its end is told as one.
pub fn stat(path: &[u8]) -> Result<PathStat, Failed> {
    let place = Path::new(OsStr::from_bytes(path));
    let failed = |e| Failed::io(format!("find {}", place.display()), e);
    let found = fs::symlink_metadata(place).map_err(failed)?;
    let target = if found.is_symlink() {
        target(place).map_err(failed)?
    } else {
        Vec::new()
    };
    let name = place.file_name().map_or(&b"/"[..], OsStr::as_bytes);
    Ok(PathStat {
        name: name.to_vec(),
        size: found.size(),
        mode: found.mode(),
        mtime: found.mtime(),
        mtime_nsec: u32::try_from(found.mtime_nsec()).unwrap_or(0),
        target,
    })
}

/// Where a link leads in the end; of one that leads nowhere, where it points.
fn target(link: &Path) -> std::io::Result<Vec<u8>> {
    if let Ok(end) = fs::canonicalize(link) {
        return Ok(end.into_os_string().into_vec());
    }
    let parent = fs::canonicalize(link.parent().unwrap_or(link))?;
    let pointed = parent.join(fs::read_link(link)?);
    Ok(pointed.into_os_string().into_vec())
}
