//! What a file is beside its bytes arrives in the root file system: as erofs-utils read
//! it, and where the kernel can mount it, as Linux does.

use super::archive::{self, CAPABILITY, Entry, layer};
use super::{extract, good, load, rootfs};
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;

fn run(program: &str, args: &[&OsStr]) {
    let out = Command::new(program).args(args).output().unwrap();
    let error = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{program}: {error}");
}

/// What dump.erofs says of a file, in one line.
fn dump(image: &Path, path: &str) -> String {
    let out = Command::new("dump.erofs")
        .arg(format!("--path={path}"))
        .arg(image)
        .output()
        .expect("dump.erofs of Debian's erofs-utils is needed");
    assert!(out.status.success(), "{path}");
    let text = String::from_utf8(out.stdout).unwrap();
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[test]
fn owners_modes_and_kinds_arrive() {
    let root = tempfile::tempdir().unwrap();
    let mut entries = vec![
        Entry::directory("bin", 0o755),
        Entry::file("bin/exact", b"with attributes").mode(0o755),
        Entry::file("bin/su", b"x").mode(0o4755),
        Entry::file("bin/wall", b"x").mode(0o2755).owner(0, 5),
        Entry::file("bin/large", b"x").owner(70_000, 4_294_967_294),
        Entry::hard_link("bin/hard", "bin/su"),
        Entry::directory("tmp", 0o1777),
    ];
    let plain = archive::docker_archive("plain", "amd64", &[layer(&entries)]);
    load(root.path(), &plain);
    let tree = root.path().join("tree");
    let extract = format!("--extract={}", tree.display());
    let image = rootfs(root.path());
    let keep = ["--no-preserve-owner", "--preserve-perms"].map(OsStr::new);
    let ends = [extract.as_ref(), image.as_os_str()];
    run("fsck.erofs", &[&keep[..], &ends].concat());
    for (path, mode) in [
        ("bin/su", 0o4755),
        ("bin/hard", 0o4755),
        ("bin/wall", 0o2755),
        ("tmp", 0o1777),
    ] {
        let meta = tree.join(path).metadata().unwrap();
        assert_eq!(meta.mode() & 0o7777, mode, "{path}");
    }
    good(root.path(), &["rm", "plain"]);
    // Nodes of devices need privileges to unpack, but none to look at.
    entries.extend([
        Entry::character_device("null", 1, 3),
        Entry::block_device("disk", 259, 65_536),
        Entry::fifo("fifo"),
    ]);
    let whole = archive::docker_archive("whole", "amd64", &[layer(&entries)]);
    load(root.path(), &whole);
    let image = rootfs(root.path());
    for (path, facts) in [
        ("/bin/su", "Links: 2"),
        ("/bin/wall", "Uid: 0 Gid: 5 "),
        ("/bin/large", "Uid: 70000 Gid: 4294967294 Access: 0644/"),
        ("/null", "char dev"),
        ("/disk", "block dev"),
        ("/fifo", "FIFO"),
    ] {
        let said = dump(&image, path);
        assert!(said.contains(facts), "{path}: {said}");
    }
    assert!(dump(&image, "/bin/su").contains("Xattr size: 0"));
    let said = dump(&image, "/bin/exact");
    assert!(!said.contains("Xattr size: 0"), "{said}");
    // The attribute stands in the image as it was.
    let bytes = std::fs::read(&image).unwrap();
    let name_and_value = [b"capability".as_slice(), CAPABILITY].concat();
    let found = bytes
        .windows(name_and_value.len())
        .any(|window| window == name_and_value);
    assert!(found);
}

/// The paths of a tree, sorted, as `find` has them.
fn paths(folder: &Path) -> Vec<String> {
    let mut all: Vec<String> = walk(folder).into_iter().map(|(path, _)| path).collect();
    all.sort();
    all
}

#[test]
fn layers_hide_what_they_say_and_nothing_else() {
    let layers = [
        layer(&[
            Entry::directory("kept", 0o755),
            Entry::file("kept/a", b"1"),
            Entry::file("kept/b", b"1"),
            Entry::directory("opaque", 0o755),
            Entry::file("opaque/deep/old", b"1"),
            Entry::file("gone/all/of/it", b"1"),
            Entry::file("replaced/x", b"1"),
            Entry::file("link", b"1"),
        ]),
        layer(&[
            Entry::file("kept/.wh.a", b""),
            Entry::file("opaque/new", b"2"),
            // It hides what is below, wherever it stands in its layer.
            Entry::file("opaque/.wh..wh..opq", b""),
            Entry::file(".wh.gone", b""),
            Entry::file("replaced", b"a file now"),
            Entry::hard_link("second", "link"),
        ]),
        layer(&[
            Entry::file("kept/a", b"3"),
            Entry::file(".wh.link", b""),
            Entry::directory("kept", 0o700),
        ]),
    ];
    let root = tempfile::tempdir().unwrap();
    let out = load(root.path(), &archive::docker_archive("a", "amd64", &layers));
    assert!(out.status.success(), "{out:?}");
    let image = rootfs(root.path());
    let tree = extract(&image);
    let expected = [
        "kept",
        "kept/a",
        "kept/b",
        "opaque",
        "opaque/new",
        "replaced",
        "second",
    ];
    assert_eq!(paths(tree.path()), expected);
    let read = |path: &str| std::fs::read(tree.path().join(path)).unwrap();
    assert_eq!(
        (read("kept/a"), read("second")),
        (b"3".to_vec(), b"1".to_vec())
    );
    assert!(dump(&image, "/kept").contains("Access: 0700/"));
    assert!(dump(&image, "/second").contains("Links: 1"));
}

/// The ways of GNU tar to write sparse files. Only pax has attributes.
const FORMATS: [&[&str]; 4] = [
    &["--format=gnu"],
    &["--xattrs", "--xattrs-include=*", "--sparse-version=0.0"],
    &["--xattrs", "--xattrs-include=*", "--sparse-version=0.1"],
    &["--xattrs", "--xattrs-include=*", "--sparse-version=1.0"],
];

/// Packs a directory with GNU tar.
fn pack(folder: &Path, format: &[&str], target: &Path) {
    let args = [format, &["--sparse", "--numeric-owner", "-c", "-f"]].concat();
    let mut args: Vec<&OsStr> = args.into_iter().map(OsStr::new).collect();
    let here = ["-C".as_ref(), folder.as_os_str(), ".".as_ref()];
    args.push(target.as_os_str());
    run("tar", &[&args[..], &here].concat());
}

#[test]
fn holes_stay_holes() {
    const SIZE: u64 = 400 << 20;
    let folder = tempfile::tempdir().unwrap();
    let tree = folder.path().join("tree");
    std::fs::create_dir(&tree).unwrap();
    let file = std::fs::File::create(tree.join("sparse")).unwrap();
    file.set_len(SIZE).unwrap();
    // Pieces that begin and end off the edges of blocks, more than one header holds.
    for piece in 0..30_u64 {
        let at = piece * (10 << 20) + 4000;
        std::os::unix::fs::FileExt::write_all_at(&file, &[piece as u8 + 1; 5000], at).unwrap();
    }
    for format in FORMATS {
        let root = tempfile::tempdir().unwrap();
        let archive = folder.path().join("tree.tar");
        pack(&tree, format, &archive);
        let packed = archive.metadata().unwrap().len();
        assert!(packed < 1 << 20, "{format:?}: {packed} bytes");
        good(root.path(), &["import", archive.to_str().unwrap(), "a"]);
        let image = rootfs(root.path());
        let meta = image.metadata().unwrap();
        assert!(meta.len() > SIZE);
        assert!(meta.blocks() * 512 < 1 << 20, "{} blocks", meta.blocks());
        // What lies where is read from the image itself: its data is the file's, whole,
        // and stands behind one block of inodes.
        let bytes = std::fs::File::open(&image).unwrap();
        let data = meta.len() - SIZE;
        let mut piece = [0; 5002];
        for number in 0..30_u64 {
            let at = data + number * (10 << 20) + 3999;
            std::os::unix::fs::FileExt::read_exact_at(&bytes, &mut piece, at).unwrap();
            let mut expected = [number as u8 + 1; 5002];
            expected[0] = 0;
            expected[5001] = 0;
            assert!(piece == expected, "{format:?}: piece {number}");
        }
    }
}

/// All that `lstat`, `readlink`, `read` and `listxattr` say of a tree's files, by path.
fn describe(folder: &Path) -> BTreeMap<String, String> {
    let mut inodes: BTreeMap<u64, String> = BTreeMap::new();
    let mut described = BTreeMap::new();
    for (path, full) in walk(folder) {
        let meta = full.symlink_metadata().unwrap();
        let first = inodes.entry(meta.ino()).or_insert_with(|| path.clone());
        let (size, links) = match meta.is_dir() {
            true => (0, 0),
            false => (meta.len(), meta.nlink()),
        };
        let content = match meta.is_file() && size < 1 << 20 {
            true => archive::digest(&std::fs::read(&full).unwrap()),
            false => String::new(),
        };
        let mut line = format!(
            "{:o} {}:{} {size} {links} {:x} {}.{} {:?} {first} {content}",
            meta.mode(),
            meta.uid(),
            meta.gid(),
            meta.rdev(),
            meta.mtime(),
            meta.mtime_nsec(),
            std::fs::read_link(&full).ok(),
        );
        let mut names = [0; 1024];
        let length = rustix::fs::llistxattr(&full, &mut names).unwrap();
        let mut names: Vec<&[u8]> = names[..length].split(|b| *b == 0).collect();
        names.sort_unstable();
        for name in names.into_iter().filter(|name| !name.is_empty()) {
            let mut value = [0; 1024];
            let length = rustix::fs::lgetxattr(&full, name, &mut value).unwrap();
            line += &format!(" {}={:x?}", String::from_utf8_lossy(name), &value[..length]);
        }
        described.insert(path, line);
    }
    described
}

fn walk(folder: &Path) -> Vec<(String, std::path::PathBuf)> {
    let mut found = Vec::new();
    let mut ahead = vec![folder.to_owned()];
    while let Some(here) = ahead.pop() {
        for entry in std::fs::read_dir(here).unwrap() {
            let path = entry.unwrap().path();
            if path.symlink_metadata().unwrap().is_dir() {
                ahead.push(path.clone());
            }
            let name = path.strip_prefix(folder).unwrap();
            found.push((name.to_str().unwrap().to_owned(), path));
        }
    }
    found.sort();
    found
}

/// A tree with one of everything, made by the kernel itself.
fn make_everything(tree: &Path) {
    use rustix::fs::{FileType, Mode, XattrFlags, chownat, lsetxattr, mknodat};
    std::fs::create_dir_all(tree.join("dir/deep")).unwrap();
    std::fs::write(tree.join("dir/file"), vec![7; 10_000]).unwrap();
    std::fs::write(tree.join("dir/su"), b"su").unwrap();
    std::fs::hard_link(tree.join("dir/file"), tree.join("dir/deep/hard")).unwrap();
    std::os::unix::fs::symlink("../dir/none", tree.join("dir/link")).unwrap();
    let node = |name: &str, kind, device| {
        let mode = Mode::from_raw_mode(0o640);
        mknodat(rustix::fs::CWD, tree.join(name), kind, mode, device).unwrap();
    };
    node(
        "char",
        FileType::CharacterDevice,
        rustix::fs::makedev(4, 300),
    );
    node(
        "block",
        FileType::BlockDevice,
        rustix::fs::makedev(259, 70_000),
    );
    node("fifo", FileType::Fifo, 0);
    let (user, group) = (
        rustix::fs::Uid::from_raw(100_000),
        rustix::fs::Gid::from_raw(5),
    );
    let flags = rustix::fs::AtFlags::SYMLINK_NOFOLLOW;
    for name in ["dir/su", "dir/link", "dir/deep", "char"] {
        chownat(
            rustix::fs::CWD,
            tree.join(name),
            Some(user),
            Some(group),
            flags,
        )
        .unwrap();
    }
    // After the change of owner, which takes these bits away.
    for (name, mode) in [("dir/su", 0o6755), ("dir/deep", 0o3770)] {
        let permissions = std::fs::Permissions::from_mode(mode);
        std::fs::set_permissions(tree.join(name), permissions).unwrap();
    }
    for (name, key, value) in [
        ("dir/su", "security.capability", CAPABILITY),
        ("dir/file", "user.note", archive::NOTE),
        ("dir/deep", "user.empty", b""),
        ("dir", "trusted.own", b"\0binary\xff"),
    ] {
        lsetxattr(tree.join(name), key, value, XattrFlags::empty()).unwrap();
    }
    let sparse = std::fs::File::create(tree.join("sparse")).unwrap();
    sparse.set_len(900_000).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&sparse, b"middle", 500_001).unwrap();
}

