//! Containers' networks on this host's kernel, with network namespaces in the places of the
//! guest, of the host and of the world outside. They take root.

use super::attachment::{Attachment, Who};
use super::egress::Egress;
use super::links::{Links, Pair};
use super::namespace::Namespace;
use super::pool::Wanted;
use super::publish::Publish;
use super::store::Store;
use super::{Membership, Plan, tap};
use fork::addresses;
use ipnet::IpNet;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, OwnedFd};
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

const OUTSIDE: &str = "203.0.113.2";
const HOST: &str = "203.0.113.1";

/// What a host has of networks.
const LEFT: &str = "ip -o link | cut -d: -f2; nft list tables; ss -Hltun";

/// A host with a state directory, and somebody outside of it.
struct World {
    host: Namespace,
    outside: Namespace,
    root: tempfile::TempDir,
}

/// What runs until it is dropped.
struct Background(Child);

impl Drop for Background {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

fn shell(line: &str) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", line]).stdin(Stdio::null());
    command
}

/// What a line prints that does what it should.
fn run(place: &Namespace, line: &str) -> String {
    let out = place.within(|| shell(line).output()).expect(line);
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(out.status.success(), "{line}: {out:?}");
    text
}

fn succeeds(place: &Namespace, line: &str) -> bool {
    let out = place.within(|| shell(line).output()).expect(line);
    out.status.success()
}

/// Serves a word by HTTP.
fn serve(place: &Namespace, port: u16, word: &str) -> Background {
    let reply = format!(
        "HTTP/1.0 200 OK\\r\\nContent-Length: {}\\r\\n\\r\\n{word}",
        word.len()
    );
    let program = format!(
        "import socket\n\
         s = socket.socket(socket.AF_INET6); s.setsockopt(41, 26, 0)\n\
         s.setsockopt(1, 2, 1); s.bind(('::', {port})); s.listen(64)\n\
         while True:\n    \
             c, who = s.accept(); c.recv(4096); c.sendall(b'{reply}'); c.close()\n"
    );
    let spawn = || Command::new("python3").args(["-c", &program]).spawn();
    let server = Background(place.within(spawn).expect("python3"));
    let start = Instant::now();
    while !run(place, "ss -Hltn").contains(&format!(":{port} ")) {
        assert!(start.elapsed() < Duration::from_secs(20), "no server");
        std::thread::sleep(Duration::from_millis(20));
    }
    server
}

fn get(host: &str, port: u16) -> String {
    let host = match host.parse::<IpAddr>() {
        Ok(IpAddr::V6(address)) => format!("[{address}]"),
        _ => host.to_owned(),
    };
    format!("curl -s -m 3 http://{host}:{port}/")
}

impl World {
    fn new() -> Self {
        let (host, outside) = (
            Namespace::new().expect("root"),
            Namespace::new().expect("root"),
        );
        let connect = || {
            let mut links = Links::new();
            let lo = links.index("lo")?;
            links.set_up(lo, None)?;
            // A bridge of this host's own, in the place of its card.
            let card = links.add_bridge("card")?;
            links.add_pair(&Pair {
                name: "wire",
                bridge: card,
                namespace: outside.as_fd(),
                peer: "eth0",
                mac: [2, 0, 0, 0, 0, 9],
            })?;
            for address in ["203.0.113.1/24", "2001:db8::1/64"] {
                links.add_address(card, address.parse().expect("one"))?;
            }
            links.set_up(card, None)
        };
        host.within(connect).expect("connected");
        let answer = || {
            let mut links = Links::new();
            let card = links.index("eth0")?;
            for address in ["203.0.113.2/24", "2001:db8::2/64"] {
                links.add_address(card, address.parse().expect("one"))?;
            }
            links.set_up(card, None)
        };
        outside.within(answer).expect("connected");
        let root = tempfile::tempdir().expect("a directory");
        Self {
            host,
            outside,
            root,
        }
    }

