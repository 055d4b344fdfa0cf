//! What a container's network carries, beside the loopback of its host: one line for each
//! way that data takes.

use super::{SETUP_PATIENCE, Workload};
use crate::support::variable;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

/// A container of this image, on the network "app", with this port published.
fn serving(name: &str, publish: &str, command: &[&str]) -> Workload {
    let server = Workload::new(name);
    let tools = variable("VM_RUN_TEST_NETTOOLS");
    if name != "nettools" {
        server.does(&["image", "load", "-i", tools.to_str().expect("a path")]);
    }
    server.does(&["network", "create", "app"]);
    server.starts(&["--network", "app", "-p", publish], command);
    server
}

/// The files of an image, whose programs run on the host itself. Server and client in
/// all measurements are the same programs.
struct OnHost(tempfile::TempDir);

impl OnHost {
    fn new(workload: &Workload, name: &str) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let image = format!("debian-{name}:bookworm");
        let id = workload.does(&["create", "--network", "none", &image]);
        let tar = dir.path().join("tar").to_str().expect("a path").to_owned();
        workload.does(&["export", "-o", &tar, id.trim_end()]);
        workload.does(&["rm", id.trim_end()]);
        let files = dir.path().join("files");
        std::fs::create_dir(&files).expect("made");
        let mut unpack = Command::new("tar");
        unpack.args(["--numeric-owner", "-xpf", &tar, "-C"]);
        assert!(unpack.arg(&files).status().expect("runs").success());
        std::fs::remove_file(tar).expect("removed");
        Self(dir)
    }

    fn command(&self, words: &[&str]) -> Command {
        const ENTER: &str = "mount --rbind /dev $0/dev && mount -t proc proc $0/proc &&
            exec chroot $0 \"$@\"";
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", ENTER]);
        command.arg(self.0.path().join("files")).args(words);
        command.stdin(Stdio::null());
        command
    }

    fn serve(&self, words: &[&str]) -> Serving {
        let mut command = self.command(words);
        Serving(command.stdout(Stdio::null()).spawn().expect("starts"))
    }

    /// What a command prints, or nothing.
    fn prints(&self, words: &[&str]) -> Option<String> {
        let out = self.command(words).output().expect("runs");
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        out.status.success().then_some(text)
    }
}

struct Serving(Child);

