//! What happens to one record in one step: all commands for a key that are committed together.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::distinct::Distinct;
use super::record::footprint;
use super::{LeaseId, Mode, REMEMBERED_DEPARTURES, Timestamp, Ttl};

/// A request for a lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Acquisition {
    /// Names the acquisition; repeating it repeats the same one.
    pub id: LeaseId,
    /// A label for people.
    pub owner: String,
    /// More labels.
    pub metadata: BTreeMap<String, String>,
    /// Alone or with others.
    pub mode: Mode,
    /// Shared only: no more than this many hold while it does; 1 to [`MAX_SHARED_HOLDERS`](super::MAX_SHARED_HOLDERS).
    pub shared_limit: u32,
    /// How long the grant and each touch last.
    pub ttl: Ttl,
    /// Keeps the key taken at least this long after the grant; whole milliseconds.
    pub min_hold: Duration,
    /// Stands in line if it cannot be granted at once.
    pub wait: bool,
    /// An earlier command asked for it too, and may still be under way.
    pub repeated: bool,
}

impl Acquisition {
    /// Whether a request for the same id is a repetition of this one: it asks for the same mode and limit.
    #[must_use]
    pub fn is_same(&self, mode: Mode, shared_limit: u32) -> bool {
        (self.mode, self.shared_limit) == (mode, shared_limit)
    }

    /// What this adds to a record, in bytes.
    #[must_use]
    pub fn size(&self) -> usize {
        footprint(&self.owner, &self.metadata)
    }

    /// One that waits for a second's lease without company, as most tests have it.
    #[cfg(test)]
    pub(crate) fn waiting(id: LeaseId) -> Self {
        Self {
            id,
            owner: String::new(),
            metadata: BTreeMap::new(),
            mode: Mode::Exclusive,
            shared_limit: 1,
            ttl: Ttl::new(Duration::from_secs(1)).expect("a second"),
            min_hold: Duration::ZERO,
            wait: true,
            repeated: false,
        }
    }
}

/// One key's share of a batch. Its parts are concurrent with each other, for none has been answered; the order in
/// which [`step`](super::step) takes them is the rule. Each list names an id once.
///
/// Applying an edit twice gives the same answers, as long as it does not ask for an id that it also releases or
/// cancels: whoever merges commands puts the second of such two into the next edit.
///
/// An edit that contains nothing is a *nudge*: it admits whoever's turn has come.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Edit {
    touch: Distinct<LeaseId>,
    release: Distinct<LeaseId>,
    /// The released ids that a command may still ask for.
    given_up: Distinct<LeaseId>,
    keep_out: Distinct<LeaseId>,
    revoke: Distinct<LeaseId>,
    unblock: Distinct<Timestamp>,
    cancel: Distinct<LeaseId>,
    refresh: Distinct<LeaseId>,
    enqueue: Distinct<Arc<Acquisition>>,
}

impl Edit {
    /// Renews the lease.
    #[must_use]
    pub fn touch(mut self, id: LeaseId) -> Self {
        self.touch.add(id);
        self
    }

    /// Settles the id for good: gives the lease or the place in line back, and keeps out a command that asks for the id
    /// later.
    #[must_use]
    pub fn release(mut self, id: LeaseId) -> Self {
        self.release.add(id);
        self
    }

    /// Releases an id whose acquire was given up without an answer: commands that ask for the id may still be under
    /// way, also if one of them has been granted the lease.
    #[must_use]
    pub fn give_up(mut self, id: LeaseId) -> Self {
        self.given_up.add(id);
        self.release(id)
    }

    /// Keeps out a command that asks for the id later, unless the id holds or waits by now: then nothing changes.
    #[must_use]
    pub fn keep_out(mut self, id: LeaseId) -> Self {
        self.keep_out.add(id);
        self
    }

    /// Takes the lease away from its holder.
    ///
    /// There is no "revoke whoever holds": committed twice after an unknown outcome it would hit the successor that
    /// the first commit admitted.
    #[must_use]
    pub fn revoke(mut self, id: LeaseId) -> Self {
        self.revoke.add(id);
        self
    }

    /// Ends the block of a `min_hold` that lasts until just then.
    #[must_use]
    pub fn unblock(mut self, until: Timestamp) -> Self {
        self.unblock.add(until);
        self
    }

    /// Leaves the line.
    #[must_use]
    pub fn cancel(mut self, id: LeaseId) -> Self {
        self.cancel.add(id);
        self
    }

    /// Keeps the place in line. Never makes one, so that a late refresh does nothing.
    #[must_use]
    pub fn refresh(mut self, id: LeaseId) -> Self {
        self.refresh.add(id);
        self
    }

