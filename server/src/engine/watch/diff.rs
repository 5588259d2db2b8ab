//! The changes of a key between two states of its record.
//!
//! A record shows more than its present state: it also shows which ids departed lately, and why. So
//! a lease that was granted and ended between the two states is reported too, unless the record has
//! forgotten the departure by then.

use std::collections::HashSet;

use crate::lease::{Departure, LeaseId, Reason, Record, Snapshot, State, Timestamp};

/// A kind of change of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ChangeKind {
    /// A lease was granted, or a lapsed lease was touched and is live again.
    Granted,
    /// A lease was released, or it is gone and the record does not say how.
    Released,
    /// The holders' leases ran out.
    Lapsed,
    /// A lease was revoked.
    Revoked,
    /// A waiter joined the queue.
    Queued,
    /// A waiter left the queue without a lease.
    LeftQueue,
}

/// A change, and when it happened by the store's clock. If that is not known, it is the time of the
/// later state.
pub(crate) type Change = (ChangeKind, Timestamp);

/// The earlier state of a key.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Previous<'a> {
    pub(crate) record: &'a Record,
    /// The leases of all holders had run out.
    pub(crate) has_lapsed: bool,
}

/// Returns the changes from `before` to `after`, in the order in which they happened. Without
/// `before` the key had no holders and no waiters.
pub(crate) fn changes(before: Option<Previous<'_>>, after: &Snapshot) -> Vec<Change> {
    // A departure that `before` shows already has been reported.
    let (held, waited, departed) = before.map(|before| ids(before.record)).unwrap_or_default();
    let (holds, waits, _) = ids(&after.record);
    let has_lapsed = before.is_some_and(|before| before.has_lapsed);
    let mut changes = Vec::new();

    // Reversed, because a record has its newest departure first.
    let departures =
        after.record.departures.iter().rev().filter(|departure| !departed.contains(&departure.id));
    for Departure { id, reason, at, .. } in departures {
        let was_granted = !matches!(reason, Reason::Withdrawn | Reason::Settled);
        if was_granted && !held.contains(id) {
            changes.push((ChangeKind::Granted, *at));
        }
        match reason {
            Reason::Withdrawn if waited.contains(id) => changes.push((ChangeKind::LeftQueue, *at)),
            Reason::Withdrawn | Reason::Settled => {}
            Reason::Released => changes.push((ChangeKind::Released, *at)),
            Reason::Revoked => changes.push((ChangeKind::Revoked, *at)),
            // The lapse has been reported.
            Reason::Displaced if has_lapsed => {}
            Reason::Displaced => changes.push((ChangeKind::Lapsed, *at)),
        }
    }
    let gone: HashSet<LeaseId> = after.record.departures.iter().map(|departure| departure.id).collect();
    // Ids that are gone without a departure: a record forgets departures, and a deleted record has
    // none.
    let vanished = held.iter().filter(|id| !holds.contains(id) && !gone.contains(id));
    changes.extend(vanished.map(|_| (ChangeKind::Released, after.now)));
    let left = waited.iter().filter(|id| !waits.contains(id) && !holds.contains(id) && !gone.contains(id));
    changes.extend(left.map(|_| (ChangeKind::LeftQueue, after.now)));

    let granted = after.record.holders.iter().filter(|holder| !held.contains(&holder.id));
    changes.extend(granted.map(|holder| (ChangeKind::Granted, holder.acquired_at)));
    let queued = after.record.waiters.iter().filter(|waiter| !waited.contains(&waiter.acquisition.id));
    changes.extend(queued.map(|waiter| (ChangeKind::Queued, waiter.since)));

    match (has_lapsed, after.state()) {
        (false, State::Lapsed) if before.is_some() => changes.push((ChangeKind::Lapsed, after.now)),
        // A holder that was there before is live again, because a touch renewed its lapsed lease.
        (true, State::Held) if holds.is_subset(&held) => changes.push((ChangeKind::Granted, after.now)),
        _ => {}
    }
    changes
}

type Ids = HashSet<LeaseId>;

