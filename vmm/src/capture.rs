//! The fork of a VM that runs: a picture of it at one instant, which it hardly notices.
//!
//! ```text
//!   source    runs ........................ | stopped            | runs on
//!   caller    pages copied, and those again | state, last pages  | children, elsewhere
//!             that were written meanwhile   |
//! ```
//! What has to be copied are the pages that the source has of its own: at its first
//! capture those that the page map shows, later those that it has written since the last.
//! KVM logs what the guest writes and `devices::WriteLog` what the monitor does. Looking
//! for pages costs milliseconds for each gibibyte, and copying one some 3 µs, so neither
//! happens while the source is stopped; the two logs name what is left then in a tenth of
//! a millisecond. The layer that holds the copies is a file that is only ever written with
//! write(2), never mapped writable, so it can be sealed at once.
//!
//! The source keeps its pages: for it nothing has changed. Nor does it matter to it if a
//! capture fails; what had been read from the logs is kept for the next.

use crate::error::Error;
use crate::machine::lock;
use crate::memory::{Image, Layer, PageSet, Ram, Run, memory_file, seal_unmapped};
use crate::moment::Moment;
use crate::reaper::Parts;
use crate::vm::{Vm, VmState};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::sync::Arc;

/// So few pages are left for when the source is stopped: a tenth of a millisecond's copy.
const FEW: u64 = 32;

/// A source that writes faster than it is copied is stopped after so many rounds.
const ROUNDS_MAX: u32 = 12;

const NOT_FORKED: &str = "booted and not forked: freeze it first";

/// What is known of a VM's memory since it was last captured.
#[derive(Debug)]
pub(crate) struct Trail {
    /// What it was then; before the first time, what it was forked from.
    image: Image,
    /// What it has written since, as far as the logs were read.
    written: PageSet,
}

/// A picture of a VM at one instant.
#[derive(Debug)]
pub struct Captured {
    /// Its memory: what it was forked from, and over it what it has written.
    pub image: Image,
    /// What is new in that since the last capture: a file, and the pages in it.
    pub layer: (Arc<File>, Vec<Run>),
    /// All the rest of it.
    pub state: VmState,
    /// What it took.
    pub cost: CaptureCost,
}

/// When a capture had come how far, and what was copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CaptureCost {
    /// It was asked for.
    pub asked: Moment,
    /// The source was told to stop.
    pub stopping: Moment,
    /// All of its vCPUs had.
    pub stopped: Moment,
    /// The states of vCPUs and devices were read.
    pub saved: Moment,
    /// They were let go on.
    pub resumed: Moment,
    /// How often pages were copied while it ran.
    pub rounds: u32,
    /// How many pages were, some more than once.
    pub copied_running: u64,
    /// How many were copied while it was stopped.
    pub copied_stopped: u64,
    /// How many pages the layer has.
    pub pages: u64,
}

impl Vm {
    /// What the memory of a VM was when it was last captured, or, before that, what it was
    /// forked from.
    ///
    /// # Errors
    /// A VM that was booted and not forked.
    pub fn image(&self) -> Result<Image, Error> {
        if let Some(trail) = &*lock(&self.trail) {
            return Ok(trail.image.clone());
        }
        let image = self.parts()?.kvm.ram.image().cloned();
        image.ok_or(Error::Phase(NOT_FORKED))
    }

    /// Takes a picture of a VM that runs, wherever its vCPUs are. It goes on when this
    /// returns. `is_ready` is asked between rounds of copying whether the children are
    /// there that are to be made of the picture: until they are, it is not stopped.
    ///
    /// # Errors
    /// A VM that was booted and not forked, one that is captured already, or what the
    /// system says. The VM runs on, unless the error is that it cannot.
    pub fn capture(&self, is_ready: impl FnMut() -> bool) -> Result<Captured, Error> {
        self.capture_watched(is_ready, |_| {})
    }

