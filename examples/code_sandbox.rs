//! A sandbox for code: each request runs in a Python of its own, in a virtual machine
//! of its own, which was forked for it from a warm one.
//!
//! It forks a hundred, asks each for `1+1` and for a random token, checks that all
//! tokens differ, and prints how long a request took.
//!
//! ```text
//! cargo build --release
//! target/release/vm-run image load < python.tar      # docker save python:3-slim
//! cargo run --release --example code_sandbox -- TEMPLATE GUEST ROOTFS
//! ```
//!
//! - `TEMPLATE`: the directory of the warm template. What an earlier run left there is
//!   opened; then no other word is needed.
//! - `GUEST`: the directory of `vmlinux` and `initramfs`: `cargo xtask guest` prints it.
//! - `ROOTFS`: a root image that has `python3`, EROFS or ext4: what `image load` made is
//!   below `images/rootfs/` of the state directory.
//!
//! It needs a KVM that runs Linux and, for the jail, root; without root the workers have
//! system call lists alone, and it says so.

use anyhow::{Context, Result, bail, ensure};
use fork::worker::{Jail, Limits, Workers, WorkersSpec, find_program};
use fork::{
    BootSpec, Child, ContainerSpec, Disks, ForkPath, ForkSpec, Guest, Host, Place, Pool,
    ProcessSpec, Stream, Template, Writable,
};
use std::collections::HashSet;
use std::env;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How many requests.
const REQUESTS: usize = 100;
/// VMs that wait for requests.
const READY: usize = 4;
/// For whatever is slow on a slow host: the boot, the imports, the pool.
const PATIENCE: Duration = Duration::from_secs(120);
/// A request that takes longer is given up.
const DEADLINE: Duration = Duration::from_secs(60);

/// Both streams that the program talks over.
const STREAMS: [Stream; 2] = [Stream::Stdin, Stream::Stdout];

/// The program in the template. What is imported before the line `warm` is imported
/// once; each child goes on behind it (docs/warm.md).
const PROGRAM: &str = r#"
import json, math, os, random, re, secrets, socket, sys

with socket.socket(socket.AF_UNIX) as s:
    s.connect(os.environ["VM_RUN_WARM"])
    s.sendall(b"warm\n")
    s.makefile().readline()
random.seed()
for line in sys.stdin:
    try:
        print(eval(line), flush=True)
    except Exception as error:
        print(repr(error), flush=True)
"#;

fn main() -> Result<()> {
    let words: Vec<PathBuf> = env::args_os().skip(1).map(PathBuf::from).collect();
    let host = Arc::new(Host::open()?);
    let place = Place::Workers(Arc::new(workers()?));
    let template = match words.as_slice() {
        [path, ..] if path.exists() => Template::open(host, path)?,
        [path, guest, rootfs] => {
            build(Arc::clone(&host), &place, guest, rootfs)?.save(path)?;
            // From disk, as the next run: all children share the page cache.
            Template::open(host, path)?
        }
        _ => bail!("usage: code_sandbox TEMPLATE [GUEST ROOTFS]"),
    };
    serve(&Pool::new(Arc::new(template), place, READY)?)
}

/// Boots a guest, runs Python in a child of it until that is warm, and freezes it. The
/// image's programs run in that child, so it too lives in a worker.
fn build(host: Arc<Host>, place: &Place, guest: &Path, rootfs: &Path) -> Result<Template> {
    let bare = Template::boot(
        host,
        &BootSpec {
            memory: 128 << 20,
            guest: Some(Guest::in_dir(guest).context("no vmlinux and initramfs in GUEST")?),
            timeout: PATIENCE,
            ..BootSpec::default()
        },
    )?;
    let root = File::open(rootfs).with_context(|| format!("cannot open {}", rootfs.display()))?;
    let parents = Pool::new(Arc::new(bare), place.clone(), 0)?;
    let mut parent = parents.fork(ForkSpec {
        disks: Disks {
            root: Some(root),
            writable: None,
        },
        ..ForkSpec::default()
    })?;
    let container = ContainerSpec {
        writable: Writable::Memory { limit: 16 << 20 },
        warm: true,
        ..ContainerSpec::default()
    };
    let python = ProcessSpec {
        args: ["python3", "-c", PROGRAM].map(String::from).into(),
        env: vec!["PATH=/usr/local/bin:/usr/bin:/bin".into()],
        streams: STREAMS.into(),
        ..ProcessSpec::default()
    };
    // Its streams stay open while it warms up.
    let _streams = parent.start(container, python)?;
    parent.await_warm(PATIENCE)?;
    Ok(parent.freeze("python")?)
}

