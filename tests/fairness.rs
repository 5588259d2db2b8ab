//! A caller with few requests beside callers with very many.

use std::time::Duration;

use leased_client::v1::keep_alive_result::Outcome;
use leased_client::v1::{LeaseRef, LossReason, RefusalReason, RevokeRequest};
use rstest::rstest;
use throwaway_mongodb::Mongod;
use tokio::task::JoinSet;
use tokio::time::Instant;
use uuid::Uuid;

use crate::keepalive::{KeepAlive, kept, lost, refused};
use crate::metrics::scrape;
use crate::support::{
    AcquireBuilder, Backend, Calls, Daemon, Embedded, Leases, MongoDb, acquire, eventually, named, secs,
};

/// The size of an attack. With `LEASED_ATTACK=full` it is as large as one that once did harm. The
/// test prints the latencies of the honest caller.
struct Attack {
    streams: usize,
    leases: usize,
}

impl Attack {
    fn of(streams: usize) -> Self {
        let full = std::env::var("LEASED_ATTACK").is_ok_and(|size| size == "full");
        if full { Self { streams, leases: 10_000 } } else { Self { streams: streams / 4, leases: 2000 } }
    }

    /// Sends one message after another on each stream. All messages name leases that nobody holds.
    /// Returns once each stream has been answered.
    async fn begin(self, daemon: &Daemon, key: impl Fn(usize, usize) -> String) -> JoinSet<()> {
        let mut attackers = JoinSet::new();
        let (answered, mut answers) = tokio::sync::mpsc::channel(self.streams);
        for number in 0..self.streams {
            let lease = |lease| named(&key(number, lease), Uuid::new_v4());
            let leases: Vec<LeaseRef> = (0..self.leases).map(lease).collect();
            let mut client = daemon.client().await.max_decoding_message_size(64 << 20);
            let answered = answered.clone();
            attackers.spawn(async move {
                let mut stream = KeepAlive::open(&mut client).await;
                loop {
                    stream.send(&leases).await;
                    let answer = stream.next().await.unwrap();
                    assert_eq!(answer.results.len(), leases.len());
                    let _ = answered.try_send(number);
                }
            });
        }
        drop(answered);
        for _ in 0..self.streams {
            answers.recv().await.unwrap();
        }
        attackers
    }
}

/// Touches a lease 40 times as an honest caller would, and prints the latencies. No touch may fail.
async fn touches(what: &str, client: &mut Leases, lease: &LeaseRef) {
    let mut touches = Vec::new();
    for _ in 0..40 {
        let began = Instant::now();
        let answer = client.renew(lease).await;
        touches.push((began.elapsed(), answer.err()));
    }
    touches.sort_by_key(|(duration, _)| *duration);
    let at = |share: usize| touches[touches.len() * share / 100].0;
    let failed = touches.iter().filter(|(_, error)| error.is_some()).count();
    println!("{what}: p50 {:?}, p99 {:?}, {failed} of {} failed", at(50), at(99), touches.len());
    assert_eq!(failed, 0, "{touches:?}");
}

async fn hold(client: &mut Leases, key: &str) -> LeaseRef {
    client.get_lease(acquire(key).shared(0).ttl(secs(600))).await.unwrap().lease.unwrap()
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_unknown_ids_on_one_key_fail_no_honest_touch(#[values(Embedded, MongoDb)] backend: Backend) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    let (same, other) = (hold(&mut client, "crowded").await, hold(&mut client, "other").await);
    let _attackers = Attack::of(8).begin(&daemon, |_, _| "crowded".to_owned()).await;
    touches(&format!("{backend:?}, another key"), &mut client, &other).await;
    touches(&format!("{backend:?}, the same key"), &mut client, &same).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_of_many_keys_fail_no_honest_touch(#[values(Embedded, MongoDb)] backend: Backend) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    let other = hold(&mut client, "other").await;
    let _attackers = Attack::of(30).begin(&daemon, |stream, lease| format!("{stream}/{lease}")).await;
    touches(&format!("{backend:?}, beside many keys"), &mut client, &other).await;
}

#[rstest]
#[tokio::test]
async fn a_lease_beyond_the_daemons_limit_is_touched_but_not_tracked(
    #[values(Embedded, MongoDb)] backend: Backend,
) {
    let daemon = Daemon::start_with(backend, |config| {
        config.limits.bounds.leases = 2;
        config.limits.coalesce_touches = false;
    })
    .await;
    let mut client = daemon.client().await;
    let mut leases = Vec::new();
    for key in ["a", "b", "c"] {
        leases.push(hold(&mut client, key).await);
    }
    let mut stream = KeepAlive::open(&mut client).await;
    for _ in 0..3 {
        let results = stream.touch(&leases).await;
        assert_eq!(results.len(), 3);
        results.iter().for_each(|(_, outcome)| assert!(kept(outcome) > Duration::ZERO));
        assert_eq!(stream.touch(&[]).await.len(), 2, "the leases that the stream tracks");
    }

    // The loss of the lease that is not tracked is reported in the answer to the next message that
    // names it.
    let mut admin = daemon.admin().await;
    let mut revoke = async |key: &str| {
        admin.revoke(RevokeRequest { key: key.to_owned(), ..Default::default() }).await.unwrap()
    };
    revoke("c").await;
    let results = stream.touch(&leases).await;
    assert_eq!(lost(&results[2].1), LossReason::Revoked);
    results[..2].iter().for_each(|(_, outcome)| assert!(kept(outcome) > Duration::ZERO));

    // After its loss is reported, a lease no longer counts against the limit.
    revoke("a").await;
    assert_eq!(stream.reported().await, [(leases[0].clone(), LossReason::Revoked)]);
    let new = hold(&mut client, "d").await;
    kept(&stream.touch(std::slice::from_ref(&new)).await[0].1);
    revoke("d").await;
    assert_eq!(stream.reported().await, [(new, LossReason::Revoked)]);
}

#[tokio::test]
async fn while_the_store_is_unavailable_touches_of_untracked_leases_are_bounded() {
    let mongod = Mongod::start().await.unwrap();
    let daemon = Daemon::over(mongod.uri(), |config| config.limits.bounds.leases = 0).await;
    let mut client = daemon.client().await;
    let lease = hold(&mut client, "held").await;
    let mut streams = [KeepAlive::open(&mut client).await, KeepAlive::open(&mut client).await];

    mongod.pause().unwrap();
    let strangers: Vec<LeaseRef> =
        (0..10_000).map(|number| named(&number.to_string(), Uuid::new_v4())).collect();
    let sequence = streams[0].send(&strangers).await;
    for stream in &mut streams {
        let results = stream.touch(std::slice::from_ref(&lease)).await;
        assert_eq!(refused(&results[0].1), RefusalReason::LimitExceeded);
    }
    assert_eq!(scrape(&daemon).await.value("leased_leases_refused_total", &[]), 2.0);

    mongod.resume().unwrap();
    let answer = streams[0].next().await.unwrap();
    assert_eq!((answer.sequence, answer.results.len()), (sequence, strangers.len()));
    for stream in &mut streams {
        eventually(async || {
            let results = stream.touch(std::slice::from_ref(&lease)).await;
            matches!(results[0].1, Outcome::Kept(_)).then_some(())
        })
        .await;
    }
}
