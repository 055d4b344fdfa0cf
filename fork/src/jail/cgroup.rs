//! cgroups for workers: one for each, under one for each spawner, with the limits that
//! were asked for. Versions 2 and 1, and hosts that have both (cgroups(7)).
//!
//! ```text
//! <the spawner's own cgroup>/vm-run/<spawner>/<worker>
//! ```
//!
//! In version 2 a cgroup that holds processes cannot hand controllers to its children
//! (cgroup-v2.rst, "No Internal Process Constraint"). Where the spawner's own is such a
//! one, the hierarchy's root takes its place, as container engines without systemd do.
//!
//! The spawner's directory is locked (flock(2)) while it lives: one that nobody locks
//! was left by a spawner that was killed, and the next one removes it.

use super::Limits;
use rustix::fs::{FlockOperation, Mode, OFlags, flock, open};
use rustix::io::Errno;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The directory that all spawners of a place share.
const SHARED: &str = "vm-run";

/// The period over which CPU time is counted, in microseconds: the kernel's default.
const PERIOD: u64 = 100_000;

/// What is bounded, by the controllers' names.
const CONTROLLERS: [&str; 3] = ["memory", "pids", "cpu"];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    V1,
    V2,
}

/// A mounted hierarchy.
#[derive(Debug, PartialEq, Eq)]
struct Hierarchy {
    version: Version,
    /// Of [`CONTROLLERS`]; in version 2 they are found out by trying.
    controllers: Vec<&'static str>,
    mount: PathBuf,
    /// The spawner's own cgroup.
    own: PathBuf,
}

/// A hierarchy in use: the spawner's directory in it.
#[derive(Debug)]
struct Tree {
    version: Version,
    controllers: Vec<&'static str>,
    dir: PathBuf,
    _lock: OwnedFd,
}

/// The cgroups of one spawner.
#[derive(Debug, Default)]
pub(crate) struct Cgroups {
    trees: Vec<Tree>,
    settings: Vec<(&'static str, Version, &'static str, String)>,
    missing: Vec<String>,
    /// Those of workers that have ended, and that the kernel still holds: threads of
    /// KVM end a moment after their VM.
    leftovers: Vec<PathBuf>,
}

/// The cgroup of one worker: a directory in each hierarchy.
#[derive(Debug)]
pub(crate) struct Group {
    dirs: Vec<PathBuf>,
}

impl Cgroups {
    /// Finds or makes the places for the controllers that `limits` needs, and removes
    /// what killed spawners have left there. What cannot be had is in [`Self::missing`].
    pub(crate) fn prepare(limits: &Limits) -> Self {
        let settings = settings(limits);
        let mut wanted: Vec<&'static str> = settings.iter().map(|setting| setting.0).collect();
        wanted.dedup();
        let mut this = Self {
            settings,
            ..Self::default()
        };
        let mut reasons = Vec::new();
        for hierarchy in hierarchies() {
            let open: Vec<_> = wanted
                .iter()
                .copied()
                .filter(|&controller| !this.has(controller))
                .collect();
            match Tree::prepare(&hierarchy, &open) {
                Ok(Some(tree)) => this.trees.push(tree),
                Ok(None) => {}
                Err(error) => reasons.push(format!("{}: {error}", hierarchy.own.display())),
            }
        }
        for controller in wanted {
            if !this.has(controller) {
                let mut line = format!("no {controller} cgroup");
                if !reasons.is_empty() {
                    line = format!("{line} ({})", reasons.join("; "));
                }
                this.missing.push(line);
            }
        }
        this
    }

    fn has(&self, controller: &str) -> bool {
        self.trees
            .iter()
            .any(|tree| tree.controllers.contains(&controller))
    }

    /// What limits cannot be kept, one line each.
    pub(crate) fn missing(&self) -> &[String] {
        &self.missing
    }

