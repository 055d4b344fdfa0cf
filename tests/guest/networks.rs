//! Containers on networks, from the command line: reached by a published port and by name,
//! kept to where they may go, and gone without a trace.

use crate::support::wire::run;
use crate::support::{Call, PATIENCE, Ran, own_root, world};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// The world outside of this host: a network namespace at the end of a wire.
struct Outside {
    name: String,
    server: Option<Child>,
}

const OUTSIDE: &str = "203.0.113.2";

impl Outside {
    fn new() -> Self {
        let name = format!("vm-run-out-{}", std::process::id());
        let outside = Self { name, server: None };
        let name = &outside.name;
        ip(&["netns", "add", name]);
        ip(&[
            "link", "add", "vmout0", "type", "veth", "peer", "name", "eth0", "netns", name,
        ]);
        ip(&["addr", "add", "203.0.113.1/24", "dev", "vmout0"]);
        ip(&["link", "set", "vmout0", "up"]);
        ip(&["-n", name, "link", "set", "lo", "up"]);
        ip(&["-n", name, "addr", "add", "203.0.113.2/24", "dev", "eth0"]);
        ip(&["-n", name, "link", "set", "eth0", "up"]);
        outside
    }

    /// A name server that knows one name, and a server of HTTP.
    fn serving(mut self) -> Self {
        const PROGRAM: &str = r#"
import http.server, socket, struct, threading
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
        self.wfile.write(b"outside, for " + self.client_address[0].encode() + b"\n")
    def log_message(self, *words): pass
def names():
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(("203.0.113.2", 53))
    while True:
        q, who = s.recvfrom(2000)
        end = q.index(b"\0", 12) + 5
        known = q[12:end].lower().startswith(b"\x05world\x07example\x00\x00\x01")
        head = q[:2] + (b"\x81\x80" if known else b"\x81\x83") + b"\0\1" + (b"\0\1" if known else b"\0\0") + b"\0\0\0\0"
        answer = b"\xc0\x0c\0\1\0\1\0\0\0\x3c\0\4" + bytes([203, 0, 113, 2]) if known else b""
        s.sendto(head + q[12:end] + answer, who)
threading.Thread(target=names, daemon=True).start()
http.server.ThreadingHTTPServer(("203.0.113.2", 8000), Answer).serve_forever()
"#;
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name, "python3", "-c", PROGRAM]);
        self.server = Some(command.stdin(Stdio::null()).spawn().expect("starts"));
        let start = Instant::now();
        while !http(&format!("{OUTSIDE}:8000")).starts_with("outside") {
            assert!(start.elapsed() < PATIENCE, "it does not serve");
            std::thread::sleep(Duration::from_millis(200));
        }
        self
    }

    /// What a command there prints.
    fn prints(&self, words: &[&str]) -> String {
        let command = ["netns", "exec", &self.name];
        let out = Command::new("ip").args(command).args(words).output();
        String::from_utf8_lossy(&out.expect("runs").stdout).into_owned()
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        if let Some(server) = &mut self.server {
            server.kill().ok();
            server.wait().ok();
        }
        // The other end of its wire goes with it.
        Command::new("ip")
            .args(["netns", "del", &self.name])
            .status()
            .ok();
    }
}

fn ip(words: &[&str]) {
    run(Command::new("ip").args(words));
}

/// What is served at the root of this host's port, or nothing.
pub fn http(address: &str) -> String {
    let get = || -> std::io::Result<String> {
        let mut stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let body = answer.split_once("\r\n\r\n");
        Ok(body.map(|(_, body)| body.to_owned()).unwrap_or_default())
    };
    get().unwrap_or_default()
}

pub fn until(what: &str, mut body: impl FnMut() -> bool) {
    let start = Instant::now();
    while !body() {
        assert!(start.elapsed() < PATIENCE, "{what}");
        std::thread::sleep(Duration::from_millis(300));
    }
}

pub fn does(root: &Path, words: &[&str]) -> String {
    let ran = Call::vm_run_in(root, words).end();
    assert_eq!(ran.status, 0, "{words:?}: {ran}");
    ran.out().trim_end().to_owned()
}

/// A container that stays.
pub fn starts(root: &Path, words: &[&str]) -> String {
    let ran = Call::run_to_keep(root, &[&["-d"], words].concat()).end();
    assert_eq!(ran.status, 0, "{words:?}: {ran}");
    ran.out().trim_end().to_owned()
}

