//! The keepalive stream: messages become touches, records become results. The hot path.
//!
//! A stream is one task. It owns the set of leases that the stream carries, and nothing else outlives it: when the
//! caller goes away the task ends, the leases run out in their time, and nobody has anything to clean up.
//!
//! A lease touched a moment ago is answered from memory, and one that is lost is told at once, unasked. A lease that the
//! stream may not name is refused by itself. Only a message past `MAX_MESSAGE_BYTES` or `MESSAGE_LEASES` costs a caller its
//! stream.

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

use super::request;
use super::response;
use super::untaken::{Answers, Entered, Outlet, Share, Untaken, outlet};
use crate::boot_instant::BootInstant;
use crate::config::Limits;
use crate::engine::{CallError, Carriage, Carrier, Full, Lessor, Loss, Source, Touched};
use crate::panics::contain;
use crate::store::{Store, StoreError};
use crate::transport::bounds::panicked;

/// Commits of one stream that are under way at once; what comes meanwhile shares the next one.
const COMMITS: usize = 16;
/// Seconds' worth of messages that a stream may send at once before some of them share a commit.
const BURST: u32 = 4;
/// The pause before leases are touched again after the store has failed.
const RETRY: Duration = Duration::from_millis(200);
/// The leases of one message, in bytes as they are encoded; those past it are refused. An answer to so many fits into one
/// response.
const MESSAGE_BYTES: usize = 512 * 1024;
/// Leases of one message; more end the stream. The first [`MESSAGE_BYTES`] hold fewer well-formed ones, so that nobody who
/// keeps to those meets it. It bounds what malformed ones cost.
const MESSAGE_LEASES: usize = 12_500;
/// Refused leases of one message that are told why in a sentence.
const SENTENCES: usize = 100;
/// Leases of a stream that wait for their answers without a share of what the answers of the connection may take. Nearly
/// all messages keep to this, and never wait for what other streams leave untaken.
const FREE: usize = 64;

/// What became of leases; `None` for those that were not touched.
type Outcomes = Vec<(Arc<Carriage>, Option<Touched>)>;

/// Messages that shared a commit, and what became of the leases that they name.
type Answer = (Messages, Result<Outcomes, Status>);

/// What is said of a lease that the daemon has no room for.
const PAST_LEASES: &str = "the daemon carries as many leases as it may, and is touching as many others as it may; touch \
                           this one by a call of its own";

/// A message that is not answered yet.
#[derive(Debug)]
struct Message {
    sequence: u64,
    came_at: Instant,
    /// How many leases it has touched.
    leases: usize,
    /// Results of the leases that are not touched.
    refused: Vec<KeepAliveResult>,
    /// What its answer takes of the connection's allowance; `None` for one of the stream's first [`FREE`] leases.
    share: Option<Share>,
}

impl Message {
    /// How much its answer takes, in results; one that says nothing takes memory, too.
    fn results(&self) -> usize {
        (self.leases + self.refused.len()).max(1)
    }
}

/// Messages that share a commit, in their order. Nearly always it is one.
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
/// The messages are read all the same: h2 takes many small frames that nobody reads for an attack and ends the
/// connection (`too_many_data_frames`).
#[derive(Debug)]
struct Group {
    messages: Messages,
    /// The leases that the messages name, one message after the other.
    leases: Vec<Arc<Carriage>>,
}

/// Serves one stream until either side ends it.
pub(crate) fn serve<S: Store>(
    mut messages: Streaming<KeepAliveRequest>,
    lessor: Lessor<S>,
    limits: &Limits,
    untaken: Untaken,
    draining: CancellationToken,
) -> Answers {
    let (mut outlet, answers) = outlet();
    let mut stream = Stream::new(lessor, limits, untaken);
    tokio::spawn(async move {
        let closed = outlet.closed();
        let end = tokio::select! {
            end = contain(stream.run(&mut messages, &mut outlet)) => end.unwrap_or_else(|_| Err(panicked())),
            () = draining.cancelled() => Err(response::shutting_down()),
            () = closed => return,
        };
        // However long the caller takes to hear how it ended.
        drop((stream, messages));
        if let Err(status) = end {
            outlet.end(status).await;
        }
    });
    answers
}

