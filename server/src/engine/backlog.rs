//! The operations that await their commit, by key and in their order.
//!
//! Each operation has a rank: the round that its caller gave it ([`super::caller`]), and a number
//! that orders the operations of one round. A key is ready if it has operations and is not in
//! flight. Ready keys are taken in the order of their first operations' ranks.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap};

use tokio::sync::oneshot;
use tokio::time::Instant;

use super::op::Op;
use super::reply::{Leftover, Reply};
use crate::lease::Key;

/// How many keys a batch has at most.
const BATCH_KEYS: usize = 1000;
/// How many bytes a batch has at most, far below the limit of a MongoDB command (16 MiB).
const BATCH_BYTES: usize = 4 * 1024 * 1024;
/// How many bytes an edit has at most. The rest goes into the next edit of the key.
const EDIT_BYTES: usize = 512 * 1024;
/// How many operations an edit has at most: as many as a record can have holders and waiters, each
/// of which is looked up among the operations.
const EDIT_OPS: usize = 2048;
/// How many operations a batch has at most, of all its edits.
const BATCH_OPS: usize = 16 * 1024;
/// How many operations that nobody awaits may be queued. More are dropped, which is safe. A call
/// that ends during an outage leaves one operation, which ends its lease or entry. If dropped, these
/// lapse later. The daemon repeats its own operations some seconds later.
pub(super) const UNANSWERED: usize = 16 * 1024;

/// When an operation is committed, relative to others: its round, and a number that orders the
/// operations of one round.
pub(super) type Rank = (u64, u64);

/// An operation, and where its result goes.
#[derive(Debug)]
pub(super) struct Pending {
    pub(super) rank: Rank,
    pub(super) op: Op,
    pub(super) reply: Reply,
}

impl PartialEq for Pending {
    fn eq(&self, other: &Self) -> bool {
        self.rank == other.rank
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
        self.rank.cmp(&other.rank)
    }
}

/// Operations of a caller that waits for room in the queue.
#[derive(Debug)]
pub(super) struct Entering {
    pub(super) ops: usize,
    pub(super) admit: oneshot::Sender<()>,
}

/// The operations of one key, in the order of their ranks.
pub(super) type KeyOps = (Key, Vec<Reverse<Pending>>);

/// Operations that are taken out of the backlog to be committed together.
#[derive(Debug)]
pub(super) struct Taken {
    pub(super) keys: Vec<KeyOps>,
}

impl Taken {
    /// How many of the operations are awaited.
    pub(super) fn awaited(&self) -> usize {
        self.keys.iter().map(|(_, ops)| awaited(ops)).sum()
    }
}

#[derive(Debug)]
pub(super) struct Backlog {
    /// Keys with operations, or in flight.
    slots: HashMap<Key, Slot>,
    /// Ready keys, by the rank of their next operation. An entry whose rank is not that of its slot
    /// any more is skipped.
    ready: BinaryHeap<Reverse<(Rank, Key)>>,
    ready_keys: usize,
    /// The round that is being committed. The first operation of each key that was taken has a round;
    /// this is the latest of them.
    pub(super) round: u64,
    /// The latest round that an operation was given.
    latest_round: u64,
    last_number: u64,
    /// How many awaited operations are queued or in flight.
    pub(super) queued: usize,
    most_queued: usize,
    /// The callers that wait for room, by rank.
    pub(super) entering: BTreeMap<Rank, Entering>,
    /// How many operations that nobody awaits are queued.
    unanswered: usize,
    /// The leftovers that must be committed again. While there are any, a task is about to do it.
    failed: Vec<Leftover>,
    /// Leftovers are not committed again any more.
    gives_up: bool,
    /// How many batches are in flight, or about to be.
    pub(super) batches: usize,
    /// How many keys the latest batch had.
    latest: usize,
}

#[derive(Debug, Default)]
struct Slot {
    ops: BinaryHeap<Reverse<Pending>>,
    /// The rank under which the key is among the ready ones.
    ready_at: Option<Rank>,
    in_flight: bool,
}

