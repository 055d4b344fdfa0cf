//! The files of a template: kept, copied and hashed, all without their holes.

use crate::error::Error;
use crate::guest::hex;
use rustix::fs::{AtFlags, CWD, SeekFrom, linkat, seek};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// What is a hole, or is not, as a whole: a page, and a block of a file system.
const BLOCK: u64 = 4096;
const ZEROES: [u8; BLOCK as usize] = [0; BLOCK as usize];
/// So many bytes are read at once.
const BUFFER: u64 = 1 << 20;

/// A file of a template, as it was written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Part {
    /// Its length.
    pub bytes: u64,
    /// Of a small file the SHA-256 of its bytes; of a sparse one see [`SparseWriter`].
    pub sha256: String,
}

impl Part {
    pub(super) fn of_bytes(bytes: &[u8]) -> Self {
        Self {
            bytes: bytes.len() as u64,
            sha256: hex(&Sha256::digest(bytes)),
        }
    }

    pub(super) fn is_of(&self, bytes: &[u8]) -> bool {
        *self == Self::of_bytes(bytes)
    }
}

/// Writes a file by parts, and leaves a hole for each block of zeroes; and knows its digest:
/// SHA-256 of each block of 4 KiB that is not all zeroes, its place before it, and of the
/// length at last (both as 64 bits, little-endian). So it is the same however much of a file
/// is a hole, and a disk of ten gibibytes costs what is on it.
#[derive(Debug)]
pub struct SparseWriter<'a> {
    to: Option<&'a File>,
    hash: Sha256,
}

impl<'a> SparseWriter<'a> {
    /// Of an empty file.
    pub fn new(to: &'a File) -> Self {
        let to = Some(to);
        let hash = Sha256::new();
        Self { to, hash }
    }

    /// Writes nothing: only the digest counts.
    fn to_nowhere() -> Self {
        let hash = Sha256::new();
        Self { to: None, hash }
    }

    /// Takes the bytes from `at` on, which is the first of a block; all but the last of a
    /// file are whole blocks.
    ///
    /// # Errors
    /// What the file system says.
    pub fn write_at(&mut self, bytes: &[u8], at: u64) -> io::Result<()> {
        let mut data: Range<usize> = 0..0;
        for (number, block) in bytes.chunks(ZEROES.len()).enumerate() {
            if *block == ZEROES[..block.len()] {
                continue;
            }
            let place = number * ZEROES.len();
            self.hash.update((at + place as u64).to_le_bytes());
            self.hash.update(block);
            if data.end != place {
                self.put(&bytes[data.clone()], at + data.start as u64)?;
                data.start = place;
            }
            data.end = place + block.len();
        }
        self.put(&bytes[data.clone()], at + data.start as u64)
    }

    fn put(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        self.to.map_or(Ok(()), |to| to.write_all_at(bytes, at))
    }

    /// Gives the file its length, has it on the disk, and says what it is.
    ///
    /// # Errors
    /// What the file system says.
    pub fn finish(mut self, bytes: u64) -> io::Result<Part> {
        if let Some(to) = self.to {
            to.set_len(bytes)?;
            to.sync_all()?;
        }
        self.hash.update(bytes.to_le_bytes());
        Ok(Part {
            bytes,
            sha256: hex(&self.hash.finalize()),
        })
    }
}

/// What is in these ranges of a file, of which no other byte counts.
pub(super) fn part_of(file: &File, ranges: &[Range<u64>]) -> io::Result<Part> {
    take(file, ranges, SparseWriter::to_nowhere())
}

/// All of a file.
pub(super) fn whole(file: &File) -> io::Result<[Range<u64>; 1]> {
    let all = 0..file.metadata()?.len();
    Ok([all])
}

/// Gives a file that nobody writes any more a second name in the template, so that it
/// lives as long as the template; on another file system, and in memory: a copy of the
/// ranges that count.
pub(super) fn keep(file: &File, ranges: &[Range<u64>], path: &Path) -> Result<Part, Error> {
    let open_file = format!("/proc/self/fd/{}", file.as_raw_fd());
    let kept = match linkat(CWD, open_file, CWD, path, AtFlags::SYMLINK_FOLLOW) {
        Ok(()) => part_of(file, ranges),
        Err(_) => take(file, ranges, SparseWriter::new(&create(path)?)),
    };
    kept.map_err(Error::io(path, "write"))
}

fn take(file: &File, ranges: &[Range<u64>], mut writer: SparseWriter<'_>) -> io::Result<Part> {
    let mut buffer = Vec::new();
    for range in ranges {
        let mut at = range.start;
        while let Some(data) = next_data(file, at..range.end)? {
            let len = (data.end - data.start).min(BUFFER);
            buffer.resize(len as usize, 0);
            file.read_exact_at(&mut buffer, data.start)?;
            writer.write_at(&buffer, data.start)?;
            at = data.start + len;
        }
    }
    writer.finish(file.metadata()?.len())
}

/// The first part of a range, which begins with a block, that is no hole; in whole blocks.
fn next_data(file: &File, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
    if range.is_empty() {
        return Ok(None);
    }
    let data = match seek(file, SeekFrom::Data(range.start)) {
        Ok(data) => data / BLOCK * BLOCK,
        Err(Errno::NXIO) => return Ok(None),
        Err(e) => return Err(e.into()),
    };
    if data >= range.end {
        return Ok(None);
    }
    let hole = seek(file, SeekFrom::Hole(data.max(range.start)))?;
    let end = hole.next_multiple_of(BLOCK).min(range.end);
    Ok(Some(data.max(range.start)..end))
}

