//! The changes to one record that are committed together: all operations of a batch on one key.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::record::footprint;
use super::unique_list::UniqueList;
use super::{LeaseId, Mode, REMEMBERED_DEPARTURES, Timestamp, Ttl};

/// A request for a lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Acquisition {
    /// The id of the acquisition. A request with the same id repeats the same acquisition.
    pub id: LeaseId,
    /// A label for people, chosen by the caller.
    pub owner: String,
    /// More labels, chosen by the caller.
    pub metadata: BTreeMap<String, String>,
    /// Whether the lease is exclusive or shared.
    pub mode: Mode,
    /// For shared leases: at most this many hold the key while this one does. 1 to
    /// [`MAX_SHARED_HOLDERS`](super::MAX_SHARED_HOLDERS).
    pub shared_limit: u32,
    /// How long the lease lasts after its grant and after each touch.
    pub ttl: Ttl,
    /// How long after the grant the key stays blocked if the lease is released earlier. Whole
    /// milliseconds.
    pub min_hold: Duration,
    /// Whether the acquisition enters the queue if it cannot be granted at once.
    pub wait: bool,
    /// Whether an earlier command that asked for the same lease may still be under way.
    pub repeated: bool,
}

impl Acquisition {
    /// Returns true if a request with the same id, this mode and this limit repeats this
    /// acquisition.
    #[must_use]
    pub fn is_same(&self, mode: Mode, shared_limit: u32) -> bool {
        (self.mode, self.shared_limit) == (mode, shared_limit)
    }

    /// Returns how many bytes this acquisition adds to a record.
    #[must_use]
    pub fn size(&self) -> usize {
        footprint(&self.owner, &self.metadata)
    }

    /// Returns an acquisition that waits for an exclusive lease of one second, as most tests need.
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

/// All operations of a batch on one key, as lists without duplicates.
///
/// The operations are concurrent with each other, because none has been answered.
/// [`step`](super::step) applies them in a fixed order, which is part of the rules.
///
/// An edit is idempotent: applied again, it gives the same answers. So an edit must not ask for an
/// id that it releases, cancels or keeps out. The code that merges operations puts the second of
/// the two into the next edit.
///
/// An empty edit is a *nudge*: it only admits the waiters that may be admitted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Edit {
    touch: UniqueList<LeaseId>,
    release: UniqueList<LeaseId>,
    /// The released ids that a command under way may still ask for.
    given_up: UniqueList<LeaseId>,
    keep_out: UniqueList<LeaseId>,
    revoke: UniqueList<LeaseId>,
    unblock: UniqueList<Timestamp>,
    cancel: UniqueList<LeaseId>,
    refresh: UniqueList<LeaseId>,
    enqueue: UniqueList<Arc<Acquisition>>,
}

impl Edit {
    /// Adds a touch, which renews the lease.
    #[must_use]
    pub fn touch(mut self, id: LeaseId) -> Self {
        self.touch.add(id);
        self
    }

    /// Adds a release: ends the id, whether it holds, waits or is unknown. While the record
    /// remembers the id, a command that asks for it changes nothing.
    #[must_use]
    pub fn release(mut self, id: LeaseId) -> Self {
        self.release.add(id);
        self
    }

    /// Adds a release of an id whose acquire the caller gave up without an answer. Commands that
    /// ask for the id may still be under way, even if one of them was granted the lease.
    #[must_use]
    pub fn give_up(mut self, id: LeaseId) -> Self {
        self.given_up.add(id);
        self.release(id)
    }

    /// Adds an id to keep out: ends the id, so that a late command that asks for it changes
    /// nothing. An id that holds or waits by now is left alone.
    #[must_use]
    pub fn keep_out(mut self, id: LeaseId) -> Self {
        self.keep_out.add(id);
        self
    }

    /// Adds a revocation, which takes the lease away from its holder.
    ///
    /// A revocation names an id, because "revoke the current holder" would not be idempotent:
    /// committed twice after an unknown outcome, it would also hit the next holder.
    #[must_use]
    pub fn revoke(mut self, id: LeaseId) -> Self {
        self.revoke.add(id);
        self
    }

    /// Adds the end of a `min_hold` block. Only a block that lasts until exactly `until` is ended:
    /// repeated, the edit must not end a later block.
    #[must_use]
    pub fn unblock(mut self, until: Timestamp) -> Self {
        self.unblock.add(until);
        self
    }

    /// Adds a cancellation, which removes a waiter from the queue.
    #[must_use]
    pub fn cancel(mut self, id: LeaseId) -> Self {
        self.cancel.add(id);
        self
    }

    /// Adds a refresh, which renews a waiter's entry. A refresh never makes an entry, because a
    /// late one would make an entry for which no call waits. A call whose entry is missing asks
    /// again, as a repetition.
    #[must_use]
    pub fn refresh(mut self, id: LeaseId) -> Self {
        self.refresh.add(id);
        self
    }

