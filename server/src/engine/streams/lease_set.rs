//! The leases of one keepalive stream, and the losses that have yet to be reported on it.

use std::collections::HashMap;
use std::mem::take;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;
use tokio::task::yield_now;

use super::StreamIndex;
use super::stream_lease::{Fate, Loss, StreamLease};
use crate::boot_instant::BootInstant;
use crate::engine::Touched;
use crate::engine::metrics::{EngineMetrics, Source, Tally};
use crate::lease::LeaseName;

/// One stream's leases: every lease that a message named and whose loss has not been reported
/// since. Dropping the set ends the tracking of its leases.
#[derive(Debug)]
pub(crate) struct LeaseSet {
    index: Arc<StreamIndex>,
    leases: HashMap<LeaseName, Arc<StreamLease>>,
    inbox: Arc<Inbox>,
}

/// The leases that a stream has lost and has not dealt with. Each lease enters once, so the number
/// of the stream's leases bounds the inbox.
#[derive(Debug)]
pub(crate) struct Inbox {
    /// `None` when the stream has ended.
    lost: Mutex<Option<Vec<Arc<StreamLease>>>>,
    wake: Notify,
    metrics: Arc<EngineMetrics>,
}

impl Inbox {
    pub(crate) fn put(&self, lease: &Arc<StreamLease>) {
        if let Some(lost) = &mut *self.lost() {
            lost.push(Arc::clone(lease));
        }
        self.wake.notify_one();
    }

    pub(crate) fn metrics(&self) -> &EngineMetrics {
        &self.metrics
    }

    fn lost(&self) -> MutexGuard<'_, Option<Vec<Arc<StreamLease>>>> {
        // No code panics half-way through a change under this lock.
        self.lost.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl LeaseSet {
    pub(crate) fn new(index: &Arc<StreamIndex>) -> Self {
        let (lost, metrics) = (Mutex::new(Some(Vec::new())), Arc::clone(&index.metrics));
        let inbox = Arc::new(Inbox { lost, wake: Notify::new(), metrics });
        Self { index: Arc::clone(index), leases: HashMap::new(), inbox }
    }

    /// Begins a message that names leases. The stream may have `most` leases.
    pub(crate) fn begin_message(&mut self, most: usize) -> MessageLeases<'_> {
        let since = BootInstant::now();
        MessageLeases { lease_set: self, most, since, new: Vec::new(), untracked: Vec::new() }
    }

    /// Begins a message that names every lease of the stream. The message must be settled.
    pub(crate) fn begin_message_for_all(&self) -> Vec<Arc<StreamLease>> {
        self.leases.values().filter(|lease| lease.begin_message() == Fate::Kept).map(Arc::clone).collect()
    }

    /// Returns the stream's lease of this name.
    pub(super) fn get(&self, name: &LeaseName) -> Option<&Arc<StreamLease>> {
        self.leases.get(name)
    }

    pub(super) fn metrics(&self) -> &EngineMetrics {
        &self.index.metrics
    }

    pub(crate) fn names(&self) -> impl ExactSizeIterator<Item = &LeaseName> {
        self.leases.keys()
    }

    /// Settles a message: returns what to answer for each lease that it named, in the same order.
    /// `None` stands for a touch that was coalesced. Leases that are lost leave the set.
    pub(crate) fn settle(
        &mut self,
        message: Vec<(Arc<StreamLease>, Option<Touched>)>,
    ) -> Vec<(Arc<StreamLease>, Touched)> {
        let now = BootInstant::now();
        let mut tally = Tally::default();
        let answer: Vec<_> = message
            .into_iter()
            .map(|(lease, touched)| {
                let source = if touched.is_some() { Source::Store } else { Source::Coalesced };
                let touched = lease.settle(touched, now);
                tally.add(touched, source);
                (lease, touched)
            })
            .collect();
        self.index.metrics.add(&tally);
        let lost = answer.iter().filter(|(_, touched)| matches!(touched, Touched::Lost(_)));
        let lost: Vec<&Arc<StreamLease>> =
            lost.map(|(lease, _)| lease).filter(|lease| lease.is_reported()).collect();
        lost.iter().for_each(|lease| self.forget(lease));
        self.index.leave(lost);
        answer
    }

