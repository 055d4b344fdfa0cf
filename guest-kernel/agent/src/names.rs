//! The files in which a container finds who it is: its hostname, and the machine's id.
//! The guest writes them, and again in every child of a warm template.

use rustix::fd::OwnedFd;
use rustix::fs::{Mode, OFlags, ftruncate, open};
use rustix::io::pwrite;
use rustix::rand::{GetRandomFlags, getrandom};
use std::io;

/// The files, open for writing. The container may write them as well, and may
/// not take them away: they are mounts.
#[derive(Debug)]
pub struct Names {
    /// For /etc/hostname.
    pub hostname: OwnedFd,
    /// For /etc/hosts.
    pub hosts: OwnedFd,
    /// For /etc/machine-id, where the image has one (machine-id(5)): two containers of
    /// one image are two machines.
    pub machine_id: OwnedFd,
}

impl Names {
    /// Makes the files `hostname`, `hosts` and `machine-id` in `directory`, empty.
    pub fn make(directory: &str) -> io::Result<Self> {
        let file = |name: &str| {
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
            let mode = Mode::RUSR | Mode::WUSR | Mode::RGRP | Mode::ROTH;
            open(format!("{directory}/{name}"), flags, mode)
        };
        Ok(Self {
            hostname: file("hostname")?,
            hosts: file("hosts")?,
            machine_id: file("machine-id")?,
        })
    }

    /// Writes the hostname anew, with `more` lines of /etc/hosts.
    pub fn write(&self, hostname: &str, domain: &str, more: &str) -> io::Result<()> {
        // First the room, which is bounded and may be all taken.
        ftruncate(&self.hostname, 0)?;
        ftruncate(&self.hosts, 0)?;
        write_all(&self.hostname, &format!("{hostname}\n"))?;
        write_all(&self.hosts, &hosts(hostname, domain, more))
    }

    /// Draws another machine's id: in a container that has none nobody sees it.
    pub fn draw_machine_id(&self) -> io::Result<()> {
        write_machine_id(&self.machine_id)
    }
}

/// 32 digits and a line's end, at random but for what marks a UUID of version 4.
fn write_machine_id(file: &OwnedFd) -> io::Result<()> {
    let mut id = [0; 16];
    if getrandom(&mut id, GetRandomFlags::empty())? != id.len() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    id[6] = id[6] & 0x0f | 0x40;
    id[8] = id[8] & 0x3f | 0x80;
    let digits: String = id.iter().map(|byte| format!("{byte:02x}")).collect();
    write_all(file, &format!("{digits}\n"))
}

fn hosts(hostname: &str, domain: &str, more: &str) -> String {
    let whole = match domain {
        "" => String::new(),
        domain => format!("{hostname}.{domain} "),
    };
    format!(
        "127.0.0.1\tlocalhost\n\
         ::1\tlocalhost ip6-localhost ip6-loopback\n\
         fe00::\tip6-localnet\n\
         ff00::\tip6-mcastprefix\n\
         ff02::1\tip6-allnodes\n\
         ff02::2\tip6-allrouters\n\
         127.0.1.1\t{whole}{hostname}\n\
         {more}"
    )
}

/// At the start of the file; a file system in memory takes all or nothing.
fn write_all(file: &OwnedFd, content: &str) -> io::Result<()> {
    match pwrite(file, content.as_bytes(), 0)? {
        n if n == content.len() => Ok(()),
        _ => Err(io::ErrorKind::WriteZero.into()),
    }
}
