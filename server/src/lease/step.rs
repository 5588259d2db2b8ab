//! The specification: how an edit changes a record at one instant.

use std::sync::Arc;
use std::time::Duration;

use super::{
    Acquisition, Departure, Edit, FencingToken, Holder, LeaseId, Mode, Reason, Record, Timestamp, Waiter,
};

/// The newest departures, which a record remembers in any case.
pub const REMEMBERED_DEPARTURES: usize = 8;
/// How long a record remembers departures that are lasting: longer than any command may be under way.
pub const MEMORY: Duration = Duration::from_secs(60);
/// A record with this many lasting departures notes no others as lasting. The room is counted once for each edit, so a
/// single edit of many may go past it.
pub const LASTING_DEPARTURES: usize = 1024;
/// How many of the lasting departures may be [`Reason::Settled`]. Anyone can release ids that nobody uses, and the room that
/// is left belongs to leases that were revoked or displaced: a late command would bring those back.
pub const SETTLED_DEPARTURES: usize = LASTING_DEPARTURES / 2;
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
/// Three parts in this order: *edit* (touch, release, revoke, unblock, cancel, refresh, enqueue), *admit* (the head of
/// the line, while it fits), *finish* (those who came only to try leave; ids are kept out; `rev` rises).
#[must_use]
pub fn step(mut record: Record, edit: &Edit, now: Timestamp, rules: &Rules) -> Record {
    let room = Room::of(&record, now);
    touch(&mut record, edit, now);
    let mut gone = depart(&mut record, edit, now, room);
    record.blocked_until.take_if(|until| edit.unblocks(*until));
    record.waiters.retain(|waiter| !edit.cancels(waiter.acquisition.id));
    enqueue(&mut record, edit, &gone, now, rules.place);

    gone.splice(0..0, admit(&mut record, now, rules.grace, room));
    gone.extend(kept_out(&record, edit, &gone, now, room));

    remember(&mut record, edit, gone, now);
    record.waiters.retain(|waiter| waiter.acquisition.wait);
    record.rev += 1;
    record
}

/// How many more departures a record can note as lasting.
#[derive(Debug, Clone, Copy)]
struct Room {
    all: usize,
    /// Those of ids that are not known.
    settled: usize,
}

impl Room {
    fn of(record: &Record, now: Timestamp) -> Self {
        let (mut lasting, mut settled) = (0, 0);
        for departure in record.departures.iter().filter(|departure| lasts(departure, now)) {
            lasting += 1;
            settled += usize::from(departure.reason == Reason::Settled);
        }
        let all = LASTING_DEPARTURES.saturating_sub(lasting);
        Self { all, settled: all.min(SETTLED_DEPARTURES.saturating_sub(settled)) }
    }
}

/// Extends what is held. Never shortens: the clock may have stepped back.
fn touch(record: &mut Record, edit: &Edit, now: Timestamp) {
    for holder in &mut record.holders {
        if edit.touches(holder.id) {
            renew(holder, now);
        }
    }
}

fn renew(holder: &mut Holder, now: Timestamp) {
    holder.expires_at = holder.expires_at.max(now + holder.ttl.get());
}

/// Removes the released and the revoked and returns them, newest first. Releasing early does not end `min_hold`.
///
/// A released id that is not known is noted too, while there is room: an acquire with it that comes later must find it
/// settled. Most departures are lasting. The exception is the common one, a holder that was asked for once and gives
/// its lease back: no other command can name its id.
fn depart(record: &mut Record, edit: &Edit, now: Timestamp, room: Room) -> Vec<Departure> {
    let released = take(&mut record.holders, |holder| edit.releases(holder.id));
    let revoked = take(&mut record.holders, |holder| edit.revokes(holder.id));
    let is_withdrawn = |waiter: &mut Waiter| edit.releases(waiter.acquisition.id);
    let withdrawn: Vec<Waiter> = record.waiters.extract_if(.., is_withdrawn).collect();
    // A holder without a `min_hold` blocks nobody, also if its `acquired_at` is ahead of a clock that stepped back.
    let held_for = released.iter().filter(|holder| !holder.min_hold.is_zero());
    let held_for = held_for.map(|holder| Some(holder.acquired_at + holder.min_hold));
    record.blocked_until = held_for.chain([record.blocked_until]).max().flatten();

    let note =
        |id, reason, lasting: bool| Departure { id, reason, at: now, lasting: lasting && room.all > 0 };
    let mut gone: Vec<Departure> =
        revoked.iter().map(|holder| note(holder.id, Reason::Revoked, true)).collect();
    gone.extend(released.iter().map(|Holder { id, repeated, .. }| {
        note(*id, Reason::Released, *repeated || edit.lasting().has(*id))
    }));
    gone.extend(withdrawn.iter().map(|waiter| note(waiter.acquisition.id, Reason::Withdrawn, true)));
    let known = |id: LeaseId| gone.iter().chain(&record.departures).any(|departure| departure.id == id);
    let unknown = edit.released().iter().filter(|id| !known(**id)).take(room.settled);
    let settled: Vec<Departure> = unknown.map(|id| note(*id, Reason::Settled, true)).collect();
    gone.extend(settled);
    gone
}

