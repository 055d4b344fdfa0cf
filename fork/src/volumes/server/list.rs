//! Directories.

use super::nodes::stat;
use super::{Outcome, Server};
use crate::volumes::wire::{Answer, DATA_MAX, Request};
use rustix::fs::{FileType, OFlags, RawDir, SeekFrom, seek};
use rustix::io::Errno;
use std::mem::MaybeUninit;

/// What is read of a directory at once, in bytes. A guest's buffer is a page as a rule.
const CHUNK: usize = 4096;

/// `struct fuse_entry_out`, and `struct fuse_dirent` without the name.
const ENTRY: usize = 128;
const DIRENT: usize = 24;

impl Server {
    pub(super) fn open_directory(&mut self, request: &mut Request<'_>) -> Outcome {
        self.has_room()?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let directory = self.open_again(request.node, flags)?;
        let handle = self.keep(directory)?;
        Ok(Answer::empty().u64(handle).zeroes(8))
    }

    /// Entries from an offset on, as many as there is room for; with `plus`, the guest is
    /// told of each as if it had looked it up.
    pub(super) fn list(&mut self, request: &mut Request<'_>, plus: bool) -> Outcome {
        let (handle, offset, size) = (request.u64()?, request.u64()?, request.u32()?);
        let room = size.min(DATA_MAX) as usize;
        let directory = &**self.handles.get(&handle).ok_or(Errno::BADF)?;
        seek(directory, SeekFrom::Start(offset))?;
        // Where nothing is mounted on them, its entries are of its own file system.
        let own = stat(directory)?;
        let mark = self.nodes.ino(&own) ^ own.stx_ino;
        let mut buffer = [MaybeUninit::uninit(); CHUNK];
        let mut entries = RawDir::new(directory, &mut buffer);
        let mut answer = Answer::empty();
        while let Some(entry) = entries.next() {
            let entry = match entry {
                Ok(entry) => entry,
                Err(Errno::INTR) => continue,
                Err(_) if !answer.0.is_empty() => break,
                Err(errno) => return Err(errno),
            };
            let name = entry.file_name();
            let len = name.to_bytes().len();
            let dirent = (DIRENT + len).next_multiple_of(8);
            let whole = if plus { ENTRY + dirent } else { dirent };
            if answer.0.len() + whole > room {
                break;
            }
            if plus {
                answer = match name.to_bytes() {
                    b"." | b".." => answer.zeroes(ENTRY),
                    // One that has gone, or that there is no room for: a name is all that
                    // the guest gets.
                    _ => match self.nodes.look_up(request.node, name) {
                        Ok(entry) => answer.bytes(&entry.0),
                        Err(_) => answer.zeroes(ENTRY),
                    },
                };
            }
            answer = answer
                .u64(entry.ino() ^ mark)
                .u64(entry.next_entry_cookie())
                .u32(len as u32)
                .u32(kind(entry.file_type()))
                .bytes(name.to_bytes())
                .zeroes(dirent - DIRENT - len);
        }
        Ok(answer)
    }
}

/// DT_*, as getdents(2) has them: the kind's bits of a mode.
fn kind(of: FileType) -> u32 {
    match of {
        FileType::Unknown => 0,
        known => known.as_raw_mode() >> 12,
    }
}
