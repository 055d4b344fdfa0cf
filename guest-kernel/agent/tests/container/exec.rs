//! What processes that are started beside the first can rely on.

use crate::cases::{Case, cases};
use crate::host::{Agent, Images, Streams, collect, process, rest, shell, start, until};
use std::io::Write;
use std::net::Shutdown;
use vm_run_abi::protocol::{
    CONTAINER, Event, ExitStatus, ProcessId, ProcessSpec, Request, StartFailure, Stream, WindowSize,
};

pub const ALL: &[Case] = cases![
    streams_status_and_surroundings_are_its_own,
    it_is_in_the_container,
    commands_that_cannot_run_leave_the_container_alone,
    signals_and_terminals_go_by_the_id,
    the_end_of_the_container_is_the_end_of_each,
    a_child_takes_them_and_they_do_not_freeze,
    ids_are_used_once,
    many_run_at_once_and_not_too_many,
];

/// A container that does nothing until its stdin ends.
fn idle(images: &Images) -> (Agent, Streams) {
    let mut agent = Agent::start(images);
    let streams = start(&mut agent, process(&["cat"]));
    assert_eq!(agent.event(), started(CONTAINER));
    (agent, streams)
}

fn started(process: ProcessId) -> Event {
    Event::Started { process }
}

fn exited(process: ProcessId, code: u8) -> Event {
    let status = ExitStatus::Code(code);
    Event::Exited { process, status }
}

fn killed(process: ProcessId) -> Event {
    let status = ExitStatus::Signal(9);
    Event::Exited { process, status }
}

/// Opens the three streams and asks for `sh -c SCRIPT`.
fn exec(agent: &mut Agent, id: ProcessId, script: &str) -> Streams {
    exec_spec(agent, id, shell(script).1)
}

fn exec_spec(agent: &mut Agent, id: ProcessId, process: ProcessSpec) -> Streams {
    let streams = agent.streams_of(id);
    agent.send(&Request::Exec { id, process });
    streams
}

/// What a script says that ends well.
fn output(agent: &mut Agent, id: ProcessId, script: &str) -> String {
    let streams = exec(agent, id, script);
    drop(streams.stdin);
    let stdout = rest(streams.stdout);
    assert_eq!(rest(streams.stderr), "", "{script}");
    let events = [agent.event(), agent.event()];
    assert_eq!(events, [started(id), exited(id, 0)], "{script}");
    stdout
}

fn streams_status_and_surroundings_are_its_own(images: &Images) {
    let (mut agent, streams) = idle(images);
    let (_, mut spec) = shell("cat; echo $FOO $HOME $VM_RUN_WARM; pwd; id -u; echo no >&2; exit 9");
    spec.env = vec!["FOO=bar".to_owned()];
    spec.cwd = "/made".to_owned();
    spec.user = "web".to_owned();
    let mut first = exec_spec(&mut agent, 7, spec);
    // Two at once.
    let second = exec(&mut agent, 8, "echo second; exit 2");
    assert_eq!(rest(second.stdout), "second\n");
    first.stdin.write_all(b"in\n").unwrap();
    first.stdin.shutdown(Shutdown::Write).unwrap();
    assert_eq!(rest(first.stdout), "in\nbar /home/web\n/made\n1000\n");
    assert_eq!(rest(first.stderr), "no\n");
    let mut events: Vec<Event> = (0..4).map(|_| agent.event()).collect();
    events.sort_by_key(|event| match event {
        Event::Started { process } => (*process, 0),
        Event::Exited { process, .. } => (*process, 1),
        other => panic!("{other:?}"),
    });
    let expected = [started(7), exited(7, 9), started(8), exited(8, 2)];
    assert_eq!(events, expected);

    // With no stream at all.
    let (_, mut spec) = shell("cat; echo lost; exit 4");
    spec.streams = Vec::new();
    agent.send(&Request::Exec {
        id: 9,
        process: spec,
    });
    assert_eq!([agent.event(), agent.event()], [started(9), exited(9, 4)]);

    // The first process has seen nothing of it.
    drop(streams.stdin);
    assert_eq!(rest(streams.stdout), "");
    assert_eq!(agent.event(), exited(CONTAINER, 0));
}

