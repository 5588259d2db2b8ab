//! Callers who ask for much, beside one who asks for little.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use leased_client::v1::{LeaseRef, ListRequest, LossReason, RevokeRequest};
use rstest::rstest;
use tokio::task::JoinSet;
use tokio::time::Instant;
use uuid::Uuid;

use crate::keepalive::{KeepAlive, kept, lost};
use crate::support::{Asking, Calls, Daemon, Embedded, Home, Leases, MongoDb, ask, named, secs};

/// How large an attack is. `LEASED_ATTACK=full` makes it as large as one that was found to harm, and the test prints what
/// an honest caller saw of it.
struct Attack {
    streams: usize,
    leases: usize,
}

impl Attack {
    fn of(streams: usize) -> Self {
        let full = std::env::var("LEASED_ATTACK").is_ok_and(|size| size == "full");
        if full { Self { streams, leases: 10_000 } } else { Self { streams: streams / 4, leases: 2000 } }
    }

    /// Names leases that nobody has, with message after message on each stream, and returns when each stream has been
    /// answered once.
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

/// What an honest caller's touches took. None may fail.
async fn touches(what: &str, client: &mut Leases, lease: &LeaseRef) {
    let mut took = Vec::new();
    for _ in 0..40 {
        let began = Instant::now();
        let answer = client.renew(lease).await;
        took.push((began.elapsed(), answer.err()));
    }
    took.sort_by_key(|(took, _)| *took);
    let at = |share: usize| took[took.len() * share / 100].0;
    let failed = took.iter().filter(|(_, error)| error.is_some()).count();
    println!("{what}: p50 {:?}, p99 {:?}, {failed} of {} failed", at(50), at(99), took.len());
    assert_eq!(failed, 0, "{took:?}");
}

async fn hold(client: &mut Leases, key: &str) -> LeaseRef {
    client.get_lease(ask(key).shared(0).ttl(secs(600))).await.unwrap().lease.unwrap()
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ids_that_nobody_knows_on_one_key_delay_no_honest_touch(#[values(Embedded, MongoDb)] home: Home) {
    let daemon = Daemon::start(home).await;
    let mut client = daemon.client().await;
    let (same, other) = (hold(&mut client, "crowded").await, hold(&mut client, "other").await);
    let _attackers = Attack::of(8).begin(&daemon, |_, _| "crowded".to_owned()).await;
    touches(&format!("{home:?}, another key"), &mut client, &other).await;
    touches(&format!("{home:?}, the same key"), &mut client, &same).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_of_many_keys_delay_no_honest_touch(#[values(Embedded, MongoDb)] home: Home) {
    let daemon = Daemon::start(home).await;
    let mut client = daemon.client().await;
    let other = hold(&mut client, "other").await;
    let _attackers = Attack::of(30).begin(&daemon, |stream, lease| format!("{stream}/{lease}")).await;
    touches(&format!("{home:?}, beside many keys"), &mut client, &other).await;
}

#[rstest]
#[tokio::test]
async fn most_listings_of_one_connection_do_not_go_before_that_of_another(
    #[values(Embedded, MongoDb)] home: Home,
) {
    const KEYS: usize = 500;
    const LISTS: usize = 250;
    let daemon = Daemon::start(home).await;
    let mut client = daemon.client().await;
    let mut holders = JoinSet::new();
    for number in 0..KEYS {
        let mut client = client.clone();
        holders.spawn(async move { hold(&mut client, &format!("key/{number}")).await });
    }
    holders.join_all().await;

    let request = ListRequest { page_size: 1000, ..ListRequest::default() };
    let (greedy, answered) = (daemon.client().await, Arc::new(AtomicUsize::new(0)));
    let mut lists = JoinSet::new();
    for _ in 0..LISTS {
        let (mut client, request, answered) = (greedy.clone(), request.clone(), Arc::clone(&answered));
        lists.spawn(async move {
            assert_eq!(client.list(request).await.unwrap().into_inner().leases.len(), KEYS);
            answered.fetch_add(1, Ordering::Relaxed);
        });
    }
    // Sent after all of those on the same connection: once this is answered, the daemon has them.
    let mut last = greedy.clone();
    tokio::spawn(async move { last.look("key/0").await.unwrap() }).await.unwrap();
    client.list(request).await.unwrap();
    let answered = answered.load(Ordering::Relaxed);
    assert!(answered < LISTS / 2, "{answered} were answered before");
    lists.join_all().await;
}

#[rstest]
#[tokio::test]
async fn past_the_limit_of_the_daemon_a_lease_is_touched_and_not_carried(
    #[values(Embedded, MongoDb)] home: Home,
) {
    let daemon = Daemon::start_with(home, |config| {
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
        assert_eq!(stream.touch(&[]).await.len(), 2, "those that are carried");
    }

    // Its loss is told by the next message that names it, once.
    let mut admin = daemon.admin().await;
    let mut revoke = async |key: &str| {
        admin.revoke(RevokeRequest { key: key.to_owned(), ..Default::default() }).await.unwrap()
    };
    revoke("c").await;
    let results = stream.touch(&leases).await;
    assert_eq!(lost(&results[2].1), LossReason::Revoked);
    results[..2].iter().for_each(|(_, outcome)| assert!(kept(outcome) > Duration::ZERO));

    // A loss that is told makes room.
    revoke("a").await;
    assert_eq!(stream.told().await, [(leases[0].clone(), LossReason::Revoked)]);
    let new = hold(&mut client, "d").await;
    kept(&stream.touch(std::slice::from_ref(&new)).await[0].1);
    revoke("d").await;
    assert_eq!(stream.told().await, [(new, LossReason::Revoked)]);
}
