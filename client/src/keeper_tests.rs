//! The keeper's arrows, one by one, on a paused clock: against a network whose other end says what the test has it say.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use leased_proto::v1::keep_alive_result::Outcome;
use leased_proto::v1::lease_service_server::{LeaseService, LeaseServiceServer};
use leased_proto::v1::{self, KeepAliveRequest, KeepAliveResponse, KeepAliveResult, LeaseRef, LossReason};
use tokio::io::DuplexStream;
use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::time::{Instant, sleep, timeout};
use tokio_stream::wrappers::{ReceiverStream, UnboundedReceiverStream};
use tokio_util::task::AbortOnDropHandle;
use tonic::transport::{Channel, Endpoint, Server};
use tonic::{Request, Response, Status, Streaming};
use uuid::Uuid;

use super::*;
use crate::belief::State;
use crate::holding::Holding;
use crate::holdings::watch_deadlines;
use crate::token::FencingToken;

const TTL: Duration = Duration::from_secs(9);
const MARGIN: Duration = Duration::from_millis(90);
/// What a paused clock may be off by: its timers know whole milliseconds.
const EXACT: Duration = Duration::from_millis(3);

/// A stream as the daemon sees it.
struct Opened {
    daemon: usize,
    at: Instant,
    messages: Streaming<KeepAliveRequest>,
    answers: mpsc::Sender<Result<KeepAliveResponse, Status>>,
}

/// A daemon that hands its streams to the test, or takes none.
struct Daemon {
    number: usize,
    is_down: Arc<AtomicBool>,
    opened: UnboundedSender<Opened>,
    refused: UnboundedSender<(usize, Instant)>,
}

/// A keeper, its leases, and the daemons that it knows.
struct Rig {
    holdings: Arc<Holdings>,
    is_down: Arc<AtomicBool>,
    opened: UnboundedReceiver<Opened>,
    refused: UnboundedReceiver<(usize, Instant)>,
    _tasks: [AbortOnDropHandle<()>; 2],
}

impl Rig {
    fn start() -> Self {
        let is_down = Arc::new(AtomicBool::new(false));
        let ((opens, opened), (refuses, refused)) = (unbounded_channel(), unbounded_channel());
        let channels = (0..2).map(|number| {
            let (opened, refused) = (opens.clone(), refuses.clone());
            let daemon = Daemon { number, is_down: Arc::clone(&is_down), opened, refused };
            (format!("daemon-{number}"), channel(daemon))
        });
        let holdings = Arc::new(Holdings::default());
        let endpoints = Endpoints::new(channels.collect(), Duration::from_secs(5));
        let keeper = Keeper::new(Arc::clone(&holdings), Arc::new(endpoints));
        let watched = Arc::clone(&holdings);
        let tasks =
            [tokio::spawn(keeper.run()), tokio::spawn(async move { watch_deadlines(&watched).await })];
        Self { holdings, is_down, opened, refused, _tasks: tasks.map(AbortOnDropHandle::new) }
    }

    /// A lease that was touched just now.
    fn hold(&self, key: &str) -> Arc<Holding> {
        let deadline = deadline(Moment::now(), TTL, MARGIN);
        let holding =
            Holding::new((key.to_owned(), Uuid::new_v4()), FencingToken::new(1), (TTL, MARGIN), deadline);
        let holding = Arc::new(holding);
        self.holdings.insert(Arc::clone(&holding));
        holding
    }

    /// The next stream.
    async fn stream(&mut self) -> Opened {
        self.opened.recv().await.unwrap()
    }
}

impl Opened {
    /// The next message.
    async fn heard(&mut self) -> KeepAliveRequest {
        self.messages.message().await.unwrap().unwrap()
    }

    async fn say(&self, sequence: u64, results: Vec<KeepAliveResult>) {
        self.answers.send(Ok(KeepAliveResponse { sequence, results, more: false })).await.unwrap();
    }

    /// Answers that all its leases are kept.
    async fn keep(&self, message: KeepAliveRequest) {
        self.say(message.sequence, message.leases.into_iter().map(|lease| kept(lease, TTL)).collect()).await;
    }

