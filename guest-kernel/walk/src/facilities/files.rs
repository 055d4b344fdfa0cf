//! Files, their attributes, mounts, and what `/proc` and `/sys` hold.

use super::{Probe, c, expect};
use crate::kernel::{Answer, call, out, ptr};
use std::ffi::CString;

pub const PROBES: &[Probe] = &[
    ("user attribute on tmpfs", || attribute(c"user.walk", b"x")),
    ("trusted attribute on tmpfs", || {
        attribute(c"trusted.walk", b"x")
    }),
    ("file capability on tmpfs", || {
        // struct vfs_cap_data, version 2, CAP_NET_RAW permitted.
        let mut value = [0u8; 20];
        value[..5].copy_from_slice(&[1, 0, 0, 2, 0]);
        value[5] = 0x20;
        attribute(c"security.capability", &value)
    }),
    ("posix acl on tmpfs", || {
        // Version 2; owner rwx, group and others nothing: tag, permissions, id.
        let entry = |tag: u8, permissions: u8| [tag, 0, permissions, 0, 255, 255, 255, 255];
        let acl = [
            &[2, 0, 0, 0][..],
            &entry(1, 7),
            &entry(4, 0),
            &entry(0x20, 0),
        ]
        .concat();
        attribute(c"system.posix_acl_access", &acl)
    }),
    ("file handle", || {
        // struct file_handle with room for 128 bytes.
        let mut handle = [0u32; 34];
        handle[0] = 128;
        let mut mount = 0i32;
        let at = libc::AT_FDCWD as u64;
        call(
            libc::SYS_name_to_handle_at,
            &[at, c(c"/tmp"), out(&mut handle), out(&mut mount), 0],
        )
    }),
    ("openat2 beneath", || {
        // struct open_how: flags, mode, resolve (BENEATH).
        let how = [libc::O_RDONLY as u64, 0, 8];
        call(
            libc::SYS_openat2,
            &[libc::AT_FDCWD as u64, c(c"/proc"), ptr(&how), 24],
        )?;
        Ok(0)
    }),
    ("openat2 in root", || {
        let root = super::open(c"/", libc::O_PATH)?;
        let how = [libc::O_RDONLY as u64, 0, 16];
        call(
            libc::SYS_openat2,
            &[root as u64, c(c"/proc"), ptr(&how), 24],
        )
    }),
    ("statx", || {
        let mut status = [0u64; 32];
        call(
            libc::SYS_statx,
            &[
                libc::AT_FDCWD as u64,
                c(c"/tmp"),
                0,
                0xfff,
                out(&mut status),
            ],
        )
    }),
    ("nameless file", || {
        super::open(c"/tmp", libc::O_TMPFILE | libc::O_RDWR)
    }),
    ("direct io on tmpfs", || {
        super::open(
            c"/tmp/direct",
            libc::O_CREAT | libc::O_RDWR | libc::O_DIRECT,
        )
    }),
    ("renameat2 exchange", || {
        let at = libc::AT_FDCWD as u64;
        super::open(c"/tmp/one", libc::O_CREAT)?;
        super::open(c"/tmp/two", libc::O_CREAT)?;
        call(
            libc::SYS_renameat2,
            &[at, c(c"/tmp/one"), at, c(c"/tmp/two"), 2],
        )
    }),
    ("fallocate", || allocate(0)),
    ("fallocate punch hole", || {
        allocate(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE)
    }),
    ("copy_file_range", || {
        let from = super::open(c"/tmp/from", libc::O_CREAT | libc::O_RDWR)?;
        let to = super::open(c"/tmp/to", libc::O_CREAT | libc::O_RDWR)?;
        call(libc::SYS_write, &[from as u64, ptr(b"x"), 1])?;
        call(
            libc::SYS_copy_file_range,
            &[from as u64, out(&mut 0u64), to as u64, 0, 1, 0],
        )
    }),
    ("lock of an open file", || {
        let file = super::open(c"/tmp/locked", libc::O_CREAT | libc::O_RDWR)?;
        // SAFETY: all zeroes is a valid flock.
        let mut lock: libc::flock = unsafe { std::mem::zeroed() };
        lock.l_type = libc::F_WRLCK as i16;
        call(
            libc::SYS_fcntl,
            &[file as u64, libc::F_OFD_SETLK as u64, ptr(&lock)],
        )
    }),
    ("lease", || {
        let file = super::open(c"/tmp/leased", libc::O_CREAT | libc::O_RDONLY)?;
        call(
            libc::SYS_fcntl,
            &[file as u64, libc::F_SETLEASE as u64, libc::F_RDLCK as u64],
        )
    }),
    ("chroot", || call(libc::SYS_chroot, &[c(c"/tmp")])),
    ("mount without the capability", || {
        let kind = c(c"tmpfs");
        call(libc::SYS_mount, &[kind, c(c"/tmp"), kind, 0, 0])
    }),
    ("node of a block device", || {
        let at = libc::AT_FDCWD as u64;
        call(
            libc::SYS_mknodat,
            &[
                at,
                c(c"/tmp/block"),
                u64::from(libc::S_IFBLK | 0o600),
                7 << 8,
            ],
        )
    }),
    ("statmount", || {
        // struct mnt_id_req: size, -, mount (of statx's STATX_MNT_ID_UNIQUE), what.
        let mut status = [0u64; 32];
        let at = libc::AT_FDCWD as u64;
        call(
            libc::SYS_statx,
            &[at, c(c"/tmp"), 0, 0x4000, out(&mut status)],
        )?;
        let request = [24u64, status[18], 1];
        let mut reply = [0u64; 64];
        call(457, &[ptr(&request), out(&mut reply), 512, 0])
    }),
    ("quota state", || {
        const Q_GETINFO: u64 = 0x80_0005 << 8;
        call(
            libc::SYS_quotactl,
            &[Q_GETINFO, c(c"/dev/null"), 0, out(&mut [0u64; 8])],
        )
    }),
];

