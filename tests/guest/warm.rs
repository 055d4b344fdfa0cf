//! Warm containers: a frozen Python answers in each child, with no start of its own.

use crate::support::{PATIENCE, Python, boot, children, python_rootfs};
use fork::worker::{Jail, Limits, Workers, WorkersSpec};
use fork::{
    ContainerSpec, Disks, Error, ForkPath, ForkSpec, Kind, Place, Pool, ProcessSpec, Stream,
    Template, Writable,
};
use std::collections::BTreeSet;
use std::io::Read;
use std::net::Shutdown;
use std::sync::{Arc, OnceLock};

/// It imports what it needs, says that it is warm, and evaluates lines. `again` makes
/// it warm once more.
const EVALUATOR: &str = r#"
import json, os, random, secrets, select, socket, ssl, sys

# Seeded in the parent: what docs/identity.md says of them is for each child to do.
ssl.RAND_bytes(16)
random.random()

def read(name):
    with open("/proc/sys/kernel/random/" + name) as file:
        return file.read().strip()

def warm(after):
    with socket.socket(socket.AF_UNIX) as s:
        s.connect(os.environ["VM_RUN_WARM"])
        s.sendall(b"warm\n")
        after()
        return s.makefile().readline().split()[1]

boot_id = read("boot_id")
# Whoever polls it is woken by a fork.
watched = open("/proc/sys/kernel/random/generation")
watched.read()
poll = select.poll()
poll.register(watched, select.POLLPRI)
generation = warm(lambda: None)
for line in sys.stdin:
    if line == "again\n":
        generation = warm(lambda: print("waiting", flush=True))
        continue
    try:
        print(eval(line), flush=True)
    except Exception as error:
        print(repr(error), flush=True)
"#;

/// How many children live at the same time.
const AT_ONCE: usize = 20;

fn process(args: &[&str], streams: &[Stream]) -> ProcessSpec {
    ProcessSpec {
        args: args.iter().map(|&word| word.to_owned()).collect(),
        env: vec!["PATH=/usr/bin:/bin".into(), "LANG=C.UTF-8".into()],
        streams: streams.to_vec(),
        ..ProcessSpec::default()
    }
}

/// A template of a Python that is warm. All tests share it.
fn template() -> Arc<Template> {
    static TEMPLATE: OnceLock<Arc<Template>> = OnceLock::new();
    let make = || {
        let mut parent = boot(128, 1)
            .fork(ForkSpec {
                hostname: "parent".into(),
                disks: Disks {
                    root: Some(python_rootfs()),
                    writable: None,
                },
                ..ForkSpec::default()
            })
            .expect("forks");
        let on = |writable| ContainerSpec {
            writable,
            warm: true,
            ..ContainerSpec::default()
        };
        let streams = [Stream::Stdin, Stream::Stdout];
        let python = process(&["python3", "-c", EVALUATOR], &streams);
        // Its children could not have that disk.
        let refused = parent.start(on(Writable::Disk), python.clone());
        assert!(matches!(refused, Err(Error::Request(_))), "{refused:?}");
        let container = on(Writable::Memory { limit: 16 << 20 });
        let _streams = parent.start(container, python).expect("starts");
        parent.await_warm(PATIENCE).expect("says that it is warm");
        Arc::new(parent.freeze("debian-python").expect("freezes"))
    };
    Arc::clone(TEMPLATE.get_or_init(make))
}

fn named(hostname: &str) -> ForkSpec {
    ForkSpec {
        hostname: hostname.into(),
        ..ForkSpec::default()
    }
}

#[test]
fn a_warm_child_answers_with_no_exec() {
    let template = template();
    assert_eq!(template.kind(), Kind::Warm);
    let mut python = Python::fork(&template, named("warm-one"));
    assert_eq!(python.ask("1+1"), "2");
    assert_eq!(python.ask("socket.gethostname()"), "warm-one");
    // It is the process that said so in the parent: the first of its container.
    assert_eq!(python.ask("os.getpid()"), "1");
    assert_eq!(
        python.ask("int(generation, 16) != 0 and len(generation)"),
        "16"
    );
    // The kernel knows it too, has told whoever was waiting, and has another boot's id
    // than was read in the parent.
    let same = "int(read('generation')) == int(generation, 16)";
    assert_eq!(python.ask(same), "True");
    assert_eq!(python.ask("len(poll.poll(0))"), "1");
    assert_eq!(python.ask("read('boot_id') == boot_id"), "False");
    assert_eq!(python.ask("read('boot_id') == read('boot_id')"), "True");
}

/// What no two children, and no child and its parent, may have in common.
const OWN: [&str; 9] = [
    "secrets.token_hex(16)",
    "os.getrandom(16).hex()",
    "open('/dev/urandom', 'rb').read(16).hex()",
    "read('uuid')",
    "read('boot_id')",
    "read('generation')",
    "socket.gethostname()",
    "ssl.RAND_add(os.urandom(32), 32) or ssl.RAND_bytes(16).hex()",
    "random.seed() or random.random()",
];

