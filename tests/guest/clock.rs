//! Time in a child, after its template has lain for a while.

use crate::support::{PATIENCE, Python, boot_timeout, field, guest, host, python_rootfs};
use fork::{
    BootSpec, ContainerSpec, Disks, ForkSpec, ProcessOptions, ProcessSpec, Stream, Template,
    Writable,
};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// How long a template lies.
const LIES: Duration = Duration::from_secs(90);

/// The furthest that a child's clock is from its host's, beside the time that the fork
/// itself took: the host's is read when the child is asked for.
const APART: Duration = Duration::from_millis(50);

/// What a host that is busy, or emulated, may be late by.
const LATE: Duration = Duration::from_secs(5);

/// Arms its timers, says that it is warm, and evaluates lines.
const PROGRAM: &str = r#"
import ctypes, os, select, socket, sys, time

libc = ctypes.CDLL(None)
MONOTONIC, HOUR = 1, 3600

class Timer(ctypes.Structure):
    _fields_ = [(name, ctypes.c_long) for name in ("every", "every_ns", "left", "left_ns")]

timer = libc.timerfd_create(MONOTONIC, os.O_NONBLOCK)
assert libc.timerfd_settime(timer, 0, ctypes.byref(Timer(left=HOUR)), None) == 0
epoll = select.epoll()
epoll.register(timer)

def left():
    now = Timer()
    assert libc.timerfd_gettime(timer, ctypes.byref(now)) == 0
    return now.left

def timed(wait):
    start = time.monotonic()
    found = wait()
    return f"{time.monotonic() - start} {found}"

def log():
    text = ctypes.create_string_buffer(1 << 20)
    got = libc.klogctl(3, text, len(text))
    assert got > 0, got
    words = ("stall", "lockup", "unstable", "hung task", "blocked for more")
    lines = text.raw[:got].decode(errors="replace").splitlines()
    return [line for line in lines if any(word in line for word in words)]

def source():
    with open("/sys/devices/system/clocksource/clocksource0/current_clocksource") as file:
        return file.read().strip()

armed = time.monotonic()
with socket.socket(socket.AF_UNIX) as s:
    s.connect(os.environ["VM_RUN_WARM"])
    s.sendall(b"warm\n")
    s.makefile().readline()
print(f"woken={time.monotonic() - armed}", flush=True)
for line in sys.stdin:
    print(eval(line), flush=True)
"#;

/// A warm container on the clock `source`, and when it was frozen.
fn template(source: &str) -> (Template, Instant) {
    let spec = BootSpec {
        memory: 128 << 20,
        guest: Some(guest()),
        cmdline: format!("clocksource={source}"),
        timeout: boot_timeout(),
        ..BootSpec::default()
    };
    let template = Template::boot(host(), &spec).expect("boots");
    let disks = Disks {
        root: Some(python_rootfs()),
        writable: None,
    };
    let spec = ForkSpec {
        disks,
        ..ForkSpec::default()
    };
    let mut parent = template.fork(spec).expect("forks");
    let limit = 16 << 20;
    let container = ContainerSpec {
        writable: Writable::Memory { limit },
        warm: true,
        ..ContainerSpec::default()
    };
    const SYSLOG: u64 = 1 << 34;
    let process = ProcessSpec {
        args: ["python3", "-c", PROGRAM].map(String::from).into(),
        env: vec!["PATH=/usr/bin:/bin".into()],
        streams: vec![Stream::Stdin, Stream::Stdout],
        options: ProcessOptions {
            capabilities: Some(SYSLOG),
            ..ProcessOptions::default()
        },
        ..ProcessSpec::default()
    };
    let _streams = parent.start(container, process).expect("starts");
    parent.await_warm(PATIENCE).expect("is warm");
    let template = parent.freeze("clock").expect("freezes");
    (template, Instant::now())
}

/// What an expression of [`PROGRAM`]'s `timed` took, in seconds, and found.
fn time(python: &mut Python, expression: &str) -> (f64, String) {
    let answer = python.ask(&format!("timed(lambda: {expression})"));
    let (seconds, found) = answer.split_once(' ').expect("two words");
    (seconds.parse().expect("a number"), found.into())
}

fn now() -> Duration {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.expect("after 1970")
}

#[test]
fn time_is_right_after_a_template_has_lain_for_a_while() {
    // The second is made while the first lies.
    let templates = ["kvm-clock", "tsc"].map(|source| (source, template(source)));
    for (source, (template, frozen)) in templates {
        std::thread::sleep(LIES.saturating_sub(frozen.elapsed()));
        let mut python = Python::fork(&template, ForkSpec::default());
        // No time has passed for it but its own, on the way there and back.
        let woken = python.hear();
        let woken: f64 = field(&woken, "woken").parse().expect("a number");
        assert!(woken < LIES.as_secs_f64() / 2.0, "{woken}");
        assert_eq!(python.ask("source()"), source);

        python.ask("time.time_ns()");
        let before = now();
        let clock: u64 = python.ask("time.time_ns()").parse().expect("a number");
        let (clock, after) = (Duration::from_nanos(clock), now());
        let stages = python.child.stages();
        let confirmed = stages.confirmed.expect("has its identity");
        let fork = confirmed.since(stages.fork.asked);
        assert!(
            clock + APART + fork >= before,
            "{clock:?} {before:?} {fork:?}"
        );
        assert!(clock <= after + APART, "{clock:?} {after:?}");

        let start = Instant::now();
        let (slept, _) = time(&mut python, "time.sleep(1)");
        let took = start.elapsed();
        assert!((1.0..1.0 + LATE.as_secs_f64()).contains(&slept), "{slept}");
        // The host's clock runs no faster than the guest's, nor slower.
        assert!(took > Duration::from_millis(950), "{took:?}");
        assert!(took < Duration::from_secs(1) + LATE, "{took:?}");

        let (waited, found) = time(&mut python, "epoll.poll(0.5)");
        assert_eq!(found, "[]", "the timer has an hour to go");
        assert!(
            (0.5..0.5 + LATE.as_secs_f64()).contains(&waited),
            "{waited}"
        );
        let left: u64 = python.ask("left()").parse().expect("a number");
        assert!((3600 - 60..3600).contains(&left), "{left}");
        assert_eq!(python.ask("log()"), "[]");
    }
}
