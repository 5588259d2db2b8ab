//! What a record says: the answer to each command, the state people see, and when to look again.

use std::time::Duration;

use super::step::{fits, is_live};
use super::{Acquisition, Holder, LeaseId, Mode, Reason, Record, Rules, Timestamp, Waiter};

/// A record as it was at an instant of the store's clock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// The record.
    pub record: Record,
    /// When it was read.
    pub now: Timestamp,
}

/// What a record says of one lease id. The answer to every command is read off this.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing<'a> {
    /// It holds.
    Holder(&'a Holder),
    /// It stands in line, behind this many others whose places have not lapsed.
    Waiter(usize),
    /// The id is over, for this reason.
    Departed(Reason),
    /// Nothing is known of it: refused, gone, or never there.
    Unknown,
}

/// What keeps an acquisition out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Obstacle<'a> {
    /// Nobody is admitted before this: a lease with a `min_hold` was released early.
    MinHold(Timestamp),
    /// The key is held, and one of the two wants it alone.
    Holder,
    /// As many share the key as the smallest limit among theirs and the acquisition's own allows.
    Limit {
        /// How many, without those whose place may be taken.
        holders: usize,
        /// The smallest limit.
        limit: u32,
    },
    /// The acquisition would fit, but this waiter came before.
    Waiter(&'a Waiter),
}

/// A key's state as people see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Nobody holds it.
    Free,
    /// Held in time.
    Held,
    /// The holders' time ran out and nobody took their place.
    Lapsed,
}

impl Snapshot {
    /// What the record says of `id`.
    #[must_use]
    pub fn standing(&self, id: LeaseId) -> Standing<'_> {
        let record = &self.record;
        if let Some(holder) = record.holders.iter().find(|holder| holder.id == id) {
            return Standing::Holder(holder);
        }
        if let Some(place) = record.waiters.iter().position(|waiter| waiter.acquisition.id == id) {
            let ahead = &record.waiters[..place];
            return Standing::Waiter(ahead.iter().filter(|waiter| self.in_line(waiter)).count());
        }
        match record.departures.iter().find(|departure| departure.id == id) {
            Some(departure) => Standing::Departed(departure.reason),
            None => Standing::Unknown,
        }
    }

    /// Whether the id of `asked` is in use for something else: with another mode or limit.
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

    /// What keeps `asked` out, if anything does.
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
        self.line().find(|waiter| waiter.acquisition.id != asked.id).map(Obstacle::Waiter)
    }

    /// The state to show.
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

    /// Time left until the holder's lease runs out.
    #[must_use]
    pub fn remaining(&self, holder: &Holder) -> Duration {
        holder.expires_at - self.now
    }

    /// The line to show: those whose places have not lapsed.
    pub fn line(&self) -> impl Iterator<Item = &Waiter> {
        self.record.waiters.iter().filter(|waiter| self.in_line(waiter))
    }

    /// How long until time alone lets the head of the line in; `None` if nobody stands in line.
    ///
    /// A hint for a timer: the store decides when it fires.
    #[must_use]
    pub fn next_admission(&self, rules: &Rules) -> Option<Duration> {
        let record = &self.record;
        let head = &record.waiters.first()?.acquisition;
        // What fits now fits later: nothing but a new edit takes room away. So the first fitting instant can be
        // searched for among those at which room appears.
        let mut instants: Vec<Timestamp> = record.blocked_until.into_iter().chain([self.now]).collect();
        instants.extend(record.holders.iter().map(|holder| holder.expires_at + rules.grace));
        instants.sort_unstable();
        let fitting = instants.partition_point(|&at| {
            at < self.now || !fits(head, &record.holders, record.blocked_until, at, rules.grace)
        });
        instants.get(fitting).map(|&at| at - self.now)
    }

    /// The holder that stands in the way of others: the one whose time runs longest.
    #[must_use]
    pub fn foremost(&self) -> Option<&Holder> {
        self.record.holders.iter().max_by_key(|holder| (holder.mode == Mode::Exclusive, holder.expires_at))
    }

    fn in_line(&self, waiter: &Waiter) -> bool {
        self.now < waiter.expires_at
    }
}
