//! A store that fails, a record that is deleted, a daemon that restarts.

use std::time::Duration;

use leased::store::mongo::{ConnectError, MongoStore, Unusable};
use leased_client::Reason;
use leased_client::v1::{LeaseState, LossReason};
use mongodb::bson::doc;
use rstest::rstest;
use throwaway_mongodb::Mongod;
use tokio::time::{Instant, sleep, timeout};
use tonic::Code;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use uuid::Uuid;

use crate::keepalive::{KeepAlive, kept};
use crate::support::{
    AcquireBuilder, Backend, Calls, Daemon, Embedded, MongoDb, PATIENCE, acquire, enqueue, eventually, ms,
    refusal, secs,
};

#[tokio::test]
async fn a_store_that_is_paused_for_five_seconds_loses_no_lease() {
    let mongod = Mongod::start().await.unwrap();
    let daemon = Daemon::over(mongod.uri(), |config| config.limits.coalesce_touches = false).await;
    let mut client = daemon.client().await;
    let lease = client.get_lease(acquire("held").ttl(secs(60))).await.unwrap().lease.unwrap();
    let mut stream = KeepAlive::open(&mut client).await;
    kept(&stream.touch(std::slice::from_ref(&lease)).await[0].1);
    let waiter = enqueue(&mut client, acquire("held").wait(secs(120)), 1).await;

    mongod.pause().unwrap();
    let stopped = Instant::now();
    let sequence = stream.send(&[]).await;
    let status = client.get_lease(acquire("other").id(Uuid::new_v4())).await.unwrap_err();
    assert_eq!((status.code(), refusal(&status, "").0), (Code::Unavailable, Some(Reason::StoreUnavailable)));
    assert!(stopped.elapsed() < secs(8), "the call's deadline has passed: {:?}", stopped.elapsed());
    let mut health = HealthClient::new(daemon.channel().await);
    assert_eq!(
        health.check(HealthCheckRequest::default()).await.unwrap().into_inner().status(),
        ServingStatus::NotServing
    );
    sleep(Duration::from_secs(5).saturating_sub(stopped.elapsed())).await;
    mongod.resume().unwrap();

    // The stream is still open, the message that was in flight is answered, and the waiter is still
    // queued.
    let answer = stream.next().await.unwrap();
    assert_eq!(answer.sequence, sequence);
    kept(answer.results[0].outcome.as_ref().unwrap());
    eventually(async || client.get_lease(acquire("after")).await.ok()).await;
    client.give_back(&lease).await.unwrap();
    assert!(timeout(PATIENCE, waiter).await.unwrap().unwrap().unwrap().waited);
}

/// Each fail point makes MongoDB fail in a different way: before the write, after it, or by closing
/// the connection.
#[tokio::test]
async fn the_daemon_resolves_an_unknown_outcome_before_it_answers() {
    let mongod = Mongod::start().await.unwrap();
    let daemon = Daemon::over(mongod.uri(), |_| {}).await;
    let mut client = daemon.client().await;
    let admin = mongodb::Client::with_uri_str(mongod.uri()).await.unwrap().database("admin");
    for failure in [
        doc! { "errorCode": 189 },   // PrimarySteppedDown
        doc! { "errorCode": 10107 }, // NotWritablePrimary
        doc! { "errorCode": 50 },    // MaxTimeMSExpired
        doc! { "closeConnection": true },
        doc! { "writeConcernError": { "code": 64, "errmsg": "waiting for replication timed out" } },
    ] {
        let mut data = failure.clone();
        data.insert("failCommands", ["findAndModify"]);
        let times = doc! { "times": 2 };
        admin
            .run_command(doc! { "configureFailPoint": "failCommand", "mode": times, "data": data })
            .await
            .unwrap();
        let granted = client.get_lease(acquire("job").id(Uuid::new_v4()).ttl(secs(60))).await;
        let granted = granted.unwrap_or_else(|status| panic!("{failure:?}: {status:?}"));
        let seen = client.inspect("job").await.unwrap();
        assert_eq!(seen.holders.len(), 1, "{failure:?}");
        assert_eq!(seen.fencing_token, granted.fencing_token, "{failure:?}: one acquisition, one token");
        client.give_back(&granted.lease.unwrap()).await.unwrap();
    }
}

