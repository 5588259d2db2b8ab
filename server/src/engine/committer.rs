//! Natural batching: while a batch is in flight, the next one gathers; an idle daemon commits at once what all those
//! bring who are ready.
//!
//! What arrives for a key that is in flight merges into its next edit, so batches in flight have disjoint keys. When
//! more is queued than a batch or an edit takes, callers take turns ([`Caller`]); each caller's commands stay in their
//! order. No timers, no added delay. A batch runs in its own task: it completes whatever becomes of the calls that wait
//! for it, and a batch that panics answers them that the outcome is unknown.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task::yield_now;
use tokio::time::{Instant, sleep};

use super::caller::Caller;
use super::notify::Audience;
use super::op::{Gathered, Part};
use super::queue::Line;
use crate::boot_instant::BootInstant;
use crate::lease::{Edit, Key, LeaseId, Snapshot, Standing};
use crate::panics::contain;
use crate::store::{Committed, Outcome, Store, StoreError};

/// Keys in one batch.
const BATCH_KEYS: usize = 1000;
/// Bytes in one batch, far below what a command may have (16 MiB).
const BATCH_BYTES: usize = 4 * 1024 * 1024;
/// Bytes in one edit; the rest goes into the next.
const EDIT_BYTES: usize = 512 * 1024;
/// Parts in one edit: as many as there can be holders and waiters of a key. A record is compared with all of them.
const EDIT_PARTS: usize = 2048;
/// Parts in one batch, of all its edits.
const BATCH_PARTS: usize = 16 * 1024;
/// Parts that enter the queue in one go. More wait for room in between, so that others enter too.
const PORTION: usize = 1000;
/// Parts without a caller that may be queued; more are dropped. Calls that end during an outage leave one each, to give
/// back what they asked for. Time does that as well: a place in line lapses, a lease runs out. Nor is anything lost with
/// the daemon's own: what it meant to look after is looked after some seconds later.
pub(super) const UNANSWERED: usize = 16 * 1024;
/// The pause before what ended calls left behind is committed again. The store itself has repeated the batch until the deadline.
const PAUSE: Duration = Duration::from_secs(1);

/// What a call is answered.
pub(super) type Answer = Result<Done, StoreError>;

/// A part that has been committed.
#[derive(Debug, Clone)]
pub(super) struct Done {
    /// The record after it.
    pub(super) snapshot: Arc<Snapshot>,
    /// As [`Committed::is_repeated`] of its batch.
    pub(super) is_repeated: bool,
}

/// Gathers parts and commits them.
#[derive(Debug)]
pub(super) struct Committer<S> {
    store: Arc<S>,
    audience: Arc<Audience>,
    deadline: Duration,
    state: Mutex<State>,
    idle: Notify,
    /// [`PORTION`], or all the room there is.
    portion: usize,
    /// The daemon itself as a caller.
    daemon: Caller,
    /// And as one that takes turns like others.
    nudger: Caller,
    /// Where batches run: a call may be dropped, and clean up, outside of any runtime.
    runtime: Handle,
}

#[derive(Debug)]
struct State {
    /// Keys with something to commit or in flight.
    slots: HashMap<Key, Slot>,
    /// The slots with something to commit that are not in flight, by their next part. An entry whose place is not that
    /// of its slot any more is skipped.
    ready: BinaryHeap<Reverse<(Place, Key)>>,
    /// How many slots are ready.
    ready_keys: usize,
    /// The round that is being committed: the latest of a part that was the next one of its key.
    round: u64,
    /// The latest round that a part was given.
    latest_round: u64,
    last_number: u64,
    /// Parts that are queued or in flight, but for those that nobody waits for.
    queued: usize,
    /// How many of them there may be.
    most_queued: usize,
    /// Who waits for room, by when they came up.
    entering: BTreeMap<Place, Entering>,
    /// Parts gathered that nobody waits for.
    unanswered: usize,
    /// What ended calls left behind and the store failed to commit. While there is any, a task is about to commit it again.
    failed: Vec<Leftover>,
    /// Nothing that fails is committed again.
    gives_up: bool,
    /// In flight, or about to be.
    batches: usize,
    /// Keys in the latest batch.
    latest: usize,
}

/// Where a part stands: its round, and the order of arrival within the round.
type Place = (u64, u64);

