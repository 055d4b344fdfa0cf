//! What becomes of the connections of a warm container in its children.

use crate::support::wire::Wire;
use crate::support::{PATIENCE, boot, python_rootfs};
use fork::{
    Child, Connections, ContainerSpec, Disks, ForkSpec, Network, ProcessSpec, Stream, Template,
    Writable,
};
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::os::unix::net::UnixStream;

/// Connects to the host and to itself, says that it is warm, and tells what it finds of
/// both connections: what comes, what error there is, or that nothing happens.
const PROGRAM: &str = r#"
import errno, os, select, socket

def pair(family, host):
    server = socket.socket(family)
    server.bind((host, 0))
    server.listen()
    client = socket.create_connection(server.getsockname()[:2])
    return client, server.accept()[0]

outside = socket.create_connection(("192.0.0.1", 7000))
outside6 = socket.create_connection(("fd76:6d72:756e::1", 7000))
datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
datagrams.connect(("192.0.0.1", 7001))
pairs = [
    pair(socket.AF_INET, "127.0.0.1"),
    pair(socket.AF_INET6, "::1"),
    pair(socket.AF_INET, "192.0.0.2"),
]
try:
    host = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    host.settimeout(20)
    host.connect((2, 1024))
    print("vsock=connected", flush=True)
except OSError as error:
    print("vsock=" + errno.errorcode[error.errno], flush=True)

with socket.socket(socket.AF_UNIX) as s:
    s.connect(os.environ["VM_RUN_WARM"])
    s.sendall(b"warm\n")
    print("connected", flush=True)
    s.makefile().readline()

def state(connection):
    if not select.select([connection], [], [], 0)[0]:
        return "open"
    try:
        return "end" if connection.recv(1) == b"" else "data"
    except OSError as error:
        return errno.errorcode[error.errno]

print("outside=" + state(outside), flush=True)
print("outside6=" + state(outside6), flush=True)
print("datagrams=" + state(datagrams), flush=True)
for number, (one, other) in enumerate(pairs):
    one.sendall(b"x")
    other.settimeout(20)
    print(f"within{number}=" + other.recv(1).decode(), flush=True)
"#;

struct Lines(BufReader<UnixStream>);

impl Lines {
    fn new(stdout: Option<UnixStream>) -> Self {
        let stdout = stdout.expect("was asked for");
        stdout.set_read_timeout(Some(PATIENCE)).expect("set");
        Self(BufReader::new(stdout))
    }

    fn next(&mut self) -> String {
        let mut line = String::new();
        self.0.read_line(&mut line).expect("a line in time");
        line.trim_end().to_owned()
    }
}

/// A template of a container that is connected; its parent has gone.
fn template() -> Template {
    let (wire, network) = Wire::new();
    // The kernel accepts whoever connects.
    let _server = wire.inside(|| TcpListener::bind("[::]:7000").expect("listens"));
    let spec = ForkSpec {
        network: Some(network),
        disks: Disks {
            root: Some(python_rootfs()),
            writable: None,
        },
        ..ForkSpec::default()
    };
    let mut parent = boot(128, 1).fork(spec).expect("forks");
    let limit = 16 << 20;
    let container = ContainerSpec {
        writable: Writable::Memory { limit },
        warm: true,
        ..ContainerSpec::default()
    };
    let process = ProcessSpec {
        args: ["python3", "-c", PROGRAM].map(String::from).into(),
        env: vec!["PATH=/usr/bin:/bin".into()],
        streams: vec![Stream::Stdout],
        ..ProcessSpec::default()
    };
    let started = parent.start(container, process).expect("starts");
    let mut lines = Lines::new(started.stdout);
    // A container reaches nothing of the host's by vsock.
    assert_eq!(lines.next(), "vsock=ECONNRESET");
    assert_eq!(lines.next(), "connected");
    parent.await_warm(PATIENCE).expect("is warm");
    parent.freeze("connected").expect("freezes")
}

fn fork(template: &Template, network: Network, connections: Connections) -> (Child, Lines) {
    let spec = ForkSpec {
        network: Some(network),
        connections,
        ..ForkSpec::default()
    };
    let mut child = template.fork(spec).expect("forks");
    let attached = child.attach(&[Stream::Stdout]).expect("attaches");
    (child, Lines::new(attached.stdout))
}

#[test]
fn connections_to_the_outside_are_reset_or_kept_and_those_within_go_on() {
    let template = template();
    for (connections, outside) in [
        (Connections::Reset, "ECONNABORTED"),
        (Connections::Keep, "open"),
    ] {
        let (_wire, network) = Wire::new();
        let (mut child, mut lines) = fork(&template, network, connections);
        for line in [
            &format!("outside={outside}"),
            &format!("outside6={outside}"),
            "datagrams=open",
            "within0=x",
            "within1=x",
            "within2=x",
        ] {
            assert_eq!(lines.next(), line, "{connections:?}");
        }
        assert_eq!(child.wait().expect("ends").code(), 0);
    }
}
