//! Waiting in the queue of a key, with one daemon and with two.

use std::time::Duration;

use leased_client::Reason;
use rstest::rstest;
use tokio::time::Instant;
use tonic::{Code, Request};
use uuid::Uuid;

use crate::metrics::scrape;
use crate::support::{
    AcquireBuilder, Acquiring, Backend, Calls, Daemon, Embedded, Fleet, GRACE, Leases, MongoDb, acquire,
    enqueue, eventually, ms, refusal, secs, until_queued,
};

/// Starts a call that waits for up to 60 s, and returns once the key `job` has `waiters` waiters.
async fn wait_as(client: &mut Leases, owner: &str, waiters: usize) -> Acquiring {
    enqueue(client, acquire("job").owner(owner).wait(secs(60)), waiters).await
}

#[tokio::test]
async fn waiters_at_two_daemons_are_granted_the_key_in_the_order_of_their_calls() {
    let one = Daemon::start(MongoDb).await;
    let two = one.sibling().await;
    let (mut at_one, mut at_two) = (one.client().await, two.client().await);
    let mut lease = at_one.get_lease(acquire("job").owner("0")).await.unwrap().lease.unwrap();
    let mut waiters = Vec::new();
    for number in 1..=6 {
        let client = if number % 2 == 0 { &mut at_one } else { &mut at_two };
        waiters.push(wait_as(client, &number.to_string(), number).await);
    }
    let queue = at_one.inspect("job").await.unwrap().waiters;
    assert_eq!(
        queue.iter().map(|waiter| waiter.owner.as_str()).collect::<Vec<_>>(),
        ["1", "2", "3", "4", "5", "6"]
    );
    let mut last = 0;
    for (number, waiter) in waiters.into_iter().enumerate() {
        at_one.give_back(&lease).await.unwrap();
        let holder = at_one.inspect("job").await.unwrap().holders.remove(0);
        assert_eq!(
            holder.owner,
            (number + 1).to_string(),
            "the waiter holds the key as soon as the release returns"
        );
        let granted = waiter.await.unwrap().unwrap();
        assert!(granted.waited && granted.fencing_token > last);
        last = granted.fencing_token;
        lease = granted.lease.unwrap();
    }
}

/// Notifications between daemons are only hints. Without one, a daemon still learns of the release,
/// since it polls the record every 1 to 2 s.
#[tokio::test]
async fn a_waiter_learns_of_a_release_at_another_daemon_even_without_a_notification() {
    let one = Daemon::start(MongoDb).await;
    let two = one.sibling().await;
    let (mut at_one, mut at_two) = (one.client().await, two.client().await);
    let lease = at_one.get_lease(acquire("job").ttl(secs(60))).await.unwrap().lease.unwrap();
    let waiter = wait_as(&mut at_two, "next", 1).await;
    at_one.give_back(&lease).await.unwrap();
    let released = Instant::now();
    let granted = waiter.await.unwrap().unwrap();
    // The bound is far below the TTL. It is loose, since the machine may be slow.
    assert!(released.elapsed() < secs(10), "{:?}", released.elapsed());
    let remaining = at_two.renew(&granted.lease.unwrap()).await.unwrap();
    assert!(
        remaining > secs(25),
        "the daemon of the waiter touches a lease that another daemon granted: {remaining:?}"
    );
}

#[rstest]
#[tokio::test]
async fn a_call_whose_wait_is_over_names_the_holder_and_leaves_the_queue(
    #[values(Embedded, MongoDb, Fleet)] backend: Backend,
) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    client.get_lease(acquire("job").owner("holder").ttl(secs(60))).await.unwrap();
    let first = wait_as(&mut client, "first", 1).await;
    let status = client.get_lease(acquire("job").wait(ms(300))).await.unwrap_err();
    assert_eq!(status.code(), Code::AlreadyExists);
    assert_eq!(refusal(&status, "owner"), (Some(Reason::LeaseHeld), "holder".to_owned()));
    assert_eq!(refusal(&status, "position").1, "1", "behind one other");
    assert_eq!(client.inspect("job").await.unwrap().waiters.len(), 1);
    first.abort();
}

