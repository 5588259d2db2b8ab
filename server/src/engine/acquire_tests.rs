//! Acquires that are refused, that end without an answer, or whose id another call uses.

use std::sync::atomic::Ordering;
use std::time::Duration;

use rstest::rstest;
use tokio::sync::OwnedSemaphorePermit;
use tokio::task::{JoinHandle, yield_now};
use tokio::time::timeout;

use super::gated::{GatedStore, PATIENCE, key, until};
use super::{Acquired, Call, CallError, Caller, Lessor, Origin};
use crate::lease::{Acquisition, Edit, LeaseId, LeaseName, Mode, SETTLED_DEPARTURES, State, Ttl};
use crate::store::Store;

fn ask(id: LeaseId, origin: Origin, wait: Duration) -> Call {
    // No lease may run out during a test, however slow the machine is.
    let ttl = Ttl::new(Duration::from_secs(3600)).expect("an hour");
    let acquisition = Acquisition { ttl, wait: !wait.is_zero(), ..Acquisition::waiting(id) };
    Call { key: key("job"), acquisition, origin, wait }
}

async fn state(engine: &Lessor<GatedStore>) -> State {
    engine.get(key("job")).await.expect("an answer").expect("a record").state()
}

/// The acquire is sent twice, because the first attempt is delayed, and it is refused. The key is
/// free when the first attempt is applied at last.
#[rstest]
#[tokio::test]
async fn a_late_attempt_does_not_undo_a_refusal(
    #[values(Origin::Daemon, Origin::Caller)] origin: Origin,
    #[values(Duration::ZERO, Duration::from_millis(50))] wait: Duration,
) {
    let store = GatedStore::new().await;
    let engine = store.engine(usize::MAX / 2);
    let holder = LeaseId::random();
    engine.acquire(ask(holder, Origin::Caller, Duration::ZERO)).await.expect("a grant");
    store.delays.store(true, Ordering::SeqCst);
    let refused = engine.acquire(ask(LeaseId::random(), origin, wait)).await;
    assert!(matches!(refused, Ok(Acquired::Held(_))), "{refused:?}");
    engine.release(LeaseName { key: key("job"), id: holder }).await.expect("an answer");
    engine.settle().await;

    store.deliver_delayed().await;
    assert_eq!(state(&engine).await, State::Free, "no caller knows of a lease");
}

/// The store grants a lease whose caller has gone, and fails for a while when the lease is
/// released.
#[tokio::test]
async fn a_lease_whose_caller_has_gone_is_released_after_an_outage() {
    let store = GatedStore::new().await;
    let engine = store.engine(usize::MAX / 2);
    let closed = store.close().await;
    let call = tokio::spawn({
        let engine = engine.clone();
        async move { engine.acquire(ask(LeaseId::random(), Origin::Daemon, Duration::ZERO)).await }
    });
    until(|| store.batches_of(&key("job")).0 == 1).await;
    store.fails.store(2, Ordering::SeqCst);
    call.abort();
    until(|| engine.committer.unanswered() == 1).await;
    drop(closed);
    timeout(PATIENCE, engine.settle()).await.expect("an end of the outage");
    assert_eq!(
        store.batches_of(&key("job")).0,
        4,
        "the first one grants the lease, and the last one releases it"
    );
    assert_eq!(state(&engine).await, State::Free, "no caller knows of a lease");
}

/// Begins an acquire of a held key with this id. The store has to repeat its commit, which is under
/// way until the returned permit is dropped.
async fn repeated_acquire(
    store: &GatedStore,
    id: LeaseId,
    origin: Origin,
) -> (Lessor<GatedStore>, LeaseId, JoinHandle<Result<Acquired, CallError>>, OwnedSemaphorePermit) {
    let (engine, holder) = (store.engine(usize::MAX / 2), LeaseId::random());
    engine.acquire(ask(holder, Origin::Caller, Duration::ZERO)).await.expect("a grant");
    let closed = store.close().await;
    store.delays.store(true, Ordering::SeqCst);
    let call = tokio::spawn({
        let engine = engine.clone();
        async move { engine.acquire(ask(id, origin, Duration::ZERO)).await }
    });
    until(|| store.batches_of(&key("job")).0 == 2).await;
    (engine, holder, call, closed)
}

