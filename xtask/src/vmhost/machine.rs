//! One run of the emulated host: QEMU with its ports, from power-on to the command's
//! exit status.

use super::image::Image;
use super::request::Request;
use super::{Options, Stdin, timed_out};
use anyhow::{Context, Result, bail};
use rustix::io::FdFlags;
use std::ffi::{OsStr, OsString};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// From power-on to the start of the command. Takes 4 s on an idle machine.
const BOOT_LIMIT: Duration = Duration::from_secs(180);
/// How often the emulated host is interrupted. QEMU's vCPU changes its bits of pending
/// interrupts without the lock under which its timers set theirs (7.2,
/// target/i386/tcg/sysemu/svm_helper.c, CPU_INTERRUPT_VIRQ), so once in a few minutes of
/// nested guests one is lost; if that is the timer's, the CPU sleeps for ever. Any other
/// interrupt wakes it, and brings what was lost.
const WAKE: Duration = Duration::from_secs(1);
/// How much of the console is kept for the day it is needed.
const CONSOLE_TAIL: usize = 8 << 10;
/// What a shell reports of a program that wrote to a pipe without a reader.
const BROKEN_PIPE: u8 = 128 + 13;

/// The ports, in the order of their numbers inside: `/dev/vport*p1` and on.
enum Port {
    Control,
    Stdout,
    Stderr,
    Stdin,
}

impl Port {
    const ALL: [Port; 4] = [Port::Control, Port::Stdout, Port::Stderr, Port::Stdin];
}

/// What the threads report.
enum Event {
    /// A line came over the control port.
    Line(String),
    /// QEMU has closed the control port: it is gone.
    Closed,
    /// Nobody reads our stdout or stderr any more.
    BrokenPipe,
}

/// Boots the emulated host, runs `argv` in it, and returns its exit status as a shell
/// has it: 128+n for death by signal n, 124 after [`Options::timeout`].
///
/// QEMU dies with the calling *thread* at the latest (`PR_SET_PDEATHSIG`).
pub fn run(argv: &[OsString], image: &Image, options: &Options) -> Result<u8> {
    let started = Instant::now();
    let request = Request {
        argv,
        directory: &std::env::current_dir().context("the working directory is gone")?,
        environment: &std::env::vars_os().collect::<Vec<_>>(),
        hostname: OsStr::from_bytes(rustix::system::uname().nodename().to_bytes()),
        modules: &image.modules,
        forward_stdin: options.stdin == Stdin::Forward,
    }
    .script()?;
    let mut machine = Machine::start(image, &request, options)?;
    let outcome = machine.attend(started, options);
    machine.kill()?;
    match outcome {
        Outcome::Exited(code) => {
            machine.join_copiers()?;
            Ok(code)
        }
        Outcome::TimedOut(limit) => Ok(timed_out(limit)),
        Outcome::BrokenPipe => Ok(BROKEN_PIPE),
        Outcome::Failed(reason) => {
            machine.join_copiers()?;
            bail!(
                "{reason}; its console ended with:\n{}",
                machine.console_tail()
            )
        }
    }
}

/// A running QEMU and the threads that serve it.
struct Machine {
    qemu: Child,
    events: Receiver<Event>,
    /// The threads that copy the console and the command's output: they end with QEMU.
    copiers: Vec<JoinHandle<()>>,
    console: Arc<Mutex<Vec<u8>>>,
    /// Keeps the stdin port connected after the end of the input: QEMU drops what it
    /// has not read yet when a socket hangs up.
    _stdin: UnixStream,
}

/// What ended a run.
enum Outcome {
    Exited(u8),
    TimedOut(Duration),
    BrokenPipe,
    Failed(String),
}

