//! The file server: one request, one answer.
//!
//! What the guest names are nodes and handles, numbers of tables here; a node is a
//! descriptor (O_PATH) of a file that was reached by single names, none of which was
//! followed if it is a link. So no request leads out of the volumes, whatever changes in
//! them meanwhile. Who may do what is for the guest's kernel to decide
//! (`default_permissions`): all users of a guest, and its root, have the same right to
//! their volumes; new files get the owner that the guest says.

mod attributes;
mod content;
mod list;
mod names;
mod nodes;

pub(super) use self::nodes::{Known, KnownFile};

use self::nodes::Nodes;
use super::table::Table;
use super::wire::{Answer, DATA_MAX, MAJOR, MINOR, Request, feature, op, packet};
use rustix::fd::{AsFd, AsRawFd, OwnedFd};
use rustix::fs::{CWD, FileType, Mode, OFlags, openat};
use rustix::io::Errno;
use rustix::process::geteuid;
use rustix::thread::{Gid, Uid, set_thread_res_gid, set_thread_res_uid};
use std::collections::HashMap;
use std::sync::Arc;

/// How long the guest may hold on to a name or to attributes, in seconds: so late it sees
/// what others change.
const VALID: u64 = 1;

/// How much a guest may have here.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    /// Files that it knows, a descriptor each.
    pub(super) nodes: usize,
    /// Files and directories that it has open, a descriptor each.
    pub(super) handles: usize,
}

/// The server of one guest.
#[derive(Debug)]
pub(super) struct Server {
    nodes: Nodes,
    handles: HashMap<u64, Arc<OwnedFd>>,
    next_handle: u64,
    bounds: Bounds,
    /// How a descriptor is named by a path: `/proc/self/fd/`, or nothing where that is the
    /// working directory.
    descriptors: &'static str,
    /// Whether it may act as other users. Without root there is but one owner.
    is_root: bool,
    /// The user could not be changed back: nothing more may be done.
    is_lost: bool,
}

type Outcome = Result<Answer, Errno>;

impl Server {
    /// A server of what lies below `root`. `descriptors` is the path of this process's
    /// descriptors.
    pub(super) fn new(
        root: OwnedFd,
        descriptors: &'static str,
        bounds: Bounds,
    ) -> Result<Self, Errno> {
        Ok(Self {
            nodes: Nodes::new(root, bounds.nodes)?,
            handles: HashMap::new(),
            next_handle: 1,
            bounds,
            descriptors,
            is_root: geteuid().is_root(),
            is_lost: false,
        })
    }

    /// What its guest knows now. All of it lies in the mounts of `namespace`.
    pub(super) fn table(&self, namespace: &Arc<OwnedFd>) -> Table {
        let handles = self.handles.iter();
        Table {
            namespace: Arc::clone(namespace),
            known: self.nodes.known(),
            handles: handles.map(|(n, fd)| (*n, Arc::clone(fd))).collect(),
            next_handle: self.next_handle,
        }
    }

    /// A server that goes on with what another one's guest knew.
    ///
    /// # Errors
    /// A table that cannot be, or is larger than `bounds`.
    pub(super) fn inherit(
        table: Table,
        descriptors: &'static str,
        bounds: Bounds,
    ) -> Result<Self, Errno> {
        let mut this = Self {
            nodes: Nodes::inherit(table.known, bounds.nodes)?,
            handles: HashMap::new(),
            next_handle: table.next_handle,
            bounds,
            descriptors,
            is_root: geteuid().is_root(),
            is_lost: false,
        };
        for (number, file) in table.handles {
            this.has_room()?;
            let file = this.apart(file)?;
            if number >= this.next_handle || this.handles.insert(number, file).is_some() {
                return Err(Errno::INVAL);
            }
        }
        Ok(this)
    }

    /// An open file for this server alone, where it has a position that counts: that of a
    /// directory. Of all else it is said in each request.
    fn apart(&self, file: Arc<OwnedFd>) -> Result<Arc<OwnedFd>, Errno> {
        match FileType::from_raw_mode(nodes::stat(file.as_fd())?.stx_mode.into()) {
            FileType::Directory => {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
                let again = openat(CWD, self.path(&file), flags, Mode::empty())?;
                Ok(Arc::new(again))
            }
            _ => Ok(file),
        }
    }

