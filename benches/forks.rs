//! `cargo bench`: what a fork takes, over the least that KVM can take, and what a fork of a
//! source that runs takes of that, with forks of forks that have pages of their own at each
//! level. docs/benchmark.md says what is measured.

use std::process::{Command, exit};

const RUNS: [&[&str]; 2] = [
    &["bench", "fork", "--guest", "micro", "-n", "200"],
    &["bench", "live", "--depth", "16", "--fresh"],
];

fn main() {
    for run in RUNS {
        let mut bench = Command::new(env!("CARGO_BIN_EXE_vm-run"));
        let status = bench.args(run).status().expect("vm-run runs");
        if !status.success() {
            exit(status.code().unwrap_or(1));
        }
    }
}
