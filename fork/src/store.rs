//! A template on disk: a directory of a few files.
//!
//! | file | holds |
//! |---|---|
//! | `manifest.json` | what the rest is, and for whom: read first, readable by people |
//! | `state` | the vCPUs' and devices' state, in postcard |
//! | `memory` | guest memory, sparse; mapped private by every child |
//! | `root` | the root image of a warm template's container |
//! | `layer.0`, ... | the layers of the disk of a container that ran |
//! | `disk` | the empty disk that is mounted in a bare template, as a list |
//!
//! It is written beside its place and renamed there, so it is whole or not
//! there. The state is untrusted until its digest, its size and its contents
//! have been checked; the memory's digest is checked by `template inspect
//! --verify` and not at every fork.

use crate::disk::{EmptyDisk, LIST_MAX};
use crate::error::Error;
use crate::guest::{hex, sha256_of};
use crate::template::{Kind, Live, TemplateInfo, Warm};
use rustix::fs::{AtFlags, CWD, FlockOperation, SeekFrom, flock, linkat, seek};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};
use vmm::{Cpu, DISK_LAYERS_MAX, Image, VmState};

/// The version of the whole directory. Goes up with every change of meaning in
/// the manifest, in the state or in what the memory holds.
pub const FORMAT: u32 = 9;

const MANIFEST: &str = "manifest.json";
const STATE: &str = "state";
const MEMORY: &str = "memory";
const ROOT: &str = "root";
const DISK: &str = "disk";
/// A manifest is about a kilobyte.
const MANIFEST_MAX: u64 = 64 << 10;
/// A state is some ten kilobytes for each vCPU.
const STATE_MAX: u64 = 16 << 20;

/// What `manifest.json` says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// See [`FORMAT`].
    pub format: u32,
    /// The version of vm-run that wrote it.
    pub written_by: String,
    /// Seconds since the epoch.
    pub created: u64,
    /// What is inside.
    pub kind: Kind,
    /// How many vCPUs.
    pub vcpus: u32,
    /// Whose children may share its memory.
    pub domain: String,
    /// The container inside, if there is one.
    pub warm: Option<Warm>,
    /// If it ran when the picture was taken.
    pub live: Option<Live>,
    /// How many layers its disk has.
    pub layers: usize,
    /// The CPU on which it was frozen.
    pub cpu: Cpu,
    /// Of kernel and agent; empty without a Linux.
    pub guest_digest: String,
    /// Length of `state`, in bytes.
    pub state_bytes: u64,
    /// SHA-256 of `state`.
    pub state_sha256: String,
    /// Length of `memory`, in bytes: the guest's memory.
    pub memory_bytes: u64,
    /// SHA-256 of `memory`.
    pub memory_sha256: String,
    /// SHA-256 of `disk`, if there is one.
    pub disk_sha256: Option<String>,
}

/// Read before the rest, and with every other field unknown: a later format may
/// have any.
#[derive(Deserialize)]
struct FormatOnly {
    format: u32,
}

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

impl Manifest {
    /// Reads and checks the manifest of the template in `dir`.
    ///
    /// # Errors
    /// No template, one of another format, or a spoilt one.
    pub fn read(dir: &Path) -> Result<Self, Error> {
        let path = dir.join(MANIFEST);
        let text = read_bounded(&path, MANIFEST_MAX)?;
        let bad = |reason: String| Error::Template {
            path: dir.to_path_buf(),
            reason,
        };
        let format: FormatOnly = serde_json::from_slice(&text).map_err(|e| {
            bad(format!(
                "its manifest is spoilt ({e}); remove and rebuild it"
            ))
        })?;
        if format.format != FORMAT {
            return Err(bad(format!(
                "it has format {} and this vm-run writes format {FORMAT}; remove and rebuild it",
                format.format
            )));
        }
        serde_json::from_slice(&text).map_err(|e| {
            bad(format!(
                "its manifest is spoilt ({e}); remove and rebuild it"
            ))
        })
    }

