//! The tests of Linux guests, shared out among emulated hosts: each of them is one thread
//! that emulates a CPU, and a machine has several.

use crate::host;
use crate::vmhost::{self, Options};
use anyhow::{Context, Result, bail};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

/// The most emulated hosts at once.
const HOSTS_MAX: usize = 2;
/// What each takes beside its memory, in MiB: QEMU's translations, and what is outside of it.
const BESIDE_MIB: u64 = 2048;

/// The tests of a test program whose names have `filter` in them, and do not have `skip`.
pub fn list(test: &Path, filter: &str, skip: &[&str]) -> Result<Vec<String>> {
    let mut command = Command::new(test);
    command.args(["--list", "--format", "terse"]);
    command.args(skip.iter().flat_map(|part| ["--skip", part]));
    if !filter.is_empty() {
        command.arg(filter);
    }
    let listed = host::output(&mut command)?;
    let names = listed
        .lines()
        .filter_map(|line| line.strip_suffix(": test"));
    let names: Vec<String> = names.map(str::to_owned).collect();
    if names.is_empty() {
        bail!("no test of a Linux guest has {filter:?} in its name");
    }
    Ok(names)
}

/// Runs these tests of a test program, each with `env`; where they need an emulated host,
/// in as many as there are cores and memory for.
pub fn run(
    test: &Path,
    env: &[(&str, PathBuf)],
    names: &[String],
    options: &Options,
) -> Result<()> {
    let hosts = match vmhost::missing_hardware_kvm() {
        None => 1,
        Some(_) => thread::available_parallelism()?.get().min(HOSTS_MAX),
    };
    let hosts = hosts.min(names.len()).min(room(options)).max(1);
    if hosts == 1 {
        return end(vmhost::run_command(&argv(test, env, names), options)?);
    }
    let statuses = thread::scope(|scope| {
        let running: Vec<_> = (0..hosts)
            .map(|host| {
                let share: Vec<_> = names.iter().skip(host).step_by(hosts).collect();
                let options = Options {
                    label: Some(format!("{}: ", host + 1)),
                    ..options.clone()
                };
                let argv = argv(test, env, &share);
                scope.spawn(move || vmhost::run_command(&argv, &options))
            })
            .collect();
        let joined = running.into_iter().map(|run| run.join());
        joined
            .map(|status| status.ok().context("a thread has panicked")?)
            .collect::<Vec<Result<u8>>>()
    });
    for status in statuses {
        end(status?)?;
    }
    Ok(())
}

/// For how many emulated hosts this machine has memory.
fn room(options: &Options) -> usize {
    let found = rustix::system::sysinfo();
    let mib = (found.totalram * u64::from(found.mem_unit)) >> 20;
    (mib / (u64::from(options.memory_mib) + BESIDE_MIB)) as usize
}

fn end(status: u8) -> Result<()> {
    match status {
        0 => Ok(()),
        status => bail!("the tests of Linux guests failed with status {status}"),
    }
}

/// What runs them, one after another. `env` hands the variables on.
fn argv(test: &Path, env: &[(&str, PathBuf)], names: &[impl AsRef<str>]) -> Vec<OsString> {
    let mut argv: Vec<OsString> = vec!["env".into()];
    argv.extend(env.iter().map(|(name, value)| {
        let mut word = OsString::from(name);
        word.push("=");
        word.push(value);
        word
    }));
    argv.push(test.into());
    // A test that fails says why when it does, not when all have ended: a run that is
    // killed for its time would take that along.
    argv.extend(["--test-threads=1", "--nocapture", "--exact"].map(OsString::from));
    argv.extend(names.iter().map(|name| name.as_ref().into()));
    argv
}
