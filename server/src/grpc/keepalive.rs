//! The keepalive stream: turns messages into touches, and their outcomes into results. The hot
//! path.
//!
//! Each stream is one task, which owns the stream's leases. When the caller goes away the task ends
//! and the leases run out, so there is nothing to clean up.
//!
//! A touch is coalesced while the latest written touch of its lease is young. A loss is pushed as
//! soon as a record shows it, unless a pending answer will report it. A lease that is malformed or
//! past a limit is refused in its result, and the stream goes on. A message past
//! `MAX_MESSAGE_BYTES` or `MESSAGE_LEASES` ends the stream.

use std::collections::HashMap;
use std::mem::take;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::{BoxFuture, OptionFuture, ready};
use futures_util::stream::{FuturesUnordered, StreamExt};
use leased_proto::v1::{KeepAliveRequest, KeepAliveResult, LeaseRef, RefusalReason};
use prost::encoding::message::encoded_len;
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status, Streaming};

use super::rate_limiter::RateLimiter;
use super::unread::{Admitted, ResponseSender, Responses, Share, UnreadAnswers, channel};
use super::{request, response};
use crate::boot_instant::BootInstant;
use crate::config::Limits;
use crate::engine::{CallError, Full, LeaseSet, Lessor, Loss, Source, StreamLease, Touched};
use crate::panics::contain;
use crate::store::{Store, StoreError};
use crate::transport::bounds::panicked;

/// How many commits of one stream are under way at a time. Messages that arrive meanwhile share the
/// next commit.
const COMMITS: usize = 16;
/// The pause before leases are touched again after the store has failed.
const RETRY: Duration = Duration::from_millis(200);
/// How many bytes the encoded leases of one message may have. Leases past this are refused. The
/// answer for leases of this size fits into one response.
const MESSAGE_BYTES: usize = 512 * 1024;
/// How many leases one message may name. A message with more ends the stream. [`MESSAGE_BYTES`] has
/// room for fewer well-formed leases, so this only bounds the cost of malformed ones.
const MESSAGE_LEASES: usize = 12_500;
/// How many refused leases of one message get a sentence beside the reason.
const SENTENCES: usize = 100;
/// How many leases of one stream may await their answers without a share of the connection's
/// allowance for unread answers. Nearly all messages are this small, and never wait for answers
/// that other streams leave unread.
const UNSHARED: usize = 64;

/// The results of touches. `None` for a touch that was coalesced.
type Outcomes = Vec<(Arc<StreamLease>, Option<Touched>)>;

/// Messages that shared a commit, and the results for the leases that they name.
type GroupOutcome = (Messages, Result<Outcomes, Status>);

/// The message of a refusal because of the daemon's limits.
const PAST_LEASES: &str = "the daemon keeps as many leases alive as it may, and is touching as many others as it may; \
                           touch this one with a Touch call";

/// A message that is not answered yet.
#[derive(Debug)]
struct Message {
    sequence: u64,
    received_at: Instant,
    /// How many leases the message touches.
    leases: usize,
    /// The results of leases that are refused.
    refused: Vec<KeepAliveResult>,
    /// The answer's share of the connection's allowance. `None` while the stream has at most
    /// [`UNSHARED`] leases unanswered.
    share: Option<Share>,
}

impl Message {
    /// The size of the answer, in results. An empty answer takes memory too, so it counts as one.
    fn results(&self) -> usize {
        (self.leases + self.refused.len()).max(1)
    }
}

/// Messages that share a commit, in the order in which they arrived. Nearly always there is one.
#[derive(Debug)]
struct Messages {
    first: Message,
    others: Vec<Message>,
}

impl Messages {
    fn into_iter(self) -> impl Iterator<Item = Message> {
        std::iter::once(self.first).chain(self.others)
    }
}

/// Messages that wait until the stream may commit again.
///
/// The stream reads further messages meanwhile, because h2 takes many small unread frames for an
/// attack and ends the connection (`too_many_data_frames`).
#[derive(Debug)]
struct Group {
    messages: Messages,
    /// The leases that the messages name, one message after the other.
    leases: Vec<Arc<StreamLease>>,
}

