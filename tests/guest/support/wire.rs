//! The host's end of a child's network: a network namespace with a tap in it, as
//! `docs/library.md` says that one is made.

use fork::{Network, addresses};
use rustix::fd::{AsFd, AsRawFd, OwnedFd};
use rustix::fs::{CWD, FileType, Mode, OFlags, makedev, mknodat, open};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::fs::File;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

/// `_IOW('T', number, int)` of Linux include/uapi/linux/if_tun.h.
const fn request(number: u64) -> u64 {
    1 << 30 | 4 << 16 | 0x54 << 8 | number
}

const TUNSETIFF: u64 = request(202);
const TUNSETOFFLOAD: u64 = request(208);
const TUNSETVNETHDRSZ: u64 = request(216);
const TUNSETVNETLE: u64 = request(220);

const IFF_TAP: u16 = 0x2;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;

/// TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, TUN_F_TSO_ECN.
const OFFLOADS: u64 = 0xf;

/// Of the tap, in its namespace.
const TAP: &str = "tap0";

/// A namespace, which goes when this is dropped.
pub struct Wire(String);

impl Wire {
    /// With a tap in it, for one child.
    pub fn new() -> (Self, Network) {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let wire = Self(format!("vm-run-{}-{count}", std::process::id()));
        find_tun();
        run(Command::new("ip").args(["netns", "add", &wire.0]));
        let tap = wire.inside(make_tap);
        let ipv4 = Ipv4Addr::from(addresses::IPV4_GATEWAY);
        let ipv6 = Ipv6Addr::from(addresses::IPV6_GATEWAY);
        let mac = addresses::GATEWAY_MAC
            .map(|byte| format!("{byte:02x}"))
            .join(":");
        for words in [
            "link set lo up".to_owned(),
            format!("link set {TAP} address {mac}"),
            format!("link set {TAP} up"),
            format!("addr add {ipv4}/{} dev {TAP}", addresses::IPV4_PREFIX),
            format!("addr add {ipv6}/{} dev {TAP} nodad", addresses::IPV6_PREFIX),
        ] {
            let words = words.split(' ');
            run(Command::new("ip").args(["-n", &wire.0]).args(words));
        }
        (wire, Network { tap })
    }

    /// What `make` makes in the namespace: a socket stays there.
    pub fn inside<T: Send + 'static>(&self, make: fn() -> T) -> T {
        let path = format!("/run/netns/{}", self.0);
        // A thread's namespace is its own.
        let thread = std::thread::spawn(move || {
            let namespace = File::open(path).expect("a namespace");
            let kind = Some(LinkNameSpaceType::Network);
            move_into_link_name_space(namespace.as_fd(), kind).expect("entered");
            make()
        });
        thread.join().expect("made")
    }

    /// A command in the namespace.
    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.0]).args(words);
        command
    }

    /// What a command in it prints that does what it should.
    pub fn run(&self, words: &[&str]) -> String {
        run(&mut self.command(words))
    }

    /// A command in it that goes on until it is dropped.
    pub fn start(&self, words: &[&str]) -> Background {
        let mut command = self.command(words);
        Background(command.stdin(Stdio::null()).spawn().expect("starts"))
    }

    /// A count of the tap. What comes from the guest, it receives.
    pub fn count(&self, name: &str) -> u64 {
        let path = format!("/sys/class/net/{TAP}/statistics/{name}");
        // `ip netns exec` mounts the namespace's own /sys.
        self.run(&["cat", &path]).trim().parse().expect("a number")
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        Command::new("ip")
            .args(["netns", "del", &self.0])
            .status()
            .ok();
    }
}

/// A process that is killed at the end.
pub struct Background(std::process::Child);

impl Drop for Background {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

pub fn run(command: &mut Command) -> String {
    let Output {
        status,
        stdout,
        stderr,
    } = command.output().expect("runs");
    let stderr = String::from_utf8_lossy(&stderr);
    assert!(status.success(), "{command:?}: {status}: {stderr}");
    String::from_utf8_lossy(&stdout).into_owned()
}

/// The emulated host has tun as a module, and nobody who makes its node.
fn find_tun() {
    const NODE: &str = "/dev/net/tun";
    Command::new("modprobe").arg("tun").status().ok();
    std::fs::create_dir_all("/dev/net").expect("a directory");
    let mode = Mode::RUSR | Mode::WUSR;
    mknodat(CWD, NODE, FileType::CharacterDevice, mode, makedev(10, 200)).ok();
}

/// In the calling thread's namespace.
fn make_tap() -> OwnedFd {
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let tap = open("/dev/net/tun", flags, Mode::empty()).expect("/dev/net/tun");
    // `struct ifreq`: a name and flags, and room for what others want.
    let mut interface = [0_u8; 40];
    interface[..TAP.len()].copy_from_slice(TAP.as_bytes());
    let flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
    interface[16..18].copy_from_slice(&flags.to_ne_bytes());
    ioctl(&tap, TUNSETIFF, interface.as_ptr() as u64);
    let (length, yes) = (12_i32, 1_i32);
    ioctl(&tap, TUNSETVNETHDRSZ, &raw const length as u64);
    ioctl(&tap, TUNSETVNETLE, &raw const yes as u64);
    ioctl(&tap, TUNSETOFFLOAD, OFFLOADS);
    tap
}

#[expect(unsafe_code, reason = "rustix has no calls for taps")]
fn ioctl(tap: &OwnedFd, request: u64, argument: u64) {
    // SAFETY: the argument is a number, or the address of what this request reads, which
    // lives in the caller.
    let done = unsafe { libc::ioctl(tap.as_raw_fd(), request, argument) };
    let error = std::io::Error::last_os_error();
    assert_eq!(done, 0, "ioctl {request:#x}: {error}");
}
