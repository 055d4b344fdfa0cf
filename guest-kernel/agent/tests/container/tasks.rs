//! What the agent does itself in a container.

use crate::cases::{Case, cases};
use crate::host::{Agent, Images, Streams, collect, shell, start, until};
use rustix::fd::AsFd;
use std::fs;
use std::io::Write;
use std::net::Shutdown;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;
use vm_run_abi::protocol::{
    CONTAINER, ContainerSpec, Event, ExitStatus, ProcessId, Request, Stream, Writable,
};
use vm_run_abi::task::{
    Change, ChangeKind, PathStat, ProcessRow, TASK_CONFLICT, TASK_FAILED, TASK_NOT_FOUND, Task,
};
use vm_run_archive::{Mounts, Pack, Plain, Resolve, TarReader, TarWriter, Unpack, pack, unpack};

pub const ALL: &[Case] = cases![
    files_come_out_and_go_in,
    hostile_archives_stay_in_their_directory,
    paths_are_told_of,
    changes_are_dockers,
    processes_are_told_of,
    a_root_without_proc_is_exported,
    an_opened_container_runs_nothing_and_keeps_what_it_is_given,
    a_task_holds_no_stream_of_others,
];

/// What came of a task.
struct Done {
    stdout: Vec<u8>,
    stderr: String,
    code: u8,
}

fn task(agent: &mut Agent, id: ProcessId, task: Task, input: &[u8]) -> Done {
    let Streams {
        mut stdin,
        stdout,
        stderr,
    } = agent.streams_of(id);
    let streams = vec![Stream::Stdin, Stream::Stdout, Stream::Stderr];
    agent.send(&Request::Task { id, task, streams });
    let (stdout, stderr) = (collect(stdout), collect(stderr));
    // One that has failed does not read.
    stdin.write_all(input).ok();
    stdin.shutdown(Shutdown::Write).ok();
    let (stdout, stderr) = (stdout.join().unwrap(), stderr.join().unwrap());
    assert_eq!(agent.event(), Event::Started { process: id });
    let code = match agent.event() {
        Event::Exited {
            process,
            status: ExitStatus::Code(code),
        } if process == id => code,
        other => panic!("{other:?}"),
    };
    let stderr = String::from_utf8(stderr).unwrap();
    assert_eq!(stderr.lines().count(), usize::from(code != 0), "{stderr}");
    Done {
        stdout,
        stderr,
        code,
    }
}

fn good(agent: &mut Agent, id: ProcessId, what: Task, input: &[u8]) -> Vec<u8> {
    let done = task(agent, id, what, input);
    assert_eq!((done.code, &done.stderr[..]), (0, ""));
    done.stdout
}

fn pack_of(path: &str, name: &str) -> Task {
    Task::Pack {
        path: path.into(),
        name: name.into(),
        follow: false,
        one_mount: false,
    }
}

fn unpack_to(path: &str, owners: bool) -> Task {
    Task::Unpack {
        path: path.into(),
        owners,
        replace: false,
    }
}

fn stat_of(agent: &mut Agent, id: ProcessId, path: &str) -> PathStat {
    let path = path.into();
    postcard::from_bytes(&good(agent, id, Task::Stat { path }, b"")).unwrap()
}

/// A tar of a path of this host's.
fn packed(path: &Path, name: &str) -> Vec<u8> {
    let mut out = TarWriter::new(Vec::new());
    let what = Pack {
        path: path.as_os_str().as_bytes(),
        name: name.as_bytes(),
        follow: false,
        mounts: Mounts::Real,
    };
    pack(&what, &mut out).unwrap();
    out.finish().unwrap()
}

fn unpacked(bytes: &[u8], directory: &Path) {
    let directory = fs::File::open(directory).unwrap();
    let how = Unpack {
        only: b"",
        resolve: Resolve::NoLinks,
        replace: false,
        owners: true,
        privileges: true,
    };
    unpack(directory.as_fd(), &how, &mut TarReader::new(Plain(bytes))).unwrap();
}

/// A shell that has done `script` and waits for the end of its input, on a layer of its
/// own in memory.
fn container(images: &Images, script: &str) -> (Agent, Streams) {
    let mut agent = Agent::start(images);
    let (mut container, process) = shell(&format!("{script}; echo done; exec cat"));
    container.writable = Writable::Memory { limit: 64 << 20 };
    let mut streams = start(&mut agent, (container, process));
    assert_eq!(agent.event(), Event::Started { process: CONTAINER });
    until(&mut streams.stdout, "done\n");
    (agent, streams)
}

