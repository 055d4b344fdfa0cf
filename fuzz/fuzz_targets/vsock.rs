//! Packets and connections, with a host that does as it likes as well.
#![no_main]

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use arbitrary::Arbitrary;
use devices::testing::Buffer;
use devices::virtio::vsock::FIRST_PORT;
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
    /// Connects, and the guest accepts.
    Establish {
        buf_alloc: u32,
    },
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
    /// Number of ports that the host has used.
    ports: u32,
}

impl World {
    fn stream(&mut self, index: u8) -> Option<&mut UnixStream> {
        let count = self.streams.len().max(1);
        self.streams.get_mut(usize::from(index) % count)
    }

    fn connect(&mut self) {
        let connected = self.hostile.guest.device().device_mut().connect(PORT);
        if let Ok(stream) = connected {
            stream.set_nonblocking(true).expect("non-blocking");
            self.streams.push(stream);
            self.ports += 1;
        }
    }

    /// Makes a packet of the guest available.
    fn packet(&mut self, port: u32, op: u8, flags: u8, credit: [u32; 2], len: u32, payload: &[u8]) {
        let mut packet = Vec::new();
        packet.extend(GUEST_CID.to_le_bytes());
        packet.extend(HOST_CID.to_le_bytes());
        packet.extend(PORT.to_le_bytes());
        packet.extend(port.to_le_bytes());
        packet.extend(len.to_le_bytes());
        packet.extend(1u16.to_le_bytes());
        packet.extend(u16::from(op).to_le_bytes());
        packet.extend(u32::from(flags).to_le_bytes());
        packet.extend(credit.map(u32::to_le_bytes).concat());
        packet.extend(payload);
        self.hostile.submit(1, &[Buffer::Out(packet)]);
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
                let port = FIRST_PORT + u32::from(connection) % self.ports.max(1);
                self.packet(port, op % 9, flags, [buf_alloc, fwd_cnt], len, &payload);
            }
            Step::Room(room) => self.hostile.submit(0, &[Buffer::In(room.into())]),
            Step::Connect => self.connect(),
            Step::Establish { buf_alloc } => {
                self.connect();
                self.hostile.submit(0, &[Buffer::In(4096)]);
                self.hostile.guest.run();
                let port = FIRST_PORT + self.ports.saturating_sub(1);
                self.packet(port, 2, 0, [buf_alloc, 0], 0, &[]);
                self.hostile.guest.run();
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
        ports: 0,
    };
    for step in steps {
        world.step(step);
    }
    world.hostile.guest.run();
    world.streams.clear();
    world.hostile.guest.run();
});