fn it_is_in_the_container(images: &Images) {
    let (mut agent, _streams) = idle(images);
    let same = "for ns in mnt pid ipc cgroup uts net; do \
                [ $(readlink /proc/self/ns/$ns) = $(readlink /proc/1/ns/$ns) ] || echo $ns; done; \
                readlink /proc/1/exe; grep ^0 /proc/self/cgroup; ls -d /proc/[1-9]* | wc -l";
    let seen = output(&mut agent, 1, same);
    let (rest, processes) = seen.trim_end().rsplit_once('\n').unwrap();
    assert_eq!(rest, "/bin/busybox\n0::/");
    // cat, the shell, ls and wc.
    assert_eq!(processes, "4");
    let privileges = output(
        &mut agent,
        2,
        "grep -E '^(Cap[PEB]|SigIgn|SigBlk)' /proc/self/status; true",
    );
    assert_eq!(
        privileges,
        "SigBlk:\t0000000000000000\nSigIgn:\t0000000000000000\nCapPrm:\t00000000a80425fb\n\
         CapEff:\t00000000a80425fb\nCapBnd:\t00000000a80425fb\n"
    );
    // Nothing of the agent's own is left open, and its session is its own.
    let fds = output(
        &mut agent,
        3,
        "ls /proc/self/fd | wc -l; cut -d' ' -f6 /proc/$$/stat; echo $$",
    );
    let lines: Vec<&str> = fds.lines().collect();
    assert_eq!(lines[0], "4");
    assert_eq!(lines[1], lines[2]);
    // What one makes another sees.
    assert_eq!(
        output(&mut agent, 4, "echo kept >/tmp/file; umask"),
        "0022\n"
    );
    assert_eq!(output(&mut agent, 5, "cat /tmp/file"), "kept\n");
}

fn commands_that_cannot_run_leave_the_container_alone(images: &Images) {
    let (mut agent, streams) = idle(images);
    let mut refused = |id, args: &[&str], user: &str| {
        let (_, mut spec) = process(args);
        spec.user = user.to_owned();
        let streams = exec_spec(&mut agent, id, spec);
        assert_eq!(rest(streams.stdout), "");
        match agent.event() {
            Event::StartFailed {
                process, reason, ..
            } if process == id => reason,
            other => panic!("{args:?}: {other:?}"),
        }
    };
    assert_eq!(refused(1, &["foo"], ""), StartFailure::NotFound);
    assert_eq!(
        refused(2, &["/etc/passwd"], ""),
        StartFailure::NotExecutable
    );
    assert_eq!(refused(3, &["true"], "ghost"), StartFailure::Other);
    drop(streams.stdin);
    assert_eq!(agent.event(), exited(CONTAINER, 0));
    // Nor can one start when that has ended.
    let streams = exec(&mut agent, 4, "true");
    let Event::StartFailed { message, .. } = agent.event() else {
        panic!("it has started");
    };
    assert_eq!(message, "the container is not running");
    assert_eq!(rest(streams.stdout), "");
}

fn signals_and_terminals_go_by_the_id(images: &Images) {
    let (mut agent, _streams) = idle(images);
    let script = "trap 'echo trapped; exit 3' TERM; echo ready; while :; do sleep 0.05; done";
    let mut first = exec(&mut agent, 1, script);
    let mut second = exec(&mut agent, 2, script);
    until(&mut first.stdout, "ready\n");
    until(&mut second.stdout, "ready\n");
    agent.signal_to(1, libc::SIGTERM);
    assert_eq!(rest(first.stdout), "trapped\n");
    agent.signal_to(2, libc::SIGKILL);
    assert_eq!(rest(second.stdout), "");
    let mut events: Vec<String> = (0..4).map(|_| format!("{:?}", agent.event())).collect();
    let mut expected = [started(1), started(2), exited(1, 3), killed(2)].map(|e| format!("{e:?}"));
    events.sort();
    expected.sort();
    assert_eq!(events, expected);
    // To one that has ended.
    agent.signal_to(1, libc::SIGKILL);

    let (_, mut spec) = shell(
        "tty; stty size; trap 'stty size; exit 5' WINCH; echo on; while :; do sleep 0.05; done",
    );
    spec.streams = vec![Stream::Terminal];
    spec.window = Some(WindowSize { rows: 11, cols: 22 });
    let mut terminal = agent.stream_of(3, Stream::Terminal);
    agent.send(&Request::Exec {
        id: 3,
        process: spec,
    });
    assert_eq!(
        until(&mut terminal, "on\r\n"),
        "/dev/pts/0\r\n11 22\r\non\r\n"
    );
    let size = WindowSize { rows: 12, cols: 24 };
    agent.send(&Request::Resize { process: 3, size });
    assert_eq!(rest(terminal), "12 24\r\n");
    assert_eq!([agent.event(), agent.event()], [started(3), exited(3, 5)]);
}

