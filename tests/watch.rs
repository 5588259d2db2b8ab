//! Watching keys: a snapshot first, then every change.

use leased_client::Reason;
use leased_client::v1::watch_response::Event;
use leased_client::v1::{
    AcquireRequest, ChangeKind, KeepAliveRequest, Lease, LeaseState, RevokeRequest, WatchRequest,
    WatchResponse,
};
use rstest::rstest;
use tokio::time::timeout;
use tonic::{Code, Status, Streaming};

use crate::support::{
    AcquireBuilder, Backend, Calls, Daemon, Embedded, Fleet, Leases, MongoDb, PATIENCE, acquire,
    invalid_fields, ms, refusal, secs, until_queued,
};

/// A watch stream.
pub(crate) struct Watch(Streaming<WatchResponse>);

impl Watch {
    /// Watches all keys under `prefix`. Returns the watch and its snapshot.
    pub(crate) async fn open(client: &mut Leases, prefix: &str) -> (Self, Vec<Lease>) {
        let request = WatchRequest { prefix: prefix.to_owned(), changes_only: false };
        let mut watch = Self(client.watch(request).await.unwrap().into_inner());
        let snapshot = watch.snapshot().await;
        (watch, snapshot)
    }

    /// Watches the changes of all keys under `prefix` from now on, without a snapshot.
    pub(crate) async fn changes_only(client: &mut Leases, prefix: &str) -> Self {
        let request = WatchRequest { prefix: prefix.to_owned(), changes_only: true };
        Self(client.watch(request).await.unwrap().into_inner())
    }

    async fn snapshot(&mut self) -> Vec<Lease> {
        let mut leases = Vec::new();
        loop {
            match self.event().await.unwrap() {
                Event::Snapshot(lease) => leases.push(lease),
                Event::SnapshotEnd(_) => return leases,
                Event::Change(change) => panic!("a change within the snapshot: {change:?}"),
            }
        }
    }

    async fn event(&mut self) -> Result<Event, Status> {
        let message = timeout(PATIENCE, self.0.message()).await.expect("no event in time")?;
        Ok(message.expect("the watch has ended").event.unwrap())
    }

    /// Returns the next change: its kind, and the state of the key after it.
    pub(crate) async fn change(&mut self) -> (ChangeKind, Lease) {
        match self.event().await.unwrap() {
            Event::Change(change) => (change.kind(), change.lease.unwrap()),
            other => panic!("not a change: {other:?}"),
        }
    }

    /// Returns the kinds of the next `count` changes, which must all be of `key`.
    pub(crate) async fn kinds(&mut self, key: &str, count: usize) -> Vec<ChangeKind> {
        let mut kinds = Vec::new();
        for _ in 0..count {
            let (kind, lease) = self.change().await;
            assert_eq!(lease.key, key);
            kinds.push(kind);
        }
        kinds
    }
}

#[rstest]
#[tokio::test]
async fn a_watch_shows_a_snapshot_and_then_every_change(
    #[values(Embedded, MongoDb, Fleet)] backend: Backend,
) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    client.get_lease(acquire("a/held").owner("first").ttl(secs(60))).await.unwrap();
    let freed = client.get_lease(acquire("a/freed")).await.unwrap().lease.unwrap();
    client.give_back(&freed).await.unwrap();
    client.get_lease(acquire("b/other").ttl(secs(60))).await.unwrap();

    let (mut watch, snapshot) = Watch::open(&mut daemon.client().await, "a/").await;
    assert_eq!(snapshot.iter().map(|lease| lease.key.as_str()).collect::<Vec<_>>(), ["a/held"]);
    assert_eq!(snapshot[0].holders[0].owner, "first");

    client.get_lease(acquire("b/new")).await.unwrap();
    let granted = client.get_lease(acquire("a/new").owner("me").ttl(secs(60))).await.unwrap();
    let (kind, lease) = watch.change().await;
    assert_eq!((kind, lease.key.as_str(), lease.state()), (ChangeKind::Granted, "a/new", LeaseState::Held));
    assert_eq!((lease.fencing_token, lease.holders[0].owner.as_str()), (granted.fencing_token, "me"));

    let mut waiting = client.clone();
    let call =
        tokio::spawn(async move { waiting.get_lease(acquire("a/new").owner("next").wait(secs(60))).await });
    let (kind, lease) = watch.change().await;
    assert_eq!((kind, lease.waiters[0].owner.as_str()), (ChangeKind::Queued, "next"));
    client.give_back(&granted.lease.unwrap()).await.unwrap();
    assert_eq!(watch.kinds("a/new", 2).await, [ChangeKind::Released, ChangeKind::Granted]);
    let next = call.await.unwrap().unwrap();

    let revoke = RevokeRequest { key: "a/new".to_owned(), ..RevokeRequest::default() };
    daemon.admin().await.revoke(revoke).await.unwrap();
    let (kind, lease) = watch.change().await;
    assert_eq!((kind, lease.state()), (ChangeKind::Revoked, LeaseState::Free));
    assert_eq!(lease.fencing_token, next.fencing_token);
}

