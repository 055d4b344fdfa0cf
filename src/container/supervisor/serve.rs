//! The supervisor's clients: a thread for each connection.

use super::life::{Order, Orders};
use super::mother::SharedNetwork;
use super::session::{Client, Farewells, Session};
use super::{failed, one_line};
use crate::container::record::{Record, State, Status};
use crate::container::store::Store;
use crate::container::wire::{self, Answer, Frame, Request};
use crate::lock::lock;
use crate::net::Attachment;
use anyhow::{Context, Result, anyhow, bail};
use fork::task::Task;
use signal_hook::consts::SIGTERM;
use signal_hook::iterator::Signals;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long a container has after SIGKILL, before its virtual machine is ended: its
/// kernel may hang.
const AFTER_KILL: Duration = Duration::from_secs(10);

/// How many clients there may be at once.
const CLIENTS_MAX: usize = 256;

const SIGKILL: i32 = 9;

/// Where the container stands, for the threads of the supervisor.
pub enum Now {
    /// It has not begun, or not yet again.
    Between,
    /// It lives.
    Living { orders: Orders, main: Arc<Session> },
    /// It has ended for good, with this status.
    Over(u8),
}

/// What the threads share.
pub struct Shared {
    inner: Mutex<Inner>,
    changed: Condvar,
    farewells: Arc<Farewells>,
    network: SharedNetwork,
}

struct Inner {
    store: Store,
    record: Record,
    now: Now,
    is_stopping: bool,
}

impl Shared {
    pub fn new(store: Store, record: Record, farewells: Arc<Farewells>) -> Arc<Self> {
        Arc::new(Self {
            inner: Mutex::new(Inner {
                store,
                record,
                now: Now::Between,
                is_stopping: false,
            }),
            changed: Condvar::new(),
            farewells,
            network: SharedNetwork::default(),
        })
    }

    /// What connects the container.
    pub fn network(&self) -> SharedNetwork {
        Arc::clone(&self.network)
    }

    /// Changes what connects the container, and writes where it is now.
    fn change_network(&self, change: impl FnOnce(&mut Attachment) -> Result<()>) -> Result<()> {
        let mut network = lock(&self.network);
        let network = network.as_mut().context(
            "the container runs without a network card: stop it, connect it, and start it again",
        )?;
        change(network)?;
        let places = network.places();
        self.change(|state| state.places = places)
    }

    pub fn read<T>(&self, read: impl FnOnce(&Record) -> T) -> T {
        read(&lock(&self.inner).record)
    }

    /// Changes the state, here and on disk.
    pub fn change(&self, change: impl FnOnce(&mut State)) -> Result<()> {
        let inner = &mut *lock(&self.inner);
        change(&mut inner.record.state);
        inner
            .store
            .set_state(&inner.record.id, &inner.record.state)
            .context("cannot write the container's state")
    }

    /// Removes the record.
    pub fn forget(&self) -> Result<()> {
        let inner = lock(&self.inner);
        inner.store.remove(&inner.record.id)
    }

    pub fn set_now(&self, now: Now) {
        lock(&self.inner).now = now;
        self.changed.notify_all();
    }

    pub fn is_stopping(&self) -> bool {
        lock(&self.inner).is_stopping
    }

    /// Waits so long, or until it is to stop: true.
    pub fn wait_for_stop(&self, pause: Duration) -> bool {
        let until = Instant::now() + pause;
        self.wait(Some(until), |inner| inner.is_stopping.then_some(()))
            .is_some()
    }

    fn stop_for_good(&self) {
        lock(&self.inner).is_stopping = true;
        self.changed.notify_all();
    }

    /// Waits until it has ended for good.
    fn wait_until_over(&self, until: Option<Instant>) -> Option<u8> {
        self.wait(until, |inner| match inner.now {
            Now::Over(status) => Some(status),
            Now::Between | Now::Living { .. } => None,
        })
    }

