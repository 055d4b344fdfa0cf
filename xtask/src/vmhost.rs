//! `cargo xtask vmhost -- CMD`: a host whose KVM can run Linux.
//!
//! Where this machine's `/dev/kvm` is of the hardware kind (VMX or SVM), CMD just
//! runs here. Elsewhere it runs on an *emulated host*: QEMU's TCG emulates an AMD
//! machine, nested paging included, well enough for Linux's own `kvm-amd`. CMD sees
//! this machine's files at the same paths (9p, under a tmpfs overlay), in the same
//! working directory and environment; what it writes stays inside and is lost; its
//! stdout, stderr and exit status come back as if it had run here.

mod image;
mod machine;
mod modules;
mod request;

pub use image::stock_kernel;

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::ffi::OsString;
use std::fs;
use std::io::{self, IsTerminal};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// What docker, env(1) and timeout(1) exit with when they themselves fail.
const OWN_FAILURE: i32 = 125;
/// What timeout(1) exits with when it ends the command.
const TIMED_OUT: u8 = 124;

/// `cargo xtask vmhost -- CMD`
#[derive(clap::Args)]
pub struct Args {
    /// Only print whether this machine needs the emulated host
    #[arg(long)]
    check: bool,
    /// Use the emulated host even where this machine's own KVM would do
    #[arg(long)]
    emulate: bool,
    /// The emulated host's kernel
    #[arg(long, value_enum, default_value_t, value_name = "VERSION")]
    host_kernel: HostKernel,
    /// The emulated host's memory
    #[arg(long, default_value_t = DEFAULT_MEMORY_MIB, value_name = "MIB")]
    memory: u32,
    /// The emulated host's CPUs; more than one take turns
    #[arg(long, default_value_t = 1, value_name = "N")]
    cpus: u8,
    /// Kill the command after this time, the emulated host's boot included, and exit with 124
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    timeout: Option<u64>,
    /// The command and its arguments
    #[arg(last = true, required_unless_present = "check", value_name = "CMD")]
    command: Vec<OsString>,
}

const DEFAULT_MEMORY_MIB: u32 = 6144;

/// A kernel for the emulated host: one of Debian 12's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum HostKernel {
    /// From the security archive; has PAGEMAP_SCAN and userfaultfd's WP_ASYNC.
    #[default]
    #[value(name = "6.12")]
    Linux612,
    /// Debian 12's own, the oldest host kernel that vm-run supports.
    #[value(name = "6.1")]
    Linux61,
}

impl HostKernel {
    /// The version as the command line has it.
    fn name(self) -> &'static str {
        match self {
            HostKernel::Linux612 => "6.12",
            HostKernel::Linux61 => "6.1",
        }
    }

    /// Debian's meta package. Not its cloud flavour: that has no 9p.
    fn package(self) -> &'static str {
        match self {
            HostKernel::Linux612 => "linux-image-6.12-amd64",
            HostKernel::Linux61 => "linux-image-amd64",
        }
    }
}

/// What the command reads as its standard input.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Stdin {
    /// `/dev/null`.
    #[default]
    Null,
    /// This process's standard input, to its end.
    Forward,
}

/// How [`run_command`] runs a command.
#[derive(Clone, Debug)]
pub struct Options {
    /// Use the emulated host even where this machine's own KVM would do.
    pub emulate: bool,
    /// The emulated host's kernel.
    pub host_kernel: HostKernel,
    /// The emulated host's memory in MiB.
    pub memory_mib: u32,
    /// How many CPUs the emulated host has. More than one are emulated by one thread, in
    /// turns: side by side, a second one hangs in KVM_CREATE_VM. In turns too guests hang now
    /// and then, already while they boot: no suite passes there.
    pub cpus: u8,
    /// The longest that boot and command may take together.
    pub timeout: Option<Duration>,
    /// What the command reads.
    pub stdin: Stdin,
    /// What each line begins with that comes from an emulated host, where several run at
    /// once: then only whole lines are passed on.
    pub label: Option<String>,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            emulate: false,
            host_kernel: HostKernel::default(),
            memory_mib: DEFAULT_MEMORY_MIB,
            cpus: 1,
            timeout: None,
            stdin: Stdin::default(),
            label: None,
        }
    }
}

/// Runs a command where KVM can run Linux, and exits as it did.
pub fn run(args: &Args) -> Result<()> {
    if args.check {
        match missing_hardware_kvm() {
            None => println!("this machine's KVM can run Linux: commands run here"),
            Some(reason) => println!("commands run on the emulated host: {reason}"),
        }
        return Ok(());
    }
    let stdin = if io::stdin().is_terminal() {
        Stdin::Null
    } else {
        Stdin::Forward
    };
    let options = Options {
        emulate: args.emulate,
        host_kernel: args.host_kernel,
        memory_mib: args.memory,
        cpus: args.cpus,
        timeout: args.timeout.map(Duration::from_secs),
        stdin,
        label: None,
    };
    let code = match run_command(&args.command, &options) {
        Ok(code) => i32::from(code),
        Err(error) => {
            eprintln!("vmhost: {error:#}");
            OWN_FAILURE
        }
    };
    std::process::exit(code)
}

