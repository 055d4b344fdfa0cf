//! The disk of a container's writable layer, in its directory.
//!
//! ```text
//! writable     a disk in one file; or, once its container or one before it was forked,
//! layers/0     the same file, which is never written again and may be others' too,
//! layers/1     what was written after the first fork,
//! ...
//! layers/N     what is written now
//! ```
//! Files are shared by hard links: the last container that has one frees it. A directory
//! of layers appears whole.

use super::WRITABLE;
use anyhow::{Context, Result, bail};
use fork::{DISK_LAYERS_MAX, DiskFiles, format_overlay, merge_overlays};
use rustix::fs::{AtFlags, CWD, RenameFlags, linkat, renameat_with};
use rustix::io::Errno;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Of more than one.
const LAYERS: &str = "layers";

/// Of what is to become one of them, in their directory.
const MERGED: &str = "merged.new";

/// The disk in a container's directory. Whoever changes it owns the container.
#[derive(Clone)]
pub struct Layers {
    dir: PathBuf,
    /// Whether it is to be there after a crash of the host.
    durable: bool,
}

impl Layers {
    /// Whether it is to be there after a crash of the host.
    pub fn is_durable(&self) -> bool {
        self.durable
    }

    pub fn of(dir: &Path, durable: bool) -> Self {
        Self {
            dir: dir.to_owned(),
            durable,
        }
    }

    /// The files that there are, the lowest first.
    fn paths(&self) -> Vec<PathBuf> {
        let layers = self.dir.join(LAYERS);
        if !layers.is_dir() {
            let plain = self.dir.join(WRITABLE);
            return plain.exists().then_some(plain).into_iter().collect();
        }
        (0..)
            .map(|number: usize| layers.join(number.to_string()))
            .take_while(|path| path.exists())
            .collect()
    }

    /// Whether there is a disk.
    pub fn exists(&self) -> bool {
        !self.paths().is_empty()
    }

    /// Opens them; `None` if there is none.
    ///
    /// # Errors
    /// What the file system says.
    pub fn open(&self) -> Result<Option<DiskFiles>> {
        let paths = self.paths();
        let mut files = Vec::new();
        for (number, path) in (1..).zip(&paths) {
            let is_top = number == paths.len();
            let file = File::options().read(true).write(is_top).open(path);
            files.push(file.with_context(|| format!("cannot open {}", path.display()))?);
        }
        Ok((!files.is_empty()).then_some(DiskFiles(files)))
    }

    /// Makes the file in which a disk that has so many layers goes on.
    ///
    /// # Errors
    /// More layers than a disk may have, or what the file system says.
    pub fn add_top(&self, count: usize) -> Result<File> {
        if count >= DISK_LAYERS_MAX {
            bail!(
                "its disk has {count} layers, which are being made one: fork it again in a moment"
            );
        }
        let layers = self.dir.join(LAYERS);
        if layers.is_dir() {
            let size = size_of(&layers.join("0"))?;
            return self.make_top(&layers, count, size);
        }
        let plain = self.dir.join(WRITABLE);
        let unfinished = self.unfinished()?;
        fs::hard_link(&plain, unfinished.join("0"))
            .with_context(|| format!("cannot link {}", plain.display()))?;
        let top = self.make_top(&unfinished, 1, size_of(&plain)?)?;
        self.finish(&unfinished)?;
        Ok(top)
    }

    /// Makes a disk of layers that are another's too, and a top of its own, in the place of
    /// any that there is.
    ///
    /// # Errors
    /// What the file system says.
    pub fn adopt(&self, lower: &[File]) -> Result<File> {
        let unfinished = self.unfinished()?;
        for (number, file) in lower.iter().enumerate() {
            let open_file = format!("/proc/self/fd/{}", file.as_raw_fd());
            let path = unfinished.join(number.to_string());
            linkat(CWD, open_file, CWD, &path, AtFlags::SYMLINK_FOLLOW)
                .with_context(|| format!("cannot link a layer to {}", path.display()))?;
        }
        let size = size_of(&unfinished.join("0"))?;
        let top = self.make_top(&unfinished, lower.len(), size)?;
        self.finish(&unfinished)?;
        Ok(top)
    }

    /// Makes one file of layers that are not written any more, of a disk of `size` bytes.
    ///
    /// # Errors
    /// What the file system says.
    pub fn merge(&self, layers: &[File], size: u64) -> Result<File> {
        let path = self.dir.join(LAYERS).join(MERGED);
        let merge = || {
            let file = create(&path)?;
            merge_overlays(layers, size, &file)?;
            // Only to be read from here on.
            File::open(&path)
        };
        let merged: std::io::Result<File> = merge();
        merged.with_context(|| format!("cannot make {}", path.display()))
    }

    /// Puts the file of [`Self::merge`] into the place of the `count` above the lowest.
    ///
    /// # Errors
    /// What the file system says: they are as they were.
    pub fn put_merged(&self, count: usize) -> Result<()> {
        let mut paths = self.paths();
        let merged = self.dir.join(LAYERS).join(MERGED);
        let between = 1..=count;
        if paths.len() < count + 2 {
            bail!("there are fewer layers than have become one");
        }
        paths.splice(between, [merged]);
        let unfinished = self.unfinished()?;
        for (number, path) in paths.iter().enumerate() {
            fs::hard_link(path, unfinished.join(number.to_string()))
                .with_context(|| format!("cannot link {}", path.display()))?;
        }
        self.sync(&unfinished)
            .and_then(|()| self.finish(&unfinished))
    }

