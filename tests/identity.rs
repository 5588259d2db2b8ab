//! Which store answers: the same name from all daemons of one, and another from every other.

use futures_util::StreamExt;
use leased_client::v1;
use mongodb::bson::doc;
use rstest::rstest;
use throwaway_mongodb::Mongod;
use tonic::metadata::MetadataMap;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

use crate::support::exposition::Exposition;
use crate::support::{Asking, Daemon, Embedded, Home, MongoDb, ask, eventually, fetch, http, secs};

fn named(metadata: &MetadataMap) -> String {
    metadata.get("leased-store").expect("the store's identity").to_str().unwrap().to_owned()
}

/// What the store is called in an answer to a unary call.
async fn store_of(daemon: &Daemon) -> String {
    let mut client = daemon.client().await;
    named(client.list(v1::ListRequest::default()).await.unwrap().metadata())
}

#[rstest]
#[tokio::test]
async fn every_answer_names_the_store(#[values(Embedded, MongoDb)] home: Home) {
    let daemon = Daemon::start(home).await;
    let store = store_of(&daemon).await;
    assert_eq!(store.len(), 36);
    let mut client = daemon.client().await;

    let granted = client.acquire(ask("job").ttl(secs(60))).await.unwrap();
    assert_eq!(named(granted.metadata()), store);
    let refused = client.acquire(ask("job")).await.unwrap_err();
    assert_eq!(named(refused.metadata()), store, "a refusal");
    let malformed = client.acquire(ask("")).await.unwrap_err();
    assert_eq!(named(malformed.metadata()), store, "a request that is wrong");
    let large = client.acquire(ask("job").owner(&"x".repeat(100_000))).await.unwrap_err();
    assert_eq!(named(large.metadata()), store, "a message that is too large");

    let stream = client.keep_alive(tokio_stream::pending()).await.unwrap();
    assert_eq!(named(stream.metadata()), store, "a keepalive stream");
    let watch = client.watch(v1::WatchRequest::default()).await.unwrap();
    assert_eq!(named(watch.metadata()), store, "a watch");
    assert!(watch.into_inner().next().await.unwrap().is_ok());

    let mut admin = daemon.admin().await;
    let revoke = v1::RevokeRequest { key: "job".to_owned(), ..v1::RevokeRequest::default() };
    assert_eq!(named(admin.revoke(revoke).await.unwrap().metadata()), store, "the other service");
    let mut health = HealthClient::new(daemon.channel().await);
    let known = health.check(HealthCheckRequest::default()).await.unwrap();
    assert_eq!(named(known.metadata()), store, "the health service");
    let unknown = health.check(HealthCheckRequest { service: "nobody".to_owned() }).await.unwrap_err();
    assert_eq!(named(unknown.metadata()), store, "a refusal of the health service");
}

#[rstest]
#[tokio::test]
async fn the_side_port_and_the_metrics_name_the_store(#[values(Embedded, MongoDb)] home: Home) {
    let daemon = Daemon::start(home).await;
    let store = store_of(&daemon).await;
    let ready = eventually(async || http(daemon.http, "/readyz").await.filter(|said| said.0.contains("200")));
    let (said, kind) = (ready.await.1, if home == Embedded { "embedded" } else { "mongodb" });
    assert!(said.contains(&format!("\nstore={kind} id={store}\n")), "{said}");
    let metrics = Exposition::parse(&fetch(daemon.http, "/metrics").await.unwrap().1).unwrap();
    assert_eq!(metrics.value("leased_build_info", &[("store_id", &store)]), 1.0);
}

#[rstest]
#[tokio::test]
async fn a_store_is_the_same_after_a_restart_and_no_other_is(#[values(Embedded, MongoDb)] home: Home) {
    let daemon = Daemon::start(home).await;
    let store = store_of(&daemon).await;
    let other = Daemon::start(home).await;
    assert_ne!(store_of(&other).await, store);
    assert_eq!(store_of(&daemon.restart().await).await, store);
}

#[tokio::test]
async fn daemons_that_meet_an_empty_database_at_once_agree_on_its_identity() {
    let first = Daemon::start(MongoDb).await;
    let mut location = first.location().clone();
    location.collection = "fresh".to_owned();
    let rules = first.config.rules;
    let connect = || leased::store::mongo::MongoStore::connect(&location, rules);
    let stores = futures_util::future::join_all((0..8).map(|_| connect())).await;
    let ids: std::collections::HashSet<_> =
        stores.into_iter().map(|store| leased::store::Store::id(&store.unwrap())).collect();
    assert_eq!(ids.len(), 1, "{ids:?}");
}

/// A primary may answer while no write of it can last. Fail points are the whole server's, so it is the test's own.
#[tokio::test]
async fn a_daemon_whose_writes_no_majority_acknowledges_is_not_ready() {
    let mongod = Mongod::start().await.unwrap();
    let daemon = Daemon::over(mongod.uri(), |_| {}).await;
    let is = async |code: &str| {
        eventually(async || http(daemon.http, "/readyz").await.filter(|said| said.0.contains(code))).await
    };
    is("200").await;
    let daemons = format!("{}.{}.daemons", daemon.location().database, daemon.location().collection);
    let failure = doc! { "code": 64, "errmsg": "waiting for replication timed out" };
    let data = doc! { "failCommands": ["update"], "namespace": daemons, "writeConcernError": failure };
    let admin = mongodb::Client::with_uri_str(mongod.uri()).await.unwrap().database("admin");
    let fail = doc! { "configureFailPoint": "failCommand", "mode": "alwaysOn", "data": data };
    admin.run_command(fail).await.unwrap();
    let said = is("503").await.1;
    let cause = said.strip_prefix("the store does not answer: a majority has acknowledged no write for ");
    assert!(cause.is_some_and(|cause| cause.contains(" s\nstore=mongodb")), "{said}");
    admin.run_command(doc! { "configureFailPoint": "failCommand", "mode": "off" }).await.unwrap();
    is("200").await;
}