fn scratch(images: &Images, name: &str) -> std::path::PathBuf {
    let path = images.dir.join(name);
    fs::create_dir(&path).unwrap();
    path
}

fn files_come_out_and_go_in(images: &Images) {
    let script = "mkdir -p /srv/in; echo text > /srv/in/file; chown 7:8 /srv/in/file;
        chmod 4711 /srv/in/file; ln /srv/in/file /srv/twin; ln -s ../nowhere /srv/in/link;
        mknod /srv/null c 1 3; head -c 3000000 /dev/urandom > /srv/big; sha256sum < /srv/big";
    let mut agent = Agent::start(images);
    let (mut spec, process) = shell(&format!("{script}; exec cat"));
    spec.writable = Writable::Memory { limit: 64 << 20 };
    let mut streams = start(&mut agent, (spec, process));
    assert_eq!(agent.event(), Event::Started { process: CONTAINER });
    let sum = until(&mut streams.stdout, "\n");
    let to = scratch(images, "out");
    unpacked(&good(&mut agent, 1, pack_of("/srv", "new"), b""), &to);
    let file = fs::metadata(to.join("new/in/file")).unwrap();
    assert_eq!(
        (file.uid(), file.gid(), file.mode() & 0o7777),
        (7, 8, 0o4711)
    );
    assert_eq!(file.ino(), fs::metadata(to.join("new/twin")).unwrap().ino());
    assert_eq!(
        fs::read_link(to.join("new/in/link")).unwrap(),
        Path::new("../nowhere")
    );
    assert_eq!(
        fs::metadata(to.join("new/null")).unwrap().rdev(),
        rustix::fs::makedev(1, 3)
    );

    // Back, once with owners and once without.
    let again = packed(&to.join("new"), "again");
    good(&mut agent, 2, unpack_to("/srv", true), &again);
    good(&mut agent, 3, unpack_to("/tmp", false), &again);
    let look = "cd /srv/again; stat -c '%u %g %a %h' in/file; readlink in/link; \
                stat -c %F null; sha256sum < big; stat -c '%u %g %a' /tmp/again/in/file";
    let (_, process) = shell(look);
    let looking = agent.streams_of(4);
    agent.send(&Request::Exec { id: 4, process });
    let seen = crate::host::rest(looking.stdout);
    let expected = format!("7 8 4711 2\n../nowhere\ncharacter special file\n{sum}0 0 4711\n");
    assert_eq!(seen, expected);
    assert_eq!(agent.event(), Event::Started { process: 4 });
    agent.event();

    // What is not there, and what stands in the way.
    for (id, what, code) in [
        (5, pack_of("/srv/no", "x"), TASK_NOT_FOUND),
        (6, unpack_to("/srv/no", false), TASK_NOT_FOUND),
        (7, unpack_to("/srv/big", false), TASK_CONFLICT),
        (8, pack_of("/srv/big/", "x"), TASK_CONFLICT),
    ] {
        let done = task(&mut agent, id, what, b"");
        assert_eq!(done.code, code, "{}", done.stderr);
    }
    let clash = packed(&to.join("new/big"), "again");
    let done = task(&mut agent, 9, unpack_to("/srv", false), &clash);
    assert_eq!(done.code, TASK_CONFLICT, "{}", done.stderr);
}

fn hostile_archives_stay_in_their_directory(images: &Images) {
    let (mut agent, _streams) = container(images, "mkdir /srv; ln -s /etc /srv/etc");
    let evil = scratch(images, "evil");
    fs::create_dir(evil.join("x")).unwrap();
    fs::write(evil.join("x/passwd"), "mine").unwrap();
    // Through a link that is there, by its name; and by a name that leads up.
    for (id, name) in [(1, "etc"), (2, "../etc"), (3, "a/../../etc")] {
        let archive = packed(&evil.join("x/passwd"), &format!("{name}/passwd"));
        let done = task(&mut agent, id, unpack_to("/srv", false), &archive);
        assert_ne!(done.code, 0, "{name}");
    }
    // Through a link of its own.
    symlink("/etc", evil.join("l")).unwrap();
    let mut out = TarWriter::new(Vec::new());
    for (path, name) in [("l", &b"l"[..]), ("x/passwd", b"l/passwd")] {
        let what = Pack {
            path: evil.join(path).into_os_string().into_encoded_bytes().leak(),
            name,
            follow: false,
            mounts: Mounts::Real,
        };
        pack(&what, &mut out).unwrap();
    }
    let done = task(
        &mut agent,
        4,
        unpack_to("/srv", false),
        &out.finish().unwrap(),
    );
    assert_eq!(done.code, TASK_FAILED, "{}", done.stderr);
    let passwd = good(&mut agent, 5, pack_of("/etc/passwd", "p"), b"");
    assert!(!String::from_utf8_lossy(&passwd).contains("mine"));
    // In the root, a link that begins at the root is the container's own.
    let archive = packed(&evil.join("x/passwd"), "srv/etc/new");
    good(&mut agent, 6, unpack_to("/", false), &archive);
    assert_eq!(stat_of(&mut agent, 7, "/etc/new").size, 4);
    // Rubbish.
    let done = task(&mut agent, 8, unpack_to("/srv", false), &[7; 2000]);
    assert_eq!(done.code, TASK_FAILED);
}

