//! `cargo xtask test`: every test, on a host that can run it.

mod shards;

use crate::artifacts::{build_one, cargo};
use crate::vmhost::{self, Options};
use crate::{guest, host, images, install, kernel, programs, twins};
use anyhow::Result;
use std::path::PathBuf;
use std::time::Duration;

/// Tests of programs that people run. Their images are large, so only a filter that
/// begins so runs them, and `cargo xtask soak`.
pub const WORKLOADS: &str = "workloads::";
/// What root images cost, for ARCHITECTURE.md: likewise.
pub const ROOTS: &str = "roots::";

/// `cargo xtask test`
#[derive(clap::Args)]
pub struct Args {
    /// Only the tests that need a Linux guest, and of those what matches
    #[arg(long, value_name = "FILTER", num_args = 0..=1, default_missing_value = "")]
    guest: Option<String>,
    /// The emulated host's kernel
    #[arg(long, value_enum, default_value_t)]
    host_kernel: vmhost::HostKernel,
    /// The emulated host's CPUs; more than one take turns
    #[arg(long, default_value_t = 1, value_name = "N")]
    host_cpus: u8,
    /// How long those that need a guest may take. On hardware they take a minute
    #[arg(long, value_name = "MINUTES", default_value_t = 40)]
    timeout: u64,
}

/// Runs them.
pub fn run(args: &Args) -> Result<()> {
    // What the tests look at images and disks with, and what they pull from.
    host::apt_install(&[
        "busybox-static",
        "curl",
        "docker-registry",
        "e2fsprogs",
        "erofs-utils",
        "gcc",
        "iproute2",
        "libc6-dev",
        "nftables",
        "openssh-client",
        "openssl",
        "procps",
        "python3",
    ])?;
    if args.guest.is_none() {
        step("the host's side");
        host::run(&mut cargo(&["test", "--locked", "--workspace"]))?;
        step("the guest's side");
        let dir = host::root().join("guest-kernel");
        host::run(cargo(&["test", "--locked", "--workspace"]).current_dir(dir))?;
    }
    step("containers in Linux guests");
    let options = Options {
        host_kernel: args.host_kernel,
        cpus: args.host_cpus,
        timeout: Some(Duration::from_secs(args.timeout * 60)),
        ..Options::default()
    };
    guest_tests(args.guest.as_deref().unwrap_or_default(), &options)
}

fn step(name: &str) {
    eprintln!("test: {name}");
}

/// How often the tests kill something at random; a few times if nothing is said.
pub const KILLS: &str = "VM_RUN_TEST_KILLS";

/// How many children are looked at for what they share.
pub const CHILDREN: &str = "VM_RUN_TEST_CHILDREN";

/// How often a container that looks at its own memory is forked.
pub const FORKS: &str = "VM_RUN_TEST_FORKS";

/// How many containers are on one network at once; a few if nothing is said.
pub const NETWORKED: &str = "VM_RUN_TEST_NETWORKED";

/// Runs the tests of Linux guests that match `filter`.
pub fn guest_tests(filter: &str, options: &Options) -> Result<()> {
    let guest = guest::ensure()?;
    host::ensure_docker_client()?;
    let prefix = tempfile::tempdir()?;
    install::into(prefix.path())?;
    let mut env: Vec<(&str, PathBuf)> = vec![
        ("VM_RUN_GUEST", guest),
        ("VM_RUN_TEST_BUSYBOX", images::ensure_busybox()?),
        ("VM_RUN_TEST_PYTHON", images::ensure_debian_python()?),
        ("VM_RUN_TEST_WALK", kernel::walk_program()?),
        ("VM_RUN_TEST_PROGRAMS", programs::ensure()?),
        ("VM_RUN_TEST_SILENT", programs::silent_guest()?),
        ("VM_RUN_TEST_TWINS", twins::ensure()?),
        (
            "VM_RUN_TEST_STOCK_KERNEL",
            vmhost::stock_kernel(options.host_kernel)?,
        ),
        ("VM_RUN_TEST_PREFIX", prefix.path().into()),
        ("VM_RUN_BOOT_TIMEOUT", "60".into()),
    ];
    for name in [KILLS, CHILDREN, FORKS, NETWORKED] {
        if let Some(count) = std::env::var_os(name) {
            env.push((name, count.into()));
        }
    }
    let has_workloads = filter.starts_with(WORKLOADS);
    if has_workloads {
        env.extend(images::workloads::ensure_all()?);
    }
    let test = build_one(
        &[
            "test",
            "--locked",
            "--package",
            "vm-run",
            "--test",
            "guest",
            "--no-run",
        ],
        "guest",
    )?;
    let mut apart = vec![WORKLOADS, ROOTS];
    apart.retain(|apart| !filter.starts_with(apart));
    let names = shards::list(&test, filter, &apart)?;
    shards::run(&test, &env, &names, options)
}
