//! Random numbers that the kernel has drawn for a process and that the process has not
//! seen: it was frozen on its way out of the call. The same bytes would wait in every
//! child, and be the first that its programs get, whatever the kernel's generator has
//! become meanwhile. So each child draws them anew, where they lie.
//!
//! A frozen thread is on its way back to user mode, out of a system call or out of an
//! interrupt; /proc tells which, and with what arguments.

use rustix::fd::{AsRawFd, BorrowedFd};
use rustix::fs::{FileType, major, minor, stat};
use rustix::rand::{GetRandomFlags, getrandom};
use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Numbers of x86-64's system calls.
const READ: u64 = 0;
const GETRANDOM: u64 = 318;

/// /dev/random and /dev/urandom (Linux Documentation/admin-guide/devices.txt).
const MEMORY_MAJOR: u32 = 1;
const RANDOM_MINORS: [u32; 2] = [8, 9];

/// The most that is drawn anew for one thread, in bytes. A call is cut short, at the end
/// of a page, when its thread is to be frozen.
const LEN_MAX: u64 = 16 << 20;

/// How much is drawn at once, in bytes.
const PIECE: usize = 16 << 10;

/// What one thread is about to get.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Drawn {
    thread: u32,
    address: u64,
    len: u64,
}

/// What the threads of this cgroup, which is frozen, and of those below it are about to
/// get.
pub fn find(cgroup: BorrowedFd<'_>) -> io::Result<Vec<Drawn>> {
    let mut all = Vec::new();
    let path = format!("/proc/self/fd/{}", cgroup.as_raw_fd());
    find_below(Path::new(&path), &mut all)?;
    Ok(all)
}

fn find_below(cgroup: &Path, all: &mut Vec<Drawn>) -> io::Result<()> {
    let threads = fs::read_to_string(cgroup.join("cgroup.threads"))?;
    // One that has died meanwhile gets nothing any more.
    let threads = threads.lines().filter_map(|line| line.parse().ok());
    all.extend(threads.filter_map(of_thread));
    for entry in fs::read_dir(cgroup)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            find_below(&entry.path(), all)?;
        }
    }
    Ok(())
}

fn of_thread(thread: u32) -> Option<Drawn> {
    let call = fs::read_to_string(format!("/proc/{thread}/syscall")).ok()?;
    let (number, [first, second, third]) = parse(&call)?;
    let (address, len) = match number {
        GETRANDOM => (first, second),
        READ if is_random(thread, first) => (second, third),
        _ => return None,
    };
    Some(Drawn {
        thread,
        address,
        len: len.min(LEN_MAX),
    })
}

/// A line of /proc/PID/syscall: a number, and arguments in hexadecimal. A thread that was
/// not in a call has -1.
fn parse(line: &str) -> Option<(u64, [u64; 3])> {
    let mut words = line.split_whitespace();
    let number = words.next()?.parse().ok()?;
    let mut argument = || u64::from_str_radix(words.next()?.strip_prefix("0x")?, 16).ok();
    Some((number, [argument()?, argument()?, argument()?]))
}

fn is_random(thread: u32, fd: u64) -> bool {
    stat(format!("/proc/{thread}/fd/{fd}")).is_ok_and(|file| {
        FileType::from_raw_mode(file.st_mode) == FileType::CharacterDevice
            && major(file.st_rdev) == MEMORY_MAJOR
            && RANDOM_MINORS.contains(&minor(file.st_rdev))
    })
}

impl Drawn {
    /// Draws it anew. The thread is frozen still.
    pub fn again(&self) -> io::Result<()> {
        let path = format!("/proc/{}/mem", self.thread);
        let memory = match OpenOptions::new().write(true).open(path) {
            Ok(memory) => memory,
            // It was killed.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        };
        let mut bytes = [0; PIECE];
        let mut done = 0;
        while done < self.len {
            let piece = (self.len - done).min(PIECE as u64) as usize;
            let got = getrandom(&mut bytes[..piece], GetRandomFlags::empty())?;
            // What is not there to be written to was not for the kernel either.
            if memory
                .write_all_at(&bytes[..got], self.address.wrapping_add(done))
                .is_err()
            {
                break;
            }
            done += got as u64;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_read() {
        let line = "318 0x7ffd00000000 0x10 0x0 0x1 0x2 0x3 0x7ffd1 0x7f3\n";
        let parsed = Some((GETRANDOM, [0x7ffd_0000_0000, 16, 0]));
        assert_eq!(parse(line), parsed);
        for line in ["", "running\n", "-1 0x7ffd 0x7f3\n", "318\n", "0 1 2 3\n"] {
            assert_eq!(parse(line), None, "{line}");
        }
    }

    #[test]
    fn the_devices_are_told_from_other_files() {
        use std::fs::File;
        use std::os::fd::AsRawFd;
        let own = std::process::id();
        let is = |path: &str| {
            let file = File::open(path).expect(path);
            is_random(own, file.as_raw_fd() as u64)
        };
        assert!(is("/dev/urandom") && is("/dev/random"));
        assert!(!is("/dev/zero") && !is("/proc/self/stat"));
        assert!(!is_random(own, u64::MAX));
    }

    #[test]
    fn it_is_drawn_where_it_lies() {
        let own = [0_u8; 3 * PIECE];
        let drawn = |address: u64, len: usize| Drawn {
            thread: std::process::id(),
            address,
            len: len as u64,
        };
        let address = own.as_ptr() as u64;
        drawn(address + 1, own.len() - 2).again().expect("writes");
        // The compiler has not seen the write.
        let own = std::hint::black_box(own);
        assert_eq!((own[0], own[own.len() - 1]), (0, 0));
        assert!(
            own[1..]
                .chunks(64)
                .all(|chunk| chunk.iter().any(|b| *b != 0))
        );
        drawn(8, 64)
            .again()
            .expect("nothing is there, and no harm done");
    }
}
