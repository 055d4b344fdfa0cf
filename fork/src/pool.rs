//! A pool: VMs of one template made ahead of time, so that a fork has only to
//! give one its identity and let it run.

use crate::child::Child;
use crate::error::Error;
use crate::request::Request;
use crate::stages::ForkPath;
use crate::template::{ForkSpec, Template};
use crate::worker::{Remote, Workers};
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vmm::Prepared;

/// How often the VMs that wait are looked after.
const CARE: Duration = Duration::from_secs(1);

/// How long the pool rests after it could not make a VM.
const REST: Duration = Duration::from_millis(200);

/// Where the VMs of a pool live.
#[derive(Debug, Clone)]
pub enum Place {
    /// In this process: they share its fate, and are few (see
    /// [`vmm::VMS_PER_PROCESS`]).
    ThisProcess,
    /// Each in a worker of its own.
    Workers(Arc<Workers>),
}

/// How many VMs of a pool there are, and have been.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PoolStats {
    /// Ready now.
    pub ready: usize,
    /// As many as are to be kept ready; none after [`Pool::drain`].
    pub size: usize,
    /// Forks that found one ready.
    pub pooled: u64,
    /// Forks that found none.
    pub cold: u64,
    /// VMs that died while they waited.
    pub died: u64,
    /// Why the last one could not be made, if that was the last that happened.
    pub last_failure: Option<String>,
}

/// A pool. Dropping it ends the VMs that wait; children live on.
#[derive(Debug)]
pub struct Pool {
    shared: Arc<Shared>,
    keeper: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    template: Arc<Template>,
    place: Place,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<Waiting>,
    is_closing: bool,
    stats: PoolStats,
}

/// A VM that waits for its identity.
#[derive(Debug)]
enum Waiting {
    Here(Box<Prepared>),
    Worker(Remote),
}

impl Pool {
    /// A pool of VMs of `template`, filled in the background.
    ///
    /// # Errors
    /// No thread for that.
    pub fn new(template: Arc<Template>, place: Place, size: usize) -> Result<Self, Error> {
        let shared = Arc::new(Shared {
            template,
            place,
            state: Mutex::new(State {
                stats: PoolStats {
                    size,
                    ..PoolStats::default()
                },
                ..State::default()
            }),
            changed: Condvar::new(),
        });
        let keeper = if size == 0 {
            None
        } else {
            let shared = Arc::clone(&shared);
            let thread = std::thread::Builder::new().name("vm-pool".into());
            Some(
                thread
                    .spawn(move || shared.keep())
                    .map_err(Error::Process)?,
            )
        };
        Ok(Self { shared, keeper })
    }

    /// Forks a child; [`Child::path`] says whether a VM was ready for it. If none
    /// was, one is made now.
    ///
    /// # Errors
    /// As [`Template::fork`], and a worker that cannot be started.
    pub fn fork(&self, spec: ForkSpec) -> Result<Child, Error> {
        self.shared.finish(self.shared.begin(spec)?)
    }

    /// Forks many children at once, in parallel as far as they have workers.
    pub fn fork_many(&self, specs: Vec<ForkSpec>) -> Vec<Result<Child, Error>> {
        let begun: Vec<_> = specs
            .into_iter()
            .map(|spec| self.shared.begin(spec))
            .collect();
        begun
            .into_iter()
            .map(|begun| begun.and_then(|begun| self.shared.finish(begun)))
            .collect()
    }

    /// Waits until as many VMs are ready as are to be kept.
    ///
    /// # Errors
    /// They are not in time: why the last could not be made.
    pub fn wait_full(&self, timeout: Duration) -> Result<(), Error> {
        let deadline = Instant::now() + timeout;
        let mut state = self.shared.lock();
        while state.waiting.len() < state.stats.size {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let why = state.stats.last_failure.clone();
                return Err(Error::PoolNotFull {
                    ready: state.waiting.len(),
                    size: state.stats.size,
                    why: why.unwrap_or_else(|| "it takes longer".into()),
                });
            }
            let waited = self.shared.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }

