//! What a guest knows of its files at one instant, on its way to the broker of a fork.
//!
//! Descriptors go, not names: what was renamed or removed since is the same file in both.
//! They lie in the mounts of the broker that opened them, which has gone when its container
//! has; its namespace goes along and keeps them.

use super::server::{Known, KnownFile};
use crate::worker::packet;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use serde::{Deserialize, Serialize};
use std::io;
use std::sync::Arc;

/// So many descriptors go with one packet.
const PART: usize = 32;
const _: () = assert!(PART <= packet::DESCRIPTORS_MAX);

/// All of it. What is open is shared with whoever takes it.
#[derive(Debug)]
pub(super) struct Table {
    /// The mounts that all of this is in.
    pub(super) namespace: Arc<OwnedFd>,
    pub(super) known: Known,
    /// What is open, by handle.
    pub(super) handles: Vec<(u64, Arc<OwnedFd>)>,
    /// The number of the next handle.
    pub(super) next_handle: u64,
}

/// A part of it: one packet.
#[derive(Debug, Serialize, Deserialize)]
enum Part {
    /// First. With it: the namespace.
    Begin {
        next: u64,
        next_handle: u64,
        devices: Vec<(u32, u32)>,
    },
    /// Numbers, and how often the guest was told of each. With it: a descriptor for each.
    Files(Vec<(u64, u64)>),
    /// Handles. With it: a descriptor for each.
    Handles(Vec<u64>),
    /// That was all.
    End,
}

/// A table that is being sent.
#[derive(Debug)]
pub(super) struct HandOver {
    table: Arc<Table>,
    /// The number of the part that comes next.
    at: usize,
    to: OwnedFd,
}

impl HandOver {
    /// Of a table, to a broker that waits for it.
    pub(super) fn new(table: Arc<Table>, to: OwnedFd) -> Self {
        Self { table, at: 0, to }
    }

    /// Sends as much as there is room for; true when that was all.
    pub(super) fn go_on(&mut self) -> io::Result<bool> {
        loop {
            let (part, with) = self.table.part(self.at);
            match packet::try_send(&self.to, &part, &with) {
                Err(full) if full.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                sent => sent?,
            }
            if matches!(part, Part::End) {
                return Ok(true);
            }
            self.at += 1;
        }
    }
}

impl AsFd for HandOver {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.to.as_fd()
    }
}

impl Table {
    fn part(&self, at: usize) -> (Part, Vec<BorrowedFd<'_>>) {
        let Some(at) = at.checked_sub(1) else {
            let begin = Part::Begin {
                next: self.known.next,
                next_handle: self.next_handle,
                devices: self.known.devices.clone(),
            };
            return (begin, vec![self.namespace.as_fd()]);
        };
        let of_files = self.known.files.len().div_ceil(PART);
        if let Some(files) = self.known.files.chunks(PART).nth(at) {
            let numbers = files.iter().map(|file| (file.number, file.told)).collect();
            let with = files.iter().map(|file| file.fd.as_fd()).collect();
            return (Part::Files(numbers), with);
        }
        if let Some(handles) = self.handles.chunks(PART).nth(at - of_files) {
            let numbers = handles.iter().map(|(number, _)| *number).collect();
            let with = handles.iter().map(|(_, fd)| fd.as_fd()).collect();
            return (Part::Handles(numbers), with);
        }
        (Part::End, Vec::new())
    }

    /// Waits for a whole one, of no more than so many files and handles together.
    ///
    /// # Errors
    /// The other side's end, or what is no table.
    pub(super) fn receive(from: &OwnedFd, most: usize) -> io::Result<Self> {
        let no_table = || io::Error::from(io::ErrorKind::InvalidData);
        let next = || {
            let ended = || io::Error::other("the server of its source has ended");
            packet::receive::<Part>(from)?.ok_or_else(ended)
        };
        let (begin, with) = next()?;
        let (
            Part::Begin {
                next: next_file,
                next_handle,
                devices,
            },
            Some(namespace),
        ) = (begin, with.into_iter().next())
        else {
            return Err(no_table());
        };
        let mut table = Self {
            namespace: Arc::new(namespace),
            known: Known {
                files: Vec::new(),
                next: next_file,
                devices,
            },
            handles: Vec::new(),
            next_handle,
        };
        loop {
            let (part, with) = next()?;
            let with = with.into_iter().map(Arc::new);
            match part {
                Part::Files(numbers) if numbers.len() == with.len() => {
                    let files = numbers.into_iter().zip(with);
                    let file = |((number, told), fd)| KnownFile { number, told, fd };
                    table.known.files.extend(files.map(file));
                }
                Part::Handles(numbers) if numbers.len() == with.len() => {
                    table.handles.extend(numbers.into_iter().zip(with));
                }
                Part::End => return Ok(table),
                Part::Begin { .. } | Part::Files(_) | Part::Handles(_) => return Err(no_table()),
            }
            if table.known.files.len() + table.handles.len() > most {
                return Err(no_table());
            }
        }
    }
}
