//! What calls leave behind that end while the store is away.

use leased_client::Reason;
use leased_client::v1::LeaseState;
use mongodb::bson::{Document, doc};
use mongodb::options::{CollectionOptions, ReadConcern};
use throwaway_mongodb::Mongod;

use crate::metrics::scrape;
use crate::support::{Asking, Calls, Daemon, ask, eventually, refusal, secs};

/// A call may take a second here, so an outage need not last long to be longer than a call and what it leaves behind. Fail
/// points are the whole server's, so it is the test's own.
#[tokio::test]
async fn a_lease_that_no_answer_told_of_is_given_back_after_an_outage_longer_than_calls_may_take() {
    let mut mongod = Mongod::start().await.unwrap();
    let daemon = Daemon::over(mongod.uri(), |config| config.limits.bounds.call = secs(1)).await;
    let mut client = daemon.client().await;
    let admin = mongodb::Client::with_uri_str(mongod.uri()).await.unwrap().database("admin");
    // What a majority has lasts, whatever becomes of the server.
    let lasting = CollectionOptions::builder().read_concern(ReadConcern::majority()).build();
    let name = &daemon.location().collection;
    let records = daemon.database().await.collection_with_options::<Document>(name, lasting);

    // The grant takes effect without being acknowledged, and then the server is away.
    let data = doc! {
        "failCommands": ["findAndModify", "update"],
        "namespace": records.namespace().to_string(),
        "writeConcernError": { "code": 64, "errmsg": "waiting for replication timed out" },
    };
    let fail = doc! { "configureFailPoint": "failCommand", "mode": "alwaysOn", "data": data };
    admin.run_command(fail).await.unwrap();
    let mut caller = client.clone();
    let call = tokio::spawn(async move { caller.get_lease(ask("job").ttl(secs(3600))).await });
    eventually(async || records.find_one(doc! { "_id": "job" }).await.unwrap()).await;
    mongod.kill().unwrap();
    let status = call.await.unwrap().unwrap_err();
    assert_eq!(refusal(&status, "outcome"), (Some(Reason::StoreUnavailable), "unknown".to_owned()));
    assert!(status.message().contains("if the call named one"), "it named none: {status:?}");
    eventually(async || {
        let failed = scrape(&daemon).await.value("leased_store_errors_total", &[("operation", "commit")]);
        (failed >= 2.0).then_some(())
    })
    .await;

    mongod.restart().await.unwrap();
    let free = async || (client.look("job").await.ok()?.state() == LeaseState::Free).then_some(());
    eventually(free).await;
}
