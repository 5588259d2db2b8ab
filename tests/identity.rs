//! The identity of the store: all daemons of one store report the same id, and every other store
//! has a different one.

use futures_util::StreamExt;
use leased_client::v1;
use mongodb::bson::doc;
use rstest::rstest;
use throwaway_mongodb::Mongod;
use tonic::metadata::MetadataMap;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

use crate::support::exposition::Exposition;
use crate::support::{
    AcquireBuilder, Backend, Daemon, Embedded, MongoDb, acquire, eventually, fetch, http, secs,
};

/// Returns the store id in the metadata of an answer.
fn id_in(metadata: &MetadataMap) -> String {
    metadata.get("leased-store").expect("the store's identity").to_str().unwrap().to_owned()
}

/// Returns the store id that the daemon sends with the answer to a unary call.
async fn store_of(daemon: &Daemon) -> String {
    let mut client = daemon.client().await;
    id_in(client.list(v1::ListRequest::default()).await.unwrap().metadata())
}

#[rstest]
#[tokio::test]
async fn every_answer_names_the_store(#[values(Embedded, MongoDb)] backend: Backend) {
    let daemon = Daemon::start(backend).await;
    let store = store_of(&daemon).await;
    assert_eq!(store.len(), 36);
    let mut client = daemon.client().await;

    let granted = client.acquire(acquire("job").ttl(secs(60))).await.unwrap();
    assert_eq!(id_in(granted.metadata()), store);
    let refused = client.acquire(acquire("job")).await.unwrap_err();
    assert_eq!(id_in(refused.metadata()), store, "a refusal");
    let malformed = client.acquire(acquire("")).await.unwrap_err();
    assert_eq!(id_in(malformed.metadata()), store, "an invalid request");
    let large = client.acquire(acquire("job").owner(&"x".repeat(100_000))).await.unwrap_err();
    assert_eq!(id_in(large.metadata()), store, "a message that is too large");

    let stream = client.keep_alive(tokio_stream::pending()).await.unwrap();
    assert_eq!(id_in(stream.metadata()), store, "a keepalive stream");
    let watch = client.watch(v1::WatchRequest::default()).await.unwrap();
    assert_eq!(id_in(watch.metadata()), store, "a watch");
    assert!(watch.into_inner().next().await.unwrap().is_ok());

    let mut admin = daemon.admin().await;
    let revoke = v1::RevokeRequest { key: "job".to_owned(), ..v1::RevokeRequest::default() };
    assert_eq!(id_in(admin.revoke(revoke).await.unwrap().metadata()), store, "the admin service");
    let mut health = HealthClient::new(daemon.channel().await);
    let serving = health.check(HealthCheckRequest::default()).await.unwrap();
    assert_eq!(id_in(serving.metadata()), store, "the health service");
    let unknown = health.check(HealthCheckRequest { service: "nobody".to_owned() }).await.unwrap_err();
    assert_eq!(id_in(unknown.metadata()), store, "a refusal of the health service");
}

#[rstest]
#[tokio::test]
async fn the_http_port_and_the_metrics_name_the_store(#[values(Embedded, MongoDb)] backend: Backend) {
    let daemon = Daemon::start(backend).await;
    let store = store_of(&daemon).await;
    let ready = eventually(async || http(daemon.http, "/readyz").await.filter(|said| said.0.contains("200")));
    let (said, kind) = (ready.await.1, if backend == Embedded { "embedded" } else { "mongodb" });
    assert!(said.contains(&format!("\nstore={kind} id={store}\n")), "{said}");
    let metrics = Exposition::parse(&fetch(daemon.http, "/metrics").await.unwrap().1).unwrap();
    assert_eq!(metrics.value("leased_build_info", &[("store_id", &store)]), 1.0);
}

#[rstest]
#[tokio::test]
async fn a_store_keeps_its_id_over_a_restart_and_no_other_store_has_it(
    #[values(Embedded, MongoDb)] backend: Backend,
) {
    let daemon = Daemon::start(backend).await;
    let store = store_of(&daemon).await;
    let other = Daemon::start(backend).await;
    assert_ne!(store_of(&other).await, store);
    assert_eq!(store_of(&daemon.restart().await).await, store);
}

#[tokio::test]
async fn daemons_that_open_an_empty_database_at_once_agree_on_its_id() {
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

/// A primary may answer although none of its writes can reach a majority. The test starts its own
/// MongoDB, since fail points affect the whole server.
#[tokio::test]
async fn a_daemon_whose_writes_no_majority_acknowledges_is_not_ready() {
    let mongod = Mongod::start().await.unwrap();
    let daemon = Daemon::over(mongod.uri(), |_| {}).await;
    let until_ready_is = async |code: &str| {
        eventually(async || http(daemon.http, "/readyz").await.filter(|said| said.0.contains(code))).await
    };
    until_ready_is("200").await;
    let daemons = format!("{}.{}.daemons", daemon.location().database, daemon.location().collection);
    let failure = doc! { "code": 64, "errmsg": "waiting for replication timed out" };
    let data = doc! { "failCommands": ["update"], "namespace": daemons, "writeConcernError": failure };
    let admin = mongodb::Client::with_uri_str(mongod.uri()).await.unwrap().database("admin");
    let fail = doc! { "configureFailPoint": "failCommand", "mode": "alwaysOn", "data": data };
    admin.run_command(fail).await.unwrap();
    let said = until_ready_is("503").await.1;
    let cause = said.strip_prefix("the store does not answer: no majority has acknowledged a write for ");
    assert!(cause.is_some_and(|cause| cause.contains(" s\nstore=mongodb")), "{said}");
    admin.run_command(doc! { "configureFailPoint": "failCommand", "mode": "off" }).await.unwrap();
    until_ready_is("200").await;
}
