//! Renews leases on a keepalive stream.

use std::time::Duration;

use leased_client::v1::keep_alive_result::Outcome;
use leased_client::v1::{
    KeepAliveRequest, KeepAliveResponse, KeepAliveResult, LeaseRef, LossReason, RefusalReason,
};
use rstest::rstest;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};
use uuid::Uuid;

use crate::support::{
    AcquireBuilder, Backend, Calls, Daemon, Embedded, Fleet, Leases, MongoDb, PATIENCE, acquire, ms, named,
    refusal, secs,
};

/// A keepalive stream, opened with the generated stub.
pub(crate) struct KeepAlive {
    requests: mpsc::Sender<KeepAliveRequest>,
    answers: Streaming<KeepAliveResponse>,
    sequence: u64,
}

impl KeepAlive {
    pub(crate) async fn open(client: &mut Leases) -> Self {
        let (requests, receiver) = mpsc::channel(64);
        let answers = client.keep_alive(ReceiverStream::new(receiver)).await.unwrap().into_inner();
        Self { requests, answers, sequence: 0 }
    }

    /// Sends a message that names `leases`, and returns its sequence number.
    pub(crate) async fn send(&mut self, leases: &[LeaseRef]) -> u64 {
        self.sequence += 1;
        self.send_raw(KeepAliveRequest { leases: leases.to_vec(), sequence: self.sequence }).await;
        self.sequence
    }

    /// Sends `message` unchanged, whatever its sequence number.
    pub(crate) async fn send_raw(&mut self, message: KeepAliveRequest) {
        self.requests.send(message).await.unwrap();
    }

    pub(crate) async fn next(&mut self) -> Result<KeepAliveResponse, Status> {
        timeout(PATIENCE, self.answers.message()).await.unwrap().map(Option::unwrap)
    }

    /// Reads the next message, which the daemon pushes. Returns the lost leases in it, and
    /// why each was lost.
    pub(crate) async fn reported(&mut self) -> Vec<(LeaseRef, LossReason)> {
        let message = self.next().await.unwrap();
        assert_eq!(message.sequence, 0);
        let loss = |result: KeepAliveResult| (result.lease.unwrap(), lost(&result.outcome.unwrap()));
        message.results.into_iter().map(loss).collect()
    }

    /// Sends one message, and returns the leases of its answer with their outcomes.
    pub(crate) async fn touch(&mut self, leases: &[LeaseRef]) -> Vec<(LeaseRef, Outcome)> {
        let parts = self.touch_in_parts(leases).await;
        parts.into_iter().flatten().map(|result| (result.lease.unwrap(), result.outcome.unwrap())).collect()
    }

    /// Sends one message, and returns the results of each part of its answer.
    pub(crate) async fn touch_in_parts(&mut self, leases: &[LeaseRef]) -> Vec<Vec<KeepAliveResult>> {
        let sequence = self.send(leases).await;
        let mut parts = Vec::new();
        loop {
            let answer = self.next().await.unwrap();
            assert_eq!(answer.sequence, sequence);
            parts.push(answer.results);
            if !answer.more {
                return parts;
            }
        }
    }
}

/// Returns how long the lease is kept. Panics on any other outcome.
pub(crate) fn kept(outcome: &Outcome) -> Duration {
    match outcome {
        Outcome::Kept(kept) => kept.remaining.unwrap().try_into().unwrap(),
        other => panic!("not kept: {other:?}"),
    }
}

/// Returns why the lease is lost. Panics on any other outcome.
pub(crate) fn lost(outcome: &Outcome) -> LossReason {
    match outcome {
        Outcome::Lost(lost) => lost.reason(),
        other => panic!("not lost: {other:?}"),
    }
}

/// Returns why the touch is refused. Panics on any other outcome.
pub(crate) fn refused(outcome: &Outcome) -> RefusalReason {
    match outcome {
        Outcome::Refused(refused) => refused.reason(),
        other => panic!("not refused: {other:?}"),
    }
}

#[rstest]
#[tokio::test]
async fn a_message_that_names_no_lease_touches_all_that_the_stream_tracks(
    #[values(Embedded, MongoDb, Fleet)] backend: Backend,
) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    let first = client.get_lease(acquire("a").ttl(secs(10))).await.unwrap().lease.unwrap();
    let second = client.get_lease(acquire("b").ttl(secs(20))).await.unwrap().lease.unwrap();
    let mut stream = KeepAlive::open(&mut client).await;

    assert!(stream.touch(&[]).await.is_empty(), "the stream does not track any lease yet");
    let results = stream.touch(std::slice::from_ref(&first)).await;
    assert_eq!(results[0].0, first);
    let remaining = kept(&results[0].1);
    assert!(remaining <= secs(10) && remaining > secs(5), "{remaining:?}");
    stream.touch(std::slice::from_ref(&second)).await;

    let mut results = stream.touch(&[]).await;
    results.sort_by(|a, b| a.0.key.cmp(&b.0.key));
    assert_eq!(results.iter().map(|result| &result.0).collect::<Vec<_>>(), [&first, &second]);
    assert!(kept(&results[1].1) > secs(10));
}

