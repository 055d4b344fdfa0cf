//! The event loop of one VM: one thread for all its devices.

use crate::error::Error;
use crate::host::{Host, ThreadKind, ThreadStart};
use crate::machine::lock;
use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

type Subscriber = Arc<Mutex<dyn MutEventSubscriber + Send>>;

/// The event loop of a VM whose guest may never drive a device: its thread is
/// started when there is something for it to do. Dropping it ends the loop.
pub(crate) struct Io {
    subscribers: Vec<Subscriber>,
    begin: ThreadStart,
    thread: Mutex<Option<IoThread>>,
    runs: AtomicBool,
}

impl Io {
    pub(crate) fn new(host: &Host, subscribers: Vec<Subscriber>) -> Arc<Self> {
        Arc::new(Self {
            subscribers,
            begin: host.thread_start(),
            thread: Mutex::default(),
            runs: AtomicBool::new(false),
        })
    }

    /// To be called when a device has, or will have, something to do.
    pub(crate) fn ensure(&self) -> Result<(), Error> {
        if self.runs.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut thread = lock(&self.thread);
        if thread.is_none() {
            *thread = Some(IoThread::spawn(&self.begin, self.subscribers.clone())?);
            self.runs.store(true, Ordering::Release);
        }
        Ok(())
    }
}

/// The thread. Dropping it ends the loop and waits for it.
#[derive(Debug)]
struct IoThread {
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
}

struct Stop {
    fd: EventFd,
    asked: Arc<AtomicBool>,
}

impl MutEventSubscriber for Stop {
    fn process(&mut self, _: Events, _: &mut EventOps) {
        self.asked.store(true, Ordering::Relaxed);
    }

    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = ops.add(Events::new(&self.fd, EventSet::IN)) {
            log::error!("the event loop cannot be stopped: {error}");
            self.asked.store(true, Ordering::Relaxed);
        }
    }
}

impl IoThread {
    /// Starts the loop over `subscribers`.
    fn spawn(begin: &ThreadStart, subscribers: Vec<Subscriber>) -> Result<Self, Error> {
        let stop = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(Error::os("eventfd"))?;
        let fd = stop.try_clone().map_err(Error::os("eventfd"))?;
        let begin = Arc::clone(begin);
        let thread = std::thread::Builder::new()
            .name("vm-io".into())
            .spawn(move || {
                begin(ThreadKind::Io);
                if let Err(error) = run(subscribers, fd) {
                    log::error!("the event loop of a virtual machine has ended: {error}");
                }
            })
            .map_err(Error::os("thread"))?;
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }
}

fn run(subscribers: Vec<Subscriber>, fd: EventFd) -> event_manager::Result<()> {
    let asked = Arc::new(AtomicBool::new(false));
    let mut manager: EventManager<Subscriber> = EventManager::new()?;
    manager.add_subscriber(Arc::new(Mutex::new(Stop {
        fd,
        asked: Arc::clone(&asked),
    })));
    for subscriber in subscribers {
        manager.add_subscriber(subscriber);
    }
    while !asked.load(Ordering::Relaxed) {
        manager.run()?;
    }
    Ok(())
}

impl Drop for IoThread {
    fn drop(&mut self) {
        if let Err(error) = self.stop.write(1) {
            log::error!("cannot stop an event loop: {error}");
            return;
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the event loop of a virtual machine has panicked");
        }
    }
}
