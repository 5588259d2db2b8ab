//! Holds the stores to the specification: the same random edits at the same instants through [`step`](crate::lease::step)
//! and through the store, records equal field by field after every batch.
//!
//! `LEASED_DIFFERENTIAL_CASES` sets the number of sequences.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError, TestError, TestRunner};
use rstest::rstest;

use super::homes::{Applier, Home, TestStore};
use super::wrongs::Wrong;
use crate::lease::{
    Acquisition, Edit, FencingToken, Key, LeaseId, MAX_WAITERS, Mode, Record, Rules, Timestamp, Ttl,
};

const RULES: Rules = Rules { grace: Duration::from_millis(300), place: Duration::from_millis(900) };
const START: i64 = 1_700_000_000_000;
const KEYS: usize = 4;
const IDS: u8 = 6;
/// Sequences of the default run.
const CASES: u32 = 2000;
/// Sequences under way at once; MongoDB has time to spare for more than one.
const THREADS: u32 = 4;

#[derive(Clone)]
enum Op {
    Touch(u8),
    Release(u8),
    /// By position among the holders; past their number: a token that nobody has.
    Revoke(usize),
    Cancel(u8),
    Enqueue(Arrival),
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

/// A batch: for some keys what happens, and how far the clock went since the last one.
#[derive(Debug, Clone)]
struct Moment {
    passed: i64,
    edits: BTreeMap<usize, Vec<Op>>,
}

#[derive(Clone)]
struct Sequence(Vec<Moment>);

impl fmt::Debug for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Touch(id) => write!(f, "touch {id}"),
            Self::Release(id) => write!(f, "release {id}"),
            Self::Revoke(position) => write!(f, "revoke the holder at {position}"),
            Self::Cancel(id) => write!(f, "cancel {id}"),
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

/// A line for each key of each moment, as people can follow it.
impl fmt::Display for Sequence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for Moment { passed, edits } in &self.0 {
            writeln!(f, "{passed:+} ms")?;
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
    (0..IDS, limit, 1_u64..2500, prop_oneof![2 => Just(0), 1 => 1_u64..1500], any::<bool>(), owner).prop_map(
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

fn sequences() -> impl Strategy<Value = Sequence> {
    let op = prop_oneof![
        2 => (0..IDS).prop_map(Op::Touch),
        2 => (0..IDS).prop_map(Op::Release),
        1 => (0_usize..4).prop_map(Op::Revoke),
        1 => (0..IDS).prop_map(Op::Cancel),
        5 => arrivals().prop_map(Op::Enqueue),
    ];
    let edits = prop::collection::btree_map(0..KEYS, prop::collection::vec(op, 0..5), 1..=KEYS);
    let moment = (-400_i64..1200, edits).prop_map(|(passed, edits)| Moment { passed, edits });
    prop::collection::vec(moment, 1..14).prop_map(Sequence)
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
    })
}

fn edit(ops: &[Op], record: Option<&Record>) -> Edit {
    ops.iter().fold(Edit::default(), |edit, op| match op {
        Op::Touch(who) => edit.touch(id(*who)),
        Op::Release(who) => edit.release(id(*who)),
        Op::Revoke(position) => {
            let holder = record.and_then(|record| record.holders.get(*position));
            edit.revoke(holder.map_or(FencingToken(7), |holder| holder.token))
        }
        Op::Cancel(who) => edit.cancel(id(*who)),
        Op::Enqueue(arrival) => edit.enqueue(acquisition(arrival)),
    })
}

/// The specification and a store beside it.
struct Pair {
    specified: Applier,
    store: Applier,
    keys: Vec<Key>,
    records: BTreeMap<usize, Record>,
    now: i64,
}

impl Pair {
    fn new(store: &TestStore) -> Self {
        let run = LeaseId::random().reveal();
        let key = |n| Key::try_from(format!("{run}/$key.{n}").as_str()).expect("a key");
        Self {
            specified: Home::Step.applier(RULES),
            store: Applier::Store(store.clone()),
            keys: (0..KEYS).map(key).collect(),
            records: BTreeMap::new(),
            now: START,
        }
    }

