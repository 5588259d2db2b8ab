//! Failovers in a set of three servers: the primary steps down, is killed or paused, and returns.

use std::time::Duration;

use mongodb::bson::{Document, doc};
use mongodb::options::WriteConcern;
use mongodb::{Client, Collection};
use throwaway_mongodb::ReplicaSet;
use tokio::time::timeout;

use crate::traces::{Traces, hello};

/// How long an election may take. Ten times what an election takes here, and a third of the minute
/// in which a primary that stepped down cannot be elected again.
const BOUND: Duration = Duration::from_secs(20);

async fn things(uri: &str) -> Collection<Document> {
    Client::with_uri_str(uri).await.unwrap().database("test").collection("things")
}

async fn insert(things: &Collection<Document>, id: i32) {
    things.insert_one(doc! { "_id": id }).write_concern(WriteConcern::majority()).await.unwrap();
}

async fn next_primary(set: &ReplicaSet) -> usize {
    timeout(BOUND, set.wait_for_primary()).await.unwrap().unwrap()
}

async fn is_secondary(set: &ReplicaSet, node: usize) -> bool {
    hello(&set.node_uri(node).unwrap()).await.get_bool("secondary").unwrap()
}

#[tokio::test]
async fn every_primary_that_steps_down_has_a_successor() {
    let mut set = ReplicaSet::start().await.unwrap();
    let seen = hello(set.uri()).await;
    let hosts = seen.get_array("hosts").unwrap();
    assert!(hosts.len() == 3 && hosts.iter().all(|host| set.uri().contains(host.as_str().unwrap())));
    assert!(set.pause(3).unwrap_err().to_string().contains("no node 3"));

    let first = set.primary().await.unwrap();
    let second = set.step_down().await.unwrap();
    assert_ne!(second, first);
    assert!(set.primary().await == Some(second) && is_secondary(&set, first).await);
    assert_ne!(set.step_down().await.unwrap(), second);
    // The next primary may be one that has stepped down before.
    let killed = set.kill_primary().await.unwrap();
    assert_ne!(next_primary(&set).await, killed);
}

#[tokio::test]
async fn a_killed_primary_has_a_successor_and_returns_with_all_data() {
    let mut set = ReplicaSet::start().await.unwrap();
    let before = things(set.uri()).await;
    insert(&before, 1).await;
    let killed = set.kill_primary().await.unwrap();
    assert_ne!(next_primary(&set).await, killed);
    assert_eq!(before.count_documents(doc! {}).await.unwrap(), 1);
    insert(&before, 2).await;

    set.restart(killed).await.unwrap();
    set.wait_for_all().await.unwrap();
    assert!(is_secondary(&set, killed).await);
    let copy = things(&set.node_uri(killed).unwrap()).await;
    assert_eq!(copy.count_documents(doc! {}).await.unwrap(), 2);
}

#[tokio::test]
async fn a_paused_primary_has_a_successor_and_is_a_secondary_when_resumed() {
    let set = ReplicaSet::start().await.unwrap();
    let paused = set.primary().await.unwrap();
    set.pause(paused).unwrap();
    let next = next_primary(&set).await;
    assert_ne!(next, paused);
    insert(&things(set.uri()).await, 1).await;
    assert_eq!(set.primary().await, Some(next));

    set.resume(paused).unwrap();
    set.wait_for_all().await.unwrap();
    assert!(is_secondary(&set, paused).await);
    let copy = things(&set.node_uri(paused).unwrap()).await;
    assert_eq!(copy.count_documents(doc! {}).await.unwrap(), 1);
    set.stop().await.unwrap();
}

#[tokio::test]
async fn a_dropped_set_leaves_no_process_and_no_folder_even_of_paused_and_killed_nodes() {
    let mut set = ReplicaSet::start().await.unwrap();
    let mut traces = Vec::new();
    for node in 0..3 {
        traces.push(Traces::of(&set.node_uri(node).unwrap()).await);
    }
    set.pause(0).unwrap();
    set.kill(1).unwrap();
    assert!(traces.iter().all(|traces| traces.folder.exists()));
    drop(set);
    for traces in traces {
        traces.until_gone().await;
    }
}
