//! The change feed on a real MongoDB: what is told, and what is not.

mod company;
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

use super::{Feed, Location, MongoStore, Pace, daemons};
use crate::lease::{Acquisition, Edit, Key, LeaseId, Mode, Rules, Snapshot, Timestamp};
use crate::store::conformance::mutants::Wrong;
use crate::store::conformance::reading::{all_of, ask, asking, key};
use crate::store::{FeedEvent, FeedState, Store};

const RULES: Rules = Rules { grace: Duration::from_millis(100), place: Duration::from_secs(15) };
const PATIENCE: Duration = Duration::from_secs(30);
const NOW: i64 = 1_700_000_000_000;

/// A store of its own at `uri`.
async fn store_at(uri: &str) -> MongoStore {
    let location =
        Location { uri: uri.to_owned(), database: "feed".into(), collection: LeaseId::random().reveal() };
    let mut store = MongoStore::connect(&location, RULES).await.expect("a usable store");
    store.set_clock(Timestamp(NOW));
    at_pace(store, |pace| Pace { beat: Duration::from_millis(50), ..pace })
}

async fn store() -> MongoStore {
    store_at(throwaway_mongodb::shared().await.expect("a MongoDB for tests")).await
}

/// Another daemon's store on the same records.
fn beside(store: &MongoStore) -> MongoStore {
    at_pace(MongoStore { lines: Arc::default(), ..store.clone() }, |pace| pace)
}

fn at_pace(store: MongoStore, change: impl FnOnce(Pace) -> Pace) -> MongoStore {
    MongoStore { feed: Arc::new(Feed::new(change(store.feed.pace))), ..store }
}

/// A daemon that follows the feed.
struct Listener {
    store: MongoStore,
    heard: mpsc::Receiver<FeedEvent>,
    draining: CancellationToken,
    feed: JoinHandle<()>,
}

impl Listener {
    /// Whether its feed is open.
    fn is_followed(&self) -> Option<()> {
        matches!(self.store.feed_state(), FeedState::Behind(_)).then_some(())
    }

    fn start(store: &MongoStore) -> Self {
        let store = beside(store);
        let (events, heard) = mpsc::channel(16);
        let draining = CancellationToken::new();
        let (fed, ended) = (store.clone(), draining.clone());
        let feed = tokio::spawn(async move { fed.feed(events, ended).await });
        Self { store, heard, draining, feed }
    }

    async fn next(&mut self) -> FeedEvent {
        timeout(PATIENCE, self.heard.recv()).await.expect("an event in time").expect("a feed")
    }

    /// The changes up to one of the key `last`, which is not among them.
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

    /// Waits until a change is told that was made after all that was told before. There may be gaps.
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
        timeout(PATIENCE, self.feed).await.expect("an end in time").expect("an end in peace");
    }
}

/// Two daemons on the records of `store`, whose feeds are open.
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
    timeout(PATIENCE, asking).await.expect("it did not happen in time")
}

fn marker() -> Key {
    key(&format!("marker/{}", LeaseId::random().reveal()))
}

async fn commit(store: &MongoStore, batch: Vec<(Key, Edit)>) -> Vec<Snapshot> {
    all_of(store.commit(Arc::new(batch), PATIENCE).await.map(|done| done.records))
}

async fn lease(store: &MongoStore, key: &Key) {
    commit(store, vec![(key.clone(), ask(asking(LeaseId::random())))]).await;
}

fn registered(store: &MongoStore) -> Collection<Document> {
    store.database.collection(&daemons::collection_name(store.collection.name()))
}

/// The daemons among what is registered.
fn signs() -> Document {
    doc! { "seen_at": { "$exists": true } }
}

/// One who waits, shared or alone.
fn waiting(id: LeaseId, mode: Mode) -> Acquisition {
    Acquisition { wait: true, mode, shared_limit: 2, ..asking(id) }
}

