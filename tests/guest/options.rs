//! What the options of `run` make of a container.

use crate::support::{Call, field};
use rustix::fs::OFlags;
use rustix::process::Signal;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};
use std::ffi::OsString;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::OpenOptionsExt;
use std::process::Stdio;

#[test]
fn environment_directory_user_entrypoint_and_hostname_are_set() {
    let script = "echo A=$A; echo B=$B; echo C=${C-unset}; echo dir=$(pwd); echo host=$(hostname)
        echo user=$(id -un):$(id -u):$(id -g); echo 'word='$0; echo arg=$1";
    let ran = Call::run(&[
        "--env",
        "A=1 2",
        "-e",
        "B",
        "-e",
        "C",
        "-w",
        "/made/for/this",
        "-u",
        "nobody",
        "--entrypoint",
        "sh",
        "--hostname",
        "hal.example",
        "busybox",
        "-c",
        script,
        "zero",
        "one",
    ])
    .env("B", "the caller's")
    .end();
    assert_eq!((ran.status, ran.err()), (0, String::new()), "{ran}");
    let out = ran.out();
    assert_eq!(field(&out, "A"), "1 2");
    assert_eq!(field(&out, "B"), "the caller's");
    assert_eq!(field(&out, "C"), "unset");
    assert_eq!(field(&out, "dir"), "/made/for/this");
    assert_eq!(field(&out, "host"), "hal.example");
    assert_eq!(field(&out, "user"), "nobody:65534:65534");
    assert_eq!((field(&out, "word"), field(&out, "arg")), ("zero", "one"));
}

#[test]
fn a_read_only_root_takes_no_writes_and_a_user_may_be_a_number() {
    let script = "echo user=$(id -u):$(id -g); touch /tmp/x; touch /x || echo refused=$?
        echo shm > /dev/shm/x && cat /dev/shm/x";
    let ran = Call::run(&[
        "--read-only",
        "-u",
        "1234:567",
        "busybox",
        "sh",
        "-c",
        script,
    ])
    .end();
    assert_eq!(ran.status, 0, "{ran}");
    assert_eq!(ran.out(), "user=1234:567\nrefused=1\nshm\n");
    assert_eq!(
        ran.err().matches("Read-only file system").count(),
        2,
        "{ran}"
    );
}

#[test]
fn a_writable_layer_in_memory_takes_as_much_as_it_may() {
    let script = "head -c 4194304 /dev/zero > /four && echo four=$(wc -c < /four)
        dd if=/dev/zero of=/sixteen bs=1M count=16 || echo sixteen=$(($(wc -c < /sixteen) < 8388608))
        rm /sixteen; echo again > /again; cat /again";
    let options = ["--writable-memory", "8m", "busybox", "sh", "-c", script];
    let ran = Call::run(&options).end();
    assert_eq!(ran.status, 0, "{ran}");
    assert_eq!(ran.out(), "four=4194304\nsixteen=1\nagain\n");
    assert!(ran.err().contains("No space left on device"), "{ran}");
}

#[test]
fn a_terminal_has_the_callers_size_and_follows_it() {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("a pty");
    grantpt(&master).expect("grantpt");
    unlockpt(&master).expect("unlockpt");
    let slave = OsString::from_vec(ptsname(&master, Vec::new()).expect("ptsname").into_bytes());
    let slave = || -> Stdio {
        // A session leader, as the tests may be, would get it as its controlling
        // terminal, and a SIGHUP when the master closes.
        let noctty = OFlags::NOCTTY.bits() as i32;
        let mut options = File::options();
        let open = options.read(true).write(true).custom_flags(noctty);
        let open = open.open(&slave);
        OwnedFd::from(open.expect("opens")).into()
    };
    resize(&master, 33, 77);
    let script = "test -t 0 && test -t 1 && test -t 2 && tty; stty size; echo term=$TERM
        trap 'stty size; exit 9' WINCH; read line; echo \"line=<$line>\"; while :; do sleep 1; done";
    let running = Call::run(&["-it", "busybox", "sh", "-c", script]).start_on(slave);
    let mut screen = Screen::new(File::from(master));
    screen.expect("term=xterm");
    assert!(
        screen.text.starts_with("/dev/pts/0\r\n33 77\r\n"),
        "{:?}",
        screen.text
    );
    screen.file.write_all(b"typed\r").expect("types");
    // Echoed by the container's terminal, then read from it.
    screen.expect("typed\r\nline=<typed>");
    resize(&screen.file, 44, 99);
    running.signal(Signal::WINCH);
    screen.expect("44 99");
    let ran = running.end();
    assert_eq!(ran.status, 9, "{ran}");
}

fn resize(master: &impl std::os::fd::AsFd, rows: u16, cols: u16) {
    let size = Winsize {
        ws_row: rows,
        ws_col: cols,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    tcsetwinsize(master, size).expect("sets the size");
}

/// The master side of a terminal, and what it has shown.
struct Screen {
    file: File,
    text: String,
}

impl Screen {
    fn new(file: File) -> Self {
        let text = String::new();
        Self { file, text }
    }

    /// Reads until it shows `text`. The end of the last process on the terminal
    /// ends the reading too.
    fn expect(&mut self, text: &str) {
        let mut buffer = [0; 1024];
        while !self.text.contains(text) {
            let n = self.file.read(&mut buffer).unwrap_or(0);
            assert!(n > 0, "no {text:?} in {:?}", self.text);
            self.text.push_str(&String::from_utf8_lossy(&buffer[..n]));
        }
    }
}
