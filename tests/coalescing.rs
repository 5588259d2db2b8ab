//! Coalescing: a touch that follows another closely is answered without a write. The answer
//! promises only the time that is left of the last write's TTL.

use std::time::Duration;

use leased_client::v1::{LeaseRef, LossReason};
use prost_types::Timestamp;
use rstest::rstest;

use crate::cost::Profile;
use crate::keepalive::{KeepAlive, kept, lost};
use crate::support::{
    AcquireBuilder, Backend, Calls, Daemon, Embedded, Leases, MongoDb, acquire, eventually, ms, secs,
};

/// A TTL in seconds. Touches coalesce for a tenth of it, which is longer than any test.
const LONG: u64 = 3600;

async fn expire_time(client: &mut Leases, key: &str) -> Timestamp {
    client.inspect(key).await.unwrap().holders[0].expire_time.unwrap()
}

async fn long_lease(client: &mut Leases, key: &str) -> LeaseRef {
    client.get_lease(acquire(key).ttl(secs(LONG))).await.unwrap().lease.unwrap()
}

#[rstest]
#[tokio::test]
async fn a_coalesced_touch_is_answered_with_the_remaining_time_and_writes_nothing(
    #[values(Embedded, MongoDb)] backend: Backend,
) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    let lease = long_lease(&mut client, "job").await;
    let mut stream = KeepAlive::open(&mut client).await;
    let first = kept(&stream.touch(std::slice::from_ref(&lease)).await[0].1);
    let written = expire_time(&mut client, "job").await;

    let mut last = first;
    for _ in 0..5 {
        let truth = client.inspect("job").await.unwrap().holders[0].remaining.unwrap();
        let remaining = kept(&stream.touch(&[]).await[0].1);
        assert!(remaining < last, "{remaining:?} after {last:?}");
        // The store's clock is read in whole milliseconds.
        assert!(remaining <= Duration::try_from(truth).unwrap() + ms(1), "{remaining:?} of {truth:?}");
        last = remaining;
    }
    assert_eq!(expire_time(&mut client, "job").await, written);
    // A Touch call never coalesces.
    eventually(async || {
        client.renew(&lease).await.unwrap();
        (expire_time(&mut client, "job").await != written).then_some(())
    })
    .await;
}

#[tokio::test]
async fn messages_that_follow_each_other_closely_take_one_write() {
    let daemon = Daemon::start(MongoDb).await;
    let mut client = daemon.client().await;
    let leases = [long_lease(&mut client, "a").await, long_lease(&mut client, "b").await];
    let mut stream = KeepAlive::open(&mut client).await;
    let profile = Profile::start(&daemon).await;
    for _ in 0..10 {
        kept(&stream.touch(&leases[..1]).await[0].1);
    }
    let commands = profile.stop(&daemon).await;
    assert_eq!(commands.len(), 1, "{commands:?}");

    // If only some leases of a message coalesce, the others are written. The answer keeps the order
    // of the message.
    let written = expire_time(&mut client, "a").await;
    let both = [leases[1].clone(), leases[0].clone(), leases[1].clone()];
    let results = stream.touch(&both).await;
    assert_eq!(results.iter().map(|(lease, _)| lease.clone()).collect::<Vec<_>>(), both);
    let remaining: Vec<_> = results.iter().map(|(_, outcome)| kept(outcome)).collect();
    assert_eq!([remaining[0], remaining[2]], [secs(LONG); 2]);
    assert!(remaining[1] < secs(LONG));
    assert_eq!(expire_time(&mut client, "a").await, written);
}

#[rstest]
#[tokio::test]
async fn after_a_tenth_of_the_ttl_the_lease_is_renewed_again(#[values(Embedded, MongoDb)] backend: Backend) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    let lease = client.get_lease(acquire("job").ttl(secs(20))).await.unwrap().lease.unwrap();
    let mut stream = KeepAlive::open(&mut client).await;
    kept(&stream.touch(std::slice::from_ref(&lease)).await[0].1);
    let written = expire_time(&mut client, "job").await;
    eventually(async || {
        let remaining = kept(&stream.touch(&[]).await[0].1);
        assert!(remaining > secs(10), "{remaining:?}");
        (expire_time(&mut client, "job").await != written).then_some(())
    })
    .await;
}

#[rstest]
#[tokio::test]
async fn with_coalescing_off_every_message_is_written(#[values(Embedded, MongoDb)] backend: Backend) {
    let daemon = Daemon::start_with(backend, |config| config.limits.coalesce_touches = false).await;
    let mut client = daemon.client().await;
    let lease = long_lease(&mut client, "job").await;
    let mut stream = KeepAlive::open(&mut client).await;
    let mut written = expire_time(&mut client, "job").await;
    for _ in 0..3 {
        // The store's clock is read in whole milliseconds, so two writes may look like one.
        written = eventually(async || {
            assert_eq!(kept(&stream.touch(std::slice::from_ref(&lease)).await[0].1), secs(LONG));
            let now = expire_time(&mut client, "job").await;
            (now != written).then_some(now)
        })
        .await;
    }
}

#[rstest]
#[tokio::test]
async fn a_touch_after_a_loss_does_not_coalesce(#[values(Embedded, MongoDb)] backend: Backend) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    let mut stream = KeepAlive::open(&mut client).await;
    for number in 0..20 {
        let key = format!("key/{number}");
        let lease = long_lease(&mut client, &key).await;
        kept(&stream.touch(std::slice::from_ref(&lease)).await[0].1);
        client.give_back(&lease).await.unwrap();
        let sequence = stream.send(std::slice::from_ref(&lease)).await;
        // If the daemon noticed the loss before the message arrived, it has also pushed the loss.
        let mut answer = stream.next().await.unwrap();
        if answer.sequence == 0 {
            assert_eq!(lost(answer.results[0].outcome.as_ref().unwrap()), LossReason::Released);
            answer = stream.next().await.unwrap();
        }
        assert_eq!(answer.sequence, sequence, "the loss is pushed only once");
        assert_eq!(lost(answer.results[0].outcome.as_ref().unwrap()), LossReason::Released);
    }
    assert!(stream.touch(&[]).await.is_empty());
}
