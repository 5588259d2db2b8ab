//! Tests of commits beside another daemon's, and of commits that fail in part or arrive late.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use mongodb::Client;
use mongodb::bson::{Document, doc};
use rstest::rstest;
use throwaway_mongodb::Mongod;

use super::commit::{Found, unapplied};
use super::document::Edited;
use super::{Location, MongoStore};
use crate::lease::{Acquisition, Edit, Key, LeaseId, Rules, Snapshot, Timestamp};
use crate::store::conformance::reading::{all_of, ask, asking, commit_batch, key};
use crate::store::failure::{Effects, Failure};
use crate::store::{ListQuery, Outcome, Store, StoreError};

const RULES: Rules = Rules { grace: Duration::from_millis(100), waiter_ttl: Duration::from_secs(15) };
const NOW: Timestamp = Timestamp(1_700_000_000_000);
const PATIENCE: Duration = Duration::from_secs(30);

/// Two daemons' stores on the same records.
async fn two() -> [MongoStore; 2] {
    let uri = throwaway_mongodb::shared().await.expect("a MongoDB for tests").to_owned();
    let location = Location { uri, database: "commit".into(), collection: LeaseId::random().reveal() };
    let mut store = MongoStore::connect(&location, RULES).await.expect("a usable store");
    store.set_clock(NOW);
    let other = MongoStore { keys_with_waiters: Arc::default(), ..store.clone() };
    [store, other]
}

#[rstest]
#[tokio::test]
async fn an_edit_admits_a_waiter_that_another_daemon_enqueued(
    #[values(false, true)] releases: bool,
    #[values(false, true)] beside_others: bool,
) {
    let [mut ours, theirs] = two().await;
    let (contested, quiet) = (key("contested"), key("quiet"));
    let [first, holder, waiter] = [(); 3].map(|()| LeaseId::random());
    let held = vec![(contested.clone(), ask(asking(first))), (quiet.clone(), ask(asking(holder)))];
    commit_batch(&ours, held).await;
    let waits = Acquisition { wait: true, ..asking(waiter) };
    commit_batch(&theirs, vec![(contested.clone(), ask(waits))]).await;

    let edit = if releases {
        Edit::default().release(first)
    } else {
        // The lease and its grace are over, so any edit admits the first waiter, even a touch of an
        // unknown id.
        ours.set_clock(NOW + Duration::from_secs(2));
        Edit::default().touch(LeaseId::random())
    };
    let mut batch = vec![(contested, edit)];
    if beside_others {
        batch.push((quiet, Edit::default().touch(holder)));
        batch.push((key("unknown"), Edit::default().touch(holder)));
    }
    let after = commit_batch(&ours, batch).await;
    let ids =
        |snapshot: &Snapshot| snapshot.record.holders.iter().map(|holder| holder.id).collect::<Vec<_>>();
    assert_eq!((ids(&after[0]), after[0].record.rev), (vec![waiter], 3));
    assert_eq!(after[0].record.waiters, []);
    if beside_others {
        assert_eq!((ids(&after[1]), after[1].record.rev), (vec![holder], 2), "applied once");
        assert_eq!((ids(&after[2]), after[2].record.rev), (vec![], 0), "a touch makes no record");
    }
}

#[tokio::test]
async fn a_touch_uses_the_full_pipeline_while_the_key_is_known_to_have_waiters() {
    let [ours, theirs] = two().await;
    let contested = key("contested");
    let [holder, waiter] = [(); 2].map(|()| LeaseId::random());
    commit_batch(&ours, vec![(contested.clone(), ask(asking(holder)))]).await;
    let touch = || vec![(contested.clone(), Edit::default().touch(holder))];
    let uses_full_pipeline = || !ours.keys_with_waiters.has_no_known_waiters(&contested);
    assert!(!uses_full_pipeline());
    commit_batch(&theirs, vec![(contested.clone(), ask(Acquisition { wait: true, ..asking(waiter) }))]).await;
    commit_batch(&ours, touch()).await;
    assert!(uses_full_pipeline());
    commit_batch(&theirs, vec![(contested.clone(), Edit::default().cancel(waiter))]).await;
    commit_batch(&ours, touch()).await;
    assert!(!uses_full_pipeline());
}

/// Edits that acquire new keys.
fn arrivals(count: usize) -> Vec<(Key, Edit)> {
    (0..count).map(|number| (key(&format!("new/{number}")), ask(asking(LeaseId::random())))).collect()
}

async fn store_at(uri: &str) -> MongoStore {
    let location =
        Location { uri: uri.to_owned(), database: "commit".into(), collection: LeaseId::random().reveal() };
    MongoStore::connect(&location, RULES).await.expect("a usable store")
}

