//! A root file system in memory: names and metadata. The files' bytes stay where
//! they are ([`Content`]). Nothing here touches the host's file system, so no path
//! in an image can lead anywhere but into this tree.

use super::content::Content;
use super::error::{ImageError, Result, printable};
use super::limits::Limits;
use std::collections::{BTreeMap, VecDeque};

/// The longest name of one file, by Linux.
const LONGEST_NAME: usize = 255;
/// Symbolic links followed on the way to one file, as in Linux's path walk.
const MOST_LINKS: usize = 40;

/// The index of a node in its tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(u32);

/// Extended attributes by name, prefix included (`security.capability`).
pub type Xattrs = BTreeMap<Vec<u8>, Vec<u8>>;

/// What all kinds of files have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Meta {
    /// Permission bits with setuid, setgid and sticky; no file type.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Seconds since 1970.
    pub mtime: i64,
    /// Nanoseconds on top.
    pub mtime_nsec: u32,
    /// Extended attributes.
    pub xattrs: Xattrs,
}

impl Meta {
    /// A directory that no entry describes: 0755, root's, of 1970, as the same
    /// input must give the same image.
    pub fn implied_directory() -> Meta {
        Meta {
            mode: 0o755,
            uid: 0,
            gid: 0,
            mtime: 0,
            mtime_nsec: 0,
            xattrs: Xattrs::new(),
        }
    }
}

/// A directory's entry: the file, and the layer that put it there.
#[derive(Clone, Copy, Debug)]
pub struct Link {
    /// The file.
    pub node: NodeId,
    /// The number of the layer, which whiteouts go by.
    pub layer: u16,
}

/// A directory's entries, sorted by name as bytes.
pub type Children = BTreeMap<Vec<u8>, Link>;

/// What a file is.
#[derive(Debug)]
pub enum Body {
    /// A directory.
    Directory(Children),
    /// A regular file.
    Regular(Content),
    /// A symbolic link and its target.
    Symlink(Vec<u8>),
    /// A character device: major, minor.
    CharDevice(u32, u32),
    /// A block device: major, minor.
    BlockDevice(u32, u32),
    /// A named pipe.
    Fifo,
    /// A socket.
    Socket,
}

/// A file.
#[derive(Debug)]
pub struct Node {
    /// Its metadata.
    pub meta: Meta,
    /// What it is.
    pub body: Body,
}

/// A root file system. Several directory entries may name one node (hard links).
#[derive(Debug)]
pub struct Tree {
    nodes: Vec<Node>,
    limits: Limits,
    metadata: u64,
    bytes: u64,
}

impl Tree {
    /// The root directory.
    pub const ROOT: NodeId = NodeId(0);

    /// An empty root file system that will not outgrow `limits`.
    pub fn new(limits: &Limits) -> Tree {
        let root = Node {
            meta: Meta::implied_directory(),
            body: Body::Directory(Children::new()),
        };
        Tree {
            nodes: vec![root],
            limits: limits.clone(),
            metadata: 0,
            bytes: 0,
        }
    }

