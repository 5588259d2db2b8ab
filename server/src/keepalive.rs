//! The keepalive stream: messages become touches, records become results. The hot path.
//!
//! A stream is one task. It owns the set of leases that the stream carries, and nothing else outlives it: when the
//! caller goes away the task ends, the leases run out in their time, and nobody has anything to clean up.
//!
//! A lease touched a moment ago is answered from memory, and one that is lost is told at once, unasked.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::stream::{FuturesUnordered, StreamExt};
use leased_proto::v1::{KeepAliveRequest, KeepAliveResponse, KeepAliveResult, LeaseRef};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, sleep_until};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status, Streaming};

use crate::bounds::panicked;
use crate::config::Limits;
use crate::lessor::{CallError, Carriage, Carrier, Lessor, Loss, Source, Touched};
use crate::panics::contain;
use crate::request::{self, Violations};
use crate::store::{Store, StoreError};
use crate::wire;

/// Commits of one stream that are under way at once; what comes meanwhile shares the next one.
const COMMITS: usize = 16;
/// Seconds' worth of messages that a stream may send at once before some of them share a commit.
const BURST: u32 = 4;
/// The pause before leases are touched again after the store has failed.
const RETRY: Duration = Duration::from_millis(200);

/// Losses told in one response, so that it stays below what a message may have.
const LOSSES: usize = 1000;

/// What a stream is answered.
pub(crate) type Answers = ReceiverStream<Result<KeepAliveResponse, Status>>;

/// What became of leases; `None` for those that were not touched.
type Outcomes = Vec<(Arc<Carriage>, Option<Touched>)>;

/// Messages that shared a commit, and what became of the leases that they name.
type Answer = (Messages, Result<Outcomes, Status>);

/// A message that is not answered yet.
#[derive(Debug, Clone, Copy)]
struct Message {
    sequence: u64,
    came_at: Instant,
    /// How many leases it names.
    leases: usize,
}

/// Messages that share a commit, in their order. Nearly always it is one.
#[derive(Debug)]
struct Messages {
    first: Message,
    others: Vec<Message>,
}

impl Messages {
    fn iter(&self) -> impl Iterator<Item = &Message> {
        std::iter::once(&self.first).chain(&self.others)
    }
}

/// Messages that wait until the stream may commit again.
///
/// They are read all the same: left unread, many short ones are an attack to h2, which ends the connection
/// (`too_many_data_frames`).
#[derive(Debug)]
struct Group {
    messages: Messages,
    /// Those that the messages name, one message after the other.
    leases: Vec<Arc<Carriage>>,
}

/// Serves one stream until either side ends it.
pub(crate) fn serve<S: Store>(
    messages: Streaming<KeepAliveRequest>,
    lessor: Lessor<S>,
    limits: &Limits,
    draining: CancellationToken,
) -> Answers {
    let (answers, receiver) = mpsc::channel(1);
    let stream = Stream {
        carrier: lessor.carry(),
        lessor,
        most_leases: limits.stream_leases,
        coalesces: limits.coalesce_touches,
        pace: Pace::new(limits.stream_rate),
        waiting: None,
        in_flight: FuturesUnordered::new(),
    };
    tokio::spawn(async move {
        let end = tokio::select! {
            end = contain(stream.run(messages, &answers)) => end.unwrap_or_else(|_| Err(panicked())),
            () = draining.cancelled() => Err(wire::shutting_down()),
            () = answers.closed() => return,
        };
        if let Err(status) = end {
            drop(answers.send(Err(status)).await);
        }
    });
    ReceiverStream::new(receiver)
}

struct Stream<S> {
    lessor: Lessor<S>,
    carrier: Carrier,
    most_leases: usize,
    /// Whether memory will do for a lease touched a moment ago.
    coalesces: bool,
    pace: Pace,
    waiting: Option<Group>,
    in_flight: FuturesUnordered<BoxFuture<'static, Answer>>,
}