/// A shell in a container of its own, to its end.
fn shell(root: &Path, options: &[&str], script: &str) -> Ran {
    Call::run_in(root, &[options, &["busybox", "sh", "-c", script]].concat()).end()
}

pub fn inspect(root: &Path, what: &[&str]) -> serde_json::Value {
    let text = does(root, what);
    let mut all: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    all[0].take()
}

const SERVE: &str = "mkdir /www; hostname > /www/index.html; exec httpd -f -p 80 -h /www";

#[test]
fn a_container_is_reached_by_a_published_port_and_by_name() {
    let own = own_root();
    let root = own.path();
    let id = does(root, &["network", "create", "app"]);
    let words = [
        "--network",
        "app",
        "--network-alias",
        "www",
        "-p",
        "18080:80",
        "--name",
        "web",
    ];
    let server = ["--hostname", "the-web", "busybox", "sh", "-c", SERVE];
    let web = starts(root, &[&words[..], &server[..]].concat());
    until("it is not published", || {
        http("127.0.0.1:18080") == "the-web\n"
    });
    assert_eq!(http("[::1]:18080"), "the-web\n");
    // By each of its names, from another; nobody is asked who is beside them.
    let script = format!(
        "for name in web www {} WEB; do wget -q -O - http://$name/ || echo no $name; done
        nslookup web | grep -c Address; cat /etc/resolv.conf",
        &web[..12]
    );
    let client = shell(root, &["--network", "app"], &script);
    let out = client.out();
    assert!(out.starts_with(&"the-web\n".repeat(4)), "{client}");
    assert!(out.contains("nameserver 192.0.0.1\n"), "{client}");
    // From another network neither by name nor by address.
    let address = inspect(root, &["inspect", "web"]);
    let place = &address["NetworkSettings"]["Networks"]["app"];
    assert_eq!(place["NetworkID"], id.as_str());
    let address = place["IPAddress"].as_str().expect("an address").to_owned();
    let script = format!(
        "wget -q -O - http://web/ || echo name=no
        wget -q -O - http://{address}/ || echo address=no"
    );
    let stranger = shell(root, &[], &script);
    assert_eq!(stranger.out(), "name=no\naddress=no\n", "{stranger}");
    // As docker says it.
    assert_eq!(
        does(root, &["port", "web"]),
        "80/tcp -> 0.0.0.0:18080\n80/tcp -> [::]:18080"
    );
    assert!(does(root, &["ps"]).contains("0.0.0.0:18080->80/tcp, [::]:18080->80/tcp"));
    let network = inspect(root, &["network", "inspect", "app"]);
    assert_eq!(network["Containers"][&web]["Name"], "web");
    // The port is somebody's.
    let ran = Call::run_in(root, &["-p", "18080:80", "busybox", "true"]).end();
    assert_eq!(ran.status, 125, "{ran}");
    assert!(ran.err().contains("the port is taken"), "{ran}");
    // It keeps its port and its name when it is started again.
    does(root, &["rename", "web", "renamed"]);
    does(root, &["restart", "-t", "0", "renamed"]);
    until("it is not published again", || {
        http("127.0.0.1:18080") == "the-web\n"
    });
    let script = "wget -q -O - http://renamed/; wget -q -O - http://web/ || echo gone";
    let client = shell(root, &["--network", "app"], script);
    assert_eq!(client.out(), "the-web\ngone\n", "{client}");
    let refused = Call::vm_run_in(root, &["network", "rm", "app"]).refused(125);
    assert!(refused.contains("in use by container renamed"), "{refused}");
    does(root, &["rm", "-f", "renamed"]);
    does(root, &["network", "rm", "app"]);
    assert_eq!(http("127.0.0.1:18080"), "");
}