    fn create(&self, name: &str, wanted: Wanted) {
        let root = self.root.path().to_owned();
        self.on_host(move || {
            let made = Store::open(&root)?.create(name, &wanted);
            made.map(drop)
        })
        .expect(name);
    }

    /// On the host.
    fn on_host<T: Send>(
        &self,
        body: impl FnOnce() -> anyhow::Result<T> + Send,
    ) -> anyhow::Result<T> {
        on(&self.host, body)
    }

    fn attach(&self, name: &str, plan: &Plan) -> anyhow::Result<Guest> {
        let id = format!(
            "{:0>64}",
            format!("{:x}", name.len() * 7919 + name.as_bytes()[0] as usize)
        );
        let id: String = id.chars().rev().collect();
        let root: PathBuf = self.root.path().into();
        let (attachment, network) = self.on_host(move || {
            let attachment = Attachment::new(
                &Who {
                    root: &root,
                    id: &id,
                    name,
                    dns: &[],
                },
                plan,
            )?;
            let network = attachment.tap()?;
            Ok((attachment, network))
        })?;
        let host = self.host.try_clone()?;
        Ok(Guest::new(attachment, network.tap, host))
    }

    fn guest(&self, name: &str, plan: &Plan) -> Guest {
        self.attach(name, plan).expect(name)
    }
}

/// A namespace that is what a guest is, at the end of a tap.
struct Guest {
    place: Namespace,
    /// Until it is dropped.
    attachment: Option<Attachment>,
    host: Namespace,
    /// Its frames are carried as long as this is there.
    _life: Arc<()>,
}

impl Drop for Guest {
    fn drop(&mut self) {
        let attachment = self.attachment.take();
        on(&self.host, || {
            drop(attachment);
            Ok(())
        })
        .expect("dropped");
    }
}

impl Guest {
    fn new(attachment: Attachment, outer: OwnedFd, host: Namespace) -> Self {
        let place = Namespace::new().expect("root");
        let make = || {
            let tap = tap::make()?;
            let mut links = Links::new();
            let lo = links.index("lo")?;
            links.set_up(lo, None)?;
            let index = links.index(tap::NAME)?;
            links.set_up(index, Some(addresses::MAC))?;
            let ipv4 = IpNet::new(addresses::IPV4.into(), addresses::IPV4_PREFIX);
            let ipv6 = IpNet::new(addresses::IPV6.into(), addresses::IPV6_PREFIX);
            links.add_address(index, ipv4.expect("one"))?;
            links.add_address(index, ipv6.expect("one"))?;
            links.add_default_route(addresses::IPV4_GATEWAY.into())?;
            links.add_default_route(addresses::IPV6_GATEWAY.into())?;
            Ok(tap)
        };
        let inner = place.within(make).expect("a guest");
        let life = Arc::new(());
        let watched = Arc::downgrade(&life);
        std::thread::spawn(move || pump(&outer, &inner, &watched));
        Self {
            place,
            attachment: Some(attachment),
            host,
            _life: life,
        }
    }

    fn attachment(&self) -> &Attachment {
        self.attachment.as_ref().expect("not dropped")
    }

    fn ipv4(&self, number: usize) -> Ipv4Addr {
        self.attachment().places()[number].ipv4.addr()
    }
}

/// Carries frames from one tap to the other, until the guest is gone.
fn pump(one: &OwnedFd, other: &OwnedFd, life: &Weak<()>) {
    let mut frame = vec![0; 70_000];
    let patience = Timespec {
        tv_sec: 0,
        tv_nsec: 50_000_000,
    };
    while life.strong_count() > 0 {
        let mut both = [one, other].map(|tap| PollFd::new(tap, PollFlags::IN));
        poll(&mut both, Some(&patience)).expect("poll");
        for (from, to) in [(one, other), (other, one)] {
            while let Ok(length) = rustix::io::read(from, &mut frame[..]) {
                // Whatever does not fit is lost, as on any wire.
                rustix::io::write(to, &frame[..length]).ok();
            }
        }
    }
}

