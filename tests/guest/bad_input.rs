//! What cannot work is refused: one line, docker's exit status, and nothing
//! half-made stays.

use crate::support::{Call, listing, own_root, variable, world};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

#[test]
fn commands_that_cannot_run_end_with_dockers_status() {
    let own = own_root();
    let root = own.path();
    let before = listing(root);
    for (status, part, command) in [
        (127, "nosuch", &["nosuch"][..]),
        (127, "/no/such", &["/no/such", "word"]),
        (126, "/etc/passwd", &["/etc/passwd"]),
        (126, "/etc", &["/etc"]),
    ] {
        let line = Call::run_in(root, &[&["busybox"], command].concat()).refused(status);
        assert!(line.contains(part), "{line}");
    }
    let users = ["-u", "nobody-of-that-name", "busybox", "true"];
    let line = Call::run_in(root, &users).refused(125);
    assert!(line.contains("nobody-of-that-name"), "{line}");
    assert_eq!(listing(root), before);
}

#[test]
fn a_file_that_is_no_program_is_not_executable() {
    let dir = tempfile::tempdir().expect("a directory");
    let program = dir.path().join("program");
    fs::write(&program, "neither ELF nor a script").expect("writes");
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).expect("chmod");
    let line = Call::run(&["--rootfs", text(dir.path()), "/program"]).refused(126);
    assert!(line.contains("/program"), "{line}");
}

#[test]
fn what_is_not_there_or_out_of_bounds_is_refused_before_anything_is_made() {
    let own = own_root();
    let root = own.path();
    let before = listing(root);
    for (part, words) in [
        ("no-such-image", &["no-such-image", "true"][..]),
        ("IMAGE", &[]),
        ("no option --no-such", &["--no-such", "busybox", "true"]),
        ("/no/such/dir", &["--rootfs", "/no/such/dir", "true"]),
        ("6MB", &["--memory", "1m", "busybox", "true"]),
        ("more than", &["--memory", "4096g", "busybox", "true"]),
        ("range of CPUs", &["--cpus", "0.001", "busybox", "true"]),
        ("range of CPUs", &["--cpus", "255", "busybox", "true"]),
        (
            "no template",
            &["--template", "none-such", "busybox", "true"],
        ),
        ("template name", &["--template", "../x", "busybox", "true"]),
        (
            "exclude",
            &["--read-only", "--writable-memory", "1m", "busybox", "true"],
        ),
        ("not a terminal", &["-it", "busybox", "true"]),
        ("host", &["--hostname", "two words", "busybox", "true"]),
    ] {
        let line = Call::run_in(root, words).refused(125);
        assert!(line.contains(part), "{part}: {line}");
    }
    for name in ["../x", "", ".hidden", "a/b", "default-256m-1c"] {
        Call::template_build_in(root, &["--name", name]).refused(125);
    }
    assert_eq!(listing(root), before);
}

#[test]
fn a_kernel_or_agent_that_is_none_is_refused() {
    let own = own_root();
    let root = own.path();
    let before = listing(root);
    let dir = tempfile::tempdir().expect("a directory");
    let vmlinux = fs::read(variable("VM_RUN_GUEST").join("vmlinux")).expect("reads");
    let truncated = dir.path().join("truncated");
    fs::write(&truncated, &vmlinux[..vmlinux.len() / 2]).expect("writes");
    let large = dir.path().join("large");
    File::create(&large)
        .and_then(|f| f.set_len(70 << 20))
        .expect("makes a file");
    for options in [
        &["--kernel", "/etc/passwd"][..],
        &["--kernel", "/no/such/kernel"],
        &["--kernel", text(&truncated)],
        &["--agent", "/no/such/agent"],
        &["--memory", "64m", "--agent", text(&large)],
    ] {
        let line = Call::template_build_in(root, &[&["--name", "bad"], options].concat());
        let line = line.refused(125);
        let file = options.last().expect("a file").to_string();
        assert!(line.contains(&file), "{line}");
    }
    assert_eq!(listing(root), before);
}

