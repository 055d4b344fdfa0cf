//! A bounded reader of tar streams: POSIX ustar and pax, GNU long names, GNU sparse
//! files (old and pax 0.1 and 1.0).
//!
//! The `tar` crate gives the header's layout; its reader is not used, because it
//! takes extension headers of any size into memory, and splits pax records at
//! newlines, which breaks binary attributes such as `security.capability`.

mod field;

use crate::error::{Context, Error, Result, printable};
use field::{check_sum, decimal, number, pax_time, tar, unsigned, until_nul};
use std::io::{self, Read};

const BLOCK: u64 = 512;
/// Bytes of one extension header. Attributes of 64 KiB each are the largest thing
/// that has a reason to be in one.
const LONGEST_EXTENSION: u64 = 1 << 20;
/// PATH_MAX and SYMLINK_MAX, without the final NUL.
const LONGEST_PATH: usize = 4095;
/// Pieces of one sparse file.
const MOST_PIECES: usize = 1 << 16;

/// A stream that can pass over bytes cheaply.
pub trait Stream: Read {
    /// Passes over exactly `count` bytes.
    fn skip(&mut self, count: u64) -> io::Result<()>;
}

/// Any reader as a [`Stream`]: bytes are passed over by reading them.
#[derive(Debug)]
pub struct Plain<R>(pub R);

impl<R: Read> Read for Plain<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl<R: Read> Stream for Plain<R> {
    fn skip(&mut self, count: u64) -> io::Result<()> {
        let passed = io::copy(&mut self.0.by_ref().take(count), &mut io::sink())?;
        if passed < count {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(())
    }
}

/// What an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    Regular,
    /// Another name of an earlier file.
    HardLink,
    /// A symbolic link.
    Symlink,
    /// A character device.
    CharDevice,
    /// A block device.
    BlockDevice,
    /// A directory.
    Directory,
    /// A named pipe.
    Fifo,
}

/// A run of a file's bytes; what lies between runs is a hole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Where the run begins in the file.
    pub offset: u64,
    /// Where its bytes are in the tar stream.
    pub position: u64,
    /// Its length in bytes.
    pub length: u64,
}

/// One member of the archive.
#[derive(Clone, Debug)]
pub struct Entry {
    /// The name, as it stands in the archive.
    pub path: Vec<u8>,
    /// The target of a link.
    pub link: Vec<u8>,
    /// What it is.
    pub kind: Kind,
    /// Permission bits with setuid, setgid and sticky.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Seconds since 1970.
    pub mtime: i64,
    /// Nanoseconds on top.
    pub mtime_nsec: u32,
    /// Major and minor number of a device.
    pub device: (u32, u32),
    /// Extended attributes.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// The file's length in bytes, holes included.
    pub size: u64,
    /// Where its bytes are.
    pub pieces: Vec<Piece>,
}

/// Reads entries one after the other.
pub struct TarReader<S> {
    stream: S,
    position: u64,
    /// Bytes of the current entry, padding included, not yet passed.
    pending: u64,
    ended: bool,
}

/// What extension headers said of the entry to come.
#[derive(Default)]
struct Extensions {
    path: Option<Vec<u8>>,
    /// A sparse file's true name; its `path` then names only where it was packed.
    sparse_name: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u32>,
    gid: Option<u32>,
    mtime: Option<(i64, u32)>,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    sparse_major: Option<u64>,
    sparse_map: Option<Vec<u64>>,
    sparse_size: Option<u64>,
}

impl<S: Stream> TarReader<S> {
    /// A reader at the beginning of `stream`.
    pub fn new(stream: S) -> Self {
        TarReader {
            stream,
            position: 0,
            pending: 0,
            ended: false,
        }
    }

    /// The stream, behind the last entry's header or data.
    pub fn into_inner(self) -> S {
        self.stream
    }

    /// The next entry, or `None` at the archive's end.
    ///
    /// # Errors
    /// [`Error::Tar`] and [`Error::Entry`] for what the stream says,
    /// [`Error::Io`] for what the system says.
    pub fn next_entry(&mut self) -> Result<Option<Entry>> {
        let mut extensions = Extensions::default();
        while let Some(header) = self.next_header()? {
            let size = number(&header.as_old().size)?;
            let size = u64::try_from(size).map_err(|_| tar("a negative size"))?;
            match header.as_old().linkflag[0] {
                b'L' => extensions.path = Some(self.long_name(size)?),
                b'K' => extensions.link = Some(self.long_name(size)?),
                b'x' | b'X' => {
                    let records = self.extension(size)?;
                    extensions.read_pax(&records)?;
                }
                // Global records hold comments (git's commit); docker ignores them too.
                b'g' => drop(self.extension(size)?),
                flag => return self.entry(&header, flag, size, extensions).map(Some),
            }
        }
        Ok(None)
    }

