//! The event loop of one VM: one thread for all its devices.

use crate::error::Error;
use crate::host::{Host, ThreadKind};
use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

type Subscriber = Arc<Mutex<dyn MutEventSubscriber + Send>>;

/// The thread. Dropping it ends the loop and waits for it.
#[derive(Debug)]
pub(crate) struct IoThread {
    stop: EventFd,
    devices: Option<Sender<Vec<Subscriber>>>,
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
    /// Starts the thread, which waits for devices.
    pub(crate) fn spawn(host: &Host) -> Result<Self, Error> {
        let stop = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(Error::os("eventfd"))?;
        let fd = stop.try_clone().map_err(Error::os("eventfd"))?;
        let begin = host.thread_start();
        let (devices, subscribers) = mpsc::channel();
        let thread = std::thread::Builder::new()
            .name("vm-io".into())
            .spawn(move || {
                begin(ThreadKind::Io);
                // Without devices there is no VM.
                let Ok(subscribers) = subscribers.recv() else {
                    return;
                };
                if let Err(error) = run(subscribers, fd) {
                    log::error!("the event loop of a virtual machine has ended: {error}");
                }
            })
            .map_err(Error::os("thread"))?;
        Ok(Self {
            stop,
            devices: Some(devices),
            thread: Some(thread),
        })
    }

    /// Starts the loop over `subscribers`; once.
    pub(crate) fn run(&mut self, subscribers: Vec<Subscriber>) -> Result<(), Error> {
        let sent = self.devices.take().map(|to| to.send(subscribers));
        match sent {
            Some(Ok(())) => Ok(()),
            _ => Err(Error::Phase("without its event loop")),
        }
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
        self.devices = None;
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
