//! One lease on one keepalive stream, from the message that names it until it is lost or the stream
//! ends.
//!
//! ```text
//!  named ──► unconfirmed ── a commit here shows it held ──► held ── a record shows it lost ──► lost ──► reported
//!                 │                                                                                     ▲
//!                 └──────── the answer to the message that names it says that it is lost ───────────────┘
//! ```

use std::mem::replace;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::Slot;
use super::coalesce::Renewal;
use super::lease_set::Inbox;
use crate::boot_instant::BootInstant;
use crate::engine::Touched;
use crate::lease::{Edit, LeaseName, Reason, Snapshot, Standing};

/// A lease on a stream. A lease that is named again after its loss gets a new `StreamLease`.
#[derive(Debug)]
pub(crate) struct StreamLease {
    name: LeaseName,
    /// When a message first named the lease.
    since: BootInstant,
    inbox: Arc<Inbox>,
    state: Mutex<State>,
    _slot: Slot,
}

#[derive(Debug, Default)]
struct State {
    /// A commit of this daemon has shown the lease held.
    held: bool,
    renewal: Option<Renewal>,
    loss: Option<Loss>,
    /// How many messages that name the lease are not answered yet. While there are any, only their
    /// answers report a loss.
    unanswered: usize,
    /// Nothing is left to report: an answer or a pushed result has said that the lease is not held,
    /// or a new `StreamLease` has replaced this one.
    reported: bool,
}

/// How a lease was lost. `None` if the record does not remember.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Loss(pub(crate) Option<Reason>);

/// Whether later records concern a lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    /// They do.
    Kept,
    /// The lease is lost, so they do not.
    Lost,
}

impl StreamLease {
    pub(crate) fn new(name: LeaseName, since: BootInstant, slot: Slot, inbox: &Arc<Inbox>) -> Arc<Self> {
        Arc::new(Self { name, since, inbox: Arc::clone(inbox), state: Mutex::default(), _slot: slot })
    }

    pub(crate) fn name(&self) -> &LeaseName {
        &self.name
    }

    /// Returns how long the lease lasts from `now` on, if a touch at `now` can be coalesced.
    pub(crate) fn coalesce(&self, now: BootInstant) -> Option<Duration> {
        self.state().renewal?.coalesce(now)
    }

    /// Notes the record after a commit of this daemon, which was sent at `sent_at` and applied
    /// `edit`.
    pub(crate) fn local_commit(
        self: &Arc<Self>,
        snapshot: &Snapshot,
        edit: &Edit,
        sent_at: BootInstant,
    ) -> Fate {
        // Ignored, because the commit may be older than the grant, or than a loss that has been
        // reported.
        if sent_at < self.since {
            return Fate::Kept;
        }
        let id = self.name.id;
        let mut state = self.state();
        match snapshot.standing(id) {
            Standing::Holder(holder) => {
                if !replace(&mut state.held, true) {
                    self.inbox.metrics().tracked.inc();
                }
                if edit.touches(id) {
                    state.renewal = Some(Renewal::new(snapshot, holder, sent_at));
                }
                Fate::Kept
            }
            // No loss to report: the answer to the message that names the lease says that it is not
            // held.
            _ if !state.held => Fate::Kept,
            standing => self.lose(state, standing),
        }
    }

    /// Notes a record that another daemon may have written, and that is newer than the latest
    /// commit of this daemon.
    pub(crate) fn remote_read(self: &Arc<Self>, snapshot: &Snapshot) -> Fate {
        let state = self.state();
        match snapshot.standing(self.name.id) {
            Standing::Holder(_) => Fate::Kept,
            // The record may have been read before the lease was granted.
            _ if !state.held => Fate::Kept,
            standing => self.lose(state, standing),
        }
    }

    /// Makes the next touch a written one. Returns true if the lease was held so far.
    pub(crate) fn stop_coalescing(&self) -> bool {
        let mut state = self.state();
        if let Some(renewal) = &mut state.renewal {
            renewal.stop_coalescing();
        }
        state.held
    }

    fn lose(self: &Arc<Self>, mut state: MutexGuard<'_, State>, standing: Standing<'_>) -> Fate {
        if state.loss.is_none() {
            self.inbox.metrics().tracked.dec();
            state.renewal = None;
            state.loss = Some(Loss(match standing {
                Standing::Departed(reason) => Some(reason),
                _ => None,
            }));
            drop(state);
            self.inbox.put(self);
        }
        Fate::Lost
    }

    /// Whether a commit of this daemon has shown the lease held, and no record since has shown it
    /// lost.
    pub(crate) fn is_held(&self) -> bool {
        let state = self.state();
        state.held && state.loss.is_none()
    }

    /// Returns true if nothing is left to report about the lease.
    pub(crate) fn is_reported(&self) -> bool {
        self.state().reported
    }

    /// Counts one more unanswered message that names the lease, unless the lease is lost.
    pub(crate) fn begin_message(&self) -> Fate {
        let mut state = self.state();
        if state.loss.is_some() {
            return Fate::Lost;
        }
        state.unanswered += 1;
        Fate::Kept
    }

    /// Notes that a new `StreamLease` of the same name replaces this one. This one's loss is not
    /// reported, because the answer to the message that names the lease again says whether it is
    /// held.
    pub(crate) fn supersede(&self) {
        self.state().reported = true;
    }

    /// Returns what to answer at `now` to a message that named the lease. `touched` is the result
    /// of its touch, or `None` if the touch was coalesced. A loss that became known meanwhile comes
    /// first.
    pub(crate) fn settle(&self, touched: Option<Touched>, now: BootInstant) -> Touched {
        let mut state = self.state();
        state.unanswered -= 1;
        let reason = match (state.loss, touched) {
            // The record that the touch returned may have a reason that another record did not.
            (Some(Loss(None)), Some(Touched::Lost(reason))) | (None, Some(Touched::Lost(reason))) => reason,
            (Some(Loss(reason)), _) => reason,
            (None, Some(Touched::Kept(remaining))) => return Touched::Kept(remaining),
            (None, Some(Touched::Unreadable)) => return Touched::Unreadable,
            (None, None) => {
                let remaining = state.renewal.map(|renewal| renewal.remaining(now));
                return Touched::Kept(remaining.unwrap_or_default());
            }
        };
        // If another message is unanswered, the lease may have been granted by now, and the answer
        // to that message will say so.
        state.reported = state.loss.is_some() || state.unanswered == 0;
        Touched::Lost(reason)
    }

    /// Returns the loss if it must be reported now, outside of an answer. Marks it as reported.
    pub(crate) fn report(&self) -> Option<Loss> {
        let mut state = self.state();
        let loss = state.loss.filter(|_| !state.reported && state.unanswered == 0)?;
        state.reported = true;
        Some(loss)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // No code panics half-way through a change under this lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for StreamLease {
    fn drop(&mut self) {
        let State { held, loss, .. } = *self.state();
        if held && loss.is_none() {
            self.inbox.metrics().tracked.dec();
            self.inbox.metrics().orphaned.inc();
        }
    }
}
