//! The networks of the guest: its own, with the interface that the monitor gives it, and
//! that of a container without a network, which has a loopback and nothing else.
//!
//! The interface is up before the fork point, at addresses that are the same in all
//! children ([`vm_run_abi::network`]). A container whose child has a network enters the
//! guest's own when it starts; one without has been in its own from the beginning. So
//! neither configures anything.

use crate::sys;
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{Mode, OFlags};
use rustix::net::netdevice::name_to_index;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::fs;
use std::io::ErrorKind;
use std::path::Path;
use std::time::{Duration, Instant};
use vm_run_abi::network::{
    INTERFACE, IPV4, IPV4_GATEWAY, IPV4_PREFIX, IPV6, IPV6_GATEWAY, IPV6_PREFIX,
};

/// The calling process's network namespace, and the device of the guest's.
const NAMESPACE: &str = "/proc/self/ns/net";
const DEVICE: &str = "/sys/class/net/eth0";

/// How the kernel keeps quiet on the interface, and believes nobody there: no address
/// that it makes itself, nothing asked of routers or taken from them, no search for
/// another of the same address. Each would be said, and paid for, by every child.
const QUIET: [(&str, &str); 4] = [
    ("addr_gen_mode", "1"),
    ("accept_ra", "0"),
    ("router_solicitations", "0"),
    ("accept_dad", "0"),
];

/// How often the kernel tells routers of a group that it has joined (RFC 3810, the
/// robustness variable): once while the interface comes up, and later what it was.
const REPORTS: &str = "/proc/sys/net/ipv6/mld_qrv";

/// How long such a report may take. The kernel sends it two ticks after the address
/// was given.
const REPORT_PATIENCE: Duration = Duration::from_secs(1);

/// The guest's own network, whose interface is up.
#[derive(Debug)]
pub struct Network {
    namespace: OwnedFd,
    /// The report of a group is still to be sent: the address is one of IPv6.
    is_loud: bool,
}

impl Network {
    /// Brings the interface up at its addresses. `None` for a kernel that has no driver
    /// for it. The namespace is the calling process's.
    pub fn set_up() -> Result<Option<Self>, String> {
        if !Path::new(DEVICE).exists() {
            return Ok(None);
        }
        let failed = |what: &str| {
            let what = format!("cannot {what} of {INTERFACE}");
            move |e: std::io::Error| format!("{what}: {e}")
        };
        let has_ipv6 = keep_quiet()?;
        let reports = fs::read_to_string(REPORTS);
        if has_ipv6 {
            write(REPORTS, "1")?;
        }
        sys::interface_up(INTERFACE).map_err(failed("change the state"))?;
        sys::set_ipv4(INTERFACE, IPV4, IPV4_PREFIX).map_err(failed("set the IPv4 address"))?;
        sys::add_ipv4_default(IPV4_GATEWAY).map_err(failed("set the IPv4 route"))?;
        if has_ipv6 {
            let index = index().map_err(|e| failed("tell the number")(e.into()))?;
            sys::add_ipv6(index, IPV6, IPV6_PREFIX).map_err(failed("set the IPv6 address"))?;
            sys::add_ipv6_default(index, IPV6_GATEWAY).map_err(failed("set the IPv6 route"))?;
            if let Ok(reports) = reports {
                write(REPORTS, reports.trim())?;
            }
        }
        Ok(Some(Self {
            namespace: own_namespace()?,
            is_loud: has_ipv6,
        }))
    }

    /// The network of the calling process, as it is.
    pub fn of_this_process() -> Result<Self, String> {
        Ok(Self {
            namespace: own_namespace()?,
            is_loud: false,
        })
    }

    /// Waits until the kernel has said on the interface what it says by itself: what it
    /// has not said at the fork point, every child would say.
    pub fn settle(&self) {
        let start = Instant::now();
        let has_spoken = || {
            let sent = fs::read_to_string(format!("{DEVICE}/statistics/tx_packets"));
            sent.is_ok_and(|count| count.trim() != "0")
        };
        while self.is_loud && !has_spoken() && start.elapsed() < REPORT_PATIENCE {
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Moves the calling process into it.
    pub fn enter(&self) -> Result<(), String> {
        move_into_link_name_space(self.namespace.as_fd(), Some(LinkNameSpaceType::Network))
            .map_err(|e| format!("cannot enter the network: {e}"))
    }
}

/// Moves the calling process into a network of its own, with nothing but a loopback.
pub fn leave() -> Result<(), String> {
    sys::new_network_namespace().map_err(|e| format!("cannot make a network namespace: {e}"))?;
    set_defaults()
}

/// What every network of a guest has. Docker's: everybody may listen on any port and
/// send pings (moby daemon/oci_linux.go), for the network is the container's own.
pub fn set_defaults() -> Result<(), String> {
    for (name, value) in [
        ("ip_unprivileged_port_start", "0"),
        ("ping_group_range", "0 2147483647"),
    ] {
        // A kernel without IPv4 has none.
        write_if_there(&format!("/proc/sys/net/ipv4/{name}"), value)?;
    }
    sys::interface_up("lo").map_err(|e| format!("cannot bring the loopback interface up: {e}"))
}

/// False for a kernel without IPv6.
fn keep_quiet() -> Result<bool, String> {
    let mut has_ipv6 = true;
    for (name, value) in QUIET {
        let path = format!("/proc/sys/net/ipv6/conf/{INTERFACE}/{name}");
        has_ipv6 &= write_if_there(&path, value)?;
    }
    Ok(has_ipv6)
}

fn write(path: &str, value: &str) -> Result<(), String> {
    fs::write(path, value).map_err(|e| format!("cannot write {path}: {e}"))
}

/// Whether the file is there.
fn write_if_there(path: &str, value: &str) -> Result<bool, String> {
    match fs::write(path, value) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(false),
        Err(e) => Err(format!("cannot write {path}: {e}")),
    }
}

fn index() -> rustix::io::Result<u32> {
    let flags = SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, flags, None)?;
    name_to_index(&socket, INTERFACE)
}

fn own_namespace() -> Result<OwnedFd, String> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    rustix::fs::open(NAMESPACE, flags, Mode::empty())
        .map_err(|e| format!("cannot open {NAMESPACE}: {e}"))
}