fn paths_are_told_of(images: &Images) {
    let script = "mkdir -p /srv/deep; echo text > /srv/deep/file; ln -s deep /srv/link;
        ln -s /srv/link/file /srv/far; ln -s gone /srv/dangling; chmod 640 /srv/deep/file";
    let (mut agent, _streams) = container(images, script);
    let file = stat_of(&mut agent, 1, "/srv/link/file");
    assert_eq!(
        (&file.name[..], file.size, file.mode),
        (&b"file"[..], 5, 0o100_640)
    );
    assert!(file.mtime > 1_000_000_000 && file.target.is_empty());
    assert_eq!(stat_of(&mut agent, 2, "srv/far").target, b"/srv/deep/file");
    assert_eq!(stat_of(&mut agent, 3, "/srv/dangling").target, b"/srv/gone");
    assert_eq!(
        stat_of(&mut agent, 4, "/srv/link/").mode & 0o170_000,
        0o040_000
    );
    assert_eq!(stat_of(&mut agent, 5, "/").name, b"/");
    // As high as the root is.
    assert_eq!(stat_of(&mut agent, 6, "/../../srv/deep").name, b"deep");
    let path = b"/srv/no".to_vec();
    assert_eq!(
        task(&mut agent, 7, Task::Stat { path }, b"").code,
        TASK_NOT_FOUND
    );
}

fn changed(agent: &mut Agent, id: ProcessId) -> Vec<String> {
    let all: Vec<Change> = postcard::from_bytes(&good(agent, id, Task::Changes, b"")).unwrap();
    let line = |change: &Change| {
        let letter = match change.kind {
            ChangeKind::Changed => 'C',
            ChangeKind::Added => 'A',
            ChangeKind::Deleted => 'D',
        };
        format!("{letter} {}", String::from_utf8_lossy(&change.path))
    };
    all.iter().map(line).collect()
}

fn changes_are_dockers(images: &Images) {
    let (mut agent, mut streams) = container(images, "true");
    // Making its mount points is no change.
    assert_eq!(changed(&mut agent, 1), [""; 0]);
    let script = "echo x >> /etc/passwd; rm /etc/group; mkdir -p /new/in; touch /new/in/file;
        rm -r /home; rm /bin/garbage; mkdir /bin/garbage; touch /tmp/gone; rm /tmp/gone";
    let (_, process) = shell(script);
    let looking = agent.streams_of(3);
    agent.send(&Request::Exec { id: 3, process });
    assert_eq!(crate::host::rest(looking.stderr), "");
    agent.event();
    agent.event();
    let expected = [
        "C /bin",
        "C /bin/garbage",
        "C /etc",
        "D /etc/group",
        "C /etc/passwd",
        "D /home",
        "A /new",
        "A /new/in",
        "A /new/in/file",
    ];
    assert_eq!(changed(&mut agent, 4), expected);
    // A directory that was removed and made again hides what was in it.
    let (_, process) = shell("mkdir -p /home/web2; chmod 700 /tmp");
    let looking = agent.streams_of(5);
    agent.send(&Request::Exec { id: 5, process });
    assert_eq!(crate::host::rest(looking.stderr), "");
    agent.event();
    agent.event();
    let now = changed(&mut agent, 6);
    for line in ["C /home", "D /home/web", "A /home/web2", "C /tmp"] {
        assert!(now.iter().any(|l| l == line), "{line} in {now:?}");
    }
    streams.stdin.write_all(b"it lives\n").unwrap();
    until(&mut streams.stdout, "it lives\n");
}

