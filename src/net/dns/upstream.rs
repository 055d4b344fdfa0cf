//! The host's servers, and one question that one of them is asked.

use super::frames::Frames;
use super::message::{self, Transport};
use rustix::event::PollFlags;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, netdevice, socket_with};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, TcpStream, UdpSocket};
use std::time::Duration;

const PORT: u16 = 53;
/// As many servers as resolv.conf(5) has: MAXNS.
const SERVERS_MAX: usize = 3;

/// Who is asked about names that are not ours, and how patiently.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Upstream {
    /// In the order in which they are asked.
    pub servers: Vec<SocketAddr>,
    /// How long each may take.
    pub timeout: Duration,
    /// How often each is asked.
    pub attempts: u8,
}

impl Upstream {
    /// These servers, of which no more than three are asked, with the times of
    /// resolv.conf(5).
    pub fn new(mut servers: Vec<SocketAddr>) -> Self {
        servers.truncate(SERVERS_MAX);
        Self {
            servers,
            timeout: Duration::from_secs(5),
            attempts: 2,
        }
    }

    /// As resolv.conf(5) has it. A line that says nothing that is known is passed over, as
    /// resolvers do.
    pub fn from_resolv_conf(text: &str) -> Self {
        let mut upstream = Self::new(Vec::new());
        for line in text.lines() {
            let mut words = line.split_ascii_whitespace();
            match words.next() {
                // What follows the address is a remark.
                Some("nameserver") => {
                    let server = words.next().and_then(parse_server);
                    upstream.servers.extend(server);
                }
                Some("options") => words.for_each(|word| upstream.set(word)),
                _ => {}
            }
        }
        upstream.servers.truncate(SERVERS_MAX);
        if upstream.servers.is_empty() {
            let local = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), PORT);
            upstream.servers.push(local);
        }
        upstream
    }

    /// Within the bounds that resolv.conf(5) has.
    fn set(&mut self, option: &str) {
        match option.split_once(':') {
            Some(("timeout", value)) => {
                if let Ok(seconds) = value.parse::<u64>() {
                    self.timeout = Duration::from_secs(seconds.clamp(1, 30));
                }
            }
            Some(("attempts", value)) => {
                if let Ok(count) = value.parse::<u8>() {
                    self.attempts = count.clamp(1, 5);
                }
            }
            _ => {}
        }
    }
}

/// An address; a link-local one has the name or the number of its interface.
fn parse_server(word: &str) -> Option<SocketAddr> {
    let Some((address, scope)) = word.split_once('%') else {
        return Some(SocketAddr::new(word.parse::<IpAddr>().ok()?, PORT));
    };
    let address: Ipv6Addr = address.parse().ok()?;
    let scope = match scope.parse() {
        Ok(number) => number,
        Err(_) => interface(scope)?,
    };
    Some(SocketAddrV6::new(address, PORT, 0, scope).into())
}

fn interface(name: &str) -> Option<u32> {
    let socket = socket(AddressFamily::UNIX, SocketType::DGRAM).ok()?;
    netdevice::name_to_index(&socket, name).ok()
}

fn socket(family: AddressFamily, kind: SocketType) -> rustix::io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    socket_with(family, kind, flags, None)
}

/// A question that one server has been asked. Both its number and the port from which it
/// was asked are new each time, so that whoever does not see it cannot guess what an answer
/// must look like (RFC 5452).
#[derive(Debug)]
pub struct Exchange {
    /// With the number that the server knows it by.
    question: Vec<u8>,
    link: Link,
}

#[derive(Debug)]
enum Link {
    Udp(UdpSocket),
    Tcp(Frames<TcpStream>),
}

/// How many answers that are none are looked at in one turn.
const LIES_MAX: usize = 16;

impl Exchange {
    /// Asks `server`. It waits for nothing.
    ///
    /// # Errors
    /// A server that cannot be reached, as far as is known at once.
    pub fn begin(server: SocketAddr, question: &[u8], transport: Transport) -> io::Result<Self> {
        let mut question = question.to_vec();
        message::set_id(&mut question, random_id()?);
        let (family, kind) = match (server, transport) {
            (SocketAddr::V4(_), Transport::Udp) => (AddressFamily::INET, SocketType::DGRAM),
            (SocketAddr::V4(_), Transport::Tcp) => (AddressFamily::INET, SocketType::STREAM),
            (SocketAddr::V6(_), Transport::Udp) => (AddressFamily::INET6, SocketType::DGRAM),
            (SocketAddr::V6(_), Transport::Tcp) => (AddressFamily::INET6, SocketType::STREAM),
        };
        let socket = socket(family, kind)?;
        // The kernel chooses the port, at random; and passes on nothing from elsewhere.
        match connect(&socket, &server) {
            Ok(()) | Err(Errno::INPROGRESS) => {}
            Err(error) => return Err(error.into()),
        }
        let link = match transport {
            Transport::Udp => {
                let socket = UdpSocket::from(socket);
                socket.send(&question)?;
                Link::Udp(socket)
            }
            Transport::Tcp => {
                let mut frames = Frames::new(TcpStream::from(socket), u16::MAX.into());
                frames.put(&question);
                Link::Tcp(frames)
            }
        };
        Ok(Self { question, link })
    }

    /// What it waits for.
    pub fn interest(&self) -> PollFlags {
        match &self.link {
            Link::Tcp(frames) if frames.is_sending() => PollFlags::OUT,
            Link::Udp(_) | Link::Tcp(_) => PollFlags::IN,
        }
    }

    /// Goes on as far as it can: the answer, if it has come.
    ///
    /// # Errors
    /// A server that is not there, or speaks no DNS.
    pub fn advance(&mut self, buffer: &mut [u8]) -> io::Result<Option<Vec<u8>>> {
        match &mut self.link {
            Link::Udp(socket) => hear(socket, &self.question, buffer),
            Link::Tcp(frames) => {
                frames.send()?;
                if frames.is_sending() {
                    return Ok(None);
                }
                // What came before an end counts.
                let received = frames.receive();
                match frames.take()? {
                    Some(answer) if message::fits(&self.question, &answer) => Ok(Some(answer)),
                    Some(_) => Err(io::ErrorKind::InvalidData.into()),
                    None => received.map(|()| None),
                }
            }
        }
    }
}

/// Passes over what is no answer: it may come from somebody else.
fn hear(socket: &UdpSocket, question: &[u8], buffer: &mut [u8]) -> io::Result<Option<Vec<u8>>> {
    for _ in 0..LIES_MAX {
        match socket.recv(buffer) {
            Ok(len) if message::fits(question, &buffer[..len]) => {
                return Ok(Some(buffer[..len].to_vec()));
            }
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

impl AsFd for Exchange {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.link {
            Link::Udp(socket) => socket.as_fd(),
            Link::Tcp(frames) => frames.stream().as_fd(),
        }
    }
}

fn random_id() -> io::Result<u16> {
    let mut bytes = [0; 2];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    Ok(u16::from_ne_bytes(bytes))
}

#[cfg(test)]
mod tests;
