//! The engine over a store: turns calls into edits, edits into batches, and keeps the line of waiting calls.
//!
//! A call adds its part to the next edit of its key ([`committer`]), and reads its answer off the record that the
//! commit returned. A call that waits has its place in the record; [`queue`] only remembers whom to tell.

/// What a call asks of a record: one operation of the next edit of its key.
mod op;
/// An acquire from its first commit to its answer.
mod acquire;
/// Gathers operations into batches and commits them.
mod committer;
/// Who takes turns: a stream, or the unary calls of a connection.
mod caller;
/// Sends each record to whoever waits for it.
mod notify;
/// Calls that wait for a lease.
mod queue;
/// Leases that keepalive streams keep alive.
mod streams;
/// Watches of keys.
mod watch;
/// What the engine counts.
mod metrics;

#[cfg(test)]
mod acquire_tests;
#[cfg(test)]
mod committer_tests;
/// A store whose commits wait until a test lets them go.
#[cfg(test)]
mod gated;

use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use acquire::{Acquired, Call, Grant, Obstruction, Origin, Refusal};
pub(crate) use caller::{Caller, Turn};
use committer::{Answer, Committer, Done, lost};
use metrics::Tally;
pub(crate) use metrics::{Counts, Source};
use notify::Audience;
use op::Part;
use queue::{Line, refresh};
use streams::Carried;
pub(crate) use streams::{Carriage, Carrier, Full, Loss};
use watch::Watchers;
pub use watch::{Begin, ChangeKind, Watch, WatchEvent};

use crate::lease::{FencingToken, Holder, Key, LeaseId, Reason, Snapshot, Standing};
use crate::metrics::registry::Meter;
use crate::store::{ListQuery, Outcome, Page, Store, StoreError};

/// The bounds that the engine keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// How long a call may take beyond its `wait`.
    pub call: Duration,
    /// Calls that may wait at once.
    pub waiting_calls: usize,
    /// Commands that may await their commit at once; more wait for room.
    pub queued_commands: usize,
    /// Watches at once.
    pub watches: usize,
    /// Leases that keepalive streams carry at once, all streams together.
    pub leases: usize,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            call: Duration::from_secs(5),
            waiting_calls: 100_000,
            queued_commands: 262_144,
            watches: 256,
            leases: 1_000_000,
        }
    }
}

/// Why a call has no answer.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum CallError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Too many calls wait already.
    #[error("{limit} calls wait already, as many as this daemon allows")]
    TooManyWaiting {
        /// The bound.
        limit: usize,
    },
    /// Too many watch already.
    #[error("{limit} watches are open already, as many as this daemon allows")]
    TooManyWatches {
        /// The bound.
        limit: usize,
    },
    /// The daemon is about to end; go elsewhere.
    #[error("the daemon is shutting down")]
    ShuttingDown,
}

/// What became of a touch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Touched {
    /// Renewed; this much time is left.
    Kept(Duration),
    /// Not held any more, and how it went if that is remembered.
    Lost(Option<Reason>),
    /// The key's record cannot be read or written, so nobody knows.
    Unreadable,
}

/// What became of a release.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Released {
    /// Given back, now or by an earlier call: the lease, or the place in line.
    Done,
    /// It was not held; how it went if that is remembered.
    Lost(Option<Reason>),
    /// It was not held, and the key remembers too many ids as settled to remember this one.
    NoRoom,
}

/// Grants and renews leases over a store. Cheap to clone.
#[derive(Debug)]
pub struct Lessor<S> {
    committer: Arc<Committer<S>>,
    audience: Arc<Audience>,
    /// On whose behalf it is asked.
    caller: Caller,
    bounds: Bounds,
    draining: Arc<CancellationToken>,
}

impl<S> Clone for Lessor<S> {
    fn clone(&self) -> Self {
        Self {
            committer: Arc::clone(&self.committer),
            audience: Arc::clone(&self.audience),
            caller: self.caller.clone(),
            bounds: self.bounds,
            draining: Arc::clone(&self.draining),
        }
    }
}

