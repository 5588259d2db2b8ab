//! What a record says: the standing of an id, the obstacle to an acquisition, the state of the key,
//! and when the head of the queue may be admitted.

use std::time::Duration;

use super::step::{fits, is_live};
use super::{Acquisition, Holder, LeaseId, Mode, Reason, Record, Rules, Timestamp, Waiter};

/// A record as it was at an instant of the store's clock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// The record.
    pub record: Record,
    /// When the record was read or written.
    pub now: Timestamp,
}

/// What a record says about one lease id. Every command is answered from the standing of its id
/// after the commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing<'a> {
    /// The id holds a lease.
    Holder(&'a Holder),
    /// The id is in the queue, behind this many waiters whose entries have not lapsed.
    Waiter(usize),
    /// The id has ended, for this reason.
    Departed(Reason),
    /// The record does not have the id: it was refused, is no longer remembered, or was never asked
    /// for.
    Unknown,
}

/// Why an acquisition is not granted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Obstacle<'a> {
    /// No lease is granted before this instant: a lease with a `min_hold` was released early.
    MinHold(Timestamp),
    /// The key is held, and the holder or the acquisition is exclusive.
    Holder,
    /// The key has as many holders as allowed by the smallest `shared_limit` of the holders and the
    /// acquisition.
    Limit {
        /// How many holders there are, not counting those that may be displaced.
        holders: usize,
        /// The smallest limit.
        limit: u32,
    },
    /// The acquisition would fit, but this waiter is ahead of it in the queue.
    Waiter(&'a Waiter),
}

/// The state of a key, as callers see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// The key has no holder.
    Free,
    /// A holder's lease has not lapsed.
    Held,
    /// All leases have lapsed, and no other lease has been granted since.
    Lapsed,
}

impl Snapshot {
    /// Returns what the record says about `id`.
    #[must_use]
    pub fn standing(&self, id: LeaseId) -> Standing<'_> {
        let record = &self.record;
        if let Some(holder) = record.holders.iter().find(|holder| holder.id == id) {
            return Standing::Holder(holder);
        }
        if let Some(index) = record.waiters.iter().position(|waiter| waiter.acquisition.id == id) {
            let ahead = &record.waiters[..index];
            return Standing::Waiter(ahead.iter().filter(|waiter| self.has_not_lapsed(waiter)).count());
        }
        match record.departures.iter().find(|departure| departure.id == id) {
            Some(departure) => Standing::Departed(departure.reason),
            None => Standing::Unknown,
        }
    }

    /// Returns true if the id of `asked` holds or waits with another mode or limit.
    #[must_use]
    pub fn conflicts(&self, asked: &Acquisition) -> bool {
        let holders = self.record.holders.iter().map(|holder| (holder.id, holder.mode, holder.shared_limit));
        let waiters =
            self.record.waiters.iter().map(|Waiter { acquisition, .. }| {
                (acquisition.id, acquisition.mode, acquisition.shared_limit)
            });
        let mut same_id = holders.chain(waiters).filter(|(id, ..)| *id == asked.id);
        same_id.any(|(_, mode, shared_limit)| !asked.is_same(mode, shared_limit))
    }

    /// Returns why `asked` is not granted, or `None` if it could be granted now.
    #[must_use]
    pub fn obstacle(&self, asked: &Acquisition, rules: &Rules) -> Option<Obstacle<'_>> {
        let record = &self.record;
        if let Some(until) = record.blocked_until.filter(|until| *until > self.now) {
            return Some(Obstacle::MinHold(until));
        }
        if !fits(asked, &record.holders, None, self.now, rules.grace) {
            let live = record.holders.iter().filter(|holder| is_live(holder, self.now, rules.grace));
            let modes = live.clone().map(|holder| holder.mode);
            if modes.chain([asked.mode]).any(|mode| mode == Mode::Exclusive) {
                return Some(Obstacle::Holder);
            }
            let limits = live.clone().map(|holder| holder.shared_limit);
            let limit = limits.fold(asked.shared_limit, u32::min);
            return Some(Obstacle::Limit { holders: live.count(), limit });
        }
        self.queue().find(|waiter| waiter.acquisition.id != asked.id).map(Obstacle::Waiter)
    }

    /// Returns the state of the key, as callers see it.
    #[must_use]
    pub fn state(&self) -> State {
        if self.record.holders.is_empty() {
            State::Free
        } else if self.record.holders.iter().any(|holder| self.now < holder.expires_at) {
            State::Held
        } else {
            State::Lapsed
        }
    }

    /// Returns how long the holder's lease still lasts.
    #[must_use]
    pub fn remaining(&self, holder: &Holder) -> Duration {
        holder.expires_at - self.now
    }

    /// Returns the waiters whose entries have not lapsed, the head first.
    pub fn queue(&self) -> impl Iterator<Item = &Waiter> {
        self.record.waiters.iter().filter(|waiter| self.has_not_lapsed(waiter))
    }

    /// Returns how long until the head of the queue can be granted without any other edit. `None`
    /// if the queue is empty.
    ///
    /// Only a hint for a timer. When the timer fires, the store decides.
    #[must_use]
    pub fn next_admission(&self, rules: &Rules) -> Option<Duration> {
        let record = &self.record;
        let head = &record.waiters.first()?.acquisition;
        // A head that fits at one instant fits at all later ones, because only an edit adds a
        // holder. So a binary search finds the first fitting instant among those at which a block
        // or a lease ends.
        let mut instants: Vec<Timestamp> = record.blocked_until.into_iter().chain([self.now]).collect();
        instants.extend(record.holders.iter().map(|holder| holder.expires_at + rules.grace));
        instants.sort_unstable();
        let fitting = instants.partition_point(|&at| {
            at < self.now || !fits(head, &record.holders, record.blocked_until, at, rules.grace)
        });
        instants.get(fitting).map(|&at| at - self.now)
    }

    /// Returns the holder to name to callers that are refused: an exclusive one, or the one whose
    /// lease lasts longest.
    #[must_use]
    pub fn foremost(&self) -> Option<&Holder> {
        self.record.holders.iter().max_by_key(|holder| (holder.mode == Mode::Exclusive, holder.expires_at))
    }

    fn has_not_lapsed(&self, waiter: &Waiter) -> bool {
        self.now < waiter.expires_at
    }
}
