//! What a request may take while it comes in: a message is whole in time, and all messages under way share a bound, of which
//! one connection gets a part. What is whole already is the handler's.

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

/// How long a message may take to come in, and a request that is one message from its head to its end.
const TIME: Duration = Duration::from_secs(10);
/// A message begins with a flag and its length in four bytes (gRPC over HTTP/2, "Length-Prefixed-Message").
const PREFIX: usize = 5;
/// So many connections together may fill the room.
const SHARES: usize = 16;

/// The room that messages under way share.
#[derive(Debug, Clone)]
pub(crate) struct Room {
    taken: Taken,
    bytes: usize,
    /// What one connection may have of it, so that no peer takes it all.
    share: usize,
    time: Duration,
}

impl Room {
    /// Room for so many bytes in the whole daemon. A connection may have the largest message in any case.
    pub(crate) fn new(bytes: usize) -> Self {
        let share = (bytes / SHARES).max(PREFIX + MAX_MESSAGE_BYTES);
        Self { taken: Taken::default(), bytes, share, time: TIME }
    }
}

/// Bytes of messages under way, of one connection or in the whole daemon. Clones are the same bytes.
#[derive(Debug, Clone, Default)]
pub(crate) struct Taken(Arc<AtomicUsize>);

impl Taken {
    /// A message has `now` bytes here, after `before`. Returns how many all messages have.
    fn shift(&self, before: usize, now: usize) -> usize {
        let taken = self.0.fetch_add(now, Ordering::Relaxed) + now;
        self.0.fetch_sub(before, Ordering::Relaxed);
        taken - before
    }
}

/// What a method is sent, or answers with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Expected {
    /// One message, and the end.
    One,
    /// Messages for as long as the caller likes.
    Many,
}

/// A request's body that keeps to the bounds, or fails with the status that says which it passed.
#[derive(Debug)]
pub(crate) struct Receiving<B> {
    body: B,
    expected: Expected,
    message: Message,
    room: Room,
    /// What its connection has of the room.
    connection: Taken,
    /// What this body has of the room.
    held: usize,
    /// When what is under way began.
    since: Instant,
    /// Made when the body first lets the handler wait.
    timer: Option<Pin<Box<Sleep>>>,
}

impl<B> Receiving<B> {
    pub(crate) fn new(body: B, expected: Expected, room: Room, connection: Taken) -> Self {
        let (message, since) = (Message::default(), Instant::now());
        Self { body, expected, message, room, connection, held: 0, since, timer: None }
    }

    /// Takes note of what came in.
    fn received(&mut self, data: &[u8]) -> Result<(), Status> {
        let was_whole = self.held == 0;
        let held = self.message.received(data);
        if self.expected == Expected::Many && (was_whole || held < self.held + data.len()) {
            // Another message than before is under way, or none.
            (self.since, self.timer) = (Instant::now(), None);
        }
        let before = std::mem::replace(&mut self.held, held);
        let Room { taken, bytes, share, .. } = &self.room;
        let (by_all, by_connection) = (taken.shift(before, held), self.connection.shift(before, held));
        if held > 0 && by_connection > *share {
            return Err(limit_exceeded("connection_receiving_bytes", *share));
        }
        if held > 0 && by_all > *bytes {
            return Err(limit_exceeded("receiving_bytes", *bytes));
        }
        Ok(())
    }

    /// Ready when what is under way should have been here.
    fn poll_late(&mut self, context: &mut Context<'_>) -> Poll<()> {
        if self.expected == Expected::Many && self.held == 0 {
            return Poll::Pending;
        }
        let end = self.since + self.room.time;
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
                let seconds = usize::try_from(self.room.time.as_secs()).unwrap_or(usize::MAX);
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
        self.room.taken.shift(self.held, 0);
        self.connection.shift(self.held, 0);
    }
}

/// How far the latest message has come in.
#[derive(Debug, Default)]
struct Message {
    prefix: [u8; PREFIX],
    /// Bytes of it that are here, prefix included; 0 between messages.
    here: usize,
    /// Bytes to come behind the prefix.
    missing: usize,
}