    /// Waits for losses that no answer reports, and returns each of them once. Leases that are lost
    /// leave the set.
    ///
    /// Cancel safe.
    pub(crate) async fn lost(&mut self) -> Vec<(Arc<StreamLease>, Loss)> {
        loop {
            let found = self.inbox.lost().as_mut().map(take).unwrap_or_default();
            let with_loss = |lease: Arc<StreamLease>| lease.report().map(|loss| (lease, loss));
            let lost: Vec<_> = found.into_iter().filter_map(with_loss).collect();
            if !lost.is_empty() {
                let mut tally = Tally::default();
                lost.iter().for_each(|(lease, loss)| {
                    tally.lost(loss.0);
                    self.forget(lease);
                });
                self.index.metrics.add(&tally);
                return lost;
            }
            self.inbox.wake.notified().await;
            // The commit that ended one lease often ends several, and they are reported together.
            yield_now().await;
        }
    }

    fn forget(&mut self, lease: &Arc<StreamLease>) {
        if self.leases.get(lease.name()).is_some_and(|current| Arc::ptr_eq(current, lease)) {
            self.leases.remove(lease.name());
        }
    }
}

/// A message while its leases are read. The leases that are new to the stream enter the index when
/// this is dropped.
#[derive(Debug)]
pub(crate) struct MessageLeases<'a> {
    lease_set: &'a mut LeaseSet,
    most: usize,
    since: BootInstant,
    /// Leases that the stream tracks from now on.
    new: Vec<Arc<StreamLease>>,
    /// Leases past the daemon's limit. The message touches them, and the stream does not track
    /// them.
    untracked: Vec<Arc<StreamLease>>,
}

/// Why a lease is not touched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Full {
    /// The stream has as many leases as it may.
    Stream,
    /// The daemon tracks as many leases as it may, and is touching as many others as it may.
    Daemon,
}

impl MessageLeases<'_> {
    /// Adds a lease to the message and, if the daemon has room, to the stream. The message must be
    /// settled for it.
    ///
    /// # Errors
    /// [`Full`] if there is no room for it. Nothing has changed then.
    pub(crate) fn add(&mut self, name: LeaseName) -> Result<Arc<StreamLease>, Full> {
        let current = self.lease_set.leases.get(&name);
        if let Some(lease) = current.filter(|lease| lease.begin_message() == Fate::Kept) {
            return Ok(Arc::clone(lease));
        }
        if current.is_none() && self.lease_set.leases.len() >= self.most {
            return Err(Full::Stream);
        }
        let index = &self.lease_set.index;
        let (slot, list) = if let Some(slot) = index.reserve() {
            (slot, &mut self.new)
        } else if let Some(slot) = index.reserve_untracked() {
            (slot, &mut self.untracked)
        } else {
            index.metrics.refused.inc();
            return Err(Full::Daemon);
        };
        current.inspect(|lost| lost.supersede());
        let lease = StreamLease::new(name.clone(), self.since, slot, &self.lease_set.inbox);
        lease.begin_message();
        list.push(Arc::clone(&lease));
        self.lease_set.leases.insert(name, Arc::clone(&lease));
        Ok(lease)
    }
}

impl Drop for MessageLeases<'_> {
    fn drop(&mut self) {
        // All together, because every commit of the daemon needs the lock that this takes.
        self.lease_set.index.enter(&self.new);
        // Untracked leases were in the set until now, so that a lease that the message names twice
        // is touched once.
        for lease in &self.untracked {
            self.lease_set.leases.remove(lease.name());
        }
    }
}

impl Drop for LeaseSet {
    fn drop(&mut self) {
        *self.inbox.lost() = None;
        self.index.leave(self.leases.values());
    }
}