    /// Reads the next bytes of the current entry: those of its pieces follow each other.
    ///
    /// # Errors
    /// [`Error::Tar`] for more bytes than it has, or a stream that ends.
    pub fn read_data(&mut self, bytes: &mut [u8]) -> Result<()> {
        let left = self.pending.checked_sub(bytes.len() as u64);
        self.pending = left.ok_or_else(|| tar("an entry shorter than its pieces"))?;
        self.read(bytes)
    }

    fn entry(
        &mut self,
        header: &tar::Header,
        flag: u8,
        size: u64,
        ext: Extensions,
    ) -> Result<Entry> {
        let old = header.as_old();
        let path = match ext.sparse_name.or(ext.path) {
            Some(path) => path,
            None => header_path(header),
        };
        let named = |reason: &str| Error::Entry {
            entry: printable(&path),
            reason: reason.to_owned(),
        };
        let kind = match flag {
            b'0' | b'\0' | b'7' if path.ends_with(b"/") => Kind::Directory,
            b'0' | b'\0' | b'7' | b'S' => Kind::Regular,
            b'1' => Kind::HardLink,
            b'2' => Kind::Symlink,
            b'3' => Kind::CharDevice,
            b'4' => Kind::BlockDevice,
            b'5' => Kind::Directory,
            b'6' => Kind::Fifo,
            other => {
                return Err(named(&format!(
                    "unknown kind {:?} of tar entry",
                    other as char
                )));
            }
        };
        let id = |field: &[u8]| -> Result<u32> {
            u32::try_from(number(field)?).map_err(|_| named("an owner out of range"))
        };
        let link = match ext.link {
            Some(link) => link,
            None => until_nul(&old.linkname).to_vec(),
        };
        if path.len() > LONGEST_PATH || link.len() > LONGEST_PATH {
            return Err(named("a name longer than 4095 bytes"));
        }
        let (mtime, mtime_nsec) = match ext.mtime {
            Some(time) => time,
            None => (number(&old.mtime)?, 0),
        };
        let mut entry = Entry {
            link,
            kind,
            mode: (number(&old.mode)? & 0o7777) as u16,
            uid: match ext.uid {
                Some(uid) => uid,
                None => id(&old.uid)?,
            },
            gid: match ext.gid {
                Some(gid) => gid,
                None => id(&old.gid)?,
            },
            mtime,
            mtime_nsec,
            device: device(header)?,
            xattrs: ext.xattrs,
            size: 0,
            pieces: Vec::new(),
            path,
        };
        if kind == Kind::Regular {
            let stored = ext.size.unwrap_or(size);
            self.pending = padded(stored)?;
            let extent = if flag == b'S' {
                self.old_sparse(header, stored)?
            } else if ext.sparse_major == Some(1) {
                self.sparse_map_in_data(ext.sparse_size, stored)?
            } else if let Some(map) = ext.sparse_map {
                let real = ext
                    .sparse_size
                    .ok_or_else(|| tar("a sparse file without its size"))?;
                (real, pieces(&map, self.position, stored, real)?)
            } else {
                let piece = Piece {
                    offset: 0,
                    position: self.position,
                    length: stored,
                };
                (stored, if stored == 0 { Vec::new() } else { vec![piece] })
            };
            (entry.size, entry.pieces) = extent;
        }
        Ok(entry)
    }

