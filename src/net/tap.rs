//! A tap, as the guest's device wants it (`fork::Network`).

use anyhow::{Context, Result};
use rustix::fd::{AsRawFd, OwnedFd};
use rustix::fs::{CWD, FileType, Mode, OFlags, makedev, mknodat, open};
use rustix::io::Errno;
use std::io;

/// Its name, in the container's namespace.
pub const NAME: &str = "tap0";

const NODE: &str = "/dev/net/tun";

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

/// The length of the header before each frame: virtio 1.2, 5.1.6.1.
const HEADER: i32 = 12;

/// Whether this host has taps at all; the node is made where the kernel has the device and
/// nobody has made it.
///
/// # Errors
/// One line.
pub fn ensure_node() -> Result<()> {
    if std::path::Path::new(NODE).exists() {
        return Ok(());
    }
    std::fs::create_dir_all("/dev/net").context("cannot make /dev/net")?;
    let mode = Mode::RUSR | Mode::WUSR | Mode::RGRP | Mode::WGRP | Mode::ROTH | Mode::WOTH;
    match mknodat(CWD, NODE, FileType::CharacterDevice, mode, makedev(10, 200)) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(error).context("cannot make /dev/net/tun"),
    }
}

/// Makes one in the calling thread's namespace. It goes when its descriptor is closed.
///
/// # Errors
/// No device (`modprobe tun`), or no privilege.
pub fn make() -> io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let tap = open(NODE, flags, Mode::empty())
        .map_err(|error| io::Error::new(error.kind(), format!("{NODE}: {error}")))?;
    // `struct ifreq`: a name and flags, and room for what others want.
    let mut interface = [0_u8; 40];
    interface[..NAME.len()].copy_from_slice(NAME.as_bytes());
    let flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
    interface[16..18].copy_from_slice(&flags.to_ne_bytes());
    let (header, yes) = (HEADER, 1_i32);
    ioctl(&tap, TUNSETIFF, interface.as_ptr() as u64)?;
    ioctl(&tap, TUNSETVNETHDRSZ, &raw const header as u64)?;
    ioctl(&tap, TUNSETVNETLE, &raw const yes as u64)?;
    ioctl(&tap, TUNSETOFFLOAD, OFFLOADS)?;
    Ok(tap)
}

#[expect(unsafe_code, reason = "rustix has no calls for taps")]
fn ioctl(tap: &OwnedFd, request: u64, argument: u64) -> io::Result<()> {
    // SAFETY: the argument is a number, or the address of what this request reads, an
    // `ifreq` of forty bytes or an int, which lives in the caller.
    match unsafe { libc::ioctl(tap.as_raw_fd(), request, argument) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
