//! An acquire from its first commit to its answer: granted, refused, or granted after a wait.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use super::caller::Caller;
use super::committer::{Committer, Done};
use super::op::Part;
use super::queue::Entry;
use super::{CallError, Lessor};
use crate::lease::{
    Acquisition, Departure, FencingToken, Holder, Key, LeaseId, MEMORY, Mode, Obstacle, Reason, Snapshot,
    Standing, Timestamp, Ttl,
};
use crate::store::{Outcome, Store, StoreError};

/// The longest time for which the daemon goes on trying to give back a lease that nobody was told of.
const GIVING_BACK: Duration = Duration::from_secs(3600);

/// A request for a lease.
#[derive(Debug, Clone)]
pub struct Call {
    /// What to lease.
    pub key: Key,
    /// By whom and how. Its `wait` says the same as this call's.
    pub acquisition: Acquisition,
    /// Who chose the id.
    pub origin: Origin,
    /// How long to stand in line at most.
    pub wait: Duration,
}

/// Who chose a lease id, and so who can know of the lease when the answer is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// The caller, who may repeat the call with it; what was granted is left to that or to its TTL.
    Caller,
    /// The daemon; nobody can ask for it again, so it is given back.
    Daemon,
}

/// The answer to an acquire.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Acquired {
    /// The caller holds the lease.
    Granted(Grant),
    /// Someone else holds it, also after the wait.
    Held(Refusal),
    /// The line takes no more.
    QueueFull,
    /// This acquisition is over: it was granted before, or its id was released.
    Lost(Reason),
    /// The id is in use for another acquisition of the key, with another mode or limit.
    IdReused,
}

/// A lease granted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    /// Its id.
    pub id: LeaseId,
    /// Its token.
    pub token: FencingToken,
    /// How long it and each touch lasts.
    pub ttl: Ttl,
    /// When it was granted.
    pub acquired_at: Timestamp,
    /// When it runs out unless touched.
    pub expires_at: Timestamp,
    /// What was left of it by the store's clock at the commit that the answer is read from.
    pub remaining: Duration,
    /// Alone or with others.
    pub mode: Mode,
    /// Granted from the line, or by an earlier commit than that of this call.
    pub waited: bool,
    /// It displaced a holder whose time was over.
    pub took_over: bool,
}

/// Who stands in the way.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Refusal {
    /// The holder's label; empty if nobody holds and the key is blocked.
    pub owner: String,
    /// The holder's token, or the last one granted.
    pub token: FencingToken,
    /// Until the holder's lease runs out or the key is not blocked any more.
    pub remaining: Duration,
    /// How many stood before the caller, if it stood in line.
    pub position: Option<usize>,
    /// What keeps the caller out; `None` if it might come in if it tried again.
    pub by: Option<Obstruction>,
}

/// What keeps a caller out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Obstruction {
    /// A `min_hold` keeps the key taken.
    MinHold,
    /// Somebody holds the key.
    Holder,
    /// As many share the key as the smallest limit allows.
    Limit {
        /// How many.
        holders: usize,
        /// The smallest limit among theirs and the caller's own.
        limit: u32,
    },
    /// Somebody came before.
    Waiter {
        /// The label of the one who came before.
        owner: String,
    },
}

impl<S: Store> Lessor<S> {
    /// Asks for a lease, and stands in line for it if the call says so.
    ///
    /// Dropping the future ends the wait and leaves no place in line behind.
    ///
    /// # Errors
    /// [`CallError`]; after an error of the store the call may be repeated with the same id.
    pub async fn acquire(&self, call: Call) -> Result<Acquired, CallError> {
        let answer = self.ask(call).await?;
        self.counts().answered(&answer);
        Ok(answer)
    }

    async fn ask(&self, call: Call) -> Result<Acquired, CallError> {
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
            leaves: false,
            open: true,
        };

        let first = loop {
            let done = self.commit_of(&mut attempt, Part::Acquire(Arc::clone(&acquisition))).await?;
            if done.is_repeated {
                attempt.repeated_at = Some(Instant::now());
            }
            let snapshot = done.snapshot;
            // Neither admitted nor kept out: someone deleted the record in between.
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
                let wait = self.counts().wait();
                let answer = self.wait(attempt, &acquisition, until).await;
                wait.over(&answer);
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
        let line = &self.audience.line;
        let limit = line.limit();
        line.enter(key, acquisition).ok_or(CallError::TooManyWaiting { limit })
    }

