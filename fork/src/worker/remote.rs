//! A worker, seen by its owner.

use super::packet;
use super::picture::{self, read_record};
use super::protocol::{FromWorker, ToWorker};
use super::spawner::Workers;
use crate::error::Error;
use crate::machine::News;
use crate::request::Request;
use crate::template::Template;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::{Shutdown, shutdown};
use rustix::process::Pid;
use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::mem::discriminant;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vmm::{CaptureCost, CaptureSpec, DiskFiles, Image, Moment, Run, Timeline, VmState};

/// The most news that are kept while an answer is waited for. A guest makes one of each
/// kind at most; a worker that sends more is not ours any longer.
const NEWS_MAX: usize = 64;

/// How long a worker may take to answer, or to end. It needs milliseconds, and a
/// second for each gibibyte to hand over a frozen memory; the rest is for a host that
/// is very busy, or emulated.
const PATIENCE: Duration = Duration::from_secs(120);

/// A worker process. Dropping it ends the worker.
#[derive(Debug)]
pub(crate) struct Remote {
    socket: OwnedFd,
    /// The spawner ends with its owner, and all workers with it.
    _workers: Arc<Workers>,
    pid: Pid,
    /// What came while an answer was waited for.
    news: VecDeque<News>,
    timeline: Option<Timeline>,
    /// Where the guest's memory lies in it.
    mappings: Vec<(u64, u64)>,
    /// Where the root image lies in it, if it is mapped into the guest.
    root_image: Option<(u64, u64)>,
    /// As its owner knows it.
    image: Option<Image>,
    is_gone: bool,
}

impl Remote {
    /// Starts a worker.
    pub(crate) fn spawn(workers: &Arc<Workers>) -> Result<Self, Error> {
        let (socket, pid) = workers.spawn()?;
        Ok(Self {
            socket,
            _workers: Arc::clone(workers),
            pid,
            news: VecDeque::new(),
            timeline: None,
            mappings: Vec::new(),
            root_image: None,
            image: None,
            is_gone: false,
        })
    }

    pub(crate) fn pid(&self) -> Pid {
        self.pid
    }

    /// Asks it to make a VM with the base of `image`.
    pub(crate) fn make(&self, image: &Image, vcpus: u8) -> Result<(), Error> {
        let memory = image.bytes();
        self.ask(&ToWorker::Make { memory, vcpus }, &[image.base().as_fd()])
    }

    /// Waits until it has.
    pub(crate) fn made(&mut self) -> Result<(), Error> {
        self.has(FromWorker::Made)
    }

    /// Asks it to give its VM the memory and the state of the template.
    pub(crate) fn load(&mut self, template: &Template) -> Result<(), Error> {
        let (image, record) = (template.image(), template.record()?);
        self.image = Some(image.clone());
        let memory = image.bytes();
        self.ask(&ToWorker::Load { memory }, &picture::files(image, record))
    }

    /// Waits until it has.
    pub(crate) fn loaded(&mut self) -> Result<(), Error> {
        self.has(FromWorker::Loaded)
    }

    /// What its memory was when it was last captured, or loaded.
    pub(crate) fn image(&self) -> Result<&Image, Error> {
        self.image.as_ref().ok_or(Error::State("has no memory yet"))
    }

    /// The same memory in other files.
    pub(crate) fn set_image(&mut self, image: Image) {
        self.image = Some(image);
    }

    /// Asks it to map the layers of an image that is not whole yet.
    pub(crate) fn lay(&self, image: &Image, record: &File) -> Result<(), Error> {
        let memory = image.bytes();
        self.ask(&ToWorker::Lay { memory }, &picture::files(image, record))
    }

    /// Waits until it has.
    pub(crate) fn laid(&mut self) -> Result<(), Error> {
        self.has(FromWorker::Laid)
    }

    /// See [`vmm::Vm::begin_capture`]: the image as far as it is there, and its new layer.
    pub(crate) fn begin_capture(&mut self, has_kernel: bool) -> Result<(Image, File), Error> {
        self.ask(&ToWorker::BeginCapture { has_kernel }, &[])?;
        let with = match self.answer()? {
            (FromWorker::Copied, with) => with,
            (other, _) => return Err(odd(&other)),
        };
        let mut with = with.into_iter().map(File::from);
        let (Some(layer), Some(record)) = (with.next(), with.next()) else {
            return Err(odd(&FromWorker::Copied));
        };
        let runs = layer_runs(read_record(&record))?.1;
        let file = layer.try_clone().map_err(Error::Process)?;
        Ok((self.image()?.with_growing(file, &runs)?, layer))
    }

