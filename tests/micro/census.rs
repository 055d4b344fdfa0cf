//! What a process has of its host, to see that nothing is left.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// The longest that what ends may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// What is counted, each under a name.
pub type Census = BTreeMap<String, usize>;

/// Counts what this process has: descriptors, threads, mappings of a VM's memory and
/// vCPUs, child processes at any depth, cgroups of the spawners `spawners` (by pid),
/// and files below `directory`.
pub fn census(spawners: &[u32], directory: &Path) -> Census {
    let maps = fs::read_to_string("/proc/self/maps").expect("reads");
    let is_of_a_vm = |line: &&str| line.contains("vm-run") || line.contains("kvm");
    let mut all = descriptors();
    all.extend([
        ("threads".into(), entries(Path::new("/proc/self/task"))),
        ("mappings".into(), maps.lines().filter(is_of_a_vm).count()),
        ("processes".into(), descendants().len()),
        ("cgroups".into(), cgroups(spawners)),
        ("files".into(), files(directory)),
    ]);
    all
}

/// The open descriptors, by what they are of: `fd anon_inode:kvm-vm`.
fn descriptors() -> Census {
    let mut found = Census::new();
    for entry in fs::read_dir("/proc/self/fd").expect("lists").flatten() {
        // The one that lists is gone by now.
        if let Ok(target) = fs::read_link(entry.path()) {
            let target = target.display().to_string();
            // Without the number of a socket or a pipe.
            let kind = target.split('[').next().filter(|kind| kind.ends_with(':'));
            *found
                .entry(format!("fd {}", kind.unwrap_or(&target)))
                .or_default() += 1;
        }
    }
    found
}

/// All mappings of this process. The C library keeps some for threads to come, so it
/// is bounded and not the same twice.
pub fn all_mappings() -> usize {
    let maps = fs::read_to_string("/proc/self/maps").expect("reads");
    maps.lines().count()
}

/// What `now` gives when it gives the same twice: a VM that waits in a pool still has
/// devices made by a thread of its own.
pub fn at_rest<T: PartialEq>(now: impl Fn() -> T) -> T {
    loop {
        let seen = now();
        std::thread::sleep(Duration::from_millis(200));
        if now() == seen {
            return seen;
        }
    }
}

/// Waits until `now` gives what was there before.
pub fn await_same<T: PartialEq + std::fmt::Debug>(what: &str, before: &T, now: impl Fn() -> T) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let seen = now();
        if seen == *before {
            return;
        }
        assert!(
            Instant::now() < deadline,
            "{what}: {before:?}, now {seen:?}"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Runs the test `name` in a process of its own, where no other test leaves traces.
/// True: this is that process.
pub fn is_alone(name: &str) -> bool {
    const VARIABLE: &str = "VM_RUN_TEST_ALONE";
    if std::env::var_os(VARIABLE).is_some() {
        return true;
    }
    let ran = Command::new(std::env::current_exe().expect("this program"))
        .args(["--exact", name, "--nocapture"])
        .env(VARIABLE, "1")
        .output()
        .expect("starts");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (out, err) = (text(&ran.stdout), text(&ran.stderr));
    assert!(ran.status.success(), "{out}{err}");
    assert!(out.contains("1 passed"), "no test {name}: {out}");
    print!("{out}");
    false
}

/// The processes that this one started, and those that they did.
pub fn descendants() -> Vec<u32> {
    let mut parents: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    for entry in fs::read_dir("/proc").expect("lists").flatten() {
        let name = entry.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        // One that has just ended has no file.
        if let Some(parent) = parent_of(pid) {
            parents.entry(parent).or_default().push(pid);
        }
    }
    let mut found = vec![std::process::id()];
    let mut next = 0;
    while next < found.len() {
        found.extend(parents.get(&found[next]).into_iter().flatten());
        next += 1;
    }
    found.split_off(1)
}

/// The processes that this one started itself: its spawners.
pub fn spawners() -> Vec<u32> {
    let mut all = descendants();
    all.retain(|pid| parent_of(*pid) == Some(std::process::id()));
    all
}

/// proc_pid_stat(5): the fourth field, after a name that may hold anything.
fn parent_of(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(1)?.parse().ok()
}

fn entries(directory: &Path) -> usize {
    fs::read_dir(directory).expect("lists").count()
}

fn files(directory: &Path) -> usize {
    walk(directory, usize::MAX).len()
}

/// A spawner's directories are called by its pid, in each hierarchy.
fn cgroups(spawners: &[u32]) -> usize {
    let is_of = |path: &&PathBuf, pid: &u32| {
        let prefix = format!("{pid}.");
        path.components().any(|part| {
            let part = part.as_os_str().to_string_lossy();
            part.starts_with(&prefix)
        })
    };
    let all = walk(Path::new("/sys/fs/cgroup"), 6);
    let ours = all
        .iter()
        .filter(|path| path.is_dir())
        .filter(|path| spawners.iter().any(|pid| is_of(path, pid)));
    ours.count()
}

fn walk(directory: &Path, depth: usize) -> Vec<PathBuf> {
    let mut found = Vec::new();
    // What goes meanwhile is not there.
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if depth > 0 && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.extend(walk(&entry.path(), depth - 1));
        }
        found.push(entry.path());
    }
    found
}
