//! What a child costs its host in memory.

use crate::error::Error;
use rustix::process::Pid;
use std::fs::File;
use std::io::{BufRead, BufReader};

/// Memory of a child in user space, in KiB, and its time. KVM's own memory for a VM
/// belongs to no process; `vm-run bench` measures it over many.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ChildStats {
    /// Guest memory that only this child has: what it wrote.
    pub guest_private: u64,
    /// Guest memory that it has mapped: its own, and what it read of the base.
    pub guest_mapped: u64,
    /// All memory that only this child has: with a worker of its own, the
    /// process's too; else as `guest_private`.
    pub private: u64,
    /// The proportional set size: shared pages divided by those who share them.
    /// Of the whole process, or of guest memory alone, as `private`.
    pub pss: u64,
    /// Page tables of its process; zero for a child that has none of its own.
    pub page_tables: u64,
    /// Processor time of its process so far, in microseconds; zero likewise.
    pub cpu_us: u64,
    /// What it has touched of its root image, mapped from the host's page cache and
    /// shared with all children that map that image. `None`: the image is not mapped,
    /// and the guest reads it from its disk.
    pub root_mapped: Option<u64>,
}

/// Of a child in this process, by where its memory and its root image lie:
/// (address, length).
pub(crate) fn of_mappings(
    mappings: &[(u64, u64)],
    root_image: Option<(u64, u64)>,
) -> Result<ChildStats, Error> {
    let path = "/proc/self/smaps";
    let mut stats = ChildStats::default();
    let mut root = Root::new(root_image);
    each_mapping(path, |mapping| {
        if mappings.iter().any(|range| is_in(mapping, *range)) {
            stats.guest_private += mapping.own;
            stats.guest_mapped += mapping.rss;
            stats.private += mapping.own;
            stats.pss += mapping.pss;
        }
        root.count(mapping);
    })?;
    stats.root_mapped = root.mapped;
    Ok(stats)
}

/// Of a child in the worker `pid`, by where its memory and its root image lie there.
pub(crate) fn of_process(
    pid: Pid,
    mappings: &[(u64, u64)],
    root_image: Option<(u64, u64)>,
) -> Result<ChildStats, Error> {
    let pid = pid.as_raw_nonzero();
    let mut stats = ChildStats::default();
    let mut root = Root::new(root_image);
    each_mapping(&format!("/proc/{pid}/smaps"), |mapping| {
        root.count(mapping);
        if mappings.iter().any(|range| is_in(mapping, *range)) {
            stats.guest_private += mapping.own;
            stats.guest_mapped += mapping.rss;
            stats.private += mapping.own;
        } else {
            stats.private += mapping.private;
        }
        stats.pss += mapping.pss;
    })?;
    each_line(&format!("/proc/{pid}/status"), |line| {
        if let Some(kib) = field(line, "VmPTE:") {
            stats.page_tables = kib;
        }
    })?;
    each_line(&format!("/proc/{pid}/stat"), |line| {
        stats.cpu_us = cpu_us(line)
    })?;
    stats.root_mapped = root.mapped;
    Ok(stats)
}

/// utime and stime (proc_pid_stat(5)): the 14th and 15th field, counted from the end of
/// the name, which may hold anything.
fn cpu_us(stat: &str) -> u64 {
    const FIRST: usize = 3;
    let fields = stat.rsplit_once(')').map_or("", |(_, after)| after);
    let ticks =
        |number| -> Option<u64> { fields.split_whitespace().nth(number - FIRST)?.parse().ok() };
    let ticks = ticks(14).unwrap_or_default() + ticks(15).unwrap_or_default();
    ticks.saturating_mul(1_000_000) / rustix::param::clock_ticks_per_second().max(1)
}

/// Whether a mapping begins in a range: (address, length). Guest memory is many mappings:
/// its layers, and what the guest has given back, are some of their own.
fn is_in(mapping: &Mapping, (start, len): (u64, u64)) -> bool {
    (start..start.saturating_add(len)).contains(&mapping.start)
}

