use super::*;
use domain::base::iana::Rtype;
use domain::base::{Message, MessageBuilder, Name};
use domain::rdata::A;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::mpsc::{Receiver, channel};

struct OneName;

impl Names for OneName {
    fn addresses(&self, name: &str) -> Option<Vec<IpAddr>> {
        (name == "web").then(|| vec![Ipv4Addr::new(10, 0, 0, 2).into()])
    }

    fn name_of(&self, _: IpAddr) -> Option<String> {
        None
    }
}

/// A service, and where it is reached.
struct Served {
    service: Option<Service>,
    address: SocketAddr,
}

const LOCAL: (Ipv4Addr, u16) = (Ipv4Addr::LOCALHOST, 0);

fn served(upstream: Option<Upstream>) -> Served {
    // The same port for both may be taken for one of them.
    let (udp, tcp) = (0..100)
        .find_map(|_| {
            let udp = UdpSocket::bind(LOCAL).unwrap();
            let tcp = TcpListener::bind(udp.local_addr().unwrap()).ok()?;
            Some((udp, tcp))
        })
        .unwrap();
    let address = udp.local_addr().unwrap();
    let service = Some(serve(udp, tcp, Arc::new(OneName), upstream).unwrap());
    Served { service, address }
}

impl Served {
    fn client(&self) -> UdpSocket {
        let client = UdpSocket::bind(LOCAL).unwrap();
        client.connect(self.address).unwrap();
        client
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        client
    }

    fn ask(&self, message: &[u8]) -> Vec<u8> {
        let client = self.client();
        client.send(message).unwrap();
        hear(&client)
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        stream
    }
}

fn hear(client: &UdpSocket) -> Vec<u8> {
    let mut buffer = vec![0; DATAGRAM_MAX];
    let len = client.recv(&mut buffer).expect("an answer in time");
    buffer.truncate(len);
    buffer
}

fn say(stream: &mut TcpStream, message: &[u8]) {
    let mut bytes = (message.len() as u16).to_be_bytes().to_vec();
    bytes.extend(message);
    stream.write_all(&bytes).unwrap();
}

fn listen(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut len = [0; 2];
    stream.read_exact(&mut len)?;
    let mut message = vec![0; u16::from_be_bytes(len).into()];
    stream.read_exact(&mut message)?;
    Ok(message)
}

fn question(name: &str, id: u16) -> Vec<u8> {
    let mut builder = MessageBuilder::new_vec();
    builder.header_mut().set_id(id);
    let mut question = builder.question();
    let name: Name<Vec<u8>> = name.parse().unwrap();
    question.push((name, Rtype::A)).unwrap();
    let mut additional = question.additional();
    additional
        .opt(|opt| {
            opt.set_udp_payload_size(1400);
            Ok(())
        })
        .unwrap();
    additional.finish()
}

/// An answer with an address.
fn positive(question: &[u8], address: [u8; 4]) -> Vec<u8> {
    let question = Message::from_octets(question).unwrap();
    let name = question.sole_question().unwrap().into_qname();
    let builder = MessageBuilder::new_vec();
    let mut answer = builder.start_answer(&question, Rcode::NOERROR).unwrap();
    let address = A::new(address.into());
    answer.push((name, 60, address)).unwrap();
    answer.finish()
}

fn code(answer: &[u8]) -> Rcode {
    Message::from_octets(answer).unwrap().header().rcode()
}

fn address(answer: &[u8]) -> String {
    let answer = Message::from_octets(answer).unwrap();
    let mut records = answer.answer().unwrap().limit_to::<A>();
    records.next().unwrap().unwrap().data().to_string()
}

