//! Shared leases.

use leased_client::Reason;
use leased_client::v1::Mode;

use rstest::rstest;

use crate::support::{
    AcquireBuilder, Backend, Calls, Daemon, Embedded, Fleet, MongoDb, acquire, enqueue, refusal, secs,
    until_queued,
};

#[rstest]
#[tokio::test]
async fn shared_holders_hold_together_up_to_their_limit(
    #[values(Embedded, MongoDb, Fleet)] backend: Backend,
) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    let first = client.get_lease(acquire("pool").shared(2)).await.unwrap();
    let second = client.get_lease(acquire("pool").shared(2)).await.unwrap();
    assert!(second.fencing_token > first.fencing_token);
    for limit in [2, 0] {
        let third = client.get_lease(acquire("pool").shared(limit)).await.unwrap_err();
        assert_eq!(
            refusal(&third, "").0,
            Some(Reason::LeaseHeld),
            "the limit of the holders binds every further caller"
        );
    }
    let seen = client.inspect("pool").await.unwrap();
    assert_eq!(seen.holders.len(), 2);
    assert!(seen.holders.iter().all(|holder| holder.mode() == Mode::Shared));
}

#[rstest]
#[tokio::test]
async fn exclusive_and_shared_leases_exclude_each_other(
    #[values(Embedded, MongoDb, Fleet)] backend: Backend,
) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    let alone = client.get_lease(acquire("pool")).await.unwrap().lease.unwrap();
    assert_eq!(
        refusal(&client.get_lease(acquire("pool").shared(0)).await.unwrap_err(), "").0,
        Some(Reason::LeaseHeld)
    );
    client.give_back(&alone).await.unwrap();
    client.get_lease(acquire("pool").shared(0)).await.unwrap();
    assert_eq!(refusal(&client.get_lease(acquire("pool")).await.unwrap_err(), "").0, Some(Reason::LeaseHeld));
}

#[rstest]
#[tokio::test]
async fn a_shared_request_does_not_overtake_an_exclusive_waiter(
    #[values(Embedded, MongoDb, Fleet)] backend: Backend,
) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    let reader = client.get_lease(acquire("pool").shared(0).ttl(secs(60))).await.unwrap().lease.unwrap();
    let writer = enqueue(&mut client, acquire("pool").owner("writer").wait(secs(60)), 1).await;
    let status = client.get_lease(acquire("pool").shared(0)).await.unwrap_err();
    assert_eq!(refusal(&status, "").0, Some(Reason::LeaseHeld), "the writer comes first");
    let late = enqueue(&mut client, acquire("pool").shared(0).wait(secs(60)), 2).await;

    client.give_back(&reader).await.unwrap();
    let writer = writer.await.unwrap().unwrap();
    assert!(!late.is_finished());
    client.give_back(&writer.lease.unwrap()).await.unwrap();
    assert!(late.await.unwrap().unwrap().fencing_token > writer.fencing_token);
}

#[rstest]
#[tokio::test]
async fn one_release_admits_all_shared_waiters_at_the_head_of_the_queue(
    #[values(Embedded, MongoDb, Fleet)] backend: Backend,
) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    let writer = client.get_lease(acquire("pool").ttl(secs(60))).await.unwrap().lease.unwrap();
    let readers: Vec<_> = (0..5)
        .map(|_| {
            let mut client = client.clone();
            tokio::spawn(async move { client.get_lease(acquire("pool").shared(0).wait(secs(60))).await })
        })
        .collect();
    until_queued(&mut client, "pool", 5).await;
    client.give_back(&writer).await.unwrap();
    assert_eq!(client.inspect("pool").await.unwrap().holders.len(), 5);
    for reader in readers {
        reader.await.unwrap().unwrap();
    }
}
