//! Tests of the index: listings and purges among many keys that do not concern them.

use std::io::{Read, Seek};
use std::time::Duration;

use futures_util::TryStreamExt;
use mongodb::Client;
use mongodb::bson::{Bson, DateTime, Document, doc};
use throwaway_mongodb::Mongod;
use tokio::time::{sleep, timeout};

use super::index::{IN_USE, Index};
use super::{Location, MongoStore};
use crate::lease::{Acquisition, Edit, LeaseId, Rules, Timestamp};
use crate::store::conformance::reading::{ask, asking, commit_batch, key};
use crate::store::failure::Failure;
use crate::store::{ListQuery, Page, Store};

const RULES: Rules = Rules { grace: Duration::from_millis(100), waiter_ttl: Duration::from_secs(15) };
const NOW: i64 = 1_700_000_000_000;
const DAY: Duration = Duration::from_secs(24 * 3600);
const MANY: usize = 20_000;
const PATIENCE: Duration = Duration::from_secs(60);

fn location(uri: &str) -> Location {
    Location { uri: uri.to_owned(), database: "index".into(), collection: LeaseId::random().reveal() }
}

async fn store_at(location: &Location) -> MongoStore {
    let mut store = MongoStore::connect(location, RULES).await.expect("a usable store");
    store.set_clock(Timestamp(NOW));
    store
}

async fn store() -> MongoStore {
    store_at(&location(throwaway_mongodb::shared().await.expect("a MongoDB for tests"))).await
}

/// A free record whose latest token was granted at `granted_at`.
fn free(name: &str, granted_at: i64) -> Document {
    let none: [Bson; 0] = [];
    doc! {
        "_id": name, "token": granted_at, "rev": 2_i64,
        "holders": none.clone(), "waiters": none.clone(), "departures": none,
    }
}

/// Inserts records over a connection without the time limits of a daemon.
async fn put_at(uri: &str, store: &MongoStore, records: Vec<Document>) {
    let client = Client::with_uri_str(uri).await.expect("a client");
    let collection = client.database(store.database.name()).collection::<Document>(store.collection.name());
    for some in records.chunks(1000) {
        collection.insert_many(some).await.expect("records");
    }
}

async fn put(store: &MongoStore, records: Vec<Document>) {
    put_at(throwaway_mongodb::shared().await.expect("a MongoDB for tests"), store, records).await;
}

/// Inserts [`MANY`] keys that have been free since [`NOW`].
async fn put_many(uri: &str, store: &MongoStore) {
    put_at(uri, store, (0..MANY).map(|number| free(&format!("key/{number:05}"), NOW)).collect()).await;
}

async fn hold(store: &MongoStore, names: &[&str]) -> Vec<LeaseId> {
    let mut ids = Vec::new();
    for name in names {
        let id = LeaseId::random();
        let batch = vec![(key(name), ask(Acquisition { wait: true, ..asking(id) }))];
        commit_batch(store, batch).await;
        ids.push(id);
    }
    ids
}

fn all() -> ListQuery {
    ListQuery { prefix: String::new(), after: None, limit: 100, include_free: false }
}

async fn listed(store: &MongoStore) -> Vec<String> {
    let page = store.list(all()).await.expect("a listing");
    page.snapshots.iter().map(|one| one.record.key.as_str().to_owned()).collect()
}