/// Returns the ids of the holders, of the waiters and of the departures.
fn ids(record: &Record) -> (Ids, Ids, Ids) {
    (
        record.holders.iter().map(|holder| holder.id).collect(),
        record.waiters.iter().map(|waiter| waiter.acquisition.id).collect(),
        record.departures.iter().map(|departure| departure.id).collect(),
    )
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use super::ChangeKind::{Granted, Lapsed, LeftQueue, Queued, Released, Revoked};
    use super::*;
    use crate::lease::{Acquisition, Edit, Key, Rules, step};

    const RULES: Rules = Rules { grace: Duration::ZERO, waiter_ttl: Duration::from_secs(15) };

    /// A key and what was seen of it last.
    struct Watched {
        record: Record,
        seen: Option<Record>,
        has_lapsed: bool,
        now: i64,
    }

    fn id(number: u8) -> LeaseId {
        LeaseId::from([number; 16])
    }

    fn acquire(number: u8) -> Edit {
        Edit::default().enqueue(Arc::new(Acquisition::waiting(id(number))))
    }

    impl Watched {
        fn new() -> Self {
            let record = Record::vacant(Key::try_from("key").expect("a key"));
            Self { record, seen: None, has_lapsed: false, now: 1_000_000 }
        }

        fn apply(&mut self, edit: &Edit) -> &mut Self {
            self.record = step(self.record.clone(), edit, Timestamp(self.now), &RULES);
            self
        }

        fn pass(&mut self, millis: i64) -> &mut Self {
            self.now += millis;
            self
        }

        fn observe(&mut self) -> Vec<ChangeKind> {
            let after = Snapshot { record: self.record.clone(), now: Timestamp(self.now) };
            let before = self.seen.as_ref().map(|record| Previous { record, has_lapsed: self.has_lapsed });
            let found = changes(before, &after).into_iter().map(|(kind, _)| kind).collect();
            self.has_lapsed = after.state() == State::Lapsed;
            self.seen = Some(after.record);
            found
        }
    }

    #[test]
    fn each_kind_of_change_is_reported() {
        let mut key = Watched::new();
        assert_eq!(key.apply(&acquire(1)).observe(), [Granted]);
        assert_eq!(key.apply(&Edit::default().touch(id(1))).observe(), []);
        assert_eq!(key.apply(&acquire(2)).observe(), [Queued]);
        assert_eq!(key.apply(&acquire(2)).observe(), [], "the waiter's entry is refreshed");
        assert_eq!(key.apply(&acquire(3)).observe(), [Queued]);
        assert_eq!(key.apply(&Edit::default().cancel(id(2))).observe(), [LeftQueue]);
        assert_eq!(key.apply(&Edit::default().release(id(1))).observe(), [Released, Granted]);
        assert_eq!(key.apply(&Edit::default().revoke(id(3))).observe(), [Revoked]);
    }

    #[test]
    fn a_release_of_an_id_that_never_held_is_not_reported_as_released() {
        let mut key = Watched::new();
        key.apply(&acquire(1)).apply(&acquire(2)).observe();
        assert_eq!(key.apply(&Edit::default().release(id(2))).observe(), [LeftQueue]);
        assert_eq!(key.apply(&Edit::default().release(id(3))).observe(), [], "the id is unknown");
    }

    #[test]
    fn a_lapse_is_reported_once() {
        let mut key = Watched::new();
        key.apply(&acquire(1)).observe();
        assert_eq!(key.pass(999).observe(), []);
        assert_eq!(key.pass(1).observe(), [Lapsed]);
        assert_eq!(key.pass(1000).observe(), []);
        assert_eq!(key.apply(&Edit::default().touch(id(1))).observe(), [Granted], "live again");
        assert_eq!(key.pass(1000).observe(), [Lapsed]);
        assert_eq!(key.apply(&acquire(2)).observe(), [Granted], "the lapse was reported before");
    }

    #[test]
    fn a_deleted_record_releases_the_lease_and_empties_the_queue() {
        let mut key = Watched::new();
        key.apply(&acquire(1)).apply(&acquire(2)).observe();
        key.record = Record::vacant(key.record.key.clone());
        assert_eq!(key.observe(), [Released, LeftQueue]);
    }

    #[test]
    fn a_lease_that_was_granted_and_ended_between_two_states_is_reported() {
        let mut key = Watched::new();
        key.apply(&acquire(1)).observe();
        key.apply(&Edit::default().release(id(1))).apply(&acquire(2)).apply(&Edit::default().release(id(2)));
        key.apply(&acquire(3)).pass(1000).apply(&acquire(4));
        assert_eq!(key.observe(), [Released, Granted, Released, Granted, Lapsed, Granted]);
        assert_eq!(key.observe(), []);
    }
}
