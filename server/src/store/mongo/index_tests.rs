//! Listings and purges beside many keys that are of no interest to them.

use std::time::Duration;

use mongodb::Client;
use mongodb::bson::{Bson, DateTime, Document, doc};
use throwaway_mongodb::Mongod;

use super::index::IN_USE;
use super::{Location, MongoStore};
use crate::lease::{Acquisition, Edit, LeaseId, Rules, Timestamp};
use crate::store::conformance::reading::{ask, asking, key};
use crate::store::{ListQuery, Store};

const RULES: Rules = Rules { grace: Duration::from_millis(100), place: Duration::from_secs(15) };
const NOW: i64 = 1_700_000_000_000;
const DAY: Duration = Duration::from_secs(24 * 3600);
const MANY: usize = 20_000;

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

/// A record whose latest token was granted then, and that is free.
fn free(name: &str, granted_at: i64) -> Document {
    let none: [Bson; 0] = [];
    doc! {
        "_id": name, "token": granted_at, "rev": 2_i64,
        "holders": none.clone(), "waiters": none.clone(), "departures": none,
    }
}

/// Over a connection that has more patience than a daemon's.
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

/// Keys free since now.
async fn put_many(uri: &str, store: &MongoStore) {
    put_at(uri, store, (0..MANY).map(|number| free(&format!("key/{number:05}"), NOW)).collect()).await;
}

async fn hold(store: &MongoStore, names: &[&str]) -> Vec<LeaseId> {
    let mut ids = Vec::new();
    for name in names {
        let id = LeaseId::random();
        let batch = vec![(key(name), ask(Acquisition { wait: true, ..asking(id) }))];
        store.commit(batch.into(), DAY).await.expect("a commit");
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

/// How many documents the server looks at for such a page.
async fn examined(store: &MongoStore, query: &ListQuery) -> i64 {
    let find = doc! {
        "find": store.collection.name(), "filter": store.of_page(query, true), "sort": { "_id": 1 }, "hint": IN_USE,
        "limit": 101,
    };
    let explain = doc! { "explain": find, "verbosity": "executionStats" };
    let explained = store.database.run_command(explain).await.expect("an explanation");
    let stats = explained.get_document("executionStats").expect("statistics");
    let count = |field| stats.get_i32(field).map(i64::from).expect("a count");
    count("totalDocsExamined").max(count("totalKeysExamined") - 1)
}

#[tokio::test]
async fn a_listing_reads_no_more_than_it_shows() {
    let store = store().await;
    put_many(throwaway_mongodb::shared().await.expect("a MongoDB for tests"), &store).await;
    let held = ["key/00007", "key/10000", "key/19999", "other"];
    hold(&store, &held).await;
    assert!(store.index.is_there());
    assert_eq!(listed(&store).await, held);
    assert!(examined(&store, &all()).await <= 4);
    let some = ListQuery { prefix: "key/1".to_owned(), ..all() };
    assert!(examined(&store, &some).await <= 2);
}

#[tokio::test]
async fn a_listing_shows_the_same_when_the_index_is_gone() {
    let store = store().await;
    put(&store, (0..10).map(|number| free(&format!("key/{number}"), NOW)).collect()).await;
    hold(&store, &["key/3", "key/5"]).await;
    store.collection.drop_index(IN_USE).await.expect("an index");
    assert_eq!(listed(&store).await, ["key/3", "key/5"]);
    assert!(!store.index.is_there());
    store.purge(DAY).await.expect("a purge");
    assert!(store.index.is_there(), "it is made anew");
    assert_eq!(listed(&store).await, ["key/3", "key/5"]);
}

#[tokio::test]
async fn records_without_the_field_are_found_when_the_index_is_made() {
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
    assert_eq!(marked(&store).await, ["damaged", "held"], "what cannot be read may be in use");
}

/// Which records the index has.
async fn marked(store: &MongoStore) -> Vec<String> {
    let names = store.collection.distinct("_id", doc! { IN_USE: true }).await.expect("names");
    names.iter().filter_map(Bson::as_str).map(ToOwned::to_owned).collect()
}

#[tokio::test]
async fn the_index_follows_every_edit_alone_and_in_company() {
    for company in [false, true] {
        let mut store = store().await;
        let names = if company { &["job", "beside", "besides"][..] } else { &["job"] };
        let apply = async |store: &MongoStore, edit: Edit| {
            let batch: Vec<_> = names.iter().map(|name| (key(name), edit.clone())).collect();
            store.commit(batch.into(), DAY).await.expect("a commit");
        };
        let is_marked = async |store: &MongoStore| marked(store).await.contains(&"job".to_owned());
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
            assert_eq!(is_marked(&store).await, expected, "{edit:?}, in company: {company}");
        }
        store.set_clock(Timestamp(NOW + 60_000));
        assert!(!listed(&store).await.contains(&"job".to_owned()), "the block is over");
        assert_eq!(store.purge(DAY).await.expect("a purge"), 0);
        assert!(!is_marked(&store).await, "nothing but the purge was to notice that");
    }
}

#[tokio::test]
async fn a_user_who_may_not_make_the_index_is_served_without_it() {
    let mongod = Mongod::start().await.expect("a MongoDB for tests");
    let client = Client::with_uri_str(mongod.uri()).await.expect("a client");
    let data = doc! { "failCommands": ["createIndexes"], "errorCode": 13 };
    let fail = doc! { "configureFailPoint": "failCommand", "mode": "alwaysOn", "data": data };
    client.database("admin").run_command(fail).await.expect("a fail point");
    let store = store_at(&location(mongod.uri())).await;
    assert!(!store.index.is_there());
    hold(&store, &["held"]).await;
    put_at(mongod.uri(), &store, vec![free("free", NOW)]).await;
    assert_eq!(listed(&store).await, ["held"]);
    store.purge(DAY).await.expect("a purge");
}

/// On a server that refuses to read collections from end to end, at that.
#[tokio::test]
async fn a_few_keys_that_are_due_are_forgotten_among_many_that_are_not() {
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
async fn a_record_that_was_never_granted_is_forgotten_within_the_hour_and_a_foreign_one_stays() {
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