/// The commit that would make the refusal final fails, so the call has no answer. The caller asks
/// again, and must not lose its lease because of the first call.
#[tokio::test]
async fn a_caller_that_asks_again_after_no_answer_keeps_its_lease() {
    let (store, id) = (GatedStore::new().await, LeaseId::random());
    let (engine, holder, call, closed) = repeated_acquire(&store, id, Origin::Caller).await;
    store.fails.store(1, Ordering::SeqCst);
    drop(closed);
    let answer = call.await.expect("no panic");
    assert!(matches!(answer, Err(CallError::Store(_))), "{answer:?}");
    engine.settle().await;
    assert_eq!(store.batches_of(&key("job")).0, 3, "nothing more is committed");

    engine.release(LeaseName { key: key("job"), id: holder }).await.expect("an answer");
    let granted = engine.acquire(ask(id, Origin::Caller, Duration::ZERO)).await;
    assert!(matches!(granted, Ok(Acquired::Granted(_))), "{granted:?}");
    store.deliver_delayed().await;
    let record = engine.get(key("job")).await.expect("an answer").expect("a record").record;
    assert_eq!(record.holders.iter().map(|holder| holder.id).collect::<Vec<_>>(), [id]);
}

/// The error asks the caller to repeat its call, so it may be waiting at another daemon by now.
#[tokio::test]
async fn a_waiting_call_that_fails_leaves_its_entry_in_the_record() {
    let (store, id) = (GatedStore::new().await, LeaseId::random());
    let engine = store.engine(usize::MAX / 2);
    engine.acquire(ask(LeaseId::random(), Origin::Caller, Duration::ZERO)).await.expect("a grant");
    store.fails.store(1, Ordering::SeqCst);
    let answer = engine.acquire(ask(id, Origin::Caller, PATIENCE)).await;
    assert!(matches!(answer, Err(CallError::Store(_))), "{answer:?}");
    engine.settle().await;
    assert_eq!(store.batches_of(&key("job")).0, 2, "nothing more is committed");
}

/// Only the daemon can release the id, because no caller knows it.
#[tokio::test]
async fn an_id_that_the_daemon_picked_is_given_up_when_its_refusal_cannot_be_made_final() {
    let store = GatedStore::new().await;
    let (engine, holder, call, closed) = repeated_acquire(&store, LeaseId::random(), Origin::Daemon).await;
    store.fails.store(2, Ordering::SeqCst);
    drop(closed);
    let answer = call.await.expect("no panic");
    assert!(matches!(answer, Err(CallError::Store(_))), "{answer:?}");
    timeout(PATIENCE, engine.settle()).await.expect("an end");
    engine.release(LeaseName { key: key("job"), id: holder }).await.expect("an answer");
    store.deliver_delayed().await;
    assert_eq!(state(&engine).await, State::Free);
}

/// The first attempt takes effect after the second one was refused, and before the call is
/// answered.
#[tokio::test]
async fn a_call_whose_first_attempt_is_granted_late_is_answered_with_the_grant() {
    let (store, id) = (GatedStore::new().await, LeaseId::random());
    let (engine, holder, call, closed) = repeated_acquire(&store, id, Origin::Caller).await;
    // Lets one batch through: the gate lets batches through in the order in which they came.
    drop(closed);
    let closed = store.close().await;
    store.apply(key("job"), Edit::default().release(holder)).await;
    store.deliver_delayed().await;
    drop(closed);
    let answer = call.await.expect("no panic");
    assert!(matches!(&answer, Ok(Acquired::Granted(grant)) if grant.id == id && grant.waited), "{answer:?}");
    engine.settle().await;
    let record = engine.get(key("job")).await.expect("an answer").expect("a record").record;
    assert!(record.holders[0].repeated, "the record must remember the end of the lease");
}

/// The caller repeats a call that it made at another daemon, whose command is late.
#[tokio::test]
async fn a_refusal_of_a_repeated_call_is_not_undone_later() {
    let (store, id) = (GatedStore::new().await, LeaseId::random());
    let (engine, holder) = (store.engine(usize::MAX / 2), LeaseId::random());
    engine.acquire(ask(holder, Origin::Caller, Duration::ZERO)).await.expect("a grant");
    let first = ask(id, Origin::Caller, Duration::ZERO);
    let acquisition = Acquisition { repeated: true, ..first.acquisition.clone() };
    let refused = engine.acquire(Call { acquisition, ..first.clone() }).await;
    assert!(matches!(refused, Ok(Acquired::Held(_))), "{refused:?}");
    engine.release(LeaseName { key: key("job"), id: holder }).await.expect("an answer");

    store.apply(key("job"), Edit::default().enqueue(first.acquisition.into())).await;
    assert_eq!(state(&engine).await, State::Free, "no caller knows of a lease");
}

#[tokio::test]
async fn a_call_is_not_refused_when_its_refusal_cannot_be_made_final() {
    let (store, id) = (GatedStore::new().await, LeaseId::random());
    let (_engine, _, call, closed) = repeated_acquire(&store, id, Origin::Caller).await;
    let released = (0..SETTLED_DEPARTURES).map(|_| LeaseId::random());
    store.apply(key("job"), released.fold(Edit::default(), Edit::release)).await;
    drop(closed);
    let answer = call.await.expect("no panic");
    assert!(matches!(answer, Err(CallError::Store(_))), "{answer:?}");
}

