//! Releasing a lease, and the waiter that is granted the key next.

use leased_client::Reason;
use leased_client::v1::LeaseState;
use tonic::Code;
use uuid::Uuid;

use rstest::rstest;

use crate::support::{
    AcquireBuilder, Backend, Calls, Daemon, Embedded, Fleet, MongoDb, acquire, enqueue, named, refusal, secs,
};

#[rstest]
#[tokio::test]
async fn a_release_frees_the_key_and_may_be_repeated(#[values(Embedded, MongoDb, Fleet)] backend: Backend) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    let lease = client.get_lease(acquire("job")).await.unwrap().lease.unwrap();
    client.give_back(&lease).await.unwrap();
    assert_eq!(client.inspect("job").await.unwrap().state(), LeaseState::Free);
    client.give_back(&lease).await.unwrap();

    let next = client.get_lease(acquire("job")).await.unwrap().lease.unwrap();
    client.give_back(&lease).await.unwrap();
    client.renew(&next).await.unwrap();
}

#[rstest]
#[tokio::test]
async fn an_id_that_never_held_a_lease_releases_nothing(
    #[values(Embedded, MongoDb, Fleet)] backend: Backend,
) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    let held = client.get_lease(acquire("job")).await.unwrap().lease.unwrap();
    for stranger in [named("job", Uuid::new_v4()), named("never leased", Uuid::new_v4())] {
        let status = client.give_back(&stranger).await.unwrap_err();
        assert_eq!(
            (status.code(), refusal(&status, "loss")),
            (Code::NotFound, (Some(Reason::LeaseLost), String::new()))
        );
    }
    client.renew(&held).await.unwrap();
    assert_eq!(refusal(&client.inspect("never leased").await.unwrap_err(), "").0, Some(Reason::KeyUnknown));
}

#[rstest]
#[tokio::test]
async fn the_next_waiter_holds_the_key_when_a_release_returns(
    #[values(Embedded, MongoDb, Fleet)] backend: Backend,
) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    let lease = client.get_lease(acquire("job")).await.unwrap().lease.unwrap();
    let waiter = enqueue(&mut client, acquire("job").owner("next").wait(secs(30)), 1).await;
    client.give_back(&lease).await.unwrap();
    let seen = client.inspect("job").await.unwrap();
    assert_eq!((seen.state(), seen.holders[0].owner.as_str()), (LeaseState::Held, "next"));
    let granted = waiter.await.unwrap().unwrap();
    assert!(granted.waited);
    assert_eq!(granted.fencing_token, seen.fencing_token);
}
