//! PID 1 of the guest. The boot, told from its first line to its last.

use rustix::fd::AsFd;
use rustix::mm::{MlockAllFlags, mlockall};
use rustix::process::{PidfdFlags, Resource, Rlimit, getpid, pidfd_open, setrlimit};
use rustix::system::{RebootCommand, reboot};
use std::fs;
use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::OnceLock;
use std::time::Duration;
use vm_run_abi::protocol::{PORT, VOLUMES_TAG};
use vm_run_agent::devices::Rules;
use vm_run_agent::doorbell::Doorbell;
use vm_run_agent::freezer::Freezer;
use vm_run_agent::identity::{ForkPoint, LiveFork};
use vm_run_agent::network::{self, Network};
use vm_run_agent::prepared::Prepared;
use vm_run_agent::rootfs::{self, Disks};
use vm_run_agent::serve::{Done, Server};
use vm_run_agent::spawn::Resources;
use vm_run_agent::volumes::Source;
use vm_run_agent::{check, init, mounts, sys};

/// The limits that a container inherits: what docker's daemon runs with. The
/// kernel's own bound of open files is this too (fs.nr_open); its default of
/// processes goes by the memory, which is for the host to limit.
const LIMITS: [(Resource, Option<u64>); 2] =
    [(Resource::Nofile, Some(1 << 20)), (Resource::Nproc, None)];

/// The container's disks: its image, and what it writes, mounted before the fork point
/// or not.
const IMAGE: &str = "/dev/vda";
const MOUNTED: &str = "/dev/vdb";
const WRITABLE: &str = "/dev/vdc";

/// In how large blocks, as a power of two of pages, the kernel tells of what is free.
const REPORTING_ORDER: &str = "/sys/module/page_reporting/parameters/page_reporting_order";

/// The way to the monitor's user, once there is one.
static DOORBELL: OnceLock<Doorbell> = OnceLock::new();

/// The way to an identity, in the program's image: see [`ForkPoint::become_child`].
static FORK_POINT: OnceLock<ForkPoint> = OnceLock::new();

fn main() -> ExitCode {
    if let Some(program) = init::asked(std::env::args()) {
        return init::live(program);
    }
    if std::process::id() != 1 {
        eprintln!(
            "vm-run-agent is the first process of a vm-run guest, and does nothing elsewhere"
        );
        return ExitCode::from(2);
    }
    std::panic::set_hook(Box::new(|panic| {
        give_up(&format!("this is a bug: {panic}"))
    }));
    match live() {
        Ok(()) => power_off(),
        Err(why) => give_up(&why),
    }
}

/// From the kernel's hand-over to the end of the container. A warm container
/// takes the guest to the fork point again.
fn live() -> Result<(), String> {
    let (fork_point, mut server) = boot()?;
    loop {
        settle()?;
        let child = fork_point.become_child()?;
        server
            .become_child(child)
            .map_err(|e| format!("the container cannot be made a child: {e}"))?;
        let served = server.run();
        match served.map_err(|e| format!("the event loop failed: {e}"))? {
            Done::Over => return Ok(()),
            // What can be written now is not for each child to write.
            Done::Frozen => rustix::fs::sync(),
        }
    }
}

/// Has in memory and mapped what a child touches first: its page faults are not
/// the child's to pay. Every process that was started has left the agent's pages
/// to be copied at the next write. What is free has to be the host's by now: what is
/// reported later, each child reports.
fn settle() -> Result<(), String> {
    report_free_pages().map_err(|e| format!("cannot write {REPORTING_ORDER}: {e}"))?;
    mlockall(MlockAllFlags::CURRENT).map_err(|e| format!("cannot lock memory: {e}"))
}

/// Has the kernel tell the host of all pages that are free, in blocks so large as before:
/// it does so when this is written, by a patch of ours. One without a balloon has no such
/// file.
fn report_free_pages() -> io::Result<()> {
    match fs::read_to_string(REPORTING_ORDER) {
        Ok(order) => fs::write(REPORTING_ORDER, order.trim()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e),
    }
}

