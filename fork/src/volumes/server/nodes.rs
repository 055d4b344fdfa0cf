//! The files that the guest knows: each a number, a descriptor, and how often the guest
//! was told of it.

use crate::volumes::wire::Answer;
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{AtFlags, Mode, OFlags, Statx, StatxFlags, openat, statx};
use rustix::io::Errno;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::CStr;
use std::sync::Arc;

/// The directory of all volumes (FUSE_ROOT_ID).
pub(super) const ROOT: u64 = 1;

/// What makes two descriptors the same file of the same mount. The mount counts: a
/// directory may be there twice, and read-only once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    mount: u64,
    device: (u32, u32),
    ino: u64,
}

#[derive(Debug)]
struct Node {
    fd: Arc<OwnedFd>,
    key: Key,
    /// What the guest has to forget before the node goes.
    told: u64,
}

/// What a server knows at one instant.
#[derive(Debug)]
pub(in crate::volumes) struct Known {
    pub(in crate::volumes) files: Vec<KnownFile>,
    /// The number of the next.
    pub(in crate::volumes) next: u64,
    pub(in crate::volumes) devices: Vec<(u32, u32)>,
}

#[derive(Debug)]
pub(in crate::volumes) struct KnownFile {
    pub(in crate::volumes) number: u64,
    pub(in crate::volumes) told: u64,
    pub(in crate::volumes) fd: Arc<OwnedFd>,
}

#[derive(Debug)]
pub(super) struct Nodes {
    all: HashMap<u64, Node>,
    by_key: HashMap<Key, u64>,
    next: u64,
    most: usize,
    /// The file systems that were met, in their order.
    devices: Vec<(u32, u32)>,
}

fn key(stat: &Statx) -> Key {
    Key {
        mount: stat.stx_mnt_id,
        device: (stat.stx_dev_major, stat.stx_dev_minor),
        ino: stat.stx_ino,
    }
}

/// Attributes of what is open.
pub(super) fn stat(fd: impl AsFd) -> Result<Statx, Errno> {
    let wanted = StatxFlags::BASIC_STATS | StatxFlags::MNT_ID;
    statx(fd, c"", AtFlags::EMPTY_PATH, wanted)
}

impl Nodes {
    pub(super) fn new(root: OwnedFd, most: usize) -> Result<Self, Errno> {
        let key = key(&stat(&root)?);
        let node = Node {
            fd: Arc::new(root),
            key,
            told: 1,
        };
        Ok(Self {
            all: HashMap::from([(ROOT, node)]),
            by_key: HashMap::from([(key, ROOT)]),
            next: ROOT + 1,
            most,
            devices: Vec::new(),
        })
    }

    pub(super) fn get(&self, number: u64) -> Result<&OwnedFd, Errno> {
        // As an NFS server says it of a handle that it does not know.
        self.all.get(&number).map(|n| &*n.fd).ok_or(Errno::STALE)
    }

    /// Looks for a name in a directory, and tells the guest of what is there: `struct
    /// fuse_entry_out`.
    pub(super) fn look_up(&mut self, parent: u64, name: &CStr) -> Result<Answer, Errno> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = openat(self.get(parent)?, name, flags, Mode::empty())?;
        self.tell(fd)
    }

    pub(super) fn has_room(&self) -> Result<(), Errno> {
        if self.all.len() >= self.most {
            return Err(Errno::NFILE);
        }
        Ok(())
    }

    /// Tells the guest of a file, by its descriptor (O_PATH).
    pub(super) fn tell(&mut self, fd: OwnedFd) -> Result<Answer, Errno> {
        let stat = stat(&fd)?;
        let key = key(&stat);
        let number = match self.by_key.get(&key) {
            Some(&number) => {
                if let Some(node) = self.all.get_mut(&number) {
                    node.told = node.told.saturating_add(1);
                }
                number
            }
            None => {
                self.has_room()?;
                let number = self.next;
                self.next += 1;
                self.by_key.insert(key, number);
                let fd = Arc::new(fd);
                self.all.insert(number, Node { fd, key, told: 1 });
                number
            }
        };
        let ino = self.ino(&stat);
        let entry = Answer::empty()
            .u64(number)
            .u64(0)
            .u64(super::VALID)
            .u64(super::VALID)
            .u32(0)
            .u32(0);
        Ok(entry.attributes(&stat, ino))
    }

    /// The inode's number as the guest sees it: it has one device for all file systems,
    /// and a program that finds one number twice takes it for one file.
    pub(super) fn ino(&mut self, stat: &Statx) -> u64 {
        let device = (stat.stx_dev_major, stat.stx_dev_minor);
        let known = self.devices.iter().position(|known| *known == device);
        let index = known.unwrap_or_else(|| {
            // More than so many would be numbered alike: no worse than not at all.
            const MOST: usize = 255;
            if self.devices.len() < MOST {
                self.devices.push(device);
            }
            self.devices.len() - 1
        });
        stat.stx_ino ^ (index as u64) << 56
    }

    pub(super) fn forget(&mut self, number: u64, count: u64) {
        let Some(node) = self.all.get_mut(&number) else {
            return;
        };
        node.told = node.told.saturating_sub(count);
        if node.told == 0 && number != ROOT {
            let key = node.key;
            self.all.remove(&number);
            self.by_key.remove(&key);
        }
    }

    /// All but the root.
    pub(super) fn clear(&mut self) {
        self.all.retain(|number, _| *number == ROOT);
        self.by_key.retain(|_, number| *number == ROOT);
    }

    /// All of them, for the server of a fork.
    pub(super) fn known(&self) -> Known {
        let file = |(number, node): (&u64, &Node)| KnownFile {
            number: *number,
            told: node.told,
            fd: Arc::clone(&node.fd),
        };
        Known {
            files: self.all.iter().map(file).collect(),
            next: self.next,
            devices: self.devices.clone(),
        }
    }

    /// What another server has known: its root among them.
    ///
    /// # Errors
    /// Numbers that cannot be, or more than `most`.
    pub(super) fn inherit(known: Known, most: usize) -> Result<Self, Errno> {
        let mut this = Self {
            all: HashMap::new(),
            by_key: HashMap::new(),
            next: known.next,
            most,
            devices: known.devices,
        };
        for KnownFile { number, told, fd } in known.files {
            if !(ROOT..this.next).contains(&number) {
                return Err(Errno::INVAL);
            }
            this.has_room()?;
            let key = key(&stat(&fd)?);
            let Entry::Vacant(place) = this.all.entry(number) else {
                return Err(Errno::EXIST);
            };
            place.insert(Node { fd, key, told });
            this.by_key.insert(key, number);
        }
        this.get(ROOT)?;
        Ok(this)
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.all.len()
    }
}