    /// Makes a cgroup with its limits.
    ///
    /// # Errors
    /// What mkdir(2) or a limit's file says. Nothing is left.
    pub(crate) fn create(&self, name: &str) -> io::Result<Group> {
        let mut group = Group { dirs: Vec::new() };
        match self.fill(&mut group, name) {
            Ok(()) => Ok(group),
            Err(error) => {
                group.remove_dirs();
                Err(error)
            }
        }
    }

    fn fill(&self, group: &mut Group, name: &str) -> io::Result<()> {
        for tree in &self.trees {
            let dir = tree.dir.join(name);
            fs::create_dir(&dir)?;
            group.dirs.push(dir.clone());
            for (controller, version, file, value) in &self.settings {
                if *version == tree.version && tree.controllers.contains(controller) {
                    fs::write(dir.join(file), value)?;
                }
            }
        }
        Ok(())
    }

    /// Removes the cgroup of a worker that has been reaped, now or a little later.
    pub(crate) fn remove(&mut self, group: Group) {
        self.leftovers.extend(group.dirs);
        self.sweep();
    }

    fn sweep(&mut self) {
        self.leftovers.retain(|dir| !remove(dir));
    }

    /// Removes everything; all workers have been reaped. False when something is left,
    /// for the next spawner to remove.
    pub(crate) fn end(mut self) -> bool {
        for wait in [0, 1, 4, 16, 64, 256] {
            std::thread::sleep(Duration::from_millis(wait));
            self.sweep();
            if self.leftovers.is_empty() {
                break;
            }
        }
        let mut all = true;
        for tree in &self.trees {
            all &= remove(&tree.dir);
            // Others may use it.
            if let Some(shared) = tree.dir.parent() {
                remove(shared);
            }
        }
        all
    }
}

impl Group {
    /// Puts a process into it, with all of its threads.
    pub(crate) fn add(&self, pid: u32) -> io::Result<()> {
        self.dirs
            .iter()
            .try_for_each(|dir| fs::write(dir.join("cgroup.procs"), pid.to_string()))
    }

    fn remove_dirs(&self) {
        for dir in &self.dirs {
            remove(dir);
        }
    }
}

/// Whether the cgroup is gone. EBUSY: it holds processes or cgroups still.
fn remove(dir: &Path) -> bool {
    match fs::remove_dir(dir) {
        Ok(()) => true,
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    }
}

/// The files to write, by controller and version.
fn settings(limits: &Limits) -> Vec<(&'static str, Version, &'static str, String)> {
    let mut settings = Vec::new();
    if let Some(bytes) = limits.memory {
        let bytes = bytes.to_string();
        settings.push(("memory", Version::V2, "memory.max", bytes.clone()));
        settings.push(("memory", Version::V1, "memory.limit_in_bytes", bytes));
    }
    let processes = limits.processes.to_string();
    settings.push(("pids", Version::V2, "pids.max", processes.clone()));
    settings.push(("pids", Version::V1, "pids.max", processes));
    if let Some(cpus) = limits.cpus {
        // The kernel takes no quota under a millisecond (sched-bwc.rst).
        let quota = ((cpus * PERIOD as f64) as u64).max(1000);
        let v2 = format!("{quota} {PERIOD}");
        settings.push(("cpu", Version::V2, "cpu.max", v2));
        settings.push(("cpu", Version::V1, "cpu.cfs_period_us", PERIOD.to_string()));
        settings.push(("cpu", Version::V1, "cpu.cfs_quota_us", quota.to_string()));
    }
    settings
}

