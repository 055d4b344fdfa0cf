//! Containers that are forked while they run.

use crate::support::{PATIENCE, boot, fork_busybox, fork_with, programs_rootfs};
use fork::worker::{Jail, Limits, Workers, WorkersSpec};
use fork::{
    Child, ContainerSpec, Disks, ForkSpec, Place, Process, ProcessSpec, Stream, Template, Writable,
};
use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// A shell that reads lines and obeys them.
const OBEY: &str = r#"while read -r line; do eval "$line"; echo "=$?"; done"#;

fn bare() -> &'static Template {
    static BARE: OnceLock<Template> = OnceLock::new();
    BARE.get_or_init(|| boot(128, 1))
}

/// A shell in a container, and the way to it.
struct Shell {
    child: Child,
    stdin: UnixStream,
    stdout: BufReader<UnixStream>,
}

impl Shell {
    fn start(hostname: &str, script: &str) -> Self {
        let mut child = fork_busybox(bare(), hostname);
        let container = ContainerSpec {
            writable: Writable::Memory { limit: 16 << 20 },
            ..ContainerSpec::default()
        };
        let streams = [Stream::Stdin, Stream::Stdout];
        let process = child.start(container, process(&["sh", "-c", script], &streams));
        Self::of(child, process.expect("starts"))
    }

    fn attach(mut child: Child) -> Self {
        let process = child.attach(&[Stream::Stdin, Stream::Stdout]);
        Self::of(child, process.expect("attaches"))
    }

    fn of(child: Child, process: Process) -> Self {
        let stdout = process.stdout.expect("was asked for");
        stdout.set_read_timeout(Some(PATIENCE)).expect("set");
        Self {
            child,
            stdin: process.stdin.expect("was asked for"),
            stdout: BufReader::new(stdout),
        }
    }

    /// What it prints when it is told this.
    fn ask(&mut self, line: &str) -> String {
        writeln!(self.stdin, "{line}").expect("is heard");
        let mut said = String::new();
        loop {
            let mut line = String::new();
            self.stdout.read_line(&mut line).expect("reads");
            match line.strip_prefix('=') {
                Some("0\n") => return said.trim_end().to_owned(),
                _ if line.is_empty() => panic!("it ended: {said}"),
                _ => said.push_str(&line),
            }
        }
    }

    fn fork(&mut self, names: &[&str]) -> Vec<Self> {
        let specs = names.iter().map(|name| named(name)).collect();
        let forked = self
            .child
            .fork(&Place::ThisProcess, specs, None)
            .expect("forks");
        let children = forked.children.into_iter();
        children
            .map(|child| Self::attach(child.expect("is forked")))
            .collect()
    }
}

fn named(hostname: &str) -> ForkSpec {
    ForkSpec {
        hostname: hostname.into(),
        ..ForkSpec::default()
    }
}

fn process(args: &[&str], streams: &[Stream]) -> ProcessSpec {
    ProcessSpec {
        args: args.iter().map(|&word| word.to_owned()).collect(),
        env: vec!["PATH=/bin:/sbin:/usr/bin:/usr/sbin".into()],
        streams: streams.to_vec(),
        ..ProcessSpec::default()
    }
}

/// What no two of a family have in common.
const OWN: [&str; 6] = [
    "cat /proc/sys/kernel/random/generation",
    "cat /proc/sys/kernel/random/boot_id",
    "cat /proc/sys/kernel/random/uuid",
    "head -c 16 /dev/urandom | hexdump",
    "hostname",
    "cat /etc/hostname",
];

