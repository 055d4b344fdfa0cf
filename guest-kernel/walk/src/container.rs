//! The circumstances of a container as docker makes it by default: namespaces of
//! its own, 14 capabilities, uid 0. Only its seccomp filter and its AppArmor
//! profile are left out, for the kernel is asked here and not they.

use crate::kernel::{call, name, ptr};
use std::ffi::{CStr, CString};
use std::fs;
use std::io::Write;

/// Docker's default capabilities (`capabilities(7)` has the numbers).
const CAPABILITIES: &[u32] = &[
    0,  // CHOWN
    1,  // DAC_OVERRIDE
    3,  // FOWNER
    4,  // FSETID
    5,  // KILL
    6,  // SETGID
    7,  // SETUID
    8,  // SETPCAP
    10, // NET_BIND_SERVICE
    13, // NET_RAW
    18, // SYS_CHROOT
    27, // MKNOD
    29, // AUDIT_WRITE
    31, // SETFCAP
];

/// The last capability of Linux 6.12, CHECKPOINT_RESTORE.
const LAST_CAPABILITY: u32 = 40;

/// A folder for the probes: on tmpfs, of this container alone.
pub const SCRATCH: &str = "/tmp";

/// Where a pseudo terminal is opened.
pub const PSEUDO_TERMINALS: &CStr = c"/tmp/pts/ptmx";

/// As PID 1 of a bare machine: mounts what any init mounts.
pub fn be_init() -> Result<(), String> {
    for folder in ["/proc", "/sys", "/dev", "/tmp"] {
        // The initramfs may have it already.
        if let Err(error) = fs::create_dir_all(folder) {
            return Err(format!("cannot make {folder}: {error}"));
        }
    }
    mount("proc", "/proc", "proc", "")?;
    mount("sysfs", "/sys", "sysfs", "")?;
    mount("cgroup2", "/sys/fs/cgroup", "cgroup2", "")?;
    // CONFIG_DEVTMPFS_MOUNT does not act on an initramfs.
    mount("devtmpfs", "/dev", "devtmpfs", "")
}

/// Enters the namespaces of a container and leaves all but its capabilities.
/// Without root's power it changes nothing and says so.
pub fn enter() -> Result<(), String> {
    let namespaces = libc::CLONE_NEWNS
        | libc::CLONE_NEWNET
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWUTS
        | libc::CLONE_NEWCGROUP;
    call(libc::SYS_unshare, &[namespaces as u64])
        .map_err(|errno| format!("unshare: {}", name(errno)))?;
    call(
        libc::SYS_mount,
        &[
            0,
            ptr(c"/".to_bytes_with_nul()),
            0,
            libc::MS_REC | libc::MS_PRIVATE,
        ],
    )
    .map_err(|errno| format!("mount: {}", name(errno)))?;
    std::env::set_current_dir("/").map_err(|error| format!("cannot enter /: {error}"))?;
    mount("tmpfs", SCRATCH, "tmpfs", "")?;
    let pts = format!("{SCRATCH}/pts");
    fs::create_dir(&pts).map_err(|error| format!("cannot make {pts}: {error}"))?;
    mount("devpts", &pts, "devpts", "newinstance,ptmxmode=0666")?;
    loopback_up()?;
    for capability in 0..=LAST_CAPABILITY {
        if !CAPABILITIES.contains(&capability) {
            call(
                libc::SYS_prctl,
                &[libc::PR_CAPBSET_DROP as u64, u64::from(capability)],
            )
            .map_err(|errno| format!("PR_CAPBSET_DROP {capability}: {}", name(errno)))?;
        }
    }
    set_capabilities()
}

/// Makes the default capabilities the permitted and effective ones.
fn set_capabilities() -> Result<(), String> {
    const VERSION_3: u32 = 0x2008_0522;
    let header = [VERSION_3, 0];
    let mask = CAPABILITIES
        .iter()
        .fold(0u64, |mask, capability| mask | 1 << capability);
    // Low words (effective, permitted, inheritable), then high words.
    let data = [
        mask as u32,
        mask as u32,
        0,
        (mask >> 32) as u32,
        (mask >> 32) as u32,
        0,
    ];
    call(libc::SYS_capset, &[ptr(&header), ptr(&data)])
        .map(|_| ())
        .map_err(|errno| format!("capset: {}", name(errno)))
}

fn mount(source: &str, target: &str, kind: &str, options: &str) -> Result<(), String> {
    let told = |errno| format!("cannot mount {target}: {}", name(errno));
    let text = |text: &str| CString::new(text).map_err(|_| told(libc::EINVAL));
    let (source, at, kind, options) = (text(source)?, text(target)?, text(kind)?, text(options)?);
    let address = |text: &CString| ptr(text.as_bytes_with_nul());
    match call(
        libc::SYS_mount,
        &[
            address(&source),
            address(&at),
            address(&kind),
            0,
            address(&options),
        ],
    ) {
        Ok(_) | Err(libc::EBUSY) => Ok(()),
        Err(errno) => Err(told(errno)),
    }
}

/// Docker brings a container's loopback interface up.
fn loopback_up() -> Result<(), String> {
    let told = |errno| format!("cannot bring lo up: {}", name(errno));
    let socket = call(
        libc::SYS_socket,
        &[libc::AF_INET as u64, libc::SOCK_DGRAM as u64, 0],
    )
    .map_err(told)?;
    // struct ifreq: the interface's name in 16 bytes, then its flags.
    let mut request = [0u8; 40];
    request[..2].copy_from_slice(b"lo");
    request[16..18].copy_from_slice(&((libc::IFF_UP | libc::IFF_RUNNING) as u16).to_ne_bytes());
    call(
        libc::SYS_ioctl,
        &[socket as u64, libc::SIOCSIFFLAGS, ptr(&request)],
    )
    .map_err(told)?;
    call(libc::SYS_close, &[socket as u64])
        .map(|_| ())
        .map_err(told)
}

/// Ends the machine whose PID 1 this is.
pub fn power_off() -> ! {
    // What was printed has left the machine only when the console has sent it.
    let flushed = std::io::stdout().flush();
    call(libc::SYS_sync, &[]).ok();
    call(
        libc::SYS_reboot,
        &[
            libc::LINUX_REBOOT_MAGIC1 as u64,
            libc::LINUX_REBOOT_MAGIC2 as u64,
            libc::LINUX_REBOOT_CMD_RESTART as u64,
        ],
    )
    .ok();
    crate::kernel::end(i32::from(flushed.is_err()))
}
