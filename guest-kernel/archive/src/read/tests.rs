use super::*;
use std::io::Cursor;

impl Stream for Cursor<Vec<u8>> {
    fn skip(&mut self, count: u64) -> io::Result<()> {
        match self.position() + count <= self.get_ref().len() as u64 {
            true => self.set_position(self.position() + count),
            false => return Err(io::ErrorKind::UnexpectedEof.into()),
        }
        Ok(())
    }
}

fn read(bytes: &[u8]) -> Result<Vec<Entry>> {
    let mut reader = TarReader::new(Cursor::new(bytes.to_vec()));
    std::iter::from_fn(|| reader.next_entry().transpose()).collect()
}

fn header(kind: tar::EntryType, name: &str, size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(0o644);
    header.set_uid(1);
    header.set_gid(2);
    header.set_mtime(3);
    header.set_size(size);
    header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
    header.set_cksum();
    header
}

/// A header and its data, filled up to whole blocks.
fn member(header: &tar::Header, data: &[u8]) -> Vec<u8> {
    let mut bytes = header.as_bytes().to_vec();
    bytes.extend(data);
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

fn pax(records: &[(&str, &[u8])]) -> Vec<u8> {
    let mut data = Vec::new();
    for (key, value) in records {
        let rest = key.len() + value.len() + 3;
        let length = (rest..).find(|n| *n == rest + n.to_string().len()).unwrap();
        data.extend(format!("{length} {key}=").as_bytes());
        data.extend(*value);
        data.push(b'\n');
    }
    member(
        &header(tar::EntryType::XHeader, "pax", data.len() as u64),
        &data,
    )
}

#[test]
fn a_plain_file_has_its_metadata_and_the_place_of_its_bytes() {
    let entries = read(&member(&header(tar::EntryType::Regular, "a/b", 3), b"abc")).unwrap();
    let [entry] = entries.as_slice() else {
        panic!("{entries:?}")
    };
    assert_eq!(
        (entry.path.as_slice(), entry.kind, entry.mode),
        (b"a/b".as_slice(), Kind::Regular, 0o644)
    );
    assert_eq!((entry.uid, entry.gid, entry.mtime), (1, 2, 3));
    assert_eq!(
        entry.pieces,
        [Piece {
            offset: 0,
            position: 512,
            length: 3
        }]
    );
}

#[test]
fn long_names_come_from_gnu_and_from_pax() {
    let long = "d/".repeat(200) + "f";
    let mut builder = tar::Builder::new(Vec::new());
    let mut plain = header(tar::EntryType::Regular, "", 0);
    builder.append_data(&mut plain, &long, io::empty()).unwrap();
    let entries = read(&builder.into_inner().unwrap()).unwrap();
    assert_eq!(entries[0].path, long.as_bytes());
    let mut bytes = pax(&[
        ("path", long.as_bytes()),
        ("uid", b"70000"),
        ("mtime", b"-1.25"),
    ]);
    bytes.extend(member(&header(tar::EntryType::Regular, "short", 0), b""));
    bytes.extend(member(&header(tar::EntryType::Regular, "next", 0), b""));
    let entries = read(&bytes).unwrap();
    assert_eq!(entries[0].path, long.as_bytes());
    assert_eq!(entries[0].uid, 70000);
    assert_eq!((entries[0].mtime, entries[0].mtime_nsec), (-2, 750_000_000));
    assert_eq!(entries[1].path, b"next", "extensions are for one entry");
}

#[test]
fn binary_attributes_survive() {
    let value = [1, b'\n', 0, b'=', 255];
    let mut bytes = pax(&[("SCHILY.xattr.security.capability", &value)]);
    bytes.extend(member(&header(tar::EntryType::Regular, "f", 0), b""));
    assert_eq!(
        read(&bytes).unwrap()[0].xattrs,
        [(b"security.capability".to_vec(), value.to_vec())]
    );
}

#[test]
fn gnu_sparse_files_have_their_pieces() {
    let mut sparse = header(tar::EntryType::GNUSparse, "s", 5);
    let gnu = sparse.as_gnu_mut().unwrap();
    gnu.set_real_size(1 << 20);
    gnu.sparse[0].set_offset(4096);
    gnu.sparse[0].set_length(5);
    gnu.sparse[1].set_offset(1 << 20);
    gnu.sparse[1].set_length(0);
    sparse.set_cksum();
    let entry = read(&member(&sparse, b"hello")).unwrap().remove(0);
    assert_eq!(entry.size, 1 << 20);
    assert_eq!(
        entry.pieces,
        [Piece {
            offset: 4096,
            position: 512,
            length: 5
        }]
    );
}

#[test]
fn pax_sparse_files_have_their_pieces() {
    let records: [(&str, &[u8]); 4] = [
        ("GNU.sparse.major", b"1"),
        ("GNU.sparse.minor", b"0"),
        ("GNU.sparse.name", b"real"),
        ("GNU.sparse.realsize", b"9000"),
    ];
    let mut bytes = pax(&records);
    let mut data = b"1\n8192\n4\n".to_vec();
    data.resize(512, 0);
    data.extend(b"tail");
    bytes.extend(member(
        &header(tar::EntryType::Regular, "GNUSparseFile.1/real", 516),
        &data,
    ));
    bytes.extend(member(&header(tar::EntryType::Regular, "next", 0), b""));
    let entries = read(&bytes).unwrap();
    assert_eq!(
        (entries[0].path.as_slice(), entries[0].size),
        (b"real".as_slice(), 9000)
    );
    let position = entries[0].pieces[0].position as usize;
    assert_eq!(
        (entries[0].pieces[0].offset, &bytes[position..position + 4]),
        (8192, b"tail".as_slice())
    );
    assert_eq!(entries[1].path, b"next");

    let mut bytes = pax(&[
        ("GNU.sparse.size", b"100"),
        ("GNU.sparse.map", b"10,2,50,1"),
    ]);
    bytes.extend(member(&header(tar::EntryType::Regular, "s", 3), b"abc"));
    let entry = read(&bytes).unwrap().remove(0);
    assert_eq!(entry.size, 100);
    assert_eq!(
        entry
            .pieces
            .iter()
            .map(|p| (p.offset, p.length))
            .collect::<Vec<_>>(),
        [(10, 2), (50, 1)]
    );
}

#[test]
fn what_is_cut_or_corrupt_is_refused() {
    let whole = member(&header(tar::EntryType::Regular, "f", 600), &[7; 600]);
    for length in [1, 511, 513, 1024, 1535] {
        assert!(
            matches!(read(&whole[..length]), Err(Error::Tar(_))),
            "{length}"
        );
    }
    let mut flipped = whole.clone();
    flipped[0] ^= 1;
    assert!(matches!(read(&flipped), Err(Error::Tar(_))));
    let huge = header(tar::EntryType::XHeader, "pax", 1 << 30);
    assert!(matches!(read(&member(&huge, b"")), Err(Error::Limit(_))));
    let unknown = header(tar::EntryType::new(b'Z'), "f", 0);
    assert!(matches!(
        read(&member(&unknown, b"")),
        Err(Error::Entry { .. })
    ));
}

#[test]
fn sparse_maps_that_lie_are_refused() {
    for (map, size) in [
        ("10,5", "12"),
        ("0,1,0,2", "9"),
        ("0,2", "9"),
        ("0", "9"),
        ("18446744073709551615,3", "9"),
    ] {
        let mut bytes = pax(&[
            ("GNU.sparse.size", size.as_bytes()),
            ("GNU.sparse.map", map.as_bytes()),
        ]);
        bytes.extend(member(&header(tar::EntryType::Regular, "s", 3), b"abc"));
        assert!(matches!(read(&bytes), Err(Error::Tar(_))), "{map}");
    }
}

#[test]
fn numbers_are_octal_or_base_256() {
    assert_eq!(number(b"0000644\0").unwrap(), 0o644);
    assert_eq!(number(b"   17 \0").unwrap(), 0o17);
    assert_eq!(number(b"\0\0\0\0").unwrap(), 0);
    assert_eq!(number(&[0x80, 0, 0, 0, 0, 1, 0, 0]).unwrap(), 65536);
    assert_eq!(number(&[0xff; 12]).unwrap(), -1);
    assert!(number(b"0009").is_err());
    assert!(number(&[0x80, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]).is_err());
}

/// Real archives of GNU tar, for the formats that it writes.
#[test]
fn gnu_tar_s_own_sparse_archives_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let file = std::fs::File::create(folder.path().join("s")).unwrap();
    file.set_len(3 << 20).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"middle", 1 << 20).unwrap();
    for format in [
        &["--format=gnu"][..],
        &["--format=posix"],
        &["--format=posix", "--sparse-version=0.1"],
    ] {
        let out = std::process::Command::new("tar")
            .args(format)
            .args(["-S", "-c", "-C"])
            .arg(folder.path())
            .arg("s")
            .output();
        let bytes = out.unwrap().stdout;
        let entry = read(&bytes).unwrap().remove(0);
        assert_eq!(
            (entry.path.as_slice(), entry.size),
            (b"s".as_slice(), 3 << 20),
            "{format:?}"
        );
        let piece = entry
            .pieces
            .iter()
            .find(|p| p.offset <= 1 << 20 && p.offset + p.length > 1 << 20);
        let at = piece.map(|p| (p.position + (1 << 20) - p.offset) as usize);
        // A file system without holes packs it whole.
        assert_eq!(
            &bytes[at.unwrap()..at.unwrap() + 6],
            b"middle",
            "{format:?}"
        );
    }
}
