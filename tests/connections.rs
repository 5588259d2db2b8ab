//! The connections of the client crate: many calls at once, silent connections, host names, long
//! timeouts.

use leased_client::{Client, KeyState};
use rstest::rstest;
use tokio::time::{Instant, timeout};
use tokio_util::task::AbortOnDropHandle;

use crate::support::relay::Relay;
use crate::support::{Backend, Daemon, Embedded, MongoDb, PATIENCE, eventually, ms, secs};

#[rstest]
#[tokio::test]
async fn a_thousand_waiting_calls_lose_no_lease_of_their_client(
    #[values(Embedded, MongoDb)] backend: Backend,
) {
    const WAITERS: usize = 1000;
    let daemon = Daemon::start(backend).await;
    let (client, ttl) = (daemon.holder().await, secs(6));
    let lease = client.acquire("job").ttl(ttl).await.unwrap();
    let stop = lease.stop_token();
    let waiting: Vec<_> = (0..WAITERS)
        .map(|_| AbortOnDropHandle::new(tokio::spawn(client.acquire("job").wait(secs(600)).into_future())))
        .collect();
    eventually(async || client.get("job").await.ok().filter(|info| info.waiters.len() == WAITERS)).await;
    let start = Instant::now();
    while start.elapsed() < ttl + ttl / 3 {
        let other = client.acquire("other").await.unwrap();
        other.release().await.unwrap();
        assert_eq!(client.get("other").await.unwrap().state, KeyState::Free);
        tokio::time::sleep(ms(100)).await;
    }
    assert!(!stop.is_cancelled(), "held throughout");
    lease.release().await.unwrap();
    drop(waiting);
    eventually(async || client.get("job").await.ok().filter(|info| info.waiters.is_empty())).await;
}

#[tokio::test]
async fn a_lease_survives_silent_connections_to_the_only_endpoint() {
    let daemon = Daemon::start(Embedded).await;
    let relay = Relay::to(daemon.grpc).await;
    let client = Client::connect([relay.url()]).await.unwrap();
    let ttl = secs(5);
    let lease = client.acquire("job").ttl(ttl).await.unwrap();
    let stop = lease.stop_token();
    for _ in 0..3 {
        tokio::time::sleep(ttl / 2).await;
        let before = relay.count();
        relay.silence();
        eventually(async || (relay.count() > before).then_some(())).await;
        assert!(!stop.is_cancelled(), "the client did not reconnect in time");
    }
    tokio::time::sleep(ttl).await;
    assert!(!stop.is_cancelled(), "held throughout");
    lease.release().await.unwrap();
}

#[tokio::test]
async fn a_daemon_is_found_by_its_host_name() {
    let daemon = Daemon::start(Embedded).await;
    let client = Client::connect([format!("http://localhost:{}", daemon.grpc.port())]).await.unwrap();
    let lease = client.acquire("job").await.unwrap();
    lease.release().await.unwrap();
}

#[tokio::test]
async fn the_revocation_of_a_lease_is_reported_at_once_even_right_after_its_grant() {
    let daemon = Daemon::start(Embedded).await;
    let (client, operator) = (daemon.holder().await, daemon.holder().await);
    // With this TTL the next touch is due after minutes. The loss must be reported earlier.
    let lease = client.acquire("job").ttl(secs(3600)).await.unwrap();
    operator.revoke("job", Some(lease.token()), "a test").await.unwrap();
    timeout(PATIENCE, lease.lost()).await.expect("the loss is reported at once");
}

#[tokio::test]
async fn the_longest_possible_timeout_is_accepted() {
    let daemon = Daemon::start(Embedded).await;
    let url = format!("http://{}", daemon.grpc);
    let client =
        Client::builder().timeout(std::time::Duration::MAX).endpoint(&url).unwrap().connect().await.unwrap();
    let lease = client.acquire("job").wait(secs(60)).await.unwrap();
    let waiting = tokio::spawn(client.acquire("job").wait(secs(3600)).into_future());
    eventually(async || client.get("job").await.ok().filter(|info| info.waiters.len() == 1)).await;
    lease.release().await.unwrap();
    timeout(PATIENCE, waiting).await.unwrap().unwrap().unwrap().release().await.unwrap();
    client.settle().await;
}