pub(super) fn write(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let mut file = create(path)?;
    file.write_all(bytes)
        .and_then(|()| file.sync_all())
        .map_err(Error::io(path, "write"))
}

fn create(path: &Path) -> Result<File, Error> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)
        .map_err(Error::io(path, "create"))
}

pub(super) fn open(path: &Path) -> Result<File, Error> {
    File::open(path).map_err(Error::io(path, "open"))
}

/// Gives a directory, which is whole, its name.
///
/// # Errors
/// A name that is taken, or what the file system says; the directory is gone then.
pub fn rename_into_place(beside: tempfile::TempDir, dir: &Path) -> Result<(), Error> {
    let parent = dir.parent().unwrap_or(Path::new("."));
    sync_dir(beside.path())?;
    fs::rename(beside.path(), dir).map_err(Error::io(dir, "rename to"))?;
    // The directory has its name now: nothing of it is to be cleaned up.
    let _kept = beside.keep();
    sync_dir(parent)
}

fn sync_dir(path: &Path) -> Result<(), Error> {
    File::open(path)
        .and_then(|dir| dir.sync_all())
        .map_err(Error::io(path, "sync"))
}

pub(crate) fn read_bounded(path: &Path, max: u64) -> Result<Vec<u8>, Error> {
    let file = open(path)?;
    let mut bytes = Vec::new();
    file.take(max + 1)
        .read_to_end(&mut bytes)
        .map_err(Error::io(path, "read"))?;
    if bytes.len() as u64 > max {
        return Err(Error::io(path, "read")(io::ErrorKind::FileTooLarge.into()));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, memfd_create};
    use std::os::unix::fs::MetadataExt;

    const LEN: u64 = 3 * BUFFER + 100;

    /// With data at its beginning, over the end of a buffer, and at its end.
    fn fill(file: &File) {
        file.set_len(LEN).expect("sized");
        for at in [7, BUFFER - 2, LEN - 3] {
            file.write_all_at(b"data", at.min(LEN - 4)).expect("writes");
        }
    }

    fn in_memory() -> File {
        File::from(memfd_create("part", MemfdFlags::CLOEXEC).expect("a file"))
    }

    fn contents(path: &Path) -> Vec<u8> {
        fs::read(path).expect("reads")
    }

    #[test]
    fn a_copy_has_its_holes_and_the_digest_of_a_file_without() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = in_memory();
        fill(&file);
        let all = whole(&file).expect("a length");
        let path = dir.path().join("copy");
        let part = keep(&file, &all, &path).expect("copies");
        assert_eq!(part.bytes, LEN);
        let mut expected = vec![0; LEN as usize];
        file.read_exact_at(&mut expected, 0).expect("reads");
        assert!(contents(&path) == expected);
        let blocks = path.metadata().expect("stats").blocks();
        assert!(blocks * 512 <= 4 * BLOCK, "{blocks} blocks");
        let full = dir.path().join("full");
        fs::write(&full, &expected).expect("writes");
        let full = open(&full).expect("opens");
        assert_eq!(part_of(&full, &all).expect("reads"), part);
        // A byte elsewhere, or the same bytes elsewhere, are something else.
        for at in [8, BLOCK + 7] {
            fill(&file);
            file.write_all_at(b"x", at).expect("writes");
            assert_ne!(part_of(&file, &all).expect("reads"), part, "{at}");
            file.write_all_at(b"\0", at).expect("writes");
        }
        file.set_len(LEN + 1).expect("sized");
        assert_ne!(part_of(&file, &all).expect("reads"), part);
    }

    #[test]
    fn only_the_ranges_that_count_are_copied() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = in_memory();
        file.set_len(8 * BLOCK).expect("sized");
        file.write_all_at(&[1; 8 * BLOCK as usize], 0)
            .expect("writes");
        let path = dir.path().join("copy");
        let ranges = [BLOCK..2 * BLOCK, 5 * BLOCK..7 * BLOCK];
        let part = keep(&file, &ranges, &path).expect("copies");
        let copy = contents(&path);
        let ones = |at: u64| copy[(at * BLOCK) as usize] == 1;
        let found: Vec<u64> = (0..8).filter(|at| ones(*at)).collect();
        assert_eq!((found, copy.len() as u64), (vec![1, 5, 6], 8 * BLOCK));
        let copy = open(&path).expect("opens");
        assert_eq!(part_of(&copy, &ranges).expect("reads"), part);
    }

    #[test]
    fn a_file_on_the_same_file_system_is_not_copied() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("one");
        fill(&create(&path).expect("creates"));
        let file = open(&path).expect("opens");
        let kept = dir.path().join("kept");
        let part = keep(&file, &whole(&file).expect("a length"), &kept).expect("keeps");
        let ino = |path: &Path| path.metadata().expect("stats").ino();
        assert_eq!(ino(&path), ino(&kept));
        // One without a name left cannot have another.
        fs::remove_file(&path).expect("removes");
        fs::remove_file(&kept).expect("removes");
        let again = keep(&file, &whole(&file).expect("a length"), &kept).expect("keeps");
        assert_eq!(again, part);
    }
}
