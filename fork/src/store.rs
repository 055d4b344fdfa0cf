//! A template on disk: a directory of a few files.
//!
//! | file | holds |
//! |---|---|
//! | `manifest.json` | what the rest is, and for whom: read first, readable by people |
//! | `state` | the vCPUs' and devices' state, and which pages are in which layer, in postcard |
//! | `memory` | guest memory, sparse; mapped private by every child |
//! | `memory.0`, ... | the layers over it: pages that were written since, each at its place |
//! | `root` | the root image of a warm template's container |
//! | `layer.0`, ... | the layers of the disk of a container that ran |
//! | `disk` | the empty disk that is mounted in a bare template, as a list |
//!
//! It is written beside its place and renamed there, so it is whole or not
//! there. A file that lies on the same file system already, as those of the template
//! from which a child was forked do, is not copied but gets one more name: no file of a
//! template is ever written again.
//!
//! The state is untrusted until its digest, its size and its contents
//! have been checked; the digests of the large files are checked by `template inspect
//! --verify` and not at every fork.

mod files;
mod manifest;

pub(crate) use files::read_bounded;
pub use files::{Part, SparseWriter, rename_into_place};
pub use manifest::{Content, Manifest, NamedPart};

use crate::disk::{EmptyDisk, LIST_MAX};
use crate::error::Error;
use crate::template::{Kind, TemplateInfo};
use crate::worker::picture::{RECORD_MAX, parse_record, record_bytes};
use files::{keep, open as open_file, whole, write};
use manifest::{layer_name, memory_name, refused};
use std::fs::{self, File};
use std::ops::Range;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};
use vmm::{DISK_LAYERS_MAX, Image, Run, VmState};

/// The version of the whole directory. Goes up with every change of meaning in
/// the manifest, in the state or in what the memory holds.
pub const FORMAT: u32 = 11;

const MANIFEST: &str = "manifest.json";
const STATE: &str = "state";
const MEMORY: &str = "memory";
const ROOT: &str = "root";
const DISK: &str = "disk";

/// What a template on disk is written from.
pub(crate) struct Contents<'a> {
    pub(crate) info: &'a TemplateInfo,
    pub(crate) image: &'a Image,
    pub(crate) state: &'a VmState,
}

/// A template on disk, opened.
pub(crate) struct Opened {
    pub(crate) image: Image,
    pub(crate) state: VmState,
    pub(crate) root: Option<File>,
    pub(crate) layers: Vec<File>,
    pub(crate) empty_disk: Option<EmptyDisk>,
}

pub(crate) fn open(dir: &Path, manifest: &Manifest) -> Result<Opened, Error> {
    open_with_pages(dir, manifest).map(|(opened, _)| opened)
}

/// The same, and the pages of each layer of the memory.
fn open_with_pages(dir: &Path, manifest: &Manifest) -> Result<(Opened, Vec<Vec<Run>>), Error> {
    let (state, pages) = read_state(dir, manifest)?;
    state.check()?;
    let image = open_memory(dir, manifest, &pages)?;
    if manifest.kind == Kind::Warm && manifest.root.is_none() {
        return Err(spoilt(dir, "it has no root image"));
    }
    let root = manifest.root.as_ref();
    let root = root.map(|part| open_part(dir, ROOT, part)).transpose()?;
    if manifest.layers.len() > DISK_LAYERS_MAX {
        return Err(spoilt(dir, "its disk has too many layers"));
    }
    let layers = manifest.layers.iter().enumerate();
    let layers = layers.map(|(number, part)| open_part(dir, &layer_name(number), part));
    let opened = Opened {
        image,
        state,
        root,
        layers: layers.collect::<Result<_, _>>()?,
        empty_disk: read_disk(dir, manifest)?,
    };
    Ok((opened, pages))
}

/// The state, and the pages of each layer of the memory.
fn read_state(dir: &Path, manifest: &Manifest) -> Result<(VmState, Vec<Vec<Run>>), Error> {
    let bytes = read_bounded(&dir.join(STATE), RECORD_MAX)?;
    if !manifest.state.is_of(&bytes) {
        return Err(spoilt(dir, "its state is not what was written"));
    }
    match parse_record(&bytes) {
        Ok((Some(state), layers)) => Ok((state, layers)),
        Ok((None, _)) => Err(spoilt(dir, "it has no state")),
        Err(_) => Err(spoilt(dir, "its state cannot be read")),
    }
}

