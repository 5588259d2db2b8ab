//! The record of a key: everything that is stored about it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::{Acquisition, FencingToken, Key, LeaseId, Timestamp, Ttl};

/// The state of a key. A key without a record was never leased, or its record has been purged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// The key that is leased.
    pub key: Key,
    /// The token of the latest grant.
    pub token: FencingToken,
    /// The leases that are granted and not yet released, revoked or displaced, in the order of
    /// their grants.
    pub holders: Vec<Holder>,
    /// The queue, the head first.
    pub waiters: Vec<Waiter>,
    /// The ids that ended recently and how, the newest first.
    pub departures: Vec<Departure>,
    /// No lease is granted before this instant. `None` if no lease with a `min_hold` was released,
    /// or if an operator ended the block.
    pub blocked_until: Option<Timestamp>,
    /// Rises with every edit, so that an edit which changes nothing else is a write as well.
    pub rev: i64,
}

/// A record without a grant may be purged once it has been unused for this long.
pub const NEVER_GRANTED: Duration = Duration::from_secs(3600);

/// Whether a lease excludes others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Mode {
    /// Held alone.
    Exclusive,
    /// Held together with other shared holders.
    Shared,
}

/// A lease that has been granted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// The id of the acquisition.
    pub id: LeaseId,
    /// A label for people, chosen by the caller.
    pub owner: String,
    /// More labels, chosen by the caller.
    pub metadata: BTreeMap<String, String>,
    /// Whether the lease excludes others.
    pub mode: Mode,
    /// How long the lease lasts after its grant and after each touch.
    pub ttl: Ttl,
    /// The token of this grant.
    pub token: FencingToken,
    /// When the lease was granted.
    pub acquired_at: Timestamp,
    /// When the lease lapses unless it is touched before.
    pub expires_at: Timestamp,
    /// How long after the grant the key stays blocked if the lease is released earlier.
    pub min_hold: Duration,
    /// For shared leases: at most this many hold the key while this one does.
    pub shared_limit: u32,
    /// Whether the lease was asked for more than once, so that a late command may still ask for it.
    pub repeated: bool,
}

/// An acquisition in the queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waiter {
    /// The lease that is asked for.
    pub acquisition: Arc<Acquisition>,
    /// When the acquisition entered the queue.
    pub since: Timestamp,
    /// When this entry lapses unless it is refreshed before.
    pub expires_at: Timestamp,
}

/// A lease id that has ended. The id is never granted while its departure is remembered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Departure {
    /// The id that ended.
    pub id: LeaseId,
    /// How the id ended.
    pub reason: Reason,
    /// When the id ended.
    pub at: Timestamp,
    /// Whether the departure is remembered for [`MEMORY`](super::MEMORY), because a command that
    /// asks for the id may still be under way.
    pub lasting: bool,
}

/// How a lease id ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reason {
    /// The holder released it.
    Released,
    /// The lease lapsed, and the grant of another lease displaced it.
    Displaced,
    /// An operator took the lease away.
    Revoked,
    /// The id was released while it was in the queue.
    Withdrawn,
    /// The id was kept out, or was released while it neither held nor waited: before an acquisition
    /// asked for it, or long after it had ended.
    Settled,
}

impl Record {
    /// Returns the record of a key that has none in the store.
    #[must_use]
    pub fn vacant(key: Key) -> Self {
        Self {
            key,
            token: FencingToken::default(),
            holders: Vec::new(),
            waiters: Vec::new(),
            departures: Vec::new(),
            blocked_until: None,
            rev: 0,
        }
    }

    /// Returns true if the key has no holder and no waiter, and no `min_hold` blocks it.
    #[must_use]
    pub fn is_free(&self, now: Timestamp) -> bool {
        // `None` is less than any instant, so a key without a block passes.
        !self.is_taken() && self.blocked_until <= Some(now)
    }

    /// Returns true if the key has a holder or a waiter.
    #[must_use]
    pub fn is_taken(&self) -> bool {
        !self.holders.is_empty() || !self.waiters.is_empty()
    }

