//! Tests which daemon a client uses, on a paused clock and over an in-memory network.

use std::collections::HashMap;
use std::io;
use std::net::{Ipv6Addr, SocketAddr};
use std::sync::atomic::Ordering;

use futures_util::StreamExt;
use leased_proto::v1::lease_service_client::LeaseServiceClient;
use leased_proto::v1::{AcquireRequest, GetRequest, LeaseRef, ReleaseRequest};
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;

use super::call::{FIRST_PAUSE, LONGEST_PAUSE};
use super::*;
use crate::WatchEvent;
use crate::daemon::Purpose;
use crate::peer::{Manner, Peer};

const TIMEOUT: Duration = Duration::from_secs(5);
const STORES: [&str; 2] = ["0b7c2f4e-8d51-4d7e-9a55-6a6f7a3c1e02", "5d0e63a8-04c7-4a4e-a1cb-0a6a3c5cf1aa"];

fn peers(count: usize) -> Vec<Peer> {
    (0..count).map(Peer::numbered).collect()
}

/// The endpoints of a client, and their background task.
fn of(peers: &[Peer]) -> (Arc<Endpoints>, AbortOnDropHandle<()>) {
    let endpoints = Arc::new(Endpoints::new(peers.iter().map(Peer::source).collect(), TIMEOUT));
    let maintained = Arc::clone(&endpoints);
    (endpoints, AbortOnDropHandle::new(tokio::spawn(async move { maintained.maintain().await })))
}

async fn get(endpoints: &Endpoints) -> Result<(), Error> {
    let call = endpoints.call(Purpose::Calls, GetRequest::default(), |channel, request| async move {
        LeaseServiceClient::new(channel).get(request).await
    });
    call.await.map(drop)
}

async fn release(endpoints: &Endpoints) -> Result<(), Error> {
    let call = endpoints.call(Purpose::KeepAlive, ReleaseRequest::default(), |channel, request| async move {
        LeaseServiceClient::new(channel).release(request).await
    });
    call.await.map(drop)
}

/// Waits in a queue until it is dropped.
async fn wait_in_queue(endpoints: &Endpoints) {
    let wait = Some(prost_types::Duration { seconds: 600, nanos: 0 });
    let request = AcquireRequest { wait, ..AcquireRequest::default() };
    let until = Instant::now() + Duration::from_secs(600);
    let call = endpoints.call_waiting(Purpose::Waits, until, request, |channel, request| async move {
        LeaseServiceClient::new(channel).acquire(request).await
    });
    panic!("the wait ended: {:?}", call.await.map(drop));
}

/// The name of the daemon that the client would use.
fn preferred(endpoints: &Endpoints) -> String {
    endpoints.state().pick().unwrap().name.clone()
}

/// The daemon that the client would use, and another.
fn in_turn<'a>(endpoints: &Endpoints, peers: &'a [Peer]) -> [&'a Peer; 2] {
    let first = preferred(endpoints);
    let (first, rest): (Vec<&Peer>, Vec<&Peer>) = peers.iter().partition(|peer| peer.name() == first);
    [first[0], rest[0]]
}

#[test]
fn every_daemon_is_asked_before_there_is_a_pause() {
    let mut pauses = Pauses::default();
    let pauses: Vec<Duration> = (0..6).map(|_| pauses.next(3, None)).collect();
    assert!(pauses[0].is_zero() && pauses[1].is_zero() && !pauses[2].is_zero());
    assert!(pauses[3].is_zero() && pauses[4].is_zero() && pauses[5] > FIRST_PAUSE);
}

#[test]
fn pauses_stay_bounded_and_heed_what_the_daemon_asks() {
    let mut pauses = Pauses::default();
    assert!(pauses.next(1, Some(Duration::from_millis(500))) >= Duration::from_millis(500));
    for _ in 0..40 {
        assert!(pauses.next(1, Some(Duration::from_secs(3600))) <= LONGEST_PAUSE.mul_f64(1.25));
    }
}