/// In a namespace, with as much stack as usual.
fn on<T: Send>(
    place: &Namespace,
    body: impl FnOnce() -> anyhow::Result<T> + Send,
) -> anyhow::Result<T> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let kind = Some(rustix::thread::LinkNameSpaceType::Network);
            rustix::thread::move_into_link_name_space(place.as_fd(), kind)?;
            body()
        });
        thread.join().expect("no panic")
    })
}

fn plan(networks: &[&str]) -> Plan {
    Plan {
        networks: networks
            .iter()
            .map(|name| Membership {
                network: (*name).to_owned(),
                ..Membership::default()
            })
            .collect(),
        ..Plan::default()
    }
}

fn allowed(words: &[&str]) -> Plan {
    let words: Vec<String> = words.iter().map(|word| (*word).into()).collect();
    Plan {
        egress: Egress::parse(&words).expect("fine"),
        ..plan(&["bridge"])
    }
}

#[test]
fn a_guest_reaches_the_outside_and_not_its_host() {
    let world = World::new();
    let guest = world.guest("one", &plan(&["bridge"]));
    let _outside = serve(&world.outside, 8000, "outside");
    let _host = serve(&world.host, 8000, "host");
    assert_eq!(run(&guest.place, &get(OUTSIDE, 8000)), "outside");
    run(&guest.place, &format!("busybox ping -c 1 -W 2 {OUTSIDE}"));
    // At any of its addresses; at once, and not by waiting.
    let gateway = world
        .host
        .within(|| Ok(()))
        .map(|()| guest.attachment().places()[0].gateway);
    let gateway = gateway.expect("fine").expect("one").to_string();
    for host in [HOST, &gateway] {
        let start = Instant::now();
        assert!(!succeeds(&guest.place, &get(host, 8000)), "{host}");
        assert!(start.elapsed() < Duration::from_secs(2), "{host}");
    }
    // Nor what clouds have for their machines.
    let start = Instant::now();
    assert!(!succeeds(&guest.place, &get("169.254.169.254", 80)));
    assert!(start.elapsed() < Duration::from_secs(2));
    // Nobody outside reaches a guest by its address.
    run(
        &world.outside,
        &format!("ip route add 10.192.0.0/11 via {HOST}"),
    );
    let _guest = serve(&guest.place, 8001, "guest");
    let address = guest.ipv4(0).to_string();
    assert!(!succeeds(&world.outside, &get(&address, 8001)));
    // But the host itself does, and the guest does itself.
    assert_eq!(run(&world.host, &get(&address, 8001)), "guest");
    assert_eq!(run(&guest.place, &get(&address, 8001)), "guest");
}

#[test]
fn guests_meet_on_their_own_networks_only() {
    let world = World::new();
    world.create("red", Wanted::default());
    world.create(
        "six",
        Wanted {
            has_ipv6: true,
            internal: true,
            ..Wanted::default()
        },
    );
    let one = world.guest("one", &plan(&["bridge", "six"]));
    let three = world.guest("three", &plan(&["six"]));
    let other = world.guest("other-one", &plan(&["red"]));
    let neighbour = world.guest("neighbour", &plan(&["bridge"]));
    let _server = serve(&one.place, 8000, "one");
    assert_eq!(
        run(&neighbour.place, &get(&one.ipv4(0).to_string(), 8000)),
        "one"
    );
    assert_eq!(
        run(&three.place, &get(&one.ipv4(1).to_string(), 8000)),
        "one"
    );
    let six = one.attachment().places()[1].ipv6.expect("one").addr();
    assert_eq!(run(&three.place, &get(&six.to_string(), 8000)), "one");
    for number in [0, 1] {
        let address = one.ipv4(number).to_string();
        let start = Instant::now();
        assert!(!succeeds(&other.place, &get(&address, 8000)), "{address}");
        assert!(start.elapsed() < Duration::from_secs(2), "{address}");
    }
    assert!(!succeeds(
        &neighbour.place,
        &get(&one.ipv4(1).to_string(), 8000)
    ));
    // An internal network has no way out, but one that is on another as well has.
    let _outside = serve(&world.outside, 8000, "outside");
    assert!(!succeeds(&three.place, &get(OUTSIDE, 8000)));
    assert_eq!(run(&one.place, &get(OUTSIDE, 8000)), "outside");
}

