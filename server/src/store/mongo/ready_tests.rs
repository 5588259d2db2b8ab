//! Tests of the readiness check, on a replica set that loses nodes.

use std::time::Duration;

use mongodb::Client;
use mongodb::bson::doc;
use throwaway_mongodb::ReplicaSet;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::daemons::Daemons;
use super::{Location, MongoStore};
use crate::lease::{LeaseId, Rules};
use crate::store::Store;

const RULES: Rules = Rules { grace: Duration::from_millis(100), waiter_ttl: Duration::from_secs(15) };
const PATIENCE: Duration = Duration::from_secs(60);

async fn store_at(uri: &str) -> MongoStore {
    let location =
        Location { uri: uri.to_owned(), database: "ready".into(), collection: LeaseId::random().reveal() };
    MongoStore::connect(&location, RULES).await.expect("a usable store")
}

/// Waits until the check succeeds if `is_ready` is true, else until it fails.
async fn until_ready(store: &MongoStore, is_ready: bool) {
    let looking = async {
        while store.check().await.is_ok() != is_ready {
            sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(PATIENCE, looking).await.unwrap_or_else(|_| panic!("never ready: {is_ready}"));
}

/// The secondaries run, so the primary stays primary. But they do not replicate.
#[tokio::test]
async fn a_primary_without_a_majority_is_not_ready() {
    let set = ReplicaSet::start().await.expect("three nodes");
    let store = store_at(set.uri()).await;
    let ended = CancellationToken::new();
    let (daemons, token) = (Daemons::new(&store), ended.clone());
    let beats = tokio::spawn(async move { daemons.run_heartbeats(watch::channel(false).0, &token).await });
    until_ready(&store, true).await;

    let primary = set.wait_for_primary().await.expect("a primary");
    let stop = async |mode: &str| {
        for node in (0..3).filter(|node| *node != primary) {
            let client = Client::with_uri_str(set.node_uri(node).expect("a node")).await.expect("a client");
            let stop = doc! { "configureFailPoint": "rsSyncApplyStop", "mode": mode };
            client.database("admin").run_command(stop).await.expect("a fail point");
        }
    };
    stop("alwaysOn").await;
    until_ready(&store, false).await;
    assert_eq!(set.primary().await, Some(primary), "the primary is the same node");
    stop("off").await;
    until_ready(&store, true).await;
    ended.cancel();
    timeout(PATIENCE, beats).await.expect("an end in time").expect("no panic");
}

#[tokio::test]
async fn a_set_in_which_two_of_three_nodes_are_paused_is_not_ready() {
    let set = ReplicaSet::start().await.expect("three nodes");
    let store = store_at(set.uri()).await;
    until_ready(&store, true).await;
    let primary = set.wait_for_primary().await.expect("a primary");
    for node in (0..3).filter(|node| *node != primary) {
        set.pause(node).expect("a node");
    }
    until_ready(&store, false).await;
    for node in (0..3).filter(|node| *node != primary) {
        set.resume(node).expect("a node");
    }
    until_ready(&store, true).await;
}

/// A direct connection to a node still answers when the node has become a secondary.
#[tokio::test]
async fn a_node_that_is_no_longer_the_primary_is_not_ready() {
    let set = ReplicaSet::start().await.expect("three nodes");
    let old = set.wait_for_primary().await.expect("a primary");
    let mut store = store_at(set.uri()).await;
    let client = Client::with_uri_str(set.node_uri(old).expect("a node")).await.expect("a client");
    store.database = client.database(store.database.name());
    until_ready(&store, true).await;
    set.step_down().await.expect("another primary");
    until_ready(&store, false).await;
}
