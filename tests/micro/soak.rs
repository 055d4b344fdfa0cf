//! Many forks and exits in a row, and what they leave: nothing.

use super::census::{all_mappings, at_rest, await_same, census, spawners};
use super::{boot, child};
use fork::worker::{Jail, Limits, Workers, WorkersSpec};
use fork::{Host, Place, Pool, Template};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// More mappings than before that the C library may keep: stacks of threads that
/// have ended and arenas for those to come.
const KEPT_BY_LIBC: usize = 64;

/// How long a pool may take to fill.
const FILLING: Duration = Duration::from_secs(60);

/// Workers in their jail, or with as much of it as a user who is not root can have.
pub fn workers() -> Workers {
    let jail = match rustix::process::geteuid().is_root() {
        true => Jail::On(Limits::default()),
        false => Jail::Off,
    };
    Workers::start(WorkersSpec {
        program: env!("CARGO_BIN_EXE_vm-run-worker").into(),
        jail,
    })
    .expect("a spawner")
}

/// A template as a run has it: opened from its directory.
pub fn on_disk(directory: &Path) -> Arc<Template> {
    let path = directory.join("vm-run-template");
    boot(64).save(&path).expect("saves");
    let host = Arc::new(Host::open().expect("these tests need /dev/kvm"));
    Arc::new(Template::open(host, &path).expect("opens"))
}

fn fork_and_end(pool: &Pool) {
    let mut child = pool.fork(child("soak")).expect("forks");
    assert_eq!(child.answer().expect("answers"), child.expected_answer());
    child.end();
}

/// `n` forks and exits in this process, every other from a pool. No other test may
/// run in it.
pub fn in_this_process(n: usize) {
    let directory = tempfile::tempdir().expect("a directory");
    let template = on_disk(directory.path());
    let host = Arc::clone(template.host());
    let pool = |size| Pool::new(Arc::clone(&template), Place::ThisProcess, size).expect("a pool");
    let (cold, pooled) = (pool(0), pool(1));
    let settled = || {
        pooled.wait_full(FILLING).expect("fills");
        host.settle();
        let counts = host.vms();
        let census = census(&[], directory.path());
        (census, counts.alive, counts.ending)
    };
    // What is made once, and kept, is made by the first.
    for _ in 0..10 {
        fork_and_end(&cold);
        fork_and_end(&pooled);
    }
    let (before, mappings, ended) = (at_rest(settled), all_mappings(), host.vms().ended);
    let begin = Instant::now();
    for i in 0..n {
        fork_and_end(if i % 2 == 0 { &cold } else { &pooled });
    }
    await_same("in this process", &before, settled);
    let now = all_mappings();
    assert!(
        now <= mappings + KEPT_BY_LIBC,
        "{mappings} mappings, now {now}"
    );
    assert_eq!(host.vms().ended - ended, n as u64, "each is closed");
    println!(
        "{n} forks in this process: {:?}; {before:?}, mappings {mappings} -> {now}",
        begin.elapsed()
    );
}

/// `n` forks and exits in workers, from a pool. No other test may run in this
/// process.
pub fn in_workers(n: usize) {
    let directory = tempfile::tempdir().expect("a directory");
    let template = on_disk(directory.path());
    let nobody = census(&[], directory.path());
    let workers = Arc::new(workers());
    let spawners = spawners();
    let size = 4;
    let place = Place::Workers(Arc::clone(&workers));
    let pool = Pool::new(Arc::clone(&template), place, size).expect("a pool");
    let waiting = || {
        pool.wait_full(FILLING).expect("fills");
        let counts = workers.counts().expect("a spawner");
        let alive = counts.started - counts.gone;
        (
            census(&spawners, directory.path()),
            alive,
            counts.violations,
        )
    };
    for _ in 0..10 {
        fork_and_end(&pool);
    }
    pool.wait_full(FILLING).expect("fills");
    await_same("the pool alone", &(size as u64), || {
        let counts = workers.counts().expect("a spawner");
        counts.started - counts.gone
    });
    let before = at_rest(waiting);
    let begin = Instant::now();
    for _ in 0..n {
        fork_and_end(&pool);
    }
    let took = begin.elapsed();
    await_same("in workers", &before, waiting);
    println!(
        "{n} forks in workers: {took:?}; {before:?}; {:?}",
        pool.stats()
    );
    drop(pool);
    await_same("workers without a pool", &0, || {
        let counts = workers.counts().expect("a spawner");
        counts.started - counts.gone
    });
    let counts = workers.counts().expect("a spawner");
    assert_eq!(counts.violations, 0, "{counts:?}");
    assert!(counts.started >= n as u64, "{counts:?}");
    drop(workers);
    // By their pids, for they are gone.
    await_same("without a spawner", &nobody, || {
        let mut now = census(&spawners, directory.path());
        // The state in a file, for workers, is the template's from then on.
        now.remove("fd /memfd:vm-run-state (deleted)");
        now
    });
}
