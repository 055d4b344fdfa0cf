//! What becomes of a frozen container's connections in a child.
//!
//! Their other ends speak to the parent, or to nobody: a program that waits for an answer
//! would wait in vain. So the connections of TCP that lead out of the guest are aborted
//! before the container runs (Linux net/ipv4/inet_diag.c, `SOCK_DESTROY`): the next call
//! on each fails with ECONNABORTED, and whoever polls it is woken. Connections within the
//! guest go on, as do sockets that listen.
//!
//! A socket of UDP that is connected has a peer, but no connection: what it sends goes
//! out by the child's own network, and answers come back by it. The sockets of vsock that
//! lead to the host end by themselves, for the device says that it was reset.

use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, send, socket_with,
};
use std::collections::BTreeSet;
use std::io;
use vm_run_abi::network;

/// Messages of netlink (linux/netlink.h, linux/sock_diag.h) and their flags.
const ERROR: u16 = 2;
const DONE: u16 = 3;
const LIST: u16 = 20;
const DESTROY: u16 = 21;
const REQUEST: u16 = 1;
const ACK: u16 = 4;
const DUMP: u16 = 0x300;

/// `struct nlmsghdr`, `struct inet_diag_sockid`, and the part of `struct inet_diag_msg`
/// that is looked at (linux/inet_diag.h), in bytes.
const HEADER: usize = 16;
const ID: usize = 48;
const FOUND: usize = 4 + ID;

const TCP: u8 = 6;

/// The states (include/net/tcp_states.h) in which a program has a connection, or is about
/// to: all but TIME_WAIT (6), CLOSE (7), LISTEN (10), and one that no socket is in.
const CONNECTED: u32 = 0x1fff & !(1 | 1 << 6 | 1 << 7 | 1 << 10);

/// As many bytes as the kernel puts into one answer.
const ANSWER: usize = 32 << 10;

/// A socket of TCP, as the kernel names it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Socket {
    family: u8,
    id: [u8; ID],
}

/// Aborts the connections in the calling process's network namespace that lead out of
/// the guest. A kernel of a user's own that cannot do so (`CONFIG_INET_DIAG_DESTROY`)
/// leaves them as they are.
pub fn reset() -> io::Result<()> {
    let kind = SocketFlags::CLOEXEC;
    let kernel = match socket_with(
        AddressFamily::NETLINK,
        SocketType::RAW,
        kind,
        Some(netlink::SOCK_DIAG),
    ) {
        Ok(kernel) => kernel,
        Err(Errno::PROTONOSUPPORT) => return Ok(()),
        Err(e) => return Err(e.into()),
    };
    let mut found = Vec::new();
    for family in [AddressFamily::INET, AddressFamily::INET6] {
        list(&kernel, family.as_raw() as u8, &mut found)?;
    }
    for socket in outgoing(&found) {
        let request = request(DESTROY, REQUEST | ACK, socket.family, &socket.id);
        send(&kernel, &request, SendFlags::empty())?;
        match acknowledged(&kernel) {
            // Gone meanwhile, or a kernel that cannot.
            Ok(()) | Err(Errno::NOENT | Errno::OPNOTSUPP) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

/// Those whose other end is not in this guest.
fn outgoing(all: &[Socket]) -> impl Iterator<Item = &Socket> {
    let mut own: BTreeSet<[u8; 16]> = all.iter().map(Socket::source).collect();
    own.extend([mapped(network::IPV4), network::IPV6]);
    all.iter().filter(move |socket| {
        let peer = socket.destination();
        !is_loopback(peer) && !own.contains(&peer)
    })
}

impl Socket {
    fn source(&self) -> [u8; 16] {
        self.address(4)
    }

    fn destination(&self) -> [u8; 16] {
        self.address(20)
    }

    /// As an address of IPv6.
    fn address(&self, at: usize) -> [u8; 16] {
        let mut address = [0; 16];
        address.copy_from_slice(&self.id[at..at + 16]);
        if AddressFamily::from_raw(self.family.into()) == AddressFamily::INET {
            let [a, b, c, d, ..] = address;
            address = mapped([a, b, c, d]);
        }
        address
    }
}

fn mapped(address: [u8; 4]) -> [u8; 16] {
    std::net::Ipv4Addr::from(address).to_ipv6_mapped().octets()
}

fn is_loopback(address: [u8; 16]) -> bool {
    let address = std::net::Ipv6Addr::from(address);
    let ipv4 = address.to_ipv4_mapped();
    address.is_loopback() || ipv4.is_some_and(|ipv4| ipv4.is_loopback())
}

/// Adds all connected sockets of a family. None for a kernel that cannot tell.
fn list(kernel: &OwnedFd, family: u8, found: &mut Vec<Socket>) -> io::Result<()> {
    let request = request(LIST, REQUEST | DUMP, family, &[0; ID]);
    send(kernel, &request, SendFlags::empty())?;
    let mut answer = vec![0; ANSWER];
    loop {
        let (len, _) = recv(kernel, &mut answer[..], RecvFlags::empty())?;
        for (kind, body) in messages(&answer[..len]) {
            match kind {
                DONE => return Ok(()),
                ERROR => {
                    return match error(body) {
                        Ok(()) | Err(Errno::NOENT) => Ok(()),
                        Err(e) => Err(e.into()),
                    };
                }
                _ => found.extend(socket(body)),
            }
        }
    }
}

fn acknowledged(kernel: &OwnedFd) -> rustix::io::Result<()> {
    let mut answer = [0; 256];
    let (len, _) = recv(kernel, &mut answer[..], RecvFlags::empty())?;
    match messages(&answer[..len]).next() {
        Some((ERROR, body)) => error(body),
        _ => Err(Errno::PROTO),
    }
}

/// A request of `struct inet_diag_req_v2`.
fn request(kind: u16, flags: u16, family: u8, id: &[u8; ID]) -> [u8; HEADER + 8 + ID] {
    let mut bytes = [0; HEADER + 8 + ID];
    let len = bytes.len() as u32;
    bytes[..4].copy_from_slice(&len.to_ne_bytes());
    bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
    bytes[6..8].copy_from_slice(&flags.to_ne_bytes());
    bytes[HEADER] = family;
    bytes[HEADER + 1] = TCP;
    bytes[HEADER + 4..HEADER + 8].copy_from_slice(&CONNECTED.to_ne_bytes());
    bytes[HEADER + 8..].copy_from_slice(id);
    bytes
}

/// The messages of an answer: kind and body.
fn messages(mut answer: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let header = answer.get(..HEADER)?;
        let len = u32::from_ne_bytes(header[..4].try_into().ok()?) as usize;
        let kind = u16::from_ne_bytes(header[4..6].try_into().ok()?);
        let body = answer.get(HEADER..len)?;
        answer = answer.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, body))
    })
}

