//! A damaged record among healthy ones. Only its own key fails.

use leased_client::Reason;
use leased_client::v1::keep_alive_result::Outcome;
use leased_client::v1::watch_response::Event;
use leased_client::v1::{
    GetRequest, LeaseRef, ListRequest, RefusalReason, RevokeRequest, TouchRequest, WatchRequest,
};
use mongodb::bson::{Document, doc};
use rstest::rstest;
use tonic::{Code, Status};

use crate::keepalive::{KeepAlive, kept};
use crate::metrics::scrape;
use crate::support::{
    AcquireBuilder, Calls, Daemon, MongoDb, acquire, eventually, refusal, secs, until_queued,
};

const KEYS: [&str; 5] = ["a", "b", "c", "d", "e"];
const DAMAGED: &str = "c";

/// Returns changes to a record's fields, each of which makes the record unreadable.
fn damages() -> Vec<Document> {
    vec![
        doc! { "holders": "nobody" },
        doc! { "holders": [{ "name": "not ours" }] },
        doc! { "waiters": 7 },
        doc! { "token": "seven" },
        doc! { "departures": [{ "reason": "bored" }] },
        doc! { "rev": "new" },
    ]
}

fn assert_unreadable<T: std::fmt::Debug>(answer: Result<T, Status>) {
    let status = answer.unwrap_err();
    assert_eq!(status.code(), Code::DataLoss, "{status:?}");
    assert_eq!(refusal(&status, "").0, Some(Reason::RecordUnreadable), "{status:?}");
}

#[rstest]
#[tokio::test]
async fn a_damaged_record_fails_only_its_own_key(#[values(0, 1, 2, 3, 4, 5)] damage: usize) {
    let daemon = Daemon::start(MongoDb).await;
    let mut client = daemon.client().await;
    let mut leases: Vec<LeaseRef> = Vec::new();
    for key in KEYS {
        leases.push(client.get_lease(acquire(key).ttl(secs(600))).await.unwrap().lease.unwrap());
    }
    let set = doc! { "$set": damages().swap_remove(damage) };
    daemon.collection().await.update_one(doc! { "_id": DAMAGED }, set).await.unwrap();

    // The first message names the damaged key among others. The second names none, and so touches
    // all leases that the stream tracks.
    let mut stream = KeepAlive::open(&mut client).await;
    for named in [&leases[..], &[]] {
        let results = stream.touch(named).await;
        assert_eq!(results.len(), KEYS.len());
        for (lease, outcome) in &results {
            match outcome {
                Outcome::Refused(refused) if lease.key == DAMAGED => {
                    assert_eq!(refused.reason(), RefusalReason::Unreadable);
                }
                outcome => assert!(kept(outcome) > secs(1), "{}", lease.key),
            }
        }
    }

    assert_unreadable(client.get_lease(acquire(DAMAGED)).await);
    assert_unreadable(client.get_lease(acquire(DAMAGED).wait(secs(60))).await);
    assert_unreadable(client.get(GetRequest { key: DAMAGED.to_owned() }).await);
    assert_unreadable(client.touch(TouchRequest { lease: Some(leases[2].clone()) }).await);
    assert_unreadable(client.give_back(&leases[2]).await);
    let revoke = RevokeRequest { key: DAMAGED.to_owned(), ..RevokeRequest::default() };
    assert_unreadable(daemon.admin().await.revoke(revoke).await);

    let others: Vec<&str> = KEYS.into_iter().filter(|key| *key != DAMAGED).collect();
    let listed = client.list(ListRequest { include_free: true, ..ListRequest::default() }).await.unwrap();
    let listed: Vec<String> = listed.into_inner().leases.into_iter().map(|lease| lease.key).collect();
    assert_eq!(listed, others);
    let mut watch = client.watch(WatchRequest::default()).await.unwrap().into_inner();
    for key in others {
        let event = watch.message().await.unwrap().unwrap().event;
        assert!(matches!(&event, Some(Event::Snapshot(lease)) if lease.key == key), "{event:?}");
    }
    let event = watch.message().await.unwrap().unwrap().event;
    assert!(matches!(event, Some(Event::SnapshotEnd(_))), "{event:?}");
    client.give_back(&leases[0]).await.unwrap();
    let event = watch.message().await.unwrap().unwrap().event;
    assert!(
        matches!(&event, Some(Event::Change(change)) if change.lease.as_ref().unwrap().key == "a"),
        "{event:?}"
    );

    let metrics = scrape(&daemon).await;
    let labels = [("store", "mongodb"), ("operation", "commit"), ("kind", "unreadable")];
    assert!(metrics.value("leased_store_errors_total", &labels) >= 1.0);
}

#[tokio::test]
async fn waiters_of_other_keys_are_refreshed_although_a_record_is_damaged() {
    let daemon = Daemon::start(MongoDb).await;
    let mut client = daemon.client().await;
    let held = client.get_lease(acquire("a").ttl(secs(600))).await.unwrap().lease.unwrap();
    client.get_lease(acquire(DAMAGED).ttl(secs(600))).await.unwrap();
    let wait = |key: &str| {
        let (mut client, call) = (client.clone(), acquire(key).ttl(secs(600)).wait(secs(600)));
        tokio::spawn(async move { client.get_lease(call).await })
    };
    let (healthy, damaged) = (wait("a"), wait(DAMAGED));
    until_queued(&mut client, "a", 1).await;
    until_queued(&mut client, DAMAGED, 1).await;
    let collection = daemon.collection().await;
    collection.update_one(doc! { "_id": DAMAGED }, doc! { "$set": { "token": "seven" } }).await.unwrap();
    // A waiter entry lapses after 15 s. The daemon refreshes the entries of both keys in one batch.
    let expiry = async || {
        let found = collection.find_one(doc! { "_id": "a" }).await.unwrap().unwrap();
        *found.get_array("waiters").unwrap()[0].as_document().unwrap().get_datetime("expires_at").unwrap()
    };
    let before = expiry().await;
    eventually(async || (expiry().await > before).then_some(())).await;
    client.give_back(&held).await.unwrap();
    healthy.await.unwrap().unwrap();
    damaged.abort();
}
