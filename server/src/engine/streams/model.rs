//! A store, this daemon's commits to it and two keepalive streams, moved a step at a time: nothing is concurrent, and
//! anything may come late.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use proptest::prelude::*;
use proptest::test_runner::TestCaseError;
use tokio::time::advance;

use super::{Carriage, Carried, Carrier, Loss};
use crate::boot_instant::{BootInstant, suspend};
use crate::engine::op::{Gathered, Part};
use crate::engine::{Touched, touched};
use crate::lease::{
    Acquisition, Edit, FencingToken, Key, LeaseId, Mode, Reason, Record, Rules, Snapshot, Timestamp, Ttl,
    step,
};

const RULES: Rules = Rules { grace: Duration::from_millis(100), place: Duration::from_millis(900) };
const START: i64 = 1_000_000;
/// Fewer than the departures that are remembered, so that none comes back.
pub(crate) const LEASES: u8 = 5;
pub(crate) const STREAMS: usize = 2;

#[derive(Debug, Clone, Copy)]
pub(crate) enum Op {
    Pass(u64),
    /// This daemon's machine is suspended; the store's time goes on.
    Suspend(u64),
    /// A message of a stream: one lease, or all.
    Name(usize, u8),
    All(usize),
    Acquire(Side, u8, Option<u32>, u64),
    Touch(Side, u8),
    Release(Side, u8),
    Revoke(Side, usize),
    /// What has gathered is sent; reaches the store; is read again there; its record comes back.
    Send,
    Reach,
    Reread,
    Land,
    /// Someone reads the record, and what was read comes to this daemon some time.
    Read,
    Hear(usize),
    /// A stream is answered, or told unasked.
    Answer(usize),
    Tell(usize),
    /// All of it without anything in between: what has gathered is committed; a message is answered.
    Commit,
    Talk(usize, u8),
}

#[derive(Debug, Clone, Copy)]
pub(crate) enum Side {
    Here,
    Elsewhere,
}

/// What is wrong about what the streams' side hears.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Twin {
    Right,
    /// Stale records cannot be told from new ones.
    StaleLooksNew,
    /// The age of a touch counts from its answer.
    AgeFromReceipt,
    /// What others did does not end that a lease is fresh.
    Deaf,
    /// This daemon's clock stands still while its machine is suspended.
    Asleep,
}

fn id(number: u8) -> LeaseId {
    LeaseId::from([number + 1; 16])
}

/// A message: what it names, and what it is answered as far as memory does not do.
type Message = Vec<(Arc<Carriage>, Option<Touched>)>;

#[derive(Default)]
struct Stream {
    carrier: Option<Carrier>,
    /// Ready to be answered.
    answers: Vec<Message>,
}

struct Commit {
    edit: Edit,
    sent_at: BootInstant,
    messages: Vec<(usize, Message)>,
    result: Option<Snapshot>,
}

/// The store, this daemon's commits to it, and two streams.
pub(crate) struct World {
    twin: Twin,
    start: BootInstant,
    /// Suspension that this daemon's clock has missed.
    overslept: Duration,
    record: Record,
    carried: Arc<Carried>,
    streams: [Stream; STREAMS],
    gathering: Vec<Part>,
    waiting: Vec<(usize, Message)>,
    in_flight: Option<Commit>,
    reads: Vec<Snapshot>,
    /// The truth of each lease: since when it holds, until when it lasts, and how it went.
    granted: HashMap<LeaseId, (FencingToken, i64)>,
    expiry: HashMap<LeaseId, Timestamp>,
    gone: HashMap<LeaseId, Reason>,
    /// What this daemon has been shown to be gone.
    learned: HashSet<LeaseId>,
    /// What the streams have been told to be lost: in answers, unasked.
    answered: Vec<Arc<Carriage>>,
    told: Vec<Arc<Carriage>>,
}

impl World {
    pub(crate) fn new(twin: Twin) -> Self {
        let carried = Arc::new(Carried::default());
        let stream = || Stream { carrier: Some(Carrier::new(&carried)), answers: Vec::new() };
        Self {
            twin,
            start: BootInstant::now(),
            overslept: Duration::ZERO,
            record: Record::vacant(Key::try_from("key").expect("a key")),
            streams: [stream(), stream()],
            carried,
            gathering: Vec::new(),
            waiting: Vec::new(),
            in_flight: None,
            reads: Vec::new(),
            granted: HashMap::new(),
            expiry: HashMap::new(),
            gone: HashMap::new(),
            learned: HashSet::new(),
            answered: Vec::new(),
            told: Vec::new(),
        }
    }

    fn now(&self) -> Timestamp {
        Timestamp(START) + (BootInstant::now() - self.start) + self.overslept
    }

    fn snapshot(&self) -> Snapshot {
        Snapshot { record: self.record.clone(), now: self.now() }
    }