    fn wait<T>(&self, until: Option<Instant>, found: impl Fn(&Inner) -> Option<T>) -> Option<T> {
        let mut inner: MutexGuard<'_, Inner> = lock(&self.inner);
        loop {
            if let Some(found) = found(&inner) {
                return Some(found);
            }
            let left = until.map(|at| at.saturating_duration_since(Instant::now()));
            inner = match left {
                Some(Duration::ZERO) => return None,
                Some(left) => {
                    self.changed
                        .wait_timeout(inner, left)
                        .unwrap_or_else(PoisonError::into_inner)
                        .0
                }
                None => self
                    .changed
                    .wait(inner)
                    .unwrap_or_else(PoisonError::into_inner),
            };
        }
    }

    /// Waits until all clients have been told what they are to be told.
    pub fn wait_for_farewells(&self) {
        self.farewells.wait();
    }

    /// The live container.
    fn living(&self) -> Result<(Orders, Arc<Session>)> {
        match &lock(&self.inner).now {
            Now::Living { orders, main } => Ok((orders.clone(), Arc::clone(main))),
            Now::Between | Now::Over(_) => Err(anyhow!("the container is not running")),
        }
    }

    /// Gives an order to the life, and waits for what comes of it.
    pub fn order<T>(&self, order: impl FnOnce(SyncSender<Result<T>>) -> Order) -> Result<T> {
        let (orders, _) = self.living()?;
        let (reply, answer) = sync_channel(1);
        let ended = || anyhow!("the container has ended");
        if !orders.send(order(reply)) {
            return Err(ended());
        }
        answer.recv().map_err(|_| ended())?
    }
}

/// Accepts clients from now on.
///
/// # Errors
/// No thread.
pub fn listen(listener: UnixListener, shared: &Arc<Shared>) -> Result<()> {
    let shared = Arc::clone(shared);
    thread("accept", move || {
        let count = Arc::new(());
        for stream in listener.incoming() {
            let stream = match stream {
                Ok(stream) => stream,
                Err(error) => {
                    log::warn!("cannot accept a client: {error}");
                    std::thread::sleep(Duration::from_millis(100));
                    continue;
                }
            };
            if Arc::strong_count(&count) > CLIENTS_MAX {
                log::warn!("a client too many is turned away");
                continue;
            }
            let (shared, ticket) = (Arc::clone(&shared), Arc::clone(&count));
            let served = thread("client", move || {
                if let Err(error) = serve(stream, &shared) {
                    log::debug!("a client: {error:#}");
                }
                drop(ticket);
            });
            if let Err(error) = served {
                log::warn!("a client is turned away: {error:#}");
            }
        }
    })
}

/// SIGTERM, as from a host that shuts down, is a stop.
///
/// # Errors
/// A signal that cannot be caught.
pub fn heed_signals(shared: &Arc<Shared>) -> Result<()> {
    let mut signals = Signals::new([SIGTERM]).context("cannot catch signals")?;
    let shared = Arc::clone(shared);
    thread("signals", move || {
        for _ in signals.forever() {
            if let Err(error) = stop(&shared, None, None) {
                log::error!("the container cannot be stopped: {}", one_line(&error));
            }
        }
    })
}

/// A thread that nobody waits for.
///
/// # Errors
/// No thread.
pub fn thread(name: &str, body: impl FnOnce() + Send + 'static) -> Result<()> {
    std::thread::Builder::new()
        .name(name.into())
        .stack_size(256 << 10)
        .spawn(body)
        .map(drop)
        .context("cannot start a thread")
}