/// Serves one stream until either side ends it.
pub(crate) fn serve<S: Store>(
    mut messages: Streaming<KeepAliveRequest>,
    lessor: Lessor<S>,
    limits: &Limits,
    unread: UnreadAnswers,
    draining: CancellationToken,
) -> Responses {
    let (mut responses, answers) = channel();
    let mut stream = KeepAliveStream::new(lessor, limits, unread);
    tokio::spawn(async move {
        let closed = responses.closed();
        let end = tokio::select! {
            end = contain(stream.run(&mut messages, &mut responses)) => end.unwrap_or_else(|_| Err(panicked())),
            () = draining.cancelled() => Err(response::shutting_down()),
            () = closed => return,
        };
        // Before the status is sent, because the leases must not stay tracked until a slow caller
        // has read the status.
        drop((stream, messages));
        if let Err(status) = end {
            responses.end(status).await;
        }
    });
    answers
}

struct KeepAliveStream<S> {
    lessor: Lessor<S>,
    lease_set: LeaseSet,
    most_leases: usize,
    coalesces: bool,
    rate_limiter: RateLimiter,
    waiting: Option<Group>,
    /// The connection's allowance for unread answers.
    unread: UnreadAnswers,
    /// A message that waits for its share of the allowance.
    entering: Option<BoxFuture<'static, Admitted>>,
    /// The results of unanswered messages without a share.
    unshared: usize,
    /// The refused leases of unanswered messages.
    refused: usize,
    in_flight: FuturesUnordered<BoxFuture<'static, GroupOutcome>>,
}

impl<S: Store> KeepAliveStream<S> {
    fn new(lessor: Lessor<S>, limits: &Limits, unread: UnreadAnswers) -> Self {
        Self {
            lease_set: lessor.lease_set(),
            lessor,
            most_leases: limits.stream_leases,
            coalesces: limits.coalesce_touches,
            rate_limiter: RateLimiter::new(limits.stream_rate),
            waiting: None,
            unread,
            entering: None,
            unshared: 0,
            refused: 0,
            in_flight: FuturesUnordered::new(),
        }
    }

    /// Reads and answers messages until the caller ends its side and every message is answered.
    ///
    /// Borrows its arguments, because a future has space for a captured value twice, and an idle
    /// stream would keep that space.
    async fn run(
        &mut self,
        messages: &mut Streaming<KeepAliveRequest>,
        responses: &mut ResponseSender,
    ) -> Result<(), Status> {
        let mut open = true;
        while open || self.entering.is_some() || self.waiting.is_some() || !self.in_flight.is_empty() {
            let ready_at = self.rate_limiter.ready_at();
            let may_commit = self.in_flight.len() < COMMITS;
            let now = Instant::now();
            if may_commit
                && ready_at <= now
                && let Some(group) = self.waiting.take()
            {
                self.rate_limiter.spend();
                self.touch(group.messages, group.leases);
                continue;
            }
            tokio::select! {
                Some((messages, touched)) = self.in_flight.next() => {
                    if !self.answer(responses, messages, touched?).await {
                        return Ok(());
                    }
                }
                lost = self.lease_set.lost() => {
                    // A few at a time, because no share of the allowance was taken for results that
                    // no message asks for.
                    for lost in lost.chunks(UNSHARED) {
                        let results = lost.iter().map(|(lease, Loss(reason))| result(lease, Touched::Lost(*reason)));
                        if !responses.send(0, results.collect(), None).await {
                            return Ok(());
                        }
                    }
                },
                Some(admitted) = OptionFuture::from(self.entering.as_mut()) => {
                    self.entering = None;
                    if !self.enter(admitted, responses).await? {
                        return Ok(());
                    }
                }
                message = messages.message(), if open && self.entering.is_none() && self.has_room() => match message {
                    Ok(Some(message)) => {
                        if let Some(admitted) = self.admit(message)?
                            && !self.enter(admitted, responses).await?
                        {
                            return Ok(());
                        }
                    }
                    Ok(None) => open = false,
                    Err(status) if status.code() == Code::OutOfRange => return Err(response::oversized()),
                    Err(status) => return Err(status),
                },
                () = sleep_until(ready_at), if may_commit && self.waiting.is_some() => {}
            }
        }
        Ok(())
    }