/// What a fresh user namespace may mount: a name, the type, the options.
pub const MOUNTS: &[(&str, &str, &str)] = &[
    ("tmpfs", "tmpfs", ""),
    ("ramfs", "ramfs", ""),
    (
        "overlay",
        "overlay",
        "lowerdir=/tmp/lower,upperdir=/tmp/upper,workdir=/tmp/work",
    ),
    (
        "overlay with user attributes",
        "overlay",
        "lowerdir=/tmp/lower,upperdir=/tmp/upper,workdir=/tmp/work,userxattr",
    ),
    ("devpts", "devpts", "newinstance"),
    ("mqueue", "mqueue", ""),
    ("cgroup2", "cgroup2", ""),
    ("binfmt_misc", "binfmt_misc", ""),
    ("bpf", "bpf", ""),
    ("fuse", "fuse", "fd=0,rootmode=40000,user_id=0,group_id=0"),
    ("ext4", "ext4", ""),
    ("erofs", "erofs", ""),
    ("9p", "9p", ""),
    ("no such", "walkfs", ""),
];

/// Files of `/proc` and `/sys` that programs read.
#[rustfmt::skip]
pub const PRESENT: &[&str] = &[
    "/proc/buddyinfo", "/proc/cgroups", "/proc/cmdline", "/proc/config.gz", "/proc/consoles", "/proc/cpuinfo",
    "/proc/crypto", "/proc/devices", "/proc/diskstats", "/proc/execdomains", "/proc/filesystems",
    "/proc/interrupts", "/proc/iomem", "/proc/kallsyms", "/proc/kcore", "/proc/key-users", "/proc/keys",
    "/proc/kmsg", "/proc/kpagecount", "/proc/loadavg", "/proc/locks", "/proc/meminfo", "/proc/misc",
    "/proc/modules", "/proc/mounts", "/proc/mtrr", "/proc/pagetypeinfo", "/proc/partitions",
    "/proc/pressure/cpu", "/proc/pressure/io", "/proc/pressure/memory", "/proc/schedstat", "/proc/slabinfo",
    "/proc/softirqs", "/proc/stat", "/proc/swaps", "/proc/sysrq-trigger", "/proc/timer_list", "/proc/uptime",
    "/proc/version", "/proc/vmallocinfo", "/proc/vmstat", "/proc/zoneinfo", "/proc/sysvipc/msg",
    "/proc/sysvipc/sem", "/proc/sysvipc/shm",
    "/proc/net/arp", "/proc/net/dev", "/proc/net/if_inet6", "/proc/net/igmp", "/proc/net/ipv6_route",
    "/proc/net/netlink", "/proc/net/netstat", "/proc/net/packet", "/proc/net/protocols", "/proc/net/psched",
    "/proc/net/ptype", "/proc/net/raw", "/proc/net/route", "/proc/net/snmp", "/proc/net/snmp6",
    "/proc/net/sockstat", "/proc/net/softnet_stat", "/proc/net/tcp", "/proc/net/tcp6", "/proc/net/udp",
    "/proc/net/udp6", "/proc/net/unix", "/proc/net/wireless",
    "/proc/self/arch_status", "/proc/self/attr/current", "/proc/self/autogroup", "/proc/self/auxv",
    "/proc/self/cgroup", "/proc/self/cmdline", "/proc/self/comm", "/proc/self/coredump_filter",
    "/proc/self/cpuset", "/proc/self/environ", "/proc/self/gid_map", "/proc/self/io", "/proc/self/ksm_stat",
    "/proc/self/limits", "/proc/self/loginuid", "/proc/self/maps", "/proc/self/mem", "/proc/self/mountinfo",
    "/proc/self/mountstats", "/proc/self/ns/cgroup", "/proc/self/ns/ipc", "/proc/self/ns/mnt",
    "/proc/self/ns/net", "/proc/self/ns/pid", "/proc/self/ns/time", "/proc/self/ns/user", "/proc/self/ns/uts",
    "/proc/self/numa_maps", "/proc/self/oom_score", "/proc/self/oom_score_adj", "/proc/self/pagemap",
    "/proc/self/personality", "/proc/self/projid_map", "/proc/self/sched", "/proc/self/schedstat",
    "/proc/self/seccomp_cache", "/proc/self/sessionid", "/proc/self/setgroups", "/proc/self/smaps",
    "/proc/self/smaps_rollup", "/proc/self/stack", "/proc/self/stat", "/proc/self/statm", "/proc/self/status",
    "/proc/self/syscall", "/proc/self/task", "/proc/self/timens_offsets", "/proc/self/timers",
    "/proc/self/timerslack_ns", "/proc/self/uid_map", "/proc/self/wchan",
    "/proc/sys/fs/aio-max-nr", "/proc/sys/fs/binfmt_misc", "/proc/sys/fs/epoll/max_user_watches",
    "/proc/sys/fs/file-max", "/proc/sys/fs/inotify/max_user_watches", "/proc/sys/fs/mqueue/msg_max",
    "/proc/sys/fs/nr_open", "/proc/sys/fs/pipe-max-size", "/proc/sys/fs/protected_symlinks",
    "/proc/sys/kernel/acct", "/proc/sys/kernel/apparmor_restrict_unprivileged_userns",
    "/proc/sys/kernel/cap_last_cap", "/proc/sys/kernel/core_pattern", "/proc/sys/kernel/dmesg_restrict",
    "/proc/sys/kernel/ftrace_enabled", "/proc/sys/kernel/hung_task_timeout_secs",
    "/proc/sys/kernel/io_uring_disabled", "/proc/sys/kernel/kptr_restrict", "/proc/sys/kernel/modprobe",
    "/proc/sys/kernel/msgmax", "/proc/sys/kernel/ngroups_max", "/proc/sys/kernel/numa_balancing",
    "/proc/sys/kernel/osrelease", "/proc/sys/kernel/overflowuid", "/proc/sys/kernel/panic",
    "/proc/sys/kernel/perf_event_paranoid", "/proc/sys/kernel/pid_max", "/proc/sys/kernel/random/boot_id",
    "/proc/sys/kernel/random/uuid", "/proc/sys/kernel/randomize_va_space",
    "/proc/sys/kernel/sched_autogroup_enabled", "/proc/sys/kernel/seccomp/actions_avail",
    "/proc/sys/kernel/sem", "/proc/sys/kernel/shmmax", "/proc/sys/kernel/sysrq", "/proc/sys/kernel/threads-max",
    "/proc/sys/kernel/unprivileged_bpf_disabled", "/proc/sys/kernel/unprivileged_userns_clone",
    "/proc/sys/kernel/yama/ptrace_scope", "/proc/sys/net/core/bpf_jit_enable", "/proc/sys/net/core/somaxconn",
    "/proc/sys/net/ipv4/conf/all/forwarding", "/proc/sys/net/ipv4/ip_local_port_range",
    "/proc/sys/net/ipv4/ip_unprivileged_port_start", "/proc/sys/net/ipv4/ping_group_range",
    "/proc/sys/net/ipv4/tcp_available_congestion_control", "/proc/sys/net/ipv4/tcp_syncookies",
    "/proc/sys/net/ipv6/conf/all/disable_ipv6", "/proc/sys/net/mptcp/enabled", "/proc/sys/net/unix/max_dgram_qlen",
    "/proc/sys/user/max_user_namespaces", "/proc/sys/vm/compaction_proactiveness", "/proc/sys/vm/max_map_count",
    "/proc/sys/vm/mmap_min_addr", "/proc/sys/vm/nr_hugepages", "/proc/sys/vm/overcommit_memory",
    "/proc/sys/vm/swappiness", "/proc/sys/vm/unprivileged_userfaultfd", "/proc/sys/vm/zone_reclaim_mode",
    "/sys/block", "/sys/class/net", "/sys/devices/system/cpu/online", "/sys/devices/system/cpu/vulnerabilities",
    "/sys/devices/system/node/online", "/sys/fs/cgroup", "/sys/fs/fuse/connections", "/sys/kernel/mm/ksm/run",
    "/sys/kernel/mm/hugepages", "/sys/kernel/mm/lru_gen/enabled", "/sys/kernel/mm/transparent_hugepage/enabled",
    "/sys/kernel/security", "/sys/kernel/tracing", "/sys/kernel/debug", "/sys/power/state",
];

