use super::*;
use crate::testing::{Buffer, FakeGuest, Used, conformance};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, recv, send, socketpair};
use std::thread::JoinHandle;

const OP_LOOKUP: u32 = 1;
const OP_WRITE: u32 = 16;

fn pair() -> (OwnedFd, OwnedFd) {
    let flags = SocketFlags::CLOEXEC;
    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap()
}

/// A guest whose server answers each request by what `serve` makes of it, until there is
/// no more to answer.
fn served(
    serve: impl Fn(&[u8]) -> Option<Vec<u8>> + Send + 'static,
) -> (FakeGuest<Fs>, JoinHandle<Vec<Vec<u8>>>) {
    let (ours, theirs) = pair();
    let server = std::thread::spawn(move || {
        let mut asked = Vec::new();
        let mut buffer = vec![0; PACKET_MAX];
        loop {
            let (_, len) = recv(&theirs, &mut buffer[..], RecvFlags::empty()).unwrap();
            if len == 0 {
                return asked;
            }
            asked.push(buffer[..len].to_vec());
            if let Some(answer) = serve(&buffer[..len]) {
                send(&theirs, &answer, SendFlags::NOSIGNAL).unwrap();
            }
        }
    });
    let mut device = Fs::restore(&FsState {});
    device.bind(ours).unwrap();
    (FakeGuest::boot(device), server)
}

fn request(opcode: u32, unique: u64, data: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; IN_HEADER];
    bytes[..4].copy_from_slice(&((IN_HEADER + data.len()) as u32).to_le_bytes());
    bytes[4..8].copy_from_slice(&opcode.to_le_bytes());
    bytes[8..16].copy_from_slice(&unique.to_le_bytes());
    bytes.extend(data);
    bytes
}

fn answer(unique: u64, error: i32, data: &[u8]) -> Vec<u8> {
    let mut bytes = ((OUT_HEADER + data.len()) as u32).to_le_bytes().to_vec();
    bytes.extend(error.to_le_bytes());
    bytes.extend(unique.to_le_bytes());
    bytes.extend(data);
    bytes
}

fn unique_of(request: &[u8]) -> u64 {
    u64::from_le_bytes(request[8..16].try_into().unwrap())
}

/// The error of an answer, and what follows its header.
fn read(used: &Used, unique: u64) -> (i32, Vec<u8>) {
    let header = &used.data[..OUT_HEADER];
    assert_eq!(header[..4], (used.len as u32).to_le_bytes());
    assert_eq!(header[8..], unique.to_le_bytes());
    let error = i32::from_le_bytes(header[4..8].try_into().unwrap());
    (error, used.data[OUT_HEADER..used.len].to_vec())
}

/// A lookup that has an answer, and its answer.
fn lookup(guest: &mut FakeGuest<Fs>, unique: u64) -> (i32, Vec<u8>) {
    let out = Buffer::Out(request(OP_LOOKUP, unique, b"name\0"));
    let used = guest.request(1, &[out, Buffer::In(OUT_HEADER), Buffer::In(64)]);
    read(&used, unique)
}

const EIO: i32 = -5;

#[test]
fn conforms() {
    conformance(&FsState {}, Fs::restore, |guest| {
        assert_eq!(lookup(guest, 7), (EIO, vec![]));
    });
}

#[test]
fn the_guest_finds_the_tag_and_one_queue_of_requests() {
    let guest = FakeGuest::boot(Fs::default());
    let config = guest.config::<40>(0);
    assert_eq!(&config[..8], b"volumes\0");
    assert_eq!(config[36..], [1, 0, 0, 0]);
}

#[test]
fn requests_are_carried_whole_and_answers_come_back() {
    let (mut guest, server) = served(|asked| {
        let data = asked[IN_HEADER..]
            .iter()
            .rev()
            .copied()
            .collect::<Vec<u8>>();
        Some(answer(unique_of(asked), 0, &data))
    });
    let data: Vec<u8> = (0..128 << 10).map(|n| (n % 251) as u8).collect();
    let whole = request(OP_WRITE, 1, &data);
    let (first, rest) = whole.split_at(60);
    let (second, third) = rest.split_at(65_000);
    let parts = [first, second, third].map(|part| Buffer::Out(part.to_vec()));
    let room = [10, 6, 65_536, 65_536].map(Buffer::In);
    let used = guest.request(1, &[&parts[..], &room[..]].concat());
    let reversed: Vec<u8> = data.iter().rev().copied().collect();
    assert_eq!(read(&used, 1), (0, reversed));
    assert_eq!(lookup(&mut guest, 2), (0, b"\0eman".to_vec()));
    drop(guest);
    assert_eq!(server.join().unwrap()[0], whole);
}

#[test]
fn what_wants_no_answer_waits_for_none() {
    let (mut guest, server) = served(|asked| {
        let opcode = u32::from_le_bytes(asked[4..8].try_into().unwrap());
        (opcode == OP_LOOKUP).then(|| answer(unique_of(asked), -2, &[]))
    });
    for opcode in [OP_FORGET, OP_BATCH_FORGET, OP_INTERRUPT] {
        let used = guest.request(0, &[Buffer::Out(request(opcode, 0, &[0; 8]))]);
        assert_eq!(used.len, 0);
    }
    assert_eq!(lookup(&mut guest, 9), (-2, vec![]));
    drop(guest);
    assert_eq!(server.join().unwrap().len(), 4);
}

