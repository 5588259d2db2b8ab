//! Lease ids that are released while their call waits, released before their acquire arrives,
//! repeated, or used for a different request.

use std::net::SocketAddr;
use std::sync::Arc;

use leased_client::Reason;
use leased_client::v1::{AcquireRequest, LeaseState, ListRequest, Mode, ReleaseRequest};
use mongodb::bson::doc;
use rstest::rstest;
use throwaway_mongodb::Mongod;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tonic::{Code, Request, Status};
use uuid::Uuid;

use crate::support::relay::Relay;
use crate::support::{
    AcquireBuilder, Acquiring, Backend, Calls, Daemon, Embedded, Fleet, Leases, MongoDb, PATIENCE, acquire,
    enqueue, eventually, named, refusal, secs, until_queued,
};

/// Starts a call that waits with its own lease id, and returns once it is the only waiter.
async fn wait_with(client: &mut Leases, id: Uuid) -> Acquiring {
    enqueue(client, acquire("job").owner("waiter").id(id).wait(secs(60)), 1).await
}

fn assert_lost(status: &Status) {
    assert_eq!(
        (status.code(), refusal(status, "loss")),
        (Code::NotFound, (Some(Reason::LeaseLost), "released".to_owned())),
        "{status:?}"
    );
}

#[rstest]
#[tokio::test]
async fn releasing_the_id_of_a_waiter_ends_its_call_and_removes_its_entry(
    #[values(Embedded, MongoDb, Fleet)] backend: Backend,
) {
    let daemon = Daemon::start(backend).await;
    // In a fleet, these clients may be connected to different daemons.
    let (mut client, mut other) = (daemon.client().await, daemon.client().await);
    let held = client.get_lease(acquire("job").ttl(secs(60))).await.unwrap().lease.unwrap();
    let id = Uuid::new_v4();
    let waiting = wait_with(&mut client, id).await;
    other.give_back(&named("job", id)).await.unwrap();
    other.give_back(&named("job", id)).await.unwrap();
    assert_lost(&timeout(PATIENCE, waiting).await.unwrap().unwrap().unwrap_err());
    assert!(client.inspect("job").await.unwrap().waiters.is_empty());
    client.give_back(&held).await.unwrap();
    assert_eq!(client.inspect("job").await.unwrap().state(), LeaseState::Free);
    for wait in [secs(0), secs(60)] {
        assert_lost(&client.get_lease(acquire("job").id(id).wait(wait)).await.unwrap_err());
    }
}

#[tokio::test]
async fn a_waiter_of_a_drained_daemon_can_be_released_at_another() {
    let one = Daemon::start(MongoDb).await;
    let two = one.sibling().await;
    let (mut at_one, mut at_two) = (one.client().await, two.client().await);
    let held = at_two.get_lease(acquire("job").ttl(secs(60))).await.unwrap().lease.unwrap();
    let id = Uuid::new_v4();
    let waiting = wait_with(&mut at_one, id).await;
    one.stop().await;
    assert_eq!(refusal(&waiting.await.unwrap().unwrap_err(), "").0, Some(Reason::ShuttingDown));
    assert_eq!(
        at_two.inspect("job").await.unwrap().waiters.len(),
        1,
        "the waiter's entry is kept for its caller"
    );
    at_two.give_back(&named("job", id)).await.unwrap();
    at_two.give_back(&held).await.unwrap();
    assert_eq!(at_two.inspect("job").await.unwrap().state(), LeaseState::Free);
}

#[rstest]
#[tokio::test]
async fn an_acquire_that_arrives_after_its_release_is_granted_nothing(
    #[values(Embedded, MongoDb, Fleet)] backend: Backend,
) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    let id = Uuid::new_v4();
    for _ in 0..2 {
        let status = client.give_back(&named("job", id)).await.unwrap_err();
        assert_eq!(
            (status.code(), refusal(&status, "loss")),
            (Code::NotFound, (Some(Reason::LeaseLost), String::new()))
        );
    }
    // A key that was never granted is not shown to callers.
    assert_eq!(refusal(&client.inspect("job").await.unwrap_err(), "").0, Some(Reason::KeyUnknown));
    let everything = ListRequest { include_free: true, ..ListRequest::default() };
    assert!(client.list(everything).await.unwrap().into_inner().leases.is_empty());

    // Many other leases are granted and released before the acquire arrives.
    for _ in 0..20 {
        let lease = client.get_lease(acquire("job")).await.unwrap().lease.unwrap();
        client.give_back(&lease).await.unwrap();
    }
    for wait in [secs(0), secs(60)] {
        assert_lost(&client.get_lease(acquire("job").id(id).wait(wait)).await.unwrap_err());
    }
    assert_eq!(client.inspect("job").await.unwrap().state(), LeaseState::Free);
}