/// A server that says what `reply` makes of a question, and tells who has asked what.
fn fake(
    reply: impl Fn(&UdpSocket, SocketAddr, &[u8]) + Send + 'static,
) -> (SocketAddr, Receiver<(SocketAddr, Vec<u8>)>) {
    let socket = UdpSocket::bind(LOCAL).unwrap();
    let address = socket.local_addr().unwrap();
    let (sender, heard) = channel();
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok((len, from)) = socket.recv_from(&mut buffer) {
            let question = &buffer[..len];
            if sender.send((from, question.to_vec())).is_err() {
                return;
            }
            reply(&socket, from, question);
        }
    });
    (address, heard)
}

fn quick(servers: Vec<SocketAddr>) -> Option<Upstream> {
    Some(Upstream {
        timeout: Duration::from_millis(300),
        ..Upstream::new(servers)
    })
}

fn send(socket: &UdpSocket, to: SocketAddr, bytes: &[u8]) {
    socket.send_to(bytes, to).unwrap();
}

#[test]
fn our_names_are_known_and_others_refused_without_servers() {
    let served = served(None);
    let answer = served.ask(&question("WEB", 7));
    assert_eq!(address(&answer), "10.0.0.2");
    let answer = served.ask(&question("example.com", 8));
    assert_eq!(code(&answer), Rcode::REFUSED);
    assert_eq!(message::id(&answer), Some(8));
    let mut stream = served.connect();
    for (name, expected) in [("web", Rcode::NOERROR), ("example.com", Rcode::REFUSED)] {
        say(&mut stream, &question(name, 9));
        assert_eq!(code(&listen(&mut stream).unwrap()), expected);
    }
}

#[test]
fn others_are_asked_of_a_server_under_another_number_and_from_another_port() {
    let (server, heard) = fake(|socket, from, question| {
        send(socket, from, &positive(question, [1, 2, 3, 4]));
    });
    let served = served(quick(vec![server]));
    for id in 0..20 {
        let asked = question("example.com", id);
        let answer = served.ask(&asked);
        assert_eq!(address(&answer), "1.2.3.4");
        assert_eq!(message::id(&answer), Some(id));
    }
    let heard: Vec<_> = heard.try_iter().collect();
    assert_eq!(heard.len(), 20);
    let distinct =
        |what: &mut dyn Iterator<Item = u16>| what.collect::<std::collections::BTreeSet<_>>().len();
    assert!(distinct(&mut heard.iter().map(|(from, _)| from.port())) > 15);
    let mut ids = heard.iter().filter_map(|(_, it)| message::id(it));
    assert!(distinct(&mut ids) > 15);
    // All else is as it was: the options too.
    let asked = question("example.com", 0);
    assert!(heard.iter().all(|(_, it)| it[2..] == asked[2..]));
}

#[test]
fn lies_are_passed_over() {
    let liar = UdpSocket::bind(LOCAL).unwrap();
    let (server, _heard) = fake(move |socket, from, asked| {
        let lie = positive(asked, [6, 6, 6, 6]);
        send(&liar, from, &lie);
        for change in [0, 1] {
            let mut other = lie.clone();
            other[change] ^= 0x40;
            send(socket, from, &other);
        }
        let other = question("example.org", message::id(asked).unwrap());
        send(socket, from, &positive(&other, [6, 6, 6, 6]));
        for garbage in [&lie[..5], &[0xff; 700], asked, &[]] {
            send(socket, from, garbage);
        }
        send(socket, from, &positive(asked, [1, 2, 3, 4]));
    });
    let served = served(quick(vec![server]));
    assert_eq!(address(&served.ask(&question("example.com", 1))), "1.2.3.4");
}