    /// Joins the line, or refreshes the place there, or renews the lease if it is held already.
    #[must_use]
    pub fn enqueue(mut self, acquisition: Arc<Acquisition>) -> Self {
        if let Some(known) = self.enqueue.add(Arc::clone(&acquisition))
            && acquisition.is_same(known.mode, known.shared_limit)
        {
            // Of two calls for one acquisition the one that waits decides: it must not lose its place to the other.
            let known = Arc::make_mut(known);
            known.wait |= acquisition.wait;
            known.repeated = true;
        }
        self
    }

    /// The edit as it is sent again after a failure: what it asks for may have been asked for before.
    #[must_use]
    pub fn repeated(mut self) -> Self {
        self.enqueue.change(|acquisition| Arc::make_mut(acquisition).repeated = true);
        self
    }

    /// Whether it renews leases and does nothing else.
    #[must_use]
    pub fn only_touches(&self) -> bool {
        let Self { touch, release, given_up: _, keep_out, revoke, unblock, cancel, refresh, enqueue } = self;
        !touch.is_empty()
            && release.is_empty()
            && keep_out.is_empty()
            && revoke.is_empty()
            && unblock.is_empty()
            && cancel.is_empty()
            && refresh.is_empty()
            && enqueue.is_empty()
    }

    /// Whether it renews this lease.
    #[must_use]
    pub fn touches(&self, id: LeaseId) -> bool {
        self.touch.has(id)
    }

    /// Whether it settles this id.
    #[must_use]
    pub fn releases(&self, id: LeaseId) -> bool {
        self.release.has(id)
    }

    /// Whether it keeps out commands that ask for this id later.
    #[must_use]
    pub fn keeps_out(&self, id: LeaseId) -> bool {
        self.keep_out.has(id)
    }

    /// Whether it takes this lease away.
    #[must_use]
    pub fn revokes(&self, id: LeaseId) -> bool {
        self.revoke.has(id)
    }

    /// Whether it ends a block that lasts until just then.
    #[must_use]
    pub fn unblocks(&self, until: Timestamp) -> bool {
        self.unblock.has(until)
    }

    /// Whether it takes this waiter out of the line.
    #[must_use]
    pub fn cancels(&self, id: LeaseId) -> bool {
        self.cancel.has(id)
    }

    /// Whether it keeps the place of this waiter.
    #[must_use]
    pub fn refreshes(&self, id: LeaseId) -> bool {
        self.refresh.has(id)
    }

    /// Whether it asks for this id, in whatever way.
    #[must_use]
    pub fn enqueues(&self, id: LeaseId) -> bool {
        self.enqueue.has(id)
    }

    /// Whether it asks for this id with this mode and limit.
    #[must_use]
    pub fn asks(&self, id: LeaseId, mode: Mode, shared_limit: u32) -> bool {
        self.enqueue.get(id).is_some_and(|acquisition| acquisition.is_same(mode, shared_limit))
    }

    /// Whether it is about this id.
    #[must_use]
    pub fn names(&self, id: LeaseId) -> bool {
        [&self.touch, &self.release, &self.keep_out, &self.revoke, &self.cancel, &self.refresh]
            .iter()
            .any(|list| list.has(id))
            || self.enqueues(id)
    }

    /// Leases to renew.
    #[must_use]
    pub fn touched(&self) -> &[LeaseId] {
        &self.touch
    }

    /// Ids to settle.
    #[must_use]
    pub fn released(&self) -> &[LeaseId] {
        &self.release
    }

    /// Ids that commands which come later may not ask for, unless they are in use.
    #[must_use]
    pub fn kept_out(&self) -> &[LeaseId] {
        &self.keep_out
    }

    /// The released ids whose departures are lasting whatever became of them: those that may still be asked for, and
    /// all of an edit that releases more than a record remembers anyway, since the edit may be sent again.
    #[must_use]
    pub(crate) fn lasting(&self) -> &Distinct<LeaseId> {
        if self.release.len() > REMEMBERED_DEPARTURES { &self.release } else { &self.given_up }
    }

    /// Leases to take away.
    #[must_use]
    pub fn revoked(&self) -> &[LeaseId] {
        &self.revoke
    }

    /// The ends of the blocks to lift.
    #[must_use]
    pub fn unblocked(&self) -> &[Timestamp] {
        &self.unblock
    }

    /// Waiters to leave the line.
    #[must_use]
    pub fn cancelled(&self) -> &[LeaseId] {
        &self.cancel
    }

    /// Waiters whose places to keep.
    #[must_use]
    pub fn refreshed(&self) -> &[LeaseId] {
        &self.refresh
    }

    /// Acquisitions to join the line, in the order of their arrival.
    #[must_use]
    pub fn enqueued(&self) -> &[Arc<Acquisition>] {
        &self.enqueue
    }
}