impl Drop for Serving {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// Asks until the server is there, and what was measured can be read.
fn measured<T>(ask: impl Fn() -> Option<String>, read: impl Fn(&str) -> Option<T>) -> T {
    let deadline = Instant::now() + SETUP_PATIENCE;
    loop {
        let said = ask().unwrap_or_default();
        if let Some(figure) = read(&said) {
            return figure;
        }
        assert!(Instant::now() < deadline, "the last answer: {said:?}");
        std::thread::sleep(std::time::Duration::from_secs(1));
    }
}

/// What a client says that is asked at `(host, port)`: over the loopback, by the published
/// port, by the container's address, and from another container by name.
fn each_way<T: std::fmt::Display>(
    what: &str,
    server: &Workload,
    (loopback, published, inside): (u16, u16, u16),
    tools: (&OnHost, &str),
    client: impl Fn(&str, u16) -> Vec<String>,
    read: impl Fn(&str) -> Option<T>,
) {
    let (on_host, image) = tools;
    let inspected: serde_json::Value =
        serde_json::from_str(&server.does(&["inspect", "it"])).expect("JSON");
    let address = &inspected[0]["NetworkSettings"]["Networks"]["app"]["IPAddress"];
    let address = address.as_str().expect("an address");
    let from_host = |host: &str, port| {
        let words = client(host, port);
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        measured(|| on_host.prints(&words), &read)
    };
    let from_container = || {
        let words = client("it", inside);
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let run = ["run", "--rm", "--network", "app", "--entrypoint", "", image];
        let ask = || {
            let ran = server.ran(&[&run, &words[..]].concat());
            (ran.status == 0).then(|| ran.out())
        };
        measured(ask, &read)
    };
    println!(
        "{what}: loopback of the host: {}",
        from_host("127.0.0.1", loopback)
    );
    println!(
        "{what}: host to the container's address: {}",
        from_host(address, inside)
    );
    println!(
        "{what}: host to the published port: {}",
        from_host("127.0.0.1", published)
    );
    println!("{what}: another container, by name: {}", from_container());
}

fn words(words: &[&str], host: &str, port: u16, last: &[&str]) -> Vec<String> {
    let port = port.to_string();
    let named = [words, &[host, "-p", &port], last].concat();
    named.iter().map(|word| (*word).to_owned()).collect()
}

#[test]
fn of_one_stream_each_way() {
    let server = serving("nettools", "25201:5201", &["iperf3", "-s"]);
    let on_host = OnHost::new(&server, "nettools");
    let _loopback = on_host.serve(&["iperf3", "-s", "-p", "5299"]);
    let read = |said: &str| {
        let said: serde_json::Value = serde_json::from_str(said).ok()?;
        let bits = said["end"]["sum_received"]["bits_per_second"].as_f64()?;
        (bits > 0.0).then(|| format!("{:.0} Mbit/s", bits / 1e6))
    };
    for (what, last) in [("iperf3 to it", "-J"), ("iperf3 from it", "-RJ")] {
        let client = |host: &str, port| words(&["iperf3", "-t", "5", "-c"], host, port, &[last]);
        let tools = (&on_host, server.image.as_str());
        each_way(what, &server, (5299, 25201, 5201), tools, client, read);
    }
}

#[test]
fn of_pages_of_nginx() {
    let server = serving("nginx", "28080:80", &[]);
    let image = "debian-nettools:bookworm";
    let on_host = OnHost::new(&server, "nettools");
    let nginx = OnHost::new(&server, "nginx");
    // The port of its only site.
    let _loopback = nginx.serve(&["nginx", "-g", "daemon off;"]);
    let url = |host: &str, port: u16| format!("http://{host}:{port}/");
    let curl = |host: &str, port: u16| ["curl", "-sf", &url(host, port)].map(str::to_owned).into();
    let page = |said: &str| (said == "served by nginx\n").then_some("served");
    each_way(
        "curl",
        &server,
        (80, 28080, 80),
        (&on_host, image),
        curl,
        page,
    );
    let wrk = |host: &str, port: u16| {
        let words = ["wrk", "-t1", "-c8", "-d5s", "--latency", &url(host, port)];
        words.map(str::to_owned).into()
    };
    let read = |said: &str| {
        let of = |name: &str| {
            let line = said.lines().find(|line| line.trim().starts_with(name))?;
            line.split_whitespace().nth(1)
        };
        let failed = said.contains("Socket errors") || said.contains("Non-2xx");
        let figure = format!(
            "{}/s, p50 {}, p99 {}",
            of("Requests/sec:")?,
            of("50%")?,
            of("99%")?
        );
        (!failed).then_some(figure)
    };
    each_way(
        "wrk",
        &server,
        (80, 28080, 80),
        (&on_host, image),
        wrk,
        read,
    );
}

#[test]
fn of_questions_to_redis() {
    let all = ["--protected-mode", "no", "--bind", "0.0.0.0", "--save", ""];
    let server = serving("redis", "26379:6379", &all);
    let on_host = OnHost::new(&server, "redis");
    let _loopback = on_host.serve(&["redis-server", "--port", "6399", "--save", ""]);
    let client = |host: &str, port| {
        let last = [
            "-n",
            "4000",
            "-c",
            "8",
            "-t",
            "ping_mbulk,set,get",
            "-q",
            "--csv",
        ];
        words(&["redis-benchmark", "-h"], host, port, &last)
    };
    // "test","rps","avg_latency_ms","min","p50","p95","p99","max"
    let read = |said: &str| {
        let lines = said.lines().filter(|line| line.starts_with('"')).skip(1);
        let figures: Vec<String> = lines
            .filter_map(|line| {
                let fields: Vec<&str> =
                    line.split(',').map(|word| word.trim_matches('"')).collect();
                let [test, rps, _, _, p50, _, p99, _] = fields[..] else {
                    return None;
                };
                Some(format!("{test} {rps}/s p50 {p50} ms p99 {p99} ms"))
            })
            .collect();
        (figures.len() == 3).then(|| figures.join(", "))
    };
    let tools = (&on_host, server.image.as_str());
    each_way(
        "redis-benchmark",
        &server,
        (6399, 26379, 6379),
        tools,
        client,
        read,
    );
}
