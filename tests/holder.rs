//! The client crate against real daemons: leases that are granted, renewed, released and lost.

use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use leased_client::{
    ChangeKind, Client, Error, FencingGuard, FencingToken, KeyInfo, KeyState, Lease, Loss, State, WatchEvent,
};
use rstest::rstest;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::time::{Instant, timeout};
use tokio_stream::StreamExt;

use crate::support::relay::Relay;
use crate::support::{Backend, Daemon, Embedded, Fleet, GRACE, MongoDb, PATIENCE, eventually, ms, secs};

/// Waits for a future that must complete soon.
async fn soon<T>(future: impl Future<Output = T>) -> T {
    timeout(PATIENCE, future).await.expect("in time")
}

/// Waits until the state of `key` fulfils the condition.
async fn until_key(client: &Client, key: &str, condition: impl Fn(&KeyInfo) -> bool) -> KeyInfo {
    eventually(async || client.get(key).await.ok().filter(|info| condition(info))).await
}

#[rstest]
#[tokio::test]
async fn a_lease_is_granted_shown_refused_to_others_and_released(
    #[values(Embedded, MongoDb, Fleet)] backend: Backend,
) {
    let daemon = Daemon::start(backend).await;
    let client = daemon.holder().await;
    let lease = client.acquire("job").owner("me").ttl(secs(20)).metadata("build", "7").await.unwrap();
    assert_eq!((lease.key(), lease.ttl(), lease.is_held()), ("job", secs(20), true));
    assert!(lease.remaining() > secs(10) && lease.remaining() < secs(20));

    let info = client.get("job").await.unwrap();
    assert_eq!((info.state, info.token), (KeyState::Held, lease.token()));
    assert_eq!((info.holders[0].owner.as_str(), info.holders[0].ttl), ("me", secs(20)));
    assert_eq!(info.holders[0].metadata["build"], "7");

    let Err(Error::Held(held)) = client.acquire("job").await else { panic!("the key is held") };
    assert_eq!((held.owner.as_str(), held.token, held.position), ("me", lease.token(), None));
    let Err(Error::Held(held)) = client.acquire("job").wait(secs(1)).await else {
        panic!("it is still held")
    };
    assert_eq!(held.position, Some(0));

    let token = lease.token();
    lease.release().await.unwrap();
    assert_eq!(client.get("job").await.unwrap().state, KeyState::Free);
    assert!(client.acquire("job").await.unwrap().token() > token);
}

#[rstest]
#[tokio::test]
async fn a_lease_renews_itself_and_is_released_when_it_is_dropped(
    #[values(Embedded, MongoDb, Fleet)] backend: Backend,
) {
    let daemon = Daemon::start(backend).await;
    let (client, other) = (daemon.holder().await, daemon.holder().await);
    let lease = client.acquire("job").ttl(secs(3)).await.unwrap();
    let waiter = tokio::spawn(async move { other.acquire("job").wait(secs(60)).await });
    let start = Instant::now();
    while start.elapsed() < secs(7) {
        assert!(lease.is_held() && !waiter.is_finished(), "held over several TTLs");
        tokio::time::sleep(ms(100)).await;
    }
    let token = lease.token();
    drop(lease);
    let next = soon(waiter).await.unwrap().unwrap();
    assert!(next.token() > token && next.is_held());

    // A waiter does not wait for the TTL of a dropped lease.
    let long = client.acquire("another").ttl(secs(3600)).await.unwrap();
    let waiting = client.acquire("another").wait(secs(600)).into_future();
    drop(long);
    soon(waiting).await.unwrap().release().await.unwrap();
}

#[rstest]
#[tokio::test]
async fn one_stream_keeps_many_leases_alive(#[values(Embedded, MongoDb)] backend: Backend) {
    let daemon = Daemon::start(backend).await;
    let client = daemon.holder().await;
    let mut leases: Vec<Lease> = Vec::new();
    for number in 0..300 {
        leases.push(client.acquire(format!("job/{number}")).ttl(secs(4)).await.unwrap());
    }
    tokio::time::sleep(secs(6)).await;
    assert!(leases.iter().all(Lease::is_held));
}

#[rstest]
#[tokio::test]
async fn many_leases_that_are_dropped_are_released(#[values(Embedded, MongoDb)] backend: Backend) {
    let daemon = Daemon::start(backend).await;
    let client = daemon.holder().await;
    let mut leases: Vec<Lease> = Vec::new();
    for number in 0..300 {
        // None of them lapses before its release arrives, however busy the machine is.
        leases.push(client.acquire(format!("job/{number}")).ttl(secs(600)).await.unwrap());
    }
    drop(leases);
    client.settle().await;
    let left = client.list("job/").stream().collect::<Vec<_>>().await;
    assert!(left.is_empty(), "all leases are released: {left:?}");
}