impl Backlog {
    /// `most_queued`: how many awaited operations there may be.
    pub(super) fn new(most_queued: usize) -> Self {
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

    /// Gives the next rank of a round.
    pub(super) fn rank(&mut self, round: u64) -> Rank {
        self.last_number += 1;
        (round, self.last_number)
    }

    /// Makes `ops` more awaited operations count as queued, if there is room and no other caller
    /// waits for it.
    pub(super) fn try_enter(&mut self, ops: usize) -> bool {
        let has_room = self.entering.is_empty() && self.queued + ops <= self.most_queued;
        if has_room {
            self.queued += ops;
        }
        has_room
    }

    /// Returns how many operations nobody awaits, without those in flight.
    pub(super) fn unanswered(&self) -> usize {
        self.unanswered + self.failed.len()
    }

    /// Whether nothing is queued, in flight or to be committed again.
    pub(super) fn is_idle(&self) -> bool {
        self.batches == 0 && self.failed.is_empty()
    }

    /// Keeps leftovers that must be committed again, as far as they still matter and there is room.
    /// Returns true if the first ones were kept, so that a task must be started to commit them.
    pub(super) fn keep(&mut self, failed: Vec<Leftover>) -> bool {
        if self.gives_up {
            return false;
        }
        let was_empty = self.failed.is_empty();
        let now = Instant::now();
        let room = UNANSWERED.saturating_sub(self.unanswered());
        self.failed.extend(failed.into_iter().filter(|leftover| now < leftover.until).take(room));
        was_empty && !self.failed.is_empty()
    }

    pub(super) fn take_failed(&mut self) -> Vec<Leftover> {
        std::mem::take(&mut self.failed)
    }

    /// Keeps no leftover from now on, and drops those that it has.
    pub(super) fn give_up(&mut self) {
        self.gives_up = true;
        self.failed.clear();
    }

    /// Queues an operation under a rank of `round`.
    pub(super) fn add(&mut self, round: u64, key: Key, op: Op, reply: Reply) {
        if !reply.is_awaited() {
            self.unanswered += 1;
        }
        self.latest_round = self.latest_round.max(round);
        let rank = self.rank(round);
        let slot = self.slots.entry(key.clone()).or_default();
        if slot.ops.is_empty() {
            // Most keys have one operation, and `push` would allocate room for four.
            slot.ops.reserve_exact(1);
        }
        slot.ops.push(Reverse(Pending { rank, op, reply }));
        self.ready_keys += slot.get_ready(&mut self.ready, key);
    }

    /// Returns true if a batch may begin beside those in flight, of which there may be `most`. A
    /// batch beside others waits until as many keys are ready as the latest batch had, divided by
    /// `most`: a batch of the first few operations to arrive would make all batches small.
    pub(super) fn may_begin(&self, most: usize) -> bool {
        let enough = if self.batches == 0 { 1 } else { (self.latest / most).max(1) };
        self.batches < most && self.ready_keys >= enough
    }

    /// Takes out the next batch. Its keys are in flight from now on.
    pub(super) fn take(&mut self) -> Taken {
        let mut taken = Taken { keys: Vec::with_capacity(self.ready_keys.min(BATCH_KEYS)) };
        let (mut ops, mut bytes) = (0, 0);
        while taken.keys.len() < BATCH_KEYS && ops < BATCH_OPS && bytes < BATCH_BYTES {
            let Some(Reverse((rank, key))) = self.ready.pop() else { break };
            let Some(slot) = self.slots.get_mut(&key).filter(|slot| slot.ready_at == Some(rank)) else {
                continue;
            };
            self.ready_keys -= 1;
            self.round = self.round.max(rank.0);
            slot.ready_at = None;
            slot.in_flight = true;
            let (some, weight) = slot.take();
            self.unanswered -= some.len() - awaited(&some);
            ops += some.len();
            bytes += weight;
            taken.keys.push((key, some));
        }
        self.latest = taken.keys.len();
        taken
    }

    /// Puts back operations of keys in flight. They keep their ranks.
    pub(super) fn put_back(&mut self, left: Vec<KeyOps>) {
        for (key, ops) in left {
            let slot = self.slots.entry(key).or_default();
            let awaited = awaited(&ops);
            self.unanswered += ops.len() - awaited;
            self.queued += awaited;
            slot.ops.extend(ops);
        }
    }

    /// Notes that keys are not in flight any more, and that `awaited` operations have left the
    /// queue.
    pub(super) fn landed(&mut self, keys: &[KeyOps], awaited: usize) {
        for (key, _) in keys {
            let Some(slot) = self.slots.get_mut(key) else { continue };
            slot.in_flight = false;
            if slot.ops.is_empty() {
                self.slots.remove(key);
            } else {
                self.ready_keys += slot.get_ready(&mut self.ready, key.clone());
            }
        }
        if self.slots.is_empty() {
            // Nothing is queued, so no caller is ahead of another one.
            self.round = self.latest_round;
        }
        self.leave(awaited);
    }

    /// Notes that `ops` awaited operations have left the queue, and admits the callers for which
    /// there is room now.
    pub(super) fn leave(&mut self, ops: usize) {
        self.queued -= ops;
        while let Some(next) = self.entering.first_entry() {
            if self.queued + next.get().ops > self.most_queued {
                return;
            }
            let Entering { ops, admit } = next.remove();
            self.queued += ops;
            // Does not fail: a caller that gives up removes its entry first.
            let _ = admit.send(());
        }
    }
}

impl Slot {
    /// Makes the key ready, at the rank of its next operation. Returns how many ready keys that
    /// adds.
    fn get_ready(&mut self, ready: &mut BinaryHeap<Reverse<(Rank, Key)>>, key: Key) -> usize {
        let Some(Reverse(next)) = self.ops.peek() else { return 0 };
        if self.in_flight || self.ready_at == Some(next.rank) {
            return 0;
        }
        ready.push(Reverse((next.rank, key)));
        usize::from(self.ready_at.replace(next.rank).is_none())
    }

    /// Takes the operations that may go into one edit, in their order. Returns them with their
    /// approximate size in bytes.
    fn take(&mut self) -> (Vec<Reverse<Pending>>, usize) {
        if self.ops.len() <= EDIT_OPS {
            let all = self.ops.iter().map(|Reverse(pending)| pending.op.weight()).sum();
            if all < EDIT_BYTES {
                let mut ops = std::mem::take(&mut self.ops).into_sorted_vec();
                // Rising in `Reverse` is falling in rank.
                ops.reverse();
                return (ops, all);
            }
        }
        let (mut ops, mut weight) = (Vec::new(), 0);
        while weight < EDIT_BYTES && ops.len() < EDIT_OPS {
            let Some(pending) = self.ops.pop() else { break };
            weight += pending.0.op.weight();
            ops.push(pending);
        }
        (ops, weight)
    }
}

fn awaited(ops: &[Reverse<Pending>]) -> usize {
    ops.iter().filter(|Reverse(pending)| pending.reply.is_awaited()).count()
}
