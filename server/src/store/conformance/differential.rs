//! Compares the stores with the specification. Both apply the same random edits at the same
//! instants, and after every batch the records must be equal field by field.
//!
//! The variable `LEASED_DIFFERENTIAL_CASES` sets the number of sequences.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError, TestError, TestRunner};
use rstest::rstest;

use super::backends::{Applier, Backend, TestStore};
use super::mutants::Mutant;
use crate::lease::{
    Acquisition, Edit, Key, LASTING_DEPARTURES, LeaseId, MAX_WAITERS, Mode, Record, Rules,
    SETTLED_DEPARTURES, Timestamp, Ttl,
};

const RULES: Rules = Rules { grace: Duration::from_millis(300), waiter_ttl: Duration::from_millis(900) };
const START: i64 = 1_700_000_000_000;
const KEYS: usize = 4;
const IDS: u8 = 48;
/// The number of sequences unless the variable sets another one.
const CASES: u32 = 2000;
/// How many sequences run at once. A single one would not keep MongoDB busy.
const THREADS: u32 = 4;

#[derive(Clone)]
enum Op {
    Touch(u8),
    Release(u8),
    GiveUp(u8),
    KeepOut(u8),
    /// The first id, and how many consecutive ids.
    ReleaseMany(u8, u8),
    /// The position among the holders. Past the last holder: an unused id.
    Revoke(usize),
    RevokeAll,
    /// Whether the edit names the block of the key, or another one.
    Unblock(bool),
    Cancel(u8),
    Refresh(u8),
    Enqueue(Arrival),
    /// Shared acquisitions that wait: the first id, and how many.
    EnqueueMany(u8, u8),
}

#[derive(Clone)]
struct Arrival {
    id: u8,
    shared_limit: Option<u32>,
    ttl: u64,
    min_hold: u64,
    wait: bool,
    owner: String,
}

/// A batch and its time.
#[derive(Debug, Clone)]
struct TimedBatch {
    /// The milliseconds since the batch before. The clock may step back.
    passed: i64,
    /// The operations by key.
    edits: BTreeMap<usize, Vec<Op>>,
    /// Replaces the edit of one key by an earlier one, as when a command is repeated or arrives
    /// late.
    replay: Option<Replay>,
}

#[derive(Debug, Clone, Copy)]
struct Replay {
    key: usize,
    which: usize,
    repeated: bool,
}

#[derive(Clone)]
struct Sequence(Vec<TimedBatch>);

impl fmt::Debug for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Touch(id) => write!(f, "touch {id}"),
            Self::Release(id) => write!(f, "release {id}"),
            Self::GiveUp(id) => write!(f, "give up {id}"),
            Self::KeepOut(id) => write!(f, "keep out {id}"),
            Self::ReleaseMany(first, count) => write!(f, "release {count} from {first} on"),
            Self::Revoke(position) => write!(f, "revoke the holder at {position}"),
            Self::RevokeAll => write!(f, "revoke every holder"),
            Self::Unblock(it) => write!(f, "lift {} block", if *it { "the" } else { "another" }),
            Self::Cancel(id) => write!(f, "cancel {id}"),
            Self::Refresh(id) => write!(f, "refresh {id}"),
            Self::EnqueueMany(first, count) => write!(f, "enqueue {count} that share, from {first} on"),
            Self::Enqueue(arrival) => arrival.fmt(f),
        }
    }
}

impl fmt::Debug for Arrival {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { id, ttl, min_hold, owner, .. } = self;
        write!(f, "enqueue {id} (")?;
        match self.shared_limit {
            Some(limit) => write!(f, "shared {limit}")?,
            None => write!(f, "exclusive")?,
        }
        let wait = if self.wait { ", waits" } else { "" };
        write!(f, ", ttl {ttl}, min_hold {min_hold}{wait}, owner {owner:?})")
    }
}

