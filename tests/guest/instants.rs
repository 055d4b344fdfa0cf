//! Children of one stopped instant, whatever the instruction: a guest without an agent,
//! whose first process draws random numbers without end on each of its CPUs
//! (`guest-kernel/twins`).

use crate::support::{PATIENCE, boot, boot_timeout, busybox_rootfs, guest, host, variable};
use fork::worker::{Jail, Limits, Workers, WorkersSpec};
use fork::{
    BootSpec, ContainerSpec, Error, ForkSpec, Guest, Place, Pool, ProcessSpec, Stream, Template,
    Writable,
};
use std::collections::HashSet;
use std::io::{BufRead, BufReader, Write};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};
use vm_run_abi::identity::{self, Identity};
use vmm::{Birth, Console, Disks, Event, EventSink, Image, Moment, Payload, Vm, VmConfig, VmState};

/// How often a guest is stopped, and two of it go on.
const ROUNDS: u64 = 4;

/// How many numbers each CPU shows as somebody new: guest-kernel/twins has it.
const SHOWN: usize = 8;

/// A VM, and what it tells.
struct Machine {
    vm: Vm,
    events: Receiver<Event>,
}

/// One number, as the guest has printed it.
struct Draw {
    before: u64,
    number: u64,
}

fn sink() -> (EventSink, Receiver<Event>) {
    let (sender, events) = mpsc::channel();
    (Arc::new(move |event| drop(sender.send(event))), events)
}

fn payload() -> Payload {
    Payload::Linux {
        kernel: guest().kernel,
        initramfs: variable("VM_RUN_TEST_TWINS"),
        cmdline: String::new(),
    }
}

impl Machine {
    /// A parent that is drawing on all its CPUs.
    fn boot(vcpus: u8) -> Self {
        let (sink, events) = sink();
        let config = VmConfig {
            memory: 64 << 20,
            vcpus,
            payload: payload(),
        };
        let vm = Vm::boot(&host(), &config, Disks::default(), &sink).expect("boots");
        let this = Self { vm, events };
        this.until("drawing", |lines| {
            let is_drawing = |line: &&String| line.ends_with("is drawing");
            lines.iter().filter(is_drawing).count() == usize::from(vcpus)
        });
        this
    }

    /// A child of `state`, with `page` as its identity page.
    fn fork(image: &Image, state: &VmState, page: &[u8]) -> Self {
        let (sink, events) = sink();
        let birth = Birth {
            disks: Disks::default(),
            volumes: None,
            tap: None,
            map_root: false,
            patches: vec![(identity::GPA, page.to_vec())],
            events: sink,
            hold: false,
        };
        let state = Arc::new(state.clone());
        let vm = vmm::fork(&host(), image, &state, Console::new(), Moment::now(), birth);
        let vm = vm.expect("forks");
        Self { vm, events }
    }