    /// Adds an acquisition, which enters the queue, or renews the lease or the entry that its id
    /// already has.
    #[must_use]
    pub fn enqueue(mut self, acquisition: Arc<Acquisition>) -> Self {
        if let Some(existing) = self.enqueue.add(Arc::clone(&acquisition))
            && acquisition.is_same(existing.mode, existing.shared_limit)
        {
            // If one of two calls for the same acquisition waits, the acquisition waits. Otherwise
            // the call that does not wait would remove the other one from the queue.
            let existing = Arc::make_mut(existing);
            existing.wait |= acquisition.wait;
            existing.repeated = true;
        }
        self
    }

    /// Returns the edit to send again after a failure. The earlier command may still be under way,
    /// so the acquisitions count as repeated.
    #[must_use]
    pub fn repeated(mut self) -> Self {
        self.enqueue.change(|acquisition| Arc::make_mut(acquisition).repeated = true);
        self
    }

    /// Returns true if the edit renews leases and does nothing else.
    #[must_use]
    pub fn only_touches(&self) -> bool {
        // `given_up` is a part of `release`.
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

    /// Returns true if the edit touches this lease.
    #[must_use]
    pub fn touches(&self, id: LeaseId) -> bool {
        self.touch.has(id)
    }

    /// Returns true if the edit releases this id.
    #[must_use]
    pub fn releases(&self, id: LeaseId) -> bool {
        self.release.has(id)
    }

    /// Returns true if the edit keeps this id out.
    #[must_use]
    pub fn keeps_out(&self, id: LeaseId) -> bool {
        self.keep_out.has(id)
    }

    /// Returns true if the edit revokes this lease.
    #[must_use]
    pub fn revokes(&self, id: LeaseId) -> bool {
        self.revoke.has(id)
    }

    /// Returns true if the edit ends a block that lasts until exactly this instant.
    #[must_use]
    pub fn unblocks(&self, until: Timestamp) -> bool {
        self.unblock.has(until)
    }

    /// Returns true if the edit removes this waiter from the queue.
    #[must_use]
    pub fn cancels(&self, id: LeaseId) -> bool {
        self.cancel.has(id)
    }

    /// Returns true if the edit renews the entry of this waiter.
    #[must_use]
    pub fn refreshes(&self, id: LeaseId) -> bool {
        self.refresh.has(id)
    }

    /// Returns true if the edit asks for this id, with any mode and limit.
    #[must_use]
    pub fn enqueues(&self, id: LeaseId) -> bool {
        self.enqueue.has(id)
    }

    /// Returns true if the edit asks for this id with this mode and limit.
    #[must_use]
    pub fn asks(&self, id: LeaseId, mode: Mode, shared_limit: u32) -> bool {
        self.enqueue.get(id).is_some_and(|acquisition| acquisition.is_same(mode, shared_limit))
    }

    /// Returns true if the edit has any operation on this id.
    #[must_use]
    pub fn names(&self, id: LeaseId) -> bool {
        [&self.touch, &self.release, &self.keep_out, &self.revoke, &self.cancel, &self.refresh]
            .iter()
            .any(|list| list.has(id))
            || self.enqueues(id)
    }

    /// The leases to renew.
    #[must_use]
    pub fn touched(&self) -> &[LeaseId] {
        &self.touch
    }

    /// The ids to release.
    #[must_use]
    pub fn released(&self) -> &[LeaseId] {
        &self.release
    }

    /// The ids to keep out: later commands that ask for them change nothing.
    #[must_use]
    pub fn kept_out(&self) -> &[LeaseId] {
        &self.keep_out
    }

    /// The released ids whose departures are lasting even if the id held and was asked for only
    /// once.
    #[must_use]
    pub(crate) fn lasting(&self) -> &UniqueList<LeaseId> {
        // The edit may be sent again after other edits. By then the record may have forgotten all
        // departures that are not lasting, except the newest ones.
        if self.release.len() > REMEMBERED_DEPARTURES { &self.release } else { &self.given_up }
    }

    /// The leases to revoke.
    #[must_use]
    pub fn revoked(&self) -> &[LeaseId] {
        &self.revoke
    }

    /// The `min_hold` blocks to end, each named by the instant until which it would last.
    #[must_use]
    pub fn unblocked(&self) -> &[Timestamp] {
        &self.unblock
    }

    /// The waiters to remove from the queue.
    #[must_use]
    pub fn cancelled(&self) -> &[LeaseId] {
        &self.cancel
    }

    /// The waiters whose entries to renew.
    #[must_use]
    pub fn refreshed(&self) -> &[LeaseId] {
        &self.refresh
    }

    /// The acquisitions to enter the queue, in the order of their arrival.
    #[must_use]
    pub fn enqueued(&self) -> &[Arc<Acquisition>] {
        &self.enqueue
    }
}