    /// Applies the batch on both sides and compares.
    fn apply(&mut self, passed: i64, edits: BTreeMap<usize, Edit>) -> Result<(), TestCaseError> {
        self.now += passed;
        let batch: Vec<_> = edits.iter().map(|(&n, edit)| (self.keys[n].clone(), edit.clone())).collect();
        let specified = self.specified.apply(batch.clone(), Timestamp(self.now));
        let found = self.store.apply(batch, Timestamp(self.now));
        for (((n, _), specified), found) in edits.into_iter().zip(specified).zip(found) {
            prop_assert_eq!(&found, &specified, "found, and specified");
            self.records.insert(n, specified);
        }
        Ok(())
    }

    fn play(&mut self, sequence: &Sequence) -> Result<(), TestCaseError> {
        for moment in &sequence.0 {
            let edits = moment.edits.iter().map(|(&n, ops)| (n, edit(ops, self.records.get(&n)))).collect();
            self.apply(moment.passed, edits)?;
        }
        Ok(())
    }
}

/// Plays random sequences until there is a difference, and tells the shortest that has one.
fn difference(store: &TestStore, cases: u32) -> Option<String> {
    let config = Config { cases, failure_persistence: None, max_shrink_iters: 2000, ..Config::default() };
    match TestRunner::new(config).run(&sequences(), |sequence| Pair::new(store).play(&sequence)) {
        Ok(()) => None,
        Err(TestError::Fail(why, sequence)) => Some(format!("{sequence}\n{why}")),
        Err(TestError::Abort(why)) => panic!("{why}"),
    }
}

/// Whether random edits show that the pipeline is wrong.
pub(super) fn finds_a_difference(wrong: Wrong) -> bool {
    let Applier::Store(store) = Home::WrongPipeline(wrong).applier(RULES) else { return false };
    difference(&store, CASES).is_some()
}

#[rstest]
fn a_store_says_what_step_says(#[values(Home::Embedded, Home::MongoDb)] home: Home) {
    let cases = std::env::var("LEASED_DIFFERENTIAL_CASES").ok().and_then(|cases| cases.parse().ok());
    let cases: u32 = cases.unwrap_or(CASES);
    let Applier::Store(store) = home.applier(RULES) else { panic!("a store") };
    let found: Vec<String> = thread::scope(|scope| {
        let searches: Vec<_> = (0..THREADS)
            .map(|_| scope.spawn(|| difference(&home.beside(&store), cases.div_ceil(THREADS))))
            .collect();
        searches.into_iter().filter_map(|search| search.join().expect("a search that ends")).collect()
    });
    assert!(found.is_empty(), "{}", found.join("\n\n"));
}

/// Lines and memories too long for random edits to reach.
#[rstest]
fn long_lines_and_many_departures_are_the_same(#[values(Home::Embedded, Home::MongoDb)] home: Home) {
    let Applier::Store(store) = home.applier(RULES) else { panic!("a store") };
    let mut pair = Pair::new(&store);
    let mut apply = |edit: Edit, passed: i64| {
        pair.apply(passed, BTreeMap::from([(0, edit)])).expect("no difference");
        pair.records[&0].clone()
    };
    let record = apply(crowd(0, 60, true), 0);
    assert_eq!(record.holders.len(), 60);
    let leave = record.holders.iter().take(40).fold(Edit::default(), |edit, holder| edit.release(holder.id));
    assert_eq!(apply(leave, 1).departures.len(), 40);
    assert_eq!(apply(crowd(100, MAX_WAITERS, false), 1).waiters.len(), MAX_WAITERS);
    assert_eq!(apply(crowd(5000, 10, false), 1).waiters.len(), MAX_WAITERS, "a full line takes nobody");
    assert_eq!(apply(crowd(6000, 10, false), 1000).waiters.len(), 0, "but loses lapsed places");
    assert_eq!(apply(crowd(7000, 10, false), 1).waiters.len(), 10);
}

/// So many who wait, with ids from `first` on.
fn crowd(first: usize, count: usize, shared: bool) -> Edit {
    let arrival =
        Arrival { id: 0, shared_limit: None, ttl: 2000, min_hold: 0, wait: true, owner: "o".repeat(200) };
    (first..first + count).fold(Edit::default(), |edit, n| {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&n.to_be_bytes());
        edit.enqueue(Arc::new(Acquisition {
            id: LeaseId::from(bytes),
            mode: if shared { Mode::Shared } else { Mode::Exclusive },
            shared_limit: 1024,
            ..Acquisition::clone(&acquisition(&arrival))
        }))
    })
}
