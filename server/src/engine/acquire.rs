//! Acquires, from the first commit to the answer: granted at once, refused, or granted after a
//! wait.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use super::caller::Caller;
use super::committer::Committer;
use super::op::Op;
use super::queue::Entry;
use super::reply::Done;
use super::{CallError, Lessor};
use crate::lease::{
    Acquisition, Departure, FencingToken, Holder, Key, LeaseId, MEMORY, Mode, Obstacle, Reason, Snapshot,
    Standing, Timestamp, Ttl,
};
use crate::store::{Outcome, Store, StoreError};

/// The longest time for which the daemon tries to release a lease whose call has ended without an
/// answer.
const MAX_GIVING_UP: Duration = Duration::from_secs(3600);

/// A request for a lease.
#[derive(Debug, Clone)]
pub struct Call {
    /// The key to lease.
    pub key: Key,
    /// The acquisition to commit. Its `wait` is true if this call's `wait` is not zero.
    pub acquisition: Acquisition,
    /// Who picked the lease id.
    pub origin: Origin,
    /// How long to wait in the queue at most.
    pub wait: Duration,
}

/// Who picked a lease id, and so who can release the lease if the answer is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// The caller. The daemon never releases the id: the caller may have repeated the call at
    /// another daemon, and hold the lease.
    Caller,
    /// The daemon. Only the daemon can release the lease if the answer is lost.
    Daemon,
}

/// The answer to an acquire.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Acquired {
    /// The caller holds the lease.
    Granted(Grant),
    /// The lease was not granted, at once or within the wait.
    Held(Refusal),
    /// The queue is full.
    QueueFull,
    /// The id has ended: its lease ended before, or the id was released or kept out.
    Lost(Reason),
    /// The id is in use for another acquisition of the key, with another mode or limit.
    IdReused,
}

/// A granted lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    /// The lease id.
    pub id: LeaseId,
    /// The fencing token.
    pub token: FencingToken,
    /// How long the grant and each touch last.
    pub ttl: Ttl,
    /// When the lease was granted.
    pub acquired_at: Timestamp,
    /// When the lease runs out unless it is touched.
    pub expires_at: Timestamp,
    /// How much time was left at the commit that the answer is read from, by the store's clock.
    pub remaining: Duration,
    /// Exclusive or shared.
    pub mode: Mode,
    /// The lease was granted from the queue, or by a commit before this call's.
    pub waited: bool,
    /// The grant displaced a holder whose lease had lapsed.
    pub took_over: bool,
}

/// Why a lease was not granted.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Refusal {
    /// The holder's label. Empty if the key has no holder.
    pub owner: String,
    /// The holder's token, or the token that was granted last.
    pub token: FencingToken,
    /// How long until the holder's lease has run out and the key is not blocked any more.
    pub remaining: Duration,
    /// How many waiters were ahead of the caller in the queue, if it waited.
    pub position: Option<usize>,
    /// What kept the caller out. `None` if another attempt might succeed.
    pub by: Option<Obstruction>,
}

/// What keeps a caller from a lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Obstruction {
    /// The key is blocked by a `min_hold`.
    MinHold,
    /// The key is held.
    Holder,
    /// As many holders share the key as the smallest limit allows.
    Limit {
        /// How many holders there are.
        holders: usize,
        /// The smallest of the holders' limits and the caller's own.
        limit: u32,
    },
    /// A waiter came before the caller.
    Waiter {
        /// The label of that waiter.
        owner: String,
    },
}

impl<S: Store> Lessor<S> {
    /// Acquires a lease, and waits for it in the queue if the call says so.
    ///
    /// Dropping the future ends the wait, and takes the call out of the queue.
    ///
    /// # Errors
    /// [`CallError`]. After an error of the store, the call may be repeated with the same id.
    pub async fn acquire(&self, call: Call) -> Result<Acquired, CallError> {
        let answer = self.acquire_uncounted(call).await?;
        self.metrics().answered(&answer);
        Ok(answer)
    }

