//! Tests each transition of the keeper on a paused clock, against daemons whose answers the test
//! chooses.

use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use leased_proto::v1::keep_alive_result::Outcome;
use leased_proto::v1::{
    self, KeepAliveRequest, KeepAliveResponse, KeepAliveResult, LeaseRef, LossReason, RefusalReason,
};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::task::AbortOnDropHandle;
use uuid::Uuid;

use super::*;
use crate::belief::State;
use crate::endpoints::{Reach, Source};
use crate::holding::Holding;
use crate::holdings::watch_deadlines;
use crate::peer::{Manner, Opened, Peer};
use crate::token::FencingToken;

const TTL: Duration = Duration::from_secs(9);
const MARGIN: Duration = Duration::from_millis(90);
/// How much a paused clock may be off: its timers count whole milliseconds.
const EXACT: Duration = Duration::from_millis(3);
/// How soon the keeper names a new lease.
const NAMED: Duration = Duration::from_millis(5);

/// A keeper, its leases, and its daemons.
struct Rig {
    holdings: Arc<Holdings>,
    peers: [Peer; 2],
    opened: UnboundedReceiver<Opened>,
    refused: UnboundedReceiver<(usize, Instant)>,
    _task: AbortOnDropHandle<()>,
}

impl Rig {
    fn start() -> Self {
        let ((opens, opened), (refuses, refused)) = (unbounded_channel(), unbounded_channel());
        let peers = [0, 1].map(|number| Peer::new(number, opens.clone(), refuses.clone()));
        let holdings = Arc::new(Holdings::default());
        let sources = peers.iter().map(Peer::source).collect();
        let endpoints = Arc::new(Endpoints::new(sources, Duration::from_secs(5)));
        let keeper = Keeper::new(Arc::clone(&holdings), Arc::clone(&endpoints));
        let watched = Arc::clone(&holdings);
        let task = tokio::spawn(async move {
            tokio::join!(
                keeper.run(),
                watch_deadlines(&watched),
                touch_refused(&watched, &endpoints),
                endpoints.maintain()
            );
        });
        Self { holdings, peers, opened, refused, _task: AbortOnDropHandle::new(task) }
    }

    fn all(&self, manner: Manner) {
        self.peers.iter().for_each(|peer| peer.be(manner));
    }

    /// Adds a lease that was touched just now.
    fn hold(&self, key: &str) -> Arc<Holding> {
        hold(&self.holdings, key, TTL)
    }

    /// Waits for the next stream.
    async fn stream(&mut self) -> Opened {
        timeout(Duration::from_secs(7200), self.opened.recv()).await.expect("a stream").unwrap()
    }
}

/// Adds a lease with this TTL that was touched just now.
fn hold(holdings: &Holdings, key: &str, ttl: Duration) -> Arc<Holding> {
    let deadline = deadline(BootInstant::now(), ttl, MARGIN);
    let lease = (key.to_owned(), Uuid::new_v4());
    let holding = Arc::new(Holding::new(lease, FencingToken::new(1), (ttl, MARGIN), deadline));
    holdings.insert(Arc::clone(&holding));
    holding
}

impl Opened {
    /// Waits for the next message.
    async fn next_message(&mut self) -> KeepAliveRequest {
        self.messages.message().await.unwrap().unwrap()
    }

    async fn say(&self, sequence: u64, results: Vec<KeepAliveResult>) {
        self.answers.send(Ok(KeepAliveResponse { sequence, results, more: false })).await.unwrap();
    }

    /// Answers that all leases of the message are kept.
    async fn keep(&self, message: KeepAliveRequest) {
        self.say(message.sequence, message.leases.into_iter().map(|lease| kept(lease, TTL)).collect()).await;
    }

    /// Keeps all leases for as long as the stream lasts. Returns the number of messages and when
    /// the stream ended.
    async fn serve(mut self) -> (usize, Instant) {
        let mut count = 0;
        while let Ok(Some(message)) = self.messages.message().await {
            count += 1;
            self.keep(message).await;
        }
        (count, Instant::now())
    }
}

