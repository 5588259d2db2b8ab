//! Losses that the daemon pushes on a keepalive stream.

use std::collections::HashSet;

use leased_client::v1::{LeaseRef, LossReason};
use rstest::rstest;

use crate::keepalive::{KeepAlive, kept, lost};
use crate::revoke::revoke;
use crate::support::{
    AcquireBuilder, Backend, Calls, Daemon, Embedded, Leases, MongoDb, acquire, enqueue, ms, secs,
};

/// Acquires a lease on each of `keys`, and opens a stream that tracks them.
async fn tracked(client: &mut Leases, keys: &[&str]) -> (KeepAlive, Vec<LeaseRef>) {
    let mut leases = Vec::new();
    for key in keys {
        leases.push(client.get_lease(acquire(key).ttl(secs(60))).await.unwrap().lease.unwrap());
    }
    let mut stream = KeepAlive::open(client).await;
    for (_, outcome) in stream.touch(&leases).await {
        kept(&outcome);
    }
    (stream, leases)
}

#[rstest]
#[tokio::test]
async fn of_many_leases_only_the_revoked_one_is_reported_lost(#[values(Embedded, MongoDb)] backend: Backend) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    let keys: Vec<String> = (0..100).map(|number| format!("key/{number}")).collect();
    let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
    let (mut stream, leases) = tracked(&mut client, &keys).await;

    assert_eq!(revoke(&daemon, "key/42", 0).await, 1);
    assert_eq!(stream.reported().await, [(leases[42].clone(), LossReason::Revoked)]);
    let left: HashSet<String> = stream
        .touch(&[])
        .await
        .into_iter()
        .map(|(lease, outcome)| {
            kept(&outcome);
            lease.key
        })
        .collect();
    assert_eq!(left.len(), 99);
    assert!(!left.contains("key/42"), "the stream still tracks the revoked lease");
    // A message that names the revoked lease is answered with the same loss.
    let results = stream.touch(&leases[41..43]).await;
    kept(&results[0].1);
    assert_eq!(lost(&results[1].1), LossReason::Revoked);
}

#[rstest]
#[tokio::test]
async fn a_holder_that_stopped_renewing_receives_the_loss_displaced(
    #[values(Embedded, MongoDb)] backend: Backend,
) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    let lease = client.get_lease(acquire("job").ttl(ms(300))).await.unwrap().lease.unwrap();
    let mut stream = KeepAlive::open(&mut client).await;
    kept(&stream.touch(std::slice::from_ref(&lease)).await[0].1);

    let next = client.get_lease(acquire("job").ttl(secs(60)).wait(secs(60))).await.unwrap().lease.unwrap();
    assert_eq!(stream.reported().await, [(lease, LossReason::Displaced)]);
    assert!(stream.touch(&[]).await.is_empty());
    client.give_back(&next).await.unwrap();
}

#[rstest]
#[tokio::test]
async fn a_release_by_another_call_is_reported(#[values(Embedded, MongoDb)] backend: Backend) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    let (mut stream, leases) = tracked(&mut client, &["a", "b"]).await;
    daemon.client().await.give_back(&leases[0]).await.unwrap();
    assert_eq!(stream.reported().await, [(leases[0].clone(), LossReason::Released)]);
    let results = stream.touch(&[]).await;
    assert_eq!(results.iter().map(|(lease, _)| lease).collect::<Vec<_>>(), [&leases[1]]);
}

#[rstest]
#[tokio::test]
async fn every_stream_that_tracks_the_lease_reports_its_loss(#[values(Embedded, MongoDb)] backend: Backend) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    let (mut one, leases) = tracked(&mut client, &["job"]).await;
    let mut other = KeepAlive::open(&mut daemon.client().await).await;
    kept(&other.touch(&leases).await[0].1);
    // A stream that has ended must not keep the other streams from reporting the loss.
    let mut ended = KeepAlive::open(&mut client).await;
    kept(&ended.touch(&leases).await[0].1);
    drop(ended);

    revoke(&daemon, "job", 0).await;
    for stream in [&mut one, &mut other] {
        assert_eq!(stream.reported().await, [(leases[0].clone(), LossReason::Revoked)]);
    }
}

#[rstest]
#[tokio::test]
async fn each_of_several_losses_is_reported_once(#[values(Embedded, MongoDb)] backend: Backend) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    let mut leases = Vec::new();
    for _ in 0..20 {
        leases.push(client.get_lease(acquire("pool").shared(20).ttl(secs(60))).await.unwrap().lease.unwrap());
    }
    let mut stream = KeepAlive::open(&mut client).await;
    stream.touch(&leases).await;
    // The revocation of all holders must not revoke the lease that this waiter is then granted.
    let next = enqueue(&mut client, acquire("pool").wait(secs(60)), 1).await;

    assert_eq!(revoke(&daemon, "pool", 0).await, 20);
    let mut reported = Vec::new();
    while reported.len() < 20 {
        for (lease, reason) in stream.reported().await {
            assert_eq!(reason, LossReason::Revoked);
            reported.push(lease.lease_id);
        }
    }
    reported.sort();
    let mut all: Vec<String> = leases.into_iter().map(|lease| lease.lease_id).collect();
    all.sort();
    assert_eq!(reported, all);
    assert!(stream.touch(&[]).await.is_empty(), "the stream still tracks a lease");
    next.await.unwrap().unwrap();
}