#[derive(Debug, Default)]
struct Slot {
    /// The next part first.
    gathering: BinaryHeap<Reverse<Pending>>,
    /// Its place among those that are ready.
    ready_at: Option<Place>,
    in_flight: bool,
}

#[derive(Debug)]
struct Pending {
    place: Place,
    part: Part,
    reply: Reply,
}

impl PartialEq for Pending {
    fn eq(&self, other: &Self) -> bool {
        self.place == other.place
    }
}

impl Eq for Pending {}

impl PartialOrd for Pending {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Pending {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.place.cmp(&other.place)
    }
}

/// Parts that wait for room in the queue.
#[derive(Debug)]
struct Entering {
    parts: usize,
    admit: oneshot::Sender<()>,
}

/// Who waits for the record.
#[derive(Debug)]
enum Reply {
    Nobody,
    /// Nobody, but the part is committed again if that failed.
    Leftover(Box<Leftover>),
    One(oneshot::Sender<Answer>),
    /// The position of this answer among those of one submission.
    OneOfMany(usize, mpsc::Sender<(usize, Answer)>),
}

/// An id that the daemon picked and that no call tells anybody of any more. It is to be given up.
#[derive(Debug)]
struct Leftover {
    key: Key,
    id: LeaseId,
    /// From then on there is nothing to give up any more.
    until: Instant,
}

impl Leftover {
    /// Whether it is still to be given up, and may be later.
    fn is_left(&self, answer: &Answer) -> bool {
        match answer {
            // The record had no room to remember it.
            Ok(done) => done.snapshot.standing(self.id) == Standing::Unknown,
            Err(error) => matches!(error, StoreError::Unavailable { .. }),
        }
    }

    /// Its part as that is queued, for the first time or again.
    fn into_queued(self) -> (Key, Part, Reply) {
        (self.key.clone(), Part::GiveUp(self.id), Reply::Leftover(Box::new(self)))
    }
}

impl Reply {
    /// Whether a call waits for the record.
    fn is_awaited(&self) -> bool {
        !matches!(self, Self::Nobody | Self::Leftover(_))
    }

    /// Whether the call has ended; then its part need not be committed any more.
    fn is_closed(&self) -> bool {
        match self {
            Self::Nobody | Self::Leftover(_) => false,
            Self::One(sender) => sender.is_closed(),
            Self::OneOfMany(_, sender) => sender.is_closed(),
        }
    }

    /// Tells the call. Returns what is to be committed again, because the store failed or the record had no room to remember
    /// it: that passes by itself.
    fn send(self, answer: Answer) -> Option<Leftover> {
        match self {
            Self::Leftover(leftover) if leftover.is_left(&answer) => return Some(*leftover),
            Self::Nobody | Self::Leftover(_) => {}
            Self::One(sender) => drop(sender.send(answer)),
            // The channel has room for every answer, so this fails only when nobody listens.
            Self::OneOfMany(position, sender) => drop(sender.try_send((position, answer))),
        }
        None
    }
}

/// What is taken out of the queue to be committed together.
#[derive(Debug)]
struct Taken {
    keys: Vec<(Key, Vec<Reverse<Pending>>)>,
}

/// What is committed together, and who waits for it.
#[derive(Debug)]
struct Batch {
    edits: Vec<(Key, Edit)>,
    /// By the position of the edit, in order.
    replies: Vec<(usize, Reply)>,
    /// Parts that do not go into the same edit as those before them.
    left: Vec<(Key, Vec<Reverse<Pending>>)>,
}

/// Room in the queue that is not used yet.
#[derive(Debug)]
struct Room<'a, S> {
    committer: &'a Committer<S>,
    parts: usize,
}

impl<S> Room<'_, S> {
    /// It is no longer this one's to return: the parts are in the queue, or the room was not given yet.
    fn release(mut self) {
        self.parts = 0;
    }
}

impl<S> Drop for Room<'_, S> {
    fn drop(&mut self) {
        if self.parts > 0 {
            self.committer.state().leave(self.parts);
        }
    }
}

