//! The file system device between a hostile guest and a hostile server: whatever either
//! says, requests end, and a server that is given up stays so.
#![no_main]

use arbitrary::Arbitrary;
use devices::testing::Buffer;
use devices::virtio::{Fs, FsState};
use harness::{Action, Hostile};
use libfuzzer_sys::fuzz_target;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, send, socketpair};
use std::time::Duration;

#[derive(Arbitrary, Debug)]
enum Step {
    Guest(Action),
    /// Of the right form, or nearly.
    Request {
        queue: bool,
        opcode: u8,
        unique: u8,
        lie: u8,
        body: Vec<u8>,
        room: u16,
    },
    /// What the server will have said by then.
    Answer {
        unique: u8,
        error: i16,
        lie: u8,
        body: Vec<u8>,
    },
    Raw(Vec<u8>),
}

fuzz_target!(|steps: Vec<Step>| {
    let flags = SocketFlags::CLOEXEC;
    let (ours, theirs) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).expect("a pair");
    // It says all that it will say ahead.
    set_socket_timeout(&ours, Timeout::Recv, Some(Duration::from_millis(1))).expect("set");
    set_socket_timeout(&ours, Timeout::Send, Some(Duration::from_millis(1))).expect("set");
    let say = |bytes: &[u8]| send(&theirs, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL).ok();
    let mut device = Fs::restore(&FsState {});
    device.bind(ours).expect("bound");
    let mut hostile = Hostile::new(device);
    for step in steps {
        match step {
            Step::Guest(action) => hostile.act(action, Fs::restore),
            Step::Request {
                queue,
                opcode,
                unique,
                lie,
                body,
                room,
            } => {
                let len = (40 + body.len() as u32).wrapping_add(u32::from(lie / 128));
                let mut bytes = len.to_le_bytes().to_vec();
                bytes.extend(u32::from(opcode).to_le_bytes());
                bytes.extend(u64::from(unique).to_le_bytes());
                bytes.extend([0; 24]);
                bytes.extend(body);
                let buffers = [Buffer::Out(bytes), Buffer::In(room.into())];
                hostile.submit(usize::from(queue), &buffers);
            }
            Step::Answer {
                unique,
                error,
                lie,
                body,
            } => {
                let len = (16 + body.len() as u32).wrapping_add(u32::from(lie / 128));
                let mut bytes = len.to_le_bytes().to_vec();
                bytes.extend(i32::from(error).to_le_bytes());
                bytes.extend(u64::from(unique).to_le_bytes());
                bytes.extend(body);
                say(&bytes);
            }
            Step::Raw(bytes) => {
                say(&bytes);
            }
        }
    }
    hostile.guest.run();
});