    /// A node by its index, which only this tree gives out.
    pub fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.0 as usize]
    }

    /// A node by its index, to change.
    pub fn node_mut(&mut self, id: NodeId) -> &mut Node {
        &mut self.nodes[id.0 as usize]
    }

    /// The entries of a directory; `None` for anything else.
    pub fn children(&self, id: NodeId) -> Option<&Children> {
        match &self.node(id).body {
            Body::Directory(children) => Some(children),
            _ => None,
        }
    }

    fn children_mut(&mut self, id: NodeId) -> Option<&mut Children> {
        match &mut self.nodes[id.0 as usize].body {
            Body::Directory(children) => Some(children),
            _ => None,
        }
    }

    /// Adds a node that no directory names yet.
    ///
    /// # Errors
    /// [`ImageError::Limit`] when the tree is full.
    pub fn add(&mut self, node: Node) -> Result<NodeId> {
        let xattrs: usize = node
            .meta
            .xattrs
            .iter()
            .map(|(name, value)| name.len() + value.len())
            .sum();
        let body = match &node.body {
            Body::Symlink(target) => target.len(),
            Body::Regular(content) => content.memory(),
            _ => 0,
        };
        self.charge(xattrs + body)?;
        if let Body::Regular(content) = &node.body {
            // Holes count: a guest that reads them has them in memory.
            self.bytes = self.bytes.saturating_add(content.size());
            self.limits.check_unpacked(self.bytes, self.bytes)?;
        }
        if self.nodes.len() >= self.limits.inodes {
            return Err(ImageError::Limit(format!(
                "the image has more than {} files",
                self.limits.inodes
            )));
        }
        self.nodes.push(node);
        Ok(NodeId(self.nodes.len() as u32 - 1))
    }

    fn charge(&mut self, bytes: usize) -> Result<()> {
        self.metadata += bytes as u64;
        if self.metadata > self.limits.metadata {
            return Err(ImageError::Limit(
                "the image's names and attributes are too large".to_owned(),
            ));
        }
        Ok(())
    }

    /// Enters `node` as `name` into a directory, in place of what was there.
    ///
    /// # Errors
    /// [`ImageError::Limit`] when the tree is full, [`ImageError::Entry`] when
    /// `directory` is none.
    pub fn link(&mut self, directory: NodeId, name: &[u8], node: NodeId, layer: u16) -> Result<()> {
        self.charge(name.len())?;
        let children = self
            .children_mut(directory)
            .ok_or_else(|| refused(name, "its parent is not a directory"))?;
        children.insert(name.to_vec(), Link { node, layer });
        Ok(())
    }

    /// Removes the entry `name` of a directory, if there is one.
    pub fn unlink(&mut self, directory: NodeId, name: &[u8]) {
        if let Some(children) = self.children_mut(directory) {
            children.remove(name);
        }
    }

    /// The entry `name` of a directory.
    pub fn lookup(&self, directory: NodeId, name: &[u8]) -> Option<Link> {
        self.children(directory)?.get(name).copied()
    }

    /// Walks to a directory as a process whose root is this tree would: symbolic
    /// links are followed, and `..` in a link's target ends at the root. With
    /// `create`, what is missing is made, for that layer.
    ///
    /// # Errors
    /// [`ImageError::Entry`] when the way leads through a file or in circles;
    /// `Ok(None)` when something is missing and `create` is not given.
    pub fn walk(&mut self, path: &[&[u8]], create: Option<u16>) -> Result<Option<NodeId>> {
        let whole = || path.join(&b'/');
        let mut trail = vec![Self::ROOT];
        let mut ahead: VecDeque<Vec<u8>> = path.iter().map(|name| name.to_vec()).collect();
        let mut followed = 0;
        while let Some(name) = ahead.pop_front() {
            let here = trail[trail.len() - 1];
            match name.as_slice() {
                b"" | b"." => continue,
                b".." => {
                    trail.truncate((trail.len() - 1).max(1));
                    continue;
                }
                _ => {}
            }
            let next = match (self.lookup(here, &name), create) {
                (Some(link), _) => link.node,
                (None, None) => return Ok(None),
                (None, Some(layer)) => self.imply(here, &name, layer)?,
            };
            match &self.node(next).body {
                Body::Directory(_) if trail.len() > self.limits.depth => {
                    return Err(ImageError::Limit(format!(
                        "directories deeper than {}",
                        self.limits.depth
                    )));
                }
                Body::Directory(_) => trail.push(next),
                Body::Symlink(target) => {
                    followed += 1;
                    if followed > MOST_LINKS {
                        return Err(refused(
                            &whole(),
                            "too many symbolic links on the way to it",
                        ));
                    }
                    if target.starts_with(b"/") {
                        trail.truncate(1);
                    }
                    for part in target.split(|b| *b == b'/').rev() {
                        ahead.push_front(part.to_vec());
                    }
                }
                _ => {
                    return Err(refused(
                        &whole(),
                        "its path leads through a file that is not a directory",
                    ));
                }
            }
        }
        Ok(trail.last().copied())
    }

    fn imply(&mut self, parent: NodeId, name: &[u8], layer: u16) -> Result<NodeId> {
        check_name(name)?;
        let node = self.add(Node {
            meta: Meta::implied_directory(),
            body: Body::Directory(Children::new()),
        })?;
        self.link(parent, name, node, layer)?;
        Ok(node)
    }

    /// Removes from a directory, at any depth, what layers below `layer` put there.
    /// Directories that still hold something of `layer` stay.
    pub fn prune_lower(&mut self, directory: NodeId, layer: u16) {
        let Some(children) = self.children(directory) else {
            return;
        };
        let links: Vec<(Vec<u8>, Link)> = children
            .iter()
            .map(|(name, link)| (name.clone(), *link))
            .collect();
        for (name, link) in links {
            // Depth is bounded by `Limits::depth`.
            self.prune_lower(link.node, layer);
            let keeps = self
                .children(link.node)
                .is_some_and(|children| !children.is_empty());
            if link.layer < layer && !keeps {
                self.unlink(directory, &name);
            }
        }
    }
}

/// Refuses an entry in one line.
pub fn refused(path: &[u8], reason: &str) -> ImageError {
    ImageError::Entry {
        entry: printable(path),
        reason: reason.to_owned(),
    }
}

/// Checks that `name` can be the name of one file.
///
/// # Errors
/// [`ImageError::Entry`] when it is empty, too long, or has a slash or a NUL in it.
pub fn check_name(name: &[u8]) -> Result<()> {
    if name.is_empty() || matches!(name, b"." | b"..") || name.iter().any(|b| matches!(b, b'/' | 0))
    {
        return Err(refused(name, "not a file name"));
    }
    if name.len() > LONGEST_NAME {
        return Err(refused(name, "a name longer than 255 bytes"));
    }
    Ok(())
}
