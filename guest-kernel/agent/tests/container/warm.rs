//! What a warm container and its children can rely on.

use crate::cases::{Case, cases};
use crate::host::{Agent, ForkPoint, Images, Streams, collect, rest, shell, start, until};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;
use vm_run_abi::protocol::{
    CONTAINER, ContainerSpec, Event, ExitStatus, ProcessSpec, Request, Stream, WindowSize, Writable,
};

pub const ALL: &[Case] = cases![
    a_shell_wakes_as_a_child,
    a_user_in_a_read_only_root_wakes_with_its_children,
    output_is_delivered_and_goes_on_where_it_was,
    a_child_can_be_frozen_again,
    an_end_before_the_attach_is_told_after_it,
    a_terminal_survives_its_host,
    the_socket_takes_what_it_should,
    what_cannot_be_frozen_runs_on,
    nonsense_on_the_way_ends_the_agent,
];

/// How long a container may take to fill all that lies between it and a host that does
/// not read. What has room left can be delivered, and the freeze goes well.
const FILL: Duration = Duration::from_secs(2);

pub fn warm(script: &str) -> (ContainerSpec, ProcessSpec) {
    let (mut container, process) = shell(script);
    container.warm = true;
    (container, process)
}

pub const STARTED: Event = Event::Started { process: CONTAINER };

fn exited(code: u8) -> Event {
    Event::Exited {
        process: CONTAINER,
        status: ExitStatus::Code(code),
    }
}

/// Freezes a container and closes its streams, which hold nothing more.
pub fn freeze_all(agent: &mut Agent, streams: Streams) -> ForkPoint {
    agent.send(&Request::Freeze);
    assert_eq!(agent.event(), Event::Frozen);
    assert_eq!(rest(streams.stdout), "");
    assert_eq!(rest(streams.stderr), "");
    drop(streams.stdin);
    agent.freeze()
}

pub fn attach(agent: &mut Agent) -> Streams {
    let streams = agent.streams_of(CONTAINER);
    agent.send(&Request::Attach {
        streams: vec![Stream::Stdin, Stream::Stdout, Stream::Stderr],
    });
    assert_eq!(agent.event(), STARTED);
    streams
}

fn a_shell_wakes_as_a_child(images: &Images) {
    let mut agent = Agent::start(images);
    let script = "read machine < /etc/machine-id; echo $VM_RUN_WARM; touch /run/vm-run/x 2>/dev/null || echo read-only; \
                  head -c 100000 /dev/zero 2>/dev/null >/etc/hosts; \
                  echo before; generation=$(/run/vm-run/warm); echo $? $generation; \
                  hostname; cat /etc/hostname; grep -c 'child-1$' /etc/hosts; \
                  [ $machine != $(cat /etc/machine-id) ] && echo another; \
                  read line; echo \"<$line>\"; cat; echo error >&2; exit 6";
    let mut streams = start(&mut agent, warm(script));
    let before = until(&mut streams.stdout, "before\n");
    assert_eq!(before, "/run/vm-run/sock\nread-only\nbefore\n");
    assert_eq!([agent.event(), agent.event()], [STARTED, Event::Warm]);
    let fork_point = freeze_all(&mut agent, streams);
    agent.fork(fork_point, 0xfeed, "child-1");
    let mut streams = attach(&mut agent);
    let woken = until(&mut streams.stdout, "another\n");
    assert_eq!(woken, "0 000000000000feed\nchild-1\nchild-1\n1\nanother\n");
    // Its stdin has not ended with the connection of the first host.
    streams.stdin.write_all(b"word\nmore\n").unwrap();
    assert_eq!(until(&mut streams.stdout, ">\nmore\n"), "<word>\nmore\n");
    streams.stdin.shutdown(Shutdown::Write).unwrap();
    assert_eq!(rest(streams.stdout), "");
    assert_eq!(rest(streams.stderr), "error\n");
    assert_eq!(agent.event(), exited(6));
}