#[test]
fn linux_sees_what_gnu_tar_packed() {
    let filesystems = std::fs::read_to_string("/proc/filesystems").unwrap();
    if !rustix::process::geteuid().is_root() || !filesystems.contains("erofs") {
        eprintln!("not tried: mounting needs root and a kernel with erofs");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let tree = folder.path().join("tree");
    make_everything(&tree);
    let before = describe(&tree);
    assert!(before["dir/su"].contains("security.capability="));
    for format in FORMATS {
        let root = tempfile::tempdir().unwrap();
        let archive = folder.path().join("tree.tar");
        pack(&tree, format, &archive);
        good(root.path(), &["import", archive.to_str().unwrap(), "a"]);
        let mounted = root.path().join("mounted");
        std::fs::create_dir(&mounted).unwrap();
        let image = rootfs(root.path());
        let mount = ["-t", "erofs", "-o", "loop,ro"].map(OsStr::new);
        let ends = [image.as_os_str(), mounted.as_os_str()];
        run("mount", &[&mount[..], &ends].concat());
        let after = describe(&mounted);
        run("umount", &[mounted.as_os_str()]);
        assert_eq!(after.len(), before.len());
        for (path, mut expected) in before.clone() {
            let mut seen = after[&path].clone();
            if format[0] == "--format=gnu" {
                // This format has whole seconds and no attributes.
                let cut = |line: &str| {
                    let fields = line.split(' ').enumerate();
                    let kept = fields.filter(|(i, _)| ![5].contains(i) && *i < 9);
                    kept.map(|(_, field)| field).collect::<Vec<_>>().join(" ")
                };
                (seen, expected) = (cut(&seen), cut(&expected));
            }
            assert_eq!(seen, expected, "{format:?}: {path}");
        }
    }
}
