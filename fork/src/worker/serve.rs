//! What a worker does: it makes one VM ready, makes it a child, runs it, ends.

use super::packet;
use super::picture::{self, write_layer_record, write_record};
use super::protocol::{FromWorker, ToWorker};
use crate::machine::{CONSOLE_LINES, News, last_words};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use std::fs::File;
use std::io;
use std::sync::Arc;
use vm_run_abi::identity;
use vmm::{
    Birth, Capture, CaptureSpec, DiskFiles, Disks, EventSink, Host, Image, Prepared, Shell, Tap, Vm,
};

/// Serves its owner until that is gone.
pub(crate) fn run(host: Host, socket: OwnedFd) -> io::Result<()> {
    let mut worker = Worker {
        host: Arc::new(host),
        socket: Arc::new(socket),
        life: Life::Blank,
        capture: None,
    };
    while let Some((request, descriptors)) = packet::receive(&worker.socket)? {
        match worker.fulfil(request, descriptors) {
            Ok((answer, with)) => {
                let with: Vec<BorrowedFd<'_>> = with.iter().map(AsFd::as_fd).collect();
                packet::send(&worker.socket, &answer, &with)?;
            }
            Err(why) => packet::send(&worker.socket, &FromWorker::Failed(why), &[])?,
        }
    }
    Ok(())
}

struct Worker {
    host: Arc<Host>,
    socket: Arc<OwnedFd>,
    life: Life,
    /// A picture of its guest that was begun.
    capture: Option<Capture>,
}

/// It only goes forward; a step that failed leaves it over.
enum Life {
    Blank,
    Made(Box<Shell>),
    Prepared(Box<Prepared>),
    Running(Box<Vm>),
    Over,
}

type Answer = (FromWorker, Vec<OwnedFd>);

impl Worker {
    fn fulfil(&mut self, request: ToWorker, with: Vec<OwnedFd>) -> Result<Answer, String> {
        let mut with = with.into_iter().map(File::from);
        match request {
            ToWorker::Make { memory, vcpus } => {
                let (Life::Blank, Some(base)) = (self.take_life(), with.next()) else {
                    return Err(out_of_turn());
                };
                let shell = Image::from_file(base, memory)
                    .and_then(|image| Shell::new(&self.host, &image, vcpus))
                    .map_err(|e| e.to_string())?;
                self.life = Life::Made(Box::new(shell));
                Ok((FromWorker::Made, Vec::new()))
            }
            ToWorker::Lay { memory } => {
                let Life::Made(mut shell) = self.take_life() else {
                    return Err(out_of_turn());
                };
                let (image, _) = picture::read(memory, with)?;
                shell.lay(&image).map_err(|e| e.to_string())?;
                self.life = Life::Made(shell);
                Ok((FromWorker::Laid, Vec::new()))
            }
            ToWorker::Load { memory } => {
                let (Life::Made(shell), (image, Some(state))) =
                    (self.take_life(), picture::read(memory, with)?)
                else {
                    return Err(out_of_turn());
                };
                let prepared = shell.load(&image, &Arc::new(state));
                let prepared = prepared.map_err(|e| e.to_string())?;
                self.life = Life::Prepared(Box::new(prepared));
                Ok((FromWorker::Loaded, Vec::new()))
            }
            ToWorker::Start {
                asked,
                identity,
                has_root,
                mounted,
                writable,
                has_volumes,
                network,
                map_root,
                hold,
            } => {
                let Life::Prepared(prepared) = self.take_life() else {
                    return Err(out_of_turn());
                };
                let root = has_root.then(|| with.next()).flatten();
                let mut take = |count: usize| {
                    let files = DiskFiles(with.by_ref().take(count).collect());
                    (count > 0).then_some(files)
                };
                let disks = Disks {
                    root,
                    mounted: take(mounted),
                    writable: take(writable),
                };
                let mut birth = self.birth(&prepared, &identity, disks, map_root, hold);
                let server = has_volumes.then(|| with.next()).flatten();
                birth.volumes = server.map(OwnedFd::from);
                let tap = |limits| {
                    let descriptor = with.next()?.into();
                    Some(Tap { descriptor, limits })
                };
                birth.tap = network.and_then(tap);
                let vm = prepared.start(asked, birth).map_err(|e| e.to_string())?;
                let started = FromWorker::Started {
                    timeline: vm.timeline(),
                    mappings: vm.mappings(),
                    root_image: vm.root_image(),
                };
                self.life = Life::Running(Box::new(vm));
                Ok((started, Vec::new()))
            }
            ToWorker::Connect { port } => {
                let stream = self.vm()?.connect(port);
                let stream = stream.map_err(|e| format!("cannot connect to the agent: {e}"))?;
                Ok((FromWorker::Connected, vec![stream.into()]))
            }
            ToWorker::Pause => {
                self.vm()?.pause().map_err(|e| e.to_string())?;
                Ok((FromWorker::Paused, Vec::new()))
            }
            ToWorker::Resume => {
                self.vm()?.resume().map_err(|e| e.to_string())?;
                Ok((FromWorker::Resumed, Vec::new()))
            }
            ToWorker::Renew { identity } => {
                let vm = self.vm()?;
                vm.pause()
                    .and_then(|()| vm.renew(&identity))
                    .and_then(|()| vm.resume())
                    .map_err(|e| e.to_string())?;
                Ok((FromWorker::Renewed, Vec::new()))
            }
            ToWorker::LastWords => {
                let words = last_words(self.vm()?.console_tail(CONSOLE_LINES));
                Ok((FromWorker::LastWords(words), Vec::new()))
            }
            ToWorker::BeginCapture { has_kernel } => {
                let vm = self.vm()?;
                let kernel = if has_kernel {
                    vm.check_kernel()
                } else {
                    Ok(())
                };
                let capture = kernel.and_then(|()| vm.begin_capture());
                let capture = capture.map_err(|e| e.to_string())?;
                let (layer, runs) = capture.layer();
                let record = write_layer_record(None, runs).map_err(handing_over)?;
                let layer = layer.try_clone().map_err(handing_over)?;
                self.capture = Some(capture);
                Ok((FromWorker::Copied, vec![layer.into(), record.into()]))
            }
            ToWorker::FinishCapture {
                has_overlay,
                has_claim,
                stays_paused,
            } => {
                let capture = self.capture.take().ok_or_else(out_of_turn)?;
                let overlay = has_overlay.then(|| with.next()).flatten();
                let claim = has_claim.then(|| with.next()).flatten();
                let spec = CaptureSpec {
                    overlay,
                    claim: claim.map(OwnedFd::from),
                    stays_paused,
                };
                let captured = self.vm()?.finish_capture(capture, spec);
                let captured = captured.map_err(|e| e.to_string())?;
                let record = write_layer_record(Some(&captured.state), captured.pages());
                let record = record.map_err(handing_over)?;
                Ok((FromWorker::Captured(captured.cost), vec![record.into()]))
            }
            ToWorker::ReplaceLayers { count } => {
                let merged = with.next().ok_or_else(out_of_turn)?;
                let replaced = self.vm()?.replace_layers(count, merged);
                replaced.map_err(|e| e.to_string())?;
                Ok((FromWorker::LayersReplaced, Vec::new()))
            }
            ToWorker::Freeze => {
                let Life::Running(vm) = self.take_life() else {
                    return Err(out_of_turn());
                };
                freeze(*vm)
            }
        }
    }

