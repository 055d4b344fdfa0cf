//! The fork of a child that runs.
//!
//! ```text
//!   children  made | ............ | mapped | ............... | the rest, state, identity
//!   source    runs | pages copied | runs   | again, and stops | runs on
//! ```
//! See `vmm/src/capture.rs` for what happens to the source.

use super::{Child, Phase};
use crate::error::Error;
use crate::pool::Place;
use crate::request::Request;
use crate::stages::ForkPath;
use crate::template::{ForkSpec, Kind, Template};
use crate::worker::{Remote, Workers, write_record};
use std::sync::Arc;
use vmm::{CaptureCost, Image, Shell};

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
    /// wherever its vCPUs were, as somebody else. This one hardly notices.
    ///
    /// Today a guest without Linux: the agent of one with a container does not know yet
    /// that it may wake up as another's.
    ///
    /// # Errors
    /// A guest of Linux, a request as of [`Template::fork`], or what the monitor says. This
    /// child runs on.
    pub fn fork(&mut self, place: &Place, specs: Vec<ForkSpec>) -> Result<LiveFork, Error> {
        if self.template.kind != Kind::Micro {
            return Err(Error::Request(
                "a Linux guest that runs cannot be forked yet: freeze its container",
            ));
        }
        if self.phase == Phase::Poisoned {
            return Err(Error::State("has failed and cannot be used any more"));
        }
        let requests = specs.into_iter().map(|spec| self.template.check(spec));
        let requests = requests.collect::<Result<Vec<_>, _>>()?;
        let image = self.machine.image()?;
        let vcpus = self.vcpus;
        let mut waiting = make(place, &self.template.host, &image, vcpus, requests.len())?;
        let capturing = self.machine.begin_capture()?;
        lay(&mut waiting, &capturing.so_far())?;
        let (image, state, cost) = self.machine.finish_capture(capturing)?;
        let template = Template::of(&self.template, image, state);
        let children = start(&template, waiting, requests);
        Ok(LiveFork { children, cost })
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
    template: &Template,
    mut waiting: Vec<Waiting>,
    requests: Vec<Request>,
) -> Vec<Result<Child, Error>> {
    let ask = |(waiting, request): (&mut Waiting, &Request)| match waiting {
        Waiting::Here(_) => Ok(()),
        Waiting::Worker(remote) => {
            remote.load(template)?;
            remote.start(request, None)
        }
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
