//! Templates, and machines of several shapes.

use crate::support::{Call, World, boot, field, fork_busybox, python, shell, variable, world};
use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::PathBuf;

const DEFAULT: &str = "templates/default-256m-1c";

#[test]
fn the_first_run_builds_the_template_and_the_next_boot_nothing() {
    let World { root, first_run } = world();
    assert_eq!(
        (first_run.status, first_run.out()),
        (0, "first\n".into()),
        "{first_run}"
    );
    let manifest = root.join(DEFAULT).join("manifest.json");
    let inode = || fs::metadata(&manifest).expect("stat").ino();
    let before = inode();
    // A guest that cannot boot, under the digest of the one that did.
    let guest = tempfile::tempdir().expect("a directory");
    let at = |name: &str| guest.path().join(name);
    fs::write(at("vmlinux"), "no kernel").expect("writes");
    fs::write(at("initramfs"), "no agent").expect("writes");
    symlink(
        variable("VM_RUN_GUEST").join("writable.blocks"),
        at("writable.blocks"),
    )
    .expect("links");
    let json: serde_json::Value =
        serde_json::from_slice(&fs::read(&manifest).expect("reads")).expect("JSON");
    fs::write(at("digest"), json["guest_digest"].as_str().expect("text")).expect("writes");
    let second = Call::run(&["busybox", "echo", "second"]).env("VM_RUN_GUEST", guest.path());
    let second = second.end();
    assert_eq!(
        (second.status, second.out()),
        (0, "second\n".into()),
        "{second}"
    );
    assert_eq!(inode(), before, "the template is the one that was there");
}

#[test]
fn a_debian_image_runs_python_with_its_extension_modules() {
    let script = "import ssl, sqlite3, hashlib, os
db = sqlite3.connect('/var/tmp/x.db'); db.execute('create table t (n)')
db.executemany('insert into t values (?)', [(n,) for n in range(100)]); db.commit()
print(ssl.OPENSSL_VERSION.split()[0], db.execute('select sum(n) from t').fetchone()[0])
print(hashlib.sha256(b'abc').hexdigest()[:8], os.uname().sysname, os.getpid())";
    let ran = Call::run(&[python(), "python3", "-c", script]).end();
    assert_eq!((ran.status, ran.err()), (0, String::new()), "{ran}");
    assert_eq!(ran.out(), "OpenSSL 4950\nba7816bf Linux 1\n");
}

#[test]
fn a_root_file_system_may_be_a_directory_or_a_file() {
    let dir = tempfile::tempdir().expect("a directory");
    let rootfs = busybox_tree(dir.path(), "from a directory");
    let rootfs = rootfs.to_str().expect("text");
    let command = ["--rootfs", rootfs, "/bin/busybox", "cat", "/name"];
    let ran = Call::run(&command).end();
    assert_eq!(
        (ran.status, ran.out()),
        (0, "from a directory\n".into()),
        "{ran}"
    );

    let file = dir.path().join("ext4");
    let size = fs::File::create(&file).and_then(|f| f.set_len(16 << 20));
    size.expect("makes a file");
    let file = file.to_str().expect("text");
    let made = Call::program("/sbin/mke2fs").args(&["-q", "-t", "ext4", "-d", rootfs, file]);
    let made = made.end();
    assert_eq!(made.status, 0, "{made}");
    let ran = Call::run(&["--rootfs", file, "/bin/busybox", "cat", "/name"]).end();
    assert_eq!(
        (ran.status, ran.out()),
        (0, "from a directory\n".into()),
        "{ran}"
    );
}

/// A root file system with this machine's static busybox and a name.
pub fn busybox_tree(parent: &std::path::Path, name: &str) -> PathBuf {
    let root = parent.join("rootfs");
    for folder in ["bin", "tmp"] {
        fs::create_dir_all(root.join(folder)).expect("makes a directory");
    }
    let busybox = ["/bin/busybox", "/usr/bin/busybox"];
    let busybox = busybox.iter().find(|path| fs::metadata(path).is_ok());
    fs::copy(
        busybox.expect("busybox-static is installed"),
        root.join("bin/busybox"),
    )
    .expect("copies");
    symlink("busybox", root.join("bin/sh")).expect("links");
    fs::write(root.join("name"), format!("{name}\n")).expect("writes");
    root
}

#[test]
fn children_of_a_template_with_two_cpus_have_two_that_work() {
    let template = boot(128, 2);
    let script = "echo online=$(cat /sys/devices/system/cpu/online) nproc=$(nproc)
        work() { for n in 1 2 3 4 5; do sha256sum /bin/busybox; done | sort -u | wc -l; }
        work > /tmp/a & taskset 2 sh -c 'grep Cpus_allowed_list /proc/self/status' > /tmp/b
        work > /tmp/c; wait; echo $(cat /tmp/a /tmp/b /tmp/c)
        for cpu in 1 2; do
            echo cpu$cpu=$(taskset $cpu head -c 16 /dev/urandom | od -An -v -tx1 | tr -d ' \\n')
        done
        grep '^cpu[01]' /proc/stat | while read -r cpu user nice system rest; do
            echo $cpu-worked=$((user + system > 0))
        done";
    let mut children = [fork_busybox(&template, "a"), fork_busybox(&template, "b")];
    let answers = children.each_mut().map(|child| shell(child, script));
    let mut random = HashSet::new();
    for answer in &answers {
        assert_eq!(field(answer, "online"), "0-1 nproc=2");
        assert!(answer.contains("\n1 Cpus_allowed_list: 1 1\n"), "{answer}");
        assert_eq!(field(answer, "cpu0-worked"), "1");
        assert_eq!(field(answer, "cpu1-worked"), "1");
        random.extend([field(answer, "cpu1"), field(answer, "cpu2")]);
    }
    assert_eq!(
        random.len(),
        4,
        "each CPU of each child has random bytes of its own"
    );
}

/// The kernel fills the zone above 4 GiB first: what a child writes lands there.
#[test]
fn a_guest_of_four_gibibytes_uses_the_memory_above_the_hole() {
    let template = boot(4096, 1);
    let script = "echo total=$(grep MemTotal /proc/meminfo | tr -cd 0-9)
        high() { echo $1=$(grep -A1 'zone *Normal' /proc/zoneinfo | tr -cd 0-9' ' | tr -s ' ' | cut -d' ' -f3); }
        high before; head -c 25165824 /dev/urandom > /dev/shm/x; high after
        sum=$(sha256sum < /dev/shm/x); cp /dev/shm/x /tmp/y
        [ \"$sum\" = \"$(sha256sum < /tmp/y)\" ] && echo sum=$sum";
    let mut children = [fork_busybox(&template, "a"), fork_busybox(&template, "b")];
    let answers = children.each_mut().map(|child| shell(child, script));
    for answer in &answers {
        let number = |name| field(answer, name).parse::<u64>().expect("a number");
        assert!(number("total") > 3800 << 10, "{answer}");
        let used = number("before").saturating_sub(number("after"));
        assert!(used * 4096 > 20 << 20, "{answer}");
    }
    assert_ne!(field(&answers[0], "sum"), field(&answers[1], "sum"));
}