    fn take_life(&mut self) -> Life {
        std::mem::replace(&mut self.life, Life::Over)
    }

    fn vm(&self) -> Result<&Vm, String> {
        match &self.life {
            Life::Running(vm) => Ok(vm),
            Life::Blank | Life::Made(_) | Life::Prepared(_) | Life::Over => Err(out_of_turn()),
        }
    }

    fn birth(
        &self,
        prepared: &Prepared,
        identity: &[u8],
        disks: Disks,
        map_root: bool,
        hold: bool,
    ) -> Birth {
        let console = prepared.console().clone();
        let socket = Arc::clone(&self.socket);
        // From the vCPU's thread straight to the owner.
        let sink: EventSink = Arc::new(move |event| {
            let news = FromWorker::News(News::of(&event, || console.tail(CONSOLE_LINES)));
            if let Err(error) = packet::send(&*socket, &news, &[]) {
                log::debug!("nobody hears of {event:?}: {error}");
            }
        });
        Birth {
            disks,
            volumes: None,
            tap: None,
            map_root,
            patches: vec![(identity::GPA, identity.to_vec())],
            events: sink,
            hold,
        }
    }
}

fn freeze(vm: Vm) -> Result<Answer, String> {
    vm.pause().map_err(|e| e.to_string())?;
    let (image, state) = vm.freeze().map_err(|e| e.to_string())?;
    let memory = image.bytes();
    let file = image.base().try_clone().map_err(handing_over)?;
    let state = write_record(Some(&state), &image).map_err(handing_over)?;
    Ok((
        FromWorker::Frozen { memory },
        vec![file.into(), state.into()],
    ))
}

fn handing_over(error: io::Error) -> String {
    format!("a guest's memory and state cannot be handed over: {error}")
}

fn out_of_turn() -> String {
    "the worker was asked out of turn".into()
}