fn the_end_of_the_container_is_the_end_of_each(images: &Images) {
    let (mut agent, streams) = idle(images);
    let mut first = exec(&mut agent, 1, "echo on; sleep 1000");
    let mut second = exec(&mut agent, 2, "trap '' TERM; echo on; sleep 1000 & wait");
    until(&mut first.stdout, "on\n");
    until(&mut second.stdout, "on\n");
    let mut starts = [agent.event(), agent.event()];
    starts.sort_by_key(|event| *event == started(2));
    assert_eq!(starts, [started(1), started(2)]);
    drop(streams.stdin);
    let mut ends = [agent.event(), agent.event()];
    ends.sort_by_key(|event| *event == killed(2));
    assert_eq!(ends, [killed(1), killed(2)]);
    assert_eq!(agent.event(), exited(CONTAINER, 0));
    assert_eq!(rest(first.stdout), "");
    assert_eq!(rest(second.stdout), "");

    // What an exec leaves behind has its streams as long as the container.
    let (mut agent, streams) = idle(images);
    let mut left = exec(
        &mut agent,
        1,
        "(sleep 0.2; echo late; sleep 1000) & echo early",
    );
    assert_eq!(until(&mut left.stdout, "early\n"), "early\n");
    assert_eq!([agent.event(), agent.event()], [started(1), exited(1, 0)]);
    assert_eq!(until(&mut left.stdout, "late\n"), "late\n");
    let stdout = collect(left.stdout);
    drop(streams.stdin);
    assert_eq!(agent.event(), exited(CONTAINER, 0));
    assert_eq!(stdout.join().unwrap(), b"");

    // A host that goes ends those too.
    let (mut agent, _streams) = idle(images);
    let mut first = exec(&mut agent, 1, "trap '' TERM; echo on; sleep 1000");
    until(&mut first.stdout, "on\n");
    agent.control.shutdown(Shutdown::Both).unwrap();
    agent.ends();
}

fn a_child_takes_them_and_they_do_not_freeze(images: &Images) {
    let mut agent = Agent::start(images);
    let (mut container, spec) = shell("/run/vm-run/warm; cat");
    container.warm = true;
    let streams = start(&mut agent, (container, spec));
    assert_eq!(
        [agent.event(), agent.event()],
        [started(CONTAINER), Event::Warm]
    );
    let mut busy = exec(&mut agent, 1, "echo on; read line");
    until(&mut busy.stdout, "on\n");
    assert_eq!(agent.event(), started(1));
    agent.send(&Request::Freeze);
    let Event::FreezeFailed { message } = agent.event() else {
        panic!("it froze beside an exec");
    };
    assert_eq!(
        message,
        "the container's first process must run, and no other"
    );
    drop(busy.stdin);
    assert_eq!(rest(busy.stdout), "");
    assert_eq!(agent.event(), exited(1, 1));
    drop(busy.stderr);
    agent.send(&Request::Freeze);
    assert_eq!(agent.event(), Event::Frozen);
    drop(streams);
    let fork_point = agent.freeze();
    agent.fork(fork_point, 1, "child-1");
    // The same id again, as the host of the child knows no other; and without an
    // attach.
    assert_eq!(
        output(&mut agent, 1, "hostname; echo $HOSTNAME"),
        "child-1\nchild-1\n"
    );
}

fn ids_are_used_once(images: &Images) {
    let (mut agent, _streams) = idle(images);
    output(&mut agent, 1, "true");
    let (_, mut process) = process(&["true"]);
    process.streams = Vec::new();
    agent.send(&Request::Exec { id: 1, process });
    agent.ends();

    let (mut agent, _streams) = idle(images);
    let (_, mut process) = shell("true");
    process.streams = Vec::new();
    let id = CONTAINER;
    agent.send(&Request::Exec { id, process });
    agent.ends();
}

fn many_run_at_once_and_not_too_many(images: &Images) {
    let (mut agent, streams) = idle(images);
    for id in 1..=256 {
        let (_, mut process) = process(&["sleep", "1000"]);
        process.streams = Vec::new();
        agent.send(&Request::Exec { id, process });
    }
    let mut running = 0;
    let refused = loop {
        match agent.event() {
            Event::Started { .. } => running += 1,
            Event::StartFailed {
                process, message, ..
            } => {
                assert_eq!(message, "the container has 256 processes already");
                break process;
            }
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(refused, 256);
    while running < 255 {
        assert!(matches!(agent.event(), Event::Started { .. }));
        running += 1;
    }
    drop(streams.stdin);
    for _ in 1..=255 {
        assert!(matches!(agent.event(), Event::Exited { process, .. } if process != CONTAINER));
    }
    assert_eq!(agent.event(), exited(CONTAINER, 0));
}
