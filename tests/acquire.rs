//! Acquire: one exclusive holder, rising fencing tokens, and calls that may be repeated.

use leased_client::Reason;
use leased_client::v1::LeaseState;
use mongodb::bson::doc;
use rstest::rstest;
use tokio::task::JoinSet;
use tonic::Code;
use uuid::Uuid;

use crate::support::{
    AcquireBuilder, Backend, Calls, Daemon, Embedded, Fleet, MongoDb, acquire, eventually, ms, refusal, secs,
};

#[rstest]
#[tokio::test]
async fn a_free_key_is_granted_as_requested(#[values(Embedded, MongoDb, Fleet)] backend: Backend) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    let id = Uuid::new_v4();
    let granted = client.get_lease(acquire("job").id(id).owner("me").ttl(ms(2500))).await.unwrap();
    let lease = granted.lease.unwrap();
    assert_eq!((lease.key.as_str(), lease.lease_id.as_str()), ("job", id.to_string().as_str()));
    assert!(granted.fencing_token > 0);
    assert!(!granted.waited);
    assert_eq!(granted.ttl, Some(ms(2500).try_into().unwrap()));
    let (from, to) = (granted.acquire_time.unwrap(), granted.expire_time.unwrap());
    let span = (to.seconds - from.seconds) * 1000 + i64::from((to.nanos - from.nanos) / 1_000_000);
    assert_eq!(span, 2500);

    let seen = client.inspect("job").await.unwrap();
    assert_eq!(seen.state(), LeaseState::Held);
    assert_eq!(seen.fencing_token, granted.fencing_token);
    assert_eq!(seen.holders[0].owner, "me");
}

#[rstest]
#[tokio::test]
async fn the_daemon_picks_the_id_and_the_ttl_that_a_request_leaves_out(
    #[values(Embedded, MongoDb, Fleet)] backend: Backend,
) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    let granted = client.get_lease(acquire("job")).await.unwrap();
    assert_eq!(granted.ttl, Some(secs(30).try_into().unwrap()));
    let lease = granted.lease.unwrap();
    assert!(Uuid::parse_str(&lease.lease_id).is_ok());
    client.give_back(&lease).await.unwrap();
}

#[rstest]
#[tokio::test]
async fn a_held_key_is_refused_and_the_refusal_names_the_holder(
    #[values(Embedded, MongoDb, Fleet)] backend: Backend,
) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    let held = client.get_lease(acquire("job").owner("first").ttl(secs(20))).await.unwrap();
    let refused = client.get_lease(acquire("job").owner("second")).await.unwrap_err();
    assert_eq!(refused.code(), Code::AlreadyExists);
    assert_eq!(refusal(&refused, "owner"), (Some(Reason::LeaseHeld), "first".to_owned()));
    assert_eq!(refusal(&refused, "token").1, held.fencing_token.to_string());
    let remaining: u64 = refusal(&refused, "remaining_ms").1.parse().unwrap();
    assert!((1..=20_000).contains(&remaining), "{remaining}");
    assert_eq!(refusal(&refused, "position").1, "", "the call did not wait");
    assert!(client.inspect("job").await.unwrap().waiters.is_empty());
}

/// In mongolock, a second worker with the same owner name can release the first worker's lock.
#[rstest]
#[tokio::test]
async fn an_equal_owner_name_gives_no_right_to_a_lease(#[values(Embedded, MongoDb, Fleet)] backend: Backend) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    let first = client.get_lease(acquire("job").owner("worker")).await.unwrap().lease.unwrap();
    let refused = client.get_lease(acquire("job").owner("worker")).await.unwrap_err();
    assert_eq!(refusal(&refused, "owner"), (Some(Reason::LeaseHeld), "worker".to_owned()));
    let mut other = first.clone();
    other.lease_id = Uuid::new_v4().to_string();
    assert_eq!(refusal(&client.give_back(&other).await.unwrap_err(), "").0, Some(Reason::LeaseLost));
    client.renew(&first).await.unwrap();
}

#[tokio::test]
async fn tokens_rise_over_release_expiry_and_deletion_of_the_record() {
    let daemon = Daemon::start(MongoDb).await;
    let mut client = daemon.client().await;
    let mut last = 0;
    let mut rises = |token: i64| {
        assert!(token > last, "{token} after {last}");
        last = token;
    };
    for _ in 0..5 {
        let granted = client.get_lease(acquire("job")).await.unwrap();
        rises(granted.fencing_token);
        client.give_back(&granted.lease.unwrap()).await.unwrap();
    }
    rises(client.get_lease(acquire("job").ttl(ms(150))).await.unwrap().fencing_token);
    let after_expiry = eventually(async || client.get_lease(acquire("job")).await.ok()).await;
    rises(after_expiry.fencing_token);
    daemon.collection().await.delete_one(doc! { "_id": "job" }).await.unwrap();
    rises(client.get_lease(acquire("job")).await.unwrap().fencing_token);
}