impl Tree {
    /// The spawner's directory in `hierarchy`, if it has any of the `wanted`.
    fn prepare(hierarchy: &Hierarchy, wanted: &[&'static str]) -> io::Result<Option<Self>> {
        let (place, controllers) = match hierarchy.version {
            Version::V1 => {
                let mut had = wanted.to_vec();
                had.retain(|controller| hierarchy.controllers.contains(controller));
                (&hierarchy.own, had)
            }
            Version::V2 => {
                let own = delegate(&hierarchy.own, wanted);
                if own.len() == wanted.len() {
                    (&hierarchy.own, own)
                } else {
                    (&hierarchy.mount, delegate(&hierarchy.mount, wanted))
                }
            }
        };
        if controllers.is_empty() {
            return Ok(None);
        }
        let shared = place.join(SHARED);
        let (dir, lock) = loop {
            match claim(&shared) {
                // Another spawner, ending, has just removed it.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                done => break done?,
            }
        };
        let controllers = match hierarchy.version {
            Version::V1 => controllers,
            Version::V2 => {
                delegate(&shared, &controllers);
                delegate(&dir, &controllers)
            }
        };
        Ok(Some(Self {
            version: hierarchy.version,
            controllers,
            dir,
            _lock: lock,
        }))
    }
}

/// Hands controllers of a version 2 cgroup to its children; returns those of `wanted`
/// that they then have.
fn delegate(cgroup: &Path, wanted: &[&'static str]) -> Vec<&'static str> {
    let file = cgroup.join("cgroup.subtree_control");
    for controller in wanted {
        // Refused where there is no such controller, or where processes are in the
        // way: what counts is what is then read.
        if let Err(error) = fs::write(&file, format!("+{controller}")) {
            log::debug!("{}: +{controller}: {error}", file.display());
        }
    }
    let given = fs::read_to_string(&file).unwrap_or_default();
    let mut had = wanted.to_vec();
    had.retain(|controller| given.split_whitespace().any(|word| word == *controller));
    had
}

/// Makes a directory of this spawner's own in `shared`, locked, after having removed
/// those of dead spawners. `shared` is locked meanwhile, so that none is removed
/// between its making and its locking.
fn claim(shared: &Path) -> io::Result<(PathBuf, OwnedFd)> {
    match fs::create_dir(shared) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let guard = open_dir(shared)?;
    flock(&guard, FlockOperation::LockExclusive)?;
    remove_dead(shared)?;
    let pid = std::process::id();
    // Another PID namespace may have the same pid.
    for nth in 0..100 {
        let dir = shared.join(format!("{pid}.{nth}"));
        match fs::create_dir(&dir) {
            Ok(()) => {
                let lock = open_dir(&dir)?;
                flock(&lock, FlockOperation::NonBlockingLockExclusive)?;
                return Ok((dir, lock));
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
    Err(io::ErrorKind::AlreadyExists.into())
}

/// Removes the directories that nobody locks. One whose workers are just dying stays
/// for the next time.
fn remove_dead(shared: &Path) -> io::Result<()> {
    for spawner in directories(shared)? {
        let Ok(lock) = open_dir(&spawner) else {
            continue;
        };
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => continue,
            Err(errno) => return Err(errno.into()),
        }
        for worker in directories(&spawner)? {
            remove(&worker);
        }
        remove(&spawner);
    }
    Ok(())
}

fn directories(of: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(of)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            found.push(entry.path());
        }
    }
    Ok(found)
}

fn open_dir(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(open(path, flags, Mode::empty())?)
}

/// The hierarchies that are mounted, and this process's cgroup in each. Version 2
/// first: where both have a controller's name, the one that is bound to it shows it.
fn hierarchies() -> Vec<Hierarchy> {
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    parse(&read("/proc/self/mountinfo"), &read("/proc/self/cgroup"))
}

fn parse(mountinfo: &str, cgroups: &str) -> Vec<Hierarchy> {
    let mut found: Vec<Hierarchy> = mountinfo
        .lines()
        .filter_map(|line| {
            // proc_pid_mountinfo(5): 36 35 98:0 /root /mount opts shared:1 - type src opts
            let (fields, end) = line.split_once(" - ")?;
            let mut fields = fields.split(' ').skip(3);
            let (root, mount) = (fields.next()?, PathBuf::from(fields.next()?));
            let mut end = end.split(' ');
            let (kind, _, options) = (end.next()?, end.next()?, end.next()?);
            let (version, controllers) = match kind {
                "cgroup2" => (Version::V2, Vec::new()),
                "cgroup" => {
                    let mut had = CONTROLLERS.to_vec();
                    had.retain(|controller| options.split(',').any(|word| word == *controller));
                    (Version::V1, had)
                }
                _ => return None,
            };
            if version == Version::V1 && controllers.is_empty() {
                return None;
            }
            let path = path_in(cgroups, version, controllers.first().copied())?;
            // A container sees a part of the hierarchy, and its path from the top.
            let below = Path::new(path).strip_prefix(root).ok();
            let own = below.map_or_else(|| mount.clone(), |below| mount.join(below));
            Some(Hierarchy {
                version,
                controllers,
                mount,
                own,
            })
        })
        .collect();
    found.sort_by_key(|hierarchy| hierarchy.version == Version::V1);
    // The same hierarchy, mounted twice.
    found.dedup_by(|a, b| a.version == Version::V2 && b.version == Version::V2);
    found
}

/// This process's path in a hierarchy: `4:memory:/path` or `0::/path` (cgroups(7)).
fn path_in<'a>(cgroups: &'a str, version: Version, controller: Option<&str>) -> Option<&'a str> {
    cgroups.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':');
        let (number, names, path) = (fields.next()?, fields.next()?, fields.next()?);
        let ours = match version {
            Version::V2 => number == "0" && names.is_empty(),
            Version::V1 => names.split(',').any(|name| Some(name) == controller),
        };
        ours.then_some(path)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_versions_are_found_with_the_own_cgroup() {
        let mountinfo = "\
22 1 0:20 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
30 22 0:25 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory
31 22 0:26 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
32 22 0:27 / /sys/fs/cgroup/devices rw - cgroup cgroup rw,devices
33 22 0:28 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
";
        let cgroups = "8:cpu,cpuacct:/user\n4:memory:/session/1\n0::/user.slice/a b\n";
        let found = parse(mountinfo, cgroups);
        let seen: Vec<_> = found
            .iter()
            .map(|h| {
                (
                    h.version,
                    h.controllers.as_slice(),
                    h.own.to_str().unwrap_or(""),
                )
            })
            .collect();
        assert_eq!(
            seen,
            [
                (
                    Version::V2,
                    &[][..],
                    "/sys/fs/cgroup/unified/user.slice/a b"
                ),
                (
                    Version::V1,
                    &["memory"][..],
                    "/sys/fs/cgroup/memory/session/1"
                ),
                (Version::V1, &["cpu"][..], "/sys/fs/cgroup/cpu,cpuacct/user"),
            ]
        );
    }

    #[test]
    fn a_container_sees_its_part() {
        let mountinfo = "33 22 0:28 /docker/1 /sys/fs/cgroup rw - cgroup2 cgroup rw\n";
        let own = |cgroups| parse(mountinfo, cgroups)[0].own.clone();
        assert_eq!(own("0::/docker/1/a\n"), Path::new("/sys/fs/cgroup/a"));
        assert_eq!(own("0::/elsewhere\n"), Path::new("/sys/fs/cgroup"));
    }

    #[test]
    fn limits_are_written_as_the_kernel_reads_them() {
        let limits = Limits {
            memory: Some(1 << 20),
            processes: 9,
            cpus: Some(1.5),
        };
        let values: Vec<_> = settings(&limits)
            .into_iter()
            .filter(|setting| setting.1 == Version::V2)
            .map(|(_, _, file, value)| (file, value))
            .collect();
        assert_eq!(
            values,
            [
                ("memory.max", "1048576".to_owned()),
                ("pids.max", "9".to_owned()),
                ("cpu.max", "150000 100000".to_owned()),
            ]
        );
    }
}
