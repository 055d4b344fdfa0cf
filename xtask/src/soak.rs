//! `cargo xtask soak`: what is too long for every change, and is run before an
//! issue is called resolved.

use crate::artifacts::{cargo, programs};
use crate::{guest, host, images, kernel, test, vmhost};
use anyhow::{Context, Result, bail};
use std::ffi::OsString;
use std::fs;
use std::process::Command;
use std::time::Duration;

/// How long a step that needs Linux guests may take, in minutes.
const LONG: u64 = 600;

/// `cargo xtask soak`
#[derive(clap::Args)]
pub struct Args {
    /// How long each fuzz target runs, in seconds; 0 leaves fuzzing out
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    fuzz: u32,
    /// Only the forks of the guest of a few instructions
    #[arg(long)]
    forks_only: bool,
}

/// Each part in turn; the first failure ends it.
pub fn run(args: &Args) -> Result<()> {
    step("forks and exits by the ten thousand, and a thousand children at once");
    host::run(&mut cargo(&[
        "test",
        "--locked",
        "--release",
        "--package",
        "vm-run",
        "--test",
        "soak",
        "--",
        "--test-threads=1",
        "--nocapture",
    ]))?;
    if args.forks_only {
        return Ok(());
    }
    step("a hundred thousand pictures of guests that run");
    host::run(
        cargo(&[
            "test",
            "--locked",
            "--release",
            "--package",
            "vm-run-vmm",
            "--lib",
        ])
        .args(["capture", "--", "--nocapture", "--test-threads=1"])
        .env("VM_RUN_TEST_CAPTURES", "100000"),
    )?;
    step("programs that people run");
    guest_tests(test::WORKLOADS, &[], None)?;
    step("kills at a hundred moments");
    guest_tests("kills::", &[], Some((test::KILLS, "100")))?;
    step("two hundred children of a bare and of a warm template");
    guest_tests("::many_children_", &[], Some((test::CHILDREN, "200")))?;
    step("a hundred containers on one network");
    guest_tests("networks::many_", &[], Some((test::NETWORKED, "100")))?;
    step("a thousand forks of a container that looks at its own memory");
    guest_tests("live::memory_is_right", &[], Some((test::FORKS, "1000")))?;
    step("a tree of forks, three hundred steps");
    guest_tests("live_tree::", &[], Some((test::FORKS, "300")))?;
    step("what root images cost");
    guest_tests(test::ROOTS, &[], None)?;
    step("the guest tests on the oldest host kernel that is supported");
    guest_tests("", &["--host-kernel=6.1"], None)?;
    step("a user's own kernel: Debian's configuration and the options of docs/kernel.md");
    users_own_kernel()?;
    if args.fuzz > 0 {
        fuzz(args.fuzz)?;
    }
    Ok(())
}

/// The tests that match, with more of what there is to count.
fn guest_tests(filter: &str, more: &[&str], count: Option<(&str, &str)>) -> Result<()> {
    let program = std::env::current_exe().context("this program has no path")?;
    let mut command = Command::new(program);
    command
        .args(["test", "--guest", filter])
        .arg(format!("--timeout={LONG}"))
        .args(more)
        .envs(count);
    host::run(&mut command)
}

/// Boots it, freezes it, and runs a container in a child.
fn users_own_kernel() -> Result<()> {
    const SCRIPT: &str = r#"
        set -e
        root=$(mktemp -d)
        "$1" --root "$root" image load "$4"
        "$1" --root "$root" template build --name own --kernel "$3" --boot-timeout 120
        "$1" --root "$root" run --template own busybox uname -sr
    "#;
    let words: [OsString; 4] = [
        programs(&[])?.vm_run.into(),
        guest::ensure()?.into(),
        kernel::ensure_debian()?.into(),
        images::ensure_busybox()?.into(),
    ];
    let mut argv: Vec<OsString> = vec!["env".into()];
    let mut variable = OsString::from("VM_RUN_GUEST=");
    variable.push(&words[1]);
    argv.push(variable);
    argv.extend(["sh", "-c", SCRIPT, "sh"].map(OsString::from));
    argv.extend(words);
    let options = vmhost::Options {
        timeout: Some(Duration::from_secs(600)),
        ..vmhost::Options::default()
    };
    match vmhost::run_command(&argv, &options)? {
        0 => Ok(()),
        status => bail!("a user's own kernel: status {status}"),
    }
}

/// Every target; needs a nightly compiler and cargo-fuzz.
fn fuzz(seconds: u32) -> Result<()> {
    let dir = host::root().join("fuzz");
    let mut targets: Vec<String> = fs::read_dir(dir.join("fuzz_targets"))?
        .filter_map(|entry| Some(entry.ok()?.path().file_stem()?.to_str()?.to_owned()))
        .collect();
    targets.sort();
    for target in targets {
        step(&format!("fuzz {target}"));
        host::run(
            Command::new(cargo(&[]).get_program())
                .current_dir(&dir)
                .env_remove("RUSTUP_TOOLCHAIN")
                .args(["+nightly", "fuzz", "run", &target, "--"])
                .arg(format!("-max_total_time={seconds}")),
        )
        .context("fuzzing needs rustup's nightly and cargo install cargo-fuzz")?;
    }
    Ok(())
}

fn step(name: &str) {
    eprintln!("soak: {name}");
}
