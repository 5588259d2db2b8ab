//! Calls that fail during an outage of the store leave no lease.

use leased_client::Reason;
use leased_client::v1::LeaseState;
use mongodb::bson::{Document, doc};
use mongodb::options::{CollectionOptions, ReadConcern};
use throwaway_mongodb::Mongod;

use crate::metrics::scrape;
use crate::support::{AcquireBuilder, Calls, Daemon, acquire, eventually, refusal, secs};

/// Calls may take only one second here, so a short outage already outlasts a call and its cleanup.
/// The test starts its own MongoDB, since fail points affect the whole server.
#[tokio::test]
async fn a_lease_that_was_granted_to_a_failed_call_is_released_after_the_outage() {
    let mut mongod = Mongod::start().await.unwrap();
    let daemon = Daemon::over(mongod.uri(), |config| config.limits.bounds.call = secs(1)).await;
    let mut client = daemon.client().await;
    let admin = mongodb::Client::with_uri_str(mongod.uri()).await.unwrap().database("admin");
    // Reads with majority concern return only writes that survive a crash of the server.
    let lasting = CollectionOptions::builder().read_concern(ReadConcern::majority()).build();
    let name = &daemon.location().collection;
    let records = daemon.database().await.collection_with_options::<Document>(name, lasting);

    // The grant takes effect, but is not acknowledged. Then the server is killed.
    let data = doc! {
        "failCommands": ["findAndModify", "update"],
        "namespace": records.namespace().to_string(),
        "writeConcernError": { "code": 64, "errmsg": "waiting for replication timed out" },
    };
    let fail = doc! { "configureFailPoint": "failCommand", "mode": "alwaysOn", "data": data };
    admin.run_command(fail).await.unwrap();
    let mut caller = client.clone();
    let call = tokio::spawn(async move { caller.get_lease(acquire("job").ttl(secs(3600))).await });
    eventually(async || records.find_one(doc! { "_id": "job" }).await.unwrap()).await;
    mongod.kill().unwrap();
    let status = call.await.unwrap().unwrap_err();
    assert_eq!(refusal(&status, "outcome"), (Some(Reason::StoreUnavailable), "unknown".to_owned()));
    assert!(
        status.message().contains("if the call named one"),
        "the message depends on whether the call named an id: {status:?}"
    );
    eventually(async || {
        let failed = scrape(&daemon).await.value("leased_store_errors_total", &[("operation", "commit")]);
        (failed >= 2.0).then_some(())
    })
    .await;

    mongod.restart().await.unwrap();
    let free = async || (client.inspect("job").await.ok()?.state() == LeaseState::Free).then_some(());
    eventually(free).await;
}
