//! A model of a store, of this daemon's commits to it and of two keepalive streams. It performs one
//! action at a time, so nothing is concurrent, and any message may be late.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use proptest::prelude::*;
use proptest::test_runner::TestCaseError;
use tokio::time::advance;

use super::{LeaseSet, Loss, StreamIndex, StreamLease};
use crate::boot_instant::{BootInstant, suspend};
use crate::engine::op::{EditBuilder, Op};
use crate::engine::{Touched, touched};
use crate::lease::{
    Acquisition, Edit, FencingToken, Key, LeaseId, LeaseName, Mode, Reason, Record, Rules, Snapshot,
    Timestamp, Ttl, step,
};

const RULES: Rules = Rules { grace: Duration::from_millis(100), waiter_ttl: Duration::from_millis(900) };
const START: i64 = 1_000_000;
/// Fewer leases than a record remembers departures, so that no lease is granted again after its
/// end.
pub(crate) const LEASES: u8 = 5;
pub(crate) const STREAMS: usize = 2;

#[derive(Debug, Clone, Copy)]
pub(crate) enum Action {
    /// Time passes.
    Pass(u64),
    /// This daemon's machine is suspended. The store's time goes on.
    Suspend(u64),
    /// A message on a stream names one lease.
    Name(usize, u8),
    /// A message on a stream names one lease, and is answered at once if its touch can be
    /// coalesced.
    Coalesce(usize, u8),
    /// A message on a stream names all leases of the stream.
    All(usize),
    Acquire(Side, u8, Option<u32>, u64),
    Touch(Side, u8),
    Release(Side, u8),
    Revoke(Side, usize),
    /// The queued operations are sent in one commit.
    Send,
    /// The commit in flight reaches the store.
    Reach,
    /// The result of the commit in flight is read again.
    Reread,
    /// The result of the commit in flight returns to this daemon.
    Return,
    /// The record is read. The read is under way to this daemon from now on.
    Read,
    /// One of the reads under way arrives at this daemon.
    Receive(usize),
    /// A message on a stream is answered.
    Answer(usize),
    /// A stream reports losses outside of answers.
    Report(usize),
    /// The queued operations are sent, reach the store and return, without other actions in
    /// between.
    Commit,
    /// A message on a stream names one lease, is committed and answered, without other actions in
    /// between.
    Exchange(usize, u8),
}

/// The daemon at which a call is made.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Side {
    /// This daemon.
    Here,
    /// Another daemon.
    Elsewhere,
}

/// What is deliberately wrong with the inputs of the streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mutant {
    /// Nothing.
    None,
    /// Stale records look newer than all others.
    StaleLooksNew,
    /// The age of a touch counts from its answer.
    AgeFromAnswer,
    /// Records that other daemons wrote are ignored.
    IgnoresRemoteReads,
    /// This daemon's clock stops while its machine is suspended.
    ClockStopsInSuspension,
}

fn id(number: u8) -> LeaseId {
    LeaseId::from([number + 1; 16])
}

/// The leases of a message with the results of their touches. `None` if the touch was coalesced.
type Message = Vec<(Arc<StreamLease>, Option<Touched>)>;

#[derive(Default)]
struct Stream {
    lease_set: Option<LeaseSet>,
    /// Messages that are ready to be answered.
    answers: Vec<Message>,
}

struct Commit {
    edit: Edit,
    sent_at: BootInstant,
    messages: Vec<(usize, Message)>,
    result: Option<Snapshot>,
}

/// The whole model.
pub(crate) struct World {
    mutant: Mutant,
    start: BootInstant,
    /// The total length of the suspensions during which this daemon's clock stopped.
    missed_suspension: Duration,
    record: Record,
    index: Arc<StreamIndex>,
    streams: [Stream; STREAMS],
    queued: Vec<Op>,
    unanswered: Vec<(usize, Message)>,
    in_flight: Option<Commit>,
    reads: Vec<Snapshot>,
    /// The version of the record at each grant.
    granted: HashMap<LeaseId, (FencingToken, i64)>,
    /// When each lease runs out.
    expiry: HashMap<LeaseId, Timestamp>,
    /// Why each lease ended.
    gone: HashMap<LeaseId, Reason>,
    /// The leases that a record has shown this daemon to be lost.
    learned: HashSet<LeaseId>,
    /// The leases whose loss was in an answer.
    answered: Vec<Arc<StreamLease>>,
    /// The leases whose loss was reported outside of answers.
    reported: Vec<Arc<StreamLease>>,
}

impl World {
    pub(crate) fn new(mutant: Mutant) -> Self {
        let index = Arc::new(StreamIndex::default());
        let stream = || Stream { lease_set: Some(LeaseSet::new(&index)), answers: Vec::new() };
        Self {
            mutant,
            start: BootInstant::now(),
            missed_suspension: Duration::ZERO,
            record: Record::vacant(Key::try_from("key").expect("a key")),
            streams: [stream(), stream()],
            index,
            queued: Vec::new(),
            unanswered: Vec::new(),
            in_flight: None,
            reads: Vec::new(),
            granted: HashMap::new(),
            expiry: HashMap::new(),
            gone: HashMap::new(),
            learned: HashSet::new(),
            answered: Vec::new(),
            reported: Vec::new(),
        }
    }

