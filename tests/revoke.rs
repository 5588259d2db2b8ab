//! Taking leases away.

use leased_client::v1::RevokeRequest;
use leased_client::v1::{LeaseState, LossReason};

use crate::keepalive::KeepAlive;
use rstest::rstest;

use crate::support::{Asking, Calls, Daemon, Embedded, Fleet, Home, MongoDb, ask, line_of, refusal, secs};

pub(crate) async fn revoke(daemon: &Daemon, key: &str, fencing_token: i64) -> i32 {
    let request = RevokeRequest { key: key.to_owned(), fencing_token, reason: "a test".to_owned() };
    daemon.admin().await.revoke(request).await.unwrap().into_inner().revoked
}

#[rstest]
#[tokio::test]
async fn a_revoked_holder_is_told_and_the_next_in_line_has_the_key(
    #[values(Embedded, MongoDb, Fleet)] home: Home,
) {
    let daemon = Daemon::start(home).await;
    let mut client = daemon.client().await;
    let granted = client.get_lease(ask("job").ttl(secs(60))).await.unwrap();
    let lease = granted.lease.unwrap();
    let mut stream = KeepAlive::open(&mut client).await;
    stream.touch(std::slice::from_ref(&lease)).await;
    let mut waiting = client.clone();
    let next = tokio::spawn(async move { waiting.get_lease(ask("job").owner("next").wait(secs(60))).await });
    line_of(&mut client, "job", 1).await;

    assert_eq!(revoke(&daemon, "job", granted.fencing_token - 1).await, 0, "a stale token changes nothing");
    client.renew(&lease).await.unwrap();
    assert_eq!(revoke(&daemon, "job", granted.fencing_token).await, 1);
    assert!(next.await.unwrap().unwrap().waited);
    assert_eq!(stream.told().await, [(lease.clone(), LossReason::Revoked)]);
    assert_eq!(refusal(&client.renew(&lease).await.unwrap_err(), "loss").1, "revoked");
    assert_eq!(refusal(&client.give_back(&lease).await.unwrap_err(), "loss").1, "revoked");
}

#[rstest]
#[tokio::test]
async fn without_a_token_every_holder_goes_but_not_who_comes_after(
    #[values(Embedded, MongoDb, Fleet)] home: Home,
) {
    let daemon = Daemon::start(home).await;
    let mut client = daemon.client().await;
    for _ in 0..3 {
        client.get_lease(ask("pool").shared(3).ttl(secs(60))).await.unwrap();
    }
    let mut waiting = client.clone();
    let next = tokio::spawn(async move { waiting.get_lease(ask("pool").owner("next").wait(secs(60))).await });
    line_of(&mut client, "pool", 1).await;
    assert_eq!(revoke(&daemon, "pool", 0).await, 3);
    let granted = next.await.unwrap().unwrap();
    client.renew(&granted.lease.unwrap()).await.unwrap();
    assert_eq!(client.look("pool").await.unwrap().state(), LeaseState::Held);
}

#[rstest]
#[tokio::test]
async fn there_is_nothing_to_revoke_on_a_free_or_unknown_key(#[values(Embedded, MongoDb, Fleet)] home: Home) {
    let daemon = Daemon::start(home).await;
    let mut client = daemon.client().await;
    let lease = client.get_lease(ask("job")).await.unwrap().lease.unwrap();
    client.give_back(&lease).await.unwrap();
    assert_eq!(revoke(&daemon, "job", 0).await, 0);
    assert_eq!(revoke(&daemon, "unknown", 0).await, 0);
}