    /// Stands in line until told, until the time is over, or until the daemon drains.
    async fn wait(
        &self,
        mut attempt: Attempt<S>,
        acquisition: &Acquisition,
        until: Instant,
    ) -> Result<Acquired, CallError> {
        let id = attempt.id;
        let Some(entry) = &mut attempt.entry else { return Err(CallError::ShuttingDown) };
        tokio::select! {
            biased;
            snapshot = entry.told() => {
                let answer = match snapshot.standing(id) {
                    // A call with this id and another mode took the place when it was lost.
                    Standing::Holder(_) if snapshot.conflicts(acquisition) => Acquired::IdReused,
                    Standing::Holder(holder) => granted(&snapshot, holder, Waited::Yes),
                    Standing::Departed(reason) => Acquired::Lost(reason),
                    Standing::Waiter(_) | Standing::Unknown => {
                        // It has lost its place, and asked for a new one in vain.
                        attempt.repeated_at = Some(Instant::now());
                        Acquired::QueueFull
                    }
                };
                self.conclude(attempt, answer, acquisition).await
            }
            () = sleep_until(until) => self.leave(attempt, acquisition).await,
            () = self.draining.cancelled() => {
                // The place stays for a while: the caller goes on with the same id elsewhere.
                if attempt.origin == Origin::Caller {
                    attempt.close();
                }
                Err(CallError::ShuttingDown)
            }
        }
    }

    /// Leaves the line, unless the turn came at this very moment.
    async fn leave(&self, mut attempt: Attempt<S>, asked: &Acquisition) -> Result<Acquired, CallError> {
        let id = attempt.id;
        let latest = attempt.entry.as_ref().and_then(Entry::latest);
        let last_position = latest.as_ref().and_then(|snapshot| match snapshot.standing(id) {
            Standing::Waiter(position) => Some(position),
            _ => None,
        });
        attempt.leave_line();
        if !attempt.leaves {
            // Another call waits on with this id, and keeps the place.
            attempt.close();
            let refusal = latest.map(|snapshot| self.refusal(&snapshot, asked, last_position));
            let refusal = refusal.unwrap_or_default();
            return Ok(Acquired::Held(refusal));
        }
        let snapshot = self.commit_of(&mut attempt, Part::Cancel(id)).await?.snapshot;
        let answer = match snapshot.standing(id) {
            Standing::Holder(_) if snapshot.conflicts(asked) => Acquired::IdReused,
            Standing::Holder(holder) => granted(&snapshot, holder, Waited::Yes),
            Standing::Departed(reason) => Acquired::Lost(reason),
            Standing::Waiter(_) | Standing::Unknown => {
                Acquired::Held(self.refusal(&snapshot, asked, last_position))
            }
        };
        self.conclude(attempt, answer, asked).await
    }

    /// Answers a call. A refusal has to stay one: an earlier command that takes effect later would make a lease that nobody
    /// knows of. So while there may be such a command, the id is kept out before the caller is told.
    ///
    /// It is not released: the caller may have repeated the call at another daemon, and hold the lease.
    async fn conclude(
        &self,
        mut attempt: Attempt<S>,
        answer: Acquired,
        asked: &Acquisition,
    ) -> Result<Acquired, CallError> {
        let id = attempt.id;
        if matches!(answer, Acquired::Held(_) | Acquired::QueueFull) {
            attempt.leave_line();
            while attempt.may_be_granted_yet() {
                let snapshot = self.commit_of(&mut attempt, Part::KeepOut(id)).await?.snapshot;
                match snapshot.standing(id) {
                    Standing::Holder(_) if !snapshot.conflicts(asked) => {
                        // Asks again, so that the record shows that others like this may come: the release must be remembered
                        // for long.
                        let again = Acquisition { repeated: true, ..Acquisition::clone(asked) };
                        let snapshot =
                            self.commit_of(&mut attempt, Part::Acquire(again.into())).await?.snapshot;
                        if let Standing::Holder(holder) = snapshot.standing(id) {
                            attempt.close();
                            return Ok(granted(&snapshot, holder, Waited::Yes));
                        }
                    }
                    // The earlier command has taken a place.
                    Standing::Waiter(_) if attempt.leaves => {
                        self.commit_of(&mut attempt, Part::Cancel(id)).await?;
                    }
                    Standing::Unknown => return Err(attempt.failed(no_room())),
                    _ => break,
                }
            }
        }
        attempt.close();
        Ok(answer)
    }