/// Sets up the guest, to everything ready for the fork point.
fn boot() -> Result<(&'static ForkPoint, Server), String> {
    mounts::cover_initramfs()?;
    let has_devtmpfs = mounts::mount_dev()?;
    let doorbell = Doorbell::map().map_err(|e| {
        say(&format!("/dev/mem: {e}"));
        "the kernel lacks CONFIG_DEVMEM".to_owned()
    })?;
    let doorbell = *DOORBELL.get_or_init(|| doorbell);
    check_machine(has_devtmpfs)?;

    set_limits()?;
    network::set_defaults()?;
    let network = Network::set_up()?;
    let prepared = ForkPoint::prepare(doorbell)?;
    let fork_point = FORK_POINT.get_or_init(|| prepared);
    let live_fork = LiveFork::prepare(fork_point)?;
    Ok((fork_point, prepare_server(network, live_fork)?))
}

fn set_limits() -> Result<(), String> {
    for (resource, limit) in LIMITS {
        let both = Rlimit {
            current: limit,
            maximum: limit,
        };
        setrlimit(resource, both).map_err(|e| format!("cannot set limits: {e}"))?;
    }
    Ok(())
}

/// Mounts what is left to mount, and looks whether anything is missing.
fn check_machine(has_devtmpfs: bool) -> Result<(), String> {
    let mut missing = mounts::mount_guest();
    if !has_devtmpfs {
        missing.push("CONFIG_DEVTMPFS");
    }
    if let Some(why) = check::complaint(&check::missing_options(&missing)) {
        return Err(why);
    }
    match check::missing_disks(&[IMAGE, MOUNTED, WRITABLE]) {
        Some(why) => Err(why),
        None => Ok(()),
    }
}

/// Opens all that the event loop works with, and makes the container's first process.
fn prepare_server(network: Option<Network>, live_fork: Option<LiveFork>) -> Result<Server, String> {
    mounts::enable_controllers()?;
    let cgroup = mounts::make_cgroup("container")?;
    let resources = Resources {
        disks: Disks {
            image: IMAGE.to_owned(),
            window: rootfs::find_window().unwrap_or_else(|why| {
                say(&why);
                None
            }),
            mounted: MOUNTED.to_owned(),
            writable: WRITABLE.to_owned(),
            volumes: Source {
                kind: "virtiofs".to_owned(),
                name: VOLUMES_TAG.to_owned(),
            },
        },
        freezer: Freezer::open(cgroup.as_fd())
            .map_err(|e| format!("cannot open the container's freezer: {e}"))?,
        rules: Rules::prepare(cgroup.as_fd())
            .map_err(|e| format!("cannot load the rules for devices: {e}"))?,
        cgroup,
        network,
        helper: "/warm".to_owned(),
        agent: pidfd_open(getpid(), PidfdFlags::empty())
            .map_err(|e| format!("cannot open a pidfd of the agent: {e}"))?,
    };
    let signals = sys::child_signals().map_err(|e| format!("cannot watch for SIGCHLD: {e}"))?;
    let prepared = Prepared::fork(&resources)
        .map_err(|failure| format!("cannot prepare a container: {}", failure.message))?;
    if let Some(network) = &resources.network {
        network.settle();
    }
    let listener = sys::listen_vsock(PORT).map_err(|e| format!("cannot listen on vsock: {e}"))?;
    Server::new(listener, signals, resources, prepared, live_fork)
        .map_err(|e| format!("cannot make an epoll: {e}"))
}

/// One line on the console. Where there is no console nobody can be told.
fn say(line: &str) {
    writeln!(std::io::stderr(), "vm-run-agent: {line}").ok();
}

/// The end of a guest that cannot go on, in one line: to the monitor if the
/// doorbell is there, and to the console.
fn give_up(why: &str) -> ! {
    let why = why.replace('\n', " ");
    say(&why);
    if let Some(doorbell) = DOORBELL.get() {
        doorbell.boot_failed(&why);
    } else if let Ok(mut log) = std::fs::File::create("/dev/kmsg") {
        // The console says it already; this is for a kernel whose console is
        // elsewhere.
        writeln!(log, "<0>vm-run-agent: {why}").ok();
    }
    power_off()
}

/// Has the power cut. PID 1 must not return: that is a kernel panic.
fn power_off() -> ! {
    if let Some(doorbell) = DOORBELL.get() {
        doorbell.power_off();
    }
    // A monitor stops the machine at that store or soon after it. Where none
    // listens a reset is the next best.
    std::thread::sleep(Duration::from_secs(1));
    reboot(RebootCommand::Restart).ok();
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}
