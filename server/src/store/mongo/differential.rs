//! Holds the pipeline to the specification: the same random edits at the same instants through [`step`] and through
//! a real MongoDB, records equal field by field after every batch.
//!
//! `LEASED_DIFFERENTIAL_CASES` sets the number of sequences.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use mongodb::bson::{Bson, DateTime};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError, TestRunner};
use tokio::runtime::Runtime;

use super::{Location, MongoStore, makes_record};
use crate::lease::{
    Acquisition, Edit, FencingToken, Key, LeaseId, MAX_WAITERS, Mode, Record, Rules, Timestamp, Ttl, step,
};

const RULES: Rules = Rules { grace: Duration::from_millis(300), place: Duration::from_millis(900) };
const START: i64 = 1_700_000_000_000;
const KEYS: usize = 3;
const IDS: u8 = 6;

#[derive(Debug, Clone)]
enum Op {
    Touch(u8),
    Release(u8),
    /// By position among the holders; past their number: a token that nobody has.
    Revoke(usize),
    Cancel(u8),
    Enqueue(Arrival),
}

#[derive(Debug, Clone)]
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

fn moments() -> impl Strategy<Value = Vec<Moment>> {
    let op = prop_oneof![
        2 => (0..IDS).prop_map(Op::Touch),
        2 => (0..IDS).prop_map(Op::Release),
        1 => (0_usize..4).prop_map(Op::Revoke),
        1 => (0..IDS).prop_map(Op::Cancel),
        5 => arrivals().prop_map(Op::Enqueue),
    ];
    let edits = prop::collection::btree_map(0..KEYS, prop::collection::vec(op, 0..5), 1..=KEYS);
    let moment = (-400_i64..1200, edits).prop_map(|(passed, edits)| Moment { passed, edits });
    prop::collection::vec(moment, 1..14)
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

/// A store whose clock the test sets, and the records that the specification makes of the same edits.
struct Pair {
    store: MongoStore,
    records: HashMap<Key, Record>,
    now: i64,
}

impl Pair {
    /// Applies the batch on both sides and compares.
    async fn apply(&mut self, batch: Vec<(Key, Edit)>) -> Result<(), TestCaseError> {
        self.store.clock = Bson::DateTime(DateTime::from_millis(self.now));
        let found = self
            .store
            .attempt(&batch)
            .await
            .map_err(|failure| TestCaseError::fail(format!("{failure:?}")))?;
        for ((key, edit), found) in batch.into_iter().zip(found) {
            if let Some(record) =
                self.records.remove(&key).or_else(|| makes_record(&edit).then(|| Record::vacant(key.clone())))
            {
                self.records.insert(key.clone(), step(record, &edit, Timestamp(self.now), &RULES));
            }
            let expected = self.records.get(&key).cloned().unwrap_or_else(|| Record::vacant(key.clone()));
            prop_assert_eq!(found.record, expected, "after {:?} at {}", edit, self.now);
        }
        Ok(())
    }
}

async fn store() -> MongoStore {
    let uri = throwaway_mongodb::shared().await.expect("a MongoDB for tests").to_owned();
    let location = Location { uri, database: "differential".into(), collection: LeaseId::random().reveal() };
    MongoStore::connect(&location, RULES).await.expect("a usable store")
}

fn cases() -> u32 {
    std::env::var("LEASED_DIFFERENTIAL_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(400)
}

#[test]
fn the_pipeline_says_what_step_says() {
    let runtime = Runtime::new().expect("a runtime");
    let store = runtime.block_on(store());
    let config = Config { cases: cases(), failure_persistence: None, ..Config::default() };
    let outcome = TestRunner::new(config).run(&moments(), |moments| {
        let run = LeaseId::random().reveal();
        let keys: Vec<Key> =
            (0..KEYS).map(|n| Key::try_from(format!("{run}/$key.{n}").as_str()).expect("a key")).collect();
        let mut pair = Pair { store: store.clone(), records: HashMap::new(), now: START };
        for moment in moments {
            pair.now += moment.passed;
            let batch =
                moment.edits.iter().map(|(&n, ops)| (keys[n].clone(), edit(ops, pair.records.get(&keys[n]))));
            let batch = batch.collect();
            runtime.block_on(pair.apply(batch))?;
        }
        Ok(())
    });
    outcome.expect("no difference");
}

/// Lines and memories too long for random edits to reach.
#[test]
fn long_lines_and_many_departures_are_the_same() {
    let runtime = Runtime::new().expect("a runtime");
    let key = Key::try_from("long").expect("a key");
    let crowd = |first: usize, count: usize, shared: bool| {
        (first..first + count).fold(Edit::default(), |edit, n| {
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&n.to_be_bytes());
            let acquisition = Acquisition {
                id: LeaseId::from(bytes),
                mode: if shared { Mode::Shared } else { Mode::Exclusive },
                shared_limit: 1024,
                owner: "o".repeat(200),
                ..Acquisition::clone(&acquisition(&Arrival {
                    id: 0,
                    shared_limit: None,
                    ttl: 2000,
                    min_hold: 0,
                    wait: true,
                    owner: String::new(),
                }))
            };
            edit.enqueue(Arc::new(acquisition))
        })
    };
    runtime.block_on(async {
        let mut pair = Pair { store: store().await, records: HashMap::new(), now: START };
        let mut apply = async |edit: Edit, passed: i64| {
            pair.now += passed;
            pair.apply(vec![(key.clone(), edit)]).await.expect("no difference");
            pair.records[&key].clone()
        };
        let record = apply(crowd(0, 60, true), 0).await;
        assert_eq!(record.holders.len(), 60);
        let leave =
            record.holders.iter().take(40).fold(Edit::default(), |edit, holder| edit.release(holder.id));
        assert_eq!(apply(leave, 1).await.departures.len(), 40);
        assert_eq!(apply(crowd(100, MAX_WAITERS, false), 1).await.waiters.len(), MAX_WAITERS);
        assert_eq!(
            apply(crowd(5000, 10, false), 1).await.waiters.len(),
            MAX_WAITERS,
            "a full line takes nobody"
        );
        assert_eq!(apply(crowd(6000, 10, false), 1000).await.waiters.len(), 0, "but loses lapsed places");
        assert_eq!(apply(crowd(7000, 10, false), 1).await.waiters.len(), 10);
    });
}
