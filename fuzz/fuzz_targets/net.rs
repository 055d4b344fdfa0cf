//! The network device between a hostile guest and a network that sends anything: frames
//! go through or are dropped, and the device comes to rest.
#![no_main]

use arbitrary::Arbitrary;
use devices::testing::Buffer;
use devices::virtio::{Net, NetState, Rate, RateLimit, RateLimits};
use harness::{Action, Hostile};
use libfuzzer_sys::fuzz_target;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair,
};
use std::num::NonZeroU64;

/// A header before a frame.
#[derive(Arbitrary, Debug)]
struct Header {
    flags: u8,
    gso: u8,
    rest: [u8; 10],
}

#[derive(Arbitrary, Debug)]
enum Step {
    Guest(Action),
    /// The guest sends a frame of the right form, or nearly, in two parts.
    Send {
        header: Header,
        body: Vec<u8>,
        /// That many more bytes.
        padding: u16,
        cut: u8,
    },
    /// The guest has room for frames, in chains of two buffers.
    Room {
        count: u8,
        len: [u16; 2],
    },
    /// The network sends a frame.
    Arrive {
        header: Header,
        body: Vec<u8>,
        padding: u16,
    },
    Raw(Vec<u8>),
    /// The network takes a frame.
    Take,
}

impl Header {
    fn before(&self, body: &[u8], padding: u16) -> Vec<u8> {
        let mut bytes = vec![self.flags, self.gso];
        bytes.extend(self.rest);
        bytes.extend(body);
        bytes.resize(bytes.len() + usize::from(padding), 0);
        bytes
    }
}

/// So slow that a frame or two are all that go.
fn slow() -> RateLimits {
    let rate = Rate {
        per_second: NonZeroU64::MIN,
        burst: 1000,
    };
    let limit = RateLimit {
        bytes: Some(rate),
        frames: None,
    };
    RateLimits {
        from_guest: limit,
        to_guest: limit,
    }
}

fuzz_target!(|input: (bool, Vec<Step>)| {
    let (is_limited, steps) = input;
    let limits = if is_limited {
        slow()
    } else {
        RateLimits::default()
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let (tap, wire) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).expect("a pair");
    let restore = |state: &NetState| {
        let mut device = Net::restore(state).expect("a state of its own");
        let tap = tap.try_clone().expect("a descriptor");
        device.bind(tap, limits).expect("bound");
        device
    };
    let say = |bytes: &[u8]| send(&wire, bytes, SendFlags::NOSIGNAL).ok();
    let mut hostile = Hostile::new(restore(&NetState::default()));
    for step in steps {
        match step {
            Step::Guest(action) => hostile.act(action, restore),
            Step::Send {
                header,
                body,
                padding,
                cut,
            } => {
                let mut head = header.before(&body, padding);
                let tail = head.split_off(head.len().min(cut.into()));
                hostile.submit(1, &[Buffer::Out(head), Buffer::Out(tail)]);
            }
            Step::Room { count, len } => {
                let [first, second] = len.map(|len| Buffer::In(len.into()));
                for _ in 0..count {
                    hostile.submit(0, &[first.clone(), second.clone()]);
                }
            }
            Step::Arrive {
                header,
                body,
                padding,
            } => {
                say(&header.before(&body, padding));
            }
            Step::Raw(bytes) => {
                say(&bytes);
            }
            Step::Take => {
                recv(&wire, &mut [0; 1 << 17][..], RecvFlags::empty()).ok();
            }
        }
    }
    hostile.guest.run();
});