/// Adds the header that says that a call is a retry. gRPC adds it to its own retries, and callers
/// add it to theirs.
fn again<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("grpc-previous-rpc-attempts", "1".parse().unwrap());
    request
}

#[rstest]
#[tokio::test]
async fn a_repeated_id_is_remembered_even_after_many_later_leases(
    #[values(Embedded, MongoDb, Fleet)] backend: Backend,
) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    let [said, seen, given_up] = [(); 3].map(|()| acquire("job").id(Uuid::new_v4()));
    let lease = |request: &AcquireRequest| named("job", request.lease_id.parse().unwrap());
    client.acquire(again(said.clone())).await.unwrap();
    client.give_back(&lease(&said)).await.unwrap();
    client.get_lease(seen.clone()).await.unwrap();
    client.get_lease(seen.clone()).await.unwrap();
    client.give_back(&lease(&seen)).await.unwrap();
    client.get_lease(given_up.clone()).await.unwrap();
    client.release(again(ReleaseRequest { lease: Some(lease(&given_up)) })).await.unwrap();
    for _ in 0..20 {
        let lease = client.get_lease(acquire("job")).await.unwrap().lease.unwrap();
        client.give_back(&lease).await.unwrap();
    }
    for request in [said, seen, given_up] {
        assert_lost(&client.get_lease(request).await.unwrap_err());
    }
}

/// MongoDB applies the command, but reports an unknown outcome. So the daemon repeats the command,
/// although all its releases are done.
#[tokio::test]
async fn shared_holders_are_all_released_although_the_first_reply_is_lost() {
    let mongod = Mongod::start().await.unwrap();
    let daemon = Daemon::over(mongod.uri(), |_| {}).await;
    let mut client = daemon.client().await;
    let mut leases = Vec::new();
    for _ in 0..20 {
        leases.push(client.get_lease(acquire("pool").shared(0).ttl(secs(60))).await.unwrap().lease.unwrap());
    }
    let admin = mongodb::Client::with_uri_str(mongod.uri()).await.unwrap().database("admin");
    let fail = |times: i32, data| doc! { "configureFailPoint": "failCommand", "mode": { "times": times }, "data": data };
    // While the first command is blocked, the other releases collect for the next one.
    let block = doc! { "failCommands": ["findAndModify"], "blockConnection": true, "blockTimeMS": 500 };
    let before = admin.run_command(fail(1, block)).await.unwrap().get_i32("count").unwrap();
    let mut releases = JoinSet::new();
    let mut release = |lease| {
        let mut client = client.clone();
        releases.spawn(async move { client.give_back(&lease).await })
    };
    release(leases.pop().unwrap());
    let is_blocked =
        doc! { "waitForFailPoint": "failCommand", "timesEntered": before + 1, "maxTimeMS": 60_000 };
    admin.run_command(is_blocked).await.unwrap();
    let error = doc! { "code": 64, "errmsg": "waiting for replication timed out" };
    let lose = doc! { "failCommands": ["findAndModify"], "writeConcernError": error };
    admin.run_command(fail(1, lose)).await.unwrap();
    for lease in leases {
        release(lease);
    }
    for released in releases.join_all().await {
        released.unwrap();
    }
    assert_eq!(client.inspect("pool").await.unwrap().state(), LeaseState::Free);
}

