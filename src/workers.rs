//! The worker processes in which children live.

use anyhow::{Context, Result, bail};
use fork::worker::{Jail, Limits, Workers, WorkersSpec, find_program};
use std::sync::Arc;

/// How workers are confined.
#[derive(Debug, Clone, Copy, Default, clap::Args)]
pub struct JailArgs {
    /// Run virtual machines without a jail of their own: no user, namespaces,
    /// cgroup or empty root; for those who are not root
    #[arg(long)]
    pub no_jail: bool,
}

/// Starts what starts workers.
///
/// # Errors
/// No permission to jail them, or no worker program.
pub fn start(args: JailArgs) -> Result<Arc<Workers>> {
    let jail = if args.no_jail {
        eprintln!(
            "vm-run: --no-jail: the virtual machine runs with your own rights, behind KVM and a system call filter alone"
        );
        Jail::Off
    } else if rustix::process::geteuid().is_root() {
        Jail::On(Limits::default())
    } else {
        bail!("a jail for the virtual machine needs root: be root, or give --no-jail");
    };
    let program = find_program().context("no worker program")?;
    let workers = Workers::start(WorkersSpec { program, jail })?;
    for missing in workers.missing() {
        eprintln!("vm-run: the jail has {missing}");
    }
    Ok(Arc::new(workers))
}
