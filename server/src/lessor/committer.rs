//! Natural batching: while a batch is in flight, the next one gathers; an idle daemon commits at once what all those
//! bring who are ready.
//!
//! What arrives for a key that is in flight merges into its next edit, so batches in flight have disjoint keys and
//! the order per key is the order of arrival. No timers, no added delay. A batch runs in its own task: it completes
//! whatever becomes of the calls that wait for it.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task::yield_now;

use super::audience::Audience;
use super::part::{Gathered, Part};
use crate::boot_instant::BootInstant;
use crate::lease::{Edit, Key, Snapshot};
use crate::store::{Outcome, Store, StoreError};

/// Keys in one batch.
const BATCH_KEYS: usize = 1000;
/// Bytes in one batch, far below what a command may have (16 MiB).
const BATCH_BYTES: usize = 4 * 1024 * 1024;
/// Bytes in one edit; the rest goes into the next.
const EDIT_BYTES: usize = 512 * 1024;

type Answer = Result<Arc<Snapshot>, StoreError>;

/// Gathers parts and commits them.
#[derive(Debug)]
pub(super) struct Committer<S> {
    store: Arc<S>,
    audience: Arc<Audience>,
    deadline: Duration,
    state: Mutex<State>,
    idle: Notify,
    /// Where batches run: a call may be dropped, and clean up, outside of any runtime.
    runtime: Handle,
}

#[derive(Debug, Default)]
struct State {
    /// Keys with something to commit or in flight.
    slots: HashMap<Key, Slot>,
    /// Keys with something to commit that are not in flight; in the order of their oldest part.
    ready: VecDeque<Key>,
    /// In flight, or about to be.
    batches: usize,
    /// Keys in the latest batch.
    latest: usize,
}

#[derive(Debug, Default)]
struct Slot {
    gathering: VecDeque<Pending>,
    in_flight: bool,
}

#[derive(Debug)]
struct Pending {
    part: Part,
    reply: Reply,
}

/// Who waits for the record.
#[derive(Debug)]
enum Reply {
    Nobody,
    One(oneshot::Sender<Answer>),
    /// The position of this answer among those of one submission.
    OneOfMany(usize, mpsc::Sender<(usize, Answer)>),
}

impl Reply {
    /// Whether the call has ended; then its part need not be committed any more.
    fn is_closed(&self) -> bool {
        match self {
            Self::Nobody => false,
            Self::One(sender) => sender.is_closed(),
            Self::OneOfMany(_, sender) => sender.is_closed(),
        }
    }

    fn send(self, answer: Answer) {
        match self {
            Self::Nobody => {}
            Self::One(sender) => drop(sender.send(answer)),
            // The channel has room for every answer, so this fails only when nobody listens.
            Self::OneOfMany(position, sender) => drop(sender.try_send((position, answer))),
        }
    }
}

/// What is committed together, and who waits for it.
#[derive(Default)]
struct Batch {
    edits: Vec<(Key, Edit)>,
    /// By the position of the edit, in order.
    replies: Vec<(usize, Reply)>,
}

impl<S: Store> Committer<S> {
    /// `deadline`: how long a batch is repeated after failures.
    pub(super) fn new(store: Arc<S>, audience: Arc<Audience>, deadline: Duration) -> Self {
        Self {
            store,
            audience,
            deadline,
            state: Mutex::default(),
            idle: Notify::new(),
            runtime: Handle::current(),
        }
    }

    pub(super) fn store(&self) -> &S {
        &self.store
    }

    /// Commits a part with the next edit of its key and returns the record after it.
    pub(super) async fn submit(self: &Arc<Self>, key: Key, part: Part) -> Answer {
        let (sender, receiver) = oneshot::channel();
        self.gather([(key, Pending { part, reply: Reply::One(sender) })]);
        receiver.await.unwrap_or_else(|_| Err(lost()))
    }

    /// The same for many parts, handed over in one go; the records stand in the order of `parts`.
    pub(super) async fn submit_all(
        self: &Arc<Self>,
        parts: Vec<(Key, Part)>,
    ) -> Result<Vec<Arc<Snapshot>>, StoreError> {
        self.submit_each(parts).await?.into_iter().collect::<Option<_>>().ok_or_else(lost)
    }

    /// The same for parts that may have become moot, and have no record then.
    pub(super) async fn submit_each(
        self: &Arc<Self>,
        parts: Vec<(Key, Part)>,
    ) -> Result<Vec<Option<Arc<Snapshot>>>, StoreError> {
        let count = parts.len();
        let (sender, mut receiver) = mpsc::channel(count.max(1));
        self.gather(parts.into_iter().enumerate().map(|(position, (key, part))| {
            (key, Pending { part, reply: Reply::OneOfMany(position, sender.clone()) })
        }));
        drop(sender);
        let mut records = vec![None; count];
        while let Some((position, answer)) = receiver.recv().await {
            records[position] = Some(answer?);
        }
        Ok(records)
    }

    /// Commits parts for which nobody waits.
    pub(super) fn submit_unanswered(self: &Arc<Self>, parts: impl IntoIterator<Item = (Key, Part)>) {
        self.gather(parts.into_iter().map(|(key, part)| (key, Pending { part, reply: Reply::Nobody })));
    }