/// A caller whose wait is over must leave no waiter entry, since an entry without a caller may
/// still be granted the key. The daemon may be refreshing its queue at that moment, because of
/// another daemon's change.
#[rstest]
#[tokio::test]
async fn a_wait_that_is_over_leaves_no_waiter_behind(#[values(Embedded, MongoDb, Fleet)] backend: Backend) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    let lease = client.get_lease(acquire("job").ttl(secs(60))).await.unwrap().lease.unwrap();
    let mut callers = tokio::task::JoinSet::new();
    for number in 0..8 {
        let mut client = daemon.client().await;
        callers.spawn(async move {
            for wait in (0..40).map(|round| ms(1 + (7 * number + round) % 23)) {
                let status = client.get_lease(acquire("job").wait(wait)).await.unwrap_err();
                assert_eq!(refusal(&status, "").0, Some(Reason::LeaseHeld), "{status:?}");
            }
        });
    }
    callers.join_all().await;
    assert_eq!(client.inspect("job").await.unwrap().waiters, []);
    client.give_back(&lease).await.unwrap();
    assert!(client.inspect("job").await.unwrap().holders.is_empty());
}

#[rstest]
#[tokio::test]
async fn a_waiting_call_is_answered_before_its_deadline(
    #[values(Embedded, MongoDb, Fleet)] backend: Backend,
) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    client.get_lease(acquire("job").ttl(secs(60))).await.unwrap();
    let mut request = Request::new(acquire("job").wait(secs(60)));
    request.set_timeout(ms(1500));
    let status = client.acquire(request).await.unwrap_err();
    assert_eq!(refusal(&status, "").0, Some(Reason::LeaseHeld), "{status:?}");
    until_queued(&mut client, "job", 0).await;
}

#[rstest]
#[tokio::test]
async fn a_caller_that_hangs_up_leaves_the_queue_at_once(
    #[values(Embedded, MongoDb, Fleet)] backend: Backend,
) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    let lease = client.get_lease(acquire("job").ttl(secs(60))).await.unwrap().lease.unwrap();
    let gone = wait_as(&mut client, "gone", 1).await;
    let next = wait_as(&mut client, "next", 2).await;
    gone.abort();
    let start = Instant::now();
    until_queued(&mut client, "job", 1).await;
    assert!(start.elapsed() < secs(10), "the waiter left only because its entry lapsed");
    client.give_back(&lease).await.unwrap();
    assert!(next.await.unwrap().unwrap().waited);
}

/// Returns how many waits have ended with `outcome`, at all daemons that clients connect to.
async fn waits(daemon: &Daemon, outcome: &str) -> f64 {
    let mut waits = 0.0;
    for member in daemon.members() {
        waits += scrape(member).await.value("leased_waits_total", &[("outcome", outcome)]);
    }
    waits
}

/// If the daemon picked the lease id and the answer is lost, no caller knows the id or can release
/// the lease. So the daemon releases it. The lease is left to expire only if the daemon sent the
/// answer before it noticed that the caller had hung up.
#[rstest]
#[tokio::test]
async fn callers_that_hang_up_at_the_moment_of_a_grant_leave_no_lease(
    #[values(Embedded, MongoDb, Fleet)] backend: Backend,
) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    for _ in 0..20 {
        let lease = client.get_lease(acquire("job").ttl(secs(60))).await.unwrap().lease.unwrap();
        let granted_before = waits(&daemon, "granted").await;
        let leaving = wait_as(&mut client, "gone", 1).await;
        let mut releasing = client.clone();
        let release = tokio::spawn(async move { releasing.give_back(&lease).await });
        tokio::task::yield_now().await;
        leaving.abort();
        release.await.unwrap().unwrap();
        // The answer may have arrived before the call was aborted.
        if let Ok(Ok(granted)) = leaving.await {
            client.give_back(&granted.lease.unwrap()).await.unwrap();
        }
        let next = match client.get_lease(acquire("job").wait(secs(20))).await {
            Ok(next) => next,
            Err(_) => {
                let granted = waits(&daemon, "granted").await - granted_before;
                assert!(granted == 1.0, "the key is held, although no call was answered");
                client.get_lease(acquire("job").wait(secs(60))).await.unwrap()
            }
        };
        client.give_back(&next.lease.unwrap()).await.unwrap();
    }
    assert!(waits(&daemon, "abandoned").await > 0.0, "no caller has hung up while it waited");
}

