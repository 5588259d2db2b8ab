//! The keeper: one task a client, one stream for all its leases.
//!
//! ```text
//!         a lease is due                 answered
//!  idle ─────────────────► opening ─────────────────► beating
//!   ▲                      │  ▲  ▲ failed or silent     │  │
//!   │  no lease is left    │  │  └─────────────────────-┘  │
//!   └──────────────────────┴──┼────────────────────────────┘
//!                             └── failed: another daemon, after a pause
//! ```
//!
//! When the client comes back to the daemon that it prefers, the stream moves there between two messages.
//!
//! A stream that breaks changes nothing about the leases: the keeper opens the next one, at whichever daemon answers, and names
//! all of them in its first message. What an answer confirms counts from before its message was sent.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::{FuturesUnordered, StreamExt};
use leased_proto::v1::keep_alive_result::Outcome;
use leased_proto::v1::lease_service_client::LeaseServiceClient;
use leased_proto::v1::{KeepAliveRequest, KeepAliveResponse};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, sleep_until, timeout_at};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};
use uuid::Uuid;

use crate::belief::{Loss, deadline};
use crate::client::touch;
use crate::daemon::{Purpose, Slot};
use crate::endpoints::{Endpoints, Pauses};
use crate::error::{Error, Failure, cause};
use crate::holding::Holding;
use crate::holdings::{Beat, Holdings};
use crate::info::span;
use crate::moment::Moment;

/// Messages that may be on their way. More means that the daemon reads none, which its silence will show.
const MESSAGES: usize = 32;
/// How long a stream without leases stays open.
const LINGER: Duration = Duration::from_secs(10);
/// The bounds of how long an answer may take before another stream is tried.
const LEAST_PATIENCE: Duration = Duration::from_millis(100);
const MOST_PATIENCE: Duration = Duration::from_secs(5);
/// The share of a TTL that a pause between streams may take up, unless that is too short to pause at all.
const PAUSE_SHARE: u32 = 10;
const LEAST_PAUSE: Duration = Duration::from_millis(50);
/// Touches under way of leases that are not touched on the stream.
const TOUCHES: usize = 64;

/// Keeps leases alive for as long as [`run`](Self::run) is polled.
pub(crate) struct Keeper {
    holdings: Arc<Holdings>,
    endpoints: Arc<Endpoints>,
    sequence: u64,
    /// Since the last answer.
    pauses: Pauses,
    /// How many streams in a row have been silent.
    silences: u32,
    /// The shortest TTL of those that the last stream began with.
    shortest: Duration,
}

enum Phase {
    Idle,
    Opening,
    Beating(Box<Stream>),
}

/// An open stream.
struct Stream {
    slot: Slot,
    requests: mpsc::Sender<KeepAliveRequest>,
    answers: Streaming<KeepAliveResponse>,
    sent: Sent,
}

/// The latest messages, oldest first. An answer may come in several parts, so an answered one is kept for a while.
#[derive(Default)]
struct Sent(VecDeque<Message>);

struct Message {
    sequence: u64,
    /// What its answer is counted from.
    sent_at: Moment,
    /// When another stream is tried.
    answer_by: Instant,
    /// A part of its answer has come.
    is_answered: bool,
}

/// Why a stream is left.
enum End {
    NoLeases,
    /// The client is back at another daemon.
    Returned,
    Silent,
    Failed(Status),
    /// The daemon serves another store than the others.
    Stranger(Error),
}

impl Keeper {
    pub(crate) fn new(holdings: Arc<Holdings>, endpoints: Arc<Endpoints>) -> Self {
        let pauses = Pauses::default();
        Self { holdings, endpoints, sequence: 0, pauses, silences: 0, shortest: Duration::MAX }
    }

    pub(crate) async fn run(mut self) {
        let mut phase = Phase::Idle;
        loop {
            phase = match phase {
                Phase::Idle => self.idle().await,
                Phase::Opening => self.opening().await,
                Phase::Beating(stream) => self.beating(stream).await,
            };
        }
    }

    /// Until a lease is due.
    async fn idle(&mut self) -> Phase {
        loop {
            tokio::select! {
                () = reached(self.holdings.next_due()) => return Phase::Opening,
                () = self.holdings.sooner_due.notified() => {}
            }
        }
    }

