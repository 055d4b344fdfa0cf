//! The hooks of a warm container.

use crate::cases::{Case, cases};
use crate::host::{Agent, ForkPoint, Images, Streams, rest, start, until};
use crate::warm::{STARTED, attach, freeze_all, warm};
use std::io::Write;
use std::time::{Duration, Instant};
use vm_run_abi::protocol::{
    CONTAINER, Event, HOOK, Hook, Hooks, ProcessSpec, Request, StartFailure, Stream,
};

pub const ALL: &[Case] = cases![
    commands_run_before_the_freeze_and_in_each_child,
    signals_reach_the_first_process,
    a_command_that_fails_before_the_freeze_forbids_it,
    a_command_that_fails_in_a_child_ends_it,
    no_host_speaks_for_a_hook,
];

fn command(words: &[&str]) -> Option<Hook> {
    Some(Hook::Command(words.iter().map(|&w| w.into()).collect()))
}

fn line(script: &str) -> Option<Hook> {
    command(&["sh", "-c", script])
}

/// Starts `script` as a container with these hooks, and waits until it is warm.
fn start_with(agent: &mut Agent, hooks: Hooks, script: &str) -> Streams {
    let (mut container, mut process) = warm(script);
    container.hooks = hooks;
    process.env = vec!["ASKED=yes".into()];
    let streams = start(agent, (container, process));
    assert_eq!([agent.event(), agent.event()], [STARTED, Event::Warm]);
    streams
}

fn commands_run_before_the_freeze_and_in_each_child(images: &Images) {
    let mut agent = Agent::start(images);
    let hooks = Hooks {
        // What it leaves running, with its output open, is the container's.
        pre_freeze: line("echo $ASKED $(hostname) >> /said; (while :; do :; done) & echo heard"),
        post_fork: line("head -c 200000 /dev/zero; echo $ASKED $(hostname) >> /said"),
        ..Hooks::default()
    };
    let script = "for i in 1 2; do /run/vm-run/warm; read line; cat /said; echo; done";
    let streams = start_with(&mut agent, hooks, script);
    let host = rustix::system::uname()
        .nodename()
        .to_string_lossy()
        .into_owned();
    let mut said = format!("yes {host}\n");
    let mut fork_point = freeze_all(&mut agent, streams);
    for (generation, name) in [(1, "one"), (2, "two")] {
        agent.fork(fork_point, generation, name);
        let mut streams = attach(&mut agent);
        streams.stdin.write_all(b"\n").unwrap();
        said += &format!("yes {name}\n");
        let expected = format!("{generation:016x}\n{said}\n");
        assert_eq!(until(&mut streams.stdout, "\n\n"), expected);
        if generation == 2 {
            return;
        }
        agent.await_sleeping("warm", 1);
        fork_point = freeze_all(&mut agent, streams);
        said += &format!("yes {name}\n");
    }
}

fn signals_reach_the_first_process(images: &Images) {
    const USR1: i32 = 10;
    let mut agent = Agent::start(images);
    let hooks = Hooks {
        post_fork: Some(Hook::Signal(USR1)),
        ..Hooks::default()
    };
    let script = "trap 'echo told' USR1; /run/vm-run/warm; sleep 1000 & wait";
    let streams = start_with(&mut agent, hooks, script);
    let fork_point = freeze_all(&mut agent, streams);
    agent.fork(fork_point, 1, "child");
    let mut streams = attach(&mut agent);
    let said = until(&mut streams.stdout, "told\n");
    assert_eq!(said, "0000000000000001\ntold\n");
}

fn a_command_that_fails_before_the_freeze_forbids_it(images: &Images) {
    let cases = [
        (
            line("echo bad >&2; echo; exit 3"),
            "ended with status 3: bad",
        ),
        (line("kill -9 $$"), "was killed"),
        (
            line("echo still here; sleep 1000 & sleep 1000"),
            "did not end in 0.5 s: still here",
        ),
        (
            command(&["no-such-hook"]),
            ": exec: \"no-such-hook\": executable file not found in $PATH",
        ),
        (command(&[]), ": exec: no command"),
    ];
    for (pre_freeze, why) in cases {
        let mut agent = Agent::start(images);
        let hooks = Hooks {
            pre_freeze,
            limit_ms: 500,
            ..Hooks::default()
        };
        let mut streams = start_with(&mut agent, hooks, "/run/vm-run/warm & cat");
        for _ in 0..2 {
            agent.send(&Request::Freeze);
            let Event::FreezeFailed { message } = agent.event() else {
                panic!("{why}");
            };
            let told = message.strip_prefix("the pre-freeze hook").expect(&message);
            assert_eq!(told.trim_start_matches(' '), why);
        }
        // It has gone, with what it had started, and the container is there.
        streams.stdin.write_all(b"on\n").unwrap();
        until(&mut streams.stdout, "on\n");
        agent.await_sleeping("sleep", 0);
    }
}

fn a_command_that_fails_in_a_child_ends_it(images: &Images) {
    let refused = |agent: &mut Agent, why: &str| {
        let message = format!("the post-fork hook {why}");
        let reason = StartFailure::Other;
        let process = CONTAINER;
        let refused = Event::StartFailed {
            process,
            reason,
            message,
        };
        // The end of the container may come before.
        let mut events = vec![agent.event()];
        if events[0] != refused {
            events.push(agent.event());
        }
        assert!(events.contains(&refused), "{events:?}");
    };
    let ask = |agent: &mut Agent, fork_point: ForkPoint, wait: Duration| {
        agent.fork(fork_point, 1, "child");
        std::thread::sleep(wait);
        let streams = agent.streams_of(CONTAINER);
        let all = vec![Stream::Stdin, Stream::Stdout, Stream::Stderr];
        agent.send(&Request::Attach { streams: all });
        streams
    };
    for (script, why, wait) in [
        // Before the host asks, and after.
        ("echo no; exit 4", "ended with status 4: no", 300),
        ("sleep 0.3; exit 4", "ended with status 4", 0),
        ("sleep 1000", "did not end in 0.5 s", 0),
    ] {
        let mut agent = Agent::start(images);
        let hooks = Hooks {
            post_fork: line(script),
            limit_ms: 500,
            ..Hooks::default()
        };
        let streams = start_with(&mut agent, hooks, "/run/vm-run/warm; sleep 1000");
        let fork_point = freeze_all(&mut agent, streams);
        let begun = Instant::now();
        let streams = ask(&mut agent, fork_point, Duration::from_millis(wait));
        refused(&mut agent, why);
        assert!(begun.elapsed() < Duration::from_secs(5), "{why}");
        assert_eq!(rest(streams.stdout), "", "nobody is attached");
    }
}

fn no_host_speaks_for_a_hook(images: &Images) {
    let mut agent = Agent::start(images);
    let streams = start_with(&mut agent, Hooks::default(), "/run/vm-run/warm; sleep 1000");
    let process = ProcessSpec {
        args: vec!["true".into()],
        ..ProcessSpec::default()
    };
    agent.send(&Request::Exec { id: HOOK, process });
    // Such a host has gone for the agent, and the container with it.
    assert_eq!(rest(streams.stdout), "");
    agent.ends();
}
