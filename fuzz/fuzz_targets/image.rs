//! A stranger's image: the layers' tar, and the archive with its documents.
#![no_main]

use libfuzzer_sys::fuzz_target;

// The store is part of the program, which has no library.
#[allow(dead_code)]
#[path = "../../src/image/mod.rs"]
mod image;
#[allow(dead_code)]
#[path = "../../src/progress.rs"]
mod progress;

fuzz_target!(|input: (bool, &[u8])| {
    match input {
        (true, layer) => image::fuzz::layer(layer),
        (false, archive) => image::fuzz::archive(archive),
    };
});