#[rstest]
#[tokio::test]
async fn a_repeated_acquire_with_the_same_id_is_the_same_acquisition(
    #[values(Embedded, MongoDb, Fleet)] backend: Backend,
) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    let request = acquire("job").id(Uuid::new_v4()).ttl(secs(20));
    let first = client.get_lease(request.clone()).await.unwrap();
    let again = client.get_lease(request.clone()).await.unwrap();
    assert_eq!(again.fencing_token, first.fencing_token);
    assert_eq!(client.inspect("job").await.unwrap().holders.len(), 1);

    client.give_back(&first.lease.unwrap()).await.unwrap();
    let late = client.get_lease(request).await.unwrap_err();
    assert_eq!(late.code(), Code::NotFound);
    assert_eq!(refusal(&late, "loss"), (Some(Reason::LeaseLost), "released".to_owned()));
    assert_eq!(
        client.inspect("job").await.unwrap().state(),
        LeaseState::Free,
        "the late call was granted a lease"
    );
}

/// Without the renewal, a client that counts the TTL from the repeated call would believe that it
/// holds the lease after the lease has ended.
#[rstest]
#[tokio::test]
async fn a_repeated_acquire_renews_the_lease(#[values(Embedded, MongoDb, Fleet)] backend: Backend) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    let request = acquire("job").id(Uuid::new_v4()).ttl(secs(20));
    let first = client.get_lease(request.clone()).await.unwrap().expire_time.unwrap();
    let instant = |time: &prost_types::Timestamp| (time.seconds, time.nanos);
    eventually(async || {
        let again = client.get_lease(request.clone()).await.unwrap().expire_time.unwrap();
        (instant(&again) > instant(&first)).then_some(())
    })
    .await;
}

#[rstest]
#[tokio::test]
async fn of_256_callers_that_race_for_a_key_one_is_granted_it(
    #[values(Embedded, MongoDb, Fleet)] backend: Backend,
) {
    let daemon = Daemon::start(backend).await;
    let client = daemon.client().await;
    let mut racers = JoinSet::new();
    for _ in 0..256 {
        let mut client = client.clone();
        racers.spawn(async move { client.get_lease(acquire("job")).await });
    }
    let outcomes = racers.join_all().await;
    let (won, lost): (Vec<_>, Vec<_>) = outcomes.into_iter().partition(Result::is_ok);
    assert_eq!(won.len(), 1);
    for status in lost.into_iter().map(Result::unwrap_err) {
        assert_eq!(refusal(&status, "").0, Some(Reason::LeaseHeld), "{status:?}");
    }
}

#[rstest]
#[tokio::test]
async fn two_thousand_concurrent_acquires_are_all_granted(
    #[values(Embedded, MongoDb, Fleet)] backend: Backend,
) {
    let daemon = Daemon::start(backend).await;
    let mut callers = JoinSet::new();
    for connection in 0..10 {
        let client = daemon.client().await;
        for number in 0..200 {
            let mut client = client.clone();
            callers.spawn(async move {
                client.get_lease(acquire(&format!("key/{connection}/{number}"))).await.unwrap()
            });
        }
    }
    let leases = callers.join_all().await;
    assert_eq!(leases.len(), 2000);
    let mut client = daemon.client().await;
    for granted in leases.iter().step_by(199) {
        let lease = granted.lease.clone().unwrap();
        assert_eq!(client.inspect(&lease.key).await.unwrap().fencing_token, granted.fencing_token);
    }
}

#[rstest]
#[tokio::test]
async fn min_hold_blocks_the_key_after_an_early_release(
    #[values(Embedded, MongoDb, Fleet)] backend: Backend,
) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    let first = client.get_lease(acquire("cron").min_hold(ms(1500))).await.unwrap();
    client.give_back(&first.lease.clone().unwrap()).await.unwrap();
    let refused = client.get_lease(acquire("cron")).await.unwrap_err();
    assert_eq!(refusal(&refused, "owner"), (Some(Reason::LeaseHeld), String::new()));
    assert!(client.inspect("cron").await.unwrap().blocked_until.is_some());
    let next = client.get_lease(acquire("cron").wait(secs(20))).await.unwrap();
    assert!(next.waited);
    let instant = |time: Option<prost_types::Timestamp>| {
        let time = time.unwrap();
        time.seconds * 1000 + i64::from(time.nanos / 1_000_000)
    };
    assert!(instant(next.acquire_time) - instant(first.acquire_time) >= 1500);
}