#[test]
fn many_children_have_nothing_in_common() {
    let program = env!("CARGO_BIN_EXE_vm-run-worker").into();
    let jail = Jail::On(Limits::default());
    let workers = Arc::new(Workers::start(WorkersSpec { program, jail }).expect("a spawner"));
    let place = Place::Workers(Arc::clone(&workers));
    let pool = Pool::new(template(), place, AT_ONCE).expect("a pool");
    let rounds = children(60).div_ceil(AT_ONCE);
    let mut seen = OWN.map(|_| BTreeSet::new());
    let mut pooled = 0;
    for round in 0..rounds {
        pool.wait_full(PATIENCE).expect("fills");
        let names: Vec<String> = (0..AT_ONCE).map(|i| format!("warm-{round}-{i}")).collect();
        let forked = pool.fork_many(names.iter().map(|name| named(name)).collect());
        let mut pythons: Vec<Python> = forked
            .into_iter()
            .map(|child| Python::of(child.expect("forks")))
            .collect();
        // All work at once; nobody waits for another's answer.
        for python in &mut pythons {
            python.say("[1+1, socket.gethostname(), boot_id]");
            OWN.iter().for_each(|expression| python.say(expression));
        }
        for (python, name) in pythons.iter_mut().zip(&names) {
            let told = python.hear();
            assert!(told.starts_with(&format!("[2, '{name}', '")), "{told}");
            for seen in &mut seen {
                seen.insert(python.hear());
            }
            // What was read in the parent.
            seen[4].insert(told.rsplit('\'').nth(1).expect("an id").to_owned());
            // Its root image is the template's own, and is mapped again.
            let stats = python.child.stats().expect("counts");
            assert!(stats.root_mapped > Some(0), "{stats:?}");
            pooled += usize::from(python.child.path() == ForkPath::Pooled);
        }
    }
    let count = rounds * AT_ONCE;
    for (seen, expression) in seen.iter().zip(OWN) {
        let with_parent = usize::from(expression == "read('boot_id')");
        assert_eq!(seen.len(), count + with_parent, "{expression}: {seen:?}");
    }
    assert_eq!(pooled, count, "a full pool has one for each");
    assert_eq!(workers.counts().expect("counts").violations, 0);
}

#[test]
fn a_warm_child_can_be_frozen_in_its_turn() {
    let mut parent = Python::fork(&template(), named("second"));
    assert_eq!(parent.ask("(kept := 41)"), "41");
    let first = parent.ask("generation");
    parent.say("again");
    assert_eq!(parent.hear(), "waiting");
    let Python { child, .. } = parent;
    let template = child.freeze("debian-python").expect("freezes again");
    let mut generations = BTreeSet::from([first]);
    let mut tokens = BTreeSet::new();
    for name in ["third-a", "third-b"] {
        let mut python = Python::fork(&template, named(name));
        assert_eq!(python.ask("kept + 1"), "42");
        // Of what its parent had not read before it was frozen.
        let import = "len(__import__('xml.dom.minidom').dom.minidom.parseString('<a/>').toxml())";
        assert_eq!(python.ask(import), "26");
        assert_eq!(python.ask("socket.gethostname()"), name);
        generations.insert(python.ask("generation"));
        tokens.insert(python.ask("secrets.token_hex()"));
    }
    assert_eq!(generations.len(), 3, "{generations:?}");
    assert_eq!(tokens.len(), 2);
}

#[test]
fn a_process_runs_beside_the_warm_one() {
    let mut python = Python::fork(&template(), named("beside"));
    let script = "cat /proc/1/comm; hostname; exit 3";
    let shell = process(&["sh", "-c", script], &[Stream::Stdout]);
    let started = python.child.exec(shell).expect("execs");
    let mut said = String::new();
    let mut stdout = started.stdout.expect("was asked for");
    stdout.set_read_timeout(Some(PATIENCE)).expect("set");
    stdout.read_to_string(&mut said).expect("reads");
    assert_eq!(said, "python3\nbeside\n");
    let status = python.child.wait_for(started.remote.process());
    assert_eq!(status.expect("ends").code(), 3);
    assert_eq!(python.ask("6 * 7"), "42", "the warm one has not noticed");
}

#[test]
fn a_warm_childs_end_is_told() {
    let template = template();
    let end = |end: fn(&mut Python)| {
        let mut python = Python::fork(&template, named("ends"));
        assert_eq!(python.ask("0"), "0");
        end(&mut python);
        python.child.wait().expect("ends").code()
    };
    assert_eq!(end(|python| python.say("sys.exit(7)")), 7);
    let end_of_file = |python: &mut Python| {
        let shut = python.stdin.shutdown(Shutdown::Write);
        shut.expect("shuts down");
    };
    assert_eq!(end(end_of_file), 0, "its loop is over");
    assert_eq!(end(|python| python.child.kill().expect("kills")), 137);
}
