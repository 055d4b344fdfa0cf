//! Where an archive goes.

use anyhow::{Context, Result, bail};
use std::fs::File;
use std::io::{BufWriter, IsTerminal, Write};
use std::path::Path;
use tempfile::NamedTempFile;

/// Has an archive written to a file, or to standard output if that is no terminal. A file
/// is whole, or not there.
///
/// # Errors
/// A terminal, what the file system says, or what `write` does.
pub fn write_archive(
    output: Option<&Path>,
    write: impl FnOnce(&mut dyn Write) -> Result<()>,
) -> Result<()> {
    let Some(path) = output else {
        let mut out = std::io::stdout().lock();
        if out.is_terminal() {
            bail!("a terminal is no place for an archive: give -o FILE, or redirect it");
        }
        return write(&mut out);
    };
    let shown = || format!("cannot write {}", path.display());
    let is_special = path.metadata().is_ok_and(|meta| !meta.is_file());
    if is_special {
        let mut file = File::options().write(true).open(path).with_context(shown)?;
        return write(&mut file);
    }
    // An archive that is cut by an error or a crash is not left to be taken for one.
    let parent = match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    let new = NamedTempFile::new_in(parent).with_context(shown)?;
    let mut out = BufWriter::with_capacity(1 << 20, new.as_file());
    write(&mut out)?;
    out.flush().with_context(shown)?;
    drop(out);
    new.as_file().sync_all().with_context(shown)?;
    new.persist(path).with_context(shown)?;
    Ok(())
}