#[test]
fn a_network_can_be_joined_and_left_by_a_guest_that_runs() {
    let world = World::new();
    world.create("red", Wanted::default());
    let mut one = world.guest("one", &plan(&["bridge"]));
    let other = world.guest("other", &plan(&["red"]));
    let _server = serve(&other.place, 8000, "other");
    let there = get(&other.ipv4(0).to_string(), 8000);
    assert!(!succeeds(&one.place, &there));
    let red = Membership {
        network: "red".into(),
        ..Membership::default()
    };
    let attachment = one.attachment.as_mut().expect("not dropped");
    world
        .on_host(|| attachment.connect("one", &red))
        .expect("connected");
    assert_eq!(run(&one.place, &there), "other");
    let attachment = one.attachment.as_mut().expect("not dropped");
    world
        .on_host(|| attachment.disconnect("red"))
        .expect("disconnected");
    assert!(!succeeds(&one.place, &there));
    assert_eq!(one.attachment().places().len(), 1);
}

#[test]
fn published_ports_go_over_to_another_network() {
    let world = World::new();
    world.create("red", Wanted::default());
    let published = Plan {
        publish: Publish::parse("8080:80").expect("fine"),
        ..plan(&["bridge"])
    };
    let mut one = world.guest("one", &published);
    let _server = serve(&one.place, 80, "one");
    let red = Membership {
        network: "red".into(),
        ..Membership::default()
    };
    let attachment = one.attachment.as_mut().expect("not dropped");
    world
        .on_host(|| {
            attachment.connect("one", &red)?;
            attachment.disconnect("bridge")
        })
        .expect("done");
    assert_eq!(run(&world.outside, &get(HOST, 8080)), "one");
    // By the kernel: a proxy would be the only one whose address the container sees.
    let table = run(&world.host, "nft list ruleset");
    assert!(table.contains(&one.ipv4(0).to_string()), "{table}");
}

#[test]
fn what_may_be_reached_is_what_is_allowed() {
    let world = World::new();
    let _a = serve(&world.outside, 8000, "a");
    let _b = serve(&world.outside, 8001, "b");
    let neighbour = world.guest("neighbour", &plan(&["bridge"]));
    let _n = serve(&neighbour.place, 8000, "n");
    let reached = |guest: &Guest| {
        let lines = [
            get(OUTSIDE, 8000),
            get(OUTSIDE, 8001),
            get(&neighbour.ipv4(0).to_string(), 8000),
        ];
        lines.map(|line| succeeds(&guest.place, &line))
    };
    for (name, words, expected) in [
        ("a", &["none"][..], [false, false, false]),
        ("bb", &["203.0.113.2:8000/tcp"], [true, false, false]),
        ("ccc", &["203.0.113.0/24:8001-9000"], [false, true, false]),
        ("dddd", &["networks"], [false, false, true]),
        (
            "eeeee",
            &["203.0.113.2/udp", "networks"],
            [false, false, true],
        ),
    ] {
        let guest = world.guest(name, &allowed(words));
        assert_eq!(reached(&guest), expected, "{words:?}");
        // What it serves is served.
        let _server = serve(&guest.place, 80, name);
        let address = guest.ipv4(0).to_string();
        assert_eq!(run(&neighbour.place, &get(&address, 80)), name);
    }
}

