//! What the stories in the other files are told with: one state directory for
//! all, `vm-run` as a process, and the library's children.

use fork::{
    BootSpec, Child, ContainerSpec, ForkSpec, Guest, Host, Isolation, ProcessSpec, Stream,
    Template, Writable,
};
use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tempfile::TempDir;

#[path = "support/process.rs"]
mod process;
#[path = "support/python.rs"]
mod python;
#[path = "support/wire.rs"]
pub mod wire;

pub use process::{Call, Ran, Running};
pub use python::Python;

/// The longest that anything here may take, on the slowest host.
pub const PATIENCE: Duration = Duration::from_secs(150);

/// What `cargo xtask test` tells in the environment.
pub fn variable(name: &str) -> PathBuf {
    std::env::var_os(name)
        .unwrap_or_else(|| panic!("{name} is not set: run `cargo xtask test`"))
        .into()
}

/// How many children of one template are looked at for what they share; `cargo xtask soak`
/// asks for more than `few`.
pub fn children(few: usize) -> usize {
    let asked = std::env::var("VM_RUN_TEST_CHILDREN").ok();
    asked.map_or(few, |n| {
        n.parse().expect("VM_RUN_TEST_CHILDREN is a number")
    })
}

/// This host, once it is known to run Linux.
pub fn host() -> Arc<Host> {
    static HOST: OnceLock<Arc<Host>> = OnceLock::new();
    let open = || {
        let host = Host::open().expect("a KVM");
        match host.isolation().expect("the probe of this KVM answers") {
            Isolation::Hardware => Arc::new(host),
            Isolation::SyscallStaysInUserMode => {
                panic!("this KVM cannot run Linux: run `cargo xtask test`")
            }
        }
    };
    Arc::clone(HOST.get_or_init(open))
}

/// The state directory that the tests share: with busybox loaded, and the default
/// template built.
pub struct World {
    pub root: PathBuf,
    /// The very first run, which built the template.
    pub first_run: Ran,
}

/// Made by whichever test is first.
pub fn world() -> &'static World {
    static WORLD: OnceLock<World> = OnceLock::new();
    WORLD.get_or_init(|| {
        host();
        let root = process_directory();
        image_load(&root, &variable("VM_RUN_TEST_BUSYBOX"));
        let first_run = Call::run_in(&root, &["busybox", "echo", "first"]).end();
        World { root, first_run }
    })
}

/// Loads the image with python3 into the shared state directory, once: it is the
/// largest, and not every test needs it.
pub fn python() -> &'static str {
    static LOADED: OnceLock<()> = OnceLock::new();
    LOADED.get_or_init(|| image_load(&world().root, &variable("VM_RUN_TEST_PYTHON")));
    "debian-python:bookworm"
}

fn image_load(root: &Path, tar: &Path) {
    let ran = Call::vm_run_in(root, &[OsStr::new("image"), "load".as_ref(), tar.as_ref()]).end();
    assert_eq!(ran.status, 0, "{ran}");
}

/// A directory that is removed by the next run of the tests, if not by this one:
/// what is in a static is never dropped.
fn process_directory() -> PathBuf {
    const PREFIX: &str = "vm-run-guest-tests-";
    let parent = std::env::temp_dir();
    for entry in fs::read_dir(&parent).expect("lists").flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if let Some(pid) = name.strip_prefix(PREFIX)
            && !Path::new("/proc").join(pid).exists()
        {
            fs::remove_dir_all(entry.path()).expect("removes what an earlier run left");
        }
    }
    let own = parent.join(format!("{PREFIX}{}", std::process::id()));
    fs::create_dir(&own).expect("makes a directory");
    own
}

/// A state directory of the test's own, with the images and templates of the
/// shared one: links, but for the files that a test may edit.
pub fn own_root() -> TempDir {
    let own = tempfile::tempdir().expect("a directory");
    link_tree(&world().root, own.path());
    own
}

fn link_tree(from: &Path, to: &Path) {
    for entry in fs::read_dir(from).expect("lists") {
        let entry = entry.expect("lists");
        let target = to.join(entry.file_name());
        // Networks are on the host, where two directories cannot have the same.
        if entry.file_name().to_string_lossy().starts_with("networks") {
            continue;
        }
        if entry.file_type().expect("has a type").is_dir() {
            fs::create_dir(&target).expect("makes a directory");
            link_tree(&entry.path(), &target);
        } else if entry.metadata().expect("stat").len() < 1 << 20 {
            fs::copy(entry.path(), target).expect("copies");
        } else {
            fs::hard_link(entry.path(), target).expect("links");
        }
    }
}

/// Every path below a directory, but for what is made at first need and holds nothing
/// of anybody's: locks, the databases of containers and networks, and their empty directories.
pub fn listing(dir: &Path) -> BTreeSet<PathBuf> {
    let mut all = BTreeSet::new();
    let mut left = vec![dir.to_path_buf()];
    while let Some(dir) = left.pop() {
        for entry in fs::read_dir(dir).expect("lists") {
            let entry = entry.expect("lists");
            if entry.file_type().expect("has a type").is_dir() {
                left.push(entry.path());
            }
            let name = entry.file_name().to_string_lossy().into_owned();
            let is_made_at_need = name.ends_with(".lock")
                || name.starts_with("containers")
                || name.starts_with("networks");
            if !is_made_at_need {
                all.insert(entry.path());
            }
        }
    }
    all
}

