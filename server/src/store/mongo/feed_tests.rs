//! Tests of the change feed on a real MongoDB: which changes it reports, and which it does not.

mod peers_present;
mod faults;

use std::sync::Arc;
use std::time::Duration;

use mongodb::Collection;
use mongodb::bson::{Document, doc};
use rstest::rstest;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::{Feed, HeartbeatConfig, Location, MongoStore, daemons};
use crate::lease::{Acquisition, Edit, Key, LeaseId, Mode, Rules, Timestamp};
use crate::store::conformance::mutants::Mutant;
use crate::store::conformance::reading::{ask, asking, commit_batch, key};
use crate::store::{FeedEvent, FeedState, Store};

const RULES: Rules = Rules { grace: Duration::from_millis(100), waiter_ttl: Duration::from_secs(15) };
const PATIENCE: Duration = Duration::from_secs(30);
const NOW: i64 = 1_700_000_000_000;

/// A store with a collection of its own at `uri`.
async fn store_at(uri: &str) -> MongoStore {
    let location =
        Location { uri: uri.to_owned(), database: "feed".into(), collection: LeaseId::random().reveal() };
    let mut store = MongoStore::connect(&location, RULES).await.expect("a usable store");
    store.set_clock(Timestamp(NOW));
    with_heartbeat(store, |heartbeat| HeartbeatConfig { interval: Duration::from_millis(50), ..heartbeat })
}

async fn store() -> MongoStore {
    store_at(throwaway_mongodb::shared().await.expect("a MongoDB for tests")).await
}

/// The store of another daemon on the same records.
fn another_daemon(store: &MongoStore) -> MongoStore {
    with_heartbeat(MongoStore { keys_with_waiters: Arc::default(), ..store.clone() }, |heartbeat| heartbeat)
}

fn with_heartbeat(store: MongoStore, change: impl FnOnce(HeartbeatConfig) -> HeartbeatConfig) -> MongoStore {
    MongoStore { feed: Arc::new(Feed::new(change(store.feed.heartbeat))), ..store }
}

/// A daemon that follows the feed.
struct Listener {
    store: MongoStore,
    events: mpsc::Receiver<FeedEvent>,
    draining: CancellationToken,
    feed: JoinHandle<()>,
}

impl Listener {
    /// Returns `Some` if the feed is open.
    fn is_open(&self) -> Option<()> {
        matches!(self.store.feed_state(), FeedState::Behind(_)).then_some(())
    }

    fn start(store: &MongoStore) -> Self {
        let store = another_daemon(store);
        let (sender, events) = mpsc::channel(16);
        let draining = CancellationToken::new();
        let (fed, ended) = (store.clone(), draining.clone());
        let feed = tokio::spawn(async move { fed.feed(sender, ended).await });
        Self { store, events, draining, feed }
    }

    async fn next(&mut self) -> FeedEvent {
        timeout(PATIENCE, self.events.recv()).await.expect("an event in time").expect("a feed")
    }

    /// Returns the changes before the next change of the key `last`.
    async fn changes_until(&mut self, last: &Key) -> Vec<(Key, Option<i64>)> {
        let mut changes = Vec::new();
        loop {
            match self.next().await {
                FeedEvent::Changed { key, .. } if key == *last => return changes,
                FeedEvent::Changed { key, rev } => changes.push((key, rev)),
                FeedEvent::Gap => panic!("a gap after {changes:?}"),
            }
        }
    }

    async fn goes_on_after_a_gap(&mut self) {
        while self.next().await != FeedEvent::Gap {}
        self.goes_on().await;
    }

    /// Waits until the feed reports a change that is made after this call. There may be gaps before
    /// it.
    async fn goes_on(&mut self) {
        let mut last = marker();
        lease(&self.store, &last).await;
        loop {
            match self.next().await {
                FeedEvent::Changed { key, .. } if key == last => return,
                FeedEvent::Changed { .. } => {}
                FeedEvent::Gap => {
                    last = marker();
                    lease(&self.store, &last).await;
                }
            }
        }
    }

    async fn drain(self) {
        self.draining.cancel();
        timeout(PATIENCE, self.feed).await.expect("an end in time").expect("no panic");
    }
}

/// Starts two daemons on the records of `store`, and waits until their feeds are open.
async fn two(store: &MongoStore) -> (Listener, Listener) {
    let mut both = (Listener::start(store), Listener::start(store));
    assert_eq!(both.0.next().await, FeedEvent::Gap);
    assert_eq!(both.1.next().await, FeedEvent::Gap);
    both
}