/// What starts a jailed process for each VM.
fn workers() -> Result<Workers> {
    let jail = if rustix::process::geteuid().is_root() {
        Jail::On(Limits {
            memory: Some(256 << 20),
            ..Limits::default()
        })
    } else {
        eprintln!("not root: workers without users, namespaces and cgroups of their own");
        Jail::Off
    };
    let program = find_program().or_else(beside_examples);
    let program = program.context("no vm-run-worker: run cargo build first")?;
    let workers = Workers::start(WorkersSpec { program, jail })?;
    for missing in workers.missing() {
        eprintln!("the jail lacks {missing}");
    }
    Ok(workers)
}

/// Cargo puts programs one directory above examples.
fn beside_examples() -> Option<PathBuf> {
    let program = env::current_exe().ok()?.parent()?.join("../vm-run-worker");
    program.is_file().then_some(program)
}

/// A child, and a conversation with the Python in it.
struct Sandbox {
    /// Dropping it ends the VM.
    child: Child,
    stdin: UnixStream,
    stdout: BufReader<UnixStream>,
}

impl Sandbox {
    fn fork(pool: &Pool, hostname: String) -> Result<Self> {
        let mut child = pool.fork(ForkSpec {
            hostname,
            ..ForkSpec::default()
        })?;
        let streams = child.attach(&STREAMS)?;
        let stdout = streams.stdout.context("no standard output")?;
        stdout.set_read_timeout(Some(DEADLINE))?;
        Ok(Self {
            child,
            stdin: streams.stdin.context("no standard input")?,
            stdout: BufReader::new(stdout),
        })
    }

    fn evaluate(&mut self, expression: &str) -> Result<String> {
        writeln!(self.stdin, "{expression}")?;
        let mut answer = String::new();
        self.stdout.read_line(&mut answer)?;
        Ok(answer.trim_end().to_owned())
    }
}

/// All requests, one after the other, as on a server that is not overloaded: the pool
/// is full when one comes. The sandboxes stay until the end.
fn serve(pool: &Pool) -> Result<()> {
    let mut sandboxes = Vec::new();
    let mut tokens = HashSet::new();
    let mut times = Vec::new();
    let started = Instant::now();
    for number in 0..REQUESTS {
        pool.wait_full(PATIENCE)?;
        let asked = Instant::now();
        let mut sandbox = Sandbox::fork(pool, format!("sandbox-{number}"))?;
        let two = sandbox.evaluate("1+1")?;
        times.push(asked.elapsed());
        ensure!(two == "2", "sandbox {number} says that 1+1 is {two:?}");
        tokens.insert(sandbox.evaluate("__import__(\"secrets\").token_hex()")?);
        sandboxes.push(sandbox);
    }
    ensure!(tokens.len() == REQUESTS, "two sandboxes have one token");
    let pooled = sandboxes
        .iter()
        .filter(|sandbox| sandbox.child.path() == ForkPath::Pooled)
        .count();
    let mut private = 0;
    for sandbox in &sandboxes {
        private += sandbox.child.stats()?.private;
    }
    times.sort_unstable();
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    println!("{REQUESTS} sandboxes alive at once, {REQUESTS} answers, {REQUESTS} different tokens");
    println!(
        "fork to answer: p50 {:.1} ms, p90 {:.1} ms, longest {:.1} ms; {pooled} of {REQUESTS} from the pool",
        ms(times[REQUESTS / 2]),
        ms(times[REQUESTS * 9 / 10]),
        ms(times[REQUESTS - 1]),
    );
    println!(
        "all requests, and the pool between them: {:.1} s; private memory: {} KiB a sandbox",
        started.elapsed().as_secs_f64(),
        private / REQUESTS as u64,
    );
    Ok(())
}
