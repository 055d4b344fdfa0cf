//! A writer of tar streams: POSIX ustar, with pax records for what that has no room for.

use crate::error::{Context, Result};
use crate::read::{Entry, Kind};
use std::io::Write;

const BLOCK: usize = 512;
/// What a name's field of a header holds.
const NAME: usize = 100;
/// The largest owner in seven octal digits.
const OWNER_MAX: u32 = 0o777_7777;
/// The largest size and time in eleven.
const NUMBER_MAX: u64 = 0o777_7777_7777;

/// Writes entries one after the other.
#[derive(Debug)]
pub struct TarWriter<W> {
    out: W,
    /// Bytes of the current entry that are still to come.
    left: u64,
    /// What fills its last block.
    padding: usize,
}

impl<W: Write> TarWriter<W> {
    /// A writer to the beginning of `out`.
    pub fn new(out: W) -> Self {
        Self {
            out,
            left: 0,
            padding: 0,
        }
    }

    /// Begins an entry; [`Entry::size`] bytes of a regular file are to follow by
    /// [`Self::data`]. Its pieces are not looked at: holes are written as zeroes.
    ///
    /// # Errors
    /// What the stream says.
    pub fn entry(&mut self, entry: &Entry) -> Result<()> {
        let records = records(entry);
        if !records.is_empty() {
            let mut header = tar::Header::new_ustar();
            header.set_entry_type(tar::EntryType::XHeader);
            header.set_mode(0o644);
            put(&mut header.as_old_mut().name, b"pax");
            header.set_size(records.len() as u64);
            header.set_cksum();
            self.write(header.as_bytes())?;
            self.write(&records)?;
            self.write(&[0; BLOCK][..padding(records.len() as u64)])?;
        }
        self.write(header(entry).as_bytes())?;
        if entry.kind == Kind::Regular {
            self.left = entry.size;
            self.padding = padding(entry.size);
        }
        Ok(())
    }

    /// The next bytes of the entry; what is more than it has is dropped.
    ///
    /// # Errors
    /// What the stream says.
    pub fn data(&mut self, bytes: &[u8]) -> Result<()> {
        let fits = usize::try_from(self.left).map_or(bytes.len(), |left| bytes.len().min(left));
        self.left -= fits as u64;
        self.write(&bytes[..fits])?;
        if self.left == 0 {
            let padding = std::mem::take(&mut self.padding);
            self.write(&[0; BLOCK][..padding])?;
        }
        Ok(())
    }

    /// Fills up an entry whose file has become shorter than it was.
    ///
    /// # Errors
    /// What the stream says.
    pub fn fill(&mut self) -> Result<()> {
        const ZEROES: [u8; 4096] = [0; 4096];
        while self.left > 0 {
            self.data(&ZEROES)?;
        }
        Ok(())
    }

    /// Ends the archive; the stream.
    ///
    /// # Errors
    /// What the stream says.
    pub fn finish(mut self) -> Result<W> {
        self.write(&[0; 2 * BLOCK])?;
        self.out.flush().context(|| "write the tar".to_owned())?;
        Ok(self.out)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let written = self.out.write_all(bytes);
        written.context(|| "write the tar".to_owned())
    }
}

fn padding(size: u64) -> usize {
    (size.next_multiple_of(BLOCK as u64) - size) as usize
}

fn header(entry: &Entry) -> tar::Header {
    let mut header = tar::Header::new_ustar();
    header.set_entry_type(match entry.kind {
        Kind::Regular => tar::EntryType::Regular,
        Kind::HardLink => tar::EntryType::Link,
        Kind::Symlink => tar::EntryType::Symlink,
        Kind::CharDevice => tar::EntryType::Char,
        Kind::BlockDevice => tar::EntryType::Block,
        Kind::Directory => tar::EntryType::Directory,
        Kind::Fifo => tar::EntryType::Fifo,
    });
    header.set_mode(entry.mode.into());
    header.set_uid(entry.uid.min(OWNER_MAX).into());
    header.set_gid(entry.gid.min(OWNER_MAX).into());
    header.set_mtime(u64::try_from(entry.mtime).unwrap_or(0).min(NUMBER_MAX));
    header.set_size(match entry.kind {
        Kind::Regular => entry.size.min(NUMBER_MAX),
        _ => 0,
    });
    put(&mut header.as_old_mut().name, &entry.path);
    put(&mut header.as_old_mut().linkname, &entry.link);
    if let Some(ustar) = header.as_ustar_mut() {
        ustar.set_device_major(entry.device.0);
        ustar.set_device_minor(entry.device.1);
    }
    header.set_cksum();
    header
}

/// As much of `value` as the field holds; it needs no end if it is full.
fn put(field: &mut [u8], value: &[u8]) {
    let fits = value.len().min(field.len());
    field[..fits].copy_from_slice(&value[..fits]);
}

