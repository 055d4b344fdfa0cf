//! What a worker does: it makes one VM ready, makes it a child, runs it, ends.

use super::packet;
use super::protocol::{FromWorker, ToWorker};
use crate::machine::{CONSOLE_LINES, News, last_words};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use vm_run_abi::identity;
use vmm::{Birth, Disks, EventSink, Host, Image, Prepared, Tap, Vm, VmState};

/// The longest state, in bytes: some ten kilobytes for each vCPU.
pub(crate) const STATE_MAX: u64 = 16 << 20;

/// Serves its owner until that is gone.
pub(crate) fn run(host: Host, socket: OwnedFd) -> io::Result<()> {
    let mut worker = Worker {
        host: Arc::new(host),
        socket: Arc::new(socket),
        life: Life::Blank,
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
}

/// It only goes forward; a step that failed leaves it over.
enum Life {
    Blank,
    Prepared(Box<Prepared>),
    Running(Box<Vm>),
    Over,
}

type Answer = (FromWorker, Vec<OwnedFd>);

impl Worker {
    fn fulfil(&mut self, request: ToWorker, with: Vec<OwnedFd>) -> Result<Answer, String> {
        let mut with = with.into_iter().map(File::from);
        match request {
            ToWorker::Prepare { memory } => {
                let (Life::Blank, Some(image), Some(state)) =
                    (self.take_life(), with.next(), with.next())
                else {
                    return Err(out_of_turn());
                };
                let prepared = prepare(&self.host, image, memory, state)?;
                self.life = Life::Prepared(Box::new(prepared));
                Ok((FromWorker::Prepared, Vec::new()))
            }
            ToWorker::Start {
                asked,
                identity,
                has_root,
                has_mounted,
                has_writable,
                has_volumes,
                network,
                map_root,
                hold,
            } => {
                let Life::Prepared(prepared) = self.take_life() else {
                    return Err(out_of_turn());
                };
                let disks = Disks {
                    root: has_root.then(|| with.next()).flatten(),
                    mounted: has_mounted.then(|| with.next()).flatten(),
                    writable: has_writable.then(|| with.next()).flatten(),
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
            Life::Blank | Life::Prepared(_) | Life::Over => Err(out_of_turn()),
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

fn prepare(host: &Arc<Host>, image: File, memory: u64, state: File) -> Result<Prepared, String> {
    let image = Image::from_file(image, memory).map_err(|e| e.to_string())?;
    let state = read_state(state).map_err(|e| format!("the state cannot be read: {e}"))?;
    Prepared::new(host, &image, &Arc::new(state)).map_err(|e| e.to_string())
}

/// Reads a state from a file that [`write_state`] has made, maybe in another process.
pub(crate) fn read_state(file: File) -> io::Result<VmState> {
    postcard::from_bytes(&contents(&file)?).map_err(|_| io::ErrorKind::InvalidData.into())
}

/// Writes a state to a file of its own.
pub(crate) fn write_state(state: &VmState) -> io::Result<File> {
    sealed(&postcard::to_stdvec(state).map_err(io::Error::other)?)
}

/// A file in memory that nobody can change: all workers of a template get one and the
/// same, and none is to choose what the others restore.
fn sealed(bytes: &[u8]) -> io::Result<File> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let mut file = File::from(memfd_create("vm-run-state", flags)?);
    file.write_all(bytes)?;
    let all = SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    fcntl_add_seals(&file, all)?;
    Ok(file)
}

/// Reads by offsets: the position in the file is one for all who have it, and several
/// workers may read at once.
fn contents(file: &File) -> io::Result<Vec<u8>> {
    let len = file.metadata()?.len();
    if len > STATE_MAX {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    // No longer than STATE_MAX.
    let mut bytes = vec![0; len as usize];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}

fn freeze(vm: Vm) -> Result<Answer, String> {
    vm.pause().map_err(|e| e.to_string())?;
    let (image, state) = vm.freeze().map_err(|e| e.to_string())?;
    let memory = image.bytes();
    let failed = |e: io::Error| format!("a frozen guest cannot be handed over: {e}");
    let file = image.file().try_clone().map_err(failed)?;
    let state = write_state(&state).map_err(failed)?;
    Ok((
        FromWorker::Frozen { memory },
        vec![file.into(), state.into()],
    ))
}

fn out_of_turn() -> String {
    "the worker was asked out of turn".into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_is_the_same_for_all_who_share_its_file() {
        let file = sealed(b"state").expect("a file");
        let shared = file.try_clone().expect("cloned");
        assert_eq!(contents(&file).expect("reads"), b"state");
        assert_eq!(contents(&shared).expect("reads"), b"state");
        for change in [shared.write_at(b"x", 0).map(drop), shared.set_len(0)] {
            let error = change.expect_err("sealed");
            assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
        }
    }

    #[test]
    fn a_file_that_is_no_state_is_not_read() {
        let long = File::from(memfd_create("long", MemfdFlags::CLOEXEC).expect("a file"));
        long.set_len(STATE_MAX + 1).expect("sized");
        assert!(contents(&long).is_err());
        assert!(read_state(sealed(b"").expect("a file")).is_err());
    }
}