impl<S> Committer<S> {
    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing in here panics half-way through a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until there is room for so many parts of this caller. Whoever has the lowest round is first.
    async fn enter(&self, caller: &Caller, parts: usize) -> Room<'_, S> {
        match self.try_enter(caller, parts) {
            Ok(room) => room,
            Err(waiting) => waiting.admitted().await,
        }
    }

    fn try_enter(&self, caller: &Caller, parts: usize) -> Result<Room<'_, S>, Waiting<'_, S>> {
        let mut state = self.state();
        let room = Room { committer: self, parts };
        if state.entering.is_empty() && state.queued + parts <= state.most_queued {
            state.queued += parts;
            return Ok(room);
        }
        let (admit, admitted) = oneshot::channel();
        let round = caller.next_round(state.round);
        let place = state.place(round);
        state.entering.insert(place, Entering { parts, admit });
        Err(Waiting { room: Some(room), place, admitted })
    }
}

/// Parts that wait for room. Dropping it leaves the line, or returns the room if it has just been given.
struct Waiting<'a, S> {
    room: Option<Room<'a, S>>,
    place: Place,
    admitted: oneshot::Receiver<()>,
}

impl<'a, S> Waiting<'a, S> {
    async fn admitted(mut self) -> Room<'a, S> {
        // The sender goes only with the committer itself, which outlives this.
        let _ = (&mut self.admitted).await;
        match self.room.take() {
            Some(room) => room,
            None => std::future::pending().await,
        }
    }
}

impl<S> Drop for Waiting<'_, S> {
    fn drop(&mut self) {
        let Some(room) = self.room.take() else { return };
        let is_waiting = room.committer.state().entering.remove(&self.place).is_some();
        if is_waiting {
            // There is nothing to return yet.
            room.release();
        }
    }
}

impl<S: Store> Committer<S> {
    /// `deadline`: how long a batch is repeated after failures. `most_queued`: parts that may await their commit.
    pub(super) fn new(
        store: Arc<S>,
        audience: Arc<Audience>,
        deadline: Duration,
        most_queued: usize,
    ) -> Self {
        Self {
            store,
            audience,
            deadline,
            state: Mutex::new(State::new(most_queued)),
            idle: Notify::new(),
            portion: PORTION.min(most_queued),
            daemon: Caller::daemon(),
            nudger: Caller::new(),
            runtime: Handle::current(),
        }
    }

    pub(super) fn store(&self) -> &S {
        &self.store
    }

    /// Commits a part with the next edit of its key and returns what came of it.
    pub(super) async fn submit(self: &Arc<Self>, caller: &Caller, key: Key, part: Part) -> Answer {
        let (sender, receiver) = oneshot::channel();
        let room = self.enter(caller, 1).await;
        self.gather(caller, [(key, part, Reply::One(sender))]);
        room.release();
        receiver.await.unwrap_or_else(|_| Err(lost()))
    }

    /// Commits many parts. The answers stand in the order of `parts`; parts that have become obsolete have none.
    pub(super) async fn submit_each(
        self: &Arc<Self>,
        caller: &Caller,
        parts: Vec<(Key, Part)>,
    ) -> Vec<Option<Answer>> {
        let count = parts.len();
        let (sender, mut receiver) = mpsc::channel(count.max(1));
        let mut parts = parts.into_iter().enumerate();
        while parts.len() > 0 {
            let portion = parts.len().min(self.portion);
            let room = self.enter(caller, portion).await;
            let some = parts.by_ref().take(portion);
            let reply = |position| Reply::OneOfMany(position, sender.clone());
            self.gather(caller, some.map(|(position, (key, part))| (key, part, reply(position))));
            room.release();
        }
        drop(sender);
        let mut answers = vec![None; count];
        while let Some((position, answer)) = receiver.recv().await {
            answers[position] = Some(answer);
        }
        answers
    }

    /// Commits the daemon's own parts, as [`Self::submit_each`].
    pub(super) async fn submit_own(self: &Arc<Self>, parts: Vec<(Key, Part)>) -> Vec<Option<Answer>> {
        self.submit_each(&self.daemon, parts).await
    }

    /// Commits parts for which nobody waits. Too many are dropped: whatever they are for, time does it too.
    pub(super) fn submit_unanswered(
        self: &Arc<Self>,
        caller: &Caller,
        parts: impl IntoIterator<Item = (Key, Part)>,
    ) {
        self.gather(caller, parts.into_iter().map(|(key, part)| (key, part, Reply::Nobody)));
    }

