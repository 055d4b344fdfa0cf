use super::*;
use rustix::net::sockopt::set_socket_linger;
use sha2::{Digest, Sha256};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr};
use std::thread::JoinHandle;

const LOCAL: (Ipv4Addr, u16) = (Ipv4Addr::LOCALHOST, 0);
const LONG: Duration = Duration::from_secs(60);

/// A proxy, and what stands for the guest's listener.
struct Proxied {
    service: Option<Service>,
    address: SocketAddr,
    guest: TcpListener,
}

fn proxied() -> Proxied {
    let guest = TcpListener::bind(LOCAL).unwrap();
    let to = guest.local_addr().unwrap();
    with(guest, move || TcpStream::connect(to))
}

fn with(
    guest: TcpListener,
    connect: impl Fn() -> io::Result<TcpStream> + Send + Sync + 'static,
) -> Proxied {
    let listener = TcpListener::bind(LOCAL).unwrap();
    let address = listener.local_addr().unwrap();
    let service = Some(serve(listener, Arc::new(connect)).unwrap());
    Proxied {
        service,
        address,
        guest,
    }
}

impl Proxied {
    fn client(&self) -> TcpStream {
        patient(TcpStream::connect(self.address).unwrap())
    }

    fn accept(&self) -> TcpStream {
        patient(self.guest.accept().unwrap().0)
    }

    /// Both ends of one connection.
    fn pair(&self) -> (TcpStream, TcpStream) {
        (self.client(), self.accept())
    }
}

fn patient(stream: TcpStream) -> TcpStream {
    stream.set_read_timeout(Some(LONG)).unwrap();
    stream.set_write_timeout(Some(LONG)).unwrap();
    stream
}

fn data(len: usize, seed: u32) -> Vec<u8> {
    let word = |n: u32| {
        n.wrapping_mul(2_654_435_761)
            .wrapping_add(seed)
            .to_ne_bytes()
    };
    (0..len.div_ceil(4) as u32)
        .flat_map(word)
        .take(len)
        .collect()
}

fn send_all(mut stream: TcpStream, data: Vec<u8>) -> JoinHandle<()> {
    std::thread::spawn(move || {
        stream.write_all(&data).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
    })
}

fn read_all(mut stream: TcpStream) -> JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        all
    })
}

fn echo(stream: &mut TcpStream, other: &mut TcpStream, text: &[u8]) {
    stream.write_all(text).unwrap();
    let mut heard = vec![0; text.len()];
    other.read_exact(&mut heard).unwrap();
    assert_eq!(heard, text);
}

fn is_reset(stream: &mut TcpStream) -> bool {
    let error = stream.read(&mut [0]).expect_err("no end in order");
    error.kind() == ErrorKind::ConnectionReset
}

fn break_off(stream: TcpStream) {
    set_socket_linger(&stream, Some(Duration::ZERO)).unwrap();
}

#[test]
fn fifty_megabytes_each_way_at_once_arrive_whole() {
    let proxied = proxied();
    let (client, guest) = proxied.pair();
    let [forth, back] = [1, 2].map(|seed| data(50_000_000, seed));
    let sums = [&forth, &back].map(Sha256::digest);
    let senders = [
        send_all(client.try_clone().unwrap(), forth),
        send_all(guest.try_clone().unwrap(), back),
    ];
    let readers = [read_all(guest), read_all(client)];
    for (reader, sum) in readers.into_iter().zip(sums) {
        assert_eq!(Sha256::digest(reader.join().unwrap()), sum);
    }
    for sender in senders {
        sender.join().unwrap();
    }
}

#[test]
fn who_has_said_all_can_listen() {
    let proxied = proxied();
    for swapped in [false, true] {
        let (client, guest) = proxied.pair();
        let (mut first, mut second) = if swapped {
            (guest, client)
        } else {
            (client, guest)
        };
        first.write_all(b"question").unwrap();
        first.shutdown(Shutdown::Write).unwrap();
        let mut text = String::new();
        second.read_to_string(&mut text).unwrap();
        assert_eq!(text, "question");
        echo(&mut second, &mut first, b"answer");
        echo(&mut second, &mut first, b"and more");
        drop(second);
        assert_eq!(first.read(&mut [0]).unwrap(), 0);
    }
}

