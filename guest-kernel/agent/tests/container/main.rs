//! Containers started by the agent's own loop, over a Unix socket in place of
//! vsock and loop devices in place of virtio disks: everything but the virtual
//! machine.
//!
//! Needs root, loop devices, erofs, overlayfs and a cgroup2; and the packages
//! busybox-static, erofs-utils and e2fsprogs. Without root it says so and tests
//! nothing.

mod cases;
mod exec;
mod hooks;
mod host;
mod options;
mod tasks;
mod volumes;
mod warm;

use std::process::ExitCode;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().collect();
    if let Some(program) = vm_run_agent::init::asked(args.iter().cloned()) {
        return vm_run_agent::init::live(program);
    }
    if let Some("serve") = args.get(1).map(String::as_str) {
        return host::serve(&args[2..]);
    }
    if !rustix::process::getuid().is_root() {
        eprintln!("\nTHE CONTAINER TESTS WERE NOT RUN: THEY NEED ROOT\n");
        return ExitCode::SUCCESS;
    }
    let wanted = args.iter().skip(1).find(|arg| !arg.starts_with('-'));
    let images = host::Images::make();
    let mut failed = 0;
    let all = [
        cases::ALL,
        hooks::ALL,
        warm::ALL,
        exec::ALL,
        options::ALL,
        tasks::ALL,
        volumes::ALL,
    ];
    for (name, case) in all.into_iter().flatten() {
        if wanted.is_some_and(|wanted| !name.contains(wanted.as_str())) {
            continue;
        }
        // The panic's message goes to stderr by itself.
        let passed = std::panic::catch_unwind(|| case(&images)).is_ok();
        println!(
            "container::{name} ... {}",
            if passed { "ok" } else { "FAILED" }
        );
        failed += usize::from(!passed);
    }
    if failed > 0 {
        eprintln!("{failed} container tests failed");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}