    /// # Errors
    /// If the template was made for another CPU than `here`.
    pub(crate) fn check_cpu(&self, dir: &Path, here: &Cpu) -> Result<(), Error> {
        if self.cpu == *here {
            return Ok(());
        }
        Err(Error::Template {
            path: dir.to_path_buf(),
            reason: if self.cpu.to_string() == here.to_string() {
                format!(
                    "it was made on a {here} with other features (microcode, kernel or hypervisor have changed); rebuild it here"
                )
            } else {
                format!(
                    "it was made on a {} and this is a {here}; rebuild it here",
                    self.cpu
                )
            },
        })
    }

    /// Reads all of the memory and compares its digest.
    ///
    /// # Errors
    /// A memory file that is not what was written.
    pub fn verify_memory(&self, dir: &Path) -> Result<(), Error> {
        let path = dir.join(MEMORY);
        let mut file = File::open(&path).map_err(Error::io(&path, "open"))?;
        let digest = sha256_of(&mut file).map_err(Error::io(&path, "read"))?;
        if hex(&digest) == self.memory_sha256 {
            return Ok(());
        }
        Err(Error::Template {
            path: dir.to_path_buf(),
            reason: "its memory is not what was written; remove and rebuild it".into(),
        })
    }
}

pub(crate) fn open(dir: &Path, manifest: &Manifest) -> Result<Opened, Error> {
    let bad = |reason: &str| Error::Template {
        path: dir.to_path_buf(),
        reason: format!("{reason}; remove and rebuild it"),
    };
    let bytes = read_bounded(&dir.join(STATE), STATE_MAX)?;
    if hex(&Sha256::digest(&bytes)) != manifest.state_sha256 {
        return Err(bad("its state is not what was written"));
    }
    let state: VmState =
        postcard::from_bytes(&bytes).map_err(|_| bad("its state cannot be read"))?;
    state.check()?;
    let path = dir.join(MEMORY);
    let file = File::open(&path).map_err(Error::io(&path, "open"))?;
    // Kept for as long as the image is: a template in use is not removed.
    flock(&file, FlockOperation::NonBlockingLockShared).map_err(|_| bad("it is being removed"))?;
    let image = Image::from_file(file, manifest.memory_bytes)
        .map_err(|_| bad("its memory is cut short"))?;
    let root = match manifest.kind {
        Kind::Warm => {
            let path = dir.join(ROOT);
            Some(File::open(&path).map_err(Error::io(&path, "open"))?)
        }
        Kind::Bare | Kind::Micro => None,
    };
    if manifest.layers > DISK_LAYERS_MAX {
        return Err(bad("its disk has too many layers"));
    }
    let layer = |number| {
        let path = dir.join(layer_name(number));
        File::open(&path).map_err(Error::io(&path, "open"))
    };
    let layers = (0..manifest.layers).map(layer).collect::<Result<_, _>>()?;
    let empty_disk = match &manifest.disk_sha256 {
        Some(digest) => {
            let list = read_bounded(&dir.join(DISK), LIST_MAX)?;
            if hex(&Sha256::digest(&list)) != *digest {
                return Err(bad("its empty disk is not what was written"));
            }
            let read = EmptyDisk::from_list(&list);
            Some(read.map_err(|_| bad("its empty disk cannot be read"))?)
        }
        None => None,
    };
    Ok(Opened {
        image,
        state,
        root,
        layers,
        empty_disk,
    })
}

fn layer_name(number: usize) -> String {
    format!("layer.{number}")
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
    let state_bytes = postcard::to_stdvec(state).map_err(|e| Error::Template {
        path: dir.to_path_buf(),
        reason: format!("its state cannot be written: {e}"),
    })?;
    write(&beside.path().join(STATE), &state_bytes)?;
    let memory_sha256 = copy_memory(&image.flatten()?, &beside.path().join(MEMORY))?;
    if let Some(root) = &info.root {
        keep_file(root, &beside.path().join(ROOT))?;
    }
    for (number, layer) in info.layers.iter().enumerate() {
        // What its guest has written, and not asked to have on the disk.
        let path = beside.path().join(layer_name(number));
        layer.sync_all().map_err(Error::io(&path, "write"))?;
        keep_file(layer, &path)?;
    }
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
        layers: info.layers.len(),
        cpu: info.cpu.clone(),
        guest_digest: info.guest_digest.clone(),
        state_bytes: state_bytes.len() as u64,
        state_sha256: hex(&Sha256::digest(&state_bytes)),
        memory_bytes: image.bytes(),
        memory_sha256,
        disk_sha256: list.map(|list| hex(&Sha256::digest(&list))),
    };
    let text = serde_json::to_vec_pretty(&manifest).map_err(|e| Error::Template {
        path: dir.to_path_buf(),
        reason: format!("its manifest cannot be written: {e}"),
    })?;
    write(&beside.path().join(MANIFEST), &text)?;
    sync_dir(beside.path())?;
    fs::rename(beside.path(), dir).map_err(Error::io(dir, "rename to"))?;
    // The directory has its name now: nothing of it is to be cleaned up.
    let _kept = beside.keep();
    sync_dir(parent)?;
    Ok(manifest)
}