/// Sets a fail point.
async fn fail_point(uri: &str, mode: impl Into<mongodb::bson::Bson>, data: Document) -> Document {
    let client = Client::with_uri_str(uri).await.expect("a client");
    let command = doc! { "configureFailPoint": "failCommand", "mode": mode.into(), "data": data };
    client.database("admin").run_command(command).await.expect("a fail point")
}

/// Returns the error of one attempt at a batch.
async fn outcome(store: &MongoStore, batch: Vec<(Key, Edit)>) -> StoreError {
    store.commit(Arc::new(batch), PATIENCE).await.expect_err("a failure")
}

/// A batch that makes records takes several commands. The first one changes existing records.
#[rstest]
#[case("insert", 0, 3)]
#[case("update", 1, 3)]
#[case("findAndModify", 0, 1)]
#[tokio::test]
async fn a_batch_that_was_applied_in_part_is_not_reported_as_not_applied(
    #[case] command: &str,
    #[case] skip: i32,
    #[case] new: usize,
    // NotWritablePrimary and Unauthorized.
    #[values(10107, 13)] code: i32,
) {
    let mongod = Mongod::start().await.expect("a MongoDB for tests");
    let store = store_at(mongod.uri()).await;
    let (job, holder) = (key("job"), LeaseId::random());
    commit_batch(&store, vec![(job.clone(), ask(asking(holder)))]).await;
    let mode = if skip == 0 { "alwaysOn".into() } else { mongodb::bson::Bson::from(doc! { "skip": skip }) };
    fail_point(mongod.uri(), mode, doc! { "failCommands": [command], "errorCode": code }).await;

    let mut batch = vec![(job, Edit::default().release(holder))];
    batch.extend(arrivals(new));
    let error = outcome(&store, batch).await;
    assert!(matches!(error, StoreError::Unavailable { outcome: Outcome::Unknown, .. }), "{error}");
    fail_point(mongod.uri(), "off", doc! {}).await;
    let found = all_of(store.read(vec![key("job")]).await);
    assert_eq!(found[0].record.holders, [], "the release took effect");
}

#[tokio::test]
async fn a_batch_that_the_server_refuses_at_once_is_reported_as_not_applied() {
    let mongod = Mongod::start().await.expect("a MongoDB for tests");
    let store = store_at(mongod.uri()).await;
    let commands = ["update", "findAndModify", "insert"];
    fail_point(mongod.uri(), "alwaysOn", doc! { "failCommands": commands, "errorCode": 10107 }).await;
    for count in [1, 3] {
        let error = outcome(&store, arrivals(count)).await;
        assert!(matches!(error, StoreError::Unavailable { outcome: Outcome::NotApplied, .. }), "{error}");
    }
    fail_point(mongod.uri(), "alwaysOn", doc! { "failCommands": commands, "errorCode": 13 }).await;
    let error = outcome(&store, arrivals(1)).await;
    assert!(matches!(error, StoreError::Refused { .. }), "{error}");
}

/// An hour, in milliseconds. With an estimate of the database's clock that is this far behind, the
/// limit of every command has passed, as if a connection had delivered the command an hour late.
const HOUR: i64 = 3_600_000;

#[rstest]
#[case::a_lone_arrival(1, 0)]
#[case::a_lone_touch(0, 1)]
#[case::touches(0, 3)]
#[case::a_batch(2, 3)]
#[tokio::test]
async fn a_command_that_arrives_late_changes_nothing(#[case] new: usize, #[case] held: usize) {
    let store = store_at(throwaway_mongodb::shared().await.expect("a MongoDB for tests")).await;
    let holders: Vec<_> = (0..held).map(|n| (key(&format!("held/{n}")), LeaseId::random())).collect();
    let hold = |(key, id): &(Key, LeaseId)| (key.clone(), ask(asking(*id)));
    commit_batch(&store, holders.iter().map(hold).collect()).await;
    let keys = || holders.iter().map(|(key, _)| key.clone()).collect();
    let before = all_of(store.read(keys()).await);

    store.check().await.expect("a primary, which tells its time");
    store.store_clock.shift(-HOUR);
    let mut batch = arrivals(new);
    batch.extend(holders.iter().map(|(key, id)| (key.clone(), Edit::default().touch(*id))));
    let effects = Effects::default();
    let late = store.apply(&batch, &effects).await;
    assert!(matches!(late, Err(Failure::Late(_))), "{late:?}");
    assert_eq!(effects.outcome(), Outcome::NotApplied);
    let records = |found: Vec<Snapshot>| found.into_iter().map(|one| one.record).collect::<Vec<_>>();
    assert_eq!(records(all_of(store.read(keys()).await)), records(before));
    let all = ListQuery { prefix: "new/".into(), after: None, limit: 10, include_free: true };
    assert_eq!(store.list(all).await.expect("a listing").snapshots, []);

    // Unlike `apply`, a whole attempt then reads the clock and repeats the command.
    store.commit(Arc::new(batch), PATIENCE).await.expect("an attempt that succeeds");
    assert_eq!(store.clock_steps(), 1, "it noticed that the clocks moved apart");
}

