use super::*;
use crate::{Mounts, Pack, Plain, TarWriter, pack};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;

/// As the host unpacks what a guest has sent.
const STRANGERS: Unpack<'static> = Unpack {
    only: b"",
    resolve: Resolve::NoLinks,
    replace: false,
    owners: false,
    privileges: false,
};

fn entry(kind: Kind, path: &[u8], link: &[u8]) -> Entry {
    Entry {
        path: path.to_vec(),
        link: link.to_vec(),
        kind,
        mode: 0o6755,
        uid: 0,
        gid: 0,
        mtime: 1_000_000_000,
        mtime_nsec: 5,
        device: (1, 3),
        xattrs: Vec::new(),
        size: 0,
        pieces: Vec::new(),
    }
}

/// An archive of these; each regular file holds its own name.
fn archive(entries: &[Entry]) -> Vec<u8> {
    let mut writer = TarWriter::new(Vec::new());
    for entry in entries {
        let mut entry = entry.clone();
        entry.size = entry.path.len() as u64;
        writer.entry(&entry).unwrap();
        if entry.kind == Kind::Regular {
            writer.data(&entry.path).unwrap();
        }
    }
    writer.finish().unwrap()
}

fn unpack_into(directory: &Path, how: &Unpack<'_>, bytes: &[u8]) -> Result<()> {
    let directory = fs::File::open(directory).unwrap();
    unpack(directory.as_fd(), how, &mut TarReader::new(Plain(bytes)))
}

fn packed(path: &Path, name: &[u8], follow: bool) -> Vec<u8> {
    let mut writer = TarWriter::new(Vec::new());
    let what = Pack {
        path: path.as_os_str().as_bytes(),
        name,
        follow,
        mounts: Mounts::Real,
    };
    pack(&what, &mut writer).unwrap();
    writer.finish().unwrap()
}

use Kind::{CharDevice, Directory, Fifo, HardLink, Regular, Symlink};

#[test]
fn a_tree_comes_back_as_it_was() {
    let from = tempfile::tempdir().unwrap();
    let top = from.path().join("top");
    fs::create_dir_all(top.join("closed/in")).unwrap();
    let odd = std::ffi::OsStr::from_bytes(b"odd\xff\n name");
    fs::write(top.join(odd), b"odd").unwrap();
    fs::write(top.join("closed/in/file"), vec![9; 1_000_000]).unwrap();
    fs::hard_link(top.join(odd), top.join("zz-twin")).unwrap();
    symlink("../../nowhere", top.join("dangling")).unwrap();
    fs::set_permissions(top.join("closed"), fs::Permissions::from_mode(0o555)).unwrap();
    let to = tempfile::tempdir().unwrap();
    unpack_into(to.path(), &STRANGERS, &packed(&top, b"new", false)).unwrap();
    let new = to.path().join("new");
    assert_eq!(fs::read(new.join(odd)).unwrap(), b"odd");
    assert_eq!(
        fs::read(new.join("closed/in/file")).unwrap(),
        vec![9; 1_000_000]
    );
    let twin = fs::metadata(new.join("zz-twin")).unwrap();
    assert_eq!(twin.ino(), fs::metadata(new.join(odd)).unwrap().ino());
    assert_eq!(
        fs::read_link(new.join("dangling")).unwrap(),
        Path::new("../../nowhere")
    );
    let closed = fs::metadata(new.join("closed")).unwrap();
    assert_eq!(closed.mode() & 0o777, 0o555);
    let before = fs::metadata(top.join("closed")).unwrap();
    assert_eq!(
        (closed.mtime(), closed.mtime_nsec()),
        (before.mtime(), before.mtime_nsec())
    );
    // Once more, over itself; and without a name of its own.
    for name in [&b"new"[..], b""] {
        unpack_into(to.path(), &STRANGERS, &packed(&top, name, false)).unwrap();
    }
    assert_eq!(fs::read(to.path().join(odd)).unwrap(), b"odd");
    for writable in [&top, &new, &to.path().to_owned()] {
        fs::set_permissions(writable.join("closed"), fs::Permissions::from_mode(0o755)).unwrap();
    }
}