/// Writes a line for each key of each batch.
impl fmt::Display for Sequence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for TimedBatch { passed, edits, replay } in &self.0 {
            writeln!(f, "{passed:+} ms")?;
            if let Some(Replay { key, which, repeated }) = replay {
                writeln!(
                    f,
                    "    key {key}: edit {which} again{}",
                    if *repeated { ", repeated" } else { "" }
                )?;
            }
            for (key, ops) in edits {
                writeln!(f, "    key {key}: {ops:?}")?;
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Sequence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

fn arrivals() -> impl Strategy<Value = Arrival> {
    let owner = prop::sample::select(vec!["$holders", "$$NOW", "$$ROOT", "a.b", "", "владелец", "'\"\\"]);
    let limit = prop_oneof![2 => Just(None), 3 => (1_u32..4).prop_map(Some)];
    (ids(), limit, 1_u64..2500, prop_oneof![2 => Just(0), 1 => 1_u64..1500], any::<bool>(), owner).prop_map(
        |(id, shared_limit, ttl, min_hold, wait, owner)| Arrival {
            id,
            shared_limit,
            ttl,
            min_hold,
            wait,
            owner: owner.to_owned(),
        },
    )
}

/// Generates mostly one of six ids, so that edits often concern the same id. The other ids are so
/// many that a record forgets departures.
fn ids() -> impl Strategy<Value = u8> {
    prop_oneof![5 => 0_u8..6, 1 => 0..IDS]
}

fn sequences() -> impl Strategy<Value = Sequence> {
    let op = prop_oneof![
        4 => ids().prop_map(Op::Touch),
        4 => ids().prop_map(Op::Release),
        1 => ids().prop_map(Op::GiveUp),
        2 => ids().prop_map(Op::KeepOut),
        1 => (0..IDS, 1_u8..24).prop_map(|(first, count)| Op::ReleaseMany(first, count)),
        2 => (0_usize..4).prop_map(Op::Revoke),
        1 => Just(Op::RevokeAll),
        1 => any::<bool>().prop_map(Op::Unblock),
        2 => ids().prop_map(Op::Cancel),
        2 => ids().prop_map(Op::Refresh),
        10 => arrivals().prop_map(Op::Enqueue),
        1 => (0..IDS, 1_u8..24).prop_map(|(first, count)| Op::EnqueueMany(first, count)),
    ];
    let edits = prop::collection::btree_map(0..KEYS, prop::collection::vec(op, 0..5), 1..=KEYS);
    let replay = (0..KEYS, 0_usize..14, any::<bool>());
    let replay = prop::option::weighted(
        0.3,
        replay.prop_map(|(key, which, repeated)| Replay { key, which, repeated }),
    );
    let passed = prop_oneof![15 => -400_i64..1200, 1 => 58_000_i64..62_000];
    let batch =
        (passed, edits, replay).prop_map(|(passed, edits, replay)| TimedBatch { passed, edits, replay });
    prop::collection::vec(batch, 1..14).prop_map(Sequence)
}

fn id(number: u8) -> LeaseId {
    LeaseId::from([number + 1; 16])
}

fn acquisition(arrival: &Arrival) -> Arc<Acquisition> {
    Arc::new(Acquisition {
        id: id(arrival.id),
        owner: arrival.owner.clone(),
        metadata: BTreeMap::from([("$where".to_owned(), arrival.owner.clone())]),
        mode: if arrival.shared_limit.is_some() { Mode::Shared } else { Mode::Exclusive },
        shared_limit: arrival.shared_limit.unwrap_or(1),
        ttl: Ttl::new(Duration::from_millis(arrival.ttl)).expect("at least a millisecond"),
        min_hold: Duration::from_millis(arrival.min_hold),
        wait: arrival.wait,
        repeated: false,
    })
}

/// A shared acquisition that waits, with the highest limit.
fn sharing(number: u8) -> Arc<Acquisition> {
    let arrival = Arrival {
        id: number,
        shared_limit: Some(1024),
        ttl: 700,
        min_hold: 0,
        wait: true,
        owner: String::new(),
    };
    acquisition(&arrival)
}

fn edit(ops: &[Op], record: Option<&Record>) -> Edit {
    ops.iter().fold(Edit::default(), |edit, op| match op {
        Op::Touch(who) => edit.touch(id(*who)),
        Op::Release(who) => edit.release(id(*who)),
        Op::GiveUp(who) => edit.give_up(id(*who)),
        Op::KeepOut(who) => edit.keep_out(id(*who)),
        Op::ReleaseMany(first, count) => {
            (*first..first + count).fold(edit, |edit, who| edit.release(id(who)))
        }
        Op::Revoke(position) => {
            let holder = record.and_then(|record| record.holders.get(*position));
            edit.revoke(holder.map_or(id(u8::MAX - 1), |holder| holder.id))
        }
        Op::RevokeAll => {
            record.iter().flat_map(|record| &record.holders).fold(edit, |edit, holder| edit.revoke(holder.id))
        }
        Op::Unblock(it) => {
            let until = record.and_then(|record| record.blocked_until);
            edit.unblock(until.filter(|_| *it).unwrap_or(Timestamp(START)))
        }
        Op::Cancel(who) => edit.cancel(id(*who)),
        Op::Refresh(who) => edit.refresh(id(*who)),
        Op::Enqueue(arrival) => edit.enqueue(acquisition(arrival)),
        Op::EnqueueMany(first, count) => {
            (*first..first + count).fold(edit, |edit, who| edit.enqueue(sharing(who)))
        }
    })
}

/// The specification and a store, with the same keys and the same time.
struct Pair {
    specified: Applier,
    store: Applier,
    keys: Vec<Key>,
    records: BTreeMap<usize, Record>,
    now: i64,
}

impl Pair {
    fn new(store: &TestStore) -> Self {
        // The tests share a collection, so each pair has keys of its own.
        let run = LeaseId::random().reveal();
        let key = |n| Key::try_from(format!("{run}/$key.{n}").as_str()).expect("a key");
        Self {
            specified: Backend::Step.applier(RULES),
            store: Applier::Store(store.clone()),
            keys: (0..KEYS).map(key).collect(),
            records: BTreeMap::new(),
            now: START,
        }
    }

    /// Applies the batch to both and compares the records.
    fn apply(&mut self, passed: i64, edits: BTreeMap<usize, Edit>) -> Result<(), TestCaseError> {
        self.now += passed;
        let batch: Vec<_> = edits.iter().map(|(&n, edit)| (self.keys[n].clone(), edit.clone())).collect();
        let specified = self.specified.apply(batch.clone(), Timestamp(self.now));
        let found = self.store.try_apply(batch, Timestamp(self.now)).map_err(|unanswered| {
            let which = if unanswered.is_of_a_record() { "" } else { NO_ANSWER };
            TestCaseError::fail(format!("{which}{unanswered:?}"))
        })?;
        for (((n, _), specified), found) in edits.into_iter().zip(specified).zip(found) {
            prop_assert_eq!(&found, &specified, "the store's record, and the specification's");
            self.records.insert(n, specified);
        }
        Ok(())
    }

    fn play(&mut self, sequence: &Sequence) -> Result<(), TestCaseError> {
        let mut sent: BTreeMap<usize, Vec<Edit>> = BTreeMap::new();
        for TimedBatch { passed, edits, replay } in &sequence.0 {
            let edit = |(&n, ops): (&usize, &Vec<Op>)| (n, edit(ops, self.records.get(&n)));
            let mut edits: BTreeMap<usize, Edit> = edits.iter().map(edit).collect();
            if let Some(Replay { key, which, repeated }) = *replay
                && let Some(sent) = sent.get(&key)
            {
                let replay = sent[which % sent.len()].clone();
                edits.insert(key, if repeated { replay.repeated() } else { replay });
            }
            for (n, edit) in &edits {
                sent.entry(*n).or_default().push(edit.clone());
            }
            self.apply(*passed, edits)?;
        }
        Ok(())
    }
}

/// Begins the message of a case in which the store did not answer. Such a case shows no difference.
const NO_ANSWER: &str = "the store does not answer: ";

/// Plays random sequences until there is a difference, and returns the shortest sequence with one
/// that the search finds.
fn difference(store: &TestStore, cases: u32, max_shrink_iters: u32) -> Option<String> {
    let config = Config { cases, failure_persistence: None, max_shrink_iters, ..Config::default() };
    match TestRunner::new(config).run(&sequences(), |sequence| Pair::new(store).play(&sequence)) {
        Ok(()) => None,
        Err(TestError::Fail(why, sequence)) if why.message().starts_with(NO_ANSWER) => {
            panic!("{sequence}\n{why}")
        }
        Err(TestError::Fail(why, sequence)) => Some(format!("{sequence}\n{why}")),
        Err(TestError::Abort(why)) => panic!("{why}"),
    }
}

/// Whether random edits catch a mutant of the pipeline.
pub(super) fn catches(mutant: Mutant) -> bool {
    let Applier::Store(store) = Backend::MutantPipeline(mutant).applier(RULES) else { return false };
    difference(&store, CASES, 0).is_some()
}

#[rstest]
fn a_store_does_what_step_does(#[values(Backend::Embedded, Backend::MongoDb)] backend: Backend) {
    let cases = std::env::var("LEASED_DIFFERENTIAL_CASES").ok().and_then(|cases| cases.parse().ok());
    let cases: u32 = cases.unwrap_or(CASES);
    let Applier::Store(store) = backend.applier(RULES) else { panic!("a store") };
    let found: Vec<String> = thread::scope(|scope| {
        let searches: Vec<_> = (0..THREADS)
            .map(|_| scope.spawn(|| difference(&backend.another(&store), cases.div_ceil(THREADS), 2000)))
            .collect();
        searches.into_iter().filter_map(|search| search.join().expect("a search that ends")).collect()
    });
    assert!(found.is_empty(), "{}", found.join("\n\n"));
}

/// The queues are longer, and the departures more numerous, than random edits make them.
#[rstest]
fn long_queues_and_many_departures_are_the_same(
    #[values(Backend::Embedded, Backend::MongoDb)] backend: Backend,
) {
    let Applier::Store(store) = backend.applier(RULES) else { panic!("a store") };
    let mut pair = Pair::new(&store);
    let mut apply = |edit: Edit, passed: i64| {
        pair.apply(passed, BTreeMap::from([(0, edit)])).expect("no difference");
        pair.records[&0].clone()
    };
    let record = apply(crowd(0, 60, true), 0);
    assert_eq!(record.holders.len(), 60);
    let leave = record.holders.iter().take(40).fold(Edit::default(), |edit, holder| edit.release(holder.id));
    assert_eq!(apply(leave, 1).departures.len(), 40);
    let unknown = (0..2000).fold(Edit::default(), |edit, n| edit.release(number(20_000 + n)));
    assert_eq!(apply(unknown.clone(), 1).departures.len(), 40 + SETTLED_DEPARTURES);
    assert_eq!(apply(unknown, 1).departures.len(), 40 + SETTLED_DEPARTURES);
    let record = apply(crowd(10_000, 600, true), 1);
    let leave = record.holders.iter().skip(20).fold(Edit::default(), |edit, holder| edit.release(holder.id));
    assert!(apply(leave, 1).departures.len() > LASTING_DEPARTURES);
    let unknown = (0..10).fold(Edit::default(), |edit, n| edit.release(number(30_000 + n)));
    assert!(apply(unknown, 1).departures.iter().all(|departure| departure.id != number(30_000)), "no room");
    assert_eq!(apply(crowd(100, MAX_WAITERS, false), 1).waiters.len(), MAX_WAITERS);
    assert_eq!(apply(crowd(5000, 10, false), 1).waiters.len(), MAX_WAITERS, "a full queue accepts nobody");
    assert_eq!(apply(crowd(6000, 10, false), 1000).waiters.len(), 0, "it drops lapsed waiters");
    assert_eq!(apply(crowd(7000, 10, false), 1).waiters.len(), 10);
}

/// Enqueues `count` acquisitions that wait, with ids from `first` on.
fn crowd(first: usize, count: usize, shared: bool) -> Edit {
    let arrival =
        Arrival { id: 0, shared_limit: None, ttl: 2000, min_hold: 0, wait: true, owner: "o".repeat(200) };
    (first..first + count).fold(Edit::default(), |edit, n| {
        edit.enqueue(Arc::new(Acquisition {
            id: number(n),
            mode: if shared { Mode::Shared } else { Mode::Exclusive },
            shared_limit: 1024,
            ..Acquisition::clone(&acquisition(&arrival))
        }))
    })
}

/// An id beyond those of the random edits.
fn number(number: usize) -> LeaseId {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&number.to_be_bytes());
    LeaseId::from(bytes)
}