    /// The next header block with a good checksum; `None` at the end.
    fn next_header(&mut self) -> Result<Option<tar::Header>> {
        if self.ended {
            return Ok(None);
        }
        self.skip(self.pending)?;
        self.pending = 0;
        let mut header = tar::Header::new_old();
        let block = header.as_mut_bytes();
        let mut filled = 0;
        while filled < block.len() {
            match self.stream.read(&mut block[filled..]) {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error).context(|| "read the tar".to_owned()),
            }
        }
        self.position += filled as u64;
        // A stream that ends at a block's edge without the two zero blocks is
        // accepted, as Go's reader does: some builders write such layers.
        if filled == 0 || (filled == block.len() && block.iter().all(|b| *b == 0)) {
            self.ended = true;
            return Ok(None);
        }
        if filled < block.len() {
            return Err(tar("it ends in the middle of a header"));
        }
        check_sum(block)?;
        Ok(Some(header))
    }

    fn skip(&mut self, count: u64) -> Result<()> {
        self.stream
            .skip(count)
            .map_err(cut)
            .context(|| "read the tar".to_owned())?;
        self.position += count;
        Ok(())
    }

    fn read(&mut self, bytes: &mut [u8]) -> Result<()> {
        self.stream
            .read_exact(bytes)
            .map_err(cut)
            .context(|| "read the tar".to_owned())?;
        self.position += bytes.len() as u64;
        Ok(())
    }

    /// The data of an extension header, its padding passed.
    fn extension(&mut self, size: u64) -> Result<Vec<u8>> {
        if size > LONGEST_EXTENSION {
            return Err(Error::Limit(format!(
                "a tar extension header of {size} bytes"
            )));
        }
        let mut bytes = vec![0; size as usize];
        self.read(&mut bytes)?;
        self.skip(padded(size)? - size)?;
        Ok(bytes)
    }

    fn long_name(&mut self, size: u64) -> Result<Vec<u8>> {
        Ok(until_nul(&self.extension(size)?).to_vec())
    }

    /// GNU's old sparse format: four pieces in the header, 21 in each block behind.
    fn old_sparse(&mut self, header: &tar::Header, stored: u64) -> Result<(u64, Vec<Piece>)> {
        let gnu = header
            .as_gnu()
            .ok_or_else(|| tar("a sparse file in a header that is not GNU's"))?;
        let real = unsigned(&gnu.realsize)?;
        let mut map = Vec::new();
        read_old_sparse(&gnu.sparse, &mut map)?;
        let mut extended = gnu.isextended[0] != 0;
        while extended {
            let mut block = tar::GnuExtSparseHeader::new();
            self.read(block.as_mut_bytes())?;
            read_old_sparse(&block.sparse, &mut map)?;
            extended = block.isextended[0] != 0;
        }
        let pieces = pieces(&map, self.position, stored, real)?;
        Ok((real, pieces))
    }

    /// The pax 1.0 sparse format: the map stands before the data, as decimal lines,
    /// filled up to a whole block.
    fn sparse_map_in_data(&mut self, real: Option<u64>, stored: u64) -> Result<(u64, Vec<Piece>)> {
        let real = real.ok_or_else(|| tar("a sparse file without its size"))?;
        let mut numbers: Vec<u64> = Vec::new();
        let mut current: Option<u64> = None;
        let mut used = 0;
        loop {
            used += BLOCK;
            if used > self.pending {
                return Err(tar("a sparse map without an end"));
            }
            let mut block = [0; BLOCK as usize];
            self.read(&mut block)?;
            for byte in block {
                match (byte, current) {
                    (b'0'..=b'9', _) => {
                        let digit = u64::from(byte - b'0');
                        let value = current
                            .unwrap_or(0)
                            .checked_mul(10)
                            .and_then(|v| v.checked_add(digit));
                        current = Some(value.ok_or_else(|| tar("a number in a sparse map"))?);
                    }
                    (b'\n', Some(value)) => {
                        numbers.push(value);
                        current = None;
                    }
                    _ => return Err(tar("a sparse map that is not decimal lines")),
                }
                let complete = numbers
                    .first()
                    .is_some_and(|count| (numbers.len() as u64 - 1) / 2 >= *count);
                if complete {
                    // The rest of the block is filling.
                    self.pending -= used;
                    let data = stored
                        .checked_sub(used)
                        .ok_or_else(|| tar("a sparse map longer than its file"))?;
                    return Ok((real, pieces(&numbers[1..], self.position, data, real)?));
                }
                if numbers.len() > 2 * MOST_PIECES {
                    return Err(Error::Limit(
                        "a sparse file of more than 65536 pieces".to_owned(),
                    ));
                }
            }
        }
    }
}

impl Extensions {
    /// pax records: `LENGTH KEY=VALUE\n`, where LENGTH counts the whole record.
    fn read_pax(&mut self, mut records: &[u8]) -> Result<()> {
        let mut pairs: Vec<u64> = Vec::new();
        while !records.is_empty() && records[0] != 0 {
            let malformed = || tar("a malformed pax record");
            let space = records
                .iter()
                .take(20)
                .position(|b| *b == b' ')
                .ok_or_else(malformed)?;
            let length = decimal(&records[..space])? as usize;
            if length <= space + 1 || length > records.len() || records[length - 1] != b'\n' {
                return Err(malformed());
            }
            let record = &records[space + 1..length - 1];
            records = &records[length..];
            let equals = record
                .iter()
                .position(|b| *b == b'=')
                .ok_or_else(malformed)?;
            self.set(&record[..equals], &record[equals + 1..], &mut pairs)?;
        }
        if !pairs.is_empty() {
            self.sparse_map = Some(pairs);
        }
        Ok(())
    }

