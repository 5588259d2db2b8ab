//! Commits operations in batches. While a batch is in flight, operations gather for the next one.
//! An idle committer commits at once whatever all ready callers have submitted. No timer delays a
//! batch.
//!
//! Operations for a key that is in flight go into its next edit, so batches in flight have
//! different keys. A batch runs in a task of its own. It is completed even if all its callers go
//! away, and if it panics they receive an error with the outcome unknown.

use std::cmp::Reverse;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task::yield_now;
use tokio::time::{Instant, sleep};

use super::backlog::{Backlog, Entering, KeyOps, Rank, Taken, UNANSWERED};
use super::caller::Caller;
use super::notify::Subscribers;
use super::op::{EditBuilder, Op};
use super::queue::WaitQueue;
use super::reply::{CommitResult, Done, Leftover, Reply, lost};
use crate::boot_instant::BootInstant;
use crate::lease::{Edit, Key, LeaseId};
use crate::panics::contain;
use crate::store::{Committed, Store, StoreError};

/// How many operations of one caller enter the queue together. The caller waits for room before its
/// next ones, so that other callers enter too.
const CHUNK: usize = 1000;
/// The pause before leftovers are committed again. The store has already repeated their batch until
/// its deadline.
const PAUSE: Duration = Duration::from_secs(1);

/// Gathers operations into batches and commits them.
#[derive(Debug)]
pub(super) struct Committer<S> {
    store: Arc<S>,
    subscribers: Arc<Subscribers>,
    deadline: Duration,
    backlog: Mutex<Backlog>,
    idle: Notify,
    /// [`CHUNK`], but at most the size of the queue, because a larger chunk would never have room.
    chunk: usize,
    /// The daemon as a caller whose operations go before most others.
    daemon: Caller,
    /// The daemon as a caller that takes turns with the others.
    nudger: Caller,
    /// Where batches run. Kept, because a call that is dropped outside of any runtime also cleans
    /// up.
    runtime: Handle,
}

/// The edits of one batch, and where their results go.
#[derive(Debug)]
struct Batch {
    edits: Vec<(Key, Edit)>,
    /// The replies, each with the position of its edit, in the order of the edits.
    replies: Vec<(usize, Reply)>,
    /// The operations that do not fit into one edit with those before them.
    left: Vec<KeyOps>,
}

/// Room in the queue that no operation uses yet. Dropping this value gives the room back.
#[derive(Debug)]
struct Room<'a, S> {
    committer: &'a Committer<S>,
    ops: usize,
}

impl<S> Room<'_, S> {
    /// Leaves the room to the operations that use it now.
    fn release(mut self) {
        self.ops = 0;
    }
}

impl<S> Drop for Room<'_, S> {
    fn drop(&mut self) {
        if self.ops > 0 {
            self.committer.backlog().leave(self.ops);
        }
    }
}

impl<S> Committer<S> {
    fn backlog(&self) -> MutexGuard<'_, Backlog> {
        // No code panics half-way through a change under this lock.
        self.backlog.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until there is room for `ops` operations of this caller. The caller with the lowest
    /// rank is first.
    async fn enter(&self, caller: &Caller, ops: usize) -> Room<'_, S> {
        match self.try_enter(caller, ops) {
            Ok(room) => room,
            Err(waiting) => waiting.admitted().await,
        }
    }

    fn try_enter(&self, caller: &Caller, ops: usize) -> Result<Room<'_, S>, Waiting<'_, S>> {
        let mut backlog = self.backlog();
        let room = Room { committer: self, ops };
        if backlog.try_enter(ops) {
            return Ok(room);
        }
        let (admit, admitted) = oneshot::channel();
        let round = caller.next_round(backlog.round);
        let rank = backlog.rank(round);
        backlog.entering.insert(rank, Entering { ops, admit });
        Err(Waiting { room: Some(room), rank, admitted })
    }
}

/// A caller that waits for room. Dropping it gives up, and gives the room back if it has just been
/// granted.
struct Waiting<'a, S> {
    room: Option<Room<'a, S>>,
    rank: Rank,
    admitted: oneshot::Receiver<()>,
}

impl<'a, S> Waiting<'a, S> {
    async fn admitted(mut self) -> Room<'a, S> {
        // Never fails: the sender is dropped only with the committer, which outlives this value.
        let _ = (&mut self.admitted).await;
        match self.room.take() {
            Some(room) => room,
            // Unreachable: only this function and the drop take the room.
            None => std::future::pending().await,
        }
    }
}

impl<S> Drop for Waiting<'_, S> {
    fn drop(&mut self) {
        let Some(room) = self.room.take() else { return };
        let is_waiting = room.committer.backlog().entering.remove(&self.rank).is_some();
        if is_waiting {
            // The room has not been granted, so there is none to give back.
            room.release();
        }
    }
}