/// The daemon sends the acquire's command on a connection that stalls, and then repeats the
/// command. The repetition finds the key held. The first command arrives when the key is free.
#[tokio::test]
async fn a_refused_acquire_holds_nothing_when_its_first_command_arrives_late() {
    let mongod = Mongod::start().await.unwrap();
    let relay = Relay::holding_back("comes late", SocketAddr::from(([127, 0, 0, 1], mongod.port()))).await;
    let uri = format!("mongodb://{}/?directConnection=true", relay.address());
    let daemon = Daemon::over(&uri, |_| {}).await;
    let mut client = daemon.client().await;
    let held = client.get_lease(acquire("job").ttl(secs(60))).await.unwrap().lease.unwrap();
    let refused = client.get_lease(acquire("job").owner("comes late").ttl(secs(60))).await.unwrap_err();
    assert_eq!(refusal(&refused, "").0, Some(Reason::LeaseHeld), "{refused:?}");
    let records = daemon.collection().await;
    let settled = doc! { "_id": "job", "departures.reason": "settled" };
    eventually(async || records.find_one(settled.clone()).await.unwrap()).await;

    client.give_back(&held).await.unwrap();
    relay.deliver().await;
    assert_eq!(
        client.inspect("job").await.unwrap().state(),
        LeaseState::Free,
        "the late command granted a lease"
    );
}

#[rstest]
#[tokio::test]
async fn an_id_in_use_cannot_be_reused_with_another_mode_or_limit(
    #[values(Embedded, MongoDb, Fleet)] backend: Backend,
) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    let shared = acquire("job").shared(3).ttl(secs(60)).id(Uuid::new_v4());
    let granted = client.get_lease(shared.clone()).await.unwrap();
    assert_eq!(granted.mode(), Mode::Shared);
    let exclusive = AcquireRequest { mode: Mode::Exclusive.into(), shared_limit: 0, ..shared.clone() };
    let wider = AcquireRequest { shared_limit: 4, ..shared.clone() };
    for request in [exclusive.clone(), exclusive.wait(secs(60)), wider.clone(), wider.wait(secs(60))] {
        let status = client.get_lease(request).await.unwrap_err();
        assert_eq!(
            (status.code(), refusal(&status, "").0),
            (Code::FailedPrecondition, Some(Reason::IdReused)),
            "{status:?}"
        );
    }
    let expiry = client.inspect("job").await.unwrap().holders[0].expire_time;
    assert_eq!(expiry, granted.expire_time, "the lease is not touched");

    let id = Uuid::new_v4();
    let waiting = wait_with(&mut client, id).await;
    let status = client.get_lease(acquire("job").shared(3).id(id).wait(secs(60))).await.unwrap_err();
    assert_eq!(refusal(&status, "").0, Some(Reason::IdReused), "an id is also in use while it waits");
    until_queued(&mut client, "job", 1).await;
    client.give_back(&granted.lease.unwrap()).await.unwrap();
    assert_eq!(waiting.await.unwrap().unwrap().mode(), Mode::Exclusive);
}

#[rstest]
#[tokio::test]
async fn a_grant_that_is_older_than_the_call_says_waited_and_is_renewed(
    #[values(Embedded, MongoDb, Fleet)] backend: Backend,
) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    let request = acquire("job").ttl(secs(20)).id(Uuid::new_v4());
    let granted = client.get_lease(request.clone()).await.unwrap();
    assert_eq!((granted.waited, granted.remaining), (false, Some(secs(20).try_into().unwrap())));
    // Both calls may fall into one millisecond of the store's clock, and then look like one.
    let again = eventually(async || {
        Some(client.get_lease(request.clone()).await.unwrap()).filter(|again| again.waited)
    })
    .await;
    assert_eq!(again.fencing_token, granted.fencing_token);
    assert_eq!(again.remaining, Some(secs(20).try_into().unwrap()), "the repeated call renews the lease");
}

