//! The client's connections: many calls at once, silence, names, and daemons that come and go.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use leased_client::{Client, KeyState};
use rstest::rstest;
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::{Instant, timeout};
use tokio_util::task::AbortOnDropHandle;

use crate::support::{Daemon, Embedded, Home, MongoDb, PATIENCE, eventually, ms, secs};

/// A relay to a daemon, whose connections can fall silent without being closed. Those made later are passed on.
struct Relay {
    url: String,
    /// Connections with a lower number are silent.
    silent_below: watch::Sender<usize>,
    connections: Arc<AtomicUsize>,
    _task: AbortOnDropHandle<()>,
}

impl Relay {
    async fn to(daemon: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (silent_below, silence) = watch::channel(0);
        let connections = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&connections);
        let task = tokio::spawn(async move {
            while let Ok((mut client, _)) = listener.accept().await {
                let number = count.fetch_add(1, Ordering::Relaxed);
                let mut silence = silence.clone();
                tokio::spawn(async move {
                    let mut server = TcpStream::connect(daemon).await.unwrap();
                    tokio::select! {
                        _ = copy_bidirectional(&mut client, &mut server) => return,
                        _ = silence.wait_for(|below| number < *below) => {}
                    }
                    // Open on both sides, and nothing passes.
                    std::future::pending::<()>().await;
                });
            }
        });
        Self { url, silent_below, connections, _task: AbortOnDropHandle::new(task) }
    }

    fn count(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }

    /// All connections there are fall silent.
    fn hush(&self) {
        self.silent_below.send_replace(self.count());
    }
}

#[rstest]
#[tokio::test]
async fn a_thousand_waiting_calls_take_nothing_from_the_leases_of_their_client(
    #[values(Embedded, MongoDb)] home: Home,
) {
    const WAITERS: usize = 1000;
    let daemon = Daemon::start(home).await;
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
async fn a_lease_survives_connections_that_fall_silent_although_there_is_only_one_endpoint() {
    let daemon = Daemon::start(Embedded).await;
    let relay = Relay::to(daemon.grpc).await;
    let client = Client::connect([&relay.url]).await.unwrap();
    let ttl = secs(5);
    let lease = client.acquire("job").ttl(ttl).await.unwrap();
    let stop = lease.stop_token();
    for _ in 0..3 {
        tokio::time::sleep(ttl / 2).await;
        let before = relay.count();
        relay.hush();
        eventually(async || (relay.count() > before).then_some(())).await;
        assert!(!stop.is_cancelled(), "a new connection came in time");
    }
    tokio::time::sleep(ttl).await;
    assert!(!stop.is_cancelled(), "held throughout");
    lease.release().await.unwrap();
}

#[tokio::test]
async fn a_name_with_an_address_at_which_nobody_answers_works_by_the_other() {
    // The daemon is at 127.0.0.1 only, and the name may have another address beside it.
    let daemon = Daemon::start(Embedded).await;
    let url = format!("http://localhost:{}", daemon.grpc.port());
    for _ in 0..8 {
        let client = Client::connect([&url]).await.unwrap();
        let lease = client.acquire("job").wait(secs(60)).await.unwrap();
        lease.release().await.unwrap();
    }
}

#[tokio::test]
async fn a_lease_of_any_age_is_told_of_its_revocation() {
    let daemon = Daemon::start(Embedded).await;
    let (client, operator) = (daemon.holder().await, daemon.holder().await);
    // Named only when it is due, a lease of this TTL would hear after minutes.
    let lease = client.acquire("job").ttl(secs(3600)).await.unwrap();
    operator.revoke("job", Some(lease.token()), "a test").await.unwrap();
    timeout(PATIENCE, lease.lost()).await.expect("told at once");
}

#[tokio::test]
async fn no_timeout_is_too_long() {
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