#[tokio::test]
async fn a_clock_that_runs_evenly_makes_no_step() {
    let store = store_at(throwaway_mongodb::shared().await.expect("a MongoDB for tests")).await;
    for _ in 0..20 {
        commit_batch(&store, arrivals(1)).await;
        commit_batch(&store, arrivals(5)).await;
        store.check().await.expect("a primary");
    }
    assert_eq!(store.clock_steps(), 0);
}

/// A sharded cluster may count one record twice and skip another one.
#[tokio::test]
async fn an_edit_counts_as_made_only_by_the_commit_tag_in_its_record() {
    let store = store_at(throwaway_mongodb::shared().await.expect("a MongoDB for tests")).await;
    let batch = arrivals(3);
    commit_batch(&store, batch.clone()).await;
    let edited = async || store.read_edited(&["new/0", "new/1", "new/2"]).await.expect("a read");
    let tag = edited().await[&key("new/0")].as_ref().ok().and_then(|edited| edited.tag).expect("a tag");
    let found = |edited: HashMap<Key, Result<Edited, StoreError>>, tag| {
        let found = |edited: Result<Edited, StoreError>| Ok(Found::of(edited?, tag));
        edited.into_iter().map(|(key, edited)| (key, found(edited))).collect()
    };
    assert_eq!(unapplied(&batch, &found(edited().await, tag)), []);
    let other = tag.wrapping_add(1);
    assert_eq!(unapplied(&batch, &found(edited().await, other)), batch, "another command was the latest one");
}

#[tokio::test]
async fn daemons_that_write_to_the_same_keys_all_the_time_get_answers() {
    let [first, second] = two().await;
    let keys: Vec<Key> = (0..5).map(|number| key(&format!("hot/{number}"))).collect();
    let rounds = async |store: &MongoStore| {
        for _ in 0..30 {
            let id = LeaseId::random();
            let each = |edit: &dyn Fn() -> Edit| keys.iter().map(|key| (key.clone(), edit())).collect();
            commit_batch(store, each(&|| ask(Acquisition { wait: true, ..asking(id) }))).await;
            let after = commit_batch(store, each(&|| Edit::default().release(id).cancel(id))).await;
            for snapshot in after {
                assert!(snapshot.record.holders.iter().all(|holder| holder.id != id), "it was made");
            }
        }
    };
    tokio::join!(rounds(&first), rounds(&second));
}

#[tokio::test]
async fn reads_of_the_engine_and_inspections_do_not_wait_for_listings() {
    let store = store_at(throwaway_mongodb::shared().await.expect("a MongoDB for tests")).await;
    let (job, id) = (key("job"), LeaseId::random());
    commit_batch(&store, vec![(job.clone(), ask(asking(id)))]).await;
    let blocked_listings = store.inspection.block_lists().await;
    assert_eq!(all_of(store.read(vec![job.clone()]).await).len(), 1);
    assert!(store.inspect(job.clone()).await.expect("an inspection").is_some());
    commit_batch(&store, vec![(job, Edit::default().touch(id))]).await;
    let all = ListQuery { prefix: String::new(), after: None, limit: 10, include_free: true };
    store.list(all.clone()).await.expect_err("all listings are blocked");
    drop(blocked_listings);
    store.list(all).await.expect("a listing");
}

/// Each listing waits in the server for 1.8 s, and there are 250 of them.
#[tokio::test]
async fn commits_do_not_wait_for_listings() {
    let mongod = Mongod::start().await.expect("a MongoDB for tests");
    let store = store_at(mongod.uri()).await;
    let (job, id) = (key("job"), LeaseId::random());
    commit_batch(&store, vec![(job.clone(), ask(asking(id)))]).await;
    let data = doc! { "failCommands": ["find"], "blockConnection": true, "blockTimeMS": 1800 };
    let before = fail_point(mongod.uri(), "alwaysOn", data).await.get_i32("count").unwrap_or(0);
    let mut listings = tokio::task::JoinSet::new();
    for _ in 0..250 {
        let store = store.clone();
        let all = ListQuery { prefix: String::new(), after: None, limit: 10, include_free: true };
        listings.spawn(async move { drop(store.list(all).await) });
    }
    let client = Client::with_uri_str(mongod.uri()).await.expect("a client");
    let wait = doc! { "waitForFailPoint": "failCommand", "timesEntered": before + 5, "maxTimeMS": 30_000 };
    client.database("admin").run_command(wait).await.expect("listings under way");
    commit_batch(&store, vec![(job.clone(), Edit::default().touch(id))]).await;
    assert!(listings.try_join_next().is_none(), "no listing was answered before the commit");
    fail_point(mongod.uri(), "off", doc! {}).await;
    listings.abort_all();
}