/// Opens a file or folder and reads a little of it, or lists it.
pub fn open(path: &str) -> Answer {
    let path = CString::new(path).map_err(|_| libc::EINVAL)?;
    match super::open(&path, libc::O_RDONLY | libc::O_NONBLOCK) {
        // Files that are only written.
        Err(libc::EACCES | libc::EPERM) => super::open(&path, libc::O_WRONLY | libc::O_NONBLOCK),
        other => other,
    }
}

fn attribute(name: &std::ffi::CStr, value: &[u8]) -> Answer {
    let path = c"/tmp/attributed";
    super::open(path, libc::O_CREAT | libc::O_RDWR)?;
    call(
        libc::SYS_setxattr,
        &[c(path), c(name), ptr(value), value.len() as u64, 0],
    )
}

fn allocate(mode: i32) -> Answer {
    let file = super::open(c"/tmp/allocated", libc::O_CREAT | libc::O_RDWR)?;
    call(libc::SYS_fallocate, &[file as u64, mode as u64, 0, 4096])
}

/// Mounts in a user namespace made for it, as its root.
pub fn mount_as_user(kind: &str, data: &str) -> Answer {
    let name = |text: &str| CString::new(text).map_err(|_| libc::EINVAL);
    for folder in [c"/tmp/lower", c"/tmp/upper", c"/tmp/work", c"/tmp/at"] {
        match call(
            libc::SYS_mkdirat,
            &[libc::AT_FDCWD as u64, c(folder), 0o700],
        ) {
            Ok(_) | Err(libc::EEXIST) => {}
            other => return other,
        }
    }
    let fuse = super::network::device_node(10, 229)?;
    super::process::become_root_of_new_user_namespace(
        libc::CLONE_NEWNS | libc::CLONE_NEWIPC | libc::CLONE_NEWCGROUP,
    )?;
    if kind == "fuse" {
        // Its options say that descriptor 0 is the device, opened by this root.
        call(
            libc::SYS_dup2,
            &[super::open(fuse, libc::O_RDWR)? as u64, 0],
        )?;
    }
    let kind = name(kind)?;
    let data = name(data)?;
    let mounted = call(
        libc::SYS_mount,
        &[c(&kind), c(c"/tmp/at"), c(&kind), 0, c(&data)],
    );
    mounted.and_then(|done| expect(done == 0, libc::EIO))
}
