//! What runs in a container, as its /proc shows it (proc(5)).

use super::Failed;
use std::fs;
use std::os::unix::fs::MetadataExt;
use vm_run_abi::task::ProcessRow;

/// The longest command line that is told, in bytes.
const COMMAND_MAX: usize = 4096;
/// USER_HZ, in which /proc counts.
const TICKS: u64 = 100;

/// All processes but this one, by their numbers.
pub fn processes() -> Result<Vec<ProcessRow>, Failed> {
    let read =
        |path: &str| fs::read_to_string(path).map_err(|e| Failed::io(format!("read {path}"), e));
    let uptime = read("/proc/uptime")?;
    let now = uptime.split('.').next().and_then(|s| s.parse::<u64>().ok());
    let booted = read("/proc/stat")?;
    let booted = booted.lines().find_map(|line| line.strip_prefix("btime "));
    let clock = Clock {
        now: now.unwrap_or_default() * TICKS,
        booted: booted.and_then(|s| s.parse().ok()).unwrap_or_default(),
    };
    let mut pids: Vec<u32> = fs::read_dir("/proc")
        .map_err(|e| Failed::io("list /proc", e))?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|pid| *pid != std::process::id())
        .collect();
    pids.sort_unstable();
    // One that has ended meanwhile is not there.
    Ok(pids
        .into_iter()
        .filter_map(|pid| row(pid, &clock))
        .collect())
}

struct Clock {
    /// Since the boot, in ticks.
    now: u64,
    /// When that was, in seconds since 1970.
    booted: i64,
}

fn row(pid: u32, clock: &Clock) -> Option<ProcessRow> {
    let directory = format!("/proc/{pid}");
    let uid = fs::metadata(&directory).ok()?.uid();
    let stat = fs::read(format!("{directory}/stat")).ok()?;
    let mut command = fs::read(format!("{directory}/cmdline")).ok()?;
    let stat = Stat::parse(&stat)?;
    command.truncate(COMMAND_MAX);
    while command.last() == Some(&0) {
        command.pop();
    }
    for byte in command.iter_mut().filter(|byte| **byte == 0) {
        *byte = b' ';
    }
    if command.is_empty() {
        command = [b"[", stat.name, b"]"].concat();
    }
    Some(ProcessRow {
        uid,
        pid,
        parent: stat.parent,
        started: clock.booted.saturating_add((stat.started / TICKS) as i64),
        age: clock.now.saturating_sub(stat.started),
        ran: stat.ran,
        terminal: terminal(stat.terminal),
        command,
    })
}

/// Of /proc/PID/stat.
struct Stat<'a> {
    name: &'a [u8],
    parent: u32,
    terminal: u32,
    ran: u64,
    started: u64,
}

impl<'a> Stat<'a> {
    /// The name is in brackets, and may hold any byte.
    fn parse(line: &'a [u8]) -> Option<Self> {
        let open = line.iter().position(|byte| *byte == b'(')?;
        let close = line.iter().rposition(|byte| *byte == b')')?;
        let rest = std::str::from_utf8(line.get(close + 1..)?).ok()?;
        // The first of them is the third field.
        let fields: Vec<&str> = rest.split_whitespace().collect();
        let number = |at: usize| fields.get(at - 3)?.parse::<u64>().ok();
        Some(Self {
            name: line.get(open + 1..close)?,
            parent: number(4)? as u32,
            terminal: fields.get(4)?.parse::<i32>().ok()? as u32,
            ran: number(14)? + number(15)?,
            started: number(22)?,
        })
    }
}

/// The name of a terminal, by its device number.
fn terminal(device: u32) -> String {
    const PTS: std::ops::Range<u32> = 136..144;
    let major = device >> 8 & 0xfff;
    let minor = device & 0xff | device >> 12 & 0xf_ff00;
    match major {
        0 => String::new(),
        _ if PTS.contains(&major) => format!("pts/{}", (major - PTS.start) * 256 + minor),
        _ => format!("{major}:{minor}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_proc_are_read_whatever_the_name_is() {
        let line = b"7 (a) b (\xff)) S 3 7 7 34817 7 0 1 2 3 4 50 6 0 0 20 0 1 0 900 1 1\n";
        let stat = Stat::parse(line).unwrap();
        assert_eq!(stat.name, b"a) b (\xff)");
        assert_eq!((stat.parent, stat.ran, stat.started), (3, 56, 900));
        assert_eq!(terminal(stat.terminal), "pts/1");
        assert_eq!(terminal(0), "");
        for nonsense in [&b""[..], b"1 (", b"1 (a) S", b") ("] {
            assert!(Stat::parse(nonsense).is_none());
        }
    }

    #[test]
    fn this_process_is_not_told_of_and_its_parent_is() {
        let all = processes().unwrap();
        assert!(all.iter().all(|row| row.pid != std::process::id()));
        let parent = std::os::unix::process::parent_id();
        let parent = all.iter().find(|row| row.pid == parent).unwrap();
        assert!(!parent.command.is_empty() && parent.started > 1_000_000_000);
    }
}
