//! The host's side of the tests: images, an agent in a process of its own, and a
//! client of the protocol.

use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{Mode, OFlags, open};
use rustix::mount::{MountFlags, MountPropagationFlags};
use rustix::process::{PidfdFlags, Resource, Rlimit, getpid, pidfd_open, setrlimit};
use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vm_run_abi::identity::Connections;
use vm_run_abi::protocol::{
    CONTAINER, ContainerSpec, Event, Hello, ProcessId, ProcessSpec, Request, Stream, Writable,
};
use vm_run_agent::devices::Rules;
use vm_run_agent::frame;
use vm_run_agent::freezer::Freezer;
use vm_run_agent::network::Network;
use vm_run_agent::prepared::Prepared;
use vm_run_agent::rootfs::Disks;
use vm_run_agent::serve::{Done, Server};
use vm_run_agent::spawn::Resources;
use vm_run_agent::volumes::Source;
use vm_run_agent::{mounts, sys};

/// A disk of which every byte is zero.
const NO_DISK: &str = "/dev/zero";

/// No test waits longer for anything.
const PATIENCE: Duration = Duration::from_secs(30);

/// The agent, as the test starts it: `serve SOCKET IMAGE WRITABLE CGROUP VOLUMES MOUNTED`,
/// PID 1 of a PID namespace, in a mount and a UTS namespace.
pub fn serve(args: &[String]) -> ExitCode {
    let [socket, image, writable, cgroup, volumes, mounted] = args else {
        return ExitCode::from(2);
    };
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", private).unwrap();
    mounts::mount("tmpfs", mounts::BASE, "tmpfs", MountFlags::empty(), c"").unwrap();
    let listener = UnixListener::bind(socket).unwrap();
    listener.set_nonblocking(true).unwrap();
    let forks = UnixListener::bind(fork_socket(Path::new(socket))).unwrap();
    let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
    let cgroup = open(cgroup, flags, Mode::empty()).unwrap();
    let resources = Resources {
        disks: Disks {
            image: image.clone(),
            window: None,
            mounted: mounted.clone(),
            writable: writable.clone(),
            volumes: Source {
                kind: "ext4".to_owned(),
                name: volumes.clone(),
            },
        },
        freezer: Freezer::open(cgroup.as_fd()).unwrap(),
        rules: Rules::prepare(cgroup.as_fd()).unwrap(),
        cgroup,
        network: Some(Network::of_this_process().unwrap()),
        helper: env!("CARGO_BIN_EXE_warm").to_owned(),
        agent: pidfd_open(getpid(), PidfdFlags::empty()).unwrap(),
    };
    let limit = Rlimit {
        current: Some(4096),
        maximum: Some(4096),
    };
    setrlimit(Resource::Nofile, limit).unwrap();
    let signals = sys::child_signals().unwrap();
    let prepared = Prepared::fork(&resources).unwrap();
    let mut server =
        Server::new(OwnedFd::from(listener), signals, resources, prepared, None).unwrap();
    while server.run().unwrap() == Done::Frozen {
        let generation = fork_point(&forks);
        let child = vm_run_agent::identity::Child {
            generation,
            // The network here is that of the machine that runs the test.
            connections: Connections::Keep,
        };
        server.become_child(child).unwrap();
    }
    ExitCode::SUCCESS
}

/// Where the agent waits for [`Agent::fork`].
fn fork_socket(socket: &Path) -> PathBuf {
    socket.with_extension("fork")
}

/// In place of the doorbell and the identity page: who connects sees that the
/// agent is there, and says a generation and a hostname.
fn fork_point(forks: &UnixListener) -> u64 {
    let (mut stream, _) = forks.accept().unwrap();
    stream.write_all(b"!").unwrap();
    let mut generation = [0; 8];
    stream.read_exact(&mut generation).unwrap();
    let mut hostname = Vec::new();
    stream.read_to_end(&mut hostname).unwrap();
    rustix::system::sethostname(&hostname).unwrap();
    u64::from_le_bytes(generation)
}

fn run(command: &mut Command) -> String {
    let out = command.output().unwrap();
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{command:?}: {stderr}");
    String::from_utf8(out.stdout).unwrap()
}

/// A loop device, taken down at the end.
pub struct Loop(pub String);