impl Machine {
    fn start(image: &Image, request: &[u8], options: &Options) -> Result<Machine> {
        let request_file =
            rustix::fs::memfd_create("vmhost-request", rustix::fs::MemfdFlags::CLOEXEC)
                .map(std::fs::File::from)
                .context("cannot make the request's memfd")?;
        (&request_file)
            .write_all(request)
            .context("cannot write the request")?;
        let [control, stdout, stderr, stdin] = Port::ALL.map(|_| UnixStream::pair());
        let pair = || "cannot make a socket pair";
        let (control, control_inside) = control.with_context(pair)?;
        let (stdout, stdout_inside) = stdout.with_context(pair)?;
        let (stderr, stderr_inside) = stderr.with_context(pair)?;
        let (stdin, stdin_inside) = stdin.with_context(pair)?;
        let ports = [
            &control_inside,
            &stdout_inside,
            &stderr_inside,
            &stdin_inside,
        ];
        let (console_out, console_in) = io::pipe().context("cannot make a pipe")?;

        let mut command = Command::new("setpriv");
        command
            .args(["--pdeathsig", "KILL", "--", "qemu-system-x86_64"])
            .args(qemu_arguments(
                image,
                options,
                ports.map(AsRawFd::as_raw_fd),
                request_file.as_raw_fd(),
            ))
            .stdin(Stdio::null())
            .stdout(console_in.try_clone().context("cannot copy a descriptor")?)
            .stderr(console_in);
        let inherited = [ports.map(AsFd::as_fd).as_slice(), &[request_file.as_fd()]].concat();
        let qemu = spawn_with(&mut command, &inherited)?;

        let (sender, events) = mpsc::channel();
        let console = Arc::default();
        let kept_stdin = stdin.try_clone().context("cannot copy a descriptor")?;
        if options.stdin == Stdin::Forward {
            // Not joined: it may wait for input for ever.
            thread::spawn(move || feed_stdin(stdin));
        }
        let copiers = vec![
            thread::spawn({
                let console = Arc::clone(&console);
                move || keep_tail(console_out, &console)
            }),
            thread::spawn({
                let (sender, label) = (sender.clone(), options.label.clone());
                move || copy_out(stdout, io::stdout(), label.as_deref(), &sender)
            }),
            thread::spawn({
                let (sender, label) = (sender.clone(), options.label.clone());
                move || copy_out(stderr, io::stderr(), label.as_deref(), &sender)
            }),
        ];
        let waking = control.try_clone().context("cannot copy a descriptor")?;
        thread::spawn(move || wake(waking));
        thread::spawn(move || read_control(control, &sender));
        Ok(Machine {
            qemu,
            events,
            copiers,
            console,
            _stdin: kept_stdin,
        })
    }

    /// Waits for whatever ends the run.
    fn attend(&mut self, started: Instant, options: &Options) -> Outcome {
        let mut ready = false;
        loop {
            let deadline = match (options.timeout, ready) {
                (Some(limit), true) => Some(limit),
                (Some(limit), false) => Some(limit.min(BOOT_LIMIT)),
                (None, false) => Some(BOOT_LIMIT),
                (None, true) => None,
            };
            let event = match deadline {
                None => self
                    .events
                    .recv()
                    .map_err(|_| RecvTimeoutError::Disconnected),
                Some(limit) => self
                    .events
                    .recv_timeout(limit.saturating_sub(started.elapsed())),
            };
            let line = match event {
                Ok(Event::Line(line)) => line,
                Ok(Event::BrokenPipe) => return Outcome::BrokenPipe,
                Ok(Event::Closed) | Err(RecvTimeoutError::Disconnected) => {
                    return Outcome::Failed("the emulated host died".into());
                }
                Err(RecvTimeoutError::Timeout) => {
                    return match options.timeout {
                        Some(limit) if ready => Outcome::TimedOut(limit),
                        _ => {
                            let seconds = started.elapsed().as_secs();
                            Outcome::Failed(format!(
                                "the emulated host did not boot in {seconds} s"
                            ))
                        }
                    };
                }
            };
            match parse_line(&line) {
                Some(Line::Ready) => ready = true,
                Some(Line::Exit(code)) => return Outcome::Exited(code),
                Some(Line::Fail(what)) => {
                    return Outcome::Failed(format!("the emulated host failed at: {what}"));
                }
                None => return Outcome::Failed(format!("the emulated host said \"{line}\"")),
            }
        }
    }

    /// Kills QEMU and reaps it. What it has passed on is in the sockets.
    fn kill(&mut self) -> Result<()> {
        self.qemu.kill().context("cannot kill QEMU")?;
        self.qemu.wait().context("cannot wait for QEMU")?;
        Ok(())
    }

    /// Waits until all that a killed QEMU had passed on is written.
    fn join_copiers(&mut self) -> Result<()> {
        for copier in self.copiers.drain(..) {
            if copier.join().is_err() {
                bail!("a copying thread panicked");
            }
        }
        Ok(())
    }

    fn console_tail(&self) -> String {
        let console = self.console.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&console).into_owned()
    }
}