    /// The same; `watch` sees the memory while nobody writes it.
    fn capture_watched(
        &self,
        mut is_ready: impl FnMut() -> bool,
        watch: impl FnOnce(&Ram),
    ) -> Result<Captured, Error> {
        let asked = Moment::now();
        let parts = self.parts()?;
        let ram = &parts.kvm.ram;
        let mut trail = lock(&self.trail);
        let trail = match &mut *trail {
            Some(trail) => trail,
            none => none.insert(begin(parts, self.pagemap())?),
        };
        let layer = memory_file(ram.bytes())?;
        let mut copying = Copying {
            ram,
            layer: &layer,
            pages: PageSet::none_of(ram.bytes()),
        };
        let mut cost = CaptureCost {
            asked,
            stopping: asked,
            stopped: asked,
            saved: asked,
            resumed: asked,
            rounds: 0,
            copied_running: 0,
            copied_stopped: 0,
            pages: 0,
        };
        loop {
            let written = trail.news(parts)?;
            let written = match cost.rounds {
                0 => trail.written.clone(),
                _ => written,
            };
            copying.copy(&written)?;
            cost.rounds += 1;
            cost.copied_running += written.count();
            let is_small = written.count() <= FEW;
            if (is_small || cost.rounds >= ROUNDS_MAX) && is_ready() {
                break;
            }
        }
        cost.stopping = Moment::now();
        let stopped = self.pause().and_then(|()| {
            cost.stopped = Moment::now();
            let state = stopped(parts, trail, &mut copying, &mut cost)?;
            watch(ram);
            Ok(state)
        });
        // Also what could not be stopped as a whole.
        self.resume()?;
        cost.resumed = Moment::now();
        let state = stopped?;
        let mut pages = copying.pages;
        cost.pages = pages.count();
        trail.image.fold(&layer, &mut pages)?;
        seal_unmapped(&layer)?;
        let layer = Layer {
            file: Arc::new(layer),
            pages,
        };
        let runs = layer.pages.runs().collect();
        let new = (Arc::clone(&layer.file), runs);
        let image = trail.image.under(layer);
        *trail = Trail {
            image: image.clone(),
            written: PageSet::none_of(ram.bytes()),
        };
        Ok(Captured {
            image,
            layer: new,
            state,
            cost,
        })
    }
}

/// Begins to log what a VM writes, and finds what it has written so far.
fn begin(parts: &Parts, pagemap: &File) -> Result<Trail, Error> {
    let ram = &parts.kvm.ram;
    let Some(image) = ram.image().cloned() else {
        return Err(Error::Phase(NOT_FORKED));
    };
    // The log first: what is written while we look is in it.
    parts.kvm.log_writes()?;
    let written = ram.own_pages(pagemap)?;
    Ok(Trail { image, written })
}

/// What is done while the source is stopped.
fn stopped(
    parts: &Parts,
    trail: &mut Trail,
    copying: &mut Copying<'_>,
    cost: &mut CaptureCost,
) -> Result<VmState, Error> {
    let devices = parts.devices.hold();
    let state = Vm::save(parts, &devices)?;
    cost.saved = Moment::now();
    // After the vCPUs were read: KVM writes guest memory when one is put aside (steal
    // time, arch/x86/kvm/x86.c).
    let last = trail.news(parts)?;
    copying.copy(&last)?;
    cost.copied_stopped = last.count();
    Ok(state)
}

impl Trail {
    /// What was written since the logs were last read.
    fn news(&mut self, parts: &Parts) -> Result<PageSet, Error> {
        let mut news = PageSet::none_of(parts.kvm.ram.bytes());
        let read = parts.kvm.take_writes(&mut news);
        // Some of it may have been read before the failure, and is in no log any more.
        self.written.add(&news);
        read.map(|()| news)
    }
}

/// A layer that is being written.
struct Copying<'a> {
    ram: &'a Ram,
    layer: &'a File,
    /// What is in it.
    pages: PageSet,
}

impl Copying<'_> {
    fn copy(&mut self, pages: &PageSet) -> Result<(), Error> {
        self.ram.copy_pages(pages, self.layer)?;
        self.pages.add(pages);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