#[test]
fn a_container_goes_where_it_may() {
    let outside = Outside::new().serving();
    let root = &world().root;
    let get = format!("wget -q -O - http://{OUTSIDE}:8000/ || echo no");
    let free = shell(root, &[], &get);
    // Behind the host's address.
    assert_eq!(free.out(), "outside, for 203.0.113.1\n", "{free}");
    for (options, expected) in [
        (&["--network", "none"][..], "no\n"),
        (&["--egress", "none"], "no\n"),
        (
            &["--egress", "203.0.113.0/24:8000/tcp"],
            "outside, for 203.0.113.1\n",
        ),
        (&["--egress", "203.0.113.2:8001"], "no\n"),
    ] {
        let ran = shell(root, options, &get);
        assert_eq!(ran.out(), expected, "{options:?}: {ran}");
    }
    // Names of the outside, by whom the host asks, if it may ask.
    let named = "wget -q -O - http://world.example:8000/ || echo no";
    for (options, expected) in [
        (&["--dns", OUTSIDE][..], "outside, for 203.0.113.1\n"),
        (
            &[
                "--dns",
                OUTSIDE,
                "--egress",
                "dns",
                "--egress",
                "203.0.113.2",
            ],
            "outside, for 203.0.113.1\n",
        ),
        (&["--dns", OUTSIDE, "--egress", "203.0.113.2"], "no\n"),
    ] {
        let ran = shell(root, options, named);
        assert_eq!(ran.out(), expected, "{options:?}: {ran}");
    }
    // What the host itself serves it does not reach, but on a network that may.
    let _host = Background(
        Command::new("busybox")
            .args(["httpd", "-f", "-p", "18081", "-h", "/"])
            .spawn()
            .expect("starts"),
    );
    until("the host does not serve", || {
        !http("127.0.0.1:18081").is_empty()
    });
    does(root, &["network", "create", "--host-access", "open"]);
    let get = "wget -q -O /dev/null http://host:18081/etc/hostname && echo yes || echo no";
    for (network, expected) in [("bridge", "no\n"), ("open", "yes\n")] {
        let options = ["--network", network, "--add-host", "host:host-gateway"];
        let ran = shell(root, &options, get);
        assert_eq!(ran.out(), expected, "{network}: {ran}");
    }
    does(root, &["network", "rm", "open"]);
    // From outside a published port is the container's, with its client's address.
    let script = format!("{SERVE} -vv");
    let server = starts(root, &["-p", "18082:80", "busybox", "sh", "-c", &script]);
    let get = "import urllib.request as r; print(r.urlopen('http://203.0.113.1:18082/').read())";
    until("it is not published", || {
        !outside.prints(&["python3", "-c", get]).is_empty()
    });
    let log = Call::vm_run_in(root, &["logs", &server]).end().err();
    assert!(log.contains(OUTSIDE), "{log}");
    does(root, &["rm", "-f", &server]);
}

#[test]
fn networks_come_and_go_while_a_container_runs() {
    let root = &world().root;
    for network in ["one", "two"] {
        does(root, &["network", "create", network]);
    }
    starts(
        root,
        &[
            "--name",
            "server",
            "--network",
            "two",
            "busybox",
            "sh",
            "-c",
            SERVE,
        ],
    );
    starts(
        root,
        &[
            "--name",
            "wanderer",
            "--network",
            "one",
            "busybox",
            "sleep",
            "1000",
        ],
    );
    let get = [
        "exec",
        "wanderer",
        "wget",
        "-q",
        "-O",
        "-",
        "http://server/",
    ];
    let reaches = || Call::vm_run_in(root, &get).end().status == 0;
    assert!(!reaches());
    does(root, &["network", "connect", "two", "wanderer"]);
    until("it is not reached", reaches);
    let places = &inspect(root, &["inspect", "wanderer"])["NetworkSettings"]["Networks"];
    assert!(places["one"].is_object() && places["two"].is_object());
    does(root, &["network", "disconnect", "two", "wanderer"]);
    assert!(!reaches());
    let twice = ["network", "disconnect", "two", "wanderer"];
    assert!(
        Call::vm_run_in(root, &twice)
            .refused(125)
            .contains("is not on network two")
    );
    does(root, &["rm", "-f", "server", "wanderer"]);
    let pruned = does(root, &["network", "prune", "--force"]);
    for network in ["one", "two"] {
        assert!(pruned.contains(network), "{pruned}");
    }
}

#[test]
fn a_warm_container_is_on_a_network_of_each_child_s_own() {
    let outside = Outside::new().serving();
    let root = &world().root;
    let script = format!(
        "wget -q -O /dev/null http://{OUTSIDE}:8000/ || exit 9
        /run/vm-run/warm > /dev/null; wget -q -O - http://{OUTSIDE}:8000/"
    );
    let words = ["--name", "netted", "--image", "busybox", "--warm", &script];
    let built = Call::template_build_in(root, &words).end();
    assert_eq!(built.status, 0, "{built}");
    for _ in 0..2 {
        let ran = Call::run_in(root, &["--template", "netted"]).end();
        assert_eq!(ran.out(), "outside, for 203.0.113.1\n", "{ran}");
    }
    does(root, &["template", "rm", "netted"]);
    drop(outside);
}

/// A process that is killed at the end.
struct Background(Child);

