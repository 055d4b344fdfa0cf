//! Decides where everything in an image goes, before a byte is written.

use super::directory;
use super::format::{BLOCK, DataLayout, INODE, SLOT};
use super::xattr;
use crate::image::error::{ImageError, Result};
use crate::image::tree::{Body, NodeId, Tree};
use std::collections::HashMap;

/// Blocks of the inode area that are kept open for a smaller inode to fill them up.
/// More would pack little better and scatter neighbours.
const OPEN_BLOCKS: usize = 32;

/// One inode of the image.
pub struct Placed {
    /// The file.
    pub node: NodeId,
    /// The directory above, as an index into [`Layout::inodes`].
    pub parent: usize,
    /// Names that it has.
    pub links: u32,
    /// Bytes of data.
    pub size: u64,
    /// Encoded extended attributes.
    pub xattrs: Vec<u8>,
    /// How its data lies.
    pub layout: DataLayout,
    /// Where it is, in bytes from the beginning of the image.
    pub position: u64,
    /// The first block of its data.
    pub start_block: u32,
}

impl Placed {
    /// The inode number: its position in slots.
    pub fn nid(&self) -> u64 {
        self.position / SLOT
    }

    /// Bytes of data that stand behind the inode.
    pub fn tail(&self) -> u64 {
        match self.layout {
            DataLayout::Inline => self.size % BLOCK,
            DataLayout::Plain => 0,
        }
    }

    /// Blocks of data elsewhere.
    pub fn blocks(&self) -> u64 {
        (self.size - self.tail()).div_ceil(BLOCK)
    }
}

/// The plan of an image.
pub struct Layout {
    /// All inodes, a directory before what is in it, the root first.
    pub inodes: Vec<Placed>,
    /// The index of each file's inode.
    pub index: HashMap<NodeId, usize>,
    /// Where the inodes end and the data begins, in bytes.
    pub data_start: u64,
    /// Blocks of the whole image.
    pub blocks: u32,
}

impl Layout {
    /// Plans the image of a tree.
    ///
    /// # Errors
    /// [`ImageError::Limit`] for what the format cannot hold.
    pub fn plan(tree: &Tree) -> Result<Layout> {
        let mut layout = Layout {
            inodes: Vec::new(),
            index: HashMap::new(),
            data_start: 0,
            blocks: 0,
        };
        layout.collect(tree)?;
        layout.place_inodes();
        layout.place_data()?;
        Ok(layout)
    }

    /// Lists the tree's files, each once, and counts their names.
    fn collect(&mut self, tree: &Tree) -> Result<()> {
        let mut ahead = vec![(Tree::ROOT, 0)];
        while let Some((node, parent)) = ahead.pop() {
            if let Some(known) = self.index.get(&node) {
                self.inodes[*known].links += 1;
                continue;
            }
            let here = self.inodes.len();
            let placed = measure(tree, node, parent)?;
            self.index.insert(node, here);
            self.inodes.push(placed);
            if let Some(children) = tree.children(node) {
                // Last first, as the first is to be taken next.
                ahead.extend(children.values().rev().map(|link| (link.node, here)));
            }
        }
        Ok(())
    }

    /// First fit over the blocks that still have room. An inode and its tail must
    /// lie in one block; the root comes first, as its number has only 16 bits.
    fn place_inodes(&mut self) {
        let mut open: Vec<(u64, u64)> = Vec::new();
        // The first block is the superblock's.
        let mut end = BLOCK;
        for inode in &mut self.inodes {
            let head = INODE + inode.xattrs.len() as u64;
            let needed = head + inode.tail();
            if needed > BLOCK {
                // Attributes may run over several blocks; the tail is then data.
                inode.layout = DataLayout::Plain;
            }
            let needed = (head + inode.tail()).next_multiple_of(SLOT);
            if let Some(block) = open.iter_mut().find(|(_, room)| *room >= needed) {
                inode.position = block.0;
                *block = (block.0 + needed, block.1 - needed);
                continue;
            }
            inode.position = end;
            let taken = needed.next_multiple_of(BLOCK);
            end += taken;
            open.push((inode.position + needed, taken - needed));
            if open.len() > OPEN_BLOCKS {
                let fullest = open
                    .iter()
                    .enumerate()
                    .min_by_key(|(_, (_, room))| *room)
                    .map(|(i, _)| i);
                open.remove(fullest.unwrap_or(0));
            }
        }
        self.data_start = end;
    }

    fn place_data(&mut self) -> Result<()> {
        let mut next = self.data_start / BLOCK;
        let too_large = |_| ImageError::Limit("the image is larger than 16 TiB".to_owned());
        for inode in &mut self.inodes {
            inode.start_block = u32::try_from(next).map_err(too_large)?;
            next += inode.blocks();
        }
        self.blocks = u32::try_from(next).map_err(too_large)?;
        Ok(())
    }
}

fn measure(tree: &Tree, node: NodeId, parent: usize) -> Result<Placed> {
    let file = tree.node(node);
    let mut links = 1;
    let size = match &file.body {
        Body::Directory(children) => {
            let directories = children
                .values()
                .filter(|link| tree.children(link.node).is_some())
                .count();
            links = 2 + directories as u32;
            // `.` and `..` are entries like others.
            directory::size(sorted_names(children.keys().map(Vec::as_slice)).map(<[u8]>::len))
        }
        Body::Regular(content) => content.size(),
        Body::Symlink(target) => target.len() as u64,
        _ => 0,
    };
    // Linux maps a file from memory (DAX) only if all of it is in blocks of its own
    // (fs/erofs/inode.c), so a regular file is, at half a block's cost.
    let is_file = matches!(file.body, Body::Regular(_));
    let layout = if is_file || size % BLOCK == 0 {
        DataLayout::Plain
    } else {
        DataLayout::Inline
    };
    let xattrs = xattr::encode(&file.meta.xattrs)?;
    Ok(Placed {
        node,
        parent,
        links,
        size,
        xattrs,
        layout,
        position: 0,
        start_block: 0,
    })
}

/// A directory's names with `.` and `..` in their places. Readers search by halves,
/// so these two are sorted with the rest: `-` comes before `.`, `0` after.
pub fn sorted_names<'a>(names: impl Iterator<Item = &'a [u8]>) -> impl Iterator<Item = &'a [u8]> {
    let mut all: Vec<&[u8]> = names.chain([b".".as_slice(), b".."]).collect();
    all.sort_unstable();
    all.into_iter()
}