/// Appends those the record does not know, if it has room for more, refreshes the places of those in line, and renews
/// what is held. A full record takes nobody; instead it loses the places that have lapsed, so that a later attempt finds
/// room.
///
/// Whoever departed does not come back: a late duplicate of an old call must not become a ghost. Nothing changes for an
/// id that is in use with another mode or limit.
fn enqueue(record: &mut Record, edit: &Edit, gone: &[Departure], now: Timestamp, place: Duration) {
    for holder in &mut record.holders {
        if edit.asks(holder.id, holder.mode, holder.shared_limit) {
            renew(holder, now);
            holder.repeated = true;
        }
    }
    for waiter in &mut record.waiters {
        let Acquisition { id, mode, shared_limit, repeated, .. } = *waiter.acquisition;
        let is_asked = edit.asks(id, mode, shared_limit);
        if is_asked || edit.refreshes(id) {
            waiter.expires_at = waiter.expires_at.max(now + place);
        }
        if is_asked && !repeated {
            Arc::make_mut(&mut waiter.acquisition).repeated = true;
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
fn admit(record: &mut Record, now: Timestamp, grace: Duration, room: Room) -> Vec<Departure> {
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
    let note =
        |Holder { id, .. }| Departure { id, reason: Reason::Displaced, at: now, lasting: room.all > 0 };
    displaced.into_iter().map(note).collect()
}

/// The ids to be kept out, but for those that are in use and those that are over anyway, as far as there is room.
fn kept_out(record: &Record, edit: &Edit, gone: &[Departure], now: Timestamp, room: Room) -> Vec<Departure> {
    let is_unknown = |id: &&LeaseId| {
        !record.holders.iter().any(|holder| holder.id == **id)
            && !record.waiters.iter().any(|waiter| waiter.acquisition.id == **id)
            && !record.departures.iter().chain(gone).any(|departure| departure.id == **id)
    };
    let note = |id: &LeaseId| Departure { id: *id, reason: Reason::Settled, at: now, lasting: true };
    edit.kept_out().iter().filter(is_unknown).take(room.settled).map(note).collect()
}

/// Puts what has gone before the departures, and forgets some of the others: not the newest, not those that the edit
/// names, since it may be applied again, and not those that last.
fn remember(record: &mut Record, edit: &Edit, gone: Vec<Departure>, now: Timestamp) {
    if gone.is_empty() {
        return;
    }
    let newest = gone.len().max(REMEMBERED_DEPARTURES);
    record.departures.splice(0..0, gone);
    let mut place = 0;
    record.departures.retain(|departure| {
        place += 1;
        place <= newest || lasts(departure, now) || edit.names(departure.id)
    });
}

fn lasts(departure: &Departure, now: Timestamp) -> bool {
    departure.lasting && now < departure.at + MEMORY
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
        shared_limit: acquisition.shared_limit,
        repeated: acquisition.repeated,
    }
}

/// Whether the head of the line may be admitted beside those who hold. A limit binds those who come later, too: nobody
/// who holds with a limit of five is ever one of six.
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
                let limits = shared.iter().map(|holder| holder.shared_limit);
                let limit = limits.fold(head.shared_limit, u32::min);
                exclusive.is_empty() && shared.len() < limit as usize
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