impl<S: Store> Lessor<S> {
    /// Starts an engine. Its `tasks` end when `draining` is cancelled.
    #[must_use]
    pub(crate) fn start(
        store: S,
        bounds: Bounds,
        draining: CancellationToken,
        meter: &mut Meter,
        tasks: &TaskTracker,
    ) -> Self {
        let counts = Arc::new(Counts::new(meter));
        let line = Arc::new(Line::new(&store, bounds.waiting_calls));
        let carried = Arc::new(Carried::new(&counts, bounds.leases));
        let watchers = Arc::new(Watchers::new(bounds.watches));
        let audience = Arc::new(Audience { line, carried, watchers, counts });
        let (store, queued) = (Arc::new(store), bounds.queued_commands);
        let committer = Arc::new(Committer::new(store, Arc::clone(&audience), bounds.call, queued));
        tasks.spawn(refresh::keep(Arc::clone(&audience), Arc::clone(&committer), draining.clone()));
        tasks.spawn(watch::keep(Arc::clone(&audience), Arc::clone(&committer), draining.clone()));
        tasks.spawn(notify::follow(Arc::clone(&audience), Arc::clone(&committer), draining.clone()));
        Self { committer, audience, caller: Caller::new(), bounds, draining: Arc::new(draining) }
    }

    /// This engine as `caller` asks it, who takes turns with other callers.
    #[must_use]
    pub(crate) fn on_behalf_of(&self, caller: Caller) -> Self {
        Self { caller, ..self.clone() }
    }

    /// The store, for what needs no engine.
    #[must_use]
    pub fn store(&self) -> &S {
        self.committer.store()
    }

    /// Renews a lease.
    ///
    /// # Errors
    /// [`CallError::Store`] if the store fails.
    pub async fn touch(&self, key: Key, id: LeaseId) -> Result<Touched, CallError> {
        let snapshot = self.commit(key, Part::Touch(id)).await?.snapshot;
        let touched = touched(&snapshot, id);
        let mut tally = Tally::default();
        tally.add(touched, Source::Store);
        self.counts().told(&tally);
        Ok(touched)
    }

