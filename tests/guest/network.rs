//! A child on a network: a tap in a network namespace of its own, the same addresses in
//! every guest.

use crate::support::wire::{Wire, run};
use crate::support::{PATIENCE, boot, busybox_rootfs, field, python_rootfs, start_shell};
use fork::worker::{Jail, Limits, Workers, WorkersSpec};
use fork::{
    Child, ContainerSpec, Disks, ForkSpec, Network, Place, Pool, ProcessSpec, Rate, RateLimit,
    RateLimits, Stream, Template, Writable,
};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::Read;
use std::num::NonZeroU64;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

const HOST: &str = "192.0.0.1";
const GUEST: &str = "192.0.0.2";
const HOST6: &str = "fd76:6d72:756e::1";
const GUEST6: &str = "fd76:6d72:756e::2";

fn template() -> Arc<Template> {
    static TEMPLATE: OnceLock<Arc<Template>> = OnceLock::new();
    Arc::clone(TEMPLATE.get_or_init(|| Arc::new(boot(256, 1))))
}

fn spec(network: Option<Network>, root: File) -> ForkSpec {
    ForkSpec {
        network,
        disks: Disks {
            root: Some(root),
            writable: None,
        },
        ..ForkSpec::default()
    }
}

/// A child with busybox and a network of its own.
fn connected() -> (Child, Wire) {
    let (wire, network) = Wire::new();
    let spec = spec(Some(network), busybox_rootfs());
    (template().fork(spec).expect("forks"), wire)
}

/// Reads until a line has come, or panics with what has.
fn await_line(from: &mut UnixStream, line: &str) {
    from.set_read_timeout(Some(PATIENCE)).expect("set");
    let (mut seen, mut byte) = (Vec::new(), [0]);
    let wanted = format!("{line}\n");
    while !seen.ends_with(wanted.as_bytes()) {
        let seen_so_far = String::from_utf8_lossy(&seen).into_owned();
        let count = from.read(&mut byte).expect("a line in time");
        assert_eq!(count, 1, "it has ended: {seen_so_far}");
        seen.push(byte[0]);
    }
}

/// Runs a shell to its end, whose output ends with it.
fn output_of(child: &mut Child, script: &str) -> String {
    let mut stdout = start_shell(child, script);
    rest(&mut stdout, script)
}

fn rest(stdout: &mut UnixStream, script: &str) -> String {
    stdout.set_read_timeout(Some(PATIENCE)).expect("set");
    let mut text = String::new();
    stdout.read_to_string(&mut text).expect(script);
    text
}