#[test]
fn a_child_goes_on_where_its_source_was_as_somebody_else() {
    let mut source = Shell::start("source", OBEY);
    source.ask("x=17; mkdir /d; echo kept > /d/file; sleep 1000 & p=$!");
    let mut family = source.fork(&["one", "two"]);
    // And a child of a child.
    let third = family[0].fork(&["three"]).pop().expect("one");
    family.push(third);
    family.push(source);
    for one in &mut family {
        assert_eq!(one.ask("echo $$ $x; cat /d/file; kill -0 $p"), "1 17\nkept");
    }
    for what in OWN {
        let all: BTreeSet<String> = family.iter_mut().map(|one| one.ask(what)).collect();
        assert_eq!(all.len(), family.len(), "{what}: {all:?}");
    }
    // What one writes, no other sees.
    for (number, one) in family.iter_mut().enumerate() {
        one.ask(&format!("x={number}; echo {number} > /d/file"));
    }
    for (number, one) in family.iter_mut().enumerate() {
        assert_eq!(
            one.ask("echo $x; cat /d/file"),
            format!("{number}\n{number}")
        );
    }
    // Each can be asked for more, and ends by itself.
    for mut one in family {
        let run = one.child.exec(process(&["hostname"], &[Stream::Stdout]));
        let mut said = String::new();
        let mut stdout = run.expect("runs").stdout.expect("was asked for");
        stdout.read_to_string(&mut said).expect("reads");
        assert_eq!(said.trim(), one.ask("hostname"));
        one.stdin.shutdown(Shutdown::Write).expect("ends");
        assert_eq!(one.child.wait().expect("ends").code(), 0);
    }
}

/// A program that was running, and one that was waiting, see the new hostname wherever
/// they see the new generation.
#[test]
fn no_program_runs_before_its_child_is_itself() {
    let script = r#"
        look() { while :; do
            g=$(cat /proc/sys/kernel/random/generation)
            h=$(cat /proc/sys/kernel/hostname)
            echo "$g $h"
        done; }
        rest() { while :; do
            g=$(cat /proc/sys/kernel/random/generation)
            h=$(cat /proc/sys/kernel/hostname)
            echo "$g $h"; usleep 1000
        done; }
        look > /one & a=$!; rest > /two & b=$!; "#;
    let mut source = Shell::start("source", &format!("{script} {OBEY}"));
    for round in 0..4 {
        let name = format!("child-{round}");
        for mut child in source.fork(&[&name]) {
            child.ask("sleep 1; kill $a $b; sort -u /one /two > /seen");
            let own = child.ask("cat /proc/sys/kernel/random/generation");
            let seen = child.ask("cat /seen");
            let of_child: Vec<&str> = seen.lines().filter(|line| line.starts_with(&own)).collect();
            assert_eq!(of_child, [format!("{own} {name}")], "{seen}");
        }
    }
}

/// What the host had started beside the container belongs to the source.
#[test]
fn what_runs_beside_the_container_is_left_behind() {
    let mut source = Shell::start("source", OBEY);
    let streams = [Stream::Stdin, Stream::Stdout];
    let cat = source
        .child
        .exec(process(&["cat"], &streams))
        .expect("runs");
    let (mut stdin, mut stdout) = (cat.stdin.expect("in"), cat.stdout.expect("out"));
    stdout.set_read_timeout(Some(PATIENCE)).expect("set");
    let mut echo = |word: &str| {
        stdin.write_all(word.as_bytes()).expect("is heard");
        let mut said = vec![0; word.len()];
        stdout.read_exact(&mut said).expect("reads");
        assert_eq!(said, word.as_bytes());
    };
    echo("before");
    let mut children = source.fork(&["child"]);
    let mut child = children.pop().expect("one");
    child.ask(
        "i=0; while pidof cat > /dev/null && test $i -lt 100; do usleep 100000; i=$((i + 1)); done",
    );
    assert_eq!(child.ask("pidof cat | wc -w"), "0");
    echo("after");
    assert_eq!(source.ask("pidof cat | wc -w"), "1");
    // The source's client is not the child's.
    assert_eq!(child.ask("echo own"), "own");
    let stream = source.stdout.get_ref();
    stream.set_nonblocking(true).expect("set");
    let nothing = source.stdout.read(&mut [0; 1]).expect_err("nothing came");
    assert_eq!(nothing.kind(), ErrorKind::WouldBlock);
}

