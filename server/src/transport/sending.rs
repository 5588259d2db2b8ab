//! Bounds the response to a unary call while it is sent.
//!
//! The caller must read the response in time. A large response is sent in chunks and keeps its
//! permit until the last chunk has been handed to the connection. Otherwise each call of a
//! connection that reads nothing would keep its response in memory, and many pages to encode would
//! keep the runtime from its sockets.
//!
//! A keepalive stream or a watch may last for as long as its caller likes, so it has no deadline.
//! But a stream can have its call reset.

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

/// How long a caller may take to read the response to a unary call, or an answer on a keepalive
/// stream.
pub(crate) const SEND_TIMEOUT: Duration = Duration::from_secs(10);
/// How many large responses the whole daemon sends at once.
const LARGE_RESPONSES: usize = 32;
/// How many bytes of a response are handed to its connection at a time. A connection asks for the
/// next chunk when its peer has read the one before. So a connection keeps about this much of a
/// response that its caller does not read.
pub(crate) const CHUNK_BYTES: usize = 16 * 1024;

thread_local! {
    /// Whether the call that this thread polls is unary and has begun to send its response.
    static DEADLINE_STARTS: Cell<bool> = const { Cell::new(false) };
    /// Resets the call that this thread polls.
    static RESET: Cell<Option<oneshot::Receiver<()>>> = const { Cell::new(None) };
}

/// Starts the deadline for reading the response of the unary call that this thread polls.
pub(crate) fn start_deadline() {
    DEADLINE_STARTS.set(true);
}

/// Returns a sender that resets the call that this thread polls.
///
/// The body of a stream could not end the stream itself: a connection whose peer reads nothing does
/// not poll the body.
pub(crate) fn reset_handle() -> oneshot::Sender<()> {
    let (sender, receiver) = oneshot::channel();
    RESET.set(Some(receiver));
    sender
}

pin_project! {
    /// The task of a call. Ends, which resets the call, if its response is not read in time or if
    /// its stream asks for a reset.
    pub(crate) struct Sending<F> {
        #[pin]
        call: F,
        // Boxed, because only a response that waits for its caller needs a timer, and a stream
        // never does.
        deadline: Option<Pin<Box<Sleep>>>,
        reset: Option<oneshot::Receiver<()>>,
    }
}

/// Runs a call until its response has been read or the deadline for reading it has passed.
///
/// The body could not enforce the deadline, because a connection does not poll it until the peer
/// has read what was sent before.
pub(crate) fn in_time<F: Future>(call: F) -> Sending<F> {
    Sending { call, deadline: None, reset: None }
}

impl<F: Future> Future for Sending<F> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let this = self.project();
        // The call sets these while it is polled. Code deep inside the service has no other way to
        // reach its task.
        DEADLINE_STARTS.set(false);
        RESET.set(None);
        if this.call.poll(context).is_ready() {
            return Poll::Ready(());
        }
        if DEADLINE_STARTS.take() {
            *this.deadline = Some(Box::pin(sleep(SEND_TIMEOUT)));
        }
        if let Some(reset) = RESET.take() {
            *this.reset = Some(reset);
        }
        if let Some(Poll::Ready(asked)) = this.reset.as_mut().map(|reset| Pin::new(reset).poll(context)) {
            if asked.is_ok() {
                return Poll::Ready(());
            }
            // The sender was dropped without a reset.
            *this.reset = None;
        }
        this.deadline.as_mut().map_or(Poll::Pending, |deadline| deadline.as_mut().poll(context))
    }
}

/// The permits to send large responses. Clones share the permits.
#[derive(Debug, Clone)]
pub(crate) struct ResponsePermits(Arc<Semaphore>);

impl Default for ResponsePermits {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(LARGE_RESPONSES)))
    }
}

/// Permits a response. Has one of its caller's turns, and one of the daemon's permits if the response
/// may be large.
#[derive(Debug)]
pub(crate) struct ResponsePermit {
    _caller_turn: engine::Turn,
    large: Option<OwnedSemaphorePermit>,
}

impl ResponsePermits {
    /// Returns a permit for a large response if one of the daemon's is free, else one for a small
    /// response.
    pub(crate) fn try_acquire(&self, caller_turn: engine::Turn) -> ResponsePermit {
        ResponsePermit { _caller_turn: caller_turn, large: Arc::clone(&self.0).try_acquire_owned().ok() }
    }

