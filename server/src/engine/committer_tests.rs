//! The order in which operations are committed, and the effects of a batch that fails.

use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::time::timeout;

use super::backlog::UNANSWERED;
use super::gated::{GatedStore, PATIENCE, key, until};
use super::{Begin, Bounds, Call, CallError, Caller, Origin, Touched, WatchEvent};
use crate::lease::{Acquisition, Edit, Key, LeaseId, LeaseName, Mode, SETTLED_DEPARTURES};
use crate::store::{ListQuery, Outcome, StoreError};

/// Longer than any test takes.
const LONG: Duration = Duration::from_secs(3600);

fn ask(name: &str, id: LeaseId) -> Call {
    let acquisition =
        Acquisition { wait: false, mode: Mode::Shared, shared_limit: 9, ..Acquisition::waiting(id) };
    Call { key: key(name), acquisition, origin: Origin::Caller, wait: Duration::ZERO }
}

/// One caller touches the leases of `many`. When they are queued, another caller touches one lease
/// of `key`. Returns how many of the following batches went before the one with that touch.
async fn batches_before(
    store: &GatedStore,
    queued_operations: usize,
    many: Vec<LeaseName>,
    key: &Key,
) -> usize {
    let engine = store.engine(queued_operations);
    let closed = store.close().await;
    let greedy = engine.on_behalf_of(Caller::new());
    let count = many.len().min(queued_operations);
    let crowd = tokio::spawn(async move { greedy.touch_all(many.iter()).await });
    until(|| engine.committer.queued() == count && store.batches_of(key).0 == 1).await;
    let before = 1;
    let modest = engine.on_behalf_of(Caller::new());
    let touch = tokio::spawn({
        let key = key.clone();
        async move { modest.touch(LeaseName { key, id: LeaseId::random() }).await }
    });
    let has_come = || engine.committer.queued() > count || engine.committer.entering() > 1;
    until(has_come).await;
    drop(closed);
    touch.await.expect("no panic").expect("an answer");
    let (_, with_it) = store.batches_of(key);
    crowd.await.expect("no panic").expect("answers");
    with_it.into_iter().find(|number| *number >= before).expect("a batch with it") - before
}

fn random_leases(count: usize, name: impl Fn(usize) -> String) -> Vec<LeaseName> {
    (0..count).map(|number| LeaseName { key: key(&name(number)), id: LeaseId::random() }).collect()
}

#[tokio::test]
async fn a_lone_touch_is_in_the_next_batch_whatever_another_caller_has_queued() {
    let store = GatedStore::new().await;
    let many = random_leases(20_000, |number| format!("many/{number}"));
    assert_eq!(batches_before(&store, usize::MAX / 2, many, &key("lone")).await, 0);
}

#[tokio::test]
async fn a_lone_touch_waits_for_one_edit_of_its_key_at_most() {
    let store = GatedStore::new().await;
    let many = random_leases(20_000, |_| "crowded".to_owned());
    assert!(batches_before(&store, usize::MAX / 2, many, &key("crowded")).await <= 1);
    let batches = store.batches.lock().expect("batches");
    let largest = batches.iter().flatten().map(|(_, touched)| *touched).max();
    assert!(largest <= Some(2048), "{largest:?}");
}

#[tokio::test]
async fn a_lone_touch_is_let_in_first_when_there_is_room() {
    let store = GatedStore::new().await;
    let many = random_leases(20_000, |number| format!("many/{number}"));
    assert!(batches_before(&store, 5000, many, &key("lone")).await <= 1);
}

#[tokio::test]
async fn calls_that_stop_waiting_for_room_take_none() {
    let store = GatedStore::new().await;
    let engine = store.engine(10);
    let closed = store.close().await;
    let calls: Vec<_> = random_leases(50, |number| format!("{number}"))
        .into_iter()
        .map(|name| {
            let engine = engine.on_behalf_of(Caller::new());
            tokio::spawn(async move { engine.touch(name).await })
        })
        .collect();
    until(|| engine.committer.entering() == 40).await;
    calls.iter().skip(5).for_each(tokio::task::JoinHandle::abort);
    until(|| engine.committer.entering() == 0).await;
    drop(closed);
    engine.settle().await;
    assert_eq!(engine.committer.queued(), 0);
    let lone = engine.touch(LeaseName { key: key("lone"), id: LeaseId::random() }).await;
    assert_eq!(lone.expect("an answer"), Touched::Lost(None));
}