    /// Returns true if the record may be purged: the key has been unused for `unused_for`, or for
    /// [`NEVER_GRANTED`] if it was never granted.
    ///
    /// A key is used while it has a holder or waiter, while a `min_hold` blocks it, and at each
    /// departure. A holder counts until `grace` after its lease lapsed, because a holder that died
    /// releases nothing. A waiter counts until its entry lapses.
    #[must_use]
    pub fn is_purgeable(&self, now: Timestamp, unused_for: Duration, grace: Duration) -> bool {
        // A record without a grant protects no token. It is of use only while late commands can
        // arrive.
        let unused_for = if self.token.0 > 0 { unused_for } else { unused_for.min(NEVER_GRANTED) };
        let departed = self.departures.iter().map(|departure| departure.at);
        let held = self.holders.iter().map(|holder| holder.expires_at + grace);
        let waited = self.waiters.iter().map(|waiter| waiter.expires_at);
        let used = departed.chain(held).chain(waited).chain(self.blocked_until);
        // A token is the time of its grant or later. Once the clock has passed the last token, the
        // first grant of a new record gets a greater one.
        used.chain([Timestamp(self.token.0)]).all(|last| last + unused_for < now)
    }

    /// Returns a version that orders the states of a key. The token comes first: revisions start
    /// again when a purged record is made again, but tokens keep rising.
    #[must_use]
    pub fn version(&self) -> (FencingToken, i64) {
        (self.token, self.rev)
    }

    /// Returns how many bytes holders and waiters add to the record, counted like
    /// [`Acquisition::size`].
    #[must_use]
    pub fn size(&self) -> usize {
        let holders = self.holders.iter().map(|holder| footprint(&holder.owner, &holder.metadata));
        let waiters = self.waiters.iter().map(|waiter| waiter.acquisition.size());
        holders.chain(waiters).sum()
    }
}

/// Returns how many bytes one acquisition adds to a record: its labels, and a fixed part for ids,
/// times and field names.
pub(super) fn footprint(owner: &str, metadata: &BTreeMap<String, String>) -> usize {
    const FIXED: usize = 256;
    let labels: usize = metadata.iter().map(|(key, value)| key.len() + value.len()).sum();
    FIXED + owner.len() + labels
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::{Edit, Rules, step};

    const GRACE: Duration = Duration::from_secs(1);
    const WEEK: Duration = Duration::from_secs(7 * 86_400);
    const START: Timestamp = Timestamp(1_700_000_000_000);

    fn vacant() -> Record {
        Record::vacant(Key::try_from("key").expect("a key"))
    }

    #[test]
    fn a_record_without_a_grant_is_purged_after_an_hour() {
        let departure =
            Departure { id: LeaseId::random(), reason: Reason::Settled, at: START, lasting: true };
        let record = Record { departures: vec![departure], rev: 1, ..vacant() };
        let hour = START + NEVER_GRANTED;
        assert!(!record.is_purgeable(hour, WEEK, GRACE));
        assert!(record.is_purgeable(Timestamp(hour.0 + 1), WEEK, GRACE));
        let granted = Record { token: FencingToken(START.0), ..record };
        assert!(
            !granted.is_purgeable(Timestamp(hour.0 + 1), WEEK, GRACE),
            "a record with a grant is kept for longer"
        );
    }

    #[test]
    fn a_record_with_a_live_holder_or_waiter_is_never_purged() {
        let rules = Rules { grace: GRACE, waiter_ttl: Duration::from_secs(15) };
        let [first, second] = [(); 2].map(|()| Arc::new(Acquisition::waiting(LeaseId::random())));
        let edit = Edit::default().enqueue(first).enqueue(second);
        let mut record = step(vacant(), &edit, START, &rules);
        let waiter_lapses = record.waiters[0].expires_at;
        assert!(!record.is_purgeable(waiter_lapses, Duration::ZERO, GRACE));
        assert!(record.is_purgeable(Timestamp(waiter_lapses.0 + 1), Duration::ZERO, GRACE));
        record.waiters.clear();
        let live_until = record.holders[0].expires_at + GRACE;
        assert!(!record.is_purgeable(live_until, Duration::ZERO, GRACE));
        assert!(record.is_purgeable(Timestamp(live_until.0 + 1), Duration::ZERO, GRACE));
    }
}
