//! The host's end of a child's network: a network namespace with a tap in it, as
//! `docs/library.md` says that one is made.

use fork::{Network, RateLimits, addresses};
use rustix::fd::AsFd;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::fs::File;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use tap::NAME as TAP;

#[path = "../../../src/net/tap.rs"]
mod tap;

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
        let tap = wire.inside(|| tap::make().expect("a tap"));
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
        (
            wire,
            Network {
                tap,
                limits: RateLimits::default(),
            },
        )
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
    Command::new("modprobe").arg("tun").status().ok();
    tap::ensure_node().expect("a node");
}
