//! The one record of a key, which holds every fact about it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::{Acquisition, FencingToken, Key, LeaseId, Timestamp, Ttl};

/// Everything known of a key. A key without a record is one that was never leased or was forgotten since.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// What is leased.
    pub key: Key,
    /// The token granted last.
    pub token: FencingToken,
    /// Granted and not yet released, revoked or displaced; in the order of their grants.
    pub holders: Vec<Holder>,
    /// Standing in line; the head first.
    pub waiters: Vec<Waiter>,
    /// Who went lately and why; newest first.
    pub departures: Vec<Departure>,
    /// Nobody is admitted before this; `None` if nobody asked for it.
    pub blocked_until: Option<Timestamp>,
    /// Rises with every edit, so that each is a real write.
    pub rev: i64,
}

/// A record of a key that nobody was ever granted is kept for this long, and then until the next purge.
pub const NEVER_GRANTED: Duration = Duration::from_secs(3600);

/// Who may act on the key together with whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Mode {
    /// Alone.
    Exclusive,
    /// With other shared holders.
    Shared,
}

/// A lease that has been granted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// Names the acquisition.
    pub id: LeaseId,
    /// A label for people.
    pub owner: String,
    /// More labels.
    pub metadata: BTreeMap<String, String>,
    /// Alone or with others.
    pub mode: Mode,
    /// How long a touch lasts.
    pub ttl: Ttl,
    /// The token of this grant.
    pub token: FencingToken,
    /// When it was granted.
    pub acquired_at: Timestamp,
    /// When it runs out unless touched before.
    pub expires_at: Timestamp,
    /// The key stays taken at least this long after the grant, even if released.
    pub min_hold: Duration,
    /// Shared only: no more than this many hold while this one does.
    pub shared_limit: u32,
    /// It was asked for more than once, so a late command may still ask for it.
    pub repeated: bool,
}

/// An acquisition standing in line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waiter {
    /// What is asked for.
    pub acquisition: Arc<Acquisition>,
    /// When it came.
    pub since: Timestamp,
    /// When its place lapses unless refreshed before.
    pub expires_at: Timestamp,
}

/// A lease id that is over: it is never granted while this is remembered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Departure {
    /// Whose.
    pub id: LeaseId,
    /// How it went.
    pub reason: Reason,
    /// When it went.
    pub at: Timestamp,
    /// It is remembered for [`MEMORY`](super::MEMORY), because a command that asks for the id may still be under way.
    pub lasting: bool,
}

/// How a lease id came to be over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reason {
    /// Given back by its holder.
    Released,
    /// Ran out, and another took its place.
    Displaced,
    /// Taken away by an operator.
    Revoked,
    /// Released while it stood in line.
    Withdrawn,
    /// Released while it neither held nor stood in line: before it was asked for, or long after it was over.
    Settled,
}

impl Record {
    /// The record of a key that has none.
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

    /// Whether nobody holds the key, waits for it or keeps it blocked.
    #[must_use]
    pub fn is_free(&self, now: Timestamp) -> bool {
        !self.is_taken() && self.blocked_until <= Some(now)
    }

    /// Whether somebody holds the key or waits for it.
    #[must_use]
    pub fn is_taken(&self) -> bool {
        !self.holders.is_empty() || !self.waiters.is_empty()
    }

    /// Whether nobody has held the key, waited for it or kept it blocked for `unused_for`, so that it may be forgotten.
    ///
    /// A lease counts as held until others may take it, `grace` after it ran out, and a place in line until it lapses: a
    /// holder that died releases nothing. The last token is the time of a grant or later than it, so a record goes only
    /// when the clock alone gives a higher one. A record that was never granted protects no token, and is of use only
    /// while late commands can arrive.
    #[must_use]
    pub fn is_forgettable(&self, now: Timestamp, unused_for: Duration, grace: Duration) -> bool {
        let unused_for = if self.token.0 > 0 { unused_for } else { unused_for.min(NEVER_GRANTED) };
        let departed = self.departures.iter().map(|departure| departure.at);
        let held = self.holders.iter().map(|holder| holder.expires_at + grace);
        let waited = self.waiters.iter().map(|waiter| waiter.expires_at);
        let used = departed.chain(held).chain(waited).chain(self.blocked_until);
        used.chain([Timestamp(self.token.0)]).all(|last| last + unused_for < now)
    }

    /// Orders the states of a key: tokens rise from one life of its record to the next, where revisions begin anew.
    #[must_use]
    pub fn version(&self) -> (FencingToken, i64) {
        (self.token, self.rev)
    }

    /// What holders and waiters add to the record, in bytes as [`Acquisition::size`] counts them.
    #[must_use]
    pub fn size(&self) -> usize {
        let holders = self.holders.iter().map(|holder| footprint(&holder.owner, &holder.metadata));
        let waiters = self.waiters.iter().map(|waiter| waiter.acquisition.size());
        holders.chain(waiters).sum()
    }
}

/// What one acquisition adds to a record: its labels and a fixed part for ids, times and field names.
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
    fn a_record_that_was_never_granted_is_forgotten_within_the_hour() {
        let departure =
            Departure { id: LeaseId::random(), reason: Reason::Settled, at: START, lasting: true };
        let record = Record { departures: vec![departure], rev: 1, ..vacant() };
        let hour = START + NEVER_GRANTED;
        assert!(!record.is_forgettable(hour, WEEK, GRACE));
        assert!(record.is_forgettable(Timestamp(hour.0 + 1), WEEK, GRACE));
        let granted = Record { token: FencingToken(START.0), ..record };
        assert!(!granted.is_forgettable(Timestamp(hour.0 + 1), WEEK, GRACE), "its token is to be outlived");
    }

    #[test]
    fn a_record_with_a_live_holder_or_waiter_is_never_forgotten() {
        let rules = Rules { grace: GRACE, place: Duration::from_secs(15) };
        let [first, second] = [(); 2].map(|()| Arc::new(Acquisition::waiting(LeaseId::random())));
        let edit = Edit::default().enqueue(first).enqueue(second);
        let mut record = step(vacant(), &edit, START, &rules);
        let place_ends = record.waiters[0].expires_at;
        assert!(!record.is_forgettable(place_ends, Duration::ZERO, GRACE));
        assert!(record.is_forgettable(Timestamp(place_ends.0 + 1), Duration::ZERO, GRACE));
        record.waiters.clear();
        let live_until = record.holders[0].expires_at + GRACE;
        assert!(!record.is_forgettable(live_until, Duration::ZERO, GRACE));
        assert!(record.is_forgettable(Timestamp(live_until.0 + 1), Duration::ZERO, GRACE));
    }
}
