//! Tests that the change feed is open only while there are other daemons.

use std::time::Duration;

use tokio::time::timeout;

use super::{
    Listener, PATIENCE, daemon_filter, eventually, lease, marker, registered, store, two, with_heartbeat,
};
use crate::store::mongo::HeartbeatConfig;
use crate::store::{FeedEvent, FeedState, Store};

#[tokio::test]
async fn a_daemon_has_a_feed_only_while_another_is_there() {
    let store = with_heartbeat(store().await, |heartbeat| HeartbeatConfig { empty_polls: 3, ..heartbeat });
    let mut first = Listener::start(&store);
    eventually(async || registered(&store).find_one(daemon_filter()).await.expect("done")).await;
    lease(&store, &marker()).await;
    assert_eq!(first.store.feed_state(), FeedState::Off);
    assert!(first.events.try_recv().is_err(), "a daemon that is alone gets no events");

    let mut second = Listener::start(&store);
    assert_eq!(first.next().await, FeedEvent::Gap);
    assert_eq!(second.next().await, FeedEvent::Gap);
    for listener in [&first, &second] {
        eventually(async || listener.is_open()).await;
    }

    second.drain().await;
    assert_eq!(
        registered(&store).count_documents(daemon_filter()).await.expect("done"),
        1,
        "the drained daemon is off the list"
    );
    eventually(async || (first.store.feed_state() == FeedState::Off).then_some(())).await;
    let third = Listener::start(&store);
    assert_eq!(first.next().await, FeedEvent::Gap, "changes while the feed was closed were not reported");
    third.drain().await;
    first.drain().await;
    assert_eq!(registered(&store).count_documents(daemon_filter()).await.expect("done"), 0);
}

#[tokio::test]
async fn a_daemon_that_died_counts_as_gone_and_is_later_removed_from_the_list() {
    let store = with_heartbeat(store().await, |heartbeat| HeartbeatConfig {
        timeout: Duration::from_millis(1500),
        empty_polls: 2,
        remove_after: Duration::from_secs(3),
        ..heartbeat
    });
    let mut first = Listener::start(&store);
    let second = Listener::start(&store);
    assert_eq!(first.next().await, FeedEvent::Gap);
    // Not drained, so the daemon does not remove itself from the list.
    second.feed.abort();
    eventually(async || (first.store.feed_state() == FeedState::Off).then_some(())).await;
    eventually(async || {
        (registered(&store).count_documents(daemon_filter()).await.expect("done") == 1).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_feed_without_a_receiver_ends() {
    let store = store().await;
    let (listener, _other) = two(&store).await;
    drop(listener.events);
    timeout(PATIENCE, listener.feed).await.expect("an end in time").expect("no panic");
}
