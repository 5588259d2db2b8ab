//! Tests of the purge: it removes keys that have been free for long, and no others.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use rstest::rstest;

use super::backends::{Backend, TestStore, wait_for};
use super::reading::{NOW, all, all_of, ask, asking, commit, empty, free, key, list, names};
use crate::lease::{Acquisition, Edit, LeaseId, Rules, Timestamp, Ttl};
use crate::store::Store;

const FREE_FOR: Duration = Duration::from_secs(60);

/// The instant this long after [`NOW`].
fn later(seconds: i64) -> Timestamp {
    Timestamp(NOW.0 + seconds * 1000)
}

fn purge(store: &TestStore) -> u64 {
    wait_for(store.purge(FREE_FOR)).expect("a purge")
}

fn exists(store: &TestStore, name: &str) -> bool {
    !wait_for(store.read(vec![key(name)])).expect("a read").is_empty()
}

#[rstest]
fn a_key_is_purged_when_it_has_been_free_for_long_enough(
    #[values(Backend::Embedded, Backend::MongoDb)] backend: Backend,
) {
    let mut store = empty(backend);
    free(&store, "free", asking(LeaseId::random()));
    store.set_clock(later(60));
    assert_eq!(purge(&store), 0, "not before");
    store.set_clock(Timestamp(later(60).0 + 1));
    assert_eq!(purge(&store), 1);
    assert!(!exists(&store, "free"));
    assert_eq!(purge(&store), 0);
}

#[rstest]
fn a_key_that_is_held_or_blocked_is_not_purged(
    #[values(Backend::Embedded, Backend::MongoDb)] backend: Backend,
) {
    let mut store = empty(backend);
    let long = Ttl::new(Duration::from_secs(86_400)).expect("a day");
    commit(&store, vec![(key("held"), ask(Acquisition { ttl: long, ..asking(LeaseId::random()) }))]);
    let hold = Acquisition { min_hold: Duration::from_secs(86_400), ..asking(LeaseId::random()) };
    free(&store, "blocked", hold);
    store.set_clock(later(3600));
    assert_eq!(purge(&store), 0);
    for name in ["held", "blocked"] {
        assert!(exists(&store, name), "{name}");
    }
}

/// The TTL is 1 s and the grace 100 ms. The lease can be taken over after both, and the key counts
/// as free from then on.
fn purge_a_lapsed_lease(mut store: TestStore) {
    store.set_clock(NOW);
    commit(&store, vec![(key("lapsed"), ask(asking(LeaseId::random())))]);
    store.set_clock(Timestamp(later(61).0 + 100));
    assert_eq!(purge(&store), 0, "not before");
    store.set_clock(Timestamp(later(61).0 + 101));
    assert_eq!(purge(&store), 1);
    assert!(!exists(&store, "lapsed"));
}

#[rstest]
fn a_lapsed_lease_is_purged_after_its_grace(#[values(Backend::Embedded, Backend::MongoDb)] backend: Backend) {
    purge_a_lapsed_lease(empty(backend));
}

#[rstest]
fn a_purge_that_ignores_the_grace_is_caught(#[values(Backend::Embedded, Backend::MongoDb)] backend: Backend) {
    let store = backend.store(Rules { grace: Duration::ZERO, waiter_ttl: Duration::from_secs(15) });
    let test = || purge_a_lapsed_lease(store);
    assert!(catch_unwind(AssertUnwindSafe(test)).is_err());
}

#[rstest]
fn a_lapsed_waiter_is_purged_with_its_key(#[values(Backend::Embedded, Backend::MongoDb)] backend: Backend) {
    let mut store = empty(backend);
    free(&store, "job", Acquisition { min_hold: Duration::from_secs(1), ..asking(LeaseId::random()) });
    commit(&store, vec![(key("job"), ask(Acquisition { wait: true, ..asking(LeaseId::random()) }))]);
    store.set_clock(later(15 + 60));
    assert_eq!(purge(&store), 0, "not before");
    store.set_clock(Timestamp(later(15 + 60).0 + 1));
    assert_eq!(purge(&store), 1);
    assert!(!exists(&store, "job"));
}

#[rstest]
fn a_purged_key_is_in_no_listing(#[values(Backend::Embedded, Backend::MongoDb)] backend: Backend) {
    let mut store = empty(backend);
    commit(&store, vec![(key("lapsed"), ask(asking(LeaseId::random())))]);
    store.set_clock(later(3600));
    assert_eq!(names(&list(&store, all())), ["lapsed"]);
    assert_eq!(purge(&store), 1);
    assert!(names(&list(&store, all())).is_empty());
    commit(&store, vec![(key("lapsed"), ask(asking(LeaseId::random())))]);
    assert_eq!(names(&list(&store, all())), ["lapsed"]);
}

#[rstest]
fn a_key_whose_token_is_ahead_of_the_clock_is_not_purged_before_the_clock_reaches_it(
    #[values(Backend::Embedded, Backend::MongoDb)] backend: Backend,
) {
    let mut store = empty(backend);
    free(&store, "job", asking(LeaseId::random()));
    // The clock is set back by ten minutes. The next token is still higher than the latest one.
    store.set_clock(later(-600));
    free(&store, "job", asking(LeaseId::random()));
    store.set_clock(later(-600 + 61));
    assert_eq!(purge(&store), 0, "a new record would be granted the same token again");
    store.set_clock(later(62));
    assert_eq!(purge(&store), 1);
    let granted = commit(&store, vec![(key("job"), ask(asking(LeaseId::random())))]);
    assert!(granted[0].record.token.0 > NOW.0 + 1, "tokens rise across the purge");
}

#[rstest]
fn thousands_of_keys_are_purged_and_those_between_them_stay(
    #[values(Backend::Embedded, Backend::MongoDb)] backend: Backend,
) {
    let mut store = empty(backend);
    let ids: Vec<LeaseId> = (0..2500).map(|_| LeaseId::random()).collect();
    let name = |number: usize| key(&format!("{number:04}"));
    let each = |edit: &dyn Fn(LeaseId) -> Edit| {
        ids.iter().enumerate().map(|(number, id)| (name(number), edit(*id))).collect::<Vec<_>>()
    };
    let long = Ttl::new(Duration::from_secs(3600)).expect("an hour");
    commit(&store, each(&|id| ask(Acquisition { ttl: long, ..asking(id) })));
    let release = each(&|id| Edit::default().release(id));
    commit(
        &store,
        release.into_iter().enumerate().filter(|(number, _)| number % 5 != 0).map(|it| it.1).collect(),
    );
    store.set_clock(later(61));
    assert_eq!(purge(&store), 2000);
    let left = all_of(wait_for(store.read((0..2500).map(name).collect())));
    assert_eq!(left.len(), 500);
    assert!(left.iter().all(|snapshot| !snapshot.record.holders.is_empty()));
}
