//! What a keepalive stream is told unasked.

use std::collections::HashSet;

use leased_client::v1::{LeaseRef, LossReason};
use rstest::rstest;

use crate::keepalive::{KeepAlive, kept, lost};
use crate::revoke::revoke;
use crate::support::{Asking, Calls, Daemon, Embedded, Home, Leases, MongoDb, ask, line_of, ms, secs};

/// Leases on `keys`, carried by a new stream.
async fn carried(client: &mut Leases, keys: &[&str]) -> (KeepAlive, Vec<LeaseRef>) {
    let mut leases = Vec::new();
    for key in keys {
        leases.push(client.get_lease(ask(key).ttl(secs(60))).await.unwrap().lease.unwrap());
    }
    let mut stream = KeepAlive::open(client).await;
    for (_, outcome) in stream.touch(&leases).await {
        kept(&outcome);
    }
    (stream, leases)
}

#[rstest]
#[tokio::test]
async fn of_many_leases_the_one_that_is_revoked_is_told_and_the_others_go_on(
    #[values(Embedded, MongoDb)] home: Home,
) {
    let daemon = Daemon::start(home).await;
    let mut client = daemon.client().await;
    let keys: Vec<String> = (0..100).map(|number| format!("key/{number}")).collect();
    let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
    let (mut stream, leases) = carried(&mut client, &keys).await;

    assert_eq!(revoke(&daemon, "key/42", 0).await, 1);
    assert_eq!(stream.told().await, [(leases[42].clone(), LossReason::Revoked)]);
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
    assert!(!left.contains("key/42"), "it is not carried any more");
    // Named again it is asked about again.
    let results = stream.touch(&leases[41..43]).await;
    kept(&results[0].1);
    assert_eq!(lost(&results[1].1), LossReason::Revoked);
}

#[rstest]
#[tokio::test]
async fn a_holder_that_fell_silent_is_told_that_it_was_displaced(#[values(Embedded, MongoDb)] home: Home) {
    let daemon = Daemon::start(home).await;
    let mut client = daemon.client().await;
    let lease = client.get_lease(ask("job").ttl(ms(300))).await.unwrap().lease.unwrap();
    let mut stream = KeepAlive::open(&mut client).await;
    kept(&stream.touch(std::slice::from_ref(&lease)).await[0].1);

    let next = client.get_lease(ask("job").ttl(secs(60)).wait(secs(60))).await.unwrap().lease.unwrap();
    assert_eq!(stream.told().await, [(lease, LossReason::Displaced)]);
    assert!(stream.touch(&[]).await.is_empty());
    client.give_back(&next).await.unwrap();
}

#[rstest]
#[tokio::test]
async fn a_release_by_another_call_is_told(#[values(Embedded, MongoDb)] home: Home) {
    let daemon = Daemon::start(home).await;
    let mut client = daemon.client().await;
    let (mut stream, leases) = carried(&mut client, &["a", "b"]).await;
    daemon.client().await.give_back(&leases[0]).await.unwrap();
    assert_eq!(stream.told().await, [(leases[0].clone(), LossReason::Released)]);
    let results = stream.touch(&[]).await;
    assert_eq!(results.iter().map(|(lease, _)| lease).collect::<Vec<_>>(), [&leases[1]]);
}

#[rstest]
#[tokio::test]
async fn every_stream_that_carries_the_lease_is_told(#[values(Embedded, MongoDb)] home: Home) {
    let daemon = Daemon::start(home).await;
    let mut client = daemon.client().await;
    let (mut one, leases) = carried(&mut client, &["job"]).await;
    let mut other = KeepAlive::open(&mut daemon.client().await).await;
    kept(&other.touch(&leases).await[0].1);
    // A stream that has ended hears of nothing, and is in nobody's way.
    let mut ended = KeepAlive::open(&mut client).await;
    kept(&ended.touch(&leases).await[0].1);
    drop(ended);

    revoke(&daemon, "job", 0).await;
    for stream in [&mut one, &mut other] {
        assert_eq!(stream.told().await, [(leases[0].clone(), LossReason::Revoked)]);
    }
}

#[rstest]
#[tokio::test]
async fn each_of_several_losses_is_told_once(#[values(Embedded, MongoDb)] home: Home) {
    let daemon = Daemon::start(home).await;
    let mut client = daemon.client().await;
    let mut leases = Vec::new();
    for _ in 0..20 {
        leases.push(client.get_lease(ask("pool").shared(20).ttl(secs(60))).await.unwrap().lease.unwrap());
    }
    let mut stream = KeepAlive::open(&mut client).await;
    stream.touch(&leases).await;
    // While the holders are revoked a newcomer waits, and is none of theirs.
    let mut waiting = client.clone();
    let next = tokio::spawn(async move { waiting.get_lease(ask("pool").wait(secs(60))).await });
    line_of(&mut client, "pool", 1).await;

    assert_eq!(revoke(&daemon, "pool", 0).await, 20);
    let mut told = Vec::new();
    while told.len() < 20 {
        for (lease, reason) in stream.told().await {
            assert_eq!(reason, LossReason::Revoked);
            told.push(lease.lease_id);
        }
    }
    told.sort();
    let mut all: Vec<String> = leases.into_iter().map(|lease| lease.lease_id).collect();
    all.sort();
    assert_eq!(told, all);
    assert!(stream.touch(&[]).await.is_empty(), "no loss is told again before this answer");
    next.await.unwrap().unwrap();
}
