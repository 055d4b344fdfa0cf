//! What `cargo xtask install` makes runs with neither cargo nor a checkout: here
//! in a root directory that holds it, the C library, and nothing else.

use crate::support::{Call, variable, world};
use std::fs;
use std::path::Path;
use tempfile::TempDir;

/// What a dynamically linked Rust program needs.
const LIBRARIES: [&str; 4] = [
    "/lib64/ld-linux-x86-64.so.2",
    "/lib/x86_64-linux-gnu/libc.so.6",
    "/lib/x86_64-linux-gnu/libgcc_s.so.1",
    "/lib/x86_64-linux-gnu/libm.so.6",
];

#[test]
fn an_installed_tree_runs_a_container_by_itself() {
    world();
    let root = TempDir::new().expect("a directory");
    for library in LIBRARIES {
        copy(Path::new(library), root.path(), library);
    }
    let prefix = variable("VM_RUN_TEST_PREFIX");
    for file in [
        "bin/vm-run",
        "lib/vm-run/vm-run-worker",
        "lib/vm-run/vmlinux",
        "lib/vm-run/initramfs",
        "lib/vm-run/writable.blocks",
        "lib/vm-run/digest",
    ] {
        copy(&prefix.join(file), root.path(), &format!("/opt/{file}"));
    }
    copy(&variable("VM_RUN_TEST_BUSYBOX"), root.path(), "/image.tar");
    for dir in ["dev", "proc", "tmp"] {
        fs::create_dir(root.path().join(dir)).expect("made");
    }
    // In a mount namespace of its own, which takes the mounts with it.
    let script = r#"
        mount --bind "$1" "$1" && cd / || exit 99
        mount --rbind /dev "$1/dev" && mount -t proc proc "$1/proc" || exit 99
        run() { env -i /usr/sbin/chroot "$ROOT" /opt/bin/vm-run --root /state "$@"; }
        ROOT=$1
        run doctor && run image load /image.tar && run run --boot-timeout 60 busybox echo alone
    "#;
    let ran = Call::program("unshare")
        .args(&["-m", "sh", "-c", script, "sh"])
        .args(&[root.path()])
        .end();
    assert_eq!(ran.status, 0, "{ran}");
    assert!(ran.out().contains("/opt/lib/vm-run/vmlinux"), "{ran}");
    assert!(ran.out().ends_with("\nalone\n"), "{ran}");
}

fn copy(from: &Path, root: &Path, to: &str) {
    let to = root.join(to.trim_start_matches('/'));
    fs::create_dir_all(to.parent().expect("below the root")).expect("made");
    fs::copy(from, &to).unwrap_or_else(|e| panic!("{}: {e}", from.display()));
}
