//! The specification: how an edit changes a record at one instant.

use std::sync::Arc;
use std::time::Duration;

use super::{Acquisition, Departure, Edit, FencingToken, Holder, Mode, Reason, Record, Timestamp, Waiter};

/// Departures a record remembers at least; those of its latest edit are all there, however many.
pub const REMEMBERED_DEPARTURES: usize = 8;
/// A line this long takes no more.
pub const MAX_WAITERS: usize = 1024;
/// A record this large, as [`Record::size`] counts, takes no more.
pub const MAX_RECORD_BYTES: usize = 1024 * 1024;
/// Shared holders a key can have: the highest [`Acquisition::shared_limit`].
pub const MAX_SHARED_HOLDERS: u32 = 1024;

/// The durations the rules are given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rules {
    /// A lease may be taken from its holder only this long after it ran out: it covers the difference between the
    /// clocks of the store's nodes.
    pub grace: Duration,
    /// How long a place in line lasts without a refresh.
    pub place: Duration,
}

/// The record after `edit` at `now`, an instant of the store's clock.
///
/// Three parts in this order: *edit* (touch, release, revoke, cancel, enqueue), *admit* (the head of the line, while
/// it fits), *finish* (those who came only to try leave; `rev` rises).
#[must_use]
pub fn step(mut record: Record, edit: &Edit, now: Timestamp, rules: &Rules) -> Record {
    touch(&mut record, edit, now);
    let mut gone = depart(&mut record, edit, now);
    record.waiters.retain(|waiter| !edit.cancels(waiter.acquisition.id));
    enqueue(&mut record, edit, &gone, now, rules.place);

    gone.splice(0..0, admit(&mut record, now, rules.grace));

    let remembered = gone.len().max(REMEMBERED_DEPARTURES);
    record.departures.splice(0..0, gone);
    record.departures.truncate(remembered);
    record.waiters.retain(|waiter| waiter.acquisition.wait);
    record.rev += 1;
    record
}

/// Extends what is held. Never shortens: the clock may have stepped back.
fn touch(record: &mut Record, edit: &Edit, now: Timestamp) {
    for holder in &mut record.holders {
        if edit.touches(holder.id) {
            holder.expires_at = holder.expires_at.max(now + holder.ttl.get());
        }
    }
}

/// Removes the released and the revoked and returns them, newest first. Releasing early does not end `min_hold`.
fn depart(record: &mut Record, edit: &Edit, now: Timestamp) -> Vec<Departure> {
    let released = take(&mut record.holders, |holder| edit.releases(holder.id));
    let revoked = take(&mut record.holders, |holder| edit.revokes(holder.token));
    // Without a `min_hold` there is nothing to wait for, and a clock that stepped back must not make it so.
    let held_for = released.iter().filter(|holder| !holder.min_hold.is_zero());
    let held_for = held_for.map(|holder| Some(holder.acquired_at + holder.min_hold));
    record.blocked_until = held_for.chain([record.blocked_until]).max().flatten();
    let mut gone = note(&revoked, Reason::Revoked, now);
    gone.extend(note(&released, Reason::Released, now));
    gone
}

/// Appends those the record does not know, if it has room for more, and refreshes the places of those in line. A
/// full record takes nobody; instead it loses the places that have lapsed, so that a later attempt finds room.
///
/// Whoever departed does not come back: a late duplicate of an old call must not become a ghost.
fn enqueue(record: &mut Record, edit: &Edit, gone: &[Departure], now: Timestamp, place: Duration) {
    for waiter in &mut record.waiters {
        if edit.enqueues(waiter.acquisition.id) {
            waiter.expires_at = waiter.expires_at.max(now + place);
        }
    }
    let unknown = |acquisition: &&Arc<Acquisition>| {
        let id = acquisition.id;
        !record.holders.iter().any(|holder| holder.id == id)
            && !record.waiters.iter().any(|waiter| waiter.acquisition.id == id)
            && !record.departures.iter().chain(gone).any(|departure| departure.id == id)
    };
    let stand = |acquisition: &Arc<Acquisition>| Waiter {
        acquisition: Arc::clone(acquisition),
        since: now,
        expires_at: now + place,
    };
    let arrivals: Vec<Waiter> = edit.enqueued().iter().filter(unknown).map(stand).collect();
    if arrivals.is_empty() {
        return;
    }
    if record.waiters.len() < MAX_WAITERS && record.size() < MAX_RECORD_BYTES {
        record.waiters.extend(arrivals);
    } else {
        record.waiters.retain(|waiter| now < waiter.expires_at);
    }
}

/// Admits from the head of the line while it fits, and returns the holders whose place was taken. A head that fits
/// but whose place has lapsed leaves instead.
fn admit(record: &mut Record, now: Timestamp, grace: Duration) -> Vec<Departure> {
    let mut left_line = 0;
    let mut displaced = Vec::new();
    for waiter in &record.waiters {
        if !fits(&waiter.acquisition, &record.holders, record.blocked_until, now, grace) {
            break;
        }
        left_line += 1;
        if waiter.expires_at <= now {
            continue;
        }
        displaced.extend(take(&mut record.holders, |holder| !is_live(holder, now, grace)));
        record.token = FencingToken(record.token.0.saturating_add(1).max(now.0));
        record.holders.push(grant(&waiter.acquisition, record.token, now));
    }
    record.waiters.drain(..left_line);
    note(&displaced, Reason::Displaced, now)
}

fn grant(acquisition: &Acquisition, token: FencingToken, now: Timestamp) -> Holder {
    Holder {
        id: acquisition.id,
        owner: acquisition.owner.clone(),
        metadata: acquisition.metadata.clone(),
        mode: acquisition.mode,
        ttl: acquisition.ttl,
        token,
        acquired_at: now,
        expires_at: now + acquisition.ttl.get(),
        min_hold: acquisition.min_hold,
    }
}

/// Whether the head of the line may be admitted beside those who hold.
pub(super) fn fits(
    head: &Acquisition,
    holders: &[Holder],
    blocked_until: Option<Timestamp>,
    now: Timestamp,
    grace: Duration,
) -> bool {
    let mut live = holders.iter().filter(|holder| is_live(holder, now, grace));
    blocked_until <= Some(now)
        && match head.mode {
            Mode::Exclusive => live.next().is_none(),
            Mode::Shared => {
                let (exclusive, shared): (Vec<_>, Vec<_>) =
                    live.partition(|holder| holder.mode == Mode::Exclusive);
                exclusive.is_empty() && shared.len() < head.shared_limit as usize
            }
        }
}

/// Whether nobody may take the holder's place yet.
pub(super) fn is_live(holder: &Holder, now: Timestamp, grace: Duration) -> bool {
    now < holder.expires_at + grace
}

fn take(holders: &mut Vec<Holder>, mut which: impl FnMut(&Holder) -> bool) -> Vec<Holder> {
    holders.extract_if(.., |holder| which(holder)).collect()
}

fn note(gone: &[Holder], reason: Reason, at: Timestamp) -> Vec<Departure> {
    gone.iter().map(|holder| Departure { id: holder.id, reason, at }).collect()
}