    /// Waits until `permit` allows a large response. Calls that wait here come before calls of
    /// [`Self::try_acquire`].
    pub(crate) async fn acquire(&self, permit: &mut ResponsePermit) {
        if permit.large.is_none() {
            // Acquiring fails only if the semaphore is closed, and it never is.
            permit.large = Arc::clone(&self.0).acquire_owned().await.ok();
        }
    }
}

impl ResponsePermit {
    /// Returns true if the response may be large.
    pub(crate) fn allows_large(&self) -> bool {
        self.large.is_some()
    }

    /// Gives the daemon's permit back, because the response has turned out to be small.
    pub(crate) fn give_up_large(&mut self) {
        self.large = None;
    }
}

/// Takes the next [`CHUNK_BYTES`] of a message.
pub(crate) fn next_chunk(rest: &mut Bytes) -> Frame<Bytes> {
    let chunk = rest.split_to(CHUNK_BYTES.min(rest.len()));
    // A copy: a slice would keep the whole message in memory for as long as the connection has the
    // slice.
    Frame::data(Bytes::copy_from_slice(&chunk))
}

/// The body of a large response: its message in chunks, and then the trailers.
#[derive(Debug, Clone)]
pub(crate) struct LargeBody {
    /// The bytes that precede the message, until they are handed out.
    prefix: Option<Bytes>,
    /// The part of the message that has not been handed out.
    rest: Bytes,
    has_trailers: bool,
    _permit: Arc<ResponsePermit>,
}

/// Returns a response whose message is encoded already. [`BoundsLayer`](super::bounds::BoundsLayer)
/// sends the [`LargeBody`] in place of `T`.
pub(crate) fn encoded<T: Default>(message: Vec<u8>, permit: ResponsePermit) -> Response<T> {
    let mut response = Response::new(T::default());
    response.extensions_mut().insert(LargeBody::new(message, permit));
    response
}

impl LargeBody {
    fn new(message: Vec<u8>, permit: ResponsePermit) -> Self {
        // The prefix is a flag, 0 for "not compressed", and the length. No message is larger than 4
        // MiB.
        let length = u32::try_from(message.len()).unwrap_or(u32::MAX);
        let prefix = Bytes::from([&[0][..], &length.to_be_bytes()].concat());
        Self { prefix: Some(prefix), rest: message.into(), has_trailers: true, _permit: Arc::new(permit) }
    }
}

impl Body for LargeBody {
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
            return Poll::Ready(Some(Ok(next_chunk(&mut self.rest))));
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
    async fn a_large_response_is_sent_in_chunks_and_keeps_its_permit_until_its_end() {
        let permits = ResponsePermits::default();
        let permit = permits.try_acquire(Caller::new().turn().await);
        let message: Vec<u8> = (0..CHUNK_BYTES * 3 + 7).map(|byte| byte.to_le_bytes()[0]).collect();
        let mut response: Response<()> = encoded(message.clone(), permit);
        let mut body = response.extensions_mut().remove::<LargeBody>().expect("a body");
        let (mut sent, mut trailers) = (Vec::new(), None);
        while let Some(frame) = poll_fn(|context| Pin::new(&mut body).poll_frame(context)).await {
            match frame.expect("a frame").into_data() {
                Ok(data) => {
                    assert!(data.len() <= CHUNK_BYTES && trailers.is_none());
                    sent.extend(data);
                }
                Err(frame) => trailers = frame.into_trailers().ok(),
            }
            assert_eq!(permits.0.available_permits(), LARGE_RESPONSES - 1);
        }
        let length = u32::try_from(message.len()).expect("a length").to_be_bytes();
        assert!(sent == [&[0][..], &length, &message].concat());
        assert_eq!(trailers.expect("trailers")[Status::GRPC_STATUS], "0");
        drop(body);
        assert_eq!(permits.0.available_permits(), LARGE_RESPONSES);
    }

    #[tokio::test]
    async fn large_responses_of_all_callers_share_the_permits_and_waiting_ones_come_first() {
        let (permits, mut acquired) = (ResponsePermits::default(), Vec::new());
        let one = async || permits.try_acquire(Caller::new().turn().await);
        for _ in 0..LARGE_RESPONSES {
            acquired.push(one().await);
        }
        assert!(acquired.iter().all(ResponsePermit::allows_large) && !one().await.allows_large());
        let mut waiting = one().await;
        let mut wait = Box::pin(permits.acquire(&mut waiting));
        assert!(wait.as_mut().now_or_never().is_none());
        acquired[0].give_up_large();
        assert!(!one().await.allows_large());
        wait.await;
        assert!(waiting.allows_large());
    }
}