    /// Makes no more VMs: those that are ready are the last.
    pub fn drain(&self) {
        self.shared.lock().stats.size = 0;
        self.shared.changed.notify_all();
    }

    /// What it has done.
    pub fn stats(&self) -> PoolStats {
        let state = self.shared.lock();
        PoolStats {
            ready: state.waiting.len(),
            ..state.stats.clone()
        }
    }

    /// The template of its children.
    pub fn template(&self) -> &Arc<Template> {
        &self.shared.template
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.lock().is_closing = true;
        self.shared.changed.notify_all();
        if let Some(keeper) = self.keeper.take()
            && keeper.join().is_err()
        {
            log::error!("the keeper of a pool has panicked");
        }
        self.shared.lock().waiting.clear();
    }
}

/// A fork on its way.
struct Begun {
    request: Request,
    path: ForkPath,
    waiting: Waiting,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One that waits, and lives.
    fn take(&self) -> Option<Waiting> {
        let mut state = self.lock();
        let found = loop {
            match state.waiting.pop_front() {
                Some(waiting) if !waiting.is_alive() => state.stats.died += 1,
                found => break found,
            }
        };
        match &found {
            Some(_) => state.stats.pooled += 1,
            None => state.stats.cold += 1,
        }
        drop(state);
        self.changed.notify_all();
        found
    }

    fn make(&self) -> Result<Waiting, Error> {
        match &self.place {
            Place::ThisProcess => Ok(Waiting::Here(Box::new(self.template.prepare()?))),
            Place::Workers(workers) => {
                let mut remote = Remote::spawn(workers)?;
                let vcpus = self.template.state().vcpus() as u8;
                remote.make(self.template.image(), vcpus)?;
                remote.load(&self.template)?;
                remote.made()?;
                remote.loaded()?;
                Ok(Waiting::Worker(remote))
            }
        }
    }

    fn begin(&self, spec: ForkSpec) -> Result<Begun, Error> {
        let request = self.template.check(spec)?;
        let (waiting, path) = match self.take() {
            Some(waiting) => (waiting, ForkPath::Pooled),
            None => (self.make()?, ForkPath::Cold),
        };
        if let Waiting::Worker(remote) = &waiting {
            let server = match &self.place {
                Place::Workers(workers) => request.serve(workers)?,
                Place::ThisProcess => None,
            };
            // The worker alone keeps it.
            remote.start(&request, server.as_ref())?;
        }
        Ok(Begun {
            request,
            path,
            waiting,
        })
    }

    fn finish(&self, begun: Begun) -> Result<Child, Error> {
        let Begun {
            request,
            path,
            waiting,
        } = begun;
        match waiting {
            Waiting::Here(prepared) => self.template.fork_here(*prepared, request, path),
            Waiting::Worker(remote) => self.template.child_in(remote, &request, path),
        }
    }

    /// Keeps the pool full until it closes.
    fn keep(&self) {
        let mut state = self.lock();
        while !state.is_closing {
            if state.waiting.len() < state.stats.size {
                drop(state);
                let made = self.make();
                state = self.lock();
                match made {
                    Ok(waiting) => {
                        state.waiting.push_back(waiting);
                        state.stats.last_failure = None;
                        self.changed.notify_all();
                    }
                    Err(error) => {
                        log::warn!("a pool cannot make a virtual machine: {error}");
                        state.stats.last_failure = Some(error.to_string());
                        state = self.rest(state, REST);
                    }
                }
            } else {
                state = self.rest(state, CARE);
                let before = state.waiting.len();
                state.waiting.retain(Waiting::is_alive);
                let died = before - state.waiting.len();
                state.stats.died += died as u64;
            }
        }
    }

    fn rest<'a>(&self, state: MutexGuard<'a, State>, time: Duration) -> MutexGuard<'a, State> {
        let waited = self.changed.wait_timeout(state, time);
        waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

impl Waiting {
    fn is_alive(&self) -> bool {
        match self {
            Self::Here(_) => true,
            Self::Worker(remote) => remote.is_alive(),
        }
    }
}