    fn apply(&mut self, edit: &Edit) {
        // As in a store: only an arrival or a release makes a record.
        if self.record.rev == 0 && edit.enqueued().is_empty() && edit.released().is_empty() {
            return;
        }
        self.record = step(self.record.clone(), edit, self.now(), &RULES);
        for holder in &self.record.holders {
            self.granted.entry(holder.id).or_insert(self.record.version());
            self.expiry.insert(holder.id, holder.expires_at);
        }
        self.gone.extend(self.record.departures.iter().map(|departure| (departure.id, departure.reason)));
    }

    /// Remembers what a record shows that comes to this daemon.
    fn learn(&mut self, snapshot: &Snapshot) {
        let shown = snapshot.record.version();
        let is_gone = |id: &LeaseId| !snapshot.record.holders.iter().any(|holder| holder.id == *id);
        let granted_before = self.granted.iter().filter(|(_, granted)| **granted <= shown);
        self.learned.extend(granted_before.map(|(id, _)| *id).filter(is_gone));
    }

    pub(crate) async fn take(&mut self, op: Op) -> Result<(), TestCaseError> {
        match op {
            Op::Pass(millis) => advance(Duration::from_millis(millis)).await,
            Op::Suspend(millis) if self.twin == Twin::Asleep => {
                self.overslept += Duration::from_millis(millis);
            }
            Op::Suspend(millis) => suspend(Duration::from_millis(millis)),
            Op::Name(stream, lease) => {
                let lease = (self.record.key.clone(), id(lease));
                let named = self.carrier(stream).naming(usize::MAX).name(lease).expect("room");
                self.message(stream, vec![named]);
            }
            Op::All(stream) => {
                let named = self.carrier(stream).all();
                self.message(stream, named);
            }
            Op::Acquire(side, lease, limit, ttl) => {
                self.call(side, Part::Acquire(acquisition(lease, limit, ttl)))
            }
            Op::Touch(side, lease) => self.call(side, Part::Touch(id(lease))),
            Op::Release(side, lease) => self.call(side, Part::Release(id(lease))),
            Op::Revoke(side, place) => {
                let id = self.record.holders.get(place).map(|holder| holder.id);
                self.call(side, Part::Revoke(id.into_iter().collect(), None));
            }
            Op::Send if self.in_flight.is_none() => self.send(),
            Op::Reach => self.reach(),
            Op::Reread => {
                let again = self.snapshot();
                if let Some(result) = self.in_flight.as_mut().and_then(|commit| commit.result.as_mut()) {
                    *result = again;
                }
            }
            Op::Land => self.land(),
            Op::Read if self.record.rev > 0 => self.reads.push(self.snapshot()),
            Op::Hear(which) if !self.reads.is_empty() => {
                let read = self.reads.swap_remove(which % self.reads.len());
                self.hear(read);
            }
            Op::Answer(stream) => self.answer(stream)?,
            Op::Tell(stream) => self.tell(stream)?,
            Op::Commit => self.commit(),
            Op::Talk(stream, lease) => {
                let lease = (self.record.key.clone(), id(lease));
                let named = self.carrier(stream).naming(usize::MAX).name(lease).expect("room");
                self.message(stream, vec![named]);
                self.commit();
                self.answer(stream)?;
            }
            Op::Send | Op::Read | Op::Hear(_) => {}
        }
        Ok(())
    }

    fn carrier(&mut self, stream: usize) -> &mut Carrier {
        self.streams[stream].carrier.as_mut().expect("until the end")
    }

    fn message(&mut self, stream: usize, named: Vec<Arc<Carriage>>) {
        let now = BootInstant::now();
        let due = named.iter().filter(|lease| !lease.is_fresh(now));
        let touches: Vec<Part> = due.map(|lease| Part::Touch(lease.lease().1)).collect();
        let message: Message = named.into_iter().map(|lease| (lease, None)).collect();
        if touches.is_empty() {
            self.streams[stream].answers.push(message);
        } else {
            self.gathering.extend(touches);
            self.waiting.push((stream, message));
        }
    }

    fn call(&mut self, side: Side, part: Part) {
        match side {
            Side::Here => self.gathering.push(part),
            Side::Elsewhere => {
                let mut gathered = Gathered::default();
                gathered.merge(&part);
                self.apply(&gathered.into_edit());
            }
        }
    }

    fn send(&mut self) {
        let mut gathered = Gathered::default();
        let rest = self.gathering.iter().position(|part| !gathered.merge(part));
        // What does not fit waits for the next edit; messages are all touches, which always fit, so they go first.
        let rest = rest.map_or_else(Vec::new, |rest| self.gathering.split_off(rest));
        self.gathering.clear();
        let (touches, rest): (Vec<_>, Vec<_>) =
            rest.into_iter().partition(|part| matches!(part, Part::Touch(_)));
        assert!(touches.iter().all(|touch| gathered.merge(touch)), "a touch goes with anything");
        self.gathering = rest;
        let messages = std::mem::take(&mut self.waiting);
        self.in_flight =
            Some(Commit { edit: gathered.into_edit(), sent_at: BootInstant::now(), messages, result: None });
    }