#[tokio::test(start_paused = true)]
async fn a_server_that_is_no_daemon_is_skipped_while_there_are_others() {
    for _ in 0..8 {
        let peers = peers(3);
        peers[0].be(Manner::Stranger);
        peers[1].be(Manner::Stranger);
        let (endpoints, _task) = of(&peers);
        endpoints.check().await.unwrap();
        for _ in 0..20 {
            get(&endpoints).await.unwrap();
        }
        let asked: usize = peers[..2].iter().map(|peer| peer.attempts("get").len()).sum();
        assert!(asked <= 2, "{asked} calls, where each server may get one at most");
    }
}

#[tokio::test(start_paused = true)]
async fn if_no_server_is_a_daemon_the_error_says_so_at_once() {
    let peers = peers(2);
    peers.iter().for_each(|peer| peer.be(Manner::Stranger));
    let (endpoints, _task) = of(&peers);
    let start = Instant::now();
    let refused = get(&endpoints).await;
    assert!(matches!(refused, Err(Error::NotLeased { .. })), "{refused:?}");
    assert!(start.elapsed() < Duration::from_secs(1));
    // Calls succeed once daemons have taken their place.
    peers.iter().for_each(|peer| peer.be(Manner::Up));
    get(&endpoints).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_error_names_an_outage_and_a_server_that_is_no_daemon() {
    let peers = peers(2);
    peers[0].be(Manner::Stranger);
    peers[1].be(Manner::Down);
    let (endpoints, _task) = of(&peers);
    let error = get(&endpoints).await.unwrap_err().to_string();
    assert!(error.contains("daemon-0 is not a leased daemon") && error.contains("down"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_daemon_that_is_silent_leaves_time_for_two_others() {
    let peers = peers(3);
    let (endpoints, _task) = of(&peers);
    get(&endpoints).await.unwrap();
    for _ in 0..2 {
        in_turn(&endpoints, &peers)[0].be(Manner::Silent);
        get(&endpoints).await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn the_client_switches_from_a_daemon_that_is_silent_from_the_start() {
    let peers = peers(2);
    let (endpoints, _task) = of(&peers);
    in_turn(&endpoints, &peers)[0].be(Manner::Silent);
    get(&endpoints).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn the_first_probe_of_all_daemons_switches_from_one_that_is_silent() {
    let peers = peers(2);
    let (endpoints, _task) = of(&peers);
    let [silent, other] = in_turn(&endpoints, &peers);
    silent.be(Manner::Silent);
    endpoints.compare().await.unwrap();
    assert_eq!(preferred(&endpoints), other.name());
    let start = Instant::now();
    get(&endpoints).await.unwrap();
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
}

/// A server that is no daemon is probed from time to time, and gets no other calls.
#[tokio::test(start_paused = true)]
async fn a_server_that_was_found_to_be_no_daemon_gets_no_more_calls() {
    let peers = peers(2);
    let (endpoints, _task) = of(&peers);
    let [stranger, other] = in_turn(&endpoints, &peers);
    stranger.be(Manner::Stranger);
    for _ in 0..10 {
        release(&endpoints).await.unwrap();
        sleep(Duration::from_secs(31)).await;
    }
    assert_eq!(stranger.attempts("release").len(), 1);
    assert_eq!(other.attempts("release").len(), 10);
}

#[tokio::test(start_paused = true)]
async fn after_a_rolling_restart_clients_are_spread_again_within_minutes() {
    const CLIENTS: usize = 30;
    let peers = peers(3);
    let clients: Vec<_> = (0..CLIENTS).map(|_| of(&peers)).collect();
    let spread = || {
        let mut spread: HashMap<String, usize> = HashMap::new();
        clients.iter().for_each(|(endpoints, _)| *spread.entry(preferred(endpoints)).or_default() += 1);
        spread
    };
    let at_first = spread();
    assert_eq!(at_first.len(), 3, "{at_first:?}");
    for peer in &peers {
        peer.be(Manner::Down);
        for (endpoints, _) in &clients {
            get(endpoints).await.unwrap();
        }
        peer.be(Manner::Up);
    }
    assert!(spread().len() < 3, "no client has returned to the last daemon yet: {:?}", spread());
    sleep(4 * RETURN).await;
    assert_eq!(spread(), at_first);
}

#[tokio::test(start_paused = true)]
async fn a_thousand_waiting_calls_do_not_hold_up_other_calls() {
    let peers = peers(1);
    let (endpoints, _task) = of(&peers);
    let waiting: Vec<_> = (0..1000)
        .map(|_| {
            let endpoints = Arc::clone(&endpoints);
            AbortOnDropHandle::new(tokio::spawn(async move { wait_in_queue(&endpoints).await }))
        })
        .collect();
    let shared = &peers[0].shared;
    while shared.waiting.load(std::sync::atomic::Ordering::Relaxed) < 1000 {
        sleep(Duration::from_millis(1)).await;
    }
    let daemon = endpoints.pick().await.unwrap();
    assert_eq!(daemon.count(Purpose::Waits), 5);
    get(&endpoints).await.unwrap();
    release(&endpoints).await.unwrap();
    assert_eq!((daemon.count(Purpose::Calls), daemon.count(Purpose::KeepAlive)), (1, 1));

    drop(waiting);
    sleep(2 * IDLE).await;
    assert_eq!(daemon.count(Purpose::Waits), 0, "closed when idle");
    assert_eq!((daemon.count(Purpose::Calls), daemon.count(Purpose::KeepAlive)), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_fails_for_ever_is_replaced() {
    let peers = peers(1);
    let (endpoints, _task) = of(&peers);
    peers[0].be(Manner::Panicking);
    let failed = get(&endpoints).await;
    assert!(matches!(failed, Err(Error::Unavailable { .. })), "{failed:?}");
    peers[0].be(Manner::Up);
    get(&endpoints).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_repetition_says_how_often_it_was_sent_before() {
    let peers = peers(1);
    let (endpoints, _task) = of(&peers);
    peers[0].be(Manner::Down);
    let up = async {
        while peers[0].attempts("release").len() < 3 {
            sleep(Duration::from_millis(1)).await;
        }
        peers[0].be(Manner::Up);
    };
    let (released, ()) = tokio::join!(release(&endpoints), up);
    released.unwrap();
    let attempts = peers[0].attempts("release");
    let expected: Vec<Option<String>> =
        (0..attempts.len()).map(|before| (before > 0).then(|| before.to_string())).collect();
    assert_eq!(attempts, expected);
}

#[tokio::test(start_paused = true)]
async fn two_stores_are_not_mixed_and_the_error_names_them() {
    for _ in 0..8 {
        let peers = peers(2);
        peers.iter().zip(STORES).for_each(|(peer, store)| peer.serve_store(store));
        let (endpoints, _task) = of(&peers);
        let error = endpoints.compare().await.unwrap_err();
        assert!(matches!(error, Error::DifferentStores { .. }), "{error:?}");
        for part in ["daemon-0", "daemon-1", STORES[0], STORES[1]] {
            assert!(error.to_string().contains(part), "{error}");
        }
        // The same client works once the stores agree.
        peers[0].serve_store(STORES[1]);
        endpoints.compare().await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn a_daemon_over_a_second_store_that_appears_later_is_never_used() {
    let peers = peers(2);
    peers.iter().zip(STORES).for_each(|(peer, store)| peer.serve_store(store));
    peers[1].be(Manner::Down);
    let (endpoints, _task) = of(&peers);
    endpoints.compare().await.unwrap();
    get(&endpoints).await.unwrap();
    peers[1].be(Manner::Up);
    peers[0].be(Manner::Down);
    let refused = get(&endpoints).await.unwrap_err().to_string();
    assert!(refused.contains(STORES[0]) && refused.contains(STORES[1]), "{refused}");
    assert_eq!(peers[1].attempts("get").len(), 0);
    release(&endpoints).await.unwrap_err();
}

#[tokio::test(start_paused = true)]
async fn a_daemon_that_comes_back_over_another_store_is_noticed_before_it_is_used() {
    let peers = peers(2);
    peers.iter().for_each(|peer| peer.serve_store(STORES[0]));
    let (endpoints, _task) = of(&peers);
    endpoints.compare().await.unwrap();
    get(&endpoints).await.unwrap();
    peers.iter().for_each(|peer| peer.be(Manner::Down));
    get(&endpoints).await.unwrap_err();
    let before = peers[1].attempts("get").len();
    peers[1].serve_store(STORES[1]);
    peers[1].be(Manner::Up);
    get(&endpoints).await.unwrap_err();
    assert_eq!(peers[1].attempts("get").len(), before);
}

#[tokio::test(start_paused = true)]
async fn a_server_that_was_no_daemon_and_is_gone_is_an_outage_like_any_other() {
    let peers = peers(1);
    peers[0].be(Manner::Stranger);
    let (endpoints, _task) = of(&peers);
    assert!(matches!(get(&endpoints).await, Err(Error::NotLeased { .. })));
    peers[0].be(Manner::Down);
    let failed = get(&endpoints).await;
    assert!(matches!(failed, Err(Error::Unavailable { .. })), "{failed:?}");
}

#[tokio::test(start_paused = true)]
async fn a_store_that_replaces_another_everywhere_is_accepted() {
    let peers = peers(1);
    peers[0].serve_store(STORES[0]);
    let (endpoints, _task) = of(&peers);
    get(&endpoints).await.unwrap();
    peers[0].serve_store(STORES[1]);
    get(&endpoints).await.unwrap();
    endpoints.compare().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn the_longest_possible_timeout_does_not_panic() {
    let peers = peers(1);
    peers[0].be(Manner::Down);
    let endpoints = Endpoints::new(vec![peers[0].source()], Duration::MAX);
    let patient = timeout(Duration::from_secs(60), get(&endpoints)).await;
    assert!(patient.is_err(), "{patient:?}");
    peers[0].be(Manner::Up);
    get(&endpoints).await.unwrap();
}

fn named(host: &str) -> Endpoints {
    let url = format!("http://{host}:5327").parse().unwrap();
    let reach = Reach::Name { url, host: host.to_owned(), port: 5327 };
    Endpoints::new(vec![Source { name: format!("http://{host}:5327"), reach }], Duration::from_secs(1))
}

#[test]
fn a_name_with_several_addresses_is_several_daemons() {
    let endpoints = named("leased.example");
    let found = |addresses: &[&str]| {
        let addresses = addresses.iter().map(|address| format!("{address}:5327").parse().unwrap());
        endpoints.found(&endpoints.resolving[0], addresses.collect());
    };
    let names = || {
        let mut names: Vec<String> =
            endpoints.state().daemons.iter().map(|daemon| daemon.name.clone()).collect();
        names.sort();
        names
    };
    found(&["10.0.0.1", "10.0.0.2", "10.0.0.1"]);
    assert_eq!(names(), ["http://leased.example:5327 (10.0.0.1)", "http://leased.example:5327 (10.0.0.2)"]);
    let before = endpoints.state().daemons.clone();
    found(&["10.0.0.2", "10.0.0.3"]);
    assert_eq!(names(), ["http://leased.example:5327 (10.0.0.2)", "http://leased.example:5327 (10.0.0.3)"]);
    let kept =
        endpoints.state().daemons.iter().filter(|one| before.iter().any(|two| Arc::ptr_eq(one, two))).count();
    assert_eq!(kept, 1, "connections to an address that stays are kept");
    // An address of another family than the first comes last, because it is less likely to work.
    found(&[]);
    found(&["[::1]", "10.0.0.3", "10.0.0.4"]);
    assert!(endpoints.state().daemons[0].name.ends_with("(::1)"));
}

#[tokio::test]
async fn the_error_shows_a_name_without_addresses() {
    let endpoints = Arc::new(named("no.such.name.invalid"));
    let maintained = Arc::clone(&endpoints);
    let _task = AbortOnDropHandle::new(tokio::spawn(async move { maintained.maintain().await }));
    let error = get(&endpoints).await.unwrap_err();
    assert!(
        matches!(&error, Error::Unavailable { cause, .. } if cause.contains("no.such.name.invalid")),
        "{error}"
    );
}

#[tokio::test]
async fn a_name_whose_look_up_fails_keeps_the_addresses_that_it_had() {
    let endpoints = Arc::new(named("no.such.name.invalid"));
    endpoints.found(&endpoints.resolving[0], vec!["10.0.0.1:5327".parse().unwrap()]);
    let before = endpoints.pick().await.unwrap();
    let mut look_ups = endpoints.look_ups.subscribe();
    let maintained = Arc::clone(&endpoints);
    let _task = AbortOnDropHandle::new(tokio::spawn(async move { maintained.maintain().await }));
    look_ups.changed().await.unwrap();
    assert!(endpoints.state().unknown_name.is_some(), "the look-up failed");
    let after = endpoints.pick().await.unwrap();
    assert!(Arc::ptr_eq(&before, &after), "{} and not {}", before.name, after.name);
    // The name is not blamed for a daemon that does not answer.
    assert_eq!(endpoints.silence(), "no answer in time");
}

/// The acquire may arrive after its release, even if the release found the lease granted.
#[tokio::test(start_paused = true)]
async fn the_release_of_an_unanswered_acquire_says_so() {
    let peer = Peer::numbered(0);
    let client = Peer::client(std::slice::from_ref(&peer), TIMEOUT);
    let acquire = client.acquire("key").wait(Duration::from_secs(600)).into_future();
    timeout(Duration::from_secs(60), acquire).await.expect_err("it waits");
    client.settle().await;
    assert_eq!(peer.attempts("release"), [Some("1".to_owned())]);

    drop(client.acquire("key").ttl(Duration::from_secs(10)).await.unwrap());
    client.settle().await;
    assert_eq!(peer.attempts("release")[1], None, "this one was granted");
}

/// A call ends after an hour with the answer that the key is held. The next call has begun by then.
#[tokio::test(start_paused = true)]
async fn a_wait_without_end_is_one_call_after_another() {
    let peer = Peer::numbered(0);
    let client = Peer::client(std::slice::from_ref(&peer), TIMEOUT);
    let waits = client.acquire("key").wait_forever().into_future();
    tokio::pin!(waits);
    timeout(Duration::from_secs(10), &mut waits).await.expect_err("it waits");
    for calls in 2..5_u32 {
        timeout(Duration::from_secs(3570), &mut waits).await.expect_err("it waits");
        assert_eq!(peer.shared.waiting.load(Ordering::Relaxed), 2, "call {calls} overlaps the one before it");
    }
    assert!(peer.attempts("release").is_empty());
    // Each call but the first counts as a repetition of the one before it.
    let expected = [None, Some("1"), Some("2"), Some("3")].map(|before| before.map(str::to_owned));
    assert_eq!(peer.attempts("acquire"), expected);
}

/// The first of two attempts may have been granted, even if the second is refused.
#[tokio::test(start_paused = true)]
async fn a_refused_acquire_is_released_unless_it_was_sent_once() {
    let peer = Peer::numbered(0);
    let client = Peer::client(std::slice::from_ref(&peer), TIMEOUT);
    peer.be(Manner::Full);
    assert!(matches!(client.acquire("key").await, Err(Error::QueueFull)));
    peer.be(Manner::Up);
    client.settle().await;
    assert!(peer.attempts("release").is_empty(), "sent once, and refused");

    peer.be(Manner::Down);
    let sent = peer.attempts("acquire").len();
    let full = async {
        while peer.attempts("acquire").len() == sent {
            sleep(Duration::from_millis(1)).await;
        }
        peer.be(Manner::Full);
    };
    let (refused, ()) = tokio::join!(client.acquire("key").into_future(), full);
    assert!(matches!(refused, Err(Error::QueueFull)), "{refused:?}");
    peer.be(Manner::Up);
    client.settle().await;
    assert_eq!(peer.attempts("release"), [Some("1".to_owned())]);
}

/// The entry in the queue outlives its caller for a while, and may be granted the lease meanwhile.
#[tokio::test(start_paused = true)]
async fn the_release_of_an_acquire_that_waited_is_repeated_for_longer_than_the_ttl() {
    let peer = Peer::numbered(0);
    let client = Peer::client(std::slice::from_ref(&peer), TIMEOUT);
    let ttl = Duration::from_secs(2);
    let acquire = client.acquire("key").ttl(ttl).wait(Duration::from_secs(600)).into_future();
    timeout(Duration::from_secs(60), acquire).await.expect_err("it waits");
    peer.be(Manner::Down);
    sleep(ttl + Duration::from_secs(15)).await;
    let before = peer.attempts("release").len();
    peer.be(Manner::Up);
    client.settle().await;
    assert_eq!(peer.attempts("release").len(), before + 1);
}

#[tokio::test(start_paused = true)]
async fn an_acquire_that_was_never_sent_is_not_released() {
    let peers = peers(2);
    let client = Peer::client(&peers, TIMEOUT);
    peers.iter().for_each(|peer| peer.be(Manner::Down));
    let failed = client.acquire("key").await;
    assert!(matches!(failed, Err(Error::Unavailable { .. })), "{failed:?}");
    assert!(
        peers.iter().all(|peer| peer.attempts("acquire").is_empty()),
        "neither server was known to be a daemon"
    );
    peers.iter().for_each(|peer| peer.be(Manner::Up));
    client.settle().await;
    assert!(peers.iter().all(|peer| peer.attempts("release").is_empty()));
}

#[tokio::test]
async fn a_failed_release_in_the_background_is_repeated_after_pauses() {
    let peer = Peer::numbered(0);
    // Shorter than the first pause between two attempts of a call, so that each call is one
    // attempt.
    let client = Peer::client(std::slice::from_ref(&peer), FIRST_PAUSE / 2);
    peer.be(Manner::Down);
    let lease = LeaseRef { key: "key".to_owned(), lease_id: String::new() };
    let start = Instant::now();
    client.release_in_background(lease, Duration::from_secs(60), crate::client::Acquired::Granted);
    let tried = async {
        while peer.attempts("release").len() < 4 {
            sleep(Duration::from_millis(1)).await;
        }
    };
    timeout(Duration::from_secs(60), tried).await.expect("the release is repeated");
    // Three pauses. Each is twice as long as the one before, and jitter shortens it by 25 % at
    // most.
    assert!(start.elapsed() >= FIRST_PAUSE * 7 * 3 / 4, "{:?}", start.elapsed());
}

#[tokio::test]
async fn a_timeout_of_zero_is_refused() {
    let builder = crate::Client::builder().timeout(Duration::ZERO).endpoint(crate::DEFAULT_ENDPOINT).unwrap();
    assert!(matches!(builder.connect_lazily(), Err(Error::Invalid(_))));
}

#[tokio::test(start_paused = true)]
async fn a_watch_skips_a_daemon_over_another_store() {
    let peers = peers(2);
    peers.iter().zip(STORES).for_each(|(peer, store)| peer.serve_store(store));
    let client = Peer::client(&peers, TIMEOUT);
    let [ours, other] = in_turn(&client.shared().endpoints, &peers);
    other.be(Manner::Down);
    client.get("key").await.unwrap();
    ours.be(Manner::Down);
    other.be(Manner::Up);
    let mut events = client.watch("").stream();
    let up = async {
        while other.attempts("watch").is_empty() {
            sleep(Duration::from_millis(1)).await;
        }
        ours.be(Manner::Up);
    };
    let seen = async { [events.next().await.unwrap().unwrap(), events.next().await.unwrap().unwrap()] };
    let both = async { tokio::join!(seen, up) };
    let (seen, ()) = timeout(Duration::from_secs(600), both).await.expect("the watch goes on");
    assert!(matches!(&seen[0], WatchEvent::Interrupted { .. }), "{seen:?}");
    assert_eq!(seen[1], WatchEvent::SnapshotEnd);
    assert_eq!(other.attempts("watch").len(), 1);
}

#[test]
fn a_name_that_is_found_again_is_not_blamed() {
    let endpoints = named("leased.example");
    let name = &endpoints.resolving[0];
    endpoints.looked_up(name, Err(io::Error::other("no such name")));
    assert!(endpoints.silence().contains("leased.example: no such name"));
    endpoints.looked_up(name, Ok(vec!["10.0.0.1:5327".parse().unwrap()]));
    // The next look-up finds no addresses.
    endpoints.looked_up(name, Ok(Vec::new()));
    assert!(!endpoints.silence().contains("leased.example"), "{}", endpoints.silence());
}

/// The address family that the resolver puts first is tried first.
#[tokio::test]
async fn a_name_with_one_dead_address_works_by_the_other() {
    let peer = Peer::numbered(0);
    let live = peer.listen().await;
    for _ in 0..4 {
        let endpoints = named("leased.example");
        let dead = SocketAddr::new(Ipv6Addr::LOCALHOST.into(), live.port());
        endpoints.looked_up(&endpoints.resolving[0], Ok(vec![dead, live]));
        assert!(preferred(&endpoints).ends_with("(::1)"));
        get(&endpoints).await.unwrap();
        assert!(preferred(&endpoints).ends_with("(127.0.0.1)"));
    }
}