#[test]
fn a_link_at_the_end_of_a_path_is_followed_if_asked() {
    let from = tempfile::tempdir().unwrap();
    fs::write(from.path().join("file"), "bytes").unwrap();
    symlink("file", from.path().join("link")).unwrap();
    let to = tempfile::tempdir().unwrap();
    let link = from.path().join("link");
    unpack_into(to.path(), &STRANGERS, &packed(&link, b"as-link", false)).unwrap();
    unpack_into(to.path(), &STRANGERS, &packed(&link, b"as-file", true)).unwrap();
    assert_eq!(
        fs::read_link(to.path().join("as-link")).unwrap(),
        Path::new("file")
    );
    assert!(
        fs::symlink_metadata(to.path().join("as-file"))
            .unwrap()
            .is_file()
    );
}

#[test]
fn no_entry_leaves_the_directory() {
    let outside = tempfile::tempdir().unwrap();
    let victim = outside.path().join("victim");
    fs::write(&victim, "safe").unwrap();
    let up = outside.path().join("to/up");
    let evil: &[&[Entry]] = &[
        &[entry(Regular, b"../victim", b"")],
        &[entry(Regular, b"a/../../victim", b"")],
        &[
            entry(Symlink, b"l", b".."),
            entry(Regular, b"l/victim", b""),
        ],
        &[
            entry(Symlink, b"l", outside.path().as_os_str().as_bytes()),
            entry(Regular, b"l/victim", b""),
        ],
        &[
            entry(Symlink, b"l", b".."),
            entry(Directory, b"l/victims", b""),
        ],
        &[
            entry(HardLink, b"l", b"../victim"),
            entry(Regular, b"l", b""),
        ],
        &[
            entry(Symlink, b"l", b"../victim"),
            entry(HardLink, b"h", b"l/x"),
        ],
        &[entry(Regular, b"", b"")],
        &[entry(HardLink, b"l", b".")],
        &[entry(CharDevice, b"null", b"")],
        &[entry(Directory, b"d", b""), entry(Regular, b"d", b"")],
        &[entry(Regular, b"d", b""), entry(Directory, b"d", b"")],
    ];
    for (number, entries) in evil.iter().enumerate() {
        let to = outside.path().join("to");
        fs::create_dir(&to).unwrap();
        let done = unpack_into(&to, &STRANGERS, &archive(entries));
        let why = done.expect_err(&format!("{number}")).to_string();
        assert!(!why.contains('\n'), "{why}");
        assert!(!up.exists());
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 2, "{number}");
        assert_eq!(fs::read_to_string(&victim).unwrap(), "safe", "{number}");
        fs::remove_dir_all(&to).unwrap();
    }
}

#[test]
fn links_are_replaced_and_not_written_through() {
    let outside = tempfile::tempdir().unwrap();
    let victim = outside.path().join("victim");
    fs::write(&victim, "safe").unwrap();
    let to = outside.path().join("to");
    fs::create_dir(&to).unwrap();
    symlink("../victim", to.join("l")).unwrap();
    let entries = [
        entry(Regular, b"l", b""),
        // An absolute name is one below the directory.
        entry(Regular, b"/abs/olute", b""),
        entry(Fifo, b"fifo", b""),
    ];
    unpack_into(&to, &STRANGERS, &archive(&entries)).unwrap();
    assert_eq!(fs::read_to_string(&victim).unwrap(), "safe");
    assert_eq!(fs::read_to_string(to.join("l")).unwrap(), "l");
    assert!(to.join("abs/olute").is_file());
    assert!(fs::metadata(to.join("fifo")).unwrap().file_type().is_fifo());
    // No stranger makes programs that run with the caller's rights.
    assert_eq!(fs::metadata(to.join("l")).unwrap().mode() & 0o7777, 0o755);
}

#[test]
fn only_what_was_asked_for_is_taken() {
    let to = tempfile::tempdir().unwrap();
    let asked = Unpack {
        only: b"asked",
        ..STRANGERS
    };
    fs::write(to.path().join(".profile"), "mine").unwrap();
    let good = [
        entry(Directory, b"asked/", b""),
        entry(Regular, b"./asked/x", b""),
    ];
    unpack_into(to.path(), &asked, &archive(&good)).unwrap();
    for evil in [
        entry(Regular, b".profile", b""),
        entry(HardLink, b"asked/p", b".profile"),
        entry(Regular, b"asked-not", b""),
    ] {
        unpack_into(to.path(), &asked, &archive(&[evil])).expect_err("refused");
    }
    assert_eq!(
        fs::read_to_string(to.path().join(".profile")).unwrap(),
        "mine"
    );
}