    /// Hears and keeps for as long as the stream lasts; tells how many messages came and when it ended.
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

/// Lets everybody run who can.
async fn settle() {
    sleep(EXACT).await;
}

/// Whether it took about `expected` from `start` to `end`.
#[track_caller]
fn assert_took(start: Instant, end: Instant, expected: Duration) {
    let took = end - start;
    assert!(took + EXACT >= expected && took <= expected + EXACT, "{took:?} and not {expected:?}");
}

#[tokio::test(start_paused = true)]
async fn it_is_idle_until_a_lease_is_due() {
    let mut rig = Rig::start();
    assert!(timeout(Duration::from_secs(3600), rig.stream()).await.is_err(), "nobody needs a stream");
    let start = Instant::now();
    rig.hold("key");
    let mut stream = rig.stream().await;
    assert_took(start, stream.at, TTL / 9);
    assert_eq!(named(&stream.heard().await), ["key"]);
}

#[tokio::test(start_paused = true)]
async fn a_lease_is_touched_every_third_of_its_ttl() {
    let mut rig = Rig::start();
    rig.hold("key");
    let mut stream = rig.stream().await;
    for _ in 0..9 {
        let message = stream.heard().await;
        let start = Instant::now();
        stream.keep(message).await;
        let next = stream.heard().await;
        let between = start.elapsed();
        assert!(between <= TTL / 3 && between >= TTL / 4, "{between:?}");
        stream.keep(next).await;
    }
}

#[tokio::test(start_paused = true)]
async fn when_opening_fails_the_other_daemon_is_asked_and_after_a_round_there_is_a_pause() {
    let mut rig = Rig::start();
    rig.is_down.store(true, Ordering::Relaxed);
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

    rig.is_down.store(false, Ordering::Relaxed);
    assert_eq!(named(&rig.stream().await.heard().await), ["key"]);
}

#[tokio::test(start_paused = true)]
async fn pauses_are_short_beside_the_ttl() {
    let mut rig = Rig::start();
    rig.is_down.store(true, Ordering::Relaxed);
    rig.hold("key");
    let mut last = rig.refused.recv().await.unwrap().1;
    for _ in 0..40 {
        let next = rig.refused.recv().await.unwrap().1;
        assert!(next - last <= TTL / 10 + EXACT, "{:?}", next - last);
        last = next;
    }
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_is_silent_is_left_for_one_at_the_other_daemon_that_names_all_leases() {
    let mut rig = Rig::start();
    let holdings = [rig.hold("a"), rig.hold("b")];
    let mut first = rig.stream().await;
    let message = first.heard().await;
    first.keep(message).await;
    // Comes later, and is due at another time than the two.
    sleep(TTL / 36).await;
    rig.hold("c");
    let message = first.heard().await;
    first.keep(message).await;
    let asked = first.heard().await;
    let start = Instant::now();
    assert_eq!(named(&asked), ["a", "b"], "the other is not due");

    let mut second = rig.stream().await;
    assert_ne!(first.daemon, second.daemon);
    assert_took(start, second.at, TTL / 3);
    let message = second.heard().await;
    assert_eq!(named(&message), ["a", "b", "c"]);
    second.keep(message).await;
    settle().await;
    assert!(holdings.iter().all(|holding| holding.state() == State::Held));
    // The first is closed.
    while let Ok(Some(_)) = first.messages.message().await {}
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_ends_is_followed_by_another_at_once() {
    let mut rig = Rig::start();
    rig.hold("key");
    let mut first = rig.stream().await;
    let message = first.heard().await;
    first.keep(message).await;
    settle().await;
    let start = Instant::now();
    let daemon = first.daemon;
    drop(first);
    let mut second = rig.stream().await;
    assert_ne!(daemon, second.daemon);
    assert_took(start, second.at, Duration::ZERO);
    assert_eq!(named(&second.heard().await), ["key"]);
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_is_late_counts_from_when_its_message_was_sent() {
    let mut rig = Rig::start();
    let holding = rig.hold("key");
    let mut stream = rig.stream().await;
    let message = stream.heard().await;
    let sent_at = Moment::now();
    sleep(TTL / 4).await;
    stream.keep(message).await;
    settle().await;
    let expected = deadline(sent_at, TTL, MARGIN);
    let (late, early) = (holding.deadline() - expected, expected - holding.deadline());
    assert!(late.is_zero() && early <= EXACT, "{late:?} late, {early:?} early");
}

#[tokio::test(start_paused = true)]
async fn what_answers_no_message_confirms_nothing() {
    let mut rig = Rig::start();
    let holding = rig.hold("key");
    let mut stream = rig.stream().await;
    let message = stream.heard().await;
    let before = holding.deadline();
    for sequence in [0, message.sequence + 1] {
        stream.say(sequence, vec![kept(holding.lease_ref(), 10 * TTL)]).await;
    }
    settle().await;
    assert_eq!(holding.deadline(), before);
    // Nor does the second answer to one message.
    stream.say(message.sequence, vec![kept(holding.lease_ref(), TTL)]).await;
    settle().await;
    let confirmed = holding.deadline();
    assert!(confirmed > before);
    stream.say(message.sequence, vec![kept(holding.lease_ref(), 10 * TTL)]).await;
    settle().await;
    assert_eq!(holding.deadline(), confirmed);
}

#[tokio::test(start_paused = true)]
async fn a_loss_that_is_told_unasked_ends_belief_at_once_and_only_that_one() {
    let mut rig = Rig::start();
    let (gone, stays) = (rig.hold("gone"), rig.hold("stays"));
    let stop = gone.stop();
    let mut stream = rig.stream().await;
    let message = stream.heard().await;
    stream.keep(message).await;
    let start = Instant::now();
    stream.say(0, vec![lost(&gone, LossReason::Revoked)]).await;
    stop.cancelled().await;
    assert_took(start, Instant::now(), Duration::ZERO);
    assert_eq!((gone.state(), stays.state()), (State::Lost(Loss::Revoked), State::Held));
    assert_eq!(named(&stream.heard().await), ["stays"]);
}

#[tokio::test(start_paused = true)]
async fn a_lease_without_word_is_in_jeopardy_at_its_deadline_and_comes_back_with_the_next() {
    let mut rig = Rig::start();
    let holding = rig.hold("key");
    rig.is_down.store(true, Ordering::Relaxed);
    let start = Instant::now();
    assert_eq!(holding.changed(State::Held).await, State::Jeopardy);
    assert_took(start, Instant::now(), TTL - MARGIN);

    rig.is_down.store(false, Ordering::Relaxed);
    let mut stream = rig.stream().await;
    let message = stream.heard().await;
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
    // It looks when the lease would have been due.
    assert!(end - start >= LINGER && end - start <= LINGER + TTL / 3 + EXACT, "{:?}", end - start);
    assert!(timeout(Duration::from_secs(3600), rig.stream()).await.is_err(), "nobody needs another");
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
    // Four beats a TTL at the most, of one message each for every 900 KiB of names.
    assert!(messages <= 4 * TTLS as usize + 1, "{messages} messages");
}

/// A way to `daemon`, through memory.
fn channel(daemon: Daemon) -> Channel {
    let (connections, arriving) = unbounded_channel::<Result<DuplexStream, std::io::Error>>();
    let router = Server::builder().add_service(LeaseServiceServer::new(daemon));
    tokio::spawn(router.serve_with_incoming(UnboundedReceiverStream::new(arriving)));
    Endpoint::from_static("http://daemon").connect_with_connector_lazy(tower::service_fn(move |_| {
        let (near, far) = tokio::io::duplex(64 * 1024);
        let sent = connections.send(Ok(far));
        async move { sent.map(|()| TokioIo::new(near)).map_err(|_| std::io::Error::other("gone")) }
    }))
}

type Calling<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl LeaseService for Daemon {
    type KeepAliveStream = ReceiverStream<Result<KeepAliveResponse, Status>>;
    type WatchStream = ReceiverStream<Result<v1::WatchResponse, Status>>;

    async fn keep_alive(
        &self,
        request: Request<Streaming<KeepAliveRequest>>,
    ) -> Calling<Self::KeepAliveStream> {
        let at = Instant::now();
        if self.is_down.load(Ordering::Relaxed) {
            self.refused.send((self.number, at)).unwrap();
            return Err(Status::unavailable("down"));
        }
        let (answers, told) = mpsc::channel(16);
        let opened = Opened { daemon: self.number, at, messages: request.into_inner(), answers };
        self.opened.send(opened).unwrap_or_default();
        Ok(Response::new(ReceiverStream::new(told)))
    }

    async fn acquire(&self, _: Request<v1::AcquireRequest>) -> Calling<v1::AcquireResponse> {
        Err(Status::unimplemented(""))
    }

    async fn release(&self, _: Request<v1::ReleaseRequest>) -> Calling<v1::ReleaseResponse> {
        Err(Status::unimplemented(""))
    }

    async fn touch(&self, _: Request<v1::TouchRequest>) -> Calling<v1::TouchResponse> {
        Err(Status::unimplemented(""))
    }

    async fn get(&self, _: Request<v1::GetRequest>) -> Calling<v1::GetResponse> {
        Err(Status::unimplemented(""))
    }

    async fn list(&self, _: Request<v1::ListRequest>) -> Calling<v1::ListResponse> {
        Err(Status::unimplemented(""))
    }

    async fn watch(&self, _: Request<v1::WatchRequest>) -> Calling<Self::WatchStream> {
        Err(Status::unimplemented(""))
    }
}
