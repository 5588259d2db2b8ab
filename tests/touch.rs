//! Renewing one lease with a Touch call.

use leased_client::Reason;
use leased_client::v1::LeaseState;
use tonic::Code;
use uuid::Uuid;

use rstest::rstest;

use crate::support::{
    AcquireBuilder, Backend, Calls, Daemon, Embedded, Fleet, MongoDb, acquire, eventually, ms, named,
    refusal, secs,
};

#[rstest]
#[tokio::test]
async fn a_touch_renews_the_lease_for_its_whole_ttl(#[values(Embedded, MongoDb, Fleet)] backend: Backend) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    let lease = client.get_lease(acquire("job").ttl(secs(20))).await.unwrap().lease.unwrap();
    let remaining = client.renew(&lease).await.unwrap();
    assert!(remaining <= secs(20) && remaining > secs(15), "{remaining:?}");
}

#[rstest]
#[tokio::test]
async fn a_lapsed_lease_can_be_touched_until_another_holds_the_key(
    #[values(Embedded, MongoDb, Fleet)] backend: Backend,
) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    let granted = client.get_lease(acquire("job").ttl(ms(100))).await.unwrap();
    eventually(async || client.inspect("job").await.ok().filter(|seen| seen.state() == LeaseState::Lapsed))
        .await;
    client.renew(&granted.lease.unwrap()).await.unwrap();
    let seen = client.inspect("job").await.unwrap();
    assert_eq!(seen.fencing_token, granted.fencing_token);
}

#[rstest]
#[tokio::test]
async fn a_displaced_lease_stays_lost_and_its_holder_receives_the_reason(
    #[values(Embedded, MongoDb, Fleet)] backend: Backend,
) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    let lease = client.get_lease(acquire("job").ttl(ms(100))).await.unwrap().lease.unwrap();
    let next = client.get_lease(acquire("job").wait(secs(30))).await.unwrap();
    assert!(next.waited);
    for status in [client.renew(&lease).await.unwrap_err(), client.give_back(&lease).await.unwrap_err()] {
        assert_eq!(status.code(), Code::NotFound);
        assert_eq!(refusal(&status, "loss"), (Some(Reason::LeaseLost), "displaced".to_owned()));
    }
    client.renew(&next.lease.unwrap()).await.unwrap();
}

#[rstest]
#[tokio::test]
async fn a_lease_that_was_never_granted_cannot_be_touched(
    #[values(Embedded, MongoDb, Fleet)] backend: Backend,
) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    let status = client.renew(&named("job", Uuid::new_v4())).await.unwrap_err();
    assert_eq!(refusal(&status, "loss"), (Some(Reason::LeaseLost), String::new()));
    assert_eq!(
        refusal(&client.inspect("job").await.unwrap_err(), "").0,
        Some(Reason::KeyUnknown),
        "the touch has made a record"
    );
}