/// Waits until the index exists.
async fn until_there(store: &MongoStore) {
    let looking = async {
        while !store.index.is_there() {
            sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(PATIENCE, looking).await.expect("an index");
}

/// Reads a number from a reply of the server.
fn number(document: &Document, field: &str) -> i64 {
    match document.get(field) {
        Some(Bson::Int32(number)) => i64::from(*number),
        Some(Bson::Int64(number)) => *number,
        other => panic!("{field}: {other:?}"),
    }
}

/// How many documents and how many index entries the server has examined for listings of this store
/// since profiling began.
async fn examined(uri: &str, store: &MongoStore) -> (i64, i64) {
    let client = Client::with_uri_str(uri).await.expect("a client");
    let profile = client.database(store.database.name()).collection::<Document>("system.profile");
    let which =
        doc! { "ns": format!("{}.{}", store.database.name(), store.collection.name()), "op": "query" };
    let finds: Vec<Document> =
        profile.find(which).await.expect("a profile").try_collect().await.expect("a profile");
    assert!(!finds.is_empty(), "the server profiles its queries");
    let sum = |field| finds.iter().map(|find| number(find, field)).sum();
    (sum("docsExamined"), sum("keysExamined"))
}

/// The server's profiler shows what a listing reads.
#[tokio::test]
async fn a_listing_reads_no_more_than_it_shows() {
    let uri = throwaway_mongodb::shared().await.expect("a MongoDB for tests");
    let location = Location { database: format!("index-{}", LeaseId::random().reveal()), ..location(uri) };
    let store = store_at(&location).await;
    put_many(uri, &store).await;
    let held = ["key/00007", "key/10000", "key/19999", "other"];
    hold(&store, &held).await;
    until_there(&store).await;
    store.database.run_command(doc! { "profile": 2 }).await.expect("a profile");
    assert_eq!(listed(&store).await, held);
    // One more entry may be examined, to see that there are no others.
    let (documents, entries) = examined(uri, &store).await;
    assert!(documents <= 4 && entries <= 5, "{documents} documents, {entries} entries");
    let some = ListQuery { prefix: "key/1".to_owned(), ..all() };
    assert_eq!(store.list(some).await.expect("a listing").snapshots.len(), 2);
    let (documents, entries) = examined(uri, &store).await;
    assert!(documents <= 4 + 2 && entries <= 5 + 3, "{documents} documents, {entries} entries");
    store.database.drop().await.expect("a database of this test");
}

#[tokio::test]
async fn an_index_that_was_dropped_is_built_again_by_the_next_listing() {
    let store = store().await;
    put(&store, (0..10).map(|number| free(&format!("key/{number}"), NOW)).collect()).await;
    hold(&store, &["key/3", "key/5"]).await;
    store.collection.drop_index(IN_USE).await.expect("an index");
    assert_eq!(listed(&store).await, ["key/3", "key/5"]);
    until_there(&store).await;
    assert_eq!(listed(&store).await, ["key/3", "key/5"]);
    let names = store.collection.list_index_names().await.expect("names");
    assert!(names.iter().any(|name| name == IN_USE), "{names:?}");
}

/// Sets a fail point, and returns how many commands have entered it so far.
async fn fail_point(mongod: &Mongod, mode: impl Into<Bson>, data: Document) -> i64 {
    let client = Client::with_uri_str(mongod.uri()).await.expect("a client");
    let command = doc! { "configureFailPoint": "failCommand", "mode": mode.into(), "data": data };
    let reply = client.database("admin").run_command(command).await.expect("a fail point");
    number(&reply, "count")
}

/// An election, a time limit or a bad request say nothing about the index.
#[tokio::test]
async fn a_listing_that_fails_for_another_reason_is_not_repeated_without_the_index() {
    let mongod = Mongod::start().await.expect("a MongoDB for tests");
    let store = store_at(&location(mongod.uri())).await;
    hold(&store, &["held"]).await;
    until_there(&store).await;
    // MaxTimeMSExpired; NotWritablePrimary, which the driver tries once more; and BadValue.
    for (code, tries) in [(50, 1), (10107, 2), (2, 1)] {
        let data = doc! { "failCommands": ["find"], "errorCode": code };
        let before = fail_point(&mongod, "alwaysOn", data).await;
        store.list(all()).await.expect_err("a failure");
        let after = fail_point(&mongod, "off", doc! {}).await;
        assert_eq!(after - before, tries, "{code}");
        assert!(store.index.is_there(), "{code}");
        assert_eq!(listed(&store).await, ["held"]);
    }
}

/// The build takes longer than a command may take.
#[tokio::test]
async fn an_index_that_takes_long_to_build_is_used_once_it_exists() {
    let mongod = Mongod::start().await.expect("a MongoDB for tests");
    let data = doc! { "failCommands": ["createIndexes"], "blockConnection": true, "blockTimeMS": 6000 };
    fail_point(&mongod, doc! { "times": 1 }, data).await;
    let store = store_at(&location(mongod.uri())).await;
    assert!(!store.index.is_there(), "the start does not wait for the index");
    hold(&store, &["held"]).await;
    put_at(mongod.uri(), &store, vec![free("free", NOW)]).await;
    assert_eq!(listed(&store).await, ["held"]);
    until_there(&store).await;
    assert_eq!(listed(&store).await, ["held"]);
}

/// Returns what is logged after this failure to build the index.
fn logged(failure: Failure) -> String {
    let mut file = tempfile::tempfile().expect("a file");
    let log = tracing_subscriber::fmt().with_writer(file.try_clone().expect("a file")).finish();
    tracing::subscriber::with_default(log, || Index::default().note_failure(failure));
    let mut text = String::new();
    file.rewind().expect("a file");
    file.read_to_string(&mut text).expect("text");
    text
}

#[test]
fn only_a_refusal_is_logged_as_a_lack_of_rights() {
    let refused = logged(Failure::refused("not authorized"));
    assert!(refused.contains("createIndex") && refused.contains("not authorized"), "{refused}");
    let late = logged(Failure::unknown("no answer within 2.5s"));
    assert!(late.contains("still being built") && !late.contains("right"), "{late}");
}

#[tokio::test]
async fn records_without_the_field_get_it_before_the_index_is_built() {
    let location = location(throwaway_mongodb::shared().await.expect("a MongoDB for tests"));
    let store = store_at(&location).await;
    hold(&store, &["held"]).await;
    let damaged = doc! { "_id": "damaged", "holders": "somebody" };
    put(&store, vec![free("free", NOW), damaged]).await;
    store.collection.drop_index(IN_USE).await.expect("an index");
    let unset = doc! { "$unset": { IN_USE: "" } };
    store.collection.update_many(doc! {}, unset).await.expect("an update");
    let store = store_at(&location).await;
    assert_eq!(listed(&store).await, ["held"]);
    assert_eq!(with_field(&store).await, ["damaged", "held"], "a record that cannot be read may be in use");
}

/// Some pages have no valid record, and so no key after which the next page could begin.
#[tokio::test]
async fn a_listing_skips_documents_that_are_no_records_whatever_their_names() {
    let store = store().await;
    let names = ["a\nb", "a\nc", &"a".repeat(1000), "", "b\u{0}"];
    let documents = names.map(|name| doc! { "_id": name, IN_USE: true, "token": 5_i64, "holders": [{}] });
    put(&store, documents.into()).await;
    hold(&store, &["aa", "z"]).await;
    for (limit, include_free) in [(1, false), (1, true), (2, false), (100, true)] {
        let (mut seen, mut query) = (Vec::new(), ListQuery { limit, include_free, ..all() });
        loop {
            let page = store.list(query.clone()).await.expect("a page");
            seen.extend(page.snapshots.into_iter().map(|one| one.record.key));
            query.after = seen.last().cloned();
            if !page.more {
                break;
            }
        }
        assert_eq!(seen, [key("aa"), key("z")], "{limit} a page");
    }
    let no_key = ListQuery { prefix: "a\n".to_owned(), limit: 1, ..all() };
    assert_eq!(store.list(no_key).await.expect("a page"), Page::default());
}

/// The names of the records that have the field.
async fn with_field(store: &MongoStore) -> Vec<String> {
    let names = store.collection.distinct("_id", doc! { IN_USE: true }).await.expect("names");
    names.iter().filter_map(Bson::as_str).map(ToOwned::to_owned).collect()
}

#[tokio::test]
async fn the_index_follows_every_edit_alone_and_in_a_batch() {
    for batched in [false, true] {
        let mut store = store().await;
        let names = if batched { &["job", "beside", "besides"][..] } else { &["job"] };
        let apply = async |store: &MongoStore, edit: Edit| {
            let batch: Vec<_> = names.iter().map(|name| (key(name), edit.clone())).collect();
            commit_batch(store, batch).await;
        };
        let has_field = async |store: &MongoStore| with_field(store).await.contains(&"job".to_owned());
        let [first, second, third] = [(); 3].map(|()| LeaseId::random());
        let wait = |id| ask(Acquisition { wait: true, ..asking(id) });
        for (edit, expected) in [
            (wait(first), true),
            (Edit::default().touch(first), true),
            (wait(second), true),
            (Edit::default().release(first), true),
            (Edit::default().release(second), false),
            (Edit::default(), false),
            (ask(Acquisition { min_hold: Duration::from_secs(60), ..asking(third) }), true),
            (Edit::default().release(third), true),
        ] {
            apply(&store, edit.clone()).await;
            assert_eq!(has_field(&store).await, expected, "{edit:?}, in a batch: {batched}");
        }
        store.set_clock(Timestamp(NOW + 60_000));
        assert!(!listed(&store).await.contains(&"job".to_owned()), "the block is over");
        assert_eq!(store.purge(DAY).await.expect("a purge"), 0);
        assert!(!has_field(&store).await, "only the purge removes the field");
    }
}

#[tokio::test]
async fn a_user_without_the_right_to_build_the_index_is_served_without_it_or_with_an_administrators() {
    let mongod = Mongod::start().await.expect("a MongoDB for tests");
    let refuse = || doc! { "failCommands": ["createIndexes"], "errorCode": 13 };
    fail_point(&mongod, "alwaysOn", refuse()).await;
    let store = store_at(&location(mongod.uri())).await;
    assert!(!store.index.is_there());
    hold(&store, &["held"]).await;
    put_at(mongod.uri(), &store, vec![free("free", NOW)]).await;
    assert_eq!(listed(&store).await, ["held"]);
    store.purge(DAY).await.expect("a purge");
    assert!(!store.index.is_there());

    fail_point(&mongod, "off", doc! {}).await;
    let index =
        doc! { "key": { "_id": 1, IN_USE: 1 }, "name": IN_USE, "partialFilterExpression": { IN_USE: true } };
    let create = doc! { "createIndexes": store.collection.name(), "indexes": [index] };
    store.database.run_command(create).await.expect("an index");
    fail_point(&mongod, "alwaysOn", refuse()).await;
    store.purge(DAY).await.expect("a purge");
    assert!(store.index.is_there());
    assert_eq!(listed(&store).await, ["held"]);
}

/// The server refuses to scan whole collections.
#[tokio::test]
async fn a_few_keys_that_are_due_are_purged_among_many_that_are_not() {
    let mongod = Mongod::start().await.expect("a MongoDB for tests");
    let client = Client::with_uri_str(mongod.uri()).await.expect("a client");
    let store = store_at(&location(mongod.uri())).await;
    put_many(mongod.uri(), &store).await;
    let long_ago = NOW - 2 * 24 * 3_600_000;
    let due = (0..500).map(|number| free(&format!("key/{:05}/due", number * 40), long_ago)).collect();
    put_at(mongod.uri(), &store, due).await;
    hold(&store, &["key/00001"]).await;
    let strict = doc! { "setParameter": 1, "notablescan": true };
    client.database("admin").run_command(strict).await.expect("a parameter");
    assert_eq!(store.purge(DAY).await.expect("a purge"), 500);
    assert_eq!(store.purge(DAY).await.expect("a purge"), 0);
    assert_eq!(listed(&store).await, ["key/00001"]);
}

#[tokio::test]
async fn a_record_that_was_never_granted_is_purged_after_an_hour_and_an_invalid_one_stays() {
    let mut store = store().await;
    let none: [Bson; 0] = [];
    let departure = doc! { "id": 1, "reason": "released", "at": DateTime::from_millis(NOW) };
    put(
        &store,
        vec![
            doc! { "_id": "late", "token": 0_i64, "rev": 1_i64, "holders": none.clone(), "waiters": none.clone(), "departures": [departure] },
            doc! { "_id": "odd", "holders": [{ "name": "not ours" }] },
            doc! { "_id": "odder", "token": "x", "rev": 1_i64, "holders": none, "departures": [{ "at": "noon" }] },
        ],
    )
    .await;
    store.set_clock(Timestamp(NOW + 3_600_000));
    assert_eq!(store.purge(DAY * 7).await.expect("a purge"), 0);
    store.set_clock(Timestamp(NOW + 3_600_001));
    assert_eq!(store.purge(DAY * 7).await.expect("a purge"), 1);
    let left = store.collection.count_documents(doc! {}).await.expect("a count");
    assert_eq!(left, 2);
}