/// QEMU's command line. `ports` are the descriptors for [`Port::ALL`].
fn qemu_arguments(
    image: &Image,
    options: &Options,
    ports: [i32; Port::ALL.len()],
    request: i32,
) -> Vec<OsString> {
    let mut arguments: Vec<OsString> = [
        "-nodefaults",
        "-no-user-config",
        "-no-reboot",
        "-display",
        "none",
        "-cpu",
        "max,la57=off",
        "-chardev",
        "stdio,id=console,signal=off",
        "-serial",
        "chardev:console",
        "-fsdev",
        "local,id=outer,path=/,security_model=none,readonly=on,multidevs=remap",
        "-device",
        "virtio-9p-pci,fsdev=outer,mount_tag=outer",
        "-device",
        "virtio-rng-pci",
        "-device",
        "virtio-serial-pci",
        "-append",
        KERNEL_COMMAND_LINE,
    ]
    .map(OsString::from)
    .to_vec();
    let mut option = |name: &str, value: OsString| arguments.extend([name.into(), value]);
    // See Options::cpus.
    let thread = if options.cpus == 1 { "multi" } else { "single" };
    option("-accel", format!("tcg,thread={thread},tb-size=1024").into());
    option("-smp", options.cpus.to_string().into());
    option("-m", options.memory_mib.to_string().into());
    option("-kernel", image.vmlinux.clone().into());
    option("-initrd", image.initramfs.clone().into());
    option(
        "-fw_cfg",
        format!("name=opt/vm-run/request,file=/proc/self/fd/{request}").into(),
    );
    for (number, fd) in (1..).zip(ports) {
        option("-chardev", format!("socket,id=port{number},fd={fd}").into());
        option(
            "-device",
            format!("virtserialport,chardev=port{number},nr={number}").into(),
        );
    }
    arguments
}

/// A panic ends QEMU (with -no-reboot). The rest saves emulated time on what protects or
/// tests nothing here: mitigations, zeroing on allocation, self-tests, X.509 keys.
const KERNEL_COMMAND_LINE: &str = "console=ttyS0 quiet panic=-1 mitigations=off init_on_alloc=0 nokaslr \
    audit=0 apparmor=0 tsc=reliable random.trust_cpu=on cryptomgr.notests \
    initcall_blacklist=load_system_certificate_list,jent_mod_init";

/// Starts `command` with `inherited` descriptors open in it at their own numbers.
fn spawn_with(command: &mut Command, inherited: &[BorrowedFd<'_>]) -> Result<Child> {
    // The flag belongs to the process: two runs at once would leak into one another.
    static SPAWNING: Mutex<()> = Mutex::new(());
    let _guard = SPAWNING.lock().unwrap_or_else(PoisonError::into_inner);
    let set = |flags: FdFlags| {
        inherited
            .iter()
            .try_for_each(|fd| rustix::io::fcntl_setfd(fd, flags))
            .context("cannot pass descriptors on")
    };
    set(FdFlags::empty())?;
    let child = command
        .spawn()
        .with_context(|| format!("cannot start {}", command.get_program().display()));
    set(FdFlags::CLOEXEC)?;
    child
}

/// A line of the control port.
#[derive(Debug, PartialEq)]
enum Line<'a> {
    /// The command is about to start.
    Ready,
    /// It has ended, and all that it wrote has left the emulated host.
    Exit(u8),
    /// The emulated host cannot run it.
    Fail(&'a str),
}

fn parse_line(line: &str) -> Option<Line<'_>> {
    match line.split_once(' ') {
        None if line == "ready" => Some(Line::Ready),
        Some(("exit", status)) => status.parse().ok().map(Line::Exit),
        Some(("fail", what)) => Some(Line::Fail(what)),
        _ => None,
    }
}

/// Passes the control port's lines on. A receiver that is gone no longer cares.
fn read_control(port: UnixStream, sender: &Sender<Event>) {
    for line in BufReader::new(port).lines().map_while(Result::ok) {
        if sender.send(Event::Line(line)).is_err() {
            return;
        }
    }
    sender.send(Event::Closed).ok();
}

/// Interrupts the emulated host again and again, until it is gone.
fn wake(mut port: UnixStream) {
    while port.write_all(b".").is_ok() {
        thread::sleep(WAKE);
    }
}

/// Copies a port to `to`, to the port's end: as it comes, or by lines with a label.
fn copy_out(mut port: UnixStream, mut to: impl Write, label: Option<&str>, sender: &Sender<Event>) {
    let mut buffer = vec![0; 64 << 10];
    let mut lines = label.map(Lines::new);
    loop {
        let count = match port.read(&mut buffer) {
            Ok(0) | Err(_) => break,
            Ok(count) => count,
        };
        let whole = match &mut lines {
            Some(lines) => lines.take(&buffer[..count]),
            None => buffer[..count].to_vec(),
        };
        if to.write_all(&whole).and_then(|()| to.flush()).is_err() {
            // Whoever ran us does not read on: the run is over, as it would be for a
            // command that gets SIGPIPE.
            sender.send(Event::BrokenPipe).ok();
            return;
        }
    }
    let rest = lines.map(Lines::rest).unwrap_or_default();
    // Nobody is left who could be told.
    to.write_all(&rest).and_then(|()| to.flush()).ok();
}