#[rstest]
#[tokio::test]
async fn a_waiter_that_hangs_up_is_reported_as_left_queue(
    #[values(Embedded, MongoDb, Fleet)] backend: Backend,
) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    client.get_lease(acquire("job").ttl(secs(60))).await.unwrap();
    let mut watch = Watch::changes_only(&mut daemon.client().await, "").await;
    let mut waiting = client.clone();
    let call = tokio::spawn(async move { waiting.get_lease(acquire("job").wait(secs(60))).await });
    assert_eq!(watch.kinds("job", 1).await, [ChangeKind::Queued]);
    until_queued(&mut client, "job", 1).await;
    call.abort();
    assert_eq!(watch.kinds("job", 1).await, [ChangeKind::LeftQueue]);
}

/// A lapse writes nothing, so the daemon cannot learn of it from a write.
#[rstest]
#[tokio::test]
async fn a_lapse_is_reported_when_it_happens_and_not_before(
    #[values(Embedded, MongoDb, Fleet)] backend: Backend,
) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    client.get_lease(acquire("before").ttl(ms(1200))).await.unwrap();
    let mut watch = Watch::changes_only(&mut daemon.client().await, "").await;
    let granted = client.get_lease(acquire("after").ttl(ms(900))).await.unwrap();
    assert_eq!(watch.kinds("after", 1).await, [ChangeKind::Granted]);
    let mut lapsed = Vec::new();
    for _ in 0..2 {
        let (kind, lease) = watch.change().await;
        assert_eq!((kind, lease.state()), (ChangeKind::Lapsed, LeaseState::Lapsed));
        assert_eq!(lease.holders[0].remaining, Some(prost_types::Duration::default()));
        lapsed.push(lease.key);
    }
    lapsed.sort();
    assert_eq!(lapsed, ["after", "before"]);
    client.renew(&granted.lease.unwrap()).await.unwrap();
    assert_eq!(watch.change().await.0, ChangeKind::Granted, "the lapsed lease is touched, and so held again");
}

#[rstest]
#[tokio::test]
async fn a_lease_that_is_kept_alive_is_not_reported_as_lapsed(
    #[values(Embedded, MongoDb, Fleet)] backend: Backend,
) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    let lease = client.get_lease(acquire("kept").ttl(ms(600))).await.unwrap().lease.unwrap();
    let mut watch = Watch::changes_only(&mut daemon.client().await, "").await;
    let beats = tokio_stream::StreamExt::throttle(tokio_stream::iter(1..=12), ms(120));
    let named = lease.clone();
    let beats = tokio_stream::StreamExt::map(beats, move |sequence| KeepAliveRequest {
        leases: vec![named.clone()],
        sequence,
    });
    let mut answers = client.keep_alive(beats).await.unwrap().into_inner();
    while answers.message().await.unwrap().is_some() {}
    client.give_back(&lease).await.unwrap();
    assert_eq!(
        watch.kinds("kept", 1).await,
        [ChangeKind::Released],
        "the lease has not lapsed for more than two TTLs"
    );
}

/// A lease lapses before another displaces it, so a takeover is always reported as a lapse and a
/// grant.
#[rstest]
#[tokio::test]
async fn a_takeover_is_reported_as_a_lapse_and_a_grant(#[values(Embedded, MongoDb, Fleet)] backend: Backend) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    let mut watch = Watch::changes_only(&mut daemon.client().await, "").await;
    client.get_lease(acquire("job").ttl(ms(300))).await.unwrap();
    let next = client.get_lease(acquire("job").wait(secs(60))).await.unwrap();
    assert_eq!(
        watch.kinds("job", 4).await,
        [ChangeKind::Granted, ChangeKind::Queued, ChangeKind::Lapsed, ChangeKind::Granted]
    );
    assert!(next.waited);
}

