//! The engine: turns calls into edits of records, commits the edits in batches, and answers the
//! calls.
//!
//! A call adds its operation to the next edit of its key ([`committer`]), and its answer is read
//! from the record that the commit returned. A call that waits has an entry in the record.
//! [`queue`] only remembers which calls to wake.

/// The operations of an edit, one for each call.
mod op;
/// Acquires, from the first commit to the answer.
mod acquire;
/// Merges operations into edits and commits them in batches.
mod committer;
/// The operations that await their commit, in their order.
mod backlog;
/// The result of an operation, and where it goes.
mod reply;
/// Fairness between callers: streams, and the unary calls of a connection.
mod caller;
/// Passes records on to the queue, the streams and the watches.
mod notify;
/// Calls that wait for a lease.
mod queue;
/// Leases that keepalive streams keep alive.
mod streams;
/// Watches of keys.
mod watch;
/// The engine's metrics.
mod metrics;

#[cfg(test)]
mod acquire_tests;
#[cfg(test)]
mod committer_tests;
/// A store whose commits wait until a test lets them through.
#[cfg(test)]
mod gated;

use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use acquire::{Acquired, Call, Grant, Obstruction, Origin, Refusal};
pub(crate) use caller::{Caller, Turn};
use committer::Committer;
use metrics::Tally;
pub(crate) use metrics::{EngineMetrics, Source};
use notify::Subscribers;
use op::Op;
use queue::{WaitQueue, refresh};
use reply::{CommitResult, Done, lost};
use streams::StreamIndex;
pub(crate) use streams::{Full, LeaseSet, Loss, StreamLease};
use watch::WatchHub;
pub use watch::{Begin, ChangeKind, Watch, WatchEvent};

use crate::lease::{FencingToken, Holder, Key, LeaseId, LeaseName, Reason, Snapshot, Standing};
use crate::metrics::registry::MetricsRegistry;
use crate::store::{ListQuery, Outcome, Page, Store, StoreError};

/// The limits of the engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// How long a call may take in addition to its `wait`.
    pub call: Duration,
    /// How many calls may wait for a lease at a time.
    pub waiting_calls: usize,
    /// How many operations may be queued for a commit. Further ones wait until there is room.
    pub queued_operations: usize,
    /// How many watches may be open at a time.
    pub watches: usize,
    /// How many leases all keepalive streams together may track at a time.
    pub leases: usize,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            call: Duration::from_secs(5),
            waiting_calls: 100_000,
            queued_operations: 262_144,
            watches: 256,
            leases: 1_000_000,
        }
    }
}

/// Why a call failed.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum CallError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The daemon's limit on waiting calls is reached.
    #[error("{limit} calls wait already, as many as this daemon allows")]
    TooManyWaiting {
        /// How many this daemon allows.
        limit: usize,
    },
    /// The daemon's limit on watches is reached.
    #[error("{limit} watches are open already, as many as this daemon allows")]
    TooManyWatches {
        /// How many this daemon allows.
        limit: usize,
    },
    /// The daemon is shutting down. Another daemon may serve the call.
    #[error("the daemon is shutting down")]
    ShuttingDown,
}

/// The result of a touch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Touched {
    /// The lease is renewed, and lasts for this much longer.
    Kept(Duration),
    /// The lease is not held any more, for this reason if the record remembers one.
    Lost(Option<Reason>),
    /// The key's record cannot be read or written, so it is unknown whether the lease is held.
    Unreadable,
}

/// The result of a release.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Released {
    /// The lease is released, or the id has left the queue, now or by an earlier call.
    Done,
    /// The lease was not held, for this reason if the record remembers one.
    Lost(Option<Reason>),
    /// The lease was not held, and the record has no room to remember that the id is settled.
    NoRoom,
}

/// Grants and renews leases over a store. Cheap to clone.
#[derive(Debug)]
pub struct Lessor<S> {
    committer: Arc<Committer<S>>,
    subscribers: Arc<Subscribers>,
    /// The caller whose calls this handle serves.
    caller: Caller,
    bounds: Bounds,
    draining: Arc<CancellationToken>,
}

