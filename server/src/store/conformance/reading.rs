//! Tests of commits of many keys, reads and listings. Other tests use the helpers of this file.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use rstest::rstest;

use super::backends::{Backend, TestStore, wait_for};
use crate::lease::{Acquisition, Edit, Key, LeaseId, Rules, Snapshot, State, Timestamp};
use crate::store::retrying::repeat;
use crate::store::{ForKey, ListQuery, Page, Store, StoreError};

const RULES: Rules = Rules { grace: Duration::from_millis(100), waiter_ttl: Duration::from_secs(15) };
pub(super) const NOW: Timestamp = Timestamp(1_700_000_000_000);
const PATIENCE: Duration = Duration::from_secs(30);

pub(in crate::store) fn key(name: &str) -> Key {
    Key::try_from(name).expect("a key")
}

pub(in crate::store) fn asking(id: LeaseId) -> Acquisition {
    Acquisition { owner: "me".to_owned(), wait: false, ..Acquisition::waiting(id) }
}

pub(in crate::store) fn ask(acquisition: Acquisition) -> Edit {
    Edit::default().enqueue(Arc::new(acquisition))
}

/// An empty store at [`NOW`].
pub(super) fn empty(backend: Backend) -> TestStore {
    let mut store = backend.store(RULES);
    store.set_clock(NOW);
    store
}

pub(super) fn commit(store: &TestStore, batch: Vec<(Key, Edit)>) -> Vec<Snapshot> {
    wait_for(commit_batch(store, batch))
}

/// Commits a batch in which no key fails. Repeats it as the daemon does.
pub(in crate::store) async fn commit_batch(store: &impl Store, batch: Vec<(Key, Edit)>) -> Vec<Snapshot> {
    all_of(try_commit(store, batch).await)
}

/// Commits a batch. Repeats it as the daemon does.
pub(super) async fn try_commit(
    store: &impl Store,
    batch: Vec<(Key, Edit)>,
) -> Result<Vec<ForKey>, StoreError> {
    let attempt = |batch, time| store.commit(batch, time);
    Ok(repeat(Arc::new(batch), PATIENCE, &Counter::default(), attempt).await?.records)
}

/// Returns the records of an answer in which no key failed.
pub(in crate::store) fn all_of(answer: Result<Vec<ForKey>, StoreError>) -> Vec<Snapshot> {
    answer.and_then(|answers| answers.into_iter().collect()).expect("an answer for every key")
}

/// Creates a store in which keys of these names are held.
fn holding(backend: Backend, names: &[&str]) -> TestStore {
    let store = empty(backend);
    commit(&store, names.iter().map(|name| (key(name), ask(asking(LeaseId::random())))).collect());
    store
}

/// Acquires and releases a key.
pub(super) fn free(store: &TestStore, name: &str, acquisition: Acquisition) {
    let id = acquisition.id;
    commit(store, vec![(key(name), ask(acquisition))]);
    commit(store, vec![(key(name), Edit::default().release(id))]);
}

pub(super) fn all() -> ListQuery {
    ListQuery { prefix: String::new(), after: None, limit: 100, include_free: false }
}

pub(super) fn list(store: &TestStore, query: ListQuery) -> Page {
    wait_for(store.list(query)).expect("a listing")
}

pub(super) fn names(page: &Page) -> Vec<&str> {
    page.snapshots.iter().map(|snapshot| snapshot.record.key.as_str()).collect()
}

#[rstest]
fn a_batch_is_answered_in_its_order_at_one_instant(
    #[values(Backend::Embedded, Backend::MongoDb)] backend: Backend,
) {
    let store = empty(backend);
    // Not in the order of the keys.
    let names: Vec<String> = (0..1000).map(|number| format!("{}", (number * 7919) % 1000)).collect();
    let batch = || names.iter().map(|name| (key(name), ask(asking(LeaseId::random())))).collect();
    let granted = commit(&store, batch());
    for (name, snapshot) in names.iter().zip(&granted) {
        assert_eq!((snapshot.record.key.as_str(), snapshot.now), (name.as_str(), NOW));
        assert_eq!(snapshot.state(), State::Held);
    }
    let refused = commit(&store, batch());
    assert!(refused.iter().zip(&granted).all(|(second, first)| second.record.token == first.record.token));
}

#[rstest]
fn an_acquire_or_a_release_makes_a_record_and_a_touch_or_a_nudge_makes_none(
    #[values(Backend::Embedded, Backend::MongoDb)] backend: Backend,
    #[values(false, true)] batched: bool,
) {
    let store = empty(backend);
    let stranger = LeaseId::random();
    let edits = [
        ("nudge", Edit::default()),
        ("arrival", ask(asking(LeaseId::random()))),
        ("touch", Edit::default().touch(stranger)),
        ("release", Edit::default().release(stranger)),
        ("cancel", Edit::default().cancel(stranger).refresh(stranger).revoke(stranger)),
    ];
    let batch: Vec<_> = edits.into_iter().map(|(name, edit)| (key(name), edit)).collect();
    let keys = batch.iter().map(|(key, _)| key.clone()).collect();
    let answers = if batched {
        commit(&store, batch)
    } else {
        batch.into_iter().flat_map(|one| commit(&store, vec![one])).collect()
    };
    let states = answers.iter().map(Snapshot::state).collect::<Vec<_>>();
    assert_eq!(states, [State::Free, State::Held, State::Free, State::Free, State::Free]);
    let mut made: Vec<Key> =
        all_of(wait_for(store.read(keys))).into_iter().map(|one| one.record.key).collect();
    made.sort();
    assert_eq!(made, [key("arrival"), key("release")]);
    let listed = list(&store, ListQuery { include_free: true, ..all() });
    assert_eq!(names(&listed), ["arrival"], "a key that was never granted is not shown");
}