fn a_user_in_a_read_only_root_wakes_with_its_children(images: &Images) {
    let mut agent = Agent::start(images);
    let script = "for i in 1 2 3; do (/run/vm-run/warm; while :; do :; done) & done; \
                  /run/vm-run/warm; id -u; touch /file || echo refused; read line; exit 1";
    let (mut container, mut process) = warm(script);
    container.writable = Writable::Nothing;
    process.user = "web".to_owned();
    let streams = start(&mut agent, (container, process));
    assert_eq!([agent.event(), agent.event()], [STARTED, Event::Warm]);
    agent.await_sleeping("warm", 4);
    let fork_point = freeze_all(&mut agent, streams);
    agent.fork(fork_point, 7, "child");
    let mut streams = attach(&mut agent);
    let mut stdout = String::new();
    while stdout.matches("0000000000000007\n").count() < 4 {
        stdout.push_str(&until(&mut streams.stdout, "\n"));
    }
    drop(streams.stdin);
    stdout.push_str(&rest(streams.stdout));
    assert!(stdout.contains("1000\n"), "{stdout}");
    assert!(stdout.contains("refused\n"), "{stdout}");
    assert_eq!(agent.event(), exited(1));
}

fn output_is_delivered_and_goes_on_where_it_was(images: &Images) {
    let mut agent = Agent::start(images);
    let script = "i=0; while [ $i -lt 60000 ]; do echo $i; i=$((i+1)); done";
    let mut streams = start(&mut agent, warm(script));
    until(&mut streams.stdout, "\n500\n");
    assert_eq!(agent.event(), STARTED);
    agent.send(&Request::Freeze);
    let stdout = collect(streams.stdout);
    assert_eq!(agent.event(), Event::Frozen);
    // It ends by itself, though the process has not.
    let first = String::from_utf8(stdout.join().unwrap()).unwrap();
    drop((streams.stdin, streams.stderr));
    let fork_point = agent.freeze();
    std::thread::sleep(Duration::from_millis(100));
    agent.fork(fork_point, 1, "child");
    // The host may let it wait.
    std::thread::sleep(Duration::from_millis(100));
    let streams = attach(&mut agent);
    let second = rest(streams.stdout);
    let all = format!("{first}{second}");
    let expected: Vec<String> = (501..60_000).map(|i| i.to_string()).collect();
    assert!(
        all.lines().eq(expected),
        "{} and {}",
        first.len(),
        second.len()
    );
    assert!(!first.contains("59999"), "it was not stopped");
    assert_eq!(agent.event(), exited(0));
}

fn a_child_can_be_frozen_again(images: &Images) {
    let mut agent = Agent::start(images);
    let script = "for i in 1 2 3; do /run/vm-run/warm; hostname; done; read line; echo \"$line\"";
    let streams = start(&mut agent, warm(script));
    assert_eq!([agent.event(), agent.event()], [STARTED, Event::Warm]);
    let mut fork_point = freeze_all(&mut agent, streams);
    for generation in 1..=2 {
        let hostname = format!("child-{generation}");
        agent.fork(fork_point, generation, &hostname);
        let mut streams = attach(&mut agent);
        let woken = format!("{generation:016x}\n{hostname}\n");
        assert_eq!(until(&mut streams.stdout, &woken), woken);
        // What the process has not read yet is still there in its child.
        streams.stdin.write_all(b"la").unwrap();
        std::thread::sleep(Duration::from_millis(50));
        fork_point = freeze_all(&mut agent, streams);
    }
    // One that is frozen with no host attached to it.
    agent.fork(fork_point, 3, "child-3");
    agent.send(&Request::Freeze);
    assert_eq!(agent.event(), Event::Frozen);
    let fork_point = agent.freeze();
    agent.fork(fork_point, 4, "child-4");
    let mut streams = attach(&mut agent);
    streams.stdin.write_all(b"st\n").unwrap();
    let all = rest(streams.stdout);
    assert!(all.starts_with("0000000000000003\nchild-"), "{all}");
    assert!(all.ends_with("\nlalast\n"), "{all}");
    assert_eq!(agent.event(), exited(0));
}