/// Counts what is mapped of a root image.
struct Root {
    range: Option<(u64, u64)>,
    mapped: Option<u64>,
}

impl Root {
    fn new(range: Option<(u64, u64)>) -> Self {
        let mapped = range.map(|_| 0);
        Self { range, mapped }
    }

    fn count(&mut self, mapping: &Mapping) {
        if self.range.is_some_and(|range| is_in(mapping, range)) {
            self.mapped = self.mapped.map(|kib| kib + mapping.rss);
        }
    }
}

#[derive(Debug, Default)]
struct Mapping {
    start: u64,
    rss: u64,
    pss: u64,
    /// Dirty, and mapped by nobody else: of a memfd's pages also those of the
    /// file, if only one process has mapped them.
    private: u64,
    /// Copied by a write, or swapped out after that.
    own: u64,
}

/// Reads smaps (proc_pid_smaps(5)): a line of addresses for each mapping, and
/// lines of counts.
fn each_mapping(path: &str, mut take: impl FnMut(&Mapping)) -> Result<(), Error> {
    let mut now = Mapping::default();
    each_line(path, |line| {
        let name_of_count = line.split_whitespace().next().unwrap_or_default();
        if !name_of_count.ends_with(':') {
            take(&now);
            now = begin(line);
        } else if let Some(kib) = field(line, "Rss:") {
            now.rss = kib;
        } else if let Some(kib) = field(line, "Pss:") {
            now.pss = kib;
        } else if let Some(kib) = field(line, "Private_Dirty:") {
            now.private += kib;
        } else if let Some(kib) = field(line, "Anonymous:") {
            now.own += kib;
        } else if let Some(kib) = field(line, "Swap:") {
            now.private += kib;
            now.own += kib;
        }
    })?;
    take(&now);
    Ok(())
}

/// By the line that a mapping begins with.
fn begin(line: &str) -> Mapping {
    let (start, _) = line.split_once('-').unwrap_or_default();
    Mapping {
        start: u64::from_str_radix(start, 16).unwrap_or_default(),
        ..Mapping::default()
    }
}

/// The count of this name, in KiB.
fn field(line: &str, name: &str) -> Option<u64> {
    let rest = line.strip_prefix(name)?;
    rest.trim().strip_suffix("kB")?.trim().parse().ok()
}

fn each_line(path: &str, mut take: impl FnMut(&str)) -> Result<(), Error> {
    let file = File::open(path).map_err(Error::io(path, "open"))?;
    for line in BufReader::new(file).lines() {
        take(&line.map_err(Error::io(path, "read"))?);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::process::getpid;

    #[test]
    fn a_process_and_its_parts_add_up() {
        let all = of_process(getpid(), &[], None).expect("of itself");
        assert!(all.private > 0 && all.pss >= all.private && all.page_tables > 0);
        let nothing = of_mappings(&[], None).expect("of nothing");
        assert_eq!(nothing, ChildStats::default());
        let most = of_mappings(&[(0, u64::MAX)], Some((0, u64::MAX))).expect("of everything");
        assert!(most.private > 0 && most.root_mapped > Some(0));
    }

    #[test]
    fn time_is_read_whatever_the_name() {
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4194560 90 0 0 0 150 50 0 0 20 0 1 0";
        let second = rustix::param::clock_ticks_per_second();
        assert_eq!(cpu_us(stat), 200 * 1_000_000 / second);
        assert_eq!(cpu_us("nonsense"), 0);
    }

    #[test]
    fn lines_are_read_as_the_kernel_writes_them() {
        let guest = begin(
            "7f0000000000-7f0010000000 rw-p 00000000 00:01 2051  /memfd:vm-run-guest (deleted)",
        );
        assert_eq!(guest.start, 0x7f00_0000_0000);
        assert_eq!(
            field("Private_Dirty:        40 kB", "Private_Dirty:"),
            Some(40)
        );
    }
}
