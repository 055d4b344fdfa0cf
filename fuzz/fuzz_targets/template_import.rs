//! A stranger's template: the documents of its archive, and a blob on its way to a file.
#![no_main]

use libfuzzer_sys::fuzz_target;

// They are part of the program, which has no library.
#[allow(dead_code)]
#[path = "../../src/image/mod.rs"]
mod image;
#[allow(dead_code)]
#[path = "../../src/progress.rs"]
mod progress;
#[allow(dead_code)]
#[path = "../../src/templates"]
mod templates {
    pub mod artifact;
    pub mod import;
    pub mod pieces;
}

use image::archive::{Archive, Input};
use image::digest::Hasher;
use image::layer::Scratch;
use image::limits::Limits;
use image::sink::{Sink, TarSink};
use progress::Quiet;
use templates::{artifact, import, pieces::Pieces};

/// Unpacks to no more than this.
const MOST: u64 = 16 << 20;

#[derive(Debug, arbitrary::Arbitrary)]
enum Given<'a> {
    /// A manifest, and what the artifact says of its layers.
    Documents {
        config: &'a [u8],
        layers: &'a str,
    },
    Index(&'a [u8]),
    Blob(&'a [u8]),
}

fuzz_target!(|input: Given<'_>| {
    match input {
        Given::Documents { config, layers } => {
            let document = format!(
                r#"{{"schemaVersion":2,"artifactType":"{}","config":{},"layers":{layers}}}"#,
                artifact::ARTIFACT,
                descriptor(config),
            );
            let index = format!(
                r#"{{"schemaVersion":2,"manifests":[{}]}}"#,
                descriptor(document.as_bytes())
            );
            find(&[config, document.as_bytes()], index.as_bytes());
        }
        Given::Index(index) => find(&[], index),
        Given::Blob(blob) => {
            let put = |piece: &[u8], at: u64| {
                assert!(at + piece.len() as u64 <= MOST, "more than it may be");
                Ok(())
            };
            let pieces = Pieces::new(blob).expect("zstd");
            if let Ok(bytes) = pieces.unpack(MOST, put, &Quiet) {
                assert!(bytes <= MOST);
            }
        }
    }
});

fn descriptor(bytes: &[u8]) -> String {
    let (digest, size) = (Hasher::digest(bytes), bytes.len());
    format!(r#"{{"mediaType":"","digest":"{digest}","size":{size}}}"#)
}

/// What an import makes of these documents.
fn find(blobs: &[&[u8]], index: &[u8]) {
    let mut archive = Vec::new();
    let mut tar = TarSink::new(&mut archive);
    for blob in blobs {
        let name = format!("blobs/sha256/{}", &Hasher::digest(blob)[7..]);
        tar.document(&name, blob).expect("writes");
    }
    tar.document("index.json", index).expect("writes");
    tar.finish().expect("writes");
    let limits = Limits::default();
    let scratch = Scratch {
        directory: &std::env::temp_dir(),
        limits: &limits,
        progress: &Quiet,
    };
    let archive = Archive::open(Input::Reader(&mut archive.as_slice()), &scratch);
    if let Ok(found) = import::find(&archive.expect("a tar"), &limits) {
        assert_eq!(found.manifest.format, fork::FORMAT);
    }
}