    /// Commits a part of a call. If the store fails, a caller with an id of its own is told to repeat the call, maybe at
    /// another daemon: nothing that this one does later may take the place or the lease away from it.
    async fn commit_of(&self, attempt: &mut Attempt<S>, part: Part) -> Result<Done, CallError> {
        self.commit(attempt.key.clone(), part).await.map_err(|error| attempt.failed(error))
    }

    /// The answer to a call that does not begin to wait.
    fn answer(&self, snapshot: &Snapshot, standing: Standing<'_>, asked: &Acquisition) -> Acquired {
        match standing {
            Standing::Holder(_) | Standing::Waiter(_) if snapshot.conflicts(asked) => Acquired::IdReused,
            // What this commit did has the instant of the record; a grant that is older was made for an earlier call.
            Standing::Holder(holder) if holder.acquired_at < snapshot.now => {
                granted(snapshot, holder, Waited::Yes)
            }
            Standing::Holder(holder) => granted(snapshot, holder, Waited::No),
            Standing::Departed(reason) => Acquired::Lost(reason),
            Standing::Waiter(position) => Acquired::Held(self.refusal(snapshot, asked, Some(position))),
            // Whoever waits is refused a place only for want of room.
            Standing::Unknown if asked.wait => Acquired::QueueFull,
            Standing::Unknown => Acquired::Held(self.refusal(snapshot, asked, None)),
        }
    }

    fn refusal(&self, snapshot: &Snapshot, asked: &Acquisition, position: Option<usize>) -> Refusal {
        let record = &snapshot.record;
        let obstacle = snapshot.obstacle(asked, &self.store().rules());
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

/// The record remembers as many ids as it may, so nobody knows whether a refusal would stay one.
fn no_room() -> CallError {
    let cause = "the key remembers no more ids".to_owned();
    CallError::Store(StoreError::Unavailable { outcome: Outcome::Unknown, cause })
}

/// Whether a grant came from the line, or was made before the call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Waited {
    Yes,
    No,
}

fn granted(snapshot: &Snapshot, holder: &Holder, waited: Waited) -> Acquired {
    // What one step does has one instant.
    let makes_way =
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
        took_over: snapshot.record.departures.iter().any(makes_way),
    })
}

/// An acquire under way. Dropped before it is closed, when the caller is gone or the store failed, it cleans up.
struct Attempt<S: Store> {
    committer: Arc<Committer<S>>,
    caller: Caller,
    key: Key,
    id: LeaseId,
    ttl: Ttl,
    origin: Origin,
    entry: Option<Entry>,
    /// When the id was last asked for by what may not be the only command to do so, of which one may still be under way:
    /// the first commit, if the caller or the store repeated it, or one for a new place.
    repeated_at: Option<Instant>,
    /// It has left, and nobody else keeps its place.
    leaves: bool,
    open: bool,
}

impl<S: Store> Attempt<S> {
    /// Whether a command that was sent earlier may take effect yet.
    fn may_be_granted_yet(&self) -> bool {
        self.repeated_at.is_some_and(|at| at.elapsed() < MEMORY)
    }

    /// The call is told of a failure.
    fn failed(&mut self, error: CallError) -> CallError {
        if self.origin == Origin::Caller {
            self.close();
        }
        error
    }

    /// Nothing is to be cleaned up.
    fn close(&mut self) {
        self.open = false;
    }

    /// Goes first, and gives up the place then: as long as the call stands here its place is kept, and taken anew.
    fn leave_line(&mut self) {
        if let Some(entry) = self.entry.take() {
            self.repeated_at = entry.rejoined_at().or(self.repeated_at);
            self.leaves |= !entry.leave();
        }
    }
}

impl<S: Store> Drop for Attempt<S> {
    fn drop(&mut self) {
        if !self.open {
            return;
        }
        self.leave_line();
        let key = self.key.clone();
        match self.origin {
            // It may be granted for as long as its place lasts. Nobody else can ever give it back.
            Origin::Daemon => {
                let lasts = (self.committer.store().rules().place + self.ttl.get()).min(GIVING_BACK);
                self.committer.give_up_id(&self.caller, key, self.id, lasts);
            }
            // Not again after a failure: by then the caller may have asked for its place again, at another daemon.
            Origin::Caller if self.leaves => {
                self.committer.submit_unanswered(&self.caller, [(key, Part::Cancel(self.id))]);
            }
            Origin::Caller => {}
        }
    }
}