    /// Opens a stream with a message that names all leases.
    async fn opening(&mut self) -> Phase {
        if self.holdings.is_empty() {
            return Phase::Idle;
        }
        let daemon = match self.endpoints.pick().await {
            Ok(daemon) => daemon,
            Err(cause) => return self.pause(cause).await,
        };
        let slot = daemon.slot(Purpose::Upkeep);
        let (requests, messages) = mpsc::channel(MESSAGES);
        let mut sent = Sent::default();
        self.beat(&requests, &mut sent, true);
        if !sent.is_any() {
            // The last lease was given back while a daemon was looked for. Nothing will be answered.
            return Phase::Idle;
        }
        let mut stub = LeaseServiceClient::new(slot.channel.clone());
        let opened = stub.keep_alive(ReceiverStream::new(messages));
        let end = match timeout_at(sent.answer_by(), opened).await {
            Ok(Ok(response)) => match self.endpoints.meet(&daemon, response.metadata()) {
                Ok(()) => {
                    let answers = response.into_inner();
                    return Phase::Beating(Box::new(Stream { slot, requests, answers, sent }));
                }
                Err(error) => End::Stranger(error),
            },
            Ok(Err(status)) => End::Failed(status),
            Err(_) => End::Silent,
        };
        self.leave(&slot, end).await
    }

    /// Touches what is due and takes in what the daemon says, until the stream is of no use any more.
    async fn beating(&mut self, mut stream: Box<Stream>) -> Phase {
        let end = loop {
            let due = self.holdings.next_due();
            tokio::select! {
                biased;
                answer = stream.answers.message() => match answer {
                    Ok(Some(answer)) => self.take(answer, &mut stream.sent),
                    Ok(None) => break End::Failed(Status::unavailable("the daemon ended the stream")),
                    Err(status) => break End::Failed(status),
                },
                () = sleep_until(stream.sent.answer_by()), if stream.sent.is_any() => break End::Silent,
                () = reached(due) => self.beat(&stream.requests, &mut stream.sent, false),
                () = self.holdings.sooner_due.notified() => {}
                // With no message under way every lease was confirmed a moment ago, or is not due yet.
                () = self.endpoints.returned.notified(), if !stream.sent.is_any() => {
                    if !self.endpoints.is_preferred(&stream.slot.daemon) {
                        break End::Returned;
                    }
                }
                () = sleep(LINGER), if due.is_none() => break End::NoLeases,
            }
        };
        self.leave(&stream.slot, end).await
    }

    /// Turns to another daemon and another connection, unless the stream is left for another reason.
    async fn leave(&mut self, slot: &Slot, end: End) -> Phase {
        let cause = match end {
            End::NoLeases => return Phase::Idle,
            End::Returned => return Phase::Opening,
            End::Silent => {
                self.silences += 1;
                self.endpoints.turn_away(slot, &Failure::Passing(None));
                "no answer in time".to_owned()
            }
            End::Failed(status) => {
                // A daemon that ends a stream, for whatever reason, may be asked again after the others.
                if let Failure::Final(_) = self.endpoints.fail(slot, &status) {
                    self.endpoints.turn_away(slot, &Failure::Passing(None));
                }
                cause(&status)
            }
            End::Stranger(error) => {
                let cause = error.to_string();
                self.endpoints.turn_away(slot, &Failure::Useless(error));
                cause
            }
        };
        self.pause(format!("{}: {cause}", slot.daemon.name)).await
    }

    /// Waits before the next stream is tried, if all daemons have failed.
    async fn pause(&mut self, cause: String) -> Phase {
        if self.pauses.is_first() {
            tracing::warn!(cause, "the keepalive stream failed; opening another");
        } else {
            tracing::debug!(cause, "no keepalive stream yet");
        }
        self.holdings.note(Some(cause));
        // Whoever pauses long finds out late that an outage is over.
        let longest = (self.shortest / PAUSE_SHARE).max(LEAST_PAUSE);
        sleep(self.pauses.next(self.endpoints.len(), None).min(longest)).await;
        Phase::Opening
    }

    /// Sends what is due, or everything.
    fn beat(&mut self, requests: &mpsc::Sender<KeepAliveRequest>, sent: &mut Sent, all: bool) {
        // Before anything leaves: this is what the answers are counted from.
        let sent_at = Moment::now();
        let Beat { messages, shortest } = self.holdings.take_due(sent_at, all);
        if all {
            self.shortest = shortest;
        }
        // A store that is slow gets more time with each stream that was silent.
        let patience = (shortest / 3).saturating_mul(1 << self.silences.min(5));
        let answer_by = Instant::now() + patience.clamp(LEAST_PATIENCE, MOST_PATIENCE);
        for leases in messages {
            self.sequence += 1;
            sent.push(Message { sequence: self.sequence, sent_at, answer_by, is_answered: false });
            if requests.try_send(KeepAliveRequest { leases, sequence: self.sequence }).is_err() {
                tracing::debug!("the keepalive stream takes no more");
            }
        }
    }

