//! What `manifest.json` says.

use super::files::{self, Part, part_of, read_bounded, whole};
use super::{DISK, FORMAT, MANIFEST, MEMORY, ROOT, STATE, open_with_pages};
use crate::error::Error;
use crate::template::{Kind, Live, Warm};
use serde::{Deserialize, Serialize};
use std::path::Path;
use vmm::Cpu;

/// A manifest is a few kilobytes.
const MANIFEST_MAX: u64 = 64 << 10;

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
    /// The CPU on which it was frozen.
    pub cpu: Cpu,
    /// Of kernel and agent; empty without a Linux.
    pub guest_digest: String,
    /// The guest's memory in bytes.
    pub memory_bytes: u64,
    /// The file `state`.
    pub state: Part,
    /// `memory`, and the layers over it: `memory.0`, ...; of these the pages that count.
    pub memory: Vec<Part>,
    /// `root`, if there is one.
    pub root: Option<Part>,
    /// The layers of its disk: `layer.0`, ...
    pub layers: Vec<Part>,
    /// `disk`, if there is one.
    pub disk: Option<Part>,
}

/// What a file of a template is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// vCPUs and devices, and which page is in which file.
    State,
    /// Guest memory, or a layer of it.
    Memory,
    /// A root image.
    Root,
    /// A layer of a disk.
    DiskLayer,
    /// The list of an empty disk.
    EmptyDisk,
}

/// A file that a manifest names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedPart<'a> {
    /// Its name in the template's directory.
    pub name: String,
    /// What it is.
    pub content: Content,
    /// What it has to be like.
    pub part: &'a Part,
}

/// Read before the rest, and with every other field unknown: a later format may
/// have any.
#[derive(Deserialize)]
struct FormatOnly {
    format: u32,
}

impl Manifest {
    /// Reads and checks the manifest of the template in `dir`.
    ///
    /// # Errors
    /// No template, one of another format, or a spoilt one.
    pub fn read(dir: &Path) -> Result<Self, Error> {
        Self::parse(dir, &Self::read_text(dir)?)
    }

    /// The text of the manifest of the template in `dir`.
    ///
    /// # Errors
    /// No template, or a text that is too long.
    pub fn read_text(dir: &Path) -> Result<Vec<u8>, Error> {
        read_bounded(&dir.join(MANIFEST), MANIFEST_MAX)
    }

    /// Reads and checks what is, or is to be, the manifest of the template in `dir`.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn parse(dir: &Path, text: &[u8]) -> Result<Self, Error> {
        let bad = |reason| refused(dir, reason);
        let spoilt = |e| {
            bad(format!(
                "its manifest is spoilt ({e}); remove and rebuild it"
            ))
        };
        if text.len() as u64 > MANIFEST_MAX {
            return Err(bad(format!(
                "its manifest has more than {MANIFEST_MAX} bytes"
            )));
        }
        let format: FormatOnly = serde_json::from_slice(text).map_err(spoilt)?;
        if format.format != FORMAT {
            return Err(bad(format!(
                "it has format {} and this vm-run writes format {FORMAT}; remove and rebuild it",
                format.format
            )));
        }
        serde_json::from_slice(text).map_err(spoilt)
    }

    /// Puts the text of a manifest beside the files of its template.
    ///
    /// # Errors
    /// What the file system says.
    pub fn write_text(dir: &Path, text: &[u8]) -> Result<(), Error> {
        files::write(&dir.join(MANIFEST), text)
    }

    /// The files of the template but for the manifest, always in the same order.
    pub fn files(&self) -> Vec<NamedPart<'_>> {
        let named = |name: String, content, part| NamedPart {
            name,
            content,
            part,
        };
        let mut all = vec![named(STATE.into(), Content::State, &self.state)];
        for (number, part) in self.memory.iter().enumerate() {
            all.push(named(memory_name(number), Content::Memory, part));
        }
        let root = self.root.iter();
        all.extend(root.map(|part| named(ROOT.into(), Content::Root, part)));
        for (number, part) in self.layers.iter().enumerate() {
            all.push(named(layer_name(number), Content::DiskLayer, part));
        }
        let disk = self.disk.iter();
        all.extend(disk.map(|part| named(DISK.into(), Content::EmptyDisk, part)));
        all
    }

    /// # Errors
    /// If the template was made for another CPU than `here`.
    pub fn check_cpu(&self, dir: &Path, here: &Cpu) -> Result<(), Error> {
        if self.cpu == *here {
            return Ok(());
        }
        let reason = if self.cpu.to_string() == here.to_string() {
            format!(
                "it was made on a {here} with other features (microcode, kernel or hypervisor have changed); rebuild it here"
            )
        } else {
            format!(
                "it was made on a {} and this is a {here}; rebuild it here",
                self.cpu
            )
        };
        Err(refused(dir, reason))
    }

    /// Reads all of the template, and compares the digests of all of its files.
    ///
    /// # Errors
    /// A file that is not what was written, by name.
    pub fn verify(&self, dir: &Path) -> Result<(), Error> {
        let (_, pages) = open_with_pages(dir, self)?;
        let mut layers = pages.iter();
        for NamedPart {
            name,
            content,
            part,
        } in self.files()
        {
            // The first of the memory is all of it.
            let layer = match content {
                Content::State | Content::EmptyDisk => continue,
                Content::Memory if name != MEMORY => layers.next(),
                Content::Memory | Content::Root | Content::DiskLayer => None,
            };
            let path = dir.join(&name);
            let file = files::open(&path)?;
            let found = match layer {
                Some(runs) => part_of(&file, &super::ranges(runs)),
                None => whole(&file).and_then(|all| part_of(&file, &all)),
            };
            if found.map_err(Error::io(&path, "read"))? != *part {
                let reason = format!("its {name} is not what was written; remove and rebuild it");
                return Err(refused(dir, reason));
            }
        }
        Ok(())
    }
}

pub(super) fn refused(dir: &Path, reason: String) -> Error {
    Error::Template {
        path: dir.to_path_buf(),
        reason,
    }
}

/// The base, and then the layers over it.
pub(super) fn memory_name(number: usize) -> String {
    match number.checked_sub(1) {
        None => MEMORY.into(),
        Some(layer) => format!("{MEMORY}.{layer}"),
    }
}

pub(super) fn layer_name(number: usize) -> String {
    format!("layer.{number}")
}
