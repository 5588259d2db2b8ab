//! Tests that the change feed goes on after every fault.

use std::time::Duration;

use mongodb::Client;
use mongodb::bson::{Document, doc};
use throwaway_mongodb::{Mongod, ReplicaSet};

use super::{RULES, eventually, lease, marker, registered, store, store_at, two, with_heartbeat};
use crate::store::mongo::{ConnectError, HeartbeatConfig, Location, MongoStore, Unusable};
use crate::store::{FeedEvent, FeedState, Store};

#[tokio::test]
async fn the_feed_goes_on_after_the_collection_was_dropped() {
    let store = store().await;
    let (mut listener, _other) = two(&store).await;
    store.collection.drop().await.expect("done");
    listener.goes_on_after_a_gap().await;
}

/// Makes the server fail every command of this kind, until [`fail_no_more`]. Fail points apply to
/// the whole server, so the test needs a server of its own.
async fn fail(mongod: &Mongod, command: &str, failure: Document) {
    let mut data = failure;
    data.insert("failCommands", [command]);
    set_fail_point(
        mongod.uri(),
        doc! { "configureFailPoint": "failCommand", "mode": "alwaysOn", "data": data },
    )
    .await;
}

async fn fail_no_more(mongod: &Mongod) {
    set_fail_point(mongod.uri(), doc! { "configureFailPoint": "failCommand", "mode": "off" }).await;
}

async fn set_fail_point(uri: &str, command: Document) {
    let client = Client::with_uri_str(uri).await.expect("done");
    client.database("admin").run_command(command).await.expect("done");
}

#[tokio::test]
async fn the_feed_goes_on_after_every_failure_of_its_stream() {
    let mongod = Mongod::start().await.expect("a MongoDB for tests");
    let store = store_at(mongod.uri()).await;
    let (mut listener, _other) = two(&store).await;
    for failure in [
        // ChangeStreamHistoryLost, CursorNotFound, PrimarySteppedDown, and UnknownError.
        doc! { "errorCode": 286 },
        doc! { "errorCode": 43 },
        doc! { "errorCode": 189 },
        doc! { "errorCode": 8 },
        doc! { "closeConnection": true },
    ] {
        fail(&mongod, "getMore", failure).await;
        eventually(async || (listener.store.feed_state() == FeedState::Broken).then_some(())).await;
        fail_no_more(&mongod).await;
        listener.goes_on_after_a_gap().await;
    }
}

#[tokio::test]
async fn a_feed_that_cannot_be_opened_is_broken_and_reports_gaps_until_it_can() {
    let mongod = Mongod::start().await.expect("a MongoDB for tests");
    let store = store_at(mongod.uri()).await;
    fail(&mongod, "aggregate", doc! { "errorCode": 8 }).await;
    let (mut listener, _other) = two(&store).await;
    assert_eq!(listener.next().await, FeedEvent::Gap);
    assert_eq!(listener.store.feed_state(), FeedState::Broken);
    fail_no_more(&mongod).await;
    eventually(async || listener.is_open()).await;
    listener.goes_on_after_a_gap().await;
}

#[tokio::test]
async fn an_open_feed_stays_open_while_heartbeats_fail() {
    let mongod = Mongod::start().await.expect("a MongoDB for tests");
    let store = with_heartbeat(store_at(mongod.uri()).await, |heartbeat| HeartbeatConfig {
        empty_polls: 1,
        timeout: Duration::from_millis(1500),
        ..heartbeat
    });
    let (mut listener, _other) = two(&store).await;
    let namespace = registered(&store).namespace().to_string();
    fail(&mongod, "update", doc! { "errorCode": 189, "namespace": namespace }).await;
    // Waits until neither daemon would count as alive.
    let dead = doc! { "seen_at": { "$exists": true }, "$expr": { "$lt": ["$seen_at", { "$subtract": ["$$NOW", 2000] }] } };
    eventually(async || {
        (registered(&store).count_documents(dead.clone()).await.expect("done") == 2).then_some(())
    })
    .await;
    let last = marker();
    lease(&store, &last).await;
    assert!(listener.changes_until(&last).await.is_empty());
}

#[tokio::test]
async fn a_user_who_may_not_open_a_change_stream_is_told_at_the_start() {
    let mongod = Mongod::start().await.expect("a MongoDB for tests");
    fail(&mongod, "aggregate", doc! { "errorCode": 13 }).await;
    let location =
        Location { uri: mongod.uri().to_owned(), database: "feed".into(), collection: "no".into() };
    let refused = MongoStore::connect(&location, RULES).await.expect_err("no rights");
    assert!(matches!(refused, ConnectError::Unusable(Unusable::Rights(_))), "{refused}");
    assert!(refused.to_string().contains("changeStream on its collection"), "{refused}");
}

/// After a step down the old primary continues to serve the stream.
#[tokio::test]
async fn the_feed_goes_on_through_failovers() {
    let mut set = ReplicaSet::start().await.expect("three nodes");
    let store = with_heartbeat(store_at(set.uri()).await, |heartbeat| HeartbeatConfig {
        max_lag: Duration::from_secs(2),
        ..heartbeat
    });
    let old_uri = set.node_uri(set.wait_for_primary().await.expect("done")).expect("done");
    let (mut listener, _other) = two(&store).await;
    set.step_down().await.expect("done");
    listener.goes_on().await;

    // The node no longer learns what a majority has, and answers that there are no changes.
    set_fail_point(&old_uri, doc! { "configureFailPoint": "stopReplProducer", "mode": "alwaysOn" }).await;
    listener.goes_on_after_a_gap().await;
    set_fail_point(&old_uri, doc! { "configureFailPoint": "stopReplProducer", "mode": "off" }).await;
    set.wait_for_all().await.expect("done");

    let paused = set.wait_for_primary().await.expect("done");
    set.pause(paused).expect("done");
    listener.goes_on_after_a_gap().await;
    set.resume(paused).expect("done");
    set.wait_for_all().await.expect("done");

    set.kill_primary().await.expect("done");
    listener.goes_on_after_a_gap().await;
}
