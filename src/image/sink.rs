//! Where the members of an OCI layout go: into a tar, or a directory.

use super::error::{Context, ImageError, Result};
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

/// What the member `oci-layout` says (image-spec, image-layout.md).
pub const LAYOUT: &[u8] = br#"{"imageLayoutVersion":"1.0.0"}"#;

/// Takes the members of a layout.
pub trait Sink {
    /// A member of `size` bytes.
    ///
    /// # Errors
    /// What the system says of either side.
    fn member(&mut self, name: &str, size: u64, content: &mut dyn Read) -> Result<()>;

    /// A small member.
    ///
    /// # Errors
    /// What the system says.
    fn document(&mut self, name: &str, mut content: &[u8]) -> Result<()> {
        self.member(name, content.len() as u64, &mut content)
    }
}

/// A tar.
pub struct TarSink<'a>(tar::Builder<&'a mut dyn Write>);

impl<'a> TarSink<'a> {
    /// That is written to `out`.
    pub fn new(out: &'a mut dyn Write) -> Self {
        TarSink(tar::Builder::new(out))
    }

    /// Writes its end.
    ///
    /// # Errors
    /// What the system says.
    pub fn finish(self) -> Result<()> {
        self.0
            .into_inner()
            .and_then(|out| out.flush())
            .context(|| "write the archive".to_owned())
    }
}

impl Sink for TarSink<'_> {
    fn member(&mut self, name: &str, size: u64, content: &mut dyn Read) -> Result<()> {
        // GNU's header holds sizes above 8 GiB. Time and owner are the same for all,
        // so that the same images give the same archive.
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        header.set_size(size);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        self.0
            .append_data(&mut header, name, content)
            .context(|| format!("write {name} into the archive"))
    }
}

/// A directory.
pub struct FolderSink(PathBuf);

impl FolderSink {
    /// That is there, with the folders of its members.
    pub fn new(directory: &Path) -> Self {
        FolderSink(directory.to_owned())
    }
}

impl Sink for FolderSink {
    fn member(&mut self, name: &str, size: u64, content: &mut dyn Read) -> Result<()> {
        let what = || format!("write {name}");
        let mut file = File::create_new(self.0.join(name)).context(what)?;
        let copied = std::io::copy(content, &mut file).context(what)?;
        if copied != size {
            return Err(ImageError::Changed(name.to_owned()));
        }
        file.sync_all().context(what)
    }
}