#[rstest]
#[tokio::test]
async fn every_change_of_a_busy_key_is_reported_in_order(
    #[values(Embedded, MongoDb, Fleet)] backend: Backend,
) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    let mut watch = Watch::changes_only(&mut daemon.client().await, "busy").await;
    let mut tokens = Vec::new();
    for _ in 0..50 {
        let granted = client.get_lease(acquire("busy").ttl(secs(60))).await.unwrap();
        tokens.push(granted.fencing_token);
        client.give_back(&granted.lease.unwrap()).await.unwrap();
    }
    for token in tokens {
        let (kind, lease) = watch.change().await;
        assert_eq!(kind, ChangeKind::Granted);
        // Before another daemon reads the record, the lease may be released and the key granted
        // again.
        assert!(lease.fencing_token == token || backend == Fleet && lease.fencing_token > token);
        assert_eq!(watch.kinds("busy", 1).await, [ChangeKind::Released]);
    }
}

/// The caller reads nothing while many changes happen. The daemon drops changes of this watch, and
/// sends a new snapshot instead.
#[rstest]
#[tokio::test]
async fn a_watcher_that_falls_behind_gets_a_new_snapshot(
    #[values(Embedded, MongoDb, Fleet)] backend: Backend,
) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    let mut slow = daemon.client().await;
    let mut watch = Watch::changes_only(&mut slow, "").await;
    let bulky = |key: &str| AcquireRequest {
        metadata: [("x".to_owned(), "y".repeat(4000))].into(),
        ..acquire(key).ttl(secs(600))
    };
    let mut calls = tokio::task::JoinSet::new();
    for number in 0..64 {
        let mut client = client.clone();
        calls.spawn(async move {
            for round in 0..60 {
                let key = format!("key/{number}");
                let granted = client.get_lease(bulky(&key)).await.unwrap();
                if round < 59 {
                    client.give_back(&granted.lease.unwrap()).await.unwrap();
                }
            }
        });
    }
    calls.join_all().await;

    // The buffered changes arrive first, and then the new snapshot.
    let first = loop {
        match watch.event().await.unwrap() {
            Event::Change(_) => {}
            Event::Snapshot(lease) => break lease,
            Event::SnapshotEnd(_) => panic!("an empty snapshot"),
        }
    };
    let mut keys: Vec<String> = watch.snapshot().await.into_iter().map(|lease| lease.key).collect();
    keys.push(first.key);
    assert_eq!(keys.len(), 64);
    client.get_lease(acquire("new")).await.unwrap();
    assert_eq!(watch.kinds("new", 1).await, [ChangeKind::Granted], "the watch goes on after the snapshot");
}

#[rstest]
#[tokio::test]
async fn a_watch_shows_no_lease_id(#[values(Embedded, MongoDb, Fleet)] backend: Backend) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    let id = uuid::Uuid::new_v4();
    let mut watch = Watch::changes_only(&mut daemon.client().await, "").await;
    let lease = client.get_lease(acquire("job").id(id)).await.unwrap().lease.unwrap();
    client.give_back(&lease).await.unwrap();
    for _ in 0..2 {
        let shown = format!("{:?}", watch.change().await);
        assert!(!shown.contains(&id.to_string()) && !shown.contains(&id.simple().to_string()), "{shown}");
    }
}

#[rstest]
#[tokio::test]
async fn a_drain_ends_a_watch_with_the_reason_shutting_down(#[values(Embedded, MongoDb)] backend: Backend) {
    let daemon = Daemon::start(backend).await;
    let (mut watch, _) = Watch::open(&mut daemon.client().await, "").await;
    daemon.drain();
    let status = watch.event().await.unwrap_err();
    assert_eq!((status.code(), refusal(&status, "").0), (Code::Unavailable, Some(Reason::ShuttingDown)));
}

#[tokio::test]
async fn watches_are_limited_in_number_and_an_invalid_prefix_is_refused() {
    let daemon = Daemon::start_with(Embedded, |config| config.limits.bounds.watches = 2).await;
    let mut client = daemon.client().await;
    let one = Watch::changes_only(&mut client, "").await;
    let _two = Watch::changes_only(&mut client, "").await;
    let status = client.watch(WatchRequest::default()).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert_eq!(refusal(&status, "limit"), (Some(Reason::LimitExceeded), "watches".to_owned()));
    drop(one);
    crate::support::eventually(async || client.watch(WatchRequest::default()).await.ok()).await;

    let prefix = "p".repeat(513);
    let status = client.watch(WatchRequest { prefix, changes_only: false }).await.unwrap_err();
    assert_eq!(invalid_fields(&status), ["prefix"]);
}
