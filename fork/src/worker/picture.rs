//! A stopped VM on its way to another process: a base, layers, and a record of the rest.

use rustix::fd::{AsFd, BorrowedFd};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use vmm::{Image, Run, VmState};

/// The longest record, in bytes: some ten kilobytes for each vCPU, and five for each run
/// of pages.
pub(crate) const RECORD_MAX: u64 = 16 << 20;

/// What is no memory: the state, and which pages are in which layer.
pub(crate) type Record = (Option<VmState>, Vec<Vec<Run>>);

/// All but the files of the memory, as bytes.
pub(crate) fn record_bytes(state: Option<&VmState>, image: &Image) -> io::Result<Vec<u8>> {
    bytes_of(state, image.layers().map(|(_, runs)| runs).collect())
}

/// Writes all but the files of the memory; without a state of one that still runs.
pub(crate) fn write_record(state: Option<&VmState>, image: &Image) -> io::Result<File> {
    sealed(&record_bytes(state, image)?)
}

/// The same of one layer over what its reader knows.
pub(crate) fn write_layer_record(state: Option<&VmState>, runs: Vec<Run>) -> io::Result<File> {
    sealed(&bytes_of(state, vec![runs])?)
}

fn bytes_of(state: Option<&VmState>, layers: Vec<Vec<Run>>) -> io::Result<Vec<u8>> {
    postcard::to_stdvec(&(state, layers)).map_err(io::Error::other)
}

/// Reads a record from its bytes.
pub(crate) fn parse_record(bytes: &[u8]) -> io::Result<Record> {
    postcard::from_bytes(bytes).map_err(|_| io::ErrorKind::InvalidData.into())
}

/// Reads a record from a file that was written here, maybe by another process.
pub(crate) fn read_record(file: &File) -> io::Result<Record> {
    parse_record(&contents(file)?)
}

/// The descriptors of a picture whose record was written.
pub(crate) fn files<'a>(image: &'a Image, record: &'a File) -> Vec<BorrowedFd<'a>> {
    let layers = image.layers().map(|(file, _)| file.as_fd());
    [image.base().as_fd(), record.as_fd()]
        .into_iter()
        .chain(layers)
        .collect()
}

/// Reads a picture of `memory` bytes from descriptors in the order of [`files`]. The base
/// is taken as it is: see [`Image::from_file`]. Without a state its layers are still being
/// written.
///
/// # Errors
/// One line.
pub(crate) fn read(
    memory: u64,
    mut files: impl Iterator<Item = File>,
) -> Result<(Image, Option<VmState>), String> {
    let (Some(base), Some(record)) = (files.next(), files.next()) else {
        return Err("a picture without memory or state".into());
    };
    let record = read_record(&record);
    let (state, layers) = record.map_err(|e| format!("the state cannot be read: {e}"))?;
    let mut image = Image::from_file(base, memory).map_err(|e| e.to_string())?;
    for runs in layers {
        let file = files.next().ok_or("a picture without a layer")?;
        let with = match state {
            Some(_) => image.with_layer_handed_over(file, &runs),
            None => image.with_growing(file, &runs),
        };
        image = with.map_err(|e| e.to_string())?;
    }
    Ok((image, state))
}

/// A file in memory that nobody can change: all workers of a template get one and the
/// same, and none is to choose what the others restore. It was never mapped, so
/// F_SEAL_FUTURE_WRITE says it all, and does not wait as F_SEAL_WRITE does, which for
/// pages that were just written asks every CPU (linux mm/memfd.c).
fn sealed(bytes: &[u8]) -> io::Result<File> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let mut file = File::from(memfd_create("vm-run-state", flags)?);
    file.write_all(bytes)?;
    let all = SealFlags::FUTURE_WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    fcntl_add_seals(&file, all)?;
    Ok(file)
}

/// Reads by offsets: the position in the file is one for all who have it, and several
/// workers may read at once.
fn contents(file: &File) -> io::Result<Vec<u8>> {
    let len = file.metadata()?.len();
    if len > RECORD_MAX {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    // No longer than RECORD_MAX.
    let mut bytes = vec![0; len as usize];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_the_same_for_all_who_share_its_file() {
        let file = sealed(b"state").expect("a file");
        let shared = file.try_clone().expect("cloned");
        assert_eq!(contents(&file).expect("reads"), b"state");
        assert_eq!(contents(&shared).expect("reads"), b"state");
        for change in [shared.write_at(b"x", 0).map(drop), shared.set_len(0)] {
            let error = change.expect_err("sealed");
            assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
        }
    }

    #[test]
    fn a_file_that_is_no_record_is_not_read() {
        let long = File::from(memfd_create("long", MemfdFlags::CLOEXEC).expect("a file"));
        long.set_len(RECORD_MAX + 1).expect("sized");
        assert!(contents(&long).is_err());
        assert!(read_record(&sealed(b"").expect("a file")).is_err());
    }
}
