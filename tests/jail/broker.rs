//! The jail of a broker, looked at from outside, and its work inside: requests that are
//! put together by hand, as a guest's kernel would.

use crate::support::*;
use devices::virtio::fs::Fs;
use fork::Volume;
use fork::worker::Claim;
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
const EBADF: i32 = 9;

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

    /// Its node, and a handle for reading and writing.
    fn open(&mut self, parent: u64, name: &str) -> Result<(u64, u64), i32> {
        let node = self.lookup(parent, name)?;
        let answer = self.ask(14, node, &[2_u32, 0].map(u32::to_le_bytes).concat())?;
        Ok((node, number(&answer)))
    }

    fn open_directory(&mut self, node: u64) -> Result<u64, i32> {
        Ok(number(&self.ask(27, node, &[0; 8])?))
    }

    /// The first entries.
    fn list(&mut self, handle: u64) -> Result<Vec<u8>, i32> {
        self.ask(28, 0, &read_in(handle, 0))
    }

    fn read(&mut self, handle: u64, offset: u64) -> Result<Vec<u8>, i32> {
        self.ask(15, 0, &read_in(handle, offset))
    }

    fn write(&mut self, handle: u64, offset: u64, data: &[u8]) -> Result<(), i32> {
        let mut body = [handle, offset].map(u64::to_le_bytes).concat();
        body.extend((data.len() as u32).to_le_bytes());
        body.extend([0; 20]);
        body.extend(data);
        self.ask(16, 0, &body).map(drop)
    }

    fn make_node(&mut self, parent: u64, mode: u32, name: &str) -> Result<(), i32> {
        let mut body = [mode, 0x103, 0, 0].map(u32::to_le_bytes).concat();
        body.extend([name.as_bytes(), b"\0"].concat());
        self.ask(8, parent, &body).map(drop)
    }
}

/// The number at the beginning of an answer.
fn number(answer: &[u8]) -> u64 {
    u64::from_le_bytes(answer[..8].try_into().expect("eight"))
}

/// `struct fuse_read_in`.
fn read_in(handle: u64, offset: u64) -> Vec<u8> {
    let mut body = [handle, offset].map(u64::to_le_bytes).concat();
    body.extend(4096_u32.to_le_bytes());
    body.extend([0; 20]);
    body
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

/// What a broker keeps of a guest, for a claim on it.
fn claim(guest: &Guest) -> Claim {
    let (claim, theirs) = Claim::new().expect("a claim");
    let mut device = Fs::default();
    device
        .bind(guest.socket.try_clone().expect("cloned"))
        .expect("bound");
    device.claim(theirs).expect("kept");
    claim
}

pub fn hands_over_what_its_guest_knows() {
    let (workers, dir) = workers();
    let mut guest = Guest::of(&workers, dir.path());
    let rw = guest.lookup(ROOT, "0").expect("the first volume");
    for number in 0..100 {
        guest.create(rw, &format!("file-{number}")).expect("made");
    }
    let host = |name: &str| dir.path().join("rw").join(name);
    let (file, handle) = guest.open(rw, "file-7").expect("opens");
    guest.write(handle, 0, b"before").expect("written");
    let listing = guest.open_directory(rw).expect("opens");
    let ro = guest.lookup(ROOT, "1").expect("the second volume");
    let claim = claim(&guest);

    // What happens from now on the other does not know; a file that is open is one file,
    // wherever its name has gone.
    fs::remove_file(host("file-7")).expect("removed");
    guest
        .ask(18, file, &[handle.to_le_bytes(), [0; 8], [0; 8]].concat())
        .expect("closed");
    let heir = |claim: &Claim| {
        let (socket, pid) = workers.serve_heir(claim).expect("an heir");
        Guest {
            socket,
            pid,
            uid: 0,
        }
    };
    let mut one = heir(&claim);
    let mut two = heir(&claim);
    assert_eq!(guest.write(handle, 0, b"x"), Err(EBADF));
    assert_eq!(one.read(handle, 0).expect("reads"), b"before");
    one.write(handle, 6, b" and after").expect("written");
    assert_eq!(two.read(handle, 0).expect("reads"), b"before and after");
    assert_eq!(one.create(ro, "made"), Err(EROFS));
    assert_eq!(one.lookup(rw, "file-7"), Err(ENOENT));
    assert_eq!(guest.lookup(rw, "file-8"), one.lookup(rw, "file-8"));

    // A position in a directory is each one's own.
    let (first, second) = (one.list(listing), two.list(listing));
    assert_eq!(first.expect("lists"), second.expect("lists"));
    // A claim outlives its guest, and a fork can be forked.
    drop(guest);
    let mut three = heir(&claim);
    assert_eq!(three.read(handle, 0).expect("reads"), b"before and after");
    let mut four = heir(&self::claim(&three));
    assert_eq!(four.read(handle, 0).expect("reads"), b"before and after");
    // When the source's broker has ended its mounts are still there.
    drop(claim);
    wait_until("the source's broker has ended", || {
        workers.counts().expect("a spawner").gone == 1
    });
    for heir in [&mut one, &mut four] {
        assert_eq!(heir.lookup(ROOT, "1"), Ok(ro));
        assert_eq!(heir.create(ro, "made"), Err(EROFS));
    }
    one.create(rw, "later").expect("made");
    assert!(host("later").exists());
    drop((one, two, three, four));
    let counts = settled(&workers);
    assert_eq!((counts.started, counts.violations), (5, 0));
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
