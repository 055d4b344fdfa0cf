//! Packets and connections, with a host that does as it likes as well.
#![no_main]

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use arbitrary::Arbitrary;
use devices::virtio::{Vsock, VsockState};
use harness::{Action, Hostile};
use libfuzzer_sys::fuzz_target;

const GUEST_CID: u64 = 3;
const HOST_CID: u64 = 2;
const PORT: u32 = 52;

/// What happens next.
#[derive(Arbitrary, Debug)]
enum Step {
    Guest(Action),
    /// A packet that is addressed right.
    Packet {
        connection: u8,
        op: u8,
        flags: u8,
        buf_alloc: u32,
        fwd_cnt: u32,
        payload: u16,
        /// Added to the length in the header.
        lie: u8,
    },
    /// Room for a packet of the device.
    Room(u16),
    Connect,
    HostWrite {
        connection: u8,
        len: u16,
    },
    HostRead {
        connection: u8,
        len: u16,
    },
    HostShutdown {
        connection: u8,
        read: bool,
    },
    HostDrop {
        connection: u8,
    },
}

fn restore(state: &VsockState) -> Vsock {
    Vsock::restore(state).expect("a good state")
}

struct World {
    hostile: Hostile<Vsock>,
    streams: Vec<UnixStream>,
}

impl World {
    fn stream(&mut self, index: u8) -> Option<&mut UnixStream> {
        let count = self.streams.len().max(1);
        self.streams.get_mut(usize::from(index) % count)
    }

    /// Makes one buffer available, with `bytes` for the device or `room` of it.
    fn submit(&mut self, queue: usize, bytes: &[u8], room: u16) {
        let guest = &mut self.hostile.guest;
        if !guest.is_set_up() || guest.room(queue) == 0 {
            return;
        }
        let buffer = if bytes.is_empty() {
            devices::testing::Buffer::In(room.into())
        } else {
            devices::testing::Buffer::Out(bytes.to_vec())
        };
        let head = guest.make_chain(queue, &[buffer]);
        guest.make_available(queue, head);
        guest.write(0x50, queue as u32);
    }

    fn step(&mut self, step: Step) {
        // A host that fails to read or write is one more thing that may happen.
        match step {
            Step::Guest(action) => self.hostile.act(action, restore),
            Step::Packet {
                connection,
                op,
                flags,
                buf_alloc,
                fwd_cnt,
                payload,
                lie,
            } => {
                let payload = vec![7; usize::from(payload)];
                let len = payload.len() as u32 + u32::from(lie / 250);
                let mut packet = Vec::new();
                packet.extend(GUEST_CID.to_le_bytes());
                packet.extend(HOST_CID.to_le_bytes());
                packet.extend(PORT.to_le_bytes());
                packet.extend((1024 + u32::from(connection % 8)).to_le_bytes());
                packet.extend(len.to_le_bytes());
                packet.extend(1u16.to_le_bytes());
                packet.extend(u16::from(op % 9).to_le_bytes());
                packet.extend(u32::from(flags).to_le_bytes());
                packet.extend(buf_alloc.to_le_bytes());
                packet.extend(fwd_cnt.to_le_bytes());
                packet.extend(payload);
                self.submit(1, &packet, 0);
            }
            Step::Room(room) => self.submit(0, &[], room),
            Step::Connect => {
                let connected = self.hostile.guest.device().device_mut().connect(PORT);
                if let Ok(stream) = connected {
                    stream.set_nonblocking(true).expect("non-blocking");
                    self.streams.push(stream);
                }
            }
            Step::HostWrite { connection, len } => {
                if let Some(stream) = self.stream(connection) {
                    stream.write(&vec![9; len.into()]).ok();
                }
            }
            Step::HostRead { connection, len } => {
                if let Some(stream) = self.stream(connection) {
                    stream.read(&mut vec![0; len.into()]).ok();
                }
            }
            Step::HostShutdown { connection, read } => {
                let how = if read {
                    Shutdown::Read
                } else {
                    Shutdown::Write
                };
                if let Some(stream) = self.stream(connection) {
                    stream.shutdown(how).ok();
                }
            }
            Step::HostDrop { connection } => {
                if !self.streams.is_empty() {
                    let index = usize::from(connection) % self.streams.len();
                    self.streams.swap_remove(index);
                }
            }
        }
    }
}

fuzz_target!(|steps: Vec<Step>| {
    let mut world = World {
        hostile: Hostile::new(restore(&VsockState::default())),
        streams: Vec::new(),
    };
    for step in steps {
        world.step(step);
    }
    world.hostile.guest.run();
    world.streams.clear();
    world.hostile.guest.run();
});
