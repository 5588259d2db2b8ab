//! What becomes of an acquire that was refused, or whose id another call uses.

use std::sync::atomic::Ordering;
use std::time::Duration;

use rstest::rstest;
use tokio::sync::OwnedSemaphorePermit;
use tokio::task::{JoinHandle, yield_now};
use tokio::time::timeout;

use super::gated::{Gated, PATIENCE, key, until};
use super::{Acquired, Call, CallError, Caller, Lessor, Origin};
use crate::lease::{Acquisition, Edit, LeaseId, Mode, SETTLED_DEPARTURES, State, Ttl};
use crate::store::Store;

fn ask(id: LeaseId, origin: Origin, wait: Duration) -> Call {
    // However slow the machine is, no lease runs out meanwhile.
    let ttl = Ttl::new(Duration::from_secs(3600)).expect("an hour");
    let acquisition = Acquisition { ttl, wait: !wait.is_zero(), ..Acquisition::waiting(id) };
    Call { key: key("job"), acquisition, origin, wait }
}

async fn state(engine: &Lessor<Gated>) -> State {
    engine.get(key("job")).await.expect("an answer").expect("a record").state()
}

/// An acquire that is sent twice, since the first attempt stalls, and refused. When the first attempt is applied at last,
/// the key is free.
#[rstest]
#[tokio::test]
async fn a_refusal_stays_one_when_an_attempt_comes_late(
    #[values(Origin::Daemon, Origin::Caller)] origin: Origin,
    #[values(Duration::ZERO, Duration::from_millis(50))] wait: Duration,
) {
    let store = Gated::new().await;
    let engine = store.engine(usize::MAX / 2);
    let holder = LeaseId::random();
    engine.acquire(ask(holder, Origin::Caller, Duration::ZERO)).await.expect("a grant");
    store.stalls.store(true, Ordering::SeqCst);
    let refused = engine.acquire(ask(LeaseId::random(), origin, wait)).await;
    assert!(matches!(refused, Ok(Acquired::Held(_))), "{refused:?}");
    engine.release(key("job"), holder, false).await.expect("an answer");
    engine.settle().await;

    store.deliver_stalled().await;
    assert_eq!(state(&engine).await, State::Free, "nobody knows of the lease");
}

/// The store grants a lease whose caller is gone, and is away for a while when it is to take the lease back.
#[tokio::test]
async fn a_lease_that_nobody_was_told_of_is_given_back_after_an_outage() {
    let store = Gated::new().await;
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
    assert_eq!(store.batches_of(&key("job")).0, 4, "one grants it, and the last one takes it back");
    assert_eq!(state(&engine).await, State::Free, "nobody knows of the lease");
}

/// A key that is held, and an acquire with this id under way that the store has to repeat. Until the gate opens, its commit is
/// under way.
async fn repeated(
    store: &Gated,
    id: LeaseId,
    origin: Origin,
) -> (Lessor<Gated>, LeaseId, JoinHandle<Result<Acquired, CallError>>, OwnedSemaphorePermit) {
    let (engine, holder) = (store.engine(usize::MAX / 2), LeaseId::random());
    engine.acquire(ask(holder, Origin::Caller, Duration::ZERO)).await.expect("a grant");
    let closed = store.close().await;
    store.stalls.store(true, Ordering::SeqCst);
    let call = tokio::spawn({
        let engine = engine.clone();
        async move { engine.acquire(ask(id, origin, Duration::ZERO)).await }
    });
    until(|| store.batches_of(&key("job")).0 == 2).await;
    (engine, holder, call, closed)
}

/// What would make the refusal final fails, so nobody knows whether it is one. The caller asks again, and must not lose its
/// lease to what was left of the first call.
#[tokio::test]
async fn a_caller_that_asks_again_after_no_answer_keeps_its_lease() {
    let (store, id) = (Gated::new().await, LeaseId::random());
    let (engine, holder, call, closed) = repeated(&store, id, Origin::Caller).await;
    store.fails.store(1, Ordering::SeqCst);
    drop(closed);
    let answer = call.await.expect("no panic");
    assert!(matches!(answer, Err(CallError::Store(_))), "{answer:?}");
    engine.settle().await;
    assert_eq!(store.batches_of(&key("job")).0, 3, "nothing more is committed");

    engine.release(key("job"), holder, false).await.expect("an answer");
    let granted = engine.acquire(ask(id, Origin::Caller, Duration::ZERO)).await;
    assert!(matches!(granted, Ok(Acquired::Granted(_))), "{granted:?}");
    store.deliver_stalled().await;
    let record = engine.get(key("job")).await.expect("an answer").expect("a record").record;
    assert_eq!(record.holders.iter().map(|holder| holder.id).collect::<Vec<_>>(), [id]);
}