/// Most refused calls were sent once, and must not cost a second commit. The granted one was
/// repeated.
#[tokio::test]
async fn a_refusal_of_a_call_that_was_sent_once_costs_no_second_commit() {
    let store = GatedStore::new().await;
    let engine = store.engine(usize::MAX / 2);
    store.delays.store(true, Ordering::SeqCst);
    engine.acquire(ask(LeaseId::random(), Origin::Caller, Duration::ZERO)).await.expect("a grant");
    let refused = engine.acquire(ask(LeaseId::random(), Origin::Daemon, Duration::ZERO)).await;
    assert!(matches!(refused, Ok(Acquired::Held(_))), "{refused:?}");
    engine.settle().await;
    assert_eq!(store.batches_of(&key("job")).0, 2);
}

/// A connection with many calls breaks, and one of the calls is repeated on another connection. The
/// operations that end the first calls have not been committed by then.
#[tokio::test]
async fn a_call_that_has_ended_does_not_remove_the_entry_of_the_call_that_repeats_it() {
    let store = GatedStore::new().await;
    let engine = store.engine(usize::MAX / 2);
    engine.acquire(ask(LeaseId::random(), Origin::Caller, Duration::ZERO)).await.expect("a grant");
    let wait = |caller: &Lessor<GatedStore>, id| {
        let engine = caller.clone();
        tokio::spawn(async move { engine.acquire(ask(id, Origin::Caller, PATIENCE)).await })
    };
    let waiters = async || {
        let snapshot = engine.get(key("job")).await.expect("an answer").expect("a record");
        snapshot.record.waiters.iter().map(|waiter| waiter.acquisition.id).collect::<Vec<_>>()
    };
    let ids: Vec<LeaseId> = (0..10).map(|_| LeaseId::random()).collect();
    let broken = engine.on_behalf_of(Caller::new());
    let calls: Vec<_> = ids.iter().map(|id| wait(&broken, *id)).collect();
    let all_wait = async {
        while waiters().await.len() < 10 {
            yield_now().await;
        }
    };
    timeout(PATIENCE, all_wait).await.expect("all of them wait");
    let closed = store.close().await;
    // With a commit under way, the operations that follow are queued.
    let before = store.batches_of(&key("job")).0;
    let touch = tokio::spawn({
        let engine = engine.clone();
        async move { engine.touch(LeaseName { key: key("job"), id: LeaseId::random() }).await }
    });
    until(|| store.batches_of(&key("job")).0 > before).await;
    calls.iter().for_each(JoinHandle::abort);
    until(|| engine.committer.unanswered() == 10).await;
    let repeats = wait(&engine.on_behalf_of(Caller::new()), ids[9]);
    until(|| engine.committer.queued() == 2).await;
    drop(closed);
    touch.await.expect("no panic").expect("an answer");
    engine.settle().await;
    assert_eq!(waiters().await, [ids[9]], "only the repeated call still waits");
    repeats.abort();
}

#[tokio::test]
async fn a_call_whose_id_is_granted_with_another_mode_is_not_answered_with_the_grant() {
    let store = GatedStore::new().await;
    let engine = store.engine(usize::MAX / 2);
    let [holder, id] = [(); 2].map(|()| LeaseId::random());
    engine.acquire(ask(holder, Origin::Caller, Duration::ZERO)).await.expect("a grant");
    let wait = |mode| {
        let mut call = ask(id, Origin::Caller, PATIENCE);
        call.acquisition.mode = mode;
        let engine = engine.clone();
        tokio::spawn(async move { engine.acquire(call).await })
    };
    let exclusive = wait(Mode::Exclusive);
    until(|| store.batches_of(&key("job")).0 == 2).await;
    engine.settle().await;
    // As when the waiter's entry lapses, or is cancelled by another daemon at which the call was
    // made earlier.
    let gone = vec![(key("job"), Edit::default().cancel(id))];
    store.commit(gone.into(), PATIENCE).await.expect("a commit");
    let shared = wait(Mode::Shared);
    until(|| store.batches_of(&key("job")).0 == 4).await;
    engine.settle().await;

    engine.release(LeaseName { key: key("job"), id: holder }).await.expect("an answer");
    let answer = |call: JoinHandle<Result<Acquired, CallError>>| async {
        timeout(PATIENCE, call).await.expect("an answer in time").expect("no panic").expect("an answer")
    };
    let shared = answer(shared).await;
    assert!(matches!(&shared, Acquired::Granted(grant) if grant.mode == Mode::Shared), "{shared:?}");
    assert_eq!(answer(exclusive).await, Acquired::IdReused);
}