struct Stream<S> {
    lessor: Lessor<S>,
    carrier: Carrier,
    most_leases: usize,
    /// Whether memory will do for a lease touched a moment ago.
    coalesces: bool,
    pace: Pace,
    waiting: Option<Group>,
    /// What the answers of the connection may take.
    untaken: Untaken,
    /// A message that waits for its share of that.
    entering: Option<BoxFuture<'static, Entered>>,
    /// Results of messages without a share that wait or are in flight.
    free: usize,
    /// Refused leases of messages that wait or are in flight.
    refused: usize,
    in_flight: FuturesUnordered<BoxFuture<'static, Answer>>,
}

impl<S: Store> Stream<S> {
    fn new(lessor: Lessor<S>, limits: &Limits, untaken: Untaken) -> Self {
        Self {
            carrier: lessor.carry(),
            lessor,
            most_leases: limits.stream_leases,
            coalesces: limits.coalesce_touches,
            pace: Pace::new(limits.stream_rate),
            waiting: None,
            untaken,
            entering: None,
            free: 0,
            refused: 0,
            in_flight: FuturesUnordered::new(),
        }
    }

    /// Reads and answers until the caller has said all and everything is answered. Borrows, since what a future is given it
    /// has room for twice.
    async fn run(
        &mut self,
        messages: &mut Streaming<KeepAliveRequest>,
        outlet: &mut Outlet,
    ) -> Result<(), Status> {
        let mut open = true;
        while open || self.entering.is_some() || self.waiting.is_some() || !self.in_flight.is_empty() {
            let ready_at = self.pace.ready_at();
            let may_commit = self.in_flight.len() < COMMITS;
            let now = Instant::now();
            if may_commit
                && ready_at <= now
                && let Some(group) = self.waiting.take()
            {
                if let Some((messages, touched)) = self.begin(group)
                    && !self.answer(outlet, messages, touched, Source::Memory).await
                {
                    return Ok(());
                }
                continue;
            }
            tokio::select! {
                Some((messages, touched)) = self.in_flight.next() => {
                    if !self.answer(outlet, messages, touched?, Source::Store).await {
                        return Ok(());
                    }
                }
                lost = self.carrier.lost() => {
                    // A few at a time, since nobody has made room for what is told unasked.
                    for lost in lost.chunks(FREE) {
                        let results = lost.iter().map(|(lease, Loss(reason))| result(lease, Touched::Lost(*reason)));
                        if !outlet.tell(0, results.collect(), None).await {
                            return Ok(());
                        }
                    }
                },
                Some(entered) = OptionFuture::from(self.entering.as_mut()) => {
                    self.entering = None;
                    if !self.enter(entered, outlet).await? {
                        return Ok(());
                    }
                }
                message = messages.message(), if open && self.entering.is_none() && self.has_room() => match message {
                    Ok(Some(message)) => {
                        if let Some(entered) = self.come(message)?
                            && !self.enter(entered, outlet).await?
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

    /// Whether another message may be read: not when those that wait name as many leases as a stream may carry. The refused leases of those in flight count too: each takes as much memory
    /// as a lease that is carried, and no other limit bounds them.
    fn has_room(&self) -> bool {
        let waiting = |Group { messages, leases }: &Group| leases.len() + messages.others.len();
        self.waiting.as_ref().map_or(0, waiting) + self.refused < self.most_leases
    }

    /// Gives a message its share of what the answers of the connection may take, or lets it wait for that.
    fn come(&mut self, message: KeepAliveRequest) -> Result<Option<Entered>, Status> {
        if message.leases.len() > MESSAGE_LEASES {
            return Err(response::limit_exceeded("message_leases", MESSAGE_LEASES));
        }
        let came_at = Instant::now();
        let named =
            if message.leases.is_empty() { self.carrier.leases().len() } else { message.leases.len() };
        let results = named.max(1);
        if self.free + results <= FREE {
            return Ok(Some(Entered { message, came_at, share: None }));
        }
        if let Some(share) = self.untaken.share(results) {
            return Ok(Some(Entered { message, came_at, share: Some(share) }));
        }
        self.entering = Some(self.untaken.later(results, &message, came_at)?);
        Ok(None)
    }

    /// Takes a message, and answers it if the store need not be asked. Returns whether the caller is still there.
    async fn enter(&mut self, entered: Entered, outlet: &mut Outlet) -> Result<bool, Status> {
        let Entered { message, came_at, share } = entered;
        let sequence = message.sequence;
        let Some((results, share)) = self.take(message, came_at, share) else { return Ok(true) };
        if !outlet.tell(sequence, results, share).await {
            return Ok(false);
        }
        self.lessor.counts().acked(Source::Memory, came_at.elapsed());
        Ok(true)
    }

    /// Checks a message and hands its touches over in one go, or lets it wait. Returns the results if the store need not be
    /// asked for any.
    fn take(
        &mut self,
        mut message: KeepAliveRequest,
        came_at: Instant,
        share: Option<Share>,
    ) -> Option<(Vec<KeepAliveResult>, Option<Share>)> {
        let (leases, refused) = match (message.sequence, message.leases.is_empty()) {
            (0, _) => (Vec::new(), self.refuse_all(take(&mut message.leases))),
            (_, true) => (self.carrier.all(), Vec::new()),
            (_, false) => self.name(&mut message.leases),
        };
        let entry = Message { sequence: message.sequence, came_at, leases: leases.len(), refused, share };
        if let Some(group) = &mut self.waiting {
            count(&entry, &mut self.refused, &mut self.free);
            group.messages.others.push(entry);
            group.leases.extend(leases);
            return None;
        }
        if self.pace.ready_at() > came_at || self.in_flight.len() >= COMMITS {
            count(&entry, &mut self.refused, &mut self.free);
            let messages = Messages { first: entry, others: Vec::new() };
            self.waiting = Some(Group { messages, leases });
            return None;
        }
        self.pace.spend();
        let due = self.due(&leases);
        if due.is_empty() {
            let mut results = self.remember(message.leases, leases);
            results.extend(entry.refused);
            return Some((results, entry.share));
        }
        count(&entry, &mut self.refused, &mut self.free);
        let messages = Messages { first: entry, others: Vec::new() };
        self.touch(messages, leases, due);
        None
    }

    /// Has the stream carry the leases that a message names, as far as it may. Those that are refused are taken out of
    /// `named`.
    fn name(&mut self, named: &mut Vec<LeaseRef>) -> (Vec<Arc<Carriage>>, Vec<KeepAliveResult>) {
        let (mut leases, mut refused) = (Vec::with_capacity(named.len()), Vec::new());
        let most = self.most_leases;
        let mut naming = self.carrier.naming(most);
        let mut bytes = 0;
        named.retain_mut(|lease| {
            bytes += encoded_len(1, lease);
            let (reason, message) = match request::one_of_many(lease) {
                Err(message) => (RefusalReason::Invalid, message),
                Ok(_) if bytes > MESSAGE_BYTES => (RefusalReason::LimitExceeded, past_message_bytes()),
                Ok(name) => match naming.name(name) {
                    Ok(carriage) => {
                        leases.push(carriage);
                        return true;
                    }
                    Err(Full::Stream) => (RefusalReason::LimitExceeded, past_stream_leases(most)),
                    Err(Full::Daemon) => (RefusalReason::LimitExceeded, PAST_LEASES.to_owned()),
                },
            };
            refuse(&mut refused, take(lease), reason, message);
            false
        });
        (leases, refused)
    }

    /// The results of a message without a sequence, which cannot be answered: a result without one says nothing about
    /// when its message was sent, and so nothing about how long the lease is held.
    fn refuse_all(&self, named: Vec<LeaseRef>) -> Vec<KeepAliveResult> {
        const WHY: &str = "sequence must be 1 or more; 0 marks what the daemon tells of its own accord";
        let mut refused = Vec::new();
        let mut refuse = |lease| refuse(&mut refused, lease, RefusalReason::Invalid, WHY);
        match named.is_empty() {
            true => self.carrier.leases().for_each(|(key, id)| refuse(response::lease_ref(key, *id))),
            false => named.into_iter().for_each(refuse),
        }
        refused
    }

    /// Has the leases touched. Begins at once: nobody looks at what is in flight while the stream is told something.
    fn touch(&mut self, messages: Messages, leases: Vec<Arc<Carriage>>, due: Vec<usize>) {
        let mut touching = Box::pin(touch(self.lessor.clone(), messages, leases, due));
        self.in_flight.push(match touching.as_mut().now_or_never() {
            Some(answer) => Box::pin(ready(answer)),
            None => touching,
        });
    }

    /// Hands over the touches of messages that have waited. Returns what to answer if memory has it all.
    fn begin(&mut self, Group { messages, leases }: Group) -> Option<(Messages, Outcomes)> {
        self.pace.spend();
        let due = self.due(&leases);
        if due.is_empty() {
            return Some((messages, leases.into_iter().map(|lease| (lease, None)).collect()));
        }
        self.touch(messages, leases, due);
        None
    }

    /// The positions of the leases that were not touched a moment ago.
    fn due(&self, leases: &[Arc<Carriage>]) -> Vec<usize> {
        let now = BootInstant::now();
        let is_due = |lease: &Carriage| !self.coalesces || !lease.is_fresh(now);
        (0..leases.len()).filter(|position| is_due(&leases[*position])).collect()
    }

    /// Answers messages, given what became of their leases. Returns whether the caller is still there.
    async fn answer(
        &mut self,
        outlet: &mut Outlet,
        messages: Messages,
        touched: Outcomes,
        source: Source,
    ) -> bool {
        let settled = self.carrier.settle(touched);
        let mut results = settled.iter().map(|(lease, touched)| result(lease, *touched));
        for message in messages.into_iter() {
            self.refused -= message.refused.len();
            if message.share.is_none() {
                self.free -= message.results();
            }
            let Message { sequence, came_at, leases, refused, share } = message;
            let results = results.by_ref().take(leases).chain(refused).collect();
            if !outlet.tell(sequence, results, share).await {
                return false;
            }
            self.lessor.counts().acked(source, came_at.elapsed());
        }
        true
    }

    /// The results of a message whose leases were all touched a moment ago. They take over what the message names.
    fn remember(&mut self, named: Vec<LeaseRef>, leases: Vec<Arc<Carriage>>) -> Vec<KeepAliveResult> {
        let settled = self.carrier.settle(leases.into_iter().map(|lease| (lease, None)).collect());
        let mut named = named.into_iter();
        let results = settled.iter().map(|(lease, touched)| {
            response::keepalive_result(named.next().unwrap_or_else(|| reference(lease)), *touched)
        });
        results.collect()
    }
}

/// Adds a lease of a message to those that are refused.
fn refuse(
    refused: &mut Vec<KeepAliveResult>,
    lease: LeaseRef,
    reason: RefusalReason,
    message: impl Into<String>,
) {
    // The reason says it as well. A sentence for each of thousands would be most of what such a message costs.
    let message = if refused.len() < SENTENCES { message.into() } else { String::new() };
    refused.push(response::refused(lease, reason, message));
}

/// Counts a message that waits or is in flight from here on.
fn count(message: &Message, refused: &mut usize, free: &mut usize) {
    *refused += message.refused.len();
    if message.share.is_none() {
        *free += message.results();
    }
}

fn past_message_bytes() -> String {
    format!(
        "past the first {} KiB of its message; send a large set in several messages",
        MESSAGE_BYTES / 1024
    )
}

fn past_stream_leases(most: usize) -> String {
    format!("the stream carries {most} leases, as many as it may; touch this one on another stream")
}

fn result(lease: &Carriage, touched: Touched) -> KeepAliveResult {
    response::keepalive_result(reference(lease), touched)
}

fn reference(lease: &Carriage) -> LeaseRef {
    let (key, id) = lease.lease();
    response::lease_ref(key, *id)
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
            Err(error) => return (messages, Err(response::failed(error))),
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

    /// When the next message or group may be committed.
    fn ready_at(&self) -> Instant {
        self.due.checked_sub(Duration::from_secs(BURST.into())).unwrap_or(self.due)
    }

    fn spend(&mut self) {
        self.due = self.due.max(Instant::now()) + self.interval;
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use leased_proto::v1::keep_alive_result::Outcome;
    use tempfile::TempDir;
    use tokio_util::task::TaskTracker;

    use super::*;
    use crate::boot_instant::suspend;
    use crate::config::{Args, Config};
    use crate::engine::{Acquired, Bounds, Call, Origin};
    use crate::lease::{Acquisition, Key, LeaseId, Rules, Ttl};
    use crate::metrics::registry::Meter;
    use crate::store::embedded::EmbeddedStore;

    const TTL: Duration = Duration::from_secs(3600);

    /// Over an empty store of its own, which goes with the folder.
    async fn lessor() -> (Lessor<EmbeddedStore>, TempDir) {
        let folder = tempfile::tempdir().expect("a folder");
        let rules = Rules { grace: Duration::ZERO, place: Duration::from_secs(15) };
        let store = EmbeddedStore::open(folder.path(), rules).await.expect("a usable folder");
        let (mut meter, tasks) = (Meter::default(), TaskTracker::new());
        (Lessor::start(store, Bounds::default(), CancellationToken::new(), &mut meter, &tasks), folder)
    }

    fn limits() -> Limits {
        Config::try_from(Args::parse_from(["leased"])).expect("the defaults").limits
    }

    #[tokio::test]
    async fn what_is_answered_from_memory_counts_the_time_that_the_machine_was_suspended() {
        let (lessor, _folder) = lessor().await;
        let (key, id) = (Key::try_from("job").expect("a key"), LeaseId::random());
        let lease = response::lease_ref(&key, id);
        let ttl = Ttl::new(TTL).expect("an hour");
        let acquisition = Acquisition { ttl, wait: false, ..Acquisition::waiting(id) };
        let call = Call { key, acquisition, origin: Origin::Caller, wait: Duration::ZERO };
        assert!(matches!(lessor.acquire(call).await, Ok(Acquired::Granted(_))));

        let mut stream = Stream::new(lessor, &limits(), Untaken::default());
        let message = || KeepAliveRequest { leases: vec![lease.clone()], sequence: 1 };
        assert!(stream.take(message(), Instant::now(), None).is_none(), "the store is asked");
        let (_, touched) = stream.in_flight.next().await.expect("an answer");
        stream.carrier.settle(touched.expect("the store answers"));

        suspend(TTL / 20);
        let (results, _) = stream.take(message(), Instant::now(), None).expect("memory does");
        let Some(Outcome::Kept(kept)) = &results[0].outcome else { panic!("{results:?}") };
        let remaining = Duration::try_from(kept.remaining.expect("a duration")).expect("not negative");
        assert!(remaining <= TTL - TTL / 20, "{remaining:?}");

        suspend(TTL / 20);
        assert!(stream.take(message(), Instant::now(), None).is_none(), "the store is asked");
    }

    #[tokio::test]
    async fn no_message_is_read_while_as_many_leases_are_refused_as_a_stream_may_carry() {
        let (lessor, _folder) = lessor().await;
        let mut stream = Stream::new(lessor, &Limits { stream_leases: 3, ..limits() }, Untaken::default());
        let stranger = response::lease_ref(&Key::try_from("job").expect("a key"), LeaseId::random());
        let message = KeepAliveRequest { leases: vec![stranger, LeaseRef::default()], sequence: 1 };
        for _ in 0..3 {
            assert!(stream.has_room());
            let answer = stream.take(message.clone(), Instant::now(), None);
            assert!(answer.is_none(), "the store is asked for one of its leases");
        }
        assert!(!stream.has_room(), "three are refused");

        let (mut outlet, mut told) = outlet();
        for refused in [2, 1, 0] {
            let (messages, touched) = stream.in_flight.next().await.expect("an answer");
            let touched = touched.expect("the store answers");
            assert!(stream.answer(&mut outlet, messages, touched, Source::Store).await);
            assert_eq!(told.next().await.expect("an answer").expect("results").results.len(), 2);
            assert!(stream.has_room());
            assert_eq!(stream.refused, refused);
        }
    }

    #[tokio::test]
    async fn a_message_without_a_sequence_takes_its_turn_and_says_why_a_hundred_times() {
        let (lessor, _folder) = lessor().await;
        let mut stream = Stream::new(lessor, &Limits { stream_rate: 1, ..limits() }, Untaken::default());
        let message = |leases| KeepAliveRequest { leases: vec![LeaseRef::default(); leases], sequence: 0 };
        let (results, _) = stream.take(message(150), Instant::now(), None).expect("results");
        let why = |result: &&KeepAliveResult| matches!(&result.outcome, Some(Outcome::Refused(refused)) if !refused.message.is_empty());
        assert_eq!((results.len(), results.iter().filter(why).count()), (150, 100));

        let burst = BURST as usize + 1;
        let mut more = (0..burst).map(|_| stream.take(message(1), Instant::now(), None));
        assert!(more.any(|results| results.is_none()), "it waits");
    }

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
