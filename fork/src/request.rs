//! What is asked of a fork, checked against what the template is.

use crate::child::Born;
use crate::disk::{Disks, Slot, reopen};
use crate::error::Error;
use crate::identity;
use crate::network::Network;
use crate::template::{DEFAULT_DOMAIN, ForkSpec, TemplateInfo};
use crate::volumes::{Claim, VOLUMES_MAX, Volume};
use crate::worker::Workers;
use std::fs::File;
use std::os::fd::OwnedFd;
use vm_run_abi::identity::Identity;
use vmm::{DiskFiles, Moment};

/// A fork's request, checked.
pub(crate) struct Request {
    pub(crate) asked: Moment,
    pub(crate) identity: Identity,
    pub(crate) disks: vmm::Disks,
    pub(crate) volumes: Shared,
    pub(crate) network: Option<Network>,
    /// See [`Birth::map_root`].
    pub(crate) map_root: bool,
    pub(crate) hold: bool,
}

/// What of the host's files a child sees.
pub(crate) enum Shared {
    Nothing,
    Volumes(Vec<Volume>),
    /// What its source sees.
    Inherited(Claim),
}

impl TemplateInfo {
    /// Checks a request, and draws the child's identity.
    pub(crate) fn check(&self, spec: ForkSpec) -> Result<Request, Error> {
        let asked = Moment::now();
        if spec.domain != self.domain {
            return Err(Error::Domain {
                template: self.domain.clone(),
                asked: spec.domain,
            });
        }
        if spec.volumes.len() > VOLUMES_MAX {
            return Err(Error::Request("a child has at most 64 volumes"));
        }
        if self.warm.is_some() && !spec.volumes.is_empty() {
            return Err(Error::Request(
                "the container in a warm template runs already: it gets no volumes",
            ));
        }
        let mut identity = identity::draw(&spec.hostname)?;
        identity.connections = spec.connections;
        identity.live = self.live.is_some();
        Ok(Request {
            asked,
            identity,
            disks: self.place(spec.disks)?,
            volumes: match &self.volumes {
                Some(claim) => Shared::Inherited(claim.try_clone().map_err(Error::Process)?),
                None if spec.volumes.is_empty() => Shared::Nothing,
                None => Shared::Volumes(spec.volumes),
            },
            network: spec.network,
            // Who names a domain shares no page with anyone outside of it.
            map_root: self.domain == DEFAULT_DOMAIN,
            hold: spec.hold,
        })
    }

    /// Which of the machine's disks each file is to be.
    fn place(&self, disks: Disks) -> Result<vmm::Disks, Error> {
        let Disks { mut root, writable } = disks;
        if let Some(own) = &self.root {
            if root.is_some() {
                return Err(Error::Request(
                    "a warm template has a root image of its own",
                ));
            }
            root = Some(own.try_clone().map_err(Error::Process)?);
        }
        let (slot, files) = match self.live {
            Some(live) => (live.disk, self.over_layers(live.disk, writable)?),
            None => (Some(self.slot_of(writable.as_ref())?), writable),
        };
        let (mounted, writable) = match slot {
            Some(Slot::Mounted) => (files, None),
            Some(Slot::Writable) | None => (None, files),
        };
        Ok(vmm::Disks {
            root,
            mounted,
            writable,
        })
    }

    /// Where a disk goes that the parent has not seen.
    fn slot_of(&self, files: Option<&DiskFiles>) -> Result<Slot, Error> {
        let is_empty = match (&self.empty_disk, files.map(|files| &files.0[..])) {
            (Some(empty), Some([file])) => empty.is_in(file).map_err(Error::Process)?,
            _ => false,
        };
        Ok(if is_empty {
            Slot::Mounted
        } else {
            Slot::Writable
        })
    }

    /// A child's own layer over those of a container that ran.
    fn over_layers(
        &self,
        slot: Option<Slot>,
        own: Option<DiskFiles>,
    ) -> Result<Option<DiskFiles>, Error> {
        match (slot, own) {
            (None, None) => Ok(None),
            (Some(_), Some(DiskFiles(own))) if own.len() == 1 => {
                let lower = self.layers.iter().map(reopen);
                let mut files = lower
                    .collect::<Result<Vec<_>, _>>()
                    .map_err(Error::Process)?;
                files.extend(own);
                Ok(Some(DiskFiles(files)))
            }
            _ => Err(Error::Request(
                "a child of a container that ran has one fresh layer for its disk, or none if the container had no disk",
            )),
        }
    }
}

impl Request {
    /// Has its volumes served, if it has any. The socket is for its worker alone.
    pub(crate) fn serve(&self, workers: &Workers) -> Result<Option<OwnedFd>, Error> {
        let served = match &self.volumes {
            Shared::Nothing => return Ok(None),
            Shared::Volumes(volumes) => workers.serve(volumes)?,
            Shared::Inherited(claim) => workers.serve_heir(claim)?,
        };
        Ok(Some(served.0))
    }

    /// What the child of it knows of itself.
    pub(crate) fn born(&self) -> Result<Born, Error> {
        let root = self.disks.root.as_ref().map(File::try_clone).transpose();
        let (slot, files) = match (&self.disks.mounted, &self.disks.writable) {
            (Some(files), _) => (Some(Slot::Mounted), &files.0[..]),
            (None, Some(files)) => (Some(Slot::Writable), &files.0[..]),
            (None, None) => (None, &[][..]),
        };
        let layers = files.iter().map(File::try_clone);
        let layers = layers.collect::<Result<_, _>>().map_err(Error::Process)?;
        Ok(Born {
            generation: self.identity.generation,
            hostname: self.identity.hostname().into(),
            root: root.map_err(Error::Process)?,
            is_held: self.hold,
            has_volumes: !matches!(self.volumes, Shared::Nothing),
            slot,
            layers,
            is_disk_unknown: false,
            has_network: self.network.is_some(),
        })
    }
}
