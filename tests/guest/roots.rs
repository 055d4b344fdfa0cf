//! What a container's root image costs its children, by the way it gets there. The
//! figures are for ARCHITECTURE.md: this prints them, and only checks that every way
//! works.

use crate::support::{
    Call, boot_timeout, busybox_rootfs, guest, host, own_root, python, python_rootfs, world,
};
use fork::{
    BootSpec, ContainerOptions, ContainerSpec, DEFAULT_DOMAIN, Disks, ForkSpec, ProcessOptions,
    ProcessSpec, Stream, Template, Writable,
};
use std::fs::File;
use std::path::Path;
use std::process::Command;

const RUNS: usize = 5;
/// In KiB, as the counts are.
const PAGE: u64 = 4;
const TRUE: &[&str] = &["sh", "-c", ":"];
const PYTHON: &[&str] = &["python3", "-c", "import ssl, sqlite3, json, asyncio"];
/// One more file system of the same image, from its disk, and what that is compared with.
const ONE_MORE: &[&str] = &[
    "sh",
    "-c",
    "mkdir /more && mount -t erofs -o ro,noatime /dev/vda /more",
];
const NONE_MORE: &[&str] = &[
    "sh",
    "-c",
    "mkdir /more && mount -t tmpfs -o ro,noatime none /more",
];

/// Medians of what a child has paid.
struct Cost {
    /// From the fork to the container's exec, in milliseconds.
    exec: u64,
    /// To its exit.
    exit: u64,
    /// Its own pages at its exit.
    pages: u64,
    /// What it has mapped of its image, in pages, if it has.
    mapped: Option<u64>,
}

fn cost(template: &Template, image: &File, command: &[&str], privileged: bool) -> Cost {
    let mut all: Vec<Cost> = (0..RUNS)
        .map(|_| one_cost(template, image, command, privileged))
        .collect();
    let mut median = |of: fn(&Cost) -> u64| {
        all.sort_by_key(of);
        of(&all[RUNS / 2])
    };
    let (exec, exit, pages) = (median(|c| c.exec), median(|c| c.exit), median(|c| c.pages));
    let mapped = all[RUNS / 2].mapped;
    Cost {
        exec,
        exit,
        pages,
        mapped,
    }
}

fn one_cost(template: &Template, image: &File, command: &[&str], privileged: bool) -> Cost {
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(image));
    let disks = Disks {
        root: Some(File::open(path).expect("opens")),
        writable: None,
    };
    let mut child = template
        .fork(ForkSpec {
            disks,
            domain: template.domain().to_owned(),
            ..ForkSpec::default()
        })
        .expect("forks");
    let container = ContainerSpec {
        writable: Writable::Memory { limit: 64 << 20 },
        options: ContainerOptions {
            privileged,
            ..ContainerOptions::default()
        },
        ..ContainerSpec::default()
    };
    let process = ProcessSpec {
        args: command.iter().map(|word| (*word).to_owned()).collect(),
        env: vec!["PATH=/bin:/sbin:/usr/bin:/usr/sbin".into()],
        streams: vec![Stream::Stdout, Stream::Stderr],
        options: ProcessOptions {
            capabilities: privileged.then_some(u64::MAX),
            ..ProcessOptions::default()
        },
        ..ProcessSpec::default()
    };
    let _streams = child.start(container, process).expect("starts");
    assert_eq!(child.wait().expect("ends").code(), 0, "{command:?}");
    let (stages, stats) = (child.stages(), child.stats().expect("counts"));
    let since = |moment: Option<fork::Moment>| {
        let moment = moment.expect("it was there");
        u64::try_from(moment.since(stages.fork.asked).as_millis()).expect("a while")
    };
    Cost {
        exec: since(stages.started),
        exit: since(stages.exited),
        pages: stats.guest_private / PAGE,
        mapped: stats.root_mapped.map(|kib| kib / PAGE),
    }
}

fn print(what: &str, cost: &Cost) {
    let Cost {
        exec,
        exit,
        pages,
        mapped,
    } = cost;
    println!("{what}: exec {exec} ms, exit {exit} ms, own pages {pages}, mapped {mapped:?}");
}

fn template(domain: &str) -> Template {
    let spec = BootSpec {
        guest: Some(guest()),
        timeout: boot_timeout(),
        domain: domain.into(),
        ..BootSpec::default()
    };
    Template::boot(host(), &spec).expect("boots")
}

/// The root file system of an image of the shared state directory, as an ext4.
fn ext4(image: &str, dir: &Path) -> File {
    let root = own_root();
    let tar = dir.join("root.tar");
    let tree = dir.join("tree");
    let disk = dir.join("root.ext4");
    let does = |words: &[&str]| {
        let ran = Call::vm_run_in(root.path(), words).end();
        assert_eq!(ran.status, 0, "{ran}");
    };
    let archive = crate::support::variable(match image {
        "busybox" => "VM_RUN_TEST_BUSYBOX",
        _ => "VM_RUN_TEST_PYTHON",
    });
    does(&["image", "load", "-i", archive.to_str().expect("text")]);
    does(&["create", "--name", "it", image, "true"]);
    does(&["export", "-o", tar.to_str().expect("text"), "it"]);
    std::fs::create_dir(&tree).expect("made");
    let script =
        "tar -C \"$2\" -xf \"$1\" && /sbin/mke2fs -q -t ext4 -O ^has_journal -d \"$2\" \"$3\" 192m";
    let made = Command::new("sh")
        .args(["-c", script, "sh"])
        .args([&tar, &tree, &disk])
        .status();
    assert!(made.expect("sh").success());
    File::open(disk).expect("opens")
}

#[test]
fn each_way_of_a_root_image_has_its_price() {
    world();
    let (shared, apart) = (template(DEFAULT_DOMAIN), template("apart"));
    for (name, image, command) in [
        ("busybox", busybox_rootfs(), TRUE),
        (python(), python_rootfs(), PYTHON),
    ] {
        let dir = tempfile::tempdir().expect("a directory");
        let ext4 = ext4(name, dir.path());
        let mapped = cost(&shared, &image, command, false);
        assert!(mapped.mapped.is_some());
        print(&format!("{name}, EROFS mapped (virtio-pmem, DAX)"), &mapped);
        let read = cost(&apart, &image, command, false);
        assert!(read.mapped.is_none());
        print(&format!("{name}, EROFS read (virtio-blk)"), &read);
        let read = cost(&apart, &ext4, command, false);
        print(&format!("{name}, ext4 read (virtio-blk)"), &read);
    }
}

/// What a layer of its own for each of an image's would cost.
#[test]
fn one_more_layer_has_its_price() {
    world();
    let (shared, image) = (template(DEFAULT_DOMAIN), busybox_rootfs());
    print("a tmpfs more", &cost(&shared, &image, NONE_MORE, true));
    print("an EROFS more", &cost(&shared, &image, ONE_MORE, true));
}
