//! What happens to one record in one step: all commands for a key that are committed together.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::distinct::Distinct;
use super::record::footprint;
use super::{FencingToken, LeaseId, Mode, Ttl};

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
    /// Shared only: it is admitted while fewer than this many hold; 1 to [`MAX_SHARED_HOLDERS`](super::MAX_SHARED_HOLDERS).
    pub shared_limit: u32,
    /// How long the grant and each touch last.
    pub ttl: Ttl,
    /// Keeps the key taken at least this long after the grant; whole milliseconds.
    pub min_hold: Duration,
    /// Stands in line if it cannot be granted at once.
    pub wait: bool,
}

impl Acquisition {
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
        }
    }
}

/// One key's share of a batch. Its parts are concurrent with each other, for none has been answered; the order in
/// which [`step`](super::step) takes them is the rule. Each list names an id or token once.
///
/// Applying an edit twice gives the same answers, as long as it does not ask for an id that it also releases or
/// cancels: whoever merges commands puts the second of such two into the next edit. (A release of an id that stands
/// in line may come before or after its grant, and repeated it comes after; both are answers to that race.)
///
/// An edit that contains nothing is a *nudge*: it admits whoever's turn has come.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Edit {
    touch: Distinct<LeaseId>,
    release: Distinct<LeaseId>,
    revoke: Distinct<FencingToken>,
    cancel: Distinct<LeaseId>,
    enqueue: Distinct<Arc<Acquisition>>,
}

impl Edit {
    /// Renews the lease.
    #[must_use]
    pub fn touch(mut self, id: LeaseId) -> Self {
        self.touch.add(id);
        self
    }

    /// Gives the lease back.
    #[must_use]
    pub fn release(mut self, id: LeaseId) -> Self {
        self.release.add(id);
        self
    }

    /// Takes the lease with this token away.
    ///
    /// There is no "revoke whoever holds": committed twice after an unknown outcome it would hit the successor that
    /// the first commit admitted.
    #[must_use]
    pub fn revoke(mut self, token: FencingToken) -> Self {
        self.revoke.add(token);
        self
    }

    /// Leaves the line.
    #[must_use]
    pub fn cancel(mut self, id: LeaseId) -> Self {
        self.cancel.add(id);
        self
    }

    /// Joins the line, or refreshes its place there.
    #[must_use]
    pub fn enqueue(mut self, acquisition: Arc<Acquisition>) -> Self {
        // Of two calls for one acquisition the one that waits decides: it must not lose its place to the other.
        if let Some(known) = self.enqueue.add(Arc::clone(&acquisition))
            && acquisition.wait
        {
            *known = acquisition;
        }
        self
    }

    /// Whether it renews leases and does nothing else.
    #[must_use]
    pub fn only_touches(&self) -> bool {
        let Self { touch, release, revoke, cancel, enqueue } = self;
        !touch.is_empty()
            && release.is_empty()
            && revoke.is_empty()
            && cancel.is_empty()
            && enqueue.is_empty()
    }

    /// Leases to renew.
    #[must_use]
    pub fn touched(&self) -> &[LeaseId] {
        &self.touch
    }

    /// Whether it renews this lease.
    #[must_use]
    pub fn touches(&self, id: LeaseId) -> bool {
        self.touch.has(id)
    }

    /// Whether it gives this lease back.
    #[must_use]
    pub fn releases(&self, id: LeaseId) -> bool {
        self.release.has(id)
    }

    /// Whether it takes away the lease with this token.
    #[must_use]
    pub fn revokes(&self, token: FencingToken) -> bool {
        self.revoke.has(token)
    }

    /// Whether it takes this waiter out of the line.
    #[must_use]
    pub fn cancels(&self, id: LeaseId) -> bool {
        self.cancel.has(id)
    }

    /// Whether it puts this acquisition into the line, or refreshes its place there.
    #[must_use]
    pub fn enqueues(&self, id: LeaseId) -> bool {
        self.enqueue.has(id)
    }

    /// Leases to give back.
    #[must_use]
    pub fn released(&self) -> &[LeaseId] {
        &self.release
    }

    /// Tokens of leases to take away.
    #[must_use]
    pub fn revoked(&self) -> &[FencingToken] {
        &self.revoke
    }

    /// Waiters to leave the line.
    #[must_use]
    pub fn cancelled(&self) -> &[LeaseId] {
        &self.cancel
    }

    /// Acquisitions to join the line, in the order of their arrival.
    #[must_use]
    pub fn enqueued(&self) -> &[Arc<Acquisition>] {
        &self.enqueue
    }
}