#[test]
fn the_next_server_is_asked_when_one_is_silent_or_has_failed() {
    let (silent, _heard) = fake(|_, _, _| {});
    let (failing, _heard) = fake(|socket, from, question| {
        let answer = message::refuse(question, Rcode::SERVFAIL).unwrap();
        send(socket, from, &answer);
    });
    let nobody = UdpSocket::bind(LOCAL).unwrap().local_addr().unwrap();
    let (good, _heard) = fake(|socket, from, question| {
        send(socket, from, &positive(question, [1, 2, 3, 4]));
    });
    for other in [silent, failing, nobody] {
        let served = served(quick(vec![other, good]));
        assert_eq!(address(&served.ask(&question("example.com", 1))), "1.2.3.4");
    }
    // That there is no such name is an answer.
    let (knows, _heard) = fake(|socket, from, question| {
        let answer = message::refuse(question, Rcode::NXDOMAIN).unwrap();
        send(socket, from, &answer);
    });
    let served = served(quick(vec![knows, good]));
    assert_eq!(code(&served.ask(&question("no.such", 1))), Rcode::NXDOMAIN);
}

#[test]
fn without_an_answer_it_has_failed_in_time() {
    let (silent, heard) = fake(|_, _, _| {});
    let nobody = UdpSocket::bind(LOCAL).unwrap().local_addr().unwrap();
    let served = served(quick(vec![silent, nobody]));
    let start = Instant::now();
    let answer = served.ask(&question("example.com", 1));
    assert_eq!(code(&answer), Rcode::SERVFAIL);
    assert!(start.elapsed() < Duration::from_secs(5));
    assert_eq!(heard.try_iter().count(), 2);
    // The failure of a server is passed on.
    let (failing, _heard) = fake(|socket, from, question| {
        let answer = message::refuse(question, Rcode::NOTIMP).unwrap();
        send(socket, from, &answer);
    });
    let served = super::tests::served(quick(vec![failing]));
    let answer = served.ask(&question("example.com", 5));
    assert_eq!(code(&answer), Rcode::NOTIMP);
    assert_eq!(message::id(&answer), Some(5));
}

#[test]
fn no_question_waits_for_another_and_their_number_is_bounded() {
    let (slow, heard) = fake(|socket, from, asked| {
        if asked.windows(4).any(|it| it == b"fast") {
            send(socket, from, &positive(asked, [1, 2, 3, 4]));
        }
    });
    let upstream = Upstream::new(vec![slow]);
    let served = served(Some(upstream));
    let client = served.client();
    for id in 0..QUESTIONS_MAX as u16 - 1 {
        client.send(&question("slow.com", id)).unwrap();
        // The guest asks again: that is no other question.
        client.send(&question("slow.com", id)).unwrap();
        heard.recv_timeout(Duration::from_secs(20)).unwrap();
    }
    assert_eq!(address(&served.ask(&question("fast.com", 1))), "1.2.3.4");
    client.send(&question("slow.com", 2000)).unwrap();
    let answer = served.ask(&question("fast.com", 1));
    assert_eq!(code(&answer), Rcode::SERVFAIL);
    // Those of our own go on.
    assert_eq!(address(&served.ask(&question("web", 2))), "10.0.0.2");
}

#[test]
fn an_answer_cut_short_is_asked_for_by_tcp() {
    let tcp = TcpListener::bind(LOCAL).unwrap();
    let server = tcp.local_addr().unwrap();
    let udp = UdpSocket::bind(server).unwrap();
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        let (len, from) = udp.recv_from(&mut buffer).unwrap();
        let mut cut = message::refuse(&buffer[..len], Rcode::NOERROR).unwrap();
        cut[2] |= 2;
        send(&udp, from, &cut);
        let (mut stream, _) = tcp.accept().unwrap();
        let asked = listen(&mut stream).unwrap();
        let answer = positive(&asked, [1, 2, 3, 4]);
        // In pieces.
        let mut bytes = (answer.len() as u16).to_be_bytes().to_vec();
        bytes.extend(answer);
        for byte in bytes {
            stream.write_all(&[byte]).unwrap();
        }
    });
    let served = served(quick(vec![server]));
    let cut = served.ask(&question("example.com", 3));
    assert!(Message::from_octets(&cut).unwrap().header().tc());
    let mut stream = served.connect();
    say(&mut stream, &question("example.com", 4));
    let answer = listen(&mut stream).unwrap();
    assert_eq!(address(&answer), "1.2.3.4");
    assert_eq!(message::id(&answer), Some(4));
}

