//! Datagrams: each client has a socket of its own to the guest, so that what the guest
//! answers finds its way back.

use crate::bell::Bell;
use crate::net::service::{Service, Watch};
use rustix::event::epoll::EventFlags;
use std::collections::{BTreeMap, HashMap};
use std::io::{self, ErrorKind};
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Clients at once. The one that has been silent for longest makes room for a new one.
const CLIENTS_MAX: usize = 1024;
/// A client that is silent for so long, as is the guest, is forgotten.
const IDLE: Duration = Duration::from_secs(60);
/// Datagrams taken from one socket before others get their turn.
const BURST: usize = 64;
/// No datagram is longer, in bytes.
const DATAGRAM_MAX: usize = 64 << 10;

/// Makes a socket that is connected to the guest. It is called in the service's thread:
/// all clients wait for it.
pub type Connect = Arc<dyn Fn() -> io::Result<UdpSocket> + Send + Sync>;

const STOP: u64 = 0;
const SOCKET: u64 = 1;

/// Hands on what comes to `socket`, and the answers.
///
/// # Errors
/// No thread, or no descriptor.
pub fn serve(socket: UdpSocket, connect: Connect) -> io::Result<Service> {
    serve_with(socket, connect, IDLE)
}

fn serve_with(socket: UdpSocket, connect: Connect, idle: Duration) -> io::Result<Service> {
    socket.set_nonblocking(true)?;
    let mut proxy = Proxy {
        socket,
        connect,
        idle,
        watch: Watch::new()?,
        clients: BTreeMap::new(),
        keys: HashMap::new(),
        last_key: SOCKET,
        look_at: None,
        buffer: vec![0; DATAGRAM_MAX],
    };
    Service::start("proxy", move |stop| {
        if let Err(error) = proxy.run(stop) {
            log::error!("a published port is served no more: {error}");
        }
    })
}

struct Proxy {
    socket: UdpSocket,
    connect: Connect,
    idle: Duration,
    watch: Watch,
    clients: BTreeMap<u64, Client>,
    /// Where a client is in there.
    keys: HashMap<SocketAddr, u64>,
    last_key: u64,
    /// No client is idle before.
    look_at: Option<Instant>,
    buffer: Vec<u8>,
}

struct Client {
    address: SocketAddr,
    guest: UdpSocket,
    /// When one of them said something.
    heard: Instant,
}

impl Proxy {
    fn run(&mut self, stop: &Bell) -> io::Result<()> {
        self.watch.add(stop, STOP, EventFlags::IN)?;
        self.watch.add(&self.socket, SOCKET, EventFlags::IN)?;
        loop {
            let patience = self
                .look_at
                .map(|at| at.saturating_duration_since(Instant::now()));
            for (key, _) in self.watch.wait(patience)? {
                match key {
                    STOP => return Ok(()),
                    SOCKET => self.hear_clients(),
                    client => self.hear_guest(client),
                }
            }
            self.forget_idle();
        }
    }

    fn hear_clients(&mut self) {
        for _ in 0..BURST {
            let (len, address) = match self.socket.recv_from(&mut self.buffer) {
                Ok(received) => received,
                Err(error) => return note(&error),
            };
            let known = self.keys.get(&address).copied();
            let key = match known.map_or_else(|| self.admit(address), Ok) {
                Ok(key) => key,
                Err(error) => {
                    log::debug!("proxy: the guest cannot be reached: {error}");
                    continue;
                }
            };
            // The two lists have the same clients.
            let Some(client) = self.clients.get_mut(&key) else {
                continue;
            };
            client.heard = Instant::now();
            if let Err(error) = client.guest.send(&self.buffer[..len]) {
                note(&error);
            }
        }
    }

    /// A new client; another one may have to go.
    fn admit(&mut self, address: SocketAddr) -> io::Result<u64> {
        if self.clients.len() >= CLIENTS_MAX {
            let silent = self.clients.iter().min_by_key(|(_, client)| client.heard);
            if let Some(key) = silent.map(|(key, _)| *key) {
                self.forget(key);
            }
        }
        let guest = (self.connect)()?;
        guest.set_nonblocking(true)?;
        self.last_key += 1;
        let key = self.last_key;
        self.watch.add(&guest, key, EventFlags::IN)?;
        let heard = Instant::now();
        let client = Client {
            address,
            guest,
            heard,
        };
        self.clients.insert(key, client);
        self.keys.insert(address, key);
        self.look_at.get_or_insert(heard + self.idle);
        Ok(key)
    }

    fn hear_guest(&mut self, key: u64) {
        // It may have been forgotten in this turn.
        let Some(client) = self.clients.get_mut(&key) else {
            return;
        };
        for _ in 0..BURST {
            let len = match client.guest.recv(&mut self.buffer) {
                Ok(len) => len,
                // Among them: nobody listens in the guest. A client finds out by itself.
                Err(error) => return note(&error),
            };
            client.heard = Instant::now();
            if let Err(error) = self.socket.send_to(&self.buffer[..len], client.address) {
                note(&error);
            }
        }
    }

    fn forget(&mut self, key: u64) {
        if let Some(client) = self.clients.remove(&key) {
            self.keys.remove(&client.address);
        }
    }

    fn forget_idle(&mut self) {
        let now = Instant::now();
        if self.look_at.is_none_or(|at| at > now) {
            return;
        }
        let idle = self.idle;
        let is_idle = |client: &Client| client.heard + idle <= now;
        let late = self.clients.iter().filter(|(_, client)| is_idle(client));
        for key in late.map(|(key, _)| *key).collect::<Vec<_>>() {
            self.forget(key);
        }
        let heard = self.clients.values().map(|client| client.heard).min();
        self.look_at = heard.map(|heard| heard + idle);
    }
}

/// A datagram is lost, as on any network.
fn note(error: &io::Error) {
    if error.kind() != ErrorKind::WouldBlock {
        log::debug!("proxy: {error}");
    }
}

#[cfg(test)]
mod tests;
