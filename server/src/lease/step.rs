//! The specification: how an edit changes a record at one instant.
//!
//! The MongoDB store's pipeline has the same rules. A rule changes here first and then there.

use std::sync::Arc;
use std::time::Duration;

use super::{
    Acquisition, Departure, Edit, FencingToken, Holder, LeaseId, Mode, Reason, Record, Timestamp, Waiter,
};

/// A record remembers at least this many departures, the newest ones.
pub const REMEMBERED_DEPARTURES: usize = 8;
/// How long a record remembers a lasting departure: longer than any command can be under way.
pub const MEMORY: Duration = Duration::from_secs(60);
/// In a record with this many lasting departures, new ones do not last, and new settled ones are
/// not noted. They are counted once, before the edit, so a single large edit may exceed this number
/// and [`SETTLED_DEPARTURES`].
pub const LASTING_DEPARTURES: usize = 1024;
/// At most this many of the lasting departures are [`Reason::Settled`], because anyone can release
/// unused ids. The other half is left to other reasons, such as a revocation: if such a departure
/// were forgotten, a late command could be granted the lease again.
pub const SETTLED_DEPARTURES: usize = LASTING_DEPARTURES / 2;
/// A queue with this many waiters accepts no more.
pub const MAX_WAITERS: usize = 1024;
/// A record of this size, as [`Record::size`] counts it, accepts no more waiters.
pub const MAX_RECORD_BYTES: usize = 1024 * 1024;
/// How many shared holders a key can have: the highest [`Acquisition::shared_limit`].
pub const MAX_SHARED_HOLDERS: u32 = 1024;

/// The durations that an operator or a store chooses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rules {
    /// How long a lapsed lease stays safe from displacement. Covers the difference between the
    /// clocks of the store's nodes.
    pub grace: Duration,
    /// How long a waiter's entry lasts after it entered the queue and after each refresh.
    pub waiter_ttl: Duration,
}

/// Returns the record after `edit` at `now`, an instant of the store's clock.
///
/// There are three phases, in this order:
/// 1. *Edit*: touch, release, revoke, unblock, cancel, refresh, enqueue.
/// 2. *Admit*: grant the head of the queue, while it fits.
/// 3. *Finish*: acquisitions that do not wait leave the queue, ids are kept out, and `rev` rises.
#[must_use]
pub fn step(mut record: Record, edit: &Edit, now: Timestamp, rules: &Rules) -> Record {
    let capacity = Capacity::of(&record, now);
    touch(&mut record, edit, now);
    let mut departed = depart(&mut record, edit, now, capacity);
    record.blocked_until.take_if(|until| edit.unblocks(*until));
    record.waiters.retain(|waiter| !edit.cancels(waiter.acquisition.id));
    enqueue(&mut record, edit, &departed, now, rules.waiter_ttl);

    // The newest first. The order must be the pipeline's, because the differential test compares
    // whole records.
    departed.splice(0..0, admit(&mut record, now, rules.grace, capacity));
    departed.extend(kept_out(&record, edit, &departed, now, capacity));

    remember(&mut record, edit, departed, now);
    // Last: even an acquisition that does not wait is granted from the queue.
    record.waiters.retain(|waiter| waiter.acquisition.wait);
    record.rev += 1;
    record
}

/// How many more lasting departures a record can note.
#[derive(Debug, Clone, Copy)]
struct Capacity {
    /// Departures of any reason.
    all: usize,
    /// Departures of the reason [`Reason::Settled`].
    settled: usize,
}