#[tokio::test]
async fn a_store_that_is_killed_and_restarted_has_every_acknowledged_lease() {
    let mut mongod = Mongod::start().await.unwrap();
    let daemon = Daemon::over(mongod.uri(), |_| {}).await;
    let mut client = daemon.client().await;
    let mut leases = Vec::new();
    for number in 0..50 {
        leases.push(client.get_lease(acquire(&format!("key/{number}")).ttl(secs(120))).await.unwrap());
    }
    mongod.kill().unwrap();
    let status = client.renew(leases[0].lease.as_ref().unwrap()).await.unwrap_err();
    assert_eq!(refusal(&status, "").0, Some(Reason::StoreUnavailable));
    mongod.restart().await.unwrap();
    for granted in leases {
        let lease = granted.lease.unwrap();
        eventually(async || client.renew(&lease).await.ok()).await;
        assert_eq!(client.inspect(&lease.key).await.unwrap().fencing_token, granted.fencing_token);
    }
}

#[tokio::test]
async fn deleting_a_record_loses_its_lease_but_not_its_waiter_or_the_order_of_tokens() {
    let daemon = Daemon::start(MongoDb).await;
    let mut client = daemon.client().await;
    let granted = client.get_lease(acquire("job").ttl(secs(60))).await.unwrap();
    let lease = granted.lease.unwrap();
    let mut stream = KeepAlive::open(&mut client).await;
    kept(&stream.touch(std::slice::from_ref(&lease)).await[0].1);
    let waiter = enqueue(&mut client, acquire("job").wait(secs(60)), 1).await;

    daemon.collection().await.delete_one(doc! { "_id": "job" }).await.unwrap();
    assert_eq!(stream.reported().await, [(lease, LossReason::Gone)]);
    let next = timeout(PATIENCE, waiter).await.unwrap().unwrap().unwrap();
    assert!(
        next.fencing_token > granted.fencing_token,
        "the waiter is queued again, and tokens go on rising"
    );
}

#[tokio::test]
async fn databases_on_which_leases_are_not_safe_are_refused() {
    let daemon = Daemon::start(MongoDb).await;
    let connect = async |change: &dyn Fn(&mut leased::store::mongo::Location)| {
        let mut location = daemon.location().clone();
        change(&mut location);
        match MongoStore::connect(&location, daemon.config.rules).await {
            Err(ConnectError::Unusable(why)) => why,
            other => panic!("{other:?}"),
        }
    };
    for weak in ["w=1", "w=0", "w=2", "journal=false", "w=nearby"] {
        let why = connect(&|location| location.uri = format!("{}&{weak}", location.uri)).await;
        assert!(matches!(why, Unusable::WeakWrites(..)), "{weak}: {why}");
    }
    let why = connect(&|location| location.uri = "mongodb:/nonsense".to_owned()).await;
    assert!(matches!(why, Unusable::Uri(_)), "{why}");

    let database = daemon.database().await;
    let index = mongodb::IndexModel::builder()
        .keys(doc! { "at": 1 })
        .options(mongodb::options::IndexOptions::builder().expire_after(secs(60)).build())
        .build();
    database.collection::<mongodb::bson::Document>("expiring").create_index(index).await.unwrap();
    let why = connect(&|location| location.collection = "expiring".to_owned()).await;
    assert!(matches!(why, Unusable::TtlIndex(_)), "{why}");

    let caseless = mongodb::options::Collation::builder().locale("en").build();
    database.create_collection("caseless").collation(caseless).await.unwrap();
    let why = connect(&|location| location.collection = "caseless".to_owned()).await;
    assert_eq!(why, Unusable::Collation);
}

#[tokio::test]
async fn a_standalone_server_is_refused_with_advice_to_make_it_a_replica_set() {
    let mongod = Mongod::standalone().await.unwrap();
    let daemon = Daemon::start(MongoDb).await;
    let mut location = daemon.location().clone();
    location.uri = mongod.uri().to_owned();
    let error = MongoStore::connect(&location, daemon.config.rules).await.unwrap_err().to_string();
    assert!(error.contains("--replSet") && error.contains("rs.initiate()"), "{error}");
}

#[rstest]
#[tokio::test]
async fn leases_survive_the_restart_of_their_only_daemon(#[values(Embedded, MongoDb)] backend: Backend) {
    let daemon = Daemon::start(backend).await;
    let granted = daemon.client().await.get_lease(acquire("job").ttl(secs(60))).await.unwrap();
    let daemon = daemon.restart().await;
    let mut client = daemon.client().await;
    let seen = client.inspect("job").await.unwrap();
    assert_eq!((seen.state(), seen.fencing_token), (LeaseState::Held, granted.fencing_token));
    let lease = granted.lease.unwrap();
    client.renew(&lease).await.unwrap();
    assert!(client.get_lease(acquire("job").wait(ms(100))).await.is_err());
    client.give_back(&lease).await.unwrap();
    assert!(client.get_lease(acquire("job")).await.unwrap().fencing_token > granted.fencing_token);
}
