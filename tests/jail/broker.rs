//! The jail of a broker, looked at from outside, and its work inside: requests that are
//! put together by hand, as a guest's kernel would.

use crate::support::*;
use fork::Volume;
use fork::worker::{Jail, Limits, Workers};
use rustix::fd::OwnedFd;
use rustix::fs::{Mode, OFlags, open};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use rustix::net::{RecvFlags, SendFlags, recv, send};
use rustix::process::Pid;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use tempfile::TempDir;

const ROOT: u64 = 1;
const EROFS: i32 = 30;
const EPERM: i32 = 1;
const ENOENT: i32 = 2;

fn volume(path: &Path, read_only: bool) -> Volume {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    Volume {
        source: open(path, flags, Mode::empty()).expect("opens"),
        read_only,
    }
}

struct Guest {
    socket: OwnedFd,
    pid: Pid,
    uid: u32,
}

impl Guest {
    /// Of directories `rw` and `ro`, and a file.
    fn of(workers: &Workers, dir: &Path) -> Self {
        fs::create_dir_all(dir.join("rw")).expect("made");
        fs::create_dir_all(dir.join("ro/below")).expect("made");
        fs::write(dir.join("ro/file"), "read me").expect("written");
        fs::write(dir.join("file"), "a file").expect("written");
        let volumes = [
            volume(&dir.join("rw"), false),
            volume(&dir.join("ro"), true),
            volume(&dir.join("file"), true),
        ];
        let (socket, pid) = workers.serve(&volumes).expect("a broker");
        let mut guest = Self {
            socket,
            pid,
            uid: 0,
        };
        let hello = [7_u32, 38, 0, 0].map(u32::to_le_bytes).concat();
        guest.ask(26, 0, &hello).expect("a session");
        guest
    }

    fn ask(&mut self, opcode: u32, node: u64, body: &[u8]) -> Result<Vec<u8>, i32> {
        let mut packet = (40 + body.len() as u32).to_le_bytes().to_vec();
        packet.extend(opcode.to_le_bytes());
        packet.extend(9_u64.to_le_bytes());
        packet.extend(node.to_le_bytes());
        packet.extend([self.uid, self.uid, 0, 0].map(u32::to_le_bytes).concat());
        packet.extend(body);
        send(&self.socket, &packet, SendFlags::NOSIGNAL).expect("sent");
        let mut answer = vec![0; 1 << 18];
        let (_, len) = recv(&self.socket, &mut answer[..], RecvFlags::empty()).expect("answers");
        assert!(len >= 16, "the broker has ended");
        let error = i32::from_le_bytes(answer[4..8].try_into().expect("four"));
        match error {
            0 => Ok(answer[16..len].to_vec()),
            error => Err(-error),
        }
    }

    fn lookup(&mut self, parent: u64, name: &str) -> Result<u64, i32> {
        let entry = self.ask(1, parent, &[name.as_bytes(), b"\0"].concat())?;
        Ok(u64::from_le_bytes(entry[..8].try_into().expect("eight")))
    }

    fn create(&mut self, parent: u64, name: &str) -> Result<(), i32> {
        let mut body = [0o102_u32, 0o644, 0, 0].map(u32::to_le_bytes).concat();
        body.extend([name.as_bytes(), b"\0"].concat());
        self.ask(35, parent, &body).map(drop)
    }

    fn make_node(&mut self, parent: u64, mode: u32, name: &str) -> Result<(), i32> {
        let mut body = [mode, 0x103, 0, 0].map(u32::to_le_bytes).concat();
        body.extend([name.as_bytes(), b"\0"].concat());
        self.ask(8, parent, &body).map(drop)
    }
}

fn workers() -> (Workers, TempDir) {
    let dir = tempfile::tempdir_in("/dev/shm").expect("a directory");
    (start(Jail::On(Limits::default())), dir)
}