fn processes_are_told_of(images: &Images) {
    let (mut agent, _streams) = container(images, "sleep 1234 & true");
    agent.await_sleeping("sleep", 1);
    agent.await_sleeping("cat", 1);
    let rows = good(&mut agent, 1, Task::Processes, b"");
    let rows: Vec<ProcessRow> = postcard::from_bytes(&rows).unwrap();
    let seen: Vec<(u32, u32, &[u8])> = rows
        .iter()
        .map(|r| (r.pid, r.parent, &r.command[..]))
        .collect();
    assert_eq!(seen.len(), 2, "{seen:?}");
    assert_eq!(seen[0], (1, 0, &b"cat"[..]));
    assert_eq!((seen[1].1, seen[1].2), (1, &b"sleep 1234"[..]));
}

fn a_root_without_proc_is_exported(images: &Images) {
    let (mut agent, _streams) = container(images, "echo mine > /etc/mine; rm /etc/group");
    let task = Task::Pack {
        path: b"/".to_vec(),
        name: Vec::new(),
        follow: false,
        one_mount: true,
    };
    let bytes = good(&mut agent, 1, task, b"");
    let mut reader = TarReader::new(Plain(&bytes[..]));
    let mut names = Vec::new();
    while let Some(entry) = reader.next_entry().unwrap() {
        names.push(String::from_utf8(entry.path).unwrap());
    }
    for there in [
        "./",
        "bin/busybox",
        "etc/mine",
        "proc/",
        "dev/",
        "etc/hostname",
    ] {
        assert!(names.iter().any(|name| name == there), "{there}");
    }
    let system = |name: &&String| {
        let is_in = |dir: &str| name.starts_with(dir) && name.len() > dir.len();
        is_in("proc/") || is_in("dev/") || is_in("sys/") || *name == "etc/group"
    };
    assert_eq!(names.iter().find(system), None);
}

fn an_opened_container_runs_nothing_and_keeps_what_it_is_given(images: &Images) {
    let writable = images.writable();
    let spec = || ContainerSpec {
        writable: Writable::Disk,
        kept: true,
        ..ContainerSpec::default()
    };
    let given = scratch(images, "given");
    fs::write(given.join("file"), "given").unwrap();
    {
        let mut agent = Agent::start_with(images, &images.busybox, &writable.0);
        agent.send(&Request::OpenContainer { container: spec() });
        assert_eq!(agent.event(), Event::Started { process: CONTAINER });
        let archive = packed(&given, "given");
        good(&mut agent, 1, unpack_to("/etc/..", false), &archive);
        let rows = good(&mut agent, 2, Task::Processes, b"");
        let rows: Vec<ProcessRow> = postcard::from_bytes(&rows).unwrap();
        assert_eq!(rows.iter().map(|row| row.pid).collect::<Vec<_>>(), [1]);
        agent.signal(9);
        let status = ExitStatus::Signal(9);
        let process = CONTAINER;
        assert_eq!(agent.event(), Event::Exited { process, status });
        let (id, task) = (3, Task::Changes);
        let streams = Vec::new();
        agent.send(&Request::Task { id, task, streams });
        assert!(matches!(agent.event(), Event::StartFailed { .. }));
    }
    let mut agent = Agent::start_with(images, &images.busybox, &writable.0);
    let (_, process) = shell("cat /given/file");
    let streams = start(&mut agent, (spec(), process));
    assert_eq!(crate::host::rest(streams.stdout), "given");
}

fn a_task_holds_no_stream_of_others(images: &Images) {
    let (mut agent, _streams) = container(images, "true");
    let (_, process) = shell("cat; echo ended");
    let mut cat = agent.streams_of(1);
    agent.send(&Request::Exec { id: 1, process });
    assert_eq!(agent.event(), Event::Started { process: 1 });
    // A task that waits for its input, as long as it likes.
    let waiting = agent.streams_of(2);
    let streams = vec![Stream::Stdin, Stream::Stdout, Stream::Stderr];
    let task = unpack_to("/tmp", false);
    agent.send(&Request::Task {
        id: 2,
        task,
        streams,
    });
    assert_eq!(agent.event(), Event::Started { process: 2 });
    cat.stdin.shutdown(Shutdown::Write).unwrap();
    until(&mut cat.stdout, "ended\n");
    drop(waiting);
}
