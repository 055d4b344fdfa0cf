//! `vm-run` as a process: started, watched, signalled, waited for.

use super::{PATIENCE, boot_timeout, variable, world};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use std::ffi::{OsStr, OsString};
use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Instant;

/// A command that has not been started.
pub struct Call(Command);

impl Call {
    /// `vm-run run ARGS` over the shared state directory.
    pub fn run<S: AsRef<OsStr>>(args: &[S]) -> Self {
        Self::run_in(&world().root, args)
    }

    /// `vm-run run ARGS` over a state directory of the test's own.
    pub fn run_in<S: AsRef<OsStr>>(root: &Path, args: &[S]) -> Self {
        Self::slow(root, &["run", "--rm"], args)
    }

    /// The same, and the container stays when it has ended.
    pub fn run_to_keep<S: AsRef<OsStr>>(root: &Path, args: &[S]) -> Self {
        Self::slow(root, &["run"], args)
    }

    /// `vm-run template build ARGS`.
    pub fn template_build_in<S: AsRef<OsStr>>(root: &Path, args: &[S]) -> Self {
        Self::slow(root, &["template", "build"], args)
    }

    /// `vm-run ARGS` over a state directory.
    pub fn vm_run_in<S: AsRef<OsStr>>(root: &Path, args: &[S]) -> Self {
        let mut call = Self::program(env!("CARGO_BIN_EXE_vm-run"));
        call.0.arg("--root").arg(root).args(args);
        call.env("VM_RUN_GUEST", variable("VM_RUN_GUEST"))
    }

    /// Any program.
    pub fn program(program: impl AsRef<OsStr>) -> Self {
        Self(Command::new(program))
    }

    /// The same call as the last words of another program's command line.
    pub fn under(self, program: &str, args: &[&str]) -> Self {
        let mut outer = Command::new(program);
        outer.args(args).arg(self.0.get_program());
        outer.args(self.0.get_args());
        for (name, value) in self.0.get_envs() {
            outer.env(name, value.expect("nothing is taken away"));
        }
        Self(outer)
    }

    fn slow<S: AsRef<OsStr>>(root: &Path, command: &[&str], args: &[S]) -> Self {
        let seconds = boot_timeout().as_secs().to_string();
        let mut words: Vec<OsString> = command.iter().map(OsString::from).collect();
        words.extend(["--boot-timeout".into(), seconds.into()]);
        words.extend(args.iter().map(|word| word.as_ref().to_owned()));
        Self::vm_run_in(root, &words)
    }

    pub fn args<S: AsRef<OsStr>>(mut self, args: &[S]) -> Self {
        self.0.args(args);
        self
    }

    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.0.env(name, value);
        self
    }

    /// Starts it with streams of its own.
    pub fn start(mut self) -> Running {
        self.0.stdin(Stdio::piped());
        self.0.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = self.0.spawn().expect("starts");
        Running {
            stdin: child.stdin.take(),
            stdout: Collected::new(child.stdout.take().expect("piped")),
            stderr: Collected::new(child.stderr.take().expect("piped")),
            child,
        }
    }

    /// Starts it on three ends of a terminal; it has no streams to look at.
    pub fn start_on(mut self, terminal: impl Fn() -> Stdio) -> Running {
        self.0
            .stdin(terminal())
            .stdout(terminal())
            .stderr(terminal());
        Running {
            stdin: None,
            stdout: Collected::new(std::io::empty()),
            stderr: Collected::new(std::io::empty()),
            child: self.0.spawn().expect("starts"),
        }
    }

    /// Runs it to its end, with nothing on its standard input.
    pub fn end(self) -> Ran {
        self.start().end()
    }

    /// Runs it to its end with this on its standard input.
    pub fn end_with(self, input: &[u8]) -> Ran {
        let mut running = self.start();
        let mut stdin = running.stdin.take().expect("piped");
        std::thread::scope(|scope| {
            // What does not read is told by its own status.
            scope.spawn(move || stdin.write_all(input).ok());
            running.end()
        })
    }

    /// Runs what must fail, with this status and one line; returns the line.
    pub fn refused(self, status: i32) -> String {
        let ran = self.end();
        assert_eq!(ran.status, status, "{ran}");
        assert!(ran.stdout.is_empty(), "{ran}");
        let line = ran.err().trim_end().to_owned();
        assert!(
            line.starts_with("vm-run: ") && !line.contains('\n') && line.len() < 1000,
            "{ran}"
        );
        line
    }
}

