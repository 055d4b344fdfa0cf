//! What one child writes is seen by no sibling, by no later child, and not by
//! the parent.

use crate::machine::busybox_tree;
use crate::support::{Call, Running, boot, fork_busybox, shell};
use fork::{Disks, ForkSpec, Template};
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Writes when told, and tells when told what it sees.
const LIFE: &str = "b=/bin/busybox; read name < /name; echo $name is ready; read go
    for file in /name /written /tmp/by-$name /dev/shm/memory; do echo by-$name > $file; done
    echo written; read go
    for file in /name /written /dev/shm/memory; do echo $file $($b cat $file); done
    echo $($b ls /tmp)";

#[test]
fn ten_siblings_at_once_with_ten_root_file_systems_see_only_their_own() {
    let dir = tempfile::tempdir().expect("a directory");
    let trees: Vec<_> = (0..10)
        .map(|i| busybox_tree(&dir.path().join(i.to_string()), &format!("tree-{i}")))
        .collect();
    let mut siblings: Vec<Running> = trees.iter().map(|tree| start(tree)).collect();
    for (i, sibling) in siblings.iter_mut().enumerate() {
        sibling.expect(&format!("tree-{i} is ready"));
    }
    for sibling in &mut siblings {
        sibling.say("write");
    }
    for sibling in &mut siblings {
        sibling.expect("written");
    }
    for (i, mut sibling) in siblings.into_iter().enumerate() {
        sibling.say("tell");
        let ran = sibling.end();
        assert_eq!((ran.status, ran.err()), (0, String::new()), "{ran}");
        let by = format!("by-tree-{i}");
        let told = format!(
            "tree-{i} is ready\nwritten\n/name {by}\n/written {by}\n/dev/shm/memory {by}\n{by}\n"
        );
        assert_eq!(ran.out(), told);
    }
    // Nor does the next one on the same root file system see any of it.
    let script = "echo $(/bin/busybox cat /name); /bin/busybox ls /tmp /dev/shm /written";
    let tree = trees[0].to_str().expect("text");
    let ran = Call::run(&["--rootfs", tree, "/bin/sh", "-c", script]).end();
    assert_eq!(ran.out(), "tree-0\n/dev/shm:\n\n/tmp:\n", "{ran}");
    assert!(ran.err().contains("/written: No such file"), "{ran}");
    // The directories themselves are what they were.
    for (i, tree) in trees.iter().enumerate() {
        let name = fs::read_to_string(tree.join("name")).expect("reads");
        assert_eq!(name, format!("tree-{i}\n"));
        assert!(!tree.join("written").exists());
    }
}

fn start(tree: &Path) -> Running {
    let tree = tree.to_str().expect("text");
    Call::run(&["-i", "--rootfs", tree, "/bin/sh", "-c", LIFE]).start()
}

#[test]
fn a_hundred_children_leave_the_templates_memory_as_it_was() {
    let template = boot(64, 1);
    let before = digest(&template);
    for batch in 0..10 {
        let mut children: Vec<_> = (0..10)
            .map(|i| fork_busybox(&template, &format!("child-{batch}-{i}")))
            .collect();
        for child in &mut children {
            // Its kernel has run, and has a random generator of its own.
            child.confirm().expect("has its identity");
        }
        // One of each batch fills some of its memory, too.
        let script = "head -c 4194304 /dev/urandom > /dev/shm/x && wc -c < /dev/shm/x";
        assert_eq!(shell(&mut children[0], script), "4194304\n");
    }
    assert_eq!(digest(&template), before);
}

fn digest(template: &Template) -> String {
    let image = template.image();
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    for at in (0..image.bytes()).step_by(buffer.len()) {
        image.base().read_exact_at(&mut buffer, at).expect("reads");
        hash.update(&buffer);
    }
    hash.finalize().iter().map(|b| format!("{b:02x}")).collect()
}

#[test]
fn two_children_never_get_one_writable_disk() {
    let template = boot(64, 1);
    let dir = tempfile::tempdir().expect("a directory");
    let (disk, link) = (dir.path().join("disk"), dir.path().join("link"));
    File::create(&disk)
        .and_then(|f| f.set_len(1 << 20))
        .expect("makes a disk");
    fs::hard_link(&disk, &link).expect("links");
    let fork = |path: &Path| {
        let open = File::options().read(true).write(true).open(path);
        let writable = Some(open.expect("opens"));
        let disks = Disks {
            root: None,
            writable: writable.map(Into::into),
        };
        let hostname = "disk".into();
        template.fork(ForkSpec {
            hostname,
            disks,
            ..ForkSpec::default()
        })
    };
    let mut first = fork(&disk).expect("forks");
    for same in [&disk, &link] {
        let error = fork(same).expect_err("the first has it").to_string();
        assert!(
            error.contains("writable disk") && !error.contains('\n'),
            "{error}"
        );
    }
    first.confirm().expect("the first is well");
    // To drop it would not wait until its disk is closed.
    first.end();
    fork(&disk).expect("it is free again");
}
