//! What happened to a key between two looks at its record.
//!
//! A record tells more than its present state: who departed lately, and why. So a lease that came and went between two
//! looks is not overlooked, as long as no more departed than a record remembers.

use std::collections::HashSet;

use crate::lease::{Departure, LeaseId, Reason, Record, Snapshot, State, Timestamp};

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ChangeKind {
    /// A lease was granted; or one that had lapsed was touched back to life.
    Granted,
    /// A lease was given back; or it is gone, and nobody remembers how.
    Released,
    /// The holders' time ran out.
    Lapsed,
    /// A lease was taken away.
    Revoked,
    /// Someone joined the line.
    Queued,
    /// Someone left the line without a lease.
    LeftQueue,
}

/// A change, and when it happened by the store's clock, as far as that is known.
pub(crate) type Change = (ChangeKind, Timestamp);

/// An earlier look.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Before<'a> {
    pub(crate) record: &'a Record,
    /// It has been told that the holders' time ran out.
    pub(crate) has_lapsed: bool,
}

/// The changes from `before` to `after`, in the order in which they happened. Without a look before, nobody held or
/// waited.
pub(crate) fn changes(before: Option<Before<'_>>, after: &Snapshot) -> Vec<Change> {
    let (held, waited, departed) = before.map(|before| ids(before.record)).unwrap_or_default();
    let (holds, waits, _) = ids(&after.record);
    let has_lapsed = before.is_some_and(|before| before.has_lapsed);
    let mut changes = Vec::new();

    let news = after.record.departures.iter().rev().filter(|departure| !departed.contains(&departure.id));
    for Departure { id, reason, at, .. } in news {
        let was_granted = !matches!(reason, Reason::Withdrawn | Reason::Settled);
        if was_granted && !held.contains(id) {
            changes.push((ChangeKind::Granted, *at));
        }
        match reason {
            Reason::Withdrawn if waited.contains(id) => changes.push((ChangeKind::LeftQueue, *at)),
            Reason::Withdrawn | Reason::Settled => {}
            Reason::Released => changes.push((ChangeKind::Released, *at)),
            Reason::Revoked => changes.push((ChangeKind::Revoked, *at)),
            Reason::Displaced if has_lapsed => {}
            Reason::Displaced => changes.push((ChangeKind::Lapsed, *at)),
        }
    }
    let gone: HashSet<LeaseId> = after.record.departures.iter().map(|departure| departure.id).collect();
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
        (true, State::Held) if holds.is_subset(&held) => changes.push((ChangeKind::Granted, after.now)),
        _ => {}
    }
    changes
}

type Ids = HashSet<LeaseId>;

/// Who holds, who waits, and who departed.
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

    const RULES: Rules = Rules { grace: Duration::ZERO, place: Duration::from_secs(15) };

    /// A key that is looked at now and then.
    struct Watched {
        record: Record,
        seen: Option<Record>,
        has_lapsed: bool,
        now: i64,
    }

    fn id(number: u8) -> LeaseId {
        LeaseId::from([number; 16])
    }

    fn ask(number: u8) -> Edit {
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

        fn passes(&mut self, millis: i64) -> &mut Self {
            self.now += millis;
            self
        }

        fn look(&mut self) -> Vec<ChangeKind> {
            let after = Snapshot { record: self.record.clone(), now: Timestamp(self.now) };
            let before = self.seen.as_ref().map(|record| Before { record, has_lapsed: self.has_lapsed });
            let found = changes(before, &after).into_iter().map(|(kind, _)| kind).collect();
            self.has_lapsed = after.state() == State::Lapsed;
            self.seen = Some(after.record);
            found
        }
    }

    #[test]
    fn each_change_has_its_name() {
        let mut key = Watched::new();
        assert_eq!(key.apply(&ask(1)).look(), [Granted]);
        assert_eq!(key.apply(&Edit::default().touch(id(1))).look(), []);
        assert_eq!(key.apply(&ask(2)).look(), [Queued]);
        assert_eq!(key.apply(&ask(2)).look(), [], "a place refreshed");
        assert_eq!(key.apply(&ask(3)).look(), [Queued]);
        assert_eq!(key.apply(&Edit::default().cancel(id(2))).look(), [LeftQueue]);
        assert_eq!(key.apply(&Edit::default().release(id(1))).look(), [Released, Granted]);
        assert_eq!(key.apply(&Edit::default().revoke(id(3))).look(), [Revoked]);
    }

    #[test]
    fn a_release_of_what_was_never_granted_is_no_end_of_a_lease() {
        let mut key = Watched::new();
        key.apply(&ask(1)).apply(&ask(2)).look();
        assert_eq!(key.apply(&Edit::default().release(id(2))).look(), [LeftQueue]);
        assert_eq!(key.apply(&Edit::default().release(id(3))).look(), [], "nobody knows it");
    }

    #[test]
    fn time_alone_is_a_change_that_is_told_once() {
        let mut key = Watched::new();
        key.apply(&ask(1)).look();
        assert_eq!(key.passes(999).look(), []);
        assert_eq!(key.passes(1).look(), [Lapsed]);
        assert_eq!(key.passes(1000).look(), []);
        assert_eq!(key.apply(&Edit::default().touch(id(1))).look(), [Granted], "back to life");
        assert_eq!(key.passes(1000).look(), [Lapsed]);
        assert_eq!(key.apply(&ask(2)).look(), [Granted], "its place was taken");
    }

    #[test]
    fn a_record_that_is_deleted_frees_the_key() {
        let mut key = Watched::new();
        key.apply(&ask(1)).apply(&ask(2)).look();
        key.record = Record::vacant(key.record.key.clone());
        assert_eq!(key.look(), [Released, LeftQueue]);
    }

    #[test]
    fn what_came_and_went_between_two_looks_is_told() {
        let mut key = Watched::new();
        key.apply(&ask(1)).look();
        key.apply(&Edit::default().release(id(1))).apply(&ask(2)).apply(&Edit::default().release(id(2)));
        key.apply(&ask(3)).passes(1000).apply(&ask(4));
        assert_eq!(key.look(), [Released, Granted, Released, Granted, Lapsed, Granted]);
        assert_eq!(key.look(), []);
    }
}