    async fn acquire_uncounted(&self, call: Call) -> Result<Acquired, CallError> {
        let until = Instant::now() + call.wait;
        let Call { key, acquisition, origin, .. } = call;
        let acquisition = Arc::new(acquisition);
        let entry = if acquisition.wait { Some(self.enter(&key, &acquisition)?) } else { None };
        let waits = entry.is_some();
        let id = acquisition.id;
        let mut attempt = Attempt {
            committer: Arc::clone(&self.committer),
            caller: self.caller.clone(),
            key: key.clone(),
            id,
            ttl: acquisition.ttl,
            origin,
            entry,
            repeated_at: acquisition.repeated.then(Instant::now),
            has_left: false,
            open: true,
        };

        let first = loop {
            let done = self.commit_for(&mut attempt, Op::Acquire(Arc::clone(&acquisition))).await?;
            if done.is_repeated {
                attempt.repeated_at = Some(Instant::now());
            }
            let snapshot = done.snapshot;
            // The key is free and has not admitted the call, because its record was deleted
            // meanwhile. So the call asks again.
            let vanished = snapshot.standing(id) == Standing::Unknown
                && snapshot.record.holders.is_empty()
                && snapshot.record.waiters.is_empty()
                && snapshot.record.blocked_until.is_none_or(|until| until <= snapshot.now);
            if !vanished {
                break snapshot;
            }
        };
        match first.standing(id) {
            Standing::Waiter(_) if waits && !first.conflicts(&acquisition) => {
                let wait = self.metrics().begin_wait();
                let answer = self.wait(attempt, &acquisition, until).await;
                wait.end(&answer);
                answer
            }
            standing => {
                let answer = self.answer(&first, standing, &acquisition);
                self.conclude(attempt, answer, &acquisition).await
            }
        }
    }

    fn enter(&self, key: &Key, acquisition: &Arc<Acquisition>) -> Result<Entry, CallError> {
        if self.draining.is_cancelled() {
            return Err(CallError::ShuttingDown);
        }
        let queue = &self.subscribers.queue;
        let limit = queue.limit();
        queue.enter(key, acquisition).ok_or(CallError::TooManyWaiting { limit })
    }

    /// Waits in the queue until a record ends the wait, `until` has passed, or the daemon drains.
    async fn wait(
        &self,
        mut attempt: Attempt<S>,
        acquisition: &Acquisition,
        until: Instant,
    ) -> Result<Acquired, CallError> {
        let id = attempt.id;
        let Some(entry) = &mut attempt.entry else { return Err(CallError::ShuttingDown) };
        tokio::select! {
            // If a record ends the wait just when its time is over, the record is the answer.
            biased;
            snapshot = entry.ended() => {
                let answer = match snapshot.standing(id) {
                    // The waiter's entry lapsed, and a call with this id and another mode made a
                    // new one.
                    Standing::Holder(_) if snapshot.conflicts(acquisition) => Acquired::IdReused,
                    Standing::Holder(holder) => granted(&snapshot, holder, Waited::Yes),
                    Standing::Departed(reason) => Acquired::Lost(reason),
                    Standing::Waiter(_) | Standing::Unknown => {
                        // The waiter's entry is gone, and the record had no room for a new one.
                        attempt.repeated_at = Some(Instant::now());
                        Acquired::QueueFull
                    }
                };
                self.conclude(attempt, answer, acquisition).await
            }
            () = sleep_until(until) => self.stop_waiting(attempt, acquisition).await,
            () = self.draining.cancelled() => {
                // The waiter's entry stays, so that the caller can go on waiting at another daemon.
                if attempt.origin == Origin::Caller {
                    attempt.close();
                }
                Err(CallError::ShuttingDown)
            }
        }
    }

    /// Leaves the queue, unless the lease is granted just then.
    async fn stop_waiting(
        &self,
        mut attempt: Attempt<S>,
        acquisition: &Acquisition,
    ) -> Result<Acquired, CallError> {
        let id = attempt.id;
        let latest = attempt.entry.as_ref().and_then(Entry::latest);
        let last_position = latest.as_ref().and_then(|snapshot| match snapshot.standing(id) {
            Standing::Waiter(position) => Some(position),
            _ => None,
        });
        attempt.leave_queue();
        if !attempt.has_left {
            // Another call goes on waiting with this id, and needs the waiter's entry.
            attempt.close();
            let refusal = latest.map(|snapshot| self.refusal(&snapshot, acquisition, last_position));
            let refusal = refusal.unwrap_or_default();
            return Ok(Acquired::Held(refusal));
        }
        let snapshot = self.commit_for(&mut attempt, Op::Cancel(id)).await?.snapshot;
        let answer = match snapshot.standing(id) {
            Standing::Holder(_) if snapshot.conflicts(acquisition) => Acquired::IdReused,
            Standing::Holder(holder) => granted(&snapshot, holder, Waited::Yes),
            Standing::Departed(reason) => Acquired::Lost(reason),
            Standing::Waiter(_) | Standing::Unknown => {
                Acquired::Held(self.refusal(&snapshot, acquisition, last_position))
            }
        };
        self.conclude(attempt, answer, acquisition).await
    }

