//! A schedule of keys. Each key is scheduled for an instant, and due keys are taken out in chunks.
//! The caller decides what to do with them.

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

use crate::lease::Key;

/// The most keys that are taken out together. A chunk bounds how long the work for many due keys
/// can keep the store from other calls.
pub(crate) const CHUNK: usize = 1000;
/// How long to sleep while the schedule is empty. A new key ends the sleep.
const FAR: Duration = Duration::from_secs(3600);

/// Keys by the instant at which they are due. A key is in the schedule once at most.
#[derive(Debug, Default)]
pub(crate) struct Schedule {
    due: Mutex<BTreeSet<(Instant, Key)>>,
    /// Notified when a key becomes the first one due.
    earlier: Notify,
}

impl Schedule {
    /// Moves the key from the instant `from` to the instant `to`. Without `from` the key is new,
    /// and without `to` it is removed.
    pub(crate) fn shift(&self, key: &Key, from: Option<Instant>, to: Option<Instant>) {
        let mut due = self.due();
        if let Some(from) = from {
            due.remove(&(from, key.clone()));
        }
        let Some(to) = to else { return };
        due.insert((to, key.clone()));
        if due.first().is_some_and(|(_, first)| first == key) {
            self.earlier.notify_one();
        }
    }

    /// Waits until a key is due.
    pub(crate) async fn reached(&self) {
        loop {
            let next = self.due().first().map_or_else(|| Instant::now() + FAR, |(due, _)| *due);
            if next <= Instant::now() {
                return;
            }
            tokio::select! {
                () = self.earlier.notified() => {}
                () = sleep_until(next) => {}
            }
        }
    }

    /// Takes out the keys that are due by `now`, at most a [`CHUNK`] of them.
    pub(crate) fn take(&self, now: Instant) -> Vec<Key> {
        let mut due = self.due();
        let mut chunk = Vec::new();
        while chunk.len() < CHUNK && due.first().is_some_and(|(due, _)| *due <= now) {
            chunk.extend(due.pop_first().map(|(_, key)| key));
        }
        chunk
    }

    #[cfg(test)]
    pub(crate) fn is_empty(&self) -> bool {
        self.due().is_empty()
    }

    fn due(&self) -> MutexGuard<'_, BTreeSet<(Instant, Key)>> {
        // No code panics half-way through a change under this lock.
        self.due.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