#[test]
fn whoever_sends_as_somebody_else_is_not_heard() {
    let world = World::new();
    let guest = world.guest("one", &plan(&["bridge"]));
    let neighbours = || {
        let place = guest.attachment().namespace_of_test();
        run(
            place,
            "ip neigh show dev tap0 | wc -l; ip -6 neigh show dev tap0 | wc -l",
        )
    };
    run(&guest.place, "busybox ping -c 1 -W 2 192.0.0.1");
    let before = neighbours();
    // The guest has other addresses all at once, and sends from each.
    run(
        &guest.place,
        "ip addr add 203.0.113.77/32 dev tap0; ip addr add 192.0.0.5/29 dev tap0
        ip -6 addr add fd76:6d72:756e::5/64 dev tap0 nodad",
    );
    for line in [
        format!("busybox ping -c 1 -W 1 -I 203.0.113.77 {OUTSIDE}"),
        format!("busybox ping -c 1 -W 1 -I 192.0.0.5 {OUTSIDE}"),
        "busybox ping -6 -c 1 -W 1 -I fd76:6d72:756e::5 fd76:6d72:756e::1".to_owned(),
    ] {
        assert!(!succeeds(&guest.place, &line), "{line}");
    }
    let place = guest.attachment().namespace_of_test();
    let after = run(place, "ip -6 neigh show dev tap0");
    assert!(!after.contains("::5"), "{before} {after}");
    run(
        &guest.place,
        "busybox ping -c 1 -W 2 -I 192.0.0.2 203.0.113.2",
    );
}

#[test]
fn published_ports_lead_to_the_guest_and_everything_goes_with_it() {
    let world = World::new();
    let before = run(&world.host, LEFT);
    let published = Plan {
        publish: ["8080:80", "127.0.0.1:8081:80", "53:53/udp"]
            .iter()
            .flat_map(|text| Publish::parse(text).expect(text))
            .collect(),
        ..plan(&["bridge"])
    };
    let guest = world.guest("one", &published);
    let _server = serve(&guest.place, 80, "guest");
    assert_eq!(run(&world.outside, &get(HOST, 8080)), "guest");
    for host in ["127.0.0.1", "::1", HOST, "2001:db8::1"] {
        assert_eq!(run(&world.host, &get(host, 8080)), "guest", "{host}");
    }
    assert_eq!(run(&world.outside, &get("2001:db8::1", 8080)), "guest");
    assert_eq!(run(&world.host, &get("127.0.0.1", 8081)), "guest");
    assert!(!succeeds(&world.outside, &get(HOST, 8081)));
    // Nobody else gets it.
    let taken = world.attach("two", &published).map(drop);
    let taken = format!("{:#}", taken.expect_err("taken"));
    assert!(taken.contains("the port is taken"), "{taken}");
    drop(guest);
    let start = Instant::now();
    while run(&world.host, LEFT) != before {
        let left = run(&world.host, LEFT);
        assert!(start.elapsed() < Duration::from_secs(20), "{left}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_hundred_guests_connect_at_once() {
    let world = World::new();
    let start = Instant::now();
    let guests: Vec<Attachment> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..100)
            .map(|n| {
                let (world, root) = (&world, world.root.path());
                scope.spawn(move || {
                    world.on_host(|| {
                        let who = Who {
                            root,
                            id: &format!("{n:03}{}", "a".repeat(61)),
                            name: &format!("guest-{n}"),
                            dns: &[],
                        };
                        let attachment = Attachment::new(&who, &plan(&["bridge"]))?;
                        attachment.tap().map(|_| attachment)
                    })
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().expect("no panic").expect("connected"))
            .collect()
    });
    println!("a hundred at once: {:?}", start.elapsed());
    let mut addresses: Vec<Ipv4Addr> = guests
        .iter()
        .map(|one| one.places()[0].ipv4.addr())
        .collect();
    addresses.sort_unstable();
    addresses.dedup();
    assert_eq!(addresses.len(), 100);
    let start = Instant::now();
    world
        .on_host(|| {
            drop(guests);
            Ok(())
        })
        .expect("dropped");
    println!("and let go: {:?}", start.elapsed());
    while run(&world.host, "ip -o link").contains("vmr") {
        assert!(start.elapsed() < Duration::from_secs(30));
        std::thread::sleep(Duration::from_millis(50));
    }
    println!("and gone: {:?}", start.elapsed());
}
