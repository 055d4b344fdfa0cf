//! What a guest asks its name server, by either transport, and what a stranger's server
//! answers.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use message::{Names, Transport, Verdict};
use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

// The server is part of the program, which has no library.
#[allow(dead_code)]
#[path = "../../src/net/dns/frames.rs"]
mod frames;
#[allow(dead_code)]
#[path = "../../src/net/dns/message.rs"]
mod message;

/// Every name is ours that begins with one letter, and every other address.
struct Network;

impl Names for Network {
    fn addresses(&self, name: &str) -> Option<Vec<IpAddr>> {
        assert_eq!(name, name.to_ascii_lowercase());
        let count = match name.bytes().next()? {
            b'a' => 0,
            b'b' => 2,
            b'c' => 300,
            _ => return None,
        };
        let ours = (0..count).map(|n: u16| match n % 2 {
            0 => Ipv4Addr::from_bits(n.into()).into(),
            _ => Ipv6Addr::from_bits(n.into()).into(),
        });
        Some(ours.collect())
    }

    fn name_of(&self, address: IpAddr) -> Option<String> {
        match address {
            IpAddr::V4(it) if it.to_bits() % 2 == 0 => Some("some.name".into()),
            IpAddr::V6(it) if it.to_bits() % 2 == 0 => Some("no..name".into()),
            _ => None,
        }
    }
}

#[derive(Arbitrary, Debug)]
enum Input<'a> {
    Datagram(&'a [u8]),
    /// What is read at once.
    Stream(Vec<&'a [u8]>),
    /// A question, and what comes as an answer to it.
    Answer(&'a [u8], &'a [u8]),
}

/// The guest's end of a stream.
struct Pieces<'a>(std::vec::IntoIter<&'a [u8]>);

impl Read for Pieces<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut piece = self.0.next().ok_or(ErrorKind::WouldBlock)?;
        piece.read(buffer)
    }
}

impl Write for Pieces<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What we say is an answer, and no longer than it may be.
fn ask(question: &[u8], transport: Transport) -> Option<Vec<u8>> {
    match message::judge(question, transport, &Network) {
        Verdict::Drop => None,
        Verdict::Answer(answer) => {
            let most = match transport {
                Transport::Udp => 1232,
                Transport::Tcp => usize::from(u16::MAX),
            };
            assert!((message::HEADER..=most).contains(&answer.len()));
            assert_eq!(message::id(&answer), message::id(question));
            Some(answer)
        }
        Verdict::Forward => {
            let failed = message::refuse(question, domain::base::iana::Rcode::SERVFAIL)
                .expect("a question was read");
            assert!(message::fits(question, &failed));
            Some(failed)
        }
    }
}

fuzz_target!(|input: Input| {
    match input {
        Input::Datagram(bytes) => {
            ask(bytes, Transport::Udp);
        }
        Input::Stream(pieces) => {
            let mut frames = frames::Frames::new(Pieces(pieces.into_iter()), message::QUESTION_MAX);
            while frames.receive().is_ok() {
                match frames.take() {
                    Ok(Some(question)) => {
                        if let Some(answer) = ask(&question, Transport::Tcp) {
                            frames.put(&answer);
                            frames.send().expect("taken");
                        }
                    }
                    Ok(None) | Err(_) => break,
                }
            }
        }
        Input::Answer(question, answer) => {
            if message::fits(question, answer) {
                let mut answer = answer.to_vec();
                message::set_id(&mut answer, 7);
                assert_eq!(message::id(&answer), Some(7));
                message::is_failure(&answer);
            }
        }
    }
});