    fn commit(&mut self) {
        self.reach();
        self.land();
        self.send();
        self.reach();
        self.land();
    }

    fn reach(&mut self) {
        let Some(mut commit) = self.in_flight.take() else { return };
        if commit.result.is_none() {
            self.apply(&commit.edit);
            commit.result = Some(self.snapshot());
        }
        self.in_flight = Some(commit);
    }

    fn land(&mut self) {
        let Some(Commit { edit, sent_at, messages, result: Some(result) }) =
            self.in_flight.take_if(|commit| commit.result.is_some())
        else {
            return;
        };
        self.learn(&result);
        let result = Arc::new(result);
        let counted_from = if self.twin == Twin::AgeFromReceipt { BootInstant::now() } else { sent_at };
        self.carried.own(&result, &edit, counted_from);
        for (stream, mut message) in messages {
            for (lease, answer) in &mut message {
                let id = lease.lease().1;
                *answer = edit.touched().contains(&id).then(|| touched(&result, id));
            }
            self.streams[stream].answers.push(message);
        }
    }

    fn hear(&mut self, mut read: Snapshot) {
        self.learn(&read);
        match self.twin {
            Twin::Deaf => return,
            Twin::StaleLooksNew => read.record.token.0 += 1_000_000,
            Twin::Right | Twin::AgeFromReceipt | Twin::Asleep => {}
        }
        self.carried.foreign(&Arc::new(read));
    }

    fn answer(&mut self, stream: usize) -> Result<(), TestCaseError> {
        let Some(message) = self.streams[stream].answers.pop() else { return Ok(()) };
        let by_commit: Vec<_> = message.iter().map(|(_, answer)| *answer).collect();
        let settled = self.carrier(stream).settle(message);
        for ((lease, answer), by_commit) in settled.into_iter().zip(by_commit) {
            let id = lease.lease().1;
            match answer {
                Touched::Unreadable => prop_assert!(false, "every record can be read"),
                Touched::Kept(remaining) => {
                    prop_assert!(!self.learned.contains(&id), "kept, after its loss was learned");
                    if by_commit.is_none() {
                        let truth = self.expiry[&id] - self.now();
                        prop_assert!(remaining <= truth, "{remaining:?} from memory, in truth {truth:?}");
                    }
                }
                // It was not granted yet.
                Touched::Lost(None) if by_commit == Some(Touched::Lost(None)) => {}
                Touched::Lost(reason) => {
                    prop_assert_eq!(reason, self.gone.get(&id).copied(), "answered");
                    prop_assert!(!is_among(&self.told, &lease), "answered after it was told unasked");
                    self.answered.push(lease);
                }
            }
        }
        Ok(())
    }

    fn tell(&mut self, stream: usize) -> Result<(), TestCaseError> {
        for (lease, Loss(reason)) in self.carrier(stream).lost().now_or_never().unwrap_or_default() {
            prop_assert!(reason.is_some(), "the reason is known to the record");
            prop_assert_eq!(reason, self.gone.get(&lease.lease().1).copied(), "told unasked");
            prop_assert!(!is_among(&self.answered, &lease), "told after it was answered");
            prop_assert!(!is_among(&self.told, &lease), "told twice");
            self.told.push(lease);
        }
        Ok(())
    }

    /// Everything under way arrives, and this daemon commits once more: every loss is known and has been told.
    pub(crate) fn end(&mut self) -> Result<(), TestCaseError> {
        for _ in 0..3 {
            self.commit();
        }
        for stream in 0..STREAMS {
            while !self.streams[stream].answers.is_empty() {
                self.answer(stream)?;
            }
            self.tell(stream)?;
            for lease in self.carrier(stream).all() {
                let id = lease.lease().1;
                prop_assert!(!self.gone.contains_key(&id), "lost, and the stream was not told");
            }
        }
        self.streams = Default::default();
        let left = self.carried.keys();
        prop_assert!(left.is_empty(), "streams that ended carry {left:?}");
        Ok(())
    }
}

fn is_among(some: &[Arc<Carriage>], lease: &Arc<Carriage>) -> bool {
    some.iter().any(|one| Arc::ptr_eq(one, lease))
}

fn acquisition(lease: u8, limit: Option<u32>, ttl: u64) -> Arc<Acquisition> {
    Arc::new(Acquisition {
        mode: if limit.is_some() { Mode::Shared } else { Mode::Exclusive },
        shared_limit: limit.unwrap_or(1),
        ttl: Ttl::new(Duration::from_millis(ttl)).expect("at least a millisecond"),
        ..Acquisition::waiting(id(lease))
    })
}
