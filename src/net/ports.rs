//! Published ports on the host: each is a socket that is bound, so nobody else has it, and
//! a proxy behind it for whoever asks from the host itself. What comes from outside the
//! kernel translates, and the socket never sees it (`firewall::of_host`).

use super::namespace::Namespace;
use super::proxy;
use super::publish::{Protocol, Publish};
use super::service::Service;
use anyhow::{Context, Result, anyhow};
use fork::addresses;
use rustix::fd::AsFd;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

/// How often another free port is tried, if a port is to be free in both families.
const TRIES: usize = 16;

/// How long the guest may take to answer a proxy's connection.
const CONNECT_PATIENCE: Duration = Duration::from_secs(10);

/// The published ports of a container.
#[derive(Default)]
pub struct Published {
    ports: Vec<Publish>,
    _services: Vec<Service>,
}

impl Published {
    /// Which they are, none of them zero.
    pub fn ports(&self) -> &[Publish] {
        &self.ports
    }
}

/// Binds and serves them, for the guest behind a namespace.
///
/// # Errors
/// A port that somebody else has.
pub fn publish(wanted: &[Publish], namespace: &Namespace) -> Result<Published> {
    let mut published = Published::default();
    for one in wanted {
        let one = one_published(*one, namespace, &mut published)?;
        published.ports.push(one);
    }
    Ok(published)
}

fn one_published(
    mut wanted: Publish,
    namespace: &Namespace,
    published: &mut Published,
) -> Result<Publish> {
    let (sockets, port) = bind(&wanted)?;
    wanted.host_port = port;
    let guest = SocketAddr::from((addresses::IPV4, wanted.container_port));
    for socket in sockets {
        let namespace = Arc::new(
            namespace
                .try_clone()
                .context("cannot duplicate a namespace")?,
        );
        published._services.push(match socket {
            Socket::Tcp(listener) => {
                let connect = move || {
                    namespace.within(|| TcpStream::connect_timeout(&guest, CONNECT_PATIENCE))
                };
                proxy::serve_tcp(listener, Arc::new(connect))?
            }
            Socket::Udp(socket) => {
                let connect = move || namespace.within(|| connected(guest));
                proxy::serve_udp(socket, Arc::new(connect))?
            }
        });
    }
    Ok(wanted)
}

fn connected(guest: SocketAddr) -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind(SocketAddr::from(([0, 0, 0, 0], 0)))?;
    socket.connect(guest)?;
    Ok(socket)
}

enum Socket {
    Tcp(TcpListener),
    Udp(UdpSocket),
}

impl Socket {
    fn bind(protocol: Protocol, address: SocketAddr) -> io::Result<Self> {
        Ok(match protocol {
            Protocol::Tcp => Self::Tcp(TcpListener::bind(address)?),
            Protocol::Udp => Self::Udp(UdpSocket::bind(address)?),
        })
    }

    fn port(&self) -> io::Result<u16> {
        let address = match self {
            Self::Tcp(socket) => socket.local_addr()?,
            Self::Udp(socket) => socket.local_addr()?,
        };
        Ok(address.port())
    }
}

/// The sockets of a port, in both families if no address was named, and the port.
fn bind(wanted: &Publish) -> Result<(Vec<Socket>, u16)> {
    let mut refused = None;
    for _ in 0..TRIES {
        match bind_once(wanted) {
            // The port was free in one family only.
            Err(error) if wanted.host_port == 0 && error.kind() == ErrorKind::AddrInUse => {
                refused = Some(error);
            }
            done => return done.map_err(|error| failed(wanted, &error)),
        }
    }
    let refused = refused.unwrap_or_else(|| ErrorKind::AddrInUse.into());
    Err(failed(wanted, &refused))
}

fn bind_once(wanted: &Publish) -> io::Result<(Vec<Socket>, u16)> {
    let first = Socket::bind(
        wanted.protocol,
        SocketAddr::new(wanted.host, wanted.host_port),
    )?;
    let port = first.port()?;
    let mut sockets = vec![first];
    let is_any = wanted.host.is_unspecified() && wanted.host.is_ipv4();
    if is_any && super::namespace::has_ipv6() {
        sockets.push(bind_ipv6_only(wanted.protocol, port)?);
    }
    Ok((sockets, port))
}

/// std's sockets of IPv6 are of both families where the host has them so.
fn bind_ipv6_only(protocol: Protocol, port: u16) -> io::Result<Socket> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, listen, socket_with, sockopt};
    let kind = match protocol {
        Protocol::Tcp => SocketType::STREAM,
        Protocol::Udp => SocketType::DGRAM,
    };
    let socket = socket_with(AddressFamily::INET6, kind, SocketFlags::CLOEXEC, None)?;
    sockopt::set_ipv6_v6only(&socket, true)?;
    if protocol == Protocol::Tcp {
        sockopt::set_socket_reuseaddr(&socket, true)?;
    }
    let address = SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), port);
    bind(socket.as_fd(), &address)?;
    Ok(match protocol {
        Protocol::Tcp => {
            // As std has it.
            listen(&socket, 128)?;
            Socket::Tcp(socket.into())
        }
        Protocol::Udp => Socket::Udp(socket.into()),
    })
}

fn failed(wanted: &Publish, error: &io::Error) -> anyhow::Error {
    let address = SocketAddr::new(wanted.host, wanted.host_port);
    match error.kind() {
        ErrorKind::AddrInUse => anyhow!(
            "cannot publish {address}/{}: the port is taken; choose another, or stop whoever has it",
            wanted.protocol.word()
        ),
        _ => anyhow!(
            "cannot publish {address}/{}: {error}",
            wanted.protocol.word()
        ),
    }
}