/// Makes lines with a label of what comes.
struct Lines<'a> {
    label: &'a str,
    begun: Vec<u8>,
}

impl<'a> Lines<'a> {
    fn new(label: &'a str) -> Self {
        let begun = Vec::new();
        Self { label, begun }
    }

    /// The lines that are whole with these bytes.
    fn take(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut whole = Vec::new();
        for part in bytes.split_inclusive(|&byte| byte == b'\n') {
            self.begun.extend(part);
            if part.ends_with(b"\n") {
                whole.extend(self.label.as_bytes());
                whole.append(&mut self.begun);
            }
        }
        whole
    }

    /// What is left of a last line without an end.
    fn rest(mut self) -> Vec<u8> {
        if self.begun.is_empty() {
            return Vec::new();
        }
        self.take(b"\n")
    }
}

/// Sends our standard input after the one byte that session.sh waits for.
fn feed_stdin(mut port: UnixStream) {
    let sent = port
        .write_all(b"+")
        .and_then(|()| io::copy(&mut io::stdin().lock(), &mut port))
        .and_then(|_| port.shutdown(Shutdown::Write));
    match sent {
        Ok(()) => {}
        // The run ended before all of it was read.
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
            ) => {}
        Err(error) => eprintln!("vmhost: standard input: {error}"),
    }
}

/// Reads the console to its end and keeps the last [`CONSOLE_TAIL`] bytes.
fn keep_tail(mut console: impl Read, tail: &Mutex<Vec<u8>>) {
    let mut buffer = [0; 4096];
    while let Ok(count @ 1..) = console.read(&mut buffer) {
        let mut tail = tail.lock().unwrap_or_else(PoisonError::into_inner);
        tail.extend_from_slice(&buffer[..count]);
        let excess = tail.len().saturating_sub(CONSOLE_TAIL);
        tail.drain(..excess);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    #[test]
    fn the_control_port_speaks_three_words() {
        assert_eq!(parse_line("ready"), Some(Line::Ready));
        assert_eq!(parse_line("exit 0"), Some(Line::Exit(0)));
        assert_eq!(parse_line("exit 137"), Some(Line::Exit(137)));
        assert_eq!(
            parse_line("fail mount -t 9p"),
            Some(Line::Fail("mount -t 9p"))
        );
        for line in ["", "exit", "exit 256", "exit -1", "ready 1", "Ready"] {
            assert_eq!(parse_line(line), None, "{line}");
        }
    }

    #[test]
    fn every_port_has_its_number_and_descriptor() {
        let image = Image {
            vmlinux: PathBuf::from("/c/vmlinux"),
            initramfs: PathBuf::from("/c/initramfs"),
            modules: PathBuf::from("/c/modules"),
        };
        let options = Options {
            memory_mib: 512,
            ..Options::default()
        };
        let arguments = qemu_arguments(&image, &options, [10, 11, 12, 13], 14);
        let has = |name: &str, value: &str| arguments.windows(2).any(|pair| pair == [name, value]);
        assert!(has("-m", "512"));
        assert!(has("-smp", "1"));
        assert!(has("-kernel", "/c/vmlinux"));
        assert!(has("-initrd", "/c/initramfs"));
        assert!(has(
            "-fw_cfg",
            "name=opt/vm-run/request,file=/proc/self/fd/14"
        ));
        for (number, fd) in (1..=4).zip(10..=13) {
            assert!(has("-chardev", &format!("socket,id=port{number},fd={fd}")));
            assert!(has(
                "-device",
                &format!("virtserialport,chardev=port{number},nr={number}")
            ));
        }
    }

    #[test]
    fn whole_lines_are_passed_on_with_their_label() {
        let mut lines = Lines::new("2: ");
        assert_eq!(lines.take(b"on"), b"");
        assert_eq!(lines.take(b"e\n\ntw"), b"2: one\n2: \n");
        assert_eq!(lines.rest(), b"2: tw\n");
        assert_eq!(Lines::new("2: ").rest(), b"");
    }

    #[test]
    fn the_tail_of_a_long_console_is_kept() {
        let text: Vec<u8> = (0..3 * CONSOLE_TAIL).map(|at| (at % 251) as u8).collect();
        let tail = Mutex::default();
        keep_tail(text.as_slice(), &tail);
        assert_eq!(
            tail.into_inner().unwrap(),
            text[text.len() - CONSOLE_TAIL..]
        );
    }
}