impl Message {
    /// Bytes of the message that is under way after `data`; 0 if none is.
    fn received(&mut self, mut data: &[u8]) -> usize {
        while !data.is_empty() {
            if let Some(prefix) = self.prefix.get_mut(self.here..).filter(|prefix| !prefix.is_empty()) {
                let (some, rest) = data.split_at(prefix.len().min(data.len()));
                prefix[..some.len()].copy_from_slice(some);
                (self.here, data) = (self.here + some.len(), rest);
                if self.here == PREFIX {
                    let [_, length @ ..] = self.prefix;
                    self.missing = u32::from_be_bytes(length) as usize;
                }
            } else {
                let count = self.missing.min(data.len());
                (self.here, self.missing, data) = (self.here + count, self.missing - count, &data[count..]);
            }
            if self.here >= PREFIX && self.missing == 0 {
                self.here = 0;
            }
        }
        self.here
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
        fn messages_are_told_apart_wherever_their_bytes_are_cut(
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

    /// A body that is fed by hand.
    type Fed = Receiving<http_body_util::StreamBody<Frames>>;

    /// A body on a connection of its own.
    fn fed(expected: Expected, room: &Room) -> (mpsc::UnboundedSender<Vec<u8>>, Fed) {
        fed_on(&Taken::default(), expected, room)
    }

    fn fed_on(connection: &Taken, expected: Expected, room: &Room) -> (mpsc::UnboundedSender<Vec<u8>>, Fed) {
        let (sender, receiver) = mpsc::unbounded_channel::<Vec<u8>>();
        let frames = UnboundedReceiverStream::new(receiver).map(|data| Ok(Frame::data(Bytes::from(data))));
        let body = http_body_util::StreamBody::new(Box::pin(frames) as Frames);
        (sender, Receiving::new(body, expected, room.clone(), connection.clone()))
    }

    async fn next(body: &mut Fed) -> Option<Result<Frame<Bytes>, Status>> {
        std::future::poll_fn(|context| Pin::new(&mut *body).poll_frame(context)).await
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_that_does_not_end_in_time_is_past_a_limit() {
        let (sender, mut body) = fed(Expected::One, &Room::new(1000));
        let began = Instant::now();
        sender.send(message(100)).expect("a reader");
        next(&mut body).await.expect("a frame").expect("the message");
        let status = next(&mut body).await.expect("an end").expect_err("no end in time");
        assert_eq!((status.code(), began.elapsed() >= TIME), (Code::ResourceExhausted, true));
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_may_rest_between_messages_and_not_in_one() {
        let (sender, mut body) = fed(Expected::Many, &Room::new(1000));
        for _ in 0..3 {
            let rest = tokio::time::timeout(TIME * 10, next(&mut body)).await;
            assert!(rest.is_err(), "nothing is wrong with silence");
            sender.send(message(100)).expect("a reader");
            next(&mut body).await.expect("a frame").expect("a message");
        }
        sender.send(message(100)[..50].to_vec()).expect("a reader");
        next(&mut body).await.expect("a frame").expect("half a message");
        let began = Instant::now();
        let trickle = async {
            loop {
                tokio::time::sleep(TIME / 20).await;
                let _ = sender.send(vec![7]);
            }
        };
        let status = tokio::select! {
            () = trickle => unreachable!("it goes on for ever"),
            status = async { loop { if let Err(status) = next(&mut body).await.expect("no end") { break status } } } => status,
        };
        assert_eq!(status.code(), Code::ResourceExhausted);
        assert!(began.elapsed() <= TIME, "{:?}", began.elapsed());
    }

    #[tokio::test]
    async fn messages_under_way_share_the_room_and_whole_ones_need_none() {
        let room = Room::new(1000);
        let (first, mut holding) = fed(Expected::Many, &room);
        first.send(message(2000)[..900].to_vec()).expect("a reader");
        next(&mut holding).await.expect("a frame").expect("there is room");
        let (second, mut other) = fed(Expected::One, &room);
        second.send(message(2000)[..200].to_vec()).expect("a reader");
        let status = next(&mut other).await.expect("a frame").expect_err("no room");
        assert_eq!(status.code(), Code::ResourceExhausted);
        drop(other);
        let (third, mut whole) = fed(Expected::One, &room);
        third.send(message(5000)).expect("a reader");
        next(&mut whole).await.expect("a frame").expect("it is whole");
        first.send(message(2000)[900..].to_vec()).expect("a reader");
        next(&mut holding).await.expect("a frame").expect("the rest");
        assert_eq!(room.taken.shift(0, 0), 0);
    }

    #[tokio::test]
    async fn a_connection_has_its_share_of_the_room_and_the_largest_message_fits() {
        assert_eq!(Room::new(1 << 30).share, 1 << 26);
        let room = Room::new(64 << 20);
        let (one, other) = (Taken::default(), Taken::default());
        let mut largest = message(MAX_MESSAGE_BYTES);
        let last = largest.split_off(largest.len() - 1);
        let (first, mut holding) = fed_on(&one, Expected::Many, &room);
        first.send(largest).expect("a reader");
        next(&mut holding).await.expect("a frame").expect("there is room");

        let (second, mut same) = fed_on(&one, Expected::Many, &room);
        second.send(message(2000)[..200].to_vec()).expect("a reader");
        let status = next(&mut same).await.expect("a frame").expect_err("no room");
        assert!(status.message().contains("connection_receiving_bytes"), "{status:?}");
        drop(same);
        let (third, mut another) = fed_on(&other, Expected::Many, &room);
        third.send(message(2000)[..200].to_vec()).expect("a reader");
        next(&mut another).await.expect("a frame").expect("it has a share of its own");

        first.send(last).expect("a reader");
        next(&mut holding).await.expect("a frame").expect("the rest");
        drop(another);
        assert_eq!([one, other, room.taken].map(|taken| taken.shift(0, 0)), [0; 3]);
    }
}
