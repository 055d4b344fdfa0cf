//! A container at rest whose files are open: a child is forked for them, in which nothing
//! runs but what its clients have done. Its state does not change; it cannot be started
//! meanwhile.

use super::mother::Mother;
use super::serve::{self, Now, Shared};
use crate::container::directory::Ownership;
use crate::container::wire::{self, Answer};
use anyhow::{Context, Result};
use std::io::Read;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

/// Holds them open until the starter closes its side, in whatever way it ends.
///
/// # Errors
/// No child, or one that has died.
pub fn hold(
    mother: &Mother,
    listener: UnixListener,
    shared: &Arc<Shared>,
    starter: &mut UnixStream,
    ownership: Ownership,
) -> Result<()> {
    let mut life = mother.open()?;
    shared.set_now(Now::Living {
        orders: life.orders(),
        main: Arc::clone(&life.main),
    });
    serve::listen(listener, shared)?;
    serve::heed_signals(shared)?;
    let (watched, theirs) = (starter.try_clone().context("dup")?, Arc::clone(shared));
    serve::thread("starter", move || close_after(watched, &theirs))?;
    // It may have gone, and is heard of by the thread.
    wire::send(starter, &Answer::Done).ok();
    let lived = life.live();
    shared.set_now(Now::Between);
    life.bury()?;
    drop(ownership);
    shared.set_now(Now::Over(0));
    shared.wait_for_farewells();
    lived?;
    // As above.
    wire::send(starter, &Answer::Done).ok();
    Ok(())
}

/// Ends it when the starter has nothing more to say. All that was written is on its disk
/// then: the guest sees to that before it tells of the end.
fn close_after(mut starter: UnixStream, shared: &Shared) {
    let ended = starter.read(&mut [0]);
    log::debug!("the starter has ended: {ended:?}");
    if let Err(error) = serve::kill(shared) {
        log::error!("{error:#}");
    }
}
