//! Mutexes whose content is whole whatever their holder was doing when it panicked.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Whatever a thread that has panicked left is still a list, a stream or a log.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