    /// Ends a call with this answer, or with a grant if the lease was granted meanwhile.
    ///
    /// A refusal must be final. A late command of this call could be granted a lease that nobody
    /// knows of. So if an earlier command may still be under way, the id is kept out before the
    /// call is answered. The id is not released, because the caller may have repeated the call at
    /// another daemon, and hold the lease.
    async fn conclude(
        &self,
        mut attempt: Attempt<S>,
        answer: Acquired,
        acquisition: &Acquisition,
    ) -> Result<Acquired, CallError> {
        let id = attempt.id;
        if matches!(answer, Acquired::Held(_) | Acquired::QueueFull) {
            attempt.leave_queue();
            while attempt.may_still_be_granted() {
                let snapshot = self.commit_for(&mut attempt, Op::KeepOut(id)).await?.snapshot;
                match snapshot.standing(id) {
                    Standing::Holder(_) if !snapshot.conflicts(acquisition) => {
                        // Asks once more, as a repetition. The record then remembers the end of
                        // this lease for as long as a late command may ask for the id.
                        let again = Acquisition { repeated: true, ..Acquisition::clone(acquisition) };
                        let snapshot =
                            self.commit_for(&mut attempt, Op::Acquire(again.into())).await?.snapshot;
                        if let Standing::Holder(holder) = snapshot.standing(id) {
                            attempt.close();
                            return Ok(granted(&snapshot, holder, Waited::Yes));
                        }
                    }
                    // The earlier command has made a waiter's entry.
                    Standing::Waiter(_) if attempt.has_left => {
                        self.commit_for(&mut attempt, Op::Cancel(id)).await?;
                    }
                    Standing::Unknown => return Err(attempt.failed(no_room())),
                    _ => break,
                }
            }
        }
        attempt.close();
        Ok(answer)
    }

    /// Commits an operation of a call. A failure ends the call as [`Attempt::failed`] says.
    async fn commit_for(&self, attempt: &mut Attempt<S>, op: Op) -> Result<Done, CallError> {
        self.commit(attempt.key.clone(), op).await.map_err(|error| attempt.failed(error))
    }

    /// Returns the answer to a call that does not begin to wait.
    fn answer(&self, snapshot: &Snapshot, standing: Standing<'_>, acquisition: &Acquisition) -> Acquired {
        match standing {
            Standing::Holder(_) | Standing::Waiter(_) if snapshot.conflicts(acquisition) => {
                Acquired::IdReused
            }
            // A grant by this commit has the instant of the record. An older one was for an earlier
            // call.
            Standing::Holder(holder) if holder.acquired_at < snapshot.now => {
                granted(snapshot, holder, Waited::Yes)
            }
            Standing::Holder(holder) => granted(snapshot, holder, Waited::No),
            Standing::Departed(reason) => Acquired::Lost(reason),
            Standing::Waiter(position) => Acquired::Held(self.refusal(snapshot, acquisition, Some(position))),
            // A call that waits gets no entry only if the record has no room for it.
            Standing::Unknown if acquisition.wait => Acquired::QueueFull,
            Standing::Unknown => Acquired::Held(self.refusal(snapshot, acquisition, None)),
        }
    }

    fn refusal(&self, snapshot: &Snapshot, acquisition: &Acquisition, position: Option<usize>) -> Refusal {
        let record = &snapshot.record;
        let obstacle = snapshot.obstacle(acquisition, &self.store().rules());
        let by = obstacle.map(|obstacle| match obstacle {
            Obstacle::MinHold(_) => Obstruction::MinHold,
            Obstacle::Holder => Obstruction::Holder,
            Obstacle::Limit { holders, limit } => Obstruction::Limit { holders, limit },
            Obstacle::Waiter(waiter) => Obstruction::Waiter { owner: waiter.acquisition.owner.clone() },
        });
        let block = match obstacle {
            Some(Obstacle::MinHold(until)) => until - snapshot.now,
            _ => Duration::ZERO,
        };
        match snapshot.foremost() {
            Some(holder) => Refusal {
                owner: holder.owner.clone(),
                token: holder.token,
                remaining: snapshot.remaining(holder).max(block),
                position,
                by,
            },
            None => Refusal { owner: String::new(), token: record.token, remaining: block, position, by },
        }
    }
}

