//! The leases of one keepalive stream, and what it has yet to be told of them.

use std::collections::HashMap;
use std::mem::take;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;
use tokio::task::yield_now;

use super::Carried;
use super::stream_lease::{Carriage, Fate, Loss};
use crate::boot_instant::BootInstant;
use crate::engine::Touched;
use crate::engine::metrics::{Counts, Source, Tally};
use crate::lease::{Key, LeaseId};

/// One stream's leases; dropping it lets go of them. It holds each lease that was named and not told as lost since.
#[derive(Debug)]
pub(crate) struct Carrier {
    carried: Arc<Carried>,
    leases: HashMap<(Key, LeaseId), Arc<Carriage>>,
    inbox: Arc<Inbox>,
}

/// Where a stream finds what it has lost. A lease comes into it once, so the stream's leases bound it.
#[derive(Debug)]
pub(crate) struct Inbox {
    /// `None` when the stream has ended.
    lost: Mutex<Option<Vec<Arc<Carriage>>>>,
    ring: Notify,
    counts: Arc<Counts>,
}

impl Inbox {
    pub(crate) fn put(&self, carriage: &Arc<Carriage>) {
        if let Some(lost) = &mut *self.lost() {
            lost.push(Arc::clone(carriage));
        }
        self.ring.notify_one();
    }

    /// Where its stream's leases are counted.
    pub(crate) fn counts(&self) -> &Counts {
        &self.counts
    }

    fn lost(&self) -> MutexGuard<'_, Option<Vec<Arc<Carriage>>>> {
        // Nothing in here panics half-way through a change.
        self.lost.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Carrier {
    pub(crate) fn new(carried: &Arc<Carried>) -> Self {
        let (lost, counts) = (Mutex::new(Some(Vec::new())), Arc::clone(&carried.counts));
        let inbox = Arc::new(Inbox { lost, ring: Notify::new(), counts });
        Self { carried: Arc::clone(carried), leases: HashMap::new(), inbox }
    }

    /// Begins a message that names leases. The stream carries at most `most` of them.
    pub(crate) fn naming(&mut self, most: usize) -> Naming<'_> {
        Naming { carrier: self, most, since: BootInstant::now(), new: Vec::new(), passing: Vec::new() }
    }

    /// The leases that are carried, for what is no message about them.
    pub(crate) fn leases(&self) -> impl ExactSizeIterator<Item = &(Key, LeaseId)> {
        self.leases.keys()
    }

    /// A message names every lease that is carried. It is to be settled.
    pub(crate) fn all(&self) -> Vec<Arc<Carriage>> {
        self.leases.values().filter(|carriage| carriage.embark() == Fate::Carried).map(Arc::clone).collect()
    }

    /// What to answer to a message for each lease it named. Those that are lost are carried no more.
    pub(crate) fn settle(
        &mut self,
        message: Vec<(Arc<Carriage>, Option<Touched>)>,
    ) -> Vec<(Arc<Carriage>, Touched)> {
        let now = BootInstant::now();
        let mut tally = Tally::default();
        let answer: Vec<_> = message
            .into_iter()
            .map(|(carriage, touched)| {
                let source = if touched.is_some() { Source::Store } else { Source::Memory };
                let touched = carriage.settle(touched, now);
                tally.add(touched, source);
                (carriage, touched)
            })
            .collect();
        self.carried.counts.told(&tally);
        let lost = answer.iter().filter(|(_, touched)| matches!(touched, Touched::Lost(_)));
        let lost: Vec<&Arc<Carriage>> =
            lost.map(|(carriage, _)| carriage).filter(|carriage| carriage.is_over()).collect();
        lost.iter().for_each(|carriage| self.forget(carriage));
        self.carried.leave(lost);
        answer
    }

    /// Waits for losses that no answer tells of. Each is returned once, and not carried any more. May be dropped and
    /// called again.
    pub(crate) async fn lost(&mut self) -> Vec<(Arc<Carriage>, Loss)> {
        loop {
            let found = self.inbox.lost().as_mut().map(take).unwrap_or_default();
            let lost: Vec<_> = found
                .into_iter()
                .filter_map(|carriage| carriage.tell().map(|loss| (carriage, loss)))
                .collect();
            if !lost.is_empty() {
                let mut tally = Tally::default();
                lost.iter().for_each(|(carriage, loss)| {
                    tally.lost(loss.0);
                    self.forget(carriage);
                });
                self.carried.counts.told(&tally);
                return lost;
            }
            self.inbox.ring.notified().await;
            // The commit that told of one is likely to tell of more.
            yield_now().await;
        }
    }

    fn forget(&mut self, carriage: &Arc<Carriage>) {
        if self.leases.get(carriage.lease()).is_some_and(|known| Arc::ptr_eq(known, carriage)) {
            self.leases.remove(carriage.lease());
        }
    }
}

/// A message that is naming leases. Those that are new begin to hear of records when it is dropped.
#[derive(Debug)]
pub(crate) struct Naming<'a> {
    carrier: &'a mut Carrier,
    most: usize,
    since: BootInstant,
    /// Leases that the stream carries from here on.
    new: Vec<Arc<Carriage>>,
    /// Leases past the limit of the daemon, which the message touches and the stream does not carry.
    passing: Vec<Arc<Carriage>>,
}

/// Why a lease is not touched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Full {
    /// The stream carries as many as it may.
    Stream,
    /// The daemon carries as many as it may, and touches as many others as it may.
    Daemon,
}

impl Naming<'_> {
    /// Names a lease, which the stream carries from here on, if the daemon has room for it. The message is to be settled for
    /// it.
    ///
    /// # Errors
    /// [`Full`] if there is no room for it. Nothing has changed then.
    pub(crate) fn name(&mut self, lease: (Key, LeaseId)) -> Result<Arc<Carriage>, Full> {
        let known = self.carrier.leases.get(&lease);
        if let Some(carriage) = known.filter(|carriage| carriage.embark() == Fate::Carried) {
            return Ok(Arc::clone(carriage));
        }
        if known.is_none() && self.carrier.leases.len() >= self.most {
            return Err(Full::Stream);
        }
        let carried = &self.carrier.carried;
        let (place, list) = if let Some(place) = carried.place() {
            (place, &mut self.new)
        } else if let Some(place) = carried.passing_place() {
            (place, &mut self.passing)
        } else {
            carried.counts.refused.inc();
            return Err(Full::Daemon);
        };
        known.inspect(|lost| lost.supersede());
        let carriage = Carriage::new(lease.clone(), self.since, place, &self.carrier.inbox);
        carriage.embark();
        list.push(Arc::clone(&carriage));
        self.carrier.leases.insert(lease, Arc::clone(&carriage));
        Ok(carriage)
    }
}

impl Drop for Naming<'_> {
    fn drop(&mut self) {
        // In few goes: every commit of the daemon needs the lock that this takes.
        self.carrier.carried.enter(&self.new);
        // The message named them until here, so that one named twice is touched once.
        for carriage in &self.passing {
            self.carrier.leases.remove(carriage.lease());
        }
    }
}

impl Drop for Carrier {
    fn drop(&mut self) {
        *self.inbox.lost() = None;
        self.carried.leave(self.leases.values());
    }
}