    /// Takes in what a daemon says, asked (`sequence` > 0) or not.
    fn take(&mut self, answer: KeepAliveResponse, sent: &mut Sent) {
        let sent_at = sent.answered(answer.sequence);
        if sent_at.is_some() {
            if !self.pauses.is_first() {
                self.holdings.note(None);
            }
            self.pauses = Pauses::default();
            self.silences = 0;
        }
        for result in answer.results {
            let id = result.lease.and_then(|lease| Uuid::try_parse(&lease.lease_id).ok());
            let Some(holding) = id.and_then(|id| self.holdings.find(id)) else { continue };
            match (result.outcome, sent_at) {
                (Some(Outcome::Kept(kept)), Some(sent_at)) => {
                    holding.confirm(deadline(sent_at, span(kept.remaining), holding.margin));
                }
                // The others are none the worse for it.
                (Some(Outcome::Refused(refused)), _) => {
                    tracing::warn!(
                        key = &*holding.key,
                        why = refused.message,
                        "a lease is not touched on the stream"
                    );
                    holding.refuse(&refused.message);
                    self.holdings.refuse(holding.id);
                }
                (Some(Outcome::Lost(lost)), _) => {
                    self.holdings.remove(holding.id);
                    holding.lose(Loss::from(lost.reason()));
                }
                _ => {}
            }
        }
    }
}

impl Sent {
    fn push(&mut self, message: Message) {
        while self.0.len() >= 2 * MESSAGES && self.0.front().is_some_and(|oldest| oldest.is_answered) {
            self.0.pop_front();
        }
        self.0.push_back(message);
    }

    /// When the message with this sequence was sent, if it is one of this stream.
    fn answered(&mut self, sequence: u64) -> Option<Moment> {
        let message = self.0.iter_mut().rfind(|message| message.sequence == sequence)?;
        message.is_answered = true;
        Some(message.sent_at)
    }

    /// The oldest message without an answer.
    fn waiting(&self) -> Option<&Message> {
        self.0.iter().find(|message| !message.is_answered)
    }

    fn is_any(&self) -> bool {
        self.waiting().is_some()
    }

    /// When the oldest should have been answered.
    fn answer_by(&self) -> Instant {
        self.waiting().map_or_else(Instant::now, |message| message.answer_by)
    }
}

/// Touches by calls of their own the leases that a daemon refused to touch on the stream, for as long as it is polled. A touch
/// that is refused as well leaves the lease to its deadline.
pub(crate) async fn touch_refused(holdings: &Holdings, endpoints: &Endpoints) {
    let mut calls = FuturesUnordered::new();
    // One call a lease: in an outage a call lasts longer than a short lease takes to be due again.
    let mut under_way = HashSet::new();
    loop {
        let room = TOUCHES - calls.len();
        tokio::select! {
            Some(id) = calls.next(), if !calls.is_empty() => {
                under_way.remove(&id);
            }
            () = reached(holdings.next_refused(&under_way)), if room > 0 => {
                for holding in holdings.take_refused(Moment::now(), room, &under_way) {
                    under_way.insert(holding.id);
                    calls.push(touch_alone(holdings, endpoints, holding));
                }
            }
            () = holdings.refused.notified() => {}
        }
    }
}

/// Touches a lease by a call of its own, and returns its id.
async fn touch_alone(holdings: &Holdings, endpoints: &Endpoints, holding: Arc<Holding>) -> Uuid {
    match touch(endpoints, holding.lease_ref()).await {
        Ok(answer) => holding.confirm(deadline(answer.sent_at, span(answer.body.remaining), holding.margin)),
        Err(Error::Lost(loss)) => {
            holdings.remove(holding.id);
            holding.lose(loss);
        }
        Err(error) => holding.refuse(&error.to_string()),
    }
    holding.id
}

/// Sleeps until then, or for ever.
async fn reached(moment: Option<Moment>) {
    match moment {
        Some(moment) => moment.reached().await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
#[path = "keeper_tests.rs"]
#[expect(clippy::unwrap_used, reason = "a test that meets an unexpected failure should stop there")]
mod tests;
