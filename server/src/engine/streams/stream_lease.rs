//! One lease on one keepalive stream: what is known of it, from when a message names it until it is lost or the stream
//! ends.

use std::mem::replace;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::Place;
use super::lease_set::Inbox;
use crate::boot_instant::BootInstant;
use crate::engine::Touched;
use crate::lease::{Edit, Holder, Key, LeaseId, Reason, Snapshot, Standing};

/// A lease is not touched again while its last touch is younger than this part of its TTL.
const FRESH_PART: u32 = 10;

/// A lease on a stream. Named again after its loss it is another one.
#[derive(Debug)]
pub(crate) struct Carriage {
    lease: (Key, LeaseId),
    /// What was sent before says nothing: it may be older than the grant, or than a loss that was told.
    since: BootInstant,
    inbox: Arc<Inbox>,
    state: Mutex<State>,
    _place: Place,
}

#[derive(Debug, Default)]
struct State {
    /// A commit of this daemon has shown it held.
    held: bool,
    renewal: Option<Renewal>,
    loss: Option<Loss>,
    /// Messages that name it and are not answered yet. Their answers tell of a loss, and nothing else does.
    under_way: usize,
    /// The stream knows that it is lost, or that it never was its.
    told: bool,
}

/// A touch that is durable.
#[derive(Debug, Clone, Copy)]
struct Renewal {
    /// Before the commit was sent, so that the touch is never taken for younger than it is. On the boot clock: what is
    /// left to the holder runs out while the machine is suspended.
    sent_at: BootInstant,
    /// What was left as of the commit.
    remaining: Duration,
    fresh_for: Duration,
}

/// How a lease went, if that is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Loss(pub(crate) Option<Reason>);

/// Whether a lease is to hear of more records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    Carried,
    Lost,
}

impl Renewal {
    fn new(snapshot: &Snapshot, holder: &Holder, sent_at: BootInstant) -> Self {
        Self { sent_at, remaining: snapshot.remaining(holder), fresh_for: holder.ttl.get() / FRESH_PART }
    }

    /// What is left at `now`, or less.
    fn remaining(&self, now: BootInstant) -> Duration {
        self.remaining.saturating_sub(now - self.sent_at)
    }

    fn is_fresh(&self, now: BootInstant) -> bool {
        now - self.sent_at < self.fresh_for && !self.remaining(now).is_zero()
    }
}

impl Carriage {
    pub(crate) fn new(
        lease: (Key, LeaseId),
        since: BootInstant,
        place: Place,
        inbox: &Arc<Inbox>,
    ) -> Arc<Self> {
        Arc::new(Self { lease, since, inbox: Arc::clone(inbox), state: Mutex::default(), _place: place })
    }

    /// Key and id.
    pub(crate) fn lease(&self) -> &(Key, LeaseId) {
        &self.lease
    }

    /// Whether it was touched so lately that memory will do at `now`.
    pub(crate) fn is_fresh(&self, now: BootInstant) -> bool {
        self.state().renewal.is_some_and(|renewal| renewal.is_fresh(now))
    }

    /// Takes note of a record that a commit of this daemon returned, which applied `edit`.
    pub(crate) fn own(self: &Arc<Self>, snapshot: &Snapshot, edit: &Edit, sent_at: BootInstant) -> Fate {
        if sent_at < self.since {
            return Fate::Carried;
        }
        let id = self.lease.1;
        let mut state = self.state();
        match snapshot.standing(id) {
            Standing::Holder(holder) => {
                if !replace(&mut state.held, true) {
                    self.inbox.counts().carried.inc();
                }
                if edit.touches(id) {
                    state.renewal = Some(Renewal::new(snapshot, holder, sent_at));
                }
                Fate::Carried
            }
            // Not held before as far as is known, so the answer to the message that names it says what it is.
            _ if !state.held => Fate::Carried,
            standing => self.lose(state, standing),
        }
    }

    /// Takes note of a record that others left after all that commits of this daemon have shown.
    pub(crate) fn foreign(self: &Arc<Self>, snapshot: &Snapshot) -> Fate {
        let state = self.state();
        match snapshot.standing(self.lease.1) {
            Standing::Holder(_) => Fate::Carried,
            _ if !state.held => Fate::Carried,
            standing => self.lose(state, standing),
        }
    }

    /// Lets no message be answered from memory until the next touch. Returns whether it was held before.
    pub(crate) fn doubt(&self) -> bool {
        let mut state = self.state();
        state.renewal = None;
        state.held
    }

    fn lose(self: &Arc<Self>, mut state: MutexGuard<'_, State>, standing: Standing<'_>) -> Fate {
        if state.loss.is_none() {
            self.inbox.counts().carried.dec();
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

    /// Whether a commit of this daemon has shown it held, and no record since has shown it lost.
    pub(crate) fn is_held(&self) -> bool {
        let state = self.state();
        state.held && state.loss.is_none()
    }

    /// Whether records concern it no more.
    pub(crate) fn is_over(&self) -> bool {
        self.state().told
    }

    /// A message names it; not after its loss.
    pub(crate) fn embark(&self) -> Fate {
        let mut state = self.state();
        if state.loss.is_some() {
            return Fate::Lost;
        }
        state.under_way += 1;
        Fate::Carried
    }

    /// The lease was lost and is named again: the answer to that tells how it stands, if nothing has before.
    pub(crate) fn supersede(&self) {
        self.state().told = true;
    }

    /// What a message that named it is answered at `now`; `touched` is `None` if memory was to do. What has been
    /// learned meanwhile counts.
    pub(crate) fn settle(&self, touched: Option<Touched>, now: BootInstant) -> Touched {
        let mut state = self.state();
        state.under_way -= 1;
        let reason = match (state.loss, touched) {
            (Some(Loss(None)), Some(Touched::Lost(reason))) | (None, Some(Touched::Lost(reason))) => reason,
            (Some(Loss(reason)), _) => reason,
            (None, Some(Touched::Kept(remaining))) => return Touched::Kept(remaining),
            (None, Some(Touched::Unreadable)) => return Touched::Unreadable,
            (None, None) => {
                let remaining = state.renewal.map(|renewal| renewal.remaining(now));
                return Touched::Kept(remaining.unwrap_or_default());
            }
        };
        // A lease that was not held yet when the one message came may be by the time of the next.
        state.told = state.loss.is_some() || state.under_way == 0;
        Touched::Lost(reason)
    }

    /// The loss, if the stream is to be told of it now.
    pub(crate) fn tell(&self) -> Option<Loss> {
        let mut state = self.state();
        let loss = state.loss.filter(|_| !state.told && state.under_way == 0)?;
        state.told = true;
        Some(loss)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing in here panics half-way through a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Carriage {
    fn drop(&mut self) {
        let State { held, loss, .. } = *self.state();
        if held && loss.is_none() {
            self.inbox.counts().carried.dec();
            self.inbox.counts().orphaned.inc();
        }
    }
}
