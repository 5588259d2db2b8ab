//! What the answer to a unary call may take while it goes out: its caller takes it in time, and a large one is handed over in
//! pieces and keeps its turn until the last piece is gone.
//!
//! Streams are not meant: a keepalive stream or a watch lasts for as long as its caller likes. But a stream may have its call
//! reset.

use std::cell::Cell;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http_body::{Body, Frame};
use pin_project_lite::pin_project;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::time::{Sleep, sleep};
use tonic::codegen::Bytes;
use tonic::codegen::http::{HeaderMap, HeaderValue};
use tonic::{Response, Status};

use crate::engine;

/// How long a caller may take to take the answer to a unary call, or one on a keepalive stream.
pub(crate) const TIME: Duration = Duration::from_secs(10);
/// Large answers under way in the whole daemon.
const TURNS: usize = 32;
/// Bytes of an answer that are handed to its connection in one go. A connection asks for more only when its peer has taken
/// those before, so this is what it keeps of an answer that nobody takes.
pub(crate) const PIECE: usize = 16 * 1024;

thread_local! {
    /// Whether the call that this thread polls has begun to send the answer to a unary call.
    static BEGUN: Cell<bool> = const { Cell::new(false) };
    /// What resets the call that this thread polls.
    static RESET: Cell<Option<oneshot::Receiver<()>>> = const { Cell::new(None) };
}

/// Notes that the call which this thread polls sends the answer to a unary call from here on.
pub(crate) fn begin() {
    BEGUN.set(true);
}

/// What resets the call which this thread polls. A connection whose peer takes nothing does not ask the body of a stream for
/// anything, so the body could not end the stream.
pub(crate) fn resettable() -> oneshot::Sender<()> {
    let (sender, receiver) = oneshot::channel();
    RESET.set(Some(receiver));
    sender
}

pin_project! {
    /// A call that is dropped, and thereby reset, if the answer to it is not taken in time or its stream asks for that.
    pub(crate) struct Sending<F> {
        #[pin]
        call: F,
        // In a box, which is made for answers that have to wait for their caller, and for no streams.
        deadline: Option<Pin<Box<Sleep>>>,
        reset: Option<oneshot::Receiver<()>>,
    }
}

/// Runs a call until its answer has been taken, or should have been.
///
/// The deadline is not the body's: a connection asks the body for no more until its peer has taken what there was.
pub(crate) fn in_time<F: Future>(call: F) -> Sending<F> {
    Sending { call, deadline: None, reset: None }
}

impl<F: Future> Future for Sending<F> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let this = self.project();
        BEGUN.set(false);
        RESET.set(None);
        if this.call.poll(context).is_ready() {
            return Poll::Ready(());
        }
        if BEGUN.take() {
            *this.deadline = Some(Box::pin(sleep(TIME)));
        }
        if let Some(reset) = RESET.take() {
            *this.reset = Some(reset);
        }
        if let Some(Poll::Ready(asked)) = this.reset.as_mut().map(|reset| Pin::new(reset).poll(context)) {
            if asked.is_ok() {
                return Poll::Ready(());
            }
            // The stream has ended by itself.
            *this.reset = None;
        }
        this.deadline.as_mut().map_or(Poll::Pending, |deadline| deadline.as_mut().poll(context))
    }
}

/// The turns that large answers take. Clones are the same turns.
#[derive(Debug, Clone)]
pub(crate) struct Turns(Arc<Semaphore>);

impl Default for Turns {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(TURNS)))
    }
}

/// The turns of an answer that may be large: one among those of its caller, and one of the whole daemon if the answer is large.
/// Dropping them ends them.
#[derive(Debug)]
pub(crate) struct Turn {
    _of_caller: engine::Turn,
    of_all: Option<OwnedSemaphorePermit>,
}

impl Turns {
    /// Adds a turn of the whole daemon to one of a caller, if there is one to be had. Those who wait in [`Self::take`] go
    /// first.
    pub(crate) fn try_take(&self, of_caller: engine::Turn) -> Turn {
        Turn { _of_caller: of_caller, of_all: Arc::clone(&self.0).try_acquire_owned().ok() }
    }

    /// Waits for a turn of the whole daemon, unless there is one in `turn` already.
    pub(crate) async fn take(&self, turn: &mut Turn) {
        if turn.of_all.is_none() {
            // Nobody closes it.
            turn.of_all = Arc::clone(&self.0).acquire_owned().await.ok();
        }
    }
}