#[tokio::test]
async fn touches_that_wait_for_their_turn_longer_than_a_call_may_take_are_committed_once() {
    let store = GatedStore::new().await;
    let engine = store.engine_within(Bounds { call: Duration::from_secs(1), ..Bounds::default() });
    let closed = store.close().await;
    let many = random_leases(3000, |number| format!("many/{number}"));
    let last = many[2999].key.clone();
    let stream = engine.on_behalf_of(Caller::new());
    let touches = tokio::spawn(async move { stream.touch_all(many.iter()).await });
    until(|| engine.committer.queued() == 3000).await;
    // A call that came later is not answered in time.
    engine
        .touch(LeaseName { key: key("lone"), id: LeaseId::random() })
        .await
        .expect_err("the store is silent");
    drop(closed);
    assert_eq!(touches.await.expect("no panic").expect("answers").len(), 3000);
    let (_, with_it) = store.batches_of(&last);
    assert_eq!(with_it.len(), 1, "{with_it:?}");
}

#[tokio::test]
async fn most_pages_of_one_caller_are_read_after_the_page_of_another() {
    let store = GatedStore::new().await;
    let engine = store.engine(usize::MAX / 2);
    let closed = store.close().await;
    let list = |caller: &Caller, prefix: &str| {
        let engine = engine.on_behalf_of(caller.clone());
        let query = ListQuery { prefix: prefix.to_owned(), after: None, limit: 1, include_free: false };
        tokio::spawn(async move { engine.list(query).await })
    };
    let (greedy, modest) = (Caller::new(), Caller::new());
    let mut lists: Vec<_> = (0..250).map(|_| list(&greedy, "many")).collect();
    lists.push(list(&modest, "lone"));
    let position = || store.pages.lock().expect("pages").iter().position(|prefix| prefix == "lone");
    until(|| position().is_some()).await;
    assert!(position() <= Some(4), "{:?}", position());
    drop(closed);
    for list in lists {
        list.await.expect("no panic").expect("a page");
    }
    assert_eq!(store.pages.lock().expect("pages").len(), 251);
}

#[tokio::test]
async fn a_batch_that_panics_is_answered_as_unknown_and_the_next_ones_go_on() {
    let store = GatedStore::new().await;
    let engine = store.engine(usize::MAX / 2);
    let id = LeaseId::random();
    engine.acquire(ask("job", id)).await.expect("a grant");
    for _ in 0..3 {
        store.panics.store(true, Ordering::SeqCst);
        let failed = engine.touch(LeaseName { key: key("job"), id }).await.expect_err("a panic");
        let unknown =
            |error: &StoreError| matches!(error, StoreError::Unavailable { outcome: Outcome::Unknown, .. });
        assert!(matches!(&failed, CallError::Store(error) if unknown(error)), "{failed:?}");
    }
    assert!(matches!(engine.touch(LeaseName { key: key("job"), id }).await, Ok(Touched::Kept(_))));
    timeout(PATIENCE, engine.settle()).await.expect("no batch counts as in flight");
    assert_eq!(engine.committer.queued(), 0);
}

#[tokio::test]
async fn touches_do_not_wait_for_all_nudges() {
    let store = GatedStore::new().await;
    let engine = store.engine(usize::MAX / 2);
    let closed = store.close().await;
    engine.committer.submit_nudges(vec![key("first")]);
    until(|| store.batches_of(&key("first")).0 == 1).await;
    let crowd = random_leases(5000, |number| format!("many/{number}"));
    engine.committer.submit_nudges(crowd.into_iter().map(|name| name.key).collect());
    let leases = random_leases(100, |number| format!("lease/{number}"));
    let open = async {
        until(|| engine.committer.queued() == 100).await;
        drop(closed);
    };
    let (touched, ()) = tokio::join!(engine.touch_all(leases.iter()), open);
    touched.expect("answers");
    for LeaseName { key, .. } in &leases {
        assert_eq!(store.batches_of(key).1, [1], "in the next batch");
    }
}