pub fn has_its_volumes_and_no_more() {
    let careless = leaked_descriptor();
    let (workers, dir) = workers();
    let mut guest = Guest::of(&workers, dir.path());
    drop(careless);
    let pid = guest.pid;
    for namespace in ["mnt", "pid", "net", "ipc", "uts", "cgroup"] {
        let of = |pid: &str| link(&format!("/proc/{pid}/ns/{namespace}"));
        assert_ne!(of(&pid.to_string()), of("self"), "{namespace}");
    }
    // CHOWN, DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER, FSETID, SETGID, SETUID and SETFCAP.
    let over_files = "00000000800000df";
    for (field, value) in [
        ("Groups", ""),
        ("CapInh", "0000000000000000"),
        ("CapPrm", over_files),
        ("CapEff", over_files),
        ("CapBnd", over_files),
        ("CapAmb", "0000000000000000"),
        ("NoNewPrivs", "1"),
        ("Seccomp", "2"),
        ("Threads", "1"),
    ] {
        assert_eq!(status(pid, field), value, "{field}");
    }
    let mut names: Vec<_> = fs::read_dir(format!("/proc/{pid}/root"))
        .expect("lists")
        .map(|entry| entry.expect("an entry").file_name())
        .collect();
    names.sort();
    assert_eq!(names, ["0", "1", "2"]);
    let mounts = fs::read_to_string(format!("/proc/{pid}/mounts")).expect("reads");
    assert_eq!(mounts.lines().count(), 4, "{mounts}");
    let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo")).expect("reads");
    for tie in ["shared:", "master:"] {
        assert!(!mounts.contains(tie), "{mounts}");
    }
    assert!(descriptors(pid).len() <= 6, "{:?}", descriptors(pid));
    // Nothing leads out of the root, and nothing is made in it.
    assert_eq!(guest.lookup(ROOT, "3"), Err(ENOENT));
    assert_eq!(guest.lookup(ROOT, "proc"), Err(ENOENT));
    assert_eq!(guest.create(ROOT, "made"), Err(EROFS));
    drop(guest);
    assert_eq!(settled(&workers).violations, 0);
}

pub fn serves_owners_and_keeps_read_only() {
    let (workers, dir) = workers();
    // What is mounted below a volume is a part of it, and as read-only.
    let below = dir.path().join("ro/below");
    fs::create_dir_all(&below).expect("made");
    mount("t", &below, "tmpfs", MountFlags::NOSUID, c"").expect("mounted");
    fs::write(below.join("deep"), "deep").expect("written");
    let mut guest = Guest::of(&workers, dir.path());
    unmount(&below, UnmountFlags::DETACH).expect("unmounted");
    let rw = guest.lookup(ROOT, "0").expect("there");
    for uid in [0, 1000] {
        guest.uid = uid;
        guest.create(rw, &format!("by-{uid}")).expect("made");
        let made = fs::metadata(dir.path().join(format!("rw/by-{uid}"))).expect("is there");
        assert_eq!(
            (made.uid(), made.gid(), made.mode() & 0o777),
            (uid, uid, 0o644)
        );
    }
    guest.uid = 0;
    assert_eq!(guest.make_node(rw, 0o020_666, "null"), Err(EPERM));
    guest.make_node(rw, 0o010_666, "fifo").expect("made");
    // Every capability is there after it has acted as somebody else.
    fs::create_dir(dir.path().join("rw/closed")).expect("made");
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o000);
    fs::set_permissions(dir.path().join("rw/closed"), mode).expect("set");
    let closed = guest.lookup(rw, "closed").expect("there");
    guest.uid = 1000;
    guest.create(closed, "in").expect("the guest decides");
    let ro = guest.lookup(ROOT, "1").expect("there");
    assert_eq!(guest.create(ro, "x"), Err(EROFS));
    let deep = guest.lookup(ro, "below").expect("there");
    guest.lookup(deep, "deep").expect("there");
    assert_eq!(guest.create(deep, "x"), Err(EROFS));
    for (parent, name) in [(ro, "file"), (ROOT, "2")] {
        let file = guest.lookup(parent, name).expect("there");
        let open = |flags: u32| [flags, 0].map(u32::to_le_bytes).concat();
        guest.ask(14, file, &open(0)).expect("opened");
        assert_eq!(guest.ask(14, file, &open(1)), Err(EROFS));
        assert_eq!(guest.ask(4, file, &chmod()), Err(EROFS));
    }
    drop(guest);
    assert_eq!(settled(&workers).violations, 0);
}

/// SETATTR of a mode.
fn chmod() -> Vec<u8> {
    let mut body = vec![0; 88];
    body[0] = 1;
    body
}

pub fn ends_with_its_guest() {
    let (workers, dir) = workers();
    let guest = Guest::of(&workers, dir.path());
    let pid = guest.pid;
    assert!(alive(pid));
    drop(guest);
    wait_until("the broker has ended", || !alive(pid));
    let guest = Guest::of(&workers, dir.path());
    drop(workers);
    assert!(!alive(guest.pid));
    let refused = start(Jail::Off).serve(&[volume(dir.path(), false)]);
    let line = refused.expect_err("no jail").to_string();
    assert!(line.contains("leave out --no-jail"), "{line}");
}