/// A process that runs. Dropping it kills it.
pub struct Running {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: Collected,
    stderr: Collected,
}

impl Running {
    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).expect("it is there");
    }

    /// Types a line into its standard input.
    pub fn say(&mut self, line: &str) {
        let stdin = self.stdin.as_mut().expect("its input is open");
        writeln!(stdin, "{line}").expect("it reads");
    }

    /// Whether its standard output holds `text` by now. It has to run still.
    pub fn has(&mut self, text: &str) -> bool {
        let ended = self.child.try_wait().expect("waits");
        assert!(ended.is_none(), "it has ended: {:?}", self.stderr.text());
        self.stdout.text().contains(text)
    }

    /// Waits until its standard output holds `text`.
    pub fn expect(&mut self, text: &str) {
        if !self.stdout.wait_for(text) {
            self.child.kill().expect("kills");
            panic!("no {text:?} in {:?}", self.stdout.text());
        }
    }

    /// Waits for its end; closes its standard input first.
    pub fn end(mut self) -> Ran {
        drop(self.stdin.take());
        let pidfd = pidfd_open(self.pid(), PidfdFlags::empty()).expect("pidfd_open");
        let patience = Timespec {
            tv_sec: PATIENCE.as_secs() as i64,
            tv_nsec: 0,
        };
        let ended = poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&patience));
        if ended.expect("poll") == 0 {
            self.child.kill().expect("kills");
            let (out, err) = (self.stdout.text(), self.stderr.text());
            panic!("it does not end: stdout {out:?}, stderr {err:?}");
        }
        let status = self.child.wait().expect("waits");
        Ran {
            status: status
                .code()
                .unwrap_or_else(|| 128 + status.signal().unwrap_or_default()),
            stdout: self.stdout.take(),
            stderr: self.stderr.take(),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // One that has ended is waited for already, and both calls say so.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// A process that has ended.
#[derive(Debug)]
pub struct Ran {
    /// Its exit status; 128 and the signal if one ended it.
    pub status: i32,
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
}

impl Ran {
    pub fn out(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    pub fn err(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }
}

impl std::fmt::Display for Ran {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (status, out, err) = (self.status, self.out(), self.err());
        write!(f, "status {status}, stdout {out:?}, stderr {err:?}")
    }
}

/// What a stream gave until now.
struct Collected {
    bytes: Arc<(Mutex<Vec<u8>>, Condvar)>,
    reader: Option<JoinHandle<()>>,
}

impl Collected {
    fn new(mut from: impl Read + Send + 'static) -> Self {
        let bytes = Arc::new((Mutex::new(Vec::new()), Condvar::new()));
        let shared = Arc::clone(&bytes);
        let reader = std::thread::spawn(move || {
            let mut buffer = [0; 1 << 16];
            while let Ok(n @ 1..) = from.read(&mut buffer) {
                let mut all = shared.0.lock().expect("nobody panics with it");
                all.extend_from_slice(&buffer[..n]);
                shared.1.notify_all();
            }
        });
        let reader = Some(reader);
        Self { bytes, reader }
    }

    fn text(&self) -> String {
        let bytes = self.bytes.0.lock().expect("nobody panics with it");
        String::from_utf8_lossy(&bytes).into_owned()
    }

    fn wait_for(&self, text: &str) -> bool {
        let deadline = Instant::now() + PATIENCE;
        let mut all = self.bytes.0.lock().expect("nobody panics with it");
        while !String::from_utf8_lossy(&all).contains(text) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let waited = self.bytes.1.wait_timeout(all, left);
            all = waited.expect("nobody panics with it").0;
        }
        true
    }

    /// All, once the stream has ended.
    fn take(&mut self) -> Vec<u8> {
        if let Some(reader) = self.reader.take() {
            reader.join().expect("reads");
        }
        std::mem::take(&mut self.bytes.0.lock().expect("nobody panics with it"))
    }
}