fn serve(mut stream: UnixStream, shared: &Arc<Shared>) -> Result<()> {
    let Some(request) = wire::receive(&mut stream)? else {
        return Ok(());
    };
    // Until it has its answer, the process stays.
    let ticket = shared.farewells.begin();
    let done = match request {
        Request::Start { .. } | Request::StartFork | Request::Open => {
            Err(anyhow!("the container runs already"))
        }
        Request::Attach { stdin } => return attach(stream, stdin, shared),
        Request::Exec(exec) => {
            let detach = exec.detach;
            let order = |clients, reply| Order::Exec(exec, clients, reply);
            return begin_beside(stream, detach, false, order, shared);
        }
        Request::Task(task) => {
            // One that takes what a client sends sees its end, and cleans up.
            let is_to_end = !matches!(task, Task::Unpack { .. });
            let order = |clients, reply| Order::Task(task, clients, reply);
            return begin_beside(stream, false, is_to_end, order, shared);
        }
        Request::Capture => return capture(&mut stream, shared),
        Request::Signal(signal) => send_signal(shared, signal).map(|()| Answer::Done),
        Request::Stop { signal, timeout } => stop(shared, signal, timeout).map(Answer::Ended),
        Request::Kill => kill(shared).map(Answer::Ended),
        Request::Pause => pause(shared).map(|()| Answer::Done),
        Request::Unpause => unpause(shared).map(|()| Answer::Done),
        Request::Wait => {
            // A client that leaves meanwhile costs a thread until the end.
            let over = shared.wait_until_over(None);
            Ok(Answer::Ended(over.unwrap_or_default()))
        }
        Request::Connect(membership) => shared
            .change_network(|network| {
                network.connect(&shared.read(|record| record.name.clone()), &membership)
            })
            .map(|()| Answer::Done),
        Request::Disconnect(network) => shared
            .change_network(|attachment| attachment.disconnect(&network))
            .map(|()| Answer::Done),
        Request::Rewind(name) => shared
            .order(|reply| Order::Rewind(name, reply))
            .map(|()| Answer::Done),
        Request::Stats => shared.order(Order::Stats).map(Answer::Stats),
    };
    wire::send(&mut stream, &done.unwrap_or_else(|error| failed(&error)))?;
    drop(ticket);
    Ok(())
}

/// A picture of the container, for whoever forks it.
fn capture(stream: &mut UnixStream, shared: &Shared) -> Result<()> {
    match shared.order(Order::Capture) {
        Ok(parcel) => wire::Picture::new(parcel).send(stream),
        Err(error) => wire::send(stream, &failed(&error)),
    }
}

fn attach(mut stream: UnixStream, stdin: bool, shared: &Arc<Shared>) -> Result<()> {
    let client = Client::new(stream.try_clone().context("dup")?);
    let (_, main) = match shared.living() {
        Ok(living) => living,
        Err(error) => return wire::send(&mut stream, &failed(&error)),
    };
    // The answer first, then the output.
    client.with(|to| wire::send(to, &Answer::Done))?;
    if !main.join(&client) {
        let ended = shared.read(|record| Frame::Ended {
            status: record.state.exit_code,
            why: record.state.error.clone(),
        });
        return client.with(|to| wire::send_frame(to, &ended));
    }
    if stdin {
        hear_input(stream, &client, &main, shared)
    } else {
        hear_nothing(stream, &client, &main)
    }
}

/// In a thread of its own: takes the input of the client that started the container.
///
/// # Errors
/// No thread.
pub fn take_input(
    stream: UnixStream,
    client: Arc<Client>,
    main: Arc<Session>,
    shared: &Arc<Shared>,
) -> Result<()> {
    let shared = Arc::clone(shared);
    thread("client", move || {
        if let Err(error) = hear_input(stream, &client, &main, &shared) {
            log::debug!("a client: {error:#}");
        }
    })
}

/// Takes input, sizes and signals for the first process, until the client leaves.
fn hear_input(
    stream: UnixStream,
    client: &Arc<Client>,
    main: &Arc<Session>,
    shared: &Shared,
) -> Result<()> {
    let once = shared.read(|record| record.spec.stdin_once);
    let heard = hear(stream, main, once);
    main.leave(client);
    if once {
        main.end_input();
    }
    heard
}

/// Takes sizes and signals only.
fn hear_nothing(mut stream: UnixStream, client: &Arc<Client>, main: &Arc<Session>) -> Result<()> {
    let heard = loop {
        match wire::receive_frame(&mut stream) {
            Ok(Some(Frame::Resize(size))) => main.remote().resize(size)?,
            Ok(Some(Frame::Signal(signal))) => main.remote().signal(signal)?,
            Ok(Some(Frame::InputEnded)) => {}
            Ok(Some(_)) => break Err(anyhow!("a frame out of turn")),
            Ok(None) => break Ok(()),
            Err(error) => break Err(error),
        }
    };
    main.leave(client);
    heard
}