#[rstest]
#[tokio::test]
async fn a_silent_holder_is_displaced_after_ttl_and_grace_and_not_before(
    #[values(Embedded, MongoDb, Fleet)] backend: Backend,
) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    let before = Instant::now();
    client.get_lease(acquire("job").ttl(ms(1000))).await.unwrap();
    let granted = client.get_lease(acquire("job").wait(secs(60))).await.unwrap();
    let elapsed = before.elapsed();
    assert!(granted.waited);
    // The store's clock counts whole milliseconds, so a lease may seem to begin a little earlier.
    assert!(elapsed + ms(5) >= ms(1000) + GRACE, "{elapsed:?}");
    // The bound is loose, since the machine may be slow.
    assert!(elapsed < secs(20), "{elapsed:?}");
}

#[rstest]
#[tokio::test]
async fn a_waiter_entry_does_not_lapse_while_its_call_is_open(
    #[values(Embedded, MongoDb, Fleet)] backend: Backend,
) {
    let daemon = Daemon::start_with(backend, |config| config.rules.waiter_ttl = ms(1000)).await;
    let mut client = daemon.client().await;
    let lease = client.get_lease(acquire("job").ttl(secs(60))).await.unwrap().lease.unwrap();
    let first = wait_as(&mut client, "first", 1).await;
    tokio::time::sleep(ms(2500)).await;
    let second = wait_as(&mut client, "second", 2).await;
    client.give_back(&lease).await.unwrap();
    let granted = first.await.unwrap().unwrap();
    client.give_back(&granted.lease.unwrap()).await.unwrap();
    second.await.unwrap().unwrap();
}

