//! The root image, mapped from the host's page cache and not read into guest memory:
//! docs/faults.md says what that is worth.

use crate::support::{
    Call, boot, boot_timeout, busybox_rootfs, fork_with, guest, host, python, python_rootfs, shell,
};
use fork::{BootSpec, Child, ChildStats, Disks, ForkSpec, Template};
use std::fs::File;
use std::io;

/// The root window of a guest of 128 MiB, in bytes (vmm/src/layout.rs).
const WINDOW: u64 = 256 << 20;

fn fork(template: &Template, root: File) -> Child {
    let disks = Disks {
        root: Some(root),
        writable: None,
    };
    fork_with(template, "root-window", disks)
}

/// What a child costs that has run `script` on `root`.
fn cost(template: &Template, root: File, script: &str) -> ChildStats {
    let mut child = fork(template, root);
    shell(&mut child, script);
    child.stats().expect("counts")
}

#[test]
fn what_is_read_of_an_image_is_no_memory_of_the_child() {
    let template = boot(128, 1);
    let library = "/usr/lib/x86_64-linux-gnu/libcrypto.so.3";
    let none = cost(&template, python_rootfs(), "true");
    let all = cost(
        &template,
        python_rootfs(),
        &format!("cat {library} > /dev/null"),
    );
    println!("without the library: {none:?}\nwith it: {all:?}");
    let (before, after) = (none.root_mapped, all.root_mapped);
    let (before, after) = (before.expect("is mapped"), after.expect("is mapped"));
    // It has more than 4 MB.
    assert!(after > before + 4000, "KiB");
    assert!(all.guest_private < none.guest_private + 1000, "KiB");
}

#[test]
fn each_child_finds_its_own_image() {
    let template = boot(128, 1);
    let name = "busybox cat --help 2>&1 | head -n 1; python3 -c 'print(6 * 7)' 2>&1";
    let mut children = [
        fork(&template, busybox_rootfs()),
        fork(&template, python_rootfs()),
        fork(&template, busybox_rootfs()),
    ];
    let answers = children
        .each_mut()
        .map(|child| shell(child, &format!("{name}; true")));
    assert!(answers[0].starts_with("BusyBox"), "{answers:?}");
    assert!(answers[1].ends_with("\n42\n"), "{answers:?}");
    assert_eq!(answers[0], answers[2]);
    for child in &children {
        let mapped = child.stats().expect("counts").root_mapped;
        assert!(mapped > Some(100), "{mapped:?} KiB");
    }
}

/// Busybox, followed by zeroes.
fn busybox_of(len: u64) -> File {
    let mut file = tempfile::tempfile().expect("a file");
    io::copy(&mut busybox_rootfs(), &mut file).expect("copies");
    assert!(file.metadata().expect("stat").len() < len);
    file.set_len(len).expect("sized");
    file
}

#[test]
fn an_image_that_does_not_fit_the_window_is_read() {
    let template = boot(128, 1);
    let mapped = |len| cost(&template, busybox_of(len), "sha256sum /bin/busybox").root_mapped;
    assert!(mapped(WINDOW) > Some(1000), "its last byte is the window's");
    assert_eq!(mapped(WINDOW + 4096), None);
    assert_eq!(mapped((64 << 20) + 512), None);
}

#[test]
fn a_named_domain_maps_no_image() {
    let domain = "tenant".to_owned();
    let spec = BootSpec {
        memory: 128 << 20,
        guest: Some(guest()),
        timeout: boot_timeout(),
        domain: domain.clone(),
        ..BootSpec::default()
    };
    let template = Template::boot(host(), &spec).expect("boots");
    let disks = Disks {
        root: Some(busybox_rootfs()),
        writable: None,
    };
    let spec = ForkSpec {
        disks,
        domain,
        ..ForkSpec::default()
    };
    let mut child = template.fork(spec).expect("forks");
    assert_eq!(shell(&mut child, "echo $((6 * 7))"), "42\n");
    assert_eq!(child.stats().expect("counts").root_mapped, None);
}

/// A megabyte written from where the image is mapped, past the guest's page cache.
const WRITE_FROM_MAPPING: &str = "
import mmap, os
image = os.open('/usr/bin/python3', os.O_RDONLY)
mapped = mmap.mmap(image, 1 << 20, mmap.MAP_PRIVATE, mmap.PROT_READ)
copy = os.open('/copy', os.O_CREAT | os.O_RDWR | os.O_DIRECT)
written = os.write(copy, memoryview(mapped))
os.fsync(copy)
open('/after', 'w').write('the disk lives')
os.sync()
print(written, open('/copy', 'rb').read() == mapped[:], open('/after').read())
";

#[test]
fn a_file_is_written_straight_from_the_mapped_image() {
    let ran = Call::run(&[python(), "python3", "-c", WRITE_FROM_MAPPING]).end();
    assert_eq!(ran.out(), "1048576 True the disk lives\n", "{ran}");
}