#[rstest]
#[tokio::test]
async fn a_cancelled_acquire_leaves_neither_a_lease_nor_a_waiter(
    #[values(Embedded, MongoDb, Fleet)] backend: Backend,
) {
    let daemon = Daemon::start(backend).await;
    let client = daemon.holder().await;
    let lease = client.acquire("job").ttl(secs(600)).await.unwrap();
    let waiting = tokio::spawn(client.acquire("job").ttl(secs(600)).wait(secs(600)).into_future());
    until_key(&client, "job", |info| info.waiters.len() == 1).await;
    waiting.abort();
    until_key(&client, "job", |info| info.waiters.is_empty()).await;

    lease.release().await.unwrap();
    for number in 0..50 {
        // The future is dropped at some moment between the request and its answer.
        let acquiring = client.acquire("busy").ttl(secs(600)).into_future();
        drop(timeout(Duration::from_micros(number * 200), acquiring).await);
    }
    eventually(async || match client.get("busy").await {
        Ok(info) => (info.state == KeyState::Free).then_some(()),
        Err(Error::KeyUnknown) => Some(()),
        Err(error) => panic!("{error}"),
    })
    .await;
}

#[rstest]
#[tokio::test]
async fn a_loss_is_reported_at_once_and_stops_the_work(#[values(Embedded, MongoDb, Fleet)] backend: Backend) {
    let daemon = Daemon::start(backend).await;
    let client = daemon.holder().await;
    // With this TTL, the next touch is due long after the test has failed.
    let lease = client.acquire("job").ttl(secs(3600)).await.unwrap();
    let stop = lease.stop_token();
    let mut state = lease.state();
    assert_eq!(client.revoke("job", Some(lease.token()), "a test").await.unwrap(), 1);
    let stopped = soon(lease.run(std::future::pending::<()>())).await;
    assert!(matches!(stopped, Err(Error::Lost(Loss::Revoked))), "{stopped:?}");
    soon(stop.cancelled()).await;
    assert_eq!(soon(state.changed()).await, State::Lost(Loss::Revoked));
    assert_eq!(soon(lease.lost_for_good()).await, Loss::Revoked);
    assert!(lease.remaining().is_zero());
    let released = lease.release().await;
    assert!(matches!(released, Err(Error::Lost(Loss::Revoked))), "{released:?}");
}

#[tokio::test]
async fn leases_move_to_another_daemon_when_their_daemon_ends() {
    let one = Daemon::start(MongoDb).await;
    let two = one.sibling().await;
    let urls = [one.urls(), two.urls()].concat();
    let client = Client::connect(&urls).await.unwrap();
    let lease = client.acquire("job").ttl(secs(6)).await.unwrap();
    let mut state = lease.state();
    let waiting = tokio::spawn(client.acquire("job").wait(secs(600)).into_future());
    until_key(&client, "job", |info| info.waiters.len() == 1).await;

    one.stop().await;
    let fresh = Client::connect(two.urls()).await.unwrap();
    let start = Instant::now();
    while start.elapsed() < secs(8) {
        assert!(lease.is_held());
        tokio::time::sleep(ms(50)).await;
    }
    assert!(state.changed().now_or_never().is_none(), "held throughout");
    until_key(&fresh, "job", |info| info.waiters.len() == 1).await;
    lease.release().await.unwrap();
    soon(waiting).await.unwrap().unwrap().release().await.unwrap();
}

#[tokio::test]
async fn a_holder_without_a_daemon_stops_before_another_can_hold_the_key() {
    let one = Daemon::start(MongoDb).await;
    let two = one.sibling().await;
    // On a slow machine the program may be late by up to the margin.
    let (ttl, margin) = (secs(6), secs(3));
    let client = Client::connect(one.urls()).await.unwrap();
    let lease = client.acquire("job").ttl(ttl).margin(margin).await.unwrap();
    let other = Client::connect(two.urls()).await.unwrap();
    let next = tokio::spawn(other.acquire("job").wait(secs(600)).into_future());
    one.stop().await;
    let silent = Instant::now();
    assert_eq!(soon(lease.lost()).await, State::Jeopardy);
    assert!(silent.elapsed() < ttl, "the TTL is counted from the last confirmed touch");
    assert!(!next.is_finished(), "nobody holds the key yet");
    let next = soon(next).await.unwrap().unwrap();
    assert!(!lease.is_held() && next.is_held() && next.token() > lease.token());
    assert!(silent.elapsed() >= margin + GRACE);
}

#[rstest]
#[tokio::test]
async fn shared_leases_are_held_together_up_to_their_limit(#[values(Embedded, MongoDb)] backend: Backend) {
    let daemon = Daemon::start(backend).await;
    let client = daemon.holder().await;
    let one = client.acquire("pool").shared(2).await.unwrap();
    let two = client.acquire("pool").shared(2).await.unwrap();
    assert!(matches!(client.acquire("pool").shared(2).await, Err(Error::Held(_))));
    assert!(two.token() > one.token());
    one.release().await.unwrap();
    client.acquire("pool").shared(2).await.unwrap().release().await.unwrap();
}