    /// Carries out one request. `Ok(None)` has no answer.
    ///
    /// # Errors
    /// What is no request, and what this process cannot go on after.
    pub(super) fn serve(&mut self, asked: &[u8]) -> Result<Option<Vec<u8>>, &'static str> {
        let mut request = Request::parse(asked).ok_or("that is no request")?;
        let (unique, is_note) = (request.unique, request.is_note());
        let outcome = self.dispatch(&mut request);
        if self.is_lost {
            return Err("the user cannot be changed back");
        }
        Ok((!is_note).then(|| packet(unique, outcome)))
    }

    fn dispatch(&mut self, request: &mut Request<'_>) -> Outcome {
        match request.opcode {
            op::INIT => self.init(request),
            op::DESTROY => self.forget_all(),
            op::LOOKUP => self.lookup(request),
            op::FORGET => self.forget(request),
            op::BATCH_FORGET => self.forget_many(request),
            op::GETATTR => self.get_attributes(request),
            op::SETATTR => self.set_attributes(request),
            op::READLINK => self.read_link(request),
            op::SYMLINK => self.symlink(request),
            op::MKNOD => self.make_node(request),
            op::MKDIR => self.make_directory(request),
            op::UNLINK => self.unlink(request, false),
            op::RMDIR => self.unlink(request, true),
            op::RENAME => self.rename(request, false),
            op::RENAME2 => self.rename(request, true),
            op::LINK => self.link(request),
            op::OPEN => self.open(request),
            op::CREATE => self.create(request),
            op::READ => self.read(request),
            op::WRITE => self.write(request),
            op::FALLOCATE => self.allocate(request),
            op::LSEEK => self.seek(request),
            op::STATFS => self.stat_fs(request),
            op::FSYNC | op::FSYNCDIR => self.sync(request),
            op::RELEASE | op::RELEASEDIR => self.release(request),
            op::SETXATTR => self.set_xattr(request),
            op::GETXATTR => self.get_xattr(request),
            op::LISTXATTR => self.list_xattr(request),
            op::REMOVEXATTR => self.remove_xattr(request),
            op::OPENDIR => self.open_directory(request),
            op::READDIR => self.list(request, false),
            op::READDIRPLUS => self.list(request, true),
            // The guest goes without: locks hold within it, a close has nothing to tell.
            _ => Err(Errno::NOSYS),
        }
    }

    /// Begins a session: what an earlier one had is gone.
    fn init(&mut self, request: &mut Request<'_>) -> Outcome {
        let (major, minor) = (request.u32()?, request.u32()?);
        let (read_ahead, features) = (request.u32()?, request.u32()?);
        if major < MAJOR {
            return Err(Errno::PROTO);
        }
        self.forget_all()?;
        let background = (12, 9);
        let answer = Answer::empty()
            .u32(MAJOR)
            .u32(minor.min(MINOR))
            .u32(read_ahead.min(DATA_MAX))
            .u32(features & feature::ALL)
            .u16(background.0)
            .u16(background.1)
            .u32(DATA_MAX)
            // Times are kept to the nanosecond.
            .u32(1);
        Ok(answer.zeroes(36))
    }

    fn forget_all(&mut self) -> Outcome {
        self.nodes.clear();
        self.handles.clear();
        Ok(Answer::empty())
    }

    /// The path by which a descriptor is opened again, or its attributes are reached.
    fn path(&self, fd: &OwnedFd) -> String {
        format!("{}{}", self.descriptors, fd.as_raw_fd())
    }

    fn handle(&self, number: u64) -> Result<&OwnedFd, Errno> {
        self.handles.get(&number).map(|fd| &**fd).ok_or(Errno::BADF)
    }

    fn has_room(&self) -> Result<(), Errno> {
        if self.handles.len() >= self.bounds.handles {
            return Err(Errno::NFILE);
        }
        Ok(())
    }

    fn keep(&mut self, file: OwnedFd) -> Result<u64, Errno> {
        self.has_room()?;
        let number = self.next_handle;
        self.next_handle += 1;
        self.handles.insert(number, Arc::new(file));
        Ok(number)
    }

    /// Does something as the user and group of a request, so that what it makes is theirs.
    /// No capability changes with the user (SECBIT_NO_SETUID_FIXUP): the guest's kernel
    /// has decided that it may be done.
    fn as_caller<T>(
        &mut self,
        (uid, gid): (u32, u32),
        act: impl FnOnce(&Self) -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        let (uid, gid) = (user(uid)?, group(gid)?);
        if !self.is_root {
            return act(self);
        }
        set_thread_res_gid(None, gid, None)?;
        let done = set_thread_res_uid(None, uid, None).and_then(|()| act(self));
        let back = set_thread_res_uid(None, Uid::ROOT, None);
        let back = back.and_then(|()| set_thread_res_gid(None, Gid::ROOT, None));
        self.is_lost = back.is_err();
        done
    }
}

/// -1 is nobody, and means "as it is" to the calls that set an owner.
fn user(raw: u32) -> Result<Uid, Errno> {
    if raw == u32::MAX {
        return Err(Errno::INVAL);
    }
    Ok(Uid::from_raw(raw))
}

fn group(raw: u32) -> Result<Gid, Errno> {
    if raw == u32::MAX {
        return Err(Errno::INVAL);
    }
    Ok(Gid::from_raw(raw))
}

#[cfg(test)]
mod tests;