/// Copies an image without layers, with its holes, and returns its digest.
fn copy_memory(image: &Image, path: &Path) -> Result<String, Error> {
    let file = create(path)?;
    let copy = || -> io::Result<String> {
        file.set_len(image.bytes())?;
        let mut hash = Sha256::new();
        let zeroes = vec![0; 1 << 20];
        let mut buffer = vec![0; 1 << 20];
        let mut at = 0;
        while at < image.bytes() {
            let data = match seek(image.base(), SeekFrom::Data(at)) {
                Ok(data) => data,
                Err(Errno::NXIO) => image.bytes(),
                Err(e) => return Err(e.into()),
            };
            while at < data {
                let hole = (data - at).min(zeroes.len() as u64);
                hash.update(&zeroes[..hole as usize]);
                at += hole;
            }
            if at == image.bytes() {
                break;
            }
            let end = seek(image.base(), SeekFrom::Hole(at))?;
            while at < end {
                let part = &mut buffer[..((end - at) as usize).min(1 << 20)];
                image.base().read_exact_at(part, at)?;
                hash.update(&*part);
                file.write_all_at(part, at)?;
                at += part.len() as u64;
            }
        }
        file.sync_all()?;
        Ok(hex(&hash.finalize()))
    };
    copy().map_err(Error::io(path, "write"))
}

/// Gives a file that nobody writes any more a second name in the template, so that it
/// lives as long as the template; on another file system: a copy.
fn keep_file(file: &File, path: &Path) -> Result<(), Error> {
    let open_file = format!("/proc/self/fd/{}", file.as_raw_fd());
    match linkat(CWD, open_file, CWD, path, AtFlags::SYMLINK_FOLLOW) {
        Ok(()) => Ok(()),
        Err(_) => {
            let copy = || -> io::Result<()> {
                let mut to = OpenOptions::new().write(true).create_new(true).open(path)?;
                let len = file.metadata()?.len();
                let mut at = 0;
                let mut buffer = vec![0; 1 << 20];
                while at < len {
                    let part = &mut buffer[..((len - at) as usize).min(1 << 20)];
                    file.read_exact_at(part, at)?;
                    to.write_all(part)?;
                    at += part.len() as u64;
                }
                to.sync_all()
            };
            copy().map_err(Error::io(path, "write"))
        }
    }
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let mut file = create(path)?;
    file.write_all(bytes)
        .and_then(|()| file.sync_all())
        .map_err(Error::io(path, "write"))
}

fn create(path: &Path) -> Result<File, Error> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)
        .map_err(Error::io(path, "create"))
}

fn sync_dir(path: &Path) -> Result<(), Error> {
    File::open(path)
        .and_then(|dir| dir.sync_all())
        .map_err(Error::io(path, "sync"))
}

pub(crate) fn read_bounded(path: &Path, max: u64) -> Result<Vec<u8>, Error> {
    let file = File::open(path).map_err(Error::io(path, "open"))?;
    let mut bytes = Vec::new();
    file.take(max + 1)
        .read_to_end(&mut bytes)
        .map_err(Error::io(path, "read"))?;
    if bytes.len() as u64 > max {
        return Err(Error::io(path, "read")(io::ErrorKind::FileTooLarge.into()));
    }
    Ok(bytes)
}
