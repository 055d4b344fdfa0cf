//! Requests that are about names.

use super::{Outcome, Server};
use crate::volumes::wire::{Answer, Request};
use rustix::fs::{
    AtFlags, FileType, Mode, RenameFlags, linkat, mkdirat, mknodat, readlinkat, renameat_with,
    symlinkat, unlinkat,
};
use rustix::io::Errno;

/// Permission bits, and those above them.
const MODE: u32 = 0o7777;

impl Server {
    pub(super) fn lookup(&mut self, request: &mut Request<'_>) -> Outcome {
        let name = request.name()?;
        self.nodes.look_up(request.node, name)
    }

    pub(super) fn forget(&mut self, request: &mut Request<'_>) -> Outcome {
        let count = request.u64()?;
        self.nodes.forget(request.node, count);
        Ok(Answer::empty())
    }

    pub(super) fn forget_many(&mut self, request: &mut Request<'_>) -> Outcome {
        let count = request.u32()?;
        request.skip(4)?;
        for _ in 0..count {
            let (node, told) = (request.u64()?, request.u64()?);
            self.nodes.forget(node, told);
        }
        Ok(Answer::empty())
    }

    pub(super) fn read_link(&mut self, request: &mut Request<'_>) -> Outcome {
        let target = readlinkat(self.nodes.get(request.node)?, c"", Vec::new())?;
        Ok(Answer::empty().bytes(target.to_bytes()))
    }

    pub(super) fn symlink(&mut self, request: &mut Request<'_>) -> Outcome {
        let (name, target) = (request.name()?, request.string()?);
        self.nodes.has_room()?;
        let parent = request.node;
        self.as_caller((request.uid, request.gid), |this| {
            symlinkat(target, this.nodes.get(parent)?, name)
        })?;
        self.nodes.look_up(parent, name)
    }

    /// FIFOs, sockets and files. A device node would be a device of the host.
    pub(super) fn make_node(&mut self, request: &mut Request<'_>) -> Outcome {
        let mode = request.u32()?;
        request.skip(12)?;
        let name = request.name()?;
        let kind = FileType::from_raw_mode(mode);
        match kind {
            FileType::RegularFile | FileType::Fifo | FileType::Socket => {}
            _ => return Err(Errno::PERM),
        }
        self.nodes.has_room()?;
        let parent = request.node;
        self.as_caller((request.uid, request.gid), |this| {
            let parent = this.nodes.get(parent)?;
            mknodat(parent, name, kind, Mode::from_raw_mode(mode & MODE), 0)
        })?;
        self.nodes.look_up(parent, name)
    }

    pub(super) fn make_directory(&mut self, request: &mut Request<'_>) -> Outcome {
        let mode = request.u32()?;
        request.skip(4)?;
        let name = request.name()?;
        self.nodes.has_room()?;
        let parent = request.node;
        self.as_caller((request.uid, request.gid), |this| {
            let parent = this.nodes.get(parent)?;
            mkdirat(parent, name, Mode::from_raw_mode(mode & MODE))
        })?;
        self.nodes.look_up(parent, name)
    }

    pub(super) fn unlink(&mut self, request: &mut Request<'_>, directory: bool) -> Outcome {
        let flags = if directory {
            AtFlags::REMOVEDIR
        } else {
            AtFlags::empty()
        };
        unlinkat(self.nodes.get(request.node)?, request.name()?, flags)?;
        Ok(Answer::empty())
    }

    pub(super) fn rename(&mut self, request: &mut Request<'_>, has_flags: bool) -> Outcome {
        let to = request.u64()?;
        let mut flags = RenameFlags::empty();
        if has_flags {
            let known = RenameFlags::NOREPLACE | RenameFlags::EXCHANGE;
            flags = RenameFlags::from_bits_retain(request.u32()?);
            // A whiteout is a device node.
            if !known.contains(flags) {
                return Err(Errno::INVAL);
            }
            request.skip(4)?;
        }
        let (old, new) = (request.name()?, request.name()?);
        let (from, to) = (self.nodes.get(request.node)?, self.nodes.get(to)?);
        renameat_with(from, old, to, new, flags)?;
        Ok(Answer::empty())
    }

    pub(super) fn link(&mut self, request: &mut Request<'_>) -> Outcome {
        let (file, name) = (request.u64()?, request.name()?);
        let (file, parent) = (self.nodes.get(file)?, self.nodes.get(request.node)?);
        linkat(file, c"", parent, name, AtFlags::EMPTY_PATH)?;
        self.nodes.look_up(request.node, name)
    }
}