fn an_end_before_the_attach_is_told_after_it(images: &Images) {
    let mut agent = Agent::start(images);
    let streams = start(&mut agent, warm("/run/vm-run/warm; echo last; exit 3"));
    assert_eq!([agent.event(), agent.event()], [STARTED, Event::Warm]);
    let fork_point = freeze_all(&mut agent, streams);
    agent.fork(fork_point, 9, "child");
    std::thread::sleep(FILL);
    // A stream that is not attached is closed with the rest.
    let stdout = agent.stream(Stream::Stdout);
    // The process has no terminal.
    let streams = vec![Stream::Stdout];
    agent.send(&Request::Attach { streams });
    assert_eq!([agent.event(), agent.event()], [STARTED, exited(3)]);
    assert_eq!(rest(stdout), "0000000000000009\nlast\n");

    let mut agent = Agent::start(images);
    let streams = start(&mut agent, warm("/run/vm-run/warm; sleep 1000"));
    assert_eq!([agent.event(), agent.event()], [STARTED, Event::Warm]);
    let fork_point = freeze_all(&mut agent, streams);
    agent.fork(fork_point, 9, "child");
    // Streams that it does not have are closed, and signals need no attach.
    let terminal = agent.stream(Stream::Terminal);
    let streams = vec![Stream::Terminal];
    agent.send(&Request::Attach { streams });
    assert_eq!(agent.event(), STARTED);
    assert_eq!(rest(terminal), "");
    agent.signal(libc::SIGKILL);
    let killed = Event::Exited {
        process: CONTAINER,
        status: ExitStatus::Signal(9),
    };
    assert_eq!(agent.event(), killed);
}

fn a_terminal_survives_its_host(images: &Images) {
    let mut agent = Agent::start(images);
    let script = "stty -echo; /run/vm-run/warm >/dev/null; stty size; \
                  trap 'stty size' WINCH; trap 'echo hup; exit 1' HUP; \
                  until read line; do :; done; echo \"<$line>\"; while :; do sleep 0.05; done";
    // A read is interrupted by a resize that comes while it waits.
    let (container, mut process) = warm(script);
    process.streams = vec![Stream::Terminal];
    process.window = Some(WindowSize { rows: 30, cols: 70 });
    let terminal = agent.stream(Stream::Terminal);
    agent.send(&Request::StartContainer { container, process });
    assert_eq!([agent.event(), agent.event()], [STARTED, Event::Warm]);
    agent.send(&Request::Freeze);
    assert_eq!(agent.event(), Event::Frozen);
    assert_eq!(rest(terminal), "");
    let fork_point = agent.freeze();
    agent.fork(fork_point, 5, "child");
    // Before it is attached, too.
    let resize = |rows, cols| Request::Resize {
        process: CONTAINER,
        size: WindowSize { rows, cols },
    };
    agent.send(&resize(31, 71));
    let mut terminal = agent.stream(Stream::Terminal);
    let streams = vec![Stream::Terminal];
    agent.send(&Request::Attach { streams });
    assert_eq!(agent.event(), STARTED);
    let size = until(&mut terminal, "\r\n");
    assert!(
        ["30 70\r\n", "31 71\r\n"].contains(&size.as_str()),
        "{size}"
    );
    terminal.write_all(b"typed\n").unwrap();
    until(&mut terminal, "<typed>\r\n");
    agent.send(&resize(32, 72));
    until(&mut terminal, "32 72\r\n");
    agent.signal(libc::SIGKILL);
    rest(terminal);
}

/// Connects to the warm socket of a container, from outside.
fn client(agent: &Agent) -> UnixStream {
    let path = format!("/proc/{}/root/run/vm-run/sock", agent.first_pid());
    let client = UnixStream::connect(path).unwrap();
    client
        .set_read_timeout(Some(Duration::from_secs(30)))
        .unwrap();
    client
}

fn the_socket_takes_what_it_should(images: &Images) {
    let mut agent = Agent::start(images);
    let mut streams = start(&mut agent, warm("echo on; sleep 1000"));
    until(&mut streams.stdout, "on\n");
    assert_eq!(agent.event(), STARTED);
    // What is no protocol is closed; a close with unread bytes is a reset.
    for nonsense in [
        &b"cold\n"[..],
        b"warm\nx",
        b"warm\0",
        &[0xff; 4096],
        b"warm\nwarm\n",
    ] {
        let mut client = client(&agent);
        client.write_all(nonsense).unwrap();
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).ok();
        assert_eq!(answer, b"");
    }
    // Sixteen are heard, and no more: those that are too many are closed.
    let waiting: Vec<UnixStream> = (0..16).map(|_| client(&agent)).collect();
    assert_eq!(rest(client(&agent)), "");
    for (i, mut client) in waiting.iter().enumerate() {
        for byte in &b"warm\n"[..5 - i % 2] {
            client.write_all(&[*byte]).unwrap();
        }
    }
    // Once, for the container.
    assert_eq!(agent.event(), Event::Warm);
    let fork_point = freeze_all(&mut agent, streams);
    for client in &waiting {
        client.set_nonblocking(true).unwrap();
        let early = (&mut &*client).read(&mut [0; 1]).unwrap_err();
        assert_eq!(early.kind(), std::io::ErrorKind::WouldBlock);
        client.set_nonblocking(false).unwrap();
    }
    agent.fork(fork_point, u64::MAX, "child");
    for (i, mut client) in waiting.into_iter().enumerate() {
        if i % 2 == 0 {
            assert_eq!(rest(client), "child ffffffffffffffff\n");
        } else {
            // Had not said all of it before, and waits for the next fork.
            client.write_all(b"\n").unwrap();
            client
                .set_read_timeout(Some(Duration::from_millis(5)))
                .unwrap();
            assert!(client.read(&mut [0]).is_err());
        }
    }
    agent.signal(libc::SIGKILL);
}