fn kept(lease: LeaseRef, remaining: Duration) -> KeepAliveResult {
    let kept = v1::Kept { remaining: Some(remaining.try_into().unwrap()) };
    KeepAliveResult { lease: Some(lease), outcome: Some(Outcome::Kept(kept)) }
}

fn lost(holding: &Holding, reason: LossReason) -> KeepAliveResult {
    let lost = v1::Lost { reason: reason.into() };
    KeepAliveResult { lease: Some(holding.lease_ref()), outcome: Some(Outcome::Lost(lost)) }
}

fn named(message: &KeepAliveRequest) -> Vec<&str> {
    let mut keys: Vec<&str> = message.leases.iter().map(|lease| lease.key.as_str()).collect();
    keys.sort_unstable();
    keys
}

/// Lets all tasks run that are ready.
async fn settle() {
    sleep(EXACT).await;
}

/// Asserts that `start` to `end` took about `expected`.
#[track_caller]
fn assert_took(start: Instant, end: Instant, expected: Duration) {
    let took = end - start;
    assert!(took + EXACT >= expected && took <= expected + EXACT, "{took:?} and not {expected:?}");
}

#[tokio::test(start_paused = true)]
async fn the_keeper_is_idle_until_a_lease_is_due() {
    let mut rig = Rig::start();
    assert!(timeout(Duration::from_secs(3600), rig.stream()).await.is_err(), "no lease needs a stream");
    let start = Instant::now();
    rig.hold("key");
    let mut stream = rig.stream().await;
    assert_took(start, stream.at, NAMED);
    assert_eq!(named(&stream.next_message().await), ["key"]);
}

#[tokio::test(start_paused = true)]
async fn a_lease_is_touched_every_third_of_its_ttl() {
    let mut rig = Rig::start();
    rig.hold("key");
    let mut stream = rig.stream().await;
    for _ in 0..9 {
        let message = stream.next_message().await;
        let start = Instant::now();
        stream.keep(message).await;
        let next = stream.next_message().await;
        let between = start.elapsed();
        assert!(between <= TTL / 3 && between >= TTL / 4, "{between:?}");
        stream.keep(next).await;
    }
}

#[tokio::test(start_paused = true)]
async fn when_opening_fails_the_other_daemon_is_asked_and_after_a_round_there_is_a_pause() {
    let mut rig = Rig::start();
    rig.all(Manner::Down);
    rig.hold("key");
    let mut tries = Vec::new();
    for _ in 0..6 {
        tries.push(rig.refused.recv().await.unwrap());
    }
    for round in tries.chunks(2) {
        assert_ne!(round[0].0, round[1].0, "both are asked");
        assert_took(round[0].1, round[1].1, Duration::ZERO);
    }
    let pauses: Vec<Duration> = tries.windows(2).map(|pair| pair[1].1 - pair[0].1).collect();
    assert!(pauses[1] >= Duration::from_millis(35) && pauses[3] > pauses[1], "{pauses:?}");

    rig.all(Manner::Up);
    assert_eq!(named(&rig.stream().await.next_message().await), ["key"]);
}

#[tokio::test(start_paused = true)]
async fn pauses_are_short_compared_with_the_ttl() {
    let mut rig = Rig::start();
    rig.all(Manner::Down);
    rig.hold("key");
    let mut last = rig.refused.recv().await.unwrap().1;
    for _ in 0..40 {
        let next = rig.refused.recv().await.unwrap().1;
        assert!(next - last <= TTL / 10 + EXACT, "{:?}", next - last);
        last = next;
    }
}