/// Returns the error in place of a refusal that cannot be made final, because the record has no
/// room to remember the id.
fn no_room() -> CallError {
    let cause = "the key's record has no room to remember the id".to_owned();
    CallError::Store(StoreError::Unavailable { outcome: Outcome::Unknown, cause })
}

/// Whether a lease was granted from the queue, or by a commit before this call's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Waited {
    Yes,
    No,
}

fn granted(snapshot: &Snapshot, holder: &Holder, waited: Waited) -> Acquired {
    // A grant and the displacement that makes way for it are one step, and have one instant.
    let made_way =
        |departure: &Departure| departure.reason == Reason::Displaced && departure.at == holder.acquired_at;
    Acquired::Granted(Grant {
        id: holder.id,
        token: holder.token,
        ttl: holder.ttl,
        acquired_at: holder.acquired_at,
        expires_at: holder.expires_at,
        remaining: snapshot.remaining(holder),
        mode: holder.mode,
        waited: waited == Waited::Yes,
        took_over: snapshot.record.departures.iter().any(made_way),
    })
}

/// An acquire under way. Cleans up if it is dropped before it is closed: the caller has cancelled
/// the call, or the store has failed.
struct Attempt<S: Store> {
    committer: Arc<Committer<S>>,
    caller: Caller,
    key: Key,
    id: LeaseId,
    ttl: Ttl,
    origin: Origin,
    entry: Option<Entry>,
    /// When the id was last asked for again: because the caller or the store repeated a command, or
    /// for a new waiter's entry. The earlier command may still be under way.
    repeated_at: Option<Instant>,
    /// The call has left the queue, and no other call needs its entry.
    has_left: bool,
    /// The call has not ended. Dropping the attempt cleans up.
    open: bool,
}

impl<S: Store> Attempt<S> {
    /// Whether an earlier command of this call may still take effect.
    fn may_still_be_granted(&self) -> bool {
        self.repeated_at.is_some_and(|at| at.elapsed() < MEMORY)
    }

    /// Ends the call with an error. If the caller picked the id, nothing is cleaned up: the caller
    /// may have repeated the call at another daemon, and would lose its waiter's entry or its
    /// lease.
    fn failed(&mut self, error: CallError) -> CallError {
        if self.origin == Origin::Caller {
            self.close();
        }
        error
    }

    /// Ends the call without anything to clean up.
    fn close(&mut self) {
        self.open = false;
    }

    /// Removes the call from the daemon's queue.
    ///
    /// To be called before the waiter's entry is cancelled. As long as the call is in the daemon's
    /// queue, a poll would find the entry gone and make a new one, for nobody.
    fn leave_queue(&mut self) {
        if let Some(entry) = self.entry.take() {
            self.repeated_at = entry.rejoined_at().or(self.repeated_at);
            self.has_left |= !entry.leave();
        }
    }
}

impl<S: Store> Drop for Attempt<S> {
    fn drop(&mut self) {
        if !self.open {
            return;
        }
        self.leave_queue();
        let key = self.key.clone();
        match self.origin {
            // The lease may be granted as long as the waiter's entry lasts, and only the daemon can
            // release it. An outage can last longer than a batch is repeated, so the daemon gives
            // the id up again until that succeeds.
            Origin::Daemon => {
                let lasts = (self.committer.store().rules().waiter_ttl + self.ttl.get()).min(MAX_GIVING_UP);
                self.committer.give_up_id(&self.caller, key, self.id, lasts);
            }
            // Not repeated after a failure: the caller may be waiting again by then, at another
            // daemon.
            Origin::Caller if self.has_left => {
                self.committer.submit_unanswered(&self.caller, [(key, Op::Cancel(self.id))]);
            }
            Origin::Caller => {}
        }
    }
}
