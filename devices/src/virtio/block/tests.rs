mod layered;

use super::*;
use std::fs::OpenOptions;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;

use crate::testing::{Buffer, FakeGuest, Used, conformance};

const CAPACITY: u64 = 64 << 21; // sectors: 64 GiB

fn state(read_only: bool) -> BlockState {
    BlockState {
        capacity_sectors: CAPACITY,
        read_only,
        id: "root".into(),
    }
}

fn open(path: &Path) -> File {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap()
}

/// A file of `len` bytes, byte *n* being *n* mod 251.
fn file(len: usize) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    let bytes: Vec<u8> = (0..len).map(|n| (n % 251) as u8).collect();
    file.write_all(&bytes).unwrap();
    file
}

fn contents(path: &Path) -> Vec<u8> {
    let (mut file, mut bytes) = (open(path), Vec::new());
    file.seek(SeekFrom::Start(0)).unwrap();
    file.read_to_end(&mut bytes).unwrap();
    bytes
}

fn bound(state: &BlockState, file: File) -> Result<Block, BlockError> {
    let mut disk = Block::restore(state)?;
    disk.bind(file)?;
    Ok(disk)
}

fn boot(read_only: bool, file: Option<File>) -> FakeGuest<Block> {
    let mut disk = Block::restore(&state(read_only)).unwrap();
    if let Some(file) = file {
        disk.bind(file).unwrap();
    }
    FakeGuest::boot(disk)
}

fn header(kind: u32, sector: u64) -> Buffer {
    let mut raw = kind.to_le_bytes().to_vec();
    raw.extend([0; 4]);
    raw.extend(sector.to_le_bytes());
    Buffer::Out(raw)
}

/// Status and data of an answer.
fn answer(mut used: Used) -> (u8, Vec<u8>) {
    let status = used.data.pop().unwrap();
    (status, used.data)
}

fn read(guest: &mut FakeGuest<Block>, sector: u64, len: usize) -> (u8, Vec<u8>) {
    let buffers = [header(T_IN, sector), Buffer::In(len), Buffer::In(1)];
    answer(guest.request(0, &buffers))
}

fn write(guest: &mut FakeGuest<Block>, sector: u64, data: &[u8]) -> u8 {
    let buffers = [
        header(T_OUT, sector),
        Buffer::Out(data.to_vec()),
        Buffer::In(1),
    ];
    answer(guest.request(0, &buffers)).0
}

fn command(guest: &mut FakeGuest<Block>, kind: u32, payload: Vec<u8>) -> u8 {
    let mut buffers = vec![header(kind, 0)];
    if !payload.is_empty() {
        buffers.push(Buffer::Out(payload));
    }
    buffers.push(Buffer::In(1));
    answer(guest.request(0, &buffers)).0
}

fn segment(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut raw = sector.to_le_bytes().to_vec();
    raw.extend(sectors.to_le_bytes());
    raw.extend(flags.to_le_bytes());
    raw
}

#[test]
fn conforms() {
    for read_only in [false, true] {
        conformance(
            &state(read_only),
            |state| Block::restore(state).unwrap(),
            |guest| {
                assert_eq!(read(guest, 8, 1024), (S_OK, vec![0; 1024]));
                assert_eq!(command(guest, T_FLUSH, vec![]), S_OK);
            },
        );
    }
}

#[test]
fn without_a_file_the_disk_is_empty_and_takes_no_writes() {
    let mut guest = boot(false, None);
    assert_eq!(read(&mut guest, CAPACITY - 1, 512), (S_OK, vec![0; 512]));
    assert_eq!(write(&mut guest, 0, &[1; 512]), S_IOERR);
    assert_eq!(command(&mut guest, T_DISCARD, segment(0, 8, 0)), S_IOERR);
    assert_eq!(command(&mut guest, T_FLUSH, vec![]), S_OK);
}

#[test]
fn a_file_bound_at_the_fork_appears_on_the_disk_the_guest_knows() {
    let mut template = boot(true, None);
    assert_eq!(template.config::<8>(0), CAPACITY.to_le_bytes());
    assert_eq!(read(&mut template, 0, 512).1, [0; 512]);
    let frozen = template.freeze();

    let image = file(3000);
    let device = bound(&frozen.device, open(image.path())).unwrap();
    let mut child = FakeGuest::thaw(device, &frozen);
    let (status, data) = read(&mut child, 0, 4096);
    assert_eq!(status, S_OK);
    assert_eq!(data[..3000], contents(image.path()));
    assert_eq!(data[3000..], [0; 1096]);
    assert_eq!(read(&mut child, CAPACITY - 8, 4096), (S_OK, vec![0; 4096]));
}