#[test]
fn two_hundred_connections_at_once() {
    let proxied = proxied();
    let clients: Vec<_> = (0..200).map(|_| proxied.client()).collect();
    for (number, client) in clients.iter().enumerate() {
        (&*client).write_all(&[number as u8]).unwrap();
    }
    let mut guests: Vec<_> = (0..200).map(|_| proxied.accept()).collect();
    for guest in &mut guests {
        let mut number = [0];
        guest.read_exact(&mut number).unwrap();
        guest.write_all(&[!number[0]]).unwrap();
    }
    for (number, mut client) in clients.into_iter().enumerate() {
        let mut answer = [0];
        client.read_exact(&mut answer).unwrap();
        assert_eq!(answer, [!(number as u8)]);
    }
}

#[test]
fn who_takes_nothing_holds_nobody_up() {
    let proxied = proxied();
    let (stuck, mut deaf) = proxied.pair();
    stuck.set_nonblocking(true).unwrap();
    let chunk = data(CHUNK, 3);
    // As much as all buffers take; the rest is not taken from whoever sends.
    let mut sent = 0;
    let mut quiet = 0;
    while quiet < 20 {
        match (&stuck).write(&chunk[sent % CHUNK..]) {
            Ok(count) => (sent, quiet) = (sent + count, 0),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                quiet += 1;
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(error) => panic!("{error}"),
        }
        assert!(sent < 64 << 20, "there is no bound");
    }
    let (mut client, mut guest) = proxied.pair();
    for _ in 0..100 {
        echo(&mut client, &mut guest, b"to");
        echo(&mut guest, &mut client, b"fro");
    }
    // Nothing of the first is lost.
    stuck.shutdown(Shutdown::Write).unwrap();
    let mut all = Vec::new();
    deaf.read_to_end(&mut all).unwrap();
    assert_eq!(all.len(), sent);
    assert!(all.chunks(CHUNK).all(|it| it == &chunk[..it.len()]));
}

#[test]
fn a_connection_that_waits_costs_no_processor() {
    let guest = TcpListener::bind(LOCAL).unwrap();
    let to = guest.local_addr().unwrap();
    let listener = TcpListener::bind(LOCAL).unwrap();
    let address = listener.local_addr().unwrap();
    let mut proxy = Proxy::new(listener, Arc::new(move || TcpStream::connect(to))).unwrap();
    let (sender, started) = channel();
    let service = Service::start("proxy", move |stop| {
        sender.send(rustix::thread::gettid()).unwrap();
        proxy.run(stop).unwrap();
    });
    let proxied = Proxied {
        service: Some(service.unwrap()),
        address,
        guest,
    };
    let (stuck, guest) = proxied.pair();
    let (half, other) = proxied.pair();
    half.shutdown(Shutdown::Write).unwrap();
    stuck.set_nonblocking(true).unwrap();
    while (&stuck).write(&[0; CHUNK]).is_ok() {}
    std::thread::sleep(Duration::from_millis(300));
    let task = started.recv().unwrap().as_raw_nonzero();
    // User and system time in hundredths of a second: proc_pid_stat(5).
    let spent = || {
        let stat = std::fs::read_to_string(format!("/proc/self/task/{task}/stat")).unwrap();
        let (_, fields) = stat.rsplit_once(") ").unwrap();
        let times = fields.split(' ').skip(11).take(2);
        times.map(|it| it.parse::<u32>().unwrap()).sum::<u32>()
    };
    let before = spent();
    std::thread::sleep(Duration::from_secs(1));
    assert!(spent() - before < 10, "it spins");
    drop((guest, other));
}

#[test]
fn a_reset_is_passed_on() {
    let proxied = proxied();
    for swapped in [false, true] {
        let (client, guest) = proxied.pair();
        let (first, mut second) = if swapped {
            (guest, client)
        } else {
            (client, guest)
        };
        (&first).write_all(b"last words").unwrap();
        let mut heard = [0; 10];
        second.read_exact(&mut heard).unwrap();
        break_off(first);
        assert!(is_reset(&mut second));
    }
}

