//! Revoking leases.

use leased_client::v1::RevokeRequest;
use leased_client::v1::{LeaseState, LossReason};

use crate::keepalive::KeepAlive;
use rstest::rstest;

use crate::support::{
    AcquireBuilder, Backend, Calls, Daemon, Embedded, Fleet, MongoDb, acquire, enqueue, refusal, secs,
};

/// Revokes a lease by its token, or all leases of `key` if the token is 0. Returns how many were
/// revoked.
pub(crate) async fn revoke(daemon: &Daemon, key: &str, fencing_token: i64) -> i32 {
    let request = RevokeRequest { key: key.to_owned(), fencing_token, reason: "a test".to_owned() };
    daemon.admin().await.revoke(request).await.unwrap().into_inner().revoked
}

#[rstest]
#[tokio::test]
async fn a_revoked_holder_receives_the_loss_and_the_next_waiter_holds_the_key(
    #[values(Embedded, MongoDb, Fleet)] backend: Backend,
) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    let granted = client.get_lease(acquire("job").ttl(secs(60))).await.unwrap();
    let lease = granted.lease.unwrap();
    let mut stream = KeepAlive::open(&mut client).await;
    stream.touch(std::slice::from_ref(&lease)).await;
    let next = enqueue(&mut client, acquire("job").owner("next").wait(secs(60)), 1).await;

    assert_eq!(revoke(&daemon, "job", granted.fencing_token - 1).await, 0, "a stale token changes nothing");
    client.renew(&lease).await.unwrap();
    assert_eq!(revoke(&daemon, "job", granted.fencing_token).await, 1);
    assert!(next.await.unwrap().unwrap().waited);
    assert_eq!(stream.reported().await, [(lease.clone(), LossReason::Revoked)]);
    assert_eq!(refusal(&client.renew(&lease).await.unwrap_err(), "loss").1, "revoked");
    assert_eq!(refusal(&client.give_back(&lease).await.unwrap_err(), "loss").1, "revoked");
}

#[rstest]
#[tokio::test]
async fn without_a_token_all_holders_are_revoked_and_no_later_one(
    #[values(Embedded, MongoDb, Fleet)] backend: Backend,
) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    for _ in 0..3 {
        client.get_lease(acquire("pool").shared(3).ttl(secs(60))).await.unwrap();
    }
    let next = enqueue(&mut client, acquire("pool").owner("next").wait(secs(60)), 1).await;
    assert_eq!(revoke(&daemon, "pool", 0).await, 3);
    let granted = next.await.unwrap().unwrap();
    client.renew(&granted.lease.unwrap()).await.unwrap();
    assert_eq!(client.inspect("pool").await.unwrap().state(), LeaseState::Held);
}

#[rstest]
#[tokio::test]
async fn a_revocation_of_a_free_or_unknown_key_revokes_nothing(
    #[values(Embedded, MongoDb, Fleet)] backend: Backend,
) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    let lease = client.get_lease(acquire("job")).await.unwrap().lease.unwrap();
    client.give_back(&lease).await.unwrap();
    assert_eq!(revoke(&daemon, "job", 0).await, 0);
    assert_eq!(revoke(&daemon, "unknown", 0).await, 0);
}