#[tokio::test(start_paused = true)]
async fn a_silent_stream_is_replaced_by_one_at_the_other_daemon_that_names_all_leases() {
    let mut rig = Rig::start();
    let holdings = [rig.hold("a"), rig.hold("b")];
    let mut first = rig.stream().await;
    let message = first.next_message().await;
    first.keep(message).await;
    // A third lease comes later, and is due at another time than these two.
    sleep(TTL / 6).await;
    rig.hold("c");
    let message = first.next_message().await;
    first.keep(message).await;
    let asked = first.next_message().await;
    let start = Instant::now();
    assert_eq!(named(&asked), ["a", "b"], "the third is not due");

    let mut second = rig.stream().await;
    assert_ne!(first.daemon, second.daemon);
    assert_took(start, second.at, TTL / 3);
    let message = second.next_message().await;
    assert_eq!(named(&message), ["a", "b", "c"]);
    second.keep(message).await;
    settle().await;
    assert!(holdings.iter().all(|holding| holding.state() == State::Held));
    // The first stream is closed.
    while let Ok(Some(_)) = first.messages.message().await {}
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_ends_is_followed_by_another_at_once() {
    let mut rig = Rig::start();
    rig.hold("key");
    let mut first = rig.stream().await;
    let message = first.next_message().await;
    first.keep(message).await;
    settle().await;
    let start = Instant::now();
    let daemon = first.daemon;
    drop(first);
    let mut second = rig.stream().await;
    assert_ne!(daemon, second.daemon);
    assert_took(start, second.at, Duration::ZERO);
    assert_eq!(named(&second.next_message().await), ["key"]);
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_is_late_counts_from_when_its_message_was_sent() {
    let mut rig = Rig::start();
    let holding = rig.hold("key");
    let mut stream = rig.stream().await;
    let message = stream.next_message().await;
    let sent_at = BootInstant::now();
    sleep(TTL / 4).await;
    stream.keep(message).await;
    settle().await;
    let expected = deadline(sent_at, TTL, MARGIN);
    let (late, early) = (holding.deadline() - expected, expected - holding.deadline());
    assert!(late.is_zero() && early <= EXACT, "{late:?} late, {early:?} early");
}

#[tokio::test(start_paused = true)]
async fn an_answer_to_no_message_confirms_nothing() {
    let mut rig = Rig::start();
    let holding = rig.hold("key");
    let mut stream = rig.stream().await;
    let message = stream.next_message().await;
    let before = holding.deadline();
    for sequence in [0, message.sequence + 1] {
        stream.say(sequence, vec![kept(holding.lease_ref(), 10 * TTL)]).await;
    }
    settle().await;
    assert_eq!(holding.deadline(), before);
    stream.say(message.sequence, vec![kept(holding.lease_ref(), 10 * TTL)]).await;
    settle().await;
    assert!(holding.deadline() > before);
}

#[tokio::test(start_paused = true)]
async fn a_loss_that_the_daemon_pushes_ends_belief_in_that_lease_at_once() {
    let mut rig = Rig::start();
    let (gone, stays) = (rig.hold("gone"), rig.hold("stays"));
    let stop = gone.stop();
    let mut stream = rig.stream().await;
    let message = stream.next_message().await;
    stream.keep(message).await;
    let start = Instant::now();
    stream.say(0, vec![lost(&gone, LossReason::Revoked)]).await;
    stop.cancelled().await;
    assert_took(start, Instant::now(), Duration::ZERO);
    assert_eq!((gone.state(), stays.state()), (State::Lost(Loss::Revoked), State::Held));
    assert_eq!(named(&stream.next_message().await), ["stays"]);
}

#[tokio::test(start_paused = true)]
async fn an_unconfirmed_lease_is_in_jeopardy_at_its_deadline_and_comes_back_when_confirmed() {
    let mut rig = Rig::start();
    let holding = rig.hold("key");
    rig.all(Manner::Down);
    let start = Instant::now();
    assert_eq!(holding.changed(State::Held).await, State::Jeopardy);
    assert_took(start, Instant::now(), TTL - MARGIN);

    rig.all(Manner::Up);
    let mut stream = rig.stream().await;
    let message = stream.next_message().await;
    stream.keep(message).await;
    assert_eq!(holding.changed(State::Jeopardy).await, State::Held);
}

#[tokio::test(start_paused = true)]
async fn a_stream_without_leases_is_closed_after_a_while() {
    let mut rig = Rig::start();
    let holding = rig.hold("key");
    let stream = rig.stream().await;
    let served = tokio::spawn(stream.serve());
    sleep(TTL).await;
    rig.holdings.remove(holding.id);
    let start = Instant::now();
    let (_, end) = served.await.unwrap();
    // The keeper wakes up when the lease would have been due.
    assert!(end - start >= LINGER && end - start <= LINGER + TTL / 3 + EXACT, "{:?}", end - start);
    assert!(timeout(Duration::from_secs(3600), rig.stream()).await.is_err(), "no lease needs another");
}

#[tokio::test(start_paused = true)]
async fn ten_thousand_leases_are_kept_with_few_messages() {
    const TTLS: u32 = 3;
    let mut rig = Rig::start();
    let holdings: Vec<_> = (0..10_000).map(|number| rig.hold(&format!("key/{number}"))).collect();
    let served = tokio::spawn(rig.stream().await.serve());
    sleep(TTLS * TTL).await;
    assert!(holdings.iter().all(|holding| holding.state() == State::Held));
    holdings.iter().for_each(|holding| rig.holdings.remove(holding.id));
    let (messages, _) = served.await.unwrap();
    // At most four beats in a TTL, each with one message for every 500 KiB of keys and ids.
    assert!(messages <= 2 * (4 * TTLS as usize + 1), "{messages} messages");
}

#[tokio::test(start_paused = true)]
async fn a_new_lease_is_named_at_once_on_the_stream_that_is_open() {
    let mut rig = Rig::start();
    rig.hold("first");
    let mut stream = rig.stream().await;
    let message = stream.next_message().await;
    stream.keep(message).await;
    sleep(TTL / 10).await;
    let start = Instant::now();
    let new = rig.hold("new");
    rig.hold("another");
    let message = stream.next_message().await;
    assert_eq!(named(&message), ["another", "new"]);
    assert_took(start, Instant::now(), NAMED);
    // The daemon can now report the loss of the new lease.
    stream.say(0, vec![lost(&new, LossReason::Revoked)]).await;
    assert_eq!(new.changed(State::Held).await, State::Lost(Loss::Revoked));
    assert_took(start, Instant::now(), NAMED);
}

#[tokio::test(start_paused = true)]
async fn an_answer_in_parts_is_applied_part_by_part() {
    let mut rig = Rig::start();
    let (one, two) = (rig.hold("one"), rig.hold("two"));
    let mut stream = rig.stream().await;
    let message = stream.next_message().await;
    let before = [one.deadline(), two.deadline()];
    sleep(TTL / 4).await;
    for holding in [&one, &two] {
        stream.say(message.sequence, vec![kept(holding.lease_ref(), 2 * TTL)]).await;
        settle().await;
        assert!(holding.deadline() > before[0].max(before[1]));
    }
}

fn refused(holding: &Holding, reason: RefusalReason) -> KeepAliveResult {
    let refused = v1::Refused { reason: reason.into(), message: "too many".to_owned() };
    KeepAliveResult { lease: Some(holding.lease_ref()), outcome: Some(Outcome::Refused(refused)) }
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_is_refused_on_the_stream_is_kept_by_unary_calls() {
    let mut rig = Rig::start();
    let (stays, excess) = (rig.hold("stays"), rig.hold("excess"));
    let mut stream = rig.stream().await;
    let message = stream.next_message().await;
    let kept = kept(stays.lease_ref(), TTL);
    stream.say(message.sequence, vec![kept, refused(&excess, RefusalReason::LimitExceeded)]).await;
    let served = tokio::spawn(stream.serve());
    sleep(3 * TTL).await;
    assert_eq!((stays.state(), excess.state()), (State::Held, State::Held));
    let touches: usize = rig.peers.iter().map(|peer| peer.attempts("touch").len()).sum();
    assert!((9..=13).contains(&touches), "{touches} in three TTLs");
    assert!(!served.is_finished());
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_is_refused_everywhere_is_held_until_its_deadline_and_the_reason_is_shown() {
    let mut rig = Rig::start();
    let start = Instant::now();
    let holding = rig.hold("key");
    let mut stream = rig.stream().await;
    let message = stream.next_message().await;
    rig.all(Manner::Stranger);
    stream.say(message.sequence, vec![refused(&holding, RefusalReason::Unreadable)]).await;
    settle().await;
    assert_eq!(holding.state(), State::Held, "a refusal does not say whether the lease is held");
    assert_eq!(holding.changed(State::Held).await, State::Jeopardy);
    assert_took(start, Instant::now(), TTL - MARGIN);
    assert!(holding.trouble().is_some());

    rig.all(Manner::Up);
    assert_eq!(holding.changed(State::Jeopardy).await, State::Held);
    assert_eq!(holding.trouble(), None);
}

/// In an outage, a lease is due again before its touch has ended.
#[tokio::test(start_paused = true)]
async fn a_lease_is_touched_by_one_call_at_a_time() {
    let mut rig = Rig::start();
    let holding = hold(&rig.holdings, "key", Duration::from_millis(300));
    let mut stream = rig.stream().await;
    let message = stream.next_message().await;
    rig.all(Manner::Silent);
    stream.say(message.sequence, vec![refused(&holding, RefusalReason::LimitExceeded)]).await;
    sleep(Duration::from_secs(4)).await;
    // Each of the two silent daemons was asked once.
    let touches: usize = rig.peers.iter().map(|peer| peer.attempts("touch").len()).sum();
    assert_eq!(touches, 2);

    rig.all(Manner::Up);
    assert_eq!(holding.changed(State::Jeopardy).await, State::Held);
}

/// A stream without a message gets no answer, which would look like silence.
#[tokio::test]
async fn no_stream_is_opened_when_the_last_lease_is_released_while_a_name_is_looked_up() {
    let holdings = Arc::new(Holdings::default());
    let url: tonic::transport::Uri = "http://localhost:1".parse().unwrap();
    let reach = Reach::Name { url, host: "localhost".to_owned(), port: 1 };
    let source = Source { name: "http://localhost:1".to_owned(), reach };
    let endpoints = Arc::new(Endpoints::new(vec![source], Duration::from_secs(5)));
    let mut keeper = Keeper::new(Arc::clone(&holdings), Arc::clone(&endpoints));
    let holding = hold(&holdings, "key", TTL);
    let opening = keeper.opening();
    tokio::pin!(opening);
    assert!(opening.as_mut().now_or_never().is_none(), "the name has not been looked up");
    holdings.remove(holding.id);
    let opened = tokio::select! {
        phase = &mut opening => phase,
        () = endpoints.maintain() => panic!("maintain never ends"),
    };
    assert!(matches!(opened, Phase::Idle));
}

/// Any duration in an answer is either used or counts as zero.
#[tokio::test(start_paused = true)]
async fn no_answer_makes_the_arithmetic_overflow() {
    const SECONDS: [i64; 7] = [i64::MIN, -1, 0, 1, 86_400, 1 << 40, i64::MAX];
    const NANOS: [i32; 5] = [i32::MIN, -1, 0, 999_999_999, i32::MAX];
    let spans =
        SECONDS.into_iter().flat_map(|seconds| NANOS.map(|nanos| prost_types::Duration { seconds, nanos }));
    for duration in spans {
        let remaining = span(Some(duration));
        for margin in [Duration::ZERO, crate::belief::margin(remaining), Duration::MAX] {
            let until = deadline(BootInstant::now(), remaining, margin);
            assert!(until >= BootInstant::now() && until + remaining >= until, "{duration:?}");
        }
        // As the TTL of a granted lease.
        let holdings = Arc::new(Holdings::default());
        let until = deadline(BootInstant::now(), remaining, Duration::ZERO);
        let lease = ("key".to_owned(), Uuid::new_v4());
        let holding = Holding::new(lease, FencingToken::new(1), (remaining, Duration::ZERO), until);
        holdings.insert(Arc::new(holding));
        assert!(holdings.next_due().is_some());
        let _ = holdings.take_due(BootInstant::now() + remaining, Scope::Due);
        let _ = holdings.take_due(BootInstant::now(), Scope::All);
        let _ = holdings.check_deadlines();

        // As the time that a kept lease has left.
        let mut rig = Rig::start();
        let holding = rig.hold("key");
        let mut stream = rig.stream().await;
        let message = stream.next_message().await;
        let kept = v1::Kept { remaining: Some(duration) };
        let result = KeepAliveResult { lease: Some(holding.lease_ref()), outcome: Some(Outcome::Kept(kept)) };
        stream.say(message.sequence, vec![result]).await;
        stream.keep(stream_message(&holding, message.sequence)).await;
        settle().await;
        assert_eq!(holding.state(), State::Held, "{duration:?}");
    }
}

fn stream_message(holding: &Holding, sequence: u64) -> KeepAliveRequest {
    KeepAliveRequest { leases: vec![holding.lease_ref()], sequence }
}

#[tokio::test(start_paused = true)]
async fn a_silent_stream_is_replaced_over_another_connection() {
    let mut rig = Rig::start();
    rig.hold("key");
    let mut streams = Vec::new();
    for _ in 0..4 {
        let mut stream = rig.stream().await;
        stream.next_message().await;
        streams.push(stream);
    }
    let connections = |peer: &Peer| peer.shared.connections.load(std::sync::atomic::Ordering::Relaxed);
    assert!(rig.peers.iter().all(|peer| connections(peer) >= 2), "each stream had its own connection");
}

#[tokio::test(start_paused = true)]
async fn a_connection_whose_task_has_panicked_is_replaced() {
    let mut rig = Rig::start();
    rig.all(Manner::Panicking);
    let holding = rig.hold("key");
    sleep(TTL / 3).await;
    rig.all(Manner::Up);
    let stream = rig.stream().await;
    let served = tokio::spawn(stream.serve());
    sleep(TTL).await;
    assert_eq!(holding.state(), State::Held);
    assert!(!served.is_finished());
}

#[tokio::test(start_paused = true)]
async fn the_stream_returns_to_the_first_daemon_and_no_lease_is_in_jeopardy() {
    let mut rig = Rig::start();
    let holding = rig.hold("key");
    let first = rig.stream().await;
    let preferred = first.daemon;
    rig.peers[preferred].be(Manner::Down);
    drop(first);
    let second = rig.stream().await;
    assert_ne!(second.daemon, preferred);
    let start = Instant::now();
    let served = tokio::spawn(second.serve());
    rig.peers[preferred].be(Manner::Up);
    let stop = holding.stop();
    let back = rig.stream().await;
    assert_eq!(back.daemon, preferred);
    assert!(start.elapsed() < Duration::from_secs(200), "within minutes");
    tokio::spawn(back.serve());
    served.await.unwrap();
    sleep(3 * TTL).await;
    assert!(!stop.is_cancelled(), "it was held throughout");
}

#[tokio::test(start_paused = true)]
async fn an_answer_from_a_daemon_over_another_store_is_ignored() {
    let mut rig = Rig::start();
    rig.peers[0].serve_store("0b7c2f4e-8d51-4d7e-9a55-6a6f7a3c1e02");
    rig.peers[1].serve_store("5d0e63a8-04c7-4a4e-a1cb-0a6a3c5cf1aa");
    let holding = rig.hold("key");
    let mut first = rig.stream().await;
    let message = first.next_message().await;
    first.keep(message).await;
    rig.peers[first.daemon].be(Manner::Down);
    let daemon = first.daemon;
    drop(first);
    // The other daemon reports a loss, which is ignored.
    let mut other = rig.stream().await;
    assert_ne!(other.daemon, daemon);
    if let Ok(Some(message)) = other.messages.message().await {
        let _ = other
            .answers
            .send(Ok(KeepAliveResponse {
                sequence: message.sequence,
                results: vec![lost(&holding, LossReason::Gone)],
                more: false,
            }))
            .await;
    }
    settle().await;
    assert_eq!(holding.state(), State::Held);
    let trouble = rig.holdings.trouble().unwrap();
    for part in [
        "daemon-0",
        "daemon-1",
        "0b7c2f4e-8d51-4d7e-9a55-6a6f7a3c1e02",
        "5d0e63a8-04c7-4a4e-a1cb-0a6a3c5cf1aa",
    ] {
        assert!(trouble.contains(part), "{trouble}");
    }
    rig.peers[daemon].be(Manner::Up);
    while rig.stream().await.daemon != daemon {}
}