/// The pax records of what the header has no room for.
fn records(entry: &Entry) -> Vec<u8> {
    let mut all = Vec::new();
    let mut number = |key: &str, value: String| record(&mut all, key.as_bytes(), value.as_bytes());
    if entry.kind == Kind::Regular && entry.size > NUMBER_MAX {
        number("size", entry.size.to_string());
    }
    if entry.uid > OWNER_MAX {
        number("uid", entry.uid.to_string());
    }
    if entry.gid > OWNER_MAX {
        number("gid", entry.gid.to_string());
    }
    if entry.mtime_nsec > 0 || !(0..=NUMBER_MAX as i64).contains(&entry.mtime) {
        number("mtime", time(entry.mtime, entry.mtime_nsec));
    }
    if entry.path.len() > NAME {
        record(&mut all, b"path", &entry.path);
    }
    if entry.link.len() > NAME {
        record(&mut all, b"linkpath", &entry.link);
    }
    for (name, value) in &entry.xattrs {
        record(&mut all, &[b"SCHILY.xattr.", &name[..]].concat(), value);
    }
    all
}

/// Seconds and nanoseconds on top of them, as a decimal number.
fn time(seconds: i64, nanos: u32) -> String {
    if seconds < 0 && nanos > 0 {
        let (whole, nanos) = (seconds + 1, 1_000_000_000 - nanos);
        return format!("-{}.{nanos:09}", whole.unsigned_abs());
    }
    format!("{seconds}.{nanos:09}")
}

/// `LENGTH KEY=VALUE\n`, where LENGTH counts itself too.
fn record(all: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + 1;
    while length != rest + length.to_string().len() {
        length = rest + length.to_string().len();
    }
    all.extend(format!("{length} ").as_bytes());
    all.extend(key);
    all.push(b'=');
    all.extend(value);
    all.push(b'\n');
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::read::{Plain, TarReader};

    fn entry(path: &[u8]) -> Entry {
        Entry {
            path: path.to_vec(),
            link: Vec::new(),
            kind: Kind::Regular,
            mode: 0o4755,
            uid: 1000,
            gid: 5,
            mtime: 1_700_000_000,
            mtime_nsec: 0,
            device: (0, 0),
            xattrs: Vec::new(),
            size: 0,
            pieces: Vec::new(),
        }
    }

    fn same(entry: &Entry, data: &[u8]) {
        let mut writer = TarWriter::new(Vec::new());
        writer.entry(entry).unwrap();
        writer.data(data).unwrap();
        let bytes = writer.finish().unwrap();
        assert_eq!(bytes.len() % BLOCK, 0);
        let mut reader = TarReader::new(Plain(&bytes[..]));
        let mut read = reader.next_entry().unwrap().unwrap();
        let mut back = vec![0; data.len()];
        reader.read_data(&mut back).unwrap();
        assert_eq!(back, data);
        read.pieces = entry.pieces.clone();
        assert_eq!(format!("{read:?}"), format!("{entry:?}"));
        assert!(reader.next_entry().unwrap().is_none());
    }

    #[test]
    fn what_is_written_is_read_again() {
        same(&entry(b"plain"), b"");
        let mut odd = entry(&[b"dir/\xff\n \xc3".repeat(40), b"x".to_vec()].concat());
        (odd.uid, odd.gid) = (u32::MAX, 1 << 30);
        (odd.mtime, odd.mtime_nsec) = (-2, 250_000_000);
        odd.xattrs = vec![(b"security.capability".to_vec(), b"\x01\n\0=".to_vec())];
        odd.size = 700;
        same(&odd, &[7; 700]);
        let mut device = entry(b"dev/null");
        (device.kind, device.device) = (Kind::CharDevice, (1, 3));
        same(&device, b"");
        let mut link = entry(b"link");
        (link.kind, link.link) = (Kind::Symlink, b"/".repeat(300));
        same(&link, b"");
        // The length of a record that counts itself into one digit more.
        for length in 80..110 {
            let mut named = entry(b"x");
            named.xattrs = vec![(b"user.n".to_vec(), vec![b'v'; length])];
            same(&named, b"");
        }
    }

    #[test]
    fn a_file_that_shrinks_or_grows_is_as_long_as_it_was_said_to_be() {
        let mut one = entry(b"one");
        one.size = 5000;
        let mut writer = TarWriter::new(Vec::new());
        writer.entry(&one).unwrap();
        writer.data(&[1; 10]).unwrap();
        writer.fill().unwrap();
        one.size = 3;
        writer.entry(&one).unwrap();
        writer.data(&[2; 100]).unwrap();
        let bytes = writer.finish().unwrap();
        let mut reader = TarReader::new(Plain(&bytes[..]));
        assert_eq!(reader.next_entry().unwrap().unwrap().size, 5000);
        assert_eq!(reader.next_entry().unwrap().unwrap().size, 3);
        assert!(reader.next_entry().unwrap().is_none());
    }
}
