//! Bounds a request while it arrives: each message must arrive in time, and all partly received
//! messages share a budget of memory, of which one connection may use a part.
//!
//! A complete message belongs to the handler and no longer counts.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use http_body::{Body, Frame, SizeHint};
use tokio::time::{Instant, Sleep, sleep_until};
use tonic::Status;
use tonic::codegen::Bytes;

use crate::grpc::response::{MAX_MESSAGE_BYTES, limit_exceeded};

/// How long a message may take to arrive. For a request of one message: from its headers to its
/// end.
const RECEIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// How many bytes precede a message: a flag, and its length in four bytes (gRPC over HTTP/2,
/// "Length-Prefixed-Message").
const PREFIX: usize = 5;
/// One connection may use the budget divided by this.
const SHARES: usize = 16;

/// The memory that partly received messages share.
#[derive(Debug, Clone)]
pub(crate) struct ReceiveBudget {
    in_use: BytesInUse,
    /// The budget of the whole daemon.
    bytes: usize,
    /// The part that one connection may use, so that no peer uses all.
    share: usize,
    /// How long a message may take to arrive.
    time: Duration,
}

impl ReceiveBudget {
    /// Returns a budget of `bytes` for the whole daemon. A connection's share has room for the
    /// largest message.
    pub(crate) fn new(bytes: usize) -> Self {
        let share = (bytes / SHARES).max(PREFIX + MAX_MESSAGE_BYTES);
        Self { in_use: BytesInUse::default(), bytes, share, time: RECEIVE_TIMEOUT }
    }
}

/// How many bytes of partly received messages are in memory, of one connection or of the whole
/// daemon. Clones share the number.
#[derive(Debug, Clone, Default)]
pub(crate) struct BytesInUse(Arc<AtomicUsize>);

impl BytesInUse {
    /// Notes that a message has grown from `before` bytes to `now`. Returns the new sum of all
    /// messages.
    fn shift(&self, before: usize, now: usize) -> usize {
        // Added before subtracting, so that the number never goes below zero.
        let sum = self.0.fetch_add(now, Ordering::Relaxed) + now;
        self.0.fetch_sub(before, Ordering::Relaxed);
        sum - before
    }
}

/// How many messages a request or response of a method has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum MessageCount {
    /// One message, and then the end.
    One,
    /// Any number of messages, for as long as the caller likes.
    Many,
}

/// The body of a request. Fails with a status that names the limit if the request exceeds one.
#[derive(Debug)]
pub(crate) struct Receiving<B> {
    body: B,
    expected: MessageCount,
    message: Message,
    budget: ReceiveBudget,
    /// The bytes in use by the connection.
    connection: BytesInUse,
    /// The bytes in use by this body.
    held: usize,
    /// When the message that is arriving began to arrive.
    since: Instant,
    /// Made when the handler first has to wait, so that a request which arrives at once needs no
    /// timer.
    timer: Option<Pin<Box<Sleep>>>,
}

impl<B> Receiving<B> {
    pub(crate) fn new(
        body: B,
        expected: MessageCount,
        budget: ReceiveBudget,
        connection: BytesInUse,
    ) -> Self {
        let (message, since) = (Message::default(), Instant::now());
        Self { body, expected, message, budget, connection, held: 0, since, timer: None }
    }

    /// Counts data that has arrived, and checks the budgets.
    fn received(&mut self, data: &[u8]) -> Result<(), Status> {
        let was_complete = self.held == 0;
        let held = self.message.received(data);
        if self.expected == MessageCount::Many && (was_complete || held < self.held + data.len()) {
            // A new message has begun, or no message is arriving.
            (self.since, self.timer) = (Instant::now(), None);
        }
        let before = std::mem::replace(&mut self.held, held);
        let ReceiveBudget { in_use, bytes, share, .. } = &self.budget;
        let (by_all, by_connection) = (in_use.shift(before, held), self.connection.shift(before, held));
        // A message that is complete by now passes even if the budget is exceeded, because it no
        // longer counts.
        if held > 0 && by_connection > *share {
            return Err(limit_exceeded("connection_receiving_bytes", *share));
        }
        if held > 0 && by_all > *bytes {
            return Err(limit_exceeded("receiving_bytes", *bytes));
        }
        Ok(())
    }

    /// Ready when the message that is arriving is late.
    fn poll_late(&mut self, context: &mut Context<'_>) -> Poll<()> {
        // A stream may be silent between messages for as long as it likes.
        if self.expected == MessageCount::Many && self.held == 0 {
            return Poll::Pending;
        }
        let end = self.since + self.budget.time;
        self.timer.get_or_insert_with(|| Box::pin(sleep_until(end))).as_mut().poll(context)
    }
}

