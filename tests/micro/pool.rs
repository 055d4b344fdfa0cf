//! Pools of VMs made ahead, in this process and in workers.

use super::census::{await_same, descendants, is_alone, spawners};
use super::soak::{in_this_process, in_workers, workers};
use super::{boot, child};
use fork::{Error, ForkPath, ForkSpec, Host, Place, Pool, PoolStats, Template, VmError};
use rustix::process::{Pid, Signal, kill_process};
use std::sync::Arc;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(60);

fn places() -> [Place; 2] {
    [Place::ThisProcess, Place::Workers(Arc::new(workers()))]
}

fn pool(place: Place, size: usize) -> Pool {
    Pool::new(Arc::new(boot(64)), place, size).expect("a pool")
}

/// What it has done, without what is different from moment to moment.
fn forks(pool: &Pool) -> (u64, u64) {
    let PoolStats { pooled, cold, .. } = pool.stats();
    (pooled, cold)
}

fn answers(pool: &Pool) -> ForkPath {
    let mut child = pool.fork(child("one")).expect("forks");
    assert_eq!(child.answer().expect("answers"), child.expected_answer());
    child.path()
}

#[test]
fn a_child_says_whether_a_vm_was_ready_for_it() {
    for place in places() {
        let empty = pool(place.clone(), 0);
        assert_eq!(answers(&empty), ForkPath::Cold);
        assert_eq!(forks(&empty), (0, 1));
        let full = pool(place, 1);
        for n in 1..=3 {
            // Refilled each time.
            full.wait_full(PATIENCE).expect("fills");
            assert_eq!(answers(&full), ForkPath::Pooled);
            assert_eq!(forks(&full), (n, 0));
        }
    }
    let template = boot(64);
    let child = template.fork(child("one")).expect("forks");
    assert_eq!(child.path(), ForkPath::Cold);
}

#[test]
fn many_at_once_take_what_is_ready_and_make_the_rest() {
    for place in places() {
        let pool = pool(place, 2);
        pool.wait_full(PATIENCE).expect("fills");
        let specs = (0..6).map(|i| child(&format!("c{i}"))).collect();
        let mut generations: Vec<u64> = Vec::new();
        let mut pooled = 0;
        let mut alive = Vec::new();
        for forked in pool.fork_many(specs) {
            let mut child = forked.expect("forks");
            let answer = child.answer().expect("answers");
            assert_eq!(answer, child.expected_answer());
            generations.push(answer);
            pooled += u64::from(child.path() == ForkPath::Pooled);
            alive.push(child);
        }
        generations.sort_unstable();
        generations.dedup();
        assert_eq!(generations.len(), 6);
        assert!(pooled >= 2, "{pooled}");
        assert_eq!(forks(&pool), (pooled, 6 - pooled));
    }
}

#[test]
fn another_domain_gets_no_child_and_takes_no_vm() {
    for place in places() {
        let pool = pool(place, 1);
        pool.wait_full(PATIENCE).expect("fills");
        let spec = ForkSpec {
            domain: "another".into(),
            ..child("one")
        };
        let error = pool.fork(spec).expect_err("refused");
        assert!(
            matches!(&error, Error::Domain { asked, .. } if asked == "another"),
            "{error}"
        );
        assert_eq!(forks(&pool), (0, 0));
        assert_eq!(pool.stats().ready, 1);
    }
}

#[test]
fn a_process_has_so_many_vms_and_says_why_not_more() {
    let mut host = Host::open().expect("these tests need /dev/kvm");
    host.allow_vms(2);
    let spec = super::spec(64, 1);
    let template = Arc::new(Template::boot(Arc::new(host), &spec).expect("boots"));
    let pool = Pool::new(Arc::clone(&template), Place::ThisProcess, 0).expect("a pool");
    let children = [(); 2].map(|()| pool.fork(child("one")).expect("forks"));
    for error in [
        pool.fork(child("three")).expect_err("refused"),
        template.fork(child("three")).expect_err("refused"),
    ] {
        assert!(
            matches!(error, Error::Vm(VmError::TooMany { most: 2 })),
            "{error}"
        );
        let text = error.to_string();
        assert!(text.contains("page fault"), "{text}");
    }
    drop(children);
    // Their places are free when they are closed, and a fork waits for that.
    pool.fork(child("four")).expect("forks");
}

#[test]
fn a_worker_that_dies_while_it_waits_is_replaced_and_counted() {
    const NAME: &str = "pool::a_worker_that_dies_while_it_waits_is_replaced_and_counted";
    if !is_alone(NAME) {
        return;
    }
    let pool = pool(Place::Workers(Arc::new(workers())), 1);
    pool.wait_full(PATIENCE).expect("fills");
    let spawners = spawners();
    let mut waiting = descendants();
    waiting.retain(|pid| !spawners.contains(pid));
    let [pid] = waiting[..] else {
        panic!("one waits: {waiting:?}");
    };
    let pid = Pid::from_raw(pid as i32).expect("a pid");
    kill_process(pid, Signal::KILL).expect("kills");
    await_same("replaced", &(1, 1), || {
        let stats = pool.stats();
        (stats.died, stats.ready)
    });
    assert_eq!(answers(&pool), ForkPath::Pooled);
}

#[test]
fn two_hundred_forks_in_this_process_leave_nothing() {
    if is_alone("pool::two_hundred_forks_in_this_process_leave_nothing") {
        in_this_process(200);
    }
}

#[test]
fn two_hundred_forks_in_workers_leave_nothing() {
    if is_alone("pool::two_hundred_forks_in_workers_leave_nothing") {
        in_workers(200);
    }
}