impl Capacity {
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

/// Renews the leases that the edit touches.
fn touch(record: &mut Record, edit: &Edit, now: Timestamp) {
    for holder in &mut record.holders {
        if edit.touches(holder.id) {
            renew(holder, now);
        }
    }
}

fn renew(holder: &mut Holder, now: Timestamp) {
    // The clock may have stepped back, and a touch never shortens a lease.
    holder.expires_at = holder.expires_at.max(now + holder.ttl.get());
}

/// Removes the ids that the edit releases or revokes, and returns their departures, the newest
/// first.
///
/// A released id that the record does not know departs as well, while there is capacity: an acquire
/// that arrives later must find that the id has ended.
fn depart(record: &mut Record, edit: &Edit, now: Timestamp, capacity: Capacity) -> Vec<Departure> {
    let released = extract(&mut record.holders, |holder| edit.releases(holder.id));
    let revoked = extract(&mut record.holders, |holder| edit.revokes(holder.id));
    let is_withdrawn = |waiter: &mut Waiter| edit.releases(waiter.acquisition.id);
    let withdrawn: Vec<Waiter> = record.waiters.extract_if(.., is_withdrawn).collect();
    // An early release does not end the `min_hold`; a revocation does. A holder without a
    // `min_hold` must not block at all: after the clock stepped back, even its `acquired_at` may
    // lie in the future.
    let held_for = released.iter().filter(|holder| !holder.min_hold.is_zero());
    let held_for = held_for.map(|holder| Some(holder.acquired_at + holder.min_hold));
    record.blocked_until = held_for.chain([record.blocked_until]).max().flatten();

    let can_last = capacity.all > 0;
    let departure = |id, reason| Departure { id, reason, at: now, lasting: can_last };
    let mut departed: Vec<Departure> =
        revoked.iter().map(|holder| departure(holder.id, Reason::Revoked)).collect();
    // The most common departure is not lasting, which keeps records small: if the lease was asked
    // for only once, no command under way can still ask for its id.
    departed.extend(released.iter().map(|Holder { id, repeated, .. }| {
        let lasting = can_last && (*repeated || edit.lasting().has(*id));
        Departure { lasting, ..departure(*id, Reason::Released) }
    }));
    departed.extend(withdrawn.iter().map(|waiter| departure(waiter.acquisition.id, Reason::Withdrawn)));
    let is_known =
        |id: LeaseId| departed.iter().chain(&record.departures).any(|departure| departure.id == id);
    let unknown = edit.released().iter().filter(|id| !is_known(**id)).take(capacity.settled);
    let settled: Vec<Departure> = unknown.map(|id| departure(*id, Reason::Settled)).collect();
    departed.extend(settled);
    departed
}

/// Applies the acquisitions and refreshes of the edit: renews leases and waiter entries, and
/// appends new waiters.
///
/// An id that has departed does not enter the queue, because a late duplicate of an old call must
/// not acquire the lease again. Nothing changes for an id that holds or waits with another mode or
/// limit.
fn enqueue(record: &mut Record, edit: &Edit, departed: &[Departure], now: Timestamp, waiter_ttl: Duration) {
    for holder in &mut record.holders {
        if edit.asks(holder.id, holder.mode, holder.shared_limit) {
            // A caller that repeats an acquire counts the TTL from the repetition, so the lease
            // must last that long.
            renew(holder, now);
            holder.repeated = true;
        }
    }
    for waiter in &mut record.waiters {
        let Acquisition { id, mode, shared_limit, repeated, .. } = *waiter.acquisition;
        let is_asked = edit.asks(id, mode, shared_limit);
        if is_asked || edit.refreshes(id) {
            waiter.expires_at = waiter.expires_at.max(now + waiter_ttl);
        }
        if is_asked && !repeated {
            Arc::make_mut(&mut waiter.acquisition).repeated = true;
        }
    }
    let is_unknown = |acquisition: &&Arc<Acquisition>| {
        let id = acquisition.id;
        !record.holders.iter().any(|holder| holder.id == id)
            && !record.waiters.iter().any(|waiter| waiter.acquisition.id == id)
            && !record.departures.iter().chain(departed).any(|departure| departure.id == id)
    };
    let to_waiter = |acquisition: &Arc<Acquisition>| Waiter {
        acquisition: Arc::clone(acquisition),
        since: now,
        expires_at: now + waiter_ttl,
    };
    let arrivals: Vec<Waiter> = edit.enqueued().iter().filter(is_unknown).map(to_waiter).collect();
    if arrivals.is_empty() {
        return;
    }
    if record.waiters.len() < MAX_WAITERS && record.size() < MAX_RECORD_BYTES {
        record.waiters.extend(arrivals);
    } else {
        // A full record accepts no waiter. It drops its lapsed entries, so that the waiters of dead
        // daemons cannot keep it full for good.
        record.waiters.retain(|waiter| now < waiter.expires_at);
    }
}

/// Grants leases from the head of the queue while the head fits. A head that fits but has lapsed
/// leaves the queue without a grant. Returns the departures of the holders that were displaced.
fn admit(record: &mut Record, now: Timestamp, grace: Duration, capacity: Capacity) -> Vec<Departure> {
    let mut left_queue = 0;
    let mut displaced = Vec::new();
    for waiter in &record.waiters {
        if !fits(&waiter.acquisition, &record.holders, record.blocked_until, now, grace) {
            break;
        }
        left_queue += 1;
        if waiter.expires_at <= now {
            continue;
        }
        // Displaces every holder whose grace is over, shared ones too: a later touch could revive
        // them, and there would be more holders than the limit.
        displaced.extend(extract(&mut record.holders, |holder| !is_live(holder, now, grace)));
        // A token is at least the time of its grant, so that tokens keep rising after a purge of
        // the record.
        record.token = FencingToken(record.token.0.saturating_add(1).max(now.0));
        record.holders.push(grant(&waiter.acquisition, record.token, now));
    }
    record.waiters.drain(..left_queue);
    let note =
        |Holder { id, .. }| Departure { id, reason: Reason::Displaced, at: now, lasting: capacity.all > 0 };
    displaced.into_iter().map(note).collect()
}

/// Returns departures for the ids that the edit keeps out, while there is capacity. Ids that hold,
/// wait or have ended already get none.
fn kept_out(
    record: &Record,
    edit: &Edit,
    departed: &[Departure],
    now: Timestamp,
    capacity: Capacity,
) -> Vec<Departure> {
    let is_unknown = |id: &&LeaseId| {
        !record.holders.iter().any(|holder| holder.id == **id)
            && !record.waiters.iter().any(|waiter| waiter.acquisition.id == **id)
            && !record.departures.iter().chain(departed).any(|departure| departure.id == **id)
    };
    let note = |id: &LeaseId| Departure { id: *id, reason: Reason::Settled, at: now, lasting: true };
    edit.kept_out().iter().filter(is_unknown).take(capacity.settled).map(note).collect()
}

/// Adds new departures to the record and forgets old ones. The newest departures and the lasting
/// ones stay, and so do those that the edit names, because the edit may be applied again.
fn remember(record: &mut Record, edit: &Edit, departed: Vec<Departure>, now: Timestamp) {
    if departed.is_empty() {
        return;
    }
    // Each departure makes the record larger and its commits slower. So a record remembers only the
    // ids that a retry may ask for.
    let newest = departed.len().max(REMEMBERED_DEPARTURES);
    record.departures.splice(0..0, departed);
    let mut position = 0;
    record.departures.retain(|departure| {
        position += 1;
        position <= newest || lasts(departure, now) || edit.names(departure.id)
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

/// Returns true if the head of the queue may hold the key together with the present holders.
pub(super) fn fits(
    head: &Acquisition,
    holders: &[Holder],
    blocked_until: Option<Timestamp>,
    now: Timestamp,
    grace: Duration,
) -> bool {
    let mut live = holders.iter().filter(|holder| is_live(holder, now, grace));
    // `None` is less than any instant, so without a block this is true.
    blocked_until <= Some(now)
        && match head.mode {
            Mode::Exclusive => live.next().is_none(),
            Mode::Shared => {
                let (exclusive, shared): (Vec<_>, Vec<_>) =
                    live.partition(|holder| holder.mode == Mode::Exclusive);
                // The limits of the holders bind a newcomer too: a holder with a limit of five is
                // never one of six.
                let limits = shared.iter().map(|holder| holder.shared_limit);
                let limit = limits.fold(head.shared_limit, u32::min);
                exclusive.is_empty() && shared.len() < limit as usize
            }
        }
}

/// Returns true until the holder may be displaced.
pub(super) fn is_live(holder: &Holder, now: Timestamp, grace: Duration) -> bool {
    now < holder.expires_at + grace
}

/// Removes and returns the holders for which `which` is true.
fn extract(holders: &mut Vec<Holder>, mut which: impl FnMut(&Holder) -> bool) -> Vec<Holder> {
    holders.extract_if(.., |holder| which(holder)).collect()
}
