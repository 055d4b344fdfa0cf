//! Small things for the tests: starting, asking, looking.

use fork::worker::{Counts, Jail, Workers, WorkersSpec};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::net::{RecvFlags, SendFlags, recv, send};
use rustix::process::{Pid, Signal, kill_process};
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::panic::catch_unwind;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

/// How long things may take on an emulated host.
const PATIENCE: Duration = Duration::from_secs(30);

/// Runs the tests whose names hold `filter`, as `cargo test` would.
pub fn run_tests(tests: &[(&str, fn())], filter: &str) -> ExitCode {
    let mut failed = 0;
    for (name, test) in tests {
        if !name.contains(filter) {
            continue;
        }
        let started = Instant::now();
        let passed = catch_unwind(test).is_ok();
        let verdict = if passed { "ok" } else { "FAILED" };
        println!("test {name} ... {verdict} ({:?})", started.elapsed());
        failed += u32::from(!passed);
    }
    ExitCode::from(u8::from(failed > 0))
}

/// A spawner whose workers are this program.
pub fn start(jail: Jail) -> Workers {
    let program = std::env::current_exe().expect("this program");
    Workers::start(WorkersSpec { program, jail }).expect("a spawner; these tests need root")
}

/// Starts a worker, asks it one thing, and returns what it says before it ends.
pub fn ask(workers: &Workers, question: &str) -> Vec<String> {
    let (socket, _) = workers.spawn().expect("a worker");
    send(&socket, question.as_bytes(), SendFlags::NOSIGNAL).expect("sent");
    let mut said = Vec::new();
    let mut line = [0; 512];
    loop {
        match recv(&socket, &mut line, RecvFlags::empty()) {
            Ok((_, 0)) | Err(_) => return said,
            Ok((_, len)) => said.push(String::from_utf8_lossy(&line[..len]).into_owned()),
        }
    }
}

/// The counts, once all workers that were started have ended.
pub fn settled(workers: &Workers) -> Counts {
    let counts = || workers.counts().expect("a spawner");
    wait_until("all workers have ended", || {
        counts().gone == counts().started
    });
    counts()
}

/// Waits for what others do.
pub fn wait_until(what: &str, is_so: impl Fn() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < until, "in vain: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A socket that nothing but a network namespace of its own keeps a process from.
pub fn listen_abstract(name: &str) -> UnixListener {
    let address = SocketAddr::from_abstract_name(name).expect("a name");
    UnixListener::bind_addr(&address).expect("a listener")
}

/// A descriptor that children would inherit.
pub fn leaked_descriptor() -> File {
    let file = File::open("/etc").expect("a directory");
    fcntl_setfd(&file, FdFlags::empty()).expect("inheritable");
    file
}

pub fn pid(text: &str) -> Pid {
    let number = text.trim().parse().expect("a pid");
    Pid::from_raw(number).expect("a pid")
}

pub fn kill(text: &str) {
    kill_process(pid(text), Signal::KILL).expect("killed");
}

/// Whether there is such a process; one that waits to be reaped is none.
pub fn alive(pid: Pid) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"));
    stat.is_ok_and(|stat| !stat.contains(") Z ") && !stat.contains(") X "))
}

/// A field of /proc/PID/status, its words with one space between.
pub fn status(pid: Pid, field: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).expect("a process");
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    let words: Vec<_> = line.expect("the field").split_whitespace().collect();
    words.join(" ")
}

pub fn link(path: &str) -> PathBuf {
    fs::read_link(path).expect("a link")
}

/// What a process has open.
pub fn descriptors(pid: Pid) -> Vec<String> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).expect("a process");
    let target = |entry: fs::DirEntry| fs::read_link(entry.path()).expect("a link");
    entries
        .map(|entry| target(entry.expect("an entry")).display().to_string())
        .collect()
}

/// The directories of a worker's cgroups.
pub fn cgroups(pid: Pid) -> Vec<PathBuf> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).expect("a process");
    let ours = text.lines().filter(|line| line.contains("/vm-run/"));
    ours.filter_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        directory(fields.next()?, fields.next()?)
    })
    .collect()
}

/// A file of the cgroup that bounds a process by a controller; `None` if none of ours
/// does. `file` is named as in version 2.
pub fn cgroup_file(pid: Pid, controller: &str, file: &str) -> Option<String> {
    let older = match file {
        "memory.max" => "memory.limit_in_bytes",
        "cpu.max" => "cpu.cfs_quota_us",
        same => same,
    };
    let found = cgroups(pid).into_iter().find_map(|dir| {
        let v2 = fs::read_to_string(dir.join("cgroup.controllers"));
        let has = match v2 {
            Ok(controllers) => controllers
                .split_whitespace()
                .any(|word| word == controller),
            Err(_) => dir.join(older).exists(),
        };
        let file = if dir.join("cgroup.controllers").exists() {
            file
        } else {
            older
        };
        has.then(|| fs::read_to_string(dir.join(file)).ok())
            .flatten()
    });
    found.map(|value| value.trim().to_owned())
}

/// Where a hierarchy's cgroup lies: as the mounts of this machine have it.
fn directory(controllers: &str, path: &str) -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    let first = controllers.split(',').next().unwrap_or_default();
    mounts.lines().find_map(|line| {
        let fields: Vec<_> = line.split(' ').collect();
        let [_, at, kind, options, ..] = fields.as_slice() else {
            return None;
        };
        let is_it = match *kind {
            "cgroup2" => controllers.is_empty(),
            "cgroup" => options
                .split(',')
                .any(|option| option == first && !first.is_empty()),
            _ => false,
        };
        is_it.then(|| Path::new(at).join(path.trim_start_matches('/')))
    })
}

/// This program in another role.
pub fn this_program(role: &str) -> Child {
    Command::new(std::env::current_exe().expect("this program"))
        .arg(role)
        .stdout(Stdio::piped())
        .spawn()
        .expect("started")
}

pub fn first_line(child: &mut Child) -> String {
    let out = child.stdout.take().expect("a pipe");
    let mut line = String::new();
    BufReader::new(out).read_line(&mut line).expect("a line");
    line.trim().to_owned()
}
