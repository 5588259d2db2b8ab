//! Renewing one lease.

use leased_client::Reason;
use leased_client::v1::LeaseState;
use tonic::Code;
use uuid::Uuid;

use rstest::rstest;

use crate::support::{
    Asking, Calls, Daemon, Embedded, Fleet, Home, MongoDb, ask, eventually, ms, named, refusal, secs,
};

#[rstest]
#[tokio::test]
async fn a_touch_gives_the_whole_ttl_again(#[values(Embedded, MongoDb, Fleet)] home: Home) {
    let daemon = Daemon::start(home).await;
    let mut client = daemon.client().await;
    let lease = client.get_lease(ask("job").ttl(secs(20))).await.unwrap().lease.unwrap();
    let remaining = client.renew(&lease).await.unwrap();
    assert!(remaining <= secs(20) && remaining > secs(15), "{remaining:?}");
}

#[rstest]
#[tokio::test]
async fn a_lapsed_lease_that_nobody_took_is_touched_back_to_life(
    #[values(Embedded, MongoDb, Fleet)] home: Home,
) {
    let daemon = Daemon::start(home).await;
    let mut client = daemon.client().await;
    let granted = client.get_lease(ask("job").ttl(ms(100))).await.unwrap();
    eventually(async || client.look("job").await.ok().filter(|seen| seen.state() == LeaseState::Lapsed))
        .await;
    client.renew(&granted.lease.unwrap()).await.unwrap();
    let seen = client.look("job").await.unwrap();
    assert_eq!(seen.fencing_token, granted.fencing_token);
}

#[rstest]
#[tokio::test]
async fn a_displaced_lease_is_gone_for_good_and_its_holder_is_told_why(
    #[values(Embedded, MongoDb, Fleet)] home: Home,
) {
    let daemon = Daemon::start(home).await;
    let mut client = daemon.client().await;
    let lease = client.get_lease(ask("job").ttl(ms(100))).await.unwrap().lease.unwrap();
    let next = client.get_lease(ask("job").wait(secs(30))).await.unwrap();
    assert!(next.waited);
    for status in [client.renew(&lease).await.unwrap_err(), client.give_back(&lease).await.unwrap_err()] {
        assert_eq!(status.code(), Code::NotFound);
        assert_eq!(refusal(&status, "loss"), (Some(Reason::LeaseLost), "displaced".to_owned()));
    }
    client.renew(&next.lease.unwrap()).await.unwrap();
}

#[rstest]
#[tokio::test]
async fn a_lease_that_never_was_cannot_be_touched(#[values(Embedded, MongoDb, Fleet)] home: Home) {
    let daemon = Daemon::start(home).await;
    let mut client = daemon.client().await;
    let status = client.renew(&named("job", Uuid::new_v4())).await.unwrap_err();
    assert_eq!(refusal(&status, "loss"), (Some(Reason::LeaseLost), String::new()));
    assert_eq!(
        refusal(&client.look("job").await.unwrap_err(), "").0,
        Some(Reason::KeyUnknown),
        "no record is made"
    );
}