#[rstest]
fn a_read_returns_the_records_that_exist(#[values(Backend::Embedded, Backend::MongoDb)] backend: Backend) {
    let store = holding(backend, &["a", "b"]);
    let mut found = all_of(wait_for(store.read(vec![key("b"), key("none"), key("a")])));
    found.sort_by(|one, other| one.record.key.cmp(&other.record.key));
    assert_eq!(found.iter().map(|one| one.record.key.as_str()).collect::<Vec<_>>(), ["a", "b"]);
    assert!(found.iter().all(|one| one.now == NOW && one.record.holders.len() == 1));
    assert!(wait_for(store.read(Vec::new())).expect("a read").is_empty());
    wait_for(store.check()).expect("a store that answers");
}

#[rstest]
fn a_listing_is_sorted_by_the_bytes_of_the_keys(
    #[values(Backend::Embedded, Backend::MongoDb)] backend: Backend,
) {
    let names_in_order =
        ["A", "a", "a b", "a/1", "a/10", "a/2", "b", "z", "é", "\u{d7ff}", "\u{e000}", "鍵", "🔑"];
    let mut sorted = names_in_order.to_vec();
    sorted.sort_unstable();
    let store = holding(backend, &names_in_order);
    assert_eq!(names(&list(&store, all())), sorted);
}

#[rstest]
fn a_prefix_matches_the_beginning_of_a_key_and_is_no_pattern(
    #[values(Backend::Embedded, Backend::MongoDb)] backend: Backend,
) {
    let store = holding(backend, &["a", "a/", "a/1", "a/é", "a/\u{10ffff}", "a0", "b", "%", "a.*", "$a"]);
    for (prefix, expected) in [
        ("a/", &["a/", "a/1", "a/é", "a/\u{10ffff}"][..]),
        ("a/\u{10ffff}", &["a/\u{10ffff}"]),
        ("a.*", &["a.*"]),
        ("$a", &["$a"]),
        ("%", &["%"]),
        ("c", &[]),
    ] {
        assert_eq!(names(&list(&store, ListQuery { prefix: prefix.to_owned(), ..all() })), expected);
    }
}

#[rstest]
fn pages_follow_each_other_without_gap_or_overlap(
    #[values(Backend::Embedded, Backend::MongoDb)] backend: Backend,
) {
    let expected: Vec<String> = (0..25).map(|number| format!("k/{number:02}")).collect();
    let store = holding(backend, &expected.iter().map(String::as_str).chain(["j", "l"]).collect::<Vec<_>>());
    for limit in [1, 7, 25, 26] {
        let mut seen = Vec::new();
        let mut query = ListQuery { prefix: "k/".to_owned(), limit, ..all() };
        loop {
            let page = list(&store, query.clone());
            assert!(page.snapshots.len() <= limit);
            seen.extend(names(&page).into_iter().map(ToOwned::to_owned));
            if !page.more {
                break;
            }
            query.after = page.snapshots.last().map(|snapshot| snapshot.record.key.clone());
        }
        assert_eq!(seen, expected, "{limit} a page");
    }
}

#[rstest]
fn a_page_ends_early_when_its_records_are_large(
    #[values(Backend::Embedded, Backend::MongoDb)] backend: Backend,
) {
    let store = empty(backend);
    let metadata = BTreeMap::from([("x".to_owned(), "y".repeat(4000))]);
    for round in 0..3 {
        let bulky = || Acquisition { metadata: metadata.clone(), ..asking(LeaseId::random()) };
        commit(&store, (0..500).map(|number| (key(&format!("{round}/{number:03}")), ask(bulky()))).collect());
    }
    let page = list(&store, ListQuery { limit: 1500, ..all() });
    assert!(page.more && (900..1200).contains(&page.snapshots.len()), "{}", page.snapshots.len());
    let after = page.snapshots.last().map(|snapshot| snapshot.record.key.clone());
    let rest = list(&store, ListQuery { limit: 1500, after, ..all() });
    assert!(!rest.more);
    assert_eq!(page.snapshots.len() + rest.snapshots.len(), 1500);
}

#[rstest]
fn free_keys_are_listed_on_demand_and_blocked_ones_always(
    #[values(Backend::Embedded, Backend::MongoDb)] backend: Backend,
) {
    let mut store = holding(backend, &["held"]);
    free(&store, "free", asking(LeaseId::random()));
    let blocked = Acquisition { min_hold: Duration::from_secs(5), ..asking(LeaseId::random()) };
    free(&store, "blocked", blocked);
    assert_eq!(names(&list(&store, all())), ["blocked", "held"]);
    assert_eq!(names(&list(&store, ListQuery { include_free: true, ..all() })), ["blocked", "free", "held"]);
    store.set_clock(Timestamp(NOW.0 + 5000));
    let page = list(&store, all());
    assert_eq!(names(&page), ["held"], "the block is over");
    assert_eq!(page.snapshots[0].state(), State::Lapsed, "and a lapsed lease is not free");
}