async fn eventually<T>(mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    let asking = async {
        loop {
            if let Some(answer) = ask().await {
                return answer;
            }
            sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(PATIENCE, asking).await.expect("it happens in time")
}

fn marker() -> Key {
    key(&format!("marker/{}", LeaseId::random().reveal()))
}

async fn lease(store: &MongoStore, key: &Key) {
    commit_batch(store, vec![(key.clone(), ask(asking(LeaseId::random())))]).await;
}

fn registered(store: &MongoStore) -> Collection<Document> {
    store.database.collection(&daemons::collection_name(store.collection.name()))
}

/// The filter for daemons in the collection of daemons.
fn daemon_filter() -> Document {
    doc! { "seen_at": { "$exists": true } }
}

/// An acquisition that waits, with this mode.
fn waiting(id: LeaseId, mode: Mode) -> Acquisition {
    Acquisition { wait: true, mode, shared_limit: 2, ..asking(id) }
}

/// Edits of a key: a description, the milliseconds since the edit before, the edit, and whether the
/// feed must report it.
fn story() -> Vec<(&'static str, i64, Edit, bool)> {
    let [first, second, third, fourth, fifth] = [(); 5].map(|()| LeaseId::random());
    let exclusive = |id| ask(waiting(id, Mode::Exclusive));
    vec![
        ("acquires", 0, exclusive(first), true),
        ("touches", 1, Edit::default().touch(first), false),
        ("touches an unknown id", 1, Edit::default().touch(second), false),
        ("nudges in vain", 1, Edit::default(), false),
        ("enqueues a second one", 1, exclusive(second), true),
        ("asks again", 1, exclusive(second), true),
        ("refreshes the waiter", 1, Edit::default().refresh(second), false),
        ("touches while another waits", 1, Edit::default().touch(first), false),
        ("enqueues a third one", 1, exclusive(third), true),
        ("cancels the third one", 1, Edit::default().cancel(third), true),
        ("releases to the next", 1, Edit::default().release(first), true),
        ("touches again", 1, Edit::default().touch(second), false),
        ("enqueues a fourth one", 1, exclusive(fourth), true),
        ("nudges when the lease is over", 2000, Edit::default(), true),
        ("enqueues a fifth one", 1, exclusive(fifth), true),
        ("touches a lost lease when the next one is over", 2000, Edit::default().touch(second), true),
        ("touches the next lease", 1, Edit::default().touch(fifth), false),
        ("tries in vain", 1, ask(asking(LeaseId::random())), true),
        ("revokes an unknown id", 1, Edit::default().revoke(LeaseId::random()), true),
        ("releases", 1, Edit::default().release(fifth), true),
        ("nudges a free key", 1, Edit::default(), false),
    ]
}

/// Plays the story. Returns the changes that the feed must report and those that it reported. With
/// `batched` each edit shares its command with an edit of another key.
async fn reported(
    mutant: Option<Mutant>,
    batched: bool,
) -> (Vec<(Key, Option<i64>)>, Vec<(Key, Option<i64>)>) {
    let correct = store().await;
    let (mut listener, _other) = two(&correct).await;
    let mut store = another_daemon(&correct);
    store.mutant = mutant;
    let (job, bystander, id) = (key("job"), key("bystander"), LeaseId::random());
    let mut expected = Vec::new();
    if batched {
        let ttl = asking(id).ttl;
        let seen =
            commit_batch(&store, vec![(bystander.clone(), ask(Acquisition { ttl, ..asking(id) }))]).await;
        expected.push((bystander.clone(), Some(seen[0].record.rev)));
    }
    let mut now = NOW;
    for (_, later, edit, is_reported) in story() {
        now += later;
        store.set_clock(Timestamp(now));
        let mut batch = vec![(job.clone(), edit)];
        if batched {
            batch.push((bystander.clone(), Edit::default().touch(id)));
        }
        let after = commit_batch(&store, batch).await;
        if is_reported {
            expected.push((job.clone(), Some(after[0].record.rev)));
        }
    }
    let last = marker();
    lease(&correct, &last).await;
    (expected, listener.changes_until(&last).await)
}

#[rstest]
#[tokio::test]
async fn every_change_of_holders_or_queue_is_reported_with_its_revision_and_touches_are_not(
    #[values(false, true)] batched: bool,
) {
    let (expected, events) = reported(None, batched).await;
    assert_eq!(events, expected);
}

#[rstest]
#[tokio::test]
async fn a_mutant_of_notify_rev_is_caught(
    #[values(Mutant::NotifyRevKept, Mutant::NotifyRevAlwaysRises)] mutant: Mutant,
    #[values(false, true)] batched: bool,
) {
    let (expected, events) = reported(Some(mutant), batched).await;
    assert_ne!(events, expected);
}

#[tokio::test]
async fn a_purged_key_is_reported_without_a_revision_and_a_name_that_is_no_key_is_not_reported() {
    let store = store().await;
    let (mut listener, _other) = two(&store).await;
    let job = key("job");
    lease(&store, &job).await;
    let collection = store.collection.clone_with_type::<Document>();
    collection.insert_one(doc! { "_id": "not\na key", "rev": 1_i64 }).await.expect("done");
    collection.insert_one(doc! { "_id": 7, "rev": 1_i64 }).await.expect("done");
    collection.delete_one(doc! { "_id": job.as_str() }).await.expect("done");
    let last = marker();
    lease(&store, &last).await;
    assert_eq!(listener.changes_until(&last).await, [(job.clone(), Some(1)), (job, None)]);
}

#[tokio::test]
async fn a_batch_that_creates_records_is_reported_once_for_each() {
    let store = store().await;
    let (mut listener, _other) = two(&store).await;
    let keys: Vec<Key> = (0..50).map(|number| key(&format!("key/{number:02}"))).collect();
    commit_batch(&store, keys.iter().map(|key| (key.clone(), ask(asking(LeaseId::random())))).collect())
        .await;
    let last = marker();
    lease(&store, &last).await;
    let mut events = listener.changes_until(&last).await;
    events.sort();
    assert_eq!(events, keys.into_iter().map(|key| (key, Some(1))).collect::<Vec<_>>());
}