    /// Renews many leases in one go; the answers stand in the order of `leases`. A record that cannot be read or written
    /// is the trouble of its leases alone.
    ///
    /// Only the store has a deadline, which begins when it is given a batch. The leases may need many batches, and each of
    /// them its turn: to begin anew after so many seconds would be to touch the first ones again and again, and the last
    /// ones never.
    ///
    /// # Errors
    /// [`CallError::Store`] if the store fails for any of them.
    pub async fn touch_all<'a>(
        &self,
        leases: impl Iterator<Item = &'a (Key, LeaseId)> + Clone,
    ) -> Result<Vec<Touched>, CallError> {
        let parts = leases.clone().map(|(key, id)| (key.clone(), Part::Touch(*id))).collect();
        let answers = self.committer.submit_each(&self.caller, parts).await.into_iter();
        let touched = |((_, id), answer): (&(Key, LeaseId), Option<Answer>)| match answer {
            Some(Ok(done)) => Ok(touched(&done.snapshot, *id)),
            Some(Err(StoreError::Unreadable { .. })) => Ok(Touched::Unreadable),
            Some(Err(error)) => Err(error.into()),
            None => Err(lost().into()),
        };
        leases.zip(answers).map(touched).collect()
    }

    /// What a new keepalive stream carries: nothing yet.
    pub(crate) fn carry(&self) -> Carrier {
        Carrier::new(&self.audience.carried)
    }

    /// Where calls are counted.
    pub(crate) fn counts(&self) -> &Counts {
        &self.audience.counts
    }

    /// Settles an id for good: gives a lease or a place in line back, and keeps out an acquire with the id that comes
    /// later. Whoever is next holds the key when this returns. `given_up`: the acquire may still be under way.
    ///
    /// # Errors
    /// [`CallError::Store`] if the store fails.
    pub async fn release(&self, key: Key, id: LeaseId, given_up: bool) -> Result<Released, CallError> {
        let part = if given_up { Part::GiveUp(id) } else { Part::Release(id) };
        let snapshot = self.commit(key, part).await?.snapshot;
        let reason = match snapshot.standing(id) {
            Standing::Departed(Reason::Released | Reason::Withdrawn) => {
                self.counts().releases.inc();
                return Ok(Released::Done);
            }
            // Nothing is known of how it went, if it ever came.
            Standing::Departed(Reason::Settled) => None,
            Standing::Departed(reason) => Some(reason),
            _ => return Ok(Released::NoRoom),
        };
        let mut tally = Tally::default();
        tally.lost(reason);
        self.counts().told(&tally);
        Ok(Released::Lost(reason))
    }

    /// Takes the lease with `token` away from its holder, or every holder's without one, and returns how many went. A
    /// block by `min_hold` goes as well, and counts as one: without a token, or with the last one granted if its lease
    /// has been released.
    ///
    /// "Every holder" means those at the time of the call, found by a read: an edit that meant whoever holds when it
    /// is committed could not be repeated after an unknown outcome. The block
    /// is named by its end for the same reason.
    ///
    /// # Errors
    /// [`CallError::Store`] if the store fails.
    pub async fn revoke(&self, key: Key, token: Option<FencingToken>) -> Result<usize, CallError> {
        let found = self.in_time(async { Ok(self.store().read(vec![key.clone()]).await?) }).await?;
        let Some(before) = found.into_iter().next().transpose()? else { return Ok(0) };
        let is_meant = |holder: &&Holder| token.is_none_or(|token| holder.token == token);
        let ids: Vec<LeaseId> =
            before.record.holders.iter().filter(is_meant).map(|holder| holder.id).collect();
        let is_last = token.is_none_or(|token| ids.is_empty() && token == before.record.token);
        let block = before.record.blocked_until.filter(|until| is_last && *until > before.now);
        if ids.is_empty() && block.is_none() {
            return Ok(0);
        }
        let after = self.commit(key, Part::Revoke(ids.clone(), block)).await?.snapshot;
        let is_revoked = |id: &&LeaseId| after.standing(**id) == Standing::Departed(Reason::Revoked);
        let is_lifted = block.is_some() && after.record.blocked_until != block;
        let revoked = ids.iter().filter(is_revoked).count() + usize::from(is_lifted);
        self.counts().revoked(revoked);
        Ok(revoked)
    }

    /// The key's record, if it has one.
    ///
    /// # Errors
    /// [`CallError::Store`] if the store fails.
    pub async fn get(&self, key: Key) -> Result<Option<Snapshot>, CallError> {
        let found = self.in_time(async { Ok(self.store().inspect(key).await?) }).await?;
        // A record without a token is one that a batch was about to make, or that remembers settled ids and nothing else.
        Ok(found.filter(|snapshot| snapshot.record.token != FencingToken::default()))
    }

    /// A page of records. Pages that one caller asks for at once are read a few at a time, so that most of them wait for each
    /// other and not in front of those of others.
    ///
    /// # Errors
    /// [`CallError::Store`] if the store fails.
    pub async fn list(&self, query: ListQuery) -> Result<Page, CallError> {
        let _turn = self.turn().await;
        self.page(query).await
    }

    /// Waits for the caller's turn to have a page read, or to be sent a large answer.
    pub(crate) async fn turn(&self) -> Turn {
        self.caller.turn().await
    }

    /// A page of records, for a caller whose turn it is.
    pub(crate) async fn page(&self, query: ListQuery) -> Result<Page, CallError> {
        self.in_time(async { Ok(self.store().list(query).await?) }).await
    }

    /// Waits until nothing is left to commit. While the store is away, that may be what ended calls left behind.
    pub async fn settle(&self) {
        self.committer.settle().await;
    }

    /// Commits nothing again that failed, from here on.
    pub(crate) fn give_up(&self) {
        self.committer.give_up();
    }

    async fn commit(&self, key: Key, part: Part) -> Result<Done, CallError> {
        self.in_time(async { Ok(self.committer.submit(&self.caller, key, part).await?) }).await
    }

    /// Ends what takes longer than a call may.
    async fn in_time<T>(&self, call: impl Future<Output = Result<T, CallError>>) -> Result<T, CallError> {
        timeout(self.bounds.call, call).await.unwrap_or_else(|_| {
            let cause = format!("no answer within {:?}", self.bounds.call);
            Err(StoreError::Unavailable { outcome: Outcome::Unknown, cause }.into())
        })
    }
}

fn touched(snapshot: &Snapshot, id: LeaseId) -> Touched {
    match snapshot.standing(id) {
        Standing::Holder(holder) => Touched::Kept(snapshot.remaining(holder)),
        Standing::Departed(reason) => Touched::Lost(Some(reason)),
        Standing::Waiter(_) | Standing::Unknown => Touched::Lost(None),
    }
}
