//! Several daemons over one database. Each reports what the others do, and none depends on another
//! that crashes.

use leased_client::Reason;
use leased_client::v1::keep_alive_result::Outcome;
use leased_client::v1::{ChangeKind, LeaseState, LossReason};
use mongodb::bson::doc;
use throwaway_mongodb::Mongod;
use tokio::time::Instant;

use crate::keepalive::{KeepAlive, kept};
use crate::revoke::revoke;
use crate::support::{
    AcquireBuilder, Calls, CrashingDaemon, Daemon, GRACE, MongoDb, acquire, enqueue, eventually, ms, refusal,
    secs, until_queued,
};
use crate::watch::Watch;

/// Starts two daemons, and returns once each follows what the other does.
async fn two() -> (Daemon, Daemon) {
    let one = Daemon::start(MongoDb).await;
    let two = one.sibling().await;
    one.until_following().await;
    two.until_following().await;
    (one, two)
}

#[tokio::test]
async fn waiters_of_a_crashed_daemon_are_skipped_once_their_entries_have_lapsed() {
    let one = Daemon::start_with(MongoDb, |config| config.rules.waiter_ttl = secs(2)).await;
    let crashing = CrashingDaemon::beside(&one).await;
    let (mut at_one, mut at_crashing) = (one.client().await, crashing.client().await);
    let lease = at_one.get_lease(acquire("job").ttl(secs(600))).await.unwrap().lease.unwrap();
    let lost = tokio::spawn(async move {
        at_crashing.get_lease(acquire("job").owner("lost").ttl(secs(600)).wait(secs(600))).await
    });
    until_queued(&mut at_one, "job", 1).await;
    let next = enqueue(&mut at_one, acquire("job").wait(secs(600)), 2).await;

    crashing.kill();
    assert!(lost.await.unwrap().is_err());
    until_queued(&mut at_one, "job", 1).await;
    at_one.give_back(&lease).await.unwrap();
    let released = Instant::now();
    let granted = next.await.unwrap().unwrap();
    assert!(granted.waited && released.elapsed() < secs(60), "the key was granted to the lost waiter first");
    assert!(!at_one.inspect("job").await.unwrap().holders[0].owner.contains("lost"));
}

#[tokio::test]
async fn a_watch_shows_what_happens_at_another_daemon() {
    let (one, two) = two().await;
    let (mut at_one, mut at_two) = (one.client().await, two.client().await);
    let mut watch = Watch::changes_only(&mut at_one, "").await;
    let lease = at_two.get_lease(acquire("job").ttl(secs(60))).await.unwrap().lease.unwrap();
    assert_eq!(watch.kinds("job", 1).await, [ChangeKind::Granted]);
    let mut waiting = at_two.clone();
    let waiter =
        tokio::spawn(async move { waiting.get_lease(acquire("job").ttl(secs(60)).wait(secs(60))).await });
    assert_eq!(watch.kinds("job", 1).await, [ChangeKind::Queued]);
    at_two.give_back(&lease).await.unwrap();
    assert_eq!(watch.kinds("job", 2).await, [ChangeKind::Released, ChangeKind::Granted]);
    waiter.await.unwrap().unwrap();
    revoke(&two, "job", 0).await;
    let (kind, lease) = watch.change().await;
    assert_eq!((kind, lease.state()), (ChangeKind::Revoked, LeaseState::Free));
    for _ in 0..20 {
        let lease = at_two.get_lease(acquire("short")).await.unwrap().lease.unwrap();
        at_two.give_back(&lease).await.unwrap();
        // The lease may be released before the watching daemon reads the record.
        assert_eq!(watch.kinds("short", 2).await, [ChangeKind::Granted, ChangeKind::Released]);
    }
}

/// The change feed does not report touches, so a daemon could mistake a lease that another daemon
/// keeps alive for a lapsed one.
#[tokio::test]
async fn a_lease_that_another_daemon_keeps_alive_is_not_reported_as_lapsed() {
    let (one, two) = two().await;
    let (mut at_one, mut at_two) = (one.client().await, two.client().await);
    let mut watch = Watch::changes_only(&mut at_one, "").await;
    let lease = at_two.get_lease(acquire("kept").ttl(ms(600))).await.unwrap().lease.unwrap();
    assert_eq!(watch.kinds("kept", 1).await, [ChangeKind::Granted]);
    let mut stream = KeepAlive::open(&mut at_two).await;
    let start = Instant::now();
    while start.elapsed() < ms(1500) {
        kept(&stream.touch(std::slice::from_ref(&lease)).await[0].1);
    }
    at_two.give_back(&lease).await.unwrap();
    assert_eq!(watch.kinds("kept", 1).await, [ChangeKind::Released]);
    at_two.get_lease(acquire("silent").ttl(ms(300))).await.unwrap();
    assert_eq!(watch.kinds("silent", 2).await, [ChangeKind::Granted, ChangeKind::Lapsed]);
}

#[tokio::test]
async fn every_daemon_respects_min_hold_and_grace() {
    let (one, two) = two().await;
    let (mut at_one, mut at_two) = (one.client().await, two.client().await);
    let cron = at_one.get_lease(acquire("cron").min_hold(secs(60))).await.unwrap().lease.unwrap();
    at_one.give_back(&cron).await.unwrap();
    let status = at_two.get_lease(acquire("cron")).await.unwrap_err();
    assert_eq!(refusal(&status, "").0, Some(Reason::LeaseHeld));

    let silent = at_one.get_lease(acquire("job").ttl(ms(300))).await.unwrap();
    let next = eventually(async || at_two.get_lease(acquire("job")).await.ok()).await;
    let millis = |time: Option<prost_types::Timestamp>| {
        let time = time.unwrap();
        time.seconds * 1000 + i64::from(time.nanos) / 1_000_000
    };
    let waited = millis(next.acquire_time) - millis(silent.expire_time);
    assert!(waited >= i64::try_from(GRACE.as_millis()).unwrap(), "{waited} ms after the lease expired");
}