#[rstest]
#[tokio::test]
async fn a_lost_lease_ends_neither_its_stream_nor_the_other_leases(
    #[values(Embedded, MongoDb, Fleet)] backend: Backend,
) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    let good = client.get_lease(acquire("good")).await.unwrap().lease.unwrap();
    let released = client.get_lease(acquire("released")).await.unwrap().lease.unwrap();
    client.give_back(&released).await.unwrap();
    let displaced = client.get_lease(acquire("displaced").ttl(ms(100))).await.unwrap().lease.unwrap();
    client.get_lease(acquire("displaced").wait(secs(30))).await.unwrap();
    let unknown = named("good", Uuid::new_v4());

    let mut stream = KeepAlive::open(&mut client).await;
    let results = stream.touch(&[released, good.clone(), displaced, unknown]).await;
    assert_eq!(lost(&results[0].1), LossReason::Released);
    kept(&results[1].1);
    assert_eq!(lost(&results[2].1), LossReason::Displaced);
    assert_eq!(lost(&results[3].1), LossReason::Gone);
    let tracked = stream.touch(&[]).await;
    assert_eq!(
        tracked.iter().map(|result| &result.0).collect::<Vec<_>>(),
        [&good],
        "the stream does not track lost leases"
    );
}

/// This is the point of a lease: once nobody renews it, it expires and the next waiter is granted
/// the key.
#[rstest]
#[tokio::test]
async fn a_lease_outlives_its_ttl_on_a_stream_and_expires_without_one(
    #[values(Embedded, MongoDb, Fleet)] backend: Backend,
) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    let granted = client.get_lease(acquire("job").ttl(ms(600))).await.unwrap();
    let lease = granted.lease.unwrap();
    let mut holder = daemon.client().await;
    let mut stream = KeepAlive::open(&mut holder).await;

    let mut waiting = client.clone();
    let waiter = tokio::spawn(async move { waiting.get_lease(acquire("job").wait(secs(60))).await });
    let start = tokio::time::Instant::now();
    while start.elapsed() < ms(2000) {
        kept(&stream.touch(std::slice::from_ref(&lease)).await[0].1);
        assert!(!waiter.is_finished(), "held over several TTLs");
        tokio::time::sleep(ms(100)).await;
    }
    drop((stream, holder));
    let next = waiter.await.unwrap().unwrap();
    assert!(next.fencing_token > granted.fencing_token);
    assert_eq!(refusal(&client.renew(&lease).await.unwrap_err(), "loss").1, "displaced");
}

/// The daemon answers a message when the store has acknowledged it, and does not wait for earlier
/// messages.
#[rstest]
#[tokio::test]
async fn fifty_messages_may_be_in_flight(#[values(Embedded, MongoDb, Fleet)] backend: Backend) {
    let daemon = Daemon::start_with(backend, |config| config.limits.coalesce_touches = false).await;
    let mut client = daemon.client().await;
    let lease = client.get_lease(acquire("job")).await.unwrap().lease.unwrap();
    let mut stream = KeepAlive::open(&mut client).await;
    for _ in 0..50 {
        stream.send(std::slice::from_ref(&lease)).await;
    }
    let mut answered = Vec::new();
    for _ in 0..50 {
        answered.push(stream.next().await.unwrap().sequence);
    }
    answered.sort_unstable();
    assert_eq!(answered, (1..=50).collect::<Vec<_>>());
}

#[rstest]
#[tokio::test]
async fn a_message_is_answered_after_its_caller_half_closes_the_stream(
    #[values(Embedded, MongoDb, Fleet)] backend: Backend,
) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    let lease = client.get_lease(acquire("job")).await.unwrap().lease.unwrap();
    let request = KeepAliveRequest { leases: vec![lease], sequence: 7 };
    let mut answers = client.keep_alive(tokio_stream::iter([request])).await.unwrap().into_inner();
    assert_eq!(answers.message().await.unwrap().unwrap().sequence, 7);
    assert!(answers.message().await.unwrap().is_none());
}
