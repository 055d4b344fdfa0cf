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

/// As [`start`], and tells whoever sits there.
///
/// # Errors
/// As [`start`].
pub fn start_aloud(args: JailArgs) -> Result<Arc<Workers>> {
    let (workers, notices) = start(args)?;
    for notice in notices {
        eprintln!("vm-run: {notice}");
    }
    Ok(workers)
}

/// Starts what starts workers; and what a person has to be told of their jails.
///
/// # Errors
/// No permission to jail them, or no worker program.
pub fn start(args: JailArgs) -> Result<(Arc<Workers>, Vec<String>)> {
    let mut notices = Vec::new();
    let jail = if args.no_jail {
        notices.push("--no-jail: the virtual machine runs with your own rights, behind KVM and a system call filter alone".to_owned());
        Jail::Off
    } else if rustix::process::geteuid().is_root() {
        Jail::On(Limits::default())
    } else {
        bail!("a jail for the virtual machine needs root: be root, or give --no-jail");
    };
    let program = find_program().context("no worker program")?;
    let workers = Workers::start(WorkersSpec { program, jail })?;
    let missing = workers.missing().iter();
    notices.extend(missing.map(|missing| format!("the jail has {missing}")));
    Ok((Arc::new(workers), notices))
}