fn open_memory(dir: &Path, manifest: &Manifest, layers: &[Vec<Run>]) -> Result<Image, Error> {
    if manifest.memory.len() != layers.len() + 1 {
        return Err(spoilt(dir, "its state is of another memory"));
    }
    let base = open_file(&dir.join(MEMORY))?;
    let mut image = Image::from_file(base, manifest.memory_bytes)
        .map_err(|_| spoilt(dir, "its memory is cut short"))?;
    for (number, runs) in layers.iter().enumerate() {
        let name = memory_name(number + 1);
        let file = open_file(&dir.join(&name))?;
        image = image.with_layer_from_disk(file, runs).map_err(|_| {
            spoilt(
                dir,
                &format!("its {name} is cut short, or of another memory"),
            )
        })?;
    }
    Ok(image)
}

/// Opens a file of the length that was written.
fn open_part(dir: &Path, name: &str, part: &Part) -> Result<File, Error> {
    let path = dir.join(name);
    let file = open_file(&path)?;
    let found = file.metadata().map_err(Error::io(&path, "stat"))?.len();
    if found != part.bytes {
        let reason = format!("its {name} has {found} bytes and not {}", part.bytes);
        return Err(spoilt(dir, &reason));
    }
    Ok(file)
}

fn read_disk(dir: &Path, manifest: &Manifest) -> Result<Option<EmptyDisk>, Error> {
    let Some(part) = &manifest.disk else {
        return Ok(None);
    };
    let list = read_bounded(&dir.join(DISK), LIST_MAX)?;
    if !part.is_of(&list) {
        return Err(spoilt(dir, "its empty disk is not what was written"));
    }
    let read = EmptyDisk::from_list(&list);
    read.map(Some)
        .map_err(|_| spoilt(dir, "its empty disk cannot be read"))
}

fn spoilt(dir: &Path, reason: &str) -> Error {
    refused(dir, format!("{reason}; remove and rebuild it"))
}

/// Writes a template to `dir`.
pub(crate) fn save(dir: &Path, contents: &Contents<'_>) -> Result<Manifest, Error> {
    let Contents { info, image, state } = contents;
    let parent = dir.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(parent).map_err(Error::io(parent, "create"))?;
    let beside = tempfile::Builder::new()
        .prefix(".new-")
        .tempdir_in(parent)
        .map_err(Error::io(parent, "create a directory in"))?;
    let unwritable = |what, e: &dyn std::error::Error| {
        refused(dir, format!("its {what} cannot be written: {e}"))
    };
    let record = record_bytes(Some(state), image).map_err(|e| unwritable("state", &e))?;
    write(&beside.path().join(STATE), &record)?;
    let list = info.empty_disk.as_ref().map(EmptyDisk::to_list);
    if let Some(list) = &list {
        write(&beside.path().join(DISK), list)?;
    }
    let manifest = Manifest {
        format: FORMAT,
        written_by: env!("CARGO_PKG_VERSION").into(),
        created: SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
            .as_secs(),
        kind: info.kind,
        vcpus: state.vcpus() as u32,
        domain: info.domain.clone(),
        warm: info.warm.clone(),
        live: info.live,
        cpu: info.cpu.clone(),
        guest_digest: info.guest_digest.clone(),
        memory_bytes: image.bytes(),
        state: Part::of_bytes(&record),
        memory: save_memory(beside.path(), image)?,
        root: save_root(beside.path(), info)?,
        layers: save_layers(beside.path(), info)?,
        disk: list.as_deref().map(Part::of_bytes),
    };
    let text = serde_json::to_vec_pretty(&manifest).map_err(|e| unwritable("manifest", &e))?;
    Manifest::write_text(beside.path(), &text)?;
    rename_into_place(beside, dir)?;
    Ok(manifest)
}

/// The base, and of each layer the pages that count.
fn save_memory(dir: &Path, image: &Image) -> Result<Vec<Part>, Error> {
    let all = 0..image.bytes();
    let base = keep(image.base(), &[all], &dir.join(MEMORY))?;
    let mut parts = vec![base];
    for (file, runs) in image.layers() {
        let path = dir.join(memory_name(parts.len()));
        parts.push(keep(file, &ranges(&runs), &path)?);
    }
    Ok(parts)
}

fn ranges(runs: &[Run]) -> Vec<Range<u64>> {
    runs.iter().map(|run| run.bytes()).collect()
}

fn save_root(dir: &Path, info: &TemplateInfo) -> Result<Option<Part>, Error> {
    let root = info.root.as_ref();
    root.map(|root| keep_all(root, &dir.join(ROOT))).transpose()
}

fn save_layers(dir: &Path, info: &TemplateInfo) -> Result<Vec<Part>, Error> {
    let save = |(number, layer): (usize, &File)| {
        let path = dir.join(layer_name(number));
        // What its guest has written, and not asked to have on the disk.
        layer.sync_all().map_err(Error::io(&path, "write"))?;
        keep_all(layer, &path)
    };
    info.layers.iter().enumerate().map(save).collect()
}

fn keep_all(file: &File, path: &Path) -> Result<Part, Error> {
    let all = whole(file).map_err(Error::io(path, "stat"))?;
    keep(file, &all, path)
}
