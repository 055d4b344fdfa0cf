use super::*;
use crate::volumes::wire::OUT_HEADER;
use rustix::fs::{Mode, OFlags, open};
use rustix::thread::{CapabilitiesSecureBits, set_capabilities_secure_bits};
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// Bytes of the header of a request.
const IN_HEADER: usize = 40;
const ROOT: u64 = 1;
const O_RDWR: u32 = 2;
const O_TRUNC: u32 = 0o1000;
const O_EXCL: u32 = 0o200;

/// A guest: what it asks is put together by hand.
struct Guest {
    server: Server,
    dir: TempDir,
    uid: u32,
    next: u64,
}

impl Guest {
    fn with(bounds: Bounds) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = open(dir.path(), flags, Mode::empty()).expect("opens");
        let server = Server::new(root, "/proc/self/fd/", bounds).expect("a server");
        let mut guest = Self {
            server,
            dir,
            uid: 0,
            next: 0,
        };
        let hello = [7_u32, 41, 1 << 20, u32::MAX]
            .map(u32::to_le_bytes)
            .concat();
        let said = guest.ask(op::INIT, 0, &hello).expect("a session");
        assert_eq!((said.len(), word(&said, 0), word(&said, 4)), (64, 7, 38));
        assert_eq!(word(&said, 20), DATA_MAX);
        guest
    }

    fn new() -> Self {
        Self::with(Bounds {
            nodes: 100,
            handles: 10,
        })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// What follows the header of the answer, or the error.
    fn ask(&mut self, opcode: u32, node: u64, body: &[u8]) -> Result<Vec<u8>, i32> {
        self.next += 2;
        let unique = self.next;
        let mut packet = ((IN_HEADER + body.len()) as u32).to_le_bytes().to_vec();
        packet.extend(opcode.to_le_bytes());
        packet.extend(unique.to_le_bytes());
        packet.extend(node.to_le_bytes());
        packet.extend(self.uid.to_le_bytes());
        packet.extend(self.uid.to_le_bytes());
        packet.extend([0; 8]);
        packet.extend(body);
        let answer = self.server.serve(&packet).expect("it goes on");
        let Some(answer) = answer else {
            return Ok(Vec::new());
        };
        assert_eq!(word(&answer, 0) as usize, answer.len());
        assert_eq!(long(&answer, 8), unique);
        match word(&answer, 4) as i32 {
            0 => Ok(answer[OUT_HEADER..].to_vec()),
            error => {
                assert_eq!(answer.len(), OUT_HEADER);
                Err(-error)
            }
        }
    }

    /// The node, and the mode.
    fn lookup(&mut self, parent: u64, name: &str) -> Result<(u64, u32), i32> {
        let entry = self.ask(op::LOOKUP, parent, &zero_ended(name))?;
        assert_eq!(entry.len(), 128);
        Ok((long(&entry, 0), word(&entry, 40 + 60)))
    }

    fn create(
        &mut self,
        parent: u64,
        name: &str,
        flags: u32,
        mode: u32,
    ) -> Result<(u64, u64), i32> {
        let mut body = [flags | 0o100, mode, 0, 0].map(u32::to_le_bytes).concat();
        body.extend(zero_ended(name));
        let made = self.ask(op::CREATE, parent, &body)?;
        assert_eq!(made.len(), 128 + 16);
        Ok((long(&made, 0), long(&made, 128)))
    }

    fn open(&mut self, node: u64, flags: u32) -> Result<u64, i32> {
        let opened = self.ask(op::OPEN, node, &[flags, 0].map(u32::to_le_bytes).concat())?;
        Ok(long(&opened, 0))
    }

    fn write(&mut self, handle: u64, at: u64, data: &[u8], how: u32) -> Result<u32, i32> {
        let mut body = [handle, at].map(u64::to_le_bytes).concat();
        body.extend([data.len() as u32, how].map(u32::to_le_bytes).concat());
        body.extend([0; 16]);
        body.extend(data);
        Ok(word(&self.ask(op::WRITE, 0, &body)?, 0))
    }

    fn read(&mut self, handle: u64, at: u64, size: u32) -> Result<Vec<u8>, i32> {
        let mut body = [handle, at].map(u64::to_le_bytes).concat();
        body.extend(size.to_le_bytes());
        body.extend([0; 20]);
        self.ask(op::READ, 0, &body)
    }

    /// SETATTR of fields at their places.
    fn set(&mut self, node: u64, valid: u32, fields: &[(usize, u32)]) -> Result<Vec<u8>, i32> {
        let mut body = vec![0; 88];
        body[..4].copy_from_slice(&valid.to_le_bytes());
        for (at, value) in fields {
            body[*at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
        self.ask(op::SETATTR, node, &body)
    }
}

fn zero_ended(name: &str) -> Vec<u8> {
    [name.as_bytes(), b"\0"].concat()
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four"))
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight"))
}

fn errno(errno: Errno) -> i32 {
    errno.raw_os_error()
}

/// Owners need root, and so do the tests of them.
fn is_root() -> bool {
    geteuid().is_root()
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).expect("is there").mode() & 0o7777
}

#[test]
fn what_is_written_can_be_read_here_and_there() {
    let mut guest = Guest::new();
    let (_, handle) = guest
        .create(ROOT, "file", O_RDWR | O_EXCL, 0o640)
        .expect("made");
    let data: Vec<u8> = (0..100_000).map(|n| (n % 251) as u8).collect();
    assert_eq!(guest.write(handle, 5, &data, 0), Ok(100_000));
    assert_eq!(guest.read(handle, 5, 128 << 10), Ok(data.clone()));
    assert_eq!(guest.read(handle, 100_005, 10), Ok(vec![]));
    let on_host = fs::read(guest.path("file")).expect("reads");
    assert_eq!((&on_host[..5], &on_host[5..]), (&[0; 5][..], &data[..]));
    assert_eq!(mode(&guest.path("file")), 0o640);
    guest
        .ask(
            op::RELEASE,
            0,
            &[&handle.to_le_bytes()[..], &[0; 16]].concat(),
        )
        .expect("closed");
    assert_eq!(guest.read(handle, 0, 1), Err(errno(Errno::BADF)));
    assert_eq!(
        guest.create(ROOT, "file", O_RDWR | O_EXCL, 0o640),
        Err(errno(Errno::EXIST))
    );
    let (_, again) = guest
        .create(ROOT, "file", O_RDWR | O_TRUNC, 0)
        .expect("opened");
    assert_eq!(guest.read(again, 0, 10), Ok(vec![]));
}

#[test]
fn names_lead_nowhere_but_into_their_directory() {
    let mut guest = Guest::new();
    for name in ["", ".", "..", "a/b", "/etc", "../x"] {
        assert_eq!(
            guest.lookup(ROOT, name),
            Err(errno(Errno::INVAL)),
            "{name:?}"
        );
        let made = guest.create(ROOT, name, O_RDWR, 0o600);
        assert_eq!(made, Err(errno(Errno::INVAL)), "{name:?}");
    }
    let long_name = "x".repeat(256);
    assert_eq!(
        guest.lookup(ROOT, &long_name),
        Err(errno(Errno::NAMETOOLONG))
    );
    assert_eq!(
        guest.ask(op::LOOKUP, ROOT, b"no end"),
        Err(errno(Errno::INVAL))
    );
    assert_eq!(guest.lookup(77, "x"), Err(errno(Errno::STALE)));
}

#[test]
fn a_link_is_a_link_and_is_followed_by_nobody_here() {
    let mut guest = Guest::new();
    symlink("/etc", guest.path("out")).expect("a link");
    let (link, kind) = guest.lookup(ROOT, "out").expect("found");
    assert_eq!(kind & 0o170_000, 0o120_000);
    assert_eq!(guest.ask(op::READLINK, link, &[]), Ok(b"/etc".to_vec()));
    assert_eq!(guest.lookup(link, "passwd"), Err(errno(Errno::NOTDIR)));
    assert_eq!(guest.open(link, 0), Err(errno(Errno::NXIO)));
    symlink("/etc/passwd", guest.path("file")).expect("a link");
    assert_eq!(
        guest.create(ROOT, "file", O_RDWR, 0o600),
        Err(errno(Errno::NXIO))
    );
    // By time and owner too, it is the link that changes.
    let before = fs::metadata("/etc/passwd").expect("is there").mtime();
    let (link, _) = guest.lookup(ROOT, "file").expect("found");
    guest.set(link, 1 << 5, &[(40, 1000)]).expect("set");
    assert_eq!(
        fs::metadata("/etc/passwd").expect("is there").mtime(),
        before
    );
    let on_host = fs::symlink_metadata(guest.path("file")).expect("is there");
    assert_eq!(on_host.mtime(), 1000);
    let target = [zero_ended("made"), zero_ended("anything/../goes")].concat();
    guest.ask(op::SYMLINK, ROOT, &target).expect("made");
    let made = fs::read_link(guest.path("made")).expect("a link");
    assert_eq!(made, Path::new("anything/../goes"));
}

#[test]
fn a_node_stays_its_file_whatever_takes_its_name() {
    let mut guest = Guest::new();
    fs::create_dir(guest.path("dir")).expect("made");
    fs::write(guest.path("dir/passwd"), "mine").expect("written");
    let (dir, _) = guest.lookup(ROOT, "dir").expect("found");
    fs::rename(guest.path("dir"), guest.path("moved")).expect("renamed");
    symlink("/etc", guest.path("dir")).expect("a link");
    let (file, _) = guest.lookup(dir, "passwd").expect("found");
    let handle = guest.open(file, 0).expect("opened");
    assert_eq!(guest.read(handle, 0, 100), Ok(b"mine".to_vec()));
}

#[test]
fn what_would_make_the_server_wait_or_is_a_device_is_not_opened_or_made() {
    let mut guest = Guest::new();
    for (kind, name, allowed) in [
        (0o010_000, "fifo", true),
        (0o140_000, "socket", true),
        (0o020_000, "tty", false),
        (0o060_000, "disk", false),
    ] {
        let mut body = [kind | 0o600, 0x501, 0, 0].map(u32::to_le_bytes).concat();
        body.extend(zero_ended(name));
        let made = guest.ask(op::MKNOD, ROOT, &body);
        if allowed {
            let node = long(&made.expect("made"), 0);
            assert_eq!(guest.open(node, 0), Err(errno(Errno::NXIO)));
        } else {
            assert_eq!(made, Err(errno(Errno::PERM)));
        }
    }
    let fifo = fs::symlink_metadata(guest.path("fifo")).expect("is there");
    assert!(fifo.file_type().is_fifo());
}

#[test]
fn what_is_made_belongs_to_whom_the_guest_says() {
    if !is_root() {
        return;
    }
    // As in the jail: this thread alone.
    set_capabilities_secure_bits(CapabilitiesSecureBits::NO_SETUID_FIXUP).expect("set");
    let mut guest = Guest::new();
    for uid in [0, 1000] {
        guest.uid = uid;
        let name = format!("file-{uid}");
        guest.create(ROOT, &name, O_RDWR, 0o4755).expect("made");
        let found = fs::metadata(guest.path(&name)).expect("is there");
        assert_eq!((found.uid(), found.gid()), (uid, uid));
        assert_eq!(mode(&guest.path(&name)), 0o4755);
        let name = format!("dir-{uid}");
        let body = [
            &[0o700_u32, 0].map(u32::to_le_bytes).concat()[..],
            &zero_ended(&name),
        ]
        .concat();
        guest.ask(op::MKDIR, ROOT, &body).expect("made");
        assert_eq!(
            fs::metadata(guest.path(&name)).expect("is there").uid(),
            uid
        );
    }
    assert!(geteuid().is_root());
    // -1 would be taken for "whoever I am".
    guest.uid = u32::MAX;
    assert_eq!(
        guest.create(ROOT, "x", O_RDWR, 0o600),
        Err(errno(Errno::INVAL))
    );
    guest.uid = 0;
    let (node, _) = guest.lookup(ROOT, "file-0").expect("found");
    guest.set(node, 0b110, &[(76, 7), (80, 8)]).expect("chown");
    let found = fs::metadata(guest.path("file-0")).expect("is there");
    assert_eq!((found.uid(), found.gid()), (7, 8));
    assert_eq!(
        found.mode() & 0o7777,
        0o755,
        "the setuid bit goes with the owner"
    );
    assert_eq!(
        guest.set(node, 0b10, &[(76, u32::MAX)]),
        Err(errno(Errno::INVAL))
    );
}

#[test]
fn a_write_takes_off_the_setuid_bit_where_the_guest_says_so() {
    let mut guest = Guest::new();
    let (node, handle) = guest.create(ROOT, "tool", O_RDWR, 0o755).expect("made");
    guest.set(node, 1, &[(68, 0o6755)]).expect("chmod");
    assert_eq!(guest.write(handle, 0, b"x", 0), Ok(1));
    if is_root() {
        assert_eq!(mode(&guest.path("tool")), 0o6755);
    }
    assert_eq!(guest.write(handle, 0, b"x", 1 << 2), Ok(1));
    assert_eq!(mode(&guest.path("tool")), 0o755);
    guest.set(node, 1, &[(68, 0o4755)]).expect("chmod");
    guest
        .set(node, 1 << 3 | 1 << 11, &[(16, 0)])
        .expect("truncated");
    assert_eq!(mode(&guest.path("tool")), 0o755);
    assert_eq!(fs::metadata(guest.path("tool")).expect("is there").len(), 0);
}

#[test]
fn renames_links_and_removals_are_the_hosts() {
    let mut guest = Guest::new();
    fs::write(guest.path("a"), "a").expect("written");
    fs::write(guest.path("b"), "b").expect("written");
    let names = [zero_ended("a"), zero_ended("b")].concat();
    let body = |flags: u32| {
        let head = [
            ROOT.to_le_bytes().to_vec(),
            flags.to_le_bytes().to_vec(),
            vec![0; 4],
        ];
        [&head.concat()[..], &names[..]].concat()
    };
    assert_eq!(
        guest.ask(op::RENAME2, ROOT, &body(1)),
        Err(errno(Errno::EXIST))
    );
    assert_eq!(
        guest.ask(op::RENAME2, ROOT, &body(4)),
        Err(errno(Errno::INVAL))
    );
    guest.ask(op::RENAME2, ROOT, &body(2)).expect("exchanged");
    assert_eq!(fs::read(guest.path("a")).expect("reads"), b"b");
    let plain = [&ROOT.to_le_bytes()[..], &names[..]].concat();
    guest.ask(op::RENAME, ROOT, &plain).expect("renamed over");
    assert_eq!(fs::read(guest.path("b")).expect("reads"), b"b");
    assert!(!guest.path("a").exists());
    let (node, _) = guest.lookup(ROOT, "b").expect("found");
    if is_root() {
        let body = [&node.to_le_bytes()[..], &zero_ended("c")].concat();
        let linked = guest.ask(op::LINK, ROOT, &body).expect("linked");
        assert_eq!(long(&linked, 0), node);
        guest
            .ask(op::UNLINK, ROOT, &zero_ended("c"))
            .expect("removed");
    }
    fs::create_dir(guest.path("dir")).expect("made");
    assert_eq!(
        guest.ask(op::UNLINK, ROOT, &zero_ended("dir")),
        Err(errno(Errno::ISDIR))
    );
    guest
        .ask(op::RMDIR, ROOT, &zero_ended("dir"))
        .expect("removed");
    assert!(!guest.path("dir").exists());
}

/// The names of a directory, by READDIR or READDIRPLUS.
fn list(guest: &mut Guest, opcode: u32, size: u32) -> Vec<String> {
    let flags = [0_u8; 8];
    let handle = long(&guest.ask(op::OPENDIR, ROOT, &flags).expect("opened"), 0);
    let (mut names, mut offset) = (Vec::new(), 0);
    loop {
        let mut body = [handle, offset].map(u64::to_le_bytes).concat();
        body.extend(size.to_le_bytes());
        body.extend([0; 20]);
        let part = guest.ask(opcode, ROOT, &body).expect("lists");
        assert!(part.len() <= size as usize);
        if part.is_empty() {
            let body = [&handle.to_le_bytes()[..], &[0; 16]].concat();
            guest.ask(op::RELEASEDIR, 0, &body).expect("closed");
            return names;
        }
        let mut rest = &part[..];
        while !rest.is_empty() {
            let mut entry = rest;
            if opcode == op::READDIRPLUS {
                entry = &rest[128..];
            }
            offset = long(entry, 8);
            let len = word(entry, 16) as usize;
            let name = String::from_utf8(entry[24..24 + len].to_vec()).expect("text");
            if opcode == op::READDIRPLUS && !name.starts_with('.') {
                assert_ne!(long(rest, 0), 0, "{name}");
                assert_eq!(long(rest, 40), long(entry, 0), "one number for one file");
            }
            names.push(name);
            rest = &entry[(24 + len).next_multiple_of(8)..];
        }
    }
}

#[test]
fn directories_are_listed_whole_a_page_at_a_time() {
    let mut guest = Guest::with(Bounds {
        nodes: 1000,
        handles: 1,
    });
    for n in 0..300 {
        fs::write(guest.path(&format!("a-file-with-a-name-{n}")), "").expect("written");
    }
    for opcode in [op::READDIR, op::READDIRPLUS] {
        let mut names = list(&mut guest, opcode, 4096);
        assert_eq!(names.len(), 302);
        names.sort();
        names.dedup();
        assert_eq!(names.len(), 302);
    }
    // Told of once, forgotten once.
    assert_eq!(guest.server.nodes.len(), 301);
    for node in 2..302_u64 {
        guest
            .ask(op::FORGET, node, &1_u64.to_le_bytes())
            .expect("no answer");
    }
    assert_eq!(guest.server.nodes.len(), 1);
}

#[test]
fn tables_are_bounded_and_a_session_begins_empty() {
    let mut guest = Guest::with(Bounds {
        nodes: 3,
        handles: 2,
    });
    for name in ["a", "b", "c"] {
        fs::write(guest.path(name), name).expect("written");
    }
    let (a, _) = guest.lookup(ROOT, "a").expect("found");
    let (b, _) = guest.lookup(ROOT, "b").expect("found");
    assert_eq!(guest.lookup(ROOT, "a").expect("known").0, a);
    assert_eq!(guest.lookup(ROOT, "c"), Err(errno(Errno::NFILE)));
    assert_eq!(
        guest.create(ROOT, "d", O_RDWR, 0o600),
        Err(errno(Errno::NFILE))
    );
    assert!(!guest.path("d").exists(), "nothing is half-made");
    let mut forget = [2_u32, 0].map(u32::to_le_bytes).concat();
    forget.extend([a, 2, b, 1].map(u64::to_le_bytes).concat());
    guest.ask(op::BATCH_FORGET, 0, &forget).expect("no answer");
    let (c, _) = guest.lookup(ROOT, "c").expect("found");
    guest.open(c, 0).expect("opened");
    guest.open(c, 0).expect("opened");
    assert_eq!(guest.open(c, 0), Err(errno(Errno::NFILE)));
    guest.ask(op::DESTROY, 0, &[]).expect("ended");
    assert_eq!(guest.open(c, 0), Err(errno(Errno::STALE)));
    // The root is not to be forgotten.
    guest
        .ask(op::FORGET, ROOT, &u64::MAX.to_le_bytes())
        .expect("no answer");
    guest.lookup(ROOT, "a").expect("found");
}

#[test]
fn extended_attributes_are_the_hosts() {
    let mut guest = Guest::new();
    fs::write(guest.path("f"), "").expect("written");
    let (node, _) = guest.lookup(ROOT, "f").expect("found");
    let name = zero_ended("user.colour");
    let set = [
        &[4_u32, 0].map(u32::to_le_bytes).concat()[..],
        &name,
        b"blue",
    ]
    .concat();
    match guest.ask(op::SETXATTR, node, &set) {
        // Not every file system has them.
        Err(error) if error == errno(Errno::OPNOTSUPP) => return,
        done => drop(done.expect("set")),
    }
    let get = |size: u32| [&[size, 0].map(u32::to_le_bytes).concat()[..], &name].concat();
    let asked = guest.ask(op::GETXATTR, node, &get(0)).expect("a length");
    assert_eq!(word(&asked, 0), 4);
    assert_eq!(guest.ask(op::GETXATTR, node, &get(4)), Ok(b"blue".to_vec()));
    assert_eq!(
        guest.ask(op::GETXATTR, node, &get(3)),
        Err(errno(Errno::RANGE))
    );
    let size = [100_u32, 0].map(u32::to_le_bytes).concat();
    let all = guest.ask(op::LISTXATTR, node, &size).expect("lists");
    assert!(all.windows(name.len()).any(|part| part == name));
    guest.ask(op::REMOVEXATTR, node, &name).expect("removed");
    assert_eq!(
        guest.ask(op::GETXATTR, node, &get(4)),
        Err(errno(Errno::NODATA))
    );
}

#[test]
fn holes_space_and_the_file_system_are_told_of() {
    let mut guest = Guest::new();
    let (node, handle) = guest.create(ROOT, "f", O_RDWR, 0o600).expect("made");
    let mut body = [handle, 0, 8192].map(u64::to_le_bytes).concat();
    body.extend([0; 8]);
    guest.ask(op::FALLOCATE, node, &body).expect("allocated");
    assert_eq!(fs::metadata(guest.path("f")).expect("is there").len(), 8192);
    let mut body = [handle, 0].map(u64::to_le_bytes).concat();
    body.extend([4_u32, 0].map(u32::to_le_bytes).concat());
    let hole = guest.ask(op::LSEEK, node, &body).expect("found");
    assert!(long(&hole, 0) <= 8192);
    assert_eq!(guest.ask(op::STATFS, ROOT, &[]).expect("told").len(), 80);
    let body = [&handle.to_le_bytes()[..], &[0; 8]].concat();
    guest.ask(op::FSYNC, node, &body).expect("synced");
    let found = guest.ask(op::GETATTR, node, &[0; 16]).expect("told");
    assert_eq!((found.len(), long(&found, 24)), (104, 8192));
    // Permissions of the host's path are as nothing: the guest's kernel decides.
    fs::set_permissions(guest.path("f"), fs::Permissions::from_mode(0o000)).expect("chmod");
    if is_root() {
        guest.open(node, 0).expect("opened");
    }
}

#[test]
fn what_is_no_request_ends_it_and_what_is_unknown_does_not() {
    let mut guest = Guest::new();
    for opcode in [0, 31, 33, 34, 39, 50, 4096] {
        assert_eq!(guest.ask(opcode, ROOT, &[0; 64]), Err(errno(Errno::NOSYS)));
    }
    for opcode in 1..60 {
        // Short of everything: an error, or nothing to answer.
        guest.ask(opcode, ROOT, &[]).ok();
        guest.ask(opcode, ROOT, &[0xff; 7]).ok();
    }
    assert!(guest.server.serve(&[0; 39]).is_err());
    assert!(guest.server.serve(&[0; 40]).is_err());
}
