//! Keys that nobody needs any more.

use leased::store::Store;
use leased::store::mongo::MongoStore;
use leased_client::Reason;
use leased_client::v1::LeaseState;

use crate::support::{Asking, Calls, Daemon, MongoDb, ask, eventually, ms, refusal, secs};

#[tokio::test]
async fn keys_long_free_are_forgotten_and_others_are_not() {
    let daemon = Daemon::start(MongoDb).await;
    let mut client = daemon.client().await;
    let store = MongoStore::connect(daemon.location(), daemon.config.rules).await.unwrap();
    let mut free = Vec::new();
    for number in 0..30 {
        let granted = client.get_lease(ask(&format!("free/{number}"))).await.unwrap();
        client.give_back(&granted.lease.unwrap()).await.unwrap();
        free.push(granted.fencing_token);
    }
    client.get_lease(ask("held").ttl(secs(60))).await.unwrap();
    client.get_lease(ask("lapsed").ttl(ms(100))).await.unwrap();
    let blocked = client.get_lease(ask("blocked").min_hold(secs(60))).await.unwrap().lease.unwrap();
    client.give_back(&blocked).await.unwrap();
    eventually(async || client.look("lapsed").await.ok().filter(|seen| seen.state() == LeaseState::Lapsed))
        .await;

    assert_eq!(store.purge(secs(60)).await.unwrap(), 0, "not yet free for so long");
    let mut purged = 0;
    eventually(async || {
        purged += store.purge(ms(100)).await.ok()?;
        // A lease that lapsed goes like a key that was given back.
        (purged == 31).then_some(())
    })
    .await;
    for key in ["held", "blocked"] {
        client.look(key).await.unwrap();
    }
    assert_eq!(refusal(&client.look("free/7").await.unwrap_err(), "").0, Some(Reason::KeyUnknown));
    let again = client.get_lease(ask("free/7")).await.unwrap();
    assert!(again.fencing_token > free[7], "tokens rise over the purge");
}