    /// Whether another message may be read. Not while the waiting messages name as many leases as
    /// the stream may have. The refused leases of unanswered messages count too, because each takes
    /// as much memory as a lease, and no other limit bounds them.
    fn has_room(&self) -> bool {
        let waiting = |Group { messages, leases }: &Group| leases.len() + messages.others.len();
        self.waiting.as_ref().map_or(0, waiting) + self.refused < self.most_leases
    }

    /// Gives a message its share of the allowance for unread answers, or has it wait for one.
    fn admit(&mut self, message: KeepAliveRequest) -> Result<Option<Admitted>, Status> {
        if message.leases.len() > MESSAGE_LEASES {
            return Err(response::limit_exceeded("message_leases", MESSAGE_LEASES));
        }
        let received_at = Instant::now();
        let named =
            if message.leases.is_empty() { self.lease_set.names().len() } else { message.leases.len() };
        let results = named.max(1);
        if self.unshared + results <= UNSHARED {
            return Ok(Some(Admitted { message, received_at, share: None }));
        }
        if let Some(share) = self.unread.try_share(results) {
            return Ok(Some(Admitted { message, received_at, share: Some(share) }));
        }
        self.entering = Some(self.unread.wait_for_share(results, &message, received_at)?);
        Ok(None)
    }

    /// Takes a message, and answers it at once if none of its touches has to be written. Returns
    /// false if the caller has gone away.
    async fn enter(&mut self, admitted: Admitted, responses: &mut ResponseSender) -> Result<bool, Status> {
        let Admitted { message, received_at, share } = admitted;
        let sequence = message.sequence;
        let Some((results, share)) = self.take(message, received_at, share) else { return Ok(true) };
        if !responses.send(sequence, results, share).await {
            return Ok(false);
        }
        self.lessor.metrics().acked(Source::Coalesced, received_at.elapsed());
        Ok(true)
    }

    /// Returns the results of a message if none of its touches has to be written. Otherwise begins
    /// the touches, or has the message wait.
    fn take(
        &mut self,
        mut message: KeepAliveRequest,
        received_at: Instant,
        share: Option<Share>,
    ) -> Option<(Vec<KeepAliveResult>, Option<Share>)> {
        let must_wait = self.waiting.is_some()
            || self.rate_limiter.ready_at() > received_at
            || self.in_flight.len() >= COMMITS;
        if !must_wait {
            self.rate_limiter.spend();
            if let Some(results) = self.coalesced(&mut message) {
                return Some((results, share));
            }
        }
        let (leases, refused) = match (message.sequence, message.leases.is_empty()) {
            (0, _) => (Vec::new(), self.refuse_all(message.leases)),
            (_, true) => (self.lease_set.begin_message_for_all(), Vec::new()),
            (_, false) => self.name(message.leases),
        };
        if leases.is_empty() && !must_wait {
            return Some((refused, share));
        }
        let entry = Message { sequence: message.sequence, received_at, leases: leases.len(), refused, share };
        self.refused += entry.refused.len();
        if entry.share.is_none() {
            self.unshared += entry.results();
        }
        match &mut self.waiting {
            Some(group) => {
                group.messages.others.push(entry);
                group.leases.extend(leases);
            }
            None => {
                let messages = Messages { first: entry, others: Vec::new() };
                if must_wait {
                    self.waiting = Some(Group { messages, leases });
                } else {
                    self.touch(messages, leases);
                }
            }
        }
        None
    }