    fn now(&self) -> Timestamp {
        Timestamp(START) + (BootInstant::now() - self.start) + self.missed_suspension
    }

    fn snapshot(&self) -> Snapshot {
        Snapshot { record: self.record.clone(), now: self.now() }
    }

    fn apply(&mut self, edit: &Edit) {
        // As in a store, only an acquire or a release makes a record.
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

    /// Notes the losses that a record shows to this daemon.
    fn learn(&mut self, snapshot: &Snapshot) {
        let shown = snapshot.record.version();
        let is_gone = |id: &LeaseId| !snapshot.record.holders.iter().any(|holder| holder.id == *id);
        let granted_before = self.granted.iter().filter(|(_, granted)| **granted <= shown);
        self.learned.extend(granted_before.map(|(id, _)| *id).filter(is_gone));
    }

    pub(crate) async fn perform(&mut self, action: Action) -> Result<(), TestCaseError> {
        match action {
            Action::Pass(millis) => advance(Duration::from_millis(millis)).await,
            Action::Suspend(millis) if self.mutant == Mutant::ClockStopsInSuspension => {
                self.missed_suspension += Duration::from_millis(millis);
            }
            Action::Suspend(millis) => suspend(Duration::from_millis(millis)),
            Action::Name(stream, lease) => {
                let lease = LeaseName { key: self.record.key.clone(), id: id(lease) };
                let named = self.lease_set(stream).begin_message(usize::MAX).add(lease).expect("room");
                self.message(stream, vec![named]);
            }
            Action::Coalesce(stream, lease) => {
                let lease = LeaseName { key: self.record.key.clone(), id: id(lease) };
                if let Some(remaining) = self.lease_set(stream).coalesce([Some(&lease)].into_iter()) {
                    self.check_coalesced(lease.id, remaining[0])?;
                }
            }
            Action::All(stream) => {
                let named = self.lease_set(stream).begin_message_for_all();
                self.message(stream, named);
            }
            Action::Acquire(side, lease, limit, ttl) => {
                self.call(side, Op::Acquire(acquisition(lease, limit, ttl)))
            }
            Action::Touch(side, lease) => self.call(side, Op::Touch(id(lease))),
            Action::Release(side, lease) => self.call(side, Op::Release(id(lease))),
            Action::Revoke(side, slot) => {
                let id = self.record.holders.get(slot).map(|holder| holder.id);
                self.call(side, Op::Revoke(id.into_iter().collect(), None));
            }
            Action::Send if self.in_flight.is_none() => self.send(),
            Action::Reach => self.reach(),
            Action::Reread => {
                let again = self.snapshot();
                if let Some(result) = self.in_flight.as_mut().and_then(|commit| commit.result.as_mut()) {
                    *result = again;
                }
            }
            Action::Return => self.return_result(),
            Action::Read if self.record.rev > 0 => self.reads.push(self.snapshot()),
            Action::Receive(which) if !self.reads.is_empty() => {
                let read = self.reads.swap_remove(which % self.reads.len());
                self.receive(read);
            }
            Action::Answer(stream) => self.answer(stream)?,
            Action::Report(stream) => self.report(stream)?,
            Action::Commit => self.commit(),
            Action::Exchange(stream, lease) => {
                let lease = LeaseName { key: self.record.key.clone(), id: id(lease) };
                let named = self.lease_set(stream).begin_message(usize::MAX).add(lease).expect("room");
                self.message(stream, vec![named]);
                self.commit();
                self.answer(stream)?;
            }
            Action::Send | Action::Read | Action::Receive(_) => {}
        }
        Ok(())
    }

    fn lease_set(&mut self, stream: usize) -> &mut LeaseSet {
        self.streams[stream].lease_set.as_mut().expect("until the end")
    }

    fn message(&mut self, stream: usize, named: Vec<Arc<StreamLease>>) {
        let now = BootInstant::now();
        let due = named.iter().filter(|lease| lease.coalesce(now).is_none());
        let touches: Vec<Op> = due.map(|lease| Op::Touch(lease.name().id)).collect();
        let message: Message = named.into_iter().map(|lease| (lease, None)).collect();
        if touches.is_empty() {
            self.streams[stream].answers.push(message);
        } else {
            self.queued.extend(touches);
            self.unanswered.push((stream, message));
        }
    }

    fn call(&mut self, side: Side, op: Op) {
        match side {
            Side::Here => self.queued.push(op),
            Side::Elsewhere => {
                let mut builder = EditBuilder::default();
                builder.merge(&op);
                self.apply(&builder.build());
            }
        }
    }

    fn send(&mut self) {
        let mut builder = EditBuilder::default();
        let rest = self.queued.iter().position(|op| !builder.merge(op));
        // Operations that do not fit wait for the next edit. Touches always fit, so all touches of
        // the messages are in this one.
        let rest = rest.map_or_else(Vec::new, |rest| self.queued.split_off(rest));
        self.queued.clear();
        let (touches, rest): (Vec<_>, Vec<_>) = rest.into_iter().partition(|op| matches!(op, Op::Touch(_)));
        assert!(touches.iter().all(|touch| builder.merge(touch)), "a touch fits into any edit");
        self.queued = rest;
        let messages = std::mem::take(&mut self.unanswered);
        self.in_flight =
            Some(Commit { edit: builder.build(), sent_at: BootInstant::now(), messages, result: None });
    }

    fn commit(&mut self) {
        self.reach();
        self.return_result();
        self.send();
        self.reach();
        self.return_result();
    }

    fn reach(&mut self) {
        let Some(mut commit) = self.in_flight.take() else { return };
        if commit.result.is_none() {
            self.apply(&commit.edit);
            commit.result = Some(self.snapshot());
        }
        self.in_flight = Some(commit);
    }

    fn return_result(&mut self) {
        let Some(Commit { edit, sent_at, messages, result: Some(result) }) =
            self.in_flight.take_if(|commit| commit.result.is_some())
        else {
            return;
        };
        self.learn(&result);
        let result = Arc::new(result);
        let counted_from = if self.mutant == Mutant::AgeFromAnswer { BootInstant::now() } else { sent_at };
        self.index.local_commit(&result, &edit, counted_from);
        for (stream, mut message) in messages {
            for (lease, answer) in &mut message {
                let id = lease.name().id;
                *answer = edit.touched().contains(&id).then(|| touched(&result, id));
            }
            self.streams[stream].answers.push(message);
        }
    }

    fn receive(&mut self, mut read: Snapshot) {
        self.learn(&read);
        match self.mutant {
            Mutant::IgnoresRemoteReads => return,
            Mutant::StaleLooksNew => read.record.token.0 += 1_000_000,
            Mutant::None | Mutant::AgeFromAnswer | Mutant::ClockStopsInSuspension => {}
        }
        self.index.remote_read(&Arc::new(read));
    }

    fn answer(&mut self, stream: usize) -> Result<(), TestCaseError> {
        let Some(message) = self.streams[stream].answers.pop() else { return Ok(()) };
        let by_commit: Vec<_> = message.iter().map(|(_, answer)| *answer).collect();
        let settled = self.lease_set(stream).settle(message);
        for ((lease, answer), by_commit) in settled.into_iter().zip(by_commit) {
            let id = lease.name().id;
            match answer {
                Touched::Unreadable => prop_assert!(false, "every record can be read"),
                Touched::Kept(remaining) if by_commit.is_none() => self.check_coalesced(id, remaining)?,
                Touched::Kept(_) => self.check_kept(id)?,
                // The lease had not been granted at the commit.
                Touched::Lost(None) if by_commit == Some(Touched::Lost(None)) => {}
                Touched::Lost(reason) => {
                    prop_assert_eq!(reason, self.gone.get(&id).copied(), "answered");
                    prop_assert!(!is_among(&self.reported, &lease), "answered after it was reported");
                    self.answered.push(lease);
                }
            }
        }
        Ok(())
    }

    fn check_kept(&self, id: LeaseId) -> Result<(), TestCaseError> {
        prop_assert!(!self.learned.contains(&id), "kept, although a record has shown its loss");
        Ok(())
    }

    fn check_coalesced(&self, id: LeaseId, remaining: Duration) -> Result<(), TestCaseError> {
        self.check_kept(id)?;
        let truth = self.expiry[&id] - self.now();
        prop_assert!(remaining <= truth, "{remaining:?} in a coalesced answer, {truth:?} in the store");
        Ok(())
    }

    fn report(&mut self, stream: usize) -> Result<(), TestCaseError> {
        for (lease, Loss(reason)) in self.lease_set(stream).lost().now_or_never().unwrap_or_default() {
            prop_assert!(reason.is_some(), "the record has the reason");
            prop_assert_eq!(reason, self.gone.get(&lease.name().id).copied(), "reported");
            prop_assert!(!is_among(&self.answered, &lease), "reported after it was answered");
            prop_assert!(!is_among(&self.reported, &lease), "reported twice");
            self.reported.push(lease);
        }
        Ok(())
    }

    /// Lets everything under way arrive and commits once more. Every loss must have been reported
    /// then.
    pub(crate) fn end(&mut self) -> Result<(), TestCaseError> {
        for _ in 0..3 {
            self.commit();
        }
        for stream in 0..STREAMS {
            while !self.streams[stream].answers.is_empty() {
                self.answer(stream)?;
            }
            self.report(stream)?;
            for lease in self.lease_set(stream).begin_message_for_all() {
                let id = lease.name().id;
                prop_assert!(!self.gone.contains_key(&id), "lost, and not reported");
            }
        }
        self.streams = Default::default();
        let left = self.index.keys();
        prop_assert!(left.is_empty(), "streams that have ended still track leases of {left:?}");
        Ok(())
    }
}

fn is_among(some: &[Arc<StreamLease>], lease: &Arc<StreamLease>) -> bool {
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