/// If a waiter does not call again after the drain of its daemon, its entry lapses, and the next
/// waiter is granted the key.
#[tokio::test]
async fn waiters_of_a_drained_daemon_are_skipped_once_their_entries_have_lapsed() {
    let daemon = Daemon::start_with(MongoDb, |config| config.rules.waiter_ttl = ms(1500)).await;
    let mut client = daemon.client().await;
    let lease = client.get_lease(acquire("job").ttl(secs(60))).await.unwrap().lease.unwrap();
    // A drain keeps the entry of a caller that chose its lease id.
    let draining = daemon.sibling().await;
    let mut at_draining = draining.client().await;
    let request = acquire("job").owner("gone").id(Uuid::new_v4()).wait(secs(60));
    let gone = tokio::spawn(async move { at_draining.get_lease(request).await });
    until_queued(&mut client, "job", 1).await;
    let next = wait_as(&mut client, "next", 2).await;
    draining.stop().await;
    assert_eq!(refusal(&gone.await.unwrap().unwrap_err(), "").0, Some(Reason::ShuttingDown));
    until_queued(&mut client, "job", 1).await;
    client.give_back(&lease).await.unwrap();
    assert_eq!(client.inspect("job").await.unwrap().holders[0].owner, "next");
    next.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_caller_of_a_draining_daemon_keeps_its_position_at_another() {
    let one = Daemon::start(MongoDb).await;
    let two = one.sibling().await;
    let (mut at_one, mut at_two) = (one.client().await, two.client().await);
    let lease = at_two.get_lease(acquire("job").ttl(secs(60))).await.unwrap().lease.unwrap();
    let request = acquire("job").owner("moving").id(Uuid::new_v4()).wait(secs(60));
    let first = tokio::spawn({
        let request = request.clone();
        async move { at_one.get_lease(request).await }
    });
    until_queued(&mut at_two, "job", 1).await;
    let other = wait_as(&mut at_two, "behind", 2).await;
    one.stop().await;
    assert_eq!(refusal(&first.await.unwrap().unwrap_err(), "").0, Some(Reason::ShuttingDown));
    let mut waiting = at_two.clone();
    let again = tokio::spawn(async move { waiting.get_lease(request).await });
    tokio::time::sleep(ms(100)).await;
    at_two.give_back(&lease).await.unwrap();
    assert_eq!(at_two.inspect("job").await.unwrap().holders[0].owner, "moving");
    again.await.unwrap().unwrap();
    other.abort();
}

/// A client that reconnects may repeat its call before the daemon notices that the first call has
/// ended.
#[rstest]
#[tokio::test]
async fn a_repeated_call_keeps_the_position_of_the_first(
    #[values(Embedded, MongoDb, Fleet)] backend: Backend,
) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    let lease = client.get_lease(acquire("job").ttl(secs(60))).await.unwrap().lease.unwrap();
    let request = acquire("job").owner("same").id(Uuid::new_v4()).wait(secs(60));
    let calls: Vec<Acquiring> = (0..2)
        .map(|_| {
            let (mut client, request) = (client.clone(), request.clone());
            tokio::spawn(async move { client.get_lease(request).await })
        })
        .collect();
    until_queued(&mut client, "job", 1).await;
    let behind = wait_as(&mut client, "behind", 2).await;
    let [old, new] = <[Acquiring; 2]>::try_from(calls).unwrap();
    old.abort();
    tokio::time::sleep(ms(200)).await;
    client.give_back(&lease).await.unwrap();
    let granted = new.await.unwrap().unwrap();
    assert_eq!(client.inspect("job").await.unwrap().holders[0].owner, "same");
    client.give_back(&granted.lease.unwrap()).await.unwrap();
    behind.await.unwrap().unwrap();
}

#[rstest]
#[tokio::test]
async fn a_full_queue_refuses_further_waiters(#[values(Embedded, MongoDb, Fleet)] backend: Backend) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    client.get_lease(acquire("job").ttl(secs(60))).await.unwrap();
    let mut crowd = tokio::task::JoinSet::new();
    for connection in 0..5 {
        let client = daemon.client().await;
        for number in 0..240 {
            let mut client = client.clone();
            let request = acquire("job").owner(&format!("{connection}/{number}")).wait(secs(60));
            crowd.spawn(async move { client.get_lease(request).await });
        }
    }
    eventually(async || client.inspect("job").await.ok().filter(|seen| seen.waiters.len() >= 1024)).await;
    let status = client.get_lease(acquire("job").wait(secs(60))).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert_eq!(refusal(&status, "").0, Some(Reason::QueueFull));
    let status = client.get_lease(acquire("job")).await.unwrap_err();
    assert_eq!(
        refusal(&status, "").0,
        Some(Reason::LeaseHeld),
        "a call that does not wait needs no room in the queue"
    );
}

#[rstest]
#[tokio::test]
async fn the_number_of_waiting_calls_at_one_daemon_is_limited(
    #[values(Embedded, MongoDb, Fleet)] backend: Backend,
) {
    let daemon = Daemon::start_with(backend, |config| config.limits.bounds.waiting_calls = 1).await;
    let mut client = daemon.client().await;
    client.get_lease(acquire("job").ttl(secs(60))).await.unwrap();
    let first = wait_as(&mut client, "first", 1).await;
    let status = client.get_lease(acquire("job").wait(secs(60))).await.unwrap_err();
    assert_eq!(refusal(&status, "limit"), (Some(Reason::LimitExceeded), "waiting_calls".to_owned()));
    first.abort();
    until_queued(&mut client, "job", 0).await;
    let wait: Duration = ms(50);
    let status = client.get_lease(acquire("job").wait(wait)).await.unwrap_err();
    assert_eq!(refusal(&status, "").0, Some(Reason::LeaseHeld), "there is room again");
}