#[rstest]
#[tokio::test]
async fn a_lease_can_be_handed_over_and_touched_without_a_guard(
    #[values(Embedded, MongoDb)] backend: Backend,
) {
    let daemon = Daemon::start(backend).await;
    let client = daemon.holder().await;
    let id = client.acquire("job").ttl(secs(5)).await.unwrap().detach();
    let remaining = client.touch("job", id).await.unwrap();
    assert!(remaining > secs(4) && remaining <= secs(5), "{remaining:?}");
    client.release("job", id).await.unwrap();
    assert!(matches!(client.touch("job", id).await, Err(Error::Lost(Loss::Released))));
}

#[rstest]
#[tokio::test]
async fn a_list_reads_all_pages(#[values(Embedded, MongoDb)] backend: Backend) {
    let daemon = Daemon::start(backend).await;
    let client = daemon.holder().await;
    let mut leases = Vec::new();
    for number in 0..25 {
        leases.push(client.acquire(format!("a/{number:02}")).await.unwrap());
    }
    let _elsewhere = client.acquire("b").await.unwrap();
    leases.pop().unwrap().release().await.unwrap();
    let keys = |list: leased_client::List| async {
        let keys: Vec<KeyInfo> = list.page_size(7).stream().map(Result::unwrap).collect().await;
        keys.into_iter().map(|info| info.key).collect::<Vec<_>>()
    };
    assert_eq!(keys(client.list("a/")).await, (0..24).map(|n| format!("a/{n:02}")).collect::<Vec<_>>());
    assert_eq!(keys(client.list("a/").include_free()).await.len(), 25);
    let invalid = client.list("x".repeat(1000)).stream().next().await;
    assert!(matches!(invalid, Some(Err(Error::Invalid(_)))), "{invalid:?}");
}

#[tokio::test]
async fn a_watch_reconnects_to_another_daemon_and_gets_a_snapshot() {
    let one = Daemon::start(MongoDb).await;
    let two = one.sibling().await;
    let watcher = Client::connect(one.urls().iter().chain(&two.urls())).await.unwrap();
    let actor = Client::connect(two.urls()).await.unwrap();
    let lease = actor.acquire("job").await.unwrap();
    let mut events = watcher.watch("").stream();
    let mut next = async || soon(events.next()).await.unwrap().unwrap();
    assert!(matches!(next().await, WatchEvent::Snapshot(info) if info.key == "job"));
    assert_eq!(next().await, WatchEvent::SnapshotEnd);
    lease.release().await.unwrap();
    let WatchEvent::Change { kind, key } = next().await else { panic!("a change") };
    assert_eq!((kind, key.key.as_str()), (ChangeKind::Released, "job"));

    // The client may watch either daemon. If it watches this one, it has to reconnect to the other.
    one.stop().await;
    let _lease = actor.acquire("other").await.unwrap();
    let mut seen = Vec::new();
    while !seen.iter().any(|event| matches!(event, WatchEvent::Snapshot(info) | WatchEvent::Change { key: info, .. } if info.key == "other"))
    {
        seen.push(next().await);
    }
}

#[tokio::test]
async fn errors_distinguish_a_silent_endpoint_a_closed_one_and_one_without_leased() {
    let begun = Instant::now();
    let builder = || Client::builder().timeout(secs(1));
    let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = |listener: &TcpListener| format!("http://{}", listener.local_addr().unwrap());

    // The system accepts the connection, and no program ever answers on it.
    let silent = builder().endpoint(&url(&nobody)).unwrap().connect().await.unwrap_err();
    assert!(
        matches!(&silent, Error::Unavailable { endpoints, .. } if *endpoints == url(&nobody)),
        "{silent}"
    );
    let closed = url(&nobody);
    drop(nobody);
    let closed = builder().endpoint(&closed).unwrap().connect().await.unwrap_err();
    assert!(matches!(&closed, Error::Unavailable { cause, .. } if cause.contains("refused")), "{closed}");

    let web = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let web_url = url(&web);
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = web.accept().await {
            drop(stream.read(&mut [0; 1024]).await);
            drop(stream.write_all(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n").await);
        }
    });
    let web = builder().endpoint(&web_url).unwrap().connect().await.unwrap_err();
    assert!(matches!(&web, Error::NotLeased { endpoint, .. } if *endpoint == web_url), "{web:?}");

    for invalid in ["", "localhost", "ftp://localhost", "https://localhost", "http://"] {
        assert!(matches!(builder().endpoint(invalid), Err(Error::Invalid(_))), "{invalid:?}");
    }
    assert!(matches!(builder().connect().await, Err(Error::Invalid(_))));
    assert!(begun.elapsed() < PATIENCE, "each attempt ends within its timeout");
}