    /// Gives up an id that a call has left behind which has ended. Tries again after failures of the store, for as long as
    /// it `lasts`: an outage must not leave a lease held that nobody was told of.
    pub(super) fn give_up_id(self: &Arc<Self>, caller: &Caller, key: Key, id: LeaseId, lasts: Duration) {
        let leftover = Leftover { key, id, until: Instant::now() + lasts };
        self.gather(caller, [leftover.into_queued()]);
    }

    /// The daemon as a caller, for its own parts.
    pub(super) fn daemon(&self) -> &Caller {
        &self.daemon
    }

    /// Admits whoever's turn has come. Leases of thousands of keys may end in the same second; touches do not wait for all
    /// that follows from it.
    pub(super) fn submit_nudges(self: &Arc<Self>, keys: Vec<Key>) {
        self.submit_unanswered(&self.nudger, keys.into_iter().map(|key| (key, Part::Nudge)));
    }

    /// Waits until nothing gathers, nothing is in flight, and nothing is to be committed again.
    pub(super) async fn settle(&self) {
        loop {
            let idle = self.idle.notified();
            if self.state().is_idle() {
                return;
            }
            idle.await;
        }
    }

    /// Commits nothing again from here on: the daemon is about to end.
    pub(super) fn give_up(&self) {
        let mut state = self.state();
        state.gives_up = true;
        state.failed.clear();
        drop(state);
        self.idle.notify_waiters();
    }

    #[cfg(test)]
    pub(super) fn queued(&self) -> usize {
        self.state().queued
    }

    #[cfg(test)]
    pub(super) fn entering(&self) -> usize {
        self.state().entering.len()
    }

    #[cfg(test)]
    pub(super) fn unanswered(&self) -> usize {
        self.state().unanswered()
    }

    fn gather(self: &Arc<Self>, caller: &Caller, parts: impl IntoIterator<Item = (Key, Part, Reply)>) {
        self.gather_in(self.state(), caller, parts);
    }

    fn gather_in(
        self: &Arc<Self>,
        mut state: MutexGuard<'_, State>,
        caller: &Caller,
        parts: impl IntoIterator<Item = (Key, Part, Reply)>,
    ) {
        for (key, part, reply) in parts {
            if !reply.is_awaited() {
                if state.unanswered() >= UNANSWERED {
                    continue;
                }
                state.unanswered += 1;
            }
            let round = caller.take_round(state.round);
            state.latest_round = state.latest_round.max(round);
            let place = state.place(round);
            state.add(key, Pending { place, part, reply });
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
            let mut taken = {
                let mut state = self.state();
                let taken = state.take();
                if taken.keys.is_empty() {
                    state.batches -= 1;
                    break;
                }
                taken
            };
            let answered = taken.answered();
            // Whatever panics in here has been logged where it did. Those who were not answered hear that the outcome is
            // unknown, as their senders are gone; the keys are free for the next batch.
            let _ = contain(self.commit(&mut taken)).await;
            self.state().landed(&taken.keys, answered);
        }
        self.idle.notify_waiters();
    }

    async fn commit(self: &Arc<Self>, taken: &mut Taken) {
        let Batch { edits, replies, left } = taken.merge(&self.audience.line);
        if !left.is_empty() {
            self.state().put_back(left);
        }
        if edits.is_empty() {
            return;
        }
        let edits = Arc::new(edits);
        let sent_at = BootInstant::now();
        let outcome = self.store.commit(Arc::clone(&edits), self.deadline).await;
        self.answer(&edits, replies, sent_at, outcome);
    }