#[test]
fn a_server_without_tcp_is_no_answer() {
    let nobody = TcpListener::bind(LOCAL).unwrap().local_addr().unwrap();
    let served = served(quick(vec![nobody]));
    let mut stream = served.connect();
    say(&mut stream, &question("example.com", 4));
    assert_eq!(code(&listen(&mut stream).unwrap()), Rcode::SERVFAIL);
}

#[test]
fn questions_on_a_connection_come_in_any_pieces() {
    let served = served(None);
    let mut stream = served.connect();
    let mut bytes = Vec::new();
    for id in 0..50 {
        let question = question("web", id);
        bytes.extend((question.len() as u16).to_be_bytes());
        bytes.extend(question);
    }
    for chunk in bytes.chunks(700) {
        stream.write_all(chunk).unwrap();
    }
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    for id in 0..50 {
        assert_eq!(message::id(&listen(&mut stream).unwrap()), Some(id));
    }
    assert!(listen(&mut stream).is_err(), "it is over");
}

#[test]
fn garbage_harms_nobody() {
    let served = served(None);
    let client = served.client();
    let whole = question("web", 1);
    for len in 0..whole.len() {
        client.send(&whole[..len]).unwrap();
    }
    for seed in 0..200_u32 {
        let bytes = (0..seed * 20).map(|n| (n.wrapping_mul(seed * 40_503 + 7) >> 5) as u8);
        client.send(&bytes.collect::<Vec<_>>()).unwrap();
    }
    for garbage in [&[0xff; 9000][..], &[0, 0], &[0, 3, 1, 2, 3], &[0xff, 0xff]] {
        let mut stream = served.connect();
        stream.write_all(garbage).unwrap();
        if garbage.len() > 2 || garbage[0] == 0xff {
            assert!(listen(&mut stream).is_err());
        }
    }
    assert_eq!(address(&served.ask(&question("web", 2))), "10.0.0.2");
}

#[test]
fn connections_are_bounded_and_one_that_ends_makes_room() {
    let served = served(None);
    let mut streams: Vec<_> = (0..=CONNECTIONS_MAX).map(|_| served.connect()).collect();
    let mut last = streams.pop().unwrap();
    for stream in &mut streams {
        say(stream, &question("web", 1));
        assert_eq!(address(&listen(stream).unwrap()), "10.0.0.2");
    }
    say(&mut last, &question("web", 1));
    last.set_read_timeout(Some(Duration::from_millis(200)))
        .unwrap();
    assert!(listen(&mut last).is_err(), "there is no room yet");
    last.set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    streams.pop();
    assert_eq!(address(&listen(&mut last).unwrap()), "10.0.0.2");
}

#[test]
fn a_connection_that_ends_takes_its_question_with_it() {
    let (silent, heard) = fake(|_, _, _| {});
    let tcp = TcpListener::bind(silent).unwrap();
    let served = served(Some(Upstream::new(vec![silent])));
    for _ in 0..2 * QUESTIONS_MAX {
        let mut stream = served.connect();
        say(&mut stream, &question("example.com", 1));
        // It has been asked, before it ends with a reset.
        drop(tcp.accept().unwrap());
        rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO)).unwrap();
    }
    let client = served.client();
    client.send(&question("example.com", 1)).unwrap();
    heard.recv_timeout(Duration::from_secs(20)).unwrap();
}

#[test]
fn the_end_of_the_service_frees_its_port() {
    let mut served = served(None);
    let _stream = served.connect();
    let start = Instant::now();
    drop(served.service.take());
    assert!(start.elapsed() < Duration::from_secs(2));
    UdpSocket::bind(served.address).unwrap();
}
