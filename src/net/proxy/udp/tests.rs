use super::*;
use std::net::Ipv4Addr;

const LOCAL: (Ipv4Addr, u16) = (Ipv4Addr::LOCALHOST, 0);

/// A proxy, and what stands for the guest's socket.
struct Proxied {
    service: Option<Service>,
    address: SocketAddr,
    guest: UdpSocket,
}

fn socket() -> UdpSocket {
    let socket = UdpSocket::bind(LOCAL).unwrap();
    let patience = Duration::from_secs(20);
    socket.set_read_timeout(Some(patience)).unwrap();
    socket
}

fn proxied(idle: Duration) -> Proxied {
    let guest = socket();
    let to = guest.local_addr().unwrap();
    let socket = UdpSocket::bind(LOCAL).unwrap();
    let address = socket.local_addr().unwrap();
    let connect = move || {
        let socket = UdpSocket::bind(LOCAL)?;
        socket.connect(to)?;
        Ok(socket)
    };
    let service = Some(serve_with(socket, Arc::new(connect), idle).unwrap());
    Proxied {
        service,
        address,
        guest,
    }
}

impl Proxied {
    fn client(&self) -> UdpSocket {
        let client = socket();
        client.connect(self.address).unwrap();
        client
    }

    /// Says something to the guest: whom it sees.
    fn say(&self, client: &UdpSocket, bytes: &[u8]) -> SocketAddr {
        client.send(bytes).unwrap();
        let (heard, from) = hear(&self.guest);
        assert_eq!(heard, bytes);
        from
    }
}

fn hear(socket: &UdpSocket) -> (Vec<u8>, SocketAddr) {
    let mut buffer = vec![0; DATAGRAM_MAX];
    let (len, from) = socket.recv_from(&mut buffer).expect("a datagram in time");
    buffer.truncate(len);
    (buffer, from)
}

#[test]
fn each_client_hears_what_is_for_it() {
    let proxied = proxied(IDLE);
    let clients = [proxied.client(), proxied.client()];
    for len in [0, 1, 1400, 65_507] {
        let seen = [1, 2].map(|n| (n, vec![n; len]));
        let seen = seen.map(|(n, bytes)| proxied.say(&clients[usize::from(n) - 1], &bytes));
        assert_ne!(seen[0], seen[1]);
        for n in [1, 0] {
            proxied.guest.send_to(&vec![n as u8; len], seen[n]).unwrap();
        }
        for n in [0, 1] {
            assert_eq!(hear(&clients[n]).0, vec![n as u8; len]);
        }
        // A client stays who it is.
        assert_eq!(proxied.say(&clients[0], b"again"), seen[0]);
    }
}

#[test]
fn nobody_else_is_heard() {
    let proxied = proxied(IDLE);
    let client = proxied.client();
    let seen = proxied.say(&client, b"hello");
    socket().send_to(b"lie", seen).unwrap();
    proxied.guest.send_to(b"truth", seen).unwrap();
    assert_eq!(hear(&client).0, b"truth");
}

#[test]
fn who_is_silent_is_forgotten() {
    let proxied = proxied(Duration::from_millis(300));
    let client = proxied.client();
    let mut seen = proxied.say(&client, b"hello");
    // As long as one of them speaks, it is not.
    for _ in 0..6 {
        std::thread::sleep(Duration::from_millis(100));
        proxied.guest.send_to(b"yes", seen).unwrap();
        hear(&client);
    }
    assert_eq!(proxied.say(&client, b"still there"), seen);
    for _ in 0..50 {
        std::thread::sleep(Duration::from_millis(500));
        let before = std::mem::replace(&mut seen, proxied.say(&client, b"back"));
        if seen != before {
            return;
        }
    }
    panic!("it is never forgotten");
}

#[test]
fn clients_are_bounded_and_the_most_silent_one_goes() {
    let proxied = proxied(IDLE);
    let first = proxied.client();
    let seen = proxied.say(&first, b"first");
    // One socket at a time, from other addresses than ours: 127.0.0.0/8 is all local.
    for n in 0..CLIENTS_MAX as u32 {
        let address = Ipv4Addr::from(0x7f00_0100 + n);
        let client = UdpSocket::bind((address, 0)).unwrap();
        client.send_to(b"next", proxied.address).unwrap();
        hear(&proxied.guest);
    }
    assert_ne!(proxied.say(&first, b"again"), seen);
}

#[test]
fn a_guest_that_does_not_listen_does_no_harm() {
    let mut proxied = proxied(IDLE);
    let to = proxied.guest.local_addr().unwrap();
    let client = proxied.client();
    proxied.say(&client, b"one");
    proxied.guest = socket();
    for _ in 0..10 {
        client.send(b"nobody").unwrap();
        std::thread::sleep(Duration::from_millis(10));
    }
    proxied.guest = UdpSocket::bind(to).unwrap();
    proxied.say(&client, b"two");
}

#[test]
fn the_end_of_the_service_frees_the_port() {
    let mut proxied = proxied(IDLE);
    let client = proxied.client();
    let seen = proxied.say(&client, b"hello");
    drop(proxied.service.take());
    UdpSocket::bind(proxied.address).unwrap();
    UdpSocket::bind(seen).unwrap();
}
