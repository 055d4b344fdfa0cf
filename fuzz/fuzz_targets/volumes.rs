//! Requests to the server of volumes: whatever comes, it answers or ends, and what lies
//! outside of its root stays as it is.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use std::path::Path;

#[derive(Arbitrary, Debug)]
enum Step {
    /// A request with a header that is one.
    Request {
        opcode: u8,
        node: u8,
        body: Body,
    },
    Raw(Vec<u8>),
}

#[derive(Arbitrary, Debug)]
enum Body {
    Bytes(Vec<u8>),
    /// Numbers, and a name or two.
    Form {
        numbers: Vec<u8>,
        names: [Name; 2],
    },
}

#[derive(Arbitrary, Debug)]
enum Name {
    Known(u8),
    Any(String),
}

const NAMES: [&str; 6] = ["0", "1", "..", "../outside", "link", "made"];

impl Body {
    fn bytes(self) -> Vec<u8> {
        match self {
            Self::Bytes(bytes) => bytes,
            Self::Form { numbers, names } => {
                let mut bytes = numbers;
                for name in names {
                    let name = match name {
                        Name::Known(n) => NAMES[usize::from(n) % NAMES.len()].to_owned(),
                        Name::Any(name) => name,
                    };
                    bytes.extend(name.as_bytes());
                    bytes.push(0);
                }
                bytes
            }
        }
    }
}

fn prepare(dir: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(dir.join("root/0"))?;
    std::fs::write(dir.join("root/1"), "file")?;
    std::fs::write(dir.join("outside"), "outside")?;
    std::os::unix::fs::symlink("../outside", dir.join("root/link"))
}

fuzz_target!(|steps: Vec<Step>| {
    let dir = tempfile::tempdir().expect("a directory");
    prepare(dir.path()).expect("filled");
    let requests: Vec<Vec<u8>> = steps
        .into_iter()
        .map(|step| match step {
            Step::Raw(bytes) => bytes,
            Step::Request { opcode, node, body } => {
                let body = body.bytes();
                let mut bytes = (40 + body.len() as u32).to_le_bytes().to_vec();
                bytes.extend(u32::from(opcode % 52).to_le_bytes());
                bytes.extend(1_u64.to_le_bytes());
                bytes.extend(u64::from(node % 8).to_le_bytes());
                bytes.extend([0; 16]);
                bytes.extend(body);
                bytes
            }
        })
        .collect();
    fork::fuzz::serve_volumes(&dir.path().join("root"), &requests);
    let outside = std::fs::read(dir.path().join("outside")).expect("is there");
    assert_eq!(outside, b"outside");
});