    /// See [`vmm::Vm::finish_capture`]; `layer` is what was begun.
    pub(crate) fn finish_capture(
        &mut self,
        layer: File,
        spec: &CaptureSpec,
    ) -> Result<(Image, VmState, CaptureCost), Error> {
        let CaptureSpec { overlay, claim, .. } = spec;
        let message = ToWorker::FinishCapture {
            has_overlay: overlay.is_some(),
            has_claim: claim.is_some(),
            stays_paused: spec.stays_paused,
        };
        let overlay = overlay.iter().map(AsFd::as_fd);
        let with = overlay.chain(claim.iter().map(AsFd::as_fd));
        self.ask(&message, &with.collect::<Vec<BorrowedFd<'_>>>())?;
        let (cost, with) = match self.answer()? {
            (FromWorker::Captured(cost), with) => (cost, with),
            (other, _) => return Err(odd(&other)),
        };
        let record = with.into_iter().map(File::from).next();
        let record = record.ok_or_else(|| odd(&FromWorker::Captured(cost)))?;
        let (state, runs) = layer_runs(read_record(&record))?;
        let state = state.ok_or_else(|| odd(&FromWorker::Captured(cost)))?;
        state.check()?;
        let image = self.image()?.with_layer(layer, &runs)?;
        self.image = Some(image.clone());
        Ok((image, state, cost))
    }

    /// Asks it to run the child, whose volumes `server` serves.
    pub(crate) fn start(&self, request: &Request, server: Option<&OwnedFd>) -> Result<(), Error> {
        let disks = &request.disks;
        let network = request.network.as_ref();
        let tap = network.map(|network| &network.tap);
        let layers = |disk: &Option<DiskFiles>| disk.as_ref().map_or(0, |files| files.0.len());
        let others = [&disks.mounted, &disks.writable].into_iter().flatten();
        let descriptors: Vec<BorrowedFd<'_>> = disks
            .root
            .iter()
            .chain(others.flat_map(|files| &files.0))
            .map(AsFd::as_fd)
            .chain(server.map(AsFd::as_fd))
            .chain(tap.map(AsFd::as_fd))
            .collect();
        let message = ToWorker::Start {
            asked: request.asked,
            identity: request.identity.to_bytes().to_vec(),
            has_root: disks.root.is_some(),
            mounted: layers(&disks.mounted),
            writable: layers(&disks.writable),
            has_volumes: server.is_some(),
            network: network.map(|network| network.limits),
            map_root: request.map_root,
            hold: request.hold,
        };
        self.ask(&message, &descriptors)
    }

    /// Waits until it does.
    pub(crate) fn started(&mut self) -> Result<(), Error> {
        match self.answer()? {
            (
                FromWorker::Started {
                    timeline,
                    mappings,
                    root_image,
                },
                _,
            ) => {
                self.timeline = Some(timeline);
                self.mappings = mappings;
                self.root_image = root_image;
                Ok(())
            }
            (other, _) => Err(odd(&other)),
        }
    }

    pub(crate) fn mappings(&self) -> &[(u64, u64)] {
        &self.mappings
    }

    pub(crate) fn root_image(&self) -> Option<(u64, u64)> {
        self.root_image
    }

    pub(crate) fn timeline(&self) -> Timeline {
        let now = Moment::now();
        self.timeline.unwrap_or(Timeline {
            asked: now,
            vm_made: now,
            memory_mapped: now,
            restored: now,
        })
    }

    pub(crate) fn connect(&mut self, port: u32) -> Result<UnixStream, Error> {
        self.ask(&ToWorker::Connect { port }, &[])?;
        match self.answer()? {
            (FromWorker::Connected, with) => with
                .into_iter()
                .next()
                .map(UnixStream::from)
                .ok_or_else(|| odd(&FromWorker::Connected)),
            (other, _) => Err(odd(&other)),
        }
    }

    pub(crate) fn pause(&mut self) -> Result<(), Error> {
        self.ask(&ToWorker::Pause, &[])?;
        self.has(FromWorker::Paused)
    }

    pub(crate) fn resume(&mut self) -> Result<(), Error> {
        self.ask(&ToWorker::Resume, &[])?;
        self.has(FromWorker::Resumed)
    }

    pub(crate) fn renew(&mut self, page: &[u8]) -> Result<(), Error> {
        let identity = page.to_vec();
        self.ask(&ToWorker::Renew { identity }, &[])?;
        self.has(FromWorker::Renewed)
    }

    /// See [`vmm::Vm::replace_layers`].
    pub(crate) fn replace_layers(&mut self, count: usize, merged: &File) -> Result<(), Error> {
        self.ask(&ToWorker::ReplaceLayers { count }, &[merged.as_fd()])?;
        self.has(FromWorker::LayersReplaced)
    }

    pub(crate) fn last_words(&mut self) -> Result<Vec<String>, Error> {
        self.ask(&ToWorker::LastWords, &[])?;
        match self.answer()? {
            (FromWorker::LastWords(lines), _) => Ok(lines),
            (other, _) => Err(odd(&other)),
        }
    }

    pub(crate) fn freeze(mut self) -> Result<(Image, VmState), Error> {
        self.ask(&ToWorker::Freeze, &[])?;
        let (memory, with) = match self.answer()? {
            (FromWorker::Frozen { memory }, with) => (memory, with),
            (other, _) => return Err(odd(&other)),
        };
        let mut with = with.into_iter().map(File::from);
        let (Some(image), Some(state)) = (with.next(), with.next()) else {
            return Err(odd(&FromWorker::Frozen { memory }));
        };
        let image = Image::sealed(image, memory)?;
        let record = read_record(&state).map_err(|e| Error::WorkerGone(e.to_string()));
        let (state, _) = record?;
        let state = state.ok_or_else(|| odd(&FromWorker::Frozen { memory }))?;
        state.check()?;
        Ok((image, state))
    }

    /// What it has told by itself. It never waits.
    pub(crate) fn news(&mut self) -> Option<News> {
        if let Some(news) = self.news.pop_front() {
            return Some(news);
        }
        if self.is_gone {
            return None;
        }
        match packet::try_receive(&self.socket) {
            Ok(Some(Some((FromWorker::News(news), _)))) => Some(news),
            Ok(Some(None)) => self.gone("it was killed, or has crashed"),
            Ok(Some(Some(_))) => self.gone("it answers what nobody asked"),
            Ok(None) => None,
            Err(error) => self.gone(&error.to_string()),
        }
    }

    fn gone(&mut self, why: &str) -> Option<News> {
        self.is_gone = true;
        Some(News::Dead(format!("its worker process has gone: {why}")))
    }

    /// Whether the process is still there.
    pub(crate) fn is_alive(&self) -> bool {
        !self.is_ready(PollFlags::empty(), Duration::ZERO)
    }

    /// Ends it, and waits until it has.
    pub(crate) fn end(self) {
        if let Err(error) = shutdown(&self.socket, Shutdown::Write) {
            log::debug!("a worker was gone already: {error}");
        }
        // Its end: nothing else is asked for.
        if !self.is_ready(PollFlags::empty(), PATIENCE) {
            log::warn!("the worker {} does not end", self.pid.as_raw_nonzero());
        }
    }

    /// Waits for one of the events, or the worker's end.
    fn is_ready(&self, events: PollFlags, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let left = Timespec {
                tv_sec: left.as_secs() as i64,
                tv_nsec: left.subsec_nanos().into(),
            };
            match poll(&mut [PollFd::new(&self.socket, events)], Some(&left)) {
                Err(Errno::INTR) => {}
                ready => return matches!(ready, Ok(1..)),
            }
        }
    }