/// What an error says; zero is none.
fn error(body: &[u8]) -> rustix::io::Result<()> {
    let number = body.get(..4).and_then(|bytes| bytes.try_into().ok());
    match number.map(i32::from_ne_bytes) {
        Some(0) => Ok(()),
        Some(number) => Err(Errno::from_raw_os_error(-number)),
        None => Err(Errno::PROTO),
    }
}

fn socket(body: &[u8]) -> Option<Socket> {
    let found = body.get(..FOUND)?;
    Some(Socket {
        family: found[0],
        id: found[4..].try_into().ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::net::{IpAddr, TcpListener, TcpStream};

    fn connection(from: &str, to: &str) -> Socket {
        let parse = |text: &str| text.parse::<IpAddr>().expect("an address");
        let mut id = [0; ID];
        let mut family = AddressFamily::INET;
        for (at, address) in [(4, parse(from)), (20, parse(to))] {
            match address {
                IpAddr::V4(ipv4) => id[at..at + 4].copy_from_slice(&ipv4.octets()),
                IpAddr::V6(ipv6) => {
                    family = AddressFamily::INET6;
                    id[at..at + 16].copy_from_slice(&ipv6.octets());
                }
            }
        }
        Socket {
            family: family.as_raw() as u8,
            id,
        }
    }

    #[test]
    fn only_what_leads_out_of_the_guest_is_aborted() {
        let within = [
            ("127.0.0.1", "127.0.0.1"),
            ("::1", "::1"),
            ("::ffff:127.0.0.1", "::ffff:127.0.0.2"),
            // To itself, by its address on the network; and by one of a bridge of its own.
            ("192.0.0.2", "192.0.0.2"),
            ("172.17.0.1", "172.17.0.1"),
            ("::ffff:172.17.0.1", "::ffff:172.17.0.1"),
        ];
        let out = [
            ("192.0.0.2", "192.0.0.1"),
            ("::ffff:192.0.0.2", "::ffff:198.51.100.7"),
            ("fd76:6d72:756e::2", "2001:db8::1"),
        ];
        let of = |pairs: &[(&str, &str)]| -> Vec<Socket> {
            pairs
                .iter()
                .map(|(from, to)| connection(from, to))
                .collect()
        };
        let all = [of(&within), of(&out)].concat();
        let found: Vec<Socket> = outgoing(&all).cloned().collect();
        assert_eq!(found, of(&out));
    }

    #[test]
    fn the_kernel_lists_connections() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("listens");
        let address = listener.local_addr().expect("has one");
        let mut stream = TcpStream::connect(address).expect("connects");
        let kind = SocketFlags::CLOEXEC;
        let (family, protocol) = (AddressFamily::NETLINK, Some(netlink::SOCK_DIAG));
        let kernel = socket_with(family, SocketType::RAW, kind, protocol).expect("netlink");
        let mut found = Vec::new();
        list(&kernel, AddressFamily::INET.as_raw() as u8, &mut found).expect("lists");
        let port = address.port().to_be_bytes();
        let to_it = found.iter().filter(|socket| socket.id[2..4] == port);
        assert_eq!(to_it.count(), 1);
        drop(listener);
        stream.read(&mut [0]).expect_err("was not accepted");
    }

    #[test]
    fn an_answer_that_is_cut_short_ends_there() {
        let mut answer = request(ERROR, 0, 0, &[0; ID]).to_vec();
        assert_eq!(messages(&answer).count(), 1);
        answer.extend([9; 8]);
        assert_eq!(messages(&answer).count(), 1);
        assert_eq!(messages(&answer[..HEADER + 1]).count(), 0);
        answer[..4].fill(0);
        assert_eq!(messages(&answer).count(), 0);
        assert_eq!(socket(&[0; FOUND - 1]), None);
        assert_eq!(error(&[0; 3]), Err(Errno::PROTO));
    }
}