#[test]
fn links_of_a_root_lead_as_far_as_they_are_let() {
    for (resolve, relative, absolute) in [
        (Resolve::NoLinks, false, false),
        (Resolve::Beneath, true, false),
        (Resolve::InRoot, true, true),
    ] {
        let to = tempfile::tempdir().unwrap();
        fs::create_dir(to.path().join("usr")).unwrap();
        symlink("usr", to.path().join("relative")).unwrap();
        symlink("/usr", to.path().join("absolute")).unwrap();
        let how = Unpack {
            resolve,
            ..STRANGERS
        };
        for (link, works) in [("relative", relative), ("absolute", absolute)] {
            let path = format!("{link}/{link}");
            let done = unpack_into(
                to.path(),
                &how,
                &archive(&[entry(Regular, path.as_bytes(), b"")]),
            );
            assert_eq!(done.is_ok(), works, "{resolve:?} {link}");
            assert_eq!(to.path().join("usr").join(link).exists(), works);
        }
    }
}

#[test]
fn what_may_be_replaced_is() {
    let to = tempfile::tempdir().unwrap();
    fs::create_dir_all(to.path().join("d/deep/er")).unwrap();
    fs::write(to.path().join("d/deep/file"), "x").unwrap();
    let how = Unpack {
        replace: true,
        ..STRANGERS
    };
    unpack_into(to.path(), &how, &archive(&[entry(Regular, b"d", b"")])).unwrap();
    assert!(to.path().join("d").is_file());
    unpack_into(to.path(), &how, &archive(&[entry(Directory, b"d", b"")])).unwrap();
    assert!(to.path().join("d").is_dir());
}

#[test]
fn an_archive_that_is_cut_leaves_no_half_of_a_file() {
    let to = tempfile::tempdir().unwrap();
    let mut bytes = archive(&[
        entry(Regular, b"first", b""),
        entry(Regular, &[b'x'; 90], b""),
    ]);
    bytes.truncate(3 * 512 + 20);
    unpack_into(to.path(), &STRANGERS, &bytes).expect_err("it is cut");
    let left: Vec<_> = fs::read_dir(to.path()).unwrap().collect();
    assert_eq!(left.len(), 1);
    assert_eq!(
        fs::read_to_string(to.path().join("first")).unwrap(),
        "first"
    );
}

#[test]
fn holes_are_kept() {
    let to = tempfile::tempdir().unwrap();
    // GNU's sparse format 1.0: the map stands before the data.
    let mut data = b"1\n1073741824\n5\n".to_vec();
    data.resize(512, 0);
    data.extend(b"bytes");
    let mut file = entry(Regular, b"GNUSparseFile.0/big", b"");
    file.size = data.len() as u64;
    let records = b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n\
        34 GNU.sparse.realsize=2147483648\n26 GNU.sparse.name=sparse\n";
    let mut header = tar::Header::new_ustar();
    header.set_entry_type(tar::EntryType::XHeader);
    header.set_size(records.len() as u64);
    header.set_cksum();
    let mut bytes = header.as_bytes().to_vec();
    bytes.extend(records);
    bytes.resize(1024, 0);
    let mut writer = TarWriter::new(bytes);
    writer.entry(&file).unwrap();
    writer.data(&data).unwrap();
    unpack_into(to.path(), &STRANGERS, &writer.finish().unwrap()).unwrap();
    let found = fs::metadata(to.path().join("sparse")).unwrap();
    assert_eq!(found.size(), 2 << 30);
    assert!(found.blocks() * 512 < 1 << 20);
    // Of zeroes, and of zeroes with something between them.
    let mut zeroes = vec![0; 8 << 20];
    for (name, middle) in [("all", 0), ("most", 1)] {
        zeroes[4 << 20] = middle;
        fs::write(to.path().join("zeroes"), &zeroes).unwrap();
        let bytes = packed(&to.path().join("zeroes"), name.as_bytes(), false);
        unpack_into(to.path(), &STRANGERS, &bytes).unwrap();
        let made = to.path().join(name);
        assert!(fs::read(&made).unwrap() == zeroes);
        assert!(fs::metadata(&made).unwrap().blocks() * 512 <= 128 << 10);
    }
}
