//! The kernel inside: a user's own, and what ours answers to programs.

use crate::machine::busybox_tree;
use crate::support::{Call, listing, own_root, variable};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

#[test]
fn a_kernel_whose_drivers_are_modules_is_refused_by_their_names() {
    let own = own_root();
    let before = listing(own.path());
    let kernel = variable("VM_RUN_TEST_STOCK_KERNEL");
    let kernel = kernel.to_str().expect("text");
    let line = Call::template_build_in(own.path(), &["--name", "stock", "--kernel", kernel]);
    let line = line.refused(125);
    assert!(line.contains("CONFIG_VIRTIO"), "{line}");
    assert_eq!(listing(own.path()), before);
}

/// The walk's reference had a tmpfs, and neither device rules nor a container
/// around it: entry, the answer there, the answer here, why.
const CIRCUMSTANCES: [[&str; 4]; 11] = [
    [
        "socket inet dgram icmp",
        "EACCES",
        "ok",
        "docker lets everybody ping",
    ],
    [
        "socket inet6 dgram icmpv6",
        "EACCES",
        "ok",
        "docker lets everybody ping",
    ],
    ["device cuse", "ok", "EPERM", "docker's device rules"],
    ["device fuse", "ok", "EPERM", "docker's device rules"],
    ["device net/tun", "ok", "EPERM", "docker's device rules"],
    [
        "mount fuse in a user namespace",
        "ok",
        "EPERM",
        "docker's device rules",
    ],
    [
        "mount overlay in a user namespace",
        "ok",
        "EINVAL",
        "no overlay lies on another",
    ],
    [
        "mount overlay with user attributes in a user namespace",
        "ok",
        "EINVAL",
        "no overlay lies on another",
    ],
    [
        "file handle",
        "ok",
        "EOPNOTSUPP",
        "an overlay has none by default",
    ],
    [
        "socket qipcrtr dgram",
        "EAFNOSUPPORT",
        "ok",
        "the guest's first network namespace",
    ],
    [
        "file /proc/sys/net/core/bpf_jit_enable",
        "ENOENT",
        "ok",
        "the guest's first network namespace",
    ],
];

/// The reference was walked under Debian's kernel.
#[test]
fn programs_get_the_answers_that_debians_kernel_gives_in_docker() {
    let walk = variable("VM_RUN_TEST_WALK");
    let dir = tempfile::tempdir().expect("a directory");
    let rootfs = busybox_tree(dir.path(), "walk");
    fs::copy(&walk, rootfs.join("walk")).expect("copies");
    symlink("/dev/pts", rootfs.join("tmp/pts")).expect("links");
    let script = "/walk inside; exit $?";
    let rootfs = rootfs.to_str().expect("text");
    let ran = Call::run(&["--rootfs", rootfs, "/bin/sh", "-c", script]).end();
    assert_eq!((ran.status, ran.err()), (0, String::new()), "{ran}");
    let measured = dir.path().join("measured");
    fs::write(&measured, &ran.stdout).expect("writes");
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("guest-kernel/walk");
    let mut expected = fs::read_to_string(sources.join("allowed")).expect("reads");
    for line in CIRCUMSTANCES {
        expected += &format!("{}\n", line.join("\t"));
    }
    let allowed = dir.path().join("allowed");
    fs::write(&allowed, expected).expect("writes");
    let compared = Call::program(&walk)
        .args(&["compare".as_ref(), sources.join("reference").as_os_str()])
        .args(&[measured, allowed])
        .end();
    assert_eq!(compared.status, 0, "{}", compared.out());
}
