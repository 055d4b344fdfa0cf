//! A template on its way to another process of the same user, by descriptors.

use crate::error::Error;
use crate::template::{Kind, Live, Template, TemplateInfo, Warm};
use crate::volumes::Claim;
use crate::worker::picture;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::sync::Arc;
use vmm::{Cpu, Host};

/// A template in parts: see [`Template::pack`].
#[derive(Debug)]
pub struct Parcel {
    /// What the files are; a few kilobytes.
    pub label: Vec<u8>,
    /// Its memory and state.
    pub files: Vec<OwnedFd>,
}

/// What its receiver cannot see in the files.
#[derive(Serialize, Deserialize)]
struct Label {
    kind: Kind,
    guest_digest: String,
    cpu: Cpu,
    domain: String,
    warm: Option<Warm>,
    live: Option<Live>,
    /// How many layers its disk has.
    layers: usize,
    has_root: bool,
    has_volumes: bool,
    /// Guest memory, in bytes.
    memory: u64,
}

impl Template {
    /// Takes it apart, to be put together by another process ([`Template::unpack`]): of
    /// one that has a container inside. The memory is shared, not copied.
    ///
    /// # Errors
    /// No descriptors.
    pub fn pack(&self) -> Result<Parcel, Error> {
        let info = self.info();
        let label = Label {
            kind: info.kind,
            guest_digest: info.guest_digest.clone(),
            cpu: info.cpu.clone(),
            domain: info.domain.clone(),
            warm: info.warm.clone(),
            live: info.live,
            layers: info.layers.len(),
            has_root: info.root.is_some(),
            has_volumes: info.volumes.is_some(),
            memory: self.image().bytes(),
        };
        let label = postcard::to_stdvec(&label).map_err(unusable)?;
        let root = info.root.as_ref().map(AsFd::as_fd);
        let files: Vec<BorrowedFd<'_>> = root
            .into_iter()
            .chain(info.layers.iter().map(AsFd::as_fd))
            .chain(info.volumes.iter().map(AsFd::as_fd))
            .chain(picture::files(self.image(), self.record()?))
            .collect();
        let files = files.iter().map(BorrowedFd::try_clone_to_owned);
        let files = files.collect::<Result<_, _>>().map_err(Error::Process)?;
        Ok(Parcel { label, files })
    }

    /// Puts a template together that another process has taken apart.
    ///
    /// # Errors
    /// A parcel that is none, or one of another CPU.
    pub fn unpack(host: Arc<Host>, parcel: Parcel) -> Result<Self, Error> {
        let label: Label = postcard::from_bytes(&parcel.label).map_err(unusable)?;
        if label.cpu != host.cpu() {
            return Err(unusable("it was captured on another CPU"));
        }
        let mut files = parcel.files.into_iter().map(File::from);
        let root = label.has_root.then(|| files.next()).flatten();
        let layers = files.by_ref().take(label.layers).collect();
        let volumes = label.has_volumes.then(|| files.next()).flatten();
        let (image, state) = picture::read(label.memory, files).map_err(unusable)?;
        let state = state.ok_or_else(|| unusable("it has no state"))?;
        state.check()?;
        let info = TemplateInfo {
            host,
            kind: label.kind,
            guest_digest: label.guest_digest,
            cpu: label.cpu,
            domain: label.domain,
            warm: label.warm,
            live: label.live,
            layers,
            volumes: volumes.map(|socket| Claim::from_descriptor(socket.into())),
            root,
            empty_disk: None,
        };
        Ok(Self::new(info, image, state))
    }
}

fn unusable(why: impl std::fmt::Display) -> Error {
    Error::Parcel(why.to_string())
}