impl<S: Store> Committer<S> {
    /// `deadline`: how long a batch is repeated after failures. `most_queued`: how many operations
    /// may await their commit.
    pub(super) fn new(
        store: Arc<S>,
        subscribers: Arc<Subscribers>,
        deadline: Duration,
        most_queued: usize,
    ) -> Self {
        Self {
            store,
            subscribers,
            deadline,
            backlog: Mutex::new(Backlog::new(most_queued)),
            idle: Notify::new(),
            chunk: CHUNK.min(most_queued),
            daemon: Caller::daemon(),
            nudger: Caller::new(),
            runtime: Handle::current(),
        }
    }

    pub(super) fn store(&self) -> &S {
        &self.store
    }

    /// Commits an operation with the next edit of its key.
    pub(super) async fn submit(self: &Arc<Self>, caller: &Caller, key: Key, op: Op) -> CommitResult {
        let (sender, receiver) = oneshot::channel();
        let room = self.enter(caller, 1).await;
        self.gather(caller, [(key, op, Reply::One(sender))]);
        room.release();
        receiver.await.unwrap_or_else(|_| Err(lost()))
    }

    /// Commits many operations. Returns their results in the order of `ops`, and `None` for an
    /// operation that became obsolete.
    pub(super) async fn submit_each(
        self: &Arc<Self>,
        caller: &Caller,
        ops: Vec<(Key, Op)>,
    ) -> Vec<Option<CommitResult>> {
        let count = ops.len();
        let (sender, mut receiver) = mpsc::channel(count.max(1));
        let mut ops = ops.into_iter().enumerate();
        while ops.len() > 0 {
            let chunk = ops.len().min(self.chunk);
            let room = self.enter(caller, chunk).await;
            let some = ops.by_ref().take(chunk);
            let reply = |position| Reply::OneOfMany(position, sender.clone());
            self.gather(caller, some.map(|(position, (key, op))| (key, op, reply(position))));
            room.release();
        }
        drop(sender);
        let mut results = vec![None; count];
        while let Some((position, result)) = receiver.recv().await {
            results[position] = Some(result);
        }
        results
    }

    /// Commits the daemon's own operations, as [`Self::submit_each`].
    pub(super) async fn submit_own(self: &Arc<Self>, ops: Vec<(Key, Op)>) -> Vec<Option<CommitResult>> {
        self.submit_each(&self.daemon, ops).await
    }

    /// Commits operations that nobody awaits. Drops them if there are too many, as [`UNANSWERED`]
    /// explains.
    pub(super) fn submit_unanswered(
        self: &Arc<Self>,
        caller: &Caller,
        ops: impl IntoIterator<Item = (Key, Op)>,
    ) {
        self.gather(caller, ops.into_iter().map(|(key, op)| (key, op, Reply::Nobody)));
    }

    /// Gives up an id that the daemon picked for a call that has ended. `lasts` is how long the
    /// id's entry and lease can last. For that long the operation is repeated after failures of the
    /// store: nobody else knows the id, so an outage would leave the key taken.
    pub(super) fn give_up_id(self: &Arc<Self>, caller: &Caller, key: Key, id: LeaseId, lasts: Duration) {
        let leftover = Leftover { key, id, until: Instant::now() + lasts };
        self.gather(caller, [leftover.into_queued()]);
    }

    /// Returns the daemon as the caller of its own operations.
    pub(super) fn daemon(&self) -> &Caller {
        &self.daemon
    }

    /// Nudges these keys. Leases on thousands of keys may end in the same second, and touches must
    /// not wait for all of the nudges. So nudges take turns with other callers.
    pub(super) fn submit_nudges(self: &Arc<Self>, keys: Vec<Key>) {
        self.submit_unanswered(&self.nudger, keys.into_iter().map(|key| (key, Op::Nudge)));
    }

    /// Waits until nothing is queued, in flight or to be committed again.
    pub(super) async fn settle(&self) {
        loop {
            // Before the check, so that a notification after the check is not missed.
            let idle = self.idle.notified();
            if self.backlog().is_idle() {
                return;
            }
            idle.await;
        }
    }

    /// Commits no leftover again from now on: the daemon is about to end.
    pub(super) fn give_up(&self) {
        self.backlog().give_up();
        self.idle.notify_waiters();
    }

    #[cfg(test)]
    pub(super) fn queued(&self) -> usize {
        self.backlog().queued
    }

    #[cfg(test)]
    pub(super) fn entering(&self) -> usize {
        self.backlog().entering.len()
    }

    #[cfg(test)]
    pub(super) fn unanswered(&self) -> usize {
        self.backlog().unanswered()
    }

    fn gather(self: &Arc<Self>, caller: &Caller, ops: impl IntoIterator<Item = (Key, Op, Reply)>) {
        self.gather_in(self.backlog(), caller, ops);
    }

    fn gather_in(
        self: &Arc<Self>,
        mut backlog: MutexGuard<'_, Backlog>,
        caller: &Caller,
        ops: impl IntoIterator<Item = (Key, Op, Reply)>,
    ) {
        for (key, op, reply) in ops {
            if reply.is_awaited() || backlog.unanswered() < UNANSWERED {
                let round = caller.take_round(backlog.round);
                backlog.add(round, key, op, reply);
            }
        }
        if backlog.may_begin(self.store.batches()) {
            backlog.batches += 1;
            self.runtime.spawn(Arc::clone(self).work());
        }
    }

