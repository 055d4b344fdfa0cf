//! Who waits for the end of a container. Docker's client asks before it starts it, and for
//! one that is removed when it ends its status is nowhere else.

use crate::lock::lock;
use docker_api::{Condition, Exit, Waiting};
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard};
use tokio::sync::oneshot;

/// All of them, by the container's id.
#[derive(Debug, Default)]
pub struct Waits(Mutex<HashMap<String, Of>>);

/// Those of one container.
#[derive(Debug, Default)]
struct Of {
    /// For its next end, or that it does not run.
    ends: Vec<oneshot::Sender<Exit>>,
    /// For its removal.
    removals: Vec<oneshot::Sender<Exit>>,
    /// Whether somebody looks for that already.
    is_looked_for: bool,
    /// How it has ended last.
    status: i64,
}

impl Waits {
    /// One more.
    pub fn enter(&self, id: &str, condition: Condition) -> Waiting {
        let (tell, waiting) = oneshot::channel();
        let mut all = self.lock();
        let of = all.entry(id.to_owned()).or_default();
        let list = match condition {
            Condition::NotRunning | Condition::NextExit => &mut of.ends,
            Condition::Removed => &mut of.removals,
        };
        list.retain(|tell| !tell.is_closed());
        list.push(tell);
        waiting
    }

    /// It has ended. Whether somebody has to look for its removal: others wait for that, and
    /// nobody does yet.
    pub fn ended(&self, id: &str, status: i64) -> bool {
        let mut all = self.lock();
        let Some(of) = all.get_mut(id) else {
            return false;
        };
        of.status = status;
        tell(&mut of.ends, status);
        of.removals.retain(|tell| !tell.is_closed());
        if of.removals.is_empty() {
            all.remove(id);
            return false;
        }
        !std::mem::replace(&mut of.is_looked_for, true)
    }

    /// Whether somebody waits for its removal still: if not, nobody looks for it any more.
    pub fn are_for_removal(&self, id: &str) -> bool {
        let mut all = self.lock();
        let Some(of) = all.get_mut(id) else {
            return false;
        };
        of.removals.retain(|tell| !tell.is_closed());
        of.is_looked_for = !of.removals.is_empty();
        of.is_looked_for
    }

    /// It is gone.
    pub fn removed(&self, id: &str) {
        if let Some(mut of) = self.lock().remove(id) {
            tell(&mut of.ends, of.status);
            tell(&mut of.removals, of.status);
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Of>> {
        lock(&self.0)
    }
}

fn tell(list: &mut Vec<oneshot::Sender<Exit>>, status: i64) {
    for one in list.drain(..) {
        // Its client may have gone.
        one.send(Exit {
            status,
            error: None,
        })
        .ok();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(mut waiting: Waiting) -> Option<i64> {
        waiting.try_recv().ok().map(|exit| exit.status)
    }

    #[test]
    fn each_is_told_of_what_it_waits_for() {
        let waits = Waits::default();
        let next = waits.enter("a", Condition::NextExit);
        let gone = waits.enter("a", Condition::Removed);
        let other = waits.enter("b", Condition::NextExit);
        assert!(waits.ended("a", 7), "somebody waits for its removal");
        assert!(waits.are_for_removal("a") && !waits.are_for_removal("b"));
        assert!(!waits.ended("a", 7), "it is looked for");
        assert_eq!(told(next), Some(7));
        waits.removed("a");
        assert_eq!((told(gone), told(other)), (Some(7), None));
        assert!(waits.lock().keys().eq(["b"]), "nothing is kept for nobody");
        let waiting = waits.enter("c", Condition::NotRunning);
        assert!(!waits.ended("c", 1));
        assert_eq!(told(waiting), Some(1));
        assert!(!waits.ended("c", 2), "nobody is left");
    }
}