#[tokio::test]
async fn the_leftover_ids_of_ended_calls_are_bounded() {
    let store = GatedStore::new().await;
    let engine = store.engine(usize::MAX / 2);
    let closed = store.close().await;
    let leave = |name: &str| {
        engine.committer.give_up_id(&engine.caller, key(name), LeaseId::random(), LONG);
    };
    for number in 0..UNANSWERED + 5000 {
        leave(&format!("{number}"));
    }
    assert_eq!(engine.committer.unanswered(), UNANSWERED);
    let batches = || store.batches.lock().expect("batches").len();
    store.fails.store(usize::MAX, Ordering::SeqCst);
    drop(closed);
    // Most of the commits have failed by then, and more calls end.
    until(|| batches() > UNANSWERED / 1000).await;
    for number in 0..5000 {
        leave(&format!("more/{number}"));
    }
    assert!(engine.committer.unanswered() <= UNANSWERED);
    until(|| batches() > 2 * UNANSWERED / 1000).await;
    assert!(engine.committer.unanswered() <= UNANSWERED);
    store.fails.store(0, Ordering::SeqCst);
    timeout(PATIENCE, engine.settle()).await.expect("all of them are committed");
    assert_eq!(engine.committer.unanswered(), 0);
    leave("later");
    assert_eq!(engine.committer.unanswered(), 1, "there is room again");
}

#[tokio::test]
async fn an_id_that_an_ended_call_leaves_behind_is_given_up_again_while_it_may_be_granted() {
    for (lasts, batches) in [(LONG, 3), (Duration::ZERO, 1)] {
        let store = GatedStore::new().await;
        let engine = store.engine(usize::MAX / 2);
        store.fails.store(2, Ordering::SeqCst);
        engine.committer.give_up_id(&engine.caller, key("job"), LeaseId::random(), lasts);
        timeout(PATIENCE, engine.settle()).await.expect("an end");
        assert_eq!(store.batches_of(&key("job")).0, batches, "{lasts:?}");
    }
}

#[tokio::test]
async fn a_drain_repeats_failed_commits_until_its_time_is_over() {
    let store = GatedStore::new().await;
    let engine = store.engine(usize::MAX / 2);
    store.fails.store(usize::MAX, Ordering::SeqCst);
    engine.committer.give_up_id(&engine.caller, key("job"), LeaseId::random(), LONG);
    let settled = tokio::spawn({
        let engine = engine.clone();
        async move { engine.settle().await }
    });
    until(|| store.batches_of(&key("job")).0 >= 2).await;
    assert!(!settled.is_finished(), "it is committed again");
    engine.give_up();
    timeout(PATIENCE, settled).await.expect("an end").expect("no panic");
    assert_eq!(engine.committer.unanswered(), 0);
}

#[tokio::test]
async fn a_damaged_record_affects_only_its_own_leases() {
    let store = GatedStore::new().await;
    let engine = store.engine(usize::MAX / 2);
    let leases = random_leases(5, |number| format!("{number}"));
    for lease in &leases {
        engine.acquire(ask(lease.key.as_str(), lease.id)).await.expect("a grant");
    }
    store.store.damage(&leases[2].key);

    let touched = engine.touch_all(leases.iter()).await.expect("answers");
    for (position, touched) in touched.into_iter().enumerate() {
        match touched {
            Touched::Unreadable => assert_eq!(position, 2),
            Touched::Kept(_) => assert_ne!(position, 2),
            Touched::Lost(reason) => panic!("{position}: {reason:?}"),
        }
    }
    let unreadable = |error: CallError| matches!(error, CallError::Store(StoreError::Unreadable { .. }));
    let damaged = || leases[2].key.clone();
    assert!(unreadable(engine.get(damaged()).await.expect_err("a record")));
    assert!(unreadable(engine.touch(leases[2].clone()).await.expect_err("a touch")));
    assert!(unreadable(engine.release(leases[2].clone()).await.expect_err("a release")));
    assert!(unreadable(engine.revoke(damaged(), None).await.expect_err("a revocation")));
    assert!(unreadable(engine.acquire(ask("2", LeaseId::random())).await.expect_err("an acquire")));

    let mut watch = engine.watch(String::new(), Begin::WithSnapshot).await.expect("a watch");
    let mut shown = Vec::new();
    while let WatchEvent::Snapshot(snapshot) = watch.next().await {
        shown.push(snapshot.record.key.clone());
    }
    assert_eq!(shown, ["0", "1", "3", "4"].map(key));
}

/// The record has no room for the id, and has room again after a minute.
#[tokio::test]
async fn an_id_that_an_ended_call_leaves_behind_is_given_up_again_if_the_record_had_no_room() {
    let store = GatedStore::new().await;
    let engine = store.engine(usize::MAX / 2);
    let released = (0..SETTLED_DEPARTURES).map(|_| LeaseId::random());
    store.apply(key("job"), released.fold(Edit::default(), Edit::release)).await;
    engine.committer.give_up_id(&engine.caller, key("job"), LeaseId::random(), LONG);
    until(|| store.batches_of(&key("job")).0 == 2).await;
    engine.give_up();
    timeout(PATIENCE, engine.settle()).await.expect("an end");
}