    /// Tells all who hear of records, then the calls that wait for this commit.
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
            let answer = match &mut records {
                Ok((records, is_repeated)) => {
                    let record = records.next().unwrap_or_else(|| Err(lost()));
                    record.map(|record| Done { snapshot: Arc::new(record), is_repeated: *is_repeated })
                }
                Err(error) => Err(error.clone()),
            };
            if let Ok(done) = &answer {
                self.audience.own(&done.snapshot, edit, sent_at);
            }
            while let Some((_, reply)) = replies.next_if(|(edit, _)| *edit == position) {
                failed.extend(reply.send(answer.clone()));
            }
        }
        if !failed.is_empty() {
            self.commit_again(failed);
        }
    }

    /// Commits these again after a pause, together with what fails meanwhile.
    fn commit_again(self: &Arc<Self>, failed: Vec<Leftover>) {
        let mut state = self.state();
        let is_pending = !state.failed.is_empty();
        state.keep(failed);
        if is_pending || state.failed.is_empty() {
            return;
        }
        // A pause does not keep the store open.
        let committer = Arc::downgrade(self);
        self.runtime.spawn(async move {
            sleep(PAUSE).await;
            let Some(committer) = committer.upgrade() else { return };
            let mut state = committer.state();
            let again = std::mem::take(&mut state.failed).into_iter().map(Leftover::into_queued);
            // Under the same lock, so that there is no moment in which nothing seems to be left. As a caller of its own, which
            // takes turns: there may be thousands.
            committer.gather_in(state, &Caller::new(), again);
        });
    }
}

impl State {
    fn new(most_queued: usize) -> Self {
        Self {
            slots: HashMap::new(),
            ready: BinaryHeap::new(),
            ready_keys: 0,
            round: 0,
            latest_round: 0,
            last_number: 0,
            queued: 0,
            most_queued,
            entering: BTreeMap::new(),
            unanswered: 0,
            failed: Vec::new(),
            gives_up: false,
            batches: 0,
            latest: 0,
        }
    }

    fn place(&mut self, round: u64) -> Place {
        self.last_number += 1;
        (round, self.last_number)
    }

    /// Parts that nobody waits for, but for those in flight.
    fn unanswered(&self) -> usize {
        self.unanswered + self.failed.len()
    }

    fn is_idle(&self) -> bool {
        self.batches == 0 && self.failed.is_empty()
    }

    /// Keeps what is to be committed again, as far as it still matters and there is room.
    fn keep(&mut self, failed: Vec<Leftover>) {
        if self.gives_up {
            return;
        }
        let now = Instant::now();
        let room = UNANSWERED.saturating_sub(self.unanswered());
        self.failed.extend(failed.into_iter().filter(|leftover| now < leftover.until).take(room));
    }

    fn add(&mut self, key: Key, pending: Pending) {
        let slot = self.slots.entry(key.clone()).or_default();
        if slot.gathering.is_empty() {
            // Most parts are alone with their key.
            slot.gathering.reserve_exact(1);
        }
        slot.gathering.push(Reverse(pending));
        self.ready_keys += slot.get_ready(&mut self.ready, key);
    }

    /// Whether a batch may begin beside those in flight, of which there are to be no more than `most`. One that took the
    /// first few to come would make all smaller.
    fn may_begin(&self, most: usize) -> bool {
        let enough = if self.batches == 0 { 1 } else { (self.latest / most).max(1) };
        self.batches < most && self.ready_keys >= enough
    }

    /// What the next batch is made of; its keys are in flight from here on.
    fn take(&mut self) -> Taken {
        let mut taken = Taken { keys: Vec::with_capacity(self.ready_keys.min(BATCH_KEYS)) };
        let (mut parts, mut bytes) = (0, 0);
        while taken.keys.len() < BATCH_KEYS && parts < BATCH_PARTS && bytes < BATCH_BYTES {
            let Some(Reverse((place, key))) = self.ready.pop() else { break };
            let Some(slot) = self.slots.get_mut(&key).filter(|slot| slot.ready_at == Some(place)) else {
                continue;
            };
            self.ready_keys -= 1;
            self.round = self.round.max(place.0);
            slot.ready_at = None;
            slot.in_flight = true;
            let (some, weight) = slot.take();
            self.unanswered -= some.len() - answered(&some);
            parts += some.len();
            bytes += weight;
            taken.keys.push((key, some));
        }
        self.latest = taken.keys.len();
        taken
    }

    /// Puts back parts whose keys are in flight. They have their places still.
    fn put_back(&mut self, left: Vec<(Key, Vec<Reverse<Pending>>)>) {
        for (key, parts) in left {
            let slot = self.slots.entry(key).or_default();
            let answered = answered(&parts);
            self.unanswered += parts.len() - answered;
            self.queued += answered;
            slot.gathering.extend(parts);
        }
    }