impl Turn {
    /// Whether the answer may be large.
    pub(crate) fn is_of_all(&self) -> bool {
        self.of_all.is_some()
    }

    /// Gives back the turn of the whole daemon.
    pub(crate) fn leave_all(&mut self) {
        self.of_all = None;
    }
}

/// Takes the next [`PIECE`] of a message that has not been handed over whole. A copy: a part of a shared buffer would keep
/// all of it for as long as the connection has the part.
pub(crate) fn piece(rest: &mut Bytes) -> Frame<Bytes> {
    let piece = rest.split_to(PIECE.min(rest.len()));
    Frame::data(Bytes::copy_from_slice(&piece))
}

/// The body of a large answer: its message in pieces, and the trailers.
#[derive(Debug, Clone)]
pub(crate) struct Large {
    /// What goes before the message.
    prefix: Option<Bytes>,
    /// What is left of the message.
    rest: Bytes,
    has_trailers: bool,
    _turn: Arc<Turn>,
}

/// An answer whose message is encoded already. The layer that bounds calls sends [`Large`] in place of `T`.
pub(crate) fn encoded<T: Default>(message: Vec<u8>, turn: Turn) -> Response<T> {
    let mut answer = Response::new(T::default());
    answer.extensions_mut().insert(Large::new(message, turn));
    answer
}

impl Large {
    fn new(message: Vec<u8>, turn: Turn) -> Self {
        // A message begins with a flag, 0 for "not compressed", and its length. None is larger than 4 MiB.
        let length = u32::try_from(message.len()).unwrap_or(u32::MAX);
        let prefix = Bytes::from([&[0][..], &length.to_be_bytes()].concat());
        Self { prefix: Some(prefix), rest: message.into(), has_trailers: true, _turn: Arc::new(turn) }
    }
}

impl Body for Large {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if let Some(prefix) = self.prefix.take() {
            return Poll::Ready(Some(Ok(Frame::data(prefix))));
        }
        if !self.rest.is_empty() {
            return Poll::Ready(Some(Ok(piece(&mut self.rest))));
        }
        let trailers = || HeaderMap::from_iter([(Status::GRPC_STATUS, HeaderValue::from_static("0"))]);
        let is_due = std::mem::take(&mut self.has_trailers);
        Poll::Ready(is_due.then(|| Ok(Frame::trailers(trailers()))))
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use futures_util::FutureExt;

    use super::*;
    use crate::engine::Caller;

    #[tokio::test]
    async fn a_large_answer_goes_out_whole_in_pieces_and_keeps_its_turn_until_its_end() {
        let turns = Turns::default();
        let turn = turns.try_take(Caller::new().turn().await);
        let message: Vec<u8> = (0..PIECE * 3 + 7).map(|byte| byte.to_le_bytes()[0]).collect();
        let mut answer: Response<()> = encoded(message.clone(), turn);
        let mut body = answer.extensions_mut().remove::<Large>().expect("a body");
        let (mut sent, mut trailers) = (Vec::new(), None);
        while let Some(frame) = poll_fn(|context| Pin::new(&mut body).poll_frame(context)).await {
            match frame.expect("a frame").into_data() {
                Ok(data) => {
                    assert!(data.len() <= PIECE && trailers.is_none());
                    sent.extend(data);
                }
                Err(frame) => trailers = frame.into_trailers().ok(),
            }
            assert_eq!(turns.0.available_permits(), TURNS - 1);
        }
        let length = u32::try_from(message.len()).expect("a length").to_be_bytes();
        assert!(sent == [&[0][..], &length, &message].concat());
        assert_eq!(trailers.expect("trailers")[Status::GRPC_STATUS], "0");
        drop(body);
        assert_eq!(turns.0.available_permits(), TURNS);
    }

    #[tokio::test]
    async fn answers_of_all_callers_share_the_turns_and_those_that_wait_go_first() {
        let (turns, mut taken) = (Turns::default(), Vec::new());
        let one = async || turns.try_take(Caller::new().turn().await);
        for _ in 0..TURNS {
            taken.push(one().await);
        }
        assert!(taken.iter().all(Turn::is_of_all) && !one().await.is_of_all());
        let mut waiting = one().await;
        let mut wait = Box::pin(turns.take(&mut waiting));
        assert!(wait.as_mut().now_or_never().is_none());
        taken[0].leave_all();
        assert!(!one().await.is_of_all());
        wait.await;
        assert!(waiting.is_of_all());
    }
}
