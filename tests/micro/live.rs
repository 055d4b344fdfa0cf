//! Forks of a guest of a few instructions that runs.

use crate::child;
use fork::micro::{LiveLoad, live_bench};
use fork::worker::{Jail, Limits, Workers, WorkersSpec};
use fork::{BootSpec, Child, ForkPath, Host, LiveFork, Place, Template};
use std::sync::Arc;
use std::time::Duration;

const MIB: u64 = 1 << 20;

/// Two mebibytes in runs, and single pages as fast as it can.
pub const LOAD: LiveLoad = LiveLoad {
    first: 16 * MIB,
    runs: 32,
    stride: MIB,
    pages: 16,
    ticks: 0,
    area: 8 * MIB,
    area_pages: 256,
    writes: 1 << 40,
    shift: 0,
};

/// The same, and after a while two more mebibytes, and an answer: new pages for each of a
/// line of forks.
const SPREADS: LiveLoad = LiveLoad {
    ticks: 20_000,
    writes: 20_000,
    shift: 64 << 10,
    ..LOAD
};

/// Every second page of half of its memory: each is a mapping of each child.
const SCATTERS: LiveLoad = LiveLoad {
    runs: 8192,
    stride: 8 << 10,
    pages: 1,
    area: 96 * MIB,
    ..LOAD
};

pub fn template(load: &LiveLoad) -> Template {
    template_with(load, 64 * MIB)
}

fn template_with(load: &LiveLoad, memory: u64) -> Template {
    let host = Arc::new(Host::open().expect("these tests need /dev/kvm"));
    let spec = BootSpec {
        memory,
        program: live_bench(load),
        ..BootSpec::default()
    };
    Template::boot(host, &spec).expect("boots")
}

fn workers(jail: Jail) -> Place {
    let program = env!("CARGO_BIN_EXE_vm-run-worker").into();
    let workers = Workers::start(WorkersSpec { program, jail }).expect("a spawner");
    Place::Workers(Arc::new(workers))
}

/// It has written its runs, and goes on to write single pages.
pub fn begins(child: &mut Child) {
    child.answer().expect("answers");
    child.unpause().expect("goes on");
    std::thread::sleep(Duration::from_millis(5));
}

fn forks(source: &mut Child, place: &Place, count: usize) -> Vec<Child> {
    let specs = (0..count).map(|n| child(&format!("live-{n}"))).collect();
    let LiveFork { children, cost } = source.fork(place, specs, None).expect("is forked");
    println!("{cost:?}");
    assert!(cost.pages > 0 && cost.resumed > cost.stopped);
    children
        .into_iter()
        .map(|child| child.expect("forks"))
        .collect()
}

/// Each answers with its own generation, which it has found while it wrote.
fn answer(children: &mut [Child]) {
    for child in children {
        let answer = child.answer().expect("answers");
        assert_eq!(Some(answer), child.generation());
        assert_eq!(child.path(), ForkPath::Live);
    }
}

fn is_forked_again_and_again(place: &Place, mut source: Child) {
    begins(&mut source);
    let mut children = forks(&mut source, place, 3);
    answer(&mut children);
    // The source again; and a child, which is a source itself now, and its child.
    answer(&mut forks(&mut source, place, 2));
    let mut child = children.pop().expect("three");
    for _ in 0..4 {
        child.unpause().expect("goes on");
        let mut next = forks(&mut child, place, 1);
        answer(&mut next);
        child = next.pop().expect("one");
    }
    answer(&mut forks(&mut source, place, 1));
}

#[test]
fn a_running_child_is_forked_in_this_process() {
    let source = template(&LOAD).fork(child("source")).expect("forks");
    is_forked_again_and_again(&Place::ThisProcess, source);
}

#[test]
fn a_running_child_is_forked_from_worker_to_worker() {
    let place = workers(Jail::On(Limits::default()));
    let pool = fork::Pool::new(Arc::new(template(&LOAD)), place.clone(), 0).expect("a pool");
    let source = pool.fork(child("source")).expect("forks");
    is_forked_again_and_again(&place, source);
    let Place::Workers(workers) = place else {
        return;
    };
    assert_eq!(workers.counts().expect("counts").violations, 0);
}

/// Deeper than an image has layers, with pages of its own at each level. Gives the most
/// layers that one had.
fn is_forked_to_any_depth(place: &Place, mut source: Child, merges: bool) -> usize {
    let mut most = 0;
    for _ in 0..18 {
        begins(&mut source);
        let mut next = forks(&mut source, place, 1);
        answer(&mut next);
        source = next.pop().expect("one");
        source.unpause().expect("goes on");
        let memory = source.memory().expect("an image");
        most = most.max(memory.layers().len());
        if merges && let Some(merged) = memory.merge().expect("merged") {
            source.use_merged(&merged).expect("there");
        }
    }
    most
}

#[test]
fn a_line_of_forks_is_as_deep_as_one_likes() {
    let template = Arc::new(template(&SPREADS));
    let place = workers(Jail::On(Limits::default()));
    let pool = fork::Pool::new(Arc::clone(&template), place.clone(), 0).expect("a pool");
    let source = pool.fork(child("source")).expect("forks");
    assert_eq!(
        is_forked_to_any_depth(&place, source, false),
        vmm::LAYERS_MAX
    );
    let source = template.fork(child("source")).expect("forks");
    assert!(is_forked_to_any_depth(&Place::ThisProcess, source, true) <= 5);
}

#[test]
fn more_children_are_forked_in_this_process_than_it_has_mappings_for() {
    let template = template_with(&SCATTERS, 128 * MIB);
    let mut source = template.fork(child("source")).expect("forks");
    begins(&mut source);
    let mut children = forks(&mut source, &Place::ThisProcess, 8);
    answer(&mut children);
    let memory = source.memory().expect("an image");
    assert!(memory.runs() < 8192, "{}", memory.runs());
    answer(&mut forks(&mut source, &Place::ThisProcess, 4));
}