impl Drop for Background {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

#[test]
fn connections_of_a_template_are_reset_or_kept_as_it_is_chosen() {
    const CONNECTED: &str = "mkfifo /p; sleep 1000 > /p & nc 203.0.113.2 8000 < /p &
        is_open() { netstat -tn | grep -q ':8000 .*ESTABLISHED'; }
        until is_open; do sleep 0.2; done
        /run/vm-run/warm > /dev/null && is_open && echo open || echo reset; exit 0";
    let _outside = Outside::new().serving();
    let own = own_root();
    let root = own.path();
    let words = ["--name", "w", "--image", "busybox", "--network", "bridge"];
    let warm = ["--warm", CONNECTED];
    let built = Call::template_build_in(root, &[&words[..], &warm].concat()).end();
    assert_eq!(built.status, 0, "{built}");
    for (options, state) in [
        (&[][..], "reset\n"),
        (&["--connections", "reset"], "reset\n"),
        (&["--connections", "keep"], "open\n"),
    ] {
        let ran = Call::run_in(root, &[options, &["--template", "w"]].concat()).end();
        assert_eq!((ran.status, ran.out().as_str()), (0, state), "{ran}");
    }
}

#[test]
fn nothing_is_left_of_a_network_whose_processes_were_killed() {
    let own = own_root();
    let root = own.path();
    let state = || {
        let lines =
            "ip -o link | cut -d: -f2; ip -o addr | cut -d' ' -f2-7 | sort; nft list tables;
            ss -Hltun | sort; lsns -n -t net -o NS | sort";
        run(Command::new("sh").args(["-c", lines]))
    };
    let before = state();
    does(root, &["network", "create", "app"]);
    for number in ["1", "2"] {
        let (port, name) = (format!("1809{number}:80"), format!("victim-{number}"));
        let words = ["--network", "app", "-p", &port, "--name", &name];
        starts(root, &[&words[..], &["busybox", "sleep", "1000"]].concat());
    }
    assert_ne!(state(), before);
    // Workers are their spawners' children, and end with them.
    let pattern = root.to_str().expect("text");
    run(Command::new("pkill").args(["-9", "-f", pattern]));
    // Whatever vm-run does next.
    does(root, &["ps"]);
    let mut after = String::new();
    until("something is left", || {
        after = state();
        after == before
    });
    // And it starts again.
    does(root, &["start", "victim-1"]);
    does(root, &["rm", "-f", "victim-1", "victim-2"]);
    assert_eq!(state(), before);
}

/// How many at once; `cargo xtask soak` asks for a hundred.
fn many() -> usize {
    let asked = std::env::var("VM_RUN_TEST_NETWORKED").ok();
    asked.map_or(6, |n| n.parse().expect("VM_RUN_TEST_NETWORKED is a number"))
}

/// How many are being started at a time. All live at once; but a hundred that begin at
/// once take a slow host minutes each.
const STARTING: usize = 8;

#[test]
fn many_containers_at_once_serve_each_other_and_their_host() {
    let own = own_root();
    let root = own.path();
    does(root, &["network", "create", "crowd"]);
    let start = Instant::now();
    let script = "mkdir /www; hostname > /www/index.html; exec httpd -f -p 80 -h /www";
    std::thread::scope(|scope| {
        for first in 0..STARTING {
            scope.spawn(move || {
                (first..many()).step_by(STARTING).for_each(|number| {
                    let (name, port) = (format!("one-{number}"), format!("{}:80", 21_000 + number));
                    let words = [
                        "--network",
                        "crowd",
                        "-p",
                        &port,
                        "--name",
                        &name,
                        "--hostname",
                        &name,
                    ];
                    starts(
                        root,
                        &[&words[..], &["busybox", "sh", "-c", script]].concat(),
                    );
                })
            });
        }
    });
    println!("{} began in {:?}", many(), start.elapsed());
    for number in 0..many() {
        let address = format!("127.0.0.1:{}", 21_000 + number);
        until(&address, || http(&address) == format!("one-{number}\n"));
    }
    let script = format!(
        "n=0; while [ $n -lt {} ]; do wget -q -O - http://one-$n/ | grep -qx one-$n || echo no $n
        n=$((n + 1)); done; echo over",
        many()
    );
    let ran = shell(root, &["--network", "crowd"], &script);
    assert_eq!(ran.out(), "over\n", "{ran}");
    println!("and served all in {:?}", start.elapsed());
    let all = does(root, &["ps", "-q"]);
    let names: Vec<&str> = all.lines().collect();
    does(root, &[&["rm", "-f"], &names[..]].concat());
    does(root, &["network", "rm", "crowd"]);
}