impl<B> Body for Receiving<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        match Pin::new(&mut self.body).poll_frame(context) {
            Poll::Ready(Some(Ok(frame))) => {
                let received = frame.data_ref().map_or(Ok(()), |data| self.received(data));
                Poll::Ready(Some(received.map(|()| frame)))
            }
            Poll::Ready(Some(Err(error))) => Poll::Ready(Some(Err(Status::from_error(error.into())))),
            Poll::Ready(None) => Poll::Ready(None),
            Poll::Pending => self.poll_late(context).map(|()| {
                let seconds = usize::try_from(self.budget.time.as_secs()).unwrap_or(usize::MAX);
                Some(Err(limit_exceeded("receiving_seconds", seconds)))
            }),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl<B> Drop for Receiving<B> {
    fn drop(&mut self) {
        self.budget.in_use.shift(self.held, 0);
        self.connection.shift(self.held, 0);
    }
}

/// A parser of message boundaries: how much of the latest message has arrived.
#[derive(Debug, Default)]
struct Message {
    prefix: [u8; PREFIX],
    /// How many bytes of the message have arrived, with its prefix. 0 between messages.
    arrived: usize,
    /// How many bytes after the prefix are still to arrive.
    missing: usize,
}

impl Message {
    /// Reads `data`. Returns how many bytes of an incomplete message have arrived then, or 0 if all
    /// messages are complete.
    fn received(&mut self, mut data: &[u8]) -> usize {
        while !data.is_empty() {
            if let Some(prefix) = self.prefix.get_mut(self.arrived..).filter(|prefix| !prefix.is_empty()) {
                let (some, rest) = data.split_at(prefix.len().min(data.len()));
                prefix[..some.len()].copy_from_slice(some);
                (self.arrived, data) = (self.arrived + some.len(), rest);
                if self.arrived == PREFIX {
                    let [_, length @ ..] = self.prefix;
                    self.missing = u32::from_be_bytes(length) as usize;
                }
            } else {
                let count = self.missing.min(data.len());
                (self.arrived, self.missing, data) =
                    (self.arrived + count, self.missing - count, &data[count..]);
            }
            if self.arrived >= PREFIX && self.missing == 0 {
                self.arrived = 0;
            }
        }
        self.arrived
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokio::sync::mpsc;
    use tokio_stream::StreamExt as _;
    use tokio_stream::wrappers::UnboundedReceiverStream;
    use tonic::Code;

    use super::*;

    fn message(bytes: usize) -> Vec<u8> {
        let mut message = vec![0];
        message.extend(u32::try_from(bytes).expect("a length").to_be_bytes());
        message.resize(PREFIX + bytes, 7);
        message
    }

    proptest! {
        #[test]
        fn message_boundaries_are_found_wherever_the_bytes_are_cut(
            sizes in prop::collection::vec(0_usize..40, 1..8),
            cuts in prop::collection::vec(1_usize..20, 1..40),
        ) {
            let bytes: Vec<u8> = sizes.iter().flat_map(|size| message(*size)).collect();
            let mut ends = vec![0];
            for size in &sizes {
                ends.push(ends[ends.len() - 1] + PREFIX + size);
            }
            let (mut parsed, mut at) = (Message::default(), 0);
            for cut in cuts.iter().cycle() {
                if at == bytes.len() {
                    break;
                }
                let next = (at + cut).min(bytes.len());
                let held = parsed.received(&bytes[at..next]);
                at = next;
                let begun = ends.iter().rev().find(|end| **end <= at).expect("the first begins at 0");
                prop_assert_eq!(held, at - begun);
            }
        }
    }

    type Frames = Pin<Box<dyn tokio_stream::Stream<Item = Result<Frame<Bytes>, Status>> + Send>>;

    /// A body whose data the test sends.
    type Fed = Receiving<http_body_util::StreamBody<Frames>>;

    /// Returns a body on a new connection, and the sender of its data.
    fn fed(expected: MessageCount, budget: &ReceiveBudget) -> (mpsc::UnboundedSender<Vec<u8>>, Fed) {
        fed_on(&BytesInUse::default(), expected, budget)
    }

    fn fed_on(
        connection: &BytesInUse,
        expected: MessageCount,
        budget: &ReceiveBudget,
    ) -> (mpsc::UnboundedSender<Vec<u8>>, Fed) {
        let (sender, receiver) = mpsc::unbounded_channel::<Vec<u8>>();
        let frames = UnboundedReceiverStream::new(receiver).map(|data| Ok(Frame::data(Bytes::from(data))));
        let body = http_body_util::StreamBody::new(Box::pin(frames) as Frames);
        (sender, Receiving::new(body, expected, budget.clone(), connection.clone()))
    }

    async fn next(body: &mut Fed) -> Option<Result<Frame<Bytes>, Status>> {
        std::future::poll_fn(|context| Pin::new(&mut *body).poll_frame(context)).await
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_that_does_not_end_in_time_exceeds_a_limit() {
        let (sender, mut body) = fed(MessageCount::One, &ReceiveBudget::new(1000));
        let began = Instant::now();
        sender.send(message(100)).expect("a reader");
        next(&mut body).await.expect("a frame").expect("the message");
        let status = next(&mut body).await.expect("an end").expect_err("no end in time");
        assert_eq!((status.code(), began.elapsed() >= RECEIVE_TIMEOUT), (Code::ResourceExhausted, true));
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_may_pause_between_messages_but_not_within_one() {
        let (sender, mut body) = fed(MessageCount::Many, &ReceiveBudget::new(1000));
        for _ in 0..3 {
            let rest = tokio::time::timeout(RECEIVE_TIMEOUT * 10, next(&mut body)).await;
            assert!(rest.is_err(), "a silent stream is not refused");
            sender.send(message(100)).expect("a reader");
            next(&mut body).await.expect("a frame").expect("a message");
        }
        sender.send(message(100)[..50].to_vec()).expect("a reader");
        next(&mut body).await.expect("a frame").expect("half a message");
        let began = Instant::now();
        let trickle = async {
            loop {
                tokio::time::sleep(RECEIVE_TIMEOUT / 20).await;
                let _ = sender.send(vec![7]);
            }
        };
        let status = tokio::select! {
            () = trickle => unreachable!("the trickle never ends"),
            status = async { loop { if let Err(status) = next(&mut body).await.expect("no end") { break status } } } => status,
        };
        assert_eq!(status.code(), Code::ResourceExhausted);
        assert!(began.elapsed() <= RECEIVE_TIMEOUT, "{:?}", began.elapsed());
    }

    #[tokio::test]
    async fn partly_received_messages_share_the_budget_and_complete_ones_need_none() {
        let budget = ReceiveBudget::new(1000);
        let (first, mut holding) = fed(MessageCount::Many, &budget);
        first.send(message(2000)[..900].to_vec()).expect("a reader");
        next(&mut holding).await.expect("a frame").expect("within the budget");
        let (second, mut other) = fed(MessageCount::One, &budget);
        second.send(message(2000)[..200].to_vec()).expect("a reader");
        let status = next(&mut other).await.expect("a frame").expect_err("past the budget");
        assert_eq!(status.code(), Code::ResourceExhausted);
        drop(other);
        let (third, mut complete) = fed(MessageCount::One, &budget);
        third.send(message(5000)).expect("a reader");
        next(&mut complete).await.expect("a frame").expect("a complete message");
        first.send(message(2000)[900..].to_vec()).expect("a reader");
        next(&mut holding).await.expect("a frame").expect("the rest");
        assert_eq!(budget.in_use.shift(0, 0), 0);
    }

    #[tokio::test]
    async fn a_connection_has_its_share_of_the_budget_and_the_largest_message_fits() {
        assert_eq!(ReceiveBudget::new(1 << 30).share, 1 << 26);
        let budget = ReceiveBudget::new(64 << 20);
        let (one, other) = (BytesInUse::default(), BytesInUse::default());
        let mut largest = message(MAX_MESSAGE_BYTES);
        let last = largest.split_off(largest.len() - 1);
        let (first, mut holding) = fed_on(&one, MessageCount::Many, &budget);
        first.send(largest).expect("a reader");
        next(&mut holding).await.expect("a frame").expect("within the budget");

        let (second, mut same) = fed_on(&one, MessageCount::Many, &budget);
        second.send(message(2000)[..200].to_vec()).expect("a reader");
        let status = next(&mut same).await.expect("a frame").expect_err("past the budget");
        assert!(status.message().contains("connection_receiving_bytes"), "{status:?}");
        drop(same);
        let (third, mut another) = fed_on(&other, MessageCount::Many, &budget);
        third.send(message(2000)[..200].to_vec()).expect("a reader");
        next(&mut another).await.expect("a frame").expect("it has a share of its own");

        first.send(last).expect("a reader");
        next(&mut holding).await.expect("a frame").expect("the rest");
        drop(another);
        assert_eq!([one, other, budget.in_use].map(|in_use| in_use.shift(0, 0)), [0; 3]);
    }
}
