//! Touches that memory does for: fewer writes, never a longer promise.

use std::time::Duration;

use leased_client::v1::{LeaseRef, LossReason};
use prost_types::Timestamp;
use rstest::rstest;

use crate::cost::Profile;
use crate::keepalive::{KeepAlive, kept, lost};
use crate::support::{Asking, Calls, Daemon, Embedded, Home, Leases, MongoDb, ask, eventually, ms, secs};

/// A tenth of it is longer than any test.
const LONG: u64 = 3600;

async fn expire_time(client: &mut Leases, key: &str) -> Timestamp {
    client.look(key).await.unwrap().holders[0].expire_time.unwrap()
}

async fn long_lease(client: &mut Leases, key: &str) -> LeaseRef {
    client.get_lease(ask(key).ttl(secs(LONG))).await.unwrap().lease.unwrap()
}

#[rstest]
#[tokio::test]
async fn a_touch_right_after_another_is_answered_with_what_is_left_and_writes_nothing(
    #[values(Embedded, MongoDb)] home: Home,
) {
    let daemon = Daemon::start(home).await;
    let mut client = daemon.client().await;
    let lease = long_lease(&mut client, "job").await;
    let mut stream = KeepAlive::open(&mut client).await;
    let first = kept(&stream.touch(std::slice::from_ref(&lease)).await[0].1);
    let written = expire_time(&mut client, "job").await;

    let mut last = first;
    for _ in 0..5 {
        let truth = client.look("job").await.unwrap().holders[0].remaining.unwrap();
        let remaining = kept(&stream.touch(&[]).await[0].1);
        assert!(remaining < last, "{remaining:?} after {last:?}");
        // The store's clock is read in whole milliseconds.
        assert!(remaining <= Duration::try_from(truth).unwrap() + ms(1), "{remaining:?} of {truth:?}");
        last = remaining;
    }
    assert_eq!(expire_time(&mut client, "job").await, written);
    // A call for one lease is for those who want to be sure.
    eventually(async || {
        client.renew(&lease).await.unwrap();
        (expire_time(&mut client, "job").await != written).then_some(())
    })
    .await;
}

#[tokio::test]
async fn messages_of_one_moment_cost_one_write() {
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

    // Of a message whose leases are partly fresh the rest is written, and the answer has them in their order.
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
async fn after_a_tenth_of_the_ttl_the_lease_is_renewed_again(#[values(Embedded, MongoDb)] home: Home) {
    let daemon = Daemon::start(home).await;
    let mut client = daemon.client().await;
    let lease = client.get_lease(ask("job").ttl(secs(20))).await.unwrap().lease.unwrap();
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
async fn with_the_switch_off_every_message_is_a_write(#[values(Embedded, MongoDb)] home: Home) {
    let daemon = Daemon::start_with(home, |config| config.limits.coalesce_touches = false).await;
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
async fn a_loss_between_two_messages_is_not_answered_from_memory(#[values(Embedded, MongoDb)] home: Home) {
    let daemon = Daemon::start(home).await;
    let mut client = daemon.client().await;
    let mut stream = KeepAlive::open(&mut client).await;
    for number in 0..20 {
        let key = format!("key/{number}");
        let lease = long_lease(&mut client, &key).await;
        kept(&stream.touch(std::slice::from_ref(&lease)).await[0].1);
        client.give_back(&lease).await.unwrap();
        let sequence = stream.send(std::slice::from_ref(&lease)).await;
        // Told unasked, if the message came later than that, and with the answer in any case.
        let mut answer = stream.next().await.unwrap();
        if answer.sequence == 0 {
            assert_eq!(lost(answer.results[0].outcome.as_ref().unwrap()), LossReason::Released);
            answer = stream.next().await.unwrap();
        }
        assert_eq!(answer.sequence, sequence, "told once");
        assert_eq!(lost(answer.results[0].outcome.as_ref().unwrap()), LossReason::Released);
    }
    assert!(stream.touch(&[]).await.is_empty());
}
