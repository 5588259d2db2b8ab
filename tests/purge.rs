//! Purges keys that have long been unused.

use leased::store::Store;
use leased::store::mongo::MongoStore;
use leased_client::Reason;
use leased_client::v1::LeaseState;

use crate::support::{AcquireBuilder, Calls, Daemon, MongoDb, acquire, eventually, ms, refusal, secs};

#[tokio::test]
async fn only_keys_that_have_long_been_unused_are_purged() {
    let daemon = Daemon::start(MongoDb).await;
    let mut client = daemon.client().await;
    let store = MongoStore::connect(daemon.location(), daemon.config.rules).await.unwrap();
    let mut free = Vec::new();
    for number in 0..30 {
        let granted = client.get_lease(acquire(&format!("free/{number}"))).await.unwrap();
        client.give_back(&granted.lease.unwrap()).await.unwrap();
        free.push(granted.fencing_token);
    }
    client.get_lease(acquire("held").ttl(secs(60))).await.unwrap();
    client.get_lease(acquire("lapsed").ttl(ms(100))).await.unwrap();
    let blocked = client.get_lease(acquire("blocked").min_hold(secs(60))).await.unwrap().lease.unwrap();
    client.give_back(&blocked).await.unwrap();
    eventually(async || {
        client.inspect("lapsed").await.ok().filter(|seen| seen.state() == LeaseState::Lapsed)
    })
    .await;

    assert_eq!(store.purge(secs(60)).await.unwrap(), 0, "no key has been free for a minute yet");
    let mut purged = 0;
    eventually(async || {
        purged += store.purge(ms(100)).await.ok()?;
        // The 31 keys are the 30 that were released and the one whose lease has lapsed.
        (purged == 31).then_some(())
    })
    .await;
    for key in ["held", "blocked"] {
        client.inspect(key).await.unwrap();
    }
    assert_eq!(refusal(&client.inspect("free/7").await.unwrap_err(), "").0, Some(Reason::KeyUnknown));
    let again = client.get_lease(acquire("free/7")).await.unwrap();
    assert!(again.fencing_token > free[7], "tokens rise over the purge");
}
