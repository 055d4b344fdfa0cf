//! The fork of a child that runs.
//!
//! ```text
//!   children  made | ............ | mapped | ............... | the rest, state, identity
//!   source    runs | pages copied | runs   | again, and stops | runs on
//! ```
//! See `vmm/src/capture.rs` for what happens to the source.

use super::{Child, POISONED, Phase};
use crate::error::Error;
use crate::machine::Capturing;
use crate::pool::Place;
use crate::request::Request;
use crate::stages::ForkPath;
use crate::template::{ForkSpec, Kind, Live, Template, TemplateInfo, Warm};
use crate::volumes::Claim;
use crate::worker::{Remote, Workers, write_record};
use std::fs::File;
use std::sync::Arc;
use vmm::{CaptureCost, CaptureSpec, Image, Merged, Shell};

/// What has become of a fork of a child that runs.
#[derive(Debug)]
pub struct LiveFork {
    /// In the order in which they were asked for.
    pub children: Vec<Result<Child, Error>>,
    /// What it took of the source.
    pub cost: CaptureCost,
}

/// A VM that waits for memory and state.
enum Waiting {
    Here(Shell),
    Worker(Remote),
}

impl Child {
    /// Forks it while it runs: each child goes on where this one was at one instant,
    /// wherever its vCPUs were, as somebody else. This one hardly notices; one that is
    /// paused stays so, and its children run.
    ///
    /// In a child of a guest with Linux no program runs before its identity holds. It has
    /// the container as this one has it, to be attached to ([`Child::attach`]); what the
    /// host had started beside it finds its streams closed, and connections of TCP are
    /// reset unless its [`ForkSpec`] says otherwise.
    ///
    /// A container with its writable layer on a disk goes on in `top`, a fresh overlay
    /// ([`format_overlay`](crate::format_overlay)), as each child does in its own
    /// ([`ForkSpec::disks`]): what it has written so far is below all of them, and never
    /// written again. One without has none.
    ///
    /// # Errors
    /// A container that does not run; a guest whose kernel is not
    /// vm-run's own; a request as of [`Template::fork`], or what the monitor says. This child
    /// runs on.
    pub fn fork(
        &mut self,
        place: &Place,
        specs: Vec<ForkSpec>,
        top: Option<File>,
    ) -> Result<LiveFork, Error> {
        let (info, spec) = self.pictured(&self.container.image, top)?;
        let requests = specs.into_iter().map(|spec| info.check(spec));
        let requests = requests.collect::<Result<Vec<_>, _>>()?;
        let image = self.make_room()?;
        let mut waiting = make(place, &info.host, &image, self.vcpus, requests.len())?;
        let most = mappings_for_each(place, waiting.len());
        let capturing = self.machine.begin_capture(info.live.is_some())?;
        if capturing.so_far().runs() <= most {
            lay(&mut waiting, capturing.so_far())?;
        }
        let (mut template, cost) = self.finish(capturing, info, spec)?;
        if template.image().runs() > most {
            let fitting = template.image().within(most)?;
            template = template.with_memory(fitting);
            self.machine.set_image(template.image().clone());
        }
        let children = start(place, &template, waiting, requests);
        Ok(LiveFork { children, cost })
    }

    /// Takes a picture of it while it runs: a template whose children go on where this one
    /// was at one instant, as those of [`Child::fork`] do. It is in memory; what has not
    /// been written since the child was forked is shared with it. `image` is what people
    /// call the container's image.
    ///
    /// `top` is as for [`Child::fork`].
    ///
    /// # Errors
    /// As [`Child::fork`].
    pub fn capture(
        &mut self,
        image: &str,
        top: Option<File>,
    ) -> Result<(Template, CaptureCost), Error> {
        let (info, spec) = self.pictured(image, top)?;
        self.make_room()?;
        let capturing = self.machine.begin_capture(info.live.is_some())?;
        self.finish(capturing, info, spec)
    }

    /// What its memory was when it was last forked or captured: for [`Image::merge`], in any
    /// thread, which makes its next forks cheaper where there were many. Where nobody does
    /// it a fork has to do it first, now and then.
    ///
    /// # Errors
    /// A child that is not there any more.
    pub fn memory(&self) -> Result<Image, Error> {
        self.machine.image()
    }

    /// Uses what was made of it.
    ///
    /// # Errors
    /// As [`Self::memory`].
    pub fn use_merged(&mut self, merged: &Merged) -> Result<(), Error> {
        let image = self.machine.image()?.with_merged(merged);
        self.machine.set_image(image);
        Ok(())
    }

    /// Its memory, with room for one more layer.
    fn make_room(&mut self) -> Result<Image, Error> {
        let image = self.machine.image()?.with_room()?;
        self.machine.set_image(image.clone());
        Ok(image)
    }

    fn finish(
        &mut self,
        capturing: Capturing,
        info: Arc<TemplateInfo>,
        spec: CaptureSpec,
    ) -> Result<(Template, CaptureCost), Error> {
        let own = spec.overlay.as_ref().map(File::try_clone).transpose();
        let own = own.map_err(Error::Process)?;
        let finished = self.machine.finish_capture(capturing, spec);
        // With an error nobody knows in which file its disk goes on.
        self.born.is_disk_unknown |= finished.is_err() && own.is_some();
        let (image, mut state, cost) = finished?;
        self.born.layers.extend(own);
        if info.live.is_some() {
            state.interrupt_for_identity();
        }
        Ok((Template::of(&info, image, state), cost))
    }