    fn set(&mut self, key: &[u8], value: &[u8], pairs: &mut Vec<u64>) -> Result<()> {
        if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
            self.xattrs.push((name.to_vec(), value.to_vec()));
            return Ok(());
        }
        let id = |value| u32::try_from(decimal(value)?).map_err(|_| tar("an owner out of range"));
        match key {
            b"path" => self.path = Some(value.to_vec()),
            b"linkpath" => self.link = Some(value.to_vec()),
            b"size" => self.size = Some(decimal(value)?),
            b"uid" => self.uid = Some(id(value)?),
            b"gid" => self.gid = Some(id(value)?),
            b"mtime" => self.mtime = Some(pax_time(value)?),
            b"GNU.sparse.name" => self.sparse_name = Some(value.to_vec()),
            b"GNU.sparse.major" => self.sparse_major = Some(decimal(value)?),
            b"GNU.sparse.size" | b"GNU.sparse.realsize" => self.sparse_size = Some(decimal(value)?),
            b"GNU.sparse.offset" | b"GNU.sparse.numbytes" => pairs.push(decimal(value)?),
            b"GNU.sparse.map" => {
                for number in value.split(|b| *b == b',') {
                    pairs.push(decimal(number)?);
                }
            }
            _ => {}
        }
        Ok(())
    }
}

/// A stream that ends too early is corrupt input, not a failing system.
fn cut(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => tar("it ends in the middle of a file").into(),
        _ => error,
    }
}

fn padded(size: u64) -> Result<u64> {
    size.checked_next_multiple_of(BLOCK)
        .ok_or_else(|| tar("a size out of range"))
}

fn header_path(header: &tar::Header) -> Vec<u8> {
    let name = until_nul(&header.as_old().name);
    match header.as_ustar().map(|ustar| until_nul(&ustar.prefix)) {
        Some(prefix) if !prefix.is_empty() => [prefix, b"/", name].concat(),
        _ => name.to_vec(),
    }
}

fn device(header: &tar::Header) -> Result<(u32, u32)> {
    let bytes = header.as_bytes();
    if header.as_ustar().is_none() && header.as_gnu().is_none() {
        return Ok((0, 0));
    }
    let part =
        |field: &[u8]| -> Result<u32> { Ok(u32::try_from(number(field)?).unwrap_or(u32::MAX)) };
    Ok((part(&bytes[329..337])?, part(&bytes[337..345])?))
}

fn read_old_sparse(list: &[tar::GnuSparseHeader], map: &mut Vec<u64>) -> Result<()> {
    for piece in list.iter().take_while(|piece| piece.offset[0] != 0) {
        if map.len() >= 2 * MOST_PIECES {
            return Err(Error::Limit(
                "a sparse file of more than 65536 pieces".to_owned(),
            ));
        }
        map.extend([unsigned(&piece.offset)?, unsigned(&piece.numbytes)?]);
    }
    Ok(())
}

/// Checks a sparse map: pieces in order, within the file, and exactly as long
/// together as the data that is stored.
fn pieces(map: &[u64], mut position: u64, stored: u64, real: u64) -> Result<Vec<Piece>> {
    if map.len() > 2 * MOST_PIECES {
        return Err(Error::Limit(
            "a sparse file of more than 65536 pieces".to_owned(),
        ));
    }
    let wrong = || tar("a sparse map that does not fit its file");
    let mut list = Vec::new();
    let mut reached: u64 = 0;
    let mut left = stored;
    for pair in map.chunks(2) {
        let &[offset, length] = pair else {
            return Err(wrong());
        };
        let end = offset.checked_add(length).ok_or_else(wrong)?;
        if offset < reached || end > real {
            return Err(wrong());
        }
        left = left.checked_sub(length).ok_or_else(wrong)?;
        if length > 0 {
            list.push(Piece {
                offset,
                position,
                length,
            });
        }
        position = position.checked_add(length).ok_or_else(wrong)?;
        reached = end;
    }
    if left != 0 {
        return Err(wrong());
    }
    Ok(list)
}

#[cfg(test)]
mod tests;