/// Tries again until a command does what it should: a server may not listen yet.
fn until_it_works(wire: &Wire, words: &[&str]) -> String {
    let start = Instant::now();
    loop {
        let out = wire.command(words).output().expect("runs");
        if out.status.success() {
            return String::from_utf8_lossy(&out.stdout).into_owned();
        }
        assert!(start.elapsed() < PATIENCE, "{words:?}: {out:?}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

#[test]
fn a_child_without_a_network_has_a_loopback_and_nothing_else() {
    let mut child = template()
        .fork(spec(None, busybox_rootfs()))
        .expect("forks");
    let script = "echo interfaces=$(ls /sys/class/net); echo routes=$(ip route | wc -l)
        echo addresses=$(ip -o addr | wc -l); ip -o addr show lo | grep -c inet6
        ping -c 1 -q 127.0.0.1 > /dev/null && echo alive=yes
        ping -c 1 -W 1 -q 192.0.0.1 > /dev/null 2>&1 || echo outside=none";
    let text = output_of(&mut child, script);
    assert_eq!(field(&text, "interfaces"), "lo");
    assert_eq!(field(&text, "routes"), "0");
    assert_eq!(field(&text, "alive"), "yes");
    assert_eq!(field(&text, "outside"), "none");
}

#[test]
fn a_child_and_its_host_reach_each_other() {
    let (mut child, wire) = connected();
    let host = ["busybox", "httpd", "-f", "-p", "8000", "-h", "/etc"];
    let _server = wire.start(&host);
    let script = format!(
        "echo interfaces=$(ls /sys/class/net)
        ip -o link show eth0 | grep -o 'mtu [0-9]*'; ip -o link show eth0 | grep -o 02:.*brd
        ip -o addr show eth0 | grep -o 'inet.*scope [a-z]*'
        for host in {HOST} {HOST6}; do ping -c 2 -W 20 -q $host > /dev/null && echo echo=$host; done
        until wget -q -O /dev/null http://{HOST}:8000/hostname; do sleep 0.2; done; echo http=yes
        wget -q -O /dev/null http://[{HOST6}]:8000/hostname && echo http6=yes
        echo ready; mkdir /www; echo from the guest > /www/file
        httpd -p 80 -h /www; sleep 1000"
    );
    let mut stdout = start_shell(&mut child, &script);
    for line in [
        "interfaces=eth0 lo",
        "mtu 1500",
        "02:76:6d:72:75:6e brd",
        "inet 192.0.0.2/29 brd 192.0.0.7 scope global",
        "inet6 fd76:6d72:756e::2/64 scope global",
        "echo=192.0.0.1",
        "echo=fd76:6d72:756e::1",
        "http=yes",
        "http6=yes",
        "ready",
    ] {
        await_line(&mut stdout, line);
    }
    for host in [GUEST.to_owned(), format!("[{GUEST6}]")] {
        let url = format!("http://{host}/file");
        let got = until_it_works(&wire, &["busybox", "wget", "-q", "-O", "-", &url]);
        assert_eq!(got, "from the guest\n");
    }
    wire.run(&["busybox", "ping", "-c", "1", "-W", "20", GUEST]);
    // One more process of the container is on its network.
    let exec = ProcessSpec {
        args: [
            "sh",
            "-c",
            "ls /sys/class/net; for id in 1 self; do readlink /proc/$id/ns/net; done",
        ]
        .map(String::from)
        .into(),
        env: vec!["PATH=/bin:/sbin:/usr/bin:/usr/sbin".into()],
        streams: vec![Stream::Stdout],
        ..ProcessSpec::default()
    };
    let mut process = child.exec(exec).expect("starts");
    let text = rest(process.stdout.as_mut().expect("asked for"), "exec");
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[..2], ["eth0", "lo"]);
    assert_eq!(lines[2], lines[3]);
}

#[test]
fn twenty_megabytes_arrive_whole_in_large_frames() {
    let (mut child, wire) = connected();
    let dir = tempfile::tempdir().expect("a directory");
    let data: Vec<u8> = (0..20_000_000_u32)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    std::fs::write(dir.path().join("data"), &data).expect("written");
    let sum = format!("{:x}", HexOf(Sha256::digest(&data).to_vec()));
    let path = dir.path().to_str().expect("text");
    let _server = wire.start(&["busybox", "httpd", "-f", "-p", "8000", "-h", path]);
    // Large frames, by the bytes and frames that a direction has seen.
    let mean = |direction: &str| {
        let count = |what: &str| wire.count(&format!("{direction}_{what}"));
        count("bytes") / count("packets").max(1)
    };
    let script = format!(
        "mkdir /www; cd /www
        until wget -q -O data http://{HOST}:8000/data; do sleep 0.2; done
        echo sum=$(sha256sum < data); httpd -p 80 -h /www; echo ready; sleep 1000"
    );
    let mut stdout = start_shell(&mut child, &script);
    await_line(&mut stdout, &format!("sum={sum} -"));
    assert!(mean("tx") > 2 * 1514, "to the guest: {}", mean("tx"));
    await_line(&mut stdout, "ready");
    let script = format!("busybox wget -q -O - 'http://[{GUEST6}]/data' | sha256sum");
    let got = until_it_works(&wire, &["sh", "-c", &script]);
    assert_eq!(got, format!("{sum}  -\n"));
    assert!(mean("rx") > 2 * 1514, "from the guest: {}", mean("rx"));
}

/// How long four megabytes take to a child, and from it, by the host's clock.
fn times(limits: RateLimits) -> [Duration; 2] {
    let (wire, network) = Wire::new();
    let network = Network { limits, ..network };
    let spec = spec(Some(network), busybox_rootfs());
    let mut child = template().fork(spec).expect("forks");
    let dir = tempfile::tempdir().expect("a directory");
    std::fs::write(dir.path().join("data"), vec![7; 4_000_000]).expect("written");
    let path = dir.path().to_str().expect("text");
    let _server = wire.start(&["busybox", "httpd", "-f", "-p", "8000", "-h", path]);
    let script = format!(
        "mkdir /www; cd /www; echo > small
        head -c 4000000 /dev/zero > data; httpd -p 80 -h /www
        until wget -q -O /dev/null http://{HOST}:8000/; do sleep 0.2; done 2> /dev/null
        echo begin; wget -q -O /dev/null http://{HOST}:8000/data; echo end; sleep 1000"
    );
    std::fs::write(dir.path().join("index.html"), "").expect("written");
    let mut stdout = start_shell(&mut child, &script);
    await_line(&mut stdout, "begin");
    let start = Instant::now();
    await_line(&mut stdout, "end");
    let to_guest = start.elapsed();
    let wget = |name: &str| {
        let url = format!("http://{GUEST}/{name}");
        until_it_works(&wire, &["busybox", "wget", "-q", "-O", "/dev/null", &url]);
    };
    wget("small");
    let start = Instant::now();
    wget("data");
    [to_guest, start.elapsed()]
}

#[test]
fn a_limit_is_kept_in_each_direction() {
    let limit = RateLimit {
        bytes: Some(Rate {
            per_second: NonZeroU64::new(1_000_000).expect("not zero"),
            burst: 100_000,
        }),
        frames: None,
    };
    let free = times(RateLimits::default());
    let limits = RateLimits {
        from_guest: limit,
        to_guest: limit,
    };
    let limited = times(limits);
    println!("4 MB to a guest and from it: {free:?}; at 1 MB/s: {limited:?}");
    for (free, limited) in free.into_iter().zip(limited) {
        // All but the burst, and what was saved while nothing came.
        assert!(limited > Duration::from_millis(3800), "{limited:?}");
        // The headers too; and this host may be slow.
        assert!(limited < Duration::from_secs(10), "{limited:?}");
        assert!(free < limited / 2, "{free:?}");
    }
}

/// In hexadecimal digits.
struct HexOf(Vec<u8>);

impl std::fmt::LowerHex for HexOf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

#[test]
fn a_child_says_nothing_by_itself() {
    let (mut child, wire) = connected();
    child.confirm().expect("has an identity");
    std::thread::sleep(Duration::from_secs(5));
    assert_eq!(wire.count("rx_packets"), 0);
    // But it is there.
    wire.run(&["busybox", "ping", "-c", "1", "-W", "20", GUEST]);
    assert!(wire.count("rx_packets") > 0);
}

#[test]
fn two_children_at_the_same_address_do_not_see_each_other() {
    let mut children = ["one", "two"].map(|name| (connected(), name));
    let mut streams = Vec::new();
    for ((child, _), name) in &mut children {
        let script = format!(
            "mkdir /www; echo {name} > /www/name; httpd -p 80 -h /www; echo ready; sleep 1000"
        );
        let mut stdout = start_shell(child, &script);
        await_line(&mut stdout, "ready");
        streams.push(stdout);
    }
    for ((_, wire), name) in &children {
        for _ in 0..2 {
            let url = format!("http://{GUEST}/name");
            let got = until_it_works(wire, &["busybox", "wget", "-q", "-O", "-", &url]);
            assert_eq!(got, format!("{name}\n"));
        }
    }
}

#[test]
fn a_child_in_a_jailed_worker_has_a_network_too() {
    let program = env!("CARGO_BIN_EXE_vm-run-worker").into();
    let jail = Jail::On(Limits::default());
    let workers = Arc::new(Workers::start(WorkersSpec { program, jail }).expect("a spawner"));
    let pool = Pool::new(template(), Place::Workers(workers), 0).expect("a pool");
    let (wire, mut network) = Wire::new();
    // So slow that each frame waits for its time.
    network.limits.from_guest.bytes = Some(Rate {
        per_second: NonZeroU64::new(1000).expect("not zero"),
        burst: 0,
    });
    let spec = spec(Some(network), busybox_rootfs());
    let mut child = pool.fork(spec).expect("forks");
    let script = format!("ping -c 3 -W 20 -s 500 -i 0.1 -q {HOST6} > /dev/null && echo alive=yes");
    let text = output_of(&mut child, &script);
    assert_eq!(field(&text, "alive"), "yes");
    // The end of a child is the end of its tap.
    assert!(wire.count("rx_packets") >= 3);
    child.end();
    let start = Instant::now();
    while wire.run(&["ls", "/sys/class/net"]) != "lo\n" {
        assert!(start.elapsed() < PATIENCE, "its tap stays");
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn a_warm_container_keeps_its_interface_and_its_children_have_their_own_taps() {
    let (mut parent, wire) = connected();
    let script = format!(
        "ping -c 1 -W 20 -q {HOST} > /dev/null && /run/vm-run/warm > /dev/null
        echo interfaces=$(ls /sys/class/net)
        ping -c 1 -W 20 -q {HOST} > /dev/null 2>&1 && echo outside=yes || echo outside=none"
    );
    let limit = 16 << 20;
    let container = ContainerSpec {
        writable: Writable::Memory { limit },
        warm: true,
        ..ContainerSpec::default()
    };
    let process = ProcessSpec {
        args: ["sh", "-c", &script].map(String::from).into(),
        env: vec!["PATH=/bin:/sbin:/usr/bin:/usr/sbin".into()],
        streams: vec![Stream::Stdout],
        ..ProcessSpec::default()
    };
    let _streams = parent.start(container, process).expect("starts");
    parent.await_warm(PATIENCE).expect("is warm");
    let template = parent.freeze("busybox").expect("freezes");
    assert_eq!(
        wire.run(&["ls", "/sys/class/net"]),
        "lo\n",
        "its tap has gone"
    );
    for connect in [true, false] {
        let made = connect.then(Wire::new);
        let (_wire, network) = made.map_or((None, None), |(wire, net)| (Some(wire), Some(net)));
        let spec = ForkSpec {
            network,
            ..ForkSpec::default()
        };
        let mut child = template.fork(spec).expect("forks");
        let mut process = child.attach(&[Stream::Stdout]).expect("attaches");
        let text = rest(process.stdout.as_mut().expect("asked for"), "warm");
        assert_eq!(field(&text, "interfaces"), "eth0 lo");
        let expected = if connect { "yes" } else { "none" };
        assert_eq!(field(&text, "outside"), expected, "{text}");
    }
}

/// Sends what no kernel sends: frames of any length and content, at any address; an ARP
/// storm in the gateway's name; and headers that ask for impossible offloads.
const HOSTILE: &str = r#"
import os, random, socket, struct
random.seed(7)
raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
raw.bind(("eth0", 0))
sent = refused = 0
def send(frame, by=raw):
    global sent, refused
    try:
        by.send(frame)
        sent += 1
    except OSError:
        refused += 1
for n in range(300):
    send(os.urandom(random.randrange(14, 1515)))
for kind in (0x0800, 0x86dd, 0x0806, 0x8100, 0x88a8, 0x0027):
    for n in range(50):
        head = os.urandom(12) if n % 2 else b"\xff" * 12
        send(head + struct.pack("!H", kind) + os.urandom(random.randrange(0, 1400)))
for n in range(200):
    mac = os.urandom(6)
    body = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1 + n % 2)
    body += mac + bytes([192, 0, 0, 1 + n % 6]) + b"\0" * 6 + bytes([192, 0, 0, 1])
    send(b"\xff" * 6 + mac + b"\x08\x06" + body)
SOL_PACKET, PACKET_VNET_HDR = 263, 15
vnet = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
vnet.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
vnet.bind(("eth0", 0))
for n in range(400):
    head = struct.pack("<BBHHHH", random.choice([0, 1, 1, 2, 255]), random.choice([0, 1, 3, 4, 5, 0x81, 255]),
        random.choice([0, 54, 65535, random.randrange(65536)]), random.choice([0, 1, 1448, 65535]),
        random.choice([0, 14, 34, 65535, random.randrange(200)]), random.choice([0, 6, 16, 65535]))
    kind = random.choice([b"\x08\x00", b"\x86\xdd"])
    send(head + b"\xff" * 6 + os.urandom(6) + kind + b"\x45\x00" + os.urandom(random.randrange(40, 4000)), vnet)
print("sent=%d" % sent, flush=True)
print("refused=%d" % refused, flush=True)
"#;

#[test]
fn hostile_frames_harm_nobody() {
    let (wire, network) = Wire::new();
    let spec = spec(Some(network), python_rootfs());
    let mut child = template().fork(spec).expect("forks");
    let (mut sibling, _other) = connected();
    let script = format!("python3 - <<'END'\n{HOSTILE}\nEND\necho over=$?");
    let text = output_of(&mut child, &script);
    assert_eq!(field(&text, "over"), "0", "{text}");
    let sent: u32 = field(&text, "sent").parse().expect("a number");
    assert!(sent >= 800, "{text}");
    // The tap's side works: the neighbour that the storm was about is learnt anew.
    assert!(wire.count("rx_packets") > 100);
    drop(child);
    run(std::process::Command::new("ip").args(["netns", "list"]));
    let script = format!("ping -c 2 -W 20 -q {HOST} > /dev/null && echo alive=yes");
    let text = output_of(&mut sibling, &script);
    assert_eq!(field(&text, "alive"), "yes");
}
