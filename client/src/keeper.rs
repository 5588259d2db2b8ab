//! The keeper: the task that keeps all leases of a client alive on one stream.
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
//! When the client returns to a daemon that it prefers, the stream moves there between two
//! messages.
//!
//! A broken stream does not affect the leases. The keeper opens the next stream at whichever daemon
//! answers, and names all leases in its first message. The remaining time in an answer counts from
//! before the message was sent.

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
use crate::boot_instant::BootInstant;
use crate::client::touch;
use crate::daemon::{Purpose, Slot};
use crate::endpoints::{Endpoints, Pauses};
use crate::error::{Error, Failure, cause};
use crate::holding::Holding;
use crate::holdings::{Beat, Holdings, Scope};
use crate::info::span;

/// The most messages that wait to be sent on the stream. If more would wait, the daemon reads none,
/// and its silence will end the stream.
const MESSAGES: usize = 32;
/// How long a stream without leases stays open.
const LINGER: Duration = Duration::from_secs(10);
/// The shortest time for an answer before another stream is tried.
const LEAST_PATIENCE: Duration = Duration::from_millis(100);
/// The longest time for an answer before another stream is tried.
const MOST_PATIENCE: Duration = Duration::from_secs(5);
/// A pause between streams is at most a tenth of the shortest TTL, or [`LEAST_PAUSE`] if that is
/// longer.
const PAUSE_SHARE: u32 = 10;
/// The lowest upper bound of a pause between streams.
const LEAST_PAUSE: Duration = Duration::from_millis(50);
/// The most unary touches in flight.
const TOUCHES: usize = 64;

/// Keeps leases alive for as long as [`run`](Self::run) is polled.
pub(crate) struct Keeper {
    holdings: Arc<Holdings>,
    endpoints: Arc<Endpoints>,
    /// The sequence of the latest message.
    sequence: u64,
    /// The pauses since the last answer.
    pauses: Pauses,
    /// How many streams in a row have been silent.
    silences: u32,
    /// The shortest TTL among the leases that the last stream began with.
    shortest: Duration,
}

enum Phase {
    Idle,
    Opening,
    Beating(Box<KeepAliveStream>),
}

/// An open stream.
struct KeepAliveStream {
    slot: Slot,
    requests: mpsc::Sender<KeepAliveRequest>,
    answers: Streaming<KeepAliveResponse>,
    sent: Sent,
}

/// The latest messages, oldest first. An answer may have several parts, so an answered message is
/// kept for a while.
#[derive(Default)]
struct Sent(VecDeque<Message>);

struct Message {
    sequence: u64,
    /// The time from which its answer counts.
    sent_at: BootInstant,
    /// When the stream counts as silent if there is no answer.
    answer_by: Instant,
    /// Whether a part of its answer has arrived.
    is_answered: bool,
}

/// Why a stream is closed.
enum End {
    NoLeases,
    /// The client has returned to a daemon that it prefers.
    Returned,
    Silent,
    Failed(Status),
    /// The daemon serves a different store than the others.
    WrongStore(Error),
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

