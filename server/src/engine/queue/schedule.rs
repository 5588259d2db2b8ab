//! A schedule of keys: each is entered for an instant, and those that are due are taken out in lots. What is to be done for
//! a key is the caller's business.

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

use crate::lease::Key;

/// Keys that are taken in one go.
pub(crate) const LOT: usize = 1000;
/// Longer than any timer is set for.
const FAR: Duration = Duration::from_secs(3600);

/// Each key is due once at most.
#[derive(Debug, Default)]
pub(crate) struct Agenda {
    due: Mutex<BTreeSet<(Instant, Key)>>,
    /// Rings when one is due earlier than all before.
    sooner: Notify,
}

impl Agenda {
    /// Enters the key for the instant `to`, instead of `from`.
    pub(crate) fn shift(&self, key: &Key, from: Option<Instant>, to: Option<Instant>) {
        let mut due = self.due();
        if let Some(from) = from {
            due.remove(&(from, key.clone()));
        }
        let Some(to) = to else { return };
        due.insert((to, key.clone()));
        if due.first().is_some_and(|(_, first)| first == key) {
            self.sooner.notify_one();
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
                () = self.sooner.notified() => {}
                () = sleep_until(next) => {}
            }
        }
    }

    /// Takes out the keys that are due by `now`, as many as a [`LOT`].
    pub(crate) fn take(&self, now: Instant) -> Vec<Key> {
        let mut due = self.due();
        let mut lot = Vec::new();
        while lot.len() < LOT && due.first().is_some_and(|(due, _)| *due <= now) {
            lot.extend(due.pop_first().map(|(_, key)| key));
        }
        lot
    }

    #[cfg(test)]
    pub(crate) fn is_empty(&self) -> bool {
        self.due().is_empty()
    }

    fn due(&self) -> MutexGuard<'_, BTreeSet<(Instant, Key)>> {
        // Nothing in here panics half-way through a change.
        self.due.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
