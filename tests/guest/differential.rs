//! `run`, case by case, with the outcome that docker documents. The cases are data
//! (differential/cases.rs); all that fail are told together.

#[expect(
    dead_code,
    reason = "it makes more kinds of archives than are needed here"
)]
#[path = "../image/archive.rs"]
mod archive;
#[path = "differential/cases.rs"]
mod cases;
#[path = "differential/images.rs"]
mod images;

use crate::support::{Call, Ran, world};
use cases::{Act, CASES, Case, Text};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// Containers at once: the emulated host has two processors.
const AT_ONCE: usize = 2;

/// What a container says that something is to be done to.
const READY: &str = "ready";

#[test]
fn every_case_ends_as_docker_documents() {
    images::load(&world().root);
    let (next, failures) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let begun = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                while let Some((number, case)) = next_case(&next) {
                    let ran = outcome(number, case);
                    if let Some(why) = complaint(case, &ran) {
                        let mut failures = failures.lock().unwrap_or_else(PoisonError::into_inner);
                        failures.push(format!("{} ({}): {why}\n{ran}", case.name, case.docs));
                    }
                }
            });
        }
    });
    let failures = failures
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner);
    eprintln!("{} cases in {:?}", CASES.len(), begun.elapsed());
    let count = failures.len();
    assert!(
        failures.is_empty(),
        "{count} of {} cases differ:\n{}",
        CASES.len(),
        failures.join("\n")
    );
}

#[test]
fn cases_have_names_of_their_own() {
    let mut names: Vec<&str> = CASES.iter().map(|case| case.name).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), CASES.len());
    assert!(names.len() >= 60);
}

fn next_case(next: &AtomicUsize) -> Option<(usize, &'static Case)> {
    let number = next.fetch_add(1, Ordering::Relaxed);
    CASES.get(number).map(|case| (number, case))
}

/// Runs one.
fn outcome(number: usize, case: &Case) -> Ran {
    let name = format!("case-{number}");
    let call = Call::run(&[&["--name", &name], case.args].concat());
    match case.act {
        Act::Nothing => call.end_with(case.stdin.as_bytes()),
        Act::Signal(signal) => {
            let mut running = call.start();
            running.expect(READY);
            running.signal(signal);
            running.end()
        }
        Act::Stop => {
            let mut running = call.start();
            running.expect(READY);
            let stopped = Call::vm_run_in(&world().root, &["stop", &name]).end();
            assert_eq!(stopped.status, 0, "{stopped}");
            running.end()
        }
    }
}

/// What is not as it should be.
fn complaint(case: &Case, ran: &Ran) -> Option<String> {
    if ran.status != case.status {
        return Some(format!("its status is to be {}", case.status));
    }
    let streams = [
        ("stdout", ran.out(), &case.stdout),
        ("stderr", ran.err(), &case.stderr),
    ];
    streams.iter().find_map(|(name, said, wanted)| {
        let is_so = match wanted {
            Text::Is(text) => said == text,
            Text::Has(text) => said.contains(text),
        };
        (!is_so).then(|| format!("its {name} is to be {wanted:?}"))
    })
}
