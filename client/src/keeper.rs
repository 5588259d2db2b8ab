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
//! A stream that breaks changes nothing about the leases: the keeper opens the next one, at whichever daemon answers, and names
//! all of them in its first message. What an answer confirms counts from before its message was sent.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use leased_proto::v1::keep_alive_result::Outcome;
use leased_proto::v1::lease_service_client::LeaseServiceClient;
use leased_proto::v1::{KeepAliveRequest, KeepAliveResponse};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, sleep_until, timeout_at};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};
use uuid::Uuid;

use crate::belief::{Loss, deadline};
use crate::endpoints::{Endpoint, Endpoints, Pauses};
use crate::error::cause;
use crate::holdings::{Beat, Holdings};
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
    endpoint: Endpoint,
    requests: mpsc::Sender<KeepAliveRequest>,
    answers: Streaming<KeepAliveResponse>,
    sent: Sent,
}

/// Messages that have no answer yet, oldest first.
#[derive(Default)]
struct Sent(VecDeque<Message>);

struct Message {
    sequence: u64,
    /// What its answer is counted from.
    sent_at: Moment,
    /// When another stream is tried.
    answer_by: Instant,
}

/// Why a stream is left.
enum End {
    NoLeases,
    Silent,
    Failed(Status),
}

impl Keeper {
    pub(crate) fn new(holdings: Arc<Holdings>, endpoints: Arc<Endpoints>) -> Self {
        let pauses = Pauses::new(endpoints.len());
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
        let endpoint = self.endpoints.preferred();
        let (requests, messages) = mpsc::channel(MESSAGES);
        let mut sent = Sent::default();
        self.beat(&requests, &mut sent, true);
        let mut stub = LeaseServiceClient::new(endpoint.channel.clone());
        let opened = stub.keep_alive(ReceiverStream::new(messages));
        let end = match timeout_at(sent.answer_by(), opened).await {
            Ok(Ok(response)) => {
                let answers = response.into_inner();
                return Phase::Beating(Box::new(Stream { endpoint, requests, answers, sent }));
            }
            Ok(Err(status)) => End::Failed(status),
            Err(_) => End::Silent,
        };
        self.leave(&endpoint, end).await
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
                () = sleep(LINGER), if due.is_none() => break End::NoLeases,
            }
        };
        self.leave(&stream.endpoint, end).await
    }

    /// Turns to another daemon, after a pause if all have failed.
    async fn leave(&mut self, endpoint: &Endpoint, end: End) -> Phase {
        let cause = match end {
            End::NoLeases => return Phase::Idle,
            End::Silent => {
                self.silences += 1;
                "no answer in time".to_owned()
            }
            End::Failed(status) => cause(&status),
        };
        if self.pauses.is_first() {
            tracing::warn!(endpoint = endpoint.name, cause, "the keepalive stream failed; opening another");
        } else {
            tracing::debug!(endpoint = endpoint.name, cause, "no keepalive stream yet");
        }
        self.endpoints.avoid(endpoint);
        // Whoever pauses long finds out late that an outage is over.
        let longest = (self.shortest / PAUSE_SHARE).max(LEAST_PAUSE);
        sleep(self.pauses.next(None).min(longest)).await;
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
            sent.0.push_back(Message { sequence: self.sequence, sent_at, answer_by });
            if requests.try_send(KeepAliveRequest { leases, sequence: self.sequence }).is_err() {
                tracing::debug!("the keepalive stream takes no more");
            }
        }
    }

    /// Takes in what a daemon says, asked (`sequence` > 0) or not.
    fn take(&mut self, answer: KeepAliveResponse, sent: &mut Sent) {
        let sent_at = sent.answered(answer.sequence);
        if sent_at.is_some() {
            self.pauses = Pauses::new(self.endpoints.len());
            self.silences = 0;
        }
        for result in answer.results {
            let id = result.lease.and_then(|lease| Uuid::try_parse(&lease.lease_id).ok());
            let Some(holding) = id.and_then(|id| self.holdings.find(id)) else { continue };
            match (result.outcome, sent_at) {
                (Some(Outcome::Kept(kept)), Some(sent_at)) => {
                    let remaining = kept.remaining.and_then(|remaining| remaining.try_into().ok());
                    holding.confirm(deadline(sent_at, remaining.unwrap_or_default(), holding.margin));
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
    /// When the message with this sequence was sent, if it is one of this stream and was not answered before.
    fn answered(&mut self, sequence: u64) -> Option<Moment> {
        let position = self.0.iter().position(|message| message.sequence == sequence)?;
        self.0.remove(position).map(|message| message.sent_at)
    }

    fn is_any(&self) -> bool {
        !self.0.is_empty()
    }

    /// When the oldest should have been answered.
    fn answer_by(&self) -> Instant {
        self.0.front().map_or_else(Instant::now, |message| message.answer_by)
    }
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