#[test]
fn reads_are_scattered_and_writes_gathered() {
    let disk = file(1 << 20);
    let mut guest = boot(false, Some(open(disk.path())));
    let buffers = [
        header(T_IN, 3),
        Buffer::In(100),
        Buffer::In(900),
        Buffer::In(24),
        Buffer::In(1),
    ];
    let used = guest.request(0, &buffers);
    assert_eq!(used.len, 1025);
    let before = contents(disk.path());
    assert_eq!(answer(used), (S_OK, before[1536..2560].to_vec()));

    // The header and the status may share buffers with data (§2.7.4.3).
    let Buffer::Out(mut first) = header(T_OUT, 5) else {
        unreachable!()
    };
    first.extend([7; 512]);
    let used = guest.request(0, &[Buffer::Out(first), Buffer::In(1)]);
    assert_eq!(answer(used).0, S_OK);
    assert_eq!(contents(disk.path())[2560..3072], [7; 512]);
    assert_eq!(command(&mut guest, T_FLUSH, vec![]), S_OK);
}

#[test]
fn the_file_never_grows() {
    let disk = file(8 * 512);
    let mut guest = boot(false, Some(open(disk.path())));
    assert_eq!(write(&mut guest, 7, &[9; 512]), S_OK);
    assert_eq!(write(&mut guest, 8, &[9; 512]), S_IOERR);
    assert_eq!(write(&mut guest, 7, &[8; 1024]), S_IOERR);
    let after = contents(disk.path());
    assert_eq!(after.len(), 8 * 512);
    assert_eq!(after[7 * 512..], [9; 512]);
}

#[test]
fn nothing_beyond_the_capacity() {
    let mut guest = boot(true, None);
    assert_eq!(read(&mut guest, CAPACITY, 512).0, S_IOERR);
    assert_eq!(read(&mut guest, CAPACITY - 1, 1024).0, S_IOERR);
    assert_eq!(read(&mut guest, u64::MAX, 1024).0, S_IOERR);
    assert_eq!(read(&mut guest, 0, 100).0, S_IOERR);
}

#[test]
fn a_read_only_disk_refuses_a_driver_that_writes_all_the_same() {
    let image = file(8192);
    let mut guest = boot(true, Some(open(image.path())));
    assert_ne!(guest.offered() & F_RO, 0);
    assert_eq!(guest.offered() & (F_DISCARD | F_WRITE_ZEROES), 0);
    let before = contents(image.path());
    assert_eq!(write(&mut guest, 0, &[1; 512]), S_IOERR);
    assert_eq!(command(&mut guest, T_DISCARD, segment(0, 16, 0)), S_IOERR);
    assert_eq!(
        command(&mut guest, T_WRITE_ZEROES, segment(0, 16, 0)),
        S_IOERR
    );
    assert_eq!(contents(image.path()), before);
}

#[test]
fn discard_and_write_zeroes_clear_what_they_name() {
    let disk = file(64 << 10);
    let mut guest = boot(false, Some(open(disk.path())));
    for (kind, flags, sector) in [
        (T_DISCARD, 0, 8),
        (T_WRITE_ZEROES, 0, 24),
        (T_WRITE_ZEROES, SEGMENT_UNMAP, 40),
    ] {
        assert_eq!(command(&mut guest, kind, segment(sector, 8, flags)), S_OK);
        let from = sector as usize * 512;
        let after = contents(disk.path());
        assert_eq!(after[from..from + 4096], [0; 4096]);
        assert_ne!(after[from - 1], 0);
        assert_ne!(after[from + 4096..from + 4098], [0; 2]);
    }
    // Over the end of the file: what is there is cleared, and it does not grow.
    let mut two = segment(120, 64, 0);
    two.extend(segment(1 << 20, 8, 0));
    assert_eq!(command(&mut guest, T_WRITE_ZEROES, two), S_OK);
    assert_eq!(contents(disk.path()).len(), 64 << 10);
}

#[test]
fn clearing_is_bounded_and_checked_before_anything_is_done() {
    let disk = file(64 << 10);
    let mut guest = boot(false, Some(open(disk.path())));
    let before = contents(disk.path());
    let mut second_is_bad = segment(0, 8, 0);
    second_is_bad.extend(segment(CAPACITY, 1, 0));
    let too_many = segment(0, 8, 0).repeat(DISCARD_SEGMENTS_MAX as usize + 1);
    for payload in [
        vec![],
        vec![0; 15],
        segment(0, DISCARD_SECTORS_MAX + 1, 0),
        segment(u64::MAX, 8, 0),
        second_is_bad,
        too_many,
    ] {
        assert_eq!(command(&mut guest, T_DISCARD, payload), S_IOERR);
    }
    assert_eq!(
        command(&mut guest, T_DISCARD, segment(0, 8, SEGMENT_UNMAP)),
        S_UNSUPP
    );
    assert_eq!(
        command(&mut guest, T_WRITE_ZEROES, segment(0, 8, 2)),
        S_UNSUPP
    );
    assert_eq!(contents(disk.path()), before);
}