/// What a program has freed is the host's again, in a child as in its forks.
#[test]
fn memory_that_was_freed_comes_back() {
    const MIB: u64 = 1 << 10;
    let mut source = Shell::start("source", OBEY);
    let own = |shell: &Shell| shell.child.stats().expect("counted").guest_private;
    let wait_for = |shell: &Shell, most: u64| {
        let until = Instant::now() + PATIENCE;
        while own(shell) > most {
            assert!(Instant::now() < until, "{} KiB stay", own(shell));
            std::thread::sleep(Duration::from_millis(100));
        }
    };
    let before = own(&source);
    source.ask("head -c 40000000 /dev/urandom > /dev/shm/file");
    assert!(own(&source) > before + 36 * MIB);
    let mut with = source.fork(&["with"]);
    source.ask("rm /dev/shm/file");
    wait_for(&source, before + 20 * MIB);
    // Of what was given back nothing is left for the fork, in whose template it was.
    let mut without = source.fork(&["without"]);
    let image = source.child.memory().expect("known");
    let (newest, _) = image.layers().last().expect("forked twice");
    let copied = newest.metadata().expect("stats").blocks() / 2;
    println!(
        "{before} KiB before, {} after, {copied} copied",
        own(&source)
    );
    assert!(copied < 20 * MIB, "{copied} KiB");
    for mut shell in [with.pop().expect("one"), without.pop().expect("one")] {
        shell.ask("head -c 30000000 /dev/zero > /dev/shm/other; rm -f /dev/shm/*");
        wait_for(&shell, 20 * MIB);
        assert_eq!(shell.ask("echo $$"), "1");
    }
}

/// How many children, and of how much memory, unless `VM_RUN_TEST_FORKS` says otherwise.
const CHILDREN: usize = 4;
const MEBIBYTES: &str = "8";
const MANY_MEBIBYTES: &str = "64";

/// A program that would notice, with threads that write all the time, forked again and
/// again into workers; every other fork is of a child of the last one and not of the first.
fn memory_is_right(vcpus: u8) {
    let many = std::env::var("VM_RUN_TEST_FORKS").ok();
    let many: Option<usize> = many.and_then(|n| n.parse().ok());
    // There are four of these tests.
    let (children, at_once, size) = match many {
        Some(many) => (many.div_ceil(4), 8, MANY_MEBIBYTES),
        None => (CHILDREN, 2, MEBIBYTES),
    };
    let program = env!("CARGO_BIN_EXE_vm-run-worker").into();
    let jail = Jail::On(Limits::default());
    let workers = Workers::start(WorkersSpec { program, jail }).expect("a spawner");
    let place = Place::Workers(Arc::new(workers));
    let template = boot(192, vcpus);
    let disks = Disks {
        root: Some(programs_rootfs()),
        writable: None,
    };
    let mut source = fork_with(&template, "source", disks);
    let container = ContainerSpec {
        writable: Writable::Memory { limit: 16 << 20 },
        ..ContainerSpec::default()
    };
    let words = ["/bin/scribble", size, "2"];
    let process = source.start(container, process(&words, &[Stream::Stdout]));
    let own = process.expect("starts").stdout.expect("was asked for");
    let mut own = BufReader::new(own);
    check_rounds(&source, &mut own, 2);
    let mut last = None;
    let mut right = 0;
    while right < children {
        let from = match &mut last {
            Some((last, _)) if right / at_once % 2 == 1 => last,
            _ => &mut source,
        };
        let count = at_once.min(children - right);
        let specs = (right..right + count).map(|number| named(&format!("child-{number}")));
        let forked = from.fork(&place, specs.collect(), None);
        let mut family = forked.expect("forks").children.into_iter();
        // Processors are for those who have something to show.
        source.pause().expect("stops");
        last = family
            .by_ref()
            .map(|child| is_right(child.expect("is forked")))
            .last();
        source.unpause().expect("goes on");
        right += count;
        println!("{right} children of a VM with {vcpus} vCPUs were right");
    }
    // What it has said meanwhile is read before.
    check_rounds(&source, &mut own, 2);
}