/// It was told to repeat its call, and may stand in line at another daemon by now.
#[tokio::test]
async fn a_waiting_call_that_is_told_of_a_failure_of_the_store_leaves_its_place() {
    let (store, id) = (Gated::new().await, LeaseId::random());
    let engine = store.engine(usize::MAX / 2);
    engine.acquire(ask(LeaseId::random(), Origin::Caller, Duration::ZERO)).await.expect("a grant");
    store.fails.store(1, Ordering::SeqCst);
    let answer = engine.acquire(ask(id, Origin::Caller, PATIENCE)).await;
    assert!(matches!(answer, Err(CallError::Store(_))), "{answer:?}");
    engine.settle().await;
    assert_eq!(store.batches_of(&key("job")).0, 2, "nothing more is committed");
}

/// Nobody else can give it back: no caller knows the id.
#[tokio::test]
async fn an_id_that_the_daemon_picked_is_given_up_when_its_refusal_cannot_be_made_final() {
    let store = Gated::new().await;
    let (engine, holder, call, closed) = repeated(&store, LeaseId::random(), Origin::Daemon).await;
    store.fails.store(2, Ordering::SeqCst);
    drop(closed);
    let answer = call.await.expect("no panic");
    assert!(matches!(answer, Err(CallError::Store(_))), "{answer:?}");
    timeout(PATIENCE, engine.settle()).await.expect("an end");
    engine.release(key("job"), holder, false).await.expect("an answer");
    store.deliver_stalled().await;
    assert_eq!(state(&engine).await, State::Free);
}

/// The first attempt takes effect after the second one was refused, and before the caller is told.
#[tokio::test]
async fn a_call_whose_first_attempt_is_granted_late_is_told_so() {
    let (store, id) = (Gated::new().await, LeaseId::random());
    let (engine, holder, call, closed) = repeated(&store, id, Origin::Caller).await;
    // Lets one batch through: those that wait at the gate go through in turn.
    drop(closed);
    let closed = store.close().await;
    store.apply(key("job"), Edit::default().release(holder)).await;
    store.deliver_stalled().await;
    drop(closed);
    let answer = call.await.expect("no panic");
    assert!(matches!(&answer, Ok(Acquired::Granted(grant)) if grant.id == id && grant.waited), "{answer:?}");
    engine.settle().await;
    let record = engine.get(key("job")).await.expect("an answer").expect("a record").record;
    assert!(record.holders[0].repeated, "its end is to be remembered for long");
}

/// The caller repeats what it sent to another daemon, whose command is late.
#[tokio::test]
async fn a_refusal_of_what_the_caller_repeats_stays_one() {
    let (store, id) = (Gated::new().await, LeaseId::random());
    let (engine, holder) = (store.engine(usize::MAX / 2), LeaseId::random());
    engine.acquire(ask(holder, Origin::Caller, Duration::ZERO)).await.expect("a grant");
    let first = ask(id, Origin::Caller, Duration::ZERO);
    let acquisition = Acquisition { repeated: true, ..first.acquisition.clone() };
    let refused = engine.acquire(Call { acquisition, ..first.clone() }).await;
    assert!(matches!(refused, Ok(Acquired::Held(_))), "{refused:?}");
    engine.release(key("job"), holder, false).await.expect("an answer");

    store.apply(key("job"), Edit::default().enqueue(first.acquisition.into())).await;
    assert_eq!(state(&engine).await, State::Free, "nobody knows of the lease");
}