    /// Commits batch after batch until nothing is ready.
    async fn work(self: Arc<Self>) {
        loop {
            // Lets callers that are ready, or were answered by the last batch, add their operations
            // first.
            yield_now().await;
            let mut taken = {
                let mut backlog = self.backlog();
                let taken = backlog.take();
                if taken.keys.is_empty() {
                    backlog.batches -= 1;
                    break;
                }
                taken
            };
            let awaited = taken.awaited();
            // A panic has been logged where it happened. Dropping the replies tells their callers
            // that the outcome is unknown, and the keys are free for the next batch.
            let _ = contain(self.commit(&mut taken)).await;
            self.backlog().landed(&taken.keys, awaited);
        }
        self.idle.notify_waiters();
    }

    async fn commit(self: &Arc<Self>, taken: &mut Taken) {
        let Batch { edits, replies, left } = merge(taken, &self.subscribers.queue);
        if !left.is_empty() {
            self.backlog().put_back(left);
        }
        if edits.is_empty() {
            return;
        }
        let edits = Arc::new(edits);
        // Before the commit, because the age of a touch counts from when it was sent.
        let sent_at = BootInstant::now();
        let outcome = self.store.commit(Arc::clone(&edits), self.deadline).await;
        self.answer(&edits, replies, sent_at, outcome);
    }

    /// Passes the records to the subscribers, then the results to the calls.
    fn answer(
        self: &Arc<Self>,
        edits: &[(Key, Edit)],
        replies: Vec<(usize, Reply)>,
        sent_at: BootInstant,
        outcome: Result<Committed, StoreError>,
    ) {
        let mut records = match outcome {
            Ok(Committed { records, is_repeated }) => Ok((records.into_iter(), is_repeated)),
            Err(error) => {
                tracing::warn!(keys = edits.len(), %error, "a batch failed");
                Err(error)
            }
        };
        let mut replies = replies.into_iter().peekable();
        let mut failed = Vec::new();
        for (position, (_, edit)) in edits.iter().enumerate() {
            let result = match &mut records {
                Ok((records, is_repeated)) => {
                    let record = records.next().unwrap_or_else(|| Err(lost()));
                    record.map(|record| Done { snapshot: Arc::new(record), is_repeated: *is_repeated })
                }
                Err(error) => Err(error.clone()),
            };
            if let Ok(done) = &result {
                self.subscribers.local_commit(&done.snapshot, edit, sent_at);
            }
            while let Some((_, reply)) = replies.next_if(|(edit, _)| *edit == position) {
                failed.extend(reply.send(result.clone()));
            }
        }
        if !failed.is_empty() {
            self.commit_again(failed);
        }
    }

    /// Commits leftovers again after a pause, together with leftovers that fail meanwhile.
    fn commit_again(self: &Arc<Self>, failed: Vec<Leftover>) {
        if !self.backlog().keep(failed) {
            return;
        }
        // Weak, because a pause must not keep the store open.
        let committer = Arc::downgrade(self);
        self.runtime.spawn(async move {
            sleep(PAUSE).await;
            let Some(committer) = committer.upgrade() else { return };
            let mut backlog = committer.backlog();
            let again = backlog.take_failed().into_iter().map(Leftover::into_queued);
            // Under the same lock, because between two locks `settle` could find nothing left. With
            // a new caller, because there may be thousands of leftovers, and they must take turns
            // with other callers.
            committer.gather_in(backlog, &Caller::new(), again);
        });
    }
}

/// Merges operations into edits, without those that are obsolete or whose callers have gone. The
/// keys stay in `taken`.
fn merge(taken: &mut Taken, queue: &WaitQueue) -> Batch {
    let edits = Vec::with_capacity(taken.keys.len());
    let mut batch = Batch { edits, replies: Vec::with_capacity(taken.keys.len()), left: Vec::new() };
    for (key, ops) in &mut taken.keys {
        let mut edit = EditBuilder::default();
        let before = batch.replies.len();
        let mut ops = std::mem::take(ops).into_iter();
        while let Some(Reverse(mut pending)) = ops.next() {
            // A call that waits with the same id, as after a reconnect, needs the waiter's entry.
            // Its acquire may have been queued later and committed earlier than this cancellation.
            if matches!(pending.op, Op::Cancel(id) if queue.has(key, id)) {
                pending.op = Op::Nudge;
            }
            if pending.reply.is_closed() || pending.op.is_obsolete() {
                continue;
            }
            if !edit.merge(&pending.op) {
                let left = std::iter::once(Reverse(pending)).chain(ops).collect();
                batch.left.push((key.clone(), left));
                break;
            }
            batch.replies.push((batch.edits.len(), pending.reply));
        }
        if batch.replies.len() > before {
            batch.edits.push((key.clone(), edit.build()));
        }
    }
    batch
}