impl Loop {
    fn attach(file: &Path, options: &[&str]) -> Self {
        let mut losetup = Command::new("losetup");
        let losetup = losetup.args(["--find", "--show"]).args(options).arg(file);
        Self(run(losetup).trim().to_owned())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        run(Command::new("losetup").args(["--detach", &self.0]));
    }
}

/// What all cases share.
pub struct Images {
    pub dir: PathBuf,
    /// A root file system of busybox.
    pub busybox: Loop,
    /// The same, as an ext4.
    pub busybox_ext4: Loop,
}

impl Images {
    pub fn make() -> Self {
        let dir = std::env::temp_dir().join(format!("vm-run-agent-test-{}", std::process::id()));
        let root = dir.join("root");
        make_busybox(&root);
        let erofs = dir.join("busybox.erofs");
        run(Command::new("mkfs.erofs")
            .arg("--quiet")
            .arg(&erofs)
            .arg(&root));
        let ext4 = dir.join("busybox.ext4");
        let mut mkfs = Command::new("mkfs.ext4");
        run(mkfs.args(["-q", "-d"]).arg(&root).arg(&ext4).arg("8M"));
        Self {
            busybox: Loop::attach(&erofs, &["--read-only"]),
            busybox_ext4: Loop::attach(&ext4, &["--read-only"]),
            dir,
        }
    }

    /// A new ext4 with what is in a directory.
    pub fn filled(&self, name: &str, from: &Path) -> Loop {
        let file = self.dir.join(name);
        let mut mkfs = Command::new("mkfs.ext4");
        run(mkfs.args(["-q", "-d"]).arg(from).arg(&file).arg("16M"));
        Loop::attach(&file, &[])
    }

    /// A new, empty ext4.
    pub fn writable(&self) -> Loop {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("writable-{}", COUNT.fetch_add(1, Ordering::Relaxed));
        let file = self.dir.join(name);
        run(Command::new("mkfs.ext4").arg("-q").arg(&file).arg("16M"));
        Loop::attach(&file, &[])
    }
}

impl Drop for Images {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.dir).unwrap();
    }
}

/// A small image. /etc is there; /proc, /dev and /sys are not, and have to be
/// made. /etc/hosts leads to a file that must not be written.
fn make_busybox(root: &Path) {
    for name in ["bin", "etc", "home/web", "tmp"] {
        fs::create_dir_all(root.join(name)).unwrap();
    }
    fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
    let list = run(Command::new("/bin/busybox").arg("--list"));
    for name in list.lines().filter(|name| *name != "busybox") {
        symlink("busybox", root.join("bin").join(name)).unwrap();
    }
    fs::set_permissions(root.join("tmp"), fs::Permissions::from_mode(0o1777)).unwrap();
    let passwd = "root:x:0:0:root:/root:/bin/sh\nweb:x:1000:1000::/home/web:/bin/sh\n";
    fs::write(root.join("etc/passwd"), passwd).unwrap();
    fs::write(
        root.join("etc/group"),
        "root:x:0:\nweb:x:1000:\nadm:x:4:web\n",
    )
    .unwrap();
    symlink("/tmp/elsewhere", root.join("etc/hosts")).unwrap();
    fs::write(root.join("etc/machine-id"), "the image's\n").unwrap();
    copy_libraries(root);
    let executable = |name: &str, content: &[u8]| {
        fs::write(root.join(name), content).unwrap();
        fs::set_permissions(root.join(name), fs::Permissions::from_mode(0o755)).unwrap();
    };
    executable("bin/garbage", b"\x01\x02 no program");
    executable("bin/orphan-script", b"#!/no/such/interpreter\n");
}

/// What this test is linked with: it is the init of a container too, where the agent
/// is static.
fn copy_libraries(root: &Path) {
    let linked = run(Command::new("ldd").arg(std::env::current_exe().unwrap()));
    for path in linked
        .split_whitespace()
        .filter(|word| word.starts_with('/'))
    {
        let target = root.join(&path[1..]);
        fs::create_dir_all(target.parent().unwrap()).unwrap();
        fs::copy(path, target).unwrap();
    }
}

/// An agent that is at its fork point.
pub struct ForkPoint(UnixStream);

/// An agent, and the control connection to it.
pub struct Agent {
    process: Child,
    socket: PathBuf,
    cgroup: PathBuf,
    pub control: UnixStream,
}

impl Agent {
    pub fn start(images: &Images) -> Self {
        Self::start_with(images, &images.busybox, "/dev/null")
    }