#[test]
fn a_reset_after_an_end_and_behind_what_nobody_takes_is_passed_on() {
    let proxied = proxied();
    let (client, mut guest) = proxied.pair();
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.read(&mut [0]).unwrap(), 0);
    break_off(client);
    let start = Instant::now();
    // To find out, the guest has to say something.
    while guest.write_all(b"x").is_ok() {
        assert!(start.elapsed() < LONG);
        std::thread::sleep(Duration::from_millis(10));
    }
    let (client, mut guest) = proxied.pair();
    client.set_nonblocking(true).unwrap();
    while (&client).write(&[0; CHUNK]).is_ok() {}
    break_off(client);
    let mut taken = 0;
    let end = loop {
        match guest.read(&mut [0; CHUNK]) {
            Ok(0) => break Ok(()),
            Ok(count) => taken += count,
            Err(error) => break Err(error.kind()),
        }
    };
    assert_eq!(end, Err(ErrorKind::ConnectionReset), "after {taken} bytes");
}

#[test]
fn what_a_server_says_before_it_breaks_off_is_heard() {
    let proxied = proxied();
    for _ in 0..20 {
        let (mut client, mut guest) = proxied.pair();
        // More than the guest ever looks at.
        client.write_all(&[1; 100_000]).unwrap();
        guest.read_exact(&mut [0]).unwrap();
        guest.write_all(b"too much").unwrap();
        // With something unread in it, that is a reset.
        drop(guest);
        let mut heard = [0; 8];
        client.read_exact(&mut heard).unwrap();
        assert_eq!(&heard, b"too much");
    }
}

#[test]
fn a_guest_that_refuses_is_a_reset() {
    let guest = TcpListener::bind(LOCAL).unwrap();
    let nobody = TcpListener::bind(LOCAL).unwrap().local_addr().unwrap();
    let blocking = with(guest, move || TcpStream::connect(nobody));
    assert!(is_reset(&mut blocking.client()));
    let guest = TcpListener::bind(LOCAL).unwrap();
    let proxied = with(guest, move || begin_connecting(nobody));
    assert!(is_reset(&mut proxied.client()));
}

/// What does not wait for the other side.
fn begin_connecting(to: SocketAddr) -> io::Result<TcpStream> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, socket_with};
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::INET, SocketType::STREAM, flags, None)?;
    match connect(&socket, &to) {
        Ok(()) | Err(rustix::io::Errno::INPROGRESS) => Ok(socket.into()),
        Err(error) => Err(error.into()),
    }
}

#[test]
fn a_stream_may_be_connecting_still() {
    let guest = TcpListener::bind(LOCAL).unwrap();
    let to = guest.local_addr().unwrap();
    let proxied = with(guest, move || begin_connecting(to));
    for _ in 0..20 {
        let client = proxied.client();
        (&client).write_all(b"question").unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let mut guest = proxied.accept();
        let mut text = String::new();
        guest.read_to_string(&mut text).unwrap();
        assert_eq!(text, "question");
    }
}

#[test]
fn a_guest_that_does_not_answer_holds_up_nobody_else() {
    let guest = TcpListener::bind(LOCAL).unwrap();
    let to = guest.local_addr().unwrap();
    let (release, held) = channel::<()>();
    let held = std::sync::Mutex::new(held);
    let (begin, begun) = channel();
    let is_first = std::sync::Once::new();
    let mut proxied = with(guest, move || {
        if !is_first.is_completed() {
            is_first.call_once(|| begin.send(()).unwrap());
            // The end of the test.
            held.lock().unwrap().recv().ok();
        }
        TcpStream::connect(to)
    });
    let mut stuck = proxied.client();
    begun.recv().unwrap();
    let mut others = Vec::new();
    for _ in 0..50 {
        let (mut client, mut guest) = proxied.pair();
        echo(&mut client, &mut guest, b"it works");
        others.push((client, guest));
    }
    // Nor the end.
    let start = Instant::now();
    drop(proxied.service.take());
    assert!(start.elapsed() < Duration::from_secs(5));
    assert_eq!(stuck.read(&mut [0]).unwrap(), 0);
    drop(release);
}

#[test]
fn the_end_of_the_service_ends_all_and_frees_the_port() {
    let mut proxied = proxied();
    let mut pairs: Vec<_> = (0..10).map(|_| proxied.pair()).collect();
    let start = Instant::now();
    drop(proxied.service.take());
    assert!(start.elapsed() < Duration::from_secs(5));
    for (client, guest) in &mut pairs {
        assert_eq!(client.read(&mut [0]).unwrap(), 0);
        assert_eq!(guest.read(&mut [0]).unwrap(), 0);
    }
    TcpListener::bind(proxied.address).unwrap();
}