#[tokio::test]
async fn a_call_is_not_refused_when_nobody_can_say_that_it_stays_refused() {
    let (store, id) = (Gated::new().await, LeaseId::random());
    let (_engine, _, call, closed) = repeated(&store, id, Origin::Caller).await;
    let released = (0..SETTLED_DEPARTURES).map(|_| LeaseId::random());
    store.apply(key("job"), released.fold(Edit::default(), Edit::release)).await;
    drop(closed);
    let answer = call.await.expect("no panic");
    assert!(matches!(answer, Err(CallError::Store(_))), "{answer:?}");
}

/// No more is written for the many refusals that were sent once, whatever was repeated before.
#[tokio::test]
async fn a_refusal_that_was_sent_once_costs_no_second_commit() {
    let store = Gated::new().await;
    let engine = store.engine(usize::MAX / 2);
    store.stalls.store(true, Ordering::SeqCst);
    engine.acquire(ask(LeaseId::random(), Origin::Caller, Duration::ZERO)).await.expect("a grant");
    let refused = engine.acquire(ask(LeaseId::random(), Origin::Daemon, Duration::ZERO)).await;
    assert!(matches!(refused, Ok(Acquired::Held(_))), "{refused:?}");
    engine.settle().await;
    assert_eq!(store.batches_of(&key("job")).0, 2);
}

/// A connection breaks with many calls, and one of them is repeated on another before what the first leaves behind has been
/// committed.
#[tokio::test]
async fn a_call_that_is_gone_takes_no_place_from_the_one_that_repeats_it() {
    let store = Gated::new().await;
    let engine = store.engine(usize::MAX / 2);
    engine.acquire(ask(LeaseId::random(), Origin::Caller, Duration::ZERO)).await.expect("a grant");
    let wait = |caller: &Lessor<Gated>, id| {
        let engine = caller.clone();
        tokio::spawn(async move { engine.acquire(ask(id, Origin::Caller, PATIENCE)).await })
    };
    let in_line = async || {
        let snapshot = engine.get(key("job")).await.expect("an answer").expect("a record");
        snapshot.record.waiters.iter().map(|waiter| waiter.acquisition.id).collect::<Vec<_>>()
    };
    let ids: Vec<LeaseId> = (0..10).map(|_| LeaseId::random()).collect();
    let broken = engine.on_behalf_of(Caller::new());
    let calls: Vec<_> = ids.iter().map(|id| wait(&broken, *id)).collect();
    let all_wait = async {
        while in_line().await.len() < 10 {
            yield_now().await;
        }
    };
    timeout(PATIENCE, all_wait).await.expect("they get into line");
    let closed = store.close().await;
    // Something is under way, so that what follows gathers.
    let before = store.batches_of(&key("job")).0;
    let touch = tokio::spawn({
        let engine = engine.clone();
        async move { engine.touch(key("job"), LeaseId::random()).await }
    });
    until(|| store.batches_of(&key("job")).0 > before).await;
    calls.iter().for_each(JoinHandle::abort);
    until(|| engine.committer.unanswered() == 10).await;
    let repeats = wait(&engine.on_behalf_of(Caller::new()), ids[9]);
    until(|| engine.committer.queued() == 2).await;
    drop(closed);
    touch.await.expect("no panic").expect("an answer");
    engine.settle().await;
    assert_eq!(in_line().await, [ids[9]], "it has kept its place, and nobody else has");
    repeats.abort();
}

#[tokio::test]
async fn a_call_whose_place_is_taken_with_another_mode_is_not_told_that_it_was_granted() {
    let store = Gated::new().await;
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
    // Its place lapses, or a daemon that it was at before gives it up.
    let gone = vec![(key("job"), Edit::default().cancel(id))];
    store.commit(gone.into(), PATIENCE).await.expect("a commit");
    let shared = wait(Mode::Shared);
    until(|| store.batches_of(&key("job")).0 == 4).await;
    engine.settle().await;

    engine.release(key("job"), holder, false).await.expect("an answer");
    let answer = |call: JoinHandle<Result<Acquired, CallError>>| async {
        timeout(PATIENCE, call).await.expect("an answer in time").expect("no panic").expect("an answer")
    };
    let shared = answer(shared).await;
    assert!(matches!(&shared, Acquired::Granted(grant) if grant.mode == Mode::Shared), "{shared:?}");
    assert_eq!(answer(exclusive).await, Acquired::IdReused);
}