fn what_cannot_be_frozen_runs_on(images: &Images) {
    let refused = |agent: &mut Agent| {
        agent.send(&Request::Freeze);
        match agent.event() {
            Event::FreezeFailed { message } => message,
            other => panic!("{other:?}"),
        }
    };
    let mut agent = Agent::start(images);
    let not_warm = "the container was not started as a warm one";
    assert_eq!(refused(&mut agent), not_warm);
    let mut streams = start(&mut agent, shell("read line; echo \"$line\""));
    assert_eq!(agent.event(), STARTED);
    assert_eq!(refused(&mut agent), not_warm);
    streams.stdin.write_all(b"on\n").unwrap();
    assert_eq!(rest(streams.stdout), "on\n");
    assert_eq!(agent.event(), exited(0));

    // A host that does not read: the freeze waits for it, and goes with the
    // container.
    let mut agent = Agent::start(images);
    let streams = start(&mut agent, warm("cat /dev/zero"));
    assert_eq!(agent.event(), STARTED);
    std::thread::sleep(FILL);
    agent.send(&Request::Freeze);
    agent.signal(libc::SIGKILL);
    let Event::FreezeFailed { message } = agent.event() else {
        panic!("no failure");
    };
    assert_eq!(message, "the container has ended");
    assert!(matches!(agent.event(), Event::Exited { .. }));
    drop(streams);

    // A host that does not read for too long: the container goes on where it was.
    let mut agent = Agent::start(images);
    let script = "head -c 3000000 /dev/zero; echo end";
    let mut streams = start(&mut agent, warm(script));
    assert_eq!(agent.event(), STARTED);
    streams.stdout.read_exact(&mut vec![0; 500_000]).unwrap();
    // Until everything between the two is full again.
    std::thread::sleep(FILL);
    let message = "the host does not read what the container has written";
    assert_eq!(refused(&mut agent), message);
    streams.stdout.read_exact(&mut vec![0; 2_500_000]).unwrap();
    assert_eq!(rest(streams.stdout), "end\n");
    assert_eq!(agent.event(), exited(0));
}

fn nonsense_on_the_way_ends_the_agent(images: &Images) {
    let attach = || Request::Attach {
        streams: Vec::new(),
    };
    // An attach of what is attached.
    let mut agent = Agent::start(images);
    let _streams = start(&mut agent, warm("sleep 1000"));
    assert_eq!(agent.event(), STARTED);
    agent.send(&attach());
    agent.ends();
    // A freeze in a freeze.
    let mut agent = Agent::start(images);
    let _streams = start(&mut agent, warm("cat /dev/zero"));
    assert_eq!(agent.event(), STARTED);
    std::thread::sleep(FILL);
    agent.send(&Request::Freeze);
    agent.send(&Request::Freeze);
    agent.ends();
    // An attach in a bare child, and one too many.
    let mut agent = Agent::start(images);
    agent.send(&attach());
    agent.ends();
    let mut agent = Agent::start(images);
    let streams = start(&mut agent, warm("/run/vm-run/warm; sleep 1000"));
    assert_eq!([agent.event(), agent.event()], [STARTED, Event::Warm]);
    let fork_point = freeze_all(&mut agent, streams);
    agent.fork(fork_point, 1, "child");
    agent.send(&attach());
    assert_eq!(agent.event(), STARTED);
    agent.send(&attach());
    agent.ends();
}