/// Takes what a client sends. With `once`, the end of its input is the process's.
fn hear(mut stream: UnixStream, session: &Session, once: bool) -> Result<()> {
    while let Some(frame) = wire::receive_frame(&mut stream)? {
        match frame {
            Frame::Input(bytes) => session.input(&bytes),
            Frame::InputEnded if once => session.end_input(),
            Frame::InputEnded => {}
            Frame::Resize(size) => session.remote().resize(size)?,
            Frame::Signal(signal) => session.remote().signal(signal)?,
            Frame::Stdout(_) | Frame::Stderr(_) | Frame::Ended { .. } => {
                bail!("a frame out of turn")
            }
        }
    }
    Ok(())
}

/// One more process, whose client this connection is unless it is detached. Whether it is
/// to end when the client leaves before it does.
fn begin_beside(
    mut stream: UnixStream,
    detach: bool,
    is_to_end: bool,
    order: impl FnOnce(Vec<Arc<Client>>, SyncSender<Result<Arc<Session>>>) -> Order,
    shared: &Arc<Shared>,
) -> Result<()> {
    let client = Client::new(stream.try_clone().context("dup")?);
    let watching = if detach {
        Vec::new()
    } else {
        vec![Arc::clone(&client)]
    };
    let begun = shared.order(|reply| order(watching, reply));
    match begun {
        Ok(_) if detach => client.with(|to| wire::send(to, &Answer::Done)),
        Ok(session) => {
            // The answer was sent when it began.
            let heard = hear(stream, &session, true);
            session.leave(&client);
            session.end_input();
            if is_to_end {
                // To one that has ended: nothing happens.
                session.remote().signal(SIGKILL)?;
            }
            heard
        }
        Err(error) => wire::send(&mut stream, &failed(&error)),
    }
}

fn send_signal(shared: &Shared, signal: i32) -> Result<()> {
    let (_, main) = shared.living()?;
    Ok(main.remote().signal(signal)?)
}

fn pause(shared: &Shared) -> Result<()> {
    shared.order(Order::Pause)?;
    shared.change(|state| state.status = Status::Paused)
}

fn unpause(shared: &Shared) -> Result<()> {
    shared.order(Order::Unpause)?;
    shared.change(|state| state.status = Status::Running)
}

/// Ends the container: by the signal, in time; else by SIGKILL; else by ending its
/// virtual machine.
fn stop(shared: &Shared, signal: Option<i32>, timeout: Option<u32>) -> Result<u8> {
    shared.stop_for_good();
    let (own_signal, own_timeout, status) = shared.read(|record| {
        let spec = &record.spec;
        (spec.stop_signal, spec.stop_timeout, record.state.status)
    });
    if status == Status::Paused {
        unpause(shared)?;
    }
    if let Ok((_, main)) = shared.living() {
        // It may end meanwhile.
        main.remote().signal(signal.unwrap_or(own_signal)).ok();
    }
    let timeout = Duration::from_secs(timeout.unwrap_or(own_timeout).into());
    match shared.wait_until_over(Some(Instant::now() + timeout)) {
        Some(status) => Ok(status),
        None => kill(shared),
    }
}

/// Ends the container, in any way.
///
/// # Errors
/// One that has not ended.
pub fn kill(shared: &Shared) -> Result<u8> {
    shared.stop_for_good();
    if let Ok((orders, main)) = shared.living() {
        let is_paused = shared.read(|record| record.state.status == Status::Paused);
        let over = if is_paused {
            None
        } else {
            // It may end meanwhile.
            main.remote().signal(SIGKILL).ok();
            shared.wait_until_over(Some(Instant::now() + AFTER_KILL))
        };
        if let Some(status) = over {
            return Ok(status);
        }
        orders.send(Order::End);
    }
    shared
        .wait_until_over(None)
        .context("the container has not ended")
}