    fn unfinished(&self) -> Result<PathBuf> {
        let unfinished = self.dir.join(format!("{LAYERS}.new"));
        remove(&unfinished)?;
        fs::create_dir(&unfinished)
            .with_context(|| format!("cannot make {}", unfinished.display()))?;
        Ok(unfinished)
    }

    fn make_top(&self, dir: &Path, number: usize, size: u64) -> Result<File> {
        let path = dir.join(number.to_string());
        let unfinished = path.with_extension("new");
        let make = || -> std::io::Result<File> {
            let file = create(&unfinished)?;
            format_overlay(&file, size)?;
            if self.durable {
                file.sync_all()?;
            }
            fs::rename(&unfinished, &path)?;
            Ok(file)
        };
        let made = make().with_context(|| format!("cannot make {}", path.display()))?;
        self.sync(dir)?;
        Ok(made)
    }

    /// Puts a directory of layers into its place.
    fn finish(&self, unfinished: &Path) -> Result<()> {
        let place = self.dir.join(LAYERS);
        let exchanged = renameat_with(CWD, unfinished, CWD, &place, RenameFlags::EXCHANGE);
        match exchanged {
            Ok(()) => remove(unfinished)?,
            Err(Errno::NOENT) => fs::rename(unfinished, &place)
                .with_context(|| format!("cannot make {}", place.display()))?,
            Err(error) => {
                return Err(error).with_context(|| format!("cannot make {}", place.display()));
            }
        }
        self.sync(&self.dir)?;
        let plain = self.dir.join(WRITABLE);
        match fs::remove_file(&plain) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("cannot remove {}", plain.display()))
            }
            _ => Ok(()),
        }
    }

    fn sync(&self, dir: &Path) -> Result<()> {
        if self.durable {
            File::open(dir)
                .and_then(|dir| dir.sync_all())
                .with_context(|| format!("cannot write {}", dir.display()))?;
        }
        Ok(())
    }

    /// What would be free without it, in bytes: files of others are not counted.
    pub fn bytes(&self) -> u64 {
        let found = self.paths();
        let found = found.iter().filter_map(|path| fs::metadata(path).ok());
        found
            .filter(|found| found.nlink() == 1)
            .map(|found| found.blocks() * 512)
            .sum()
    }
}

/// An empty file, to be read too.
fn create(path: &Path) -> std::io::Result<File> {
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(true);
    options.open(path)
}

fn size_of(path: &Path) -> Result<u64> {
    let found = fs::metadata(path);
    Ok(found
        .with_context(|| format!("cannot find {}", path.display()))?
        .len())
}

fn remove(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", dir.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    fn lengths(layers: &Layers) -> Vec<u64> {
        let DiskFiles(files) = layers.open().expect("opens").expect("some");
        let length = |file: &File| file.metadata().expect("stat").len();
        files.iter().map(length).collect()
    }

    #[test]
    fn a_disk_goes_on_in_one_more_file_after_each_fork() {
        let root = tempfile::tempdir().expect("a directory");
        let source = Layers::of(root.path(), true);
        assert!(source.open().expect("opens").is_none());
        let plain = root.path().join(WRITABLE);
        fs::write(&plain, vec![7; 8192]).expect("written");
        assert_eq!(lengths(&source), [8192]);
        source.add_top(1).expect("made");
        assert!(!plain.exists());
        let overlay = 8192 + 4096 + 4096;
        assert_eq!(lengths(&source), [8192, overlay]);
        // A fork that has failed leaves one behind that nobody has written to.
        source.add_top(2).expect("made");
        source.add_top(2).expect("made");
        assert_eq!(lengths(&source), [8192, overlay, overlay]);
        assert_eq!(source.bytes() / 4096, 2 + 1 + 1);

        // The middle one becomes part of one that is.
        let DiskFiles(files) = source.open().expect("opens").expect("some");
        source.merge(&files[1..2], 8192).expect("merged");
        source.put_merged(1).expect("put in its place");
        assert_eq!(lengths(&source), [8192, overlay, overlay]);
        assert!(source.put_merged(2).is_err());

        let other = tempfile::tempdir().expect("a directory");
        let child = Layers::of(other.path(), false);
        let DiskFiles(files) = source.open().expect("opens").expect("some");
        for count in [3, 2] {
            // Once more, in the place of what it has.
            let top = child.adopt(&files[..count]).expect("adopted");
            top.write_all_at(b"own", 0).expect("is open to be written");
            let mut lengths_of = vec![overlay; count + 1];
            lengths_of[0] = 8192;
            assert_eq!(lengths(&child), lengths_of);
        }
        drop(root);
        let DiskFiles(files) = child.open().expect("opens").expect("some");
        let mut byte = [0];
        files[0]
            .read_exact_at(&mut byte, 8191)
            .expect("is there still");
        assert_eq!(byte, [7]);
    }
}