#[rstest]
#[tokio::test]
async fn the_lowest_shared_limit_binds_all_sharers_and_limits_are_shown(
    #[values(Embedded, MongoDb, Fleet)] backend: Backend,
) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    let narrow = client.get_lease(acquire("pool").shared(1).ttl(secs(60))).await.unwrap().lease.unwrap();
    let status = client.get_lease(acquire("pool").shared(10)).await.unwrap_err();
    assert_eq!(refusal(&status, "blocked_by"), (Some(Reason::LeaseHeld), "limit".to_owned()), "{status:?}");
    let wide = enqueue(&mut client, acquire("pool").shared(10).ttl(secs(60)).wait(secs(60)), 1).await;
    let seen = client.inspect("pool").await.unwrap();
    assert_eq!((seen.holders[0].shared_limit, seen.waiters[0].shared_limit), (1, 10));
    client.give_back(&narrow).await.unwrap();
    wide.await.unwrap().unwrap();
    client.get_lease(acquire("pool").shared(0).ttl(secs(60))).await.unwrap();
    let mut limits: Vec<u32> =
        client.inspect("pool").await.unwrap().holders.iter().map(|holder| holder.shared_limit).collect();
    limits.sort_unstable();
    assert_eq!(limits, [0, 10]);
}

#[rstest]
#[tokio::test]
async fn a_refusal_says_what_blocks_the_key(#[values(Embedded, MongoDb, Fleet)] backend: Backend) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    let reader = client.get_lease(acquire("job").shared(0).ttl(secs(60))).await.unwrap().lease.unwrap();
    let status = client.get_lease(acquire("job")).await.unwrap_err();
    assert_eq!(refusal(&status, "blocked_by").1, "holder", "{status:?}");
    let id = Uuid::new_v4();
    let writer = wait_with(&mut client, id).await;
    let status = client.get_lease(acquire("job").shared(0)).await.unwrap_err();
    assert_eq!(refusal(&status, "blocked_by").1, "waiter", "{status:?}");
    assert_eq!(refusal(&status, "waiter").1, "waiter");
    assert!(status.message().contains("\"waiter\""), "{status:?}");
    client.give_back(&named("job", id)).await.unwrap();
    assert_lost(&writer.await.unwrap().unwrap_err());
    client.give_back(&reader).await.unwrap();

    let early = client.get_lease(acquire("job").min_hold(secs(3600))).await.unwrap().lease.unwrap();
    client.give_back(&early).await.unwrap();
    let status = client.get_lease(acquire("job")).await.unwrap_err();
    assert_eq!(refusal(&status, "blocked_by").1, "min_hold", "{status:?}");
}

#[rstest]
#[tokio::test]
async fn a_revocation_ends_a_min_hold(#[values(Embedded, MongoDb, Fleet)] backend: Backend) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    let revoke = async |fencing_token| {
        let key = "job".to_owned();
        let request = leased_client::v1::RevokeRequest { key, fencing_token, reason: String::new() };
        daemon.admin().await.revoke(request).await.unwrap().into_inner().revoked
    };
    for by_token in [true, false] {
        let granted = client.get_lease(acquire("job").min_hold(secs(86_400)).ttl(secs(60))).await.unwrap();
        client.give_back(&granted.lease.unwrap()).await.unwrap();
        let next = enqueue(&mut client, acquire("job").wait(secs(60)), 1).await;
        assert_eq!(revoke(granted.fencing_token - 1).await, 0, "an older token must not end the block");
        assert_eq!(revoke(if by_token { granted.fencing_token } else { 0 }).await, 1);
        let next = next.await.unwrap().unwrap();
        assert_eq!(revoke(granted.fencing_token).await, 0);
        client.give_back(&next.lease.unwrap()).await.unwrap();
    }
}

/// A key remembers up to 512 ids that were released before their acquire arrived. Further releases
/// are refused, not silently forgotten.
#[rstest]
#[tokio::test]
async fn a_release_that_cannot_be_remembered_is_refused(#[values(Embedded, MongoDb)] backend: Backend) {
    let daemon = Daemon::start(backend).await;
    let client = Arc::new(daemon.client().await);
    let mut releases = JoinSet::new();
    for _ in 0..530 {
        let mut client = Leases::clone(&client);
        releases.spawn(async move { client.give_back(&named("job", Uuid::new_v4())).await.unwrap_err() });
    }
    let mut refused = releases.join_all().await;
    refused.retain(|status| refusal(status, "").0 != Some(Reason::LeaseLost));
    assert_eq!(refused.len(), 530 - 512);
    for status in refused {
        assert_eq!(refusal(&status, "limit"), (Some(Reason::LimitExceeded), "settled_ids".to_owned()));
    }
}