impl<S> Clone for Lessor<S> {
    fn clone(&self) -> Self {
        Self {
            committer: Arc::clone(&self.committer),
            subscribers: Arc::clone(&self.subscribers),
            caller: self.caller.clone(),
            bounds: self.bounds,
            draining: Arc::clone(&self.draining),
        }
    }
}

impl<S: Store> Lessor<S> {
    /// Starts an engine and its background `tasks`, which end when `draining` is cancelled.
    #[must_use]
    pub(crate) fn start(
        store: S,
        bounds: Bounds,
        draining: CancellationToken,
        registry: &mut MetricsRegistry,
        tasks: &TaskTracker,
    ) -> Self {
        let metrics = Arc::new(EngineMetrics::new(registry));
        let queue = Arc::new(WaitQueue::new(&store, bounds.waiting_calls));
        let streams = Arc::new(StreamIndex::new(&metrics, bounds.leases));
        let watches = Arc::new(WatchHub::new(bounds.watches));
        let subscribers = Arc::new(Subscribers { queue, streams, watches, metrics });
        let (store, queued) = (Arc::new(store), bounds.queued_operations);
        let committer = Arc::new(Committer::new(store, Arc::clone(&subscribers), bounds.call, queued));
        tasks.spawn(refresh::run(Arc::clone(&subscribers), Arc::clone(&committer), draining.clone()));
        tasks.spawn(watch::run(Arc::clone(&subscribers), Arc::clone(&committer), draining.clone()));
        tasks.spawn(notify::follow_feed(Arc::clone(&subscribers), Arc::clone(&committer), draining.clone()));
        Self { committer, subscribers, caller: Caller::new(), bounds, draining: Arc::new(draining) }
    }

    /// Returns a handle to this engine for the calls of `caller`.
    #[must_use]
    pub(crate) fn on_behalf_of(&self, caller: Caller) -> Self {
        Self { caller, ..self.clone() }
    }

    /// Returns the store, for operations that need no engine.
    #[must_use]
    pub fn store(&self) -> &S {
        self.committer.store()
    }

    /// Renews a lease.
    ///
    /// # Errors
    /// [`CallError::Store`] if the store fails.
    pub async fn touch(&self, LeaseName { key, id }: LeaseName) -> Result<Touched, CallError> {
        let snapshot = self.commit(key, Op::Touch(id)).await?.snapshot;
        let touched = touched(&snapshot, id);
        let mut tally = Tally::default();
        tally.add(touched, Source::Store);
        self.metrics().add(&tally);
        Ok(touched)
    }