#[test]
fn two_guests_never_share_a_writable_disk() {
    let disk = file(4096);
    let bind = |read_only| bound(&state(read_only), open(disk.path()));
    let writer = bind(false).unwrap();
    assert!(matches!(bind(false), Err(BlockError::InUse)));
    assert!(matches!(bind(true), Err(BlockError::InUse)));
    drop(writer);
    let readers = (bind(true).unwrap(), bind(true).unwrap());
    assert!(matches!(bind(false), Err(BlockError::InUse)));
    drop(readers);
    let mut writer = bind(false).unwrap();
    assert!(matches!(
        writer.bind(open(disk.path())),
        Err(BlockError::Bound)
    ));
}

#[test]
fn files_that_do_not_fit_are_refused() {
    let disk = file(4096);
    let small = BlockState {
        capacity_sectors: 7,
        ..state(false)
    };
    assert!(matches!(
        bound(&small, open(disk.path())),
        Err(BlockError::FileTooLarge {
            file: 4096,
            capacity: 3584
        })
    ));
    let read_only = || File::open(disk.path()).unwrap();
    assert!(matches!(
        bound(&state(false), read_only()),
        Err(BlockError::Access)
    ));
    assert!(bound(&state(true), read_only()).is_ok());
    assert!(matches!(
        bound(&state(true), File::open("/").unwrap()),
        Err(BlockError::NotAFile)
    ));
    assert!(matches!(
        bound(&state(true), File::open("/dev/zero").unwrap()),
        Err(BlockError::NotAFile)
    ));
}

#[test]
fn states_that_cannot_be_are_refused() {
    let too_large = BlockState {
        capacity_sectors: 1 << 60,
        ..state(false)
    };
    assert!(matches!(
        Block::restore(&too_large),
        Err(BlockError::CapacityTooLarge(_))
    ));
    let long_id = BlockState {
        id: "x".repeat(21),
        ..state(false)
    };
    assert!(matches!(
        Block::restore(&long_id),
        Err(BlockError::IdTooLong(_))
    ));
}

#[test]
fn the_id_is_padded() {
    let mut guest = boot(true, None);
    let used = guest.request(0, &[header(T_GET_ID, 0), Buffer::In(20), Buffer::In(1)]);
    let (status, id) = answer(used);
    assert_eq!(status, S_OK);
    assert_eq!(id, b"root\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    let used = guest.request(0, &[header(T_GET_ID, 0), Buffer::In(19), Buffer::In(1)]);
    assert_eq!(answer(used).0, S_IOERR);
}

#[test]
fn unknown_requests_are_unsupported() {
    let mut guest = boot(false, None);
    assert_eq!(command(&mut guest, 99, vec![]), S_UNSUPP);
}

#[test]
fn a_request_without_header_or_status_stops_the_device() {
    for buffers in [
        vec![Buffer::In(513)],
        vec![Buffer::Out(vec![0; 15]), Buffer::In(1)],
        vec![header(T_OUT, 0), Buffer::Out(vec![0; 512])],
    ] {
        let mut guest = boot(false, None);
        guest.submit(0, &buffers);
        guest.run();
        assert!(guest.needs_reset());
    }
}

#[test]
fn a_host_that_cannot_write_gives_the_guest_an_error() {
    use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
    let disk = memfd_create("disk", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&disk, 4096).unwrap();
    fcntl_add_seals(&disk, SealFlags::WRITE).unwrap();
    let mut guest = boot(false, Some(File::from(disk)));
    for _ in 0..2 {
        assert_eq!(write(&mut guest, 0, &[1; 512]), S_IOERR);
        assert_eq!(command(&mut guest, T_DISCARD, segment(0, 8, 0)), S_IOERR);
    }
    assert_eq!(read(&mut guest, 0, 512), (S_OK, vec![0; 512]));
    assert!(!guest.needs_reset());
}

#[test]
fn many_requests_at_once_are_all_answered() {
    let disk = file(1 << 20);
    let mut guest = boot(false, Some(open(disk.path())));
    for sector in 0..85 {
        let len = 64 << 10;
        guest.submit(0, &[header(T_IN, sector), Buffer::In(len), Buffer::In(1)]);
    }
    guest.run();
    let answers: Vec<_> = std::iter::from_fn(|| guest.used(0)).map(answer).collect();
    assert_eq!(answers.len(), 85);
    assert!(answers.iter().all(|(status, _)| *status == S_OK));
}