    /// Waits until a lease is due.
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
        let slot = daemon.slot(Purpose::KeepAlive);
        let (requests, messages) = mpsc::channel(MESSAGES);
        let mut sent = Sent::default();
        self.beat(&requests, &mut sent, Scope::All);
        if !sent.awaits_answer() {
            // The last lease was released while the client chose a daemon. A stream without a
            // message gets no answer, which would look like silence.
            return Phase::Idle;
        }
        let mut stub = LeaseServiceClient::new(slot.channel.clone());
        let opened = stub.keep_alive(ReceiverStream::new(messages));
        let end = match timeout_at(sent.answer_by(), opened).await {
            Ok(Ok(response)) => match self.endpoints.note_store(&daemon, response.metadata()) {
                Ok(()) => {
                    let answers = response.into_inner();
                    return Phase::Beating(Box::new(KeepAliveStream { slot, requests, answers, sent }));
                }
                Err(error) => End::WrongStore(error),
            },
            Ok(Err(status)) => End::Failed(status),
            Err(_) => End::Silent,
        };
        self.leave(&slot, end).await
    }

    /// Touches leases that are due and reads the answers, until the stream is closed.
    async fn beating(&mut self, mut stream: Box<KeepAliveStream>) -> Phase {
        let end = loop {
            let due = self.holdings.next_due();
            tokio::select! {
                // An answer that has arrived counts, even if `answer_by` has passed as well.
                biased;
                answer = stream.answers.message() => match answer {
                    Ok(Some(answer)) => self.read(answer, &mut stream.sent),
                    Ok(None) => break End::Failed(Status::unavailable("the daemon ended the stream")),
                    Err(status) => break End::Failed(status),
                },
                () = sleep_until(stream.sent.answer_by()), if stream.sent.awaits_answer() => {
                    break End::Silent;
                }
                () = reached(due) => self.beat(&stream.requests, &mut stream.sent, Scope::Due),
                () = self.holdings.sooner_due.notified() => {}
                // Only while no message waits for its answer: every lease has then just been
                // confirmed, or is not due yet.
                () = self.endpoints.returned.notified(), if !stream.sent.awaits_answer() => {
                    if !self.endpoints.is_preferred(&stream.slot.daemon) {
                        break End::Returned;
                    }
                }
                () = sleep(LINGER), if due.is_none() => break End::NoLeases,
            }
        };
        self.leave(&stream.slot, end).await
    }

    /// Switches to another daemon and another connection if the stream has failed, and returns the
    /// next phase.
    async fn leave(&mut self, slot: &Slot, end: End) -> Phase {
        let cause = match end {
            End::NoLeases => return Phase::Idle,
            End::Returned => return Phase::Opening,
            End::Silent => {
                self.silences += 1;
                self.endpoints.switch(slot, &Failure::Passing(None));
                "no answer in time".to_owned()
            }
            End::Failed(status) => {
                // `fail` stays at a daemon that has answered. After a stream has ended the keeper
                // switches in any case, so that it tries the other daemons first.
                if let Failure::Final(_) = self.endpoints.fail(slot, &status) {
                    self.endpoints.switch(slot, &Failure::Passing(None));
                }
                cause(&status)
            }
            End::WrongStore(error) => {
                let cause = error.to_string();
                self.endpoints.switch(slot, &Failure::Useless(error));
                cause
            }
        };
        self.pause(format!("{}: {cause}", slot.daemon.name)).await
    }

    /// Waits before the next stream if all daemons have failed.
    async fn pause(&mut self, cause: String) -> Phase {
        if self.pauses.is_first() {
            tracing::warn!(cause, "the keepalive stream failed; opening another");
        } else {
            tracing::debug!(cause, "no keepalive stream yet");
        }
        self.holdings.note(Some(cause));
        // Short compared with the TTL, so that the end of an outage is noticed in time.
        let longest = (self.shortest / PAUSE_SHARE).max(LEAST_PAUSE);
        sleep(self.pauses.next(self.endpoints.len(), None).min(longest)).await;
        Phase::Opening
    }

    /// Sends the messages of a beat.
    fn beat(&mut self, requests: &mpsc::Sender<KeepAliveRequest>, sent: &mut Sent, scope: Scope) {
        // Before any message is sent, because what the answers confirm counts from here.
        let sent_at = BootInstant::now();
        let Beat { messages, shortest } = self.holdings.take_due(sent_at, scope);
        if scope == Scope::All {
            self.shortest = shortest;
        }
        // Doubled with each silent stream, to give a slow store more time.
        let patience = (shortest / 3).saturating_mul(1 << self.silences.min(5));
        let answer_by = Instant::now() + patience.clamp(LEAST_PATIENCE, MOST_PATIENCE);
        for leases in messages {
            self.sequence += 1;
            sent.push(Message { sequence: self.sequence, sent_at, answer_by, is_answered: false });
            if requests.try_send(KeepAliveRequest { leases, sequence: self.sequence }).is_err() {
                tracing::debug!("too many keepalive messages are waiting to be sent");
            }
        }
    }

    /// Applies an answer of the daemon, or a loss that the daemon pushes, with `sequence`
    /// 0.
    fn read(&mut self, answer: KeepAliveResponse, sent: &mut Sent) {
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
                // A refusal of one lease does not affect the others.
                (Some(Outcome::Refused(refused)), _) => {
                    tracing::warn!(
                        key = &*holding.key,
                        why = refused.message,
                        "the daemon refused to touch a lease on the stream"
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

    /// Marks the message with this sequence as answered, and returns when it was sent. `None` if
    /// this stream has sent no message with this sequence.
    fn answered(&mut self, sequence: u64) -> Option<BootInstant> {
        let message = self.0.iter_mut().rfind(|message| message.sequence == sequence)?;
        message.is_answered = true;
        Some(message.sent_at)
    }

    /// The oldest message without an answer.
    fn oldest_unanswered(&self) -> Option<&Message> {
        self.0.iter().find(|message| !message.is_answered)
    }

    /// Whether any message waits for its answer.
    fn awaits_answer(&self) -> bool {
        self.oldest_unanswered().is_some()
    }

    /// When the oldest message without an answer should have been answered.
    fn answer_by(&self) -> Instant {
        self.oldest_unanswered().map_or_else(Instant::now, |message| message.answer_by)
    }
}

/// Touches by unary calls the leases that a daemon refused on the stream, for as long as the future
/// is polled. A lease whose call is refused, too, stays valid until its deadline.
pub(crate) async fn touch_refused(holdings: &Holdings, endpoints: &Endpoints) {
    let mut calls = FuturesUnordered::new();
    // At most one call for each lease: in an outage, a lease with a short TTL is due again before
    // its call ends.
    let mut under_way = HashSet::new();
    loop {
        let room = TOUCHES - calls.len();
        tokio::select! {
            Some(id) = calls.next(), if !calls.is_empty() => {
                under_way.remove(&id);
            }
            () = reached(holdings.next_refused(&under_way)), if room > 0 => {
                for holding in holdings.take_refused(BootInstant::now(), room, &under_way) {
                    under_way.insert(holding.id);
                    calls.push(touch_alone(holdings, endpoints, holding));
                }
            }
            () = holdings.refused.notified() => {}
        }
    }
}

/// Touches a lease by a unary call, and returns the lease id.
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

/// Sleeps until `instant`; for ever if there is none.
async fn reached(instant: Option<BootInstant>) {
    match instant {
        Some(instant) => instant.reached().await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
#[path = "keeper_tests.rs"]
#[expect(clippy::unwrap_used, reason = "a test that meets an unexpected failure should stop there")]
mod tests;