    /// Returns the results of a message if all its touches can be coalesced. Moves the names from the
    /// message into the results.
    fn coalesced(&self, message: &mut KeepAliveRequest) -> Option<Vec<KeepAliveResult>> {
        if !self.coalesces || message.sequence == 0 {
            return None;
        }
        let named = &mut message.leases;
        let remaining = if named.is_empty() {
            let remaining = self.lease_set.coalesce(self.lease_set.names().map(Some))?;
            named.extend(self.lease_set.names().map(|name| response::lease_ref(&name.key, name.id)));
            remaining
        } else {
            let mut bytes = 0;
            self.lease_set.coalesce(named.iter().map(|lease| {
                bytes += encoded_len(1, lease);
                request::one_of_many(lease).ok().filter(|_| bytes <= MESSAGE_BYTES)
            }))?
        };
        let results = take(named).into_iter().zip(remaining);
        let kept = |(lease, remaining)| response::keepalive_result(lease, Touched::Kept(remaining));
        Some(results.map(kept).collect())
    }

    /// Adds the leases that a message names to the stream, and refuses the malformed ones and those
    /// past a limit.
    fn name(&mut self, named: Vec<LeaseRef>) -> (Vec<Arc<StreamLease>>, Vec<KeepAliveResult>) {
        let (mut leases, mut refused) = (Vec::with_capacity(named.len()), Vec::new());
        let most = self.most_leases;
        let mut message_leases = self.lease_set.begin_message(most);
        let mut bytes = 0;
        for lease in named {
            bytes += encoded_len(1, &lease);
            let (reason, message) = match request::one_of_many(&lease) {
                Err(message) => (RefusalReason::Invalid, message),
                Ok(_) if bytes > MESSAGE_BYTES => (RefusalReason::LimitExceeded, past_message_bytes()),
                Ok(name) => match message_leases.add(name) {
                    Ok(lease) => {
                        leases.push(lease);
                        continue;
                    }
                    Err(Full::Stream) => (RefusalReason::LimitExceeded, past_stream_leases(most)),
                    Err(Full::Daemon) => (RefusalReason::LimitExceeded, PAST_LEASES.to_owned()),
                },
            };
            refuse(&mut refused, lease, reason, message);
        }
        (leases, refused)
    }

    /// Refuses all leases of a message without a sequence number. Without the number the holder
    /// could not tell which message a result answers, and so from when to count the remaining time.
    fn refuse_all(&self, named: Vec<LeaseRef>) -> Vec<KeepAliveResult> {
        const WHY: &str = "sequence must be 1 or more; 0 marks results that no message asked for";
        let mut refused = Vec::new();
        let mut refuse = |lease| refuse(&mut refused, lease, RefusalReason::Invalid, WHY);
        match named.is_empty() {
            true => self.lease_set.names().for_each(|name| refuse(response::lease_ref(&name.key, name.id))),
            false => named.into_iter().for_each(refuse),
        }
        refused
    }

    /// Begins to touch the leases whose touches cannot be coalesced. Polls the future once, so that
    /// the touches are queued even while an answer waits for its reader and nothing polls the
    /// future.
    fn touch(&mut self, messages: Messages, leases: Vec<Arc<StreamLease>>) {
        let now = BootInstant::now();
        let is_due = |lease: &StreamLease| !self.coalesces || lease.coalesce(now).is_none();
        let due = (0..leases.len()).filter(|position| is_due(&leases[*position])).collect();
        let mut touching = Box::pin(touch(self.lessor.clone(), messages, leases, due));
        self.in_flight.push(match touching.as_mut().now_or_never() {
            Some(answer) => Box::pin(ready(answer)),
            None => touching,
        });
    }

    /// Answers messages with the outcomes for their leases. Returns false if the caller has gone
    /// away.
    async fn answer(
        &mut self,
        responses: &mut ResponseSender,
        messages: Messages,
        touched: Outcomes,
    ) -> bool {
        let is_written = touched.iter().any(|(_, touched)| touched.is_some());
        let source = if is_written { Source::Store } else { Source::Coalesced };
        let settled = self.lease_set.settle(touched);
        let mut results = settled.iter().map(|(lease, touched)| result(lease, *touched));
        for message in messages.into_iter() {
            self.refused -= message.refused.len();
            if message.share.is_none() {
                self.unshared -= message.results();
            }
            let Message { sequence, received_at, leases, refused, share } = message;
            let results = results.by_ref().take(leases).chain(refused).collect();
            if !responses.send(sequence, results, share).await {
                return false;
            }
            self.lessor.metrics().acked(source, received_at.elapsed());
        }
        true
    }
}