    /// Waits until its console says so, and returns that.
    fn until(&self, what: &str, is_there: impl Fn(&[String]) -> bool) -> Vec<String> {
        let start = Instant::now();
        loop {
            let lines = self.vm.console_tail(1000);
            if is_there(&lines) {
                return lines;
            }
            assert!(start.elapsed() < PATIENCE, "{what}: {lines:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// What it has drawn since it is `generation`, on so many CPUs.
    fn draws(&self, generation: u64, vcpus: u8) -> Vec<Draw> {
        let wanted = SHOWN * usize::from(vcpus);
        let lines = self.until("draws", |lines| {
            let drawn = lines.iter().filter_map(|line| draw(line, generation));
            drawn.count() == wanted
        });
        lines.iter().filter_map(|l| draw(l, generation)).collect()
    }
}

/// What a line says that was printed by a CPU that is `generation`.
fn draw(line: &str, generation: u64) -> Option<Draw> {
    let words: Vec<&str> = line.split(' ').collect();
    let [_, "call" | "vdso", numbers @ ..] = &words[..] else {
        return None;
    };
    let number = |at: usize| u64::from_str_radix(numbers.get(at)?, 16).ok();
    (number(1)? == generation).then_some(Draw {
        before: number(0)?,
        number: number(2)?,
    })
}

/// 2040: as if the template had lain for years.
const SECONDS: u64 = 2_208_988_800;

fn identity(generation: u64) -> Identity {
    let entropy = [generation as u8; identity::ENTROPY_LEN];
    Identity::new(generation, SECONDS * 1_000_000_000, entropy, "twin").expect("an identity")
}

/// Whether a line of a CPU that is `generation` tells the time of [`identity`].
fn tells_time(line: &str, generation: u64) -> bool {
    let time = line.split_once(&format!("time {generation:016x} "));
    let seconds = time.and_then(|(_, seconds)| seconds.parse::<u64>().ok());
    seconds.is_some_and(|seconds| (SECONDS..SECONDS + PATIENCE.as_secs()).contains(&seconds))
}

/// Two children of one instant, and the numbers that they drew as what they are.
fn twins(image: &Image, state: &VmState, round: u64, vcpus: u8) -> ([Machine; 2], [Vec<Draw>; 2]) {
    let generations = [1, 2].map(|twin| 100 * u64::from(vcpus) + 10 * round + twin);
    let machines = generations.map(|of| Machine::fork(image, state, &identity(of).to_bytes()));
    let mut drawn = [0, 1].map(|twin: usize| machines[twin].draws(generations[twin], vcpus));
    for (draws, generation) in drawn.iter_mut().zip(generations) {
        // What was under way at that instant may have been drawn before it.
        draws.retain(|draw| draw.before == generation);
    }
    (machines, drawn)
}

#[test]
fn twins_of_any_instant_draw_other_numbers_on_one_cpu_and_on_two() {
    for vcpus in [1, 2] {
        let mut machine = Machine::boot(vcpus);
        let mut numbers = HashSet::new();
        let mut count = 0;
        let mut would_be_twins = false;
        for round in 0..ROUNDS {
            // Not at the same place in its loop each time.
            std::thread::sleep(Duration::from_micros(round * 7_919));
            machine.vm.pause().expect("stops");
            let (image, mut state) = machine.vm.freeze().expect("freezes");
            if !would_be_twins {
                // Without the interrupt. Where the kernel reseeds just then, they are not.
                let (_, [one, other]) = twins(&image, &state, 9, vcpus);
                let other: HashSet<u64> = other.iter().map(|draw| draw.number).collect();
                would_be_twins = one.iter().any(|draw| other.contains(&draw.number));
            }
            state.interrupt_for_identity();
            let (machines, drawn) = twins(&image, &state, round, vcpus);
            for (machine, draws) in machines.iter().zip(drawn) {
                let told = machine.events.recv_timeout(PATIENCE);
                let Ok(Event::IdentityTaken { generation }) = told else {
                    panic!("{told:?}");
                };
                let lines = machine.vm.console_tail(1000);
                let timely = lines.iter().filter(|line| tells_time(line, generation));
                assert_eq!(timely.count(), usize::from(vcpus), "{lines:?}");
                assert!(draws.len() >= SHOWN * usize::from(vcpus) - usize::from(vcpus));
                count += draws.len();
                numbers.extend(draws.iter().map(|draw| draw.number));
            }
            assert_eq!(numbers.len(), count, "round {round} of {vcpus} vCPUs");
            let [one, _] = machines;
            machine = one;
        }
        assert!(would_be_twins, "{vcpus} vCPUs");
    }
}

#[test]
fn a_child_that_is_told_no_identity_runs_no_program() {
    let machine = Machine::boot(2);
    machine.vm.pause().expect("stops");
    let (image, mut state) = machine.vm.freeze().expect("freezes");
    state.interrupt_for_identity();
    // All of it but the magic: its first process would print what it draws.
    let mut page = identity(7).to_bytes();
    page[..8].fill(0);
    let child = Machine::fork(&image, &state, &page);
    let ended = child.events.recv_timeout(PATIENCE);
    assert_eq!(ended, Ok(Event::Reset));
    let lines = child.vm.console_tail(1000);
    let panic = "is told no identity";
    assert!(lines.iter().any(|line| line.contains(panic)), "{lines:?}");
    assert!(
        !lines.iter().any(|line| draw(line, 7).is_some()),
        "{lines:?}"
    );
}

#[test]
fn a_child_that_does_not_confirm_its_identity_is_never_used() {
    let spec = BootSpec {
        memory: 64 << 20,
        guest: Some(Guest {
            initramfs: variable("VM_RUN_TEST_TWINS"),
            disk: None,
            ..guest()
        }),
        cmdline: "mute".into(),
        timeout: boot_timeout(),
        ..BootSpec::default()
    };
    let template = Template::boot(host(), &spec).expect("boots");
    let mut child = template.fork(ForkSpec::default()).expect("forks");
    let refused = child.confirm();
    assert!(matches!(refused, Err(Error::Identity(_))), "{refused:?}");
    let process = ProcessSpec {
        args: vec!["true".into()],
        ..ProcessSpec::default()
    };
    let refused = child.start(ContainerSpec::default(), process);
    assert!(matches!(refused, Err(Error::State(_))), "{refused:?}");
    let refused = child.renew_identity();
    assert!(matches!(refused, Err(Error::State(_))), "{refused:?}");
}

/// A container that says, for each line, which machine it is on.
const WHO: &str = "cd /proc/sys/kernel/random
    while read line; do echo $(cat generation) $(cat boot_id) $(hostname) $(nproc); done";

#[test]
fn a_running_child_becomes_somebody_else_in_its_process_or_in_a_jailed_worker() {
    let program = env!("CARGO_BIN_EXE_vm-run-worker").into();
    let jail = Jail::On(Limits::default());
    let workers = Arc::new(Workers::start(WorkersSpec { program, jail }).expect("a spawner"));
    let template = Arc::new(boot(128, 2));
    let places = [Place::ThisProcess, Place::Workers(Arc::clone(&workers))];
    for place in places {
        let pool = Pool::new(Arc::clone(&template), place, 0).expect("a pool");
        let disks = fork::Disks {
            root: Some(busybox_rootfs()),
            writable: None,
        };
        let spec = ForkSpec {
            disks,
            ..ForkSpec::default()
        };
        let mut child = pool.fork(spec).expect("forks");
        let limit = 16 << 20;
        let container = ContainerSpec {
            writable: Writable::Memory { limit },
            ..ContainerSpec::default()
        };
        let process = ProcessSpec {
            args: ["sh", "-c", WHO].map(String::from).into(),
            env: vec!["PATH=/bin:/sbin:/usr/bin:/usr/sbin".into()],
            streams: vec![Stream::Stdin, Stream::Stdout],
            ..ProcessSpec::default()
        };
        let streams = child.start(container, process).expect("starts");
        let (mut stdin, stdout) = (
            streams.stdin.expect("asked"),
            streams.stdout.expect("asked"),
        );
        stdout.set_read_timeout(Some(PATIENCE)).expect("set");
        let mut stdout = BufReader::new(stdout);
        let mut ask = || {
            stdin.write_all(b"who?\n").expect("it reads");
            let mut answer = String::new();
            stdout.read_line(&mut answer).expect("it answers");
            answer
        };
        let mut seen = HashSet::new();
        for round in 0..4 {
            let answer = ask();
            assert_eq!(answer, ask(), "nobody else meanwhile");
            let words: Vec<&str> = answer.split_whitespace().collect();
            assert_eq!(words[2..], ["child", "2"]);
            seen.extend([words[0].to_owned(), words[1].to_owned()]);
            assert_eq!(seen.len(), 2 * (round + 1), "{seen:?}");
            child.renew_identity().expect("is somebody else");
        }
    }
    assert_eq!(workers.counts().expect("counts").violations, 0);
}