/// What happens to a key, how much later, and whether others should hear of it.
fn story() -> Vec<(&'static str, i64, Edit, bool)> {
    let [first, second, third, fourth, fifth] = [(); 5].map(|()| LeaseId::random());
    let exclusive = |id| ask(waiting(id, Mode::Exclusive));
    vec![
        ("comes and holds", 0, exclusive(first), true),
        ("touches", 1, Edit::default().touch(first), false),
        ("touches what is not held", 1, Edit::default().touch(second), false),
        ("nudges in vain", 1, Edit::default(), false),
        ("stands in line", 1, exclusive(second), true),
        ("asks again", 1, exclusive(second), true),
        ("refreshes a place", 1, Edit::default().refresh(second), false),
        ("touches while others wait", 1, Edit::default().touch(first), false),
        ("stands last", 1, exclusive(third), true),
        ("leaves the line", 1, Edit::default().cancel(third), true),
        ("releases to the next", 1, Edit::default().release(first), true),
        ("touches again", 1, Edit::default().touch(second), false),
        ("waits for the end of the lease", 1, exclusive(fourth), true),
        ("nudges when it is over", 2000, Edit::default(), true),
        ("waits too", 1, exclusive(fifth), true),
        ("touches what is lost, when the next lease is over", 2000, Edit::default().touch(second), true),
        ("touches, and all is quiet again", 1, Edit::default().touch(fifth), false),
        ("tries in vain", 1, ask(asking(LeaseId::random())), true),
        ("revokes what nobody has", 1, Edit::default().revoke(LeaseId::random()), true),
        ("releases", 1, Edit::default().release(fifth), true),
        ("nudges a free key", 1, Edit::default(), false),
    ]
}

/// Plays the story, and returns what should be told of it and what was.
async fn told(wrong: Option<Wrong>, together: bool) -> (Vec<(Key, Option<i64>)>, Vec<(Key, Option<i64>)>) {
    let sound = store().await;
    let (mut listener, _other) = two(&sound).await;
    let mut store = beside(&sound);
    store.wrong = wrong;
    let (job, bystander, id) = (key("job"), key("bystander"), LeaseId::random());
    let mut expected = Vec::new();
    if together {
        let ttl = asking(id).ttl;
        let seen = commit(&store, vec![(bystander.clone(), ask(Acquisition { ttl, ..asking(id) }))]).await;
        expected.push((bystander.clone(), Some(seen[0].record.rev)));
    }
    let mut now = NOW;
    for (_, later, edit, is_told) in story() {
        now += later;
        store.set_clock(Timestamp(now));
        let mut batch = vec![(job.clone(), edit)];
        if together {
            batch.push((bystander.clone(), Edit::default().touch(id)));
        }
        let after = commit(&store, batch).await;
        if is_told {
            expected.push((job.clone(), Some(after[0].record.rev)));
        }
    }
    let last = marker();
    lease(&sound, &last).await;
    (expected, listener.changes_until(&last).await)
}

#[rstest]
#[tokio::test]
async fn every_change_to_the_line_up_is_told_with_its_revision_and_touches_are_not(
    #[values(false, true)] together: bool,
) {
    let (expected, heard) = told(None, together).await;
    assert_eq!(heard, expected);
}

#[rstest]
#[tokio::test]
async fn a_wrong_epoch_is_noticed(
    #[values(Wrong::EpochKept, Wrong::EpochAlwaysRises)] wrong: Wrong,
    #[values(false, true)] together: bool,
) {
    let (expected, heard) = told(Some(wrong), together).await;
    assert_ne!(heard, expected);
}

#[tokio::test]
async fn a_key_that_is_forgotten_is_told_without_a_revision_and_what_is_no_key_is_not() {
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
async fn a_batch_that_creates_records_tells_each_once() {
    let store = store().await;
    let (mut listener, _other) = two(&store).await;
    let keys: Vec<Key> = (0..50).map(|number| key(&format!("key/{number:02}"))).collect();
    commit(&store, keys.iter().map(|key| (key.clone(), ask(asking(LeaseId::random())))).collect()).await;
    let last = marker();
    lease(&store, &last).await;
    let mut heard = listener.changes_until(&last).await;
    heard.sort();
    assert_eq!(heard, keys.into_iter().map(|key| (key, Some(1))).collect::<Vec<_>>());
}