/// Adds a result for a lease that is refused.
fn refuse(
    refused: &mut Vec<KeepAliveResult>,
    lease: LeaseRef,
    reason: RefusalReason,
    message: impl Into<String>,
) {
    // With thousands of refused leases, the sentences would be most of the cost of the answer, and
    // the reason says the same.
    let message = if refused.len() < SENTENCES { message.into() } else { String::new() };
    refused.push(response::refused(lease, reason, message));
}

fn past_message_bytes() -> String {
    format!(
        "past the first {} KiB of its message; send a large set in several messages",
        MESSAGE_BYTES / 1024
    )
}

fn past_stream_leases(most: usize) -> String {
    format!("the stream has {most} leases, as many as it may; touch this one on another stream")
}

fn result(lease: &StreamLease, touched: Touched) -> KeepAliveResult {
    response::keepalive_result(reference(lease), touched)
}

fn reference(lease: &StreamLease) -> LeaseRef {
    let name = lease.name();
    response::lease_ref(&name.key, name.id)
}

/// Touches the leases at the positions `due`. A lease that several messages name is touched once.
///
/// Tries again until the store answers, so that an outage does not end the stream. The leases
/// survive an outage that is shorter than what is left of their TTLs.
async fn touch<S: Store>(
    lessor: Lessor<S>,
    messages: Messages,
    leases: Vec<Arc<StreamLease>>,
    mut due: Vec<usize>,
) -> GroupOutcome {
    let mut touched = vec![None; leases.len()];
    while !due.is_empty() {
        let repeated = if messages.others.is_empty() { Vec::new() } else { take_repeated(&leases, &mut due) };
        match lessor.touch_all(due.iter().map(|position| leases[*position].name())).await {
            Ok(answers) => {
                due.iter().zip(answers).for_each(|(position, answer)| touched[*position] = Some(answer));
                repeated.iter().for_each(|(position, first)| touched[*position] = touched[*first]);
                break;
            }
            Err(CallError::Store(StoreError::Unavailable { .. })) => sleep(RETRY).await,
            Err(error) => return (messages, Err(response::failed(error))),
        }
        // All, because the last written touches of coalesced leases may no longer be young.
        due = (0..leases.len()).collect();
    }
    (messages, Ok(leases.into_iter().zip(touched).collect()))
}