#[test]
fn memory_is_right_after_many_forks_with_one_vcpu() {
    memory_is_right(1);
}

#[test]
fn memory_is_right_after_many_forks_with_two_vcpus() {
    memory_is_right(2);
}

#[test]
fn memory_is_right_after_many_forks_with_four_vcpus() {
    memory_is_right(4);
}

#[test]
fn memory_is_right_after_many_forks_with_eight_vcpus() {
    memory_is_right(8);
}

/// Waits until it has found all of its memory right once; with what it says then.
fn is_right(mut child: Child) -> (Child, BufReader<UnixStream>) {
    let process = child.attach(&[Stream::Stdout]).expect("attaches");
    let mut stdout = BufReader::new(process.stdout.expect("was asked for"));
    check_rounds(&child, &mut stdout, 1);
    (child, stdout)
}

/// Reads until the program has found all of its memory right, so often as this child.
fn check_rounds(child: &Child, stdout: &mut BufReader<UnixStream>, rounds: usize) {
    stdout
        .get_ref()
        .set_read_timeout(Some(PATIENCE))
        .expect("set");
    let generation = format!("of {}\n", child.generation().expect("is confirmed"));
    let mut found = 0;
    while found < rounds {
        let mut line = String::new();
        stdout.read_line(&mut line).expect("reads");
        assert!(line.starts_with("round "), "{line:?}");
        found += usize::from(line.ends_with(&generation));
    }
}

/// What each thread of each child drew first; `None` if the program cannot draw so here.
fn first_draws(template: &Template, how: &str, threads: u8) -> Option<Vec<String>> {
    let disks = Disks {
        root: Some(programs_rootfs()),
        writable: None,
    };
    let mut source = fork_with(template, "source", disks);
    let container = ContainerSpec {
        writable: Writable::Memory { limit: 16 << 20 },
        warm: true,
        ..ContainerSpec::default()
    };
    let words = ["/bin/drawing", how, &threads.to_string()];
    let started = source.start(container, process(&words, &[Stream::Stdout]));
    let mut own = started.expect("starts").stdout.expect("was asked for");
    // From here on it draws, until it is a child.
    source.await_warm(PATIENCE).expect("says that it is warm");
    let specs = (0..4).map(|number| named(&format!("child-{number}")));
    let forked = source.fork(&Place::ThisProcess, specs.collect(), None);
    let mut values = Vec::new();
    for child in forked.expect("forks").children {
        let mut child = child.expect("is forked");
        let process = child.attach(&[Stream::Stdout]).expect("attaches");
        let mut stdout = process.stdout.expect("was asked for");
        stdout.set_read_timeout(Some(PATIENCE)).expect("set");
        let mut said = String::new();
        stdout.read_to_string(&mut said).expect("reads");
        assert_eq!(child.wait().expect("ends").code(), 0, "{said}");
        values.extend(said.lines().map(String::from));
    }
    if values.is_empty() {
        own.set_read_timeout(Some(PATIENCE)).expect("set");
        let mut said = [0; 8];
        own.read_exact(&mut said).expect("reads");
        assert_eq!(&said, b"no vDSO\n");
        return None;
    }
    assert!(values.iter().all(|value| value.len() == 32), "{values:?}");
    assert_eq!(values.len(), 4 * usize::from(threads), "{values:?}");
    Some(values)
}

/// Threads that draw random numbers all the time, one for each vCPU, draw what is their
/// child's own from the first on.
#[test]
fn no_two_children_draw_the_same() {
    const VCPUS: u8 = 2;
    let template = boot(128, VCPUS);
    let all_differ = |how: &str| {
        let values = first_draws(&template, how, VCPUS)?;
        let different: BTreeSet<&String> = values.iter().collect();
        println!("{how}: {} of {} differ", different.len(), values.len());
        Some(different.len() == values.len())
    };
    assert!(all_differ("vdso").expect("a vDSO with getrandom"));
    // A thread may have been after a call and before its look at the generation: what it
    // has then, it had before.
    assert!((0..2).any(|_| all_differ("call").expect("a system call")));
}