/// A call without an answer may have succeeded, so the client repeats it. The repetition must not
/// revoke the lease of the next holder.
#[rstest]
#[tokio::test]
async fn a_repeated_revocation_spares_the_next_holder(#[values(Embedded, MongoDb)] backend: Backend) {
    let daemon = Daemon::start(backend).await;
    let relay = Relay::losing_the_answer_to("the host is gone", daemon.grpc).await;
    let (holder, operator) = (daemon.holder().await, Client::connect([relay.url()]).await.unwrap());
    let lease = holder.acquire("job").ttl(secs(60)).await.unwrap();
    let waiter = tokio::spawn(holder.acquire("job").ttl(secs(60)).wait(secs(60)).into_future());
    until_key(&holder, "job", |info| info.waiters.len() == 1).await;

    let revoking = tokio::spawn(async move { operator.revoke("job", None, "the host is gone").await });
    let next = soon(waiter).await.unwrap().unwrap();
    assert!(next.token() > lease.token() && !revoking.is_finished());
    relay.close_unanswered();
    soon(revoking).await.unwrap().unwrap();
    assert_eq!(holder.get("job").await.unwrap().holders[0].token, next.token());
    assert!(next.is_held());
}

#[tokio::test]
async fn invalid_requests_are_refused() {
    let daemon = Daemon::start(Embedded).await;
    let client = daemon.holder().await;
    for acquire in [
        client.acquire(""),
        client.acquire("job").ttl(ms(1)),
        client.acquire("job").wait(Duration::MAX),
        // A lease of 6 s is touched every 2 s. With a margin of 4 s it would be in jeopardy before
        // its next touch.
        client.acquire("job").ttl(secs(6)).margin(secs(4)),
        client.acquire("job").margin(secs(3600)),
    ] {
        let refused = acquire.await;
        assert!(matches!(refused, Err(Error::Invalid(_))), "{refused:?}");
    }
    assert!(matches!(client.get("unknown").await, Err(Error::KeyUnknown)));
}

/// Fencing tokens exist for this case: a holder that was paused writes late, and the resource
/// refuses the write.
#[tokio::test]
async fn a_resource_refuses_the_write_of_a_holder_that_lost_its_lease() {
    let daemon = Daemon::start(Embedded).await;
    let (client, resource) = (daemon.holder().await, FencingGuard::new());
    let paused = client.acquire("job").ttl(ms(300)).await.unwrap();
    let token = paused.token();
    resource.check("job", token).unwrap();
    let _id = paused.detach();
    let next = client.acquire("job").wait(secs(60)).await.unwrap();
    resource.check("job", next.token()).unwrap();
    let stale = resource.check("job", token).unwrap_err();
    assert_eq!((stale.token, stale.seen), (token, next.token()));
    resource.check("another", FencingToken::new(1)).unwrap();
}

#[tokio::test]
async fn a_refused_margin_leaves_no_lease() {
    let daemon = Daemon::start(Embedded).await;
    let client = daemon.holder().await;
    client.acquire("job").margin(secs(3600)).await.unwrap_err();
    client.settle().await;
    client.acquire("job").await.unwrap().release().await.unwrap();
}

#[rstest]
#[tokio::test]
async fn any_part_of_a_program_can_release_a_lease_that_it_shares(
    #[values(Embedded, MongoDb)] backend: Backend,
) {
    let daemon = Daemon::start(backend).await;
    let client = daemon.holder().await;
    let lease = Arc::new(client.acquire("job").await.unwrap());
    let part = Arc::clone(&lease);
    let worker = tokio::spawn(async move { part.run(std::future::pending::<()>()).await });
    lease.release().await.unwrap();
    assert_eq!(client.get("job").await.unwrap().state, KeyState::Free);
    let stopped = soon(worker).await.unwrap();
    assert!(matches!(stopped, Err(Error::Lost(Loss::Released))), "{stopped:?}");
    lease.release().await.unwrap();
    let next = client.acquire("job").await.unwrap();
    drop(lease);
    client.settle().await;
    assert!(next.is_held(), "dropping a released lease does not release the next one");
}

/// The runtime has one thread, so work that blocks this thread also stops the client from renewing.
#[tokio::test]
async fn work_that_ends_after_its_lease_is_reported_as_late() {
    let daemon = Daemon::start(Embedded).await;
    let client = daemon.holder().await;
    let lease = client.acquire("job").ttl(ms(300)).await.unwrap();
    let (_never, blocked) = std::sync::mpsc::channel::<()>();
    let late = lease.run(async { blocked.recv_timeout(ms(600)) }).await;
    assert!(matches!(late, Err(Error::EndedLate { .. })), "{late:?}");
}