    /// Frees keys whose batch has returned, and the room of so many parts.
    fn landed(&mut self, keys: &[(Key, Vec<Reverse<Pending>>)], parts: usize) {
        for (key, _) in keys {
            let Some(slot) = self.slots.get_mut(key) else { continue };
            slot.in_flight = false;
            if slot.gathering.is_empty() {
                self.slots.remove(key);
            } else {
                self.ready_keys += slot.get_ready(&mut self.ready, key.clone());
            }
        }
        if self.slots.is_empty() {
            // Nobody is behind any more, so nobody is ahead.
            self.round = self.latest_round;
        }
        self.leave(parts);
    }

    /// Counts `parts` out of the queue, and lets in the callers for which there is room now.
    fn leave(&mut self, parts: usize) {
        self.queued -= parts;
        while let Some(next) = self.entering.first_entry() {
            if self.queued + next.get().parts > self.most_queued {
                return;
            }
            let Entering { parts, admit } = next.remove();
            self.queued += parts;
            // Whoever has left the line is not in it, so this does not fail.
            let _ = admit.send(());
        }
    }
}

impl Slot {
    /// Enters the key among those that are ready, by its next part, and returns how many keys that adds.
    fn get_ready(&mut self, ready: &mut BinaryHeap<Reverse<(Place, Key)>>, key: Key) -> usize {
        let Some(Reverse(next)) = self.gathering.peek() else { return 0 };
        if self.in_flight || self.ready_at == Some(next.place) {
            return 0;
        }
        ready.push(Reverse((next.place, key)));
        usize::from(self.ready_at.replace(next.place).is_none())
    }

    /// The parts that may go into one edit, in their order, and about how many bytes they have.
    fn take(&mut self) -> (Vec<Reverse<Pending>>, usize) {
        if self.gathering.len() <= EDIT_PARTS {
            let all = self.gathering.iter().map(|Reverse(pending)| pending.part.weight()).sum();
            if all < EDIT_BYTES {
                let mut parts = std::mem::take(&mut self.gathering).into_sorted_vec();
                parts.reverse();
                return (parts, all);
            }
        }
        let (mut parts, mut weight) = (Vec::new(), 0);
        while weight < EDIT_BYTES && parts.len() < EDIT_PARTS {
            let Some(pending) = self.gathering.pop() else { break };
            weight += pending.0.part.weight();
            parts.push(pending);
        }
        (parts, weight)
    }
}

/// For how many of the parts somebody waits.
fn answered(parts: &[Reverse<Pending>]) -> usize {
    parts.iter().filter(|Reverse(pending)| pending.reply.is_awaited()).count()
}

impl Taken {
    /// For how many parts somebody waits.
    fn answered(&self) -> usize {
        self.keys.iter().map(|(_, parts)| answered(parts)).sum()
    }

    /// Makes edits of the parts, without those that nobody needs any more. The keys stay.
    ///
    /// Parts of two callers need not be in the order in which they came. So a place is not given up when a call stands in
    /// `line` with the same id, as after a reconnect.
    fn merge(&mut self, line: &Line) -> Batch {
        let edits = Vec::with_capacity(self.keys.len());
        let mut batch = Batch { edits, replies: Vec::with_capacity(self.keys.len()), left: Vec::new() };
        for (key, parts) in &mut self.keys {
            let mut gathered = Gathered::default();
            let before = batch.replies.len();
            let mut parts = std::mem::take(parts).into_iter();
            while let Some(Reverse(mut pending)) = parts.next() {
                if matches!(pending.part, Part::Cancel(id) if line.has(key, id)) {
                    pending.part = Part::Nudge;
                }
                if pending.reply.is_closed() || pending.part.is_moot() {
                    continue;
                }
                if !gathered.merge(&pending.part) {
                    let left = std::iter::once(Reverse(pending)).chain(parts).collect();
                    batch.left.push((key.clone(), left));
                    break;
                }
                batch.replies.push((batch.edits.len(), pending.reply));
            }
            if batch.replies.len() > before {
                batch.edits.push((key.clone(), gathered.into_edit()));
            }
        }
        batch
    }
}

/// The answer when the task that would have given it is gone, which takes a shutdown or a defect.
pub(super) fn lost() -> StoreError {
    StoreError::Unavailable { outcome: Outcome::Unknown, cause: "the commit was given up".to_owned() }
}
