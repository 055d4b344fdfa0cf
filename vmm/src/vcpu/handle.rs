//! A vCPU's thread, seen from outside.

use super::kick;
use super::thread::{self, Order, Seat};
use crate::error::Error;
use crate::moment::Moment;
use std::sync::mpsc::{self, Receiver, Sender, SyncSender};
use std::thread::JoinHandle;
use std::time::Duration;
use vmm_sys_util::signal::Killable;

/// How long a vCPU may take to leave the guest when it is told to. It needs
/// microseconds; a host under heavy load may keep it from running.
const KICK_TIMEOUT: Duration = Duration::from_secs(30);

/// The thread. Dropping it ends the vCPU, and waits for that.
pub(crate) struct Vcpu {
    id: u8,
    /// `None` when it is to end.
    orders: Option<Sender<Order>>,
    thread: Option<JoinHandle<()>>,
}

impl Vcpu {
    /// Starts the thread of vCPU `id`, which waits for orders.
    pub(crate) fn spawn(id: u8) -> Result<Self, Error> {
        kick::install()?;
        let (orders, receiver) = mpsc::channel();
        let thread = std::thread::Builder::new()
            .name(format!("vcpu-{id}"))
            .spawn(move || thread::main(id, &receiver))
            .map_err(Error::os("thread"))?;
        Ok(Self {
            id,
            orders: Some(orders),
            thread: Some(thread),
        })
    }

    /// Gives it its vCPU; the answer says when that was loaded.
    pub(crate) fn take(&self, seat: Seat) -> Result<Receiver<Result<Moment, Error>>, Error> {
        let (loaded, answer) = mpsc::sync_channel(1);
        let seat = Box::new(seat);
        self.send(Order::Take { seat, loaded })?;
        Ok(answer)
    }

    pub(crate) fn send(&self, order: Order) -> Result<(), Error> {
        let sent = self.orders.as_ref().map(|orders| orders.send(order));
        match sent {
            Some(Ok(())) => Ok(()),
            _ => Err(Error::Unresponsive(self.id)),
        }
    }

    /// Gives an order that is answered, and gets the vCPU out of the guest.
    pub(crate) fn ask<T>(
        &self,
        order: impl FnOnce(SyncSender<T>) -> Order,
    ) -> Result<Receiver<T>, Error> {
        let (reply, answer) = mpsc::sync_channel(1);
        self.send(order(reply))?;
        self.kick();
        Ok(answer)
    }

    pub(crate) fn hear<T>(&self, answer: &Receiver<T>) -> Result<T, Error> {
        answer
            .recv_timeout(KICK_TIMEOUT)
            .map_err(|_| Error::Unresponsive(self.id))
    }

    /// Ends the vCPU, and does not wait for it.
    pub(crate) fn stop(&mut self) {
        // No more orders: the thread ends when it next looks, which is now.
        self.orders = None;
        self.kick();
    }

    fn kick(&self) {
        if let Some(thread) = &self.thread
            && !thread.is_finished()
            && let Err(error) = thread.kill(kick::signal())
        {
            log::debug!("vCPU {} is gone: {error}", self.id);
        }
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        self.stop();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the thread of vCPU {} has panicked", self.id);
        }
    }
}
