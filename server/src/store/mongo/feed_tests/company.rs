//! There is a change feed while there are other daemons, and only then.

use std::time::Duration;

use tokio::time::timeout;

use super::{Listener, PATIENCE, at_pace, eventually, lease, marker, registered, signs, store, two};
use crate::store::mongo::Pace;
use crate::store::{FeedEvent, FeedState, Store};

#[tokio::test]
async fn a_daemon_has_a_feed_only_while_another_is_there() {
    let store = at_pace(store().await, |pace| Pace { patience: 3, ..pace });
    let mut first = Listener::start(&store);
    eventually(async || registered(&store).find_one(signs()).await.expect("done")).await;
    lease(&store, &marker()).await;
    assert_eq!(first.store.feed_state(), FeedState::Off);
    assert!(first.heard.try_recv().is_err(), "nothing is told to one who is alone");

    let mut second = Listener::start(&store);
    assert_eq!(first.next().await, FeedEvent::Gap);
    assert_eq!(second.next().await, FeedEvent::Gap);
    for listener in [&first, &second] {
        eventually(async || listener.is_followed()).await;
    }

    second.drain().await;
    assert_eq!(registered(&store).count_documents(signs()).await.expect("done"), 1, "the drained is gone");
    eventually(async || (first.store.feed_state() == FeedState::Off).then_some(())).await;
    let third = Listener::start(&store);
    assert_eq!(first.next().await, FeedEvent::Gap, "what others did meanwhile was not told");
    third.drain().await;
    first.drain().await;
    assert_eq!(registered(&store).count_documents(signs()).await.expect("done"), 0);
}

#[tokio::test]
async fn a_daemon_that_died_is_missed_and_later_forgotten() {
    let store = at_pace(store().await, |pace| Pace {
        alive: Duration::from_millis(1500),
        patience: 2,
        forget: Duration::from_secs(3),
        ..pace
    });
    let mut first = Listener::start(&store);
    let second = Listener::start(&store);
    assert_eq!(first.next().await, FeedEvent::Gap);
    second.feed.abort();
    eventually(async || (first.store.feed_state() == FeedState::Off).then_some(())).await;
    eventually(async || {
        (registered(&store).count_documents(signs()).await.expect("done") == 1).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_feed_that_nobody_hears_ends() {
    let store = store().await;
    let (listener, _other) = two(&store).await;
    drop(listener.heard);
    timeout(PATIENCE, listener.feed).await.expect("an end in time").expect("an end in peace");
}