/// Removes from `due` each position whose lease is also at an earlier position. Returns each
/// removed position with the earlier one.
fn take_repeated(leases: &[Arc<StreamLease>], due: &mut Vec<usize>) -> Vec<(usize, usize)> {
    let mut firsts = HashMap::with_capacity(due.len());
    let mut repeated = Vec::new();
    due.retain(|position| {
        let first = *firsts.entry(Arc::as_ptr(&leases[*position])).or_insert(*position);
        if first != *position {
            repeated.push((*position, first));
        }
        first == *position
    });
    repeated
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use leased_proto::v1::keep_alive_result::Outcome;
    use tempfile::TempDir;
    use tokio_util::task::TaskTracker;

    use super::super::rate_limiter::BURST;
    use super::*;
    use crate::boot_instant::suspend;
    use crate::config::{Args, Config};
    use crate::engine::{Acquired, Bounds, Call, Origin};
    use crate::lease::{Acquisition, Key, LeaseId, Rules, Ttl};
    use crate::metrics::registry::MetricsRegistry;
    use crate::store::embedded::EmbeddedStore;

    const TTL: Duration = Duration::from_secs(3600);

    /// Returns an engine over an empty store, and the folder of the store.
    async fn lessor() -> (Lessor<EmbeddedStore>, TempDir) {
        let folder = tempfile::tempdir().expect("a folder");
        let rules = Rules { grace: Duration::ZERO, waiter_ttl: Duration::from_secs(15) };
        let store = EmbeddedStore::open(folder.path(), rules).await.expect("a usable folder");
        let (mut registry, tasks) = (MetricsRegistry::default(), TaskTracker::new());
        (Lessor::start(store, Bounds::default(), CancellationToken::new(), &mut registry, &tasks), folder)
    }

    fn limits() -> Limits {
        Config::try_from(Args::parse_from(["leased"])).expect("the defaults").limits
    }

    #[tokio::test]
    async fn a_coalesced_answer_counts_the_time_for_which_the_machine_was_suspended() {
        let (lessor, _folder) = lessor().await;
        let (key, id) = (Key::try_from("job").expect("a key"), LeaseId::random());
        let lease = response::lease_ref(&key, id);
        let ttl = Ttl::new(TTL).expect("an hour");
        let acquisition = Acquisition { ttl, wait: false, ..Acquisition::waiting(id) };
        let call = Call { key, acquisition, origin: Origin::Caller, wait: Duration::ZERO };
        assert!(matches!(lessor.acquire(call).await, Ok(Acquired::Granted(_))));

        let mut stream = KeepAliveStream::new(lessor, &limits(), UnreadAnswers::default());
        let message = || KeepAliveRequest { leases: vec![lease.clone()], sequence: 1 };
        assert!(stream.take(message(), Instant::now(), None).is_none(), "the store is asked");
        let (_, touched) = stream.in_flight.next().await.expect("an answer");
        stream.lease_set.settle(touched.expect("the store answers"));

        suspend(TTL / 20);
        let (results, _) = stream.take(message(), Instant::now(), None).expect("it is coalesced");
        let Some(Outcome::Kept(kept)) = &results[0].outcome else { panic!("{results:?}") };
        let remaining = Duration::try_from(kept.remaining.expect("a duration")).expect("not negative");
        assert!(remaining <= TTL - TTL / 20, "{remaining:?}");

        suspend(TTL / 20);
        assert!(stream.take(message(), Instant::now(), None).is_none(), "the store is asked");
    }

    #[tokio::test]
    async fn no_message_is_read_while_unanswered_refusals_fill_the_streams_limit() {
        let (lessor, _folder) = lessor().await;
        let mut stream =
            KeepAliveStream::new(lessor, &Limits { stream_leases: 3, ..limits() }, UnreadAnswers::default());
        let stranger = response::lease_ref(&Key::try_from("job").expect("a key"), LeaseId::random());
        let message = KeepAliveRequest { leases: vec![stranger, LeaseRef::default()], sequence: 1 };
        for _ in 0..3 {
            assert!(stream.has_room());
            let answer = stream.take(message.clone(), Instant::now(), None);
            assert!(answer.is_none(), "the store is asked for one of its leases");
        }
        assert!(!stream.has_room(), "three are refused");

        let (mut responses, mut told) = channel();
        for refused in [2, 1, 0] {
            let (messages, touched) = stream.in_flight.next().await.expect("an answer");
            let touched = touched.expect("the store answers");
            assert!(stream.answer(&mut responses, messages, touched).await);
            assert_eq!(told.next().await.expect("an answer").expect("results").results.len(), 2);
            assert!(stream.has_room());
            assert_eq!(stream.refused, refused);
        }
    }

    #[tokio::test]
    async fn a_message_without_a_sequence_takes_its_turn_and_a_hundred_refusals_say_why() {
        let (lessor, _folder) = lessor().await;
        let mut stream =
            KeepAliveStream::new(lessor, &Limits { stream_rate: 1, ..limits() }, UnreadAnswers::default());
        let message = |leases| KeepAliveRequest { leases: vec![LeaseRef::default(); leases], sequence: 0 };
        let (results, _) = stream.take(message(150), Instant::now(), None).expect("results");
        let why = |result: &&KeepAliveResult| matches!(&result.outcome, Some(Outcome::Refused(refused)) if !refused.message.is_empty());
        assert_eq!((results.len(), results.iter().filter(why).count()), (150, 100));

        let burst = BURST as usize + 1;
        let mut more = (0..burst).map(|_| stream.take(message(1), Instant::now(), None));
        assert!(more.any(|results| results.is_none()), "it waits");
    }
}