    pub fn start_with(images: &Images, image: &Loop, writable: &str) -> Self {
        Self::start_on(images, image, writable, "/dev/null", NO_DISK)
    }

    /// An agent that has an empty layer mounted.
    pub fn start_with_mounted(images: &Images, mounted: &str) -> Self {
        Self::start_on(images, &images.busybox, "/dev/null", "/dev/null", mounted)
    }

    /// An agent whose volumes are on an ext4.
    pub fn start_with_volumes(
        images: &Images,
        image: &Loop,
        writable: &str,
        volumes: &str,
    ) -> Self {
        Self::start_on(images, image, writable, volumes, NO_DISK)
    }

    fn start_on(
        images: &Images,
        image: &Loop,
        writable: &str,
        volumes: &str,
        mounted: &str,
    ) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let socket = images.dir.join(format!("agent-{number}"));
        let cgroup = make_cgroup(number);
        let process = Command::new("unshare")
            .args(["--mount", "--uts", "--pid", "--fork", "--kill-child"])
            .arg(std::env::current_exe().unwrap())
            .arg("serve")
            .args([&socket, Path::new(&image.0), Path::new(writable), &cgroup])
            .args([volumes, mounted])
            .spawn()
            .unwrap();
        let control = connect(&socket, &Hello::Control);
        Self {
            process,
            socket,
            cgroup,
            control,
        }
    }

    pub fn send(&mut self, request: &Request) {
        let frame = frame::encode(request).unwrap();
        self.control.write_all(&frame).unwrap();
    }

    pub fn signal(&mut self, signal: i32) {
        self.signal_to(CONTAINER, signal);
    }

    pub fn signal_to(&mut self, process: ProcessId, signal: i32) {
        self.send(&Request::Signal { process, signal });
    }

    pub fn event(&mut self) -> Event {
        let mut len = [0; 4];
        self.control.read_exact(&mut len).unwrap();
        let mut body = vec![0; u32::from_le_bytes(len) as usize];
        self.control.read_exact(&mut body).unwrap();
        postcard::from_bytes(&body).unwrap()
    }

    pub fn stream(&self, stream: Stream) -> UnixStream {
        self.stream_of(CONTAINER, stream)
    }

    /// The three streams of a process.
    pub fn streams_of(&self, process: ProcessId) -> Streams {
        Streams {
            stdin: self.stream_of(process, Stream::Stdin),
            stdout: self.stream_of(process, Stream::Stdout),
            stderr: self.stream_of(process, Stream::Stderr),
        }
    }

    pub fn stream_of(&self, process: ProcessId, stream: Stream) -> UnixStream {
        connect(&self.socket, &Hello::Stdio { process, stream })
    }

    /// Closes the control connection, and returns when the agent is at its fork
    /// point; the streams have to be closed by then.
    pub fn freeze(&mut self) -> ForkPoint {
        self.control.shutdown(Shutdown::Both).unwrap();
        let mut stream = UnixStream::connect(fork_socket(&self.socket)).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut there = [0];
        stream.read_exact(&mut there).unwrap();
        ForkPoint(stream)
    }

    /// Lets the agent go on as a child, and connects to it.
    pub fn fork(&mut self, ForkPoint(mut stream): ForkPoint, generation: u64, hostname: &str) {
        stream.write_all(&generation.to_le_bytes()).unwrap();
        stream.write_all(hostname.as_bytes()).unwrap();
        stream.shutdown(Shutdown::Both).unwrap();
        self.control = connect(&self.socket, &Hello::Control);
    }

    /// The number of the container's first process, as this test sees it.
    pub fn first_pid(&self) -> u32 {
        let pids = fs::read_to_string(self.cgroup.join("cgroup.procs")).unwrap();
        pids.lines().next().unwrap().parse().unwrap()
    }

    /// Waits until so many processes of the container that have this name sleep.
    pub fn await_sleeping(&self, name: &str, count: usize) {
        let start = Instant::now();
        let sleeps = |pid: &&str| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            stat.contains(&format!("({name}) S "))
        };
        loop {
            let pids = fs::read_to_string(self.cgroup.join("cgroup.procs")).unwrap();
            if pids.lines().filter(sleeps).count() == count {
                return;
            }
            assert!(
                start.elapsed() < PATIENCE,
                "{name} is not there {count} times"
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits until the container has no process.
    pub fn await_no_process(&self) {
        let start = Instant::now();
        let procs = self.cgroup.join("cgroup.procs");
        while !fs::read_to_string(&procs).unwrap().is_empty() {
            assert!(start.elapsed() < PATIENCE, "processes are left");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits for the agent's own end.
    pub fn ends(&mut self) {
        let start = Instant::now();
        while self.process.try_wait().unwrap().is_none() {
            assert!(start.elapsed() < PATIENCE, "the agent does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.control.shutdown(Shutdown::Both).ok();
        let start = Instant::now();
        while self.process.try_wait().unwrap().is_none() && start.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_millis(5));
        }
        self.process.kill().ok();
        self.process.wait().unwrap();
        // What an agent leaves behind that has not ended by itself.
        while fs::remove_dir(&self.cgroup).is_err() {
            assert!(start.elapsed() < 2 * PATIENCE, "processes are left");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

fn make_cgroup(number: u32) -> PathBuf {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let cgroup2 = mounts
        .lines()
        .map(|line| line.split(' ').collect::<Vec<_>>())
        .find(|fields| fields[2] == "cgroup2")
        .expect("these tests need a cgroup2");
    let name = format!("vm-run-agent-test-{}-{number}", std::process::id());
    let path = Path::new(cgroup2[1]).join(name);
    fs::create_dir(&path).unwrap();
    path
}

fn connect(socket: &Path, hello: &Hello) -> UnixStream {
    let start = Instant::now();
    let mut stream = loop {
        match UnixStream::connect(socket) {
            Ok(stream) => break stream,
            Err(e) => assert!(start.elapsed() < PATIENCE, "no agent: {e}"),
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(&frame::encode(hello).unwrap()).unwrap();
    stream
}

/// A process with the three streams, as root, in a root of guest memory.
pub fn process(args: &[&str]) -> (ContainerSpec, ProcessSpec) {
    let container = ContainerSpec {
        writable: Writable::Memory { limit: 16 << 20 },
        ..ContainerSpec::default()
    };
    let process = ProcessSpec {
        args: args.iter().map(|arg| (*arg).to_owned()).collect(),
        streams: vec![Stream::Stdin, Stream::Stdout, Stream::Stderr],
        ..ProcessSpec::default()
    };
    (container, process)
}

/// `sh -c SCRIPT` of the same kind.
pub fn shell(script: &str) -> (ContainerSpec, ProcessSpec) {
    process(&["sh", "-c", script])
}

/// The connections of a process.
pub struct Streams {
    pub stdin: UnixStream,
    pub stdout: UnixStream,
    pub stderr: UnixStream,
}

/// Everything that came of a process.
#[derive(Debug)]
pub struct Outcome {
    pub stdout: String,
    pub stderr: String,
    pub events: Vec<Event>,
}

/// Asks for the process and opens its streams.
pub fn start(agent: &mut Agent, (container, process): (ContainerSpec, ProcessSpec)) -> Streams {
    let streams = agent.streams_of(CONTAINER);
    agent.send(&Request::StartContainer { container, process });
    streams
}

/// Reads a stream to its end.
pub fn rest(mut stream: UnixStream) -> String {
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

/// Reads until `text` has come.
pub fn until(stream: &mut UnixStream, text: &str) -> String {
    let mut seen = String::new();
    let mut byte = [0];
    while !seen.ends_with(text) {
        stream.read_exact(&mut byte).unwrap();
        seen.push(char::from(byte[0]));
    }
    seen
}

/// Reads a stream to its end in the background.
pub fn collect(mut stream: UnixStream) -> JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        bytes
    })
}

/// Runs a process with an empty stdin to its end.
pub fn outcome(agent: &mut Agent, spec: (ContainerSpec, ProcessSpec)) -> Outcome {
    let streams = start(agent, spec);
    streams.stdin.shutdown(Shutdown::Write).unwrap();
    let text = |bytes: JoinHandle<Vec<u8>>| String::from_utf8(bytes.join().unwrap()).unwrap();
    let (stdout, stderr) = (collect(streams.stdout), collect(streams.stderr));
    let mut events = vec![agent.event()];
    if matches!(events[0], Event::Started { .. }) {
        events.push(agent.event());
    }
    Outcome {
        stdout: text(stdout),
        stderr: text(stderr),
        events,
    }
}
