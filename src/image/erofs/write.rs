//! Writes the planned image, from its first byte to its last.

use super::directory::{self, Dirent};
use super::format::{BLOCK, Inode, Superblock, file_type};
use super::layout::{Layout, Placed, sorted_names};
use super::xattr;
use crate::image::content::Opened;
use crate::image::error::{Context, ImageError, Result};
use crate::image::tree::{Body, Tree};
use crate::progress::Progress;
use std::fs::File;
use std::io::{BufWriter, Seek, SeekFrom, Write};

const CHUNK: u64 = 1 << 20;

/// Writes `tree` into `file`, which is empty, as an EROFS image with this UUID.
/// Blocks of zeros are left as holes. Does not sync.
///
/// # Errors
/// [`ImageError::Limit`] for what the format cannot hold, [`ImageError::Io`] when
/// the disk is full, and what reading the files' bytes gives.
pub fn write(tree: &Tree, uuid: [u8; 16], file: &File, progress: &dyn Progress) -> Result<()> {
    let layout = Layout::plan(tree)?;
    let total = u64::from(layout.blocks) * BLOCK;
    progress.begin("Writing the root file system", Some(total));
    let superblock = Superblock {
        root_nid: u16::try_from(layout.inodes[0].nid()).map_err(|_| {
            ImageError::Limit("the root directory's inode is out of reach".to_owned())
        })?,
        inodes: layout.inodes.len() as u64,
        blocks: layout.blocks,
        uuid,
    };
    let mut out = Output {
        file: BufWriter::with_capacity(CHUNK as usize, file),
        position: 0,
        progress,
    };
    out.put(&superblock.encode())?;
    write_inodes(tree, &layout, &mut out)?;
    for inode in &layout.inodes {
        out.advance_to(u64::from(inode.start_block) * BLOCK)?;
        write_data(tree, &layout, inode, &mut out)?;
    }
    out.finish(total)?;
    progress.end();
    Ok(())
}

fn write_inodes(tree: &Tree, layout: &Layout, out: &mut Output<'_>) -> Result<()> {
    let mut order: Vec<usize> = (0..layout.inodes.len()).collect();
    order.sort_unstable_by_key(|index| layout.inodes[*index].position);
    for index in order {
        let placed = &layout.inodes[index];
        let node = tree.node(placed.node);
        let inode = Inode {
            layout: placed.layout,
            xattr_count: xattr::count(&placed.xattrs),
            size: placed.size,
            start_block: placed.start_block,
            number: index as u32 + 1,
            links: placed.links,
        };
        out.advance_to(placed.position)?;
        out.put(&inode.encode(&node.meta, &node.body))?;
        out.put(&placed.xattrs)?;
        if placed.tail() > 0 {
            let source = Source::of(tree, layout, placed)?;
            let mut tail = vec![0; placed.tail() as usize];
            source.read_at(&mut tail, placed.size - placed.tail())?;
            out.put(&tail)?;
        }
    }
    Ok(())
}

fn write_data(tree: &Tree, layout: &Layout, placed: &Placed, out: &mut Output<'_>) -> Result<()> {
    let end = placed.size - placed.tail();
    if end == 0 {
        return Ok(());
    }
    let source = Source::of(tree, layout, placed)?;
    let mut buffer = vec![0; CHUNK.min(end) as usize];
    let mut offset = 0;
    while offset < end {
        let part = &mut buffer[..CHUNK.min(end - offset) as usize];
        source.read_at(part, offset)?;
        for block in part.chunks(BLOCK as usize) {
            out.put_unless_zero(block)?;
        }
        offset += part.len() as u64;
    }
    Ok(())
}

/// The bytes of a file, a directory or a symbolic link.
enum Source<'a> {
    Bytes(Vec<u8>),
    File(Opened<'a>),
}

impl<'a> Source<'a> {
    fn of(tree: &'a Tree, layout: &Layout, placed: &Placed) -> Result<Source<'a>> {
        Ok(match &tree.node(placed.node).body {
            Body::Directory(_) => Source::Bytes(encode_directory(tree, layout, placed)),
            Body::Symlink(target) => Source::Bytes(target.clone()),
            Body::Regular(content) => Source::File(content.open()?),
            _ => Source::Bytes(Vec::new()),
        })
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        match self {
            Source::File(file) => file.read_at(buffer, offset),
            Source::Bytes(bytes) => {
                let start = offset as usize;
                buffer.copy_from_slice(&bytes[start..start + buffer.len()]);
                Ok(())
            }
        }
    }
}

fn encode_directory(tree: &Tree, layout: &Layout, placed: &Placed) -> Vec<u8> {
    let Some(children) = tree.children(placed.node) else {
        return Vec::new();
    };
    let entry = |name: &'_ [u8]| {
        let target = match name {
            b"." => placed,
            b".." => &layout.inodes[placed.parent],
            // Every entry's node was listed by the plan.
            _ => &layout.inodes[layout.index[&children[name].node]],
        };
        (target.nid(), file_type(&tree.node(target.node).body).dirent)
    };
    let entries: Vec<Dirent<'_>> = sorted_names(children.keys().map(Vec::as_slice))
        .map(|name| {
            let (nid, file_type) = entry(name);
            Dirent {
                name,
                nid,
                file_type,
            }
        })
        .collect();
    directory::encode(&entries)
}

/// A file written front to back, with holes.
struct Output<'a> {
    file: BufWriter<&'a File>,
    position: u64,
    progress: &'a dyn Progress,
}

impl Output<'_> {
    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.file
            .write_all(bytes)
            .context(|| "write the root file system's image".to_owned())?;
        self.moved(bytes.len() as u64);
        Ok(())
    }

    fn put_unless_zero(&mut self, block: &[u8]) -> Result<()> {
        if block.iter().any(|byte| *byte != 0) {
            return self.put(block);
        }
        self.advance_to(self.position + block.len() as u64)
    }

    /// Leaves zeros up to `position`, which is not behind.
    fn advance_to(&mut self, position: u64) -> Result<()> {
        let gap = position - self.position;
        if gap == 0 {
            return Ok(());
        }
        if gap < BLOCK {
            return self.put(&[0; BLOCK as usize][..gap as usize]);
        }
        self.file
            .seek(SeekFrom::Start(position))
            .context(|| "write the root file system's image".to_owned())?;
        self.moved(gap);
        Ok(())
    }

    fn moved(&mut self, bytes: u64) {
        self.position += bytes;
        self.progress.advance(bytes);
    }

    fn finish(mut self, length: u64) -> Result<()> {
        let what = || "write the root file system's image".to_owned();
        self.file.flush().context(what)?;
        self.file.get_ref().set_len(length).context(what)
    }
}
