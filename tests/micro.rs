//! Forks of a guest of a few instructions: they run on any KVM.

#[path = "micro/artifact.rs"]
mod artifact;
#[path = "micro/census.rs"]
mod census;
#[path = "micro/live.rs"]
mod live;
#[path = "micro/pool.rs"]
mod pool;
#[path = "micro/soak.rs"]
mod soak;
#[path = "micro/store.rs"]
mod store;

use fork::{BootSpec, Disks, Error, ForkSpec, Host, Kind, Template};
use std::fs::File;
use std::path::Path;
use std::sync::Arc;

fn spec(memory_mib: u64, vcpus: u8) -> BootSpec {
    BootSpec {
        memory: memory_mib << 20,
        vcpus,
        ..BootSpec::default()
    }
}

fn boot(memory_mib: u64) -> Template {
    let host = Host::open().expect("these tests need /dev/kvm");
    Template::boot(Arc::new(host), &spec(memory_mib, 1)).expect("boots")
}

fn child(hostname: &str) -> ForkSpec {
    ForkSpec {
        hostname: hostname.into(),
        ..ForkSpec::default()
    }
}

#[test]
fn a_child_goes_on_where_its_parent_was_frozen() {
    let template = boot(64);
    let mut child = template.fork(child("one")).expect("forks");
    // Right only if memory, registers, XSAVE state and identity are all there.
    assert_eq!(child.answer().expect("answers"), child.expected_answer());
}

#[test]
fn siblings_differ_and_leave_their_parent_alone() {
    let template = boot(64);
    let before = bytes(&template);
    let mut children: Vec<_> = (0..8)
        .map(|i| template.fork(child(&format!("c{i}"))).expect("forks"))
        .collect();
    let mut answers: Vec<u64> = children
        .iter_mut()
        .map(|child| {
            let answer = child.answer().expect("answers");
            assert_eq!(answer, child.expected_answer());
            answer
        })
        .collect();
    answers.sort_unstable();
    answers.dedup();
    assert_eq!(answers.len(), 8, "each has a generation of its own");
    assert!(before == bytes(&template), "the base has not changed");
}

fn bytes(template: &Template) -> Vec<u8> {
    use std::os::unix::fs::FileExt;
    let mut all = vec![0; template.image().bytes() as usize];
    template
        .image()
        .base()
        .read_exact_at(&mut all, 0)
        .expect("the base is readable");
    all
}

#[test]
fn a_template_on_disk_forks_like_the_one_in_memory() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("t");
    let template = boot(64);
    let manifest = template.save(&path).expect("saves");
    manifest.verify(&path).expect("is what was written");
    let opened = Template::open(Arc::clone(template.host()), &path).expect("opens");
    assert_eq!(opened.kind(), Kind::Micro);
    let mut child = opened.fork(child("disk")).expect("forks");
    assert_eq!(child.answer().expect("answers"), child.expected_answer());
    assert!(
        matches!(template.save(&path), Err(Error::Io { .. })),
        "not over another"
    );
    let left: Vec<_> = std::fs::read_dir(dir.path()).expect("lists").collect();
    assert_eq!(left.len(), 1, "nothing half-made is left: {left:?}");
}

/// Each spoils a saved template, and gives a part of the line it must cause.
#[test]
fn a_spoilt_template_is_refused() {
    type Spoil = fn(&Path);
    let cases: [(&str, Spoil); 5] = [
        ("has format 99", |t| {
            let now = format!("\"format\": {}", fork::FORMAT);
            edit(t, &now, "\"format\": 99")
        }),
        ("rebuild it here", |t| {
            edit(t, "\"family\": ", "\"family\": 1")
        }),
        ("manifest is spoilt", |t| edit(t, "{", "[")),
        ("state is not what was written", |t| {
            let mut state = std::fs::read(t.join("state")).expect("reads");
            state[100] ^= 1;
            std::fs::write(t.join("state"), state).expect("writes");
        }),
        ("memory is cut short", |t| {
            let file = File::options()
                .write(true)
                .open(t.join("memory"))
                .expect("opens");
            file.set_len(4096).expect("truncates");
        }),
    ];
    let template = boot(64);
    for (line, spoil) in cases {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("t");
        template.save(&path).expect("saves");
        spoil(&path);
        let error = Template::open(Arc::clone(template.host()), &path).expect_err(line);
        let text = error.to_string();
        assert!(text.contains(line) && !text.contains('\n'), "{text}");
    }
}

fn edit(template: &Path, from: &str, to: &str) {
    let path = template.join("manifest.json");
    let text = std::fs::read_to_string(&path).expect("reads");
    assert!(text.contains(from), "{text}");
    std::fs::write(&path, text.replacen(from, to, 1)).expect("writes");
}

#[test]
fn what_no_guest_can_have_is_refused_in_one_line() {
    let host = Arc::new(Host::open().expect("these tests need /dev/kvm"));
    for (memory, vcpus) in [(1, 1), (65, 1), (64, 0), (64, 255)] {
        let error = Template::boot(Arc::clone(&host), &spec(memory, vcpus)).expect_err("refused");
        assert!(!error.to_string().contains('\n'), "{error}");
    }
    let template = boot(64);
    let error = template.fork(child("no spaces")).expect_err("refused");
    assert!(matches!(error, Error::Hostname(_)), "{error}");
}

#[test]
fn two_children_never_get_one_writable_disk() {
    let template = boot(64);
    let disk = tempfile::NamedTempFile::new().expect("a file");
    disk.as_file().set_len(1 << 20).expect("sized");
    let with_disk = || ForkSpec {
        hostname: "d".into(),
        disks: Disks {
            root: None,
            writable: Some(disk.reopen().expect("opens").into()),
        },
        ..ForkSpec::default()
    };
    let first = template.fork(with_disk()).expect("forks");
    let error = template.fork(with_disk()).expect_err("refused");
    assert!(error.to_string().contains("writable disk"), "{error}");
    first.end();
    template.fork(with_disk()).expect("free again");
}