/// The guest that all boot from.
pub fn guest() -> Guest {
    Guest::in_dir(&variable("VM_RUN_GUEST")).expect("VM_RUN_GUEST holds vmlinux and initramfs")
}

/// Boots a parent and freezes it in memory.
pub fn boot(memory_mib: u64, vcpus: u8) -> Template {
    let spec = BootSpec {
        memory: memory_mib << 20,
        vcpus,
        guest: Some(guest()),
        timeout: boot_timeout(),
        ..BootSpec::default()
    };
    Template::boot(host(), &spec).expect("boots")
}

/// How long a guest may take to boot here.
pub fn boot_timeout() -> Duration {
    let seconds = variable("VM_RUN_BOOT_TIMEOUT");
    let seconds = seconds.to_str().and_then(|s| s.parse().ok());
    Duration::from_secs(seconds.expect("VM_RUN_BOOT_TIMEOUT is a number"))
}

/// The root file system of the busybox image, which the shared state directory
/// has as a file.
pub fn busybox_rootfs() -> File {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    File::open(PATH.get_or_init(|| rootfs("busybox"))).expect("opens")
}

/// The same of the image with python3.
pub fn python_rootfs() -> File {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    File::open(PATH.get_or_init(|| rootfs(python()))).expect("opens")
}

/// An image of a shell, ssh-keygen, and the programs that `cargo xtask test` has compiled,
/// loaded into the shared state directory once.
pub fn programs() -> &'static str {
    const NAME: &str = "programs:latest";
    static LOADED: OnceLock<()> = OnceLock::new();
    LOADED.get_or_init(|| {
        let scratch = tempfile::tempdir().expect("a directory");
        let script = "set -e
            mkdir -p tree/bin tree/etc/ssh
            cp $(command -v busybox) \"$1\"/* tree/bin
            for name in sh cat rm sleep; do ln -s busybox tree/bin/$name; done
            echo root:x:0:0:root:/:/bin/sh > tree/etc/passwd
            echo none > tree/etc/machine-id
            echo the image\\'s > tree/etc/ssh/ssh_host_rsa_key
            keygen=$(command -v ssh-keygen)
            for file in $keygen $(ldd $keygen | grep -o '/[^ ]*'); do
                mkdir -p tree${file%/*}
                cp -L $file tree$file
            done
            tar -cf programs.tar -C tree .";
        let made = Command::new("sh")
            .args(["-c", script, "sh"])
            .arg(variable("VM_RUN_TEST_PROGRAMS"))
            .current_dir(scratch.path())
            .status();
        assert!(made.expect("sh").success());
        let tar = scratch.path().join("programs.tar");
        let words = [
            OsStr::new("image"),
            "import".as_ref(),
            tar.as_ref(),
            NAME.as_ref(),
        ];
        let ran = Call::vm_run_in(&world().root, &words).end();
        assert_eq!(ran.status, 0, "{ran}");
    });
    NAME
}

/// The root file system of that image.
pub fn programs_rootfs() -> File {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    File::open(PATH.get_or_init(|| rootfs(programs()))).expect("opens")
}

fn rootfs(name: &str) -> PathBuf {
    let root = &world().root;
    let images = Call::vm_run_in(root, &["image", "ls", "--json"]).end();
    let images: serde_json::Value = serde_json::from_slice(&images.stdout).expect("JSON");
    let size = images.as_array().into_iter().flatten().find_map(|image| {
        let named = image["names"][0].as_str()?.starts_with(name);
        named.then(|| image["size"].as_u64()).flatten()
    });
    let size = size.expect("it is listed");
    listing(&root.join("images/rootfs"))
        .into_iter()
        .find(|path| path.metadata().is_ok_and(|meta| meta.len() == size))
        .expect("it has a root file system")
}

/// Forks a child that can run busybox.
pub fn fork_busybox(template: &Template, hostname: &str) -> Child {
    let disks = fork::Disks {
        root: Some(busybox_rootfs()),
        writable: None,
    };
    fork_with(template, hostname, disks)
}

/// Forks a child with these disks.
pub fn fork_with(template: &Template, hostname: &str, disks: fork::Disks) -> Child {
    let hostname = hostname.into();
    template
        .fork(ForkSpec {
            hostname,
            disks,
            ..ForkSpec::default()
        })
        .expect("forks")
}

/// Starts a shell in a child; its output is to be read.
pub fn start_shell(child: &mut Child, script: &str) -> std::os::unix::net::UnixStream {
    let process = ProcessSpec {
        args: ["sh", "-c", script].map(String::from).into(),
        env: vec!["PATH=/bin:/sbin:/usr/bin:/usr/sbin".into()],
        streams: vec![Stream::Stdout],
        ..ProcessSpec::default()
    };
    let limit = 64 << 20;
    let container = ContainerSpec {
        writable: Writable::Memory { limit },
        ..ContainerSpec::default()
    };
    let process = child.start(container, process).expect("starts");
    process.stdout.expect("was asked for")
}

/// Runs a shell in a child to its end; returns what it printed.
pub fn shell(child: &mut Child, script: &str) -> String {
    let mut stdout = start_shell(child, script);
    stdout.set_read_timeout(Some(PATIENCE)).expect("set");
    let mut text = String::new();
    stdout.read_to_string(&mut text).expect("reads");
    assert_eq!(child.wait().expect("ends").code(), 0, "{script}: {text}");
    text
}

/// The value after `name=` in a text of such lines.
pub fn field<'a>(text: &'a str, name: &str) -> &'a str {
    text.lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
        .unwrap_or_else(|| panic!("no {name}= in {text:?}"))
}