/// Each spoils a template, and gives a part of the line it must cause.
#[test]
fn a_template_that_is_not_ours_is_refused_and_the_default_one_is_rebuilt() {
    type Spoil = fn(&Path);
    let cases: [(&str, Spoil); 5] = [
        ("format 99", |t| edit(t, &format_now(), "\"format\": 99")),
        ("rebuild it here", |t| {
            edit(t, "\"family\": ", "\"family\": 1")
        }),
        ("spoilt", |t| edit(t, "{", "[")),
        ("state is not what was written", |t| {
            let mut state = fs::read(t.join("state")).expect("reads");
            state[100] ^= 1;
            fs::write(t.join("state"), state).expect("writes");
        }),
        ("cut short", |t| {
            fs::remove_file(t.join("memory")).expect("removes");
            fs::write(t.join("memory"), [0; 4096]).expect("writes");
        }),
    ];
    for (part, spoil) in cases {
        let own = own_root();
        let templates = own.path().join("templates");
        fs::rename(templates.join("default-256m-1c"), templates.join("t")).expect("renames");
        spoil(&templates.join("t"));
        let before = listing(own.path());
        let line = Call::run_in(own.path(), &["--template", "t", "busybox", "true"]).refused(125);
        assert!(line.contains(part), "{line}");
        assert_eq!(listing(own.path()), before);
    }
    let own = own_root();
    edit(
        &own.path().join("templates/default-256m-1c"),
        &format_now(),
        "\"format\": 0",
    );
    let ran = Call::run_in(own.path(), &["busybox", "echo", "rebuilt"]).end();
    assert_eq!((ran.status, ran.out()), (0, "rebuilt\n".into()), "{ran}");
    assert!(
        ran.err().contains("format 0") && ran.err().contains("rebuilding"),
        "{ran}"
    );
}

/// As a manifest of today has it.
fn format_now() -> String {
    format!("\"format\": {}", fork::FORMAT)
}

fn edit(template: &Path, from: &str, to: &str) {
    let path = template.join("manifest.json");
    let text = fs::read_to_string(&path).expect("reads");
    assert!(text.contains(from), "{text}");
    fs::write(&path, text.replacen(from, to, 1)).expect("writes");
}

#[test]
fn a_full_disk_stops_the_building_of_a_template_and_leaves_nothing() {
    let disk = SmallDisk::new(12);
    let line = Call::template_build_in(disk.path(), &["--name", "large"]).refused(125);
    assert!(line.contains("No space left on device"), "{line}");
    let left = listing(disk.path());
    assert_eq!(left, [disk.path().join("templates")].into(), "{line}");
}

#[test]
fn a_full_disk_is_an_error_in_the_container_and_nothing_worse() {
    let disk = SmallDisk::new(24);
    for folder in ["images", "templates"] {
        symlink(world().root.join(folder), disk.path().join(folder)).expect("links");
    }
    let script = "dd if=/dev/urandom of=/large bs=1M count=48 conv=fsync 2>/dev/null || echo failed
        echo alive; head -c 4 /proc/self/comm; exit 5";
    let ran = Call::run_in(disk.path(), &["busybox", "sh", "-c", script]).end();
    assert_eq!(ran.status, 5, "{ran}");
    assert_eq!(ran.out(), "failed\nalive\nhead", "{ran}");
    let left = fs::read_dir(disk.path()).expect("lists").flatten();
    let left: Vec<_> = left
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| !name.starts_with("containers") && !name.starts_with("networks"))
        .collect();
    assert_eq!(left.len(), 2, "{left:?}");
}

#[test]
fn a_host_without_a_usable_kvm_is_told_what_to_do() {
    let dir = tempfile::tempdir().expect("a directory");
    let nodes = |script: &str| {
        let script = format!("mount -t tmpfs none /dev && {script} && exec \"$0\" \"$@\"");
        let call = Call::template_build_in(dir.path(), &["--name", "none"]);
        call.under("unshare", &["-m", "sh", "-c", &script])
            .refused(125)
    };
    let line = nodes("true");
    assert!(line.contains("there is no /dev/kvm"), "{line}");
    // The node of a module that is not loaded.
    let line = nodes("mknod /dev/kvm c 240 0");
    assert!(line.contains("there is no /dev/kvm"), "{line}");
    let line = nodes("mknod /dev/kvm c 1 3");
    assert!(line.contains("/dev/kvm"), "{line}");
    let call = Call::template_build_in(dir.path(), &["--name", "none"]);
    let powerless = ["--bounding-set", "-dac_override,-dac_read_search"];
    let script = "mount -t tmpfs none /dev && mknod -m 0 /dev/kvm c 10 232 && exec \"$0\" \"$@\"";
    let line = call
        .under("setpriv", &powerless)
        .under("unshare", &["-m", "sh", "-c", script])
        .refused(125);
    assert!(line.contains("no permission to open /dev/kvm"), "{line}");
    assert_eq!(listing(dir.path()), [dir.path().join("templates")].into());
}

/// A file system of its own that is soon full. Needs to be root.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn new(mebibytes: u32) -> Self {
        let path = tempfile::tempdir().expect("a directory").keep();
        let size = std::ffi::CString::new(format!("size={mebibytes}m")).expect("text");
        mount(
            "none",
            &path,
            "tmpfs",
            MountFlags::empty(),
            Some(size.as_c_str()),
        )
        .expect("root can mount");
        Self(path)
    }

    fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        unmount(&self.0, UnmountFlags::DETACH).expect("unmounts");
        fs::remove_dir(&self.0).expect("removes");
    }
}

fn text(path: &Path) -> &str {
    path.to_str().expect("text")
}