impl<S: Store> Stream<S> {
    /// Reads and answers until the caller has said all and everything is answered.
    async fn run(
        mut self,
        mut messages: Streaming<KeepAliveRequest>,
        answers: &mpsc::Sender<Result<KeepAliveResponse, Status>>,
    ) -> Result<(), Status> {
        let mut open = true;
        while open || self.waiting.is_some() || !self.in_flight.is_empty() {
            let ready_at = self.pace.ready_at();
            let may_commit = self.in_flight.len() < COMMITS;
            let now = Instant::now();
            if may_commit
                && ready_at <= now
                && let Some(group) = self.waiting.take()
            {
                if let Some((messages, touched)) = self.begin(group, now)
                    && !self.answer(answers, &messages, touched, Source::Memory).await
                {
                    return Ok(());
                }
                continue;
            }
            tokio::select! {
                Some((messages, touched)) = self.in_flight.next() => {
                    if !self.answer(answers, &messages, touched?, Source::Store).await {
                        return Ok(());
                    }
                }
                lost = self.carrier.lost() => for some in lost.chunks(LOSSES) {
                    if answers.send(Ok(told(some))).await.is_err() {
                        return Ok(());
                    }
                },
                message = messages.message(), if open && self.has_room() => match message {
                    Ok(Some(message)) => {
                        let came_at = Instant::now();
                        if let Some(response) = self.take(message, came_at)? {
                            if answers.send(Ok(response)).await.is_err() {
                                return Ok(());
                            }
                            self.lessor.counts().acked(Source::Memory, came_at.elapsed());
                        }
                    }
                    Ok(None) => open = false,
                    Err(status) if status.code() == Code::OutOfRange => return Err(wire::oversized()),
                    Err(status) => return Err(status),
                },
                () = sleep_until(ready_at), if may_commit && self.waiting.is_some() => {}
            }
        }
        Ok(())
    }

    /// Whether another message may wait. Together those that wait name no more leases than a stream may carry, so that a
    /// group costs no more than one message may.
    fn has_room(&self) -> bool {
        let Some(Group { messages, leases }) = &self.waiting else { return true };
        leases.len() + messages.others.len() < self.most_leases
    }

    /// Checks a message and hands its touches over in one go, or lets it wait. Returns the answer if memory has it all.
    fn take(
        &mut self,
        message: KeepAliveRequest,
        came_at: Instant,
    ) -> Result<Option<KeepAliveResponse>, Status> {
        let mut wrong = Violations::default();
        if message.sequence == 0 {
            wrong.add("sequence", "must be 1 or more; 0 marks what the daemon tells on its own accord");
        }
        let mut named = Vec::with_capacity(message.leases.len());
        for (position, lease) in message.leases.iter().enumerate() {
            named.extend(request::lease(&mut wrong, format_args!("leases[{position}]"), Some(lease)));
        }
        wrong.into_result()?;

        let leases = if named.is_empty() { self.carrier.all() } else { self.carrier.name(named) };
        if self.carrier.len() > self.most_leases {
            return Err(wire::limit_exceeded("stream_leases", self.most_leases));
        }
        let entry = Message { sequence: message.sequence, came_at, leases: leases.len() };
        if let Some(group) = &mut self.waiting {
            group.messages.others.push(entry);
            group.leases.extend(leases);
            return Ok(None);
        }
        let messages = Messages { first: entry, others: Vec::new() };
        if self.pace.ready_at() > came_at || self.in_flight.len() >= COMMITS {
            self.waiting = Some(Group { messages, leases });
            return Ok(None);
        }
        self.pace.spend();
        let due = self.due(&leases, came_at);
        if due.is_empty() {
            return Ok(Some(self.remember(message, leases)));
        }
        self.in_flight.push(Box::pin(touch(self.lessor.clone(), messages, leases, due)));
        Ok(None)
    }

    /// Hands over the touches of messages that have waited. Returns what to answer if memory has it all.
    fn begin(&mut self, Group { messages, leases }: Group, now: Instant) -> Option<(Messages, Outcomes)> {
        self.pace.spend();
        let due = self.due(&leases, now);
        if due.is_empty() {
            return Some((messages, leases.into_iter().map(|lease| (lease, None)).collect()));
        }
        self.in_flight.push(Box::pin(touch(self.lessor.clone(), messages, leases, due)));
        None
    }

    /// The positions of the leases that were not touched a moment ago.
    fn due(&self, leases: &[Arc<Carriage>], now: Instant) -> Vec<usize> {
        let is_due = |lease: &Carriage| !self.coalesces || !lease.is_fresh(now);
        (0..leases.len()).filter(|position| is_due(&leases[*position])).collect()
    }