    fn ask(&self, request: &ToWorker, with: &[BorrowedFd<'_>]) -> Result<(), Error> {
        packet::send(&self.socket, request, with).map_err(|e| Error::WorkerGone(e.to_string()))
    }

    /// Waits for an answer that says no more than that it is done.
    fn has(&mut self, done: FromWorker) -> Result<(), Error> {
        match self.answer()? {
            (answer, _) if discriminant(&answer) == discriminant(&done) => Ok(()),
            (other, _) => Err(odd(&other)),
        }
    }

    /// The answer to a request; news are kept.
    fn answer(&mut self) -> Result<(FromWorker, Vec<OwnedFd>), Error> {
        loop {
            if !self.is_ready(PollFlags::IN, PATIENCE) {
                self.is_gone = true;
                let seconds = PATIENCE.as_secs();
                return Err(Error::WorkerGone(format!("no answer in {seconds} s")));
            }
            let received = packet::receive(&self.socket);
            match received.map_err(|e: io::Error| Error::WorkerGone(e.to_string()))? {
                None => {
                    self.is_gone = true;
                    return Err(Error::WorkerGone("it was killed, or has crashed".into()));
                }
                Some((FromWorker::News(_), _)) if self.news.len() >= NEWS_MAX => {
                    self.is_gone = true;
                    return Err(Error::WorkerGone("it talks without end".into()));
                }
                Some((FromWorker::News(news), _)) => self.news.push_back(news),
                Some((FromWorker::Failed(why), _)) => return Err(Error::Worker(why)),
                Some(answer) => return Ok(answer),
            }
        }
    }
}

impl AsFd for Remote {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Of a record of one layer.
fn layer_runs(record: io::Result<picture::Record>) -> Result<(Option<VmState>, Vec<Run>), Error> {
    match record.map_err(|e| Error::WorkerGone(e.to_string()))? {
        (state, mut layers) if layers.len() == 1 => Ok((state, layers.pop().unwrap_or_default())),
        _ => Err(Error::WorkerGone("it has sent no single layer".into())),
    }
}

fn odd(answer: &FromWorker) -> Error {
    Error::WorkerGone(format!("it answers out of turn: {answer:?}"))
}
