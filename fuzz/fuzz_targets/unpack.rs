//! A guest's archive, unpacked into a directory of the host: nothing appears beside it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rustix::fd::AsFd;
use std::fs::{self, File};
use vm_run_archive::{Plain, Resolve, TarReader, Unpack, unpack};

fuzz_target!(|input: (bool, &[u8])| {
    let (replace, bytes) = input;
    let outside = tempfile::tempdir().expect("a directory");
    let inside = outside.path().join("inside");
    fs::create_dir(&inside).expect("a directory");
    let how = Unpack {
        only: b"",
        resolve: Resolve::NoLinks,
        replace,
        owners: false,
        privileges: false,
    };
    let directory = File::open(&inside).expect("it is there");
    // A refusal is as good as an archive.
    unpack(directory.as_fd(), &how, &mut TarReader::new(Plain(bytes))).ok();
    assert_eq!(
        fs::read_dir(outside.path()).expect("it is there").count(),
        1
    );
});