#[test]
fn a_request_that_is_not_as_long_as_it_says_reaches_nobody() {
    let (mut guest, server) = served(|asked| Some(answer(unique_of(asked), 0, &[])));
    let mut lies = request(OP_LOOKUP, 3, b"name\0");
    lies[0] += 1;
    let used = guest.request(1, &[Buffer::Out(lies), Buffer::In(OUT_HEADER)]);
    assert_eq!(read(&used, 3), (-22, vec![]));
    let long = request(OP_WRITE, 4, &vec![0; PACKET_MAX]);
    let parts: Vec<Buffer> = long
        .chunks(60_000)
        .map(|p| Buffer::Out(p.to_vec()))
        .collect();
    let used = guest.request(1, &[&parts[..], &[Buffer::In(OUT_HEADER)]].concat());
    assert_eq!(read(&used, 4), (-22, vec![]));
    assert!(!guest.needs_reset());
    drop(guest);
    assert!(server.join().unwrap().is_empty());
}

#[test]
fn a_request_without_header_or_room_for_one_stops_the_device() {
    for buffers in [
        vec![Buffer::Out(vec![0; IN_HEADER - 1]), Buffer::In(64)],
        vec![
            Buffer::Out(request(OP_LOOKUP, 1, &[])),
            Buffer::In(OUT_HEADER - 1),
        ],
        vec![Buffer::Out(request(OP_LOOKUP, 1, &[]))],
    ] {
        let mut guest = FakeGuest::boot(Fs::default());
        guest.submit(1, &buffers);
        guest.run();
        assert!(guest.needs_reset());
    }
}

#[test]
fn a_server_that_does_not_answer_what_was_asked_is_given_up() {
    let odd: [fn(u64) -> Vec<u8>; 6] = [
        |unique| answer(unique + 1, 0, &[]),
        |unique| answer(unique, 1, &[]),
        |unique| answer(unique, -512, &[]),
        |unique| answer(unique, 0, &[0; 65]),
        |unique| answer(unique, 0, &[])[..15].to_vec(),
        |unique| [answer(unique, 0, &[]), vec![0]].concat(),
    ];
    for odd in odd {
        let (mut guest, server) = served(move |asked| Some(odd(unique_of(asked))));
        assert_eq!(lookup(&mut guest, 1), (EIO, vec![]));
        assert!(!guest.device().device().has_server());
        assert_eq!(lookup(&mut guest, 2), (EIO, vec![]));
        assert!(!guest.needs_reset());
        assert_eq!(server.join().unwrap().len(), 1);
    }
}

#[test]
fn a_dead_or_silent_server_is_an_error_to_the_guest() {
    let (ours, theirs) = pair();
    let mut device = Fs::default();
    device.bind(ours).unwrap();
    drop(theirs);
    let mut guest = FakeGuest::boot(device);
    assert_eq!(lookup(&mut guest, 1), (EIO, vec![]));

    let (ours, theirs) = pair();
    let timeout = Some(std::time::Duration::from_millis(10));
    let kind = rustix::net::sockopt::Timeout::Recv;
    rustix::net::sockopt::set_socket_timeout(&ours, kind, timeout).unwrap();
    let mut device = Fs::default();
    device.bind(ours).unwrap();
    let mut guest = FakeGuest::boot(device);
    assert_eq!(lookup(&mut guest, 1), (EIO, vec![]));
    assert!(!guest.device().device().has_server());
    drop(theirs);
}

#[test]
fn a_claim_is_the_monitors_alone() {
    let (mut guest, server) = served(|asked| Some(answer(unique_of(asked), 0, &[])));
    let used = guest.request(
        1,
        &[
            Buffer::Out(request(OP_CLAIM, 0, &[])),
            Buffer::In(OUT_HEADER),
        ],
    );
    assert_eq!(read(&used, 0), (-38, vec![]));
    let (_kept, claim) = pair();
    guest.device().device_mut().claim(claim).unwrap();
    assert_eq!(lookup(&mut guest, 1), (0, vec![]));
    drop(guest);
    let asked = server.join().unwrap();
    assert_eq!(asked[0], request(OP_CLAIM, 0, &[]));
    assert_eq!(asked.len(), 2);

    // One that has too many goes on.
    let (mut guest, server) = served(|asked| {
        let is_claim = asked == request(OP_CLAIM, 0, &[]);
        Some(answer(
            unique_of(asked),
            if is_claim { -23 } else { 0 },
            &[],
        ))
    });
    for _ in 0..2 {
        let (_kept, claim) = pair();
        let refused = guest.device().device_mut().claim(claim).unwrap_err();
        assert!(
            refused.to_string().contains("Too many open files"),
            "{refused}"
        );
    }
    assert_eq!(lookup(&mut guest, 1), (0, vec![]));
    drop(guest);
    assert_eq!(server.join().unwrap().len(), 3);

    // One that answers something else may answer this later.
    let (guest, server) = served(|asked| Some(answer(unique_of(asked) + 1, 0, &[])));
    for _ in 0..2 {
        let (_kept, claim) = pair();
        assert!(guest.device().device_mut().claim(claim).is_err());
        assert!(!guest.device().device().has_server());
    }
    assert_eq!(server.join().unwrap().len(), 1);
}

#[test]
fn only_one_server_and_only_packets() {
    let (one, two) = pair();
    let mut device = Fs::default();
    let file = std::fs::File::open("/dev/null").unwrap();
    assert!(matches!(device.bind(file.into()), Err(FsError::NotPackets)));
    let (stream, _) = std::os::unix::net::UnixStream::pair().unwrap();
    assert!(matches!(
        device.bind(stream.into()),
        Err(FsError::NotPackets)
    ));
    device.bind(one).unwrap();
    assert!(matches!(device.bind(two), Err(FsError::Bound)));
}