    /// Answers messages, given what became of their leases. Returns whether the caller is still there.
    async fn answer(
        &mut self,
        answers: &mpsc::Sender<Result<KeepAliveResponse, Status>>,
        messages: &Messages,
        touched: Outcomes,
        source: Source,
    ) -> bool {
        let settled = self.carrier.settle(touched);
        let mut results = settled.iter().map(|(lease, touched)| result(lease, *touched));
        for Message { sequence, came_at, leases } in messages.iter() {
            let results = results.by_ref().take(*leases).collect();
            if answers.send(Ok(KeepAliveResponse { sequence: *sequence, results })).await.is_err() {
                return false;
            }
            self.lessor.counts().acked(source, came_at.elapsed());
        }
        true
    }

    /// The answer to a message whose leases were all touched a moment ago. Names them as the message does.
    fn remember(&mut self, message: KeepAliveRequest, leases: Vec<Arc<Carriage>>) -> KeepAliveResponse {
        let settled = self.carrier.settle(leases.into_iter().map(|lease| (lease, None)).collect());
        let mut named = message.leases.into_iter();
        let results = settled.iter().map(|(lease, touched)| {
            wire::keepalive_result(named.next().unwrap_or_else(|| reference(lease)), *touched)
        });
        KeepAliveResponse { sequence: message.sequence, results: results.collect() }
    }
}

/// Losses told on the daemon's own accord.
fn told(lost: &[(Arc<Carriage>, Loss)]) -> KeepAliveResponse {
    let results = lost.iter().map(|(lease, Loss(reason))| result(lease, Touched::Lost(*reason))).collect();
    KeepAliveResponse { sequence: 0, results }
}

fn result(lease: &Carriage, touched: Touched) -> KeepAliveResult {
    wire::keepalive_result(reference(lease), touched)
}

fn reference(lease: &Carriage) -> LeaseRef {
    let (key, id) = lease.lease();
    wire::lease_ref(key, *id)
}

/// Touches the leases at the positions `due` until the store answers: the leases live on meanwhile, and so does the
/// stream. A lease that several messages name is touched once.
async fn touch<S: Store>(
    lessor: Lessor<S>,
    messages: Messages,
    leases: Vec<Arc<Carriage>>,
    mut due: Vec<usize>,
) -> Answer {
    let mut touched = vec![None; leases.len()];
    while !due.is_empty() {
        let repeated = if messages.others.is_empty() { Vec::new() } else { take_repeated(&leases, &mut due) };
        match lessor.touch_all(due.iter().map(|position| leases[*position].lease())).await {
            Ok(answers) => {
                due.iter().zip(answers).for_each(|(position, answer)| touched[*position] = Some(answer));
                repeated.iter().for_each(|(position, first)| touched[*position] = touched[*first]);
                break;
            }
            Err(CallError::Store(StoreError::Unavailable { .. })) => sleep(RETRY).await,
            Err(error) => return (messages, Err(wire::failed(error))),
        }
        // By now what memory said of the others has aged.
        due = (0..leases.len()).collect();
    }
    (messages, Ok(leases.into_iter().zip(touched).collect()))
}

/// Takes the positions of leases that stand at an earlier one, too, out of `due`. Returns each with the earlier one.
fn take_repeated(leases: &[Arc<Carriage>], due: &mut Vec<usize>) -> Vec<(usize, usize)> {
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

/// Holds a stream to a rate in the long run: the generic cell rate algorithm (ITU-T I.371), as a delay.
#[derive(Debug)]
struct Pace {
    /// The share of time that a message takes up.
    interval: Duration,
    /// When all messages so far would have come at the exact rate.
    due: Instant,
}

impl Pace {
    fn new(rate: u32) -> Self {
        Self { interval: Duration::from_secs(1) / rate, due: Instant::now() }
    }

    /// When the next message may be read.
    fn ready_at(&self) -> Instant {
        self.due.checked_sub(Duration::from_secs(BURST.into())).unwrap_or(self.due)
    }

    fn spend(&mut self) {
        self.due = self.due.max(Instant::now()) + self.interval;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_stream_may_burst_and_is_then_held_to_its_rate() {
        let mut pace = Pace::new(50);
        let start = Instant::now();
        for _ in 0..=200 {
            assert!(pace.ready_at() <= start, "a burst");
            pace.spend();
        }
        for _ in 0..100 {
            sleep_until(pace.ready_at()).await;
            pace.spend();
        }
        let passed = start.elapsed();
        assert!((Duration::from_millis(1990)..Duration::from_millis(2200)).contains(&passed), "{passed:?}");
    }
}