    /// What is said of a picture of it, and how it is taken.
    fn pictured(
        &self,
        image: &str,
        overlay: Option<File>,
    ) -> Result<(Arc<TemplateInfo>, CaptureSpec), Error> {
        let mut spec = CaptureSpec {
            overlay,
            claim: None,
            stays_paused: self.is_paused,
        };
        if self.template.kind == Kind::Micro {
            return match self.phase {
                Phase::Poisoned => Err(Error::State(POISONED)),
                _ => Ok((Arc::clone(&self.template), spec)),
            };
        }
        self.expect(Phase::Started, "has no container that runs")?;
        if self.born.is_disk_unknown {
            return Err(Error::State(
                "cannot be forked any more, for a fork of it has failed half-way: start its container again",
            ));
        }
        let root = self.born.root.as_ref().map(File::try_clone).transpose();
        let root = root.map_err(Error::Process)?;
        let container = Warm {
            image: image.into(),
            ..self.container.clone()
        };
        let layers = self.born.layers.iter().map(File::try_clone);
        let layers = layers.collect::<Result<_, _>>().map_err(Error::Process)?;
        let mut volumes = None;
        if self.born.has_volumes {
            let (ours, theirs) = Claim::new().map_err(Error::Process)?;
            (volumes, spec.claim) = (Some(ours), Some(theirs));
        }
        let info = TemplateInfo {
            live: Some(Live {
                disk: self.born.slot,
            }),
            layers,
            volumes,
            ..self.template.with_container(container, root)
        };
        Ok((Arc::new(info), spec))
    }
}

/// Makes VMs, in parallel where they have workers.
fn make(
    place: &Place,
    host: &Arc<vmm::Host>,
    image: &Image,
    vcpus: u8,
    count: usize,
) -> Result<Vec<Waiting>, Error> {
    match place {
        Place::ThisProcess => (0..count)
            .map(|_| Ok(Waiting::Here(Shell::new(host, image, vcpus)?)))
            .collect(),
        Place::Workers(workers) => {
            let mut remotes = spawn(workers, image, vcpus, count)?;
            remotes.iter_mut().try_for_each(Remote::made)?;
            Ok(remotes.into_iter().map(Waiting::Worker).collect())
        }
    }
}

fn spawn(
    workers: &Arc<Workers>,
    image: &Image,
    vcpus: u8,
    count: usize,
) -> Result<Vec<Remote>, Error> {
    let spawn = |_| {
        let remote = Remote::spawn(workers)?;
        remote.make(image, vcpus)?;
        Ok(remote)
    };
    (0..count).map(spawn).collect()
}

/// How many mappings the memory of each of so many children may be. Workers have one each.
fn mappings_for_each(place: &Place, count: usize) -> usize {
    match place {
        Place::ThisProcess => vmm::mappings_left() / count.max(1),
        Place::Workers(_) => usize::MAX,
    }
}

/// Maps what there is of the memory, while the source runs.
fn lay(waiting: &mut [Waiting], image: &Image) -> Result<(), Error> {
    let record = write_record(None, image).map_err(Error::Process)?;
    for waiting in waiting.iter_mut() {
        match waiting {
            Waiting::Here(shell) => shell.lay(image)?,
            Waiting::Worker(remote) => remote.lay(image, &record)?,
        }
    }
    waiting.iter_mut().try_for_each(|waiting| match waiting {
        Waiting::Here(_) => Ok(()),
        Waiting::Worker(remote) => remote.laid(),
    })
}

/// Lets them go on as children. All are asked before any is waited for.
fn start(
    place: &Place,
    template: &Template,
    mut waiting: Vec<Waiting>,
    requests: Vec<Request>,
) -> Vec<Result<Child, Error>> {
    let ask = |(waiting, request): (&mut Waiting, &Request)| match (waiting, place) {
        (Waiting::Worker(remote), Place::Workers(workers)) => {
            remote.load(template)?;
            remote.start(request, request.serve(workers)?.as_ref())
        }
        (Waiting::Here(_) | Waiting::Worker(_), _) => Ok(()),
    };
    let asked: Vec<Result<(), Error>> = waiting.iter_mut().zip(&requests).map(ask).collect();
    let all = waiting.into_iter().zip(requests).zip(asked);
    all.map(|((waiting, request), asked)| {
        asked?;
        finish(template, waiting, request)
    })
    .collect()
}

fn finish(template: &Template, waiting: Waiting, request: Request) -> Result<Child, Error> {
    match waiting {
        Waiting::Here(shell) => {
            let prepared = shell.load(template.image(), template.shared_state())?;
            template.fork_here(prepared, request, ForkPath::Live)
        }
        Waiting::Worker(mut remote) => {
            remote.loaded()?;
            template.child_in(remote, &request, ForkPath::Live)
        }
    }
}