/// Runs `argv` where KVM can run Linux: here if [`missing_hardware_kvm`] finds nothing
/// missing, else on the emulated host, which it says in one line on stderr. The command
/// has this process's working directory, environment, stdout and stderr.
///
/// Returns the exit status as a shell has it: 128+n for death by signal n; 124 if the
/// timeout ended it. The command is killed when the calling thread ends before it.
pub fn run_command(argv: &[OsString], options: &Options) -> Result<u8> {
    let reason = match missing_hardware_kvm() {
        None if !options.emulate => return run_here(argv, options),
        None => "as asked".to_owned(),
        Some(reason) => reason,
    };
    eprintln!(
        "vmhost: running on the emulated host (QEMU TCG with SVM, Linux {}): {reason}",
        options.host_kernel.name()
    );
    let image = image::Image::prepare(options.host_kernel)?;
    machine::run(argv, &image, options)
}

/// Why this machine's KVM cannot run a Linux guest, if it cannot.
///
/// PVM's `/dev/kvm` opens but shows the guest-visible CPU flags neither of VMX nor of SVM.
pub fn missing_hardware_kvm() -> Option<String> {
    if let Err(error) = fs::File::options().read(true).write(true).open("/dev/kvm") {
        return Some(format!("cannot open /dev/kvm: {error}"));
    }
    match fs::read_to_string("/proc/cpuinfo") {
        Err(error) => Some(format!("cannot read /proc/cpuinfo: {error}")),
        Ok(cpuinfo) if has_virtualization(&cpuinfo) => None,
        Ok(_) => Some("/proc/cpuinfo has neither vmx nor svm".to_owned()),
    }
}

/// Whether a `/proc/cpuinfo` has the flag of VMX or SVM.
fn has_virtualization(cpuinfo: &str) -> bool {
    cpuinfo
        .lines()
        .filter_map(|line| line.split_once(':'))
        .filter(|(field, _)| field.trim() == "flags")
        .any(|(_, flags)| {
            flags
                .split_whitespace()
                .any(|flag| flag == "vmx" || flag == "svm")
        })
}

/// Runs the command on this machine.
fn run_here(argv: &[OsString], options: &Options) -> Result<u8> {
    let [program, arguments @ ..] = argv else {
        bail!("no command given");
    };
    let mut command = Command::new("setpriv");
    command
        .args(["--pdeathsig", "KILL", "--"])
        .arg(program)
        .args(arguments);
    if options.stdin == Stdin::Null {
        command.stdin(Stdio::null());
    }
    let mut child = command
        .spawn()
        .context("cannot start setpriv (package util-linux)")?;
    if let Some(limit) = options.timeout
        && !ends_within(&child, limit)?
    {
        child.kill().context("cannot kill the command")?;
        child.wait().context("cannot wait for the command")?;
        return Ok(timed_out(limit));
    }
    let status = child.wait().context("cannot wait for the command")?;
    shell_status(status).with_context(|| format!("{}: {status}", program.display()))
}

/// Waits until the child has ended (true, and it is not reaped yet) or the time is over.
fn ends_within(child: &Child, limit: Duration) -> Result<bool> {
    let pidfd = pidfd_open(Pid::from_child(child), PidfdFlags::empty())
        .context("cannot watch the command")?;
    let started = Instant::now();
    loop {
        let left = limit.saturating_sub(started.elapsed());
        let timeout = Timespec::try_from(left).context("the timeout is too long")?;
        match poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&timeout)) {
            Ok(ready) => return Ok(ready > 0),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error).context("cannot watch the command"),
        }
    }
}

/// Says that the time is over; returns what to exit with.
fn timed_out(limit: Duration) -> u8 {
    eprintln!("vmhost: killed after {} s", limit.as_secs_f64());
    TIMED_OUT
}

/// A status as a shell's `$?` has it.
fn shell_status(status: ExitStatus) -> Option<u8> {
    let code = status
        .code()
        .or_else(|| status.signal().map(|signal| 128 + signal))?;
    u8::try_from(code).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_flags_count() {
        assert!(has_virtualization(
            "processor\t: 0\nflags\t\t: fpu vmx de\n"
        ));
        assert!(has_virtualization("flags\t\t: fpu svm\n"));
        assert!(!has_virtualization(
            "flags\t\t: fpu svm_lock\nvmx flags\t: vnmi\n"
        ));
        assert!(!has_virtualization("model name\t: svm vmx\n"));
        assert!(!has_virtualization(""));
    }

    #[test]
    fn statuses_are_what_a_shell_says() {
        assert_eq!(shell_status(ExitStatus::from_raw(0)), Some(0));
        assert_eq!(shell_status(ExitStatus::from_raw(7 << 8)), Some(7));
        assert_eq!(shell_status(ExitStatus::from_raw(9)), Some(137));
    }
}
