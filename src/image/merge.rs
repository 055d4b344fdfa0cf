//! Applies a layer's entries to the tree, by the image specification's rules for
//! changesets (image-spec, layer.md) and docker's and containerd's practice where
//! it is silent:
//!
//! - A leading `/` or `./` is nothing; a `..` in a name or in a hard link's target
//!   is refused.
//! - A parent that is a symbolic link is followed inside the tree, as in a chroot;
//!   one that is a file is refused; one that is missing is made (0755, root).
//! - A directory over a directory changes its metadata and keeps its entries;
//!   everything else takes the old entry's place.
//! - A whiteout hides what lower layers have, never what its own layer has.

use super::content::Content;
use super::error::{ImageError, Result};
use super::tree::{Body, Children, Meta, Node, NodeId, Tree, Xattrs, check_name, refused};
use std::fs::File;
use std::sync::Arc;
use vm_run_archive::{Entry, Kind};

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Names that aufs keeps for itself; docker passes over them.
const AUFS: &[u8] = b".wh..wh.";

/// Applies one entry of layer number `layer`, whose bytes are in `file`.
///
/// # Errors
/// [`ImageError::Entry`] for one that is refused, [`ImageError::Limit`] when the tree
/// is full.
pub fn apply(tree: &mut Tree, entry: Entry, layer: u16, file: &Arc<File>) -> Result<()> {
    let path = components(&entry.path)?;
    let Some((name, parents)) = path.split_last() else {
        return apply_root(tree, &entry);
    };
    if let Some(hidden) = name.strip_prefix(WHITEOUT) {
        return whiteout(tree, parents, name, hidden, layer);
    }
    check_name(name).map_err(|_| refused(&entry.path, "a name longer than 255 bytes"))?;
    let parent = tree
        .walk(parents, Some(layer))
        .map_err(|error| of_entry(error, &entry.path))?
        .ok_or_else(|| refused(&entry.path, "its parent is missing"))?;
    if entry.kind == Kind::HardLink {
        let target = hard_link_target(tree, &entry)?;
        return tree.link(parent, name, target, layer);
    }
    if entry.kind == Kind::Directory
        && let Some(link) = tree.lookup(parent, name)
        && tree.children(link.node).is_some()
    {
        let meta = meta(&entry);
        tree.node_mut(link.node).meta = meta;
        return tree.link(parent, name, link.node, layer);
    }
    let node = Node {
        meta: meta(&entry),
        body: body(&entry, file)?,
    };
    let node = tree.add(node)?;
    tree.link(parent, name, node, layer)
}

fn apply_root(tree: &mut Tree, entry: &Entry) -> Result<()> {
    if entry.kind != Kind::Directory {
        return Err(refused(&entry.path, "the root of an image is a directory"));
    }
    tree.node_mut(Tree::ROOT).meta = meta(entry);
    Ok(())
}

fn whiteout(
    tree: &mut Tree,
    parents: &[&[u8]],
    name: &[u8],
    hidden: &[u8],
    layer: u16,
) -> Result<()> {
    let opaque = name == OPAQUE;
    if !opaque && name.starts_with(AUFS) {
        return Ok(());
    }
    if !opaque {
        check_name(hidden).map_err(|_| refused(name, "a whiteout of no file name"))?;
    }
    let Some(parent) = tree.walk(parents, None)? else {
        return Ok(());
    };
    if opaque {
        tree.prune_lower(parent, layer);
        return Ok(());
    }
    let Some(link) = tree.lookup(parent, hidden) else {
        return Ok(());
    };
    tree.prune_lower(link.node, layer);
    let keeps = tree
        .children(link.node)
        .is_some_and(|children| !children.is_empty());
    if link.layer < layer && !keeps {
        tree.unlink(parent, hidden);
    }
    Ok(())
}

/// The file that a hard link names. Its last component is not followed.
fn hard_link_target(tree: &mut Tree, entry: &Entry) -> Result<NodeId> {
    let missing = || {
        refused(
            &entry.path,
            "a hard link to a file that is not in the image",
        )
    };
    let target = components(&entry.link)
        .map_err(|_| refused(&entry.path, "a hard link out of the image"))?;
    let (name, parents) = target.split_last().ok_or_else(missing)?;
    let parent = tree
        .walk(parents, None)
        .map_err(|error| of_entry(error, &entry.path))?
        .ok_or_else(missing)?;
    let link = tree.lookup(parent, name).ok_or_else(missing)?;
    if tree.children(link.node).is_some() {
        return Err(refused(&entry.path, "a hard link to a directory"));
    }
    Ok(link.node)
}

/// The refusal of a parent, said of the entry below it.
fn of_entry(error: ImageError, path: &[u8]) -> ImageError {
    match error {
        ImageError::Entry { reason, .. } => refused(path, &reason),
        other => other,
    }
}

/// The names of a path, without the leading slash and the dots.
fn components(path: &[u8]) -> Result<Vec<&[u8]>> {
    if path.contains(&0) {
        return Err(refused(path, "a NUL in its name"));
    }
    let parts: Vec<&[u8]> = path
        .split(|b| *b == b'/')
        .filter(|part| !matches!(*part, b"" | b"."))
        .collect();
    if parts.contains(&b"..".as_slice()) {
        return Err(refused(path, "its path leads out of the image"));
    }
    Ok(parts)
}

fn body(entry: &Entry, file: &Arc<File>) -> Result<Body> {
    let (major, minor) = entry.device;
    let device = |body: fn(u32, u32) -> Body| {
        // new_encode_dev in Linux: 12 bits of major, 20 of minor.
        if major >= 1 << 12 || minor >= 1 << 20 {
            return Err(refused(&entry.path, "a device number out of range"));
        }
        Ok(body(major, minor))
    };
    Ok(match entry.kind {
        Kind::Directory => Body::Directory(Children::new()),
        Kind::Regular => Body::Regular(Content::from_layer(file, entry.size, entry.pieces.clone())),
        Kind::Symlink if entry.link.is_empty() || entry.link.contains(&0) => {
            return Err(refused(&entry.path, "a symbolic link to nothing"));
        }
        Kind::Symlink => Body::Symlink(entry.link.clone()),
        Kind::CharDevice => device(Body::CharDevice)?,
        Kind::BlockDevice => device(Body::BlockDevice)?,
        Kind::Fifo => Body::Fifo,
        Kind::HardLink => return Err(refused(&entry.path, "a hard link has no body")),
    })
}

fn meta(entry: &Entry) -> Meta {
    Meta {
        // Linux gives every symbolic link this mode, whatever its archive says.
        mode: if entry.kind == Kind::Symlink {
            0o777
        } else {
            entry.mode
        },
        uid: entry.uid,
        gid: entry.gid,
        mtime: entry.mtime,
        mtime_nsec: entry.mtime_nsec,
        xattrs: entry
            .xattrs
            .iter()
            .filter(|(name, _)| is_kept(name))
            .cloned()
            .collect::<Xattrs>(),
    }
}

/// overlayfs takes attributes of these names in a lower layer for its own orders
/// (redirects, opaque directories); a container's image has none to give.
pub fn is_kept(xattr: &[u8]) -> bool {
    !xattr.starts_with(b"trusted.overlay.") && !xattr.starts_with(b"user.overlay.")
}

#[cfg(test)]
mod tests;