    /// Renews many leases at once. The answers are in the order of `leases`. A record that cannot
    /// be read or written only affects the answers for its own leases.
    ///
    /// # Errors
    /// [`CallError::Store`] if the store fails for any of them.
    pub async fn touch_all<'a>(
        &self,
        leases: impl Iterator<Item = &'a LeaseName> + Clone,
    ) -> Result<Vec<Touched>, CallError> {
        // Only each batch has a deadline. A deadline for all would end the call halfway while the
        // daemon is busy. Its repetition would touch the first leases again, and never the last
        // ones.
        let ops = leases.clone().map(|name| (name.key.clone(), Op::Touch(name.id))).collect();
        let answers = self.committer.submit_each(&self.caller, ops).await.into_iter();
        let touched = |(name, answer): (&LeaseName, Option<CommitResult>)| match answer {
            Some(Ok(done)) => Ok(touched(&done.snapshot, name.id)),
            Some(Err(StoreError::Unreadable { .. })) => Ok(Touched::Unreadable),
            Some(Err(error)) => Err(error.into()),
            None => Err(lost().into()),
        };
        leases.zip(answers).map(touched).collect()
    }

    /// Returns an empty set of leases for a new keepalive stream.
    pub(crate) fn lease_set(&self) -> LeaseSet {
        LeaseSet::new(&self.subscribers.streams)
    }

    /// Returns the engine's metrics.
    pub(crate) fn metrics(&self) -> &EngineMetrics {
        &self.subscribers.metrics
    }

    /// Releases a lease, or takes its id out of the queue. While the record remembers the id, an
    /// acquire with it is refused. The next waiter of the queue, if it fits, holds the key when
    /// this returns.
    ///
    /// # Errors
    /// [`CallError::Store`] if the store fails.
    pub async fn release(&self, LeaseName { key, id }: LeaseName) -> Result<Released, CallError> {
        self.settle_id(key, id, Op::Release(id)).await
    }

    /// Releases an id whose acquire may still be under way. Differs from [`Self::release`] in that
    /// the record remembers the id for longer.
    ///
    /// # Errors
    /// [`CallError::Store`] if the store fails.
    pub async fn release_given_up(&self, LeaseName { key, id }: LeaseName) -> Result<Released, CallError> {
        self.settle_id(key, id, Op::GiveUp(id)).await
    }

    async fn settle_id(&self, key: Key, id: LeaseId, op: Op) -> Result<Released, CallError> {
        let snapshot = self.commit(key, op).await?.snapshot;
        let reason = match snapshot.standing(id) {
            Standing::Departed(Reason::Released | Reason::Withdrawn) => {
                self.metrics().releases.inc();
                return Ok(Released::Done);
            }
            // The record does not say how the lease was lost, or whether there ever was one.
            Standing::Departed(Reason::Settled) => None,
            Standing::Departed(reason) => Some(reason),
            _ => return Ok(Released::NoRoom),
        };
        let mut tally = Tally::default();
        tally.lost(reason);
        self.metrics().add(&tally);
        Ok(Released::Lost(reason))
    }

    /// Revokes the lease with `token`, or the leases of all holders without a token. Returns how
    /// many leases were revoked.
    ///
    /// Without a token, or if `token` was granted last and its lease has been released, also ends a
    /// `min_hold` block, which counts as one lease.
    ///
    /// # Errors
    /// [`CallError::Store`] if the store fails.
    pub async fn revoke(&self, key: Key, token: Option<FencingToken>) -> Result<usize, CallError> {
        // The edit names the holders by id, and the block by its end. An edit that revoked all
        // holders at its commit could not be repeated after an unknown outcome: it would revoke the
        // next holder too.
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
        let after = self.commit(key, Op::Revoke(ids.clone(), block)).await?.snapshot;
        let is_revoked = |id: &&LeaseId| after.standing(**id) == Standing::Departed(Reason::Revoked);
        let is_lifted = block.is_some() && after.record.blocked_until != block;
        let revoked = ids.iter().filter(is_revoked).count() + usize::from(is_lifted);
        self.metrics().revoked(revoked);
        Ok(revoked)
    }

    /// Returns the key's record, if the key was ever granted to anyone and its record has not been
    /// purged since.
    ///
    /// # Errors
    /// [`CallError::Store`] if the store fails.
    pub async fn get(&self, key: Key) -> Result<Option<Snapshot>, CallError> {
        let found = self.in_time(async { Ok(self.store().inspect(key).await?) }).await?;
        // A record without a token was never granted: it only remembers settled ids, or a batch is
        // about to make it.
        Ok(found.filter(|snapshot| snapshot.record.token != FencingToken::default()))
    }

    /// Reads a page of records. If one caller requests many pages at the same time, they are read a
    /// few at a time, so that they do not delay the pages of other callers.
    ///
    /// # Errors
    /// [`CallError::Store`] if the store fails.
    pub async fn list(&self, query: ListQuery) -> Result<Page, CallError> {
        let _turn = self.turn().await;
        self.page(query).await
    }

    /// Waits for the caller's turn to have a page read or to be sent a large answer.
    pub(crate) async fn turn(&self) -> Turn {
        self.caller.turn().await
    }

    /// Reads a page of records. To be called when it is the caller's turn.
    pub(crate) async fn page(&self, query: ListQuery) -> Result<Page, CallError> {
        self.in_time(async { Ok(self.store().list(query).await?) }).await
    }

    /// Waits until nothing is left to commit. That can take as long as an outage of the store,
    /// because the ids of calls that have ended are given up again until that succeeds.
    pub async fn settle(&self) {
        self.committer.settle().await;
    }

    /// Stops repeating commits that failed.
    pub(crate) fn give_up(&self) {
        self.committer.give_up();
    }

    async fn commit(&self, key: Key, op: Op) -> Result<Done, CallError> {
        self.in_time(async { Ok(self.committer.submit(&self.caller, key, op).await?) }).await
    }

    /// Fails a call that takes longer than [`Bounds::call`].
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