    /// Waits until nothing gathers and nothing is in flight.
    pub(super) async fn settle(&self) {
        loop {
            let idle = self.idle.notified();
            if self.state().batches == 0 {
                return;
            }
            idle.await;
        }
    }

    fn gather(self: &Arc<Self>, parts: impl IntoIterator<Item = (Key, Pending)>) {
        let mut state = self.state();
        for (key, pending) in parts {
            state.add(key, pending);
        }
        if state.may_begin(self.store.batches()) {
            state.batches += 1;
            self.runtime.spawn(Arc::clone(self).work());
        }
    }

    /// Commits what has gathered, batch after batch, until nothing has.
    async fn work(self: Arc<Self>) {
        loop {
            // What came in together with the first part, or was answered by the last batch, is about to add its own.
            yield_now().await;
            let Batch { edits, replies } = {
                let mut state = self.state();
                let batch = state.take_batch();
                if batch.edits.is_empty() {
                    state.batches -= 1;
                    break;
                }
                batch
            };
            let edits = Arc::new(edits);
            let sent_at = BootInstant::now();
            let outcome = self.store.commit(Arc::clone(&edits), self.deadline).await;
            self.answer(&edits, replies, sent_at, outcome);
            self.state().landed(&edits);
        }
        self.idle.notify_waiters();
    }

    /// Tells all who hear of records, then the calls that wait for this commit.
    fn answer(
        &self,
        edits: &[(Key, Edit)],
        replies: Vec<(usize, Reply)>,
        sent_at: BootInstant,
        outcome: Result<Vec<Snapshot>, StoreError>,
    ) {
        let mut records = match outcome {
            Ok(records) => Ok(records.into_iter().map(Arc::new)),
            Err(error) => {
                tracing::warn!(keys = edits.len(), %error, "a batch failed");
                Err(error)
            }
        };
        let mut replies = replies.into_iter().peekable();
        for (position, (_, edit)) in edits.iter().enumerate() {
            let answer = match &mut records {
                Ok(records) => records.next().ok_or_else(lost),
                Err(error) => Err(error.clone()),
            };
            if let Ok(record) = &answer {
                self.audience.own(record, edit.touched(), sent_at);
            }
            while let Some((_, reply)) = replies.next_if(|(edit, _)| *edit == position) {
                reply.send(answer.clone());
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing in here panics half-way through a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn add(&mut self, key: Key, pending: Pending) {
        let slot = self.slots.entry(key.clone()).or_default();
        if slot.gathering.is_empty() && !slot.in_flight {
            self.ready.push_back(key);
        }
        slot.gathering.push_back(pending);
    }

    /// Whether a batch may begin beside those in flight, of which there are to be no more than `most`. One that took the
    /// first few to come would make all smaller.
    fn may_begin(&self, most: usize) -> bool {
        let enough = if self.batches == 0 { 1 } else { (self.latest / most).max(1) };
        self.batches < most && self.ready.len() >= enough
    }

    /// The next batch; its keys are in flight from here on.
    fn take_batch(&mut self) -> Batch {
        let mut batch = Batch::default();
        let mut bytes = 0;
        while batch.edits.len() < BATCH_KEYS && bytes < BATCH_BYTES {
            let Some(key) = self.ready.pop_front() else { break };
            let Some(slot) = self.slots.get_mut(&key) else { continue };
            let Some((edit, weight)) = slot.take_edit(batch.edits.len(), &mut batch.replies) else {
                self.slots.remove(&key);
                continue;
            };
            slot.in_flight = true;
            bytes += weight;
            batch.edits.push((key, edit));
        }
        self.latest = batch.edits.len();
        batch
    }

    /// Frees keys whose batch has returned.
    fn landed(&mut self, edits: &[(Key, Edit)]) {
        for (key, _) in edits {
            let Some(slot) = self.slots.get_mut(key) else { continue };
            slot.in_flight = false;
            if slot.gathering.is_empty() {
                self.slots.remove(key);
            } else {
                self.ready.push_back(key.clone());
            }
        }
    }
}

impl Slot {
    /// The next edit and about how many bytes it has; `None` if nobody needs what has gathered. Adds those who wait for
    /// it to `replies`, under its `position`.
    fn take_edit(&mut self, position: usize, replies: &mut Vec<(usize, Reply)>) -> Option<(Edit, usize)> {
        let (mut gathered, mut weight) = (Gathered::default(), 0);
        let before = replies.len();
        while weight < EDIT_BYTES {
            let Some(Pending { part, reply }) = self.gathering.pop_front() else { break };
            if reply.is_closed() || part.is_moot() {
                continue;
            }
            if !gathered.merge(&part) {
                self.gathering.push_front(Pending { part, reply });
                break;
            }
            weight += part.weight();
            replies.push((position, reply));
        }
        (replies.len() > before).then(|| (gathered.into_edit(), weight))
    }
}

/// The answer when the task that would have given it is gone, which takes a shutdown or a defect.
fn lost() -> StoreError {
    StoreError::Unavailable { outcome: Outcome::Unknown, cause: "the commit was given up".to_owned() }
}