/// A daemon starts to follow the change feed when another daemon appears.
#[tokio::test]
async fn a_daemon_that_was_alone_learns_of_a_release_at_another() {
    let one = Daemon::start(MongoDb).await;
    let mut at_one = one.client().await;
    let lease = at_one.get_lease(acquire("job").ttl(secs(60))).await.unwrap().lease.unwrap();
    let waiter = enqueue(&mut at_one, acquire("job").wait(secs(60)), 1).await;
    let two = one.sibling().await;
    one.until_following().await;
    two.client().await.give_back(&lease).await.unwrap();
    let granted = waiter.await.unwrap().unwrap();
    let remaining = at_one.renew(&granted.lease.unwrap()).await.unwrap();
    assert!(granted.waited && remaining > secs(25));
}

/// A stream reports a loss whichever daemon caused it.
#[tokio::test]
async fn a_loss_at_another_daemon_is_pushed_with_its_reason() {
    let (one, two) = two().await;
    let (mut at_one, mut at_two) = (one.client().await, two.client().await);
    let mut stream = KeepAlive::open(&mut at_one).await;
    let mut leases = Vec::new();
    for (key, ttl) in
        [("revoked", secs(60)), ("released", secs(60)), ("displaced", ms(500)), ("kept", secs(60))]
    {
        leases.push(at_one.get_lease(acquire(key).ttl(ttl)).await.unwrap().lease.unwrap());
    }
    for (_, outcome) in &stream.touch(&leases).await {
        kept(outcome);
    }
    revoke(&two, "revoked", 0).await;
    assert_eq!(reported_loss(&mut stream).await, ("revoked".to_owned(), LossReason::Revoked));
    at_two.give_back(&leases[1]).await.unwrap();
    assert_eq!(reported_loss(&mut stream).await, ("released".to_owned(), LossReason::Released));
    at_two.get_lease(acquire("displaced").ttl(secs(60)).wait(secs(60))).await.unwrap();
    assert_eq!(reported_loss(&mut stream).await, ("displaced".to_owned(), LossReason::Displaced));

    let results = stream.touch(&[]).await;
    assert_eq!(results.iter().map(|(lease, _)| lease.key.as_str()).collect::<Vec<_>>(), ["kept"]);
}

/// Reads the next message, which the daemon pushes. Returns the key of the one lease in it,
/// and why it was lost.
async fn reported_loss(stream: &mut KeepAlive) -> (String, LossReason) {
    let mut answer = stream.next().await.unwrap();
    assert_eq!((answer.sequence, answer.results.len()), (0, 1));
    let result = answer.results.remove(0);
    match result.outcome.unwrap() {
        Outcome::Lost(lost) => (result.lease.unwrap().key, lost.reason()),
        other => panic!("not lost: {other:?}"),
    }
}

/// Coalescing must not hide a loss that another daemon caused.
#[tokio::test]
async fn a_touch_after_a_loss_at_another_daemon_does_not_coalesce() {
    let (one, two) = two().await;
    let mut at_one = one.client().await;
    let lease = at_one.get_lease(acquire("job").ttl(secs(600))).await.unwrap().lease.unwrap();
    let mut stream = KeepAlive::open(&mut at_one).await;
    for _ in 0..3 {
        kept(&stream.touch(std::slice::from_ref(&lease)).await[0].1);
    }
    revoke(&two, "job", 0).await;
    assert_eq!(reported_loss(&mut stream).await, ("job".to_owned(), LossReason::Revoked));
    let results = stream.touch(std::slice::from_ref(&lease)).await;
    assert!(matches!(&results[0].1, Outcome::Lost(lost) if lost.reason() == LossReason::Revoked));
}

/// The feed names a changed key only once. If the read of its record fails, the daemon repeats the
/// read. Otherwise the change would be missed.
#[tokio::test]
async fn a_change_is_reported_even_if_the_first_read_of_it_fails() {
    let mongod = Mongod::start().await.unwrap();
    let one = Daemon::over(mongod.uri(), |_| {}).await;
    let two = one.sibling().await;
    one.until_following().await;
    let mut watch = Watch::changes_only(&mut one.client().await, "").await;
    let admin = mongodb::Client::with_uri_str(mongod.uri()).await.unwrap().database("admin");
    let records = format!("{}.{}", one.location().database, one.location().collection);
    // Every read of a record fails with UnknownError (8).
    let data = doc! { "failCommands": ["find"], "namespace": records, "errorCode": 8 };
    let begun = admin
        .run_command(doc! { "configureFailPoint": "failCommand", "mode": "alwaysOn", "data": data })
        .await
        .unwrap();
    let failed = i64::from(begun.get_i32("count").unwrap());
    two.client().await.get_lease(acquire("job").ttl(secs(600))).await.unwrap();
    let wait = doc! { "waitForFailPoint": "failCommand", "timesEntered": failed + 1, "maxTimeMS": 30_000 };
    admin.run_command(wait).await.unwrap();
    admin.run_command(doc! { "configureFailPoint": "failCommand", "mode": "off" }).await.unwrap();
    assert_eq!(watch.kinds("job", 1).await, [ChangeKind::Granted]);
}
